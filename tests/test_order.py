"""Changes that overlap end in the order in which the server took them, and a client that is gone
is gone: nothing of it lands over what is newer and was acknowledged.

In each test an older change is held up: by an origin that says nothing, by a disk that is slow
(slow.c, preloaded, lets one chosen call wait until the test lets it go on), by the first copy
for a snapshot, by its own length.  Its client leaves, in one of several ways, or stays.  Then
another connection changes the same blocks, and is answered.  The older change may go on only
after that, and nothing of it may be seen where the newer one was.

How a client leaves is its own business: it resets the connection, closes it, closes its sending
half, or is killed.  None of them says goodbye (DISC).  What is on a disk is only ever learnt by
reading through NBD.
"""

import contextlib
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from conftest import SANITIZED, SharedPage, need_holes, need_module, skip
from nbd import *
from origin import Origin
from test_model import SECONDS, random_seed
from test_proxy import Meanwhile, is_answered, original, proxy
from test_service import block_device
from test_snapshot import Snapshots

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4096
SIZE = 4 * MIB
CONTENT = pattern(0, SIZE)
ADDRESS = ["--laddr", "127.0.0.1", "--lport", "0"]
READ, WRITE, FLUSH, TRIM = NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_TRIM
ZEROES, DISC = NBD_CMD_WRITE_ZEROES, NBD_CMD_DISC
FUA, NO_HOLE = NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE
AT_ONCE = 5 if SANITIZED else 1     # seconds: for what waits for nothing
SHORT = 0.05                        # seconds in which a wrong server would have answered
hazard = pytest.mark.hazard

GONE = ["reset", "close", "half-close", "kill"]
WAYS = [*GONE, "stays"]
MODES = ["target", "cow-target", "cow-file", "proxy", "switched"]
all_modes = pytest.mark.parametrize("mode", MODES)
all_ways = pytest.mark.parametrize("how", WAYS)
all_gone = pytest.mark.parametrize("how", GONE)
all_transports = pytest.mark.parametrize("transport", ["tcp", "unix"])


# Clients that leave

def leave(client, how):
    """It goes without a word, or stays."""
    if how == "reset":
        client.reset()
    elif how == "close":
        client.close()
    elif how == "half-close":
        client.shutdown_write()
    elif how == "kill":
        with subprocess.Popen(["sleep", "1000"], pass_fds=[client.sock.fileno()]) as holder:
            client.close()
            holder.kill()


def pipeline(client, requests):
    """Sends (command, offset, payload or length, flags) in one piece; returns the cookies."""
    cookies, message = [], []
    for command, offset, what, flags in requests:
        payload, length = (what, len(what)) if isinstance(what, bytes) else (b"", what)
        cookie = client.next_cookie
        client.next_cookie += 1
        client.expect(cookie, Request(command, offset, length, flags))
        message += [client.header(command, offset, length, flags, cookie), payload]
        cookies.append(cookie)
    client.send(b"".join(message))
    return cookies


def take_answers(client):
    """Those that come although something is held up."""
    found = {}
    while client.pending and is_answered(client, SHORT):
        reply = client.collect()
        found[reply.cookie] = reply
    client.finished.update(found)


def overtake(server, older, newer, how):
    """While the disk holds changes of older, (client, cookies), that client leaves, and those of
    newer, (client, changes), are made.  Then the disk goes on."""
    (a, cookies), (b, changes) = older, newer
    leave(a, how)
    answers = pipeline(b, changes)
    take_answers(b)
    server.slow.release()
    assert not any(b.collect(answer).error for answer in answers)
    b.flush()
    assert how != "stays" or not any(a.collect(cookie).error for cookie in cookies)
    calm(server)


def write(offset, payload, flags=0):
    return WRITE, offset, payload, flags


def over(content, at, data):
    return content[:at] + data + content[at + len(data):]


def calm(server):
    """Until nothing is under way any more, whoever waits for it."""
    seen = []

    def is_calm():
        seen.append(server.is_asleep())
        return len(seen) >= 4 and all(seen[-4:])

    until(is_calm, pause=0.003, what="a server that sleeps")


def read(server, length, at=0):
    """By a client that has not been there before."""
    with server.client() as c:
        return c.pread(length, at)


# Servers

class SlowDisk(SharedPage):
    """The page that is shared with slow.c: its struct control.

    .hold(at, length)   the next change of that range waits
    .caught()           until it does; returns whether the thread also serves sockets
    .release()          and until it is done
    .hold_sync() .sync_caught() .release_sync()     the same for fdatasync()
    .jitter(seconds)    every second change is held up for some time, at most that
    """

    (START, END, LEFT, CLOSED, CAUGHT, INLINE, PASSED, SYNC_CLOSED, SYNC_CAUGHT,
     JITTER) = range(10)

    NUMBER = struct.Struct("=Q")

    def hold(self, at, length):
        for word in (self.CAUGHT, self.INLINE, self.PASSED):
            self.set(word, 0)
        self.set(self.START, at)
        self.set(self.END, at + length)
        self.set(self.CLOSED, 1)
        self.set(self.LEFT, 1)

    def caught(self):
        until(lambda: self.get(self.CAUGHT), what="a change that waits for the disk")
        return self.get(self.INLINE) > 0

    def release(self):
        self.set(self.LEFT, 0)
        self.set(self.CLOSED, 0)
        until(lambda: self.get(self.PASSED) == self.get(self.CAUGHT), pause=0.001,
              what="a change that was let go")

    def hold_sync(self):
        self.set(self.SYNC_CLOSED, 1)

    def sync_caught(self):
        until(lambda: self.get(self.SYNC_CAUGHT), what="a sync that waits for the disk")

    def release_sync(self):
        self.set(self.SYNC_CLOSED, 0)

    def jitter(self, seconds):
        self.set(self.JITTER, int(seconds * 1e6))


