"""Many clients at once, and very many one after the other.

They come, work, and go in all ways; afterwards the server has the descriptors, threads and
memory that it had before.  In each mode; a proxy's control socket is asked as well.

make check compresses a day into seconds: 20,000 connections in each mode.  XNBD_LOAD_SECONDS=3600
goes on with them for so many seconds in each mode.
"""

import contextlib
import os
import random
import socket
import struct
import time
from pathlib import Path

import pytest

from conftest import is_portable, raise_descriptor_limit
from nbd import *
from origin import Origin

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 4096
CLIENTS = 2000
SIZE = CLIENTS * BLOCK
SECONDS = float(os.environ.get("XNBD_LOAD_SECONDS", 0))
SHORT = 2000 if SANITIZED else 20000    # short connections for each mode, without that
ALLOCATION = "base:allocation"
FIXED = struct.pack(">I", NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)
# What allocators, buffers that are used again, and stacks may have kept.
SLACK = 512 * MIB if SANITIZED else 2 * MIB
WORKERS = 16                            # threads that the server may start when it needs them
PARKING_FDS = 2                         # of one more, which polls those who are silent
hazard = pytest.mark.hazard
MODES = ["target", "cow", "proxy"]
modes = pytest.mark.parametrize("mode", MODES)
limit = pytest.mark.limit(int(SECONDS) * 2 + (1200 if SANITIZED else 240))


class House:
    """A server in one of the modes, on TCP and on a Unix socket.

    .server .addresses .origin .control (of a proxy, or None)
    """

    def __init__(self, server, origin=None, control=None):
        self.server, self.origin, self.control = server, origin, control
        self.addresses = server.addresses
        self.before = None

    def footprint(self):
        """Descriptors, threads, bytes of memory."""
        return len(os.listdir(f"/proc/{self.server.proc.pid}/fd")), self.server.status(
            "Threads"), self.server.rss()

    def is_back(self, slack=SLACK):
        """All is as it was when note() was called."""
        (fds, threads, rss), (fds0, threads0, rss0) = self.footprint(), self.before
        return (fds <= fds0 + PARKING_FDS and threads <= threads0 + WORKERS + 1
                and rss <= rss0 + slack)

    def note(self):
        """Remembers what it has, once it has all its threads and buffers."""
        nobody = self.server.sockets()
        clients = [Client(self.addresses[i % 2]).negotiate() for i in range(64)]
        for c in clients:
            c.request(NBD_CMD_READ, 0, 32 * KIB)
            c.request(NBD_CMD_WRITE, 0, payload=pattern(0, 32 * KIB))
        for c in clients:
            c.collect_all()
        for c in clients:
            c.close()
        until(lambda: self.server.sockets() <= nobody, what="closed connections")
        self.server.settle()
        self.before = self.footprint()

    def wait_until_back(self, slack=SLACK):
        try:
            until(lambda: self.is_back(slack), what="descriptors, threads and memory as before")
        except AssertionError as e:
            raise AssertionError(f"{e}: {self.before} then, {self.footprint()} now") from None


@pytest.fixture
def house(server, ram):
    """house(mode): a server, its disk is pattern(0, SIZE)."""
    origins = []

    def start(mode, *options):
        image, origin, control = ram / f"{mode}.img", None, None
        listen = ["--unix", ram / f"{mode}.sock", "--laddr", "127.0.0.1", "--lport", "0", *options]
        if mode == "proxy":
            control, origin = ram / "control", Origin(pattern(0, SIZE)).start()
            origins.append(origin)
            s = server(args=["--proxy", *listen, *origin.arguments, image, ram / "bitmap", control])
        else:
            image.write_bytes(pattern(0, SIZE))
            s = server(args=[f"--{'cow-' * (mode == 'cow')}target", *listen, image])
        return House(s, origin, control)

    yield start
    for one in origins:
        one.stop()
        one.check()


def option(number, data=b""):
    return option_header(number, len(data)) + data


STRUCTURED = option(NBD_OPT_STRUCTURED_REPLY) + option(
    NBD_OPT_SET_META_CONTEXT, meta_data("", [ALLOCATION]))
GO = option(NBD_OPT_GO, info_data("", [NBD_INFO_BLOCK_SIZE, NBD_INFO_NAME]))
HANDSHAKE = FIXED + STRUCTURED + GO


# They come, work and go

def leave(c, how):
    """The ways to go."""
    if how == "disconnect":
        c.request(NBD_CMD_DISC)
    elif how == "in a header":
        c.send(request_header(NBD_CMD_READ, 0, 512)[:13])
    elif how == "in a payload":
        c.send(request_header(NBD_CMD_WRITE, 0, 512) + bytes(100))
    elif how == "unread":
        c.request(NBD_CMD_READ, 0, 64 * KIB)
    if how == "reset":
        c.reset()
    c.close()


LEAVE = ["disconnect", "close", "reset", "in a header", "in a payload", "unread"]


