"""Extended headers: NBD_OPT_EXTENDED_HEADERS, requests with lengths of 64 bits.

Headings are those of doc/proto.md in the branch extension-ext-header.  What every reply must
look like (the one kind of header, the offset of its request, extents of 64 bits) is checked by
nbd.py in all tests.  What holds with any replies is in test_protocol.py and test_hazards.py,
which try extended headers as well.
"""

import json
import os
import random
import subprocess
import sys

import pytest

from conftest import need_holes, need_module, need_punch
from nbd import *
from test_clients import PATIENCE, qemu_io, tool
from test_hazards import in_step, unchanged
from test_protocol import FLAGS_OF, WRITABLE, arguments, evict

MIB, GIB = 1 << 20, 1 << 30
SIZE = (256 << 10) + 77
LARGE = 9 * GIB + 4097          # of a sparse disk
ALLOCATION = "base:allocation"
PAYLOAD = NBD_CMD_FLAG_PAYLOAD_LEN
hazard = pytest.mark.hazard
WITHOUT_PAYLOAD = [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE,
                   NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, NBD_CMD_RESIZE, 1000, 65535]
named = {"ids": lambda value: COMMANDS.get(value, str(value))}


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


@pytest.fixture
def c(target):
    return target.client(structured=EXTENDED, contexts=[ALLOCATION])


@pytest.fixture(params=["target", "cow", "proxy"])
def serve(request, server, tmp_path):
    """serve(image): a server of each mode that exports what is in the image; .origin, that of
    a proxy."""
    count = 0

    def start(image):
        nonlocal count
        count += 1
        files = [tmp_path / f"{name}{count}" for name in ("origin", "nbd", "cache", "map", "ctl")]
        where = ["--unix", files[1]]
        origin = None
        if request.param == "target":
            one = server(image, *where)
        elif request.param == "cow":
            one = server(args=["--cow-target", *where, image])
        else:
            origin = server(image, "--unix", files[0], "--readonly")
            one = server(args=["--proxy", *where, f"unix:{files[0]}", *files[2:]])
        one.origin = origin
        return one

    return start


def send(c, command, offset=0, length=0, flags=0, payload=b"", cookie=1):
    """A request exactly as it is told, with whatever is behind it."""
    c.expect(cookie, Request(command, offset, length, flags))
    c.send(extended_header(command, offset, length, flags, cookie) + payload)
    return cookie


