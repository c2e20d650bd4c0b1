"""What a server takes while it has little to do: memory, the processor, and what
it writes.  tests/footprint.py measures the same, and times, in full."""

import re
import resource
import time
from pathlib import Path

import pytest

from conftest import raise_descriptor_limit, skip
from nbd import *

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
REST = 2                    # seconds without a wake-up: rest
ADDRESS = ["--laddr", "127.0.0.1", "--lport", "0"]
MODES = ["target", "cow-target", "proxy"]
all_modes = pytest.mark.parametrize("mode", MODES)
plain = pytest.mark.skipif(SANITIZED, reason="a sanitizer has memory and threads of its own")


@pytest.fixture
def start(server, tmp_path):
    """start(mode, image): a server; a proxy's origin is a target."""
    def run(mode, image):
        if mode != "proxy":
            return server(args=[f"--{mode}", *ADDRESS, image])
        origin = server(image, "--unix", tmp_path / "origin.sock")
        files = [tmp_path / f"cache.{kind}" for kind in ("img", "map", "ctl")]
        return server(args=["--proxy", *ADDRESS, f"unix:{origin.unix}", *files])

    return run


# Memory

@plain
@all_modes
def test_idle_server_takes_little_memory(start, disk, mode):
    """Most of it is the C library's text, whose share in it differs."""
    s = start(mode, disk(MIB))
    assert s.status("RssAnon") * KIB < 128 * resource.getpagesize()
    assert s.rss() < 4 * MIB


@plain
@all_modes
def test_1000_idle_connections_take_little_memory(start, disk, mode):
    raise_descriptor_limit(1300)
    s = start(mode, disk(MIB))
    s.client().disc()
    before = s.rss()
    for _ in range(1000):
        s.client()
    assert s.rss() - before < 8 * MIB


@plain
def test_large_image_that_was_read_does_not_stay_in_memory(start, disk):
    """Large reads are sent out of a mapping, whose pages count."""
    size = 160 * MIB
    s = start("target", disk(size, sparse=False))
    with s.client() as c:
        for offset in range(0, size, 8 * MIB):
            c.pread(8 * MIB, offset)
        assert s.status("VmHWM") < 64 * KIB


# The processor

def asleep(server):
    """{thread: how often it has gone to sleep}, or None if one is awake."""
    found = {}
    for task in Path(f"/proc/{server.proc.pid}/task").iterdir():
        status = (task / "status").read_text()
        if not re.search(r"^State:\s+S", status, re.M):
            return None
        found[task.name] = int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)[1])
    return found


def are_at_rest(servers):
    """Whether no thread wakes up for a while."""
    before = [asleep(s) for s in servers]
    time.sleep(REST)            # a measurement
    return None not in before and [asleep(s) for s in servers] == before


@plain
def test_nothing_wakes_up_at_rest(start, disk):
    """Not even with clients, when what they did is committed."""
    servers = [start(mode, disk(MIB)) for mode in MODES]
    for s in servers:
        c = s.client()
        c.pread(100 * KIB)
        c.pwrite(b"x" * 5000, 777)
        c.flush()
        c.pwrite(b"x" * 5000, 77777)
    until(lambda: are_at_rest(servers), what="rest", pause=0)


# What is written

def written(server):
    """Bytes, to whatever."""
    try:
        text = Path(f"/proc/{server.proc.pid}/io").read_text()
    except OSError:
        skip("needs /proc/PID/io, of Linux")
    return int(re.search(r"^wchar: (\d+)", text, re.M)[1])


def test_commit_writes_what_has_changed_and_not_the_bitmap(start, disk, tmp_path):
    """Whose size is 64 MiB here."""
    s = start("proxy", disk(TIB))
    with s.client() as c:
        c.flush()
        before = written(s)
        c.pwrite(b"x" * 4096, TIB // 2)
        c.flush()
        assert written(s) - before < 64 * KIB
    assert (tmp_path / "cache.map").stat().st_size > 64 * MIB
