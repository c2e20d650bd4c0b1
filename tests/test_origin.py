"""The proxy and its origin: one that is odd, wrong, slow, silent, or dies.

Whatever it does, clients get the origin's bytes, or what they wrote, or EIO if
the origin says so; they wait while it is away.  What is in the cache goes on
meanwhile.  The origin is never written to: see origin.py, which fails if it is.
After each test the cache image is compared, too, once its server has ended.
"""

import contextlib
import itertools
import random
import re
import select
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import need, preload
from nbd import *
from origin import (BAD_HANDSHAKES, BAD_REPLIES, BAD_SIMPLE_REPLIES, BAD_STATUSES, CLOSE, RESET,
                    SILENCE, Fault, ODD_HANDSHAKES, ODD_REPLIES, ODD_STATUSES, Origin, failing,
                    option_reply)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4096
SIZE = 2 * MIB + 77
ROUND = 2 * MIB                     # a size for origins with large blocks
CONTENT = pattern(0, SIZE)
ALLOCATION = "base:allocation"
SLACK = 20 if SANITIZED else 10     # seconds more than something may take by itself
SOON = 10                           # seconds for what waits for nobody, nor for --origin-timeout
hazard = pytest.mark.hazard
forms = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])


# The proxy and what belongs to it

class Proxy:
    """A proxy, its origin, and what clients must find.

    .server .origin .image .control
    .expected       the disk's bytes: the origin's, and what wrote() added; None: not known
    .client(**kw)   of nbd.py
    """

    def __init__(self, server, origin, image, control):
        self.server, self.origin = server, origin
        self.image, self.control = image, control
        self.expected = bytearray(origin.pread(origin.size)) if origin.size <= 64 * MIB else None
        self.client = server.client

    def write(self, c, data, offset, **kw):
        c.pwrite(data, offset, **kw)
        self.expected[offset:offset + len(data)] = data

    def right(self, c, offset=0, length=None):
        """What a client reads there is what it must find."""
        length = self.origin.size - offset if length is None else length
        for at in range(offset, offset + length, MIB):
            size = min(MIB, offset + length - at)
            assert c.pread(size, at) == self.expected[at:at + size], f"wrong data in {at}+{size}"

    def all_right(self):
        with self.client() as c:
            self.right(c)

    def check_image(self):
        """Each block is what it must be, or was never stored."""
        if self.expected is None or not self.image.exists():
            return
        found = self.image.read_bytes()
        for at in range(0, len(self.expected), BLOCK):
            block = found[at:at + BLOCK]
            assert block == self.expected[at:at + BLOCK] or not block.strip(b"\0"), (
                f"the cache image is wrong at {at}")

    # Control

    def ask(self, command, seconds=DEADLINE):
        """One command; the lines of its answer, the last one is "ok" or "error: ..."."""
        with Control(self.control, seconds) as control:
            control.send(command)
            return control.answer()

    def query(self):
        """{name: value}; it waits for nobody."""
        lines = self.ask("query", SOON)
        assert lines[-1] == "ok", lines
        return dict(line.split(": ", 1) if ": " in line else (line.rstrip(":"), "")
                    for line in lines[:-1])

    def down(self):
        """The reason, if the link is down."""
        status = self.query()
        assert status["origin-link"] in ("up", "down"), status
        return status["origin-link"] == "down" and status["origin-reason"]

    def wait_down(self):
        return until(self.down, what="a link that is down")

    def wait_up(self):
        until(lambda: not self.down(), what="a link that is up")

    def cached(self):
        return int(self.query()["cached-blocks"])

    def lost(self):
        """The log's lines about lost links."""
        return re.findall(r"link lost: (.*)", self.server.log())


class Control:
    """A connection to the control socket."""

    def __init__(self, path, seconds=DEADLINE):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(seconds)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("r", encoding="utf-8", newline="\n")

    def send(self, command):
        self.sock.sendall(command.encode() + b"\n")

    def line(self):
        line = self.lines.readline()
        assert line.endswith("\n"), f"the control socket said {line!r} and closed"
        return line[:-1]

    def answer(self):
        lines = [self.line()]
        while lines[-1] != "ok" and not lines[-1].startswith("error:"):
            lines.append(self.line())
        return lines

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.lines.close()
        self.sock.close()


@pytest.fixture
def origin():
    """origin(content, **options): starts an Origin; one that was written to fails."""
    started = []

    def start(content=CONTENT, **options):
        one = Origin(content, **options)
        started.append(one)
        return one.start()

    yield start
    for one in started:
        one.stop()
    for one in started:
        one.check()


def command_line(origin, directory, number, *options):
    files = [directory / f"{name}{number}" for name in ("cache", "bitmap", "control")]
    return ["--proxy", "--laddr", "127.0.0.1", "--lport", "0", "--origin-connections", "1",
            *options, *origin.arguments, *files], files


@pytest.fixture
def proxy(origin, server, tmp_path):
    """proxy(origin, *options): starts a proxy, with one connection to that origin.  It may
    be called by several threads."""
    started, lock = [], threading.Lock()

    def launch(args, attempts):
        """A machine that is busy may stop for longer than a short --origin-timeout."""
        for left in reversed(range(attempts)):
            one = server(args=args, wait=False)
            until(lambda: one.addresses or one.proc.poll() is not None, what="listening")
            if one.addresses or not left or "no answer" not in one.log():
                return one.wait_ready()
            one.expected_status = 1

    def start(origin, *options):
        with lock:                  # one after the other: there may be many
            args, files = command_line(origin, tmp_path, len(started), *options)
            server = launch(args, 3 if "--origin-timeout" in options else 1)
            started.append(Proxy(server, origin, files[0], files[2]))
            return started[-1]

    yield start
    for one in started:
        one.origin.thaw()
        for client in one.server.clients:
            client.close()
        one.server.stop(DEADLINE)
        one.check_image()


@pytest.fixture
def refused(run_server, tmp_path):
    """refused(origin, *options): a proxy that must not start; returns why."""
    def run(origin, *options):
        number = threading.get_ident()
        args, files = command_line(origin, tmp_path, number, *options)
        done = run_server(*args)
        assert done.returncode == 1, done
        line, = done.stderr.splitlines()
        assert not files[2].exists(), "a control socket was left behind"
        return line

    return run


def in_parallel(cases, work, threads=8):
    """work(case) for each, in some threads; fails with all failures."""
    def attempt(case):
        try:
            work(case)
        except Exception as e:
            return f"{case}: {type(e).__name__}: {e}"

    with ThreadPoolExecutor(threads) as pool:
        failures = [failure for failure in pool.map(attempt, cases) if failure]
    assert not failures, "\n".join(failures)


@contextlib.contextmanager
def within(seconds, what):
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert took < seconds, f"{what} took {took:.2f} s"


def miss(c, offset=0, length=BLOCK):
    """Asks for what is not in the cache; returns the cookie."""
    return c.request(NBD_CMD_READ, offset, length)


def expect_data(p, c, cookie, offset=0, length=BLOCK):
    reply = c.collect(cookie)
    assert not reply.error, reply
    assert reply.data == p.expected[offset:offset + length]


def goes_on(p, c, cached):
    """What needs no origin works at once: cached reads, writes, FLUSH, the control
    socket, a new client."""
    with within(SOON, "a cached read"):
        p.right(c, cached, BLOCK)
    with within(SOON, "a write of whole blocks, and one to a cached block"):
        p.write(c, pattern(cached, 2 * BLOCK, 7), cached)
        p.write(c, b"some", cached + 5)
    with within(SOON, "zeroing"):
        c.zero(BLOCK, cached + 2 * BLOCK)
        p.expected[cached + 2 * BLOCK:cached + 3 * BLOCK] = bytes(BLOCK)
    with within(SOON, "FLUSH"):
        c.flush()
    with within(SOON, "the control socket"):
        p.query()
    with within(SOON, "another client"), p.client() as other:
        p.right(other, cached, 3 * BLOCK)


