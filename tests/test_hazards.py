"""How NBD servers have failed before: each hazard, re-tried on this one.

The marker of a test names its hazard.  Whatever a client does, it may lose its
connection, the server lives and serves the next one; the fixture `server`
checks at the end that it ends well and that no sanitizer complained.
"""

import contextlib
import os
import random
import re
import resource
import select
import signal
import stat
import struct
import threading
import time
from pathlib import Path

import pytest

from conftest import (Server, arguments_of, make_disk, need_holes, need_punch,
                      raise_descriptor_limit)
from nbd import *
from test_control import bgctl, done
from test_faults import EVER, HOLD, SLOW, Control as Calls, library
from test_protocol import evict

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB + 77
ALLOCATION = "base:allocation"
# What the server may grow by; a sanitizer keeps freed memory for a while.
MEMORY = 1024 * MIB if SANITIZED else 64 * MIB
FIXED = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES
hazard = pytest.mark.hazard
all_replies = pytest.mark.parametrize("structured", [False, True, EXTENDED],
                                      ids=["simple", "structured", "extended"])


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


def option(number, data=b""):
    return option_header(number, len(data)) + data


def in_step(c):
    assert c.pread(512, 1000) == pattern(1000, 512)


def unchanged(c):
    for at in range(0, c.size, MIB):
        length = min(MIB, c.size - at)
        assert c.pread(length, at) == pattern(at, length)


# Handshake

SESSION = b"".join([
    struct.pack(">I", FIXED),
    option(NBD_OPT_STRUCTURED_REPLY),
    option(NBD_OPT_LIST),
    option(NBD_OPT_SET_META_CONTEXT, meta_data("ab", [ALLOCATION])),
    option(NBD_OPT_INFO, info_data("ab", [NBD_INFO_NAME])),
    option(1000, b"unknown"),
    option(NBD_OPT_GO, info_data("ab", [NBD_INFO_BLOCK_SIZE])),
    request_header(NBD_CMD_READ, 0, 512),
    request_header(NBD_CMD_WRITE, SIZE - 8, 8) + b"payload.",
    request_header(NBD_CMD_BLOCK_STATUS, 0, 512),
])
LEGACY = b"".join([struct.pack(">I", 0), option(NBD_OPT_EXPORT_NAME, b"ab"),
                   request_header(NBD_CMD_READ, 0, 512)])
MODERN = b"".join([
    struct.pack(">I", FIXED),
    option(NBD_OPT_EXTENDED_HEADERS),
    option(NBD_OPT_SET_META_CONTEXT, meta_data("ab", [ALLOCATION])),
    option(NBD_OPT_GO, info_data("ab")),
    extended_header(NBD_CMD_READ, 0, 512),
    extended_header(NBD_CMD_WRITE, SIZE - 8, 8, NBD_CMD_FLAG_PAYLOAD_LEN) + b"payload.",
    extended_header(NBD_CMD_TRIM, SIZE - 8, 8, NBD_CMD_FLAG_PAYLOAD_LEN) + b"payload.",
    extended_header(NBD_CMD_BLOCK_STATUS, 0, 512),
])
sessions = pytest.mark.parametrize("session", [SESSION, LEGACY, MODERN],
                                   ids=["fixed", "legacy", "extended"])


@hazard("handshake cut off at every byte; reset instead of close")
@pytest.mark.parametrize("end", ["close", "reset"])
@sessions
def test_session_cut_off_at_every_byte(target, session, end):
    before = target.sockets()
    for length in range(len(session) + 1):
        c = Client(target.address)
        c.send(session[:length])
        if length % 2:
            c.recv(18)              # else the greeting goes unread
        getattr(c, end)()
        if length % 40 == 0:
            target.is_served()
    target.is_served()
    until(lambda: target.sockets() <= before, what="closing of all connections")


@hazard("handshake followed by junk at every byte")
@pytest.mark.parametrize("junk", [b"\0" * 300, b"\xff" * 300, b"IHAVEOPT" * 40],
                         ids=["zeros", "ones", "magic"])
@sessions
def test_junk_at_every_byte(target, session, junk):
    for length in range(len(session) + 1):
        with Client(target.address) as c:
            try:
                c.send(session[:length] + junk)
                c.shutdown_write()
            except (Closed, OSError):
                pass
            c.recv_until_closed()
    target.is_served()


@hazard("handshake followed by junk")
def test_random_options_get_one_final_reply_each(target):
    """Random numbers, lengths and data; the connection stays in step."""
    dice = random.Random(1)
    for _ in range(20):
        with target.hello() as c:
            for _ in range(20):
                number = dice.choice([*range(3, 6), *range(8, 14), dice.getrandbits(32)])
                c.option(number, dice.randbytes(dice.choice([0, 1, 4, 8, 20, 300])))
                while not c.option_reply(number).is_final:
                    pass
            assert c.list() == [""]


@hazard("handshake followed by junk")
def test_random_bytes_end_only_their_own_connection(target):
    dice = random.Random(2)
    with target.client() as witness:
        for i in range(100):
            with (target.hello() if i % 2 else target.client()) as c:
                try:
                    c.send(dice.randbytes(dice.randrange(1, 2000)))
                    c.shutdown_write()
                except (Closed, OSError):
                    pass
                c.recv_until_closed()
            in_step(witness)


@hazard("handshake cut off or followed by junk: oldstyle")
@pytest.mark.parametrize("end", ["close", "reset"])
def test_oldstyle_session_cut_off_at_every_byte(server, image, end):
    s = server(image, "--oldstyle")
    session = request_header(NBD_CMD_READ, 0, 512) + request_header(NBD_CMD_WRITE, 0, 9)
    for length in range(len(session) + 1):
        c = s.client(oldstyle=True)
        c.send(session[:length])
        getattr(c, end)()
    with s.client(oldstyle=True) as c:
        in_step(c)


