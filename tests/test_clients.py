"""Real clients, over TCP and Unix sockets: what our own client cannot check.

Each talks to the server as it likes to; what it read, and what it left in the
image after the server has ended, is compared here.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import make_disk, need, need_module, need_punch
from nbd import DEADLINE, SANITIZED, pattern

MIB, GIB = 1 << 20, 1 << 30
SIZE = 8 * MIB + 512            # qemu rounds sizes up to whole sectors
RAGGED = 3 * MIB + 77
DATA = pattern(0, SIZE)
PATIENCE = 3 * DEADLINE         # seconds for one run of a program


@pytest.fixture(params=["tcp", "unix"])
def serve(request, server, tmp_path):
    """serve(image, *options): a server on TCP or on a Unix socket."""
    def start(image, *options):
        path = tmp_path / f"{image.name}.sock"
        return server(image, *(["--unix", path] if request.param == "unix" else []), *options)

    return start


def tool(package, program, *arguments, status=0, **kw):
    """Runs a client to its end, which must be good; returns its output."""
    command = [need(program, package), *map(str, arguments)]
    done = subprocess.run(command, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                                      "stderr": subprocess.STDOUT, "text": True,
                                      "timeout": PATIENCE, **kw})
    assert done.returncode == status, f"{command}:\n{done.stdout}"
    return done.stdout


def mixed(disk, size=SIZE):
    """An image with data, allocated zeros and holes, and its content."""
    image = disk(size)
    content = bytearray(size)
    with open(image, "r+b") as f:
        for at, data in [(0, pattern(0, MIB)), (2 * MIB, bytes(MIB)),
                         (size - 1000, pattern(size - 1000, 1000))]:
            f.seek(at)
            f.write(data)
            content[at:at + len(data)] = data
    return image, bytes(content)


def allocated(image):
    return image.stat().st_blocks * 512


# qemu

def qemu_img(*arguments, **kw):
    return tool("qemu-utils", "qemu-img", *arguments, **kw)


def qemu_io(uri, *commands, **kw):
    words = [word for c in commands for word in ("-c", c)]
    text = tool("qemu-utils", "qemu-io", "-f", "raw", "-d", "unmap", *words, uri, **kw)
    assert "ailed" not in text, text
    return text


@pytest.mark.parametrize("size", [0, 512, 4097, SIZE, 5 << 40])
def test_qemu_img_info_tells_the_size(serve, disk, size):
    told = json.loads(qemu_img("info", "--output=json", serve(disk(size)).uri))
    assert told["virtual-size"] == -(-size // 512) * 512
    assert told["format"] == "raw"


def test_qemu_img_converts_in(serve, disk, tmp_path):
    source = make_disk(tmp_path / "source", content=DATA)
    image = disk(content=b"\xff" * SIZE)
    s = serve(image)
    qemu_img("convert", "-n", "-f", "raw", "-O", "raw", source, s.uri)
    s.stop()
    assert image.read_bytes() == DATA


def test_qemu_img_converts_a_sparse_image_in(serve, disk, tmp_path):
    """Zeros become holes."""
    need_punch(tmp_path)
    source = make_disk(tmp_path / "source", 64 * MIB, content=DATA)
    image = disk(content=b"\xff" * (64 * MIB))
    s = serve(image)
    qemu_img("convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", source, s.uri)
    s.stop()
    assert image.read_bytes() == DATA + bytes(64 * MIB - SIZE)
    assert allocated(image) < 2 * SIZE


@pytest.mark.parametrize("options", [[], ["-W", "-m", "16"]], ids=" ".join)
def test_qemu_img_converts_out(serve, disk, tmp_path, options):
    image, content = mixed(disk)
    qemu_img("convert", *options, "-f", "raw", "-O", "raw", serve(image).uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
    assert allocated(tmp_path / "out") < 3 * MIB


def test_qemu_img_converts_to_qcow2_and_back(serve, disk, tmp_path):
    image, content = mixed(disk)
    other = disk(content=b"\xff" * SIZE)
    there = serve(other)
    qemu_img("convert", "-O", "qcow2", serve(image).uri, tmp_path / "q")
    qemu_img("convert", "-n", "-f", "qcow2", "-O", "raw", tmp_path / "q", there.uri)
    there.stop()
    assert other.read_bytes() == content


def test_qemu_img_compares(serve, disk, tmp_path):
    image, content = mixed(disk)
    uri = serve(image).uri
    same = make_disk(tmp_path / "same", content=content)
    other = make_disk(tmp_path / "other", content=content[:-1] + b"?")
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", "raw", same, uri)
    assert "mismatch" in qemu_img("compare", "-f", "raw", "-F", "raw", other, uri, status=1)


def test_qemu_img_maps_holes(serve, disk, tmp_path):
    need_punch(tmp_path)
    image, content = mixed(disk)
    extents = json.loads(qemu_img("map", "--output=json", "-f", "raw", serve(image).uri))
    assert sum(e["length"] for e in extents) == SIZE
    assert any(e["zero"] for e in extents)
    for e in extents:
        part = content[e["start"]:e["start"] + e["length"]]
        assert not e["zero"] or not part.strip(b"\0")


def test_qemu_io_verifies_patterns(serve, disk):
    """At offsets and of lengths that suit nobody; -b and -C among them."""
    image = disk(content=b"\x11" * SIZE)
    s = serve(image)
    qemu_io(s.uri, "read -P 0x11 0 8M", "write -P 0x5a 1 511", "write -P 0x6b 4095 2",
            "write -P 0x7c 65535 131073", "write -f -P 0x8d 3M 1M", "flush",
            "read -P 0x11 0 1", "read -P 0x5a 1 511", "read -P 0x11 512 3583",
            "read -P 0x6b 4095 2", "read -P 0x11 4097 61438", "read -P 0x7c 65535 131073",
            "read -P 0x8d 3M 1M", "aio_write -P 0x9e 5M 1M", "aio_read -P 0x11 7M 512k",
            "aio_flush", "read -P 0x9e 5M 1M", "readv -P 0x8d 3M 4k 64k 1 511")
    expected = bytearray(b"\x11" * SIZE)
    for at, length, byte in [(1, 511, 0x5a), (4095, 2, 0x6b), (65535, 131073, 0x7c),
                             (3 * MIB, MIB, 0x8d), (5 * MIB, MIB, 0x9e)]:
        expected[at:at + length] = bytes([byte]) * length
    s.stop()
    assert image.read_bytes() == expected


def test_qemu_io_zeroes_and_discards(serve, disk, tmp_path):
    need_punch(tmp_path)
    image = disk(content=b"\x11" * SIZE)
    s = serve(image)
    qemu_io(s.uri, "write -z 1 511", "write -z -u 64k 1M", "write -z -n -u 2M 1M",
            "write -z -f 4097 4095", "discard 4M 2M", "flush",
            "read -P 0x11 0 1", "read -P 0 1 511", "read -P 0 64k 1M", "read -P 0 2M 1M",
            "read -P 0 4097 4095", "read -P 0 4M 2M", "read -P 0x11 6M 2M")
    s.stop()
    data = image.read_bytes()
    assert data[6 * MIB:] == b"\x11" * (SIZE - 6 * MIB) and data[0] == 0x11
    assert not data[4 * MIB:6 * MIB].strip(b"\0")
    assert allocated(image) < SIZE - 3 * MIB


def test_qemu_io_may_not_write_a_readonly_export(serve, disk):
    s = serve(disk(content=DATA), "--readonly")
    text = tool("qemu-utils", "qemu-io", "-f", "raw", "-c", "write 0 512", s.uri, status=1)
    assert "ermission denied" in text
    text = tool("qemu-utils", "qemu-io", "-r", "-f", "raw", "-c", "read 1 8M", s.uri)
    assert f"read {SIZE - 512}/{SIZE - 512} bytes" in text


def test_qemu_reaches_an_oldstyle_server_by_no_name_only(serve, disk):
    told = json.loads(qemu_img("info", "--output=json", serve(disk(SIZE), "--oldstyle").uri))
    assert told["virtual-size"] == SIZE


# libnbd's tools

def nbdinfo(*arguments):
    return tool("libnbd-bin", "nbdinfo", *arguments)


def test_nbdinfo_tells_what_is_exported(serve, disk):
    s = serve(disk(RAGGED, name="some.img"))
    told = json.loads(nbdinfo("--json", s.uri))
    assert told["protocol"] == "newstyle-fixed" and told["structured"] is True
    export, = told["exports"]
    wanted = {"export-name": "", "description": "some.img", "export-size": RAGGED,
              "is_read_only": False, "is_rotational": False, "can_cache": True, "can_df": True,
              "can_fast_zero": True, "can_flush": True, "can_fua": True, "can_multi_conn": True,
              "can_trim": True, "can_zero": True, "block_size_minimum": 1,
              "block_size_preferred": 4096, "block_size_maximum": 32 * MIB}
    assert {k: export[k] for k in wanted} == wanted
    assert export["contexts"] == ["base:allocation"]


def test_nbdinfo_lists_the_default_export(serve, disk):
    told = json.loads(nbdinfo("--list", "--json", serve(disk(RAGGED)).uri))
    assert [e["export-name"] for e in told["exports"]] == [""]
    assert told["exports"][0]["export-size"] == RAGGED


@pytest.mark.parametrize("option", ["read", "write", "flush", "fua", "trim", "zero", "cache",
                                    "df", "fast-zero", "multi-conn", "structured-reply"])
def test_nbdinfo_finds_every_capability(server, disk, option):
    nbdinfo("--can", option, server(disk(SIZE)).uri)


def test_nbdinfo_sees_a_readonly_export(serve, disk):
    nbdinfo("--is", "read-only", serve(disk(SIZE), "--readonly").uri)


def test_nbdinfo_maps_holes(serve, disk, tmp_path):
    need_punch(tmp_path)
    image, content = mixed(disk, RAGGED)
    extents = json.loads(nbdinfo("--map", "--json", serve(image).uri))
    assert sum(e["length"] for e in extents) == RAGGED
    assert {e["type"] for e in extents} >= {0, 3}
    for e in extents:
        part = content[e["offset"]:e["offset"] + e["length"]]
        assert not e["type"] & 2 or not part.strip(b"\0")


def nbdcopy(*arguments):
    return tool("libnbd-bin", "nbdcopy", *arguments)


HOW_TO_COPY = [[], ["--synchronous"], ["--connections=4", "--threads=4", "--requests=64"],
               ["--no-extents", "--request-size=4096"], ["--allocated", "--flush"],
               ["--request-size=33554432"]]
copying = pytest.mark.parametrize("options", HOW_TO_COPY, ids=" ".join)


@copying
def test_nbdcopy_in(serve, disk, tmp_path, options):
    source = make_disk(tmp_path / "source", content=pattern(0, RAGGED - MIB) + bytes(MIB))
    image = disk(content=b"\xff" * RAGGED)
    s = serve(image)
    nbdcopy(*options, source, s.uri)
    s.stop()
    assert image.read_bytes() == source.read_bytes()


@copying
def test_nbdcopy_out(serve, disk, tmp_path, options):
    image, content = mixed(disk, RAGGED)
    nbdcopy(*options, serve(image).uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


def test_nbdcopy_keeps_holes(serve, disk, tmp_path):
    need_punch(tmp_path)
    image = disk(GIB, content=DATA)
    nbdcopy(serve(image).uri, tmp_path / "out")
    assert (tmp_path / "out").stat().st_size == GIB
    assert allocated(tmp_path / "out") < 2 * SIZE


def test_nbdcopy_from_server_to_server(serve, disk):
    image, content = mixed(disk, RAGGED)
    other = disk(content=b"\xff" * RAGGED)
    there = serve(other)
    nbdcopy("--connections=4", serve(image).uri, there.uri)
    there.stop()
    assert other.read_bytes() == content


# libnbd from Python

def shell_environment():
    """nbdsh takes the first python3; the one that has libnbd is ours."""
    directory = os.path.dirname(sys.executable)
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}


def test_nbdsh_reads_and_writes(serve, disk):
    need_module("nbd", "python3-libnbd")
    image = disk(RAGGED)
    s = serve(image)
    commands = ["h.pwrite(b'hello', 4093)", "h.flush()",
                "print(h.get_size(), bytes(h.pread(7, 4092)), h.get_protocol())",
                "h.zero(5, 4093, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)",
                "h.pwrite(b'bye', h.get_size() - 3, nbd.CMD_FLAG_FUA)"]
    told = tool("python3-libnbd", "nbdsh", "-u", s.uri, *[w for c in commands for w in ("-c", c)],
                env=shell_environment(), cwd="/")      # tests/nbd.py is no libnbd
    assert told.split("\n")[0] == f"{RAGGED} {bytes(1) + b'hello' + bytes(1)} newstyle-fixed"
    s.stop()
    assert image.read_bytes() == bytes(RAGGED - 3) + b"bye"


# Runs in a process of its own: in this one, `nbd` is the tests' raw client.
STRESS = r"""
import nbd, random, sys
uri, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng, disk, handles = random.Random(seed), bytearray(size), []
for i in range(4):
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_request_structured_replies(i != 3)
    h.connect_uri(uri)
    handles.append(h)
