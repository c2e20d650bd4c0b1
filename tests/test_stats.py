"""Statistics, and what the log tells of clients."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from nbd import *

BLOCK, MIB = 4096, 1 << 20
SIZE = 4 * MIB
hazard = pytest.mark.hazard
DID = re.compile(r"(?P<reads>\d+) reads (?P<read>\d+ [KMGT]?i?B), (?P<writes>\d+) writes "
                 r"(?P<written>\d+ [KMGT]?i?B), (?P<flushes>\d+) flushes, (?P<others>\d+) others, "
                 r"(?P<errors>\d+) errors, p50 (?P<p50>\d+) us, p99 (?P<p99>\d+) us, "
                 r"max (?P<max>\d+) us$")


def peer(c):
    return "%s:%d" % c.sock.getsockname()


def lines_of(s, c):
    """What the log says of a client."""
    return [line.split(f"{c if isinstance(c, str) else peer(c)}: ", 1)[1]
            for line in s.log().splitlines()
            if f" {c if isinstance(c, str) else peer(c)}: " in line]


def did(text):
    """A description as {name: number or text}."""
    found = DID.search(text)
    assert found, text
    values = found.groupdict()
    return {k: v if k in ("read", "written") else int(v) for k, v in values.items()}


def ended(s, name):
    """The line of a client's end."""
    until(lambda: any("disconnected" in line for line in lines_of(s, name)), what="its end")
    return lines_of(s, name)[-1]


@pytest.fixture
def image(disk):
    return disk(SIZE, sparse=False)


# The last line of a client

def test_end_tells_what_a_client_did(server, image):
    s = server(image)
    c = s.client(structured=True, contexts=["base:allocation"])
    name = peer(c)
    for i in range(5):
        c.pread(BLOCK, i * BLOCK)
    c.pread(MIB, 0)                         # from the mapping
    c.pwrite(b"x" * 3 * BLOCK, 0)
    c.pwrite(b"", 0)
    c.flush()
    c.trim(BLOCK, 0)
    c.zero(BLOCK, 0)
    c.block_status(BLOCK, 0)
    assert c.error_of(NBD_CMD_READ, SIZE, 1) == NBD_EINVAL
    assert c.error_of(99) == NBD_EINVAL
    c.disc()
    text = ended(s, name)
    assert text.startswith("disconnected: client left; ")
    values = did(text)
    assert {k: values[k] for k in ("reads", "read", "writes", "written", "flushes", "others",
                                   "errors")} == {
        "reads": 7, "read": "1044 KiB", "writes": 2, "written": "12 KiB", "flushes": 1, "others": 4, "errors": 2}
    assert values["p50"] <= values["p99"] <= values["max"] < 60 * 10**6


def test_end_of_who_did_nothing_is_short(server, image):
    s = server(image)
    c = s.client()
    name = peer(c)
    c.disc()
    assert ended(s, name) == "disconnected: client left"


def test_payload_that_comes_slowly_counts_from_its_beginning(server, image):
    """And so does whatever is not answered at once."""
    s = server(image)
    c = s.client()
    name = peer(c)
    c.pread(BLOCK)
    c.send(request_header(NBD_CMD_WRITE, 0, 2 * BLOCK) + b"x" * BLOCK)
    with s.client() as other:
        begun = time.monotonic()
        while time.monotonic() - begun < 0.2:
            other.pread(BLOCK)
    c.send(b"x" * BLOCK)
    assert c.recv(16)[4:8] == bytes(4)
    c.send(request_header(NBD_CMD_DISC))
    values = did(ended(s, name))
    assert values["max"] >= 190000 and values["p50"] < 190000
    assert (values["writes"], values["written"]) == (1, "8192 B")


# --stats, SIGRTMIN

def reports(s, name):
    """What was told of a client, or of "all clients", up to now."""
    return [did(line) for line in lines_of(s, name)
            if DID.match(line) and not line.startswith("disconnected")]