def booby_trap(length):
    """A payload that destroys the disk and leaves, if it is read as requests."""
    requests = extended_header(NBD_CMD_WRITE_ZEROES, 0, SIZE) + extended_header(NBD_CMD_DISC)
    return (requests * (length // len(requests) + 1))[:length]


# NBD_OPT_EXTENDED_HEADERS

def test_option_is_acknowledged_and_needs_no_structured_replies(target):
    c = target.hello()
    c.extended_headers()
    c.go()
    assert c.flags == WRITABLE | NBD_FLAG_SEND_DF
    in_step(c)


def test_option_may_follow_structured_replies(target):
    c = target.hello()
    c.structured_reply()
    c.extended_headers()
    c.go()
    in_step(c)


def test_option_twice_is_acknowledged_twice(target):
    """As STRUCTURED_REPLY is: the ACK says that they have been negotiated, and they have."""
    c = target.hello()
    c.extended_headers()
    c.extended_headers()
    c.go()
    in_step(c)


def test_option_with_data_negotiates_nothing(target):
    c = target.hello()
    assert c.refused(NBD_OPT_EXTENDED_HEADERS, b"x") == NBD_REP_ERR_INVALID
    c.go()
    assert not c.flags & NBD_FLAG_SEND_DF
    in_step(c)


def test_there_is_no_way_back_to_structured_replies(target):
    c = target.hello()
    c.extended_headers()
    assert c.refused(NBD_OPT_STRUCTURED_REPLY) == NBD_REP_ERR_EXT_HEADER_REQD
    assert c.refused(NBD_OPT_STRUCTURED_REPLY, b"x") == NBD_REP_ERR_INVALID
    c.go()
    in_step(c)


@pytest.mark.parametrize("name", ["", "disk"])
def test_export_name_afterwards_closes(target, name):
    """"NBD_OPT_EXPORT_NAME" MUST NOT be used then, and has no error replies."""
    c = target.hello()
    c.extended_headers()
    c.option(NBD_OPT_EXPORT_NAME, octets(name))
    c.expect_closed()
    target.is_served()


def test_other_options_work_as_with_structured_replies(target):
    c = target.hello()
    c.extended_headers()
    assert c.list() == [""]
    assert c.refused(NBD_OPT_STARTTLS) == NBD_REP_ERR_UNSUP
    assert c.list_meta_context() == [ALLOCATION]
    c.set_meta_context()
    assert c.info().raw == c.go().raw
    assert c.block_status(SIZE) == {ALLOCATION: [(SIZE, 0)]}


def test_context_chosen_before_is_kept(target):
    c = target.hello()
    c.structured_reply()
    c.set_meta_context()
    c.extended_headers()
    c.go()
    assert c.block_status(SIZE) == {ALLOCATION: [(SIZE, 0)]}


def test_option_needs_fixed_newstyle(target):
    c = target.raw().hello(0)
    c.option(NBD_OPT_EXTENDED_HEADERS)
    c.expect_closed()


# Request message; Extended reply chunk message

@hazard("request with a header of the wrong size")
@pytest.mark.parametrize("padding", [0, 4, 36])
def test_compact_request_closes(target, padding):
    """At once, though it is shorter than what is expected."""
    with target.client(structured=EXTENDED) as c:
        c.send(request_header(NBD_CMD_READ, 0, 512) + bytes(padding))
        c.expect_closed()
    target.is_served()


@hazard("request with a header of the wrong size")
def test_extended_request_closes_where_headers_are_compact(target):
    for structured in (False, True):
        with target.client(structured=structured) as c:
            c.send(extended_header(NBD_CMD_READ, 0, 512))
            c.expect_closed()
    target.is_served()


@hazard("request with a header of the wrong size: thousands of them in step")
def test_requests_of_all_kinds_follow_each_other(c):
    for i in range(300):
        c.request(NBD_CMD_READ, i, 100 + i)
        c.request(NBD_CMD_WRITE, 200000 + i, payload=pattern(200000 + i, 1 + i))
        c.request(NBD_CMD_BLOCK_STATUS, i, 512)
        c.request(NBD_CMD_CACHE, i, 512)
        c.request(NBD_CMD_FLUSH)
    for reply in c.collect_all().values():
        assert not reply.error and reply.chunks
        if reply.request.command == NBD_CMD_READ:
            assert reply.data == pattern(reply.request.offset, reply.request.length)
    unchanged(c)


@pytest.mark.parametrize("command", FLAGS_OF, ids=COMMANDS.get)
def test_success_and_error_are_chunks_for_every_command(c, command):
    """Also where a simple reply would do with structured replies."""
    payload = pattern(8192, 512) if command == NBD_CMD_WRITE else b""
    good = c.call(command, *arguments(command), payload=payload)
    assert not good.error
    if command not in (NBD_CMD_READ, NBD_CMD_BLOCK_STATUS):
        assert good.chunks == [(NBD_REPLY_TYPE_NONE, None, 0)]
    for offset in (SIZE, 1 << 63, U64 - 1):
        bad = c.call(command, offset, 512, payload=payload)
        assert bad.error in (NBD_EINVAL, NBD_ENOSPC)
        assert bad.chunks == [(NBD_REPLY_TYPE_ERROR, None, 0)]
    in_step(c)


@pytest.mark.parametrize("command", FLAGS_OF, ids=COMMANDS.get)
def test_flags_of_each_command(c, command):
    payload = pattern(8192, 512) if command == NBD_CMD_WRITE else b""
    for bit in set(range(16)) - {5}:
        error = c.error_of(command, *arguments(command), 1 << bit, payload)
        known = 1 << bit in FLAGS_OF[command]
        assert error in ({0, NBD_ENOTSUP} if known else {NBD_EINVAL})
    in_step(c)


def test_every_way_of_cutting_requests_into_two_packets(c):
    requests = (extended_header(NBD_CMD_WRITE, 100, 5, PAYLOAD, 1) + pattern(100, 5)
                + extended_header(NBD_CMD_TRIM, 0, 5, PAYLOAD, 2) + b"12345"
                + extended_header(NBD_CMD_READ, 7, 9, 0, 3))
    for cut in range(len(requests) + 1):
        for cookie, request in enumerate([(NBD_CMD_WRITE, 100, 5), (NBD_CMD_TRIM, 0, 5),
                                          (NBD_CMD_READ, 7, 9)], 1):
            c.expect(cookie, Request(*request, 0))
        c.send(requests[:cut])
        c.send(requests[cut:])
        replies = c.collect_all()
        assert [replies[i].error for i in (1, 2, 3)] == [0, NBD_EINVAL, 0]
        assert replies[3].data == pattern(7, 9)


# NBD_CMD_READ

def test_read_of_data_and_holes_comes_in_chunks(server, disk):
    image = disk(4 * MIB, pattern(0, MIB))
    expected = pattern(0, MIB) + bytes(3 * MIB)
    with server(image).client(structured=EXTENDED) as c:
        for offset, length in [(0, 4 * MIB), (1, 2 * MIB), (MIB - 1, 2), (2 * MIB, MIB)]:
            evict(image)
            reply = c.call(NBD_CMD_READ, offset, length)
            assert reply.data == expected[offset:offset + length]
            evict(image)
            whole = c.call(NBD_CMD_READ, offset, length, NBD_CMD_FLAG_DF)
            assert whole.data == reply.data
            assert whole.chunks == [(NBD_REPLY_TYPE_OFFSET_DATA, offset, length)]


def test_holes_are_sent_as_such(server, disk, tmp_path):
    """Where the read goes to a disk: not on a file system in memory."""
    need_holes()
    image = disk(64 * MIB, pattern(0, 4096))
    with server(image).client(structured=EXTENDED) as c:
        kinds = set()
        for at in range(0, 64 * MIB, 16 * MIB):
            evict(image)
            reply = c.call(NBD_CMD_READ, at, 16 * MIB)
            assert reply.data == (pattern(0, 4096) if not at else b"").ljust(16 * MIB, b"\0")
            kinds |= {kind for kind, _, _ in reply.chunks}
        assert kinds <= {NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE}
        if file_system_of(tmp_path) != "tmpfs":
            assert NBD_REPLY_TYPE_OFFSET_HOLE in kinds


def file_system_of(path):
    return subprocess.run(["stat", "-f", "-c", "%T", path], stdout=subprocess.PIPE,
                          text=True).stdout.strip()


@pytest.mark.parametrize("length", [READ_MAX + 1, 1 << 32, (1 << 32) + 512, 1 << 63, U64 - 1])
def test_read_above_the_maximum_overflows(server, disk, length):
    with server(disk(LARGE)).client(structured=EXTENDED) as c:
        for offset in (0, 1, LARGE, U64 - 1):
            assert c.error_of(NBD_CMD_READ, offset, length) == NBD_EOVERFLOW
        assert c.pread(512) == bytes(512)


def test_read_error_is_a_chunk(server, disk):
    image = disk(content=pattern(0, 2 * MIB))
    with server(image).client(structured=EXTENDED) as c:
        os.truncate(image, 4096)
        for length in (512, 20000):
            reply = c.call(NBD_CMD_READ, MIB, length)
            assert reply.error == NBD_EIO
            assert reply.chunks == [(NBD_REPLY_TYPE_ERROR, None, 0)]
        assert c.pread(512) == pattern(0, 512)


# Lengths of more than 32 bits

MARKS = [0, 4096, 2 * GIB, 4 * GIB - 4096, 4 * GIB, 4 * GIB + 4096, 8 * GIB, 9 * GIB]
RANGES = [(4096, 4 * GIB), (4096, 4 * GIB + 1), (4096, 8 * GIB), (0, LARGE), (5000, 8 * GIB - 3)]


def after_zeroing(place, start, end, inward):
    """The block at a mark, when a range was zeroed; inward: whole blocks of it only."""
    if inward:
        start = -(-start // 4096) * 4096
        end = end if end == LARGE else end // 4096 * 4096
    return bytes(0 if start <= at < end else byte
                 for at, byte in enumerate(pattern(place, 4096), place))


@hazard("length of 64 bits is cut down to 32")
@pytest.mark.limit(400)
@pytest.mark.parametrize("command", [NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES], **named)
def test_zeroing_of_more_than_4_gib_clears_all_of_its_range(serve, disk, tmp_path, command):
    need_punch(tmp_path)
    with serve(disk(LARGE)).client(structured=EXTENDED) as c:
        for start, length in RANGES:
            for place in MARKS:
                c.pwrite(pattern(place, 4096), place)
            assert c.error_of(command, start, length) == 0
            for place in MARKS:
                expected = after_zeroing(place, start, start + length, command == NBD_CMD_TRIM)
                assert c.pread(4096, place) == expected, (start, length, place)


@hazard("extents are cut down to 32 bits")
def test_extent_of_more_than_4_gib_is_told_as_one(server, disk):
    need_holes()
    hole = NBD_STATE_HOLE | NBD_STATE_ZERO
    with server(disk(LARGE, pattern(0, MIB))).client(
            structured=EXTENDED, contexts=[ALLOCATION]) as c:
        assert c.block_status(LARGE)[ALLOCATION] == [(MIB, 0), (LARGE - MIB, hole)]
        assert c.block_status(5 * GIB, MIB + 5)[ALLOCATION] == [(5 * GIB, hole)]
        assert c.block_status(5 * GIB, 2 * MIB, NBD_CMD_FLAG_REQ_ONE)[ALLOCATION] == [
            (5 * GIB, hole)]


@hazard("extents are cut down to 32 bits: all modes")
@pytest.mark.parametrize("flags", [0, NBD_CMD_FLAG_REQ_ONE], ids=["plain", "REQ_ONE"])
def test_extents_cover_the_disk_and_tell_the_truth(serve, disk, flags):
    """What has data is never told to be zeros; each answer goes on."""
    image = disk(LARGE)
    with open(image, "r+b") as f:
        for place in MARKS:
            f.seek(place)
            f.write(pattern(place, 4096))
    with serve(image).client(structured=EXTENDED, contexts=[ALLOCATION]) as c:
        c.pwrite(pattern(GIB, 4096), GIB)
        at = 0
        while at < LARGE:
            for length, status in c.block_status(LARGE - at, at, flags)[ALLOCATION]:
                full = [place for place in [GIB, *MARKS] if at < place + 4096 and place < at + length]
                assert not (full and status & NBD_STATE_ZERO), (at, length, full)
                at += length
        assert at == LARGE


@pytest.mark.parametrize("flags", [0, NBD_CMD_FLAG_REQ_ONE], ids=["plain", "REQ_ONE"])
def test_one_reply_describes_64_gib_at_most(serve, disk, flags):
    """A disk of 16 TiB would take seconds, in which nothing else of the thread is done."""
    size = (1 << 44) - (1 << 40)
    s = serve(disk(size))
    with s.client(structured=EXTENDED, contexts=[ALLOCATION]) as c:
        for at in (0, 12345, size - 64 * GIB - 1, size - 5):
            extents = c.block_status(size - at, at, flags)[ALLOCATION]
            told = sum(length for length, _ in extents)
            assert 0 < told <= min(size - at, 64 * GIB)
            if not s.origin:
                assert told == min(size - at, 64 * GIB)


def test_extents_fit_32_bits_where_headers_are_compact(serve, disk):
    """nbd.py sees that none is longer than what was asked about."""
    with serve(disk(LARGE)).client(contexts=[ALLOCATION]) as c:
        for at in (0, 5000, 4 * GIB):
            length = (1 << 32) - 1
            extents = c.block_status(length, at)[ALLOCATION]
            assert 0 < sum(size for size, _ in extents) <= length


@hazard("length of 64 bits is cut down to 32: CACHE, too")
def test_cache_of_more_than_4_gib_brings_all_of_it(serve, disk):
    """A proxy needs its origin no more then."""
    size = 4 * GIB + 3 * MIB + 77
    places = (0, 2 * GIB, 4 * GIB - 4096, 4 * GIB, size - 4096)
    image = disk(size)
    with open(image, "r+b") as f:
        for place in places:
            f.seek(place)
            f.write(pattern(place, 4096))
    s = serve(image)
    with s.client(structured=EXTENDED) as c:
        c.cache(size)
        if s.origin:
            s.origin.kill()
        for place in places:
            assert c.pread(4096, place) == pattern(place, 4096)


HOSTILE = [(0, SIZE + 1), (SIZE, 1), (0, 1 << 32), (0, (1 << 32) + 512), (1, 1 << 63),
           (0, U64 - 1), (1, U64 - 1), (SIZE, U64 - SIZE), (4096, U64 - 4096), (4096, U64 - 4095),
           (512, U64 - 1), (U64 - 1, U64 - 1), (U64 - 1, 2), (1 << 63, 1 << 63),
           ((1 << 63) - 1, 1 << 63)]


@hazard("length of 64 bits wraps")
@pytest.mark.parametrize("offset, length", HOSTILE)
@pytest.mark.parametrize("readonly", [[], ["--readonly"]], ids=["writable", "readonly"])
def test_hostile_lengths_change_nothing(server, image, offset, length, readonly):
    with server(image, *readonly).client(structured=EXTENDED, contexts=[ALLOCATION]) as c:
        for command in WITHOUT_PAYLOAD:
            for flags in (0, NBD_CMD_FLAG_FUA):
                error = c.error_of(command, offset, length, flags)
                expected = (NBD_EPERM if readonly and command in (NBD_CMD_TRIM,
                                                                  NBD_CMD_WRITE_ZEROES) else
                            NBD_EOVERFLOW if command == NBD_CMD_READ and length > READ_MAX else
                            NBD_ENOSPC if command == NBD_CMD_WRITE_ZEROES else NBD_EINVAL)
                assert error == expected, (command, flags)
        unchanged(c)


# NBD_CMD_FLAG_PAYLOAD_LEN

@hazard("qemu writes without PAYLOAD_LEN")
@pytest.mark.parametrize("offset, length", [(0, 0), (0, 1), (7, 32), (4096, 65536), (5, 200000)])
def test_write_without_the_flag_has_a_payload_all_the_same(c, offset, length):
    """It must have the flag; but qemu, 8.2 to 10.0 at least, sends it like this, and as a server
    takes it."""
    data = pattern(offset, length, seed=3)
    write = send(c, NBD_CMD_WRITE, offset, length, NBD_CMD_FLAG_FUA, data)
    flush = c.request(NBD_CMD_FLUSH)
    assert c.collect(write).error == c.collect(flush).error == 0
    expected = pattern(0, SIZE)
    assert c.pread(SIZE) == expected[:offset] + data + expected[offset + length:]


@hazard("qemu writes without PAYLOAD_LEN: one that is refused is drained")
@pytest.mark.parametrize("length", [1, 32, 300000])
def test_payload_of_a_refused_write_without_the_flag_is_consumed(c, length):
    write = send(c, NBD_CMD_WRITE, SIZE, length, 0, booby_trap(length))
    assert c.collect(write).error == NBD_ENOSPC
    unchanged(c)


@hazard("unexpected payload that is not drained")
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 4096, 65536, MIB + 5])
@pytest.mark.parametrize("command", WITHOUT_PAYLOAD, **named)
def test_unexpected_payload_is_consumed(c, command, length):
    for flags in (PAYLOAD, PAYLOAD | NBD_CMD_FLAG_FUA):
        bad = send(c, command, 0, length, flags, booby_trap(length))
        read = c.request(NBD_CMD_READ, 5, 100)
        assert c.collect(bad).error == NBD_EINVAL
        assert c.collect(read).data == pattern(5, 100)
    unchanged(c)


@hazard("unexpected payload that is not drained")
def test_unexpected_payload_that_arrives_slowly_is_consumed(target, c):
    """Meanwhile others are served, and those before it are answered."""
    payload = booby_trap(200000)
    first = c.request(NBD_CMD_READ, 7, 100)
    bad = send(c, NBD_CMD_READ, 0, len(payload), PAYLOAD, payload[:10])
    assert c.collect(first).data == pattern(7, 100)
    for at in range(10, len(payload), 50000):
        target.is_served()
        c.send(payload[at:at + 50000])
    assert c.collect(bad).error == NBD_EINVAL
    unchanged(c)


@hazard("unexpected payload that is not drained: of 32 MiB")
@pytest.mark.parametrize("command", [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_BLOCK_STATUS], **named)
def test_payload_of_the_maximum_is_consumed(c, command):
    assert c.error_of(command, 0, PAYLOAD_MAX, PAYLOAD, booby_trap(PAYLOAD_MAX)) == (
        NBD_ENOSPC if command == NBD_CMD_WRITE else NBD_EINVAL)
    unchanged(c)


@hazard("unexpected payload that is not drained: nor that of a refused WRITE")
@pytest.mark.parametrize("length", [1, 32, 65536, MIB + 5])
@pytest.mark.parametrize("offset, flags, error", [
    (SIZE, 0, NBD_ENOSPC), (U64 - 1, 0, NBD_ENOSPC), (U64 - 4096, 0, NBD_ENOSPC),
    (0, 1 << 15, NBD_EINVAL), (0, NBD_CMD_FLAG_DF, NBD_EINVAL)])
def test_payload_of_a_refused_write_is_consumed(c, offset, flags, error, length):
    assert c.error_of(NBD_CMD_WRITE, offset, 0, flags, booby_trap(length)) == error
    unchanged(c)


def test_payload_of_a_write_to_a_readonly_disk_is_consumed(server, image):
    with server(image, "--readonly").client(structured=EXTENDED) as c:
        for length in (1, 32, 300000):
            assert c.error_of(NBD_CMD_WRITE, 0, payload=booby_trap(length)) == NBD_EPERM
            assert c.error_of(NBD_CMD_TRIM, 0, length, PAYLOAD, booby_trap(length)) == NBD_EINVAL
        unchanged(c)


@hazard("payload of 2^64 - 1 bytes")
@pytest.mark.parametrize("length", [READ_MAX + 1, 1 << 32, (1 << 32) + 1, 1 << 63, U64 - 1])
@pytest.mark.parametrize("command", [NBD_CMD_WRITE, NBD_CMD_DISC, *WITHOUT_PAYLOAD], **named)
def test_payload_above_the_maximum_closes(target, command, length):
    """At once: before any of it has come."""
    for flags in {PAYLOAD, 0 if command == NBD_CMD_WRITE else PAYLOAD}:
        with target.client(structured=EXTENDED) as c:
            c.send(extended_header(command, 0, length, flags))
            c.expect_closed()
    assert target.is_served()


def test_flag_means_nothing_where_headers_are_compact(target):
    with target.client(contexts=[ALLOCATION]) as c:
        for command in WITHOUT_PAYLOAD:
            assert c.error_of(command, 0, 0 if command == NBD_CMD_FLUSH else 512,
                              PAYLOAD) == NBD_EINVAL
        assert c.error_of(NBD_CMD_WRITE, 0, 0, PAYLOAD, booby_trap(512)) == NBD_EINVAL
        unchanged(c)


# Terminating the transmission phase

def test_shutdown_closes_within_an_unexpected_payload(target, c):
    send(c, NBD_CMD_CACHE, 0, 1000, PAYLOAD, b"x" * 500)
    target.settle()
    target.terminate()
    c.expect_closed()


# The same bytes by any headers

def operations(size):
    """[(command, offset, length, flags)], some of them wrong."""
    dice = random.Random(7)
    for _ in range(150):
        command = dice.choice([*FLAGS_OF, NBD_CMD_WRITE, NBD_CMD_READ])
        offset = dice.choice([dice.randrange(size), dice.randrange(size) & -4096, size - 1, size])
        length = dice.choice([0, 1, 511, 4096, 5000, 70000, 300000])
        if dice.random() < 0.9:
            length = min(length, size - offset)
        flags = dice.choice([0, 0, 0, *FLAGS_OF[command]])
        yield (command, *((0, 0) if command == NBD_CMD_FLUSH else (offset, length)), flags)


def outcome(c):
    """What the operations are answered with, and the disk afterwards."""
    told = []
    for number, (command, offset, length, flags) in enumerate(operations(c.size)):
        if not c.structured:
            flags &= ~NBD_CMD_FLAG_DF
        payload = pattern(offset, length, seed=number % 251 + 1)
        if command == NBD_CMD_BLOCK_STATUS and not c.contexts:
            continue
        reply = c.call(command, offset, length, flags,
                       payload if command == NBD_CMD_WRITE else b"")
        if command != NBD_CMD_BLOCK_STATUS:
            told.append((number, reply.error, reply.data))
    return told, c.pread(c.size)


def test_same_operations_have_the_same_outcome_by_any_headers(serve, disk):
    size = MIB + 77
    outcomes = []
    for structured in (False, True, EXTENDED):
        s = serve(disk(content=pattern(0, size)))
        with s.client(structured=structured, contexts=[ALLOCATION] if structured else []) as c:
            outcomes.append(outcome(c))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][1] != pattern(0, size)


