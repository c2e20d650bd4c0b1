"""Snapshots (SIGUSR1): the disk as it was at one instant, while clients write.

Every write here is numbered, and fills its units with its number.  A unit of a
snapshot tells by its number when it can have been current: from when that write
was sent until a later one was answered.  There must be one instant at which all
units of the snapshot were current, between the signal and the log's "started".
"""

import collections
import os
import random
import re
import signal
import statistics
import struct
import subprocess
import time
from pathlib import Path

import pytest

from conftest import (SANITIZED, is_portable, loop_device, make_disk, need, need_copies, need_holes,
                      need_punch, skip)
from nbd import *
from test_model import Session, extents, turn

MIB = 1 << 20
UNIT = 2048                     # half a block: so there are writes of parts of blocks
ALWAYS = float("inf")


# Numbered writes

class Entry:
    """A write of one number.  done is None while it is not answered."""

    def __init__(self, number, sent, done=None):
        self.number, self.sent, self.done = number, sent, done


class Numbered:
    """A disk of units, and all numbers that each of them has had.

    now         counts requests and replies
    entries     for each unit, in the order in which they were sent
    """

    def __init__(self, units, number=1):
        """All units have that number at the beginning; 0 is zeros."""
        self.units, self.size = units, units * UNIT
        self.now, self.numbers = 0, number
        self.entries = [[Entry(number, -1, -1)] for _ in range(units)]

    def tick(self):
        self.now += 1
        return self.now

    def content(self, unit, number):
        """Bytes that occur at no other unit, nor with another number."""
        return struct.pack("<Q", number << 24 | unit if number else 0) * (UNIT // 8)

    def payload(self, first, count, number):
        return b"".join(self.content(u, number) for u in range(first, first + count))

    def make_image(self, path):
        """With the numbers of the beginning, and no holes."""
        return make_disk(path, content=self.payload(0, self.units, self.entries[0][0].number))

    def begin(self, first, count, zero):
        self.numbers += 1
        e = Entry(0 if zero else self.numbers, self.tick())
        for unit in range(first, first + count):
            self.entries[unit].append(e)
        return e

    def end(self, e):
        e.done = self.tick()

    def current(self, unit, number):
        """[(from, until)]: when the unit can have had that number."""
        return [(e.sent, self._overwritten(unit, e)) for e in self.entries[unit]
                if e.number == number]

    def _overwritten(self, unit, e):
        """When it was sure that the unit no longer had it."""
        if e.done is None:
            return ALWAYS
        return min((w.done for w in self.entries[unit]
                    if w.done is not None and w.sent > e.done), default=ALWAYS)

    def spans(self, data, first=0):
        """[(unit, [(from, until)])] of all units of data; fails if one is torn,
        or has what it never had."""
        spans = []
        for unit in range(first, first + len(data) // UNIT):
            got = data[(unit - first) * UNIT:(unit - first + 1) * UNIT]
            number = struct.unpack_from("<Q", got)[0] >> 24
            assert got == self.content(unit, number), (
                f"unit {unit} is a mixture: {sorted(set(struct.iter_unpack('<Q', got)))[:4]}")
            when = self.current(unit, number)
            assert when, f"unit {unit} has the number {number}, which it never had"
            spans.append((unit, when))
        return spans

    def check_instant(self, data, earliest, latest):
        """All of data was current at one instant between the two."""
        several, first, last = [], f"{earliest}, the signal", f"{latest}, the start"
        for unit, when in self.spans(data):
            if len(when) > 1:
                several.append((unit, when))
                continue
            (begins, ends), = when
            if begins > earliest:
                earliest, first = begins, f"{begins}, when what unit {unit} has was sent"
            if ends < latest:
                latest, last = ends, f"{ends}, until when unit {unit} can have had it"
            assert earliest <= latest, f"the instant is not before {first}, nor after {last}"
        self._check_several(several, earliest, latest)

    @staticmethod
    def _check_several(several, earliest, latest):
        """The same for units that had their number more than once: zeros."""
        moments = {earliest} | {begins for _, when in several for begins, _ in when
                                if earliest <= begins <= latest}
        assert any(all(any(a <= t <= b for a, b in when) for _, when in several)
                   for t in sorted(moments)), f"no instant for {len(several)} zeroed units"

    def settle(self, data, first=0):
        """data is what there is from now on, whatever was in flight before."""
        now = self.tick()
        for at in range(0, len(data), UNIT):
            number = struct.unpack_from("<Q", data, at)[0] >> 24
            self.entries[first + at // UNIT] = [Entry(number, -1, now)]

    def prune(self):
        """Forgets what is certainly overwritten by now."""
        for unit, entries in enumerate(self.entries):
            if len(entries) > 1:
                self.entries[unit] = [e for e in entries
                                      if self._overwritten(unit, e) == ALWAYS]


class Operation:
    """A write, trim or zeroing of units, as test_model's Session wants it."""

    private = False

    def __init__(self, command, first, count, flags=0):
        self.command, self.first, self.count, self.flags = command, first, count, flags
        self.start, self.length = first * UNIT, count * UNIT

    def begin(self, model):
        self.born = time.monotonic()
        if self.command != NBD_CMD_FLUSH:
            self.entry = model.begin(self.first, self.count, self.command != NBD_CMD_WRITE)
        else:
            self.entry = Entry(None, model.tick())
        self.model = model

    def payload(self):
        if self.command != NBD_CMD_WRITE:
            return b""
        return self.model.payload(self.first, self.count, self.entry.number)

    def end(self, model, reply):
        assert not reply.error, f"{reply}"
        model.end(self.entry)
        self.took = time.monotonic() - self.born
        self.on_end(self)

    def on_end(self, op):
        pass


class Writer:
    """Random writes: most of a block, some of parts of blocks, a few long ones."""

    def __init__(self, model, seed, kinds=(NBD_CMD_WRITE,), on_end=None, longest=160):
        self.units, self.kinds, self.longest = model.units, kinds, longest
        self.rng = random.Random(f"numbered {seed}")
        self.on_end = on_end

    def _range(self):
        kind = self.rng.random()
        if kind < 0.6:
            first = self.rng.randrange(self.units) & ~1
            return first, min(2, self.units - first)
        count = self.rng.randrange(1, 20 if kind < 0.98 else self.longest)
        return self.rng.randrange(self.units - count), count

    def next(self):
        command = self.rng.choice(self.kinds)
        first, count = self._range()
        if command == NBD_CMD_FLUSH:
            first = count = 0
        if command == NBD_CMD_TRIM:             # whole blocks, or it is only a hint
            first, count = first & ~1, (count + 1) & ~1
            first = min(first, (self.units & ~1) - count)
        op = Operation(command, first, count)
        op.on_end = self.on_end or op.on_end
        return op


class Load:
    """Connections that send numbered writes as fast as they are answered.

    done    how many were answered
    probe   {phase: seconds that writes of a connection took that has one in
            flight at a time}
    """

    def __init__(self, server, model, kinds=(NBD_CMD_WRITE,), connections=4, in_flight=16):
        self.model, self.done, self.phase = model, 0, "before"
        self.probe = collections.defaultdict(list)
        self.sessions = [Session(server.client(), model, Writer(model, i, kinds, self._count),
                                 in_flight) for i in range(connections)]
        self.sessions.append(Session(server.client(), model,
                                     Writer(model, "probe", on_end=self._measure, longest=21), 1))

    def _count(self, op):
        self.done += 1

    def _measure(self, op):
        self.probe[self.phase].append(op.took)

    def run(self, condition):
        """Goes on until condition() is true."""
        while not condition():
            for s in self.sessions:
                s.fill()
            turn(self.sessions)

    def run_for(self, replies):
        end = self.done + replies
        self.run(lambda: self.done >= end)

    def drain(self):
        while any(s.in_flight for s in self.sessions):
            turn(self.sessions)


# Taking snapshots

class Snapshots:
    """The snapshots of a server, as its log tells of them."""

    def __init__(self, server):
        self.server = server

    def lines(self, word):
        """[(path, rest)] of the lines that say "started", "complete" or "failed"."""
        return re.findall(rf"snapshot (\S+): {word}(.*)\n", self.server.log())

    def count(self, word):
        return len(self.lines(word))

    def over(self):
        return self.count("complete") + self.count("failed")

    def signal(self):
        self.server.proc.send_signal(signal.SIGUSR1)

    def take(self, load=None):
        """Takes one, with the load running.  Returns its path, and the model's
        time before the signal and after "started"."""
        wait = load.run if load else until
        started, over = self.count("started"), self.over()
        before = load.model.tick() if load else None
        self.signal()
        wait(lambda: self.count("started") > started)
        after = load.model.tick() if load else None
        wait(lambda: self.over() > over)
        assert not self.lines("failed"), self.server.log()
        return Path(self.lines("complete")[-1][0]), before, after


def leave(server):
    """Its clients go, and it stops: a server that stops waits for those who stay."""
    for client in server.clients:
        client.close()
    server.stop()


def names(image):
    """All files beside the image but the server's logs."""
    return {p.name for p in image.parent.iterdir() if not p.name.endswith(".log")}


def report(name, seconds):
    """Latencies, for who reads the output of `pytest -s`."""
    if seconds:
        print(f"{name}: {len(seconds)} writes, median {statistics.median(seconds) * 1e3:.2f} ms,"
              f" worst {max(seconds) * 1e3:.2f} ms")


@pytest.fixture
def file_system(tmp_path):
    """file_system(kind, size): a mounted one; skips where that is not possible."""
    mounted = []

    def make(kind, size):
        place = tmp_path / f"{kind}{len(mounted)}"
        place.mkdir()
        done = subprocess.run([need("mount", "mount"), *how_to_mount(kind, size, tmp_path), place],
                              stderr=subprocess.PIPE, text=True)
        if done.returncode:
            skip(f"needs to mount {kind} (root): {done.stderr.splitlines()[0]}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def how_to_mount(kind, size, directory):
    if kind == "tmpfs":
        return ["-t", kind, "-o", f"size={size}", "none"]
    make, package, options = {
        "ext4": ("mkfs.ext4", "e2fsprogs", ["-q", "-F", "-m", "0"]),
        "btrfs": ("mkfs.btrfs", "btrfs-progs", ["-q"]),
        "xfs": ("mkfs.xfs", "xfsprogs", ["-q"]),
    }[kind]
    image = make_disk(directory / f"{kind}.device", size)
    subprocess.run([need(make, package), *options, image], check=True, stdout=subprocess.DEVNULL)
    return ["-t", kind, "-o", "loop", image]


# Point in time

@pytest.fixture
def loaded(server, tmp_path):
    """loaded(kinds, mib, directory): image, model, server, load and snapshots."""
    def start(kinds=(NBD_CMD_WRITE,), mib=48, directory=tmp_path, in_flight=16):
        model = Numbered(mib * MIB // UNIT + 1)         # half a block at the end
        image = model.make_image(directory / "disk.img")
        s = server(image)
        return image, model, s, Load(s, model, kinds, in_flight=in_flight), Snapshots(s)

    return start


@pytest.mark.hazard("a snapshot is not of one instant")
def test_ten_snapshots_under_load_are_each_one_instant(loaded):
    image, model, s, load, snapshots = loaded()
    load.run_for(500)
    during = taken = 0
    while taken < 10 or during < 100:
        taken += 1
        load.phase, done = "during", load.done
        path, before, after = snapshots.take(load)
        during, load.phase = during + load.done - done, "between"
        model.check_instant(path.read_bytes(), before, after)
        path.unlink()
        model.prune()
        load.run_for(200)
    load.drain()
    leave(s)
    model.check_instant(image.read_bytes(), model.now, model.now)
    assert names(image) == {image.name}
    for phase, seconds in load.probe.items():
        report(f"probe, {phase} snapshots", seconds)
    print(f"{during} writes were answered during {taken} snapshots")


@pytest.mark.parametrize("kinds", [
    [NBD_CMD_WRITE, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES],
    [NBD_CMD_WRITE, NBD_CMD_WRITE, NBD_CMD_TRIM],
    [*[NBD_CMD_WRITE] * 6, NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM, NBD_CMD_FLUSH],
], ids=["zeroes", "trims", "all"])
@pytest.mark.hazard("a snapshot is not of one instant")
def test_zeroes_and_trims_during_a_snapshot_are_not_in_it(loaded, tmp_path, kinds):
    need_punch(tmp_path)
    image, model, s, load, snapshots = loaded(kinds, mib=32)
    load.run_for(200)
    for _ in range(3):
        path, before, after = snapshots.take(load)
        model.check_instant(path.read_bytes(), before, after)
        model.prune()
        load.run_for(100)
    load.drain()
    leave(s)
    model.check_instant(image.read_bytes(), model.now, model.now)


@pytest.mark.hazard("a snapshot is not of one instant")
@pytest.mark.parametrize("command", [NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM], ids=["zero", "trim"])
def test_disk_cleared_as_a_whole_during_a_snapshot_is_in_it(server, disk, tmp_path, command):
    """One request for all of it, at once after the start."""
    need_punch(tmp_path)
    content = pattern(0, 64 * MIB)
    s = server(disk(content=content))
    snapshots = Snapshots(s)
    with s.client() as c:
        snapshots.signal()
        until(lambda: snapshots.lines("started"))
        assert not c.error_of(command, 0, len(content))
        until(snapshots.over)
        assert Path(snapshots.lines("complete")[0][0]).read_bytes() == content
        assert c.pread(MIB, 5 * MIB) == bytes(MIB)


def test_snapshot_does_not_follow_later_writes(server, disk):
    content = pattern(0, 3 * MIB + 77)
    s = server(disk(content=content))
    path, *_ = Snapshots(s).take()
    with s.client() as c:
        c.pwrite(pattern(0, c.size, seed=1))
        c.flush()
    assert path.read_bytes() == content


def test_writer_in_the_middle_of_a_payload_does_not_delay_a_snapshot(server, disk):
    """Nor is a block of it in the snapshot by half."""
    old, new = pattern(0, 4 * MIB), pattern(0, 4 * MIB, seed=1)
    s = server(disk(content=old))
    snapshots = Snapshots(s)
    with s.client() as slow:
        cookie = slow.next_cookie
        slow.expect(cookie, Request(NBD_CMD_WRITE, 1000, MIB, 0))
        slow.send(request_header(NBD_CMD_WRITE, 1000, MIB, 0, cookie) + new[1000:300000])
        path, *_ = snapshots.take()
        slow.send(new[300000:1000 + MIB])
        assert not slow.collect(cookie).error
        merged = old[:1000] + new[1000:1000 + MIB] + old[1000 + MIB:]
        assert slow.pread(4 * MIB) == merged
    got = path.read_bytes()
    assert all(got[a:a + 4096] in (old[a:a + 4096], merged[a:a + 4096])
               for a in range(0, len(old), 4096))


def test_client_waiting_for_a_flush_does_not_stop_a_snapshot(loaded):
    """What is being stored ends, and nothing waits for ever."""
    _, model, s, load, snapshots = loaded([NBD_CMD_WRITE, NBD_CMD_FLUSH], mib=8)
    for _ in range(3):
        path, before, after = snapshots.take(load)
        model.check_instant(path.read_bytes(), before, after)
    load.drain()


# The file

@pytest.mark.parametrize("size", [0, 1, 511, 4095, 4096, 4097, MIB + 12345])
def test_snapshot_has_the_size_and_bytes_of_the_image(server, disk, size):
    image = disk(content=pattern(0, size))
    s = server(image)
    path, *_ = Snapshots(s).take()
    assert path.read_bytes() == pattern(0, size)
    assert path.stat().st_mode & 0o7777 == 0o600
    s.stop()
    assert names(image) == {image.name, path.name}


def test_name_is_that_of_the_image_and_the_time(server, disk):
    image = disk(4096)
    begin = int(time.time())
    path, *_ = Snapshots(server(image)).take()
    found = re.fullmatch(re.escape(str(image)) + r"\.snapshot\.(\d+)", str(path))
    assert found and begin <= int(found[1]) <= time.time()


def test_name_that_is_taken_gets_a_suffix(server, disk):
    """And what has it is left alone, be it a file or a link to nowhere."""
    image = disk(content=pattern(0, 5000))
    now = int(time.time())
    taken = [Path(f"{image}.snapshot.{second}") for second in range(now, now + 60)]
    for n, path in enumerate(taken):
        path.symlink_to("nowhere") if n % 2 else path.write_text("taken")
    snapshots = Snapshots(server(image))
    first, *_ = snapshots.take()
    assert re.fullmatch(re.escape(str(image)) + r"\.snapshot\.\d+\.1", str(first))
    assert first.read_bytes() == pattern(0, 5000)
    assert all(os.readlink(path) == "nowhere" if n % 2 else path.read_text() == "taken"
               for n, path in enumerate(taken))
    assert not (image.parent / "nowhere").exists()
    more = {snapshots.take()[0] for _ in range(20)} | {first}
    assert len(more) == 21 and all(p.read_bytes() == pattern(0, 5000) for p in more)


def test_holes_stay_holes(server, disk, tmp_path):
    """Data in a few places of 6 GiB: it takes no longer, and no more space."""
    need_punch(tmp_path)
    image = disk(6 << 30)
    with (s := server(image)).client() as c:
        for at in 0, 4096 * 7, 100 * MIB, (4 << 30) - 4096, (4 << 30) + 4096, c.size - 9:
            c.pwrite(pattern(at, min(8192, c.size - at)), at)
        c.pwrite(pattern(200 * MIB, MIB), 200 * MIB)
        c.trim(MIB // 2, 200 * MIB)
        path, *_ = Snapshots(s).take()
    s.stop()
    assert data_of(path) == data_of(image)
    assert path.stat().st_blocks <= image.stat().st_blocks + 64


def data_of(path):
    """[(offset, bytes)] of what is not a hole."""
    with open(path, "rb") as f:
        return [(start, os.pread(f.fileno(), end - start, start))
                for start, end, hole in extents(f.fileno(), path.stat().st_size) if not hole]


def test_snapshot_of_a_read_only_target(server, disk):
    content = pattern(0, MIB)
    path, *_ = Snapshots(server(disk(content=content), "--readonly")).take()
    assert path.read_bytes() == content


def test_daemon_finds_an_image_with_a_relative_path(run_server, tmp_path):
    """Its working directory is another one by then."""
    image = make_disk(tmp_path / "disk.img", content=pattern(0, 5 * 4096))
    done = run_server("--target", "--laddr", "127.0.0.1", "--lport", "0", "--daemonize",
                      "--pidfile", "pid", "--logpath", "log", "disk.img", cwd=tmp_path)
    assert done.returncode == 0, done
    pid = int((tmp_path / "pid").read_text())
    try:
        os.kill(pid, signal.SIGUSR1)
        until(lambda: ": complete" in (tmp_path / "log").read_text())
    finally:
        os.kill(pid, signal.SIGTERM)
        until(lambda: not (tmp_path / "pid").exists())
    path, = tmp_path.glob("disk.img.snapshot.*")
    assert path.read_bytes() == image.read_bytes()


@pytest.mark.hazard("a snapshot appears before it is complete")
def test_snapshot_is_complete_when_its_name_appears(server, disk):
    """Nobody ever sees a part of one under that name."""
    content = pattern(0, 32 * MIB)
    image = disk(content=content)
    with (s := server(image)).client() as c:
        s.proc.send_signal(signal.SIGUSR1)
        seen = until(lambda: c.pread(1) and [n for n in names(image) if ".snapshot." in n])
        assert (image.parent / seen[0]).read_bytes() == content


# Signals

BIG = 192 * MIB             # takes so long that a signal comes in the middle


def pause(server):
    """It does nothing any more, until resume()."""
    server.proc.send_signal(signal.SIGSTOP)
    until(lambda: all(" (stopped)" in (task / "status").read_text() for task in
                      Path(f"/proc/{server.proc.pid}/task").iterdir()), what="a stop")


def resume(server):
    server.proc.send_signal(signal.SIGCONT)


def check_middle(image, server, snapshots):
    if snapshots.over():
        server.kill()
        for path in image.parent.glob("*.snapshot.*"):
            path.unlink()
        raise AssertionError("the image is too small for this test")


def begun(image, server):
    """A server in the middle of a snapshot, and paused; its client; its snapshots."""
    need_copies(image.parent)
    s = server(image)
    c, snapshots = s.client(), Snapshots(s)
    snapshots.signal()
    until(lambda: snapshots.lines("started"), pause=0.001)
    pause(s)
    check_middle(image, s, snapshots)
    return s, c, snapshots


@pytest.fixture
def long_one(server, disk):
    """An image, and what begun() returns."""
    image = disk(BIG, sparse=False)
    return image, *once(lambda: begun(image, server))


def deliver(server, number):
    """A signal to a paused server, which it takes."""
    server.proc.send_signal(number)
    resume(server)
    status = Path(f"/proc/{server.proc.pid}/status")
    until(lambda: not int(re.search(r"ShdPnd:\s*(\w+)", status.read_text())[1], 16)
          >> number - 1 & 1, pause=0.001, what="taking the signal")
    pause(server)


def test_signal_during_a_snapshot_makes_another_when_it_is_done(server, disk):
    """One more, however many signals there were.  It shows a later instant."""
    image = disk(BIG, sparse=False)

    def begin():
        s, c, snapshots = begun(image, server)
        write = c.request(NBD_CMD_WRITE, BIG - 4000, payload=b"between")
        for _ in range(3):
            deliver(s, signal.SIGUSR1)
        check_middle(image, s, snapshots)
        return s, c, snapshots, write

    s, c, snapshots, write = once(begin)
    resume(s)
    assert not c.collect(write).error
    until(lambda: snapshots.over() == 2)
    s.is_served()
    assert snapshots.count("started") == snapshots.count("complete") == 2
    first, second = (Path(path) for path, _ in snapshots.lines("complete"))
    assert first != second
    for path, expected in (first, bytes(7)), (second, b"between"):
        with open(path, "rb") as f:
            assert os.pread(f.fileno(), 7, BIG - 4000) == expected
        assert path.stat().st_size == BIG


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end_during_a_snapshot_leaves_nothing_behind(long_one, number):
    image, s, c, snapshots = long_one
    c.request(NBD_CMD_WRITE, BIG - 4096, payload=bytes(4096))
    s.terminate(number)
    resume(s)
    s.wait()
    assert snapshots.count("failed") == 1
    assert names(image) == {image.name}


@pytest.fixture
def nameless():
    """Files without a name, which a portable build has as little as holes."""
    need_holes()


@pytest.mark.hazard("a snapshot appears before it is complete: it is killed")
def test_kill_during_a_snapshot_leaves_nothing_behind(nameless, long_one):
    image, s, *_ = long_one
    s.kill()
    assert names(image) == {image.name}


def test_end_at_any_moment_leaves_all_or_nothing(server, disk):
    content = pattern(0, 16 * MIB)
    image = disk(content=content)
    for i in range(12):
        s = server(image)
        s.proc.send_signal(signal.SIGUSR1)
        time.sleep(i * 0.008)           # a moment of its life, not a wait for anything
        s.kill() if i % 3 == 2 else s.stop()
        for name in names(image) - {image.name}:
            if is_portable() and i % 3 == 2:
                assert "snapshot" in name       # perhaps half a one: no file is nameless
            else:
                assert ".snapshot." in name
                assert (image.parent / name).read_bytes() == content
            (image.parent / name).unlink()


@pytest.mark.hazard("signal storm during load")
def test_storm_of_signals_under_load(loaded):
    """Signals come together, snapshots one after the other, and each is good."""
    image, model, s, load, snapshots = loaded(mib=4)
    before, dice = model.tick(), random.Random(1)
    for _ in range(200):
        s.proc.send_signal(dice.choice([signal.SIGUSR1, signal.SIGHUP]))
        load.run_for(2)
    load.run(lambda: snapshots.lines("complete"))
    load.drain()
    leave(s)                # perhaps in the middle of one more
    found = [p for p in image.parent.iterdir() if ".snapshot." in p.name]
    assert len(found) == snapshots.count("complete") and snapshots.count("failed") <= 1
    for path in found:
        model.check_instant(path.read_bytes(), before, model.now)


@pytest.mark.parametrize("options", [[], ["--cow-file", "overlay"]], ids=["throw-away", "kept"])
def test_signal_is_ignored_in_other_modes(server, disk, options):
    image = disk(content=pattern(0, MIB))
    s = server(args=["--cow-target", "--laddr", "127.0.0.1", "--lport", "0",
                     *[image.parent / o if o == "overlay" else o for o in options], image])
    before = names(image)
    s.proc.send_signal(signal.SIGUSR1)
    until(lambda: re.search(r"SIGUSR1.*ignored", s.log()))
    assert s.is_served() and names(image) == before


# Failures

@pytest.mark.hazard("a snapshot that failed is noticed by clients")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_disk_fails_the_snapshot_and_nobody_else(loaded, file_system, kind):
    """Logged, removed, no client harmed; and the next one works when there is room."""
    need_holes()
    place = file_system(kind, 44 * MIB)
    image, model, s, load, snapshots = loaded(directory=place, mib=24)
    load.run_for(200)
    before = names(image)
    for i in range(1, 3):
        snapshots.signal()
        load.run(lambda: snapshots.count("failed") == i)
    load.run_for(500)
    load.drain()
    assert all("No space left" in reason for _, reason in snapshots.lines("failed"))
    assert names(image) == before
    with s.client() as c:
        c.trim(16 * MIB, 0, NBD_CMD_FLAG_FUA)
        model.end(model.begin(0, 16 * MIB // UNIT, True))
        c.flush()
    snapshots.signal()
    until(lambda: snapshots.lines("complete"))
    path, = (Path(p) for p, _ in snapshots.lines("complete"))
    model.check_instant(path.read_bytes(), model.now, model.now)
    leave(s)
    model.check_instant(image.read_bytes(), model.now, model.now)


def test_directory_that_cannot_be_written_is_logged(server, disk, tmp_path):
    """It is gone: not even root can make a file in it."""
    place = tmp_path / "gone"
    place.mkdir()
    image = make_disk(place / "disk.img", content=pattern(0, MIB))
    s = server(image)
    image.rename(tmp_path / "moved.img")
    place.rmdir()
    s.proc.send_signal(signal.SIGUSR1)
    until(lambda: re.search(r"snapshot.*: failed: ", s.log()))
    with s.client() as c:
        assert c.pread(MIB) == pattern(0, MIB)
        c.pwrite(b"on")


def test_device_has_no_snapshot_and_says_so(server, disk):
    with loop_device(disk(MIB)) as device:
        s = server(device)
        s.proc.send_signal(signal.SIGUSR1)
        until(lambda: re.search(r"snapshot.*failed: .*device", s.log()))
        assert s.is_served()
        s.stop()


# Where the file system can share blocks

@pytest.mark.parametrize("kind, size", [("btrfs", 160 * MIB), ("xfs", 320 * MIB)],
                         ids=["btrfs", "xfs"])
def test_reflink_shares_blocks_and_is_one_instant(loaded, file_system, kind, size):
    """Three snapshots that together would not fit."""
    need_holes()    # nor does it share blocks
    image, model, s, load, snapshots = loaded(directory=file_system(kind, size), mib=48)
    load.run_for(300)
    for _ in range(3):
        path, before, after = snapshots.take(load)
        assert "cloned" in snapshots.lines("complete")[-1][1]
        model.check_instant(path.read_bytes(), before, after)
    load.drain()
