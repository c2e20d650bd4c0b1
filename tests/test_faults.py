"""Calls that fail: a server goes on, tells the right client, and no data is wrong.

faults.c, preloaded into a server, counts its calls of some functions, and fails
or shortens one of them, or all from a certain one on.  A session of each mode
is carried out first with no fault, to learn how many calls it makes; then
again and again, with another one failing each time: at the start, in the
session, or at the end.

Every reply that says success must be right by a model of the disk.  A request
may be answered with the error of the call if it needs that call, and nobody
else may notice.  A change that was answered with an error leaves old bytes or
new ones.  When the fault is over, a fresh client is served as ever, and the
files that the server leaves hold what was read.  What stays is an error of
stable storage (xnbd-server(8), "When the disk fails"): a target fails every
flush from then on, and an export with a bitmap file every request; the log
says so once, and the exit status is 1.  After a restart, what had been flushed
is there, and each other block is as it was then or newer.

The suite takes a part of all calls.  XNBD_FAULTS=all takes every one.
"""

import collections
import concurrent.futures
import contextlib
import errno
import itertools
import os
import random
import re
import resource
import signal
import socket
import threading
from pathlib import Path

import pytest

from conftest import (CRASH, Server, SharedPage, build_library, is_portable, make_disk, need_copies,
                      need_holes, skip)
from nbd import *
from origin import Origin
from test_control import bgctl
from test_cow import Map, spoil_uncommitted
from test_snapshot import file_system

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 4096
SIZE = MIB + 77
ALL = os.environ.get("XNBD_FAULTS") == "all"
AT_ONCE = 4                     # servers
LINKS = 2                       # of a proxy to its origin
PATIENCE = 1                    # seconds: then a lasting fault ends, if somebody waits for that
READ, WRITE, FLUSH, TRIM = NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_TRIM
ZEROES, STATUS, CACHE = NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE
FUA, NO_HOLE = NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE
FAST = 0 if is_portable() else NBD_CMD_FLAG_FAST_ZERO      # such a build zeroes nothing fast
ALLOCATION = "base:allocation"
hazard = pytest.mark.hazard

# faults.c: the functions, and the kinds that are no errno.
CALLS = ["pread", "pwrite", "fdatasync", "fsync", "fallocate", "recv", "send", "malloc", "accept",
         "open", "mmap", "thread", "pipe", "socket", "connect", "lseek", "truncate", "link", "poll",
         "stat", "read", "write", "flock", "unlink"]
HALF, ONE, HOLD, SLOW = 1000, 1001, 1002, 1003
KINDS = {"half": HALF, "one": ONE, "hold": HOLD}
EVER = (1 << 32) - 1


# The library

