"""Power cuts at every moment: what the files may be then must keep the promise.

powercut.c, preloaded into a server, records each change of its two files, each
sync, and each request and reply, in one order.  Here the record is played
back.  At each point of it we know what a power cut may leave: of each page of
a file, of its size and of its name, what it was at the last completed sync or
after any change since, one independently of the other.  And we know what the
clients may rely on: the promise (class Promise).

A block is read from its page in the image if the header says that all are held,
or if the committed map has its bit, else from where the disk comes from: the
base image, or the remote server.  So what it can read as depends on the header,
one page of the map and one of the image only, and looking at each combination of
what these may be covers all subsets of the changes that a power cut can lose.
Real servers are then started on some of the states, chosen at random; on all of
those that a start can leave behind.

A page is taken to be written whole or not at all.  The live map is worth nothing
after a power cut, and is filled with random bits.  After kill -9 the page cache
has all, and the live map counts beside the committed one; so that each point of
the record is checked for that, too, and then every acknowledged change is there
(class Killed).  It is written bit by bit, so that each record of bits is a point
of its own, between the data and the reply.

A snapshot of a target must have no name, or be complete (class SnapshotCuts).

XNBD_POWERCUT_SECONDS=<seconds> lets the random test run longer;
XNBD_SEED=<seed> repeats its operations.
"""

import concurrent.futures
import contextlib
import itertools
import os
import random
import socket
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

from conftest import (CRASH, SERVER, build_library, is_portable, make_disk, need_copies, need_punch,
                      preload, skip)
from nbd import *
from test_cow import fnv1a
from test_model import random_seed
from test_snapshot import Snapshots, file_system, leave

BLOCK = 4096
ZEROS = bytes(BLOCK)
SECONDS = float(os.environ.get("XNBD_POWERCUT_SECONDS") or 4)
POINTS = 3 if SECONDS < 60 else 60      # real servers for as many states of one record
hazard = pytest.mark.hazard
ADDRESS = ["--laddr", "127.0.0.1", "--lport", "0"]
CHANGES = (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM)

# powercut.c: the kinds of records, and the layout of what is before the bytes.
(WRITE, TRUNCATE, ALLOCATE, ZERO, SYNC, SYNCED, CREATE, UNLINK, RENAME, LINK, RECEIVE,
 SEND, CLONE, HELD) = range(1, 15)
RECORD = struct.Struct("=IIQQQQ")


# The header of the bitmap file: how much of it its checksum covers, and its flags.
CHECKED = 80
FAILED, WHOLE, WRITTEN = 1, 2, 4


def flags_of(header):
    return struct.unpack_from("<I", header, 60)[0]


class Log:
    """The record, read as it grows."""

    def __init__(self, path):
        self.path, self.place, self.rest = path, 0, b""
        path.touch()

    def read(self):
        """Yields (kind, thread, file, at, length, bytes), whole records only."""
        with open(self.path, "rb") as f:
            f.seek(self.place)
            data = self.rest + f.read()
            self.place = f.tell()
        at = 0
        while at + RECORD.size <= len(data):
            *head, size = RECORD.unpack_from(data, at)
            end = at + RECORD.size + size
            if end > len(data):
                break
            yield (*head, data[at + RECORD.size:end])
            at = end
        self.rest = data[at:]

    def drop_rest(self):
        """The server was killed, maybe in the middle of a record."""
        os.truncate(self.path, self.place - len(self.rest))
        self.place, self.rest = self.place - len(self.rest), b""


# What may be on the disk

class Versions:
    """What something was at the last sync, and after each change since:
    [(time, value)], the first one is the durable one."""

    def __init__(self, value):
        self.all = [(0, value)]

    @property
    def last(self):
        return self.all[-1][1]

    def values(self):
        return [value for _, value in self.all]

    def change(self, time, value):
        """Whether that is another value."""
        if value == self.last:
            return False
        self.all.append((time, value))
        return True

    def sync(self, begun):
        """What was there when it began is durable; whether it is all now."""
        durable = max(i for i, (time, _) in enumerate(self.all) if time < begun)
        del self.all[:durable]
        return len(self.all) == 1


