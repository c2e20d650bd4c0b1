"""Rules of the NBD protocol that implementers get wrong.

The sections follow the rules by number; the words after a number are the
heading of doc/proto.md (NetworkBlockDevice/nbd) where the rule stands.  What
every reply must look like (cookies, chunks that overlap, extents, error values)
is checked by nbd.py in all tests.
"""

import ctypes
import os
import struct

import pytest

from conftest import need_holes, need_punch, skip
from nbd import *

SIZE = (256 << 10) + 77         # no multiple of any block size
MIB = 1 << 20
BLOCK = 4096
WRITABLE = (NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA
            | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES
            | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE
            | NBD_FLAG_SEND_FAST_ZERO)
READONLY = (NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_FLUSH
            | NBD_FLAG_SEND_FUA | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE)
BAD_NAMES = {"nul": b"a\0b", "latin1": b"\xe9t\xe9", "overlong": b"\xc0\x80",
             "surrogate": b"\xed\xa0\x80", "too high": b"\xf4\x90\x80\x80",
             "cut": b"abc\xe2\x82", "lone continuation": b"\x80"}
bad_names = pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES.keys())
all_replies = pytest.mark.parametrize("structured", [False, True, EXTENDED],
                                      ids=["simple", "structured", "extended"])


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


@pytest.fixture
def readonly(server, image):
    return server(image, "--readonly")


def options_in_step(c):
    """The connection still understands options."""
    assert c.list() == [""]


def in_step(c, offset=0):
    """The connection still understands requests."""
    assert c.pread(512, offset) == pattern(offset, 512)


def contents(c):
    """The whole disk, as that client reads it."""
    return b"".join(c.pread(min(16 * MIB, c.size - at), at)
                    for at in range(0, c.size, 16 * MIB))


# 1. Conventions

@bad_names
@pytest.mark.parametrize("option", [NBD_OPT_INFO, NBD_OPT_GO])
def test_name_that_is_no_string_is_invalid(target, option, name):
    c = target.hello()
    assert c.refused(option, info_data(name)) == NBD_REP_ERR_INVALID
    options_in_step(c)


@bad_names
@pytest.mark.parametrize("option", [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT])
def test_name_that_is_no_string_has_no_contexts(target, option, name):
    c = target.hello()
    c.structured_reply()
    assert c.refused(option, meta_data(name)) == NBD_REP_ERR_INVALID
    options_in_step(c)


@pytest.mark.parametrize("option", [NBD_OPT_INFO, NBD_OPT_GO])
def test_name_of_4097_bytes_is_too_big(target, option):
    c = target.hello()
    assert c.refused(option, info_data("n" * 4097)) == NBD_REP_ERR_TOO_BIG
    options_in_step(c)


def test_name_of_4097_bytes_has_no_contexts(target):
    c = target.hello()
    c.structured_reply()
    assert c.refused(NBD_OPT_SET_META_CONTEXT, meta_data("n" * 4097)) == NBD_REP_ERR_TOO_BIG
    options_in_step(c)


def test_multibyte_name_of_4096_bytes_is_a_name(target):
    name = "\u20ac" * 1365 + "x"
    assert len(name.encode()) == 4096
    with target.client(name=name) as c:
        in_step(c)


def test_description_is_utf8_whatever_the_file_is_called(server, disk):
    """1. A file's name need not be UTF-8; what is sent must be (Info.text
    raises otherwise).  It may be left out."""
    image = disk(SIZE, name=os.fsdecode(b"d\xe9\xff.img"))
    c = server(image).hello()
    info = c.info(infos=[NBD_INFO_DESCRIPTION])
    assert NBD_INFO_DESCRIPTION not in info.raw or info.description is not None


# 2. Client flags

def test_client_flag_not_offered_closes(target):
    for bit in range(2, 32):
        with target.raw() as c:
            c.greeting()
            c.client_flags(NBD_FLAG_C_FIXED_NEWSTYLE | 1 << bit)
            c.expect_closed()
    target.is_served()


# 3. Newstyle negotiation

def test_greeting_offers_fixed_newstyle_and_no_zeroes(target):
    assert target.raw().greeting() == NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES


@pytest.mark.parametrize("no_zeroes", [False, True], ids=["zeroes", "no zeroes"])
@pytest.mark.parametrize("how", ["export_name", "go"])
def test_zeroes_follow_export_name_only(target, how, no_zeroes):
    """3. The reply that follows shows whether there were too many."""
    with target.client(how=how, no_zeroes=no_zeroes) as c:
        assert (c.size, c.flags) == (SIZE, WRITABLE)
        in_step(c)


@pytest.mark.parametrize("flags", [0, NBD_FLAG_C_NO_ZEROES])
def test_export_name_needs_no_fixed_newstyle(target, flags):
    c = target.raw().hello(flags)
    c.export_name()
    in_step(c)


@pytest.mark.parametrize("option", [NBD_OPT_LIST, NBD_OPT_GO, NBD_OPT_STRUCTURED_REPLY])
def test_other_options_need_fixed_newstyle(target, option):
    """3. proto.md lets a server choose; this one closes."""
    c = target.raw().hello(0)
    c.option(option, info_data() if option == NBD_OPT_GO else b"")
    c.expect_closed()


@pytest.mark.parametrize("magic", [0, IHAVEOPT ^ 1, INIT_PASSWD, OPTION_REPLY_MAGIC])
def test_wrong_option_magic_closes(target, magic):
    c = target.hello()
    c.option(NBD_OPT_LIST, magic=magic)
    c.expect_closed()


# 4. Fixed newstyle negotiation; Baseline