@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The library, built.  Sanitizers have allocators of their own."""
    return build_library("faults", tmp_path_factory, *["-DFAULTS_NO_MALLOC"] * SANITIZED)


class Control(SharedPage):
    """The page that is shared with the library in one server: words, as struct
    control of faults.c has them."""

    CALL, FIRST, KIND, TIMES, INJECTED, RELEASE, COUNTS = range(7)

    def count(self, call):
        """How often it was called."""
        return self.get(self.COUNTS + CALLS.index(call))

    def counts(self):
        return {call: self.count(call) for call in CALLS}

    def arm(self, call, kind, number=1, times=1):
        """The call of that number from now on will fail."""
        self.set(self.CALL, CALLS.index(call))
        self.set(self.KIND, kind)
        self.set(self.TIMES, times)
        self.set(self.FIRST, self.count(call) + number)

    def disarm(self):
        self.set(self.FIRST, 0)

    @property
    def injected(self):
        return self.get(self.INJECTED)

    def release(self):
        """Lets those go on who were held up."""
        self.set(self.RELEASE, 1)


class Fault(collections.namedtuple("Fault", "call kind number times")):
    """The call of that number fails, and some that follow."""

    @property
    def code(self):
        return KINDS.get(self.kind) or getattr(errno, self.kind)

    @property
    def is_silent(self):
        """Nobody should notice: what was interrupted or shortened is called again."""
        return self.kind in ("EINTR", "EAGAIN", "half", "one") and self.call != "thread"

    @property
    def is_sticky(self):
        """A sync that fails is an error for good."""
        return self.call == "fdatasync" and not self.is_silent

    def may_end(self, mode):
        """Whether the export may end by it: a bitmap file cannot be written, or not be synced."""
        return mode.has_maps and (self.is_sticky or self.call == "pwrite" and self.kind == "EIO")

    def __str__(self):
        times = {1: "", EVER: " and all later ones"}.get(self.times, f" and {self.times - 1} more")
        return f"{self.call} number {self.number}{times}: {self.kind}"


def test_library_leaves_an_error_of_a_connection_to_the_server(library, server, disk, tmp_path):
    """A reset is not taken for an orderly end."""
    control = Control(tmp_path / "control", library)
    s = server(disk(BLOCK), env=control.environment)
    s.client().reset()
    until(lambda: os.strerror(errno.ECONNRESET) in s.log(), what="the reset in the log")


# What may come of it

CHANGES = {WRITE, ZEROES, TRIM}
NBD_ERRORS = {"EIO": NBD_EIO, "ENOSPC": NBD_ENOSPC, "ENOMEM": NBD_ENOMEM}
# The calls that requests need, and cannot do without.
NEEDED = {"pread": {READ, *CHANGES}, "pwrite": {*CHANGES, FLUSH, CACHE}, "fdatasync": {FLUSH},
          "fallocate": {*CHANGES, CACHE}, "malloc": set(COMMANDS)}
# These may cost connections: a client's own, the control socket's.
COSTS_CONNECTIONS = {"recv", "send", "malloc", "thread", "pipe"}


def may_fail(fault, o):
    """The errors that an operation may be answered with."""
    if fault is None or fault.is_silent:
        return set()
    if fault.kind == "EOPNOTSUPP":
        return {NBD_ENOTSUP} if o.flags & FAST else set()
    commands = {o.command, FLUSH} if o.flags & FUA else {o.command}
    if not commands & NEEDED.get(fault.call, set()):
        return set()
    # What a proxy has no memory to receive is an error of the origin.
    return {NBD_ERRORS[fault.kind]} | ({NBD_EIO} if fault.call == "malloc" else set())


# The disk

class Disk:
    """What each byte may be: what it is in one of the versions.

    loose       a change may still be under way, whose client was disconnected
    flushed     the versions when a flush was answered last
    """

    def __init__(self, content):
        self.versions = [bytearray(content)]
        self.loose = False
        self.flush()

    def change(self, at, data):
        for v in self.versions:
            v[at:at + len(data)] = data

    def perhaps(self, at, data):
        """Nobody knows how much of a change was done."""
        v = bytearray(self.versions[0])
        v[at:at + len(data)] = data
        self.versions.append(v)

    def flush(self):
        self.flushed = [bytearray(v) for v in self.versions]

    def lose(self):
        """Stable storage has failed, and only what had been committed was believed after that."""
        self.versions += self.flushed

    def check(self, at, data, what):
        """These bytes are legal; they are known from then on, unless they may still change."""
        if self.versions[0][at:at + len(data)] != data:
            for i in range(0, len(data), BLOCK):
                self.check_piece(at + i, data[i:i + BLOCK], what)
        if not self.loose:
            self.change(at, data)

    def check_piece(self, at, data, what):
        legal = [v[at:at + len(data)] for v in self.versions]
        if data in legal:
            return
        for i, octet in enumerate(data):
            assert octet in {v[i] for v in legal}, (
                f"{what}: byte {at + i} is {octet:#x}; legal: {sorted({v[i] for v in legal})}")

    def snapshot(self):
        copy = Disk(b"")
        copy.versions = [bytearray(v) for v in self.versions]
        copy.loose = self.loose
        return copy


HOLE = range(512 * KIB, 768 * KIB)
CONTENT = b"".join([pattern(0, HOLE.start), bytes(len(HOLE)), pattern(HOLE.stop, SIZE - HOLE.stop)])


def make_image(path):
    make_disk(path, SIZE, CONTENT[:HOLE.start])
    with open(path, "r+b") as f:
        os.pwrite(f.fileno(), CONTENT[HOLE.stop:], HOLE.stop)


# Operations

JUNK = random.Random(1).randbytes(2 * MIB)


class Operation:
    """A request, and what it means for the disk.  No two write the same."""

    places = itertools.count(1)

    def __init__(self, command, at=0, length=0, flags=0):
        self.command, self.at, self.length, self.flags = command, at, length, flags
        self.payload = b""
        if command == WRITE:
            place = next(self.places) * 4099 % MIB
            self.payload = JUNK[place:place + length]

    def __repr__(self):
        return f"{COMMANDS[self.command]}({self.at}, {self.length}, {self.flags:#x})"

    @property
    def data(self):
        """What it changes the disk to."""
        return self.payload or bytes(self.length)

    def send(self, client):
        return client.request(self.command, self.at, self.length, self.flags, self.payload)

    def succeeded(self, disk, reply):
        if self.command == READ:
            disk.check(self.at, reply.data, self)
        elif self.command in (WRITE, ZEROES):
            disk.change(self.at, self.data)
        elif self.command == TRIM:
            disk.perhaps(self.at, self.data)
        elif self.command == STATUS:
            self.check_holes(disk, *reply.extents.values())
        if self.command == FLUSH or self.flags & FUA:
            disk.flush()

    def check_holes(self, disk, extents):
        at = self.at
        for length, flags in extents:
            if flags & NBD_STATE_ZERO:
                disk.snapshot().check(at, bytes(length), self)
            at += length

    def failed(self, disk):
        if self.command in CHANGES:
            disk.perhaps(self.at, self.data)


def op(*words):
    """A step of one operation."""
    return [words]


OPERATIONS = [
    op(READ, 0, 512), op(READ, 3 * BLOCK - 5, 1000), op(READ, 4 * BLOCK, 200 * KIB),
    op(READ, 450 * KIB, 350 * KIB),
    op(WRITE, 5000, 700), op(WRITE, 16 * BLOCK, 3 * BLOCK), op(WRITE, 600 * KIB + 123, 300 * KIB),
    op(READ, 600 * KIB, 310 * KIB), op(FLUSH), op(WRITE, 9 * BLOCK + 1, 100, FUA),
    op(ZEROES, 20 * BLOCK, 3 * BLOCK), op(ZEROES, 30 * BLOCK + 9, 2 * BLOCK, NO_HOLE),
    op(ZEROES, 40 * BLOCK, 4 * BLOCK, FAST), op(TRIM, 50 * BLOCK + 5, 5 * BLOCK),
    op(STATUS, 0, SIZE), op(CACHE, 0, 50 * BLOCK)]
TOGETHER = [[(READ, i * 9 * BLOCK + 100, 5000) for i in range(6)]
            + [(WRITE, SIZE - 5000, 5000), (WRITE, 256 * KIB + 7, 9000), (READ, 800 * KIB, 100)]]
LAST = [op(WRITE, 2 * BLOCK, 100), op(WRITE, 100 * BLOCK, BLOCK), op(READ, 0, SIZE), op(FLUSH),
        op(WRITE, 70 * BLOCK + 11, 6000)]


# Modes

class Mode:
    """A server of one kind, with files in a directory of its own."""

    steps = [*OPERATIONS, *TOGETHER, *LAST]
    has_maps = True             # a flush writes a bitmap: without stable storage the export ends

    def __init__(self, directory, library, origin=None):
        self.directory, self.origin = directory, origin
        directory.mkdir()
        self.prepare()
        self.control = Control(directory / "control", library)
        self.socket = directory / "s"
        self.runs = 0

    def prepare(self):
        make_image(self.path("disk"))

    def path(self, name):
        return self.directory / name

    def start(self, fault=None, options=()):
        """With a fault at the start, if there is one; and says whether it listens."""
        if fault:
            self.control.arm(*arming(fault))
        arguments = ["--unix", self.socket, *options, *self.arguments()]
        self.runs += 1
        self.server = Server(arguments, self.directory, self.runs,
                             {"env": self.control.environment})
        self.server.address = str(self.socket)
        until(lambda: self.server.addresses or self.server.proc.poll() is not None, what="a start")
        return bool(self.server.addresses)

    def end(self):
        """Leaves nothing, unless it may be wanted."""
        if self.server.proc.poll() is None:
            self.server.kill()
            return
        for path in self.directory.iterdir():
            path.unlink()

    def says(self, text):
        """How often the log does."""
        return self.server.log().count(text)

    def files(self):
        return {p.name for p in self.directory.iterdir()} - {"control"} - {
            f"server{i}.log" for i in range(1, self.runs + 1)}

    def check_files(self, disk):
        """What the server has left, when it has ended."""
        disk.check(0, self.path("disk").read_bytes(), "the image")


class Target(Mode):
    steps = [*OPERATIONS[:8], ["snapshot"], *OPERATIONS[4:], *TOGETHER, ["snapshot"], *LAST]
    has_maps = False

    def arguments(self):
        return ["--target", self.path("disk")]


class Cow(Mode):
    has_maps = False

    def arguments(self):
        return ["--cow-target", self.path("disk")]

    def check_files(self, disk):
        assert self.path("disk").read_bytes() == CONTENT, "the base was changed"


class Kept(Cow):
    has_maps = True
    held = "overlay"

    def arguments(self):
        return ["--cow-target", "--cow-file", self.path("overlay"), self.path("disk")]

    def check_files(self, disk):
        super().check_files(disk)
        check_restart(self, disk)


class Proxy(Mode):
    steps = [*OPERATIONS, ["query"], *TOGETHER, ["cache-all"], *LAST, ["switch"], *OPERATIONS[3:10],
             *LAST]
    held = "cache"

    def prepare(self):
        pass

    def arguments(self):
        return ["--proxy", "--origin-connections", LINKS, f"unix:{self.origin.unix}",
                self.path("cache"), self.path("cache.map"), self.path("ctl")]

    @property
    def switched(self):
        """Even if the answer was lost."""
        return "switched to target mode" in self.server.log()

    def ask(self, line):
        """The answer; None if it was refused, or the connection lost."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(DEADLINE)
            try:
                s.connect(str(self.path("ctl")))
                s.sendall(line.encode() + b"\n")
                answer = b""
                while not answer.endswith(b"\nok\n") and answer != b"ok\n":
                    part = s.recv(4096)
                    if not part or b"error:" in answer + part:
                        return None
                    answer += part
            except ConnectionError:
                return None
        return answer

    def pending(self):
        """Requests that wait for the origin, or a worker."""
        return int(re.search(rb"^pending-requests: (\d+)", self.ask("query"), re.M).group(1))

    def check_files(self, disk):
        if self.switched:
            disk.check(0, self.path("cache").read_bytes(), "the image")
        else:
            check_restart(self, disk)


