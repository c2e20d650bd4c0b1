"""A stop is no worse than a crash, and a client that can reconnect goes on.

While a server stops, what it has received is carried out and answered where time allows, nothing
more is taken, nothing is answered with an error that a crash would not have caused, and each
connection closes.  A client that repeats on the next server what was not answered loses nothing.

The first part looks at one stop, with our own client.  The second part restarts servers under the
load of clients that reconnect: qemu's, and the Linux kernel's in a virtual machine (see vm.py).

XNBD_RESTARTS=<number> restarts more often; XNBD_SEED=<seed> repeats the operations.
"""

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

import vm
from conftest import STOP_LIMIT, Server, end_all, need, preload, skip
from nbd import *
from origin import Origin
from test_faults import EVER, SLOW, Control, library
from test_kernel import check_image
from test_kill import Disk, Generator
from test_model import Session, random_seed
from test_proxy import original, proxy

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4 * KIB
SIZE = 4 * MIB
CONTENT = pattern(0, SIZE)
AT_ONCE = 2 if SANITIZED else 0.7       # seconds, for a stop where nothing is owed
RESTARTS = int(os.environ.get("XNBD_RESTARTS") or 2)
READ, WRITE, FLUSH, CACHE = NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_CACHE
ZEROES, STATUS, NO_HOLE = NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_NO_HOLE
ALLOCATION = "base:allocation"
DIALECTS = [False, True, EXTENDED]
hazard = pytest.mark.hazard


# A disk in each mode, served again and again

class Target:
    """A disk that servers of one mode serve, one after the other.

    .start(port)        a server, on a Unix socket and on TCP; further keywords as in conftest.py
    .file               what holds the blocks
    """

    is_kept = True              # a restart finds what was written
    has_commits = False         # a bitmap says what was written

    def __init__(self, content, directory, size=None):
        self.directory, self.content = directory, content
        directory.mkdir()
        self.size = len(content) if size is None else size
        self.file = self.path("disk")
        with open(self.file, "wb") as f:
            f.write(content)
            f.truncate(self.size)
        self.socket = directory / "s"

    def path(self, name):
        return self.directory / name

    def start(self, port=0, **popen):
        where = ["--unix", self.socket, "--laddr", "127.0.0.1", "--lport", port]
        return self.launch(where, popen)

    def launch(self, where, popen):
        return self.server(args=["--target", *where, self.file], **popen)


class CowTarget(Target):
    is_kept = False

    def launch(self, where, popen):
        return self.server(args=["--cow-target", *where, self.file], **popen)


class CowFile(Target):
    has_commits = True

    def launch(self, where, popen):
        return self.server(args=["--cow-target", "--cow-file", self.path("overlay"), *where,
                                 self.file], **popen)


class Proxied(Target):
    """Its origin is the test's, or a server."""

    has_commits = True
    origin = None

    def launch(self, where, popen):
        if not self.origin:
            self.origin = self.server(args=["--target", "--readonly", "--unix", self.path("o"),
                                            self.path("disk")])
        self.file = self.path("cache.img")
        return self.proxy(self.origin, *where, place=self.directory, name=self.directory.name,
                          image=self.file, **popen)


class Switched(Proxied):
    """A proxy that has become a target, and after a restart a target."""

    is_switched = has_commits = False

    def launch(self, where, popen):
        if self.is_switched:
            return Target.launch(self, where, popen)
        s = super().launch(where, popen)
        s.migrate()
        self.is_switched = True
        return s


MODES = {"target": Target, "cow-target": CowTarget, "cow-file": CowFile, "proxy": Proxied,
         "switched": Switched}
KEPT = [name for name in MODES if MODES[name].is_kept]


@pytest.fixture
def make(server, proxy, tmp_path):
    """make(name, content, size): a disk in the mode of that name."""
    def made(name, content=CONTENT, size=None):
        mode = MODES[name](content, tmp_path / name, size)
        mode.server, mode.proxy = server, proxy
        return mode

    return made


@pytest.fixture(params=MODES)
def mode(request, make):
    return make(request.param)


def everybody(server, **options):
    """A client on each transport, by each dialect."""
    return [server.client(address=address, structured=dialect, **options)
            for address in server.addresses for dialect in DIALECTS]


# How a stop goes

def rest(client):
    """The replies up to the end of the connection, of which none may tell an error."""
    replies = []
    try:
        while True:
            replies.append(client.collect())
            assert not replies[-1].error, f"{replies[-1]}"
    except Closed:
        client.close()
    return replies