@pytest.fixture
def serve(server, proxy, disk, slow_library, tmp_path, request):
    """serve(mode, *options): starts a server of a disk.

    content, size       what is on the disk; as Origin() takes it
    place               the directory of its image, or of what is beside it
    transport           "unix" for a Unix socket
    cold                nothing is found in the page cache

    What it returns has a .slow (SlowDisk) and, in mode proxy, an .origin as well.  What waits is
    let go at the end.
    """
    def image(content, size, place):
        path = place / "disk.img"
        with open(path, "wb") as f:
            for at, data in (content if isinstance(content, dict) else {0: content}).items():
                os.pwrite(f.fileno(), data, at)
            f.truncate(size or len(content))
        return path

    def of_origin(mode, options, content, size, place, popen):
        origin = stack.enter_context(Origin(content, size))
        s = proxy(origin, *options, place=place, **popen)
        if mode == "switched":
            s.migrate()
            origin.die()
        return s

    def of_image(mode, options, content, size, place, popen):
        what = {"target": ["--target"], "device": ["--target"],
                "cow-target": ["--cow-target", "--cow-dir", place],
                "cow-file": ["--cow-target", "--cow-file", place / "overlay"]}[mode]
        path = (request.getfixturevalue("block_device")[0] if mode == "device" else
                image(content, size, place))
        return server(args=[*what, *options, path], **popen)

    def start(mode, *options, content=CONTENT, size=None, place=tmp_path, transport="tcp",
              cold=False):
        slow = SlowDisk(tmp_path / "slow", slow_library, **{"SLOW_COLD": 1} if cold else {})
        stack.callback(slow.set, SlowDisk.SYNC_CLOSED, 0)
        stack.callback(slow.set, SlowDisk.CLOSED, 0)
        address = ["--unix", tmp_path / "socket"] if transport == "unix" else ADDRESS
        begin = of_origin if mode in ("proxy", "switched") else of_image
        s = begin(mode, [*address, *options], content, size, place, {"env": slow.environment})
        s.slow = slow
        return s

    with contextlib.ExitStack() as stack:
        yield start


# A slow disk

def two_blocks(command, byte, at, flags=0):
    """A change of a test: of two blocks, or of a part of each."""
    return {"partial write": write(at + 100, byte * (2 * BLOCK - 200), flags),
            "zero": (ZEROES, at, 2 * BLOCK, flags),
            "zero, no hole": (ZEROES, at, 2 * BLOCK, flags | NO_HOLE),
            "trim": (TRIM, at, 2 * BLOCK, flags)}[command]


def result(change, content):
    """What a change makes of the content."""
    command, at, what, _ = change
    return over(content, at, what if command == WRITE else bytes(what))


OLDER = ["write", "partial write", "zero", "zero, no hole", "trim"]


def check_newer_change_wins(s, change, newer, how, first):
    """Both are of the two blocks at change's offset, which are written for the first time, or
    not.  Returns whether a loop was held up."""
    at = change[1] & -BLOCK
    with s.client() as a, s.client() as b:
        b.pread(2 * BLOCK, at)              # a proxy holds them then
        if not first:
            b.pwrite(CONTENT[at:at + 2 * BLOCK], at)
        calm(s)
        s.slow.hold(at, 2 * BLOCK)
        cookie, = pipeline(a, [change])
        on_loop = s.slow.caught()
        overtake(s, (a, [cookie]), (b, newer), how)
        got, before, after = b.pread(2 * BLOCK, at), CONTENT, result(change, CONTENT)
        for command in newer:
            before, after = result(command, before), result(command, after)
        before, after = (x[at:at + 2 * BLOCK] for x in (before, after))
        assert got[BLOCK:] in (before[BLOCK:], after[BLOCK:]), f"the newer one is lost ({how})"
        assert got[:BLOCK] in (before[:BLOCK], after[:BLOCK])
        assert how != "stays" or change[0] == TRIM or got == after
    return on_loop


@hazard("a write of a client that is gone lands over a newer one: a slow disk")
@pytest.mark.parametrize("how, flags, first", [
    ("reset", FUA, False), ("close", 0, True), ("half-close", FUA, True), ("stays", 0, False)],
    ids=["reset", "close", "half-close", "stays"])
@pytest.mark.parametrize("mode", [*MODES, "device"])
def test_newer_write_outlives_one_that_the_disk_held_up_on_its_loop(serve, mode, how, flags,
                                                                    first):
    """Where the disk was slow before, a loop leaves it to a worker for a while."""
    s = serve(mode, "--threads", 4)
    assert any(check_newer_change_wins(s, write(at, b"A" * 2 * BLOCK, flags),
                                       [write(at + BLOCK, b"B" * BLOCK)], how, first)
               for at in range(MIB, SIZE, 128 * KIB))


OLDER = ["partial write", "zero", "zero, no hole", "trim"]


@hazard("a write of a client that is gone lands over a newer one: a slow disk")
@pytest.mark.parametrize("older", OLDER)
@pytest.mark.parametrize("mode", [*MODES, "device"])
def test_newer_change_outlives_one_that_the_disk_held_up_on_a_worker(serve, mode, older):
    """Or two newer ones, the second of which is of a part of the first."""
    if older == "trim":
        need_holes()
    s = serve(mode, "--threads", 4, cold=older == "partial write")
    for i, how in enumerate(["reset", "close", "kill", "stays"]):
        at = (i + 4) * 64 * KIB
        newer = [write(at + BLOCK, b"B" * BLOCK), (ZEROES, at + BLOCK + 1, 100, NO_HOLE)]
        change = two_blocks(older, b"A", at, i % 2 * FUA)
        assert not check_newer_change_wins(s, change, newer[:1 + i % 2], how,
                                           first=i < 2)
    assert s.is_served()


@hazard("FAST_ZERO fails when a part has been zeroed")
@pytest.mark.parametrize("mode", MODES)
def test_fast_zero_that_newer_writes_cut_is_all_or_nothing(serve, mode):
    """On a file system in memory, which cannot keep blocks that it zeroes: a part of a block it can
    write, a whole one it refuses to clear fast."""
    if not os.access("/dev/shm", os.W_OK):
        skip("needs /dev/shm")
    flags, at = NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, MIB
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        s = serve(mode, "--threads", 4, place=Path(place))
        with s.client() as a, s.client() as b:
            a.pwrite(b"o" * 4 * BLOCK, at)
            s.slow.hold(at + 2 * BLOCK, BLOCK)
            held, = pipeline(b, [write(at + 2 * BLOCK, b"A" * 100)])
            s.slow.caught()
            zeroing, = pipeline(a, [(ZEROES, at + 100, 3 * BLOCK - 100, flags)])
            newer, = pipeline(a, [write(at + BLOCK + 200, b"B" * 100)])
            assert not a.collect(newer).error
            s.slow.release()
            assert not b.collect(held).error
            error = a.collect(zeroing).error
            assert error in (0, NBD_ENOTSUP)
            before = over(b"o" * 4 * BLOCK, 2 * BLOCK, b"A" * 100)
            after = over(before, 100, bytes(3 * BLOCK - 100))
            assert a.pread(4 * BLOCK, at) == over(before if error else after, BLOCK + 200, b"B" * 100)