# Other clients.  libnbd has extended headers since 1.18, qemu since 8.2; before, they go on
# without, as with any server.

LIBNBD = r"""
import nbd, sys
uri, size = sys.argv[1], int(sys.argv[2])
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
knows = hasattr(h, "get_extended_headers_negotiated")
assert h.get_structured_replies_negotiated() and h.get_size() == size and h.can_df()
h.pwrite(b"hello", size - 5, nbd.CMD_FLAG_FUA)
h.pwrite(b"x" * 8192, 1 << 32)
assert h.pread(5, size - 5) == b"hello" and h.pread(3, 1) == bytes(3)
told = []
if knows:
    assert h.get_extended_headers_negotiated()
    h.zero(size - 5, 0)
    h.trim(5 << 30, 4096)
    h.cache(5 << 30, 0)
    h.block_status_64(size, 0, lambda name, at, entries, error: told.extend(entries))
    lengths = [length for length, _ in told]
else:
    h.zero((1 << 32) - 4096, 0)
    h.zero(8192, 1 << 32)
    h.block_status((1 << 32) - 1, 0, lambda name, at, entries, error: told.extend(entries))
    lengths = told[::2]
assert lengths and 0 < sum(lengths) <= size
assert h.pread(8192, 1 << 32) == bytes(8192) and h.pread(5, size - 5) == b"hello"
h.flush()
for call in (lambda: h.pread(2, size - 1), lambda: h.zero(2, size - 1)):
    h.set_strict_mode(0)
    try:
        call()
        raise SystemExit("an error was expected")
    except nbd.Error as e:
        assert e.errno in ("EINVAL", "ENOSPC"), e
assert h.pread(5, size - 5) == b"hello"
h.shutdown()
sys.stdout.write("passed")
"""


