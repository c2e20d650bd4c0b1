"""Fuzzing: what parses, given inputs that libFuzzer invents (fuzz_*.c).

The corpus begins with seeds that are made here; inputs that once found a
mistake, ours or a planted one, are kept in corpus/ and tried first.  They are
also replayed without libFuzzer, by whatever compiler there is.

XNBD_FUZZ_SECONDS=<seconds> for each target (5); XNBD_SEED=<seed> repeats a run
as far as that can be; XNBD_FUZZ_DIR=<directory> keeps the corpus that grows,
and what was found, there.  "make fuzz" does.
"""

import concurrent.futures
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from conftest import need, skip
from nbd import *
from test_cow import fnv1a
from test_model import random_seed

HERE = Path(__file__).absolute().parent
SECONDS = int(os.environ.get("XNBD_FUZZ_SECONDS") or 5)
# The files that a target is made of, besides its own; longest input.
TARGETS = {
    "server": (["proto.c", "proto_client.c", "util.c"], 4096),
    "origin": (["proto.c", "proto_client.c", "util.c"], 4096),
    "link": (["proto.c", "proto_client.c", "loop.c", "log.c", "util.c"], 1024),
    "ctl": (["stats.c", "log.c", "util.c"], 1024),
    "bitmap": (["log.c", "util.c"], 1024),
}
FLAGS = ["-std=c11", "-D_FILE_OFFSET_BITS=64", "-pthread", "-O1", "-g", "-fno-omit-frame-pointer"]
SANITIZERS = "address,undefined"
GO_DATA = info_data("disk", [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE])
ALLOCATION = "base:allocation"


