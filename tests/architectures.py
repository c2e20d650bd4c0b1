"""Files that one build of the programs writes are read by every other: overlays, caches,
and their bitmap files.  Run by tests/portability, which names the builds in XNBD_BUILDS."""

import os
import subprocess
from pathlib import Path

import pytest

import conftest
from conftest import Server, end_all
from nbd import *

MIB, BLOCK = 1 << 20, 4096
SIZE = 12 * MIB + 77                    # a map of several words, and a ragged end
CONTENT = pattern(0, SIZE)
BUILDS = [Path(b) for b in os.environ["XNBD_BUILDS"].split()]
pairs = pytest.mark.parametrize("writer, reader",
                                [p for b in BUILDS[1:] for p in ((BUILDS[0], b), (b, BUILDS[0]))],
                                ids=lambda build: build.name)


@pytest.fixture
def built(tmp_path, monkeypatch):
    """built(build, *arguments): starts that build's server, as `server` does."""
    started = []

    def start(build, *arguments):
        monkeypatch.setattr(conftest, "SERVER", str(build / "run/xnbd-server"))
        one = Server(arguments, tmp_path, len(started), {})
        started.append(one)
        return one.wait_ready()

    yield start
    end_all(started)


@pytest.fixture
def image(disk):
    return disk(content=CONTENT)


def change(c, seed):
    """Changes some of the disk; returns what it is then: parts of blocks, many blocks,
    the last block."""
    content = bytearray(c.pread(SIZE))
    for at, length in [(5000 * seed, 100), (MIB * seed, 2 * MIB), (SIZE - seed, seed),
                       (11 * MIB + seed * BLOCK, BLOCK)]:
        c.pwrite(content_of := pattern(at, length, seed), at)
        content[at:at + length] = content_of
    c.zero(10 * BLOCK, 8 * MIB + seed * BLOCK)
    content[8 * MIB + seed * BLOCK:8 * MIB + (seed + 10) * BLOCK] = bytes(10 * BLOCK)
    return bytes(content)


def cow(built, build, image, overlay):
    return built(build, "--cow-target", "--unix", f"{overlay}.sock", "--cow-file", overlay, image)


@pairs
def test_overlay_goes_from_one_to_the_other_and_back(built, image, tmp_path, writer, reader):
    """After a good end, and after kill -9."""
    overlay, expected = tmp_path / "overlay", CONTENT
    for seed, (build, leave) in enumerate([(writer, Server.stop), (reader, Server.kill),
                                           (writer, Server.kill), (reader, Server.stop)], 1):
        s = cow(built, build, image, overlay)
        with s.client() as c:
            assert c.pread(SIZE) == expected
            expected = change(c, seed)
            if leave is Server.stop:
                c.flush()
                c.disc()
        leave(s)
    assert cow(built, writer, image, overlay).client().pread(SIZE) == expected


def proxy(built, build, origin, place):
    return built(build, "--proxy", "--unix", place / "proxy.sock", f"unix:{origin}",
                 place / "cache", place / "map", place / "ctl")


def control(build, command, place):
    return subprocess.run([build / "run/xnbd-bgctl", command, place / "ctl"], check=True,
                          stdout=subprocess.PIPE, text=True, timeout=10 * DEADLINE).stdout


def told(build, place):
    """What --query tells, by name."""
    return dict(line.partition(": ")[::2] for line in control(build, "--query", place).splitlines())


@pairs
def test_cache_goes_from_one_to_the_other(built, image, tmp_path, writer, reader):
    """What one has cached the other need not fetch; it makes the copy complete, and either
    build's xnbd-bgctl controls it."""
    origin = tmp_path / "origin.sock"
    built(reader, "--target", "--readonly", "--unix", origin, image)
    s = proxy(built, writer, origin, tmp_path)
    with s.client() as c:
        expected = change(c, 1)
        c.disc()
    cached = told(reader, tmp_path)["cached-blocks"]
    s.stop()
    s = proxy(built, reader, origin, tmp_path)
    assert told(writer, tmp_path)["cached-blocks"] == cached
    with s.client() as c:
        assert c.pread(SIZE) == expected
        assert told(writer, tmp_path)["fetched-bytes"] == "0"
        expected = change(c, 2)
        control(writer, "--cache-all", tmp_path)
        control(reader, "--switch", tmp_path)
        assert c.pread(SIZE) == expected
        c.disc()
    s.stop()
    assert (tmp_path / "cache").read_bytes()[:SIZE] == expected


def test_all_write_the_same_files(built, image, tmp_path):
    found = set()
    for build in BUILDS:
        overlay = tmp_path / build.name
        s = cow(built, build, image, overlay)
        with s.client() as c:
            change(c, 3)
            c.flush()
            c.disc()
        s.stop()
        found.add((overlay.read_bytes(), Path(f"{overlay}.map").read_bytes()))
    assert len(found) == 1
