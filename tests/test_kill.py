"""kill -9 at any moment: no acknowledged write is lost, and no block is wrong.

Several clients read, write, zero, trim and flush at the same time, a proxy
copies the rest of the disk meanwhile, and the server is killed: at a random
moment, at a certain system call, or before or after the n-th thing that it does
to a file or a socket.  The next one goes on with its files.  Each
block must then be as the last acknowledged write made it, or as the write did
that was in flight.  There is never more than one in flight to a block.

XNBD_KILLS=<number> kills more often; XNBD_SEED=<seed> repeats the operations,
though not the moments.
"""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import time

import pytest

from conftest import SERVER, need, need_punch, skip
from nbd import *
from test_model import Session, random_seed, turn
from test_powercut import (ADDRESS, ALPHABET, BLOCK, CHANGES, Cow, Proxy, Target, another, ask,
                           content_of, has_proxy, kill, mixture, preloaded, recorder, same, shows)
from test_powercut import Operation as Change
from test_snapshot import Snapshots

hazard = pytest.mark.hazard
MIB = 1 << 20
KILLS = int(os.environ.get("XNBD_KILLS") or 50)
KILLS_OF_A_DISK = 5             # then it is finished, and another one begins
STRIDE = max(1, 350 // KILLS)   # of moments, from kill to kill


# The model

class Disk:
    """What each block is.

    blocks      those that were ever changed: what the last answered change made
    flying      {block: the change or the READ that is in flight}
    """

    def __init__(self, content):
        self.content, self.size = content, len(content)
        self.count = -(-self.size // BLOCK)
        self.blocks, self.flying = {}, {}

    def block(self, number):
        if number in self.blocks:
            return self.blocks[number]
        return self.content[number * BLOCK:(number + 1) * BLOCK]

    def legal(self, number):
        """What a server that starts now may show."""
        op, old = self.flying.get(number), self.block(number)
        return [old, op.apply(number, old)] if op and op.command in CHANGES else [old]

    def settle(self, numbers, data):
        """What these blocks, which follow each other, are after a kill."""
        for i, number in enumerate(numbers):
            legal, got = self.legal(number), data[i * BLOCK:(i + 1) * BLOCK]
            assert got in legal, (f"block {number} is {mixture(got)}; legal: "
                                  + "; ".join(map(mixture, legal))
                                  + f"; in flight: {self.flying.get(number)}")
            self.blocks[number] = got

    def begin(self, op):
        self.flying.update((b, op) for b in op.blocks())

    def end(self, op):
        for b in op.blocks():
            if op.command in CHANGES:
                self.blocks[b] = op.apply(b, self.block(b))
            del self.flying[b]

    def bytes(self, at, length):
        first, last = at // BLOCK, -(-(at + length) // BLOCK)
        data = b"".join(self.block(b) for b in range(first, last))
        return data[at - first * BLOCK:at - first * BLOCK + length]

    def all(self):
        return self.bytes(0, self.size)


class Operation(Change):
    """As test_model's Session wants it."""

    private = False

    def __init__(self, *request):
        super().__init__(*request)
        self.start = self.at
        del self.sent[self.cookie]      # there is no record to find it by

    def payload(self):
        return self.data if self.command == NBD_CMD_WRITE else b""

    def begin(self, disk):
        disk.begin(self)
        self.expected = disk.bytes(self.at, self.length) if self.command == NBD_CMD_READ else None

    def end(self, disk, reply):
        same(self, reply, self.expected)
        disk.end(self)


class Generator:
    """Operations on blocks that have nothing in flight.  Half of them go to a
    small part of the disk, so that its blocks are written again and again."""

    KINDS = {NBD_CMD_WRITE: 12, NBD_CMD_WRITE_ZEROES: 2, NBD_CMD_TRIM: 1, NBD_CMD_READ: 6,
             NBD_CMD_FLUSH: 1}

    def __init__(self, disk, rng):
        self.disk, self.rng = disk, rng

    def range(self):
        size = self.disk.size if self.rng.random() < 0.5 else min(MIB, self.disk.size)
        start, length = self.rng.randrange(size), self.rng.choice([1, 700, BLOCK, 3 * BLOCK, 60000])
        if self.rng.random() < 0.5:
            start -= start % BLOCK
        return start, min(length, self.disk.size - start)

    def next(self):
        command, = self.rng.choices(list(self.KINDS), list(self.KINDS.values()))
        if command == NBD_CMD_FLUSH:
            return Operation(command)
        flags = NBD_CMD_FLAG_FUA if command in CHANGES and self.rng.random() < 0.02 else 0
        while True:
            at, length = self.range()
            blocks = range(at // BLOCK, -(-(at + length) // BLOCK))
            if not any(b in self.disk.flying for b in blocks):
                return Operation(command, at, length, flags)


# Lives of a server

def drain(sessions):
    """Takes the replies that the server has sent before it was killed."""
    for s in sessions:
        with contextlib.suppress(ConnectionError):
            while s.in_flight:
                s.receive()


def live(server, disk, rng, seconds):
    """Load on several connections, until the server is killed."""
    sessions = [Session(server.client(), disk, Generator(disk, rng), 16) for _ in range(4)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for s in sessions:
            s.fill()
        turn(sessions)
    kill(server)
    drain(sessions)
    return sum(s.count for s in sessions)


def runs(numbers, most=256):
    """Numbers that follow each other, together."""
    run = []
    for n in sorted(numbers):
        if run and (n != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(n)
    if run:
        yield run


def settle(server, disk, rng):
    """After a kill, everything that was ever changed, and a few blocks more.  The
    others stay as they are: at the origin only, or copied."""
    numbers = {*disk.blocks, *disk.flying, *rng.sample(range(disk.count), 20)}
    with server.client() as c:
        for run in runs(numbers):
            length = min(len(run) * BLOCK, disk.size - run[0] * BLOCK)
            disk.settle(run, c.pread(length, run[0] * BLOCK))
    disk.flying.clear()


def modes(kind, server, tmp_path):
    """make(name, content): a Mode on a disk of that content."""
    need_punch(tmp_path)
    if kind is Proxy and not has_proxy():
        pytest.skip("this version has no --proxy")
    return lambda name, content: kind(server, tmp_path / name, content)


@pytest.fixture(params=[Cow, Proxy], ids=["cow", "proxy"])
def mode(request, server, tmp_path):
    return modes(request.param, server, tmp_path)


@pytest.fixture
def proxy(server, tmp_path):
    return modes(Proxy, server, tmp_path)


@pytest.fixture
def spoilt(mode, server):
    """The same, and the image has junk where no block is held: as it may be after
    a power cut.  It must not be taken for something."""
    def make(name, content):
        m = mode(name, content)
        with another(server, m.arguments(m.directory)):
            pass
        m.spoil(range(-(-m.size // BLOCK)))
        return m

    return make


def start(server, mode):
    return server(args=mode.arguments(mode.directory))


def finish(server, mode, disk):
    """The disk is all there, and goes on without its origin."""
    s = start(server, mode)
    if mode.is_proxy:
        ask(mode.control(mode.directory), "cache-all")
        ask(mode.control(mode.directory), "switch")
        mode.origin.stop()
    shows(s, [[disk.block(b)] for b in range(disk.count)])
    s.stop()
    if mode.is_proxy:
        assert (mode.directory / mode.image).read_bytes() == disk.all()
    assert mode.base.read_bytes() == disk.content, "the origin was changed"


@hazard("block marked before its data arrived: kill -9 leaves zeros that count as cached")
@pytest.mark.limit(240 + 2 * KILLS)
def test_kill_at_random_moments(spoilt, server):
    seed = random_seed()
    print(f"XNBD_SEED={seed}")
    for number in range(-(-KILLS // KILLS_OF_A_DISK)):
        rng = random.Random(f"{seed}/{number}")
        disk = Disk(content_of(16 * MIB + 77))
        m = spoilt(f"disk{number}", disk.content)
        if not m.is_proxy and number % 2:
            continue                # the same code, less of it
        for _ in range(KILLS_OF_A_DISK):
            s = start(server, m)
            settle(s, disk, rng)
            if m.is_proxy:
                ask(m.control(m.directory), "cache-all2 1")
            assert live(s, disk, rng, rng.uniform(0.01, 0.3)) > 0
        s = start(server, m)
        settle(s, disk, rng)
        kill(s)
        finish(server, m, disk)


# At a system call

def perform(client, disk):
    """A fixed sequence of operations; raises ConnectionError when the server goes."""
    for round, name in enumerate(list(ALPHABET) * 2):
        command, *rest = ALPHABET[name]
        if rest:
            rest[0] += round % 5 * 8 * BLOCK
        op = Operation(command, *rest)
        op.begin(disk)
        cookie = client.request(op.command, op.at, op.length, op.flags, op.payload())
        op.end(disk, client.collect(cookie))


@contextlib.contextmanager
def killing(server, told, call, number):
    """strace, which kills the server at that call.  It is killed itself in the end:
    sometimes it does not notice that the server has gone."""
    with open(told, "wb") as log:
        strace = subprocess.Popen([need("strace", "strace"), "-f", "-o", "/dev/null", "-e",
                                   f"inject={call}:signal=SIGKILL:when={number}",
                                   "-p", str(server.proc.pid)], stderr=log)
    try:
        until(lambda: "attached" in told.read_text() or strace.poll() is not None)
        if "attached" not in told.read_text():
            skip(f"needs to trace a process (root): {told.read_text().strip()}")
        yield
    finally:
        strace.kill()
        strace.wait()


def is_killed(s, m, disk, told, call, number):
    """Performs with a server that is killed at that call, if it gets there."""
    with s.client() as c, killing(s, told, call, number):
        if m.is_proxy:
            with contextlib.suppress(OSError):
                ask(m.control(m.directory), "cache-all2 1")
        try:
            perform(c, disk)
            return False
        except ConnectionError:
            return True


@hazard("block marked before its data arrived: kill -9 leaves zeros that count as cached")
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync", "fallocate", "sendmsg", "recvfrom",
                                  "preadv2"])
def test_kill_at_each_system_call(spoilt, server, tmp_path, call):
    """strace counts the calls of each thread on its own."""
    for number in (1, 2, 3, 5, 8):
        disk = Disk(content_of(MIB + 77))
        m = spoilt(f"disk{number}", disk.content)
        s = start(server, m)
        killed = is_killed(s, m, disk, tmp_path / f"told{number}", call, number)
        kill(s)
        s = start(server, m)
        settle(s, disk, random.Random(number))
        kill(s)
        assert killed or number > 1
        if not killed:
            break
    finish(server, m, disk)


@hazard("switch while a block is in flight says 100 % and leaves it zeros")
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync", "sendmsg", "futex"])
def test_kill_in_a_switch(proxy, server, tmp_path, call):
    """A proxy goes on with the files; and if the switch was said to be done, a
    target does with the image alone."""
    for number in (1, 2, 3):
        disk = Disk(content_of(MIB + 77))
        m = proxy(f"disk{number}", disk.content)
        s = start(server, m)
        with s.client() as c:
            ask(m.control(m.directory), "cache-all")
            perform(c, disk)
            with killing(s, tmp_path / f"told{number}", call, number):
                done = switches(m, c, disk)
        kill(s)
        if done:
            with another(server, ["--target", *ADDRESS, m.directory / m.image]) as s:
                shows(s, [disk.legal(b) for b in range(disk.count)])
        s = start(server, m)
        settle(s, disk, random.Random(number))
        kill(s)
    finish(server, m, disk)


def switches(m, client, disk):
    """Writes during and after a switch; whether that was done."""
    done = False
    with contextlib.suppress(ConnectionError):
        op = Operation(NBD_CMD_WRITE, 5 * BLOCK + 7, 60000)
        op.begin(disk)
        cookie = client.request(op.command, op.at, op.length, op.flags, op.payload())
        done = ask(m.control(m.directory), "switch") is not None
        op.end(disk, client.collect(cookie))
        perform(client, disk)
    return done


@pytest.mark.parametrize("call", ["fallocate", "pwrite64", "fsync", "ftruncate", "fdatasync",
                                  "flock", "openat"])
def test_kill_in_the_first_start_is_no_obstacle(mode, server, tmp_path, call):
    """Whatever it has created when it comes to that call, the next one goes on."""
    disk = Disk(content_of(10 * BLOCK))
    for number in range(1, 40):
        m = mode(f"disk{number}", disk.content)
        if not killed_in_start(m, tmp_path / "told", call, number):
            break
        with another(server, m.arguments(m.directory)) as s:
            shows(s, [[disk.block(b)] for b in range(disk.count)])


@hazard("the live map is believed after a reboot: the start that empties it is killed")
@pytest.mark.parametrize("why", ["power_cut", "fail_storage"])
@pytest.mark.parametrize("call", ["ftruncate", "pwrite64", "fdatasync"])
def test_kill_while_the_live_map_is_emptied(spoilt, server, tmp_path, call, why):
    """Whatever was done by then, the next start believes the committed map alone."""
    disk = Disk(content_of(MIB + 77))
    m = spoilt("disk", disk.content)
    s = start(server, m)
    with s.client() as c:
        perform(c, disk)
        c.flush()
    kill(s)
    for number in range(1, 10):
        getattr(m, why)()
        if not killed_in_start(m, tmp_path / "told", call, number):
            break
        for _ in range(2):
            with another(server, m.arguments(m.directory)) as s:
                shows(s, [[disk.block(b)] for b in range(disk.count)])
    assert 1 < number < 9
    finish(server, m, disk)


@pytest.mark.parametrize("call", ["rename", "fallocate", "pwrite64", "fsync", "fdatasync", "flock"])
def test_kill_while_the_bitmap_is_cleared(proxy, server, tmp_path, call):
    """Either it was, or it was not."""
    disk = Disk(content_of(MIB))
    m = proxy("disk", disk.content)
    for number in (1, 2):
        s = start(server, m)
        with s.client() as c:
            perform(c, disk)
        kill(s)
        if not killed_in_start(m, tmp_path / "told", call, number, "--clear-bitmap"):
            break
        s = start(server, m)
        before, disk.blocks = disk.blocks, {}
        with s.client() as c:
            found = c.pread(disk.size)
        kill(s)
        if found != disk.content:
            disk.blocks = before
            assert found == disk.all()


def killed_in_start(m, told, call, number, *options):
    """False if it listens in spite of that.  strace -D leaves the server as our child."""
    with open(told, "wb") as log:
        p = subprocess.Popen([need("strace", "strace"), "-D", "-f", "-o", "/dev/null", "-e",
                              f"inject={call}:signal=SIGKILL:when={number}", SERVER,
                              *m.arguments(m.directory, *options)],
                             stdin=subprocess.DEVNULL, stderr=log)
    try:
        until(lambda: p.poll() is not None or "listening" in told.read_text(), what="a start")
        if p.poll() is not None and p.returncode != -signal.SIGKILL:
            skip(f"needs to trace a process (root): {told.read_text().strip()}")
        return p.poll() is not None
    finally:
        p.kill()
        p.wait()


# At a moment

class Scenario:
    """What a server does, from its start on, until it is killed.

    disk        what it is to hold
    switched    a switch was answered
    instant     the disk when a snapshot was ordered
    """

    def __init__(self, server, recorder, mode, work):
        self.start_server, self.recorder = server, recorder
        self.mode, self.work = mode, work

    def renew(self):
        """The files and the disk as in the beginning; what a cache has is junk."""
        for file in self.mode.directory.iterdir():
            file.unlink()
        self.mode.make_files()
        if self.mode.is_proxy:
            self.image().write_bytes(os.urandom(self.mode.size))
        self.disk = Disk(self.mode.content)
        self.switched, self.instant = False, None

    def start(self, moment):
        """False if it is killed before it listens."""
        environment = preloaded(self.recorder, self.mode.directory, "/dev/null")
        self.server = self.start_server(args=self.mode.arguments(self.mode.directory), wait=False,
                                        env={**environment, "POWERCUT_KILL": str(moment)})
        until(lambda: self.server.addresses or self.is_dead())
        self.server.address = next(iter(self.server.addresses), None)
        return self.server.address is not None

    def is_dead(self):
        return self.server.proc.poll() == -signal.SIGKILL

    def is_killed_at(self, moment):
        """Whether there is such a moment."""
        self.renew()
        try:
            if self.start(moment):
                with self.server.client() as c:
                    self.work(self, c)
        except OSError as e:
            until(self.is_dead, what=f"kill -9 after {e}")
        killed = self.is_dead()
        kill(self.server)
        return killed

    def check(self, rng):
        """The next server shows what was acknowledged."""
        if self.switched:
            with another(self.start_server, ["--target", *ADDRESS, self.image()]) as s:
                shows(s, [self.disk.legal(b) for b in range(self.disk.count)])
        for path in self.snapshots():
            assert path.read_bytes() == self.instant, f"{path.name} is wrong"
        with another(self.start_server, self.mode.arguments(self.mode.directory)) as s:
            settle(s, self.disk, rng)

    def image(self):
        return self.mode.directory / self.mode.image

    def snapshots(self):
        return [p for p in self.mode.directory.iterdir() if ".snapshot." in p.name]

    def ask(self, command):
        ask(self.mode.control(self.mode.directory), command)


def change(scenario, client):
    """With a copy in the background, and commits."""
    if scenario.mode.is_proxy:
        scenario.ask("cache-all2 1")
    perform(client, scenario.disk)


def change_and_switch(scenario, client):
    """All is copied, or written; a client writes meanwhile."""
    scenario.ask("cache-all")
    perform(client, scenario.disk)
    op = Operation(NBD_CMD_WRITE, 5 * BLOCK + 7, 60000)
    op.begin(scenario.disk)
    cookie = client.request(op.command, op.at, op.length, op.flags, op.payload())
    scenario.ask("switch")
    scenario.switched = True
    op.end(scenario.disk, client.collect(cookie))
    perform(client, scenario.disk)


def change_and_force_a_switch(scenario, client):
    """Whole blocks are written, so that nothing else is here; it becomes zeros."""
    for at in range(0, 30 * BLOCK, 3 * BLOCK):
        op = Operation(NBD_CMD_WRITE, at, BLOCK)
        op.begin(scenario.disk)
        op.end(scenario.disk, client.collect(client.request(op.command, op.at, op.length, op.flags,
                                                            op.payload())))
    scenario.ask("switch force")
    scenario.switched = True


def change_and_take_a_snapshot(scenario, client):
    perform(client, scenario.disk)
    scenario.instant = scenario.disk.all()
    snapshots = Snapshots(scenario.server)
    snapshots.signal()
    until(lambda: snapshots.count("started") or scenario.is_dead())
    perform(client, scenario.disk)
    until(lambda: snapshots.over() or scenario.is_dead())


@hazard("kill -9 loses what was acknowledged: each moment")
@pytest.mark.limit(240 + 4 * KILLS)
@pytest.mark.parametrize("kind, work", [
    (Cow, change), (Proxy, change), (Proxy, change_and_switch), (Target, change_and_take_a_snapshot)
], ids=["cow", "commit", "switch", "snapshot"])
def test_kill_at_each_moment(server, recorder, tmp_path, kind, work):
    """Every STRIDE-th of them, or with enough XNBD_KILLS each."""
    need_punch(tmp_path)
    seed = random_seed()
    print(f"XNBD_SEED={seed}")
    rng = random.Random(seed)
    mode = kind(server, tmp_path.resolve() / "disk", content_of(40 * BLOCK + 77))
    scenario = Scenario(server, recorder, mode, work)
    first = rng.randrange(1, STRIDE + 1)
    for moment in itertools.count(first, STRIDE):
        killed = scenario.is_killed_at(moment)
        scenario.check(rng)
        if not killed:
            break
    assert moment > 40, "is the library not loaded?"
    print(f"killed at {(moment - first) // STRIDE} moments, the last is about {moment}")
    assert mode.base.read_bytes() == mode.content, "the origin was changed"


@hazard("kill -9 loses what was acknowledged: in a forced switch")
@pytest.mark.limit(240 + 4 * KILLS)
def test_forced_switch_that_is_killed_has_happened_or_not(server, recorder, tmp_path):
    """For all blocks that were not here at the same time: they are zeros then, or the
    origin's as before; and what they are, they stay."""
    need_punch(tmp_path)
    rng = random.Random(random_seed())
    mode = Proxy(server, tmp_path.resolve() / "disk", content_of(40 * BLOCK + 77))
    scenario, seen = Scenario(server, recorder, mode, change_and_force_a_switch), set()
    first, step = rng.randrange(1, STRIDE + 1), max(1, STRIDE // 3)
    for moment in itertools.count(first, step):
        killed = scenario.is_killed_at(moment)
        switched = has_switched(scenario)
        assert has_switched(scenario) == switched
        seen.add(switched)
        if not killed:
            break
    assert moment > 40 and seen == {False, True}


def has_switched(scenario):
    """Whether all that was not written is zeros; else all of it is the origin's."""
    disk = scenario.disk
    with another(scenario.start_server, scenario.mode.arguments(scenario.mode.directory)) as s:
        with s.client() as c:
            data = c.pread(disk.size)
    touched = {*disk.blocks, *disk.flying}
    absent = [b for b in range(disk.count) if b not in touched]
    for b in touched:
        zeros = [bytes(BLOCK)] if b in disk.flying else []
        assert data[b * BLOCK:(b + 1) * BLOCK] in [*disk.legal(b), *zeros], f"block {b}"
    found = b"".join(data[b * BLOCK:(b + 1) * BLOCK] for b in absent)
    before = b"".join(disk.block(b) for b in absent)
    assert found in ([bytes(len(before))] if scenario.switched else [before, bytes(len(before))])
    return found != before