MODES = {"target": Target, "cow": Cow, "cow-file": Kept, "proxy": Proxy}
LOST = "is not on stable storage"
# After an error of the moment: no space for the map.
WAITS, GOES_ON = "is not committed", "is committed again"


def check_restart(mode, disk):
    """If stable storage had failed, that is not forgotten."""
    lost = mode.says(LOST)
    if lost:
        disk.lose()
    assert mode.start(), mode.server.log()
    assert mode.says("stable storage had failed") == lost, mode.server.log()
    with mode.server.client() as c:
        disk.check(0, c.pread(SIZE), "after a restart")
    mode.server.stop()


# Sessions

def arming(fault):
    return fault.call, fault.code, fault.number, fault.times


class Session:
    """A client that goes through the steps of its mode, whatever happens.

    errors      [(operation, error)]
    lost        connections
    refused     commands of the control socket
    ended       stable storage has failed under a bitmap file
    """

    BEGUN = re.compile(r"snapshot \S+: started|snapshot of \S+: failed")

    def __init__(self, mode, disk, fault=None):
        self.mode, self.disk, self.fault = mode, disk, fault
        self.client, self.errors, self.lost, self.refused = None, [], 0, []
        self.ended = False
        self.snapshots = []

    def run(self, steps):
        for step in steps:
            if step == ["snapshot"]:
                self.snapshot()
            elif isinstance(step[0], str):
                self.tell(*step)
            else:
                self.perform([Operation(*words) for words in step])

    def connected(self):
        """A client, after a few attempts; None if there is none."""
        for _ in range(2):
            if self.client:
                break
            try:
                self.client = self.mode.server.client(structured=True, contexts=[ALLOCATION])
            except ConnectionError:
                self.lost += 1
        return self.client

    def leave(self):
        if self.client:
            self.client.close()
        self.client = None

    def perform(self, operations):
        """All of them at once."""
        client, sent = self.connected(), {}
        if not client:
            return
        self.ended = self.mode.has_maps and self.mode.says(LOST)
        try:
            for o in operations:
                sent[o] = None      # a part of it may be sent
                sent[o] = o.send(client)
            for o, cookie in list(sent.items()):
                self.answered(o, client.collect(cookie))
                del sent[o]
        except ConnectionError:
            self.lost += 1
            self.leave()
            for o in sent:
                o.failed(self.disk)
                self.disk.loose |= o.command in CHANGES

    def answered(self, o, reply):
        if not reply.error:
            assert not self.ended, f"{o} succeeds without stable storage"
            o.succeeded(self.disk, reply)
            return
        if reply.error not in may_fail(self.fault, o):
            assert self.fault and self.fault.may_end(self.mode) and reply.error == NBD_EIO, (
                f"{o} fails with {reply}")
            until(lambda: self.mode.says(LOST), what="a word about that in the log")
        self.errors.append((o, reply.error))
        o.failed(self.disk)

    def tell(self, line):
        if not self.mode.ask(line):
            self.refused.append(line)

    def snapshot(self):
        """The disk is as it was when that began, or there is none."""
        s = self.mode.server
        began = len(self.BEGUN.findall(s.log()))
        s.proc.send_signal(signal.SIGUSR1)
        until(lambda: len(self.BEGUN.findall(s.log())) > began, what="a snapshot")
        self.snapshots.append(self.disk.snapshot())

    def check_cost(self):
        """One fault is one request's, or one connection's."""
        fault = self.fault
        problems = [*self.errors, *self.refused, *["a lost connection"] * self.lost]
        assert fault.call in COSTS_CONNECTIONS or not self.lost, problems
        assert not fault.is_silent or not problems, problems
        if fault.times == 1 and not fault.is_sticky and not (
                self.mode.has_maps and fault.call == "pwrite"):     # a commit's, for all who wait
            assert len(problems) <= 1, problems


