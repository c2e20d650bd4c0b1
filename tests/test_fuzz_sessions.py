"""Fuzzing through sockets: sessions that are nearly good, against a running server.

A session is made of good messages, of which some fields, bytes or places are
then changed.  Several sessions go on at the same time, in pieces.  Whatever
they send:

* each gets answers that the protocol allows, and the error that its request
  deserves, for as long as it is understood; and each comes to an end
* one that ends in DISC gets an answer to each of its requests, also if it has
  closed its side long before; one that closes its side without DISC is gone,
  and gets the answers that were on their way
* what none of them could change reads as before, for them and for others
* the server lives, ends well in order, and did not grow

The same for the control socket, and with an origin that changes its answers.

XNBD_FUZZ_SECONDS=<seconds> for each test (5; if it is set, with a server that
has sanitizers, made for it); XNBD_SEED=<seed> repeats what is sent, though not
when.
"""

import collections
import contextlib
import os
import random
import re
import select
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

import conftest
from conftest import end_all
from nbd import *
from origin import BAD_REPLIES, Fault, Origin
from test_control import Control
from test_model import random_seed

SECONDS = int(os.environ.get("XNBD_FUZZ_SECONDS") or 5)
LIMIT = 300 + 2 * SECONDS
BLOCK = 4096
SIZE = 300 * BLOCK + 77
CONTENT = pattern(0, SIZE)
BATCHES, TOGETHER = 20, 8       # of a server's life; sessions of a batch
# At most; a sanitizer keeps freed memory for a while.
MEMORY = (1024 if SANITIZED or os.environ.get("XNBD_FUZZ_SECONDS") else 64) << 20
ALLOCATION = "base:allocation"
IHAVEOPT_BYTES = struct.pack(">Q", IHAVEOPT)
FIXED = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES
KEPT_OPTION_MAX = 65536         # longer data is thrown away
OPTION_MAX = 32 << 20           # more is an attack
FLAGS = {NBD_CMD_READ: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF, NBD_CMD_WRITE: NBD_CMD_FLAG_FUA,
         NBD_CMD_FLUSH: NBD_CMD_FLAG_FUA, NBD_CMD_TRIM: NBD_CMD_FLAG_FUA,
         NBD_CMD_CACHE: NBD_CMD_FLAG_FUA,
         NBD_CMD_WRITE_ZEROES: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
         NBD_CMD_BLOCK_STATUS: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE}
CHANGES = (NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES)


# Messages: lists of fields, (bytes, value) or bytes

def encode(message):
    return b"".join(field if isinstance(field, bytes) else field[1].to_bytes(field[0], "big")
                    for field in message)


def option(number, *data):
    return [(8, IHAVEOPT), (4, number), (4, len(encode(data))), *data]


def name_field(name):
    return [(4, len(octets(name))), octets(name)]


def request(command, offset=0, length=0, flags=0, cookie=0, payload=b"", extended=False):
    if extended and command == NBD_CMD_WRITE and cookie % 8:
        flags |= NBD_CMD_FLAG_PAYLOAD_LEN       # or as qemu: without
    return [(4, NBD_EXTENDED_REQUEST_MAGIC if extended else NBD_REQUEST_MAGIC), (2, flags),
            (2, command), (8, cookie), (8, offset), (8 if extended else 4, length), payload]


Head = collections.namedtuple("Head", "size flags command cookie offset length payload")


def head(data, at, extended):
    """The head of a request in there, and how much payload is behind it; None if there is none,
    or none that a server goes on after."""
    size, layout = (32, ">IHHQQQ") if extended else (28, ">IHHQQI")
    if len(data) - at < size:
        return None
    magic, flags, *fields = struct.unpack_from(layout, data, at)
    found = Head(size, flags, *fields, 0)
    if found.command == NBD_CMD_WRITE or extended and flags & NBD_CMD_FLAG_PAYLOAD_LEN:
        found = found._replace(payload=found.length)
    good = magic == (NBD_EXTENDED_REQUEST_MAGIC if extended else NBD_REQUEST_MAGIC)
    return found if good and not (extended and found.payload > PAYLOAD_MAX) else None