class Laggard:
    """A connection that never finishes its handshake."""

    def __init__(self, server, start, drip=b""):
        self.born = time.monotonic()
        self.client = server.raw()
        self.client.send(start)
        self.drip, self.closed_after = drip, None

    def tick(self):
        """Reads what there is, and sends one more piece."""
        if self.closed_after is not None:
            return
        try:
            self.client.sock.setblocking(False)
            while self.client.sock.recv(65536):
                pass
            self.closed_after = time.monotonic() - self.born
        except BlockingIOError:
            self._send()
        except ConnectionError:
            self.closed_after = time.monotonic() - self.born

    def _send(self):
        try:
            self.client.sock.send(self.drip)
        except ConnectionError:
            self.closed_after = time.monotonic() - self.born


def unfinished_handshakes(directory, stack):
    s = Server(arguments_of(make_disk(directory / "disk.img", content=pattern(0, SIZE)), []),
               directory, 0, {})
    stack.callback(s.kill)
    s.wait_ready()
    done = [s.client(structured=i % 2) for i in range(2)]
    flags = struct.pack(">I", FIXED)
    late = [Laggard(s, b""), Laggard(s, flags), Laggard(s, flags[:2]),
            Laggard(s, flags + option(NBD_OPT_LIST)[:11]),
            Laggard(s, flags + option_header(1000, 1 << 20), drip=b"x"),
            Laggard(s, flags, drip=option(NBD_OPT_LIST)),
            Laggard(s, flags + option_header(NBD_OPT_GO, 6) + b"\0\0\0")]
    aborted = Laggard(s, flags + option(NBD_OPT_ABORT))
    until(lambda: [one.tick() for one in [*late, aborted]] and all(
        one.closed_after for one in [*late, aborted]), seconds=10 + DEADLINE, pause=0.1,
        what="closing of the unfinished handshakes")
    assert all(9.9 < one.closed_after < 10 + DEADLINE / 2 for one in late), [
        one.closed_after for one in late]
    for c in done:
        in_step(c)
        c.close()
    s.stop()


@hazard("idle connections that never finish the handshake")
@pytest.mark.meanwhile(work=unfinished_handshakes)
def test_handshake_has_a_deadline_of_10_seconds(meanwhile):
    """However the time is spent; and it does not concern those who finished."""
    meanwhile()


@hazard("idle connections that never finish the handshake: a cap")
def test_connections_have_a_cap(target):
    """Those above it are closed unserved and logged; stopping closes all."""
    raise_descriptor_limit(4400)
    with target.client() as served:
        done = [target.client() for _ in range(3800)]       # they have no deadline any more
        idle = [target.raw() for _ in range(4095 - len(done))]
        idle[-1].greeting()
        target.raw().expect_closed()
        in_step(served)
        until(lambda: "connections" in target.log(), what="a line in the log")
        idle.pop().close()
        until(lambda: greeted(target), what="room for one more")
        target.stop()


def greeted(server):
    try:
        server.raw().greeting()
        return True
    except Closed:
        return False


@hazard("idle connections: their memory")
def test_2000_idle_connections_cost_little(target):
    raise_descriptor_limit(2300)
    before = target.rss()
    idle = [target.client(structured=i % 2) for i in range(2000)]
    assert target.rss() - before < MEMORY
    target.is_served()
    for c in idle[::100]:
        in_step(c)
    target.settle()
    before = target.cpu()
    time.sleep(0.5)                 # a measurement
    assert target.cpu() - before < 0.2, "idle connections keep the server busy"
    target.stop()


@hazard("accept() out of descriptors")
def test_running_out_of_descriptors_pauses_and_does_not_spin(server, image):
    s = server(image)
    with s.client() as served:
        resource.prlimit(s.proc.pid, resource.RLIMIT_NOFILE, (24, 24))
        crowd = [s.raw() for _ in range(64)]
        s.settle()
        before = s.cpu()
        time.sleep(0.5)             # a measurement
        assert s.cpu() - before < 0.25
        in_step(served)
        for c in crowd:
            c.close()
        s.is_served()


# Option lengths

@hazard("option length 0xffffffff")
@pytest.mark.parametrize("length", [(1 << 32) - 1, 1 << 31, PAYLOAD_MAX + 1])
@pytest.mark.parametrize("number", [*range(1, 13), 0xffffffff])
def test_oversize_option_is_refused_at_once(target, number, length):
    """Before its data, and nothing is allocated for it."""
    with target.hello() as c:
        c.option(number, length=length)
        c.expect_closed()


@hazard("option length: nothing allocated")
def test_announced_option_data_costs_no_memory(target):
    before = target.rss()
    for i in range(50):
        target.hello().option([1000, *range(3, 12)][i % 10], b"x", length=PAYLOAD_MAX)
    target.settle()
    target.is_served()
    assert target.status("VmHWM") * 1024 - before < MEMORY


@hazard("name length 0xffffffff or larger than its option")
@pytest.mark.parametrize("length", [(1 << 32) - 1, (1 << 32) - 4, (1 << 32) - 6, 1 << 31,
                                    4097, 65536, 5, 4])
@pytest.mark.parametrize("number", [NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_LIST_META_CONTEXT,
                                    NBD_OPT_SET_META_CONTEXT])
def test_name_larger_than_its_option(target, number, length):
    with target.hello() as c:
        c.structured_reply()
        data = struct.pack(">I", length) + b"abc" + b"\0\0"
        assert c.refused(number, data) == NBD_REP_ERR_INVALID
        assert c.list() == [""]


NAME_SIZES = [0, 1, 255, 256, 257, 3000, 4095, 4096, 4097]
name_sizes = pytest.mark.parametrize("length", NAME_SIZES)


@hazard("names of 0 to 4097 bytes")
@name_sizes
def test_information_about_names_of_many_sizes(target, length):
    name = ("name" * 1025)[:length]
    with target.hello() as c:
        if length > STRING_MAX:
            assert c.refused(NBD_OPT_INFO, info_data(name, [1, 2, 3])) == NBD_REP_ERR_TOO_BIG
        else:
            assert c.info(name, [1, 2, 3]).size == SIZE
        assert c.list() == [""]