def total(found, name="reads"):
    return sum(one[name] for one in found)


def test_intervals_add_up(server, image):
    """Each client's lines tell what it did since the one before; who did nothing has none."""
    s = server(image, "--stats", "1")
    a, b, idle = s.client(), s.client(), s.client()
    for n in range(1, 4):
        for _ in range(10 * n):
            a.pread(BLOCK)
        b.pwrite(b"x" * BLOCK)
        until(lambda: total(reports(s, peer(a))) == 5 * n * (n + 1)
              and total(reports(s, peer(b)), "writes") == n, what="the next report")
    until(lambda: total(reports(s, "all clients")) == 60, what="the last total")
    assert not reports(s, peer(idle))
    assert total(reports(s, "all clients"), "writes") == 3
    assert len(reports(s, peer(a))) >= 3


@hazard("a timer that ticks for nobody")
def test_no_timer_ticks_for_nobody(server, image):
    """And what was told is not told again, when nobody does anything."""
    s = server(image, "--stats", "1")
    with s.client() as c:
        c.pread(BLOCK)
        name = peer(c)
        until(lambda: reports(s, name), what="a report")
        c.disc()
    ended(s, name)
    s.settle()
    before = switches(s)
    time.sleep(2.2)
    assert switches(s) == before
    assert len(reports(s, "all clients")) == 1


def switches(s):
    """How often a thread of the server went to sleep."""
    tasks = Path(f"/proc/{s.proc.pid}/task").iterdir()
    return sum(int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text(),
                             re.M)[1]) for task in tasks)


def test_signal_tells_all_since_the_beginning(server, image):
    """Once for each signal, and those who have left are in the total."""
    s = server(image)
    with s.client() as c:
        c.pread(BLOCK)
        name = peer(c)
        c.disc()
        ended(s, name)
    c = s.client()
    for n in range(1, 3):
        c.pread(BLOCK)
        s.proc.send_signal(signal.SIGRTMIN)
        until(lambda: len(reports(s, "all clients")) == n, what="the report")
    assert [one["reads"] for one in reports(s, peer(c))] == [1, 2]
    assert [one["reads"] for one in reports(s, "all clients")] == [2, 3]


@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
def test_signal_before_the_first_client(server, image, mode):
    s = server(args=[mode, "--laddr", "127.0.0.1", "--lport", "0", "--quiet", "--pidfile",
                     image.with_suffix(".pid"), image], wait=False)
    until(lambda: image.with_suffix(".pid").exists(), what="the server")
    s.proc.send_signal(signal.SIGRTMIN)
    until(lambda: "all clients: 0 reads" in s.log(), what="the report")
    s.stop()
    assert s.log().count("\n") == 1


# Errors