def right(replies, content=CONTENT):
    for reply in replies:
        at, length = reply.request.offset, reply.request.length
        assert reply.request.command != READ or reply.data == content[at:at + length], f"{reply}"


def begin_stop(server):
    """Until each of its threads has heard of it."""
    server.terminate()
    until(lambda: "stopping" in server.log(), what="the end to begin")
    until(lambda: server.is_asleep() or server.proc.poll() is not None, what="its effect")


def all_end_in_time(servers, status=0):
    """They stop together, within the time of one."""
    for s in servers:
        s.expected_status = status
        s.terminate()
    latest = time.monotonic() + STOP_LIMIT + 0.5    # what this process may be late
    for s in servers:
        s.wait(max(0.1, latest - time.monotonic()))


def is_taken(client):
    """Whether the server has received all that this client has sent.  A Unix socket counts what
    its peer has not received; TCP what its host has not, and there the queue of the server's."""
    count = fcntl.ioctl(client.sock, termios.TIOCOUTQ, bytes(4))
    if struct.unpack("i", count)[0]:
        return False
    if client.sock.family == socket.AF_UNIX:
        return True
    ends = [f"{name[1]:04X}" for name in (client.sock.getpeername(), client.sock.getsockname())]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if [local.split(":")[1], remote.split(":")[1]] == ends:
            return int(queues.split(":")[1], 16) == 0
    return False


# Nothing is owed

def in_the_handshake(server):
    """Clients that have come to different places in it."""
    clients = [server.raw(address) for address in server.addresses for _ in range(5)]
    for c in clients:
        c.greeting()
    for connected, greeted, within, structured, asked in zip(*[iter(clients)] * 5):
        for c in (greeted, within, structured, asked):
            c.client_flags()
        within.send(option_header(NBD_OPT_GO, 100) + b"half")
        structured.structured_reply()
        asked.info()
    return clients