class File:
    """A file as it may be on the disk, page by page."""

    def __init__(self, data=b""):
        self.size = Versions(len(data))
        self.pages = {}
        self.loose = set()          # pages that have changed since the last sync
        for page in range(-(-len(data) // BLOCK)):
            content = data[page * BLOCK:(page + 1) * BLOCK]
            self.pages[page] = Versions(content.ljust(BLOCK, b"\0"))

    def page(self, number):
        if number not in self.pages:
            self.pages[number] = Versions(ZEROS)
        return self.pages[number]

    def write(self, time, at, data):
        """Returns the pages that have changed."""
        changed, end = [], at + len(data)
        for number in range(at // BLOCK, -(-end // BLOCK)):
            start = number * BLOCK
            first, last = max(at, start), min(end, start + BLOCK)
            old = self.page(number).last
            new = old[:first - start] + data[first - at:last - at] + old[last - start:]
            if self.page(number).change(time, new):
                changed.append(number)
        self.loose.update(changed)
        self.grow(time, end)
        return changed

    def grow(self, time, size):
        self.size.change(time, max(self.size.last, size))
        return []

    def truncate(self, time, size):
        old = self.size.last
        changed = self.write(time, size, bytes(old - size)) if size < old else []
        self.size.change(time, size)
        return changed

    def clone(self, time, other):
        """It becomes a copy of that; returns the pages that have changed."""
        for number, page in other.pages.items():
            self.write(time, number * BLOCK, page.last)
        self.truncate(time, other.size.last)
        return list(other.pages)

    def is_durable(self):
        return not self.loose and len(self.size.all) == 1

    def cached(self, number):
        """A page of it in the page cache."""
        return self.page(number).last

    def sync(self, begun):
        self.size.sync(begun)
        self.loose -= {n for n in self.loose if self.pages[n].sync(begun)}

    def choose(self, choice):
        """(size, {page: bytes}) of one of the states that it may have."""
        return choice(self.size.values()), {n: choice(p.values()) for n, p in self.pages.items()}


class Directory:
    """The watched directory: names, and what files they may have on the disk."""

    def __init__(self, path, important):
        self.path, self.inode, self.important = path, path.stat().st_ino, important
        self.names, self.files = {}, {}
        for file in path.iterdir():
            self.files[file.stat().st_ino] = File(file.read_bytes())
            self.names[file.name] = Versions(self.files[file.stat().st_ino])

    def name(self, name, time, file):
        if name not in self.names:
            self.names[name] = Versions(None)
        self.names[name].change(time, file)

    def candidates(self, name):
        """The files, or None, that the name may stand for."""
        return self.names[name].values() if name in self.names else [None]

    def last(self, name):
        return self.names[name].last if name in self.names else None

    def sync(self, begun):
        for versions in self.names.values():
            versions.sync(begun)

    def choose(self, choice):
        """{name: (size, pages)} of a state, without temporary names."""
        chosen = {name: choice(self.candidates(name)) for name in self.important}
        return {name: file.choose(choice) for name, file in chosen.items() if file}


# Operations, and what clients may rely on

class Operation:
    """A request.  Its cookie is its own for ever, so that the record can name it."""

    cookies = itertools.count(1)
    sent = {}

    def __init__(self, command, at=0, length=0, flags=0):
        self.command, self.at, self.length, self.flags = command, at, length, flags
        self.cookie = next(self.cookies)
        self.data = self.content()
        self.sent[self.cookie] = self

    def content(self):
        """Bytes that no other operation writes, and that are nowhere zero."""
        if self.command == NBD_CMD_READ:
            return b""
        if self.command != NBD_CMD_WRITE:
            return bytes(self.length)
        word = struct.pack("<IHBB", self.cookie | 1 << 31, 0xfffe, 0xfd, 0xfc)
        return (word * (self.length // 8 + 1))[:self.length]

    def __repr__(self):
        fua = ", FUA" if self.flags & NBD_CMD_FLAG_FUA else ""
        return f"#{self.cookie} {COMMANDS[self.command]}({self.at}, {self.length}{fua})"

    def blocks(self):
        return range(self.at // BLOCK, -(-(self.at + self.length) // BLOCK))

    def apply(self, block, old):
        """What the block, which was old, is afterwards.  A TRIM clears whole blocks."""
        start = block * BLOCK
        first, last = max(self.at - start, 0), min(self.at + self.length - start, len(old))
        if self.command == NBD_CMD_TRIM and last - first < len(old):
            return old
        return old[:first] + self.data[first + start - self.at:last + start - self.at] + old[last:]


class Promise:
    """For each block: what it may read as after a power cut.

    values[b]   what it was when the last change that is known to be durable was
                done, and after each change since that the server has seen
    first[b]    the number of the first of these, counted from the beginning
    answered[b] the number of the last one that was acknowledged
    """

    def __init__(self, content):
        blocks = [content[at:at + BLOCK] for at in range(0, len(content), BLOCK)]
        self.origin = blocks
        self.values = [[block] for block in blocks]
        self.first, self.answered = [0] * len(blocks), [0] * len(blocks)
        self.loose = set()          # blocks with answered changes that are not durable
        self.past = {}              # block: [(what was done, value)], for messages

    def add(self, block, value, why):
        self.values[block].append(value)
        self.past.setdefault(block, []).append((why, value))
        del self.past[block][:-6]
        return self.first[block] + len(self.values[block]) - 1

    def request(self, op):
        """The server has got its header."""
        if op.command == NBD_CMD_FLUSH:
            op.covers = self.answered_by_now()
        elif op.command in CHANGES:
            op.made = {b: self.add(b, op.apply(b, self.values[b][-1]), op) for b in op.blocks()}

    def answered_by_now(self):
        return {b: self.answered[b] for b in self.loose}

    def reply(self, op):
        """It was answered; returns the blocks of which less is allowed now."""
        if op.command in CHANGES:
            for block, number in op.made.items():
                self.answered[block] = number
            self.loose.update(op.made)
        if op.command == NBD_CMD_FLUSH:
            return self.durable(op.covers)
        if op.command in CHANGES and op.flags & NBD_CMD_FLAG_FUA:
            return self.durable(op.made)
        return []

    def acknowledged(self, block):
        """What was answered last, and what is in flight."""
        return self.values[block][self.answered[block] - self.first[block]:]

    def durable(self, numbers):
        """What was before these changes is gone."""
        for block, number in numbers.items():
            del self.values[block][:max(0, number - self.first[block])]
            self.first[block] = max(self.first[block], number)
            if self.first[block] >= self.answered[block]:
                self.loose.discard(block)
        return list(numbers)

    def settle(self, values):
        """What the blocks are now, for sure."""
        self.__init__(b"".join(self.origin))
        self.values = [[value] for value in values]

    def describe(self, block, value):
        if value == self.origin[block]:
            return "as it is at the origin"
        for why, known in reversed(self.past.get(block, [])):
            if value == known:
                return f"as it was after {why}"
        return "zeros" if not value.strip(b"\0") else f"a mixture: {mixture(value)}"


def mixture(value):
    """The runs of a block: (length, first bytes)."""
    words = [value[i:i + 8] for i in range(0, len(value), 8)]
    return ", ".join(f"{8 * len(list(run))} x {word.hex()}"
                     for word, run in itertools.islice(itertools.groupby(words), 3))


# What passed through the sockets

def same(op, reply, expected):
    """The reply is right."""
    assert not reply.error, f"{op}: {reply}"
    if reply.data != expected:
        at = next(i for i, (a, b) in enumerate(zip(reply.data, expected)) if a != b)
        raise AssertionError(f"{op}: at {op.at + at} is {reply.data[at:at + 16].hex()}, "
                             f"and {expected[at:at + 16].hex()} is expected")


class Stream:
    """One direction of a connection, cut into messages by a generator, which
    yields how many bytes it wants next."""

    def __init__(self, parser):
        self.parser, self.have = parser, bytearray()
        self.want = next(parser)

    def feed(self, data):
        self.have += data
        while len(self.have) >= self.want:
            message = bytes(self.have[:self.want])
            del self.have[:self.want]
            self.want = self.parser.send(message)


def client_requests(on_request, reads):
    """What a client sends that does not ask for structured replies; reads gets
    the lengths of its READs."""
    option = None
    yield 4                         # the client's flags
    while option != NBD_OPT_GO:
        _, option, length = struct.unpack(">QII", (yield 16))
        yield length
    while True:
        *_, command, cookie, _, length = struct.unpack(">IHHQQI", (yield 28))
        on_request(cookie)
        if command == NBD_CMD_READ:
            reads[cookie] = length
        yield length if command == NBD_CMD_WRITE else 0


def server_replies(on_reply, reads):
    option = kind = None
    yield 18                        # the greeting
    while (option, kind) != (NBD_OPT_GO, NBD_REP_ACK):
        _, option, kind, length = struct.unpack(">QIII", (yield 20))
        yield length
    while True:
        _, error, cookie = struct.unpack(">IIQ", (yield 16))
        on_reply(cookie, error)
        length = reads.pop(cookie, 0)
        yield 0 if error else length


def lines(on_line):
    line = b""
    while True:
        byte = yield 1
        line += byte
        if byte == b"\n":
            on_line(line.decode(errors="replace").strip())
            line = b""


class Socket:
    """A connection: of a client, who is greeted by the server; to the origin,
    which greets; or of the control socket, where lines are spoken."""

    def __init__(self, cuts, kind, data):
        if data.startswith(b"NBDMAGIC") and kind == SEND:
            cuts.on_client()
            reads = {}
            self.streams = {RECEIVE: Stream(client_requests(cuts.on_request, reads)),
                            SEND: Stream(server_replies(cuts.on_reply, reads))}
        elif data.startswith(b"NBDMAGIC"):
            self.streams = {}
        else:
            self.streams = {RECEIVE: Stream(lines(cuts.on_command)),
                            SEND: Stream(lines(cuts.on_answer))}

    def feed(self, kind, data):
        if self.streams:
            self.streams[kind].feed(data)


# The check

class PowerCuts:
    """Plays the record back, and checks the promise at each point of it.

    served      a client was greeted: from now on every state can be opened
    starting    no client of this server was greeted yet
    switched    the image must be right without the bitmap, too
    held        a thread waits at the recorder's
    checked     how many values of blocks were looked at
    """

    def __init__(self, mode, log, promise):
        self.mode, self.promise = mode, promise
        self.log = log
        self.directory = Directory(mode.directory, [n for n in (mode.image, mode.bitmap) if n])
        self.time, self.checked = 0, 0
        self.served = self.switched = self.held = False
        self.starting = True
        self.killed_now = Killed(self)
        self.sockets, self.syncs = {}, {}
        self.forgotten = {}         # by --clear-bitmap, when a client is greeted
        self.commands = []          # of the control socket: (line, what it covers)
        self.watchers = []          # called after each change that a power cut may lose

    def catch_up(self):
        """Plays back what is new in the record."""
        for record in self.log.read():
            self.time += 1
            self.play(*record)

    def play(self, kind, thread, inode, at, length, data):
        if kind in (RECEIVE, SEND):
            if inode not in self.sockets:
                self.sockets[inode] = Socket(self, kind, data)
            self.sockets[inode].feed(kind, data)
            return
        if kind == SYNC:
            self.syncs[thread] = self.time
        elif kind == SYNCED:
            self.synced(self.syncs.pop(thread), inode, at)
        elif kind in (CREATE, UNLINK, RENAME, LINK):
            self.renamed(kind, inode, data.decode().split("\0"))
        elif kind == HELD:
            self.held = True
        elif inode in self.directory.files:
            self.changed(self.directory.files[inode], kind, at, length, data)
        for watch in self.watchers:
            watch()

    def synced(self, begun, inode, ok):
        for file in [self.directory, *self.directory.files.values()]:
            if ok and (file is self.directory.files.get(inode)
                       or (file is self.directory and inode == file.inode)):
                file.sync(begun)

    def renamed(self, kind, inode, names):
        d = self.directory
        if kind == CREATE:
            d.files[inode] = File()
            if names[0]:
                d.name(names[0], self.time, d.files[inode])
        if kind in (RENAME, LINK):
            d.name(names[1], self.time, d.last(names[0]) if names[0] else d.files[inode])
        if kind in (RENAME, UNLINK):
            d.name(names[0], self.time, None)
        self.check_all()

    def changed(self, file, kind, at, length, data):
        before = {n: file.page(n).last for n in self.mode.map_pages}
        if kind == WRITE:
            pages = file.write(self.time, at, data)
        elif kind == ZERO:
            pages = file.write(self.time, at, bytes(min(length, file.size.last - at)))
        elif kind == TRUNCATE:
            pages = file.truncate(self.time, at)
        elif kind == CLONE:
            pages = file.clone(self.time, self.directory.files[at])
        else:
            pages = file.grow(self.time, at)
        if file is self.directory.last(self.mode.bitmap):
            self.map_changed(file, pages, before)
        elif file is self.directory.last(self.mode.image):
            blocks = [page for page in pages if page < len(self.promise.values)]
            self.check(blocks)
            self.killed_now.check(blocks)
        self.check_files()

    def map_changed(self, file, pages, before):
        """A power cut leaves nothing of the live map; after kill -9 it counts."""
        everything = range(len(self.promise.values))
        if 0 in pages:
            self.check(everything)
            self.killed_now.check(everything)
        for n in set(pages) & set(self.mode.map_pages):
            page = file.page(n).last
            assert not int.from_bytes(page, "little") >> len(everything), (
                "a bit behind the last block")
            blocks = self.changed_bits(before[n], page)
            if n == 1:
                self.check(blocks)
            self.killed_now.check(blocks)

    def changed_bits(self, before, after):
        bits = int.from_bytes(before, "little") ^ int.from_bytes(after, "little")
        return [b for b in range(len(self.promise.values)) if bits >> b & 1]

    # Requests and replies

    def on_client(self):
        self.starting = False
        if not self.served:
            self.served = True
            self.promise.durable(self.forgotten)
            self.check_all()

    def clearing(self):
        """A start with --clear-bitmap follows: until a client is greeted, blocks
        may be as before or as at the origin."""
        p = self.promise
        self.forgotten = {b: p.add(b, p.origin[b], "--clear-bitmap")
                          for b in range(len(p.values))}
        p.answered = list(self.forgotten.values())
        self.served = False

    def on_request(self, cookie):
        if cookie in Operation.sent:
            self.promise.request(Operation.sent[cookie])

    def on_reply(self, cookie, error):
        op = Operation.sent.pop(cookie, None)
        if op:
            assert not error, f"{op}: error {error}"
            self.check(self.promise.reply(op), f"the reply to {op}")
            self.killed_now.check(op.blocks(), f"the reply to {op}")

    def on_command(self, line):
        self.commands.append((line, self.promise.answered_by_now()))

    def on_answer(self, line):
        if line != "ok" and not line.startswith("error:"):
            return
        command, covers = self.commands.pop(0)
        if command.startswith("switch") and line == "ok":
            self.switched = True
            self.promise.durable(covers)
            self.check_all()

    # What must be true

    def states(self, block):
        """What the block may read as."""
        held = {bool(self.mode.is_held(header, bits, block))
                for file in self.directory.candidates(self.mode.bitmap)
                for header in (file.page(0).values() if file else [ZEROS])
                for bits in (file.page(1).values() if file else [ZEROS])}
        if False in held:
            yield self.promise.origin[block], "its bit is not set"
        if True not in held and not self.switched:
            return
        size = len(self.promise.origin[block])
        for file in self.directory.candidates(self.mode.image):
            for version in file.page(block).values() if file else []:
                yield version[:size], "its bit is set"

    def check(self, blocks, when=None):
        for block in blocks:
            legal = self.promise.values[block]
            for value, why in self.states(block):
                self.checked += 1
                if value not in legal:
                    self.complain(block, value, why, when)

    def complain(self, block, value, why, when):
        told = self.promise.describe
        raise AssertionError(
            f"after a power cut at {when or f'record {self.time}'} block {block}, if {why}, may be "
            f"{told(block, value)}; legal: "
            + "; ".join(told(block, legal) for legal in self.promise.values[block]))

    def check_all(self):
        self.check(range(len(self.promise.values)))
        self.killed_now.check(range(len(self.promise.values)))
        self.check_files()

    def check_files(self):
        """The server can open what there may be."""
        if not self.served:
            return
        image = self.directory.candidates(self.mode.image)
        bitmap = self.directory.candidates(self.mode.bitmap)
        assert None not in bitmap, "the bitmap file may not be there"
        if any(page.strip(b"\0") for file in bitmap for page in file.page(1).values()):
            assert None not in image, "the image may not be there"
            assert all(size >= self.mode.size for file in image for size in file.size.values())
        for file in bitmap:
            sizes = self.mode.map_sizes if self.starting else {self.mode.map_size}
            assert set(file.size.values()) <= sizes, file.size.values()
            assert all(self.mode.is_header(page) for page in file.page(0).values())

    # Between two servers

    def ended(self):
        """It has ended in order: all that was answered is durable."""
        self.catch_up()
        assert not self.log.rest
        self.promise.durable(self.promise.answered_by_now())
        self.check_all()
        self.compare()
        self.syncs.clear()

    def killed(self):
        """What it did last may not be in the record; the page cache has it."""
        self.catch_up()
        self.log.drop_rest()
        self.syncs.clear()
        self.time += 1
        for name, file in self.files():
            for page in self.differences(name, file):
                file.write(self.time, page * BLOCK, self.real_page(name, page))
        self.killed_now.check(range(len(self.promise.values)))

    def files(self):
        return [(name, v.last) for name, v in self.directory.names.items() if v.last]

    def real_page(self, name, page):
        with open(self.directory.path / name, "rb") as f:
            return os.pread(f.fileno(), BLOCK, page * BLOCK)

    def differences(self, name, file):
        """Pages that are not as the record says."""
        size = (self.directory.path / name).stat().st_size
        assert size == file.size.last, f"{name}: {size} bytes, {file.size.last} by the record"
        data = (self.directory.path / name).read_bytes()
        return [n for n in range(-(-size // BLOCK)) if data[n * BLOCK:(n + 1) * BLOCK]
                != file.page(n).last[:size - n * BLOCK]]

    def compare(self):
        """The recorder has missed nothing."""
        for name, file in self.files():
            assert not self.differences(name, file), f"{name} was changed in other ways"

    def legal(self):
        return [list(values) for values in self.promise.values]


class Killed:
    """What kill -9 would leave now: the page cache, and with it both maps, of which the
    live one counts if the header says that it is of this boot, and that stable storage
    has not failed."""

    def __init__(self, cuts):
        self.cuts, self.checked = cuts, 0
        self.boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes

    def header_and_map(self):
        file = self.cuts.directory.last(self.cuts.mode.bitmap)
        if not file:
            return ZEROS, ZEROS
        header, committed = file.cached(0), file.cached(1)
        if header[40:56] != self.boot or flags_of(header) & FAILED:
            return header, committed
        live = file.cached(self.cuts.mode.live_page)
        return header, bytes(a | b for a, b in zip(committed, live))

    def value(self, header, bits, block):
        elsewhere = self.cuts.promise.origin[block]
        if not self.cuts.mode.is_held(header, bits, block):
            return elsewhere
        return self.cuts.directory.last(self.cuts.mode.image).cached(block)[:len(elsewhere)]

    def check(self, blocks, when=None):
        """Every acknowledged change is there."""
        if not self.cuts.served or not blocks:
            return
        promise, found = self.cuts.promise, self.header_and_map()
        for b in blocks:
            self.checked += 1
            value, legal = self.value(*found, b), promise.acknowledged(b)
            assert value in legal, (
                f"after kill -9 at {when or f'record {self.cuts.time}'} block {b} is "
                f"{promise.describe(b, value)}; legal: "
                + "; ".join(promise.describe(b, v) for v in legal))


class SnapshotCuts(PowerCuts):
    """The same for a target, whose image is all that there is, and its snapshots.

    instant     what each block is in a snapshot that is made now
    """

    instant = None

    def states(self, block):
        size = len(self.promise.origin[block])
        for file in self.directory.candidates(self.mode.image):
            for version in file.page(block).values():
                yield version[:size], "the image counts"

    def ended(self):
        """A target leaves to FLUSH what is to be durable."""
        self.catch_up()
        assert not self.log.rest
        self.compare()
        self.syncs.clear()

    def snapshots(self):
        return [name for name in self.directory.names if ".snapshot." in name]

    def check_files(self):
        assert all(size == self.mode.size for file in self.directory.candidates(self.mode.image)
                   for size in file.size.values())
        for name in self.snapshots():
            for file in filter(None, self.directory.candidates(name)):
                assert file.is_durable(), f"a power cut spoils {name}, which has its name already"

    def renamed(self, kind, inode, names):
        super().renamed(kind, inode, names)
        if kind != UNLINK and names[-1] in self.snapshots():
            self.directory.important.append(names[-1])
            self.is_right(self.directory.last(names[-1]))

    def is_right(self, file):
        assert file.size.last == self.mode.size
        for b, expected in enumerate(self.instant):
            got = file.page(b).last[:len(expected)]
            assert got == expected, (f"block {b} of the snapshot is {mixture(got)}, "
                                     f"and was {mixture(expected)}")
        self.checked += len(self.instant)


# The two modes

def content_of(size):
    """A pattern with holes in it: single blocks, and some long runs."""
    data = bytearray(pattern(0, size))
    for b in range(-(-size // BLOCK)):
        if b % 7 == 3 or b // 64 % 8 == 5:
            data[b * BLOCK:(b + 1) * BLOCK] = bytes(len(data[b * BLOCK:(b + 1) * BLOCK]))
    return bytes(data)


def make_sparse(path, size, content):
    make_disk(path, size)
    with open(path, "r+b") as f:
        for at in range(0, len(content), BLOCK):
            if content[at:at + BLOCK].strip(b"\0"):
                os.pwrite(f.fileno(), content[at:at + BLOCK], at)
    return path


class Mode:
    """How a server is started in a directory, and what its files mean."""

    cuts = PowerCuts

    def __init__(self, directory, content, size=None):
        """A disk that begins with content; zeros follow, up to size."""
        self.directory, self.content = directory, content
        self.size = size or len(content)
        directory.mkdir()
        self.base = make_sparse(directory.with_suffix(".base"), self.size, content)
        self.map_bytes = max(1, -(-self.size // (BLOCK * BLOCK * 8))) * BLOCK
        self.live_page = 1 + self.map_bytes // BLOCK
        self.map_pages = (1, self.live_page)        # that are looked at
        self.map_size = BLOCK + 2 * self.map_bytes
        # The other one is that of a start that is killed while it empties the live map.
        self.map_sizes = {self.map_size, BLOCK + self.map_bytes}

    def make_files(self):
        """What has to be there before a server is."""

    @staticmethod
    def is_held(header, bits, block):
        return flags_of(header) & WHOLE or bits[block // 8] >> block % 8 & 1

    def is_header(self, page):
        """xnbd-bitmap(5)."""
        magic, version, kind, block, size = struct.unpack_from("<8sIIQQ", page)
        return ((magic, version, kind, block, size)
                == (b"xnbdbmap", 2, self.kind, BLOCK, self.size)
                and flags_of(page) in (0, WRITTEN, WHOLE, WHOLE | WRITTEN)
                and struct.unpack_from("<Q", page, CHECKED)[0] == fnv1a(page[:CHECKED]))

    def is_sound(self, state):
        """Whether the files are all there, as a server leaves them."""
        size, pages = state.get(self.bitmap, (0, {}))
        return (self.image in state and state[self.image][0] >= self.size
                and size in self.map_sizes and self.is_header(pages.get(0, ZEROS)))

    def interpret(self, state, origin):
        """What each block reads as."""
        pages = state[self.bitmap][1] if self.bitmap in state else {}
        header, bits = pages.get(0, ZEROS), pages.get(1, ZEROS)
        image = state[self.image][1] if self.image in state else {}
        return [image.get(b, ZEROS)[:len(origin[b])] if self.is_held(header, bits, b)
                else origin[b] for b in range(len(origin))]

    def write(self, state, directory):
        """The state as files: the machine has booted again, and the live map is junk."""
        directory.mkdir(exist_ok=True)
        for name, (size, pages) in state.items():
            with open(directory / name, "wb") as f:
                f.truncate(size)
                for number, page in pages.items():
                    if page.strip(b"\0"):
                        os.pwrite(f.fileno(), page[:max(0, size - number * BLOCK)], number * BLOCK)
                if name == self.bitmap:
                    self.reboot(f.fileno(), size, pages.get(0, ZEROS))

    def spoil(self, blocks):
        """Fills blocks of the image, which means nothing where no bit is set: so
        it may be after a power cut that lost what was not committed."""
        with open(self.directory / self.image, "r+b") as f:
            for b in blocks:
                junk = os.urandom(min(BLOCK, self.size - b * BLOCK))
                os.pwrite(f.fileno(), junk, b * BLOCK)

    def power_cut(self):
        """Does to the real files what a power cut certainly does."""
        with open(self.directory / self.bitmap, "r+b") as f:
            self.reboot(f.fileno(), os.fstat(f.fileno()).st_size, os.pread(f.fileno(), BLOCK, 0))

    def fail_storage(self):
        """The last server has said that stable storage had failed; its live map is worth
        as little."""
        with open(self.directory / self.bitmap, "r+b") as f:
            header = os.pread(f.fileno(), CHECKED, 0)
            flags = struct.pack("<I", flags_of(header) | FAILED)
            self.seal(f.fileno(), header[:60] + flags + header[64:])
            self.scribble(f.fileno(), BLOCK + 2 * self.map_bytes)

    def reboot(self, fd, size, header):
        if self.is_header(header):
            self.seal(fd, header[:40] + uuid.uuid4().bytes + header[56:CHECKED])
        self.scribble(fd, size)

    @staticmethod
    def seal(fd, checked):
        os.pwrite(fd, checked + struct.pack("<Q", fnv1a(checked)), 0)

    def scribble(self, fd, size):
        live = BLOCK + self.map_bytes
        os.pwrite(fd, os.urandom(max(0, size - live)), live)


class Cow(Mode):
    is_proxy, kind, image, bitmap = False, 1, "overlay", "overlay.map"

    def __init__(self, start, *disk):
        super().__init__(*disk)

    def arguments(self, directory, *options):
        return ["--cow-target", *ADDRESS, *options, "--cow-file", directory / self.image,
                self.base]


class Proxy(Mode):
    is_proxy, kind, image, bitmap = True, 2, "cache", "cache.map"

    def __init__(self, start, *disk):
        super().__init__(*disk)
        self.origin = start(args=["--target", "--readonly", "--unix",
                                  self.directory.with_suffix(".sock"), self.base])

    def arguments(self, directory, *options):
        return ["--proxy", *ADDRESS, *options, f"unix:{self.origin.unix}",
                directory / self.image, directory / self.bitmap, self.control(directory)]

    @staticmethod
    def control(directory):
        return directory.with_name(directory.name + ".ctl")


class Target(Mode):
    is_proxy, image, bitmap = False, "image", None
    cuts = SnapshotCuts

    def __init__(self, start, *disk):
        super().__init__(*disk)
        self.make_files()

    def make_files(self):
        make_sparse(self.directory / self.image, self.size, self.content)

    def arguments(self, directory, *options):
        return ["--target", *ADDRESS, *options, directory / self.image]

    @staticmethod
    def is_held(header, bits, block):
        return True

    def is_sound(self, state):
        return state[self.image][0] == self.size


def has_proxy():
    shown = subprocess.run([SERVER, "--help"], capture_output=True, text=True).stdout
    return "--proxy" in shown and "not in this version" not in shown


# A recorded server

def preloaded(library, directory, log):
    """An environment for a server: what it does to that directory is recorded."""
    return preload(library, POWERCUT_DIRECTORY=directory, POWERCUT_LOG=log)


@pytest.fixture(scope="session")
def recorder(tmp_path_factory):
    return build_library("powercut", tmp_path_factory)


class Rig:
    """A mode's server, recorded, and a client; from start to start.

    now     what each block is, as far as clients know
    hold    a path: when there is such a file, and until it is gone, a thread is held up
            that is about to write to a temporary file, or begins a sync (hold_what)
    trims   a TRIM clears blocks
    """

    hold_what = "WRITE"
    trims = True

    def __init__(self, mode, recorder, start):
        self.mode, self.recorder, self.start_server = mode, recorder, start
        self.log = Log(mode.directory.with_suffix(".log"))
        self.hold = mode.directory.with_suffix(".hold")
        self.states = itertools.count()
        self.begin()

    def begin(self, values=None):
        """The record begins with the files that are there: with what they hold."""
        assert self.mode.map_bytes == BLOCK, "one page of the map is looked at"
        promise = Promise(self.mode.content)
        if values:
            promise.settle(values)
        self.now = [values[-1] for values in promise.values]
        self.cuts = self.mode.cuts(self.mode, self.log, promise)
        self.cuts.served = values is not None

    def spoil(self, blocks):
        """Makes the files, and begins with an image that is full of junk."""
        with another(self.start_server, self.mode.arguments(self.mode.directory)):
            pass
        self.mode.spoil(blocks)
        self.begin(list(self.cuts.promise.origin))
        return self

    def environment(self):
        return {**preloaded(self.recorder, self.mode.directory, self.log.path),
                f"POWERCUT_HOLD_{self.hold_what}": str(self.hold)}

    def start(self, *options):
        self.cuts.starting = True
        self.server = self.start_server(
            args=self.mode.arguments(self.mode.directory, *options), env=self.environment())
        self.client = self.server.client()
        self.cuts.catch_up()
        if not self.log.place:
            skip("needs a server that is linked dynamically")
        return self

    def send(self, client, command, at=0, length=0, flags=0):
        op = Operation(command, at, length, flags)
        if op.command in CHANGES:
            for b in op.blocks():
                self.now[b] = op.apply(b, self.now[b])
        op.expected = self.content(at, length) if command == NBD_CMD_READ else None
        client.request(command, at, length, flags, op.data if command == NBD_CMD_WRITE else b"",
                       cookie=op.cookie)
        return op

    @staticmethod
    def collect(client, op):
        same(op, client.collect(op.cookie), op.expected)

    def do(self, *request):
        op = self.send(self.client, *request)
        self.collect(self.client, op)

    def content(self, at, length):
        first, last = at // BLOCK, -(-(at + length) // BLOCK)
        return b"".join(self.now[first:last])[at - first * BLOCK:at - first * BLOCK + length]

    def flush(self):
        self.do(NBD_CMD_FLUSH)

    def stop(self):
        """In order, by SIGTERM."""
        leave(self.server)
        self.cuts.ended()

    def kill(self):
        """By SIGKILL; nothing is in flight."""
        kill(self.server)
        self.cuts.killed()

    def is_committed(self):
        """Every change that was answered is safe."""
        self.cuts.catch_up()
        p = self.cuts.promise
        return all(value == p.values[b][-1] for b in p.loose for value, _ in self.cuts.states(b))

    def wait_for_commit(self):
        until(self.is_committed, what="a commit")
        self.cuts.promise.durable(self.cuts.promise.answered_by_now())

    def ask(self, command):
        return ask(self.mode.control(self.mode.directory), command)

    def cut_power(self, choice):
        """Kills the server; what it finds when it starts again is a chosen state."""
        kill(self.server)
        self.cuts.catch_up()
        self.log.drop_rest()
        state = self.cuts.directory.choose(choice)
        assert self.mode.is_sound(state)
        self.mode.write(state, self.mode.directory)
        self.begin(self.mode.interpret(state, self.cuts.promise.origin))

    def opens(self, state, legal):
        """A server that starts on that state shows only what is legal."""
        directory = self.mode.directory.with_name(
            f"{self.mode.directory.name}.{next(self.states)}")
        self.mode.write(state, directory)
        with another(self.start_server, self.mode.arguments(directory)) as s:
            shows(s, legal)
        for file in directory.iterdir():
            file.unlink()


def ask(path, command):
    """Says a line on a control socket; returns the lines before "ok", and raises
    ConnectionError if there was none."""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(DEADLINE)
        control.connect(str(path))
        control.sendall(command.encode() + b"\n")
        with control.makefile() as answer:
            told = list(answer_lines(answer))
    if not told or told.pop() != "ok\n":
        raise ConnectionError(f"no answer to {command}")
    return told


def answer_lines(answer):
    for line in answer:
        assert not line.startswith("error"), line
        yield line
        if line == "ok\n":
            break


def kill(server):
    """And no sanitizer has complained."""
    server.kill()
    assert not CRASH.search(server.log()), server.log()


@contextlib.contextmanager
def another(start, arguments):
    """A server that is killed in the end."""
    s = start(args=arguments)
    yield s
    kill(s)


def shows(server, legal):
    """Each block is one of those that are legal for it."""
    with server.client() as c:
        for first in range(0, len(legal), 1024):
            some = legal[first:first + 1024]
            data = c.pread(sum(len(values[0]) for values in some), first * BLOCK)
            for i, values in enumerate(some):
                got = data[i * BLOCK:(i + 1) * BLOCK]
                assert got in values, (f"block {first + i} is {mixture(got)}; legal: "
                                       + "; ".join(map(mixture, values)))


def one_of_all(index):
    """For choose(): the states by number; [0] is left when it was a number of one."""
    left = [index]

    def choice(values):
        left[0], i = divmod(left[0], len(values))
        return values[i]

    return choice, left


def all_states(directory, most=200):
    """Every combination of what a power cut may leave, or so many of them."""
    for index in range(most):
        choice, left = one_of_all(index)
        state = directory.choose(choice)
        if left[0]:
            break
        yield state


def identity(state):
    """Equal for equal states."""
    return frozenset((name, size, frozenset(p for p in pages.items() if p[1] != ZEROS))
                     for name, (size, pages) in state.items())


def make_rigs(kind, server, recorder, tmp_path):
    """make(size): a Rig on a disk of that size, in a directory of its own."""
    need_punch(tmp_path)
    if kind is Proxy and not has_proxy():
        pytest.skip("this version has no --proxy")
    number = itertools.count()

    def make(size):
        directory = tmp_path.resolve() / f"rig{next(number)}"
        return Rig(kind(server, directory, content_of(size)), recorder, server)

    return make


@pytest.fixture(params=[Cow, Proxy], ids=["cow", "proxy"])
def rig(request, server, recorder, tmp_path):
    return make_rigs(request.param, server, recorder, tmp_path)


@pytest.fixture
def proxy_rig(server, recorder, tmp_path):
    return make_rigs(Proxy, server, recorder, tmp_path)


# Sequences

# On a group of four blocks, of which the last is a neighbour that nobody touches.
ALPHABET = {
    "whole": (NBD_CMD_WRITE, BLOCK, BLOCK),
    "part": (NBD_CMD_WRITE, BLOCK + 100, 300),
    "across": (NBD_CMD_WRITE, BLOCK + 3000, 2096),
    "long": (NBD_CMD_WRITE, 0, 3 * BLOCK),
    "zero": (NBD_CMD_WRITE_ZEROES, BLOCK + 2048, 6144),
    "trim": (NBD_CMD_TRIM, BLOCK, 2 * BLOCK),
    "read": (NBD_CMD_READ, 0, 3 * BLOCK),
    "FUA": (NBD_CMD_WRITE, BLOCK + 2000, 500, NBD_CMD_FLAG_FUA),
    "flush": (NBD_CMD_FLUSH,),
}
GROUP = 4 * BLOCK
STRIDE = 16 * BLOCK             # from group to group: no read-ahead gets so far


def run(rig, name, group):
    command, *rest = ALPHABET[name]
    if rest:
        rest[0] += group * STRIDE
    rig.do(command, *rest)


def in_groups(rig, sequences):
    """Each on a group of its own, in any order, so that they are no sequential
    reading.  A sequence ends with a flush: the next one finds nothing that
    waits to be committed, as after a start."""
    groups = random.Random(1).sample(range(len(sequences)), len(sequences))
    for group, sequence in zip(groups, sequences):
        for name in sequence:
            if name == "kill":
                rig.kill()
                rig.start()
            else:
                run(rig, name, group)
        rig.flush()
        rig.cuts.catch_up()


def blocks_of_groups(count):
    return [(group * STRIDE + at) // BLOCK for group in range(count)
            for at in range(0, GROUP, BLOCK)]


def sequences_of(length):
    return list(itertools.product(ALPHABET, repeat=length))


@hazard("bitmap reaches the disk before the data; switch without fdatasync of the image")
def test_all_sequences_of_up_to_three_operations(rig):
    sequences = [s for length in (1, 2, 3) for s in sequences_of(length)]
    r = rig((len(sequences) - 1) * STRIDE + GROUP - BLOCK + 77)
    r.spoil(blocks_of_groups(len(sequences))).start()
    in_groups(r, sequences)
    r.stop()
    assert r.cuts.checked > 1000


def test_all_pairs_with_a_kill_between_them(rig):
    """The second server believes the live map, and so the first's data must be
    made durable by the second's commits."""
    sequences = [(a, "kill", b) for a, b in sequences_of(2)]
    r = rig(len(sequences) * STRIDE)
    r.spoil(blocks_of_groups(len(sequences))).start()
    in_groups(r, sequences)
    r.stop()


# Starts

def first_states(rig):
    """{identity: (state, what each block may read as)} of what a start can leave
    until a client is greeted."""
    found = {}

    def watch():
        if not rig.cuts.served:
            for state in all_states(rig.cuts.directory):
                found[identity(state)] = state, rig.cuts.legal()

    rig.cuts.watchers.append(watch)
    return found


def test_every_state_of_a_first_start_can_be_opened(rig):
    r = rig(40 * BLOCK + 77)
    found = first_states(r)
    r.start()
    assert len(found) > 2
    for state, legal in found.values():
        r.opens(state, legal)


def test_a_first_operation_is_as_safe_as_later_ones(rig):
    """Each on a server of its own, which it is the first to make do anything."""
    for name in ALPHABET:
        for last in ("flush", "stop"):
            r = rig(4 * BLOCK).start()
            run(r, name, 0)
            if last == "flush":
                r.flush()
                r.kill()
            else:
                r.stop()


@pytest.mark.parametrize("kind", [Cow, Proxy], ids=["cow", "proxy"])
def test_a_flush_commits_all_pages_of_a_large_map(server, tmp_path, kind):
    """One block for each page of the map: a page is 128 MiB of the disk."""
    if kind is Proxy and not has_proxy():
        pytest.skip("this version has no --proxy")
    pages, span = 150, 128 << 20
    m = kind(server, tmp_path / "disk", b"", pages * span)
    s = server(args=m.arguments(m.directory))
    with s.client() as c:
        for page in range(pages):
            c.pwrite(pattern(page * span, BLOCK), page * span)
        c.flush()
    kill(s)
    m.power_cut()
    with another(server, m.arguments(m.directory)) as s, s.client() as c:
        for page in range(pages):
            assert c.pread(BLOCK, page * span) == pattern(page * span, BLOCK), f"page {page}"


# Random operations

class Clients:
    """Several connections whose requests in flight touch different blocks."""

    KINDS = {NBD_CMD_WRITE: 10, NBD_CMD_WRITE_ZEROES: 2, NBD_CMD_TRIM: 2, NBD_CMD_READ: 4,
             NBD_CMD_FLUSH: 3}

    def __init__(self, rig, rng, count=3):
        self.rig, self.rng = rig, rng
        self.kinds = {kind: n for kind, n in self.KINDS.items()
                      if kind != NBD_CMD_TRIM or rig.trims}
        self.first = 0              # they leave alone what is before it
        self.clients = [rig.server.client() for _ in range(count)]

    def range(self):
        """Whole blocks, or a part of one, or of several."""
        size, kind = self.rig.mode.size, self.rng.random()
        start = self.rng.randrange(self.first, size)
        length = self.rng.choice([100, 2000, BLOCK, 2 * BLOCK, 5 * BLOCK])
        if kind < 0.6:
            start, length = start - start % BLOCK, max(BLOCK, length - length % BLOCK)
        return start, min(length, size - start)

    def request(self):
        command, = self.rng.choices(list(self.kinds), list(self.kinds.values()))
        if command == NBD_CMD_FLUSH:
            return command, 0, 0
        fua = command in CHANGES and self.rng.random() < 0.1
        return command, *self.range(), NBD_CMD_FLAG_FUA if fua else 0

    def send(self, count):
        """Up to so many at once; returns what is in flight."""
        busy, in_flight = set(), []
        for command, at, length, *flags in [self.request() for _ in range(count)]:
            blocks = set(range(at // BLOCK, -(-(at + length) // BLOCK)))
            if busy & blocks:
                continue
            busy |= blocks
            client = self.rng.choice(self.clients)
            in_flight.append((client, self.rig.send(client, command, at, length, *flags)))
        return in_flight

    def collect(self, in_flight):
        for client, op in in_flight:
            self.rig.collect(client, op)

    def turns(self, count):
        for _ in range(count):
            self.collect(self.send(self.rng.randrange(1, 7)))


def random_choice(rng):
    """For choose(): nothing that was not synced, all, or some."""
    share = rng.choice([0, 0.1, 0.5, 0.9, 1])
    return lambda values: values[0] if rng.random() >= share else rng.choice(values[1:] or values)


class Sample:
    """Some of the states of a record, each as likely as any other."""

    def __init__(self, rig, rng, size):
        self.rig, self.rng, self.size = rig, rng, size
        self.seen, self.chosen = 0, []
        rig.cuts.watchers.append(self.watch)

    def watch(self):
        if not self.rig.cuts.served:
            return
        self.seen += 1
        if len(self.chosen) < self.size:
            self.chosen.append(self.state())
        elif self.rng.random() < self.size / self.seen:
            self.chosen[self.rng.randrange(self.size)] = self.state()

    def state(self):
        return self.rig.cuts.directory.choose(random_choice(self.rng)), self.rig.cuts.legal()

    def check(self):
        for state, legal in self.chosen:
            self.rig.opens(state, legal)


class Switched(Sample):
    """Some of those behind the `ok` to a switch: the image alone is right."""

    def watch(self):
        if self.rig.cuts.switched:
            super().watch()

    def check(self):
        assert self.chosen
        for state, legal in self.chosen:
            serves_alone(self.rig, state, legal)


def end_a_life(r, rng):
    """In order, killed, or by a power cut; then it starts again."""
    how = rng.choice([r.stop, r.kill, r.cut_power, r.cut_power])
    how(random_choice(rng)) if how == r.cut_power else how()
    r.start()


@pytest.mark.limit(240 + 3 * int(SECONDS))
def test_random_operations_and_power_cuts(rig):
    seed, end = random_seed(), time.monotonic() + SECONDS
    print(f"XNBD_SEED={seed}")
    for disk in itertools.count():
        if time.monotonic() > end:
            break
        rng = random.Random(f"{seed}/{disk}")
        blocks = rng.choice([10, 64, 200])
        r = rig(blocks * BLOCK - rng.choice([0, 77]))
        r.spoil(rng.sample(range(blocks), rng.choice([0, blocks]))).start()
        for _ in range(6):
            sample = Sample(r, rng, 1)
            Clients(r, rng).turns(rng.randrange(60))
            r.cuts.catch_up()
            sample.check()
            end_a_life(r, rng)
        r.stop()


# What a proxy has besides

@pytest.fixture
def after_each(proxy_rig):
    """{name: Rig} with a server for each operation that changes the disk, which
    does no other: so that they wait together, and none hides what another forgot."""
    names = [name for name in ALPHABET if name not in ("flush", "read", "FUA")]
    rigs = {name: proxy_rig(len(ALPHABET) * STRIDE).start() for name in names}
    yield rigs
    for r in rigs.values():
        r.stop()


@hazard("what was not flushed is never committed")
def test_commit_without_a_flush(after_each):
    """Once a second, while something waits for it; and what comes then is safe, too."""
    seconds = random.Random(random_seed()).sample(list(ALPHABET), len(ALPHABET))
    for group, second in enumerate(seconds[:9 if SECONDS > 60 else 2]):
        for name, r in after_each.items():
            run(r, name, group)
        for r in after_each.values():
            r.wait_for_commit()
        for r in after_each.values():
            run(r, second, group)
            r.flush()


def test_commit_without_a_request_after_a_kill(after_each):
    for name, r in after_each.items():
        run(r, name, 0)
        r.kill()
        r.start()
    for r in after_each.values():
        r.wait_for_commit()


def load(r, rng, turns=30):
    """Clients that have done something."""
    clients = Clients(r, rng)
    clients.turns(turns)
    return clients


@hazard("bitmap reaches the disk before the data; switch without fdatasync of the image")
@pytest.mark.parametrize("how", ["quiet", "under load", "forced"])
def test_switch_leaves_an_image_that_is_complete_and_durable(proxy_rig, how):
    """From its `ok` on, the image alone must be right, whatever the power does;
    later writes to it are as safe as those to any disk.  At each point before
    and after, a proxy goes on with what there is."""
    for turn in range(4):
        rng = random.Random(f"{random_seed()}/{turn}")
        r = proxy_rig(64 * BLOCK - 77).spoil(range(64)).start()
        clients = load(r, rng)
        points, switched = Sample(r, rng, POINTS), Switched(r, rng, POINTS)
        if how == "forced":
            force_switch(r)
        else:
            r.ask("cache-all")
            clients.turns(5)
            switch(r, clients if how == "under load" else None)
        clients.turns(20)
        r.cuts.catch_up()
        points.check()
        switched.check()
        r.stop()
        assert (r.mode.directory / r.mode.image).read_bytes() == b"".join(r.now)


@hazard("switch without fdatasync of the image")
def test_what_is_written_during_a_switch_is_durable_after_it(proxy_rig):
    """All blocks were here, and committed; then the first sync of the switch is held
    up, and what is answered meanwhile has to wait for another one."""
    r = proxy_rig(40 * BLOCK)
    r.hold_what = "SYNC"
    r.start()
    r.ask("cache-all")
    until(lambda: all_is_committed(r.cuts), what="a commit")
    r.hold.touch()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(r.ask, "switch")
        until(lambda: r.cuts.catch_up() or r.cuts.held, what="a sync")
        for name in ("whole", "part", "zero", "trim"):
            run(r, name, 1)
        r.cuts.catch_up()
        answered = r.cuts.promise.answered_by_now()
        r.hold.unlink()
        asked.result()
    r.cuts.catch_up()
    r.cuts.check(r.cuts.promise.durable(answered), "the `ok`")
    r.stop()


def all_is_committed(cuts):
    cuts.catch_up()
    return all(why != "its bit is not set" for b in range(len(cuts.promise.values))
               for _, why in cuts.states(b))


def switch(r, clients=None):
    """With these clients at work meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(r.ask, "switch")
        while clients and not asked.done():
            clients.turns(1)
        asked.result()


def force_switch(r):
    """What is not here reads as zeros then.  Only a client can tell what that was."""
    p, before = r.cuts.promise, r.now
    r.cuts.catch_up()
    for b, block in enumerate(p.origin):
        if r.now[b] == block:
            p.add(b, block, p.add(b, bytes(len(block)), "switch force"))
    r.ask("switch force")
    with r.server.client() as c:
        r.now = [c.pread(len(block), b * BLOCK) for b, block in enumerate(p.origin)]
    for b, block in enumerate(r.now):
        assert block in (before[b], bytes(len(block))), f"block {b} is {mixture(block)}"
    r.cuts.catch_up()
    p.settle(r.now)
    r.cuts.check_all()


def serves_alone(r, state, legal):
    """A target on the image shows what is legal."""
    directory = r.mode.directory.with_suffix(".alone")
    r.mode.write(state, directory)
    with another(r.start_server, ["--target", *ADDRESS, directory / r.mode.image]) as s:
        shows(s, legal)


def test_clear_bitmap_forgets_for_good(proxy_rig):
    """While it starts, blocks may be as before or as at the origin; once a client
    is there, only the origin's."""
    for turn in range(3):
        rng = random.Random(f"{random_seed()}/{turn}")
        r = proxy_rig(30 * BLOCK - 77).start()
        load(r, rng)
        r.stop() if turn % 2 else r.kill()
        r.cuts.clearing()
        found = first_states(r)
        r.now = list(r.cuts.promise.origin)
        r.start("--clear-bitmap")
        for state, legal in rng.sample(list(found.values()), min(30, len(found))):
            r.opens(state, legal)
        load(r, rng)
        r.stop()


# Snapshots

CHUNK = 512 * 1024              # the thread that copies holds no more at a time


@pytest.fixture(params=["copied", "cloned"])
def target(request, server, recorder, tmp_path):
    """A Rig of a target, on a file system that can share blocks or cannot."""
    place = tmp_path.resolve()
    if request.param == "cloned":
        if is_portable():
            pytest.skip("this build clones nothing (XNBD_PORTABLE)")
        place = request.getfixturevalue("file_system")("xfs", 320 << 20)
    else:
        need_copies(place)
    return target_rig(server, recorder, place, request.param == "cloned")


def target_rig(server, recorder, place, is_cloned=False):
    """Without holes, so that chunks are as long as can be."""
    content = pattern(0, 4 * CHUNK + 3 * BLOCK + 77)
    r = Rig(Target(server, place / "rig", content), recorder, server)
    r.is_cloned = is_cloned
    r.trims = not is_portable()     # such a build punches no holes
    return r


def begin_snapshot(r):
    """With nothing in flight.  Where it is copied, the copy is held up: by one chunk."""
    snapshots = Snapshots(r.server)
    r.do(NBD_CMD_WRITE, 0, BLOCK)   # a chunk begins where the first data is: not behind a hole
    r.hold.touch()
    r.cuts.catch_up()
    r.cuts.instant, r.cuts.held = list(r.now), False
    started = snapshots.count("started")
    snapshots.signal()
    until(lambda: snapshots.count("started") > started)
    until(lambda: r.cuts.catch_up() or r.cuts.held or snapshots.over())
    assert r.cuts.held != r.is_cloned, "the thread that copies was not held up"
    return snapshots


def change_during_snapshot(r, clients, turns=10):
    """While the copy has done nothing yet, and while it goes on."""
    clients.first = CHUNK           # what is before it may be held
    clients.turns(turns)
    clients.first = 0
    r.hold.unlink()
    clients.turns(turns)


@hazard("a snapshot appears before it is complete: a power cut")
@pytest.mark.limit(240 + 2 * int(SECONDS))
def test_snapshot_has_a_name_only_when_it_is_complete_and_durable(target):
    """As it was at the signal, whatever clients do meanwhile; and a power cut
    costs the image nothing but what was not flushed."""
    seed, r, end = random_seed(), target, time.monotonic() + SECONDS / 2
    print(f"XNBD_SEED={seed}")
    for turn in itertools.count():
        rng = random.Random(f"{seed}/{turn}")
        r.start()
        clients = load(r, rng, 10)
        snapshots = begin_snapshot(r)
        change_during_snapshot(r, clients)
        until(snapshots.over)
        r.cuts.catch_up()
        name = Path(snapshots.lines("complete")[0][0]).name
        assert None not in r.cuts.directory.candidates(name), "a power cut removes it again"
        assert (r.mode.directory / name).read_bytes() == b"".join(r.cuts.instant)
        clients.turns(10)
        if turn > 1 and time.monotonic() > end:
            break
        r.cut_power(random_choice(rng)) if turn % 2 else r.kill()
    r.stop()


def end_held_up(r, how, rng):
    """The copy has not gone on before the server knows that it has to stop."""
    if how == "stop":
        for client in r.server.clients:
            client.close()
        r.server.terminate()
        until(lambda: "stopping" in r.server.log())
        r.hold.unlink()
        r.stop()
    else:
        r.kill() if how == "kill" else r.cut_power(random_choice(rng))
        r.hold.unlink()


@hazard("a snapshot appears before it is complete: the end in the middle")
@pytest.mark.parametrize("how", ["stop", "kill", "cut_power"])
def test_end_in_the_middle_of_a_copy_leaves_no_snapshot(server, recorder, tmp_path, how):
    """Neither whole nor by half."""
    need_copies(tmp_path)
    r, rng = target_rig(server, recorder, tmp_path.resolve()), random.Random(random_seed())
    clients = load(r.start(), rng, 5)
    begin_snapshot(r)
    clients.first = CHUNK
    clients.turns(5)
    end_held_up(r, how, rng)
    assert not [p for p in r.mode.directory.iterdir() if ".snapshot." in p.name]
    r.start()
    r.do(NBD_CMD_READ, 0, CHUNK)
    r.stop()
