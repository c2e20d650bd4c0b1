"""Copy on write: the base never changes, and what was written is there.

With --cow-file the overlay outlives the server.  What must be true of it after
kill -9 and after a power cut is tested by killing the server, and by doing to
the two files what a power cut may do; xnbd-bitmap(5) tells their format.  What
is on the disk is only ever learnt by reading through NBD.
"""

import contextlib
import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from conftest import is_portable, make_disk, need, need_holes, need_module, need_punch, skip
from nbd import *
from test_model import (ALLOCATION, DISKS, SECONDS, Model, dialect, exercise, extents, random_seed,
                        written_parts)
from test_service import bound_by_modes
from test_snapshot import UNIT, Load, Numbered, file_system, leave, names

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4096
ADDRESS = ["--laddr", "127.0.0.1", "--lport", "0"]
DATA, HOLE = 0, NBD_STATE_HOLE | NBD_STATE_ZERO
hazard = pytest.mark.hazard


# Servers and images

@pytest.fixture
def cow(server):
    """cow(base, *options, **keywords): starts a server with --cow-target."""
    def start(base, *options, **keywords):
        return server(args=["--cow-target", *ADDRESS, *options, base], **keywords)

    return start


@pytest.fixture(params=["throw-away", "kept"])
def either(cow, tmp_path, request):
    """The same, with an overlay that is thrown away, and with one that is kept."""
    kept = request.param == "kept"
    place = ["--cow-file", tmp_path / "overlay"] if kept else []

    def start(base, *options, **keywords):
        return cow(base, *place, *options, **keywords)

    start.kept = kept
    return start


def digest(path):
    """Of a file's data, where that lies, and its times."""
    status, found = path.stat(), hashlib.sha256()
    with open(path, "rb") as f:
        for start, end, hole in extents(f.fileno(), status.st_size):
            found.update(f"{start} {end} {hole}".encode())
            for at in range(start, end if not hole else start, MIB):
                found.update(os.pread(f.fileno(), min(MIB, end - at), at))
    return status.st_size, status.st_mtime_ns, found.hexdigest()


@pytest.fixture
def base(disk):
    """base(...) makes an image as disk(...) does; the test fails if it changes."""
    made = {}

    def make(*args, **keywords):
        path = disk(*args, **keywords)
        made[path] = digest(path)
        return path

    yield make
    assert {path: digest(path) for path in made} == made, "the base has changed"


@pytest.fixture
def patterned(base):
    return base(content=pattern(0, 4 * MIB + 77))


def overlay_status(server):
    """stat() of the overlay, which has no name."""
    for fd in Path(f"/proc/{server.proc.pid}/fd").iterdir():
        if os.readlink(fd).endswith(" (deleted)"):
            return fd.stat()
    raise AssertionError("no file without a name")


def overlay_bytes(server):
    return overlay_status(server).st_blocks * 512


# Random operations

def connecting(server):
    """For exercise()."""
    return lambda i: server.client(**dialect(i))


def check_through(server, model):
    """Compares the disk, with nothing in flight."""
    with server.client() as c:
        for start, end in written_parts(model):
            read = model.begin_read(start, end - start)
            model.end_read(read, c.pread(end - start, start))


@pytest.mark.limit(120 + 2 * int(SECONDS))
@pytest.mark.parametrize("size", DISKS.values(), ids=DISKS.keys())
def test_random_operations_agree_with_a_model(either, base, size):
    content = pattern(0, min(size, 8 * MIB) // 2)
    image = base(size, content)
    s = either(image)
    model = Model(size, content)
    exercise(connecting(s), model, random_seed(), SECONDS / 3)
    leave(s)
    if either.kept:
        check_through(either(image), model)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4095, 4096, 4097])
def test_random_operations_on_a_small_disk(either, base, size):
    content = pattern(0, size)
    image = base(content=content)
    s = either(image)
    model = Model(size, content)
    exercise(connecting(s), model, random_seed(), min(SECONDS, 0.2))
    leave(s)
    if either.kept:
        check_through(either(image), model)


def exercise_and_kill(server, model, seconds):
    """kill -9 with operations in flight: each may have been done or not."""
    killer = threading.Timer(seconds, server.kill)
    killer.start()
    try:
        with pytest.raises(ConnectionError):
            exercise(connecting(server), model, random_seed(), DEADLINE)
    finally:
        killer.join()
    model.reads.clear()             # their answers will not come


@hazard("kill -9 loses what was acknowledged")
def test_kill_loses_nothing_that_was_acknowledged(cow, base, tmp_path):
    """The model lives on, from server to server."""
    content = pattern(0, 4 * MIB)
    image = base(DISKS["ragged"], content)
    model = Model(DISKS["ragged"], content)
    for i in range(4):
        s = cow(image, "--cow-file", tmp_path / "overlay")
        check_through(s, model)
        exercise_and_kill(s, model, 0.3 + 0.2 * i)
    check_through(cow(image, "--cow-file", tmp_path / "overlay"), model)


# Nothing is left behind

@hazard("overlay left behind after kill -9")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT,
                                    signal.SIGABRT, signal.SIGVTALRM])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["beside", "--cow-dir"])
def test_overlay_has_no_name_from_the_beginning(cow, patterned, tmp_path, number, elsewhere):
    other = tmp_path / "other"
    other.mkdir()
    before = names(patterned)
    s = cow(patterned, *["--cow-dir", other] * elsewhere)
    with s.client() as c:
        c.pwrite(pattern(0, MIB, seed=1))
        place = other if elsewhere else patterned.parent
        assert overlay_status(s).st_dev == place.stat().st_dev
        assert overlay_status(s).st_mode & 0o7777 == 0o600
        assert names(patterned) == before and not list(other.iterdir())
        s.expected_status = 0 if number in (signal.SIGTERM, signal.SIGINT) else -number
        s.terminate(number)
        s.proc.wait(DEADLINE)
    assert names(patterned) == before and not list(other.iterdir())


def test_kill_in_the_middle_of_load_leaves_no_file(cow, base, tmp_path):
    image = base(DISKS["ragged"], pattern(0, MIB))
    before = names(image)
    exercise_and_kill(cow(image), Model(DISKS["ragged"], pattern(0, MIB)), 0.4)
    assert names(image) == before


def test_failed_start_leaves_no_file(run_server, patterned, tmp_path):
    """Of a throw-away overlay: the address cannot be had."""
    before = names(patterned)
    done = run_server("--cow-target", "--laddr", "192.0.2.1", "--lport", "0", patterned)
    assert done.returncode == 1
    assert names(patterned) == before


def test_overlay_goes_where_cow_dir_says(cow, patterned, file_system):
    """Even to another file system."""
    place = file_system("tmpfs", 8 * MIB)
    with (s := cow(patterned, "--cow-dir", place)).client() as c:
        c.pwrite(pattern(0, MIB, seed=1))
        assert overlay_status(s).st_dev == place.stat().st_dev
        assert c.pread(2 * MIB) == pattern(0, MIB, seed=1) + pattern(MIB, MIB)


def test_each_server_has_an_overlay_of_its_own(cow, patterned):
    a, b = cow(patterned), cow(patterned)
    with a.client() as one, b.client() as two:
        one.pwrite(b"one", 10)
        two.pwrite(b"two", 10)
        assert (one.pread(3, 10), two.pread(3, 10)) == (b"one", b"two")
    assert cow(patterned).client().pread(3, 10) == pattern(10, 3)


# The base

def test_base_on_a_directory_that_cannot_be_written(cow, run_server, tmp_path):
    """The overlay has to go elsewhere then; the refusal says which way."""
    place = tmp_path / "place"
    place.mkdir()
    image = make_disk(place / "base.img", content=pattern(0, MIB))
    image.chmod(0o444)
    place.chmod(0o555)
    done = run_server("--cow-target", *ADDRESS, image, preexec_fn=bound_by_modes)
    refused(done, str(place), "--cow-dir")
    s = cow(image, "--cow-dir", tmp_path, preexec_fn=bound_by_modes)
    with s.client() as c:
        c.pwrite(b"new", 100)
        assert c.pread(MIB) == pattern(0, 100) + b"new" + pattern(103, MIB - 103)


def test_base_on_a_read_only_file_system(cow, file_system, tmp_path):
    place = file_system("tmpfs", 4 * MIB)
    image = make_disk(place / "base.img", content=pattern(0, MIB))
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    for options in ["--cow-dir", tmp_path], ["--cow-file", tmp_path / "overlay"]:
        with cow(image, *options).client() as c:
            c.pwrite(b"new", 100)
            assert c.pread(MIB) == pattern(0, 100) + b"new" + pattern(103, MIB - 103)