def work(crowd, content, seed):
    """Each writes its own block and reads it, and another one that nobody writes; all at once."""
    sent = []
    for i, c in crowd:
        data = pattern(i * BLOCK, 512, seed)
        at = i * BLOCK + 512 * (seed % 4)
        content[at:at + 512] = data
        other = (i * 7919 % CLIENTS) * BLOCK + 4 * 512
        sent.append((c, data, c.request(NBD_CMD_WRITE, at, payload=data),
                     c.request(NBD_CMD_READ, other, 1024), other))
    for c, data, write, read, other in sent:
        assert not c.collect(write).error
        assert c.collect(read).data == pattern(other, 1024)


def read_back(crowd, content):
    sent = [(c, i, c.request(NBD_CMD_READ, i * BLOCK, BLOCK)) for i, c in crowd]
    for c, i, cookie in sent:
        assert c.collect(cookie).data == content[i * BLOCK:(i + 1) * BLOCK]


@limit
@hazard("idle connections: their memory")
@hazard("closes with 64 reads in flight")
@modes
def test_2000_clients_come_work_and_go(house, mode):
    """Half of them go and come again while the others work."""
    raise_descriptor_limit(CLIENTS + 300)
    h, content = house(mode), bytearray(pattern(0, SIZE))
    dice = random.Random(5)
    with contextlib.ExitStack() as stack:
        def come(i):
            c = stack.enter_context(Client(h.addresses[i % 2]))
            return i, c.negotiate(structured=i % 3, how=["go", "export_name"][i % 2])

        h.note()
        crowd = [come(i) for i in range(CLIENTS)]
        work(crowd, content, 2)
        dice.shuffle(crowd)
        going, staying = crowd[::2], crowd[1::2]
        for n, (i, c) in enumerate(going):
            leave(c, LEAVE[n % len(LEAVE)])
        work(staying, content, 3)
        again = [come(i) for i, _ in going]
        work(again, content, 4)
        read_back(staying + again, content)
        for n, (i, c) in enumerate(staying + again):
            leave(c, LEAVE[n % len(LEAVE)])
        h.wait_until_back(slack=SLACK + CLIENTS * 2 * KIB)
    with h.server.client() as c:
        for at in range(0, SIZE, MIB):
            assert c.pread(min(MIB, SIZE - at), at) == content[at:at + MIB]


# They never finish the handshake

# A handshake that stops after each of its bytes, and others.
UNFINISHED = [HANDSHAKE[:n] for n in range(len(HANDSHAKE))] + [
    FIXED + option(NBD_OPT_LIST) * 20, FIXED + option_header(NBD_OPT_GO, 6) + b"\0\0\0",
    FIXED + option_header(1000, 1 << 20) + bytes(5000)]


@limit
@hazard("idle connections that never finish the handshake")
def test_200_unfinished_handshakes_stop_nobody_and_are_closed(house):
    """In all modes at the same time: their deadline is 10 seconds."""
    houses = [house(mode) for mode in MODES]
    crowds = []
    with contextlib.ExitStack() as stack:
        witnesses = [stack.enter_context(h.server.client()) for h in houses]
        for h, c in zip(houses, witnesses):
            c.pread(512)
            h.note()
        for h in houses:
            crowd = [stack.enter_context(Client(h.addresses[i % 2])) for i in range(200)]
            for i, c in enumerate(crowd):
                c.send(UNFINISHED[i % len(UNFINISHED)])
            crowds.append(crowd)
        end = time.monotonic() + 10 + DEADLINE
        while any(crowds):
            assert time.monotonic() < end, f"not closed: {[len(crowd) for crowd in crowds]}"
            for h, c, crowd in zip(houses, witnesses, crowds):
                at = random.randrange(SIZE - 512)
                assert c.pread(512, at) == pattern(at, 512)
                assert h.server.is_served()
                crowd[:] = [one for one in crowd if not has_ended(one)]
            time.sleep(0.05)
        for h in houses:
            h.wait_until_back(slack=SLACK + 200 * 64 * KIB)


def has_ended(c):
    """Reads what there is; whether the server has closed."""
    c.sock.setblocking(False)
    try:
        while c.sock.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


# They do not read

def send_until_blocked(c):
    """Requests for long replies, until nothing more can be sent."""
    requests = b"".join(request_header(NBD_CMD_READ, (4 + i % 3) * MIB, MIB, cookie=i)
                        for i in range(64))
    c.sock.settimeout(0.03)
    try:
        while True:
            c.sock.sendall(requests)
    except TimeoutError:
        c.sock.settimeout(DEADLINE)


@limit
@hazard("client that does not read its replies: ten of them, others unaffected")
@modes
def test_20_clients_that_do_not_read_take_bounded_memory_and_stop_nobody(house, mode):
    """Also when all that they want arrives at once, from a proxy's origin."""
    h = house(mode)
    with h.server.client() as c:
        assert c.pread(MIB) == pattern(0, MIB)
        h.note()
        if h.origin:
            h.origin.hold()
        deaf = [h.server.client(h.addresses[i % 2], rcvbuf=4096) for i in range(20)]
        for one in deaf:
            send_until_blocked(one)
        if h.origin:
            h.origin.release()
        h.server.settle()
        for at in range(0, SIZE, 64 * KIB):
            length = min(64 * KIB, SIZE - at)
            assert c.pread(length, at) == pattern(at, length)
        assert h.server.is_served()
        # 2 MiB of buffers, one request more, and what is kept of input and output.
        assert h.server.rss() - h.before[2] < SLACK + len(deaf) * 6 * MIB
        for i, one in enumerate(deaf):
            one.reset() if i % 2 else one.close()
        h.wait_until_back(slack=SLACK + 24 * MIB)


