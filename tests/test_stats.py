"""Statistics, and what the log tells of clients."""

import contextlib
import fcntl
import os
import re
import select
import signal
import stat
import struct
import termios
import threading
import time
from pathlib import Path

import pytest

from conftest import terminal
from nbd import *
from test_control import (Control, bgctl, check_state, done, end_of, refused_in_one_line,
                          start_bgctl, state, subset)
from test_faults import HOLD, library
from test_hazards import calls, wait_held

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


@pytest.mark.parametrize("first", [100, BLOCK])     # with a block of it, or with less
def test_payload_that_comes_slowly_counts_from_its_beginning(server, image, first):
    """And so does whatever is not answered at once."""
    s = server(image)
    c = s.client()
    name = peer(c)
    c.pread(BLOCK)
    c.send(request_header(NBD_CMD_WRITE, 0, 2 * BLOCK) + b"x" * first)
    with s.client() as other:
        begun = time.monotonic()
        while time.monotonic() - begun < 0.2:
            other.pread(BLOCK)
    c.send(b"x" * (2 * BLOCK - first))
    assert c.recv(16)[4:8] == bytes(4)
    c.send(request_header(NBD_CMD_DISC))
    values = did(ended(s, name))
    assert 190000 <= values["max"] < 60 * 10**6 and values["p50"] < 190000
    assert (values["writes"], values["written"]) == (1, "8192 B")


def test_read_that_waited_is_counted_once(server, disk, tmp_path):
    """Large ones, which are sent out of the file when they are there, among them."""
    origin = server(disk(content=b"x" * SIZE))
    s = server(args=["--proxy", "--laddr", "127.0.0.1", "--lport", "0", "127.0.0.1", origin.port,
                     tmp_path / "cache", tmp_path / "bitmap", tmp_path / "control"])
    c = s.client()
    name = peer(c)
    for offset, length in ((3 * MIB, BLOCK), (2 * MIB, 16 * BLOCK), (0, 64 * BLOCK)):
        c.pread(length, offset)             # from the origin
        c.pread(length, offset)
    c.disc()
    values = did(ended(s, name))
    assert (values["reads"], values["read"]) == (6, "648 KiB")


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


@pytest.mark.skipif("TSAN_OPTIONS" in os.environ, reason="TSan has a thread that ticks")
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
    (NBD_CMD_READ, 0, 65 * MIB, "READ of 68157440 bytes at 0 refused: it is too long"),
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


# The control socket of each mode

@pytest.fixture
def controlled(server, image):
    """controlled(mode, *options): a server with a .control."""
    def start(mode="--target", *options, **popen):
        control = image.with_suffix(".ctl")
        s = server(args=[mode, "--laddr", "127.0.0.1", "--lport", "0", "--ctl", control, *options,
                         image], **popen)
        s.control = control
        return s

    return start


modes = pytest.mark.parametrize("mode", ["--target", "--cow-target"])


@modes
def test_query_tells_what_each_client_did(controlled, image, mode):
    s = controlled(mode)
    a, b = s.client(), s.client()
    a.pread(BLOCK)
    a.pwrite(b"x" * BLOCK * 2)
    b.flush()
    assert b.error_of(77) == NBD_EINVAL
    until(lambda: state(s.control)["clients"] == 2, what="two clients")
    values = check_state(state(s.control))
    assert values["mode"] == mode[2:] and values["image"] == str(image)
    assert values["size"] == SIZE and values["readonly"] is False and values["snapshot"] == "idle"
    first, second = sorted(values["client"], key=lambda c: -c["reads"])
    assert (first["address"], second["address"]) == (peer(a), peer(b))
    wanted = {"reads": 1, "writes": 1, "read-bytes": BLOCK, "written-bytes": 2 * BLOCK,
              "flushes": 0, "others": 0, "errors": 0, "in-flight": 0}
    assert wanted.items() <= first.items()
    assert {"flushes": 1, "others": 1, "errors": 1, "reads": 0}.items() <= second.items()
    assert first["p50-us"] <= first["p99-us"] <= first["max-us"]
    assert (values["reads"], values["writes"], values["flushes"], values["others"],
            values["errors"]) == (1, 1, 1, 1, 1)


def test_delays_are_counted_by_powers_of_two(controlled, image):
    """Half and 99 of 100 are rounded up to these, but not above the longest."""
    s = controlled()
    with s.client() as c:
        for n in range(100):
            c.pread(BLOCK, n * BLOCK)
        values = check_state(state(s.control))
    delays = dict(values["delays-us"])
    assert sum(delays.values()) == values["reads"] == 100
    assert all(top & (top + 1) == 0 for top in delays)
    for percent in 50, 99:
        reached = min(top for top in delays
                      if sum(n for t, n in delays.items() if t <= top) >= percent)
        assert values[f"p{percent}-us"] == min(reached, values["max-us"])


