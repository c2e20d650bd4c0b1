"""The proxy: what is read is the origin's, or what was written last; the cache
is kept; a target takes over; and the origin is never written to.

Origins and clients here are real programs.  origin.py is one where it matters
what an origin does at which moment.  What is on a disk is only ever learnt by
reading through NBD, or from a cache image after its server has ended.

Many tests of other modes are made on a proxy as well: they are imported, and
find fixtures of the same names here.
"""

import contextlib
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest

from conftest import SANITIZED, Server, end_all, make_disk, need, need_holes, need_punch
from nbd import *
from origin import Origin, failing
from test_clients import (
    FIO_SIZE, fio, nbdcopy, qemu_img, tool,
    test_libnbd_handles_agree_with_a_model, test_nbdcopy_keeps_holes, test_nbdcopy_out,
    test_nbdinfo_maps_holes, test_qemu_img_compares, test_qemu_img_converts_out,
    test_qemu_img_maps_holes, test_qemu_io_may_not_write_a_readonly_export)
from test_cow import (
    BLOCK, DATA, HOLE, RACES, WRITE, ZERO, Map, at_once, bits, check_places, check_race, cleared,
    digest, directory_instead, everything, fails_for_good, fifo_instead, header_with, link_instead,
    map_is_the_overlay, map_of_garbage, map_of_length, map_of_zeros, named, requests_of,
    spoil_uncommitted, status_of_blocks, traced,
    test_client_that_dies_in_a_payload_leaves_each_block_old_or_new,
    test_holes_of_base_and_overlay_are_read_as_zeros,
    test_nbdcopy_reads_the_disk_with_many_connections, test_nbdcopy_writes_the_disk,
    test_neighbours_marked_at_the_same_moment_all_stay, test_qemu_io_writes_zeroes_and_reads,
    test_reader_beside_a_first_write_finds_old_or_new, test_what_one_client_wrote_all_read)
from test_hazards import (
    send_until_blocked,
    test_burst_of_thousands_of_requests, test_closing_with_reads_in_flight,
    test_connections_that_read_at_once_get_their_own_bytes, test_early_read_errors_are_chunks,
    test_flush_as_the_first_command, test_length_0_touches_nothing,
    test_random_requests_get_one_reply_each, test_ranges_that_wrap_change_nothing,
    test_reads_around_the_sizes_of_buffers, test_refused_payload_that_arrives_slowly_is_drained,
    test_replies_are_complete_when_they_are_read_late)
from test_model import (ALLOCATION, DISKS, SECONDS, Generator, Model, Session, dialect, exercise,
                        extents, random_seed, turn)
from test_protocol import (
    test_disc_finishes_what_is_outstanding, test_early_read_error_is_of_the_negotiated_kind,
    test_fast_zero_zeroes_or_changes_nothing, test_flags_of_each_command,
    test_flushed_change_shows_on_all_connections, test_many_requests_in_flight_are_all_answered,
    test_readonly_refuses_to_write, test_readonly_serves_all_else,
    test_shutdown_answers_what_was_received_and_nothing_else,
    test_shutdown_closes_in_the_middle_of_a_payload,
    test_trim_discards_whole_blocks_and_keeps_the_rest,
    test_two_requests_with_one_cookie_get_two_replies,
    test_write_zeroes_zeroes_exactly_its_range)
from test_service import alone, block_device, need_ipv6, refused, syslog
from test_snapshot import UNIT, Load, Numbered, Snapshots, file_system, leave, report

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 4 * MIB + 77
CONTENT = pattern(0, SIZE)
ADDRESS = ["--laddr", "127.0.0.1", "--lport", "0"]
READ, TRIM, CACHE, FLUSH = NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_FLUSH
FUA, NO_HOLE, FAST = NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FAST_ZERO
hazard = pytest.mark.hazard
all_replies = pytest.mark.parametrize("structured", [False, True, EXTENDED],
                                      ids=["simple", "structured", "extended"])


# The control socket

class Refused(Exception):
    """A command was answered with an error."""


class Control:
    """A connection to a control socket."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(path))
        self.input = self.sock.makefile(newline="\n")

    def send(self, line):
        self.sock.sendall(line.encode() + b"\n")

    def answer(self):
        """[(name, value)] up to "ok"; raises Refused."""
        found = []
        while (line := self.input.readline()) != "ok\n":
            assert line.endswith("\n"), f"the answer ends with {line!r} after {found}"
            name, _, value = line[:-1].partition(": ")
            if name == "error":
                refusal = Refused(value)
                refusal.before = found
                raise refusal
            found.append((name, value))
        return found

    def ask(self, line):
        self.send(line)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.input.close()
        self.sock.close()


def number(text):
    return int(text) if text.isdecimal() else text


# Proxies and origins

def remote_of(origin):
    """The origin in the proxy's command line."""
    if isinstance(origin, list):
        return origin
    if not isinstance(origin, Server):
        return origin.arguments
    first = origin.address
    return [f"unix:{first}"] if isinstance(first, str) else [first[0], first[1]]


class Proxy(Server):
    """A running proxy.

    .origin                     a Server, an Origin, or what the command line has
    .image .bitmap .control     its files
    .map                        the bitmap, to do to it what machines do
    """

    def __init__(self, origin, options, files, directory, count, popen):
        self.origin = origin
        self.image, self.bitmap, self.control = files
        self.map = Map(self.bitmap)
        own = {"--unix", "--laddr", "--inetd", "--connected-fd"} & {str(o) for o in options}
        self.command_line = ["--proxy", *([] if own else ADDRESS), *options, *remote_of(origin),
                             *files]
        super().__init__(self.command_line, directory, f"-proxy{count}", popen)

    @property
    def path(self):
        """As test_cow calls it."""
        return self.image

    def ask(self, line):
        with Control(self.control) as control:
            return control.ask(line)

    def query(self, *wanted):
        """{name: value}, or the values of some names."""
        told = {name: number(value) for name, value in self.ask("query")}
        return told if not wanted else told[wanted[0]] if len(wanted) == 1 else [
            told[name] for name in wanted]

    def cached(self):
        return self.query("cached-blocks")

    def quiet(self):
        """Until it wants nothing of the origin any more, and has put away what came; reading
        ahead ends, too."""
        until(lambda: self.query("origin-requests", "pending-requests") == [0, 0]
              and self.is_asleep(), what="no request to the origin")
        return self

    def waits(self, requests=1):
        """Until so many requests wait for the origin."""
        until(lambda: self.query("origin-requests") >= requests, what="a miss")

    def cache_all(self):
        return self.ask("cache-all")

    def switch(self, force=False):
        return self.ask("switch force" if force else "switch")

    def migrate(self):
        """All that a migration does but for the end of the origin."""
        self.cache_all()
        self.switch()
        assert self.query("mode") == "target"


@pytest.fixture
def original(tmp_path):
    """original(size, content, places): an image for an origin, with data at
    {offset: bytes} as well.  The test fails if it changes; so it does with
    original.watch(path)."""
    watched = {}

    def watch(path):
        watched[path] = digest(path)
        return path

    def make(size=None, content=b"", places=None):
        path = make_disk(tmp_path / f"original{len(watched)}.img", size, content)
        with open(path, "r+b") as f:
            for offset, data in (places or {}).items():
                os.pwrite(f.fileno(), data, offset)
        return watch(path)

    make.watch = watch
    yield make
    assert {path: digest(path) for path in watched} == watched, "the origin's image has changed"
    for path in watched:
        path.unlink()


@pytest.fixture
def proxy(original, server, tmp_path):
    """proxy(origin, *options): starts a proxy and waits until it listens.

    origin      an image, which a target serves then on a Unix socket; a Server;
                an Origin; or [host, port] or [unix:path]
    name        of its files: one of the same name finds the cache of the first
    place       the directory of the cache
    image       the path of the cache image
    """
    started = []

    def start(origin, *options, name="cache", place=tmp_path, image=None, wait=True, **popen):
        if isinstance(origin, Path):
            origin = server(origin, "--unix", tmp_path / f"origin{len(started)}.sock")
        files = [image or place / f"{name}.img", place / f"{name}.map", tmp_path / f"{name}.ctl"]
        one = Proxy(origin, options, files, tmp_path, len(started), popen)
        started.append(one)
        return one.wait_ready() if wait else one

    yield start
    end_all(started)


@pytest.fixture
def revive(server):
    """revive(origin): a target that was killed comes back at its address."""
    return lambda origin: server(args=origin.arguments)


@pytest.fixture
def image(original, request):
    """As large as the test wants it, which may be one of another file."""
    return original(content=pattern(0, request.function.__globals__["SIZE"]))


# What tests of other files call their server and its image

def linked(p):
    """Once it has its links to the origin: tests of others count sockets."""
    until(lambda: p.sockets() == 4, what="two listeners and two links")
    return p


@pytest.fixture
def target(proxy, image):
    return linked(proxy(image))


@pytest.fixture
def readonly(proxy, image):
    return proxy(image, "--readonly")


@pytest.fixture
def serve(proxy):
    return proxy


@pytest.fixture
def base(original):
    return original


@pytest.fixture
def patterned(original):
    return original(content=CONTENT)


@pytest.fixture
def cow(proxy):
    return lambda *arguments: linked(proxy(*arguments))


@pytest.fixture
def either(cow):
    """Its second server finds what the first one has cached."""
    cow.kept = True
    return cow


@contextlib.contextmanager
def stopped(process):
    """A black hole: nothing is reset, nothing is answered."""
    process.proc.send_signal(signal.SIGSTOP)
    try:
        until(lambda: all(" (stopped)" in (task / "status").read_text() for task in
                          Path(f"/proc/{process.proc.pid}/task").iterdir()), what="a stop")
        yield
    finally:
        process.proc.send_signal(signal.SIGCONT)


def is_answered(client, seconds=0.3):
    """Whether anything comes within that time."""
    return bool(select.select([client.sock], [], [], seconds)[0])


class Meanwhile(threading.Thread):
    """Does something while the test goes on."""

    def __init__(self, work, *arguments):
        super().__init__(daemon=True)
        self.work, self.arguments = work, arguments
        self.value = self.error = None
        self.start()

    def run(self):
        try:
            self.value = self.work(*self.arguments)
        except BaseException as e:
            self.error = e

    def is_over(self):
        return not self.is_alive()

    def result(self):
        self.join(3 * DEADLINE)
        assert not self.is_alive(), "it is not done"
        if self.error:
            raise self.error
        return self.value


# What clients see

@pytest.mark.parametrize("options", [[], ["--readonly"]], ids=["writable", "readonly"])
@all_replies
def test_export_is_that_of_a_target(proxy, server, image, options, structured):
    t, p = server(image, *options), proxy(image, *options)
    with t.client(structured=structured) as a, p.client(structured=structured) as b:
        assert (a.size, a.flags) == (b.size, b.flags)
    with t.hello() as a, p.hello() as b:
        block_sizes = a.info("", [NBD_INFO_BLOCK_SIZE]).block_size
        assert b.info("", [NBD_INFO_BLOCK_SIZE]).block_size == block_sizes


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4095, 4096, 4097, 8191, MIB + 77])
def test_disk_of_any_size_is_read_written_kept_and_migrated(proxy, original, size):
    p = proxy(original(content=pattern(0, size)))
    with p.client() as c:
        assert c.size == size
        assert c.pread(size) == pattern(0, size)
        assert c.error_of(WRITE, size, payload=b"x") == NBD_ENOSPC
        expected = pattern(0, size)
        if size:
            c.pwrite(b"\xee", size - 1)
            expected = expected[:-1] + b"\xee"
        assert c.pread(size) == expected
    p.stop()
    p = proxy(p.origin)
    with p.client() as c:
        assert c.pread(size) == expected
        assert p.query("fetched-bytes") == 0
        p.migrate()
        p.origin.kill()
        assert c.pread(size) == expected and c.size == size
    p.stop()
    assert p.image.read_bytes() == expected


COLD = [1, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8193, 65535, 65536, 65537, 130000,
        262144, 300001, MIB - 1, MIB + 1, 2 * MIB + 4097]


@all_replies
@pytest.mark.parametrize("shift", [0, 1, 4095])
def test_cold_reads_of_all_lengths_are_right(proxy, original, structured, shift):
    """Each of a part that nobody has read, the last first; and once more, warm."""
    places, at = [], shift
    for length in COLD:
        places.append((at, length))
        at += (length + 3 * BLOCK) & -BLOCK
    content = pattern(0, at + 1234)
    with proxy(original(content=content)).client(structured=structured) as c:
        for _ in range(2):
            for first, length in reversed(places):
                assert c.pread(length, first) == content[first:first + length], (first, length)
        assert c.pread(1234 + shift, c.size - 1234 - shift) == content[-1234 - shift:]


@all_replies
def test_cold_reads_of_32_mib_are_right(proxy, original, structured):
    content = pattern(0, 33 * MIB + 77)
    with proxy(original(content=content)).client(structured=structured) as c:
        assert c.pread(PAYLOAD_MAX, MIB + 77) == content[MIB + 77:]
        assert c.pread(PAYLOAD_MAX, 1) == content[1:PAYLOAD_MAX + 1]


FAR = 60 * MIB          # where nothing is read ahead


@pytest.fixture
def wide(original):
    """An image with CONTENT at its beginning and something at FAR."""
    return original(64 * MIB, CONTENT, {FAR: pattern(FAR, MIB)})