class Watch:
    """Ends a lasting fault when somebody waits for that."""

    def __init__(self, control):
        self.timer = threading.Timer(PATIENCE, control.disarm)

    def __enter__(self):
        self.timer.start()

    def __exit__(self, *_):
        self.timer.cancel()
        self.timer.join()


def run_session(mode, fault):
    """A session with a fault in it; then there is none, and service is as ever."""
    disk = Disk(CONTENT)
    assert mode.start(), mode.server.log()
    before = descriptors(mode.server)
    session = Session(mode, disk, fault)
    mode.control.arm(*arming(fault))
    with Watch(mode.control):
        session.run(mode.steps)
        mode.control.disarm()
    injected = mode.control.injected
    session.leave()
    if injected:
        session.check_cost()
    if injected and has_ended(mode, fault):
        check_end_of_export(mode)
    else:
        check_service(mode, session)
    before["socket"] += LINKS if isinstance(mode, Proxy) else 0     # some may have been down
    until(lambda: not descriptors(mode.server) - before, what="descriptors that come back")
    mode.server.expected_status = int(mode.says(LOST) > 0)
    mode.server.stop()
    check_snapshots(mode, session)
    mode.check_files(disk)
    return injected


def has_ended(mode, fault):
    """Whether that was the end of the export; a sync that was nobody's may be just now."""
    if fault.is_sticky and mode.has_maps:
        until(lambda: mode.says(LOST), what="a word about a failed sync")
    return fault.may_end(mode) and mode.says(LOST) > 0


def check_end_of_export(mode):
    """Nobody knows which blocks have been lost: nothing is read, or written."""
    with mode.server.client(structured=True, contexts=[ALLOCATION]) as c:
        for o in (Operation(*words) for words in itertools.chain(*OPERATIONS)):
            assert c.collect(o.send(c)).error == NBD_EIO, o
    assert mode.says(LOST) == 1, mode.server.log()


def check_service(mode, session):
    """A fresh client is served, and reads what is right."""
    disk = session.disk
    with mode.server.client() as c:
        disk.check(0, c.pread(SIZE), "after the fault")
        c.pwrite(b"fresh", 77 * BLOCK + 5)
        disk.change(77 * BLOCK + 5, b"fresh")
        disk.check(70 * BLOCK, c.pread(10 * BLOCK, 70 * BLOCK), "after the fault")
        error = c.error_of(FLUSH)
    check_flush(mode, session, error)
    if isinstance(mode, Proxy) and not mode.switched and not error:
        assert mode.ask("cache-all") and mode.ask("switch"), mode.server.log()
        with mode.server.client() as c:
            disk.check(0, c.pread(SIZE), "after a switch")


def check_flush(mode, session, error):
    """A sync that failed was logged, and every flush fails; also one that came by itself.  A disk
    that was full is forgotten when there is room."""
    lost = mode.says(LOST)
    assert bool(error) == lost <= 1, (error, mode.server.log())
    until(lambda: mode.says(WAITS) == mode.says(GOES_ON), what="a word about a commit")
    if session.fault.is_sticky and mode.control.injected:
        assert error == NBD_ERRORS[session.fault.kind]
        failed = {e for o, e in session.errors if o.command == FLUSH}
        assert failed <= {error}, f"flush: {error}, before that: {failed}"


def descriptors(server):
    """What it has open, counted: a thread keeps its pipe."""
    found = collections.Counter()
    directory = f"/proc/{server.proc.pid}/fd"
    for fd in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            found[re.sub(r":\[.*| \(deleted\)", "", os.readlink(f"{directory}/{fd}"))] += 1
    del found["pipe"]
    return found


def check_snapshots(mode, session):
    """Those that were said to be complete are there, and are right; and no others."""
    log = mode.server.log()
    left = re.findall(r"snapshot \S+: cannot remove (\S+): ", log)
    names = [name for name in mode.files() if "snapshot" in name and
             name not in map(os.path.basename, left)]
    complete = re.findall(r"snapshot (\S+): complete", log)
    assert sorted(names) == sorted(Path(name).name for name in complete), log
    for path in complete:
        found = Path(path).read_bytes()
        assert any(is_legal(disk, found) for disk in session.snapshots), path


def is_legal(disk, found):
    try:
        disk.check(0, found, "a snapshot")
        return True
    except AssertionError:
        return False


def run_end(mode, fault):
    """A fault while the server stops: it ends in time, and what it was told is kept.  Status 0
    says that even a power cut takes nothing away; else the log says why."""
    disk = Disk(CONTENT)
    assert mode.start(), mode.server.log()
    session = Session(mode, disk)
    session.run(LAST)
    mode.control.arm(*arming(fault))
    mode.server.terminate()
    session.leave()
    mode.server.expected_status = None
    status = mode.server.stop()
    injected = mode.control.injected
    mode.control.disarm()
    assert status == (mode.says(LOST) or mode.says(WAITS) > mode.says(GOES_ON)), f"status {status}"
    if status == 0 and mode.has_maps:
        cut_power(mode)
    mode.check_files(disk)
    return injected


def cut_power(mode):
    """What has not been committed is junk."""
    bitmap = Map(mode.path(mode.held + ".map"))
    bitmap.another_boot()
    bitmap.scribble()
    spoil_uncommitted(mode.path(mode.held), bitmap)