@hazard("a write of a client that is gone lands over a newer one: pieces of a payload")
@pytest.mark.parametrize("flags", [0, FUA], ids=["plain", "fua"])
@pytest.mark.parametrize("mode", [*MODES, "device"])
def test_newer_write_outlives_each_piece_of_a_payload(serve, mode, flags):
    """One piece is stored, one is held up, one may still be in the socket.  Where its client
    stays, that one is newer if it is taken later."""
    s, piece = serve(mode, "--threads", 4), 16 * BLOCK
    for i, how in enumerate(["reset", "close", "half-close", "stays"]):
        at = (i + 1) * 4 * piece
        with s.client() as a, s.client() as b:
            cookie = a.next_cookie
            a.expect(cookie, Request(WRITE, at, 3 * piece, flags))
            a.send(a.header(WRITE, at, 3 * piece, flags, cookie) + b"A" * piece)
            until(lambda: b.pread(piece, at) == b"A" * piece, what="the first piece")
            calm(s)
            s.slow.hold(at + piece, piece)
            a.send(b"A" * piece)
            s.slow.caught()
            a.send(b"A" * piece)
            places = [at, at + piece, at + 2 * piece - BLOCK, at + 2 * piece,
                      at + 3 * piece - BLOCK]
            overtake(s, (a, [cookie]), (b, [write(place, b"B" * BLOCK) for place in places]), how)
            assert [b.pread(BLOCK, place) for place in places[:3]] == [b"B" * BLOCK] * 3, how
            assert all(b.pread(BLOCK, place) in (b"B" * BLOCK, b"A" * BLOCK)[:1 + (how == "stays")]
                       for place in places[3:]), f"what was in the socket ({how})"


@hazard("a write of a client that is gone lands over a newer one: what was not taken yet")
@all_transports
@pytest.mark.parametrize("mode", MODES)
def test_requests_behind_one_that_the_disk_holds_up_are_not_carried_out(serve, mode, transport):
    """They are in the socket when their client leaves."""
    s = serve(mode, "--threads", 4, transport=transport)
    for i, how in enumerate(GONE):
        at = (i + 4) * 64 * KIB
        changes = [write(at + BLOCK, b"A" * BLOCK), (ZEROES, at + 2 * BLOCK, BLOCK, NO_HOLE),
                   write(at + 3 * BLOCK, b"A" * 3 * BLOCK, FUA), (TRIM, at + 6 * BLOCK, BLOCK, 0)]
        with s.client() as a, s.client() as b:
            s.slow.hold(at, BLOCK)
            pipeline(a, [write(at, b"A" * BLOCK)])
            s.slow.caught()
            pipeline(a, changes)
            overtake(s, (a, []), (b, [write(at + BLOCK, b"B" * 6 * BLOCK, FUA)]), how)
            assert b.pread(6 * BLOCK, at + BLOCK) == b"B" * 6 * BLOCK, how


@hazard("a FUA write holds up others until it is durable")
@pytest.mark.parametrize("mode", ["target", "cow-file", "proxy", "switched"])
def test_write_does_not_wait_for_the_sync_of_an_older_one(serve, mode):
    s = serve(mode, "--threads", 4)
    with s.client() as a, s.client() as b:
        b.pread(BLOCK, MIB)
        calm(s)
        s.slow.hold_sync()
        cookie = a.request(WRITE, MIB, flags=FUA, payload=b"A" * BLOCK)
        s.slow.sync_caught()
        newer = b.request(WRITE, MIB + 100, payload=b"B" * 100)
        assert is_answered(b, AT_ONCE) and not b.collect(newer).error
        assert not is_answered(a, 0)
        s.slow.release_sync()
        assert not a.collect(cookie).error
        b.flush()
    assert read(s, BLOCK, MIB) == over(b"A" * BLOCK, 100, b"B" * 100)