@hazard("an answer that is older than its question")
@modes
def test_query_counts_what_was_answered_before(controlled, mode):
    """However many ask at the same time; and those who have left count, too."""
    s = controlled(mode)
    others = [Control(s.control) for _ in range(5)]
    with s.client() as c:
        for n in range(1, 50):
            c.pread(512)
            for one in others:
                one.send(b"query\n")
            for one in others:
                lines = dict(line.split(": ", 1) for line in one.lines()[:-1])
                assert lines["reads"] == str(n)
        c.disc()
    until(lambda: state(s.control)["clients"] == 0, what="its end")
    values = state(s.control)
    assert values["reads"] == 49 and values["client"] == []
    for one in others:
        one.close()


@modes
def test_commands_of_a_proxy_are_refused_elsewhere(controlled, mode):
    s = controlled(mode)
    for command in "--cache-all", "--cache-all2", "--switch":
        refused_in_one_line(bgctl(command, s.control), 1, "for a proxy")
    refused_in_one_line(bgctl("--reconnect", s.control, "host", "1"), 1, "for a proxy")
    c = Control(s.control)
    assert c.ask("stop-copy") == ["error: that command is for a proxy, and this server is none"]
    assert c.ask("help") == ["command: help", "command: query [json]", "command: snapshot [EXPORT_NAME]",
                             "ok"]
    c.close()
    assert s.is_served()


def test_control_socket_is_private_and_removed(controlled, run_server, image):
    s = controlled()
    assert stat.S_IMODE(os.stat(s.control).st_mode) == 0o600
    live = run_server("--target", "--unix", image.with_suffix(".sock"), "--ctl", s.control, image)
    assert live.returncode == 1 and str(s.control) in live.stderr
    s.kill()
    s = controlled()
    assert state(s.control)["mode"] == "target"
    s.stop()
    assert not s.control.exists()


def test_control_option_is_not_for_a_proxy(run_server, tmp_path):
    ended = run_server("--proxy", "--ctl", tmp_path / "other", "unix:sock", tmp_path / "cache",
                      tmp_path / "map", tmp_path / "ctl")
    assert ended.returncode == 2 and "--ctl" in ended.stderr and "CONTROL_SOCKET" in ended.stderr
    assert not list(tmp_path.iterdir())


@hazard("a disk that hangs: the control socket answers")
def test_query_does_not_wait_for_a_thread_that_hangs(controlled, image, calls):
    s = controlled("--target", env=calls.environment)
    a, b = s.client(), s.client()
    a.pread(BLOCK)
    b.pread(BLOCK)
    calls.arm("pwrite", HOLD)
    a.request(NBD_CMD_WRITE, 0, payload=b"x" * BLOCK)
    wait_held(calls)
    values = check_state(state(s.control))
    assert [(one["address"], one["reads"]) for one in values["client"]] == [(peer(a), 1), (peer(b), 1)]
    assert (values["clients"], values["reads"], values["writes"]) == (2, 2, 0)
    b.pread(BLOCK)
    assert state(s.control)["reads"] == 3
    calls.release()
    a.collect_all()
    assert state(s.control)["writes"] == 1


# Snapshots

def snapshots(image):
    return sorted(path.name for path in image.parent.glob(image.name + ".snapshot.*"))


def test_snapshot_command_tells_the_path_when_it_is_complete(controlled, image):
    s = controlled()
    c = s.client()
    c.pwrite(b"before" * 1000, 5000)
    before = image.read_bytes()
    path = Path(done(bgctl("--snapshot", s.control), out=None).stdout.rstrip("\n"))
    assert path.name in snapshots(image) and path.read_bytes() == before
    c.pwrite(b"after" * 1000, 5000)
    assert path.read_bytes() == before
    subset(state(s.control), snapshot="idle", snapshot_last=str(path))


def test_snapshot_that_fails_is_an_error(controlled, image, tmp_path):
    s = controlled()
    elsewhere = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(elsewhere)
    refused_in_one_line(bgctl("--snapshot", elsewhere / s.control.name), 1, "No such file")
    assert "No such file" in state(elsewhere / s.control.name)["snapshot-error"]
    elsewhere.rename(tmp_path)
    done(bgctl("--snapshot", s.control), out=None)
    assert "snapshot-error" not in state(s.control)


def test_snapshot_is_refused_in_copy_on_write_mode(controlled):
    refused_in_one_line(bgctl("--snapshot", controlled("--cow-target").control), 1, "target mode")


def held_snapshot(controlled, image, calls):
    """A server whose snapshot cannot end, and who waits for it."""
    s = controlled("--target", env=calls.environment)
    calls.arm("fsync", HOLD)
    first = Control(s.control)
    first.send(b"snapshot\n")
    wait_held(calls)
    assert state(s.control)["snapshot"] == "running"
    return s, first