def run_start(mode, fault):
    """A fault at the start: one line that says why, or it does not matter."""
    there = mode.files()
    if mode.start(fault, ["--pidfile", mode.path("pid")]):
        mode.control.disarm()
        check_works(mode)
    else:
        check_refusal(mode.server)
        left = mode.files() - there - {"cache", "cache.map", "overlay", "overlay.map"}
        assert not left or fault.call in ("unlink", "stat", "flock"), left
        mode.control.disarm()
        assert mode.start(options=["--pidfile", mode.path("pid")]), mode.server.log()
        check_works(mode)
    return mode.control.injected


def check_works(mode):
    disk = Disk(CONTENT)
    Session(mode, disk).run(LAST)
    mode.server.stop()
    mode.check_files(disk)


def check_refusal(server):
    server.expected_status = 1
    server.wait()
    lines = [line for line in server.log().splitlines()
             if not line.startswith("xnbd-server: origin ")]     # whose thread may say something
    assert len(lines) == 1 and lines[0].startswith("xnbd-server: "), lines


PHASES = {"start": run_start, "session": run_session, "end": run_end}

# What is tried

ONCE_AND_EVER = [1, EVER]
FAULTS = {
    "pread": {"EIO": ONCE_AND_EVER, "half": ONCE_AND_EVER, "one": [50], "EINTR": [1]},
    "pwrite": {"ENOSPC": ONCE_AND_EVER, "EIO": [1], "half": ONCE_AND_EVER, "one": [50],
               "EINTR": [1]},
    "fdatasync": {"EIO": ONCE_AND_EVER, "ENOSPC": [1], "EINTR": [1]},
    "fsync": {"EIO": ONCE_AND_EVER},
    "fallocate": {"ENOSPC": ONCE_AND_EVER, "EIO": [1], "EOPNOTSUPP": ONCE_AND_EVER, "EINTR": [1]},
    "recv": {"ECONNRESET": ONCE_AND_EVER, "half": [EVER], "one": [50], "EINTR": [1], "EAGAIN": [5]},
    "send": {"EPIPE": ONCE_AND_EVER, "half": ONCE_AND_EVER, "one": [50], "EINTR": [1],
             "EAGAIN": [5]},
    "malloc": {"ENOMEM": ONCE_AND_EVER},
    "accept": {"EMFILE": [1], "ECONNABORTED": [1, 5], "EINTR": [1]},
    "open": {"EMFILE": ONCE_AND_EVER},
    "mmap": {"ENOMEM": ONCE_AND_EVER},
    "thread": {"EAGAIN": ONCE_AND_EVER},
    "pipe": {"EMFILE": ONCE_AND_EVER},
    "socket": {"EMFILE": ONCE_AND_EVER},
    "connect": {"ECONNREFUSED": ONCE_AND_EVER},
    "lseek": {"EIO": ONCE_AND_EVER},
    "truncate": {"ENOSPC": ONCE_AND_EVER},
    "link": {"EIO": ONCE_AND_EVER, "EPERM": [1]},
    "poll": {"EINTR": [1], "ENOMEM": [1, 20]},
    "stat": {"EIO": ONCE_AND_EVER},
    "read": {"EINTR": [1]},
    "write": {"EINTR": [1]},
    "flock": {"EWOULDBLOCK": [1]},
    "unlink": {"EIO": ONCE_AND_EVER},
}
GROUPS = {
    "disk": ["pread", "pwrite", "fdatasync", "fsync", "fallocate", "lseek", "truncate", "link",
             "unlink", "stat", "flock"],
    "network": ["recv", "send", "accept", "socket", "connect", "poll"],
    "resources": ["malloc", "mmap", "thread", "pipe", "open", "read", "write"],
}
CRITICAL = {"pwrite", "fdatasync", "fallocate", "malloc", "recv", "send"}


def sample(count, most):
    """Numbers of calls, spread evenly; the first and the last are among them."""
    if ALL or count <= most:
        return range(1, count + 1)
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})