# Origins of all kinds

@pytest.mark.parametrize("name", ODD_HANDSHAKES)
def test_origins_of_all_kinds_are_used(origin, proxy, name):
    """Its limits, too: Origin checks them."""
    o = origin(CONTENT[:ROUND], **ODD_HANDSHAKES[name])
    p = proxy(o)
    with p.client(structured=True) as c:
        assert c.size == ROUND
        for offset, length in [(1, 1), (BLOCK - 1, 2), (ROUND - 700, 700), (300000, 200001)]:
            p.right(c, offset, length)
        p.right(c)
    assert p.ask("cache-all")[-1] == "ok"
    assert p.query()["cached-percent"] == "100.0"
    assert max(o.counts().values()) == 1, "a block was fetched twice"


@pytest.mark.parametrize("name", ["no GO", "oldstyle", "small maximum block",
                                  "large minimum block", "no contexts"])
def test_origins_of_all_kinds_are_copied(origin, proxy, name):
    o = origin(CONTENT[:ROUND], **ODD_HANDSHAKES[name])
    p = proxy(o)
    assert p.ask("cache-all")[-1] == "ok"
    assert o.read_bytes() == ROUND
    o.die()
    p.all_right()


@pytest.mark.parametrize("style", ["newstyle", "no-go"])
@pytest.mark.parametrize("name", ["", "a name", "grün/ß", "n" * 4096],
                         ids=["none", "plain", "unicode", "longest"])
def test_export_name_is_asked_for(origin, proxy, name, style):
    o = origin(names=[name], style=style)
    proxy(o, "--target-exportname", name)
    assert o.connections[0].name == name
    assert not any(name.encode() not in data for option, data in o.connections[0].options
                   if option == NBD_OPT_SET_META_CONTEXT), "contexts of another export"


@pytest.mark.parametrize("length", [4097, 100000])
def test_export_name_that_is_too_long_is_not_sent(origin, refused, length):
    o = origin()
    assert "too long" in refused(o, "--target-exportname", length * "n")
    assert not o.connections


def test_export_that_the_origin_does_not_have_is_refused(origin, refused):
    assert "export" in refused(origin(names=["present"]), "--target-exportname", "absent")


def test_origin_on_a_unix_socket(origin, proxy, tmp_path):
    o = origin(unix=tmp_path / "origin")
    p = proxy(o)
    p.all_right()
    assert p.query()["origin"] == o.label
    o.die()
    p.wait_down()
    o.come_back()
    p.wait_up()


def test_host_name_with_several_addresses(origin, proxy):
    """It may stand for ::1 first, where nobody listens."""
    proxy(Named(origin())).all_right()


class Named:
    """An Origin by a name of the host."""

    def __init__(self, origin, name="localhost"):
        self.origin = origin
        self.arguments = [name, str(origin.port)]

    def __getattr__(self, name):
        return getattr(self.origin, name)


def test_end_is_announced_to_the_origin(origin, proxy):
    o = origin()
    p = proxy(o)
    p.server.stop()
    until(lambda: not o.open, what="the end of the connection")
    assert all(c.said_goodbye for c in o.connections)


@pytest.mark.parametrize("multi_conn, most", [(True, 3), (False, 1)])
def test_connections_are_as_many_as_allowed(origin, proxy, multi_conn, most):
    """Several only where the origin offers CAN_MULTI_CONN."""
    o = origin(multi_conn=multi_conn, delay=0.001)
    p = proxy(o, "--origin-connections", "3")
    assert p.ask("cache-all")[-1] == "ok"
    p.all_right()
    assert 1 <= len(o.connections) <= most
    until(lambda: int(p.query()["origin-links"]) == len(o.open), what="the number of links")


# Several links

def test_links_that_the_origin_refuses_are_done_without(origin, proxy):
    """It said CAN_MULTI_CONN, and takes one client: that link serves all, the log is short."""
    o = origin(delay=0.001)
    o.faults.extend([Fault(GIB), *[Fault(0)] * 100])
    p = proxy(o, "--origin-connections", "3")
    o.wait_connections(4)
    p.all_right()
    assert p.ask("cache-all")[-1] == "ok"
    assert p.query()["origin-link"] == "up" and p.query()["origin-links"] == "1"
    seconds = time.monotonic() - o.connections[0].made
    assert len(o.connections) < 20 + seconds and p.server.log().count(o.label) < 5


@pytest.mark.parametrize("change", [
    {NBD_OPT_STRUCTURED_REPLY: lambda *_: option_reply(NBD_OPT_STRUCTURED_REPLY,
                                                       NBD_REP_ERR_UNSUP)},
    {NBD_OPT_GO: lambda *_: option_reply(NBD_OPT_GO, NBD_REP_ERR_UNSUP)},
    {NBD_OPT_SET_META_CONTEXT: lambda *_: option_reply(NBD_OPT_SET_META_CONTEXT,
                                                       NBD_REP_ERR_POLICY)}],
    ids=["simple", "no-go", "no-contexts"])
@pytest.mark.parametrize("changed", [{0}, {1, 2}], ids=["first", "others"])
def test_links_may_differ(origin, proxy, change, changed):
    """The origin was replaced between two handshakes: each link is used as it is."""
    o = origin(CONTENT[:MIB] + bytes(MIB) + CONTENT[2 * MIB:], delay=0.001)
    p = proxy(o, "--origin-connections", "3")
    def three_links():
        return [c.phase for c in o.open] == ["transmission"] * 3

    until(three_links, what="three links")
    for i, link in enumerate(list(o.connections)):
        o.set(answers=change if i in changed else {})
        link.drop()
        until(three_links, what="a new link")
    with p.client(contexts=[ALLOCATION]) as c:
        assert p.ask("cache-all2") == ["ok"]
        assert c.block_status(SIZE)[ALLOCATION]
        p.right(c)
    until(lambda: p.query()["copy"] == "done", what="the end of the copy")


def test_link_to_a_disk_of_another_size_is_never_used(origin, proxy):
    """Those that were there stay."""
    o = origin()
    o.faults.append(Fault(GIB))
    o.faults.extend([Fault(0)] * 100)       # the others, until the size has changed
    p = proxy(o, "--origin-connections", "2")
    o.set(told_size=SIZE + BLOCK)
    o.faults.clear()
    until(lambda: str(SIZE + BLOCK) in p.server.log(), what="a line in the log")
    p.all_right()
    assert p.ask("cache-all")[-1] == "ok"
    assert {r.number for r in o.reads()} == {0}
    assert p.query()["origin-link"] == "up"


def test_links_that_come_and_go_lose_nothing(origin, proxy):
    """Any of three, while clients read and a copy runs."""
    dice = random.Random(5)
    o = origin(delay=lambda r: dice.random() * 0.1, block_size=(1, BLOCK, 16 * KIB))
    p = proxy(o, "--origin-connections", "3")
    assert p.ask("cache-all2") == ["ok"]
    over = threading.Event()

    def read(seed):
        read_at_random(p, seed)
        while not over.is_set():
            read_at_random(p, seed, 16)

    def drop_links():
        for link in o.open:
            if dice.random() < 0.6:
                link.drop(reset=dice.random() < 0.5)
        return len(o.connections) >= 12

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(in_parallel, range(4), read, 4)
        try:
            until(drop_links, pause=0.05, what="connection 12")
        finally:
            over.set()
        reading.result()
    until(lambda: p.query()["copy"] == "done", what="the end of the copy")
    o.die()
    p.all_right()


# Replies in any order and form