def test_base_served_by_a_target_at_the_same_time(either, server, disk):
    """The target's clients see nothing of the overlay, and what they write does
    not change blocks that the overlay has."""
    need_holes()
    content = pattern(0, 4 * MIB + 77)
    image = disk(content=content)
    target, copy = server(image), either(image)
    with target.client() as t, copy.client() as c:
        c.pwrite(pattern(0, MIB, seed=1))
        c.trim(MIB, MIB)
        c.zero(MIB, 2 * MIB)
        c.flush()
        t.flush()
        assert t.pread(t.size) == content
        expected = pattern(0, MIB, seed=1) + bytes(2 * MIB) + content[3 * MIB:]
        assert c.pread(c.size) == expected
        t.pwrite(bytes(3 * MIB))
        assert t.pread(t.size) == bytes(3 * MIB) + content[3 * MIB:]
        assert c.pread(c.size) == expected
    copy.stop()
    target.stop()
    assert image.read_bytes() == bytes(3 * MIB) + content[3 * MIB:]


# Clients at the same time.  Each race: the bytes of a group of blocks, and what
# each client does to which of them at the same moment.

WRITE, ZERO = NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES
RACES = {
    "two halves": (BLOCK, [(WRITE, 0, 2048), (WRITE, 2048, 4096)]),
    "five odd parts": (BLOCK, [(WRITE, 0, 1), (WRITE, 1, 1000), (WRITE, 1000, 1001),
                               (WRITE, 1001, 4095), (WRITE, 4095, 4096)]),
    "runs that meet in a block": (3 * BLOCK, [(WRITE, 100, 6000), (WRITE, 6000, 12000)]),
    "whole and part": (BLOCK, [(WRITE, 0, 4096), (WRITE, 1000, 1100)]),
    "whole and two parts": (BLOCK, [(WRITE, 0, 4096), (WRITE, 0, 1), (WRITE, 4000, 4096)]),
    "whole run and part": (4 * BLOCK, [(WRITE, 0, 4 * BLOCK), (WRITE, 5000, 5001)]),
    "zeroed part and part": (BLOCK, [(ZERO, 0, 2048), (WRITE, 2048, 4096)]),
    "zeroed run and parts": (3 * BLOCK, [(ZERO, 2048, 10000), (WRITE, 0, 2048),
                                         (WRITE, 10000, 12288)]),
    "two zeroed parts": (BLOCK, [(ZERO, 0, 2000), (ZERO, 2000, 4096)]),
    "zeroed whole and part": (2 * BLOCK, [(ZERO, 0, 2 * BLOCK), (WRITE, 3000, 5000)]),
    "neighbours": (8 * BLOCK, [(WRITE, i * BLOCK, (i + 1) * BLOCK) for i in range(8)]),
    "zeroed neighbours": (8 * BLOCK, [((WRITE, ZERO)[i % 2], i * BLOCK, (i + 1) * BLOCK)
                                      for i in range(8)]),
}


def requests_of(client, part, number, places):
    """One client's side of a race: a request for each group, as bytes, in an
    order of its own, so that the clients meet somewhere."""
    command, first, last = part
    sent = []
    for at in random.Random(number).sample(places, len(places)):
        cookie = client.next_cookie = client.next_cookie + 1
        client.expect(cookie, Request(command, at + first, last - first, 0))
        sent.append(request_header(command, at + first, last - first, 0, cookie))
        if command == WRITE:
            sent.append(pattern(at + first, last - first, seed=number))
    return b"".join(sent)