@hazard("names of 0 to 4097 bytes")
@name_sizes
def test_contexts_of_names_of_many_sizes(target, length):
    name = ("name" * 1025)[:length]
    with target.hello() as c:
        c.structured_reply()
        if length > STRING_MAX:
            assert c.refused(NBD_OPT_SET_META_CONTEXT,
                             meta_data(name, [ALLOCATION])) == NBD_REP_ERR_TOO_BIG
        else:
            c.set_meta_context(name)
            c.go(name)
            assert c.block_status(SIZE)[ALLOCATION]
            in_step(c)


@hazard("names of 0 to 4097 bytes")
@name_sizes
def test_export_names_of_many_sizes(target, length):
    with target.hello() as c:
        c.option(NBD_OPT_EXPORT_NAME, ("name" * 1025)[:length].encode())
        if length > STRING_MAX:
            c.expect_closed()
        else:
            c.size, c.flags = c.unpack(">QH")
            in_step(c)


# Order of options

@hazard("GO twice")
def test_second_go_is_no_request(target):
    with target.hello() as c:
        c.go()
        c.option(NBD_OPT_GO, info_data("at least a request"))
        c.expect_closed()
    target.is_served()


@hazard("GO twice, in one packet")
def test_second_go_in_one_packet_is_no_request(target):
    with target.hello() as c:
        c.send(option(NBD_OPT_GO, info_data("at least a request")) * 2)
        c.recv_until_closed()           # the first one's reply may be lost
    target.is_served()


@hazard("INFO after INFO")
def test_info_after_info_for_other_names(target):
    with target.hello() as c:
        for i in range(300):
            assert c.info("n" * i, [i % 5]).size == SIZE
        c.go("other")
        in_step(c)


@hazard("options after ABORT")
@pytest.mark.parametrize("number", [NBD_OPT_ABORT, NBD_OPT_LIST, NBD_OPT_GO,
                                    NBD_OPT_EXPORT_NAME, 1000])
def test_options_after_abort_are_not_served(target, number):
    """One packet, so that the later option arrives whatever ABORT does."""
    with target.hello() as c:
        c.send(option(NBD_OPT_ABORT) + option(number, info_data()))
        assert c.option_replies(NBD_OPT_ABORT) == []
        c.expect_closed()
    target.is_served()


@hazard("transmission bytes among options")
def test_request_among_options_closes(target):
    with target.hello() as c:
        c.list()
        c.send(request_header(NBD_CMD_READ, 0, 512))
        c.recv_until_closed()
    with target.hello() as c:       # but for its magic number, it looks like one
        c.send(request_header(NBD_CMD_READ, 0, 512, cookie=NBD_OPT_INFO << 32))
        c.expect_closed()
    target.is_served()


@hazard("transmission bytes among options: behind the last one they are welcome")
@all_replies
def test_whole_session_in_one_packet(target, structured):
    number = NBD_OPT_EXTENDED_HEADERS if structured == EXTENDED else NBD_OPT_STRUCTURED_REPLY
    first = option(number) if structured else b""
    with target.raw() as c:
        c.greeting()
        c.structured, c.extended = bool(structured), structured == EXTENDED
        for i in range(64):
            c.expect(i, Request(NBD_CMD_READ, i * 1000, 1000, 0))
        c.send(struct.pack(">I", FIXED) + first + option(NBD_OPT_GO, info_data())
               + b"".join(c.header(NBD_CMD_READ, i * 1000, 1000, cookie=i)
                          for i in range(64)) + c.header(NBD_CMD_DISC))
        if structured:
            c.option_replies(number)
        c.option_replies(NBD_OPT_GO)
        for i, reply in c.collect_all().items():
            assert reply.data == pattern(i * 1000, 1000)
        c.expect_closed()


# Sizes of reads and writes

def sizes_around_buffers():
    for power in range(9, 22):
        for delta in (-28, -16, -1, 0, 1, 16, 28):
            yield (1 << power) + delta


@hazard("READ of exactly a buffer's size, and a little less or more")
@all_replies
def test_reads_around_the_sizes_of_buffers(target, structured):
    with target.client(structured=structured) as c:
        for length in sizes_around_buffers():
            for offset in (0, 7, SIZE - length):
                assert c.pread(length, offset) == pattern(offset, length), (offset, length)


@hazard("READ of exactly a buffer's size: WRITE likewise")
def test_writes_around_the_sizes_of_buffers(server, disk):
    with server(disk(SIZE)).client() as c:
        for seed, length in enumerate(sizes_around_buffers(), 1):
            data = pattern(0, length, seed)
            c.pwrite(data, 9)
            assert c.pread(length, 9) == data, length


@hazard("offset + length wraps; lengths near 2^32")
@pytest.mark.parametrize("offset, length", [
    (U64 - 1, 1), (U64 - 4096, 4096), (U64 - 4096, 8192), (U64 - 1, (1 << 32) - 1),
    (0, (1 << 32) - 1), (0, (1 << 32) - 512), (SIZE - 1, (1 << 32) - 1), (SIZE, (1 << 32) - 1),
    (1 << 63, (1 << 32) - 1), ((1 << 63) - 4096, 4096), ((1 << 63) - 1, 2), (1 << 32, 1)])
def test_ranges_that_wrap_change_nothing(target, offset, length):
    with target.client(contexts=[ALLOCATION]) as c:
        for command in (NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES,
                        NBD_CMD_BLOCK_STATUS):
            for flags in (0, NBD_CMD_FLAG_FUA):
                assert c.error_of(command, offset, length, flags) in (
                    NBD_EINVAL, NBD_ENOSPC, NBD_EOVERFLOW)
        if length <= 8192:
            assert c.error_of(NBD_CMD_WRITE, offset, payload=b"x" * length) == NBD_ENOSPC
        unchanged(c)