def in_a_request(server):
    """They have sent the half of a header, or of a payload."""
    clients = everybody(server)
    for c in clients:
        c.send(c.header(READ, 0, 512)[:20])
    for length in (1000, 400000):
        for c in everybody(server):
            c.send(c.header(WRITE, 0, length, cookie=1) + b"x" * (length // 2))
            clients.append(c)
    return clients


def idle(server):
    clients = everybody(server)
    for c in everybody(server):
        c.pwrite(b"x" * 512, SIZE - 512)
        c.pread(512)
        clients.append(c)
    return clients


def is_at_once(seconds):
    """A stop, which takes seconds(), is quick; a stall of the machine may spoil a few."""
    took = [seconds()]
    while took[-1] > AT_ONCE and len(took) < 5:
        took.append(seconds())
    assert took[-1] <= AT_ONCE, f"seconds: {took}"


def closes_at_once(mode, clients, number=signal.SIGTERM):
    """A server with these clients, who hear nothing, stops at once."""
    def seconds():
        server = mode.start()
        connected = clients(server)
        server.settle()
        begun = time.monotonic()
        server.terminate(number)
        for c in connected:
            c.expect_closed()
        server.wait()
        return time.monotonic() - begun

    is_at_once(seconds)


@hazard("SIGTERM answers with an error: who is owed nothing")
@pytest.mark.parametrize("clients", [idle, in_the_handshake, in_a_request])
def test_client_to_whom_nothing_is_owed_is_closed_at_once(mode, clients):
    """Without a word: neither an error of an option nor an answer to half a request."""
    closes_at_once(mode, clients)
    with mode.start().client() as c:
        got = c.pread(200000)
        assert all(octet in (CONTENT[i], ord("x")) for i, octet in enumerate(got))
        assert c.pread(SIZE - 200512, 200000) == CONTENT[200000:-512]


def test_second_kind_of_signal_does_the_same(make):
    closes_at_once(make("target"), in_a_request, signal.SIGINT)


@pytest.mark.parametrize("option", ["--inetd", "--connected-fd=0"])
def test_single_client_to_whom_nothing_is_owed_is_closed_at_once(server, disk, option):
    def seconds():
        ours, theirs = socket.socketpair()
        s = server(args=["--target", option, image], wait=False, stdin=theirs, stdout=theirs)
        theirs.close()
        c = Client(ours)
        if option == "--inetd":
            c.negotiate()
        assert c.pread(512) == CONTENT[:512]
        c.send(c.header(WRITE, 0, 1000, cookie=1) + b"x" * 500)
        s.settle()
        begun = time.monotonic()
        s.terminate()
        c.expect_closed()
        s.wait()
        return time.monotonic() - begun

    image = disk(content=CONTENT)
    is_at_once(seconds)


@hazard("SIGTERM answers with an error: a client in its handshake")
def test_client_in_the_handshake_gets_no_error(mode):
    """Whatever it asks for until it is closed."""
    s = mode.start()
    clients = [s.raw(address).hello() for address in s.addresses]
    s.terminate()
    for c in clients:
        with pytest.raises(Closed):
            until(lambda: not c.info())     # for ever, or until it is closed
        c.close()
    s.wait()


# What was received, and what comes later

READS = [(i * 64 * KIB + 512, 64 * KIB) for i in range(20)]     # less than may be in flight


def ask(client, *more):
    """All in one piece, so that the server receives all or none of them.  More requests are
    (command, offset, length, payload)."""
    message = b""
    for cookie, (command, at, length, payload) in enumerate(
            [*((READ, *place, b"") for place in READS), *more]):
        client.expect(cookie, Request(command, at, length, 0))
        message += client.header(command, at, length, cookie=cookie) + payload
    client.send(message)


@hazard("SIGTERM answers with an error: what was received")
def test_requests_that_were_received_are_answered(mode):
    """Though their clients take their time to read the replies."""
    s = mode.start()
    clients = everybody(s)
    expected = bytearray(CONTENT)
    for n, c in enumerate(clients):
        at, data = 2 * MIB + n * 64 * KIB + 7, bytes([n + 1]) * 5000
        expected[at:at + 5000], expected[at + 9000:at + 18000] = data, bytes(9000)
        ask(c, (WRITE, at, 5000, data), (ZEROES, at + 9000, 9000, b""), (FLUSH, 0, 0, b""),
            (CACHE, 0, MIB, b""))
    s.settle()
    begin_stop(s)
    for c in clients:
        replies = rest(c)
        right(replies)
        assert len(replies) == len(READS) + 4
    s.wait()
    if mode.is_kept:
        with mode.start().client() as c:
            assert c.pread(SIZE) == expected


@hazard("SIGTERM answers with an error: what comes too late")
def test_requests_that_come_later_are_neither_answered_nor_carried_out(mode):
    """Nor do they cost a client the replies to the earlier ones."""
    s = mode.start()
    clients = everybody(s)
    for c in clients:
        ask(c)
    s.settle()
    begin_stop(s)
    for command, *range_, payload in ((WRITE, SIZE - BLOCK, BLOCK, b"late" * (BLOCK // 4)),
                                      (ZEROES, 3 * MIB, BLOCK, b""), (READ, 0, 512, b""),
                                      (FLUSH, 0, 0, b"")):
        for c in clients:
            with contextlib.suppress(Closed):
                c.request(command, *range_, payload=payload)
    for c in clients:
        replies = rest(c)
        right(replies)
        assert len(replies) == len(READS)
    s.wait()
    with mode.start().client() as c:
        assert c.pread(SIZE) == CONTENT


def test_client_that_comes_during_the_stop_is_not_greeted(make):
    """It is refused, or closed without a word."""
    mode = make("target")
    s = mode.start()
    deaf = everybody(s)
    for c in deaf:
        for _ in range(64):
            c.request(READ, 0, MIB)
    s.settle()
    begin_stop(s)
    for address in s.addresses:
        with contextlib.suppress(ConnectionError, FileNotFoundError):
            Client(address).expect_closed()
    for c in deaf:
        c.close()
    s.wait()


@hazard("SIGTERM answers with an error: a client under load")
def test_client_that_goes_on_asking_loses_nothing(mode):
    """It repeats on the next server what was not answered."""
    dice, disk = random_seed(), Disk(CONTENT)
    print("seed", dice)
    generator = Generator(disk, random.Random(dice))
    s = mode.start()
    sessions = [Session(c, disk, generator, 16) for c in everybody(s)]
    goes_on(sessions, until_count=1500)
    s.terminate()
    goes_on(sessions)
    s.wait()
    assert not any(c.count == len(c.in_flight) for c in sessions), "nothing was answered"
    if mode.is_kept:
        repeat(mode.start(), disk, [op for one in sessions for op in one.in_flight.values()])


def goes_on(sessions, until_count=None):
    """Sends more and more, until so many requests were sent, or each connection is closed."""
    living = list(sessions)
    while living and (not until_count or sum(one.count for one in sessions) < until_count):
        poller, by_fd = select.poll(), {one.client.sock.fileno(): one for one in living}
        for fd, one in by_fd.items():
            if one.most:
                one.fill()
            poller.register(fd, select.POLLIN | (select.POLLOUT if one.out else 0))
        ready = poller.poll(1000 * DEADLINE)
        assert ready, "nothing happens"
        for fd, events in ready:
            if not take_turn(by_fd[fd], events):
                living.remove(by_fd[fd])


def take_turn(session, events):
    """False when the server has closed, and all that it said was read."""
    try:
        if events & ~select.POLLOUT:
            session.receive()
    except Closed:
        session.client.close()
        return False
    try:
        if session.out:
            session.flush()
    except BlockingIOError:
        pass
    except ConnectionError:
        session.most = 0
        session.out.clear()
    return True


def repeat(server, disk, operations):
    with server.client() as c:
        session = Session(c, disk, None, 0)
        for op in operations:
            session.send(op)
            while session.out:
                session.flush()
            session.receive()
        assert c.pread(disk.size) == disk.all()


# What takes too long

@hazard("SIGTERM with a client that does not read, in every mode")
def test_client_that_reads_nothing_does_not_keep_a_server(make):
    servers = [make(name).start() for name in MODES]
    clients = [c for s in servers for c in everybody(s)]
    for c in clients:
        for _ in range(64):
            c.request(READ, 0, MIB)
    all_end_in_time(servers)
    for c in clients:
        right(rest(c))


@hazard("SIGTERM answers with an error: a long command")
def test_long_zeroing_does_not_keep_a_server(make, library, tmp_path):
    """It is done, or not answered.  Each call for a part of it takes its time here."""
    servers, clients = [], []
    for name in MODES:
        control = Control(tmp_path / f"{name}.control", library)
        s = make(name, b"", size=4 * GIB).start(env=control.environment)
        control.arm("fallocate", SLOW, times=EVER)
        servers.append(s)
        for c in everybody(s):
            c.request(ZEROES, 0, 4 * GIB - BLOCK, NO_HOLE)
            clients.append(c)
        until(lambda: control.injected, what="zeroing")
    all_end_in_time(servers)
    for c in clients:
        rest(c)


# The origin

def misses(client, n):
    """Requests for blocks that the origin has, another part of the disk for each client."""
    at = MIB + n * 300 * KIB
    return [client.request(READ, at, 5000), client.request(READ, 0, at + 5000),
            client.request(WRITE, at + 100 * KIB + 5, payload=b"part"),
            client.request(CACHE, at, 64 * KIB),
            client.request(ZEROES, at + 200 * KIB + 7, 100)]


def written(content):
    """The disk after them."""
    content = bytearray(content)
    for n in range(6):
        at = MIB + n * 300 * KIB
        content[at + 100 * KIB + 5:][:4] = b""
        content[at + 100 * KIB + 5:at + 100 * KIB + 9] = b"part"
        content[at + 200 * KIB + 7:at + 200 * KIB + 107] = bytes(100)
    return bytes(content)


@pytest.fixture
def remote(tmp_path):
    with Origin(CONTENT, unix=tmp_path / "o") as origin:
        yield origin


@pytest.fixture
def behind(make, remote):
    """A proxy whose origin is the test's."""
    mode = make("proxy")
    mode.origin = remote
    return mode


@hazard("SIGTERM answers with an error: who waits for the origin")
@pytest.mark.parametrize("how", ["silent", "gone"])
def test_what_waits_for_the_origin_gets_no_answer_and_can_be_repeated(behind, remote, how):
    s = behind.start()
    clients = everybody(s)
    clients[0].pread(MIB)
    s.quiet()
    remote.freeze() if how == "silent" else remote.die()
    cookies = [misses(c, n) for n, c in enumerate(clients)]
    asker = s.client(contexts=[ALLOCATION])
    asker.request(STATUS, 2 * MIB, MIB)
    s.settle()
    s.terminate()
    for c in [*clients, asker]:
        assert not rest(c)
    s.wait()
    remote.thaw() if how == "silent" else remote.come_back()
    check_repeated(behind.start(), clients)


def check_repeated(server, clients):
    """What was not answered, again; and then all."""
    for old in clients:
        with server.client() as c:
            for r in [reply.request for reply in old.pending.values()]:
                payload = b"part" if r.command == WRITE else b""
                assert not c.error_of(r.command, r.offset, r.length, r.flags, payload), f"{r}"
    with server.client() as c:
        assert c.pread(SIZE) == written(CONTENT)


@hazard("SIGTERM answers with an error: who waits for an origin that answers just then")
def test_origin_that_answers_during_the_stop_harms_nothing(behind, remote):
    s = behind.start()
    remote.hold()
    clients = everybody(s)
    for n, c in enumerate(clients):
        misses(c, n)
    s.settle()
    begin_stop(s)
    remote.release()
    for c in clients:
        rest(c)
    s.wait()
    check_repeated(behind.start(), clients)


# The disk

def stuck(mode, library, directory):
    """A server, its clients, whose requests it has received and who wait for a disk, and what
    the disk waits for."""
    flag = directory / f"{mode.directory.name}.while"
    held = mode.path("cache.img") if isinstance(mode, Proxied) else mode.file
    s = mode.start(env=preload(library, SLOW_COLD=1, SLOW_IMAGE=held, SLOW_WHILE=flag))
    with s.client() as c:
        c.pread(SIZE)
    flag.touch()
    clients = everybody(s)
    for c in clients:
        ask(c)
    until(lambda: s.status("Threads") >= 16, what="reads that wait")
    until(lambda: all(map(is_taken, clients)), what="requests that are received")
    return s, clients, flag


def test_disk_that_answers_in_time_costs_nobody_a_reply(make, slow_library, tmp_path):
    for name in MODES:
        s, clients, flag = stuck(make(name), slow_library, tmp_path)
        begin_stop(s)
        flag.unlink()
        for c in clients:
            replies = rest(c)
            right(replies)
            assert len(replies) == len(READS), name
        s.wait()


@hazard("exit status 0 though something is lost: a disk that hangs")
def test_disk_that_keeps_a_thread_is_told_by_the_status(make, slow_library, tmp_path):
    modes = [stuck(make(name), slow_library, tmp_path) for name in MODES]
    all_end_in_time([s for s, _, _ in modes], status=1)
    for _, clients, flag in modes:
        for c in clients:
            right(rest(c))


DURABLE = ["target", "cow-file", "proxy", "switched"]


@pytest.fixture
def failing(make, library, tmp_path):
    """failing(name): a disk in that mode, a server of it, and what fails its calls."""
    def made(name):
        control = Control(tmp_path / "control", library)
        mode = make(name)
        return mode.start(env=control.environment), control

    return made


@hazard("exit status 0 though something is lost: a flush has failed")
@pytest.mark.parametrize("name", DURABLE)
def test_flush_that_failed_is_told_by_the_status(failing, name):
    s, control = failing(name)
    with s.client() as c:
        c.pwrite(b"x" * BLOCK)
        control.arm("fdatasync", errno.EIO)
        assert c.error_of(FLUSH) == NBD_EIO
    s.expected_status = 1
    s.stop()


@hazard("exit status 0 though something is lost: the last commit fails")
@pytest.mark.parametrize("name", [name for name in MODES if MODES[name].has_commits])
def test_last_commit_that_fails_is_told_by_the_status(failing, name):
    s, control = failing(name)
    with s.client() as c:
        control.arm("fdatasync", errno.EIO)
        c.pwrite(b"x" * BLOCK)
    s.expected_status = 1
    s.stop()
    assert control.injected == 1


@pytest.mark.parametrize("name", DURABLE)
def test_status_is_0_where_all_is_durable(failing, name):
    s, control = failing(name)
    with s.client() as c:
        c.pwrite(b"x" * BLOCK)
        c.flush()
        c.pwrite(b"y" * BLOCK, BLOCK)
    s.stop()


# Restarts under the load of a client that reconnects: qemu's

LOAD = 64 * MIB
MOST = 100                      # restarts of one disk


class Daemon:
    """qemu's NBD client, behind a server of its own."""

    def __init__(self, server, directory):
        self.socket, self.log = directory / "q", directory / "daemon.log"
        disk = {"driver": "nbd", "node-name": "disk", "reconnect-delay": 60,
                "server": {"type": "unix", "path": server.unix}}
        with open(self.log, "wb") as log:
            self.proc = subprocess.Popen(
                [need("qemu-storage-daemon", "qemu-system-common"), "--blockdev", json.dumps(disk),
                 "--nbd-server", f"addr.type=unix,addr.path={self.socket}",
                 "--export", "nbd,id=export,node-name=disk,writable=on,name=x"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def client(self):
        def connects():
            assert self.proc.poll() is None, self.log.read_text()
            with contextlib.suppress(ConnectionError, FileNotFoundError):
                return Client(self.socket).negotiate("x")

        return until(connects, what="qemu-storage-daemon")

    def __enter__(self):
        self.client().close()
        return self

    def __exit__(self, *_):
        self.proc.terminate()
        self.proc.wait()


class Load:
    """fio, which writes until it is told to end, and reads what it wrote a little before."""

    def __init__(self, daemon, directory):
        self.output = directory / "fio.json"
        with open(self.output, "wb") as output:
            self.proc = subprocess.Popen(
                [need("fio", "fio"), "--name=load", "--ioengine=nbd",
                 f"--uri=nbd+unix:///x?socket={daemon.socket}", "--rw=randwrite",
                 "--bs=128k", "--iodepth=32", f"--size={LOAD}", "--time_based",
                 "--runtime=3600", "--verify=crc32c", "--verify_backlog=128", "--verify_fatal=1",
                 "--output-format=json"],
                cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)

    def is_well(self):
        assert self.proc.poll() is None, self.output.read_text()[:2000]
        return True

    def end(self):
        assert self.is_well()
        self.proc.send_signal(signal.SIGINT)
        self.proc.wait(DEADLINE)
        text = self.output.read_text()
        job, = json.loads(text[text.index("{"):text.rindex("}") + 1])["jobs"]
        assert job["error"] == 0, text[:2000]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.proc.kill()
        self.proc.wait()


def written_by(server):
    """Bytes, to files and sockets."""
    return int(re.search(r"wchar: (\d+)", Path(f"/proc/{server.proc.pid}/io").read_text())[1])


def number_of(restart):
    return struct.pack(">Q", restart + 1) * (BLOCK // 8)


def restart(server, mode, number, **popen):
    """By a signal that asks, or one that does not."""
    if number == signal.SIGKILL:
        server.kill()
    else:
        server.stop()
    return mode.start(**popen)


@hazard("a restart is an I/O error of a client that reconnects")
@pytest.mark.limit(240 + 10 * RESTARTS)
@pytest.mark.parametrize("name", KEPT)
def test_client_of_qemu_does_not_notice_restarts(make, tmp_path, name):
    """Nor is anything lost that was acknowledged."""
    mode = make(name, pattern(0, LOAD + MOST * BLOCK))
    s = mode.start()
    with Daemon(s, tmp_path) as daemon, Load(daemon, tmp_path) as load, daemon.client() as c:
        for i in range(RESTARTS):
            until(lambda: load.is_well() and written_by(s) > 8 * MIB, what="load")
            c.pwrite(number_of(i), LOAD + i % MOST * BLOCK)
            s = restart(s, mode, signal.SIGKILL if i % 4 == 1 else signal.SIGTERM)
            for earlier in range(max(0, i - MOST + 1), i + 1):
                assert c.pread(BLOCK, LOAD + earlier % MOST * BLOCK) == number_of(earlier)
        until(lambda: load.is_well() and written_by(s) > 8 * MIB, what="load")
        load.end()
    s.stop()


# Restarts below a machine

SLOTS = 20
PATIENCE = 200                  # seconds, in an emulated machine
# Until it is told to end: files, each of which is synced, and what keeps the disk busy.
USE_DISK = """
trap 'touch $TMP/stop' EXIT
mkfs.ext4 -q -F $DISK
mount $DISK $MNT
copy_tree
sync
until [ -e $TMP/stop ]; do
        dd if=$DISK of=/dev/null bs=1M count=32 iflag=direct 2>/dev/null
done &
until [ -e $TMP/stop ]; do
        dd if=/dev/zero of=$MNT/zeros bs=64k count=200 2>/dev/null
        sync
done &
i=0
until [ -e $TMP/stop ]; do
        i=$((i + 1))
        { echo $i; head -c $((i * 7919 % 200000)) $TREE/d0/3000000; } |
                dd of=$MNT/slot$((i % SLOTS)) bs=64k iflag=fullblock conv=fsync 2>/dev/null
        echo "file $i"
done
wait
umount $MNT
mount $DISK $MNT
verify_tree
umount $MNT
"""
ERRORS = """
dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)|lost.*write|aborting|read-only' || true
"""
RECONNECT = """
reconnected() {
        $RECONNECT $DEV $HOST $PORT && [ "$(connections)" -ge 1 ]
}
await 100 reconnected
"""


class OwnDisk(Target):
    """The disk that a machine has by way of qemu's client, from its boot on."""

    def server(self, args):
        self.starts = getattr(self, "starts", 0) + 1
        return Server(args, self.directory, self.starts, {}).wait_ready()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine with such a disk, which is .disk, and whose server is .server; it boots once."""
    directory = tmp_path_factory.mktemp("machine")
    disk = OwnDisk(b"", directory / "disk", size=64 * MIB)
    blockdev = {"driver": "nbd", "node-name": "disk", "reconnect-delay": 100,
                "server": {"type": "unix", "path": str(disk.socket)}}
    server = disk.start()
    try:
        booted = vm.Guest(directory, deadline=900, extra=[vm.compiled("reconnect")], devices=[
            "-blockdev", json.dumps(blockdev), "-device", "virtio-blk-pci,drive=disk,romfile="])
    except vm.Missing as e:
        server.stop()
        skip(str(e))
    with booted:
        booted.disk, booted.server = disk, server
        yield booted
    end_all([booted.server])


def files_of(job):
    """How many the loop has written."""
    while job.machine.receive(time.monotonic() + 0.01):
        pass
    return sum(line.startswith("file") for line in job.lines)


def wait_for_files(job, count):
    job.wait_for(f"file {files_of(job) + count}", PATIENCE)


def end_use(machine, job):
    """Ends the load, which has had no error; returns how many files there were."""
    machine.run("touch $TMP/stop")
    job.wait(PATIENCE)
    assert machine.run(ERRORS) == ""
    return files_of(job)


def check_disk(image, machine, last):
    check_image(image, machine)
    copy = image.with_suffix(".files")
    copy.mkdir()
    subprocess.run([need("debugfs", "e2fsprogs"), "-R", f"rdump / {copy}", image],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = (machine.tree / "d0/3000000").read_bytes()
    for i in range(max(1, last - SLOTS + 1), last + 1):
        assert (copy / f"slot{i % SLOTS}").read_bytes() == b"%d\n" % i + part[:i * 7919 % 200000], i


@hazard("a restart is an I/O error of a client that reconnects: the kernel's")
@pytest.mark.limit(900)
def test_file_system_on_the_client_of_the_kernel_does_not_notice_restarts(machine, make):
    """The kernel waits for a connection that something below it makes again."""
    mode = make("target", b"", size=64 * MIB)
    s = mode.start()
    machine.run("cleanup; rm -f $TMP/stop; dmesg -c >/dev/null")
    machine.run("attach $DEV debian -t 10 -b 4096; $RECONNECT $DEV 200", PORT=s.port,
                RECONNECT=vm.compiled("reconnect"))
    job = machine.start(USE_DISK, DISK="/dev/nbd0", SLOTS=SLOTS)
    job.wait_for("file 3", PATIENCE)
    for _ in range(RESTARTS // 2):
        port = s.port
        s = restart(s, mode, signal.SIGTERM, port=port)
        machine.run(RECONNECT, PATIENCE, PORT=port, RECONNECT=vm.compiled("reconnect"))
        wait_for_files(job, 5)
    last = end_use(machine, job)
    machine.run("detach $DEV debian")
    s.stop()
    check_disk(mode.file, machine, last)


@hazard("a restart is an I/O error of a client that reconnects: a machine's disk")
@pytest.mark.limit(900)
def test_file_system_on_the_client_of_qemu_does_not_notice_restarts(machine):
    machine.run("cleanup; rm -f $TMP/stop; dmesg -c >/dev/null")
    job = machine.start(USE_DISK, DISK="/dev/vda", SLOTS=SLOTS)
    job.wait_for("file 3", PATIENCE)
    for _ in range(RESTARTS // 2):
        machine.server = restart(machine.server, machine.disk, signal.SIGTERM)
        wait_for_files(job, 5)
    last = end_use(machine, job)
    machine.server.stop()
    check_disk(machine.disk.file, machine, last)
    machine.server = machine.disk.start()       # which the machine wants for its end