class Writer:
    """Makes sessions, all of them from one source of chance."""

    def __init__(self, dice):
        self.dice = dice
        self.extended = False       # the session that is being made has such headers

    def chance(self, p):
        return self.dice.random() < p

    # Good ones

    def name(self):
        return self.dice.choice(["", "", "disk", "ä€😀", "n" * self.dice.choice([1, 255, 4096])])

    def some_option(self, number, name):
        dice = self.dice
        if number in (NBD_OPT_INFO, NBD_OPT_GO):
            infos = [dice.randrange(6) for _ in range(dice.randrange(5))]
            return option(number, *name_field(name), (2, len(infos)), *((2, i) for i in infos))
        if number in (NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT):
            queries = dice.choices([ALLOCATION, "base:", "", "x:y"], k=dice.randrange(3))
            return option(number, *name_field(name), (4, len(queries)),
                          *(field for query in queries for field in name_field(query)))
        if number == NBD_OPT_EXPORT_NAME:
            return option(number, octets(name))
        if self.chance(0.03):
            return option(number, bytes(dice.choice([1, 65536, 65537, 200000])))
        return option(number)

    def haggling(self):
        """Flags and options, up to transmission."""
        dice, name = self.dice, self.name()
        messages = [[(4, FIXED)]]
        self.extended = self.chance(0.4)
        if self.extended or self.chance(0.7):
            messages.append(option(NBD_OPT_EXTENDED_HEADERS if self.extended else
                                   NBD_OPT_STRUCTURED_REPLY))
            if self.chance(0.6):
                messages.append(option(NBD_OPT_SET_META_CONTEXT, *name_field(name), (4, 1),
                                       *name_field(ALLOCATION)))
        for _ in range(dice.choice([0, 0, 0, 1, 3])):
            number = dice.choice([NBD_OPT_LIST, NBD_OPT_STARTTLS, NBD_OPT_INFO, 4, 99,
                                  NBD_OPT_STRUCTURED_REPLY, NBD_OPT_LIST_META_CONTEXT,
                                  NBD_OPT_SET_META_CONTEXT, NBD_OPT_EXTENDED_HEADERS])
            messages.append(self.some_option(number, name))
            if messages[-1] == option(NBD_OPT_EXTENDED_HEADERS):
                self.extended = True
        last = dice.choice([NBD_OPT_GO] * 6 + [NBD_OPT_EXPORT_NAME, NBD_OPT_ABORT])
        messages.append(self.some_option(last, name))
        return messages

    def range(self):
        """Most are small, and where others are as well."""
        dice = self.dice
        length = dice.choice([0, 1, 511, 512, 4096, 5000, 4096, 20000, 65536, 70000])
        if self.chance(0.02):
            length = 300000
        offset = dice.randrange(min(SIZE, 1 << 18) if self.chance(0.7) else SIZE)
        if self.chance(0.5):
            offset -= offset % 512
        if self.chance(0.95):
            length = min(length, SIZE - offset)
        elif self.extended:
            length = dice.choice([SIZE - offset + (1 << 32), 1 << 63, U64 - 1, U64 - max(offset, 1)])
        return offset, length

    def request(self, cookie):
        dice = self.dice
        command, = dice.choices([NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_TRIM,
                                 NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, 99],
                                [16, 8, 1, 2, 2, 2, 4, 0.2])
        offset, length = (0, 0) if command == NBD_CMD_FLUSH else self.range()
        if command == NBD_CMD_WRITE:
            length = min(length, 300000)
        flags = 0
        if self.chance(0.2):
            flags = FLAGS.get(command, 0) & dice.randrange(32)
            if command in CHANGES and self.chance(0.9):
                flags &= ~NBD_CMD_FLAG_FUA
        payload = self.payload(offset, length) if command == NBD_CMD_WRITE else b""
        if self.extended and length <= 300000 and self.chance(0.02):
            flags |= NBD_CMD_FLAG_PAYLOAD_LEN
            payload = self.payload(offset, length)
        return request(command, offset, length, flags, cookie, payload, self.extended)

    def payload(self, offset, length):
        """Often what is there already, so that nothing may change."""
        same = CONTENT[offset:offset + length]
        if self.chance(0.6) and len(same) == length:
            return same
        return self.dice.randbytes(1) * length

    def good(self):
        messages = self.haggling()
        first = self.dice.randrange(1 << 62)
        count = self.dice.choice([0, 1, 3, 8, 20])
        messages += [self.request(first + i) for i in range(count)]
        if self.chance(0.8):            # else it is gone at its end
            messages.append(request(NBD_CMD_DISC, cookie=first + count,
                                    extended=self.extended))
        return messages

    # Changed ones

    def value(self, width, old):
        """Of a field: one that something may depend on."""
        dice, bits = self.dice, 8 * width
        return dice.choice([
            old ^ 1 << dice.randrange(bits), old + 1, old - 1, old + dice.randrange(-64, 64), 0, 1,
            (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, SIZE, SIZE - old, SIZE - old + 1,
            4096, 65536, 65537, OPTION_MAX, OPTION_MAX + 1, dice.randrange(1 << bits),
            dice.randrange(256)]) % (1 << bits)

    def change_field(self, messages):
        message = self.dice.choice(messages)
        places = [i for i, field in enumerate(message) if not isinstance(field, bytes)]
        if places:
            i = self.dice.choice(places)
            width, old = message[i]
            message[i] = (width, self.value(width, old))

    def change_order(self, messages):
        dice = self.dice
        a, b = dice.randrange(len(messages)), dice.randrange(len(messages))
        kind = dice.randrange(4)
        if kind == 0:
            messages[a], messages[b] = messages[b], messages[a]
        elif kind == 1:
            messages.insert(b, list(messages[a]))
        elif kind == 2:
            messages.insert(b, dice.choice(self.good()))
        elif len(messages) > 1:
            del messages[a]

    def change_bytes(self, data):
        dice, at = self.dice, self.dice.randrange(len(data) + 1)
        kind = dice.randrange(5)
        if kind == 0:
            return data[:at]
        if kind == 1:
            return data[:at] + dice.randbytes(dice.randrange(1, 40)) + data[at:]
        if kind == 2:
            return data[:at] + data[at + dice.randrange(1, 40):]
        if kind == 3:
            return data[:at] + bytes(byte ^ 1 << dice.randrange(8) for byte in data[at:at + 1]) \
                + data[at + 1:]
        return data + dice.randbytes(dice.choice([1, 27, 28, 32, 300]))

    def session(self):
        """The bytes of one."""
        messages = self.good()
        for _ in range(self.dice.choice([0, 0, 1, 1, 2, 4])):
            self.dice.choice([self.change_field, self.change_field, self.change_field,
                              self.change_order])(messages)
        data = b"".join(map(encode, messages))
        if self.chance(0.25):
            data = self.change_bytes(data)
        return data

    # How they are sent

    def pieces(self, data):
        """In one go, cut somewhere, or byte by byte at some place."""
        dice, kind = self.dice, self.dice.random()
        cuts = set()
        if data and kind < 0.5:
            cuts = {dice.randrange(len(data)) for _ in range(dice.choice([1, 2, 5]))}
        elif data and kind < 0.6:
            start = dice.randrange(len(data))
            cuts = set(range(start, min(start + 60, len(data))))
        cuts = sorted(cuts | {0, len(data)})
        return [data[a:b] for a, b in zip(cuts, cuts[1:])]

    def ending(self):
        return self.dice.choices(["half", "sip", "close", "reset"], [20, 3, 2, 1])[0]


# What a server must make of it

def changed(data):
    """[(start, end)] of the disk that those bytes may have changed, if all were taken: where a
    message cannot begin with these bytes, nothing is taken any more.  What must be refused
    changes nothing, nor does a WRITE of what is there."""
    at, found, extended = 4, [], False
    while len(data) - at >= 16:
        if data.startswith(IHAVEOPT_BYTES, at):
            number, length = struct.unpack_from(">II", data, at + 8)
            extended = extended or (number == NBD_OPT_EXTENDED_HEADERS and not length)
            at += 16 + length
            continue
        r = head(data, at, extended)
        if not r or r.command == NBD_CMD_DISC:
            break
        payload = data[at + r.size:at + r.size + r.payload] if r.payload else None
        at += r.size + r.payload
        flags = r.flags & ~(NBD_CMD_FLAG_PAYLOAD_LEN if extended else 0)
        if (r.command in CHANGES and r.length and r.offset + r.length <= SIZE
                and not flags & ~FLAGS[r.command]
                and payload != CONTENT[r.offset:r.offset + r.length][:len(payload or b"")]):
            found.append((r.offset, r.offset + r.length))
    return found


def deserved(flags, command, offset, length, client, readonly):
    """The errors that a request may be answered with; 0 is none."""
    flaws = set()
    allowed = FLAGS.get(command, 0)
    if client.extended and command == NBD_CMD_WRITE:
        allowed |= NBD_CMD_FLAG_PAYLOAD_LEN
    if command == NBD_CMD_READ and not client.structured:
        allowed &= ~NBD_CMD_FLAG_DF
    if (command not in FLAGS or flags & ~allowed
            or command == NBD_CMD_FLUSH and (offset or length)
            or command == NBD_CMD_BLOCK_STATUS and not (client.contexts and length)
            or command == NBD_CMD_WRITE and length > PAYLOAD_MAX):
        flaws.add(NBD_EINVAL)
    if readonly and command in CHANGES:
        flaws.add(NBD_EPERM)
    if command == NBD_CMD_READ and length > READ_MAX:
        flaws.add(NBD_EOVERFLOW)
    if offset + length > SIZE:
        flaws.add(NBD_ENOSPC if command in (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES) else NBD_EINVAL)
    if not flaws:
        flaws = {0, NBD_ENOTSUP} if flags & NBD_CMD_FLAG_FAST_ZERO else {0}
    return flaws


def name_of(content):
    """The export's name in the data of an option."""
    return content[4:4 + int.from_bytes(content[:4], "big")]


class Answers(Client):
    """Reads what a server has sent, and a session at the same time."""

    SOCKET = socket.socket(socket.AF_UNIX)      # never connected: the bytes are here

    def __init__(self, received):
        super().__init__(self.SOCKET)
        self.received, self.place = received, 0
        self.reads = []             # (offset, data) of those that succeeded
        self.chosen_for = None      # the export name that contexts were chosen for

    def recv(self, length):
        data = self.received[self.place:self.place + length]
        if len(data) < length:
            raise Closed(data)
        self.place += length
        return data

    @property
    def rest(self):
        return len(self.received) - self.place


class Session:
    """A connection, and what is sent on it."""

    def __init__(self, address, writer, data=None):
        self.data = writer.session() if data is None else data
        self.pieces = collections.deque(writer.pieces(self.data))
        self.ending = writer.ending()
        self.received = bytearray()
        self.ended = False
        self.sock = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
        self.sock.connect(address)
        if isinstance(address, tuple):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self._finish_sending()

    def __repr__(self):
        return (f"session: {self.ending}, sent {len(self.data)} bytes {self.data[:400].hex()}, "
                f"received {len(self.received)} {bytes(self.received[:400]).hex()}")

    def events(self):
        return select.POLLIN | (select.POLLOUT if self.pieces else 0)

    def turn(self, events):
        try:
            if events & select.POLLOUT and self.pieces:
                self._send()
            if events & ~select.POLLOUT and not self.ended:
                self._receive()
        except OSError:             # the server has closed it
            self._drain()

    def _send(self):
        sent = self.sock.send(self.pieces[0])
        self.pieces[0] = self.pieces[0][sent:]
        if not self.pieces[0]:
            self.pieces.popleft()
        self._finish_sending()

    def _finish_sending(self):
        if self.pieces:
            return
        if self.ending in ("half", "sip"):
            self.sock.shutdown(socket.SHUT_WR)
        else:
            if self.ending == "reset":
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._end()

    def _receive(self):
        """Who sips is so slow that the server has to wait for it."""
        data = self.sock.recv(64 if self.ending == "sip" and self.pieces else 1 << 18)
        self.received += data
        if not data:
            self._end()

    def _drain(self):
        """What it sent before may be there."""
        try:
            while data := self.sock.recv(1 << 18):
                self.received += data
        except OSError:
            pass
        self._end()

    def _end(self):
        self.ended = True
        self.sock.close()

    @property
    def stays(self):
        """It reads everything up to the end."""
        return self.ending in ("half", "sip")

    # The checks of what came

    def check(self, touched, readonly, errors=()):
        """Everything that was understood has been answered as it should be.  errors: what any
        READ may be answered with."""
        answers = Answers(bytes(self.received))
        try:
            complete = self._follow(answers, readonly, errors)
        except Closed:
            complete = False
            assert not self._must_be_complete, f"an answer is missing: {self}"
        if complete:
            assert not answers.rest, f"{answers.rest} bytes nobody asked for: {self}"
        for offset, data in answers.reads:
            check_content(offset, data, touched)

    def _follow(self, answers, readonly, errors):
        """Whether the session was followed to its end."""
        self._must_be_complete = False
        answers.greeting()
        if len(self.data) < 4:
            return True
        flags = int.from_bytes(self.data[:4], "big")
        if flags & ~FIXED:
            return True
        answers.no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        at = self._options(answers, flags)
        return at is None or self._requests(answers, at, readonly, errors)

    def _options(self, answers, flags):
        """Where transmission begins; None if it does not."""
        data, at = self.data, 4
        self._must_be_complete = self.ending == "half" and self._is_all_options()
        while len(data) - at >= 16 and data.startswith(IHAVEOPT_BYTES, at):
            number, length = struct.unpack_from(">II", data, at + 8)
            content = data[at + 16:at + 16 + length]
            at += 16 + length
            if length > OPTION_MAX or at > len(data):
                return None
            if number == NBD_OPT_EXPORT_NAME:
                return at if answers.rest and self._enter(answers, content) else None
            if not flags & NBD_FLAG_C_FIXED_NEWSTYLE:
                self._must_be_complete = False
                return None
            replies = self._option(answers, number, content)
            if replies is not None and number == NBD_OPT_ABORT:
                self._must_be_complete = self.stays and at == len(data)
                return None
            if replies is not None and number == NBD_OPT_GO:
                self._enter(answers, name_of(content), Info(replies))
                return at
        return None

    def _is_all_options(self):
        """Nothing else, and nothing cut off, or behind the last: each must be answered."""
        at, number = 4, None
        while (self.data.startswith(IHAVEOPT_BYTES, at) and len(self.data) - at >= 16
               and number not in (NBD_OPT_GO, NBD_OPT_EXPORT_NAME, NBD_OPT_ABORT)):
            number, length = struct.unpack_from(">II", self.data, at + 8)
            at += 16 + length
        return at == len(self.data)

    @staticmethod
    def _enter(answers, name, info=None):
        """Transmission begins, after GO, or EXPORT_NAME."""
        if info:
            answers.size, answers.flags = info.size, info.flags
        else:
            answers.size, answers.flags = answers.unpack(">QH")
            assert answers.no_zeroes or answers.recv(124) == bytes(124)
        assert answers.size == SIZE
        if answers.chosen_for != name:
            answers.contexts = {}
        return True

    @staticmethod
    def _option(answers, number, content):
        """The replies before the ACK; None if it was refused."""
        if number == NBD_OPT_SET_META_CONTEXT:
            answers.contexts = {}
        try:
            replies = answers.option_replies(number)
        except OptionError as e:
            assert not e.before
            return None
        assert len(content) <= KEPT_OPTION_MAX
        if number in (NBD_OPT_STRUCTURED_REPLY, NBD_OPT_EXTENDED_HEADERS):
            answers.structured = True
            answers.extended = number == NBD_OPT_EXTENDED_HEADERS
        if number == NBD_OPT_SET_META_CONTEXT:
            answers.contexts = dict(reply.context for reply in replies)
            answers.chosen_for = name_of(content)
        return replies

    def _requests(self, answers, at, readonly, errors):
        data, sent, orderly = self.data, {}, False
        while r := head(data, at, answers.extended):
            size, flags, command, cookie, offset, length, payload = r
            if command == NBD_CMD_DISC:
                orderly = at + size == len(data)
                break
            if cookie in sent:          # answers cannot be told apart
                answers.place = len(answers.received)
                return False
            at += size + payload
            if at > len(data):
                break
            sent[cookie] = deserved(flags, command, offset, length, answers, readonly)
            if command == NBD_CMD_READ and 0 in sent[cookie]:
                sent[cookie] |= set(errors)
            answers.expect(cookie, Request(command, offset, length, flags))
        # Who leaves without DISC may be on another connection already, and is owed nothing.
        self._must_be_complete = self.stays and orderly
        while answers.pending:
            self._answer(answers, answers.collect(), sent)
        return self._must_be_complete

    @staticmethod
    def _answer(answers, reply, sent):
        assert reply.error in sent[reply.cookie], f"{reply}, deserves {sent[reply.cookie]}"
        if reply.request.command == NBD_CMD_READ and not reply.error:
            answers.reads.append((reply.request.offset, reply.data))


# The disk

class Touched:
    """Which blocks may have been changed."""

    def __init__(self):
        self.blocks = set()

    def add(self, ranges):
        for start, end in ranges:
            self.blocks.update(range(start // BLOCK, -(-end // BLOCK)))

    @property
    def much(self):
        return len(self.blocks) > SIZE // BLOCK * 2 // 3


def check_content(offset, data, touched):
    """What is not touched is as before."""
    if data == CONTENT[offset:offset + len(data)]:
        return
    for block in range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)):
        if block not in touched.blocks:
            a, b = max(offset, block * BLOCK), min(offset + len(data), (block + 1) * BLOCK)
            assert data[a - offset:b - offset] == CONTENT[a:b], f"block {block} has changed"


def check_disk(address, touched):
    """What somebody sees who does nothing wrong."""
    with Client(address) as c:
        c.negotiate(structured=True)
        check_content(0, c.pread(SIZE), touched)
        c.disc()


# Turns

def run(sessions):
    """Lets them all go on, until each has ended."""
    end = time.monotonic() + 3 * DEADLINE
    while waiting := {s.sock.fileno(): s for s in sessions if not s.ended}:
        poller = select.poll()
        for fd, s in waiting.items():
            poller.register(fd, s.events())
        for fd, events in poller.poll(1000 * DEADLINE):
            waiting[fd].turn(events)
        assert time.monotonic() < end, f"no end of {list(waiting.values())}"


class Fuzz:
    """A test's rounds, each with servers and files of its own."""

    def __init__(self, server, directory):
        self.server, self.directory = server, directory
        self.seed = random_seed()
        self.sessions, self.last = 0, []

    def rounds(self, one):
        """Calls one(dice, directory) for the time that there is."""
        end, rounds = time.monotonic() + SECONDS, 0
        while rounds == 0 or time.monotonic() < end:
            directory = self.directory / "round"
            directory.mkdir()
            try:
                one(random.Random(self.seed), directory)
            except BaseException:
                print(f"XNBD_SEED={self.seed}, and what was sent last is in {self.keep()}")
                raise
            shutil.rmtree(directory)
            self.seed += 1
            rounds += 1
        print(f"{self.sessions} sessions in {rounds} rounds")

    def keep(self):
        """Writes down what was sent last; returns where."""
        found = Path(os.environ.get("XNBD_FUZZ_DIR") or self.directory) / "found"
        found.mkdir(parents=True, exist_ok=True)
        path = found / f"sessions-{self.seed}"
        path.write_text("".join(f"{s.ending} {s.data.hex()}\n" for s in self.last))
        return path

    def batch(self, sessions):
        self.sessions += len(sessions)
        self.last = sessions
        try:
            run(sessions)
        finally:
            for s in sessions:
                s.sock.close()

    def end(self, s):
        """The server of a round has served, and ends."""
        assert s.proc.poll() is None, s.log()
        until(lambda: s.sockets() <= len(s.addresses) + self.own_sockets, what="closed connections")
        assert s.status("VmHWM") << 10 < MEMORY
        s.stop()
        self.server.forget(s)

    own_sockets = 0             # besides the listeners and the connections


@pytest.fixture(scope="session")
def fuzzed_program(tmp_path_factory):
    """The server to test; with sanitizers, if this is to take its time."""
    if SANITIZED or not os.environ.get("XNBD_FUZZ_SECONDS"):
        return conftest.SERVER
    build = tmp_path_factory.mktemp("asan")
    subprocess.run(
        ["make", "-s", "-C", Path(__file__).absolute().parent.parent, f"BUILD={build}",
         "CFLAGS=-O1 -g -fno-omit-frame-pointer -DXNBD_INSTRUMENTED -fsanitize=address,undefined "
         "-fno-sanitize-recover=undefined", f"{build}/xnbd-server"],
        check=True, stdin=subprocess.DEVNULL)
    return str(build / "xnbd-server")


@pytest.fixture
def start(fuzzed_program, tmp_path, monkeypatch):
    """start(*arguments): a server of a round."""
    started = []
    monkeypatch.setattr(conftest, "SERVER", fuzzed_program)

    def begin(*arguments):
        log = tmp_path / "log"
        log.mkdir(exist_ok=True)
        one = conftest.Server(arguments, log, len(started), {})
        started.append(one)
        return one.wait_ready()

    def forget(one):
        started.remove(one)
        one.stderr.unlink()

    begin.forget = forget
    yield begin
    end_all(started)


@pytest.fixture
def fuzz(start, tmp_path):
    return Fuzz(start, tmp_path)


# Targets

def addresses(directory):
    return ["--unix", directory / "nbd", "--laddr", "127.0.0.1", "--lport", "0"]


def some_threads(dice):
    """Options of the server: its connections share threads, or do not."""
    return dice.choice([[], ["--threads", "1"], ["--threads", "3"]])


def sessions_round(fuzz, s, dice, touched, readonly=False):
    """Batches of sessions against a server."""
    writer = Writer(dice)
    for number in range(BATCHES):
        batch = [Session(dice.choice(s.addresses), writer) for _ in range(TOGETHER)]
        if not readonly:
            for one in batch:
                touched.add(changed(one.data))
        fuzz.batch(batch)
        for one in batch:
            one.check(touched, readonly)
        if number % 5 == 4 or touched.much:
            check_disk(s.address, touched)
        if touched.much:
            return


@pytest.mark.limit(LIMIT)
@pytest.mark.parametrize("mode", ["target", "cow"])
def test_sessions_with_a_target(fuzz, mode):
    def one(dice, directory):
        image = directory / "image"
        image.write_bytes(CONTENT)
        readonly = dice.random() < 0.2
        arguments = ["--target" if mode == "target" else "--cow-target", *addresses(directory),
                     *some_threads(dice), *["--readonly"] * readonly]
        if mode == "cow" and dice.random() < 0.5:
            arguments += ["--cow-file", directory / "overlay"]
        s = fuzz.server(*arguments, image)
        sessions_round(fuzz, s, dice, Touched(), readonly)
        fuzz.end(s)
        if mode == "cow" or readonly:
            assert image.read_bytes() == CONTENT

    fuzz.rounds(one)


# A proxy

def proxy(fuzz, directory, remote, dice, *options):
    files = [directory / name for name in ("cache", "map", "ctl")]
    bounds = dice.choice([[], ["--max-queue-size", "2"], ["--max-buf-size", "64K"]])
    s = fuzz.server("--proxy", *addresses(directory), *some_threads(dice), *bounds, *options,
                    *remote, *files)
    s.image, s.bitmap, s.control = files
    return s


def tell(s, command):
    """The lines of an answer on the control socket."""
    with contextlib.closing(Control(s.control)) as control:
        return control.ask(command)


def go_over(s):
    """All of the disk comes, and the proxy does without its origin."""
    until(lambda: tell(s, "cache-all")[-1] == "ok", what="a complete copy")
    assert tell(s, "switch") == ["ok"]


@pytest.fixture
def remote(start, tmp_path):
    """A good origin: the arguments for it."""
    image = tmp_path / "remote"
    image.write_bytes(CONTENT)
    start("--target", "--unix", tmp_path / "origin", image)
    yield [f"unix:{tmp_path / 'origin'}"]
    assert image.read_bytes() == CONTENT, "the origin was written to"


@pytest.mark.limit(LIMIT)
def test_sessions_with_a_proxy(fuzz, remote):
    """They come while blocks do, and while it goes over to its image."""
    fuzz.own_sockets = 3

    def one(dice, directory):
        s, touched = proxy(fuzz, directory, remote, dice), Touched()
        sessions_round(fuzz, s, dice, touched)
        if dice.random() < 0.5:
            go_over(s)
            sessions_round(fuzz, s, dice, touched)
        fuzz.end(s)

    fuzz.rounds(one)


# The control socket

LINES = ["help", "query", "cache-all", "cache-all 1", "cache-all 8192", "cache-all2",
         "cache-all2 7", "stop-copy", "switch", "switch force", "reconnect unix:/nowhere -",
         "reconnect unix:{remote} - x y", "reconnect unix:{remote} -", "bogus", "", " "]
LINE_MAX = 8192


class ControlWriter(Writer):
    """Makes what is sent to a control socket."""

    def __init__(self, dice, remote):
        super().__init__(dice)
        self.remote = remote

    def session(self):
        dice = self.dice
        lines = [dice.choice(LINES).replace("{remote}", self.remote).encode()
                 for _ in range(dice.choice([0, 1, 2, 5]))]
        data = b"".join(line + dice.choice([b"\n", b"\n", b"\n", b"\r\n"]) for line in lines)
        for _ in range(dice.choice([0, 0, 1, 2])):
            data = self.change_bytes(data)
        if self.chance(0.05):
            data += b"x" * dice.choice([LINE_MAX, LINE_MAX + 1, LINE_MAX + 2, 3 * LINE_MAX])
            data += dice.choice([b"", b"\n"])
        # To look for hosts of other names may take long.
        return re.sub(rb"reconnect +(?!unix:)", b"reconnekt ", data)


class ControlSession(Session):
    """Lines, and their answers."""

    def check(self, *_):
        lines = bytes(self.received).split(b"\n")
        assert lines.pop() == b"" or not self.stays, f"half a line: {self}"
        assert all(re.fullmatch(rb"ok|[^\0-\x1f\x7f]+: .*", line) for line in lines), f"{self}"
        ends = sum(line == b"ok" or line.startswith(b"error: ") for line in lines)
        if self.stays:
            assert ends == self.expected(), f"{ends} answers, not {self.expected()}: {self}"

    def expected(self):
        """How many answers: one a line, up to one that is too long."""
        *lines, rest = self.data.split(b"\n")
        for number, line in enumerate(lines):
            if len(line) - line.endswith(b"\r") > LINE_MAX:
                return number + 1
        return len(lines) + (len(rest) >= LINE_MAX + 2)


@pytest.mark.limit(LIMIT)
def test_lines_to_a_proxy(fuzz, remote):
    """The clients' requests come at the same time."""
    fuzz.own_sockets = 4

    def one(dice, directory):
        s = proxy(fuzz, directory, remote, dice)
        touched, zeroed = Touched(), False
        lines, writer = ControlWriter(dice, remote[0][len("unix:"):]), Writer(dice)
        for _ in range(BATCHES):
            batch = [ControlSession(str(s.control), lines) for _ in range(TOGETHER)]
            batch += [Session(s.addresses[0], writer) for _ in range(2)]
            zeroed = zeroed or any(b"force" in one.data for one in batch)
            for one in batch[TOGETHER:]:
                touched.add(changed(one.data))
            if zeroed:          # what was not here reads as zeros from now on
                touched.add([(0, SIZE)])
            fuzz.batch(batch)
            for one in batch:
                one.check(touched, False)
            check_disk(s.address, touched)
            assert tell(s, "query")[-1] == "ok"
        fuzz.end(s)

    fuzz.rounds(one)


# An origin that changes its answers

class BadOrigin(Origin):
    """Some of its answers are changed, but never the data in them: so what was asked for then may
    have become anything, and nothing else.  If the change is to the cookie, it may be the answer
    to whatever else was in flight."""

    writer, touched = None, None
    rate, left = 0, 0           # how many are changed, and at most

    def answer_to(self, request):
        messages = super().answer_to(request)
        if not self.left or self.writer.dice.random() >= self.rate:
            return messages
        self.left -= 1
        self.taint(request)
        return self.spoil(request, messages)

    def taint(self, *requests):
        self.touched.add((r.offset, r.end) for r in requests)

    def spoil(self, request, messages):
        writer = self.writer
        kind, = writer.dice.choices(range(5), [1, 1, 0.2, 1, 4])
        if kind == 0 and request.command == NBD_CMD_READ and request.structured:
            bad = writer.dice.choice(list(BAD_REPLIES.values()))(request)
            return bad if isinstance(bad, list) else [bad]
        at = writer.dice.randrange(len(messages))
        if kind == 1:
            self.taint(*list(request.connection.in_flight.values()))
            return [writer.change_bytes(messages[at])] + messages
        if kind == 2:
            return messages[:at] + messages[at + 1:] or [b""]
        if kind == 3:
            return messages[:at + 1] + messages[at:]
        return messages[:at] + [self.spoil_head(request, messages[at])] + messages[at + 1:]

    def spoil_head(self, request, message):
        """Changes a field of a chunk's head, or of a simple reply's."""
        chunked = message.startswith(struct.pack(">I", NBD_STRUCTURED_REPLY_MAGIC))
        widths = [4, 2, 2, 8, 4] + [8] * (len(message) >= 28) if chunked else [4, 4, 8]
        which = self.writer.dice.randrange(len(widths))
        if which == (3 if chunked else 2):
            self.taint(*list(request.connection.in_flight.values()))
        at = sum(widths[:which])
        old = int.from_bytes(message[at:at + widths[which]], "big")
        new = self.writer.value(widths[which], old)
        return message[:at] + new.to_bytes(widths[which], "big") + message[at + widths[which]:]


# The greeting, an ACK, the context and its ACK, the information and its ACK: no data.
HANDSHAKE_BYTES = 18 + 20 + (20 + 4 + len(ALLOCATION)) + 20 + (20 + 12) + 20


def spoil_handshakes(origin, dice):
    """Of some of the connections to come, somewhere."""
    origin.faults.extend(Fault(dice.randrange(HANDSHAKE_BYTES), dice.choice(
        ["close", "reset", "double", "flip", "flip"])) for _ in range(dice.randrange(4)))


def reads(writer):
    """A session that reads here and there: most of it is a block that the origin is asked for.
    It ends in DISC, so that all of it is answered, whatever the origin does."""
    messages = [[(4, FIXED)], option(NBD_OPT_STRUCTURED_REPLY),
                option(NBD_OPT_GO, *name_field(""), (2, 0))]
    for cookie in range(30):
        block = BLOCK * writer.dice.randrange(SIZE // BLOCK)
        place = (block, BLOCK) if writer.chance(0.9) else writer.range()
        messages.append(request(NBD_CMD_READ, *place, cookie=cookie))
    messages.append(request(NBD_CMD_DISC, cookie=30))
    return b"".join(map(encode, messages))


@pytest.mark.limit(LIMIT)
def test_proxy_of_an_origin_that_changes_its_answers(fuzz, tmp_path):
    """Nothing but what was asked for then can be wrong; and when it answers well again, all
    is served."""
    fuzz.own_sockets = 17

    def one(dice, directory):
        touched = Touched()
        with BadOrigin(CONTENT, unix=directory / "origin", seed=dice.random()) as origin:
            s = proxy(fuzz, directory, origin.arguments, dice, "--origin-timeout", "1",
                      "--origin-connections", dice.choice([1, 16, 16]))
            origin.writer, origin.touched = Writer(random.Random(dice.random())), touched
            origin.rate, origin.left = dice.choice([0.02, 0.1, 0.5]), 30
            for _ in range(3):
                spoil_handshakes(origin, dice)
                writer = Writer(dice)
                batch = [Session(s.addresses[0], writer, reads(writer)) for _ in range(TOGETHER)]
                fuzz.batch(batch)
                for each in batch:
                    each.check(touched, False, errors=[NBD_EIO])
            origin.left = 0
            origin.faults.clear()
            check_disk(s.address, touched)
            go_over(s)
        check_disk(s.address, touched)
        fuzz.end(s)
        origin.check()

    fuzz.rounds(one)