@hazard("an answer that is older than its question: a snapshot")
def test_snapshot_asked_for_during_another_is_made_afterwards(controlled, image, calls):
    s, first = held_snapshot(controlled, image, calls)
    later = [Control(s.control) for _ in range(2)]
    with s.client() as c:
        c.pwrite(b"later", 0)
    for one in later:
        one.send(b"snapshot\n")
    state(s.control)                        # they have been heard
    calls.release()
    path, end = first.lines()
    assert end == "ok"
    answers = [one.lines() for one in later]
    assert answers[0] == answers[1] and answers[0][0] != path
    old, new = (Path(line.removeprefix("snapshot: ")) for line in (path, answers[0][0]))
    assert old.read_bytes()[:5] != b"later" and new.read_bytes()[:5] == b"later"
    for one in [first, *later]:
        one.close()


def test_client_that_left_does_not_stop_its_snapshot(controlled, image, calls):
    s, first = held_snapshot(controlled, image, calls)
    first.close()
    state(s.control)
    calls.release()
    until(lambda: snapshots(image), what="the snapshot")


# --watch

RATES = re.compile(r"(\d+) requests/s, (\d+\.\d) MiB/s read, (\d+\.\d) MiB/s written, ")
TOTAL = re.compile(RATES.pattern + r"p99 (\d+) us, (\d+) clients, (\d+) errors")


class Terminal:
    """xnbd-bgctl --watch on a terminal of that size."""

    def __init__(self, control, width=80, height=24, *options):
        self.master, slave = terminal()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.process = start_bgctl("--watch", *options, control, stdout=slave)
        os.close(slave)
        self.drawn = b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        with contextlib.suppress(OSError):      # Linux: EIO when the other end has gone
            while part := os.read(self.master, 65536):
                self.drawn += part

    def frames(self):
        """The lines of each frame that is complete."""
        text = self.drawn.decode().replace("\r\n", "\n")
        whole = text.split("\033[H\033[?7l")[1:]     # lines that are too long do not wrap
        return [frame.split("\033[J\033[?7h")[0].replace("\033[K", "").split("\n")[:-1]
                for frame in whole if "\033[J\033[?7h" in frame]

    def end(self):
        """How the program ended, and what it said."""
        result = end_of(self.process)
        self.reader.join(DEADLINE)
        os.close(self.master)
        return result


def test_watch_shows_rates_clients_and_state(controlled, image):
    """A client that does nothing has no line."""
    s = controlled()
    idle, busy = s.client(), s.client()
    t = Terminal(s.control)

    def seen():
        busy.pread(MIB, 0)
        busy.pwrite(b"x" * MIB, 0)
        found = [TOTAL.match(frame[0]) for frame in t.frames()]
        return all(found) and len(found) > 1 and all(float(n) > 1 for n in found[-1].groups()[1:3])

    until(seen, what="rates")
    total, first, *shown = t.frames()[-1]
    assert TOTAL.match(total)[5] == "2" and int(TOTAL.match(total)[4]) > 0
    assert RATES.sub("", first) == peer(busy) and float(RATES.match(first)[2]) > 1
    assert shown[:2] == ["mode: target", f"image: {image}"]
    assert peer(idle) not in str(shown)
    t.process.send_signal(signal.SIGINT)
    result = t.end()
    assert (result.returncode, result.stderr) == (0, "")


@hazard("a view larger than its terminal, width 0")
@pytest.mark.parametrize("width, height", [(0, 0), (1, 1), (2, 2), (20, 6), (65535, 65535), (80, 7)])
def test_watch_fits_the_terminal(controlled, width, height):
    """Its last row stays empty; the terminal cuts lines that are too long."""
    s = controlled()
    clients = [s.client() for _ in range(30)]
    t = Terminal(s.control, width, height)

    def seen():
        for c in clients:
            c.pread(BLOCK)
        return len(t.frames()) >= 2

    until(seen, what="frames")
    for frame in t.frames():
        assert len(frame) <= max(1, (height or 24) - 1)
    assert height == 65535 or len(t.frames()[-1]) == max(1, (height or 24) - 1)
    t.process.terminate()
    assert t.end().returncode == -signal.SIGTERM


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_watch_ends_with_the_server(controlled, killed):
    s = controlled()
    t = Terminal(s.control)
    until(lambda: t.frames(), what="the first frame")
    s.kill() if killed else s.stop()
    result = t.end()
    assert result.returncode == 1 and "the server has ended" in result.stderr


def test_watch_without_a_terminal_is_lines(controlled):
    s = controlled()
    c = s.client()
    p = start_bgctl("--watch", s.control)
    lines = []
    while len(lines) < 2:
        c.pread(BLOCK)
        if select.select([p.stdout], [], [], 0)[0]:
            lines.append(p.stdout.readline())
    p.send_signal(signal.SIGINT)
    assert end_of(p).returncode == 0
    for line in lines:
        assert re.fullmatch(TOTAL.pattern + r"\n", line), line
        assert int(line.split()[0]) > 0 and line.endswith(" 1 clients, 0 errors\n")