def test_libnbd_uses_what_it_knows(serve, disk, tmp_path):
    need_module("nbd", "python3-libnbd")
    need_punch(tmp_path)
    s = serve(disk(LARGE))
    done = subprocess.run([sys.executable, "-c", LIBNBD, s.uri, str(LARGE)], cwd="/",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=PATIENCE)
    assert done.returncode == 0 and done.stdout == "passed", done.stdout


def test_qemu_maps_more_than_4_gib(server, disk):
    need_holes()
    size = 9 * GIB
    s = server(disk(size, pattern(0, MIB)))
    extents = json.loads(tool("qemu-utils", "qemu-img", "map", "--output=json", "-f", "raw", s.uri))
    assert [(e["length"], e["zero"]) for e in extents] == [(MIB, False), (size - MIB, True)]


def test_qemu_writes_and_zeroes_beyond_4_gib(serve, disk, tmp_path):
    """-n: with FAST_ZERO, and as much at once as is possible."""
    need_punch(tmp_path)
    qemu_io(serve(disk(LARGE)).uri, "write -P 7 0 4k", "write -P 7 6g 4k", "write -f -P 9 8g 3M",
            "read -P 7 6g 4k", "write -z -n -u 4k 8g", "read -P 7 0 4k", "read -P 0 6g 4k",
            "read -P 0 8g 4k", "read -P 9 8589938688 3141632", "flush")