@hazard("length 0 at offset 0: takes the whole disk")
def test_length_0_touches_nothing(target):
    with target.client(contexts=[ALLOCATION]) as c:
        for command in (NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_CACHE,
                        NBD_CMD_WRITE_ZEROES):
            assert c.error_of(command, 0, 0) == 0
        unchanged(c)


@hazard("refused WRITE whose payload is not drained")
def test_refused_payload_that_arrives_slowly_is_drained(target):
    """Meanwhile others are served."""
    payload = request_header(NBD_CMD_WRITE_ZEROES, 0, SIZE) * 4000
    with target.client() as c:
        cookie = c.request(NBD_CMD_WRITE, SIZE, len(payload), payload=payload[:100])
        target.is_served()
        c.send(payload[100:50000])
        target.is_served()
        c.send(payload[50000:] + b"".join(
            request_header(NBD_CMD_READ, i, 100, cookie=i) for i in range(10)))
        for i in range(10):
            c.expect(i, Request(NBD_CMD_READ, i, 100, 0))
        assert c.collect(cookie).error == NBD_ENOSPC
        for i, reply in c.collect_all().items():
            assert reply.data == pattern(i, 100)
        unchanged(c)


@hazard("WRITE_ZEROES or TRIM of more than 64 MiB clears only the first part")
@pytest.mark.parametrize("command, flags", [
    (NBD_CMD_WRITE_ZEROES, 0), (NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE), (NBD_CMD_TRIM, 0)])
def test_long_zeroing_clears_all_of_its_range(server, disk, tmp_path, command, flags):
    if command == NBD_CMD_TRIM:
        need_punch(tmp_path)
    size, start, length = 160 * MIB, 4 * MIB, 150 * MIB
    with server(disk(size)).client() as c:
        for at in range(0, size, MIB):
            c.pwrite(pattern(at, 8192), at)
            c.pwrite(pattern(at + MIB - 4096, 4096), at + MIB - 4096)
        assert c.error_of(command, start, length, flags) == 0
        for at in range(0, size, MIB):
            cleared = start <= at < start + length
            assert c.pread(8192, at) == (bytes(8192) if cleared else pattern(at, 8192))
            last = at + MIB - 4096
            assert c.pread(4096, last) == (bytes(4096) if cleared else pattern(last, 4096))


@hazard("READ longer than IOV_MAX pieces")
@all_replies
def test_read_of_thousands_of_extents(server, disk, structured):
    """Data and holes take turns, 4 KiB each: 4096 pieces in 16 MiB."""
    image = disk(16 * MIB)
    with open(image, "r+b") as f:
        for at in range(0, 16 * MIB, 8192):
            f.seek(at)
            f.write(pattern(at, 4096))
    expected = b"".join(pattern(at, 4096) + bytes(4096) for at in range(0, 16 * MIB, 8192))
    with server(image).client(structured=structured) as c:
        assert c.pread(16 * MIB) == expected
        assert c.pread(16 * MIB - 2, 1) == expected[1:-1]


@hazard("READ longer than IOV_MAX pieces: as many replies at once")
@all_replies
def test_burst_of_thousands_of_requests(target, structured):
    """One send, so that the server may want to answer all at once."""
    count = 5000
    with target.client(structured=structured) as c:
        for i in range(count):
            c.expect(i, Request(NBD_CMD_READ, i, 1 + i % 5, 0))
        c.send(b"".join(c.header(NBD_CMD_READ, i, 1 + i % 5, cookie=i)
                        for i in range(count)))
        for i, reply in c.collect_all().items():
            assert reply.data == pattern(i, 1 + i % 5)


@hazard("READ longer than IOV_MAX pieces: as many large replies at once")
@all_replies
def test_burst_of_large_reads(target, structured):
    """Each is in a piece of memory of its own, besides its header."""
    length, count = 64 * 1024, 600
    with target.client(structured=structured) as c:
        c.pread(SIZE)               # all of it is in memory
        for i in range(count):
            c.expect(i, Request(NBD_CMD_READ, i, length, 0))
        c.send(b"".join(c.header(NBD_CMD_READ, i, length, cookie=i) for i in range(count)))
        for i, reply in c.collect_all().items():
            assert reply.data == pattern(i, length)


@hazard("payload of 32 MiB, of 33 MiB")
def test_payloads_at_the_maximum(server, disk):
    with server(disk(34 * MIB)).client() as c:
        data = pattern(0, PAYLOAD_MAX)
        c.pwrite(data, 1)
        assert c.error_of(NBD_CMD_WRITE, 0, payload=bytes(33 * MIB)) == NBD_EINVAL
        assert c.error_of(NBD_CMD_READ, 0, 65 * MIB) == NBD_EOVERFLOW
        assert c.pread(PAYLOAD_MAX, 1) == data


# Commands

@hazard("FLUSH as the first command")
@all_replies
def test_flush_as_the_first_command(target, structured):
    with target.client(structured=structured) as c:
        c.flush()
        in_step(c)


@hazard("command types 0 to 65535")
def test_every_command_type_is_answered(target):
    """Those that do not exist; one reply each, in step."""
    with target.client(structured=True) as c:
        for start in range(0, 65536, 1024):
            cookies = [c.request(command, 0, 512) for command in range(start, start + 1024)
                       if command not in COMMANDS]
            cookies.append(c.request(NBD_CMD_RESIZE, 0, 512))
            assert all(c.collect(cookie).error == NBD_EINVAL for cookie in cookies)
        unchanged(c)