def cut_off(server, image, *options):
    """A server whose image ends early, and a client."""
    s = server(image, *options)
    c = s.client()
    os.truncate(image, SIZE // 2)
    return s, c


def test_error_is_logged_with_request_and_reason(server, image):
    s, c = cut_off(server, image)
    assert c.error_of(NBD_CMD_READ, SIZE // 2 + BLOCK, BLOCK) == NBD_EIO
    until(lambda: len(lines_of(s, c)) == 2, what="the error")
    assert re.fullmatch(rf"READ of 4096 bytes at {SIZE // 2 + BLOCK} failed: .*error",
                        lines_of(s, c)[1])


@hazard("a client floods the log")
@pytest.mark.parametrize("options, command, offset, length", [
    (["--verbose"], NBD_CMD_READ, SIZE, BLOCK), (["--verbose"], 77, 0, 0),
    (["--verbose"], NBD_CMD_WRITE, SIZE, 1), ([], NBD_CMD_READ, SIZE // 2, BLOCK)],
    ids=["past the end", "unknown", "write", "broken image"])
def test_errors_do_not_flood_the_log(server, image, options, command, offset, length):
    """Two lines a second at most, and none is lost from the count."""
    s, c = cut_off(server, image, *options)
    begun, errors, bare = time.monotonic(), 0, len(lines_of(s, c))
    payload = b"x" * length if command == NBD_CMD_WRITE else b""
    while time.monotonic() - begun < 2.5:
        for _ in range(100):
            c.request(command, offset, length, payload=payload)
        replies = c.collect_all().values()
        assert all(reply.error for reply in replies)
        errors += 100

    def told():
        found = lines_of(s, c)[bare:]
        return (sum(" failed: " in line or " refused: " in line for line in found)
                + sum(int(line.split()[2]) for line in found if line.endswith(" more")))

    until(lambda: told() == errors, what="all of them")
    assert len(lines_of(s, c)) - bare <= 2 * (time.monotonic() - begun) + 4


def test_what_was_not_told_is_told_at_the_end(server, image):
    s, c = cut_off(server, image)
    for _ in range(3):
        assert c.error_of(NBD_CMD_READ, SIZE // 2, BLOCK) == NBD_EIO
    name = peer(c)
    c.disc()
    assert did(ended(s, name))["errors"] == 3
    assert lines_of(s, name)[-2] == "... and 2 more"


REFUSED = [
    # command, offset, length, what the line must tell
    (NBD_CMD_READ, SIZE, 1, "READ of 1 bytes at 4194304 refused: it passes the end"),
    (NBD_CMD_READ, 0, 33 * MIB, "READ of 34603008 bytes at 0 refused: it is too long"),
    (77, 5, 6, "command 77 of 6 bytes at 5 refused: the command"),
    (NBD_CMD_TRIM, 0, 1, "TRIM of 1 bytes at 0 refused: the export is read-only"),
    (NBD_CMD_FLUSH, 0, 1, "FLUSH of 1 bytes at 0 refused: the command, its flags"),
]


@pytest.mark.parametrize("command, offset, length, text", REFUSED,
                         ids=[text.split()[0] + str(i) for i, (*_, text) in enumerate(REFUSED)])
def test_verbose_tells_what_was_refused_and_why(server, image, command, offset, length, text):
    s = server(image, "--readonly", "--verbose")
    c = s.client()
    assert c.error_of(command, offset, length)
    until(lambda: text in s.log(), what=text)


def test_without_verbose_what_was_refused_is_not_told(server, image):
    s = server(image, "--readonly")
    with s.client() as c:
        for command, offset, length, _ in REFUSED:
            assert c.error_of(command, offset, length)
        name = peer(c)
        c.disc()
    assert did(ended(s, name))["errors"] == len(REFUSED)
    assert len(lines_of(s, name)) == 2


def test_verbose_tells_what_was_negotiated(server, image):
    s = server(image, "--verbose")
    c = s.client(name="of any name", structured=True, contexts=["base:allocation"])
    until(lambda: len(lines_of(s, c)) == 2, what="the negotiation")
    assert re.fullmatch(rf"export '' of {SIZE} bytes, flags 0x[0-9a-f]+, structured replies, "
                        "base:allocation", lines_of(s, c)[1])


def test_quiet_tells_errors_alone(server, image):
    log = image.with_suffix(".log")
    path = image.with_suffix(".sock")
    s = server(image, "--quiet", "--unix", path, "--logpath", log, wait=False)
    s.address = str(path)
    c = until(lambda: client_of(s), what="the server")
    os.truncate(image, 0)
    assert c.error_of(NBD_CMD_READ, 0, BLOCK) == NBD_EIO
    c.disc()
    s.stop()
    text = re.sub(r"(?m)^\S+Z: ", "", s.log())
    assert text.startswith("unix client ") and text.count("\n") == 1, text
    assert "READ of 4096 bytes at 0 failed" in text


def client_of(s):
    try:
        return s.client()
    except OSError:
        return None