def faults_of(phase, calls, counts):
    for call in calls:
        most = 8 if call in CRITICAL else 4
        for kind, lengths in FAULTS[call].items():
            for times in lengths:
                if phase == "start" and call == "send" and times == EVER:
                    continue        # to wake a thread is never impossible
                for number in sample(counts[call], most if times == 1 else most // 2):
                    yield Fault(call, kind, number, times)


class Bench:
    """Runs a mode many times, each in a directory of its own."""

    def __init__(self, directory, library, origin):
        self.directory, self.library, self.origin = directory, library, origin
        self.numbers = itertools.count()
        self.counted = {}

    def mode(self, name):
        return MODES[name](self.directory / str(next(self.numbers)), self.library, self.origin)

    def counts(self, name):
        """{phase: {call: how many there are}}, without a fault."""
        if name not in self.counted:
            self.counted[name] = self.count(self.mode(name))
        return self.counted[name]

    def count(self, mode):
        disk = Disk(CONTENT)
        assert mode.start(options=["--pidfile", mode.path("pid")]), mode.server.log()
        at = [dict.fromkeys(CALLS, 0), mode.control.counts()]
        if not any(at[1].values()):
            skip("needs a server that is linked dynamically")
        session = Session(mode, disk)
        session.run(mode.steps)
        at.append(mode.control.counts())
        mode.server.terminate()
        session.leave()
        mode.server.stop()
        at.append(mode.control.counts())
        assert not session.errors and not session.lost and not session.refused
        return {phase: {call: after[call] - before[call] for call in CALLS}
                for phase, before, after in zip(PHASES, at, at[1:])}

    def try_one(self, phase, name, fault):
        """Whether the call was made and failed; what is wrong, if anything."""
        mode = self.mode(name)
        try:
            return PHASES[phase](mode, fault), None
        except Exception as e:
            return 0, f"{fault} ({mode.directory}): {type(e).__name__}: {e}\n{mode.server.log()}"
        finally:
            mode.end()

    def try_all(self, phase, name, calls):
        faults = list(faults_of(phase, calls, self.counts(name)[phase]))
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            results = list(pool.map(lambda fault: self.try_one(phase, name, fault), faults))
        self.report(phase, name, faults, results)
        problems = [problem for _, problem in results if problem]
        assert not problems, f"{len(problems)} of {len(faults)}:\n" + "\n".join(problems[:5])

    def report(self, phase, name, faults, results):
        tried, injected, wrong = (collections.Counter() for _ in range(3))
        for fault, (count, problem) in zip(faults, results):
            tried[fault.call] += 1
            injected[fault.call] += count > 0
            wrong[fault.call] += problem is not None
        for call in tried:
            print(f"{phase} {name} {call}: {tried[call]} faults, {injected[call]} happened, "
                  f"{wrong[call]} wrong")


@pytest.fixture(scope="module")
def bench(tmp_path_factory, library):
    directory = tmp_path_factory.mktemp("f")
    make_image(directory / "origin.img")
    origin = Server(["--target", "--readonly", "--unix", directory / "origin",
                     directory / "origin.img"], directory, "origin", {}).wait_ready()
    yield Bench(directory, library, origin)
    origin.stop()
    assert (directory / "origin.img").read_bytes() == CONTENT, "the origin was changed"


@pytest.mark.limit(3600 if ALL else 300)
@pytest.mark.parametrize("calls", GROUPS)
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("phase", PHASES)
def test_calls_that_fail(bench, phase, name, calls):
    bench.try_all(phase, name, GROUPS[calls])


# Syncs that fail, or do not end

@pytest.fixture(params=MODES)
def running(request, bench):
    """A server of each mode, which is stopped in the end, and its files are looked at."""
    mode = bench.mode(request.param)
    mode.disk = Disk(CONTENT)
    assert mode.start(), mode.server.log()
    try:
        yield mode
        if mode.server.proc.poll() is None:
            mode.server.stop()
        mode.check_files(mode.disk)
    finally:
        mode.end()


# An overlay that is thrown away is never synced.
synced = pytest.mark.parametrize("running", ["target", "cow-file", "proxy"], indirect=True)
with_map = pytest.mark.parametrize("running", ["cow-file", "proxy"], indirect=True)


def carry_out(mode, *steps):
    """Without an error."""
    session = Session(mode, mode.disk)
    session.run(steps)
    session.leave()
    assert not session.lost and not session.refused


@hazard("fdatasync fails, the next one succeeds")
@pytest.mark.parametrize("running", ["target"], indirect=True)
def test_failed_sync_is_told_once_in_the_log_and_with_every_flush(running):
    """A target goes on reading and writing."""
    carry_out(running, *OPERATIONS)
    running.control.arm("fdatasync", errno.EIO)
    with running.server.client() as c, running.server.client() as other:
        assert c.error_of(FLUSH) == other.error_of(FLUSH) == NBD_EIO
        assert other.error_of(WRITE, 5, flags=FUA, payload=b"new") == NBD_EIO
        running.disk.change(5, b"new")
        assert c.pread(10, 2) == running.disk.versions[0][2:12]
    assert running.control.injected == 1
    carry_out(running, *OPERATIONS[:8], *OPERATIONS[11:])       # but for flush and FUA
    assert running.says(LOST) == 1
    running.server.expected_status = 1


@with_map
def test_failed_sync_ends_an_export_that_has_a_bitmap_file(running):
    """For who flushes and for all others; a restart believes what had been flushed."""
    carry_out(running, *OPERATIONS, op(FLUSH), op(WRITE, 90 * BLOCK, 2 * BLOCK))
    running.control.arm("fdatasync", errno.EIO)
    with running.server.client() as c, running.server.client() as other:
        assert c.error_of(FLUSH) == other.error_of(FLUSH) == NBD_EIO
        assert other.error_of(WRITE, 5, payload=b"new") == c.error_of(READ, 0, 10) == NBD_EIO
    check_end_of_export(running)
    running.server.expected_status = 1


def held_up(running):
    """A client whose FLUSH waits for a sync that does not end, and its cookie."""
    running.control.arm("fdatasync", HOLD, times=EVER)
    c = running.server.client()
    cookie = c.request(FLUSH)
    until(lambda: running.control.injected, what="a sync")
    return c, cookie


@hazard("a disk that hangs")
@synced
def test_sync_that_hangs_holds_up_only_who_waits_for_it(running):
    carry_out(running, *OPERATIONS[:8])
    c, cookie = held_up(running)
    carry_out(running, *OPERATIONS[:8], *TOGETHER, *OPERATIONS[11:])
    assert c.pread(10, 0) == running.disk.versions[0][:10]
    assert cookie in c.pending
    running.control.release()
    assert c.collect(cookie).error == 0


def stop_while_held_up(running):
    carry_out(running, *OPERATIONS[:8])
    c, cookie = held_up(running)
    running.server.terminate()
    until(lambda: "stopping" in running.server.log(), what="the end to begin")
    return c, cookie


@hazard("SIGTERM with a disk that hangs")
@synced
def test_flush_that_is_done_in_time_is_answered_though_the_server_stops(running):
    c, cookie = stop_while_held_up(running)
    running.control.release()
    with contextlib.suppress(Closed):       # in time it was not
        assert c.collect(cookie).error == 0
    c.close()
    running.server.wait(DEADLINE)
    running.control.disarm()


@hazard("SIGTERM with a disk that hangs")
def test_sync_that_does_not_end_does_not_keep_the_server_from_ending(bench):
    """What was answered before is kept.  Whether the rest is on stable storage is not known: the
    status says so."""
    def hang(mode):
        mode.disk = Disk(CONTENT)
        assert mode.start(), mode.server.log()
        stop_while_held_up(mode)[0].close()
        mode.server.expected_status = 1
        mode.server.wait(DEADLINE)
        assert "1 connections wait for the disk" in mode.server.log()
        mode.control.disarm()
        mode.check_files(mode.disk)
        mode.end()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(hang, [bench.mode(name) for name in ("target", "cow-file", "proxy")]))