def read_at_random(p, seed, count=60):
    """One client with 16 reads in flight; all must be right."""
    dice, size = random.Random(seed), p.origin.size
    with p.client(structured=seed % 2) as c:
        for _ in range(count // 16 + 1):
            asked = {}
            for _ in range(16):
                length = dice.choice([1, 512, BLOCK, 5000, 70000])
                offset = dice.randrange(size - length)
                asked[c.request(NBD_CMD_READ, offset, length)] = offset, length
            for cookie, where in asked.items():
                expect_data(p, c, cookie, *where)


@hazard("replies matched in order of sending")
@forms
@pytest.mark.parametrize("order", ["reversed", "random", "mixed"])
def test_replies_come_in_any_order(origin, proxy, order, structured):
    content = bytearray(CONTENT)
    for at in range(0, SIZE, 96 * KIB):         # some holes
        content[at:at + 24 * KIB] = bytes(24 * KIB)
    o = origin(bytes(content), order=order, structured=structured, chunk=40000, shuffle=True)
    p = proxy(o)
    in_parallel(range(4), lambda seed: read_at_random(p, seed), 4)
    p.all_right()
    assert not p.lost()
    assert max(o.counts().values()) == 1, "a block was fetched twice"


@forms
def test_replies_come_in_small_fragments(origin, proxy, structured):
    """Each byte of a handshake and of some replies; then some bytes at a time."""
    o = origin(fragment=1, structured=structured)
    p = proxy(o)
    with p.client() as c:
        p.right(c, 0, 2 * BLOCK)
        p.right(c, SIZE - 100, 100)
        dice = random.Random(3)
        o.set(fragment=lambda: dice.choice([1, 15, 16, 17, 19, 20, 27, 28, 29, 4096, 70001]))
        p.right(c)
    assert not p.lost()


def test_slow_origin_is_not_a_silent_one(origin, proxy):
    """An answer may take longer than the timeout, as long as something arrives."""
    def drip():
        time.sleep(0.25)
        return 800

    def read_slowly():
        o = origin()
        p = proxy(o, "--origin-timeout", "1")
        o.set(fragment=drip)
        with p.client() as c:
            p.right(c, 0, BLOCK)
        assert not p.lost() and len(o.connections) == 1

    once(read_slowly)


@hazard("origin never answers: a byte now and then is none")
def test_origin_that_drips_is_given_up(origin, proxy):
    def drip():
        time.sleep(0.1)
        return 1

    o = origin()
    p = proxy(o, "--origin-timeout", "1")
    with p.client() as c:
        o.set(fragment=drip)
        cookie = c.request(NBD_CMD_READ, 0, BLOCK)
        until(lambda: len(o.connections) > 1, what="another link")
        o.set(fragment=None)
        assert c.collect(cookie).data == CONTENT[:BLOCK]


def test_idle_link_stays(origin, proxy):
    """Silence is no failure where nothing is owed."""
    o = origin()
    p = proxy(o, "--origin-timeout", "1")
    with p.client() as c:
        p.right(c, 0, BLOCK)
        p.wait_up()
        before = o.open
        time.sleep(1.6)             # a measurement
        assert len(before) == 1 and o.open == before
        p.right(c, 1 * MIB, BLOCK)


# Errors of the origin

@forms
@pytest.mark.parametrize("name", ODD_REPLIES)
def test_unusual_replies_are_understood(origin, proxy, name, structured):
    """An error is EIO for who asked, once; the link stays, and nothing is kept."""
    action, is_error = ODD_REPLIES[name]
    o = origin(structured=structured)
    p = proxy(o)
    with p.client() as c:
        o.misbehave(action)
        assert c.error_of(NBD_CMD_READ, 64 * KIB, 16 * KIB) == (NBD_EIO if is_error else 0)
        p.right(c, 64 * KIB, 16 * KIB)
        p.right(c)
    assert len(o.connections) == 1 and not p.lost()


@hazard("one EIO of the origin stalls every client, cached blocks too")
@forms
def test_error_concerns_only_those_who_need_the_block(origin, proxy, structured):
    bad = 512 * KIB
    o = origin(structured=structured, errors=failing(bad, bad + 1))
    p = proxy(o)
    with p.client() as c, p.client() as other:
        p.right(other, 0, 64 * KIB)
        for offset, length in [(bad, BLOCK), (bad - BLOCK, 3 * BLOCK), (bad + 9, 1)]:
            cookie = c.request(NBD_CMD_READ, offset, length)
            with within(SOON, "a cached read"):
                p.right(other, 0, 64 * KIB)
            p.right(other, MIB + offset, 8 * KIB)
            assert c.collect(cookie).error == NBD_EIO
        assert c.error_of(NBD_CMD_WRITE, bad + 5, payload=b"part") == NBD_EIO
        goes_on(p, c, 0)
        p.write(c, pattern(bad, BLOCK, 9), bad)         # needs no origin
        p.right(c)
    assert len(o.connections) == 1 and not p.lost()


@forms
def test_error_is_for_the_block_and_not_for_what_came_with_it(origin, proxy, structured):
    """A request that joined a larger fetch gets its blocks if they can be had."""
    bad = 128 * KIB
    o = origin(structured=structured, errors=failing(bad, bad + BLOCK))
    p = proxy(o)
    o.hold()
    with p.client() as c, p.client() as other:
        large = miss(c, bad - 16 * KIB, 64 * KIB)
        o.wait(lambda r: r.touches(bad, bad + BLOCK))
        asked = [(miss(other, offset, length), offset, length)
                 for offset, length in [(bad - 16 * KIB, BLOCK), (bad + BLOCK, 100),
                                        (bad - 5, 5), (bad + 20 * KIB + 1, 2 * BLOCK)]]
        until(lambda: int(p.query()["pending-requests"]) == 5, what="the requests")
        o.release()
        for cookie, offset, length in asked:
            expect_data(p, other, cookie, offset, length)
        assert c.collect(large).error == NBD_EIO


def test_error_is_not_remembered(origin, proxy):
    o = origin(errors=failing(0, SIZE))
    p = proxy(o)
    with p.client() as c:
        for offset in (0, 5000, SIZE - 1):
            assert c.error_of(NBD_CMD_READ, offset, 1) == NBD_EIO
        assert p.cached() == 0
        o.set(errors=None)
        p.right(c)


def test_copy_leaves_out_what_the_origin_cannot_deliver(origin, proxy):
    """It is named in bytes, the rest is here, and the next copy gets it."""
    bad = [(256 * KIB, 260 * KIB), (MIB, MIB + 64 * KIB)]
    o = origin(errors=lambda r: any(failing(*b)(r) for b in bad) and NBD_EIO)
    p = proxy(o)
    lines = p.ask("cache-all 8")
    assert lines[-1].startswith("error:")
    failed = [tuple(map(int, line.split()[1:])) for line in lines if line.startswith("failed:")]
    for start, end in bad:
        assert any(a <= start and end <= a + length for a, length in failed), failed
    assert all(any(a < end + 64 * KIB and start - 64 * KIB < a + length for start, end in bad)
               for a, length in failed), failed
    missing = sum(length for _, length in failed) // BLOCK
    assert p.cached() == -(-SIZE // BLOCK) - missing
    o.set(errors=None)
    assert p.ask("cache-all")[-1] == "ok"
    o.die()
    p.all_right()


def test_eshutdown_is_a_lost_link(origin, proxy):
    """Who shuts down is asked again after that."""
    o = origin()
    p = proxy(o)
    o.set(errors=lambda r: NBD_ESHUTDOWN * (r.number == 0))
    with p.client() as c:
        p.right(c)
    assert len(o.connections) == 2 and len(p.lost()) == 1


@pytest.mark.parametrize("name", ODD_STATUSES)
def test_unusual_extents_are_understood(origin, proxy, name):
    content = CONTENT[:MIB] + bytes(MIB) + CONTENT[2 * MIB:]
    o = origin(content)
    p = proxy(o)
    o.misbehave(ODD_STATUSES[name], times=None)
    with p.client(contexts=[ALLOCATION]) as c:
        told = c.block_status(SIZE)[ALLOCATION]
        assert 0 < sum(length for length, _ in told) <= SIZE
        assert not any(flags & ~(NBD_STATE_HOLE | NBD_STATE_ZERO) for _, flags in told)
    assert p.ask("cache-all")[-1] == "ok"
    assert not p.lost()
    o.die()
    p.all_right()


# Origins that break the protocol

@pytest.fixture
def survive(origin, proxy):
    """survive(structured, cases, work): work(proxy, case) for each case, each with a block
    of its own, on a few proxies at once."""
    def run(structured, cases, work, count=8):
        def work_on(part):
            o = origin(structured=structured)
            p = proxy(o)
            for i, case in enumerate(part):
                try:
                    work(p, case, MIB - i * 16 * KIB)   # backwards: nothing is read ahead
                except Exception as e:
                    raise AssertionError(f"{case}: {type(e).__name__} {e}; {o.connections[-2:]}; "
                                         + "; ".join(p.lost()[-2:])) from e
            p.all_right()

        cases = list(cases)
        in_parallel([cases[i::count] for i in range(count)], work_on, count)

    return run


@hazard("origin sends: wrong magic, wrong cookie, a chunk outside the request, an error text of "
        "4 GiB")
@forms
def test_wrong_replies_cost_the_link_and_nothing_else(survive, structured):
    """The request is answered from the next link; log and query say why, once."""
    bad = BAD_REPLIES if structured else BAD_SIMPLE_REPLIES

    def work(p, name, offset):
        before, lost = len(p.origin.connections), len(p.lost())
        if name == "cookie of an answered request":
            with p.client() as c:
                p.right(c, SIZE - offset // 2, BLOCK)
        p.origin.misbehave(bad[name], which=lambda r: r.touches(offset, offset + BLOCK))
        with p.client() as c:
            p.right(c, offset, 16 * KIB)
            until(lambda: len(p.lost()) == lost + 1, what=f"a line about {name!r}")
            p.wait_up()
            p.right(c, offset, 16 * KIB)
        assert len(p.origin.connections) == before + 1, "the link was not made anew, once"
        assert len(p.lost()) == lost + 1, p.lost()

    survive(structured, bad, work)


@hazard("origin sends an error text of 4 GiB: nothing is allocated for it")
@pytest.mark.parametrize("name", [name for name in BAD_REPLIES if "GiB" in name])
def test_announced_gigabytes_cost_no_memory(origin, proxy, name):
    p = proxy(origin())
    with p.client() as c:
        p.right(c, MIB, MIB)
        before = p.server.rss()
        p.origin.misbehave(BAD_REPLIES[name])
        p.right(c)
    assert p.server.status("VmHWM") * 1024 - before < (1024 if SANITIZED else 64) * MIB


@hazard("origin that is always wrong")
def test_origin_that_is_always_wrong_is_not_asked_all_the_time(origin, proxy):
    """It is asked with pauses, the requests wait, the rest goes on; then it is right."""
    o = origin()
    p = proxy(o)
    with p.client() as c, p.client() as other:
        p.right(other, MIB, BLOCK)
        o.misbehave(BAD_REPLIES["wrong magic"], times=None)
        cookie = miss(c)
        until(lambda: len(o.connections) > 2, what="another connection")
        goes_on(p, other, MIB)
        before, cpu, start = len(o.connections), p.server.cpu(), time.monotonic()
        time.sleep(1)               # a measurement
        attempts, took = len(o.connections) - before, time.monotonic() - start
        assert attempts <= 1 + took / 0.1
        assert p.server.cpu() - cpu < 0.3 * took
        o.behave()
        expect_data(p, c, cookie)


@hazard("origin sends: extents that are wrong")
def test_wrong_extents_cost_the_link_and_nothing_else(origin, proxy):
    def work(name):
        o = origin(CONTENT[:MIB] + bytes(MIB) + CONTENT[2 * MIB:])
        p = proxy(o)
        o.misbehave(BAD_STATUSES[name])
        with p.client(contexts=[ALLOCATION]) as c:
            assert c.block_status(SIZE)[ALLOCATION]
        o.misbehave(BAD_STATUSES[name])
        assert p.ask("cache-all")[-1] == "ok"
        assert p.lost(), "it was believed"
        o.die()
        p.all_right()

    in_parallel(BAD_STATUSES, work, 4)


# Handshakes that go wrong

@hazard("origin sends: wrong magic, a size over 2^63")
def test_origin_that_cannot_be_used_is_refused_at_start(origin, refused):
    """With one line that names it."""
    def work(name):
        o = origin(**BAD_HANDSHAKES[name])
        with within(SOON + SLACK, "a refusal"):
            line = refused(o)
        assert o.label in line or str(o.port) in line, line
        assert not o.reads()

    in_parallel(BAD_HANDSHAKES, work)


@hazard("origin sends: wrong magic, a size over 2^63; after a reconnect")
def test_origin_that_cannot_be_used_is_tried_again(survive):
    """Until it can be used; log and query say why not."""
    usual = {option: getattr(Origin, option, None)
             for bad in BAD_HANDSHAKES.values() for option in bad}
    usual["answers"] = {}

    def work(p, name, offset):
        o = p.origin
        o.set(**BAD_HANDSHAKES[name])
        o.open[0].drop()
        with p.client() as c:
            cookie = miss(c, offset)
            attempts = len(o.connections)
            assert p.wait_down()
            o.wait_connections(attempts + 1)
            assert p.down()
            o.set(**usual)
            expect_data(p, c, cookie, offset)
        assert p.query()["origin-link"] == "up"

    survive(True, BAD_HANDSHAKES, work)


@hazard("origin never answers: at start")
@pytest.mark.parametrize("reading", [True, False])
def test_silent_origin_is_refused_at_start(origin, refused, reading):
    o = origin()
    o.freeze(reading)
    with within(1 + SLACK, "a refusal"):
        refused(o, "--origin-timeout", "1")


def test_nobody_at_the_address_is_refused_at_start(origin, refused):
    o = origin()
    o.die()
    line = refused(o)
    assert o.label in line and "refused" in line.lower()


SILENT_NAME = "silent.example"
SILENT_RESOLVER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

int getaddrinfo(const char *name, const char *port, const struct addrinfo *hints,
		struct addrinfo **list)
{
	__typeof__(&getaddrinfo) real = (__typeof__(&getaddrinfo))dlsym(RTLD_NEXT, "getaddrinfo");

	while (!(hints->ai_flags & AI_NUMERICHOST) && strcmp(name, "silent.example") == 0)
		pause();
	return real(name, port, hints, list);
}
"""


@pytest.fixture
def silent_resolver(tmp_path, monkeypatch):
    """For servers, looking SILENT_NAME up never ends."""
    library = tmp_path / "silent.so"
    subprocess.run([need("cc", "gcc"), "-shared", "-fPIC", "-xc", "-", "-o", library, "-ldl"],
                   input=SILENT_RESOLVER, text=True, check=True)
    for name, value in preload(library).items():
        monkeypatch.setenv(name, value)


def test_name_that_is_looked_up_for_ever_is_refused_at_start(origin, refused, silent_resolver):
    o = Named(origin(), SILENT_NAME)
    with within(1 + SLACK, "a refusal"):
        assert "no answer" in refused(o, "--origin-timeout", "1")


def test_name_that_is_looked_up_for_ever_holds_nobody_up(origin, proxy, silent_resolver):
    """Nor the end."""
    p = proxy(origin(), "--origin-timeout", "1")
    with p.client() as c, Control(p.control) as control, within(1 + SLACK, "a refusal"):
        control.send(f"reconnect {SILENT_NAME} 10809")
        p.right(c, MIB, BLOCK)
        assert not select.select([control.sock], [], [], 0)[0], "a miss had to wait"
        assert "no answer" in control.answer()[-1]
    with p.client() as c:
        p.right(c)


@hazard("origin never ends its answer to an option")
def test_handshake_that_never_ends_is_given_up(origin, refused):
    def endless(connection, data):
        while True:
            connection.send(option_reply(NBD_OPT_GO, NBD_REP_INFO, b"\x12\x67" + b"x" * 1000))
            time.sleep(0.01)

    o = origin(answers={NBD_OPT_GO: endless})
    with within(15 + SLACK, "a refusal"):
        refused(o, "--origin-timeout", "1")


def test_words_of_the_origin_cannot_forge_log_lines(origin, refused):
    """They are shown shortened, in one line, without control characters."""
    words = b"\x1b[2Jno\nxnbd-server: listening on 127.0.0.1:1\r\0" + b"x" * 4000
    o = origin(answers={NBD_OPT_GO: lambda *_: option_reply(
        NBD_OPT_GO, NBD_REP_ERR_POLICY, words)})
    line = refused(o)
    assert line.isprintable() and len(line) < 500


# A byte-exact saboteur

def session_length(origin, proxy, **options):
    """What an origin sends for a handshake and one read; up to where it is no data."""
    o = origin(CONTENT[:64 * KIB], **options)
    p = proxy(o)
    handshake = o.connections[0].sent
    with p.client() as c:
        p.right(c, 0, BLOCK)
    return handshake, o.connections[0].sent


def points(handshake, end):
    """Every byte of the handshake and of a reply's header, and some of its data."""
    return [*range(handshake + 40), *range(handshake + 40, end, 301), *range(end - 3, end)]


styles = pytest.mark.parametrize("options", [
    {}, {"structured": False}, {"style": "no-go"}, {"style": "oldstyle"}],
    ids=["structured", "simple", "no-go", "oldstyle"])


@hazard("origin closes at every byte: at start")
@styles
def test_origin_that_closes_at_every_byte_of_the_handshake_is_refused(origin, proxy, refused,
                                                                      options):
    """With --proxy running, or nothing: there is no third."""
    handshake, _ = session_length(origin, proxy, **options)

    def work(n):
        o = origin(**options)
        o.faults.append(Fault(n, "reset" if n % 3 == 2 else "close"))
        assert o.label in refused(o)

    in_parallel(range(0, handshake, 1 if options == {} else 5), work)


def recover(p, fault, offset):
    """The link is lost, the next one suffers the fault, a read is answered all the same."""
    o = p.origin
    until(lambda: [c.phase for c in o.open] == ["transmission"], what="one good link")
    before, link = len(o.connections), o.connections[-1]
    o.faults.append(fault)
    link.drop()
    with p.client() as c:
        p.right(c, offset, BLOCK)
    assert not o.faults and len(o.connections) > before


@hazard("origin closes at every byte")
@styles
def test_link_that_breaks_at_every_byte_is_made_anew(origin, proxy, options):
    """Handshake and first reply, after a link that was good."""
    n = 32
    cuts = points(*session_length(origin, proxy, **options))[::1 if options == {} else 5]

    def work(i):
        o = origin(pattern(0, len(cuts) * BLOCK), **options)
        p = proxy(o)
        for at, cut in list(enumerate(cuts))[i::n]:
            recover(p, Fault(cut, "reset" if cut % 3 == 2 else "close"), at * BLOCK)
        p.all_right()

    in_parallel(range(n), work, n)


@hazard("origin never answers: it falls silent at every byte")
def test_link_that_falls_silent_at_every_byte_is_made_anew(origin, proxy):
    n = 32
    cuts = points(*session_length(origin, proxy))[::4]

    def work(i):
        o = origin(pattern(0, len(cuts) * BLOCK))
        p = proxy(o, "--origin-timeout", "1")
        for at, cut in list(enumerate(cuts))[i::n]:
            recover(p, Fault(cut, "stall"), at * BLOCK)
        p.all_right()

    in_parallel(range(n), work, n)


@hazard("origin sends: a byte too few, twice, or changed")
@pytest.mark.parametrize("how", ["flip", "skip", "double"])
def test_spoilt_byte_never_spoils_data(origin, proxy, how):
    """In the handshake, or in the magic number of a reply: elsewhere nobody could tell."""
    n = 32
    handshake, _ = session_length(origin, proxy)
    cuts = list(range(0, handshake + 4, 3))

    def work(i):
        o = origin(pattern(0, len(cuts) * BLOCK))
        p = proxy(o, "--origin-timeout", "1")
        for at, cut in list(enumerate(cuts))[i::n]:
            recover(p, Fault(cut, how), at * BLOCK)
        p.all_right()

    in_parallel(range(n), work, n)


# Origins that die, stall and come back

def kill(o):
    o.die()


def reset(o):
    o.die(reset=True)


def black_hole(o):
    o.freeze()


def stop(o):
    """As SIGSTOP does."""
    o.freeze(reading=False)


def revive(o):
    if o.frozen:
        o.thaw()
    else:
        o.come_back()


outages = pytest.mark.parametrize("outage", [kill, reset, black_hole, stop])


@hazard("origin black-holed, or restarted with other clients connected")
@outages
def test_all_but_misses_goes_on_without_the_origin(origin, proxy, outage):
    """The control socket says so; those who wait are answered when it is back."""
    o = origin()
    p = proxy(o, "--origin-timeout", "1")
    with contextlib.ExitStack() as stack:
        c, *others = [stack.enter_context(p.client(structured=i % 2)) for i in range(6)]
        p.right(c, MIB, 3 * BLOCK)
        p.wait_up()
        lost = len(p.lost())
        outage(o)
        cookies = [miss(other, i * 64 * KIB) for i, other in enumerate(others)]
        partial = others[0].request(NBD_CMD_WRITE, 512 * KIB + 10, payload=b"part")
        goes_on(p, c, MIB)
        assert p.wait_down()
        goes_on(p, c, MIB)
        until(lambda: int(p.query()["pending-requests"]) > len(cookies), what="the requests")
        assert p.query()["origin-links"] == "0"
        assert len(p.lost()) == lost + 1, p.lost()
        revive(o)
        for i, (other, cookie) in enumerate(zip(others, cookies)):
            expect_data(p, other, cookie, i * 64 * KIB)
        assert others[0].collect(partial).error == 0
        p.expected[512 * KIB + 10:512 * KIB + 14] = b"part"
        p.right(c)
    assert p.query()["origin-link"] == "up" and "origin-reason" not in p.query()


@hazard("origin black-holed: nobody else waits until that is noticed")
@pytest.mark.parametrize("outage", [black_hole, stop])
def test_silence_that_is_not_noticed_yet_delays_misses_only(origin, proxy, outage):
    o = origin()
    p = proxy(o, "--origin-timeout", "60")
    with p.client() as c, p.client() as other:
        p.right(c, MIB, 3 * BLOCK)
        outage(o)
        cookie = miss(other)
        goes_on(p, c, MIB)
        assert not p.down()
        revive(o)
        expect_data(p, other, cookie)


@outages
def test_copy_survives_an_outage(origin, proxy, outage):
    o = origin(block_size=(1, BLOCK, 64 * KIB))
    p = proxy(o, "--origin-timeout", "1")
    o.hold(lambda r: r.offset >= MIB and r.command == NBD_CMD_READ)
    assert p.ask("cache-all2") == ["ok"]
    until(lambda: o.held, what="the second half")
    outage(o)
    assert p.wait_down()
    assert p.query()["copy"] == "running"
    o.release()
    revive(o)
    until(lambda: p.query()["copy"] == "done", what="the end of the copy")
    o.die()
    p.all_right()


@hazard("the copy starves clients: when the origin is back")
def test_clients_go_first_when_the_origin_is_back(origin, proxy):
    """What the copy was owed waits for those who came later."""
    o = origin(CONTENT[:ROUND], allocation=False, block_size=(1, BLOCK, 64 * KIB))
    p = proxy(o)
    with p.client() as c:
        o.hold()
        assert p.ask("cache-all2") == ["ok"]
        o.wait()
        o.die()
        assert p.wait_down()
        offsets = [ROUND - i * 16 * KIB for i in range(1, 9)]
        cookies = {miss(c, offset): offset for offset in offsets}
        until(lambda: int(p.query()["pending-requests"]) == 8, what="the requests")
        o.come_back()
        asked = o.wait(lambda r: r.number > 0, n=9)
        assert sorted(r.offset for r in asked[:8]) == sorted(offsets)
        o.release()
        for cookie, offset in cookies.items():
            expect_data(p, c, cookie, offset)
    until(lambda: p.query()["copy"] == "done", what="the end of the copy")


@hazard("origin black-holed: noticed by a deadline")
@pytest.mark.parametrize("silence", ["before", "within"])
def test_silence_is_noticed_in_time(origin, proxy, silence):
    """Before a reply, and within one: after --origin-timeout, and not much later."""
    o = origin()
    p = proxy(o, "--origin-timeout", "1")
    with p.client() as c:
        if silence == "within":
            o.misbehave(lambda r: o.connections[0].send(
                struct.pack(">I", NBD_STRUCTURED_REPLY_MAGIC)) or SILENCE)
        else:
            o.hold()
        start, cookie = time.monotonic(), miss(c)
        until(lambda: o.connections[0].ended, what="a new link")
        assert 0.9 < o.connections[0].ended - start < 1 + SLACK
        o.release()
        expect_data(p, c, cookie)
    assert len(p.lost()) == 1


@hazard("origin black-holed: noticed by a deadline, though others are answered")
def test_answer_that_is_lost_among_others_is_noticed(origin, proxy):
    o, blocks = origin(bytes(64 * MIB)), list(range(1, 64 * MIB // BLOCK))
    random.Random(1).shuffle(blocks)        # so that nothing is read ahead
    p = proxy(o, "--origin-timeout", "1")
    with p.client() as c, p.client() as other:
        o.hold(which=lambda r: r.touches(0, BLOCK))
        cookie = miss(c)
        while not p.lost():
            p.right(other, blocks.pop() * BLOCK, BLOCK)
        o.release()
        expect_data(p, c, cookie)


def test_end_does_not_wait_for_a_silent_origin(origin, proxy):
    """A request that waits for it gets no answer."""
    o = origin()
    p = proxy(o)
    with p.client() as c:
        o.freeze()
        miss(c)
        until(lambda: int(p.query()["pending-requests"]) == 1, what="the request")
        p.server.terminate()
        c.expect_closed()
    p.server.stop()


def test_client_may_leave_while_it_waits(origin, proxy):
    o = origin()
    p = proxy(o)
    with p.client() as witness:
        p.right(witness, MIB, BLOCK)
        o.hold()
        for i in range(20):
            c = p.client()
            miss(c, i * 64 * KIB)
            c.reset() if i % 2 else c.close()
        goes_on(p, witness, MIB)
        o.release()
        p.right(witness)


@hazard("closes with 64 reads in flight: that wait for an origin")
def test_clients_that_leave_while_they_wait_leave_nothing(origin, proxy):
    """What their reads bring goes to nobody, and its memory is used again."""
    o = origin(bytes(64 * MIB))
    p = proxy(o)
    with p.client() as witness:
        p.right(witness, 0, BLOCK)
        before = p.server.rss()
        for i in range(1, 31):
            o.hold()
            c = p.client()
            for n in range(31):     # backwards: nothing is read ahead
                miss(c, 2 * n * MIB + 64 * (31 - i) * KIB, 64 * KIB)
            until(lambda: p.query()["pending-requests"] == "31", what="31 reads that wait")
            name = "%s:%d: disconnected: " % c.sock.getsockname()
            c.reset()
            until(lambda: name in p.server.log(), what="the end of the connection")
            o.release()
            until(lambda: p.query()["pending-requests"] == "0", what="the end of the reads")
        assert p.server.rss() - before < (1024 if SANITIZED else 40) * MIB
        p.right(witness, 0, 3 * MIB)


@hazard("one client's data reach another")
def test_memory_that_is_used_again_is_lent_to_one_at_a_time(origin, proxy):
    o, length = origin(pattern(0, 12 * MIB)), 64 * KIB
    p = proxy(o)
    clients = [p.client() for _ in range(4)]
    for first in range(3):          # far from each other: nothing is read ahead
        o.hold()
        offsets = [(3 * i + first) * MIB for i in range(4)]
        cookies = [miss(c, at, length) for c, at in zip(clients, offsets)]
        until(lambda: p.query()["pending-requests"] == "4", what="four reads at once")
        o.release()
        for c, cookie, at in zip(clients, cookies, offsets):
            expect_data(p, c, cookie, at, length)


@hazard("origin that is always wrong, or never there")
def test_attempts_back_off(origin, proxy):
    """0.1 s, 0.2 s, 0.4 s and so on; and from the beginning after a success."""
    o = origin()
    p = proxy(o)
    offsets = itertools.count(0, 64 * KIB)
    with p.client() as c:
        def lose_the_link(failures):
            p.right(c, next(offsets), BLOCK)
            link = o.connections[-1]
            o.faults.extend([Fault(0)] * failures)
            link.drop()
            p.right(c, next(offsets), BLOCK)
            check_pauses(o.connections[link.number:])

        once(lambda: (lose_the_link(3), lose_the_link(2)))
    losses = next(offsets) // (2 * 64 * KIB)
    assert len(p.lost()) <= 2 * losses, "a line for each attempt"


def check_pauses(connections):
    """From the end of each to the beginning of the next."""
    pauses = [b.made - a.ended for a, b in zip(connections, connections[1:])]
    for i, pause in enumerate(pauses):
        assert 0.1 * 2 ** i - 0.002 < pause < 0.13 * 2 ** i + 0.3, pauses


@hazard("reconnect to a disk of another size")
@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1, SIZE + GIB])
def test_another_size_after_a_reconnect_is_refused(origin, proxy, size):
    """Until it has the right one again: who knows what else has changed."""
    o = origin()
    p = proxy(o)
    with p.client() as c:
        p.right(c, MIB, 3 * BLOCK)
        o.die()
        o.come_back(told_size=size)
        cookie = miss(c)
        reason = until(lambda: (lambda why: why and str(size) in why and str(SIZE) in why and why)(
            p.down()), what="a reason with both sizes")
        goes_on(p, c, MIB)
        assert p.query()["size"] == str(SIZE)
        assert p.server.log().count(reason) == 1, "not logged once"
        assert not o.connections[-1].in_flight and len(o.reads()) == 1
        o.set(told_size=None)
        expect_data(p, c, cookie)


def test_another_kind_of_origin_after_a_reconnect_is_used(origin, proxy):
    """Without structured replies, contexts or GO; oldstyle."""
    o = origin(CONTENT[:ROUND])
    p = proxy(o)
    changes = [{"structured": False}, {"style": "oldstyle"}, {"style": "no-go"},
               {"style": "newstyle", "structured": True, "allocation": False},
               {"allocation": True, "multi_conn": False, "flags": NBD_FLAG_READ_ONLY}]
    with p.client(contexts=[ALLOCATION]) as c:
        for i, change in enumerate(changes):
            o.die()
            o.come_back(**change)
            p.right(c, i * 256 * KIB + 5, 200 * KIB)
            assert c.block_status(ROUND)[ALLOCATION]
        p.right(c)


def test_smaller_limits_after_a_reconnect_are_refused(origin, proxy):
    """What is under way could not be asked for any more."""
    o = origin(CONTENT[:ROUND])
    p = proxy(o)
    with p.client() as c:
        p.right(c, MIB, 3 * BLOCK)
        o.die()
        o.come_back(block_size=(BLOCK, BLOCK, 64 * KIB))
        cookie = miss(c)
        until(lambda: "block size" in (p.down() or ""), what="a reason")
        goes_on(p, c, MIB)
        o.set(block_size=None)
        expect_data(p, c, cookie)


# What is asked of the origin

def test_block_is_fetched_once_for_all_who_wait(origin, proxy):
    o = origin()
    p = proxy(o)
    o.hold()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(p.client()) for _ in range(8)]
        asked = [(c, miss(c, 1000 * i, 9000), 1000 * i) for i, c in enumerate(clients)]
        until(lambda: int(p.query()["pending-requests"]) == 8, what="the requests")
        o.release()
        for c, cookie, offset in asked:
            expect_data(p, c, cookie, offset, 9000)
    assert max(o.counts().values()) == 1


def test_cached_blocks_are_not_fetched_again(origin, proxy):
    o = origin()
    p = proxy(o)
    p.all_right()
    asked = len(o.reads())
    p.all_right()
    with p.client() as c:
        c.zero(64 * KIB)
        p.expected[:64 * KIB] = bytes(64 * KIB)
        p.right(c)
    assert len(o.reads()) == asked and max(o.counts().values()) == 1


def test_written_blocks_are_not_fetched(origin, proxy):
    """Only the blocks at the ends of a range, of which parts are kept."""
    o = origin()
    p = proxy(o)
    with p.client() as c:
        p.write(c, pattern(0, 40 * KIB, 1), 64 * KIB)
        c.zero(40 * KIB, 128 * KIB)
        p.expected[128 * KIB:168 * KIB] = bytes(40 * KIB)
        assert not o.reads()
        p.write(c, pattern(0, 40 * KIB, 2), 256 * KIB + 100)
        assert set(o.counts()) <= {64, 74}
        p.right(c)


@hazard("zero-length request marks the whole disk")
def test_requests_of_length_0_fetch_and_mark_nothing(origin, proxy):
    o = origin()
    p = proxy(o)
    with p.client() as c:
        for command in (NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES,
                        NBD_CMD_CACHE):
            for offset in (0, 100, BLOCK):
                assert c.error_of(command, offset, 0) == 0
        assert p.cached() == 0 and not o.reads()
        p.right(c)


@hazard("32 or more separate missing pieces in one request")
def test_request_of_many_missing_pieces(origin, proxy):
    o = origin(order="random")
    p = proxy(o)
    with p.client() as c:
        for at in range(0, ROUND, 2 * BLOCK):
            p.write(c, pattern(at, BLOCK, 3), at)
        assert not o.reads()
        p.right(c, 1, ROUND - 2)
    assert max(o.counts().values()) == 1 and all(block % 2 for block in o.counts())


def test_long_reads_respect_the_origins_limits(origin, proxy):
    """A READ of 32 MiB of an origin that gives 64 KiB at a time.  Origin checks them."""
    size = 33 * MIB
    o = origin(pattern(0, size), block_size=(512, BLOCK, 64 * KIB))
    p = proxy(o)
    with p.client() as c:
        assert c.pread(32 * MIB, 512) == p.expected[512:512 + 32 * MIB]


def test_sequential_reads_are_read_ahead(origin, proxy):
    o = origin(delay=0.005)
    p = proxy(o)
    with p.client() as c:
        for at in range(0, MIB, 32 * KIB):
            p.right(c, at, 32 * KIB)
    until(lambda: max(r.end for r in o.reads()) >= MIB + 64 * KIB, what="a read ahead")
    assert max(o.counts().values()) == 1, "a block was fetched twice"


def test_random_reads_are_not_read_ahead(origin, proxy):
    """Nor backwards ones."""
    o = origin()
    p = proxy(o)
    blocks = random.Random(4).sample(range(ROUND // BLOCK), 60)
    blocks = [b for b in blocks if b - 1 not in blocks]
    with p.client() as c:
        for block in blocks:
            p.right(c, block * BLOCK, BLOCK)
        time.sleep(0.05)            # for what would come late
    assert set(o.counts()) == set(blocks)


@hazard("the copy starves clients")
def test_copy_asks_a_slow_link_for_no_more(origin, proxy):
    """Requests that are answered one by one, late, do not let the copy have more under way."""
    size = 128 * MIB
    o = origin(lambda offset, length: bytes(length), size=size, structured=False)
    p = proxy(o)
    with Control(p.control) as control:
        o.hold()
        control.send("cache-all")
        for _ in range(150):
            until(lambda: len(o.held) > 8, what="requests of the copy")
            first = o.held[0]
            o.release(lambda r: r is first)
            time.sleep(0.005)
        quiet(o)
        assert 0 < sum(r.length for r in o.held) <= 24 * MIB
        o.release()
        assert control.answer()[-1] == "ok"


@hazard("the copy starves clients")
@forms
def test_clients_go_before_the_copy(origin, proxy, structured):
    """On a single link with the copy under way: a miss is sent although the copy's requests
    are owed, and is answered before them if the origin does so."""
    size = 32 * MIB
    o = origin(lambda offset, length: pattern(offset, length), size=size, structured=structured)
    p = proxy(o)
    with p.client() as c, Control(p.control) as control:
        o.hold()
        control.send("cache-all")
        while structured and not o.reads():         # first it asks for extents
            o.release(lambda r: r.command == NBD_CMD_BLOCK_STATUS)
            time.sleep(0.01)
        o.wait(lambda r: r.command == NBD_CMD_READ)
        quiet(o)
        offset = size - 5 * BLOCK
        cookie = miss(c, offset)
        mine = o.wait(lambda r: r.command == NBD_CMD_READ and r.touches(offset, offset + BLOCK))[0]
        o.release(lambda r: r is mine)
        expect_data(p, c, cookie, offset)
        assert 0 < sum(r.length for r in o.held) <= 24 * MIB, "of the copy"
        o.release()
        assert control.answer()[-1] == "ok"
    assert max(o.counts().values()) == 1


def quiet(o):
    """Until no more requests arrive, or no more for a moment."""
    seen = []
    while len(seen) < 5 or seen[-1] != seen[-5]:
        seen.append(len(o.requests))
        time.sleep(0.02)


def test_copy_does_not_flood_a_fifo_origin(origin, proxy):
    """One that answers in order and slowly: a miss waits only for a bounded window."""
    size = 32 * MIB
    o = origin(lambda offset, length: pattern(offset, length), size=size,
               delay=lambda r: 0.002)
    p = proxy(o)
    with p.client() as c, Control(p.control) as control:
        control.send("cache-all")
        o.wait(n=2)
        for at in range(size - MIB, size - MIB + 10 * 64 * KIB, 64 * KIB):
            start = len(o.reads())
            p.right(c, at, BLOCK)
            between = sum(r.length for r in o.reads()[start:])
            assert between <= 34 * MIB
        assert control.answer()[-1] == "ok"


def test_holes_are_not_transferred(origin, proxy):
    size, pieces = GIB, {at: pattern(at, 64 * KIB) for at in range(0, GIB, 96 * MIB)}
    o = origin(pieces, size=size)
    p = proxy(o)
    with within(10 + SLACK, "a copy of holes"):
        assert p.ask("cache-all")[-1] == "ok"
    assert o.read_bytes() <= sum(map(len, pieces.values())) + 16 * 64 * KIB
    assert p.image.stat().st_blocks * 512 <= 4 * MIB
    o.die()
    with p.client() as c:
        for at, data in pieces.items():
            assert c.pread(96 * KIB, at) == data + bytes(32 * KIB)


def test_origin_that_tells_no_extents_sends_all(origin, proxy):
    content = bytes(MIB) + CONTENT[:MIB]
    o = origin(content, allocation=False)
    p = proxy(o)
    assert p.ask("cache-all")[-1] == "ok"
    o.die()
    p.all_right()


# Late data and newer writes

@hazard("after a reconnect the retried fetch lands after a newer write")
@pytest.mark.parametrize("outage", [None, kill, black_hole])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "partial"])
def test_late_data_does_not_overwrite_a_write(origin, proxy, outage, whole):
    """The fetch is under way, a client writes some of its blocks, the data arrives then."""
    o = origin()
    p = proxy(o, "--origin-timeout", "1")
    with p.client() as reader, p.client() as writer:
        o.hold()
        cookie = miss(reader, 0, 64 * KIB)
        o.wait(lambda r: r.command == NBD_CMD_READ)
        if whole:
            p.write(writer, pattern(0, 8 * KIB, 3), 8 * KIB)
            writer.zero(BLOCK, 32 * KIB)
            p.expected[32 * KIB:36 * KIB] = bytes(BLOCK)
            expected = None
        else:
            expected = writer.request(NBD_CMD_WRITE, 10000, payload=b"part")
            p.expected[10000:10004] = b"part"
        if outage:
            outage(o)
            p.wait_down()
            revive(o)
        o.release()
        assert reader.collect(cookie).error == 0
        if expected:
            assert writer.collect(expected).error == 0
        p.right(writer)


@hazard("partial write and full write of one absent block race with its fetch")
def test_writes_to_a_block_that_is_being_fetched(origin, proxy):
    """Parts from several clients; all of them, and the rest from the origin."""
    o = origin()
    p = proxy(o)
    o.hold()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(p.client()) for _ in range(8)]
        asked = []
        for i, c in enumerate(clients):
            data = bytes([i + 1]) * 300
            asked.append((c, c.request(NBD_CMD_WRITE, MIB + i * 500, payload=data)))
            p.expected[MIB + i * 500:MIB + i * 500 + 300] = data
        o.wait(lambda r: r.command == NBD_CMD_READ)
        o.release()
        for c, cookie in asked:
            assert c.collect(cookie).error == 0
        p.right(clients[0])
    assert max(o.counts().values()) == 1


def test_write_asks_for_both_edges_at_once(origin, proxy):
    o = origin()
    p = proxy(o)
    o.hold()
    data = bytes([7]) * (4 * BLOCK)
    with p.client() as c:
        cookie = c.request(NBD_CMD_WRITE, MIB + 100, payload=data)
        p.expected[MIB + 100:MIB + 100 + len(data)] = data
        o.wait(lambda r: r.command == NBD_CMD_READ, 2)
        o.release()
        assert c.collect(cookie).error == 0
        assert o.counts() == {MIB // BLOCK: 1, MIB // BLOCK + 4: 1}
        p.right(c)


# Another origin by command

def test_reconnect_leaves_a_hanging_origin(origin, proxy):
    old, new = origin(), origin()
    p = proxy(old)
    with p.client() as c:
        p.right(c, MIB, BLOCK)
        old.freeze(reading=False)
        cookie = miss(c)
        with within(SLACK, "a reconnect"):
            assert p.ask(f"reconnect 127.0.0.1 {new.port}") == ["ok"]
        expect_data(p, c, cookie)
        assert p.query()["origin"] == new.label
        p.right(c)


def test_reconnect_to_a_silent_origin_is_refused_in_time(origin, proxy):
    """The old one is used meanwhile, and afterwards."""
    old, new = origin(), origin()
    p = proxy(old, "--origin-timeout", "3")
    new.freeze(reading=False)
    offsets = iter(range(0, SIZE, 64 * KIB))

    def reconnect(c):
        with Control(p.control) as control, within(3 + SLACK, "a refusal"):
            control.send(f"reconnect 127.0.0.1 {new.port}")
            p.right(c, next(offsets), BLOCK)
            assert not select.select([control.sock], [], [], 0)[0], "a miss had to wait"
            assert control.answer()[-1].startswith("error:")

    with p.client() as c:
        once(lambda: reconnect(c))
        p.right(c)
    new.thaw()
    assert p.query()["origin"] == old.label


def test_copy_and_reads_go_over_to_another_origin(origin, proxy):
    """Of another kind: back and forth while they run; each request is answered once."""
    one = origin(delay=0.02, block_size=(1, BLOCK, 16 * KIB))
    two = origin(delay=0.02, style="no-go", order="random")
    p = proxy(one, "--origin-connections", "2")
    for o in one, two:
        o.hold(lambda r: r.end == SIZE)         # so that there is something to ask for
    assert p.ask("cache-all2") == ["ok"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(in_parallel, range(4), lambda seed: read_at_random(p, seed), 4)
        for target in (two, one) * 3:
            asked = len(target.reads())
            assert p.ask(f"reconnect 127.0.0.1 {target.port}") == ["ok"]
            until(lambda: len(target.reads()) > asked, what="a read")
        one.release()
        two.release()
        reading.result()
    until(lambda: p.query()["copy"] == "done", what="the end of the copy")
    one.die()
    two.die()
    p.all_right()


@hazard("reconnect to a disk of another size")
def test_reconnect_to_another_size_is_refused(origin, proxy):
    """Or to nobody, or to what cannot be used; the old link stays."""
    old, other, gone = origin(), origin(CONTENT[:MIB]), origin()
    broken = [origin(**BAD_HANDSHAKES[name])
              for name in ("nothing", "wrong magic", "refused by policy")]
    gone.die()
    p = proxy(old)
    answer, = p.ask(f"reconnect 127.0.0.1 {other.port}")
    assert answer.startswith("error:") and str(MIB) in answer and str(SIZE) in answer
    for bad in [gone, *broken]:
        assert p.ask(f"reconnect 127.0.0.1 {bad.port}")[-1].startswith("error:")
    p.all_right()
    assert len(old.connections) == 1 and p.query()["origin"] == old.label
    assert not other.reads() and not p.lost()


# Everything at once

def anything(dice):
    """An action that answers somehow."""
    bad, odd = list(BAD_REPLIES.values()), [action for action, _ in ODD_REPLIES.values()]
    junk = [lambda r: dice.randbytes(dice.randrange(1, 200)), lambda r: CLOSE, lambda r: RESET]
    return lambda r: dice.choice(dice.choice([bad, odd, junk]))(r)


@hazard("origin sends anything")
@pytest.mark.parametrize("seed", range(2))
def test_random_replies_never_spoil_data(origin, proxy, seed):
    """One reply in ten is some other one.  Reads give the right bytes, or EIO."""
    dice = random.Random(seed)
    o = origin(order="random", chunk=2000, fragment=lambda: dice.choice([5, 999, 1 << 20]))
    p = proxy(o, "--origin-timeout", "1")
    o.misbehave(anything(dice), times=None, which=lambda r: dice.random() < 1 / 10)
    end = time.monotonic() + 1
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(p.client(structured=i % 2)) for i in range(4)]
        asked = {}
        while time.monotonic() < end:
            for c in clients:
                length = dice.choice([1, 4096, 9000, 50000])
                offset = dice.randrange(SIZE - length)
                asked[c, miss(c, offset, length)] = offset, length
            if len(asked) > 40:
                check_some(p, asked)
        o.behave()
        while asked:
            check_some(p, asked)
    p.all_right()


def check_some(p, asked):
    """Collects the oldest ones."""
    for c, cookie in list(asked)[:20]:
        offset, length = asked.pop((c, cookie))
        reply = c.collect(cookie)
        assert reply.error in (0, NBD_EIO), reply
        assert reply.error or reply.data == p.expected[offset:offset + length]


@hazard("origin sends anything: what was kept of it")
def test_nothing_wrong_is_kept_for_the_next_start(origin, server, proxy, tmp_path):
    """After a bad origin the cache is served while the origin gives nothing but errors:
    each block is right or not there."""
    dice = random.Random(7)
    o = origin()
    p = proxy(o, "--origin-timeout", "1")
    o.misbehave(anything(dice), times=None, which=lambda r: dice.random() < 1 / 4)
    with p.client() as c:
        for at in range(0, MIB, 32 * KIB):
            assert c.error_of(NBD_CMD_READ, at, 32 * KIB) in (0, NBD_EIO)
    cached = p.cached()         # blocks that are read ahead may be more by now
    p.server.stop()
    o.behave()
    o.set(errors=lambda r: NBD_EIO)
    again = Proxy(server(args=p.server.arguments), o, p.image, p.control)
    right, kept = 0, again.cached()
    with again.client() as c:
        for at in range(0, SIZE, BLOCK):
            reply = c.call(NBD_CMD_READ, at, min(BLOCK, SIZE - at))
            assert reply.error == NBD_EIO or reply.data == p.expected[at:at + BLOCK]
            right += not reply.error
    assert right == kept >= cached > 0