@hazard("flags on every command")
def test_random_requests_get_one_reply_each(target):
    """Any flags, offsets and lengths; WRITE with the payload it announces."""
    dice = random.Random(3)
    with target.client(contexts=[ALLOCATION]) as c:
        for _ in range(3000):
            command = dice.choice([*COMMANDS, dice.getrandbits(16)])
            if command == NBD_CMD_DISC:
                continue
            offset = dice.choice([0, 1, 4096, SIZE - 1, SIZE, 1 << 63, dice.getrandbits(64)])
            length = dice.choice([0, 1, 511, 4096, 65537, dice.getrandbits(32)])
            flags = dice.choice([0, 0, 1, 2, 4, 8, 16, dice.getrandbits(16)])
            payload = b""
            if command == NBD_CMD_WRITE:
                length %= 70000
                payload = bytes(length)
            c.request(command, offset, length, flags, payload)
            if len(c.pending) > 8:
                c.collect()
        c.collect_all()
    target.is_served()


# Clients that do not do their part

def send_until_blocked(c, data, quiet=0.3):
    """Sends as much as the server takes; returns how much that was."""
    c.sock.setblocking(False)
    sent = 0
    while sent < len(data) and select.select([], [c.sock], [], quiet)[1]:
        sent += c.sock.send(data[sent:sent + 65536])
    c.sock.settimeout(DEADLINE)
    return sent


UNREAD = {
    "READ of 1 MiB": (20000, NBD_CMD_READ, 0, MIB),
    "READ of 32 MiB": (2000, NBD_CMD_READ, 0, PAYLOAD_MAX),
    "READ of 4 KiB": (100000, NBD_CMD_READ, 0, 4096),
    "BLOCK_STATUS": (50000, NBD_CMD_BLOCK_STATUS, 0, PAYLOAD_MAX),
    "CACHE": (100000, NBD_CMD_CACHE, 0, 512),
    "WRITE of 1 byte": (100000, NBD_CMD_WRITE, 0, 1),
    "refused WRITE": (100000, NBD_CMD_WRITE, U64 - 1, 64),
    "unknown": (100000, 1000, 0, 512),
}


def many(c, count, command, offset, length):
    """So many requests of one kind, as a client sends them."""
    payload = b"x" * length if command == NBD_CMD_WRITE else b""
    return (c.header(command, offset, length) + payload) * count


@pytest.fixture
def checked(disk):
    """An image of data and holes, so that every reply is long."""
    image = disk(PAYLOAD_MAX)
    with open(image, "r+b") as f:
        for at in range(0, PAYLOAD_MAX, 32768):
            f.seek(at)
            f.write(pattern(at, 16384))
    return image


@hazard("client that does not read its replies")
@pytest.mark.parametrize("requests", UNREAD.values(), ids=UNREAD.keys())
@all_replies
def test_unread_replies_cost_bounded_memory(server, checked, requests, structured):
    s = server(checked)
    with s.client(rcvbuf=4096, structured=structured,
                  contexts=[ALLOCATION] if structured else []) as deaf:
        s.is_served()
        before = s.rss()
        send_until_blocked(deaf, many(deaf, *requests))
        s.settle()
        s.is_served()
        assert s.status("VmHWM") * 1024 - before < MEMORY + PAYLOAD_MAX


@hazard("client that does not read its replies: ten of them, others unaffected")
def test_ten_deaf_clients_do_not_disturb_others(server, checked):
    s = server(checked)
    with s.client() as witness:
        before, open_before = s.rss(), s.sockets()
        deaf = [s.client(rcvbuf=4096) for _ in range(10)]
        for c in deaf:
            send_until_blocked(c, many(c, *UNREAD["READ of 1 MiB"]))
        s.settle()
        for at in range(0, PAYLOAD_MAX, 32768):
            assert witness.pread(16384, at) == pattern(at, 16384)
        assert s.rss() - before < 10 * (MEMORY if SANITIZED else 24 * MIB)
        for i, c in enumerate(deaf):
            c.reset() if i % 2 else c.close()
        until(lambda: s.sockets() <= open_before, what="return of the descriptors")


@hazard("client that does not read its replies: it may begin to")
@pytest.mark.parametrize("length", [20000, 100000], ids=["copied", "sent from the page cache"])
def test_replies_are_complete_when_they_are_read_late(target, length):
    with target.client(rcvbuf=4096) as c:
        for i in range(200):
            c.request(NBD_CMD_READ, i * 1000, length)
        target.settle()
        for reply in c.collect_all().values():
            assert reply.data == pattern(reply.request.offset, length)


@hazard("large reads leave the image resident: memory bounded")
def test_pass_over_the_image_does_not_stay_resident(server, disk):
    s = server(disk(256 * MIB, sparse=False))
    with s.client() as c:
        before = s.rss()
        for at in range(0, c.size, 4 * MIB):
            c.pread(4 * MIB, at)
        assert s.rss() - before < MEMORY + 64 * MIB


@hazard("one byte at a time")
def test_session_one_byte_at_a_time(target):
    with target.raw() as c:
        c.greeting()
        for i in range(len(SESSION)):
            c.send(SESSION[i:i + 1])
            if i % 50 == 0:
                target.is_served()
        c.option_replies(NBD_OPT_STRUCTURED_REPLY)
        c.option_replies(NBD_OPT_LIST)
        c.contexts = {reply.context[0]: reply.context[1]
                      for reply in c.option_replies(NBD_OPT_SET_META_CONTEXT)}
        c.option_replies(NBD_OPT_INFO)
        with pytest.raises(OptionError):
            c.option_replies(1000)
        c.option_replies(NBD_OPT_GO)
        c.structured, c.size = True, SIZE
        for command, offset, length in ((NBD_CMD_READ, 0, 512), (NBD_CMD_WRITE, SIZE - 8, 8),
                                        (NBD_CMD_BLOCK_STATUS, 0, 512)):
            c.pending.clear()
            c.expect(0, Request(command, offset, length, 0))
            assert c.collect(0).error == 0
        assert c.pread(8, SIZE - 8) == b"payload."