@pytest.mark.parametrize("length", [0, 1, 5, 65536, 65537, 3 * MIB])
@pytest.mark.parametrize("option", [0, NBD_OPT_PEEK_EXPORT, 12, 1000, 1 << 31, (1 << 32) - 1])
def test_unknown_option_is_unsupported_and_its_data_consumed(target, option, length):
    c = target.hello()
    data = (option_header(NBD_OPT_ABORT, 0) * (length // 16 + 1))[:length]
    assert c.refused(option, data) == NBD_REP_ERR_UNSUP
    options_in_step(c)


def test_unknown_option_of_32_mib_is_consumed(target):
    c = target.hello()
    assert c.refused(1000, bytes(32 * MIB)) == NBD_REP_ERR_UNSUP
    options_in_step(c)


@pytest.mark.parametrize("option", [
    NBD_OPT_LIST, NBD_OPT_INFO, NBD_OPT_GO, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY,
    NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT])
def test_known_option_of_more_than_64_kib_is_too_big(target, option):
    c = target.hello()
    c.structured_reply()
    for length in (65537, MIB):
        assert c.refused(option, bytes(length)) == NBD_REP_ERR_TOO_BIG
    options_in_step(c)


# 5. NBD_OPT_EXPORT_NAME

@pytest.mark.parametrize("name", [*BAD_NAMES.values(), b"n" * 4097, b"n" * 65537],
                         ids=[*BAD_NAMES, "4097", "65537"])
def test_refused_export_name_closes(target, name):
    c = target.hello()
    c.option(NBD_OPT_EXPORT_NAME, name)
    c.expect_closed()
    target.is_served()


# 6. NBD_OPT_ABORT

@pytest.mark.parametrize("data", [b"", b"goodbye", bytes(65536)], ids=["0", "7", "65536"])
def test_abort_is_acknowledged_whatever_its_data(target, data):
    c = target.hello()
    assert c.ask(NBD_OPT_ABORT, data) == []
    c.expect_closed()


# 7. Option types

NO_DATA = [NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY,
           NBD_OPT_EXTENDED_HEADERS]


@pytest.mark.parametrize("length", [1, 4, 65536])
@pytest.mark.parametrize("option", NO_DATA)
def test_option_without_data_refuses_data(target, option, length):
    c = target.hello()
    assert c.refused(option, b"x" * length) == NBD_REP_ERR_INVALID
    options_in_step(c)


def test_structured_reply_with_data_negotiates_nothing(target):
    c = target.hello()
    c.refused(NBD_OPT_STRUCTURED_REPLY, b"x")
    c.go()
    assert not c.flags & NBD_FLAG_SEND_DF
    in_step(c)


# 8. NBD_OPT_EXPORT_NAME; NBD_OPT_LIST

def test_list_names_the_default_export(target):
    assert target.hello().list() == [""]


@pytest.mark.parametrize("how", ["export_name", "go"])
@pytest.mark.parametrize("name", ["", "sda", "*", "a/b c", "\u20ac\U0001f4be"])
def test_any_name_is_the_disk(target, name, how):
    with target.client(name=name, how=how) as c:
        assert c.size == SIZE
        in_step(c)


# 9. NBD_OPT_INFO and NBD_OPT_GO

info_options = pytest.mark.parametrize("option", [NBD_OPT_INFO, NBD_OPT_GO],
                                       ids=["INFO", "GO"])
MALFORMED_INFO = {
    "no data": b"",
    "half a length": b"\0\0",
    "length only": struct.pack(">I", 0),
    "no count": string("abc"),
    "half a count": string("abc") + b"\0",
    "name one byte too long": struct.pack(">I", 4) + b"abc" + b"\0\0",
    "name is the rest": struct.pack(">I", 5) + b"abc" + b"\0\0",
    "name of 2^31": struct.pack(">I", 1 << 31) + b"abc" + b"\0\0",
    "name of 2^32 - 1": struct.pack(">I", (1 << 32) - 1) + b"abc" + b"\0\0",
    "name of 2^32 - 6": struct.pack(">I", (1 << 32) - 6) + b"abc" + b"\0\0",
    "a request too few": string("abc") + struct.pack(">HH", 2, 0),
    "a request too many": string("abc") + struct.pack(">HHH", 1, 0, 0),
    "65535 requests, none there": string("abc") + struct.pack(">H", 65535),
    "half a request": string("abc") + struct.pack(">HB", 1, 0),
    "a byte too many": info_data("abc", [NBD_INFO_NAME]) + b"\0",
}


@info_options
@pytest.mark.parametrize("data", MALFORMED_INFO.values(), ids=MALFORMED_INFO.keys())
def test_malformed_information_request_is_invalid(target, option, data):
    c = target.hello()
    assert c.refused(option, data) == NBD_REP_ERR_INVALID
    options_in_step(c)


@info_options
def test_export_information_is_sent_unasked(target, option):
    info = target.hello().info(option=option)
    assert (info.size, info.flags) == (SIZE, WRITABLE)


@info_options
def test_unknown_information_requests_are_ignored(target, option):
    info = target.hello().info(infos=[4, NBD_INFO_BLOCK_SIZE, 99, 0xffff], option=option)
    assert info.block_size
    assert set(info.raw) <= {NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_INFO_DESCRIPTION,
                             NBD_INFO_BLOCK_SIZE}


def test_thousands_of_information_requests_fit_64_kib(target):
    c = target.hello()
    kinds = range(100, 100 + (65536 - 6) // 2)
    assert c.info(infos=kinds).size == SIZE
    options_in_step(c)


@info_options
def test_repeated_information_request_is_answered_in_step(target, option):
    """9. A client must not repeat one; SHOULD appear once (Info checks that)."""
    c = target.hello()
    try:
        c.info(infos=[NBD_INFO_NAME] * 3, option=option)
    except OptionError as e:
        assert e.type == NBD_REP_ERR_INVALID


@info_options
@pytest.mark.parametrize("name", ["", "sda"])
def test_all_information_on_request(target, image, name, option):
    info = target.hello().info(name, [NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION,
                                      NBD_INFO_NAME, NBD_INFO_EXPORT], option)
    assert info.name in (name, "")
    assert info.description == image.name
    assert info.block_size == (1, BLOCK, PAYLOAD_MAX)


@pytest.mark.parametrize("infos", [[], [NBD_INFO_BLOCK_SIZE], [1, 2, 3]])
@all_replies
def test_info_then_go_agree(target, structured, infos):
    c = target.hello()
    if structured:
        c.extended_headers() if structured == EXTENDED else c.structured_reply()
    assert c.info("x", infos).raw == c.go("x", infos).raw
    in_step(c)


# 10. NOTLS mode

def test_starttls_is_unsupported(target):
    c = target.hello()
    assert c.refused(NBD_OPT_STARTTLS) == NBD_REP_ERR_UNSUP
    options_in_step(c)


# 11. NBD_OPT_SET_META_CONTEXT; NBD_OPT_LIST_META_CONTEXT

meta_options = pytest.mark.parametrize(
    "option", [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT], ids=["LIST", "SET"])
ALLOCATION = "base:allocation"
MALFORMED_META = {
    "no data": b"",
    "half a length": b"\0\0\0",
    "name longer than the option": struct.pack(">I", 100) + b"abc" + bytes(4),
    "name of 2^32 - 1": struct.pack(">I", (1 << 32) - 1) + bytes(8),
    "name of 2^32 - 8": struct.pack(">I", (1 << 32) - 8) + bytes(8),
    "no count": string(""),
    "half a count": string("") + b"\0\0",
    "count of 1, none there": string("") + struct.pack(">I", 1),
    "count of 2^32 - 1": string("") + struct.pack(">I", (1 << 32) - 1) + string(ALLOCATION),
    "half a query length": string("") + struct.pack(">I", 1) + b"\0\0",
    "query longer than the option": string("") + struct.pack(">II", 1, 16) + b"base:allocation",
    "query of 2^32 - 1": string("") + struct.pack(">II", 1, (1 << 32) - 1) + b"base:allocation",
    "a query too many": meta_data("", [ALLOCATION]) + string(ALLOCATION),
    "a byte too many": meta_data("", [ALLOCATION]) + b"\0",
}


@pytest.fixture
def meta(target):
    """A client that has negotiated structured replies."""
    c = target.hello()
    c.structured_reply()
    return c


def test_set_meta_context_before_structured_replies_is_invalid(target):
    c = target.hello()
    assert c.refused(NBD_OPT_SET_META_CONTEXT,
                     meta_data("", [ALLOCATION])) == NBD_REP_ERR_INVALID
    options_in_step(c)


def test_list_meta_context_before_structured_replies_is_answered(target):
    """11. proto.md: MAY be answered with ERR_INVALID."""
    c = target.hello()
    try:
        assert c.list_meta_context() == [ALLOCATION]
    except OptionError as e:
        assert e.type == NBD_REP_ERR_INVALID
    options_in_step(c)


@meta_options
@pytest.mark.parametrize("data", MALFORMED_META.values(), ids=MALFORMED_META.keys())
def test_malformed_meta_context_is_invalid(meta, option, data):
    assert meta.refused(option, data) == NBD_REP_ERR_INVALID
    options_in_step(meta)


@pytest.mark.parametrize("queries", [[], ["base:"], [ALLOCATION], ["base:", ALLOCATION],
                                     ["x-unknown:y", ALLOCATION]])
def test_list_meta_context_finds_allocation_once(meta, queries):
    replies = meta.ask(NBD_OPT_LIST_META_CONTEXT, meta_data("", queries))
    assert [reply.context for reply in replies] == [(0, ALLOCATION)]


# Semantically wrong queries select nothing, or are ERR_INVALID where proto.md
# allows that; other namespaces are never an error.
UNKNOWN_QUERIES = ["x-unknown:", "x-unknown:y", "qemu:dirty-bitmap:a", "basex:allocation",
                   "bas:allocation", "BASE:allocation"]
WRONG_QUERIES = ["base:alloc", "base:allocation:x", "base:allocationx", "base:Allocation",
                 "base", "", ":", "allocation", "base:allocation\0", b"base:\xff",
                 "base:" + "a" * 4096]


@meta_options
@pytest.mark.parametrize("query", UNKNOWN_QUERIES)
def test_unknown_namespace_is_ignored(meta, option, query):
    assert meta.ask(option, meta_data("", [query])) == []


@meta_options
@pytest.mark.parametrize("query", WRONG_QUERIES,
                         ids=lambda query: repr(query[:24]))
def test_wrong_query_finds_nothing(meta, option, query):
    try:
        assert meta.ask(option, meta_data("", [query])) == []
    except OptionError as e:
        assert e.type in (NBD_REP_ERR_INVALID, NBD_REP_ERR_TOO_BIG)
    options_in_step(meta)


@pytest.mark.parametrize("queries, found", [
    ([], {}),
    ([ALLOCATION], {1: ALLOCATION}),
    (["base:"], {}),
    (["base:", "x-unknown:y"], {}),
    (["x-unknown:y", ALLOCATION, "base:"], {1: ALLOCATION}),
    ([ALLOCATION] * 3, {1: ALLOCATION}),
    ([ALLOCATION] * 1000, {1: ALLOCATION})], ids=lambda value: str(value)[:30])
def test_set_meta_context_selects_by_name_only(meta, queries, found):
    assert meta.set_meta_context("", queries) == found
    meta.go()
    if found:
        assert meta.block_status(SIZE)[ALLOCATION]
    else:
        assert meta.error_of(NBD_CMD_BLOCK_STATUS, 0, SIZE) == NBD_EINVAL


@pytest.mark.parametrize("data", [
    meta_data("", []), meta_data("", ["x-unknown:y"]), meta_data("other", [ALLOCATION]),
    b"", meta_data("", [ALLOCATION]) + b"\0", meta_data(b"\xff", [ALLOCATION]), bytes(65537)],
    ids=["no query", "unknown", "other export", "empty", "malformed", "bad name", "too big"])
def test_new_or_failed_set_forgets_the_earlier_choice(meta, data):
    meta.set_meta_context()
    try:
        meta.ask(NBD_OPT_SET_META_CONTEXT, data)
    except OptionError:
        pass
    meta.go()
    assert meta.error_of(NBD_CMD_BLOCK_STATUS, 0, SIZE) == NBD_EINVAL
    in_step(meta)


@pytest.mark.parametrize("how", ["go", "export_name"])
@pytest.mark.parametrize("chosen, entered, error", [
    ("", "", 0), ("a", "a", 0), ("a", "", NBD_EINVAL), ("", "a", NBD_EINVAL),
    ("a", "b", NBD_EINVAL), ("abc", "ab", NBD_EINVAL)])
def test_choice_holds_for_the_same_name_only(meta, chosen, entered, error, how):
    meta.set_meta_context(chosen)
    getattr(meta, how)(entered)
    assert meta.error_of(NBD_CMD_BLOCK_STATUS, 0, SIZE) == error
    in_step(meta)


def test_info_and_list_keep_the_choice(meta):
    meta.set_meta_context("a")
    meta.info("b")
    meta.list_meta_context("b", ["base:"])
    meta.list()
    meta.structured_reply()
    meta.go("a")
    assert meta.block_status(SIZE)[ALLOCATION]


def test_structured_reply_twice_is_acknowledged_twice(target):
    c = target.hello()
    c.structured_reply()
    c.structured_reply()
    c.go()
    assert c.flags == WRITABLE | NBD_FLAG_SEND_DF
    in_step(c)


# 12. Termination of the session during option haggling

def test_hundreds_of_bad_options_do_not_end_the_session(target):
    c = target.hello()
    for option in range(100, 400):
        assert c.refused(option, b"x" * (option % 7)) == NBD_REP_ERR_UNSUP
        assert c.refused(NBD_OPT_LIST, b"x") == NBD_REP_ERR_INVALID
        assert c.refused(NBD_OPT_GO, b"x") == NBD_REP_ERR_INVALID
    c.go()
    in_step(c)


# 13, 14. Size constraints

SIZES = [0, 1, 511, 512, 4095, 4096, 4097, SIZE]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_told_and_read_to_its_last_byte(server, disk, size):
    with server(disk(content=pattern(0, size))).client() as c:
        assert c.size == size
        assert contents(c) == pattern(0, size)
        assert c.error_of(NBD_CMD_READ, size, 1) == NBD_EINVAL
        assert c.error_of(NBD_CMD_READ, 0, size + 1) == NBD_EINVAL


@pytest.mark.parametrize("size", [size for size in SIZES if size])
def test_every_size_is_written_to_its_last_byte(server, disk, size):
    image = disk(size)
    s = server(image)
    with s.client() as c:
        c.pwrite(pattern(0, size))
        c.pwrite(b"!", size - 1)
        assert c.error_of(NBD_CMD_WRITE, size - 1, payload=b"xx") == NBD_ENOSPC
        assert contents(c) == pattern(0, size - 1) + b"!"
    s.stop()
    assert image.read_bytes() == pattern(0, size - 1) + b"!"


@pytest.mark.parametrize("size", SIZES)
def test_block_size_information_is_sound(server, disk, size):
    """14. A size that is no multiple of the minimum has an unreachable tail."""
    info = server(disk(size)).hello().info(infos=[NBD_INFO_BLOCK_SIZE])
    minimum, preferred, maximum = info.block_size
    assert size % minimum == 0
    assert minimum & minimum - 1 == 0 and minimum <= 65536
    assert preferred & preferred - 1 == 0 and preferred >= max(512, minimum)
    assert maximum >= preferred
    assert (minimum, preferred, maximum) == (1, 4096, 33554432)


def test_single_bytes_may_be_read_and_written(target):
    """13. Without block size information the minimum is 1."""
    with target.client() as c:
        for offset in (0, 1, 511, 4095, 4096, SIZE - 1):
            assert c.pread(1, offset) == pattern(offset, 1)
            c.pwrite(b"\xee", offset)
            assert c.pread(1, offset) == b"\xee"
        assert c.pread(3, 1) == pattern(1, 1)[:0] + b"\xee" + pattern(2, 2)


@all_replies
def test_payloads_of_32_mib_are_served(server, disk, structured):
    with server(disk(40 * MIB)).client(structured=structured) as c:
        data = pattern(0, PAYLOAD_MAX)
        c.pwrite(data, 12345)
        assert c.pread(PAYLOAD_MAX, 12345) == data
        assert c.pread(PAYLOAD_MAX, 40 * MIB - PAYLOAD_MAX) == (
            data[8 * MIB - 12345:] + bytes(8 * MIB - 12345))


@all_replies
def test_payload_of_32_mib_for_a_small_export_is_no_attack(target, structured):
    with target.client(structured=structured) as c:
        assert c.error_of(NBD_CMD_WRITE, 0, payload=bytes(PAYLOAD_MAX)) == NBD_ENOSPC
        assert c.error_of(NBD_CMD_READ, 0, PAYLOAD_MAX) == NBD_EINVAL
        in_step(c)


# 15. Size constraints

HUGE = (5 << 30) + 4097


@pytest.fixture
def huge(server, disk):
    """A sparse disk of more than 4 GiB."""
    return server(disk(HUGE))


@pytest.mark.parametrize("length", [PAYLOAD_MAX + 1, (64 << 20) + 1, (3 << 30) + 5, (1 << 32) - 1])
@pytest.mark.parametrize("command", [NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_CACHE,
                                     NBD_CMD_BLOCK_STATUS], ids=COMMANDS.get)
def test_commands_without_payload_may_be_longer_than_the_maximum(huge, tmp_path, command, length):
    if command in (NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES):
        need_punch(tmp_path)            # or gigabytes of zeros would be written
    with huge.client(contexts=[ALLOCATION]) as c:
        for offset in (0, HUGE - length):
            assert c.error_of(command, offset, length) == 0
        assert c.pread(512, HUGE - 512) == bytes(512)


@pytest.mark.parametrize("offset", [(1 << 31) - 5, (1 << 32) - 5, (1 << 32) + 12345, HUGE - 10])
def test_offsets_beyond_32_bits(huge, offset):
    with huge.client() as c:
        c.pwrite(b"0123456789", offset)
        assert c.pread(10, offset) == b"0123456789"
        assert c.pread(10, offset & 0xfffffff) == bytes(10)


def test_offsets_beyond_4_tib(server, disk):
    size = (4 << 40) + (1 << 30)
    with server(disk(size)).client(contexts=[ALLOCATION]) as c:
        assert c.size == size
        c.pwrite(b"x" * 4096, size - 4096)
        assert c.pread(4097, size - 4097) == b"\0" + b"x" * 4096
        assert c.error_of(NBD_CMD_READ, size - 1, 2) == NBD_EINVAL
        assert c.block_status(4096, size - 4096)


# 16. Request types

@all_replies
@pytest.mark.parametrize("offset", [0, 1, SIZE - 1])
@pytest.mark.parametrize("command", [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_CACHE,
                                     NBD_CMD_WRITE_ZEROES], ids=COMMANDS.get)
def test_length_0_within_the_disk_succeeds(target, command, offset, structured):
    with target.client(structured=structured) as c:
        assert c.error_of(command, offset, 0) == 0
        assert contents(c) == pattern(0, SIZE)


@pytest.mark.parametrize("offset", [0, SIZE, SIZE + 1, 1 << 63, U64 - 1])
def test_length_0_never_disconnects(target, offset):
    with target.client(contexts=[ALLOCATION]) as c:
        for command in COMMANDS:
            if command not in (NBD_CMD_DISC, NBD_CMD_FLUSH):
                c.call(command, offset, 0)
        assert contents(c) == pattern(0, SIZE)


def test_block_status_of_length_0_is_invalid(target):
    with target.client(contexts=[ALLOCATION]) as c:
        assert c.error_of(NBD_CMD_BLOCK_STATUS, 0, 0) == NBD_EINVAL
        in_step(c)


# 17. Error values

PAST_THE_END = [(SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 1), (0, SIZE + 1), (1 << 32, 4096),
                (1 << 63, 1), ((1 << 63) - 1, 1), (U64 - 1, 1), (U64 - 4096, 8192)]


@all_replies
@pytest.mark.parametrize("offset, length", PAST_THE_END)
@pytest.mark.parametrize("command, error", [
    (NBD_CMD_READ, NBD_EINVAL), (NBD_CMD_TRIM, NBD_EINVAL), (NBD_CMD_CACHE, NBD_EINVAL),
    (NBD_CMD_BLOCK_STATUS, NBD_EINVAL), (NBD_CMD_WRITE, NBD_ENOSPC),
    (NBD_CMD_WRITE_ZEROES, NBD_ENOSPC)], ids=lambda value: COMMANDS.get(value))
def test_past_the_end(target, command, error, offset, length, structured):
    if command == NBD_CMD_BLOCK_STATUS and not structured:
        return
    contexts = [ALLOCATION] if command == NBD_CMD_BLOCK_STATUS else []
    payload = b"x" * length if command == NBD_CMD_WRITE else b""
    with target.client(structured=structured, contexts=contexts) as c:
        assert c.error_of(command, offset, length, payload=payload) == error
        assert contents(c) == pattern(0, SIZE)


# 18. Request message

def booby_trap(length):
    """A payload that destroys the disk and leaves if it is read as requests."""
    requests = (request_header(NBD_CMD_WRITE_ZEROES, 0, SIZE)
                + request_header(NBD_CMD_DISC))
    return (requests * (length // len(requests) + 1))[:length]


@all_replies
@pytest.mark.parametrize("length", [1, 28, 4096, 65536, MIB + 5])
@pytest.mark.parametrize("offset, flags, error", [
    (SIZE, 0, NBD_ENOSPC), (U64 - 1, 0, NBD_ENOSPC), (0, 1 << 15, NBD_EINVAL),
    (0, NBD_CMD_FLAG_DF, NBD_EINVAL)])
def test_payload_of_a_refused_write_is_drained(target, offset, flags, error, length, structured):
    with target.client(structured=structured) as c:
        assert c.error_of(NBD_CMD_WRITE, offset, flags=flags,
                          payload=booby_trap(length)) == error
        assert contents(c) == pattern(0, SIZE)


@pytest.mark.parametrize("length", [PAYLOAD_MAX + 1, PAYLOAD_MAX + MIB])
def test_payload_above_the_maximum_is_drained(target, length):
    with target.client() as c:
        assert c.error_of(NBD_CMD_WRITE, 0, payload=booby_trap(length)) == NBD_EINVAL
        assert contents(c) == pattern(0, SIZE)


def test_pipelined_refused_writes_keep_their_order_of_bytes(target):
    """18. Refused and accepted writes, all sent before the first reply."""
    with target.client() as c:
        cookies = [c.request(NBD_CMD_WRITE, 0 if i % 2 else SIZE, payload=booby_trap(1000 + i))
                   for i in range(40)]
        errors = [c.collect(cookie).error for cookie in cookies]
        assert errors == [NBD_ENOSPC, 0] * 20
        assert c.pread(1039) == booby_trap(1039)


# 19. Transmission flags

def test_readonly_is_told(readonly):
    with readonly.client() as c:
        assert c.flags == READONLY
    with readonly.client(structured=True) as c:
        assert c.flags == READONLY | NBD_FLAG_SEND_DF


@all_replies
@pytest.mark.parametrize("offset, length", [(0, 512), (1, 1), (SIZE - 1, 1), (SIZE, 512),
                                            (U64 - 1, 1), (0, MIB)])
@pytest.mark.parametrize("command", [NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES],
                         ids=COMMANDS.get)
def test_readonly_refuses_to_write(readonly, command, offset, length, structured):
    payload = booby_trap(length) if command == NBD_CMD_WRITE else b""
    with readonly.client(structured=structured) as c:
        assert c.error_of(command, offset, length, payload=payload) == NBD_EPERM
        assert contents(c) == pattern(0, SIZE)


def test_readonly_serves_all_else(readonly):
    with readonly.client(contexts=[ALLOCATION]) as c:
        c.flush()
        c.cache(SIZE)
        assert c.block_status(SIZE)
        assert contents(c) == pattern(0, SIZE)


def test_readonly_serves_a_file_without_write_permission(server, image):
    image.chmod(0o444)
    with server(image, "--readonly").client() as c:
        assert contents(c) == pattern(0, SIZE)


# 20. Error values

FLAGS_OF = {
    NBD_CMD_READ: [NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_DF],
    NBD_CMD_WRITE: [NBD_CMD_FLAG_FUA],
    NBD_CMD_FLUSH: [NBD_CMD_FLAG_FUA],
    NBD_CMD_TRIM: [NBD_CMD_FLAG_FUA],
    NBD_CMD_CACHE: [NBD_CMD_FLAG_FUA],
    NBD_CMD_WRITE_ZEROES: [NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FAST_ZERO],
    NBD_CMD_BLOCK_STATUS: [NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_REQ_ONE],
}


def arguments(command):
    """Offset and length for a harmless request."""
    return (0, 0) if command == NBD_CMD_FLUSH else (8192, 512)


@pytest.mark.parametrize("command", FLAGS_OF, ids=COMMANDS.get)
def test_flags_of_each_command(target, command):
    """20, 22. Every flag alone, and with FUA."""
    payload = pattern(8192, 512) if command == NBD_CMD_WRITE else b""
    with target.client(contexts=[ALLOCATION]) as c:
        for bit in range(16):
            for flags in {1 << bit, 1 << bit | NBD_CMD_FLAG_FUA}:
                error = c.error_of(command, *arguments(command), flags, payload)
                known = 1 << bit in FLAGS_OF[command]
                if flags & NBD_CMD_FLAG_FAST_ZERO and known:
                    assert error in (0, NBD_ENOTSUP)
                else:
                    assert error == (0 if known else NBD_EINVAL), (command, hex(flags))
        in_step(c)


def test_refused_flags_change_nothing(target):
    with target.client() as c:
        for command in (NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_WRITE):
            for flags in (1 << 15, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_REQ_ONE | NBD_CMD_FLAG_FUA):
                payload = b"x" * 4096 if command == NBD_CMD_WRITE else b""
                assert c.error_of(command, 4096, 4096, flags, payload) == NBD_EINVAL
        assert contents(c) == pattern(0, SIZE)


@all_replies
def test_unknown_commands_are_invalid(target, structured):
    """20. Also that nothing but WRITE has a payload."""
    with target.client(structured=structured) as c:
        for command in [8, 9, 10, 15, 16, 255, 256, 257, 258, 32768, 65535]:
            assert c.error_of(command, 0, 512) == NBD_EINVAL
            assert c.error_of(command, 0, 512, NBD_CMD_FLAG_FUA) == NBD_EINVAL
        assert contents(c) == pattern(0, SIZE)


@pytest.mark.parametrize("magic", [0, NBD_REQUEST_MAGIC ^ 1, NBD_SIMPLE_REPLY_MAGIC,
                                   NBD_EXTENDED_REQUEST_MAGIC, 0x12560953])
def test_wrong_request_magic_closes(target, magic):
    with target.client() as c:
        c.send(request_header(NBD_CMD_READ, 0, 512, magic=magic) + bytes(64))
        c.expect_closed()
    target.is_served()


def test_flags_are_checked_before_all_else(readonly):
    with readonly.client() as c:
        assert c.error_of(NBD_CMD_WRITE, SIZE, 512, 1 << 15, b"x" * 512) == NBD_EINVAL
        assert c.error_of(NBD_CMD_TRIM, SIZE, 512, NBD_CMD_FLAG_DF) == NBD_EINVAL
        in_step(c)


# 21. Ordering of messages

@pytest.mark.parametrize("offset, length", [(0, 1), (1, 0), (0, SIZE), (U64 - 1, 0),
                                            (0, (1 << 32) - 1), (4096, 4096)])
def test_flush_with_a_range_is_invalid(target, offset, length):
    with target.client() as c:
        assert c.error_of(NBD_CMD_FLUSH, offset, length) == NBD_EINVAL
        in_step(c)


def test_flush_succeeds_at_any_time(target):
    with target.client() as c:
        c.flush()
        c.pwrite(b"x")
        c.flush()
        c.flush()


class Cachestat(ctypes.Structure):
    """struct cachestat of Linux: pages of a file in the page cache."""
    _fields_ = [(name, ctypes.c_uint64) for name in
                ("cache", "dirty", "writeback", "evicted", "recently_evicted")]


def unstable_pages(path):
    """How many pages of a file are not on stable storage yet."""
    result, whole = Cachestat(), (ctypes.c_uint64 * 2)(0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as f:
        if libc.syscall(451, f.fileno(), whole, ctypes.byref(result), 0):
            skip("needs the system call cachestat (Linux 6.5)")
    return result.dirty + result.writeback


@pytest.fixture
def slow_disk(server, disk):
    """A server, its image, and the certainty that writes there stay dirty."""
    image = disk(SIZE)
    for _ in range(20):             # the kernel may write at any time
        image.write_bytes(bytes(SIZE))
        if unstable_pages(image):
            break
    else:
        skip("needs a file system with dirty pages for the temporary directory")
    with open(image, "rb") as f:
        os.fsync(f.fileno())
    return server(image), image


def test_flush_makes_writes_stable(slow_disk):
    """21. FLUSH covers every write replied to before, on any connection."""
    s, image = slow_disk
    with s.client() as writer, s.client() as flusher:
        writer.pwrite(pattern(0, SIZE))
        flusher.flush()
        assert unstable_pages(image) == 0


# 22. Command flags

@pytest.mark.parametrize("data", [b"x", pattern(0, 4096), pattern(0, 200000)], ids=len)
def test_fua_write_is_stable(slow_disk, data):
    s, image = slow_disk
    with s.client() as c:
        c.pwrite(data, 5, NBD_CMD_FLAG_FUA)
        assert unstable_pages(image) == 0


@pytest.mark.parametrize("command, flags", [
    (NBD_CMD_WRITE_ZEROES, 0), (NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE), (NBD_CMD_TRIM, 0)])
def test_fua_binds_trim_and_write_zeroes(slow_disk, command, flags):
    s, image = slow_disk
    with s.client() as c:
        c.pwrite(pattern(0, SIZE), flags=NBD_CMD_FLAG_FUA)
        assert c.error_of(command, 5, 100000, flags | NBD_CMD_FLAG_FUA) == 0
        assert unstable_pages(image) == 0


# 23. Transmission flags (CAN_MULTI_CONN)

def write(c, flags):
    c.pwrite(b"x" * 8192, 4096, flags)


def zero(c, flags):
    c.zero(8192, 4096, flags)


@pytest.mark.parametrize("change, expected", [(write, b"x" * 8192), (zero, bytes(8192))])
@pytest.mark.parametrize("fua", [NBD_CMD_FLAG_FUA, 0], ids=["FUA", "FLUSH"])
def test_flushed_change_shows_on_all_connections(target, change, expected, fua):
    clients = [target.client(structured=i % 2) for i in range(4)]
    for c in clients:
        assert contents(c) == pattern(0, SIZE)
    change(clients[0], fua)
    if not fua:
        clients[0].flush()
    for c in clients:
        assert c.pread(8192, 4096) == expected
        assert c.pread(4096) == pattern(0, 4096)


# 24. Commands

@pytest.mark.parametrize("offset, length", [
    (0, 1), (1, 511), (0, 4096), (4096, 8192), (1, 8192), (4095, 4098), (100, 130000),
    (4097, 4095), (SIZE - 77, 77), (SIZE - 5000, 5000), (0, SIZE)])
def test_trim_discards_whole_blocks_and_keeps_the_rest(target, tmp_path, offset, length):
    need_punch(tmp_path)
    with target.client() as c:
        c.trim(length, offset)
        first = -(-offset // BLOCK) * BLOCK
        last = (offset + length) // BLOCK * BLOCK
        hole = max(0, last - first)
        data = contents(c)
        tail = SIZE // BLOCK * BLOCK        # the ragged end may go with the file's last block
        assert data[:first] == pattern(0, first)
        assert data[first:first + hole] == bytes(hole)
        if offset + length < SIZE:
            assert data[first + hole:] == pattern(0, SIZE)[first + hole:]
        else:
            assert data[tail:] in (pattern(tail, SIZE - tail), bytes(SIZE - tail),
                                   pattern(tail, SIZE - tail)[:offset - tail].ljust(77, b"\0"))


@pytest.mark.parametrize("flags", [0, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FUA],
                         ids=["plain", "NO_HOLE", "FUA"])
@pytest.mark.parametrize("offset, length", [
    (0, 1), (1, 511), (4095, 2), (0, 4096), (1, 8192), (4097, 4095), (100, 130000),
    (65536, 131072), (SIZE - 77, 77), (SIZE - 1, 1), (SIZE - 5000, 5000), (0, SIZE)])
def test_write_zeroes_zeroes_exactly_its_range(target, offset, length, flags):
    with target.client() as c:
        c.zero(length, offset, flags)
        whole = pattern(0, SIZE)
        assert contents(c) == whole[:offset] + bytes(length) + whole[offset + length:]


def allocated(image):
    return os.stat(image).st_blocks * 512


def test_write_zeroes_frees_storage(server, disk, tmp_path):
    need_punch(tmp_path)
    image = disk(content=pattern(0, MIB))
    s = server(image)
    with s.client() as c:
        c.flush()
        before = allocated(image)
        c.zero(MIB // 2)
        c.flush()
        assert allocated(image) <= before - MIB // 4
        assert contents(c) == bytes(MIB // 2) + pattern(MIB // 2, MIB // 2)


@pytest.mark.parametrize("content", [b"", pattern(0, MIB)], ids=["hole", "data"])
def test_no_hole_provisions_storage(server, disk, content):
    image = disk(MIB, content)
    s = server(image)
    with s.client() as c:
        c.zero(MIB, 0, NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FUA)
        assert contents(c) == bytes(MIB)
    s.stop()
    assert allocated(image) >= MIB


# 25. Request types (NBD_CMD_WRITE_ZEROES)

@pytest.mark.parametrize("flags", [0, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FUA],
                         ids=["plain", "NO_HOLE", "FUA"])
@pytest.mark.parametrize("offset, length", [(0, SIZE), (4096, 65536), (1, 511), (5, 130000)])
def test_fast_zero_zeroes_or_changes_nothing(target, offset, length, flags):
    with target.client() as c:
        error = c.error_of(NBD_CMD_WRITE_ZEROES, offset, length, flags | NBD_CMD_FLAG_FAST_ZERO)
        assert error in (0, NBD_ENOTSUP)
        expected = bytearray(pattern(0, SIZE))
        if not error:
            expected[offset:offset + length] = bytes(length)
        assert contents(c) == expected


def test_fast_zero_is_supported_where_holes_can_be_punched(target, tmp_path):
    need_punch(tmp_path)
    with target.client() as c:
        c.zero(65536, 0, NBD_CMD_FLAG_FAST_ZERO)


def test_fast_zero_not_offered_is_refused(readonly):
    with readonly.client() as c:
        assert not c.flags & NBD_FLAG_SEND_FAST_ZERO
        error = c.error_of(NBD_CMD_WRITE_ZEROES, 0, 4096, NBD_CMD_FLAG_FAST_ZERO)
        assert error in (NBD_EINVAL, NBD_EPERM)
        in_step(c)


# 26. Structured reply chunk message

@pytest.mark.parametrize("offset, length, flags, error", [
    (SIZE, 1, 0, NBD_EINVAL), (U64 - 1, 2, 0, NBD_EINVAL), (0, 512, 1 << 15, NBD_EINVAL),
    (0, 512, NBD_CMD_FLAG_NO_HOLE, NBD_EINVAL), (0, READ_MAX + 1, 0, NBD_EOVERFLOW)])
@all_replies
def test_early_read_error_is_of_the_negotiated_kind(target, structured, offset, length, flags,
                                                    error):
    """26. Once negotiated, never a simple reply; without, never a chunk."""
    with target.client(structured=structured) as c:
        reply = c.call(NBD_CMD_READ, offset, length, flags)
        assert reply.error == error
        assert reply.structured == bool(structured)
        in_step(c)


@pytest.mark.parametrize("how", ["go", "export_name"])
def test_structured_replies_work_after_either_way_in(target, how):
    with target.client(structured=True, how=how) as c:
        assert c.flags == WRITABLE | NBD_FLAG_SEND_DF
        assert c.call(NBD_CMD_READ, 0, SIZE).structured


# 27. Request types (NBD_CMD_READ)

@all_replies
@pytest.mark.parametrize("length", [512, 65536, MIB])
def test_read_that_fails_does_not_begin_with_success(server, disk, structured, length):
    """27, and hazard "image truncated".  A simple reply that says success must
    bring data; behind it only closing is left."""
    image = disk(content=pattern(0, 2 * MIB))
    s = server(image)
    with s.client(structured=structured) as c:
        os.truncate(image, 4096)
        try:
            assert c.error_of(NBD_CMD_READ, MIB, length) == NBD_EIO
            in_step(c)
        except Closed:
            pass
    s.is_served()


# 28. Structured reply types

@pytest.fixture
def holey(disk):
    """An image of 4 MiB of data and holes, and the bytes of it."""
    image = disk(4 * MIB)
    data = bytearray(4 * MIB)
    with open(image, "r+b") as f:
        for at in range(0, 4 * MIB, 96 << 10):
            piece = pattern(at, 32 << 10)[:4 * MIB - at]
            data[at:at + len(piece)] = piece
            f.seek(at)
            f.write(piece)
    return image, bytes(data)


@pytest.fixture
def swiss(server, holey):
    """A server on data and holes, and the bytes it must serve."""
    image, data = holey
    return server(image), data


READS = [(0, 4 * MIB), (1, 4 * MIB - 2), (0, 1), (32767, 2), (32768, 65536), (32768, 1),
         (40000, 100), (98303, 2), (4095, 70000), (5, 511), (4 * MIB - 1, 1), (65536, 2 * MIB)]


@all_replies
def test_chunks_cover_the_request_exactly(swiss, structured):
    """28. nbd.py checks overlap, coverage, DONE and the size of hole chunks."""
    s, data = swiss
    with s.client(structured=structured) as c:
        for offset, length in READS:
            assert c.pread(length, offset) == data[offset:offset + length], (offset, length)


def evict(path):
    """Asks the kernel to forget what it caches of a file: the next read has to
    wait for the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@all_replies
@pytest.mark.parametrize("offset, length", READS)
def test_reads_that_wait_for_the_disk_are_right(server, holey, structured, offset, length):
    """28. Other requests may overtake them."""
    image, data = holey
    with server(image).client(structured=structured) as c:
        evict(image)
        for at in (offset, 0, 3 * MIB):
            c.request(NBD_CMD_READ, at, min(length, 4 * MIB - at))
        c.request(NBD_CMD_FLUSH)
        for reply in c.collect_all().values():
            at, size = reply.request.offset, reply.request.length
            assert reply.error == 0
            assert reply.request.command == NBD_CMD_FLUSH or reply.data == data[at:at + size]


@pytest.mark.parametrize("length", [1, 4096, MIB])
def test_df_read_that_waits_for_the_disk_is_one_chunk(server, holey, length):
    image, data = holey
    with server(image).client(structured=True) as c:
        for offset in (0, 30000, 2 * MIB + 1):
            evict(image)
            assert c.pread(length, offset, NBD_CMD_FLAG_DF) == data[offset:offset + length]


def test_hole_chunks_are_holes(server, disk):
    with server(disk(64 * MIB)).client(structured=True) as c:
        assert c.pread(PAYLOAD_MAX, 5) == bytes(PAYLOAD_MAX)


# 29. Request types (NBD_CMD_READ), the DF flag

@all_replies
def test_df_is_offered_with_structured_replies_only(target, structured):
    with target.client(structured=structured) as c:
        assert bool(c.flags & NBD_FLAG_SEND_DF) == bool(structured)
        error = c.error_of(NBD_CMD_READ, 0, 512, NBD_CMD_FLAG_DF)
        assert error == (0 if structured else NBD_EINVAL)
        in_step(c)


def test_df_read_is_one_chunk(swiss):
    s, data = swiss
    with s.client(structured=True) as c:
        for offset, length in [*READS, (0, 65536), (4097, 65536)]:
            reply = c.call(NBD_CMD_READ, offset, length, NBD_CMD_FLAG_DF)
            assert reply.error == 0
            assert reply.data == data[offset:offset + length], (offset, length)


def test_df_read_of_32_mib_is_one_chunk(server, disk):
    with server(disk(33 * MIB, pattern(0, MIB))).client(structured=True) as c:
        data = c.pread(PAYLOAD_MAX, 1, NBD_CMD_FLAG_DF)
        assert data == pattern(1, MIB - 1) + bytes(PAYLOAD_MAX - MIB + 1)


# 30. Error values

@all_replies
@pytest.mark.parametrize("offset", [0, SIZE, U64 - 1])
@pytest.mark.parametrize("length", [READ_MAX + 1, (1 << 31), (1 << 32) - 1])
def test_read_above_the_maximum_overflows(target, offset, length, structured):
    with target.client(structured=structured) as c:
        assert c.error_of(NBD_CMD_READ, offset, length) == NBD_EOVERFLOW
        in_step(c)


# 31. Terminating the transmission phase

def replies_until_closed(c):
    """Replies up to the end, which must be between two messages."""
    replies = []
    while True:
        try:
            replies.append(c.collect())
        except Closed as e:
            check(not e.got, f"closed within a message: {e.got!r}")
            return replies


@all_replies
def test_shutdown_answers_what_was_received_and_nothing_else(target, structured):
    with target.client(structured=structured) as c:
        for i in range(64):
            c.request(NBD_CMD_READ, i * 4096, 4096)
        first = c.collect()
        target.terminate()
        for i in range(64):
            try:
                c.request(NBD_CMD_READ, i, 4096)
            except Closed:
                break
        for reply in [first, *replies_until_closed(c)]:
            assert not reply.error and reply.data == pattern(reply.request.offset, 4096)
        target.wait()


@all_replies
def test_shutdown_closes_in_the_middle_of_a_payload(target, structured):
    """31. The client sends it again to the next server."""
    with target.client(structured=structured) as c:
        c.request(NBD_CMD_WRITE, 0, 1000, payload=b"x" * 500)
        target.settle()
        target.terminate()
        c.expect_closed()
    target.wait()


def test_shutdown_closes_in_the_handshake(target):
    c = target.hello()
    target.terminate()
    with pytest.raises(Closed) as e:
        until(lambda: not c.info())         # for ever, or until it is closed
    assert not e.value.got
    target.wait()


def test_acknowledged_writes_survive_shutdown(server, disk):
    image = disk(MIB)
    s = server(image)
    with s.client() as c:
        for i in range(64):
            c.request(NBD_CMD_WRITE, i * 4096, payload=pattern(i * 4096, 4096))
        c.collect()
        s.terminate()
        done = [reply.request for reply in replies_until_closed(c) if not reply.error]
        s.wait()
    data = image.read_bytes()
    for request in done:
        assert data[request.offset:][:4096] == pattern(request.offset, 4096)


# 32. Transmission

@all_replies
def test_disc_has_no_reply(target, structured):
    with target.client(structured=structured) as c:
        c.disc()


@pytest.mark.parametrize("flags", [0, NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_DF, 1 << 15])
def test_disc_has_no_reply_whatever_its_fields(target, flags):
    with target.client() as c:
        c.request(NBD_CMD_DISC, 4096, 512, flags)
        c.expect_closed()


@all_replies
def test_disc_finishes_what_is_outstanding(target, structured):
    with target.client(structured=structured) as c:
        for i in range(32):
            c.request(NBD_CMD_READ, i * 4096, 4096)
            c.request(NBD_CMD_WRITE, 200000 + i, payload=b"x")
        c.request(NBD_CMD_FLUSH)
        c.request(NBD_CMD_DISC)
        replies = replies_until_closed(c)
        assert len(replies) == 65
        assert not any(reply.error for reply in replies)
        for reply in replies:
            if reply.request.command == NBD_CMD_READ:
                assert reply.data == pattern(reply.request.offset, 4096)
    with target.client() as c:
        assert c.pread(32, 200000) == b"x" * 32


@all_replies
def test_cookies_are_opaque(target, structured):
    cookies = [0, 1, 0xff, NBD_REQUEST_MAGIC, 1 << 31, 1 << 32, 1 << 63, U64 - 1]
    with target.client(structured=structured) as c:
        for cookie in cookies + cookies:
            c.collect(c.request(NBD_CMD_READ, 0, 16, cookie=cookie))
        for cookie in cookies:
            c.request(NBD_CMD_READ, cookie % 1000, 16, cookie=cookie)
        for cookie, reply in c.collect_all().items():
            assert reply.data == pattern(cookie % 1000, 16)


def test_two_requests_with_one_cookie_get_two_replies(target):
    with target.client() as c:
        c.send(request_header(NBD_CMD_FLUSH, cookie=7) * 2)
        for _ in range(2):
            assert c.unpack(">IIQ") == (NBD_SIMPLE_REPLY_MAGIC, 0, 7)
        in_step(c)


@all_replies
def test_many_requests_in_flight_are_all_answered(target, structured):
    with target.client(structured=structured) as c:
        for i in range(1000):
            c.request(NBD_CMD_READ, i * 97, 1 + i)
        replies = c.collect_all().values()
        assert len(replies) == 1000
        for reply in replies:
            assert reply.data == pattern(reply.request.offset, reply.request.length)


# 33. NBD_REPLY_TYPE_BLOCK_STATUS; base:allocation

def walk(c, end, flags=0):
    """Asks for the status of [0, end) as a client would; [(offset, length,
    status)] without what lies behind the end."""
    extents, at = [], 0
    while at < end:
        for length, status in c.block_status(min(end - at, (1 << 32) - 1), at,
                                             flags)[ALLOCATION]:
            extents.append((at, min(length, end - at), status))
            at += length
    return extents


@pytest.mark.parametrize("contexts, structured", [((), True), ((), False), ((), EXTENDED)])
def test_block_status_that_was_not_negotiated_is_invalid(target, contexts, structured):
    with target.client(structured=structured, contexts=contexts) as c:
        assert c.error_of(NBD_CMD_BLOCK_STATUS, 0, 512) == NBD_EINVAL
        in_step(c)


@pytest.mark.parametrize("flags", [0, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLAG_FUA],
                         ids=["plain", "REQ_ONE", "FUA"])
def test_block_status_tells_the_truth_about_zeros(swiss, flags):
    """33. Status 0 is always safe; ZERO must read as zeros.  The rules for
    extents are checked by nbd.py."""
    s, data = swiss
    with s.client(contexts=[ALLOCATION]) as c:
        for offset, length, status in walk(c, len(data), flags):
            assert not status & ~(NBD_STATE_HOLE | NBD_STATE_ZERO)
            if status & NBD_STATE_ZERO:
                assert not any(data[offset:offset + length]), (offset, length)


@pytest.mark.parametrize("size", [1, 511, 4097, SIZE])
def test_block_status_ends_with_a_ragged_export(server, disk, size):
    with server(disk(content=pattern(0, size))).client(contexts=[ALLOCATION]) as c:
        assert sum(length for _, length, _ in walk(c, size)) == size
        assert c.block_status(1, size - 1)[ALLOCATION] == [(1, 0)]


def test_block_status_of_odd_ranges(swiss):
    s, data = swiss
    with s.client(contexts=[ALLOCATION]) as c:
        for offset, length in READS:
            for flags in (0, NBD_CMD_FLAG_REQ_ONE):
                at = offset
                for size, status in c.block_status(length, offset, flags)[ALLOCATION]:
                    assert not (status & NBD_STATE_ZERO and any(data[at:at + size]))
                    at += size


def test_block_status_shows_holes(server, disk):
    """33. nbdinfo --map and qemu-img convert depend on it."""
    need_holes()
    image = disk(64 * MIB, pattern(0, MIB))
    with server(image).client(contexts=[ALLOCATION]) as c:
        holes = sum(length for _, length, status in walk(c, c.size)
                    if status == NBD_STATE_HOLE | NBD_STATE_ZERO)
        assert holes >= 62 * MIB


def test_block_status_follows_writes(server, disk):
    with server(disk(MIB)).client(contexts=[ALLOCATION]) as c:
        walk(c, MIB)
        c.pwrite(b"x" * 4096, 65536)
        data = [extent for extent in walk(c, MIB)
                if extent[0] <= 65536 < extent[0] + extent[1]]
        assert data[0][2] == 0


def test_block_status_of_hundreds_of_extents(server, disk):
    """33. As many as there are, or fewer: the client comes again."""
    image = disk(32 * MIB)
    with open(image, "r+b") as f:
        for at in range(0, 32 * MIB, 32 << 10):
            f.seek(at)
            f.write(b"x" * 4096)
    with server(image).client(contexts=[ALLOCATION]) as c:
        extents = walk(c, c.size)
        assert sum(length for _, length, _ in extents) == 32 * MIB
        for offset, length, status in extents:
            covers_data = offset % (32 << 10) < 4096 or offset // (32 << 10) != (
                (offset + length - 1) // (32 << 10))
            assert not (covers_data and status & NBD_STATE_ZERO)


# 34. Request types (NBD_CMD_CACHE)

@pytest.mark.parametrize("offset, length", [(0, SIZE), (1, 511), (SIZE - 1, 1), (4096, 65536)])
def test_cache_changes_no_data(target, offset, length):
    with target.client() as c:
        c.cache(length, offset)
        assert contents(c) == pattern(0, SIZE)
        c.pwrite(b"x" * 10, offset % 1000)
        assert c.pread(10, offset % 1000) == b"x" * 10


# Oldstyle negotiation

@pytest.fixture
def oldstyle(server, image):
    """The server, which a client of wait_ready() has only connected to."""
    return server(image, "--oldstyle")


def test_oldstyle_greets_with_size_and_flags(oldstyle):
    """Handshake flags MUST NOT be set; no structured replies, so no DF."""
    c = oldstyle.raw()
    assert c.oldstyle_greeting() == 0
    assert (c.size, c.flags) == (SIZE, WRITABLE)
    in_step(c)


def test_oldstyle_readonly_is_told(server, image):
    with server(image, "--oldstyle", "--readonly").client(oldstyle=True) as c:
        assert c.flags == READONLY
        assert c.error_of(NBD_CMD_WRITE, 0, payload=b"x") == NBD_EPERM
        in_step(c)


def test_oldstyle_serves_every_command(oldstyle):
    with oldstyle.client(oldstyle=True) as c:
        c.pwrite(b"x" * 100, 50, NBD_CMD_FLAG_FUA)
        c.zero(20, 60)
        c.cache(4096)
        c.trim(10)
        c.flush()
        assert c.pread(100, 50) == b"x" * 10 + bytes(20) + b"x" * 70
        assert c.error_of(NBD_CMD_READ, 0, 512, NBD_CMD_FLAG_DF) == NBD_EINVAL
        assert c.error_of(NBD_CMD_BLOCK_STATUS, 0, 512) == NBD_EINVAL
        c.disc()


def test_oldstyle_needs_no_word_of_the_client(oldstyle):
    """Requests may follow the greeting at once, in one packet with the next."""
    with oldstyle.client(oldstyle=True) as c:
        for i in range(100):
            c.request(NBD_CMD_READ, i, 100)
        for reply in c.collect_all().values():
            assert reply.data == pattern(reply.request.offset, 100)


@pytest.mark.hazard("a reply stays behind a READ in pieces")
def test_small_read_beside_one_in_pieces_is_answered(server, disk):
    """Both go to workers; the small one is done first, and waits for the end of the other."""
    image = disk(4 * MIB, pattern(0, 4 * MIB))
    s = server(image)
    with s.client() as c:
        for i in range(20):
            evict(image)
            small = c.request(NBD_CMD_READ, 0, 4096)
            large = c.request(NBD_CMD_READ, MIB, 600 * 1024)
            assert c.collect(small).data == pattern(0, 4096)
            assert c.collect(large).data == pattern(MIB, 600 * 1024)