@hazard("SIGTERM with a disk that hangs")
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@with_map
def test_last_commit_that_does_not_end_does_not_keep_the_server_from_ending(running, number):
    """Whichever of its syncs hangs, on whatever thread."""
    carry_out(running, op(FLUSH), op(WRITE, 90 * BLOCK, 2 * BLOCK))
    running.control.arm("fdatasync", HOLD, number, EVER)
    running.server.terminate()
    running.server.expected_status = None
    status = running.server.wait(DEADLINE)
    assert status == (running.control.injected > 0)
    assert (status == 1) == ("waits for the disk" in running.server.log())
    running.control.disarm()


@hazard("a copy into a cache that has failed")
@pytest.mark.parametrize("running", ["proxy"], indirect=True)
def test_copy_into_a_cache_that_has_failed_is_no_success(running):
    running.control.arm("fdatasync", errno.EIO)
    with running.server.client() as c:
        assert c.error_of(FLUSH) == NBD_EIO
    running.server.expected_status = 1
    result = bgctl("--cache-all", running.path("ctl"))
    assert result.returncode == 1 and "cannot copy: Input/output error" in result.stderr
    assert "copy: failed\n" in bgctl("--query", running.path("ctl")).stdout


@hazard("SIGTERM with a full disk")
@with_map
def test_full_disk_does_not_keep_the_server_from_ending(running):
    """Under the bitmap file, when it is to be committed for the last time."""
    carry_out(running, op(FLUSH), op(WRITE, 90 * BLOCK, 2 * BLOCK))
    running.control.arm("pwrite", errno.ENOSPC, times=EVER)
    running.server.expected_status = 1
    running.server.stop()
    assert running.says(WAITS)
    running.control.disarm()


# A snapshot

@hazard("disk full, or an I/O error, under a snapshot")
@pytest.mark.parametrize("call, kind", [("pread", errno.EIO), ("pwrite", errno.ENOSPC)])
@pytest.mark.parametrize("running", ["target"], indirect=True)
def test_old_block_that_cannot_be_kept_fails_the_snapshot_and_not_the_write(running, call, kind):
    """The snapshot's own thread is held up meanwhile, at the first half of the disk."""
    need_copies(running.directory)
    running.control.arm("pwrite", HOLD)
    running.server.proc.send_signal(signal.SIGUSR1)
    until(lambda: running.control.injected == 1, what="a snapshot that waits")
    running.control.arm(call, kind)
    carry_out(running, op(WRITE, 200 * BLOCK, BLOCK), op(WRITE, 230 * BLOCK + 1, 100))
    assert running.control.injected == 2
    running.control.release()
    until(lambda: os.strerror(kind) in running.server.log(), what="the end of the snapshot")
    assert not [name for name in running.files() if "snapshot" in name]


# Clients that are disconnected

@hazard("after a reconnect, what waited from before lands after a newer write")
def test_write_of_a_client_that_was_disconnected_does_not_bury_a_newer_one(bench, server, tmp_path):
    """It waits for the origin, which has stopped; its client comes back and writes again."""
    make_image(tmp_path / "origin")
    origin = server(tmp_path / "origin", "--unix", tmp_path / "o")
    mode = Proxy(tmp_path / "proxy", bench.library, origin)
    try:
        assert mode.start(), mode.server.log()
        origin.proc.send_signal(signal.SIGSTOP)
        before = mode.server.client()
        before.request(WRITE, 100 * BLOCK + 10, payload=b"old" * 100)
        until(lambda: mode.pending() == 1, what="a write that waits")
        before.send(bytes(28))
        before.expect_closed()
        with mode.server.client() as c:
            c.pwrite(b"n" * BLOCK, 100 * BLOCK)
            origin.proc.send_signal(signal.SIGCONT)
            until(lambda: mode.pending() == 0, what="the end of all that waits")
            assert c.pread(BLOCK, 100 * BLOCK) == b"n" * BLOCK
        mode.server.stop()
    finally:
        origin.proc.send_signal(signal.SIGCONT)
        mode.end()


# The background copy

@hazard("the copy starves clients")
def test_copy_that_waits_for_the_disk_does_not_keep_a_miss_waiting(library, tmp_path):
    """While a client waits for the origin, what the copy brings is stored by a worker.  (What is
    held up is data, so there is no hole: that would only be recorded.)"""
    content = pattern(0, SIZE)
    with Origin(content, unix=tmp_path / "origin") as origin:
        mode = Proxy(tmp_path / "proxy", library, origin)
        assert mode.start(), mode.server.log()
        origin.hold(lambda r: r.length == BLOCK)
        with mode.server.client() as c:
            cookie = c.request(READ, 100 * BLOCK, BLOCK)
            until(lambda: origin.held, what="a miss")
            mode.control.arm("pwrite", HOLD)
            mode.ask("cache-all2")
            until(lambda: mode.control.injected == 1, what="a store that waits")
            origin.release()
            assert c.collect(cookie).data == content[100 * BLOCK:101 * BLOCK]
            mode.control.release()
        assert mode.ask("cache-all")
        mode.server.stop()
        assert mode.path("cache").read_bytes() == content
        mode.end()


# Full disks, limits