def at_once(actions):
    """Runs all of them at the same moment."""
    barrier = threading.Barrier(len(actions))

    def run(action):
        barrier.wait()
        action()

    threads = [threading.Thread(target=run, args=[a]) for a in actions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def race(clients, parts, places):
    """Each client sends its part of all groups; answered when it returns."""
    out = [requests_of(c, part, i + 1, places)
           for i, (c, part) in enumerate(zip(clients, parts))]
    at_once([lambda c=c, data=data: c.send(data) for c, data in zip(clients, out)])
    for c in clients:
        assert not any(reply.error for reply in c.collect_all().values())


def check_race(got, parts, before, at):
    """Each byte is that of a client who wrote it, or the old one if nobody did.  A payload that
    comes in pieces, which end with blocks, is ordered by piece: so each block has one winner."""
    edges = sorted({*range(0, len(got), BLOCK), len(got),
                    *(e for _, first, last in parts for e in (first, last))})
    for a, b in zip(edges, edges[1:]):
        legal = [pattern(at + a, b - a, seed=i + 1) if command == WRITE else bytes(b - a)
                 for i, (command, first, last) in enumerate(parts) if first <= a and b <= last]
        legal = legal or [before[a:b]]
        assert got[a:b] in legal, (
            f"at {at} the bytes {a} to {b} are {got[a:a + 16].hex()}, and not "
            + " or ".join(v[:16].hex() for v in legal))


@hazard("two clients write the two halves of one fresh block; an aligned write during"
        " another's partial write; a neighbour's bit vanishes")
@pytest.mark.parametrize("state", ["fresh", "written before"])
@pytest.mark.parametrize("name", RACES)
def test_clients_at_the_same_moment_all_win(cow, patterned, name, state):
    """Many groups of blocks, each once while it is fresh."""
    group, parts = RACES[name]
    with (s := cow(patterned)).client() as witness:
        if state != "fresh":
            witness.pwrite(pattern(0, 4 * MIB, seed=0x77))
        before = witness.pread(4 * MIB)
        clients = [s.client() for _ in parts]
        places = range(0, 4 * MIB - group + 1, group)
        for i in range(0, len(places), 64):
            race(clients, parts, places[i:i + 64])
        after = witness.pread(4 * MIB)
    for at in places:
        check_race(after[at:at + group], parts, before[at:at + group], at)


@hazard("marking is not atomic: a neighbour's bit vanishes")
def test_neighbours_marked_at_the_same_moment_all_stay(cow, base):
    """Two clients go through the disk side by side, a block each."""
    blocks = 32 * MIB // BLOCK
    with (s := cow(base(32 * MIB))).client() as witness:
        clients = s.client(), s.client()
        parts = (WRITE, 0, BLOCK), (WRITE, BLOCK, 2 * BLOCK)
        for first in range(0, blocks, 1024):
            race(clients, parts, range(first * BLOCK, (first + 1024) * BLOCK, 2 * BLOCK))
        for at in range(0, 32 * MIB, 8 * MIB):
            data = witness.pread(8 * MIB, at)
            lost = [b for b in range(0, len(data), BLOCK) if not any(data[b:b + 16])]
            assert not lost, f"blocks at {at} + {lost} are as if they were never written"


@hazard("client dies after 4 of 64 KiB: the rest of the range reads as zeros")
def test_reader_beside_a_first_write_finds_old_or_new(cow, patterned):
    """Never zeros: a block is marked after its data is stored, not before."""
    length, some = 128 * KIB, 64
    with (s := cow(patterned)).client() as writer, s.client() as reader:
        for at in range(0, 4 * MIB, length):
            last = at + length - some
            new = requests_of(writer, (WRITE, 0, length), 1, [at])
            reads = requests_of(reader, (NBD_CMD_READ, 0, some), 0, [last] * 300)
            at_once([lambda: writer.send(new), lambda: reader.send(reads)])
            writer.collect_all()
            found = {reply.data for reply in reader.collect_all().values()}
            assert found <= {pattern(last, some), pattern(last, some, seed=1)}, last


# A client that dies

def merged(old, new, first, last):
    return old[:first] + new[first:last] + old[last:]


def cuts(length):
    """Where a payload of that length ends too early."""
    return [c for c in (0, 1, 511, 4095, 4096, 4097, 3996, 8193, 40000, 65535, 131072, 200000)
            if c < length]


@hazard("client dies after 4 of 64 KiB: the rest of the range reads as zeros")
@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("length", [64 * KIB, 300000])
@pytest.mark.parametrize("state", ["fresh", "written before"])
def test_client_that_dies_in_a_payload_leaves_each_block_old_or_new(either, patterned, end,
                                                                    length, state):
    with (s := either(patterned)).client() as witness:
        if state != "fresh":
            witness.pwrite(pattern(0, 4 * MIB, seed=0x77))
        old, new = witness.pread(4 * MIB), pattern(0, 4 * MIB, seed=1)
        idle, starts = s.sockets(), []
        for i, cut in enumerate(cuts(length)):
            first = i * 340 * KIB + (0, 100, 4095)[i % 3]
            starts.append(first)
            c = s.client()
            c.send(request_header(WRITE, first, length, 0, 1) + new[first:first + cut])
            getattr(c, end)()
        until(lambda: s.sockets() <= idle, what="closing of the dead connections")
        got = witness.pread(4 * MIB)
    for first in starts:
        whole = merged(old, new, first, first + length)
        for at in range(first & -BLOCK, first + length, BLOCK):
            assert got[at:at + BLOCK] in (old[at:at + BLOCK], whole[at:at + BLOCK]), at
    quiet = merged_away(old, got, starts, length)
    assert got == quiet


def merged_away(old, got, starts, length):
    """old, but what the dead clients could write is as it is now."""
    result = bytearray(old)
    for first in starts:
        result[first:first + length] = got[first:first + length]
    return bytes(result)


# A full disk

@hazard("overlay's disk full")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize("kept", [False, True], ids=["throw-away", "kept"])
def test_full_overlay_disk_is_enospc_for_that_write(cow, patterned, file_system, kind, kept):
    need_holes()
    place = file_system(kind, 3 * MIB // 2)
    options = ["--cow-file", place / "overlay"] if kept else ["--cow-dir", place]
    s = cow(patterned, *options)
    with s.client() as c, s.client() as other:
        held = fill(c)
        assert held > 100
        check_filled(other, held)
        check_full(c, held)
        check_filled(c, held)
        c.flush()
        check_filled(other, held)
        make_room(c)
        assert other.pread(BLOCK, 3 * MIB) == pattern(3 * MIB, BLOCK, seed=2)
    s.stop()
    if kept:
        with cow(patterned, *options).client() as c:
            assert c.pread(BLOCK, 3 * MIB) == pattern(3 * MIB, BLOCK, seed=2)
            assert c.pread(MIB, 3 * MIB + 77) == pattern(3 * MIB, BLOCK, seed=2)[77:] + pattern(
                3 * MIB + BLOCK, MIB + 77 - BLOCK)


def fill(c):
    """Writes every second block until there is no room; returns how many it wrote."""
    for i in range(512):
        error = c.error_of(WRITE, i * 2 * BLOCK, payload=pattern(i * 2 * BLOCK, BLOCK, seed=1))
        if error:
            assert error == NBD_ENOSPC
            return i
    raise AssertionError("the disk is not full")


def check_filled(c, held):
    for i in range(512):
        at = i * 2 * BLOCK
        assert c.pread(2 * BLOCK, at) == (pattern(at, BLOCK, seed=1 if i < held else 0xa5)
                                          + pattern(at + BLOCK, BLOCK)), (i, held)


def check_full(c, held):
    """Fresh blocks cannot be written, others can, and reads go on."""
    at = held * 2 * BLOCK
    assert c.error_of(WRITE, at + 100, payload=b"part") == NBD_ENOSPC
    assert c.error_of(WRITE, at, payload=bytes(MIB)) == NBD_ENOSPC or at + MIB > c.size
    assert c.pread(BLOCK, at) == pattern(at, BLOCK)
    c.pwrite(pattern(0, BLOCK, seed=1))
    assert c.pread(BLOCK) == pattern(0, BLOCK, seed=1)


def make_room(c):
    """TRIM gives space back, and then writes succeed again."""
    c.trim(2 * MIB)
    c.flush()
    for i in range(16):
        c.pwrite(pattern(3 * MIB, BLOCK, seed=2), 3 * MIB)


# Commands

@hazard("FLUSH marks every block as written: the base reads as zeros for all")
def test_flush_changes_nothing(either, patterned):
    s = either(patterned)
    with s.client(contexts=[ALLOCATION]) as c:
        before = c.block_status(c.size)
        c.flush()
        assert c.pread(c.size) == pattern(0, c.size)
        c.pwrite(b"x", 5000)
        c.flush()
        c.pwrite(b"y", 9000, NBD_CMD_FLAG_FUA)
        expected = bytearray(pattern(0, c.size))
        expected[5000:5001], expected[9000:9001] = b"x", b"y"
        assert c.pread(c.size) == expected
        assert c.block_status(c.size) == before
    s.stop()
    if either.kept:
        with either(patterned).client() as c:
            assert c.pread(c.size) == expected


LENGTHS = [1, 511, 4095, 4096, 4097, 8191, 130000]


def cleared(data, command, first, length, size):
    """The disk after WRITE_ZEROES, or TRIM, which clears whole blocks only."""
    last = first + length
    if command == NBD_CMD_TRIM:
        first = -(-first // BLOCK) * BLOCK
        last = last if last == size else last // BLOCK * BLOCK
    return data[:first] + bytes(last - first) + data[last:] if last > first else data


@hazard("TRIM or WRITE_ZEROES of a partial block clears the wrong end")
@pytest.mark.parametrize("flags", [0, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_FAST_ZERO],
                         ids=["plain", "no-hole", "fast"])
@pytest.mark.parametrize("state", ["fresh", "written before", "some written before"])
@pytest.mark.parametrize("length", LENGTHS)
def test_zeroing_clears_exactly_its_range(cow, base, tmp_path, length, state, flags):
    clears(cow, base, tmp_path, ZERO, length, state, flags)


@hazard("TRIM or WRITE_ZEROES of a partial block clears the wrong end")
@pytest.mark.parametrize("state", ["fresh", "written before", "some written before"])
@pytest.mark.parametrize("length", LENGTHS)
def test_trim_clears_the_whole_blocks_of_its_range(cow, base, tmp_path, length, state):
    clears(cow, base, tmp_path, NBD_CMD_TRIM, length, state, 0)


def clears(cow, base, tmp_path, command, length, state, flags):
    """At the beginning, the middle and the end of blocks and of the disk."""
    if command == NBD_CMD_TRIM or flags & NBD_CMD_FLAG_FAST_ZERO:
        need_punch(tmp_path)
    size = 300000
    places = [0, 1, 511, 4095, 4096, 5000, 8192, 100000, size - length, size - length - 1]
    with cow(base(content=pattern(0, size))).client() as c:
        for first in places:
            prepare(c, state)
            old = c.pread(size)
            assert not c.error_of(command, first, length, flags)
            assert c.pread(size) == cleared(old, command, first, length, size), first


def prepare(c, state):
    """Blocks of the overlay that the next operation meets; what it left stays."""
    if state == "written before":
        c.pwrite(pattern(0, c.size, seed=1))
    elif state == "some written before":
        for at in range(0, c.size - 100, 3 * BLOCK):
            c.pwrite(pattern(at + 50, 40, seed=2), at + 50)


def test_zeroing_and_trim_give_overlay_space_back(cow, base, tmp_path):
    need_punch(tmp_path)
    with (s := cow(base(content=pattern(0, 8 * MIB)))).client() as c:
        assert overlay_bytes(s) == 0
        for clear in c.trim, c.zero:
            c.pwrite(pattern(0, 4 * MIB, seed=1), MIB)
            assert overlay_bytes(s) >= 4 * MIB
            clear(4 * MIB + 200, MIB - 100)
            assert c.pread(4 * MIB, MIB) == bytes(4 * MIB)
            assert overlay_bytes(s) <= 4 * BLOCK


def test_zeroing_and_trim_of_the_base_take_no_space(cow, base, tmp_path):
    need_punch(tmp_path)
    with (s := cow(base(content=pattern(0, 8 * MIB)))).client() as c:
        c.trim(2 * MIB, 0)
        c.zero(2 * MIB, 4 * MIB)
        assert c.pread(8 * MIB) == (bytes(2 * MIB) + pattern(2 * MIB, 2 * MIB) + bytes(2 * MIB)
                                    + pattern(6 * MIB, 2 * MIB))
        assert overlay_bytes(s) <= 4 * BLOCK


def status_of_blocks(c, length):
    """The status of each block from 0 on, however it was told."""
    found, at = [], 0
    while at < length:
        for size, status in c.block_status(length - at, at)[ALLOCATION]:
            found += [status] * -(-min(size, length - at) // BLOCK)
            at += size
    return found


def test_block_status_tells_the_truth(either, base, tmp_path):
    """For data and holes of the base, and for data and holes of the overlay."""
    need_punch(tmp_path)
    image = base(128 * BLOCK + 77, pattern(0, 64 * BLOCK))
    expected = [DATA] * 64 + [HOLE] * 65
    with either(image).client(contexts=[ALLOCATION]) as c:
        assert status_of_blocks(c, c.size) == expected
        for command, first, last, status in [
                (WRITE, 8, 16, DATA), (WRITE, 60, 70, DATA), (WRITE, 128, 128.001, DATA),
                (ZERO, 20, 30, HOLE), (NBD_CMD_TRIM, 40, 50, HOLE), (ZERO, 10, 12, HOLE),
                (WRITE, 45, 46, DATA), (NBD_CMD_TRIM, 66, 68, HOLE), (ZERO, 100, 110, HOLE),
                (WRITE, 80, 80.5, DATA), (WRITE, 82.25, 83.5, DATA)]:
            start, length = int(first * BLOCK), int((last - first) * BLOCK)
            data = pattern(start, length, seed=1) if command == WRITE else b""
            assert not c.error_of(command, start, length, payload=data)
            for block in range(int(first), int(-(-last // 1))):
                expected[block] = status
            assert status_of_blocks(c, c.size) == expected, (command, first)
        (length, status), = c.block_status(c.size, 0, NBD_CMD_FLAG_REQ_ONE)[ALLOCATION]
        assert (length, status) == (10 * BLOCK, DATA)


def test_holes_of_base_and_overlay_are_read_as_zeros(either, base, tmp_path):
    """A long structured read goes over all kinds of blocks."""
    need_punch(tmp_path)
    image = base(2 * MIB, pattern(0, MIB))
    with either(image).client(contexts=[ALLOCATION]) as c:
        c.pwrite(pattern(0, 9 * BLOCK, seed=1), MIB - 4 * BLOCK)
        c.zero(3 * BLOCK, 5 * BLOCK)
        c.trim(2 * BLOCK, MIB)
        expected = bytearray(pattern(0, MIB) + bytes(MIB))
        expected[MIB - 4 * BLOCK:MIB + 5 * BLOCK] = pattern(0, 9 * BLOCK, seed=1)
        expected[5 * BLOCK:8 * BLOCK] = bytes(3 * BLOCK)
        expected[MIB:MIB + 2 * BLOCK] = bytes(2 * BLOCK)
        for flags in 0, NBD_CMD_FLAG_DF:
            assert c.pread(c.size, 0, flags) == expected
        assert b"".join(c.pread(1000, at) for at in range(0, 200000, 1000)) == expected[:200000]
        c.cache(c.size)
        assert c.pread(c.size) == expected


@hazard("overlay larger than 4 GiB wraps")
def test_places_above_4_gib_are_their_own(either, base):
    size = 9 * GIB + 5
    image = base(size, pattern(0, 64 * KIB))
    places = [0, MIB, 4 * GIB - 6, 4 * GIB + MIB, 8 * GIB + MIB, size - 12, 4 * GIB + 32 * KIB]
    s = either(image)
    with s.client() as c:
        for i, at in enumerate(places):
            c.pwrite(b"number%06d" % i, at)
        check_places(c, places)
        assert c.pread(60 * KIB, BLOCK) == pattern(BLOCK, 60 * KIB)
        c.zero(3 * GIB, 5 * GIB)
        c.trim(GIB, 3 * GIB)
        c.pwrite(b"number", 4 * GIB - 6)
        check_places(c, places)
    s.stop()
    if either.kept:
        check_places(either(image).client(), places)


def check_places(c, places):
    """They have their numbers, and there is nothing 300 MiB behind them."""
    for i, at in enumerate(places):
        assert c.pread(12, at) == b"number%06d" % i
        assert not any(c.pread(min(8192, c.size - at), (at + 300 * MIB) % (9 * GIB)))


def test_readonly_shows_the_disk_and_refuses_writes(either, patterned):
    if either.kept:
        with (s := either(patterned)).client() as c:
            c.pwrite(b"kept", 5000)
        s.stop()
    with either(patterned, "--readonly").client() as c:
        assert c.flags & NBD_FLAG_READ_ONLY
        for command in WRITE, ZERO, NBD_CMD_TRIM:
            payload = b"x" * 4096 if command == WRITE else b""
            assert c.error_of(command, 0, 4096, payload=payload) == NBD_EPERM
        c.flush()
        expected = bytearray(pattern(0, c.size))
        expected[5000:5004] = b"kept" if either.kept else expected[5000:5004]
        assert c.pread(c.size) == expected


def test_what_one_client_wrote_all_read(either, patterned):
    """CAN_MULTI_CONN: also before anything is flushed."""
    s = either(patterned)
    with s.client() as a, s.client() as b:
        assert a.flags & NBD_FLAG_CAN_MULTI_CONN
        for i in range(100):
            a.pwrite(b"%04d" % i, i * 4000)
            assert b.pread(4, i * 4000) == b"%04d" % i


# Options of target mode

@pytest.mark.parametrize("options", [["--oldstyle"], ["--threads", "1"], ["--unix", "sock"]],
                         ids=lambda o: o[0])
def test_options_of_target_mode_work(server, patterned, tmp_path, options):
    options = [tmp_path / o if o == "sock" else o for o in options]
    s = server(args=["--cow-target", *ADDRESS, *options, patterned], wait="--oldstyle" not in options)
    until(lambda: s.addresses)
    for address in s.addresses:
        with s.raw(address).negotiate(oldstyle="--oldstyle" in options) as c:
            c.pwrite(b"new", 100)
            assert c.pread(200) == pattern(0, 100) + b"new" + pattern(103, 97)


@pytest.mark.parametrize("option", ["--inetd", "--connected-fd"])
def test_one_client_on_a_descriptor(server, patterned, tmp_path, option):
    """The end is that of the client, and the overlay is kept then."""
    for i in range(2):
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        s = server(args=["--cow-target", "--cow-file", tmp_path / "overlay", "--logpath",
                         tmp_path / "log", option, *[fd] * (option != "--inetd"), patterned],
                   wait=False, stdin=theirs, pass_fds=[fd])
        theirs.close()
        with Client(ours) as c:
            if option == "--inetd":
                c.negotiate()
            c.pwrite(b"new", 100 * i)
            assert c.pread(3) == b"new"
            c.disc()
        s.wait()
    with server(args=["--cow-target", *ADDRESS, "--cow-file", tmp_path / "overlay",
                      patterned]).client() as c:
        assert c.pread(103) == b"new" + pattern(3, 97) + b"new"


def test_daemon_keeps_an_overlay_with_a_relative_path(run_server, cow, patterned, tmp_path):
    done = run_server("--cow-target", "--unix", "sock", "--daemonize", "--pidfile", "pid",
                      "--logpath", "log", "--cow-file", "overlay", patterned.name, cwd=tmp_path)
    assert done.returncode == 0, done
    with Client(tmp_path / "sock") as c:
        c.negotiate().pwrite(b"new")
        c.disc()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    until(lambda: not (tmp_path / "pid").exists())
    until(lambda: can_start(cow, patterned, tmp_path))


def can_start(cow, image, directory):
    """The daemon has gone from the map, and left what was written."""
    s = cow(image, "--cow-file", directory / "overlay", wait=False)
    until(lambda: s.addresses or s.proc.poll() is not None)
    if not s.addresses:
        s.expected_status = 1
        return False
    with s.wait_ready().client() as c:
        assert c.pread(3) == b"new"
    return True


# An overlay that is kept: its files

class Map:
    """The file PATH.map, to do to it what machines do."""

    HEADER = 4096
    CHECKED = 80                        # bytes of the header, before the checksum
    FAILED, WHOLE, WRITTEN = 1, 2, 4    # flags
    # Offsets in the header.
    VERSION, BOOT, CLEAN, FLAGS, IMAGE_INSTANCE, OWN_INSTANCE = 8, 40, 56, 60, 64, 72

    def __init__(self, path):
        self.path = Path(path)

    def change(self, offset, data, seal=True):
        """Writes into the header; seal makes its checksum right again."""
        with open(self.path, "r+b") as f:
            os.pwrite(f.fileno(), data, offset)
            if seal:
                checked = os.pread(f.fileno(), self.CHECKED, 0)
                os.pwrite(f.fileno(), struct.pack("<Q", fnv1a(checked)), self.CHECKED)

    def field(self, offset, form="<I"):
        with open(self.path, "rb") as f:
            header = f.read(self.HEADER)
        return struct.unpack_from(form, header, offset)[0]

    def flags(self):
        return self.field(self.FLAGS)

    def is_clean(self):
        return self.field(self.CLEAN) == 1

    def another_boot(self):
        self.change(self.BOOT, uuid.uuid4().bytes)

    def maps(self):
        """The committed map and the live map."""
        data = self.path.read_bytes()[self.HEADER:]
        return data[:len(data) // 2], data[len(data) // 2:]

    def is_committed(self, block):
        return self.maps()[0][block // 8] >> block % 8 & 1

    def lose_live_map(self):
        """As a start leaves it that is killed while it empties the live map."""
        os.truncate(self.path, self.HEADER + len(self.maps()[0]))

    def make_version_1(self):
        """As version 1.0.0 leaves it: no instances, no flags; and its live map has all
        bits, those that are committed as well."""
        committed, live = self.maps()
        header = bytearray(self.path.read_bytes()[:self.HEADER])
        header[self.VERSION:self.VERSION + 4] = struct.pack("<I", 1)
        header[self.FLAGS:] = bytes(self.HEADER - self.FLAGS)
        header[64:72] = struct.pack("<Q", fnv1a(header[:64]))
        live = bytes(a | b for a, b in zip(committed, live))
        self.path.write_bytes(header + committed + live)

    def scribble(self):
        """What a power cut may leave of the live map: anything."""
        committed, live = self.maps()
        with open(self.path, "r+b") as f:
            os.pwrite(f.fileno(), os.urandom(len(live)), self.HEADER + len(committed))


def fnv1a(data):
    h = 0xcbf29ce484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001b3 % U64
    return h


class Kept:
    """A base, and an overlay of it that holds some blocks."""

    def __init__(self, cow, run_server, base, directory):
        self.cow, self.run_server, self.base = cow, run_server, base
        self.path = directory / "overlay"
        self.map = Map(directory / "overlay.map")

    def start(self, *options):
        return self.cow(self.base, "--cow-file", self.path, *options)

    def refused(self, *words):
        done = self.run_server("--cow-target", *ADDRESS, "--cow-file", self.path, self.base)
        return refused(done, *words)

    def power_cut(self):
        """After SIGKILL: the next start is that of a machine that was off.  The
        live map is worth nothing, nor is what the overlay has in blocks that
        were not committed."""
        self.map.another_boot()
        self.map.scribble()
        spoil_uncommitted(self.path, self.map)


def spoil_uncommitted(path, bitmap):
    """Fills what the committed map does not speak of with junk."""
    committed, size = bitmap.maps()[0], path.stat().st_size
    with open(path, "r+b") as f:
        for block in range(-(-size // BLOCK)):
            if not committed[block // 8] >> block % 8 & 1:
                os.pwrite(f.fileno(), os.urandom(BLOCK)[:size - block * BLOCK], block * BLOCK)


def refused(done, *words):
    """It ended with status 1 and one line, in which these words are."""
    assert done.returncode == 1 and not done.stdout, done
    line, = done.stderr.splitlines()
    assert all(str(word) in line for word in words), f"{words} are not in: {line}"
    return line


@pytest.fixture
def empty(cow, run_server, disk, tmp_path):
    """A Kept that was never started."""
    return Kept(cow, run_server, disk(content=pattern(0, MIB + 77)), tmp_path)


WRITTEN = {0: 4096, 5000: 10, 100000: 50000, MIB - 100: 177}


def write_all(empty):
    """Its server; WRITTEN is written, and not flushed."""
    with (s := empty.start()).client() as c:
        for at, length in WRITTEN.items():
            c.pwrite(pattern(at, length, seed=1), at)
    return s


@pytest.fixture
def kept(empty):
    """One that was started and stopped, and holds WRITTEN."""
    write_all(empty).stop()
    return empty


def expected_of(written, size, seed=1):
    data = bytearray(pattern(0, size))
    for at, length in written.items():
        data[at:at + length] = pattern(at, length, seed=seed)
    return bytes(data)


def holds(kept, written=None):
    """Starts it, and finds what was written; returns the server."""
    s = kept.start()
    with s.client() as c:
        assert c.pread(c.size) == expected_of(WRITTEN if written is None else written, c.size)
    return s


def test_restart_continues(kept):
    """Again and again, and what is written is added."""
    written = dict(WRITTEN)
    for i in range(4):
        s = holds(kept, written)
        with s.client() as c:
            at = 200000 + i * 100001
            c.pwrite(pattern(at, 9000, seed=1), at)
            written[at] = 9000
        s.kill() if i % 2 else s.stop()
    holds(kept, written)


def test_files_of_an_overlay_are_for_the_owner_only(kept):
    for path in kept.path, kept.map.path:
        assert path.stat().st_mode & 0o7777 == 0o600
    assert names(kept.base) == {kept.base.name, "overlay", "overlay.map"}


def test_moved_base_and_overlay_go_on(kept, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    kept.base = Path(shutil.copy(kept.base, place))
    kept.map = Map(kept.map.path.rename(place / "other.map"))
    kept.path = kept.path.rename(place / "other")
    holds(kept)


@hazard("what was not flushed is never committed: at the end")
def test_orderly_end_commits_what_was_not_flushed(kept):
    """So the machine may be switched off then."""
    kept.power_cut()
    holds(kept)


def test_sigterm_under_load_commits_what_was_acknowledged(cow, empty):
    model = Numbered(len(pattern(0, MIB)) // UNIT)
    model.make_image(empty.base)
    s = empty.start()
    load = Load(s, model)
    load.run_for(200)
    s.terminate()
    stop_load(load)
    s.wait()
    empty.power_cut()
    check_numbers(empty.start(), model, since=model.now)


def stop_load(load):
    """Until the server closes; writes that it refuses at its end have not been done."""
    for session in load.sessions:
        with contextlib.suppress(ConnectionError):
            session.client.send(session.out)
            while session.in_flight:
                reply = session.client.collect()
                op = session.in_flight.pop(reply.cookie)
                if reply.error:
                    assert reply.error == NBD_ESHUTDOWN, f"{reply}"
                else:
                    op.end(load.model, reply)


# What spoils an overlay: how, and what the refusal must tell.

def other_size(kept):
    os.truncate(kept.base, 2 * MIB)
    return "size of the disk", MIB + 77, 2 * MIB


def other_base(kept):
    kept.base.write_bytes(pattern(0, MIB + 77, seed=9))
    return kept.map.path, "the base image has changed since this overlay was made"


def base_changed_in_one_byte(kept):
    """In its first block, such as a partition table."""
    with open(kept.base, "r+b") as f:
        os.pwrite(f.fileno(), b"\x83", 450)
    return kept.map.path, "the base image has changed since this overlay was made"


def map_missing(kept):
    kept.map.path.unlink()
    return kept.path, kept.map.path


def overlay_missing(kept):
    kept.path.unlink()
    return kept.path, kept.map.path, "blocks"


def overlay_truncated(kept):
    os.truncate(kept.path, 500000)
    return kept.path, 500000, MIB + 77


def overlay_empty(kept):
    os.truncate(kept.path, 0)
    return kept.path, " 0", MIB + 77


def overlay_longer(kept):
    os.truncate(kept.path, 2 * MIB)
    return kept.path, 2 * MIB, MIB + 77


def map_of_length(length):
    def spoil(kept):
        expected = kept.map.path.stat().st_size
        os.truncate(kept.map.path, length)
        return kept.map.path, length, expected
    spoil.__name__ = f"map_of_{length}_bytes"
    return spoil


def map_of_zeros(kept):
    kept.map.path.write_bytes(bytes(kept.map.path.stat().st_size))
    return kept.map.path, "bitmap"


def map_of_garbage(kept):
    kept.map.path.write_bytes(os.urandom(kept.map.path.stat().st_size))
    return kept.map.path, "bitmap"


def map_is_the_overlay(kept):
    shutil.copy(kept.path, kept.map.path)
    return kept.map.path, "bitmap"


def header_with(offset, data, *words, seal=True):
    def spoil(kept):
        kept.map.change(offset, data, seal)
        return kept.map.path, *words
    return spoil


def named(spoil, name):
    spoil.__name__ = name
    return spoil


def link_instead(which):
    def spoil(kept):
        path = kept.path if which == "overlay" else kept.map.path
        path.rename(path.parent / "elsewhere")
        path.symlink_to("elsewhere")
        return path,
    return named(spoil, f"{which}_is_a_link")


def directory_instead(which):
    def spoil(kept):
        path = kept.path if which == "overlay" else kept.map.path
        path.unlink()
        path.mkdir()
        return path,
    return named(spoil, f"{which}_is_a_directory")


def fifo_instead(kept):
    kept.path.unlink()
    os.mkfifo(kept.path)
    return kept.path,


SPOILERS = [
    other_size, other_base, base_changed_in_one_byte,
    map_missing, overlay_missing, overlay_truncated, overlay_empty, overlay_longer,
    *[map_of_length(n) for n in (0, 1, 87, 4095, 4096, 8191, 8193, 12287, 12289, 100000)],
    map_of_zeros, map_of_garbage, map_is_the_overlay,
    named(header_with(0, b"xnbdBMAP", "bitmap", seal=False), "wrong_magic"),
    named(header_with(8, b"\0\0\0\0", "version", " 0", " 2"), "version_0"),
    named(header_with(8, b"\1\0\0\0", "checksum", seal=False), "version_1_with_another_checksum"),
    named(header_with(8, b"\3\0\0\0", "version", " 3", " 2"), "later_version"),
    named(header_with(12, b"\2\0\0\0", "belongs to a proxy"), "bitmap_of_a_proxy"),
    named(header_with(16, b"\0\2", "block size", " 512", " 4096"), "other_block_size"),
    named(header_with(24, b"\0", "checksum", seal=False), "damaged_header"),
    named(header_with(60, b"\1", "checksum", seal=False), "damaged_flags"),
    named(header_with(79, b"\1", "checksum", seal=False), "damaged_instance"),
    named(header_with(80, b"\0" * 8, "checksum", seal=False), "checksum_of_zeros"),
    link_instead("overlay"), link_instead("map"), directory_instead("overlay"),
    directory_instead("map"), fifo_instead,
]


def everything(kept):
    """All files, but for the header of a map that was right until then."""
    return {p.name: (p.is_symlink(), p.read_bytes()[Map.HEADER * (p.suffix == ".map"):]
                     if p.is_file() else None)
            for p in kept.base.parent.iterdir() if p.suffix != ".log"}


@hazard("overlay truncated or of another base; bitmap truncated or garbage")
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_spoilt_overlay_is_refused_and_not_touched(kept, spoil):
    """In one line that tells what was found and what was expected; and once
    everything is as it was, it goes on."""
    files = kept.base, kept.path, kept.map.path
    saved = [path.read_bytes() for path in files]
    words = spoil(kept)
    before = everything(kept)
    kept.refused(*words)
    assert everything(kept) == before
    for path, content in zip(files, saved):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.is_symlink() or path.is_fifo():
            path.unlink()
        path.write_bytes(content)
    holds(kept)


def test_overlay_of_version_1_goes_on(kept):
    """Its map becomes one of this version."""
    kept.map.make_version_1()
    holds(kept).stop()
    assert kept.map.field(Map.VERSION) == 2
    holds(kept)


def test_killed_server_of_version_1_loses_nothing(empty):
    """Of the same boot: its live map is believed."""
    write_all(empty).kill()
    empty.map.make_version_1()
    holds(empty)


def test_live_map_of_version_1_is_not_believed_after_a_power_cut(empty):
    s = empty.start()
    with s.client() as c:
        c.pwrite(pattern(0, 4096, seed=1))
        c.flush()
        c.pwrite(pattern(5 * BLOCK, BLOCK, seed=1), 5 * BLOCK)
        s.kill()
    empty.map.make_version_1()
    with open(empty.map.path, "r+b") as f:
        os.pwrite(f.fileno(), uuid.uuid4().bytes, Map.BOOT)
        os.pwrite(f.fileno(), struct.pack("<Q", fnv1a(os.pread(f.fileno(), 64, 0))), 64)
    spoil_uncommitted(empty.path, empty.map)
    holds(empty, {0: 4096})


@hazard("another server uses the cache: or the overlay")
def test_second_server_of_an_overlay_is_refused(kept):
    """The first goes on."""
    s = holds(kept)
    kept.refused(kept.map.path, "another server")
    with s.client() as c:
        c.pwrite(b"on", 7)
        assert c.pread(2, 7) == b"on"
    s.kill()
    kept.start()            # the lock is gone with its holder


def test_base_cannot_be_its_own_overlay(run_server, base):
    image = base(content=pattern(0, MIB))
    done = run_server("--cow-target", *ADDRESS, "--cow-file", image, image)
    refused(done, image)


@pytest.mark.parametrize("option", ["--cow-file", "--cow-dir"])
def test_place_that_does_not_exist_is_refused(run_server, patterned, tmp_path, option):
    done = run_server("--cow-target", *ADDRESS, option, tmp_path / "nowhere" / "overlay", patterned)
    refused(done, tmp_path / "nowhere" / "overlay", "No such file")


@hazard("a misspelt option is ignored: or one of another mode")
def test_cow_options_belong_to_cow_target(run_server, patterned, tmp_path):
    for options in (["--target", "--cow-dir", tmp_path], ["--target", "--cow-file", "overlay"],
                    ["--cow-target", "--cow-dir", tmp_path, "--cow-file", "overlay"]):
        done = run_server(*options, patterned)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert options[-2] in done.stderr


# Power cuts

def check_numbers(server, model, since):
    """Each unit has a number that it had at some time since then."""
    with server.client() as c:
        for first in range(0, model.units, 256):
            data = c.pread(min(256, model.units - first) * UNIT, first * UNIT)
            for unit, when in model.spans(data, first):
                assert any(ends >= since for _, ends in when), (
                    f"unit {unit} is as it was until {when[-1][1]}, and {since} was flushed")
            model.settle(data, first)


class Flushes:
    """The model's time of the last FLUSH that is known to be done."""

    def __init__(self):
        self.since = 0

    def __call__(self, op):
        if op.command == NBD_CMD_FLUSH or op.flags & NBD_CMD_FLAG_FUA:
            self.since = max(self.since, op.entry.sent)


@pytest.fixture
def numbered(cow, run_server, tmp_path):
    """A model, and a Kept whose base has its numbers."""
    model = Numbered(6 * MIB // UNIT + 1)
    image = model.make_image(tmp_path / "base.img")
    return model, Kept(cow, run_server, image, tmp_path)


def test_power_cut_under_load_leaves_what_was_flushed(numbered):
    """Writes, zeroes and flushes on several connections, again and again; each
    block is as new as the last flush, and whole."""
    model, kept = numbered
    s = kept.start()
    for i in range(4):
        load, flushed = Load(s, model, [WRITE] * 6 + [ZERO]), Flushes()
        flusher = load.sessions[-1]
        flusher.generator.kinds, flusher.generator.on_end = [WRITE, NBD_CMD_FLUSH], flushed
        load.run(lambda: load.done >= 300 + 50 * i and flushed.since > 0)
        s.kill()
        kept.power_cut()
        s = kept.start()
        check_numbers(s, model, flushed.since)


def test_power_cut_without_a_flush_leaves_the_base_or_newer(numbered):
    """No block is zeros, nor a mixture with a block that was never written."""
    model, kept = numbered
    s = kept.start()
    load = Load(s, model)
    load.run_for(500)
    s.kill()
    kept.power_cut()
    check_numbers(kept.start(), model, since=-1)


@hazard("the live map is believed after a reboot")
@pytest.mark.parametrize("how", ["FLUSH", "FLUSH of another client", "FUA", "FUA of a part",
                                 "FUA of zeroes", "FUA of a trim"])
def test_power_cut_keeps_what_was_made_durable(empty, tmp_path, how):
    if "trim" in how:
        need_punch(tmp_path)
    s = empty.start()
    with s.client() as c, s.client() as other:
        at, length = (BLOCK + 10, 20) if "part" in how else (BLOCK, 5 * BLOCK)
        flags = NBD_CMD_FLAG_FUA if "FUA" in how else 0
        if "zeroes" in how:
            c.zero(length, at, flags)
        elif "trim" in how:
            c.trim(length, at, flags)
        else:
            c.pwrite(pattern(at, length, seed=1), at, flags)
        if "FLUSH" in how:
            (other if "another" in how else c).flush()
        c.pwrite(b"not durable" * 100, 300000)
        expected = c.pread(200000)
    s.kill()
    empty.power_cut()
    with empty.start().client() as c:
        assert c.pread(200000) == expected
        assert c.pread(1100, 300000) in (b"not durable" * 100, pattern(300000, 1100))


@hazard("bitmap reaches the disk before the data: or a part of it never does")
def test_power_cut_keeps_a_write_across_pages_of_the_map(cow, run_server, disk, tmp_path):
    """A page, of 4096 bytes, tells of 128 MiB."""
    at, length = 128 * MIB - BLOCK, 2 * BLOCK
    kept = Kept(cow, run_server, disk(129 * MIB), tmp_path)
    s = kept.start()
    with s.client() as c:
        c.pwrite(pattern(at, length), at)
        c.flush()
    s.kill()
    kept.map.another_boot()
    with kept.start().client() as c:
        assert c.pread(length, at) == pattern(at, length)


@hazard("kill -9 loses what was acknowledged")
def test_kill_without_a_power_cut_believes_the_live_map(empty):
    """No flush, no orderly end: and the machine has been up all the time."""
    write_all(empty).kill()
    holds(empty).kill()
    holds(empty)


def test_flush_after_a_kill_commits_what_the_one_before_wrote(empty):
    """The second server has set no bit of its own; then the power goes."""
    write_all(empty).kill()
    s = holds(empty)
    with s.client() as c:
        c.flush()
    s.kill()
    empty.power_cut()
    holds(empty)


# What a start believes.  The committed map is never in doubt.

SAFE, LATER = {0: 4096, 100000: 5000}, {5 * BLOCK: 4096, 200000: 7}


@pytest.fixture
def killed(cow, run_server, file_system, tmp_path):
    """A Kept on a file system whose instance is known.  SAFE was flushed, LATER was not;
    then it was killed."""
    base = make_disk(tmp_path / "base.img", content=pattern(0, MIB + 77))
    kept = Kept(cow, run_server, base, file_system("ext4", 16 * MIB))
    with (s := kept.start()).client() as c:
        for at, length in SAFE.items():
            c.pwrite(pattern(at, length, seed=1), at)
        c.flush()
        for at, length in LATER.items():
            c.pwrite(pattern(at, length, seed=1), at)
        s.kill()
    assert not bits(kept.map.maps()[0]) & {5, 200000 // BLOCK}, "it was committed too early"
    return kept


def bits(data):
    """The blocks that a map has."""
    return {8 * i + bit for i, byte in enumerate(data) if byte for bit in range(8)
            if byte >> bit & 1}


def shows_in_the_end(kept, written):
    """It holds that, and so does the server after it: nothing comes back."""
    for end in "kill", "stop":
        s = holds(kept, written)
        getattr(s, end)()
    holds(kept, written)


def test_instances_of_both_file_systems_are_in_the_header(killed):
    """Here they lie on one."""
    need_instances()
    image, own = (killed.map.field(at, "<Q") for at in (Map.IMAGE_INSTANCE, Map.OWN_INSTANCE))
    assert image == own != 0


def need_instances():
    """Such a server knows of none."""
    if is_portable():
        pytest.skip("this build knows no instances (XNBD_PORTABLE)")


@hazard("the live map is believed after a reboot: of the file system alone")
@pytest.mark.parametrize("which", [Map.IMAGE_INSTANCE, Map.OWN_INSTANCE], ids=["image", "map"])
def test_live_map_of_another_instance_is_not_believed(killed, which):
    """The page cache went with the file system.  The log says so, once."""
    need_instances()
    killed.map.change(which, struct.pack("<Q", killed.map.field(which, "<Q") + 1))
    spoil_uncommitted(killed.path, killed.map)
    with (s := killed.start()).client() as c:
        assert c.pread(c.size) == expected_of(SAFE, c.size)
        assert s.log().count("mounted again") == 1
    s.kill()
    shows_in_the_end(killed, SAFE)


@pytest.mark.parametrize("which", [Map.IMAGE_INSTANCE, Map.OWN_INSTANCE], ids=["image", "map"])
def test_live_map_of_an_unknown_instance_is_believed(killed, which):
    """The boot id decides alone."""
    killed.map.change(which, bytes(8))
    shows_in_the_end(killed, SAFE | LATER)


@hazard("fdatasync fails, the next one succeeds: in the next process")
def test_live_map_is_not_believed_when_stable_storage_had_failed(killed):
    """That is told once; the server after it starts from what there is then."""
    killed.map.change(Map.FLAGS, struct.pack("<I", killed.map.flags() | Map.FAILED))
    spoil_uncommitted(killed.path, killed.map)
    with (s := killed.start()).client() as c:
        assert c.pread(c.size) == expected_of(SAFE, c.size)
        assert s.log().count("stable storage had failed") == 1
        assert killed.map.flags() == Map.WRITTEN
        for at, length in LATER.items():
            c.pwrite(pattern(at, length, seed=1), at)
    s.kill()
    with (s := killed.start()).client() as c:
        assert c.pread(c.size) == expected_of(SAFE | LATER, c.size)
        assert "had failed" not in s.log()


@hazard("the live map is believed after a reboot")
def test_start_that_was_killed_while_it_emptied_the_live_map_goes_on(killed):
    """The file has no live map then, and still says what it was not believed for."""
    killed.map.another_boot()
    killed.map.lose_live_map()
    spoil_uncommitted(killed.path, killed.map)
    s = holds(killed, SAFE)
    assert len(killed.map.maps()[1]) == len(killed.map.maps()[0])
    s.kill()
    shows_in_the_end(killed, SAFE)


def test_file_without_a_live_map_has_an_empty_one(killed):
    """Whatever the header says."""
    killed.map.lose_live_map()
    spoil_uncommitted(killed.path, killed.map)
    shows_in_the_end(killed, SAFE)


def test_believed_live_map_outlives_another_kill(killed):
    """Before anybody has committed it, and with new bits beside the old ones."""
    s = holds(killed, SAFE | LATER)
    with s.client() as c:
        c.pwrite(pattern(6 * BLOCK, BLOCK, seed=1), 6 * BLOCK)
        s.kill()
    shows_in_the_end(killed, SAFE | LATER | {6 * BLOCK: BLOCK})


def test_map_tells_whether_clients_have_written(empty):
    """From the first change on, for good; not of what changes nothing."""
    with (s := empty.start()).client() as c:
        c.pread(BLOCK)
        c.flush()
        assert empty.map.flags() == 0
        c.pwrite(b"x", 5000)
        assert empty.map.flags() == Map.WRITTEN
    s.stop()
    assert empty.map.is_clean()
    with empty.start().client() as c:
        assert empty.map.flags() == Map.WRITTEN and not empty.map.is_clean()
        assert c.pread(1, 5000) == b"x"


@hazard("the live map is believed after a reboot: bits that were committed are gone")
def test_record_after_a_restart_takes_nothing_from_the_committed_map(empty):
    """A page of the map that only the live map had is committed, and then recorded in."""
    write_all(empty).kill()
    s = holds(empty)
    with s.client() as c:
        c.flush()
        committed = bits(empty.map.maps()[0])
        c.pwrite(b"x", 60 * BLOCK)
        assert bits(empty.map.maps()[0]) >= committed > {0, 1}
        s.kill()
    empty.power_cut()
    holds(empty)


# The order of system calls, and what happens when one of them fails

@contextlib.contextmanager
def traced(server, output, *options):
    """strace of a running server; skips where that is not allowed."""
    told = output.with_suffix(".told")
    with open(told, "w") as f:
        strace = subprocess.Popen([need("strace", "strace"), "-f", "-y", "-o", output, *options,
                                   "-p", str(server.proc.pid)], stderr=f)
    try:
        until(lambda: "attached" in told.read_text() or strace.poll() is not None)
        if strace.poll() is not None:
            skip(f"needs to trace a process (root): {told.read_text().strip()}")
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait()


CALLS = "trace=fdatasync,fsync,pwrite64,sendmsg,sendto,writev,write"


def calls_of(output):
    return [name for name in map(call_of, output.read_text().splitlines()) if name]


@hazard("bitmap reaches the disk before the data; kill -9 loses what was acknowledged")
def test_flush_syncs_the_data_then_the_map_then_answers(empty, tmp_path):
    """The order is what makes a power cut harmless, and kill -9: no other way to see it."""
    s, blocks = empty.start(), itertools.count(1)

    def flush(c):
        """Before the commit that comes by itself, after a second."""
        block = next(blocks)
        output = tmp_path / f"calls{block}"
        with traced(s, output, "-e", CALLS):
            c.pwrite(b"new", block * BLOCK + 5)
            c.flush()
        assert calls_of(output) == [
            "write overlay", "write live map", "answer",
            "sync overlay", "write committed map", "sync map", "answer"], output.read_text()

    with s.client() as c:
        c.pwrite(b"first")
        c.flush()
        once(lambda: flush(c))


@hazard("bitmap reaches the disk before the data")
def test_first_change_is_told_and_has_its_space_before_it_is_recorded(cow, run_server, disk,
                                                                      tmp_path):
    """The header says that clients write, on stable storage before any bit of theirs is;
    the committed map's page is taken before the live map has a bit of it."""
    image, numbers = disk(content=pattern(0, MIB)), itertools.count()

    def flush():
        directory = tmp_path / str(next(numbers))
        directory.mkdir()
        s = Kept(cow, run_server, image, directory).start()
        output = directory / "calls"
        with s.client() as c, traced(s, output, "-e", CALLS):
            c.pwrite(b"new", 5)
            c.flush()
        assert calls_of(output) == [
            "write header", "write overlay", "write committed map", "write live map", "answer",
            "sync overlay", "sync map", "write committed map", "sync map", "answer",
        ], output.read_text()

    once(flush)


def test_write_to_a_block_that_is_held_needs_no_record(empty, tmp_path):
    with (s := empty.start()).client() as c:
        c.pwrite(b"first", 5)
        with traced(s, tmp_path / "calls", "-e", "trace=pwrite64"):
            c.pwrite(pattern(0, BLOCK, seed=1))
            c.zero(100, 1000)
        assert set(calls_of(tmp_path / "calls")) - {"write committed map"} == {"write overlay"}


def call_of(line):
    """What a line of strace means to a FLUSH; None for others."""
    found = re.match(r"\d+ +(\w+)\(\d+<([^>]*)>(?:.*, (\d+)\) += )?", line)
    if not found:
        return None
    call, path, at = found.groups()
    name = Path(path).name
    if name == "overlay.map":
        return "sync map" if "sync" in call else f"write {part_of_map(path, int(at))}"
    if name == "overlay":
        return f"{'sync' if 'sync' in call else 'write'} overlay"
    return "answer" if path.startswith(("socket:", "TCP")) else None


def part_of_map(path, at):
    size = Path(path).stat().st_size
    return ("header" if at < Map.HEADER else
            "committed map" if at < (size + Map.HEADER) // 2 else "live map")


def fails_for_good(client):
    """Each request that has something to do is answered with EIO."""
    for command in NBD_CMD_READ, WRITE, ZERO, NBD_CMD_TRIM, NBD_CMD_CACHE:
        payload = pattern(0, BLOCK, seed=7) if command == WRITE else b""
        assert client.error_of(command, 0, BLOCK, payload=payload) == NBD_EIO, command
    assert client.error_of(WRITE, 0, flags=NBD_CMD_FLAG_FUA, payload=b"x") == NBD_EIO
    assert client.error_of(NBD_CMD_FLUSH) == NBD_EIO


@hazard("fdatasync fails, the next one succeeds")
@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("then", ["restart", "power cut"])
def test_failed_sync_ends_the_export_and_its_data_is_never_committed(empty, tmp_path, end, then):
    """The system tells once that it has lost data, and may have dropped a page of any block
    that was changed since the last good sync.  So nothing is answered any more, and the
    next start believes what had been committed before, and says so."""
    s = empty.start()
    with s.client() as c, s.client() as other:
        c.pwrite(b"safe", 100)
        c.flush()
        with traced(s, tmp_path / "calls", "-e", "inject=fdatasync:error=EIO:when=1"):
            c.pwrite(pattern(0, 5 * BLOCK, seed=1), BLOCK)
            assert c.error_of(NBD_CMD_FLUSH) == NBD_EIO
        for client in c, other, c:
            fails_for_good(client)
        with s.client() as later:
            fails_for_good(later)
        assert s.log().count("not on stable storage") == 1
        assert empty.map.flags() == Map.FAILED | Map.WRITTEN and not empty.map.is_clean()
    if end == "stop":
        s.expected_status = 1
        s.stop()
    else:
        s.kill()
    assert bits(empty.map.maps()[0]) == {0}
    with open(empty.path, "r+b") as f:
        os.pwrite(f.fileno(), os.urandom(5 * BLOCK), BLOCK)
    if then == "power cut":
        empty.power_cut()
    s = empty.start()
    with s.client() as c:
        assert c.pread(4, 100) == b"safe"
        assert c.pread(5 * BLOCK, BLOCK) == pattern(BLOCK, 5 * BLOCK)
        assert s.log().count({"restart": "stable storage had failed",
                              "power cut": "the machine was started again"}[then]) == 1
        c.pwrite(b"again", BLOCK)
        c.flush()
    s.stop()


@hazard("fdatasync fails, the next one succeeds: that of the map")
@pytest.mark.parametrize("which", [1, 2])
def test_failed_sync_of_the_map_ends_the_export_as_well(empty, tmp_path, which):
    """The first commit syncs it twice."""
    s = empty.start()
    with s.client() as c:
        with traced(s, tmp_path / "calls", "-P", empty.map.path, "-e", "trace=fdatasync", "-e",
                    f"inject=fdatasync:error=EIO:when={which}"):
            c.pwrite(pattern(0, 5 * BLOCK, seed=1), BLOCK)
            assert c.error_of(NBD_CMD_FLUSH) == NBD_EIO
        fails_for_good(c)
        assert empty.map.flags() & Map.FAILED
    s.expected_status = 1
    s.stop()


@hazard("overlay's disk full: the map's")
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_record_that_finds_no_space_is_that_requests_error(empty, tmp_path, error):
    """The bit is not set: a reader finds the base.  The next write is as any other."""
    s = empty.start()
    with s.client() as c:
        c.pwrite(b"first", 5)
        with traced(s, tmp_path / "calls", "-P", empty.map.path, "-e", "trace=pwrite64", "-e",
                    f"inject=pwrite64:error={error}:when=1+"):
            for at in 5 * BLOCK, 9 * BLOCK + 100:
                assert c.error_of(WRITE, at, payload=pattern(at, 500, seed=1)) == NBD_ENOSPC
                assert c.pread(2 * BLOCK, at) == pattern(at, 2 * BLOCK)
            c.pwrite(b"held", 100)
        c.flush()
        c.pwrite(pattern(9 * BLOCK, 200, seed=1), 9 * BLOCK)
    s.kill()
    with empty.start().client() as c:
        assert c.pread(5, 5) == b"first" and c.pread(4, 100) == b"held"
        assert c.pread(BLOCK, 5 * BLOCK) == pattern(5 * BLOCK, BLOCK)
        assert c.pread(BLOCK, 9 * BLOCK) == (pattern(9 * BLOCK, 200, seed=1)
                                             + pattern(9 * BLOCK + 200, BLOCK - 200))


@hazard("fdatasync fails, the next one succeeds: a record of bits was lost")
def test_record_that_fails_ends_the_export(empty, tmp_path):
    """Nobody knows what the live map is then."""
    s = empty.start()
    with s.client() as c:
        c.pwrite(b"safe", 5)
        c.flush()
        with traced(s, tmp_path / "calls", "-P", empty.map.path, "-e", "trace=pwrite64", "-e",
                    "inject=pwrite64:error=EIO:when=1"):
            assert c.error_of(WRITE, 5 * BLOCK, payload=b"lost") == NBD_EIO
        fails_for_good(c)
        assert empty.map.flags() & Map.FAILED
    s.expected_status = 1
    s.stop()
    with empty.start().client() as c:
        assert c.pread(6 * BLOCK) == pattern(0, 5) + b"safe" + pattern(9, 6 * BLOCK - 9)


@hazard("overlay's disk full: the map's, in a commit")
def test_commit_that_finds_no_space_is_tried_again(empty, tmp_path):
    """It is no lost durability: the flush fails, and a later one may succeed."""
    s = empty.start()
    with s.client() as c:
        c.pwrite(b"first", 5)
        c.flush()
        c.pwrite(b"second", 5 * BLOCK)
        with traced(s, tmp_path / "calls", "-P", empty.map.path, "-e", "trace=pwrite64", "-e",
                    "inject=pwrite64:error=ENOSPC:when=1+"):
            assert c.error_of(NBD_CMD_FLUSH) == NBD_ENOSPC
            assert c.pread(6, 5 * BLOCK) == b"second"
        c.flush()
        assert s.log().count("not committed") == s.log().count("committed again") == 1
        s.kill()
    empty.power_cut()
    with empty.start().client() as c:
        assert c.pread(6, 5 * BLOCK) == b"second"


# Real clients

def test_qemu_io_writes_zeroes_and_reads(either, base):
    need_holes()
    qemu_io = need("qemu-io", "qemu-utils")
    image = base(content=b"\x5a" * (2 * MIB))
    s = either(image)
    commands = ["read -P 0x5a 0 2M", "write -P 0x11 4k 64k", "write -P 0x22 70000 511",
                "write -z 128k 100k", "write -z -u 300k 64k", "discard 512k 256k", "flush",
                "write -f -P 0x33 1M 1234", "read -P 0x11 4k 64k", "read -P 0x22 70000 511",
                "read -P 0 128k 100k", "read -P 0 300k 64k", "read -P 0 512k 256k",
                "read -P 0x33 1M 1234", "read -P 0x5a 1049810 4096", "read -P 0x5a 0 4k"]
    done = subprocess.run([qemu_io, "-f", "raw", *[a for c in commands for a in ("-c", c)], s.uri],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout


def test_nbdcopy_reads_the_disk_with_many_connections(either, base, tmp_path):
    nbdcopy = need("nbdcopy", "libnbd-bin")
    content = pattern(0, 8 * MIB)
    with (s := either(base(12 * MIB + 512, content))).client() as c:
        c.pwrite(pattern(0, MIB, seed=1), MIB + 100)
        c.zero(MIB, 4 * MIB + 100)
        c.pwrite(b"far", 11 * MIB)
    expected = bytearray(content + bytes(4 * MIB + 512))
    expected[MIB + 100:2 * MIB + 100] = pattern(0, MIB, seed=1)
    expected[4 * MIB + 100:5 * MIB + 100] = bytes(MIB)
    expected[11 * MIB:11 * MIB + 3] = b"far"
    subprocess.run([nbdcopy, s.uri, tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == expected


def test_nbdcopy_writes_the_disk(either, base, tmp_path):
    nbdcopy = need("nbdcopy", "libnbd-bin")
    image = base(content=pattern(0, 8 * MIB))
    source = make_disk(tmp_path / "source", 8 * MIB, pattern(0, 5 * MIB, seed=1))
    s = either(image)
    subprocess.run([nbdcopy, "--flush", source, s.uri], check=True)
    with s.client() as c:
        assert c.pread(8 * MIB) == source.read_bytes()


LIBNBD = """
import nbd, sys
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
assert h.can_multi_conn() and h.can_trim() and h.can_zero() and not h.is_read_only()
h.pwrite(b"libnbd" * 1000, 5000)
h.zero(70000, 100000)
h.trim(65536, 262144)
h.flush()
assert h.pread(6000, 5000) == b"libnbd" * 1000
assert h.pread(70000, 100000) == bytearray(70000)
found = []
h.block_status(h.get_size(), 0, lambda name, at, entries, error: found.extend(entries))
assert sum(found[::2]) == h.get_size(), found
assert set(found[1::2]) == {0, 3}, found
h.shutdown()
"""


def test_libnbd_uses_all_commands(either, patterned, tmp_path):
    need_module("nbd", "python3-libnbd")
    need_punch(tmp_path)
    subprocess.run([sys.executable, "-c", LIBNBD, either(patterned).uri], cwd="/", check=True)