@hazard("closes with 64 reads in flight")
@pytest.mark.parametrize("length", [512, 65536, MIB])
@pytest.mark.parametrize("end", ["close", "reset", "shutdown_write"])
@all_replies
def test_closing_with_reads_in_flight(target, end, length, structured):
    before = target.sockets()
    for _ in range(10):
        c = target.client(structured=structured)
        c.send(c.header(NBD_CMD_READ, 0, length) * 64)
        getattr(c, end)()
        c.close()
    target.is_served()
    until(lambda: target.sockets() <= before, what="return of the descriptors")


@hazard("client dies within a payload")
@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("sent", [0, 1, 4095, 100000, MIB - 1])
def test_death_within_a_payload_touches_nothing_else(target, sent, end):
    """What was sent may be on the disk; what was not must be as it was."""
    c = target.client()
    c.request(NBD_CMD_WRITE, MIB, MIB, payload=b"x" * sent)
    getattr(c, end)()
    target.is_served()
    with target.client() as c:
        assert c.pread(MIB) == pattern(0, MIB)
        data = c.pread(SIZE - MIB, MIB)
        whole = pattern(MIB, SIZE - MIB)
        assert data[sent:] == whole[sent:]
        assert all(byte in (120, old) for byte, old in zip(data[:sent], whole[:sent]))


# Several connections at once

@hazard("two connections read at once through a shared file offset")
def test_connections_that_read_at_once_get_their_own_bytes(target):
    """They send all before the first reply is taken."""
    clients = [target.client(structured=i % 2) for i in range(4)]
    dice, bursts = random.Random(4), []
    for c in clients:
        reads = [(dice.randrange(SIZE - 10000), dice.choice([1, 512, 4096, 10000]))
                 for _ in range(1500)]
        for i, (offset, length) in enumerate(reads):
            c.expect(i, Request(NBD_CMD_READ, offset, length, 0))
        bursts.append(b"".join(request_header(NBD_CMD_READ, *read, cookie=i)
                               for i, read in enumerate(reads)))
    for c, burst in zip(clients, bursts):
        c.send(burst)
    for c in clients:
        for reply in c.collect_all().values():
            request = reply.request
            assert reply.data == pattern(request.offset, request.length)


def descriptor_of(server, path):
    """What the system tells about the server's descriptor of a file."""
    proc = f"/proc/{server.proc.pid}"
    for fd in os.listdir(f"{proc}/fd"):
        with contextlib.suppress(FileNotFoundError):        # closed meanwhile
            if os.readlink(f"{proc}/fd/{fd}") == str(path):
                return f"{proc}/fdinfo/{fd}"
    raise AssertionError(f"{path} is not open")


@hazard("two connections read at once through a shared file offset: there is none")
def test_reads_do_not_move_the_file_offset(target, image):
    with target.client() as c, open(descriptor_of(target, image)) as info:
        before = info.readline()
        for at in range(0, SIZE - 4096, SIZE // 50):
            assert c.pread(4096, at) == pattern(at, 4096)
            c.pwrite(pattern(at, 4096), at)
        info.seek(0)
        assert before.startswith("pos:") and info.readline() == before


@hazard("early READ error sent as a simple reply though structured replies were negotiated")
def test_early_read_errors_are_chunks(target):
    """Among good ones, so that they take the fast path; nbd.py checks."""
    bad = [(SIZE, 512, 0, NBD_EINVAL), (0, 512, 1 << 9, NBD_EINVAL), (U64 - 1, 512, 0, NBD_EINVAL),
           (0, READ_MAX + 1, 0, NBD_EOVERFLOW), (0, 512, NBD_CMD_FLAG_REQ_ONE, NBD_EINVAL)]
    with target.client(structured=True) as c:
        wanted = {}
        for _ in range(20):
            for offset, length, flags, error in bad:
                wanted[c.request(NBD_CMD_READ, offset, length, flags)] = error
                wanted[c.request(NBD_CMD_READ, 0, 512)] = 0
        replies = c.collect_all()
        assert {cookie: reply.error for cookie, reply in replies.items()} == wanted
        assert all(reply.structured for reply in replies.values())


# Signals

class Storm(threading.Thread):
    """Sends signals until it is stopped."""

    def __init__(self, proc, numbers):
        super().__init__(daemon=True)
        self.proc, self.numbers, self.calm = proc, numbers, threading.Event()

    def run(self):
        while not self.calm.is_set():
            for number in self.numbers:
                self.proc.send_signal(number)
            self.calm.wait(0.0005)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception):
        self.calm.set()
        self.join()


@hazard("signal storm during load")
def test_signal_storm_during_load(server, image, tmp_path):
    s = server(image, "--logpath", tmp_path / "storm.log")
    numbers = [signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD, signal.SIGCONT]
    with Storm(s.proc, numbers), s.client(structured=True) as c:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            for i in range(32):
                c.request(NBD_CMD_READ, i * 5000, 100000)
            c.request(NBD_CMD_FLUSH)
            c.request(NBD_CMD_WRITE, 12345, payload=pattern(12345, 50000))
            for reply in c.collect_all().values():
                assert reply.error == 0
                if reply.request.command == NBD_CMD_READ:
                    assert reply.data == pattern(reply.request.offset, 100000)
        s.is_served()


def deaf(server):
    c = server.client(rcvbuf=4096)
    send_until_blocked(c, many(c, *UNREAD["READ of 1 MiB"]))


def half_a_payload(server):
    server.client().request(NBD_CMD_WRITE, 0, PAYLOAD_MAX, payload=b"x" * 100000)


def half_a_request(server):
    server.client().send(request_header(NBD_CMD_READ, 0, 512)[:13])


def half_a_handshake(server):
    server.hello().send(option(NBD_OPT_LIST)[:9])


def half_an_option(server):
    server.hello().option(NBD_OPT_GO, b"x", length=60000)


def idle(server):
    server.client()


@hazard("SIGTERM with a client that does not read; idle connections: stopping closes them")
@pytest.mark.parametrize("obstacle, number", [
    (deaf, signal.SIGTERM), (half_a_payload, signal.SIGTERM), (half_a_request, signal.SIGTERM),
    (half_a_handshake, signal.SIGTERM), (half_an_option, signal.SIGINT), (idle, signal.SIGINT)])