assert handles[0].get_size() == size and handles[0].can_multi_conn()
assert handles[0].get_structured_replies_negotiated()
assert not handles[3].get_structured_replies_negotiated()

def wait(h):
    while h.aio_in_flight():
        h.poll(-1)

def chunk(data, offset, status, error):
    assert error.value == 0 and status in (nbd.READ_DATA, nbd.READ_HOLE)
    got[offset] = len(data)

for turn in range(40):
    h = handles[turn % 4]
    place = 0
    while place < size:                     # 64 KiB at most each, none overlaps
        length = min(rng.randrange(1, 65537), size - place)
        kind = rng.randrange(4)
        if kind == 0:
            data = rng.randbytes(length)
            h.aio_pwrite(nbd.Buffer.from_bytearray(data), place)
            disk[place:place + length] = data
        elif kind == 1:
            h.aio_zero(length, place, flags=rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
            disk[place:place + length] = bytes(length)
        elif kind == 2:
            h.aio_cache(length, place)
        place += length
        while h.aio_in_flight() > 50:
            h.poll(-1)
    wait(h)
    h.flush()
    reader, offset = handles[(turn + 1) % 4], rng.randrange(size - 100000)
    assert reader.pread(100000, offset) == disk[offset:offset + 100000]
    if reader.can_df():
        got = {}        # by offset: the length of each chunk
        assert reader.pread_structured(100000, offset, chunk) == disk[offset:offset + 100000]
        assert sum(got.values()) == 100000
        assert reader.pread_structured(50000, offset, chunk, nbd.CMD_FLAG_DF) == (
            disk[offset:offset + 50000])
        found = []
        reader.block_status(size, 0, lambda context, at, entries, error:
                            found.append((context, at, list(entries))))
        (context, at, entries), = found
        for length, flags in zip(entries[::2], entries[1::2]):
            part = disk[at:at + length]
            assert not flags & nbd.STATE_ZERO or not part.strip(b"\0")
            at += length
for call, error in [(lambda: h.pread(2, size - 1), "EINVAL"),
                    (lambda: h.pwrite(b"ab", size - 1), "ENOSPC"),
                    (lambda: h.zero(2, size - 1), "ENOSPC")]:
    h.set_strict_mode(0)
    try:
        call()
        raise SystemExit(error + " was expected")
    except nbd.Error as e:
        assert e.errno == error, e
for h in handles:
    assert h.pread(size, 0) == disk
    h.shutdown()
sys.stdout.write("passed")
"""


def test_libnbd_handles_agree_with_a_model(serve, disk):
    """Four handles, one without structured replies, up to 50 requests in flight."""
    need_module("nbd", "python3-libnbd")
    s = serve(disk(RAGGED))
    done = subprocess.run([sys.executable, "-c", STRESS, s.uri, str(RAGGED), "1"], cwd="/",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=PATIENCE)
    assert done.returncode == 0 and done.stdout == "passed", done.stdout


# fio

FIO_SIZE = 16 if SANITIZED else 48      # MiB, of all jobs together


def fio(server, *options):
    """Three jobs, each with its own third of the disk and its own connection."""
    job = ["--name=job", "--ioengine=nbd", f"--uri={server.uri}", "--numjobs=3",
           f"--size={FIO_SIZE // 3}m", f"--offset_increment={FIO_SIZE // 3}m", "--iodepth=32",
           "--randseed=1", "--thread", "--group_reporting", "--minimal", *options]
    text = tool("fio", "fio", *job, cwd=server.stderr.parent)    # it leaves files there
    assert not re.search("verify|error|fail", text), text


VERIFY = ["--verify=crc32c-intel", "--verify_fatal=1", "--verify_backlog=256"]


@pytest.mark.parametrize("options", [
    ["--rw=randwrite", "--bs=4k"], ["--rw=randwrite", "--bsrange=512-64k", "--blockalign=512"],
    ["--rw=randrw", "--bs=16k"], ["--rw=write", "--bs=256k"]],
    ids=lambda options: " ".join(options))
def test_fio_verifies_what_it_wrote(serve, disk, options):
    need("fio", "fio")
    s = serve(disk(FIO_SIZE * MIB))
    fio(s, *options, *VERIFY)
    s.stop()


def test_fio_trims_among_writes(serve, disk):
    s = serve(disk(content=b"\x5a" * (FIO_SIZE * MIB)))
    fio(s, "--rw=randtrim", "--bs=64k")
    s.stop()


# nbd-client

def test_nbd_client_lists_the_default_export(serve, disk):
    s = serve(disk(SIZE))
    where = ["-unix", s.unix] if s.unix else ["127.0.0.1", s.port]
    told = tool("nbd-client", "nbd-client", "-l", *where, stderr=subprocess.DEVNULL)
    assert re.fullmatch(r"(Negotiation: \.\.)?\n?: .*\n", told), told     # ": " and a description
    assert s.is_served()