# Not UTF-8: too long for what they are, surrogates, too large, cut off.
NO_STRINGS = [b"\xc0\xaf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf",
              b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\x80", b"a\xff", b"\xe2\x82", b"\xc3"]


# Seeds: what each of the targets reads, most of it good

def option(number, data=b""):
    return option_header(number, len(data)) + data


def server_seeds():
    """What is done, the exports and their size; then what a client sends."""
    hello = struct.pack(">I", NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)
    metas = [option(number, meta_data("disk", [ALLOCATION, "base:", "x:y"]))
             for number in (NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT)]
    structured = option(NBD_OPT_STRUCTURED_REPLY) + b"".join(metas)
    commands = [(NBD_CMD_READ, 0, 4096, NBD_CMD_FLAG_DF), (NBD_CMD_READ, 512, 4000, 0),
                (NBD_CMD_FLUSH, 0, 0, 0), (NBD_CMD_BLOCK_STATUS, 0, 4096, 8),
                (NBD_CMD_WRITE, 100, 8, NBD_CMD_FLAG_FUA), (NBD_CMD_TRIM, 0, 512, 0),
                (NBD_CMD_WRITE_ZEROES, 0, 4096, 2), (NBD_CMD_CACHE, 0, 1, 0)]
    requests = b"".join(request_header(command, offset, length, flags, cookie=command)
                        + bytes(8) for command, offset, length, flags in commands)
    extended = option(NBD_OPT_EXTENDED_HEADERS) + b"".join(metas)
    extended_requests = b"".join(
        extended_header(command, offset, length, flags, cookie=command) + bytes(8)
        for command, offset, length, flags in [
            *commands, (NBD_CMD_WRITE, 100, 8, NBD_CMD_FLAG_PAYLOAD_LEN),
            (NBD_CMD_READ, 100, 8, NBD_CMD_FLAG_PAYLOAD_LEN), (NBD_CMD_TRIM, 0, 1 << 32, 0),
            (NBD_CMD_BLOCK_STATUS, 0, 1 << 32, 0), (NBD_CMD_WRITE_ZEROES, 1, U64 - 1, 0),
            (NBD_CMD_WRITE, 0, PAYLOAD_MAX + 1, NBD_CMD_FLAG_PAYLOAD_LEN)])
    for size in range(8):
        yield (bytes([4, 6 + 32 * (size % 2), size]) + hello + structured
               + option(NBD_OPT_GO, GO_DATA) + requests)
        yield (bytes([4, 6 + 32 * (size % 2), size]) + hello + extended
               + option(NBD_OPT_GO, GO_DATA) + extended_requests)
    yield bytes([4, 15, 6]) + hello + extended + extended + structured + option(
        NBD_OPT_EXPORT_NAME, b"disk")
    for number in range(12):
        yield bytes([4 + number % 4, 15, 3]) + hello + option(number, GO_DATA) + structured
        yield bytes([3, 15, 3]) + hello + option(number)
    yield bytes([4, 20, 4]) + bytes(4) + option(NBD_OPT_EXPORT_NAME, b"disk") + requests
    yield bytes([4, 31, 4]) + hello + option(NBD_OPT_LIST) + option(NBD_OPT_ABORT)
    yield bytes([4, 7, 4]) + hello + option_header(NBD_OPT_GO, 65537) + GO_DATA
    for what in (0, 1, 2):
        for name in ("disk".encode(), "ärger\u20ac\U0001f600".encode(), *NO_STRINGS):
            yield bytes([what, 6, 3]) + name


def option_reply(number, kind, data=b""):
    return struct.pack(">QIII", OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def chunk(kind, payload=b"", done=False, cookie=1):
    return struct.pack(">IHHQI", NBD_STRUCTURED_REPLY_MAGIC, done, kind, cookie,
                       len(payload)) + payload


def origin_seeds():
    """What is parsed; for a reply, what was asked; then what an origin sends."""
    greeting = struct.pack(">QQH", INIT_PASSWD, IHAVEOPT, 3)
    ack = [option_reply(number, NBD_REP_ACK) for number in range(12)]
    info = option_reply(NBD_OPT_GO, NBD_REP_INFO, struct.pack(">HQH", 0, 1 << 30, 0x10d))
    context = option_reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT,
                           struct.pack(">I", 1) + ALLOCATION.encode())
    for sizes in [(512, 4096, 1 << 25), (0, 4096, 1 << 25), (3, 4096, 1 << 20), (1 << 17,) * 3,
                  (4096, 4096, 512), (1, 512, 2048), (65536, 65536, (1 << 32) - 1)]:
        yield (b"\0" + greeting + ack[NBD_OPT_STRUCTURED_REPLY] + context
               + ack[NBD_OPT_SET_META_CONTEXT] + info + option_reply(
                   NBD_OPT_GO, NBD_REP_INFO, struct.pack(">HIII", 3, *sizes)) + ack[NBD_OPT_GO])
    for what in (0, 2):
        yield (bytes([what]) + greeting + option_reply(
            NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_UNSUP, b"no") + option_reply(
                NBD_OPT_GO, NBD_REP_ERR_UNSUP) + struct.pack(">QH", 1 << 30, 1) + bytes(124))
        yield bytes([what]) + greeting[:16] + struct.pack(">HQH124x", 0, 4096, 1)
        yield bytes([what]) + struct.pack(">QQQI124x", INIT_PASSWD, OLDSTYLE_MAGIC, 4096, 1)
    data = chunk(NBD_REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", 0) + bytes(100))
    hole = chunk(NBD_REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", 100, 100))
    end = chunk(NBD_REPLY_TYPE_NONE, done=True)
    error = chunk(NBD_REPLY_TYPE_ERROR, struct.pack(">IH", 5, 2) + b"no", True)
    extents = chunk(NBD_REPLY_TYPE_BLOCK_STATUS, struct.pack(">5I", 7, 64, 3, 136, 0), True)
    for bits, replies in [(1, data[:28] + hole + end), (1, data[:28] + error), (5, extents),
                          (0, struct.pack(">IIQ", NBD_SIMPLE_REPLY_MAGIC, 0, 1)),
                          (0, struct.pack(">IIQ", NBD_SIMPLE_REPLY_MAGIC, 5, 1))]:
        yield bytes([3, bits, 0, 199, 1]) + replies
    # Chunks: kind, offset, length.
    pieces = b"".join(struct.pack(">BHH", kind, at, 9) for kind, at in
                      [(0, 0), (3, 10), (1, 30), (0, 20), (0x85, 0)])
    yield bytes([5, 1, 0, 39, 1]) + pieces
    yield bytes([5, 1, 15, 255, 1]) + b"".join(struct.pack(">BHH", 0, at, 1)
                                               for at in range(0, 4096, 64))


def link_seeds():
    """What was negotiated; then events: 0 asks, 2 and 3 let bytes arrive, 6 says a chunk of
    a kind, for a request, of a range."""
    ask, send, arrive = bytes([0, 0, 1, 99]), bytes([1, 255]), bytes([3])

    def reply(kind, number=0, bits=0, *more):
        return bytes([6, kind, number, bits, *more])

    data, hole, end, error, status = 0, 3, 4, 5, 6
    yield b"\1" + ask * 2 + send + reply(8 | data, 1) + reply(8 | data, 0) + arrive
    yield (b"\1" + bytes([0, 10, 2, 0, 99, 99]) + send + reply(data, 0, 2) + reply(
        data, 0, 1, 0, 25) + reply(end) + bytes([2, 99, 2, 1]) * 3 + arrive)
    yield b"\1" + ask + reply(data, 0, 2) + reply(8 | hole, 0, 1, 0, 50) + arrive
    yield (b"\1" + ask * 3 + reply(8 | error, 1) + reply(64 | 8 | error, 2) + arrive
           + bytes([5, 200]))
    yield (b"\3" + bytes([0, 7, 1, 255])
           + reply(8 | 64 | status, 0, 0, 0, 9, 3, 0, 99, 0, 1, 0, 2) + arrive)
    yield (b"\3" + ask + bytes([0, 1, 1, 255]) + reply(8 | 224 | status, 1, 0, *[0, 9, 3] * 8)
           + arrive)
    yield b"\0" + ask + reply(7) + arrive + ask + reply(64, 1) + arrive + bytes([2, 255])


def ctl_seeds():
    """Events, each a byte for its kind and one for whom it concerns."""
    def send(line):
        return bytes([13, 0, len(line)]) + line

    arrive = bytes([0, 0, 255])
    yield arrive + send(b"help\nquery\r\nbogus\nswitch now\n") + bytes([3, 0])
    yield arrive + send(b"cache-all 7\n") + bytes([8, 3, 5, 0]) + send(b"stop-copy\n")
    yield arrive + send(b"cache-all2\ncache-all 1") + bytes([5, 1, 8, 9]) + send(b"\n")
    yield arrive + send(b"switch force\nquery\n") + bytes([2, 3, 6, 3, 1, 0])
    yield arrive + send(b"reconnect h 1 an export\n") + bytes([7, 1, 4, 0])
    yield arrive * 2 + send(b"query\n") + bytes([13, 1, 6]) + b"query\n" + bytes([16, 0] * 2)
    yield arrive + send(b"snapshot\nsnapshot\n") + bytes([17, 1, 17, 2, 17, 1, 17, 0])
    yield arrive * 18 + bytes([11, 0, 24, 11, 0, 9, 9, 1, 9, 0])


def bitmap_seeds():
    """What is done, how much of the header is mended, the disk; then the file, and in its
    last 64 bytes what happens to the bitmap."""
    def header(size, kind=2, boot=b"b" * 16, version=2, flags=0):
        h = struct.pack("<8sIIQQQ16sII", b"xnbdbmap", version, kind, 4096, size, 0, boot, 1, flags)
        h += struct.pack("<QQ", 5, 6) if version > 1 else b""
        return (h + struct.pack("<Q", fnv1a(h))).ljust(4096, b"\0")

    def bits(first, count):
        return bytes([0]) + struct.pack(">IH", first, count)[1:]

    def ends(how):
        return bytes([6 + 8 * how])

    commit, complete, note, fails = b"\3", b"\4", b"\5", b"\13"
    kill, power_cut, failure, remount = map(ends, range(4))
    lives = [bits(1, 3) + kill + commit + bits(9, 1) + power_cut + bits(5, 1),
             note + bits(0, 200) + commit + bits(201, 9) + power_cut + note + bits(7, 7) + kill,
             bits(3, 5) + fails + failure + bits(40, 3) + commit + kill + remount,
             bits(3, 5) + remount + bits(40, 3) + complete + power_cut + bits(1, 1) + commit,
             b"\14" + bits(3, 5) + kill + complete + kill, commit + bits(32767, 3) + power_cut]
    lives = [life.ljust(64, commit) for life in lives]
    for blocks, tail in [(1, 0), (200, 77), (224 + 16, 1), (255, 4095)]:
        disk = bytes([blocks]) + struct.pack(">H", tail)
        for mended in (0x0f, 0x0b, 0x4b, 0x4f, 0x2f, 0x1f, 0x07, 0x8f, 0xcf):
            for i, (what, empty) in enumerate([(0, 0x15), (16, 0x15), (64, 0x2a), (176, 0x2a)]):
                yield (bytes([what, mended]) + disk + bytes([0, empty]) + b"\x5a\xff\0\x01" * 16
                       + lives[(i + mended) % len(lives)])
        for life in lives:
            yield bytes([2, 0x0f]) + disk + bytes([0]) + life
    disk = 200 * 4096 - 77
    for contents in (header(disk) + b"\xff" * 8192, header(disk, 1) + bytes(8192), bytes(100),
                     header(disk, version=1) + b"\xff" * 8192,
                     header(disk, version=3) + bytes(8192), header(disk, flags=3) + bytes(4096),
                     header(disk)[:87]):
        for what in (0, 2):
            yield bytes([what, 0x10, 200, 0, 77, 0]) + contents
    for life in lives:
        yield bytes([12, 0, 100, 0, 0, 0]) + life

SEEDS = {"server": server_seeds, "origin": origin_seeds, "link": link_seeds, "ctl": ctl_seeds,
         "bitmap": bitmap_seeds}


def make_seeds(target, directory):
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]()):
        (directory / f"seed-{number:02}").write_bytes(seed)


def dictionary(target, path):
    """The words that a target knows, for libFuzzer to put into its inputs."""
    words = {
        "server": [struct.pack(">Q", IHAVEOPT), struct.pack(">I", NBD_REQUEST_MAGIC),
                   struct.pack(">I", NBD_EXTENDED_REQUEST_MAGIC),
                   *(struct.pack(">I", number) for number in range(1, 12)), b"base:",
                   ALLOCATION.encode(), b"disk", b"\0\0\0\4disk", *NO_STRINGS],
        "origin": [struct.pack(">Q", number) for number in
                   (INIT_PASSWD, IHAVEOPT, OLDSTYLE_MAGIC, OPTION_REPLY_MAGIC)]
        + [struct.pack(">I", number) for number in (
            NBD_SIMPLE_REPLY_MAGIC, NBD_STRUCTURED_REPLY_MAGIC, NBD_REP_ERR_UNSUP, NBD_OPT_GO)]
        + [ALLOCATION.encode()],
        "ctl": [b"help\n", b"query\n", b"cache-all", b"cache-all2", b"stop-copy\n", b"snapshot\n",
                b"switch", b" force\n", b"reconnect ", b"unix:", b"\r\n", b" "],
        "link": [struct.pack(">I", NBD_STRUCTURED_REPLY_MAGIC)],
        "bitmap": [b"xnbdbmap", b"\3", b"\4", b"\6", b"\x0e", b"\x16", b"\x1e"],
    }[target]
    path.write_text("".join('"%s"\n' % "".join(f"\\x{byte:02x}" for byte in word)
                            for word in words))
    return path


# Programs

def build(compiler, target, output, *options):
    """Compiles a target; whether that was possible."""
    sources = [HERE / f"fuzz_{target}.c", *(HERE.parent / name for name in TARGETS[target][0])]
    done = subprocess.run([compiler, *FLAGS, *options, "-o", output, *sources],
                          stderr=subprocess.PIPE, text=True)
    return done.returncode == 0 or done.stderr


def sanitizers(kinds=SANITIZERS):
    return [f"-fsanitize={kinds}", "-fno-sanitize-recover=undefined"]


class Fuzzer:
    """A target that libFuzzer runs."""

    def __init__(self, clang, target, directory, artifacts):
        self.clang, self.target = clang, target
        self.program = directory / f"fuzz-{target}"
        self.corpus = artifacts / "corpus" / target
        self.found = artifacts / "found"

    def run(self, seed, stopped):
        """Builds it, and lets it run, if nobody has interrupted the tests; a CompletedProcess."""
        self.found.mkdir(parents=True, exist_ok=True)
        make_seeds(self.target, self.corpus)
        built = build(self.clang, self.target, self.program,
                      *sanitizers("fuzzer," + SANITIZERS))
        assert built is True and not stopped.is_set(), built
        words = dictionary(self.target, self.program.with_suffix(".dict"))
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryDirectory(dir=memory) as scratch:
            return subprocess.run(
                [self.program, f"-max_total_time={SECONDS}", f"-seed={seed % (1 << 32) or 1}",
                 f"-max_len={TARGETS[self.target][1]}", f"-dict={words}", "-timeout=60",
                 "-rss_limit_mb=4096", "-use_value_profile=1", "-reload=0", "-print_final_stats=1",
                 f"-artifact_prefix={self.found}/{self.target}-", self.corpus,
                 HERE / "corpus" / self.target],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                env={**os.environ, "TMPDIR": scratch}, stdin=subprocess.DEVNULL)


def need_libfuzzer(clang, directory):
    """Skips if it is not installed: it is no part of clang."""
    source = directory / "nothing.c"
    source.write_text("int LLVMFuzzerTestOneInput(void) { return 0; }\n")
    if subprocess.run([clang, *sanitizers("fuzzer," + SANITIZERS), "-o", directory / "nothing",
                       source], stderr=subprocess.DEVNULL).returncode:
        skip("needs clang's libFuzzer (libclang-rt-dev)")


@pytest.fixture(scope="module")
def fuzzing(request, tmp_path_factory):
    """fuzzing(target): the CompletedProcess of its fuzzer.  Two are run at the same time."""
    clang = need("clang", "clang")
    directory = tmp_path_factory.mktemp("fuzz")
    need_libfuzzer(clang, directory)
    artifacts = Path(os.environ.get("XNBD_FUZZ_DIR") or directory).resolve()
    seed, stopped = random_seed(), threading.Event()
    wanted = {item.callspec.params["target"] for item in request.session.items
              if item.originalname == "test_no_input_is_a_finding"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = {target: pool.submit(Fuzzer(clang, target, directory, artifacts).run, seed,
                                       stopped) for target in TARGETS if target in wanted}
        yield lambda target: running[target].result()
        stopped.set()
        pool.shutdown(cancel_futures=True)


@pytest.mark.limit(120 + 3 * SECONDS * len(TARGETS))
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_is_a_finding(fuzzing, target):
    """Neither a crash, nor a sanitizer's report, nor one of the target's assertions."""
    done = fuzzing(target)
    assert done.returncode == 0, done.stdout[-6000:]
    print(*re.findall(r"#\d+\tDONE.*|stat::.*", done.stdout), sep="\n")
    assert "stat::number_of_executed_units: " in done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs_and_seeds_are_no_findings(target, tmp_path):
    """Without libFuzzer, and with what sanitizers the compiler has."""
    compiler = next(filter(None, map(shutil.which, ["cc", "gcc", "clang"])), None)
    if not compiler:
        skip("needs a C compiler")
    program, driver = tmp_path / "replay", HERE / "fuzz_replay.c"
    if build(compiler, target, program, driver, *sanitizers()) is not True:
        built = build(compiler, target, program, driver)
        assert built is True, built
    make_seeds(target, tmp_path / "seeds")
    kept = HERE / "corpus" / target
    inputs = [*sorted((tmp_path / "seeds").iterdir()), *sorted(kept.iterdir())]
    done = subprocess.run([program, *inputs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-6000:]
    assert done.stdout.count("\n") == len(inputs), done.stdout[-6000:]