def test_ends_in_time_whatever_clients_do(server, image, obstacle, number):
    s = server(image)
    obstacle(s)
    s.client()
    s.terminate(number)
    s.wait()


# Files

@hazard("fixed names under /tmp")
def test_creates_no_files_of_its_own(server, image, tmp_path):
    home, temporary = tmp_path / "cwd", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    s = server(image, cwd=home, env={**os.environ, "TMPDIR": str(temporary)})
    s.is_served()
    files = set()
    for fd in Path(f"/proc/{s.proc.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):    # closed meanwhile
            files.add(os.readlink(fd))
    own = {f for f in files if f.startswith("/") and not f.startswith(("/dev/", "/memfd"))}
    assert own == {str(image), str(s.stderr)}
    s.stop()
    assert not os.listdir(home) and not os.listdir(temporary)


@hazard("followed symlinks")
def test_created_image_follows_no_symlink(run_server, tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link.img"
    link.symlink_to(victim)
    done = run_server("--target", "--unix", tmp_path / "sock", "--create", "1M", link)
    assert done.returncode == 1 and "link.img" in done.stderr
    assert not victim.exists()


@hazard("fixed names, files of mode other than 0600")
def test_created_image_is_private(server, tmp_path):
    image = tmp_path / "new.img"
    with server(image, "--create", "1M", umask=0).client() as c:
        assert c.size == MIB
        assert stat.S_IMODE(image.stat().st_mode) == 0o600


@hazard("followed symlinks: the log and the pid file")
def test_files_created_are_not_for_others_to_write(server, image, tmp_path):
    log, pidfile = tmp_path / "a.log", tmp_path / "a.pid"
    server(image, "--logpath", log, "--pidfile", pidfile, umask=0)
    for path in (log, pidfile):
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0, path


# The image goes bad

@hazard("image truncated under a running server")
@all_replies
@pytest.mark.parametrize("command", [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_TRIM,
                                     NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS],
                         ids=COMMANDS.get)
def test_truncated_image_costs_one_connection_at_most(server, image, command, structured):
    s = server(image)
    with s.client(structured=structured, contexts=[ALLOCATION] if structured else []) as c:
        c.pread(MIB, MIB)               # whatever the server keeps of that range
        os.truncate(image, 512)
        for offset, length in ((0, 512), (100, 4096), (MIB, 4096), (MIB, MIB)):
            if command == NBD_CMD_FLUSH:
                offset = length = 0
            payload = b"x" * length if command == NBD_CMD_WRITE else b""
            try:
                reply = c.call(command, offset, length, payload=payload)
            except Closed:
                break
            assert reply.error in (0, NBD_EIO, NBD_EINVAL), reply
            assert command != NBD_CMD_READ or length == 512 or reply.error == NBD_EIO
    assert s.proc.poll() is None
    with s.client() as c:
        assert c.pread(1) in (pattern(0, 1), b"x", b"\0")


@hazard("image truncated while it is read")
@all_replies
def test_image_truncated_while_reads_are_in_flight(server, disk, structured):
    """Data that is there, EIO, or a close; never the death of the server."""
    image = disk(content=pattern(0, SIZE))
    s = server(image)
    for size in (SIZE - MIB, 4096, 0):
        make_whole(image)
        c = s.client(structured=structured)
        for i in range(64):
            c.request(NBD_CMD_READ, i * 49000, MIB)
        os.truncate(image, size)
        try:
            for reply in c.collect_all().values():
                assert reply.error in (0, NBD_EIO)
        except Closed:
            pass
        c.close()
    make_whole(image)
    with s.client() as c:
        unchanged(c)


def make_whole(image):
    with open(image, "r+b") as f:
        f.write(pattern(0, SIZE))


@hazard("an I/O error under a running server")
@all_replies
def test_write_that_the_system_refuses_is_enospc(server, disk, structured):
    """A file size limit: EFBIG, and a signal that by default kills."""
    limit = MIB
    s = server(disk(SIZE, pattern(0, limit // 2)), preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit)))
    with s.client(structured=structured) as c:
        assert c.error_of(NBD_CMD_WRITE, 2 * limit, payload=b"x" * 4096) == NBD_ENOSPC
        assert c.error_of(NBD_CMD_WRITE, limit - 512, payload=b"x" * 4096) == NBD_ENOSPC
        c.pwrite(b"x" * 4096, limit - 4096)
        assert c.pread(4096, limit - 4096) == b"x" * 4096
        in_step(c)


@hazard("client that does not read its replies")
@pytest.mark.parametrize("first", [4 * MIB, 32 * MIB])
def test_request_behind_a_large_reply_needs_no_further_input(server, disk, first):
    """The large one takes all the buffers that a connection may have, and
    gives them back when it is sent: then the next must be looked at."""
    s = server(disk(size=64 * MIB))
    with s.client(structured=True) as c:
        c.send(request_header(NBD_CMD_READ, 0, first, cookie=1)
               + request_header(NBD_CMD_READ, first, 512, cookie=2))
        c.expect(1, Request(NBD_CMD_READ, 0, first, 0))
        c.expect(2, Request(NBD_CMD_READ, first, 512, 0))
        assert c.collect(2).data == bytes(512)
        assert c.collect(1).data == bytes(first)


# At one moment, which is held: faults.c holds up a call

@pytest.fixture
def calls(library, tmp_path):
    """A server with env=calls.environment makes its calls through faults.c."""
    return Calls(tmp_path / "calls", library)


def hold(calls, call, number=1):
    calls.arm(call, HOLD, number)


def wait_held(calls):
    until(lambda: calls.injected == 1, what="a call that is held up")


def request_and_turn(calls, c, *request, **keywords):
    """Sends a request, and gives the server's thread a turn.  If it did not sleep before,
    that may come too early: then who is at fault may get away, but nobody else is blamed."""
    before = calls.count("poll")
    cookie = c.request(*request, **keywords)
    until(lambda: calls.count("poll") > before, what="the end of a turn")
    return cookie


def snapshot_of(server):
    """Waits for it; returns its bytes."""
    until(lambda: re.search("snapshot .*: (complete|failed)", server.log()), what="a snapshot")
    path = re.search(r"snapshot (\S+): complete", server.log())[1]
    with open(path, "rb") as f:
        return f.read()


@hazard("a snapshot is not of one instant")
def test_write_under_way_is_in_the_snapshot_and_a_later_one_is_not(server, image, calls, tmp_path):
    """The instant comes when the first is stored; who comes meanwhile waits for it."""
    s = server(image, "--ctl", tmp_path / "ctl", env=calls.environment)
    with s.client() as c:
        hold(calls, "pwrite")
        first = c.request(NBD_CMD_WRITE, 0, payload=b"1" * 4096)
        wait_held(calls)
        s.proc.send_signal(signal.SIGUSR1)
        until(lambda: "snapshot: running\n" in done(bgctl("--query", tmp_path / "ctl"),
                                                    out=None).stdout, what="its beginning")
        until(s.is_asleep, what="the thread that waits for its instant")
        later = s.client()
        second = request_and_turn(calls, later, NBD_CMD_WRITE, 3 * MIB, payload=b"2" * 4096)
        calls.release()
        assert not c.collect(first).error and not later.collect(second).error
        expected = b"1" * 4096 + pattern(4096, SIZE - 4096)
        assert snapshot_of(s) == expected
        assert c.pread(4096, 3 * MIB) == b"2" * 4096


@hazard("a snapshot is not of one instant: a block of it is copied once")
def test_block_is_copied_into_a_snapshot_once(server, image, calls):
    """A client changes what is copied, and then that and what is not, while the thread
    that copies is between two chunks."""
    need_holes()
    s = server(image, env=calls.environment)
    edge = 512 * KIB                # a hole begins there: it takes 2 calls of lseek() to find that
    expected = pattern(0, edge) + bytes(8192) + pattern(0, SIZE)[edge + 8192:]
    with s.client() as c:
        c.trim(8192, edge)
        hold(calls, "lseek", 3)
        s.proc.send_signal(signal.SIGUSR1)
        until(lambda: calls.injected or "cloned" in s.log(), what="the second chunk")
        c.pwrite(b"1" * 4096, edge - 4096)
        c.pwrite(b"2" * 8192, edge - 4096)
        calls.release()
        assert snapshot_of(s) == expected
        assert c.pread(8192, edge - 4096) == b"2" * 8192


@hazard("a start waits for a disk that is slow")
def test_start_does_not_wait_for_a_slow_disk(server, image, calls):
    """A server looks at what it serves; of a disk that does not answer it tells later."""
    calls.arm("pread", HOLD)
    s = server(image, env=calls.environment)
    wait_held(calls)
    with s.client() as c:
        assert c.size == SIZE
        calls.release()
        assert c.pread(4096) == pattern(0, 4096)


@hazard("a start waits for a disk that is slow")
def test_look_at_a_disk_that_does_not_answer_holds_up_no_end(server, image, calls):
    calls.arm("pread", HOLD)
    s = server(image, env=calls.environment)
    wait_held(calls)
    s.expected_status = 1
    s.stop()
    assert "a thread waits for the disk" in s.log()


@hazard("the search for a hole passes all extents of the rest of the disk")
def test_reads_are_not_searched_for_holes_where_that_takes_long(server, image, calls):
    """Each begins before what is known to be data, and would have to find out anew."""
    need_holes()
    with server(image, env=calls.environment).client() as c:
        evict(image)
        calls.arm("lseek", SLOW, times=EVER)
        before = calls.count("lseek")
        for at in range(4 * MIB, 0, -64 * KIB):
            assert c.pread(16 * KIB, at - 64 * KIB) == pattern(at - 64 * KIB, 16 * KIB)
        assert calls.count("lseek") - before <= 4


@hazard("a snapshot appears before it is complete")
def test_snapshot_has_no_name_before_it_is_durable(server, image, calls):
    s = server(image, env=calls.environment)
    hold(calls, "fsync")
    s.proc.send_signal(signal.SIGUSR1)
    wait_held(calls)
    assert not list(image.parent.glob("*.snapshot.*"))
    calls.release()
    assert snapshot_of(s) == pattern(0, SIZE)


@hazard("an aligned write during another's partial write")
def test_aligned_write_during_another_one_stays(server, image, calls):
    """The first has read the old block, and is about to store it with its own part."""
    s = server(args=["--cow-target", "--laddr", "127.0.0.1", "--lport", "0", image],
               env=calls.environment)
    last = 16 * 4096                # of the first one's blocks: it writes 100 bytes there
    with s.client() as c, s.client() as other:
        hold(calls, "pwrite", 2)    # the first call is for the whole blocks
        first = c.request(NBD_CMD_WRITE, 0, payload=b"1" * (last + 100))
        wait_held(calls)
        second = request_and_turn(calls, other, NBD_CMD_WRITE, last, payload=b"2" * 4096)
        calls.release()
        assert not c.collect(first).error and not other.collect(second).error
        data = c.pread(last + 4096)
        assert data[:last] == b"1" * last
        assert data[last:] in (b"1" * 100 + b"2" * 3996, b"2" * 4096)


@hazard("signal storm during load: the log file is opened again")
def test_nobody_waits_while_the_log_file_is_opened_again(server, image, tmp_path, calls):
    log = tmp_path / "server.log"
    s = server(image, "--logpath", log, env=calls.environment)
    hold(calls, "open")
    s.proc.send_signal(signal.SIGHUP)
    wait_held(calls)
    s.client().disc()
    s.is_served()
    calls.release()
    until(lambda: ": client left\n" in log.read_text(), what="a line of that time")
    assert "reopened" in log.read_text()