@hazard("one dead origin stalls every client, cached blocks too")
@pytest.mark.parametrize("how", ["killed", "stopped"])
@all_replies
def test_cached_blocks_need_no_origin_and_others_wait_for_it(proxy, wide, revive, how,
                                                             structured):
    p = proxy(wide)
    with p.client(structured=structured) as c, p.client(structured=structured) as waiting:
        c.pread(MIB + 5, 100)
        p.quiet()
        with contextlib.ExitStack() as away:
            if how == "killed":
                p.origin.kill()
            else:
                away.enter_context(stopped(p.origin))
            reads = [waiting.request(READ, FAR + 5 + i * BLOCK, 100 * i + 1) for i in range(100)]
            p.waits()
            for at in range(100, MIB, 50000):
                assert c.pread(50000, at) == pattern(at, 50000)
            c.flush()
            assert not is_answered(waiting)
            assert p.is_served()
            reads.append(waiting.request(READ, 100, 1000))
            assert waiting.collect(reads[-1]).data == pattern(100, 1000)
        if how == "killed":
            revive(p.origin)
        for i, cookie in enumerate(reads[:-1]):
            assert waiting.collect(cookie).data == pattern(FAR + 5 + i * BLOCK, 100 * i + 1)


def test_writes_are_seen_by_all_and_not_by_the_origin(proxy, image):
    need_holes()
    p = proxy(image)
    with p.client() as a, p.client(structured=True) as b, p.origin.client() as o:
        a.pwrite(pattern(0, MIB, seed=1), 4096)
        a.zero(100000, 3 * MIB + 1)
        a.trim(65536, 2 * MIB)
        a.pwrite(b"last", SIZE - 4, FUA)
        a.flush()
        expected = bytearray(CONTENT)
        expected[4096:4096 + MIB] = pattern(0, MIB, seed=1)
        expected[3 * MIB + 1:3 * MIB + 100001] = bytes(100000)
        expected[2 * MIB:2 * MIB + 65536] = bytes(65536)
        expected[-4:] = b"last"
        assert a.pread(SIZE) == expected
        assert b.pread(SIZE) == expected
        assert o.pread(SIZE) == CONTENT


# (first, length): each is made in blocks that nothing has touched.
PARTS = [(0, 1), (1, 1), (4095, 1), (0, 4095), (1, 4095), (511, 1000), (4095, 2), (1, 8190),
         (100, 12000), (0, 4097), (4000, 4192), (100, 3 * BLOCK - 100), (5, 70000), (0, 8192)]
CHANGES = {"write": (WRITE, 0), "write FUA": (WRITE, FUA), "zero": (ZERO, 0),
           "zero NO_HOLE": (ZERO, NO_HOLE), "zero FAST": (ZERO, FAST), "zero FUA": (ZERO, FUA),
           "trim": (TRIM, 0)}
changes = pytest.mark.parametrize("command, flags", CHANGES.values(), ids=CHANGES.keys())


def changed(data, command, first, length):
    """The disk after a WRITE of pattern(seed=1), a WRITE_ZEROES or a TRIM."""
    if command == WRITE:
        return data[:first] + pattern(first, length, seed=1) + data[first + length:]
    return cleared(data, command, first, length, len(data))


def payload_of(command, first, length):
    return pattern(first, length, seed=1) if command == WRITE else b""