@hazard("disk full on a write")
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_full_disk_under_a_sparse_image_is_enospc(server, file_system, kind):
    """For that write: what is there can be read and written, and TRIM makes room."""
    need_holes()
    image = make_disk(file_system(kind, 2 * MIB) / "disk.img", 8 * MIB)
    s = server(image)
    with s.client() as c, s.client(structured=True) as other:
        errors = [c.error_of(WRITE, i * 64 * KIB, payload=pattern(i * 64 * KIB, 64 * KIB))
                  for i in range(128)]
        held = errors.index(NBD_ENOSPC)
        assert held > 9 and set(errors) == {0, NBD_ENOSPC}
        assert other.pread(held * 64 * KIB) == pattern(0, held * 64 * KIB)
        assert other.error_of(WRITE, 8 * MIB - MIB, payload=b"x" * MIB) == NBD_ENOSPC
        other.pwrite(b"new", 5)
        assert c.pread(10, 3) == pattern(3, 2) + b"new" + pattern(8, 5)
        c.trim(MIB // 2, MIB // 2)
        c.flush()
        other.pwrite(pattern(0, 64 * KIB), 7 * MIB)
        assert c.pread(64 * KIB, 7 * MIB) == pattern(0, 64 * KIB)
        c.flush()


def limit_sizes(server, limit=None):
    """None takes the limit away."""
    _, hard = resource.prlimit(server.proc.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.proc.pid, resource.RLIMIT_FSIZE, (limit or hard, hard))


@hazard("a file size limit kills the server")
def test_limit_of_file_sizes_is_enospc_and_nothing_for_reads(running):
    limit = 256 * KIB
    above = [(600 * KIB, BLOCK), (600 * KIB + 100, 200), (limit - BLOCK, 2 * BLOCK),
             (300 * KIB, 300 * KIB)]
    limit_sizes(running.server, limit)
    with running.server.client(structured=True) as c:
        for at, length in above:
            o = Operation(WRITE, at, length)
            assert c.error_of(WRITE, at, payload=o.payload) == NBD_ENOSPC
            o.failed(running.disk)
    for _ in range(2):
        carry_out(running, op(READ, 0, SIZE), op(READ, 700 * KIB, 5), op(WRITE, 777, limit - 777),
                  op(WRITE, 9, 9, FUA), op(FLUSH))
    limit_sizes(running.server)
    carry_out(running, *running.steps)


@pytest.mark.parametrize("arguments", [
    ["--target", "--create", MIB, "disk"], ["--cow-target", "base"],
    ["--cow-target", "--cow-file", "overlay", "base"],
    ["--proxy", "origin", "cache", "cache.map", "ctl"]], ids=["create", "cow", "cow-file", "proxy"])
def test_limit_of_file_sizes_at_the_start_is_named(run_server, bench, tmp_path, monkeypatch,
                                                   arguments):
    monkeypatch.chdir(tmp_path)
    make_image(tmp_path / "base")
    origin = f"unix:{bench.origin.unix}"
    done = run_server("--unix", "socket", *[origin if a == "origin" else a for a in arguments],
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                                            (64 * KIB, 64 * KIB)))
    assert done.returncode == 1 and "File too large" in done.stderr, done
    assert len(done.stderr.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"base", "overlay.map", "cache.map"}


@hazard("a full disk under the log file")
def test_log_that_cannot_be_written_costs_nothing(server, file_system, tmp_path):
    place = file_system("tmpfs", 64 * KIB)
    with contextlib.suppress(OSError), open(place / "junk", "wb", buffering=0) as f:
        while True:
            f.write(bytes(BLOCK))
    make_image(tmp_path / "disk")
    s = server(args=["--target", "--unix", tmp_path / "s", "--logpath", place / "log",
                     tmp_path / "disk"], wait=False)
    s.address = str(tmp_path / "s")

    def connects():
        with contextlib.suppress(OSError):
            return s.client()

    with until(connects) as c:
        assert c.pread(SIZE) == CONTENT
    assert (place / "log").stat().st_size == 0
    s.settle()


# Files that others make shorter

SHORT = 5000
SHORTENED = [("target", "disk"), ("cow", "disk"), ("cow-file", "disk"), ("cow-file", "overlay"),
             ("proxy", "cache")]


@pytest.fixture(params=SHORTENED, ids=["-".join(pair) for pair in SHORTENED])
def shortened(request, bench):
    """(mode, file): all that can be is in that file."""
    name, file = request.param
    mode = bench.mode(name)
    assert mode.start(), mode.server.log()
    with mode.server.client() as c:
        if file == "overlay":
            c.pwrite(CONTENT)
        if file == "cache":
            assert mode.ask("cache-all")
        assert c.pread(SIZE) == c.pread(SIZE) == CONTENT
    try:
        yield mode, mode.path(file)
        mode.server.stop()
    finally:
        mode.end()


@hazard("image truncated under a running server")
def test_truncated_file_costs_one_connection_at_most(shortened):
    """What is read is right, or an error."""
    mode, file = shortened
    os.truncate(file, SHORT)
    for length in (1, 700, BLOCK, 60 * KIB, 200 * KIB, SIZE):
        for at in (0, SHORT - length, SHORT, 400 * KIB, HOLE.start, SIZE - length):
            if 0 <= at <= SIZE - length:
                check_read(mode.server, at, length, at + length <= SHORT)
    with mode.server.client(contexts=[ALLOCATION]) as c:
        for command, *rest in [(STATUS, 0, SIZE), (CACHE, 0, SIZE), (FLUSH,), (TRIM, 0, SIZE),
                               (ZEROES, 100, 99999)]:
            assert c.error_of(command, *rest) in (0, NBD_EIO)
        assert c.error_of(WRITE, 500 * KIB + 7, payload=b"x" * 9000) in (0, NBD_EIO)
    assert mode.server.is_served()


def check_read(server, at, length, is_there):
    with server.client() as c:
        try:
            reply = c.call(READ, at, length)
        except Closed:
            assert not is_there
            return
    assert reply.error == (0 if is_there else NBD_EIO)
    assert not is_there or reply.data == CONTENT[at:at + length]


@hazard("image truncated while it is read")
@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_file_truncated_while_large_reads_are_in_flight(shortened, structured):
    mode, file = shortened
    for size in (SIZE // 2, SHORT, 0):
        with mode.server.client(structured=structured) as c, contextlib.suppress(Closed):
            cookies = {c.request(READ, i * 9000, 500 * KIB): i * 9000 for i in range(60)}
            os.truncate(file, size)
            for cookie, at in cookies.items():
                check_reply(c.collect(cookie), at)
    assert mode.server.proc.poll() is None


def check_reply(reply, at):
    """The kernel may send zeros in the place of what goes away while it is sent."""
    assert reply.error in (0, NBD_EIO)
    if reply.error:
        return
    for i in range(0, len(reply.data), BLOCK):
        piece = reply.data[i:i + BLOCK]
        right = CONTENT[at + i:at + i + len(piece)]
        assert all(a in (b, 0) for a, b in zip(piece, right)), at + i