@hazard("a write waits for a payload that does not come")
@all_modes
def test_write_does_not_wait_for_the_payload_of_an_older_one(serve, mode):
    """The part that has not come yet is newer."""
    s, half = serve(mode), 16 * BLOCK
    with s.client() as a, s.client() as b:
        cookie = a.next_cookie
        a.expect(cookie, Request(WRITE, MIB, 2 * half, 0))
        a.send(a.header(WRITE, MIB, 2 * half, 0, cookie) + b"A" * half)
        until(lambda: b.pread(half, MIB) == b"A" * half, what="the first half")
        newer = b.request(WRITE, MIB + half // 2, payload=b"B" * half)
        assert is_answered(b, AT_ONCE) and not b.collect(newer).error
        a.send(b"A" * half)
        assert not a.collect(cookie).error
    assert read(s, 2 * half, MIB) == b"A" * (half // 2) + b"B" * (half // 2) + b"A" * half


@hazard("a write that was repeated on another connection lands over a newer one")
@all_modes
def test_write_that_was_repeated_elsewhere_does_not_come_back(serve, mode):
    """The client does not wait until the server knows that a connection was cut."""
    s = serve(mode, "--threads", 4)
    with s.client() as a, s.client() as b, s.client() as c:
        c.pwrite(b"0" * BLOCK, MIB)
        s.slow.hold(MIB, BLOCK)
        pipeline(a, [write(MIB, b"1" * BLOCK)])
        s.slow.caught()
        a.reset()
        repeated = b.request(WRITE, MIB, payload=b"1" * BLOCK)
        if not is_answered(b, SHORT):
            s.slow.release()
        assert not b.collect(repeated).error
        c.pwrite(b"2" * BLOCK, MIB)
        c.flush()
        s.slow.release()
        calm(s)
    assert read(s, BLOCK, MIB) == b"2" * BLOCK


LIBNBD = """
import nbd, select, sys
uri, at, short = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
one, two = bytearray(b"1" * 4096), bytearray(b"2" * 4096)

def connect():
    h = nbd.NBD()
    h.connect_uri(uri)
    return h

def say(word):
    print(word, flush=True)

def hear():
    assert sys.stdin.readline()

handles = [connect() for _ in range(4)]
assert all(h.can_multi_conn() for h in handles)
handles[0].aio_pwrite(nbd.Buffer.from_bytearray(one), at)
hear()
del handles[0]                          # which closes it
h = handles[0]
repeated = h.aio_pwrite(nbd.Buffer.from_bytearray(one), at)
if h.poll(int(short * 1000)) == 0:
    say("waits")
while not h.aio_command_completed(repeated):
    h.poll(-1)
handles[1].pwrite(bytes(two), at)
handles[2].flush()
say("done")
hear()
assert bytes(handles[2].pread(4096, at)) == bytes(two), "the first write is back"
for h in handles:
    h.shutdown()
say("passed")
"""


@hazard("a write that was repeated on another connection lands over a newer one: libnbd")
@pytest.mark.parametrize("mode", ["target", "cow-file", "proxy"])
def test_libnbd_repeats_a_write_of_a_connection_that_was_cut(serve, mode):
    need_module("nbd", "python3-libnbd")
    s = serve(mode, "--threads", 4)
    with s.client() as c:
        c.pwrite(b"0" * BLOCK, MIB)
    s.slow.hold(MIB, BLOCK)
    with subprocess.Popen([sys.executable, "-c", LIBNBD, s.uri, str(MIB), str(SHORT)], cwd="/",
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        def tell():
            client.stdin.write("go on\n")
            client.stdin.flush()

        s.slow.caught()
        tell()
        word = client.stdout.readline()
        s.slow.release()
        if word == "waits\n":
            word = client.stdout.readline()
        assert word == "done\n"
        calm(s)
        tell()
        assert client.stdout.readline() == "passed\n"


# What takes long

@pytest.fixture
def roomy(ram):
    """The directory in memory, with room for what the tests put there."""
    free = os.statvfs(ram)
    if free.f_bavail * free.f_frsize < 2 * GIB:
        skip("needs 2 GiB of free memory in /dev/shm")
    return ram


@hazard("zeroing of a client that is gone destroys what is newer")
@pytest.mark.parametrize("how, flags", [
    ("reset", NO_HOLE | FUA), ("close", 0), ("close", NO_HOLE), ("stays", NO_HOLE)],
    ids=["reset, fua", "close, plain", "close", "stays"])
@all_modes
def test_newer_writes_outlive_a_long_zeroing(serve, roomy, mode, how, flags):
    """In memory there is no call that zeroes a range and makes no hole: it is written in pieces.
    One write goes where it has been, one where it is, and one where it will be."""
    size = 160 * MIB + 77
    s = serve(mode, "--threads", 4, content={0: b"o" * MIB}, size=size, place=roomy)
    places = [5 * BLOCK, MIB + 2 * BLOCK, 2 * MIB + 100, 100 * MIB, 159 * MIB + 5]
    with s.client() as a, s.client() as b:
        for at in places:
            b.pwrite(b"0" * 5000, at)
        s.slow.hold(MIB, 64 * KIB)
        cookie = a.request(ZEROES, 0, size - 1, flags)
        s.slow.caught()
        overtake(s, (a, [cookie]), (b, [write(at, b"B" * 5000) for at in places]), how)
        assert [b.pread(5000, at) for at in places] == [b"B" * 5000] * len(places)
        if how == "stays":
            assert not b.pread(MIB, 3 * MIB).strip(b"\0") and b.pread(BLOCK) == bytes(BLOCK)


@hazard("one client's long zeroing holds up the misses of all others")
@pytest.mark.parametrize("flags", [0, NO_HOLE], ids=["plain", "no hole"])
def test_misses_do_not_wait_for_a_long_zeroing(serve, roomy, flags):
    """Though another one lies in the midst of it.  Each attempt has a range of its own."""
    ranges = [0, GIB // 2]
    length, size = ranges[1], 2 * ranges[1] + 8 * MIB
    data = pattern(size - 8 * MIB, 8 * MIB)
    s = serve("proxy", "--threads", 4, content={size - 8 * MIB: data}, size=size, place=roomy)

    def work():
        first = ranges.pop()
        inside, elsewhere = first + 100 * MIB, len(ranges) * 4 * MIB
        with s.client() as a, s.client() as b, s.client() as c:
            s.slow.hold(first + MIB, BLOCK)
            zeroing = a.request(ZEROES, first, length - BLOCK, flags)
            s.slow.caught()
            b.request(READ, inside, MIB)
            s.origin.wait(lambda r: r.touches(inside, inside + MIB) and r.answered)
            s.slow.jitter(0.0004)       # of 64 KiB: then it takes a second
            s.slow.release()
            start = time.monotonic()
            assert c.pread(MIB, size - 8 * MIB + elsewhere) == data[elsewhere:elsewhere + MIB]
            seconds = time.monotonic() - start
            s.slow.jitter(0)
            assert not a.collect(zeroing).error
            assert seconds < (3 if SANITIZED else 0.5)

    once(work, attempts=len(ranges))


# A snapshot

@hazard("a write of a client that is gone lands over a newer one: the first copy of a snapshot")
@pytest.mark.parametrize("how", ["reset", "close", "stays"])
@pytest.mark.parametrize("mode", ["target", "switched"])
def test_newer_writes_outlive_those_that_wait_for_a_snapshot(serve, ram, mode, how):
    """In memory, where no file shares blocks with another."""
    s = serve(mode, "--threads", 4, place=ram)
    snapshots, pieces = Snapshots(s), [i * 64 * KIB for i in range(7)]
    with s.client() as a, s.client() as b:
        s.slow.hold(0, BLOCK)
        snapshots.signal()
        s.slow.caught()
        older = pipeline(a, [write(at, b"A" * 56 * KIB, i % 2 * FUA)
                             for i, at in enumerate(pieces)])
        calm(s)
        overtake(s, (a, older), (b, [write(at + 1, b"B" * 50 * KIB) for at in pieces]), how)
        until(lambda: snapshots.over() == 1, what="a snapshot")
        calm(s)
        assert [b.pread(50 * KIB, at + 1) for at in pieces] == [b"B" * 50 * KIB] * len(pieces)
    (path, _), = snapshots.lines("complete")
    assert Path(path).read_bytes() == CONTENT


# A silent origin

@pytest.fixture
def silent(proxy, tmp_path):
    """silent(*options, content, transport): a proxy whose origin answers nothing any more, once
    it has told of the block at offset 0.  It has .origin, which may go on."""
    with contextlib.ExitStack() as stack:
        def start(*options, content=CONTENT, size=None, transport="tcp"):
            origin = stack.enter_context(Origin(content, size))
            unix = ["--unix", tmp_path / "socket"] if transport == "unix" else []
            p = proxy(origin, *unix, "--threads", 4, *options)
            assert read(p, BLOCK) == origin.pread(BLOCK)
            p.quiet()
            origin.hold()
            return p

        yield start


def is_asked(server, at):
    """Until the origin is asked for that block."""
    server.origin.wait(lambda r: r.held and r.touches(at, at + 1))


def waiting(server, number):
    """Until so many requests wait."""
    until(lambda: server.query("pending-requests") == number, what=f"{number} requests that wait")


PARTIAL = {"write": write(MIB + 100, b"A" * 200), "write, fua": write(MIB + 100, b"A" * 200, FUA),
           "zero": (ZEROES, MIB + 100, 200, 0), "zero, no hole": (ZEROES, MIB + 100, 200, NO_HOLE),
           "large write": write(MIB + 100, b"A" * 600 * KIB),
           "long zero": (ZEROES, MIB + 100, 600 * KIB, NO_HOLE | FUA)}


@hazard("a write of a client that is gone lands over a newer one: a silent origin")
@all_transports
@all_ways
def test_newer_writes_outlive_those_that_waited_for_the_origin(silent, how, transport):
    """That of a client which stays is answered, with what is left of it done."""
    p = silent(content=pattern(0, 8 * MIB), transport=transport)
    changes = [(command, at + i * MIB, what, flags)
               for i, (command, at, what, flags) in enumerate(PARTIAL.values())]
    with contextlib.ExitStack() as clients, p.client() as b:
        older = []
        for change in changes:
            a = clients.enter_context(p.client())
            older.append((a, *pipeline(a, [change])))
            is_asked(p, change[1])
        for a, _ in older:
            leave(a, how)
        for _, at, _, _ in changes:
            b.pwrite(b"B" * 2 * BLOCK, at & -BLOCK)
        b.flush()
        p.origin.release()
        if how == "stays":
            assert not any(a.collect(cookie).error for a, cookie in older)
        waiting(p, 0)
        calm(p)
        for change in changes:
            first, length = change[1] & -BLOCK, len(change[2]) if change[0] == WRITE else change[2]
            assert b.pread(2 * BLOCK, first) == b"B" * 2 * BLOCK
            if how == "stays" and length > 3 * BLOCK:
                rest = length - 3 * BLOCK
                assert b.pread(rest, first + 2 * BLOCK) == result(
                    change, p.origin.pread(8 * MIB))[first + 2 * BLOCK:][:rest]


@hazard("a request in flight is never answered: one of which newer ones have left many pieces")
def test_change_that_was_cut_very_often_gets_what_it_waits_for(silent):
    """Newer ones wait for it from some number on, but the blocks that it waits for do not."""
    p, pieces = silent(size=40 * MIB), 4096
    with p.client() as a, p.client() as b:
        cookie, = pipeline(a, [(ZEROES, MIB + 1, 39 * MIB - 1, 0)])
        is_asked(p, MIB)
        pipeline(b, [write(MIB + 2 * i * BLOCK, b"B" * BLOCK) for i in range(1, pieces)])
        assert not any(reply.error for reply in b.collect_all().values())
        p.origin.release()
        assert not a.collect(cookie).error
        assert b.pread(4 * BLOCK, MIB + 2 * BLOCK) == (b"B" * BLOCK + bytes(BLOCK)) * 2


@hazard("a write of a whole block waits for an older one that waits for the origin")
@pytest.mark.parametrize("newer", ["write", "write, fua", "zero", "zero, no hole"])
def test_write_of_a_whole_block_does_not_wait_for_a_silent_origin(silent, newer):
    """Nor do older changes of parts of it then, of which nothing is left."""
    p, at = silent(), MIB
    byte = b"B" if "write" in newer else b"\0"
    flags = FUA * ("fua" in newer) | NO_HOLE * ("no hole" in newer)
    with p.client() as a, p.client() as b:
        older = pipeline(a, [write(at + 100, b"A" * 200), write(at + 1000, b"a" * 96, FUA),
                             (ZEROES, at + 2000, 500, NO_HOLE)])
        is_asked(p, at)
        waiting(p, len(older))
        answer, = pipeline(b, [write(at, byte * BLOCK, flags) if "write" in newer else
                               (ZEROES, at, BLOCK, flags)])
        assert is_answered(b, AT_ONCE) and not b.collect(answer).error
        assert is_answered(a, AT_ONCE), "the older ones are not answered"
        assert not any(a.collect(cookie).error for cookie in older)
        assert b.pread(BLOCK, at) == byte * BLOCK
    p.origin.release()
    p.quiet()
    assert read(p, BLOCK, at) == byte * BLOCK


# Of 1000 to 3000, what is newer.  None of them leaves nothing.
OVERLAPS = {
    "left": [(0, 1500)], "right": [(2500, 3500)], "middle": [(1500, 2000)],
    "two pieces": [(1200, 1400), (2000, 2400)], "all but the first byte": [(1001, 3000)],
    "all but the last byte": [(999, 2999)], "the ends": [(900, 1100), (2900, 3100)],
    "one after the other": [(1100, 2000), (1500, 2500), (1400, 1600)],
    "next to it": [(999, 1000), (3000, 3001)],
}


@hazard("a write that waits for the origin loses what a newer one has left of it")
@pytest.mark.parametrize("whose", ["one client's", "another client's", "of one that has gone"])
def test_overlapping_writes_that_wait_end_in_the_order_of_their_arrival(silent, whose):
    """A part that is not newer stays; that of a client that has gone, as may be."""
    p = silent()
    expected, count = CONTENT, 0
    without = CONTENT
    with p.client() as a, p.client() as other:
        b = a if whose == "one client's" else other
        cookies = []
        for i, pieces in enumerate(OVERLAPS.values()):
            at = MIB + i * 64 * KIB
            older = write(at + 1000, b"A" * 2000)
            cookies.append((a, *pipeline(a, [older])))
            is_asked(p, at)
            newer = [write(at + first, bytes([ord("B") + n]) * (end - first))
                     for n, (first, end) in enumerate(pieces)]
            cookies += [(b, cookie) for cookie in pipeline(b, newer)]
            count += 1 + len(newer)
            waiting(p, count)
            expected = result(older, expected)
            for change in newer:
                expected, without = result(change, expected), result(change, without)
        if whose == "of one that has gone":
            a.reset()
            cookies = [(c, cookie) for c, cookie in cookies if c is b]
        p.origin.release()
        assert not any(c.collect(cookie).error for c, cookie in cookies)
        calm(p)
        for i, name in enumerate(OVERLAPS):
            at = MIB + i * 64 * KIB
            got = other.pread(BLOCK, at)
            assert got == expected[at:at + BLOCK] or (
                whose == "of one that has gone" and got == without[at:at + BLOCK]), name


@hazard("a write that waits for the origin loses what a newer one has left of it: other blocks")
def test_write_keeps_its_other_blocks_when_one_was_written_anew(silent):
    """It waits for the blocks at both its ends; the newer one is of the first, of the last, of
    one between them."""
    p = silent(content=pattern(0, 8 * MIB))
    expected = pattern(0, 8 * MIB)
    with p.client() as a, p.client() as b:
        older = []
        for i in range(3):
            at = MIB + i * MIB
            change = write(at + 1000, b"A" * 4 * BLOCK)
            older += pipeline(a, [change])
            is_asked(p, at)
            newer = write(at + [0, 2, 4][i] * BLOCK, b"B" * BLOCK)
            b.pwrite(newer[2], newer[1])
            expected = result(newer, result(change, expected))
        assert not is_answered(a, SHORT)
        p.origin.release()
        assert not any(a.collect(cookie).error for cookie in older)
        for i in range(3):
            at = MIB + i * MIB
            assert b.pread(5 * BLOCK, at) == expected[at:at + 5 * BLOCK], i


@hazard("a write that was repeated on another connection lands over a newer one: a silent origin")
@all_gone
def test_write_that_waited_and_was_repeated_does_not_come_back(silent, how):
    p = silent()
    with p.client() as a, p.client() as b, p.client() as c:
        pipeline(a, [write(MIB + 100, b"1" * 200)])
        is_asked(p, MIB)
        leave(a, how)
        repeated, = pipeline(b, [write(MIB + 100, b"1" * 200)])
        c.pwrite(b"0" * BLOCK, MIB)     # it has now all that it needs
        assert is_answered(b, AT_ONCE) and not b.collect(repeated).error
        c.pwrite(b"2" * 200, MIB + 100)
        c.flush()
        p.origin.release()
        p.quiet()
        calm(p)
        assert c.pread(BLOCK, MIB) == over(b"0" * BLOCK, 100, b"2" * 200)


MORE_THAN_IT_TAKES = 800            # requests of one client


def small_writes(at, byte):
    """Of parts of one block, more than a server takes from one client at once."""
    return [write(at + 5 + 2 * i, byte * 2) for i in range(MORE_THAN_IT_TAKES)]


@hazard("a write of a client that is gone lands over a newer one: what was not taken yet")
@all_transports
@all_gone
def test_requests_behind_those_that_wait_for_the_origin_are_not_carried_out(silent, how,
                                                                            transport):
    p = silent(transport=transport)
    with p.client() as a, p.client() as b:
        pipeline(a, small_writes(MIB, b"A"))
        pipeline(a, [write(2 * MIB, b"A" * 2 * BLOCK), (ZEROES, 2 * MIB, 4 * BLOCK, NO_HOLE)])
        is_asked(p, MIB)
        calm(p)
        leave(a, how)
        b.pwrite(b"B" * 4 * BLOCK, 2 * MIB)
        b.flush()
        p.origin.release()
        waiting(p, 0)
        p.quiet()
        calm(p)
        assert b.pread(4 * BLOCK, 2 * MIB) == b"B" * 4 * BLOCK


# An orderly end

@hazard("what was sent before DISC is lost")
@pytest.mark.parametrize("end, transport", [("close", "tcp"), ("close", "unix"),
                                            ("half-close", "tcp"), ("waits", "unix")])
@all_modes
def test_what_was_sent_before_disc_is_carried_out(serve, mode, end, transport):
    """In one packet, of which the server takes all."""
    s = serve(mode, transport=transport)
    changes = [write(MIB, b"A" * BLOCK), write(MIB + 5 * BLOCK, b"A" * 100, FUA),
               (ZEROES, MIB + 10 * BLOCK, 5000, NO_HOLE)]
    expected = CONTENT
    for change in changes:
        expected = result(change, expected)
    with s.client() as c:
        cookies = pipeline(c, [*changes, (DISC, 0, 0, 0)])
        leave(c, end)
        if end != "close":
            assert not any(c.collect(cookie).error for cookie in cookies[:-1])
            c.expect_closed()
        until(lambda: read(s, 20 * BLOCK, MIB) == expected[MIB:MIB + 20 * BLOCK],
              what="what was sent before DISC")


@hazard("what was sent before DISC is lost: much")
@pytest.mark.parametrize("end, transport", [("half-close", "unix"), ("waits", "tcp")])
@all_modes
def test_many_writes_before_disc_are_carried_out(serve, mode, end, transport):
    s, number, length = serve(mode, content=bytes(8 * MIB), transport=transport), 120, 64 * KIB
    with s.client() as c:
        def send():
            for i in range(number):
                c.send(c.header(WRITE, i * length, length, 0, i) + bytes([i + 1]) * length)
            c.send(c.header(DISC))
            leave(c, end)

        for i in range(number):
            c.expect(i, Request(WRITE, i * length, length, 0))
        sender = Meanwhile(send)
        assert not any(reply.error for reply in c.collect_all().values())
        sender.result()
        c.expect_closed()
    assert read(s, number * length) == b"".join(bytes([i + 1]) * length for i in range(number))


@hazard("what was sent before DISC is lost: a silent origin")
@pytest.mark.parametrize("end, transport", [("half-close", "tcp"), ("waits", "unix")])
@pytest.mark.parametrize("older", ["one", "many"])
def test_what_was_sent_before_disc_is_carried_out_when_the_origin_answers(silent, older, end,
                                                                          transport):
    """Also when there are so many requests before it that the server does not read DISC."""
    p = silent(transport=transport)
    changes = small_writes(MIB, b"A")[:1 if older == "one" else None]
    changes += [write(2 * MIB, b"A" * 2 * BLOCK), write(2 * MIB + 5 * BLOCK, b"A" * 10, FUA)]
    expected = CONTENT
    for change in changes:
        expected = result(change, expected)
    with p.client() as c:
        cookies = pipeline(c, [*changes, (DISC, 0, 0, 0)])
        leave(c, end)
        is_asked(p, MIB)
        calm(p)
        p.origin.release()
        assert not any(c.collect(cookie).error for cookie in cookies[:-1])
        c.expect_closed()
    p.quiet()
    for at in (MIB, 2 * MIB):
        assert read(p, 8 * BLOCK, at) == expected[at:at + 8 * BLOCK]


@hazard("what was sent before DISC is lost: a slow disk")
@all_modes
def test_what_was_sent_before_disc_is_carried_out_when_the_disk_answers(serve, mode):
    s = serve(mode, "--threads", 4)
    with s.client() as a:
        s.slow.hold(MIB, BLOCK)
        cookies = pipeline(a, [write(MIB, b"A" * BLOCK)])
        s.slow.caught()
        cookies += pipeline(a, [write(2 * MIB, b"A" * BLOCK), (DISC, 0, 0, 0)])
        a.shutdown_write()
        s.slow.release()
        assert not any(a.collect(cookie).error for cookie in cookies[:-1])
        a.expect_closed()
    assert read(s, BLOCK, MIB) == read(s, BLOCK, 2 * MIB) == b"A" * BLOCK


# Clients that gave up

PLACES = 8


@hazard("clients that gave up keep their places while the origin is silent")
@pytest.mark.parametrize("requests", [2, 40], ids=["read", "not read any more"])
@pytest.mark.parametrize("how, transport", [("reset", "tcp"), ("close", "tcp"), ("close", "unix"),
                                            ("half-close", "unix"), ("kill", "tcp")])
def test_clients_that_gave_up_give_back_all_at_once(silent, how, requests, transport):
    """They have asked for what the origin does not deliver; a new one is served from the cache."""
    p = silent("--max-connections", PLACES, content=pattern, size=64 * MIB,
               transport=transport)
    before = p.rss()
    with contextlib.ExitStack() as clients:
        for i in range(PLACES):
            c = clients.enter_context(p.client())
            pipeline(c, [(READ, (2 + (i + k) % 60) * MIB, MIB, 0) for k in range(requests)])
            pipeline(c, [write((2 + i) * MIB + 100, b"A" * 200)])
            is_asked(p, (2 + i) * MIB)
        calm(p)
        assert p.query("clients") == PLACES
        for c in p.clients[-PLACES:]:
            leave(c, how)
        until(lambda: p.query("clients", "pending-requests", "buffer-bytes") == [0, 0, 0],
              seconds=AT_ONCE, what="places, requests and memory that are given back")
    assert read(p, BLOCK) == p.origin.pread(BLOCK)
    assert SANITIZED or p.rss() < before + 8 * MIB
    p.origin.release()
    p.quiet()
    assert read(p, 3 * MIB, 2 * MIB) == p.origin.pread(3 * MIB, 2 * MIB)


@hazard("a client that left keeps its place until the origin answers")
@all_gone
def test_end_of_a_client_is_noticed_while_it_waits(silent, how):
    """By the server's log, and by the connection of one that closed its half alone."""
    p = silent()
    with p.client() as c:
        pipeline(c, [(READ, MIB, BLOCK, 0), write(2 * MIB + 1, b"A")])
        is_asked(p, MIB)
        leave(c, how)
        until(lambda: p.query("clients") == 0, seconds=AT_ONCE, what="the end")
        assert "disconnected" in p.log()
        if how == "half-close":
            c.expect_closed()
    assert read(p, BLOCK) == CONTENT[:BLOCK]


# What waits

@hazard("SIGTERM waits for a silent origin")
def test_server_ends_soon_though_requests_wait_for_the_origin(silent):
    """And nobody gets an error, who would take it for one of the disk."""
    p = silent()
    with p.client() as c, p.client() as idle:
        pipeline(c, [(READ, MIB, BLOCK, 0), write(2 * MIB + 1, b"A"),
                     (ZEROES, 3 * MIB + 1, 10, 0), (NBD_CMD_CACHE, MIB, BLOCK, 0)])
        is_asked(p, 3 * MIB)
        start = time.monotonic()
        p.terminate()
        c.expect_closed()
        idle.expect_closed()
        p.wait()
        assert time.monotonic() - start < 2 + AT_ONCE


@hazard("requests that wait shut out those that need not: others have left")
def test_client_that_found_no_room_goes_on_when_others_have_left(silent):
    p = silent("--max-queue-size", 8)
    with p.client() as a, p.client() as b:
        pipeline(a, [(READ, MIB + i * BLOCK, BLOCK, 0) for i in range(6)])
        waiting(p, 6)
        *_, cached = pipeline(b, [(READ, 2 * MIB + i * BLOCK, BLOCK, 0) for i in range(3)]
                              + [(READ, 0, BLOCK, 0)])
        waiting(p, 8)
        a.close()
        assert b.collect(cached).data == CONTENT[:BLOCK]
        p.origin.release()
        b.collect_all()


@hazard("what waits for the origin holds up the switch, or a snapshot after it")
def test_nothing_holds_up_a_forced_switch_or_a_snapshot_after_it(silent, ram):
    """There are requests that wait for the origin, and half a payload."""
    p = silent()
    with p.client() as a, p.client() as b:
        cookies = pipeline(a, [(READ, MIB, BLOCK, 0), write(2 * MIB + 1, b"A" * 10),
                               (ZEROES, 3 * MIB + 1, 10, 0)])
        is_asked(p, 3 * MIB)
        b.send(b.header(WRITE, 3 * MIB + 8 * BLOCK, 2 * BLOCK, 0, 7) + b"B" * BLOCK)
        calm(p)
        p.switch(force=True)
        replies = [a.collect(cookie) for cookie in cookies]
        assert not any(reply.error for reply in replies)
        assert replies[0].data == bytes(BLOCK)
        path, _, _ = Snapshots(p).take()
        content = path.read_bytes()
        path.unlink()
        assert content[:BLOCK] == CONTENT[:BLOCK]
        assert content[2 * MIB:2 * MIB + BLOCK] == over(bytes(BLOCK), 1, b"A" * 10)
        b.expect(7, Request(WRITE, 3 * MIB + 8 * BLOCK, 2 * BLOCK, 0))
        b.send(b"B" * BLOCK)
        assert not b.collect(7).error


# Chance

UNIT = 512
UNITS = 8                           # of a block
BLOCKS = 64


class Stamps:
    """What each unit of some blocks may show.

    A write has a stamp, which fills its units.  It is over when it is acknowledged, or when its
    connection was cut.  What is sent after that is newer, and so is what is sent after it on the
    same connection; nothing older may show once that is acknowledged.
    """

    class Write:
        def __init__(self, client, stamp, first, count, sent):
            self.client, self.stamp, self.first, self.count = client, stamp, first, count
            self.sent, self.over, self.acknowledged = sent, None, None

        @property
        def payload(self):
            return struct.pack("<Q", self.stamp) * (self.count * UNIT // 8)

        def is_older(self, other):
            """Whether it must not show where the other one was carried out."""
            return self.sent < other.sent and (
                self.client is other.client or (self.over or other.sent) < other.sent)

    def __init__(self, base):
        """base: what is there before, with a stamp of its own."""
        self.base, self.now, self.stamps = base, 0, 0
        self.writes = [[] for _ in range(BLOCKS * UNITS)]

    def tick(self):
        self.now += 1
        return self.now

    def begin(self, client, first, count, stamp=None):
        self.stamps += stamp is None
        w = self.Write(client, stamp or self.stamps, first, count, self.tick())
        for unit in range(first, first + count):
            self.writes[unit].append(w)
        return w

    def acknowledge(self, w):
        w.acknowledged = w.over = self.tick()

    def cut(self, w):
        w.over = self.tick()

    def may_show(self, unit):
        """The stamps, and None for what was there before."""
        done = [w for w in self.writes[unit] if w.acknowledged]
        return {w.stamp for w in self.writes[unit] if not any(map(w.is_older, done))} | (
            set() if done else {None})

    def check(self, data):
        for unit in range(BLOCKS * UNITS):
            got = data[unit * UNIT:(unit + 1) * UNIT]
            allowed = self.may_show(unit)
            assert got in [self.base[unit * UNIT:(unit + 1) * UNIT] if stamp is None else
                           struct.pack("<Q", stamp) * (UNIT // 8) for stamp in allowed], (
                f"unit {unit} shows {struct.unpack_from('<Q', got)[0]}, not one of {allowed}")


class Storm:
    """Connections that write, one of which is cut now and then; another one repeats then what
    it owed, and all go on."""

    def __init__(self, server, dice, at, base):
        self.server, self.dice, self.at, self.stamps = server, dice, at, Stamps(base)
        self.clients = [server.client() for _ in range(4)]
        self.in_flight = {c: {} for c in self.clients}      # {cookie: Write}
        self.left = []                                      # that have closed their half alone

    def send(self, c, first=None, count=None, stamp=None):
        if count is None:
            count = self.dice.choice([1, 3, UNITS, UNITS, 3 * UNITS])
            first = self.dice.randrange(BLOCKS * UNITS - count + 1)
            if count % UNITS == 0:
                first -= first % UNITS
        w = self.stamps.begin(c, first, count, stamp)
        cookie = c.request(WRITE, self.at + first * UNIT, 0, self.dice.choice([0, 0, 0, FUA]),
                           w.payload)
        self.in_flight[c][cookie] = w

    def receive(self, seconds):
        ready, _, _ = select.select([c.sock for c in self.clients if self.in_flight[c]], [], [],
                                    seconds)
        for c in [c for c in self.clients if c.sock in ready]:
            reply = c.collect()
            assert not reply.error
            self.stamps.acknowledge(self.in_flight[c].pop(reply.cookie))

    def cut(self):
        victim = self.clients.pop(self.dice.randrange(len(self.clients)))
        leave(victim, self.dice.choice(["reset", "close", "half-close"]))
        self.left.append(victim)
        owed = self.in_flight.pop(victim).values()
        for w in owed:
            self.stamps.cut(w)
        for w in owed:
            self.send(self.dice.choice(self.clients), w.first, w.count, w.stamp)
        self.clients.append(c := self.server.client())
        self.in_flight[c] = {}

    def run(self, steps):
        for _ in range(steps):
            c = self.dice.choice(self.clients)
            if len(self.in_flight[c]) < 6:
                self.send(c)
            if self.dice.random() < 0.05:
                self.cut()
            self.receive(0)
        while any(self.in_flight.values()):
            self.receive(DEADLINE)
        for c in [*self.clients, *self.left]:
            c.close()
        calm(self.server)
        self.stamps.check(read(self.server, BLOCKS * BLOCK, self.at))


@hazard("a write of a client that is gone lands over a newer one")
@pytest.mark.limit(120 + 3 * int(SECONDS))
@pytest.mark.parametrize("mode", ["target", "cow-file", "proxy"])
def test_no_block_shows_what_is_older_than_what_was_acknowledged(serve, mode):
    """Each round has blocks that were not written yet.  The disk is slow now and then, and so is
    the origin."""
    rounds, length, end = 200, BLOCKS * BLOCK, time.monotonic() + SECONDS / 2
    content, seed = pattern(0, rounds * length), random_seed()
    print(f"XNBD_SEED={seed}")
    dice = random.Random(seed)
    s = serve(mode, "--threads", 4, content=content)
    if mode == "proxy":
        s.origin.delay = lambda request: dice.choice([0, 0, 0.002, 0.03])
    for number in range(rounds):
        at = number * length
        s.slow.jitter(dice.choice([0.0005, 0.003]))
        Storm(s, dice, at, content[at:at + length]).run(150)
        if time.monotonic() > end:
            break


# A slow disk, and who shares the thread

@hazard("a disk whose writes are slow holds up another export")
def test_write_after_a_slow_one_is_work_for_a_worker(serve):
    """For much longer than the slow one took, however long that was."""
    s = serve("target", content=bytes(64 * BLOCK))
    with s.client() as c:
        s.slow.hold(0, BLOCK)
        first = c.request(WRITE, 0, payload=b"1" * BLOCK)
        if not s.slow.caught():
            skip("no write is done by a thread that serves sockets here")
        time.sleep(0.7)
        s.slow.release()
        assert not c.collect(first).error
        s.slow.hold(8 * BLOCK, BLOCK)
        second = c.request(WRITE, 8 * BLOCK, payload=b"2" * BLOCK)
        assert not s.slow.caught()
        s.slow.release()
        assert not c.collect(second).error
