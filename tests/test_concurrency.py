"""Snapshots, a switch, reconnects, an origin that dies, and the server's end, in
the middle of many clients' work.

Operations and model are those of test_model.py: each reply is checked, and in
the end the image.  What happens meanwhile is a script, a generator: it goes on
a bit after each turn of the clients, who so are always busy.  A server's life
ends with SIGTERM, and they do not stop for that; the next one goes on with its
files.

XNBD_MODEL_SECONDS=<seconds for each mode> repeats the scripts, XNBD_SEED=<seed>
the operations, though not the moments.

The same under Valgrind: no error, no lost memory at the end.
"""

import contextlib
import itertools
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import pytest

import conftest
import test_model
from conftest import SERVER, make_disk, need
from nbd import *
from test_model import Generator, Model, Write, dialect, random_seed, read_all, turn
from test_snapshot import Snapshots

MIB = 1 << 20
SIZE = 8 * MIB + 77
SECONDS = float(os.environ.get("XNBD_MODEL_SECONDS") or 0)
BGCTL = os.environ.get("XNBD_BGCTL", str(Path(SERVER).with_name("xnbd-bgctl")))
ADDRESS = ["--laddr", "127.0.0.1", "--lport", "0"]
CONTENT = pattern(0, SIZE // 2)


# Clients

class Session(test_model.Session):
    """A connection that may come to its end while it works.

    ending      the server was told to stop
    refused     operations that it did not want then: who knows what became of them
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.ending = self.over = False
        self.refused = []

    def receive(self):
        try:
            reply = self.client.collect()
        except ConnectionError:
            self.lost()
            return
        op = self.in_flight.pop(reply.cookie)
        if self.ending and reply.error == NBD_ESHUTDOWN:
            self.refused.append(op)
        else:
            op.end(self.model, reply)

    def flush(self):
        try:
            super().flush()
        except ConnectionError:
            pass                    # there may be replies to be read, and then the end

    def lost(self):
        assert self.ending, "the server has closed a connection"
        self.over = True

    def events(self):
        return 0 if self.over else super().events()


class Crowd:
    """The clients of a server, over TCP."""

    def __init__(self, server, model, seed, connections, in_flight):
        self.server, self.model = server, model
        self.sessions = [self.session(i, seed, in_flight) for i in range(connections)]

    def session(self, i, seed, in_flight):
        client = self.server.client(**dialect(i))
        generator = Generator(self.model.size, i, client.structured, seed, client.extended)
        return Session(client, self.model, generator, in_flight)

    def turn(self):
        """Where all of them wait for an origin, only the script can go on."""
        for s in self.sessions:
            if not s.over:
                s.fill()
        if something_happens(self.sessions):
            turn(self.sessions)

    def work(self, script):
        """Until the script is at its end; it may clean up after a failure."""
        with contextlib.closing(script):
            for _ in script:
                self.turn()

    def end(self):
        """SIGTERM.  They go on until the last connection is closed."""
        for s in self.sessions:
            s.ending = True
        self.server.terminate()
        while not all(s.over for s in self.sessions):
            self.turn()
        for s in self.sessions:
            s.client.close()
        self.server.wait(DEADLINE)
        self.settle()

    def settle(self):
        """What was in flight was done by now, or never will be."""
        self.model.reads.clear()
        self.model.now += 1
        for s in self.sessions:
            for op in [*s.in_flight.values(), *s.refused]:
                if isinstance(op.handle, Write) and op.handle.done is None:
                    op.handle.done = self.model.now


def something_happens(sessions, milliseconds=20):
    poller = select.poll()
    for s in sessions:
        if s.events():
            poller.register(s.client.sock.fileno(), s.events())
    return poller.poll(milliseconds)


# What happens meanwhile

def turns(number):
    for _ in range(number):
        yield


def program(*command, may_fail=False):
    """Until it has ended."""
    p = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while p.poll() is None:
        yield
    assert p.returncode == 0 or may_fail, (command, p.stdout.read())


def snapshot(server, model):
    """What it shows could have been read between the signal and "started"."""
    snapshots = Snapshots(server)
    started, over = snapshots.count("started"), snapshots.over()
    read = model.begin_read(0, model.size)
    snapshots.signal()
    while snapshots.count("started") == started:
        yield
    model.reads.discard(read)
    while snapshots.over() == over:
        yield
    path = Path(snapshots.lines("complete")[-1][0])
    model.check(read, 0, path.read_bytes())
    path.unlink()


def snapshots(server, model, number):
    """And one more that is not waited for."""
    for _ in range(number):
        yield from turns(50)
        yield from snapshot(server, model)
    Snapshots(server).signal()


def begun(script):
    """Only its first step."""
    next(script, None)
    yield


# Modes

class Target:
    """How a server is started, what happens in each of its lives, and what must be
    left in the end."""

    lives = 2

    def __init__(self, start, directory):
        self.start = start
        self.image = make_disk(directory / "disk.img", SIZE, CONTENT)

    def run(self):
        return self.start(args=["--target", *ADDRESS, self.image])

    def script(self, crowd, life):
        return snapshots(crowd.server, crowd.model, 2)

    def check(self, model):
        model.check_image(self.image)


def is_unchanged(base):
    content = base.read_bytes()
    return content[:len(CONTENT)] == CONTENT and not content[len(CONTENT):].strip(b"\0")


class Cow(Target):
    """Its base must stay as it is."""

    options = ["--cow-file", "overlay"]

    def run(self):
        return self.start(args=["--cow-target", *ADDRESS, *self.options, self.image],
                          cwd=self.image.parent)

    def script(self, crowd, life):
        return turns(300)

    def check(self, model):
        read = model.begin_read(0, SIZE)
        with self.run().client() as c:
            model.end_read(read, c.pread(SIZE))
        assert is_unchanged(self.image)


class ThrowAway(Cow):
    """Nothing is left."""

    options, lives = [], 1

    def check(self, model):
        assert is_unchanged(self.image)


class Proxy(Target):
    """Two servers have its disk, and only one of them is ever there for sure.  Its
    end comes during a copy, then during a switch, and then when it is a target;
    what it has left is a proxy's cache still."""

    lives = 3

    def __init__(self, start, directory, start_origin=None):
        self.start, self.start_origin = start, start_origin or start
        self.base = make_disk(directory / "base.img", SIZE, CONTENT)
        self.image, self.control = directory / "cache.img", directory / "control"
        self.sockets = [directory / "origin0", directory / "origin1"]
        self.origins = [self.origin(path) for path in self.sockets]
        self.bgctl, self.unfinished = [BGCTL], []

    def origin(self, path):
        return self.start_origin(args=["--target", "--readonly", "--unix", path, self.base])

    def run(self):
        return self.start(args=["--proxy", *ADDRESS, f"unix:{self.sockets[0]}", self.image,
                                f"{self.image}.map", self.control])

    def say(self, command, *arguments, **kw):
        return program(*self.bgctl, command, self.control, *arguments, **kw)

    def begin_to(self, command):
        """And do not wait for it."""
        self.unfinished.append(self.say(command, may_fail=True))
        return begun(self.unfinished[-1])

    def stall(self, number, *commands):
        """Its answers come late: to clients, and to what is begun meanwhile."""
        self.origins[number].proc.send_signal(signal.SIGSTOP)
        try:
            for command in commands:
                yield from self.begin_to(command)
            yield from turns(30)
        finally:
            self.origins[number].proc.send_signal(signal.SIGCONT)
        yield from turns(10)

    def replace(self, number):
        """kill -9, and after a while another server in its place."""
        self.origins[number].kill()
        yield from turns(20)
        self.origins[number] = self.origin(self.sockets[number])
        yield from turns(10)

    def wander(self):
        """From one origin to the other and back, and both of them die in between."""
        yield from self.stall(0)
        yield from self.replace(0)
        yield from self.say("--reconnect", f"unix:{self.sockets[1]}")
        yield from self.replace(0)
        yield from self.stall(1)
        yield from self.replace(1)
        yield from self.say("--query")
        yield from self.say("--reconnect", f"unix:{self.sockets[0]}")

    def migrate(self, crowd):
        """No origin is needed then."""
        yield from self.say("--cache-all")
        yield from turns(20)
        yield from self.say("--switch")
        for origin in self.origins:
            origin.kill()
        yield from snapshots(crowd.server, crowd.model, 2)

    def script(self, crowd, life):
        yield from self.wander()
        if life == 0:
            yield from self.stall(0, "--cache-all")
        elif life == 1:
            yield from self.say("--cache-all")
            yield from self.begin_to("--switch")
            while "switching to target mode" not in crowd.server.log():     # not the next server
                yield from turns(1)
        else:
            yield from self.migrate(crowd)

    def check(self, model):
        for _ in itertools.chain(*self.unfinished):
            time.sleep(0.01)
        super().check(model)
        assert is_unchanged(self.base)


# The tests

def live(mode, seed, connections=8, in_flight=32):
    """What one server left, the next one goes on with."""
    model, count = Model(SIZE, CONTENT), 0
    for life in range(mode.lives):
        crowd = Crowd(mode.run(), model, f"{seed}/{life}", connections, in_flight)
        if life:
            read_all(crowd.sessions[0], model)
        crowd.work(mode.script(crowd, life))
        crowd.end()
        count += sum(s.count for s in crowd.sessions)
    mode.check(model)
    return count


@pytest.mark.limit(240 + 3 * int(SECONDS))
@pytest.mark.parametrize("kind", [Target, ThrowAway, Cow, Proxy],
                         ids=["target", "cow", "cow file", "proxy"])
def test_model_agrees_whatever_happens_to_the_server(server, tmp_path, kind):
    seed, end = random_seed(), time.monotonic() + SECONDS
    print(f"XNBD_SEED={seed}")
    for number in itertools.count():
        directory = tmp_path / f"disk{number}"
        directory.mkdir()
        print(live(kind(server, directory), f"{seed}/{number}"), "operations")
        if time.monotonic() > end:
            break


# Valgrind

SUPERVISE = ["--quiet", "--leak-check=full", "--errors-for-leak-kinds=definite",
             "--show-leak-kinds=definite", "--error-exitcode=99", "--child-silent-after-fork=yes",
             "--vgdb=no"]


class Valgrind:
    """Starts programs under it; in the end it must have had nothing to say."""

    def __init__(self, start, directory):
        self.server, self.directory, self.started = start, directory, []
        self.command = [need("valgrind", "valgrind"), *SUPERVISE,
                        f"--log-file={directory}/valgrind.%p"]

    def start(self, **kw):
        """A server, by way of a script: what is started is what is named there.  Valgrind
        does not know the calls of a sandbox, or would be confined by it."""
        script = self.directory / "supervised"
        script.write_text("#!/bin/sh\nexec " + " ".join(self.command) + f' {SERVER} --no-sandbox "$@"\n')
        script.chmod(0o755)
        with mock.patch.object(conftest, "SERVER", str(script)):
            self.started.append(self.server(**kw))
        return self.started[-1]

    def check(self):
        """Of a server that runs still it tells only in the end."""
        for s in self.started:
            s.stop(DEADLINE)
        logs = list(self.directory.glob("valgrind.*"))
        assert logs, "nothing has run under Valgrind"
        for log in logs:
            assert not (told := log.read_text()), told


@pytest.mark.skipif(SANITIZED, reason="a sanitizer and Valgrind do not go together")
@pytest.mark.limit(600)
@pytest.mark.parametrize("kind", [Target, ThrowAway, Cow, Proxy],
                         ids=["target", "cow", "cow file", "proxy"])
def test_valgrind_finds_nothing(server, tmp_path, kind):
    valgrind = Valgrind(server, tmp_path)
    if kind is Proxy:
        mode = Proxy(valgrind.start, tmp_path, server)
        mode.bgctl = [*valgrind.command, BGCTL]
    else:
        mode = kind(valgrind.start, tmp_path)
    live(mode, random_seed(), connections=4, in_flight=8)
    valgrind.check()