# A day of short connections

READ = request_header(NBD_CMD_READ, 5000, 512, cookie=7)
DISC = request_header(NBD_CMD_DISC)
DATA = pattern(5000, 512)


def ack(number):
    return struct.pack(">QIII", OPTION_REPLY_MAGIC, number, NBD_REP_ACK, 0)


# What a short connection says, and what the answer must end with; None: whatever.
SHORT_TALKS = {
    "nothing": (b"", b"IHAVEOPT\0\3"),
    "ABORT": (FIXED + option(NBD_OPT_ABORT), ack(NBD_OPT_ABORT)),
    "LIST": (FIXED + option(NBD_OPT_LIST) + option(NBD_OPT_ABORT),
             ack(NBD_OPT_LIST) + ack(NBD_OPT_ABORT)),
    "INFO": (FIXED + option(NBD_OPT_INFO, info_data("a name")) + option(NBD_OPT_ABORT),
             ack(NBD_OPT_INFO) + ack(NBD_OPT_ABORT)),
    "INFO, and then silence": (FIXED + option(NBD_OPT_INFO, info_data("")), ack(NBD_OPT_INFO)),
    "unknown options": (FIXED + b"".join(option(n, b"x" * n) for n in range(20, 60)), None),
    "READ": (FIXED + GO + READ + DISC, DATA),
    "EXPORT_NAME": (FIXED + option(NBD_OPT_EXPORT_NAME, b"ab") + READ + DISC, DATA),
    "structured READ": (HANDSHAKE + READ + DISC, DATA),
    "WRITE": (FIXED + GO + request_header(NBD_CMD_WRITE, 5000, 512) + DATA + READ + DISC, DATA),
    "half a WRITE": (FIXED + GO + request_header(NBD_CMD_WRITE, 5000, 512) + DATA[:100], None),
    "refused requests": (FIXED + GO + request_header(77) * 50 + READ + DISC, DATA),
    "junk": (os.urandom(300), None),
    "junk instead of options": (FIXED + os.urandom(300), None),
    "junk instead of requests": (FIXED + GO + os.urandom(300), None),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", None),
    "an option of 4 GiB": (FIXED + option_header(NBD_OPT_GO, (1 << 32) - 1) + bytes(500), None),
}
TALKS = list(SHORT_TALKS.items())
# What is said to the control socket, and how the answer must end.
CONTROL_TALKS = [(b"query\n", b"\nok\n"), (b"help\n", b"\nok\n"), (b"", b""), (b"quer", b""),
                 (b"no such command\n", None), (b"query\n" * 5, b"\nok\n"),
                 (b"x" * 10000, None), (os.urandom(200) + b"\n", None)]


def talk(address, said):
    """Connects and says it all."""
    sock = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(address if isinstance(address, tuple) else str(address))
    try:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
    except ConnectionError:                 # it has closed already
        pass
    return sock


def hear(sock, name, expected):
    """The whole answer."""
    said = bytearray()
    try:
        while part := sock.recv(65536):
            said += part
    except ConnectionError:
        assert expected is None, f"{name}: reset after {bytes(said)}"
    sock.close()
    # Where workers do all that may wait, the answer to something else may come last.
    at_end = said.endswith(expected or b"") or is_portable() and expected in said
    assert at_end, f"{name}: {bytes(said)}"


def give_up(sock, n):
    """Goes without having heard the answer."""
    if n % 2:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def shower(h, n):
    """16 short connections at once, of all kinds in turns."""
    heard = []
    for i in range(16 * n, 16 * n + 16):
        name, (said, expected) = TALKS[i % len(TALKS)]
        sock = talk(h.addresses[i // len(TALKS) % 2], said)
        if i % 5 == 4:
            give_up(sock, i // 5)
        else:
            heard.append((sock, name, expected))
    if h.control and n % 4 == 0:
        said, expected = CONTROL_TALKS[n // 4 % len(CONTROL_TALKS)]
        heard.append((talk(h.control, said), said, expected))
    for one in heard:
        hear(*one)


@limit
@hazard("handshake followed by junk")
@hazard("handshake cut off at every byte; reset instead of close")
@modes
def test_day_of_short_connections_leaves_nothing(house, mode):
    """Ends of all kinds, good and bad.  Some 100 bytes lost by each connection would be seen."""
    h = house(mode)
    for n in range(40):
        shower(h, n)
    h.note()
    end, n = time.monotonic() + SECONDS, 0
    while time.monotonic() < end if SECONDS else n < SHORT // 16:
        shower(h, n)
        n += 1
    h.wait_until_back()
    with h.server.client() as c:
        assert c.pread(SIZE) == pattern(0, SIZE)