@changes
def test_changes_of_parts_of_absent_blocks_merge(proxy, image, tmp_path, command, flags):
    if command == TRIM or flags & FAST:
        need_punch(tmp_path)
    expected = CONTENT
    p = proxy(image)
    places = [(i * 25 * BLOCK + first, length) for i, (first, length) in enumerate(PARTS)]
    places += [(SIZE - 1, 1), (SIZE // 2 + 1, 50), (SIZE - 2 * BLOCK - 100, BLOCK)]
    with p.client() as c:
        for first, length in places:
            error = c.error_of(command, first, length, flags, payload_of(command, first, length))
            assert error == 0 or (error == NBD_ENOTSUP and flags == FAST)
            expected = expected if error else changed(expected, command, first, length)
        for first, length in places:
            part = slice(first & -BLOCK, (first + length + BLOCK) & -BLOCK)
            assert c.pread(len(expected[part]), part.start) == expected[part], (first, length)
        p.migrate()
        assert c.pread(SIZE) == expected
    p.stop()
    assert p.image.read_bytes() == expected


@changes
def test_changes_of_whole_blocks_need_no_origin(proxy, image, command, flags):
    """The last block of the disk, which is shorter, is one as well."""
    if command == TRIM or flags & FAST:
        need_holes()
    p = proxy(image)
    end = SIZE // BLOCK * BLOCK
    p.origin.kill()
    with p.client() as c:
        for first, length in [(BLOCK, 5 * BLOCK), (MIB, BLOCK), (end, 77),
                              (end - 9 * BLOCK, 8 * BLOCK)]:
            assert c.error_of(command, first, length, flags,
                              payload_of(command, first, length)) == 0
            assert c.pread(length, first) == (payload_of(command, first, length)
                                              or bytes(length))
        c.flush()
        assert p.query("fetched-bytes", "cached-blocks") == [0, 15]


def test_change_of_a_part_of_an_absent_block_waits_for_the_origin(proxy, image, revive):
    p = proxy(image)
    p.origin.kill()
    with p.client() as c, p.client() as other:
        waiting = [c.request(WRITE, 100, payload=b"part"), c.request(ZERO, 50 * BLOCK + 1, BLOCK)]
        other.pwrite(pattern(MIB, BLOCK, seed=1), MIB)
        assert other.pread(BLOCK, MIB) == pattern(MIB, BLOCK, seed=1)
        p.waits()
        assert not is_answered(c)
        revive(p.origin)
        assert not any(c.collect(cookie).error for cookie in waiting)
        assert other.pread(2 * BLOCK) == CONTENT[:100] + b"part" + CONTENT[104:2 * BLOCK]
        at = 50 * BLOCK
        assert other.pread(3 * BLOCK, at) == (CONTENT[at:at + 1] + bytes(BLOCK)
                                              + CONTENT[at + BLOCK + 1:at + 3 * BLOCK])


def test_flush_and_fua_succeed_while_the_origin_is_away(proxy, image):
    p = proxy(image)
    with p.client() as c:
        c.flush()
        p.origin.kill()
        c.flush()
        c.pwrite(pattern(0, BLOCK, seed=1), 0, FUA)
        c.flush()
        assert c.pread(BLOCK) == pattern(0, BLOCK, seed=1)


def test_cache_command_fetches(proxy, wide):
    p = proxy(wide)
    with p.client() as c:
        c.cache(MIB, FAR - 100)
        until(lambda: p.cached() >= 257, what="the blocks")
        p.quiet()
        p.origin.kill()
        assert c.pread(MIB, FAR - 100) == bytes(100) + pattern(FAR, MIB - 100)


@hazard("zero-length request marks the whole disk")
@all_replies
def test_requests_of_no_length_mark_nothing(proxy, image, structured):
    p = proxy(image)
    with p.client(structured=structured) as c:
        for command in READ, WRITE, ZERO, TRIM, CACHE:
            for at in 0, 1, BLOCK, SIZE - 1:
                for flags in 0, FUA:
                    assert not c.error_of(command, at, 0, flags)
        c.flush()
        assert p.query("cached-blocks", "fetched-bytes") == [0, 0]
        assert c.pread(SIZE) == CONTENT


@hazard("32 or more separate missing pieces in one request")
@pytest.mark.parametrize("pieces", [31, 32, 33, 2048])
@all_replies
def test_read_of_many_missing_pieces(proxy, original, structured, pieces):
    """Every second block is here; then another read asks for all others."""
    length = 2 * pieces * BLOCK
    content = pattern(0, length + 77)
    p = proxy(original(content=content))
    with p.client(structured=structured) as c, p.client() as writer:
        expected = bytearray(content)
        for at in range(0, length, 2 * BLOCK):
            writer.request(WRITE, at, payload=pattern(at, BLOCK, seed=1))
            expected[at:at + BLOCK] = pattern(at, BLOCK, seed=1)
        assert not any(reply.error for reply in writer.collect_all().values())
        assert p.cached() == pieces
        assert c.pread(length - 2, 1) == expected[1:length - 1]
        assert c.pread(length + 77) == expected


@hazard("32 or more separate missing pieces in one request: CACHE and writes")
def test_cache_and_write_of_many_missing_pieces(proxy, original):
    content = pattern(0, 512 * BLOCK)
    p = proxy(original(content=content))
    with p.client() as c:
        expected = bytearray(content)
        for at in range(0, len(content), 2 * BLOCK):
            c.request(ZERO, at, BLOCK)
            expected[at:at + BLOCK] = bytes(BLOCK)
        c.collect_all()
        c.cache(100 * BLOCK, 3 * BLOCK + 1)
        c.pwrite(pattern(0, 200 * BLOCK, seed=1), 200 * BLOCK + 1)
        expected[200 * BLOCK + 1:400 * BLOCK + 1] = pattern(0, 200 * BLOCK, seed=1)
        assert c.pread(len(content)) == expected


def test_places_above_4_gib_are_their_own(proxy, server, original):
    """Some are the origin's, some are written."""
    size = 9 * GIB + 5
    places = [0, MIB, 4 * GIB - 6, 4 * GIB + MIB, 8 * GIB + MIB, size - 12]
    p = proxy(original(size, places={at: b"number%06d" % i for i, at in enumerate(places)}))
    with p.client() as c:
        check_places(c, places)
        p.stop()
    p = proxy(p.origin)
    with p.client() as c:
        for i in 2, 3, 5:
            c.pwrite(bytes(12), places[i])
            c.pwrite(b"number%06d" % i, places[i])
        c.zero(3 * GIB, 5 * GIB)
        c.trim(GIB, 3 * GIB - BLOCK)
        check_places(c, places)
        p.migrate()
        p.origin.kill()
        check_places(c, places)
    p.stop()
    check_places(server(p.image).client(), places)


# BLOCK_STATUS

def true_status(c, content, at=0, end=None):
    """What is told to be zeros is; returns how much that is."""
    zeros, end = 0, c.size if end is None else end
    while at < end:
        for length, status in c.block_status(end - at, at)[ALLOCATION]:
            length = min(length, end - at)
            if status & NBD_STATE_ZERO:
                assert not content[at:at + length].strip(b"\0"), (at, length)
                zeros += length
            at += length
    return zeros


def test_block_status_tells_the_origins_holes_and_its_own(proxy, original, tmp_path):
    need_punch(tmp_path)
    content = pattern(0, 64 * BLOCK) + bytes(64 * BLOCK + 77)
    p = proxy(original(len(content), content[:64 * BLOCK]))
    expected = [DATA] * 64 + [HOLE] * 65
    with p.client(contexts=[ALLOCATION]) as c:
        assert status_of_blocks(c, c.size) == expected
        for command, first, count, status in [
                (WRITE, 8, 8, DATA), (WRITE, 60, 10, DATA), (ZERO, 20, 10, HOLE),
                (TRIM, 40, 10, HOLE), (ZERO, 10, 2, HOLE), (WRITE, 45, 1, DATA),
                (TRIM, 66, 2, HOLE), (WRITE, 100, 3, DATA)]:
            at, length = first * BLOCK, count * BLOCK
            assert not c.error_of(command, at, length, payload=payload_of(command, at, length))
            content = changed(content, command, at, length)
            expected[first:first + count] = [status] * count
            assert status_of_blocks(c, c.size) == expected, (command, first)
        (length, status), = c.block_status(c.size, 0, NBD_CMD_FLAG_REQ_ONE)[ALLOCATION]
        assert length <= 10 * BLOCK and status == DATA
        c.pwrite(b"part", 120 * BLOCK + 5)
        assert c.pread(c.size) == content[:120 * BLOCK + 5] + b"part" + content[120 * BLOCK + 9:]


@hazard("BLOCK_STATUS: a proxy never reports \"not cached\" as a hole")
@pytest.mark.parametrize("options", [[], ["--oldstyle"]], ids=["it tells", "it does not tell"])
def test_absent_blocks_are_not_holes(proxy, server, original, tmp_path, options):
    """Whatever the cache image has in their place."""
    o = server(original(content=CONTENT), "--unix", tmp_path / "o.sock", *options)
    p = proxy(o)
    with p.client(contexts=[ALLOCATION]) as c:
        assert true_status(c, CONTENT) == 0
        c.pread(2 * MIB, 1)
        assert true_status(c, CONTENT) == 0
        c.zero(MIB, 3 * MIB)
        true_status(c, cleared(CONTENT, ZERO, 3 * MIB, MIB, SIZE))


def test_block_status_stays_true_under_a_copy_and_after_the_switch(proxy, original, tmp_path):
    need_punch(tmp_path)
    content = bytearray(16 * MIB)
    for at in range(0, 16 * MIB, MIB):
        content[at:at + 70000] = pattern(at, 70000)
    image = original(16 * MIB, places={at: content[at:at + 70000]
                                       for at in range(0, 16 * MIB, MIB)})
    p = proxy(image)
    with p.client(contexts=[ALLOCATION]) as c:
        before = true_status(c, content)
        assert before > 14 * MIB
        copy = Meanwhile(p.cache_all)
        while not copy.is_over():
            true_status(c, content)
        copy.result()
        assert true_status(c, content) >= before - MIB
        p.switch()
        assert true_status(c, content) >= before - MIB


# Misses, and what goes on beside them

def test_block_is_fetched_once_however_many_want_it(proxy, image):
    p = proxy(image)
    clients = [p.client(structured=i % 2) for i in range(8)]
    found = []
    at_once([lambda c=c: found.append(c.pread(SIZE)) for c in clients])
    assert found == [CONTENT] * 8
    assert p.query("fetched-bytes") <= SIZE + 77


def test_runs_are_fetched_as_runs(proxy):
    with Origin(CONTENT) as o:
        with proxy(o).client() as c:
            assert c.pread(2 * MIB, 5) == CONTENT[5:5 + 2 * MIB]
            assert len(o.reads()) < 64


def test_misses_do_not_wait_for_each_other(proxy):
    """Hundreds are outstanding; whichever the origin answers first, goes first."""
    content = pattern(0, 16 * MIB)
    with Origin(content) as o:
        o.hold(lambda request: request.command == READ and request.offset < 12 * MIB)
        p = proxy(o)
        clients = [p.client() for _ in range(4)]
        for i, c in enumerate(clients):
            for n in range(64):
                c.request(READ, (i * 64 + n) * 40960 + 5, 1000)
        with p.client() as other:
            assert other.pread(1000, 15 * MIB) == content[15 * MIB:15 * MIB + 1000]
        assert not any(is_answered(c, 0) for c in clients)
        o.release()
        for c in clients:
            for reply in c.collect_all().values():
                at = reply.request.offset
                assert reply.data == content[at:at + 1000]


@hazard("partial write and full write of one absent block race with its fetch")
@pytest.mark.parametrize("name", RACES)
def test_clients_at_the_same_moment_all_win(proxy, image, name):
    """In absent blocks, while another client reads them."""
    group, parts = RACES[name]
    p = proxy(image)
    clients = [p.client() for _ in parts]
    reader = p.client()
    places = list(range(0, SIZE - group + 1, max(group, 3 * BLOCK)))
    for i in range(0, len(places), 64):
        some = places[i:i + 64]
        out = [requests_of(c, part, n + 1, some) for n, (c, part) in enumerate(zip(clients, parts))]
        read = requests_of(reader, (READ, 0, group), 99, some)
        at_once([lambda c=c, data=data: c.send(data)
                 for c, data in zip([*clients, reader], [*out, read])])
        for c in clients:
            assert not any(reply.error for reply in c.collect_all().values())
        for reply in reader.collect_all().values():
            at = reply.request.offset
            check_between(reply.data, parts, at)
    with p.client() as c:
        after = c.pread(SIZE)
    for at in places:
        check_race(after[at:at + group], parts, CONTENT[at:at + group], at)


def check_between(got, parts, at):
    """Each byte is the origin's, or that of a client who wrote it."""
    edges = sorted({0, len(got), *(e for _, first, last in parts for e in (first, last))})
    for a, b in zip(edges, edges[1:]):
        legal = [pattern(at + a, b - a, seed=i + 1) if command == WRITE else bytes(b - a)
                 for i, (command, first, last) in enumerate(parts) if first <= a and b <= last]
        legal.append(CONTENT[at + a:at + b])
        assert got[a:b] in legal or all(byte in bytes_here for byte, *bytes_here
                                        in zip(got[a:b], *legal)), (at, a)


@hazard("after a reconnect the retried fetch lands after a newer write")
@pytest.mark.parametrize("how", ["late", "after a reconnect"])
@pytest.mark.parametrize("command", [WRITE, ZERO, TRIM], ids=["write", "zero", "trim"])
def test_late_data_of_the_origin_does_not_overwrite_what_is_newer(proxy, command, how):
    if command == TRIM:
        need_holes()
    with Origin(CONTENT) as o:
        p = proxy(o)
        o.hold(lambda request: request.command == READ)
        with p.client() as c, p.client() as writer:
            read = c.request(READ, 100, 20 * BLOCK)
            o.wait(lambda request: request.command == READ)
            if how != "late":
                o.die()
            first, length = 4 * BLOCK, 8 * BLOCK
            assert not writer.error_of(command, first, length,
                                       payload=payload_of(command, first, length))
            expected = changed(CONTENT, command, first, length)
            assert writer.pread(length, first) == expected[first:first + length]
            o.release()
            if how != "late":
                o.come_back()
            reply = c.collect(read)
            for at in range(BLOCK, 20 * BLOCK, BLOCK):
                got = reply.data[at - 100:at - 100 + BLOCK]
                assert got in (CONTENT[at:at + BLOCK], expected[at:at + BLOCK])
            assert writer.pread(40 * BLOCK) == expected[:40 * BLOCK]
        p.quiet()
        p.kill()
        with proxy(o).client() as c:
            assert c.pread(SIZE) == expected


@hazard("one EIO of the origin stalls every client, cached blocks too")
@all_replies
def test_error_of_the_origin_is_eio_for_who_needs_that_block(proxy, structured):
    with Origin(CONTENT, errors=failing(MIB, MIB + BLOCK)) as o:
        p = proxy(o)
        with p.client(structured=structured) as c, p.client() as other:
            for command, at, length in [(READ, MIB, 1), (READ, MIB - 100, 200), (WRITE, MIB + 5, 9),
                                        (READ, MIB, 10 * BLOCK), (ZERO, MIB + 1, BLOCK - 1)]:
                payload = b"x" * length if command == WRITE else b""
                assert c.error_of(command, at, length, payload=payload) == NBD_EIO
                assert other.pread(MIB, 0) == CONTENT[:MIB]
                assert other.pread(MIB, MIB + BLOCK) == CONTENT[MIB + BLOCK:2 * MIB + BLOCK]
            with pytest.raises(Refused, match="1 block"):
                p.cache_all()
            with pytest.raises(Refused, match="1 of"):
                p.switch()
            o.errors = None
            assert c.pread(BLOCK, MIB) == CONTENT[MIB:MIB + BLOCK]
            p.migrate()
            assert c.pread(SIZE) == CONTENT


@hazard("one EIO of the origin: it is not for those who need less of what was asked for")
def test_error_of_a_long_fetch_is_not_for_who_needs_a_part_of_it(proxy):
    with Origin(CONTENT, errors=failing(MIB, MIB + BLOCK)) as o:
        p = proxy(o)
        o.hold(lambda request: request.command == READ)
        with p.client() as c, p.client() as other:
            long_one = c.request(READ, MIB - 8 * BLOCK, 16 * BLOCK)
            o.wait(lambda request: request.touches(MIB, MIB + 1))
            short = [other.request(READ, MIB + n * BLOCK + 5, 100) for n in (-8, -1, 1, 7)]
            part = other.request(WRITE, MIB + 3 * BLOCK + 5, payload=b"part")
            p.waits()
            o.release()
            assert c.collect(long_one).error == NBD_EIO
            for cookie in short:
                reply = other.collect(cookie)
                at = reply.request.offset
                assert not reply.error and reply.data == CONTENT[at:at + 100]
            assert not other.collect(part).error
            assert other.pread(8, MIB + 3 * BLOCK + 3) == (
                CONTENT[MIB + 3 * BLOCK:][3:5] + b"part" + CONTENT[MIB + 3 * BLOCK:][9:11])


@hazard("one EIO of the origin: a block that is written whole needs it no more")
def test_block_that_cannot_be_read_can_be_written(proxy):
    need_holes()
    with Origin(CONTENT, errors=failing(MIB, MIB + 2 * BLOCK)) as o:
        p = proxy(o)
        with p.client() as c:
            c.pwrite(b"x" * BLOCK, MIB)
            c.trim(BLOCK, MIB + BLOCK)
            expected = CONTENT[:MIB] + b"x" * BLOCK + bytes(BLOCK) + CONTENT[MIB + 2 * BLOCK:]
            assert c.pread(SIZE) == expected
            p.migrate()


# Links that are lost

@hazard("origin black-holed (SIGSTOP, no reset)")
def test_silent_origin_is_noticed_by_the_deadline(proxy, wide):
    """Once in the log; and when it goes on, so does the proxy."""
    p = proxy(wide, "--origin-timeout", "2")
    with p.client() as c, p.client() as waiting:
        c.pread(MIB)
        p.quiet()
        before = p.log().count("link lost")
        with stopped(p.origin):
            read = waiting.request(READ, FAR, 1000)
            until(lambda: p.query("origin-link") == "down", what="an end of the link")
            assert p.query("origin-reason")
            assert c.pread(MIB) == CONTENT[:MIB]
            assert p.log().count("link lost") == before + 1
        assert waiting.collect(read).data == pattern(FAR, 1000)
        until(lambda: p.query("origin-link") == "up", what="a link")


@hazard("origin restarted with other clients connected")
def test_background_copy_survives_an_origin_that_is_killed_again_and_again(proxy, original,
                                                                          revive):
    content = pattern(0, 16 * MIB)
    p = proxy(original(content=content))
    origin = p.origin
    with p.client() as c:
        assert p.ask("cache-all2") == []
        for _ in range(3):
            origin.kill()
            part = c.request(WRITE, 15 * MIB + 5, payload=content[15 * MIB + 5:][:100000])
            origin = revive(origin)
            assert not c.collect(part).error
        until(lambda: p.query("copy") == "done", what="the end of the copy")
        p.switch()
        origin.kill()
        assert c.pread(16 * MIB) == content


@pytest.mark.parametrize("command", [CACHE, NBD_CMD_BLOCK_STATUS], ids=["CACHE", "BLOCK_STATUS"])
def test_end_does_not_wait_for_a_long_command(proxy, original, command):
    """Nor for the copies that go on."""
    with Origin({}, size=4 * GIB, delay=0.02) as o:
        p = proxy(o)
        with p.client(contexts=[ALLOCATION]) as c:
            cookie = c.request(command, 0, 4 * GIB - BLOCK)
            p.ask("cache-all2")
            o.wait(lambda request: request.command == (READ if command == CACHE else command))
            p.terminate()
            with contextlib.suppress(Closed):
                assert not c.collect(cookie).error
        p.wait()
        assert p.map.is_clean()


def test_end_does_not_wait_for_the_origin(proxy, image):
    """Those who do lose their connection, and get no answer."""
    p = proxy(image)
    with p.client() as c, p.client() as writer:
        p.origin.kill()
        for i in range(20):
            c.request(READ, i * 100000, 50000)
        writer.request(WRITE, 5, payload=b"part")
        p.waits()
        p.terminate()
        c.expect_closed()
        writer.expect_closed()
    p.wait()
    assert p.map.is_clean()


# The command line

def proxy_usage(*words):
    """Arguments, with an image and so on in place of their names."""
    return ["--proxy", *ADDRESS, *words]


HOST_AND_FILES = ["127.0.0.1", "10809", "cache.img", "cache.map", "cache.ctl"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_missing_argument_is_wrong_usage(run_server, tmp_path, count):
    refused(run_server(*proxy_usage(*HOST_AND_FILES[:count]), cwd=tmp_path), 2)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_missing_argument_after_a_unix_socket_is_wrong_usage(run_server, tmp_path, count):
    words = ["unix:sock", *HOST_AND_FILES[2:]][:count]
    refused(run_server(*proxy_usage(*words), cwd=tmp_path), 2)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("words", [HOST_AND_FILES, ["unix:sock", *HOST_AND_FILES[1:]]],
                         ids=["host", "unix"])
def test_further_argument_is_wrong_usage(run_server, tmp_path, words):
    refused(run_server(*proxy_usage(*words, "further"), cwd=tmp_path), 2, "further")


WRONG_VALUES = {
    "--max-queue-size": ["", "x", "-1", "1.5", "99999999999999999999"],
    "--max-buf-size": ["", "x", "-1", "99999999999999999999999"],
    "--origin-connections": ["", "0", "x", "-1", "99999999999"],
    "--origin-timeout": ["", "0", "x", "-1", "99999999999"],
}


@pytest.mark.parametrize("option, value", [(o, v) for o in WRONG_VALUES for v in WRONG_VALUES[o]])
def test_wrong_value_is_named(run_server, tmp_path, option, value):
    refused(run_server(*proxy_usage(option, value, *HOST_AND_FILES), cwd=tmp_path), 2, option)


@pytest.mark.parametrize("option", [*WRONG_VALUES, "--target-exportname"])
def test_missing_value_is_named(run_server, option):
    refused(run_server("--proxy", option), 2, option)


PROXY_OPTIONS = [["--target-exportname", "name"], ["--clear-bitmap"],
                 ["--origin-connections", "1"], ["--origin-timeout", "5"]]


@pytest.mark.parametrize("option", PROXY_OPTIONS, ids=lambda o: o[0])
@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
def test_option_of_proxy_mode_is_refused_elsewhere(run_server, image, mode, option):
    refused(run_server(mode, *ADDRESS, *option, image), 2, option[0])


@pytest.mark.parametrize("option", [["--create", "1M"], ["--cow-dir", "/tmp"],
                                    ["--cow-file", "overlay"]], ids=lambda o: o[0])
def test_option_of_another_mode_is_refused(run_server, tmp_path, option):
    refused(run_server(*proxy_usage(*option, *HOST_AND_FILES), cwd=tmp_path), 2, option[0])


@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
def test_two_modes_are_refused(run_server, mode):
    refused(run_server("--proxy", mode, *HOST_AND_FILES), 2, mode)


def test_options_may_follow_the_arguments(proxy, image, server, tmp_path):
    o = server(image, "--unix", tmp_path / "o.sock")
    p = server(args=["--prox", f"unix:{o.unix}", tmp_path / "c.img", tmp_path / "c.map",
                     tmp_path / "c.ctl", "--laddr=127.0.0.1", "--lport=0", "--readonly"])
    with p.client() as c:
        assert c.flags & NBD_FLAG_READ_ONLY
        assert c.pread(SIZE) == CONTENT


HOSTS = [("127.0.0.1", "127.0.0.1", "127.0.0.1"), ("::1", "::1", "[::1]"),
         ("::1", "[::1]", "[::1]"), ("127.0.0.1", "localhost", "localhost"),
         ("localhost", "localhost", "localhost")]


@pytest.mark.parametrize("listens, host, shown", HOSTS, ids=[f"{a} {b}" for a, b, _ in HOSTS])
def test_origin_by_address_or_name(proxy, server, image, listens, host, shown):
    """A name stands for all its addresses, of which one has to answer."""
    if ":" in listens:
        need_ipv6()
    o = server(image, "--laddr", listens, "--lport", "0")
    p = proxy([host, o.port])
    with p.client() as c:
        assert c.pread(SIZE) == CONTENT
    assert p.query("origin", "origin-link") == [f"{shown}:{o.port}", "up"]
    assert re.search(rf"origin {re.escape(shown)}:{o.port}: connected, {SIZE} bytes", p.log())


@pytest.mark.parametrize("port", [[], ["10809"], ["-"]], ids=["4 arguments", "5", "5 with -"])
def test_origin_on_a_unix_socket(proxy, server, image, tmp_path, port):
    o = server(image, "--unix", tmp_path / "o.sock")
    p = proxy([f"unix:{o.unix}", *port])
    with p.client() as c:
        assert c.pread(SIZE) == CONTENT
    assert p.query("origin") == f"unix:{o.unix}"


def test_proxy_listens_where_a_target_does(proxy, image, tmp_path):
    p = proxy(image, "--unix", tmp_path / "p.sock", *ADDRESS, "--threads", "1", "--pidfile",
              tmp_path / "pid", "--logpath", tmp_path / "log")
    assert int((tmp_path / "pid").read_text()) == p.proc.pid
    assert len(p.addresses) == 2 and p.stderr.read_text() == ""
    for address in p.addresses:
        assert p.client(address).pread(SIZE) == CONTENT
    assert p.control.stat().st_mode & 0o777 == 0o600
    p.stop()
    assert not (tmp_path / "p.sock").exists() and not p.control.exists()


def test_proxy_greets_oldstyle_clients(proxy, image):
    with proxy(image, "--oldstyle").client(oldstyle=True) as c:
        assert c.size == SIZE
        assert c.pread(SIZE) == CONTENT
        c.pwrite(b"old", 5000)
        assert c.pread(5, 4999) == CONTENT[4999:5000] + b"old" + CONTENT[5003:5004]


def test_proxy_logs_to_syslog(proxy, image, syslog, tmp_path):
    p = proxy(image, "--syslog", "--unix", tmp_path / "p.sock", wait=False,
              preexec_fn=alone(syslog.enter))
    syslog.wait_for("connected, ")
    syslog.wait_for("listening on")
    assert Client(tmp_path / "p.sock").negotiate().pread(SIZE) == CONTENT
    assert p.log() == ""


def test_files_of_a_cache_are_for_the_owner_only(proxy, image):
    p = proxy(image, umask=0)
    for path in p.image, p.bitmap, p.control:
        assert path.stat().st_mode & 0o7777 == 0o600
    assert p.image.stat().st_size == SIZE and p.image.stat().st_blocks * 512 <= BLOCK


@pytest.mark.parametrize("name", ["one", "two", "a b"])
def test_export_of_that_name_is_fetched(proxy, spawn, original, tmp_path, name):
    exports = tmp_path / "exports"
    exports.mkdir()
    for i, other in enumerate(["one", "two", "a b"]):
        make_disk(exports / other, content=pattern(0, 100000 + i, seed=i + 1))
    o = spawn.nbdkit("file", f"dir={exports}")
    p = proxy(o, "--target-exportname", name)
    with p.client(name="whatever the client says") as c:
        assert c.pread(c.size) == (exports / name).read_bytes()
    assert p.query("origin-export") == name


def test_export_that_does_not_exist_is_refused(proxy, run_server, spawn, tmp_path):
    exports = tmp_path / "exports"
    exports.mkdir()
    make_disk(exports / "one", 100000)
    o = spawn.nbdkit("file", f"dir={exports}")
    before = set(os.listdir(tmp_path))
    done = run_server("--proxy", *ADDRESS, "--target-exportname", "nowhere", *o,
                      *cache_in(tmp_path))
    refused(done, 1, "nowhere")
    assert set(os.listdir(tmp_path)) == before


def cache_in(directory):
    return [directory / "cache.img", directory / "cache.map", directory / "cache.ctl"]


def test_origin_that_cannot_be_reached_is_named(run_server, tmp_path):
    """And nothing is left behind."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))        # nobody listens there
        port = s.getsockname()[1]
        for remote in (["127.0.0.1", port], ["[::1]", port], ["name.invalid", 10809],
                       [f"unix:{tmp_path}/nowhere"]):
            done = run_server("--proxy", *ADDRESS, *remote, *cache_in(tmp_path))
            refused(done, 1, str(remote[0]).strip("[]"))
            assert not os.listdir(tmp_path)


def test_clear_bitmap_forgets_the_cache(proxy, image):
    """Also what was written."""
    p = proxy(image)
    with p.client() as c:
        c.pwrite(b"forgotten", 5000)
        c.pread(MIB)
    p.stop()
    p = proxy(p.origin, "--clear-bitmap")
    assert p.cached() == 0
    with p.client() as c:
        assert c.pread(SIZE) == CONTENT


def test_readonly_proxy_caches_what_is_read(proxy, image):
    p = proxy(image, "--readonly")
    with p.client() as c:
        for command in WRITE, ZERO, TRIM:
            payload = b"x" * BLOCK if command == WRITE else b""
            assert c.error_of(command, 0, BLOCK, payload=payload) == NBD_EPERM
        assert c.pread(SIZE) == CONTENT
        c.flush()
        p.quiet()
        p.origin.kill()
        assert c.pread(SIZE) == CONTENT
        assert p.query("readonly") == "yes"
        p.switch()
        assert c.error_of(WRITE, 0, payload=b"x") == NBD_EPERM
        assert c.pread(SIZE) == CONTENT


LIMITS = {"--max-queue-size": ("pending-requests", 7), "--max-buf-size": ("buffer-bytes", MIB)}


@hazard("a bound on what waits for a dead origin")
@pytest.mark.parametrize("option", LIMITS)
def test_limits_hold_while_the_origin_is_stopped(proxy, original, option):
    """And when it goes on, so does everything, for all clients.  One more request of each may
    pass the limit: who has nothing under way may always ask."""
    name, limit = LIMITS[option]
    more = 3 * 60000 if name == "buffer-bytes" else 3
    content = pattern(0, 12 * MIB)
    p = proxy(original(content=content), option, str(limit))
    assert p.query(f"{name}-limit") == limit
    clients = [p.client(structured=i % 2) for i in range(3)]
    command = WRITE if name == "buffer-bytes" else READ     # a READ that waits holds no data
    with stopped(p.origin):
        for i, c in enumerate(clients):
            for n in range(60 if command == READ else 12):
                at = (3 * n + i) * 65536 + 5
                c.request(command, at, 60000,
                          payload=content[at:at + 60000] if command == WRITE else b"")
        until(lambda: p.query(name) > 0)
        for _ in range(30):
            assert p.query(name) <= limit + more
            time.sleep(0.01)            # a measurement
        assert not any(is_answered(c, 0) for c in clients)
        p.hello().list()
    for c in clients:
        for reply in c.collect_all().values():
            at = reply.request.offset
            assert c.pread(60000, at) == content[at:at + 60000] and not reply.error
            assert command == WRITE or reply.data == content[at:at + 60000]
    until(lambda: p.query(name) == 0, what="an end of all requests")
    assert p.is_served()


@hazard("a bound on what waits for a dead origin: many clients")
def test_many_clients_hold_one_piece_each_beyond_the_bound(proxy, original):
    """And no more, whatever they ask for; all of it is done when the origin goes on."""
    p = proxy(original(content=bytes(16 * MIB)), "--max-buf-size", "256K")
    clients = [p.client() for _ in range(60)]
    length = 64 * KIB - 2
    with stopped(p.origin):
        for i, c in enumerate(clients):
            for n in range(3):
                c.request(WRITE, (3 * i + n) * 64 * KIB + 1, payload=bytes([i + 1]) * length)
        until(lambda: p.query("pending-requests") >= 60, what="one of each")
        for _ in range(30):
            assert p.query("buffer-bytes") <= 4 * 64 * KIB + 60 * length
            time.sleep(0.01)            # a measurement
    for i, c in enumerate(clients):
        assert not any(reply.error for reply in c.collect_all().values())
        assert c.pread(length, 3 * i * 64 * KIB + 1) == bytes([i + 1]) * length
    assert p.query("buffer-bytes") == 0


@pytest.mark.parametrize("option, value", [("--max-queue-size", "1"), ("--max-buf-size", "1"),
                                           ("--max-buf-size", "4096")])
def test_smallest_limits_let_everything_pass(proxy, image, option, value):
    """One at a time, even one that is larger than the limit."""
    p = proxy(image, option, value)
    with p.client(structured=True) as a, p.client() as b:
        for c in a, b:
            for at in range(0, SIZE - 100000, 300000):
                c.request(READ, at, 100000)
                c.request(WRITE, at + 5, payload=CONTENT[at + 5:at + 70005])
            c.request(FLUSH)
        for c in a, b:
            for reply in c.collect_all().values():
                assert not reply.error
                at = reply.request.offset
                assert reply.data is None or reply.data == CONTENT[at:at + 100000]
        assert a.pread(SIZE) == CONTENT


@hazard("a bound on what waits for a dead origin: memory")
def test_memory_is_bounded_while_the_origin_is_away(proxy, original):
    """Without any limit on the command line."""
    p = proxy(original(256 * MIB))
    with p.client() as before:
        before.pread(1)
        p.quiet()
        p.origin.kill()
        rss = p.rss()
        clients = [p.client() for _ in range(3)]
        for c in clients:
            c.sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                for i in range(2000):
                    at = (i * 77 * MIB // 64 + 5) % (240 * MIB)
                    c.send(request_header(READ, at, MIB, 0, i) if i % 3 else
                           request_header(WRITE, at, 4000, 0, i) + bytes(4000))
        p.settle()
        assert p.rss() - rss < (1024 if SANITIZED else 64) * MIB
        assert before.pread(1) == b"\0"
        for c in clients:
            c.close()
        p.stop()


def test_links_to_an_origin_are_as_many_as_wanted(proxy, image):
    for count in 1, 2, 4:
        p = proxy(image, "--origin-connections", str(count), name=f"cache{count}")
        with p.client() as c:
            c.pread(SIZE)
            p.cache_all()
        assert 1 <= p.query("origin-links") <= count
        p.stop()


# One client

@pytest.mark.parametrize("option", ["--inetd", "--connected-fd"])
def test_one_client_on_a_descriptor(proxy, server, image, tmp_path, option):
    """The end is that of the client, and what it has cached is kept."""
    o = server(image, "--unix", tmp_path / "o.sock")
    for i in range(2):
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        p = proxy(o, "--logpath", tmp_path / "log", option, *[str(fd)] * (option != "--inetd"),
                  wait=False, stdin=theirs, pass_fds=[fd])
        theirs.close()
        with Client(ours) as c:
            c.size = SIZE
            if option == "--inetd":
                c.negotiate()
            c.pwrite(b"new", 100 * i)
            assert c.pread(MIB) == (b"new" + CONTENT[3:MIB] if not i else
                                    b"new" + CONTENT[3:100] + b"new" + CONTENT[103:MIB])
            assert (p.query("fetched-bytes") == 0) == bool(i)
            c.disc()
        p.wait()
        assert not p.control.exists()


@hazard("--daemonize: control acts on the wrong process; relative paths break after chdir")
def test_daemon_works_from_any_directory(run_server, server, original, tmp_path):
    """With relative paths only, also that of an origin that goes and comes back."""
    home = tmp_path / "home"
    home.mkdir()
    o = server(original(content=CONTENT), "--unix", home / "o.sock")
    done = run_server("--proxy", "--daemonize", "--unix", "p.sock", "--pidfile", "pid",
                      "--logpath", "log", "unix:o.sock", "c.img", "c.map", "c.ctl", cwd=home)
    assert done.returncode == 0 and not done.stderr, done
    try:
        check_daemon(server, o, home)
    finally:
        os.kill(int((home / "pid").read_text()), signal.SIGTERM)
        until(lambda: not (home / "pid").exists())
    assert sorted(os.listdir(home)) == ["c.img", "c.map", "log", "o.sock"]
    assert (home / "c.img").read_bytes() == b"new" + CONTENT[3:]


def check_daemon(server, origin, home):
    with Client(home / "p.sock") as c, Control(home / "c.ctl") as control:
        c.negotiate()
        assert c.pread(MIB) == CONTENT[:MIB]
        origin.kill()
        c.pwrite(b"new" + CONTENT[3:BLOCK])
        told = dict(control.ask("query"))
        assert told["mode"] == "proxy" and told["size"] == str(SIZE)
        server(args=origin.arguments)
        control.ask("cache-all")
        control.ask("switch")
        assert dict(control.ask("query"))["mode"] == "target"
        assert c.pread(SIZE) == b"new" + CONTENT[3:]


def test_daemon_that_cannot_start_says_why(run_server, tmp_path):
    done = run_server("--proxy", "--daemonize", *ADDRESS, "unix:nowhere.sock", "c.img", "c.map",
                      "c.ctl", cwd=tmp_path)
    refused(done, 1, "nowhere.sock")
    assert not os.listdir(tmp_path)


# The cache outlives its server

def test_restart_fetches_nothing_again(proxy, image):
    """Neither what was read nor what was written."""
    p = proxy(image)
    with p.client() as c:
        c.pread(2 * MIB)
        c.pwrite(b"new", 3 * MIB + 5)
    p.quiet()
    cached = p.cached()
    p.stop()
    p = proxy(p.origin)
    assert p.cached() == cached
    with p.client() as c:
        assert c.pread(2 * MIB) == CONTENT[:2 * MIB]
        assert c.pread(BLOCK, 3 * MIB) == CONTENT[3 * MIB:][:5] + b"new" + CONTENT[
            3 * MIB + 8:3 * MIB + BLOCK]
        assert p.query("fetched-bytes", "written-blocks") == [0, 0]
        assert c.pread(SIZE)[:2 * MIB] == CONTENT[:2 * MIB]
    assert 0 < p.query("fetched-bytes") <= SIZE - 2 * MIB + BLOCK


@hazard("kill -9 loses what was acknowledged")
def test_kill_loses_nothing(proxy, image):
    """The live map is believed, since the machine has been up."""
    need_holes()
    p = proxy(image)
    with p.client() as c:
        c.pread(MIB)
        c.pwrite(b"new", MIB - 5)
        c.trim(BLOCK, 5 * BLOCK)
    p.quiet().kill()
    p = proxy(p.origin)
    with p.client() as c:
        assert c.pread(MIB - 5) == changed(CONTENT, TRIM, 5 * BLOCK, BLOCK)[:MIB - 5]
        assert c.pread(3, MIB - 5) == b"new"
        assert p.query("fetched-bytes") == 0


def power_cut(p):
    """What is left of a stopped proxy's cache: only what was committed."""
    p.map.another_boot()
    p.map.scribble()
    spoil_uncommitted(p.image, p.map)


@hazard("what was not flushed is never committed: at the end")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_orderly_end_commits_what_is_cached(proxy, image, number):
    """Without a flush; xnbd-bitmap(5) says what must be in the file."""
    p = proxy(image)
    with p.client() as c:
        c.pread(5 * BLOCK, MIB)
        c.pwrite(b"new", 100)
        c.zero(BLOCK, 50 * BLOCK)
        assert not p.map.is_clean()
        cached = p.quiet().cached()
        p.terminate(number)
        p.wait()
    committed, live = map(bits, p.map.maps())
    assert p.map.is_clean() and committed == live and len(committed) == cached
    assert committed >= {0, 50, *range(256, 261)}
    power_cut(p)
    p = proxy(p.origin)
    assert p.cached() == cached
    with p.client() as c:
        assert c.pread(SIZE) == changed(CONTENT[:100] + b"new" + CONTENT[103:], ZERO, 50 * BLOCK,
                                        BLOCK)


def test_second_signal_after_a_hanging_client_still_leaves_a_good_cache(proxy, image):
    """It ends at once then, without a commit."""
    p = proxy(image)
    with p.client() as c:
        c.pwrite(pattern(0, MIB, seed=1))
        c.flush()
        c.pwrite(b"later", 5)
        p.terminate()
        p.terminate()
        p.expected_status = None
        p.wait()
    with proxy(p.origin).client() as c:
        assert c.pread(SIZE) == (CONTENT[:0] + pattern(0, 5, seed=1) + b"later"
                                 + pattern(0, MIB, seed=1)[10:] + CONTENT[MIB:])


@hazard("what was not flushed is never committed")
def test_commit_comes_by_itself_after_a_second(proxy, image):
    """A power cut then loses nothing that is older."""
    p = proxy(image)
    with p.client() as c:
        c.pwrite(b"new" + bytes(BLOCK - 3), 7 * BLOCK)
        c.pread(1, 20 * BLOCK)
        until(lambda: {7, 20} <= bits(p.map.maps()[0]), what="a commit")
    p.kill()
    power_cut(p)
    with proxy(p.origin).client() as c:
        assert c.pread(3, 7 * BLOCK) == b"new"
        assert c.pread(SIZE - 8 * BLOCK, 8 * BLOCK) == CONTENT[8 * BLOCK:]


@hazard("the live map is believed after a reboot")
@pytest.mark.parametrize("how", ["FLUSH", "FLUSH of another client", "FUA"])
def test_power_cut_keeps_what_was_flushed(proxy, image, how):
    p = proxy(image)
    with p.client() as c, p.client() as other:
        c.pwrite(pattern(5, 3 * BLOCK, seed=1), 5, FUA if how == "FUA" else 0)
        if how != "FUA":
            (other if "another" in how else c).flush()
    p.kill()
    power_cut(p)
    with proxy(p.origin).client() as c:
        assert c.pread(SIZE) == CONTENT[:5] + pattern(5, 3 * BLOCK, seed=1) + CONTENT[
            5 + 3 * BLOCK:]


def failing_sync(p, directory, when=1):
    """While this goes on the first fdatasync() fails; with "1+" all do."""
    return traced(p, directory / "calls", "-e", f"inject=fdatasync:error=EIO:when={when}")


@hazard("fdatasync fails, the next one succeeds: in the next process")
def test_restart_after_a_failed_sync_has_what_was_committed_before(proxy, image, tmp_path):
    """What was fetched or written since is the origin's again; and the log says so."""
    p = proxy(image)
    with p.client() as c:
        c.pwrite(b"safe", 100)
        c.flush()
        committed = bits(p.map.maps()[0])
        with failing_sync(p, tmp_path):
            c.pwrite(pattern(0, 5 * BLOCK, seed=1), MIB)
            c.pread(BLOCK, 2 * MIB)
            assert c.error_of(FLUSH) == NBD_EIO
        fails_for_good(c)
        assert c.error_of(READ, 3 * MIB, 100) == NBD_EIO        # also what the origin has
        assert p.map.flags() == Map.FAILED | Map.WRITTEN
    p.expected_status = 1
    p.stop()
    assert bits(p.map.maps()[0]) == committed and not p.map.is_clean()
    spoil_uncommitted(p.image, p.map)
    p = proxy(p.origin)
    assert p.log().count("stable storage had failed") == 1 and p.cached() == len(committed)
    with p.client() as c:
        assert c.pread(SIZE) == CONTENT[:100] + b"safe" + CONTENT[104:]
        p.migrate()


@hazard("fdatasync fails, the next one succeeds: that of a commit without a request")
def test_failed_commit_that_comes_by_itself_ends_the_export(proxy, image, tmp_path):
    """Nobody has asked for a flush: the clients learn it by the next request."""
    p = proxy(image)
    with p.client() as c:
        with failing_sync(p, tmp_path):
            c.pwrite(pattern(0, 5 * BLOCK, seed=1), MIB)
            until(lambda: "not on stable storage" in p.log(), what="a commit")
        fails_for_good(c)
        assert p.map.flags() & Map.FAILED
    p.expected_status = 1
    p.stop()


@hazard("block marked before its data arrived: kill -9 leaves zeros that count as cached")
def test_kill_while_blocks_are_fetched_and_written(proxy, original):
    """Again and again, in one cache, at any moment."""
    content = pattern(0, 16 * MIB)
    o = None
    for i in range(6):
        p = proxy(o or original(content=content))
        o = p.origin
        with p.client() as a, p.client() as b:
            for n in range(64):
                a.request(READ, n * 250000, 65536)
                b.request(WRITE, n * 250000 + 5, payload=content[n * 250000 + 5:][:20000])
            for _ in range(i * 10):
                a.collect()
            p.kill()
    with proxy(o).client() as c:
        assert c.pread(len(content)) == content


@hazard("another server uses the cache")
def test_second_server_on_a_bitmap_is_refused(proxy, run_server, image, tmp_path):
    """The first goes on, and when it is killed its lock is gone."""
    p = proxy(image)
    done = run_server("--proxy", *ADDRESS, *remote_of(p.origin), tmp_path / "other.img", p.bitmap,
                      tmp_path / "other.ctl")
    refused(done, 1, p.bitmap)
    assert not (tmp_path / "other.ctl").exists()
    with p.client() as c:
        c.pwrite(b"on", 5)
        assert c.pread(SIZE) == CONTENT[:5] + b"on" + CONTENT[7:]
    p.kill()
    with proxy(p.origin).client() as c:
        assert c.pread(2, 5) == b"on"


# What spoils a cache.  Functions of test_cow tell what the refusal must name.

@pytest.fixture
def kept(proxy, original):
    """A proxy that has ended; its cache holds some blocks."""
    p = proxy(original(content=pattern(0, MIB + 77)))
    p.base = p.image.parent / "original0.img"
    with p.client() as c:
        c.pread(3 * BLOCK, 600000)
        c.pwrite(pattern(0, 5000, seed=1), 100)
    p.stop()
    return p


def missing_image(kept):
    kept.image.unlink()
    return kept.image,


def shorter_image(length):
    def spoil(kept):
        os.truncate(kept.image, length)
        return kept.image, length, MIB + 77
    return named(spoil, f"image_of_{length}_bytes")


def image_as_map(length):
    def spoil(kept):
        kept.map.path.write_bytes(pattern(0, length))
        return kept.map.path, "bitmap"
    return named(spoil, f"image_of_{length}_bytes_as_map")


# --clear-bitmap is the way out.
CLEARABLE = [
    missing_image, shorter_image(0), shorter_image(500000), shorter_image(MIB + 76),
    *[map_of_length(n) for n in (0, 16, 87, 4095, 4096, 8191, 8193, 12287, 12289, 100000)],
    named(header_with(8, b"\3\0\0\0", "version", " 3", " 2"), "later_version"),
    named(header_with(16, b"\0\2", "block size", " 512", " 4096"), "other_block_size"),
    named(header_with(24, b"\0", "checksum", seal=False), "damaged_header"),
    named(header_with(24, struct.pack("<Q", 2 * MIB), "size", 2 * MIB, MIB + 77), "other_disk"),
]
# It is not.
HOPELESS = [map_is_the_overlay, link_instead("map"), directory_instead("map"),
            directory_instead("overlay"), fifo_instead, map_of_length(1), map_of_zeros, map_of_garbage,
            named(header_with(0, b"xnbdBMAP", "bitmap", seal=False), "wrong_magic"),
            named(header_with(12, b"\1\0\0\0", "overlay"), "bitmap_of_an_overlay"),
            *[image_as_map(n) for n in (1, 512, 4096, MIB + 77)]]


@hazard("cache image deleted or shorter, bitmap kept; bitmap truncated or garbage")
@pytest.mark.parametrize("spoil", CLEARABLE, ids=lambda spoil: spoil.__name__)
def test_spoilt_cache_is_refused_until_the_bitmap_is_cleared(kept, proxy, run_server, spoil):
    words = spoil(kept)
    before = everything(kept)
    refused(run_server(*kept.command_line), 1, *words, "--clear-bitmap")
    assert everything(kept) == before
    p = proxy(kept.origin, "--clear-bitmap")
    with p.client() as c:
        assert c.pread(c.size) == pattern(0, MIB + 77)
        p.migrate()
    p.stop()
    assert p.image.read_bytes()[:MIB + 77] == pattern(0, MIB + 77)


@pytest.mark.parametrize("spoil", HOPELESS, ids=lambda spoil: spoil.__name__)
def test_what_is_no_cache_is_refused_by_name(kept, run_server, spoil):
    words = spoil(kept)
    before = everything(kept), kept.bitmap.is_file() and kept.bitmap.read_bytes()
    for options in [], ["--clear-bitmap"]:
        ended = run_server(*kept.command_line, *options)
        refused(ended, 1, words[0])
        assert (everything(kept), kept.bitmap.is_file() and kept.bitmap.read_bytes()) == before
        assert "--clear-bitmap" not in ended.stderr


@hazard("bitmap of another disk")
@pytest.mark.parametrize("size", [0, MIB, MIB + 76, MIB + 78, 200 * MIB])
def test_origin_of_another_size_is_refused(kept, run_server, server, original, tmp_path, size):
    o = server(original(size), "--unix", tmp_path / "other.sock")
    before = everything(kept)
    done = run_server("--proxy", *ADDRESS, f"unix:{o.unix}", kept.image, kept.bitmap, kept.control)
    refused(done, 1, size, MIB + 77, "--clear-bitmap")
    assert everything(kept) == before


@pytest.mark.parametrize("which", ["image", "bitmap", "control"])
def test_place_that_does_not_exist_is_refused(proxy, run_server, server, image, tmp_path, which):
    o = server(image, "--unix", tmp_path / "o.sock")
    files = dict(zip(["image", "bitmap", "control"], cache_in(tmp_path)))
    files[which] = tmp_path / "nowhere" / "file"
    refused(run_server("--proxy", *ADDRESS, f"unix:{o.unix}", *files.values()), 1, files[which])


def test_same_file_twice_is_refused(run_server, server, image, tmp_path):
    o = server(image, "--unix", tmp_path / "o.sock")
    image, bitmap, control = cache_in(tmp_path)
    done = run_server("--proxy", *ADDRESS, f"unix:{o.unix}", image, image, control)
    refused(done, 1, image)
    kept = tmp_path / "kept"
    kept.write_bytes(b"something of value")
    refused(run_server("--proxy", *ADDRESS, f"unix:{o.unix}", image, bitmap, kept), 1, kept)
    assert kept.read_bytes() == b"something of value"


# The cache image

@hazard("switch changes the disk's size because the cache image is larger")
def test_larger_cache_image_keeps_the_origins_size(proxy, server, image, tmp_path):
    larger = make_disk(tmp_path / "larger.img", 8 * MIB, b"\x77" * (8 * MIB))
    p = proxy(image, image=larger)
    with p.client() as c:
        assert c.size == SIZE and c.pread(SIZE) == CONTENT
        c.pwrite(b"end", SIZE - 3)
        p.migrate()
        with p.client() as later:
            assert later.size == SIZE
        assert c.error_of(WRITE, SIZE, payload=b"x") == NBD_ENOSPC
        assert c.error_of(READ, SIZE - 1, 2) == NBD_EINVAL
        assert c.pread(SIZE) == CONTENT[:-3] + b"end"
        assert p.query("size") == SIZE
    p.stop()
    assert larger.stat().st_size == 8 * MIB
    assert larger.read_bytes()[:SIZE] == CONTENT[:-3] + b"end"
    assert not larger.read_bytes()[SIZE + BLOCK:].strip(b"\x77")


def test_cache_image_may_be_a_larger_block_device(proxy, server, original, block_device):
    device, backing = block_device
    content = pattern(0, 2 * MIB + 512, seed=3)
    p = proxy(original(content=content), image=Path(device))
    with p.client() as c:
        assert c.size == len(content)
        c.pwrite(b"new", 5)
        c.zero(MIB, 100000)
        expected = content[:5] + b"new" + content[8:]
        expected = cleared(expected, ZERO, 100000, MIB, len(expected))
        p.stop()
    p = proxy(p.origin, image=Path(device))
    with p.client() as c:
        assert c.pread(c.size) == expected
        p.migrate()
        p.origin.kill()
        assert c.pread(c.size) == expected and c.size == len(content)
    p.stop()
    assert backing.read_bytes()[:len(content)] == expected
    assert backing.read_bytes()[3 * MIB:] == pattern(0, 4 * MIB)[3 * MIB:]


def test_device_smaller_than_the_disk_is_refused(run_server, server, original, block_device,
                                                 tmp_path):
    device, backing = block_device
    o = server(original(5 * MIB), "--unix", tmp_path / "o.sock")
    before = backing.read_bytes()
    done = run_server("--proxy", *ADDRESS, f"unix:{o.unix}", device, tmp_path / "cache.map",
                      tmp_path / "cache.ctl")
    refused(done, 1, device, 5 * MIB)
    assert backing.read_bytes() == before


def test_image_without_a_bitmap_holds_nothing(proxy, image, tmp_path):
    """Shorter or not: it gets the size, and its bytes mean nothing."""
    p = proxy(image, image=make_disk(tmp_path / "used.img", content=b"\x77" * MIB))
    assert p.cached() == 0
    with p.client() as c:
        assert c.pread(SIZE) == CONTENT
    assert p.image.stat().st_size == SIZE


def test_clearing_never_touches_an_image_in_place_of_the_bitmap(proxy, run_server, image,
                                                               tmp_path):
    """The two were exchanged, or are the same."""
    p = proxy(image)
    with p.client() as c:
        c.pwrite(b"of value", 5)
    p.stop()
    before = p.image.read_bytes()
    remote = remote_of(p.origin)
    for files in [p.image, p.image], [p.bitmap, p.image]:
        done = run_server("--proxy", *ADDRESS, "--clear-bitmap", *remote, *files, p.control)
        refused(done, 1, p.image)
        assert p.image.read_bytes() == before


# Random operations

def connecting(p):
    """For exercise()."""
    return lambda i: p.client(**dialect(i))


def later(seconds, work):
    def wait():
        time.sleep(seconds)             # a moment of the load, not a wait for anything
        return work()

    return Meanwhile(wait)


@hazard("partial write and full write of one absent block race with its fetch")
@pytest.mark.limit(120 + 5 * int(SECONDS))
@pytest.mark.parametrize("name", ["ragged", "small", "over 4 GiB"])
def test_random_operations_agree_with_a_model(proxy, original, server, name):
    """A copy and then the switch come in the middle; then the origin goes."""
    size, seed = DISKS[name], random_seed()
    content = pattern(0, min(size, 8 * MIB) // 2)
    p = proxy(original(size, content))
    model, some = Model(size, content), SECONDS / 6
    exercise(connecting(p), model, seed, some)
    p.stop()
    p = proxy(p.origin)
    migration = later(some / 2, p.migrate)
    exercise(connecting(p), model, seed + 1, 2 * some)
    migration.result()
    p.origin.kill()
    exercise(connecting(p), model, seed + 2, some)
    leave(p)
    model.check_image(p.image)


@pytest.mark.parametrize("size", [0, 1, 512, 4097])
def test_random_operations_on_a_tiny_disk(proxy, original, size):
    content = pattern(0, size)
    p = proxy(original(content=content))
    model = Model(size, content)
    exercise(connecting(p), model, random_seed(), min(SECONDS, 0.2))
    p.migrate()
    p.origin.kill()
    exercise(connecting(p), model, random_seed(), min(SECONDS, 0.2))
    leave(p)
    model.check_image(p.image)


class Whims:
    """What is wrong with an origin: an error now and then.

    failed      the blocks of the requests that had one
    """

    def __init__(self, seed, often=0.1):
        self.rng, self.often, self.failed = random.Random(seed), often, set()

    def __call__(self, request):
        if self.rng.random() >= self.often:
            return 0
        self.failed.update(blocks_of(request.offset, request.length))
        return self.rng.choice([NBD_EIO, NBD_ENOMEM, NBD_EINVAL])

    def delay(self, request):
        return self.rng.random() ** 4 * 0.05


def blocks_of(start, length):
    return range(start // BLOCK, -(-(start + length) // BLOCK))


class Patient(Session):
    """A connection that takes EIO for what the origin has failed to deliver."""

    def __init__(self, client, model, generator, in_flight, whims):
        super().__init__(client, model, generator, in_flight)
        self.whims = whims

    def receive(self):
        reply = self.client.collect()
        op = self.in_flight.pop(reply.cookie)
        if reply.error != NBD_EIO:
            op.end(self.model, reply)
            return
        assert not op.error and not self.whims.failed.isdisjoint(
            blocks_of(op.start, op.length)), f"{op}: {reply}, and the origin did not fail"
        self._give_up(op)

    def _give_up(self, op):
        """A change that failed may have been made, in part or not at all."""
        if op.command in (READ, NBD_CMD_BLOCK_STATUS):
            self.model.end_read(op.handle)
        elif op.handle:
            self.model.now += 1
            op.handle.done, op.handle.sure = self.model.now, False


class Trouble:
    """Makes an origin die, hang and come back until it is told to stop."""

    def __init__(self, origin, seed):
        self.origin, self.rng, self.over = origin, random.Random(seed), threading.Event()
        self.work = Meanwhile(self._run)

    def _run(self):
        while not self.over.wait(0.2 + self.rng.random() * 0.3):
            if self.rng.random() < 0.7:
                self.origin.die(reset=self.rng.random() < 0.5)
                self.over.wait(self.rng.random() * 0.2)
                self.origin.come_back()
            else:
                self.origin.freeze()
                self.over.wait(self.rng.random() * 0.3)
                self.origin.thaw()

    def stop(self):
        self.over.set()
        self.work.result()


def drive(sessions, condition):
    while not condition():
        for s in sessions:
            s.fill()
        turn(sessions)


def for_seconds(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.mark.limit(120 + 5 * int(SECONDS))
@hazard("replies matched in order of sending: an origin that reorders swaps blocks silently")
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_model_agrees_whatever_the_origin_does(proxy, structured):
    """It answers late, out of order, in fragments, with errors, dies and returns."""
    seed = random_seed()
    print(f"XNBD_SEED={seed}")
    size, whims = 20 * MIB + 77, Whims(seed)
    content = pattern(0, size // 2)
    with Origin({0: content}, size=size, structured=structured, order="mixed", chunk=20000,
                fragment=lambda: whims.rng.randrange(1, 50000), delay=whims.delay, errors=whims,
                shuffle=True) as o:
        p = proxy(o)
        model = Model(size, content)
        sessions = [Patient(connecting(p)(i), model, Generator(size, i, i % 2, seed), 16, whims)
                    for i in range(4)]
        trouble = Trouble(o, seed)
        drive(sessions, for_seconds(SECONDS / 2))
        drive(sessions, lambda: sum(s.count for s in sessions) > 100)
        copy = Meanwhile(lambda: until(lambda: tried(p.cache_all), seconds=3 * DEADLINE))
        drive(sessions, for_seconds(SECONDS / 4))
        o.set(errors=None)
        drive(sessions, copy.is_over)
        copy.result()
        trouble.stop()
        switch = Meanwhile(p.switch)
        drive(sessions, switch.is_over)
        switch.result()
        drive(sessions, for_seconds(SECONDS / 8))
        o.die()
        drive(sessions, for_seconds(SECONDS / 8))
        while any(s.in_flight for s in sessions):
            turn(sessions)
        print(f"{sum(s.count for s in sessions)} operations, {len(o.connections)} connections, "
              f"{len(whims.failed)} blocks failed")
    leave(p)
    model.check_image(p.image)


def tried(command):
    """Whether it was not refused."""
    try:
        command()
        return True
    except Refused:
        return False


# The switch

def switched_load(proxy, original, tmp_path, kinds):
    model = Numbered(16 * MIB // UNIT + 1)
    p = proxy(original.watch(model.make_image(tmp_path / "numbered.img")))
    return model, p, Load(p, model, kinds)


@hazard("switch while a block is in flight says 100 % and leaves it zeros; a request in flight"
        " is never answered")
@pytest.mark.parametrize("kinds", [[WRITE], [*[WRITE] * 6, ZERO, TRIM, FLUSH]],
                         ids=["writes", "all"])
def test_switch_under_load_loses_no_request(proxy, original, tmp_path, kinds):
    """Numbered writes on five connections; each is answered once (nbd.py), and
    the image has them all, long after the origin has gone."""
    if TRIM in kinds:
        need_holes()
    model, p, load = switched_load(proxy, original, tmp_path, kinds)
    load.run_for(200)
    load.phase = "copying"
    copy = Meanwhile(p.cache_all)
    load.run(copy.is_over)
    copy.result()
    load.phase = "switching"
    switch = Meanwhile(p.switch)
    load.run(switch.is_over)
    load.run_for(100)
    switch.result()
    load.phase = "after"
    p.origin.kill()
    load.run_for(500)
    load.drain()
    leave(p)
    model.check_instant(p.image.read_bytes(), model.now, model.now)
    for phase, seconds in load.probe.items():
        report(f"probe, {phase}", seconds)
    assert max(load.probe["switching"], default=0) < DEADLINE / 4


@hazard("a client connecting meanwhile is lost")
def test_clients_that_connect_during_the_switch_are_served(proxy, image):
    for i in range(5):
        p = proxy(image, name=f"cache{i}")
        p.cache_all()
        over = threading.Event()

        def connect():
            count = 0
            while not over.is_set():
                with p.client(structured=count % 2) as c:
                    assert c.pread(1000, 1000) == CONTENT[1000:2000]
                count += 1
            return count

        connecting = [Meanwhile(connect) for _ in range(2)]
        p.switch()
        over.set()
        assert all(c.result() for c in connecting)
        p.stop()


def test_switch_is_refused_with_the_numbers_while_blocks_are_missing(proxy, original):
    p = proxy(original(content=pattern(0, 1000 * BLOCK)))
    with p.client() as c:
        c.pwrite(bytes(999 * BLOCK))
        with pytest.raises(Refused) as refusal:
            p.switch()
        assert str(refusal.value) == "1 of 1000 blocks are not here yet (99.9 % are)"
        assert p.query("mode", "cached-percent") == ["proxy", "99.9"]
        c.pread(1, 999 * BLOCK)
        p.switch()
        assert p.query("mode", "cached-percent") == ["target", "100.0"]


def test_sigusr2_is_the_switch(proxy, image):
    p = proxy(image)
    with p.client() as c:
        c.pread(BLOCK)
        p.proc.send_signal(signal.SIGUSR2)
        until(lambda: "not here yet" in p.log(), what="the refusal")
        assert p.query("mode") == "proxy"
        p.cache_all()
        p.proc.send_signal(signal.SIGUSR2)
        until(lambda: p.query("mode") == "target", what="the switch")
        p.origin.kill()
        assert c.pread(SIZE) == CONTENT


def test_target_after_the_switch_is_like_any_other(proxy, server, image):
    p = proxy(image)
    p.proc.send_signal(signal.SIGUSR1)
    until(lambda: re.search(r"SIGUSR1.*ignored", p.log()), what="a line about SIGUSR1")
    with p.client(contexts=[ALLOCATION]) as c:
        p.migrate()
        p.origin.kill()
        told = p.query()
        assert (told["mode"], told["origin-link"]) == ("target", "closed")
        for command in "switch", "switch force":
            with pytest.raises(Refused, match="target already"):
                p.ask(command)
        assert p.cache_all() is not None and p.ask("cache-all2") == []
        with pytest.raises(Refused, match="no origin"):
            p.ask("reconnect 127.0.0.1 10809")
        c.pwrite(b"snapshot", 5000)
        path, *_ = Snapshots(p).take()
        c.pwrite(b"not in it", 9000, FUA)
        c.zero(BLOCK, MIB)
        c.trim(BLOCK, 2 * MIB)
        assert c.block_status(SIZE)[ALLOCATION]
        assert path.read_bytes() == CONTENT[:5000] + b"snapshot" + CONTENT[5008:]
        expected = c.pread(SIZE)
    p.stop()
    with server(p.image).client() as c:
        assert c.pread(SIZE) == expected


def test_switched_proxy_that_is_killed_has_lost_nothing(proxy, server, image):
    """The image alone is the disk now; the bitmap is not needed any more."""
    p = proxy(image)
    with p.client() as c:
        p.migrate()
        c.pwrite(b"after", 5)
        p.kill()
    p.bitmap.unlink()
    with server(p.image).client() as c:
        assert c.pread(SIZE) == CONTENT[:5] + b"after" + CONTENT[10:]


def test_proxy_may_be_started_again_after_the_switch(proxy, image):
    """On the same cache: all is here, also what was written since."""
    p = proxy(image)
    with p.client() as c:
        p.migrate()
        c.pwrite(b"after", 5)
    p.stop()
    p = proxy(p.origin)
    with p.client() as c:
        assert c.pread(SIZE) == CONTENT[:5] + b"after" + CONTENT[10:]
        assert p.query("fetched-bytes", "cached-percent") == [0, "100.0"]
        p.switch()


@hazard("a request in flight is never answered: forced, while the origin is dead")
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_forced_switch_answers_those_who_wait_for_the_origin(proxy, image, how):
    """What is missing reads as zeros, and the answer says how much that was."""
    p = proxy(image)
    end = SIZE // BLOCK * BLOCK
    with p.client() as c, p.client(structured=True) as s, contextlib.ExitStack() as away:
        c.pwrite(pattern(0, BLOCK, seed=1))
        if how == "killed":
            p.origin.kill()
        else:
            away.enter_context(stopped(p.origin))
        sent = {c.request(READ, MIB + i * 10 * BLOCK, 1000): c for i in range(20)}
        sent |= {s.request(READ, MIB + i * 10 * BLOCK, 100000): s for i in range(20)}
        sent |= {c.request(WRITE, 2 * MIB + i * BLOCK + 5, payload=b"part"): c for i in range(20)}
        p.waits(3)
        zeroed = dict(p.switch(force=True))
        assert int(zeroed["zeroed"]) == end // BLOCK
        replies = [client.collect(cookie) for cookie, client in sent.items()]
        assert {reply.error for reply in replies} <= {0, NBD_EIO}
        assert not any((reply.data or b"").strip(b"\0") for reply in replies)
        expected = bytearray(SIZE)
        expected[:BLOCK] = pattern(0, BLOCK, seed=1)
        for reply in replies:
            if reply.request.command == WRITE and not reply.error:
                expected[reply.request.offset:reply.request.offset + 4] = b"part"
        assert c.pread(SIZE) == expected
    leave(p)
    assert p.image.read_bytes() == expected


def test_forced_switch_zeroes_what_the_image_has_in_the_place_of_absent_blocks(proxy, image,
                                                                              tmp_path):
    """It may have been used before."""
    used = make_disk(tmp_path / "used.img", content=b"\x77" * SIZE)
    p = proxy(image, image=used)
    with p.client() as c:
        c.pread(10, 50 * BLOCK)
        p.quiet()
        kept = p.cached()
        zeroed = dict(p.switch(force=True))
        assert int(zeroed["zeroed"]) == -(-SIZE // BLOCK) - kept
        found = c.pread(SIZE)
    for at in range(0, SIZE, BLOCK):
        assert found[at:at + BLOCK] in (bytes(len(found[at:at + BLOCK])), CONTENT[at:at + BLOCK])
    assert b"\x77" * 100 not in found
    p.stop()
    assert used.read_bytes() == found


def test_switch_is_refused_while_a_copy_has_more_to_do_and_the_copy_goes_on(proxy):
    with Origin(CONTENT) as o:
        o.hold(lambda request: request.command == READ)
        p = proxy(o)
        copy = Meanwhile(p.cache_all)
        o.wait(lambda request: request.command == READ)
        with pytest.raises(Refused, match="not here yet"):
            p.switch()
        o.release()
        copy.result()
        p.switch()
        assert p.client().pread(SIZE) == CONTENT


def test_writer_in_the_middle_of_a_payload_does_not_delay_the_switch(proxy, image):
    """Its first half went to the proxy, the second goes to the target."""
    p = proxy(image)
    p.cache_all()
    new = pattern(0, SIZE, seed=1)
    with p.client() as slow, p.client() as c:
        cookie = slow.request(WRITE, 1000, 2 * MIB, payload=new[1000:MIB])
        p.switch()
        p.origin.kill()
        assert c.pread(MIB, 3 * MIB) == CONTENT[3 * MIB:4 * MIB]
        slow.send(new[MIB:1000 + 2 * MIB])
        assert not slow.collect(cookie).error
        assert c.pread(SIZE) == CONTENT[:1000] + new[1000:1000 + 2 * MIB] + CONTENT[1000 + 2 * MIB:]


@hazard("client that does not read its replies: it may not stop the switch")
def test_deaf_client_does_not_delay_the_switch(proxy, image):
    p = proxy(image)
    p.cache_all()
    with p.client(rcvbuf=4096) as deaf, p.client() as c:
        send_until_blocked(deaf, request_header(READ, 0, MIB) * 20000)
        begin = time.monotonic()
        p.switch()
        assert time.monotonic() - begin < 9     # it would be waited for for 10 s
        assert c.pread(SIZE) == CONTENT


@hazard("fdatasync fails, the next one succeeds")
def test_switch_is_refused_when_the_data_cannot_be_made_durable(proxy, image, tmp_path):
    """The system tells once that it has lost data; it stays a proxy, which serves nothing any
    more.  The origin is still there for the next one."""
    p = proxy(image)
    with p.client() as c:
        p.cache_all()
        with failing_sync(p, tmp_path, "1+"):
            c.pwrite(b"new", 5)
            with pytest.raises(Refused, match="nput/output error|durable"):
                p.switch()
        for force in False, True:
            with pytest.raises(Refused):
                p.switch(force)
        fails_for_good(c)
        assert p.query("mode") == "proxy"
        assert p.map.flags() == Map.FAILED | Map.WRITTEN
    p.expected_status = 1
    p.stop()
    spoil_uncommitted(p.image, p.map)
    p = proxy(p.origin)
    with p.client() as c:
        assert c.pread(SIZE) in (CONTENT, CONTENT[:5] + b"new" + CONTENT[8:])
        p.migrate()


def calls_of_switch(p, output):
    """What it does to its files up to its answer; "header" writes that of the map."""
    for line in output.read_text().splitlines():
        found = re.match(r"\d+ +(\w+)\(\d+<([^>]*)>(?:.*, (\d+)\) += )?", line)
        if 'ok\\n"' in line:
            yield "ok"
        elif found and Path(found[2]) in (p.image, p.bitmap):
            name = "image" if Path(found[2]) == p.image else "map"
            is_header = name == "map" and found[3] == "0"
            yield ("sync " + name if "sync" in found[1] else
                   "header" if is_header else "write " + name)


@hazard("switch without fdatasync of the image: or of the map, or in the wrong order")
@pytest.mark.parametrize("force", [False, True], ids=["complete", "forced"])
def test_switch_holds_all_blocks_once_the_image_is_durable(proxy, image, tmp_path, force):
    """Whatever the maps say: by one sector, which is written last."""
    p, output = proxy(image), tmp_path / "calls"
    with p.client() as c, Control(p.control) as control:
        c.pwrite(b"new", 5)
        if not force:
            p.cache_all()
        c.flush()
        p.quiet()
        with traced(p, output, "-e", "trace=fdatasync,fsync,pwrite64,sendto,sendmsg,write"):
            control.ask("switch force" if force else "switch")
            assert p.map.flags() == Map.WHOLE | Map.WRITTEN
    calls = list(calls_of_switch(p, output))
    assert calls[-4:] == ["sync image", "header", "sync map", "ok"], calls
    assert "header" not in calls[:-3] and "write map" not in calls, calls


def test_switched_cache_outlives_a_power_cut_without_any_bit(proxy, image):
    """A switch does not commit bits: the header alone says that all is here."""
    p = proxy(image)
    with p.client() as c:
        c.pwrite(b"new", 5)
        p.migrate()
        c.pwrite(b"later", 3 * MIB)
        c.flush()
    p.kill()
    p.map.another_boot()
    with open(p.bitmap, "r+b") as f:
        os.pwrite(f.fileno(), bytes(p.bitmap.stat().st_size - Map.HEADER), Map.HEADER)
    p = proxy(p.origin)
    blocks = -(-SIZE // BLOCK)
    assert p.query("cached-blocks", "cached-percent") == [blocks, "100.0"]
    with p.client() as c:
        expected = CONTENT[:5] + b"new" + CONTENT[8:3 * MIB] + b"later" + CONTENT[3 * MIB + 5:]
        assert c.pread(SIZE) == expected
        p.origin.kill()
        assert c.pread(SIZE) == expected


@hazard("the live map is believed after a reboot: zeros of a forced switch that was cut")
def test_forced_switch_whose_sync_fails_leaves_the_origins_blocks(proxy, image, tmp_path):
    """The zeros are in the image by then; they count for nothing."""
    p = proxy(image)
    with p.client() as c:
        c.pwrite(b"new", 5)
        c.flush()
        with failing_sync(p, tmp_path):
            with pytest.raises(Refused):
                p.switch(force=True)
        assert not p.map.flags() & Map.WHOLE
        fails_for_good(c)
    p.expected_status = 1
    p.stop()
    with proxy(p.origin).client() as c:
        assert c.pread(SIZE) == CONTENT[:5] + b"new" + CONTENT[8:]


@hazard("fdatasync fails, the next one succeeds: what a switch had made durable is gone")
def test_second_switch_that_fails_takes_nothing_from_the_first(proxy, image, tmp_path):
    """By a server that was started again on the cache: all blocks are held for good."""
    p = proxy(image)
    with p.client() as c:
        p.switch(force=True)
        c.pwrite(b"flushed", 5)
        c.flush()
    p.stop()
    p = proxy(p.origin)
    with p.client() as c:
        with failing_sync(p, tmp_path):
            with pytest.raises(Refused):
                p.switch()
        fails_for_good(c)
    p.expected_status = 1
    p.stop()
    p = proxy(p.origin)
    assert p.query("cached-percent") == "100.0"
    with p.client() as c:
        assert c.pread(SIZE) == bytes(5) + b"flushed" + bytes(SIZE - 12)


@hazard("switch without fdatasync of the image")
@pytest.mark.parametrize("force", [False, True], ids=["complete", "forced"])
def test_switch_that_finds_no_space_for_the_header_may_be_tried_again(proxy, image, tmp_path,
                                                                      force):
    """Nothing has been lost: clients notice nothing, and nothing counts as zeros."""
    p = proxy(image)
    with p.client() as c:
        c.pwrite(b"new", 5)
        if not force:
            p.cache_all()
        c.flush()
        p.quiet()
        with traced(p, tmp_path / "calls", "-P", p.bitmap, "-e", "trace=pwrite64", "-e",
                    "inject=pwrite64:error=ENOSPC:when=1+"):
            with pytest.raises(Refused, match="space"):
                p.switch(force)
        assert not p.map.flags() & Map.WHOLE
        assert c.pread(SIZE) == CONTENT[:5] + b"new" + CONTENT[8:]
        p.migrate()
        assert p.map.flags() & Map.WHOLE
    p.stop()
    assert p.image.read_bytes() == CONTENT[:5] + b"new" + CONTENT[8:]


@hazard("switch without fdatasync of the image")
def test_switch_syncs_the_image_before_it_says_so(proxy, image, tmp_path):
    p, output = proxy(image), tmp_path / "calls"
    with p.client() as c, Control(p.control) as control:
        p.cache_all()
        with traced(p, output, "-e", "trace=fdatasync,fsync,pwrite64,sendto,sendmsg,write"):
            c.pwrite(b"new", 5)
            assert control.ask("switch") == []
    calls = [line for line in output.read_text().splitlines()
             if p.image.name in line or "ok\\n" in line]
    kinds = ["sync" if "sync(" in line else "ok" if "ok\\n" in line else "write" for line in calls]
    assert "sync" in kinds[kinds.index("write"):kinds.index("ok")], calls


# Full disks

FULL = 8 * MIB


def fill(c):
    """Writes every second block until there is no room; how many there was room for."""
    for i in range(FULL // BLOCK // 2):
        error = c.error_of(WRITE, i * 2 * BLOCK, payload=pattern(i * 2 * BLOCK, BLOCK, seed=1))
        if error:
            assert error == NBD_ENOSPC
            return i
    raise AssertionError("the disk is not full")


def filled(held):
    expected = bytearray(pattern(0, FULL))
    for at in range(0, held * 2 * BLOCK, 2 * BLOCK):
        expected[at:at + BLOCK] = pattern(at, BLOCK, seed=1)
    return expected


@hazard("disk full on a write; disk full while caching a read")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_disk_is_enospc_for_writes_and_nothing_for_reads(proxy, original, file_system, kind):
    need_holes()
    p = proxy(original(content=pattern(0, FULL)), place=file_system(kind, 2 * MIB))
    with p.client() as c, p.client(structured=True) as other:
        held = fill(c)
        assert held > 100 and p.cached() == held
        expected = filled(held)
        for client in c, other:
            assert client.pread(FULL) == expected
            assert client.pread(5000, FULL - 6000) == expected[FULL - 6000:FULL - 1000]
        assert p.cached() <= held + 16          # ext4 may find a little more
        assert "No space left" in p.log() and len(p.log().splitlines()) < 100
        assert c.error_of(WRITE, FULL - 5000, payload=b"part") == NBD_ENOSPC
        with pytest.raises(Refused, match="space"):
            p.cache_all()
        assert c.pread(FULL) == expected
        c.pwrite(pattern(0, BLOCK, seed=1))
        c.trim(MIB)
        c.flush()
        expected[:MIB] = bytes(MIB)
        c.pwrite(b"part", FULL - 5000)
        expected[FULL - 5000:FULL - 4996] = b"part"
        before = p.cached()
        assert c.pread(50000, FULL - 100000) == expected[FULL - 100000:FULL - 50000]
        until(lambda: p.cached() > before, what="a block that is cached again")
        assert other.pread(FULL) == expected
    p.stop()
    p = proxy(p.origin, place=p.bitmap.parent)
    with p.client() as c:
        assert c.pread(FULL) == expected


# Origins of others

def accepts(path):
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(str(path)) == 0


class Spawn:
    """Starts other servers at Unix sockets in a directory."""

    def __init__(self, directory):
        self.directory, self.running = directory, []

    def start(self, name, package, *arguments):
        path = self.directory / f"{name[:4]}.sock"         # names of sockets have 107 bytes at most
        command = [need(name, package), *[str(a).format(socket=path) for a in arguments]]
        with open(self.directory / f"{name}.log", "ab") as log:
            proc = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.running.append(proc)
        until(lambda: accepts(path) or proc.poll() is not None, what=f"a socket of {name}")
        assert proc.poll() is None, (self.directory / f"{name}.log").read_text()
        return [f"unix:{path}"]

    def nbdkit(self, *arguments):
        return self.start("nbdkit", "nbdkit", "-f", "-U", "{socket}", *arguments)

    def qemu_nbd(self, image):
        return self.start("qemu-nbd", "qemu-utils", "-k", "{socket}", "-f", "raw", "-t", "-e", "8",
                          "-r", image)

    def nbd_server(self, image):
        """One process for each connection; it has no name for its default export."""
        config = self.directory / "nbd-server.conf"
        config.write_text(f"[generic]\nport = 0\n[disk]\nexportname = {image}\nreadonly = true\n")
        return self.start("systemd-socket-activate", "systemd", "--accept", "--inetd", "-l",
                          "{socket}", need("nbd-server", "nbd-server"), "-d", "-C", config)

    def end(self):
        while self.running:
            proc = self.running.pop()
            proc.kill()             # nbdkit waits for its clients otherwise
            proc.wait(DEADLINE)


@pytest.fixture
def spawn(original, tmp_path):
    spawned = Spawn(tmp_path)
    yield spawned
    spawned.end()


class Origins:
    """Starts an origin that serves an image: the fixtures' functions, and spawn."""

    def __init__(self, proxy, server, spawn, socket):
        self.proxy, self.server, self.spawn, self.socket = proxy, server, spawn, socket

    def target(self, image, *options):
        return self.server(image, "--unix", self.socket, *options)

    def cow_target(self, image):
        return self.server(args=["--cow-target", "--unix", self.socket, image])

    def nbdkit(self, image, *options, last=()):
        return self.spawn.nbdkit(*options, "file", image, *last)

    def block_sizes(self, image, least, most):
        """A server that insists on them."""
        return self.nbdkit(image, "--filter=blocksize-policy", last=[
            f"blocksize-minimum={least}", f"blocksize-preferred={max(least, 4096)}",
            f"blocksize-maximum={most}", "blocksize-error-policy=error"])

    def proxies(self, image, count):
        """A chain."""
        for i in range(count):
            image = self.proxy(image, name=f"proxy{i}")
        return image


ORIGINS = {
    "xnbd-server": lambda o, image: o.target(image),
    "xnbd-server --oldstyle": lambda o, image: o.target(image, "--oldstyle"),
    "xnbd-server --readonly": lambda o, image: o.target(image, "--readonly"),
    "xnbd-server --cow-target": lambda o, image: o.cow_target(image),
    "nbdkit, 16 threads": lambda o, image: o.nbdkit(image, "-t", "16"),
    "nbdkit, a delay": lambda o, image: o.nbdkit(image, "--filter=delay", last=["rdelay=10ms"]),
    "nbdkit -o": lambda o, image: o.nbdkit(image, "-o"),
    "nbdkit --mask-handshake=0": lambda o, image: o.nbdkit(image, "--mask-handshake=0"),
    "nbdkit --no-sr": lambda o, image: o.nbdkit(image, "--no-sr"),
    "nbdkit, noextents": lambda o, image: o.nbdkit(image, "--filter=noextents"),
    "nbdkit, blocks of 512 bytes": lambda o, image: o.block_sizes(image, 512, 65536),
    "nbdkit, blocks of 64 KiB": lambda o, image: o.block_sizes(image, 65536, 131072),
    "qemu-nbd": lambda o, image: o.spawn.qemu_nbd(image),
    "nbd-server": lambda o, image: o.spawn.nbd_server(image),
    "a proxy": lambda o, image: o.proxies(image, 1),
    "a proxy of a proxy": lambda o, image: o.proxies(image, 2),
}


@pytest.fixture
def through(proxy, server, spawn, tmp_path):
    """through(name, image): a proxy whose origin is that one of ORIGINS."""
    def start(name, image):
        origin = ORIGINS[name](Origins(proxy, server, spawn, tmp_path / "o.sock"), image)
        named = ["--target-exportname", "disk"] if name == "nbd-server" else []
        return proxy(origin, *named)

    return start


MIXED = 4 * MIB + 64 * KIB


@pytest.mark.parametrize("name", ORIGINS)
def test_disk_of_any_origin_is_read_and_migrated(through, original, name):
    """Data and holes; a part is read in no order, a part written, the rest copied."""
    content = bytearray(MIXED)
    places = {at: pattern(at, 200000) for at in range(0, MIXED - 200000, 512 * KIB)}
    for at, data in places.items():
        content[at:at + len(data)] = data
    p = through(name, original(MIXED, places=places))
    rng = random.Random(name)
    with p.client(contexts=[ALLOCATION]) as c, p.client() as other:
        for _ in range(20):
            at = rng.randrange(MIXED)
            true_status(c, content, at, rng.randrange(at, MIXED) + 1)
        for _ in range(60):
            at = rng.randrange(MIXED // 2)
            length = rng.choice([1, 512, 4096, 70000])
            (c if rng.random() < 0.5 else other).request(READ, at, length)
        for client in c, other:
            for reply in client.collect_all().values():
                at, length = reply.request.offset, reply.request.length
                assert reply.data == content[at:at + length], (at, length)
        c.pwrite(b"part", MIXED // 2 + 5)
        content[MIXED // 2 + 5:MIXED // 2 + 9] = b"part"
        true_status(c, content)
        p.migrate()
        assert other.pread(MIXED) == content
    p.stop()
    assert p.image.read_bytes() == content


def test_any_origin_may_be_gone_after_the_switch(through, spawn, original):
    content = pattern(0, MIXED)
    p = through("nbdkit, 16 threads", original(content=content))
    p.migrate()
    spawn.end()
    assert p.client().pread(MIXED) == content


def test_errors_of_nbdkit_are_eio_and_go_away(proxy, spawn, original, tmp_path):
    """Ten per cent of its reads fail.  Asked again and again, all come."""
    content = pattern(0, 2 * MIB + 77)
    o = spawn.nbdkit("-t", "16", "--filter=error", "file", original(content=content),
                     "error-pread=EIO", "error-pread-rate=10%")
    p = proxy(o)
    with p.client(structured=True) as c:
        errors = 0
        for at in range(0, len(content), 50000):
            length = min(50000, len(content) - at)
            while True:
                reply = c.call(READ, at, length)
                if not reply.error:
                    break
                assert reply.error == NBD_EIO
                errors += 1
            assert reply.data == content[at:at + length]
        until(lambda: tried(p.cache_all), seconds=3 * DEADLINE)
        p.switch()
        assert c.pread(len(content)) == content
    print(f"{errors} errors")


# Sparse disks

SPARSE, PIECES = 10 * GIB, 100


@pytest.fixture
def sparse(original, tmp_path):
    """10 GiB with 100 MiB of data."""
    need_punch(tmp_path)
    data = pattern(0, MIB)
    rng = random.Random(100)
    at = [i * (SPARSE // PIECES) + rng.randrange(SPARSE // PIECES - 2 * MIB) & -BLOCK
          for i in range(PIECES)]
    return original(SPARSE, places={a: a.to_bytes(8, "little") + data[8:] for a in at})


def same_bytes(a, b):
    """Compares two sparse files where either of them has data."""
    assert a.stat().st_size == b.stat().st_size
    with open(a, "rb") as f, open(b, "rb") as g:
        for one in f, g:
            for start, end, hole in extents(one.fileno(), SPARSE):
                for at in range(start, end if not hole else start, MIB):
                    length = min(MIB, end - at)
                    assert os.pread(f.fileno(), length, at) == os.pread(g.fileno(), length, at), at


@pytest.mark.parametrize("name", ["xnbd-server", "nbdkit, 16 threads", "qemu-nbd", "a proxy"])
def test_sparse_disk_migrates_by_moving_its_data_alone(through, sparse, name):
    p = through(name, sparse)
    begin = time.monotonic()
    p.cache_all()
    print(f"{name}: {time.monotonic() - begin:.2f} s")
    assert PIECES * MIB <= p.query("fetched-bytes") < 110 * MIB
    p.switch()
    with p.client(contexts=[ALLOCATION]) as c:
        assert c.size == SPARSE
        c.block_status(MIB, 5 * GIB)
    p.stop()
    assert p.image.stat().st_blocks * 512 < 110 * MIB
    same_bytes(p.image, sparse)


# Clients

def test_qemu_img_converts_in(proxy, original, tmp_path):
    source = make_disk(tmp_path / "source", 8 * MIB, pattern(0, 3 * MIB, seed=1))
    p = proxy(original(content=pattern(0, 8 * MIB)))
    qemu_img("convert", "-n", "-f", "raw", "-O", "raw", source, p.uri)
    p.migrate()
    p.stop()
    assert p.image.read_bytes() == source.read_bytes()


def test_nbdinfo_finds_all_capabilities(proxy, image):
    p = proxy(image)
    for option in "read", "write", "flush", "fua", "trim", "zero", "cache", "df", "fast-zero", \
            "multi-conn", "structured-reply":
        tool("libnbd-bin", "nbdinfo", "--can", option, p.uri)


def test_nbdcopy_fills_a_cold_cache_and_reads_the_same_warm(proxy, original, tmp_path):
    content = pattern(0, 24 * MIB + 77)
    p = proxy(original(content=content))
    nbdcopy("--connections=4", "--requests=64", p.uri, tmp_path / "cold")
    assert p.query("fetched-bytes") <= len(content) + 77
    p.quiet()
    p.origin.kill()
    nbdcopy(p.uri, tmp_path / "warm")
    for copy in "cold", "warm":
        assert (tmp_path / copy).read_bytes() == content


@pytest.mark.parametrize("options", [["--rw=randwrite", "--bs=4k"],
                                     ["--rw=randrw", "--bsrange=512-64k", "--blockalign=512"]],
                         ids=lambda options: options[0])
def test_fio_verifies_what_it_wrote_during_a_migration(proxy, original, options):
    need("fio", "fio")
    p = proxy(original(content=b"\x5a" * (FIO_SIZE * MIB)))
    migration = later(0.2, p.migrate)
    fio(p, *options, "--verify=crc32c-intel", "--verify_fatal=1", "--verify_backlog=256")
    migration.result()


@pytest.mark.parametrize("option, value", [("--max-queue-size", "1"), ("--max-buf-size", "1M")])
def test_client_that_does_not_read_its_reply_holds_up_nobody(proxy, original, option, value):
    """The bounds are for what waits for the origin or the disk, not for a client."""
    content = pattern(0, 32 * MIB)
    p = proxy(original(content=content), option, value)
    with p.client() as deaf, p.client() as c:
        deaf.request(READ, 0, 32 * MIB)
        until(lambda: p.query("cached-blocks") == 32 * MIB // BLOCK, what="all blocks")
        for at in range(0, 32 * MIB, 4 * MIB):
            assert c.pread(BLOCK, at) == content[at:at + BLOCK]
        c.pwrite(b"new", 5)
        c.flush()
        assert deaf.collect_all()


def test_long_change_leaves_room_for_others_of_its_client(server, disk, tmp_path):
    """It needs no data, however long it is."""
    with server(disk(GIB)).client() as c:
        for i in range(20):
            long = c.request(ZERO, 0, GIB - BLOCK)
            assert c.pread(512) == bytes(512)
            assert not c.collect(long).error
