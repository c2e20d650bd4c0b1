"""Random operations on many connections at once, checked against a model disk.

    exercise(connect, Model(size, content, trim), seed, seconds)

sends them and checks every reply; Model.check_image() then compares the image.
Neither knows what serves the disk.  A failure tells the seed; the same
operations come again with XNBD_SEED=<seed>, though not in the same order of
replies, and for longer with XNBD_MODEL_SECONDS=<seconds for each disk>.

What may be read while writes are in flight?  A byte has the value of a write
that was sent before the read was answered, unless another write to that byte
was sent after the first one's reply and answered before the read was sent.
So the model keeps, for each run of bytes, all writes whose value may be there.
Where none was in flight during a read, what it found is the value from then
on, and later reads must find the same.
"""

import bisect
import os
import random
import select
import time

import pytest

from nbd import *

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CONNECTIONS = 8
IN_FLIGHT = 64                  # requests, on each connection
SECONDS = float(os.environ.get("XNBD_MODEL_SECONDS") or 3)
LEAST = 200                     # operations, even if they take longer
ALLOCATION = "base:allocation"

# What a TRIM does: each byte keeps its value or becomes zero; or all are zero.
TRIM_IS_A_HINT, TRIM_ZEROES = "hint", "zeroes"

NOISE = random.Random(0).randbytes(4 * MIB)     # parts of it are what is written
LONGEST = 300000                                # bytes of a READ or WRITE
LONGEST_ZEROING = 256 * MIB


# The model

class Write:
    """Bytes that a range of the disk has, may have, or may get.

    sent, done  the model's time of the request and of its reply; done is
                None while there is no reply
    sure        False if its range may keep any older value (TRIM as a hint)
    """

    def __init__(self, start, end, data=None, origin=0, sent=0, done=None, sure=True):
        self.start, self.end = start, end
        self.data, self.origin = data, origin       # None is zeros; its place on the disk
        self.sent, self.done, self.sure = sent, done, sure

    def __repr__(self):
        kind = "zeros" if self.data is None else "data"
        return (f"{kind} {self.start}+{self.end - self.start}"
                f" sent {self.sent} done {self.done}{'' if self.sure else ' (hint)'}")

    def bytes(self, start, end):
        if self.data is None:
            return bytes(end - start)
        return self.data[start - self.origin:end - self.origin]

    def is_zero(self, start, end):
        return self.data is None or not self.bytes(start, end).strip(b"\0")


class Read:
    """What a read in flight may find."""

    def __init__(self, start, end, runs, sent):
        self.start, self.end = start, end
        self.runs = runs            # [(start, end, writes)] as it was sent
        self.sent = sent
        self.later = []             # writes of the range that were sent since

    def __repr__(self):
        return f"read {self.start}+{self.end - self.start} sent {self.sent}"

    def pieces(self, start, end):
        """[(start, end, writes)] for a part of it, with the later writes."""
        cuts = {p for w in self.later for p in (w.start, w.end) if start < p < end}
        first = bisect.bisect_right(self.runs, start, key=lambda run: run[0]) - 1
        for a, b, writes in self.runs[max(first, 0):]:
            if a >= end:
                break
            a, b = max(a, start), min(b, end)
            edges = [a, *sorted(p for p in cuts if a < p < b), b]
            for c, d in zip(edges, edges[1:]):
                late = [w for w in self.later if w.start <= c and d <= w.end]
                yield c, d, writes, late


class Model:
    """A disk, and everything that may be on it; content is its beginning.

    now         counts requests and replies
    starts      of the runs, sorted; the last one ends with the disk
    writes      for each run: a tuple of all whose value may be there
    """

    def __init__(self, size, content=b"", trim=TRIM_IS_A_HINT):
        self.size, self.trim = size, trim
        self.now = 0
        self.starts, self.writes = [0], [(Write(0, size, done=0),)]
        self.reads = set()
        if content:
            self.end_write(self._write(0, len(content), content, 0))

    # Runs

    def _cut(self, place):
        """The index of the run that starts there, which it makes if need be."""
        if place >= self.size:
            return len(self.starts)
        i = bisect.bisect_left(self.starts, place)
        if i == len(self.starts) or self.starts[i] != place:
            self.starts.insert(i, place)
            self.writes.insert(i, self.writes[i - 1])
        return i

    def _change(self, start, end, change):
        """Replaces the writes of every run in a range; equal neighbours merge."""
        first, last = self._cut(start), self._cut(end)
        starts, writes = [], []
        for i in range(first, last):
            new = change(self.writes[i])
            if not writes or writes[-1] != new:
                starts.append(self.starts[i])
                writes.append(new)
        self.starts[first:last], self.writes[first:last] = starts, writes

    def runs(self, start, end):
        """[(start, end, writes)] of a range."""
        i = bisect.bisect_right(self.starts, start) - 1
        runs = []
        while i < len(self.starts) and self.starts[i] < end:
            after = self.starts[i + 1] if i + 1 < len(self.starts) else self.size
            runs.append((self.starts[i], after, self.writes[i]))
            i += 1
        return runs

    # Writes

    def _write(self, start, length, data=None, origin=0, sure=True):
        self.now += 1
        w = Write(start, start + length, data, origin, self.now, None, sure)
        if length:
            self._change(w.start, w.end, lambda writes: (*writes, w))
        for read in self.reads:
            if w.start < read.end and read.start < w.end:
                read.later.append(w)
        return w

    def begin_write(self, start, length, phase):
        """A WRITE of NOISE[phase:] is sent."""
        return self._write(start, length, NOISE, start - phase)

    def begin_zero(self, start, length):
        return self._write(start, length)

    def begin_trim(self, start, length):
        return self._write(start, length, sure=self.trim == TRIM_ZEROES)

    def end_write(self, w):
        """It was answered: what was done before it was sent, is overwritten."""
        self.now += 1
        w.done = self.now

        def outlives(v):
            return v is w or v.done is None or v.done >= w.sent or not (
                w.sure or (v.data is None and not v.sure))

        if w.end > w.start:
            self._change(w.start, w.end, lambda writes: tuple(filter(outlives, writes)))

    def forget(self, w):
        """It was refused, and changed nothing."""
        if w.end > w.start:
            self._change(w.start, w.end, lambda writes: tuple(v for v in writes if v is not w))

    # Reads

    def begin_read(self, start, length):
        self.now += 1
        read = Read(start, start + length, self.runs(start, start + length), self.now)
        self.reads.add(read)
        return read

    def end_read(self, read, data=None):
        """It was answered.  data, if any, is checked and remembered."""
        self.now += 1
        self.reads.discard(read)
        if data is not None:
            self.check(read, read.start, data)

    def check(self, read, place, data):
        """A part of what it found.  A length instead of data: so many zeros."""
        zeros = data if isinstance(data, int) else None
        length = len(data) if zeros is None else zeros
        for a, b, writes, late in read.pieces(place, place + length):
            legal = [*writes, *late]
            if zeros is None:
                got = data[a - place:b - place]
                found = next((w for w in legal if w.bytes(a, b) == got), None)
            else:
                found = next((w for w in legal if w.is_zero(a, b)), None)
            if not found:
                got = data[a - place:b - place] if zeros is None else bytes(b - a)
                found = self._mixed(read, a, got, legal)
            if not late and len(writes) > 1:
                self._settle(read, a, b, writes, found)

    def _mixed(self, read, place, got, legal):
        """Writes at the same time may mix, byte by byte."""
        values = [w.bytes(place, place + len(got)) for w in legal]
        for i, byte in enumerate(got):
            if not any(v[i] == byte for v in values):
                raise AssertionError(f"{read} found at {place + i}: {got[i:i + 16].hex()}; legal: "
                                     + "; ".join(f"{v[i:i + 16].hex()} of {w}"
                                                 for v, w in zip(values, legal)))
        return Write(place, place + len(got), got, place, read.sent, self.now)

    def _settle(self, read, start, end, writes, found):
        """Nothing was in flight: found is the value from now on."""
        if all(w.done and w.done < read.sent for w in writes):
            self._change(start, end, lambda now: (found,) if now is writes else now)

    def check_image(self, path):
        """Compares the image, which nobody uses any more."""
        assert path.stat().st_size == self.size
        read = self.begin_read(0, self.size)
        with open(path, "rb") as f:
            for start, end, hole in extents(f.fileno(), self.size):
                if hole:
                    self.check(read, start, end - start)
                for a in range(start, end if not hole else start, MIB):
                    self.check(read, a, os.pread(f.fileno(), min(MIB, end - a), a))
        self.end_read(read)


def extents(fd, size):
    """(start, end, is a hole) of a file."""
    place = 0
    while place < size:
        try:
            data = os.lseek(fd, place, os.SEEK_DATA)
        except OSError:             # none behind it
            data = size
        if data > place:
            yield place, data, True
        place = data
        if place < size:
            place = os.lseek(fd, data, os.SEEK_HOLE)
            yield data, place, False


# Where operations go

class Zone:
    """A part of the disk for the operations of one connection, or of all.
    Where it is `private`, those in flight at a time do not overlap."""

    def __init__(self, start, end, private):
        self.start, self.end, self.private = start, end, private

    def range(self, rng):
        """A random (start, length) in it."""
        length = min(random_length(rng), self.end - self.start)
        start = rng.randrange(self.start, self.end - length + 1)
        if rng.random() < 0.4:
            start = max(self.start, start & ~4095)
        return start, min(length, self.end - start)


class Strips:
    """In each of some blocks of 4 KiB, one connection's part."""

    private = True

    def __init__(self, base, blocks, first, last, size):
        pieces = [(base + 4096 * b + first, base + 4096 * b + last) for b in range(blocks)]
        self.pieces = [(a, min(b, size)) for a, b in pieces if a < size]

    def range(self, rng):
        start, end = rng.choice(self.pieces)
        return start, rng.randrange(1, end - start + 1)


class Crowd:
    """A small part that all connections write at the same time, cut at odd
    places so that their writes often end at the same one."""

    private = False

    def __init__(self, start, end):
        rng = random.Random(start)
        self.cuts = sorted({start, end, *(rng.randrange(start, end + 1) for _ in range(40))})

    def range(self, rng):
        i = rng.randrange(len(self.cuts) - 1)
        j = min(len(self.cuts) - 1, i + rng.randrange(1, 4))
        return self.cuts[i], self.cuts[j] - self.cuts[i]


def random_length(rng):
    kind = rng.random()
    if kind < 0.45:
        return rng.choice([1, 2, 511, 512, 513, 4095, 4096, 4097, 8192])
    return rng.randrange(1, 6000 if kind < 0.85 else 70000 if kind < 0.97 else LONGEST)


def home(size, i):
    """The part of connection i: an eighth, or one around an offset that matters."""
    if size <= 64 * MIB:
        edges = [size * n // CONNECTIONS + n * 37 % 11 for n in range(CONNECTIONS)] + [size]
        return min(edges[i], size), min(edges[i + 1], size)
    places = [0, 2 * GIB, 4 * GIB, size // 3, size // 2, size // 4 * 3, 4 * TIB, size]
    start = max(0, min(places[i] - 2 * MIB - 77, size - 4 * MIB))
    return start, start + 4 * MIB


def zones(size, i):
    """[(zone, weight)] for connection i.  There are none on an empty disk."""
    middle = 4 * GIB if size > 4 * GIB else size // 2
    crowd = max(0, middle - 32 * KIB), min(size, middle + 32 * KIB)
    start, end = home(size, i)
    blocks = min(16, size // 4096 + 1)
    strips = Strips((size // 4096 + 1 - blocks) * 4096, blocks, i * 4096 // CONNECTIONS + i,
                    (i + 1) * 4096 // CONNECTIONS + (i + 1) % CONNECTIONS, size)
    found = [(Zone(0, size, False), 0.05)] if size else []
    found += [(Zone(start, end, True), 0.65)] if end > start else []
    found += [(strips, 0.15)] if strips.pieces else []
    found += [(Crowd(*crowd), 0.15)] if crowd[1] > crowd[0] else []
    return found


# Operations

class Operation:
    """A request: what it is to the model, and what its reply must be."""

    def __init__(self, command, start, length, flags=0, error=0, private=False):
        self.command, self.flags = command, flags
        self.start, self.length = start, length
        self.error, self.private = error, private
        self.phase = None
        self.handle = None

    def __repr__(self):
        return f"{COMMANDS[self.command]} {self.start}+{self.length} flags {self.flags:#x}"

    def disturbs(self, other):
        """Whether what one of them finds depends on when the other is done."""
        reads = (NBD_CMD_READ, NBD_CMD_CACHE, NBD_CMD_BLOCK_STATUS)
        return (self.start < other.start + other.length
                and other.start < self.start + self.length
                and not (self.command in reads and other.command in reads))

    def payload(self):
        return NOISE[self.phase:self.phase + self.length] if self.command == NBD_CMD_WRITE else b""

    def begin(self, model):
        if self.error or self.command in (NBD_CMD_FLUSH, NBD_CMD_CACHE):
            return
        if self.command == NBD_CMD_WRITE:
            self.handle = model.begin_write(self.start, self.length, self.phase)
        else:
            begin = {NBD_CMD_READ: model.begin_read, NBD_CMD_BLOCK_STATUS: model.begin_read,
                     NBD_CMD_WRITE_ZEROES: model.begin_zero, NBD_CMD_TRIM: model.begin_trim}
            self.handle = begin[self.command](self.start, self.length)

    def end(self, model, reply):
        if reply.error == NBD_ENOTSUP and self.flags & NBD_CMD_FLAG_FAST_ZERO and not self.error:
            model.forget(self.handle)
            return
        assert reply.error == self.error, f"{self}: {reply}"
        if self.command == NBD_CMD_READ and self.handle:
            model.end_read(self.handle, reply.data)
        elif self.command == NBD_CMD_BLOCK_STATUS and self.handle:
            self._end_block_status(model, reply)
        elif self.handle:
            model.end_write(self.handle)

    def _end_block_status(self, model, reply):
        (runs,) = reply.extents.values()
        place, end = self.start, self.start + self.length
        for length, status in runs:
            length = min(length, end - place)
            if status & NBD_STATE_ZERO:
                model.check(self.handle, place, length)
            place += length
        model.end_read(self.handle)


FLAGS = {
    NBD_CMD_READ: [NBD_CMD_FLAG_FUA],
    NBD_CMD_WRITE: [NBD_CMD_FLAG_FUA],
    NBD_CMD_FLUSH: [],
    NBD_CMD_TRIM: [NBD_CMD_FLAG_FUA],
    NBD_CMD_CACHE: [NBD_CMD_FLAG_FUA],
    NBD_CMD_WRITE_ZEROES: [NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_NO_HOLE,
                           NBD_CMD_FLAG_FAST_ZERO, NBD_CMD_FLAG_FAST_ZERO],
    NBD_CMD_BLOCK_STATUS: [NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLAG_FUA],
}
WEIGHTS = {NBD_CMD_READ: 40, NBD_CMD_WRITE: 30, NBD_CMD_WRITE_ZEROES: 9, NBD_CMD_TRIM: 7,
           NBD_CMD_CACHE: 4, NBD_CMD_BLOCK_STATUS: 7, NBD_CMD_FLUSH: 1}
PAST_THE_END = {NBD_CMD_READ: NBD_EINVAL, NBD_CMD_TRIM: NBD_EINVAL, NBD_CMD_CACHE: NBD_EINVAL,
                NBD_CMD_BLOCK_STATUS: NBD_EINVAL, NBD_CMD_WRITE: NBD_ENOSPC,
                NBD_CMD_WRITE_ZEROES: NBD_ENOSPC}


class Generator:
    """The operations of one connection: they depend on the seed alone."""

    def __init__(self, size, number, structured, seed, extended=False):
        self.size, self.structured = size, structured
        self.longest_zeroing = 5 * GIB if extended else LONGEST_ZEROING
        self.rng = random.Random(f"{seed}/{number}")
        self.zones = zones(size, number)
        self.commands = {c: w for c, w in WEIGHTS.items()
                         if structured or c != NBD_CMD_BLOCK_STATUS}

    def _flags(self, command):
        flags = FLAGS[command] + ([NBD_CMD_FLAG_DF] * 3
                                  if command == NBD_CMD_READ and self.structured else [])
        chosen = 0
        for flag in flags:
            # FUA waits for the disk: it is rare, or there would be little else.
            if self.rng.random() < (0.02 if flag == NBD_CMD_FLAG_FUA else 0.2):
                chosen |= flag
        return chosen

    def _past_the_end(self, command, flags):
        """An error: it begins inside the disk, at its end or far behind it."""
        start = self.rng.choice([max(0, self.size - self.rng.randrange(10)), self.size,
                                 self.size + self.rng.randrange(1, 1 << 40), U64 - 5000])
        length = max(0, self.size - start) + self.rng.choice([1, 512, 4096])
        return Operation(command, start, length, flags, PAST_THE_END[command])

    def _zeroing(self, flags):
        """As long as is possible, which must not take long."""
        start = self.rng.randrange(self.size)
        return Operation(NBD_CMD_WRITE_ZEROES, start, min(self.longest_zeroing, self.size - start),
                         flags | NBD_CMD_FLAG_FAST_ZERO)

    def _choose(self):
        command, = self.rng.choices(list(self.commands), list(self.commands.values()))
        flags, kind = self._flags(command), self.rng.random()
        if command == NBD_CMD_FLUSH:
            return Operation(command, 0, 0, flags)
        if not self.zones or kind < 0.02:
            return self._past_the_end(command, flags)
        if kind < 0.03 and command != NBD_CMD_BLOCK_STATUS:
            return Operation(command, self.rng.randrange(self.size), 0, flags)
        if kind < 0.035 and command == NBD_CMD_WRITE_ZEROES:
            return self._zeroing(flags)
        zone, = self.rng.choices(*zip(*self.zones))
        return Operation(command, *zone.range(self.rng), flags, private=zone.private)

    def next(self):
        op = self._choose()
        op.phase = self.rng.randrange(len(NOISE) - LONGEST)
        return op


# Connections

class Session:
    """A connection with as many requests in flight as may be."""

    def __init__(self, client, model, generator, in_flight):
        self.client, self.model = client, model
        self.generator, self.most = generator, in_flight
        self.in_flight = {}         # cookie: Operation
        self.out = bytearray()
        self.held = None            # an Operation that waits for another
        self.count = 0

    def __str__(self):
        return f"{len(self.in_flight)} in flight: {list(self.in_flight.values())[:3]}"

    def fill(self):
        while len(self.in_flight) < self.most:
            op = self.held or self.generator.next()
            self.held = op
            if op.private and any(op.disturbs(o) for o in self.in_flight.values() if o.private):
                return
            self.held = None
            self.send(op)

    def send(self, op):
        self.count += 1
        cookie = self.count
        op.begin(self.model)
        self.in_flight[cookie] = op
        self.client.expect(cookie, Request(op.command, op.start, op.length, op.flags))
        self.out += self.client.header(op.command, op.start, op.length, op.flags, cookie)
        self.out += op.payload()

    def flush(self):
        """Sends what the socket, which is writable, takes."""
        sent = self.client.sock.send(memoryview(self.out)[:256 * KIB])
        del self.out[:sent]

    def receive(self):
        """Takes one reply, which has begun to arrive."""
        reply = self.client.collect()
        self.in_flight.pop(reply.cookie).end(self.model, reply)

    def events(self):
        return (select.POLLIN if self.in_flight else 0) | (select.POLLOUT if self.out else 0)


def turn(sessions):
    """Waits for something to do on any connection, and does it."""
    poller = select.poll()
    by_fd = {s.client.sock.fileno(): s for s in sessions if s.events()}
    for fd, s in by_fd.items():
        poller.register(fd, s.events())
    ready = poller.poll(1000 * DEADLINE)
    assert ready, "nothing happens: " + "; ".join(str(s) for s in sessions)
    for fd, events in ready:
        if events & ~select.POLLOUT:
            by_fd[fd].receive()
        if events & select.POLLOUT:
            by_fd[fd].flush()


def written_parts(model):
    """[(start, end)] of up to 1 MiB, without what is zeros for long."""
    parts = []
    for start, end, _ in model.runs(0, model.size):
        if end - start > 2 * MIB:
            end = start + MIB
        while start < end:
            last = parts[-1] if parts and parts[-1][1] == start else None
            if last and start - last[0] < MIB:
                start = parts[-1][1] = min(end, last[0] + MIB)
            else:
                parts.append([start, start])
    return parts


def read_all(session, model):
    """With nothing in flight."""
    for start, end in written_parts(model):
        read = model.begin_read(start, end - start)
        model.end_read(read, session.client.pread(end - start, start))


def dialect(i):
    """What connection i negotiates: one in two has structured replies, of these one in two
    extended headers as well."""
    return {"structured": EXTENDED if i % 4 == 3 else i % 2, "contexts": [ALLOCATION] * (i % 2)}


def exercise(connect, model, seed, seconds, connections=CONNECTIONS, in_flight=IN_FLIGHT):
    """Does random operations for that time and checks every reply.

    connect(i)  makes connection i, a nbd.Client in the transmission phase;
                with base:allocation if replies are structured
    Returns how many operations were done: LEAST, however slow the machine is.
    """
    print(f"XNBD_SEED={seed}")
    clients = [connect(i) for i in range(connections)]
    assert all(c.size == model.size for c in clients)
    sessions = [Session(c, model, Generator(model.size, i, c.structured, seed, c.extended),
                        in_flight)
                for i, c in enumerate(clients)]
    end = time.monotonic() + seconds

    def count():
        return sum(s.count for s in sessions)

    try:
        while (more := time.monotonic() < end or count() < LEAST) or any(
                s.in_flight for s in sessions):
            for s in sessions if more else []:
                s.fill()
            turn(sessions)
        for s in sessions[:2]:
            read_all(s, model)
    except AssertionError as e:
        raise AssertionError(f"XNBD_SEED={seed}: {e}") from e
    return count()


def random_seed():
    return int(os.environ.get("XNBD_SEED") or random.SystemRandom().randrange(1 << 32))


# The tests

DISKS = {"ragged": 24 * MIB + 77, "small": 5001, "over 4 GiB": 4 * GIB + 3 * MIB + 511,
         "over 4 TiB": 4 * TIB + 5 * MIB + 4095}


@pytest.mark.limit(120 + 2 * int(SECONDS))
@pytest.mark.parametrize("size", DISKS.values(), ids=DISKS.keys())
def test_random_operations_agree_with_a_model(server, disk, tmp_path, size):
    """Half of the connections are over TCP and half over a Unix socket; of each
    half there is each dialect."""
    content = pattern(0, min(size, 8 * MIB) // 2)
    image = disk(size, content)
    s = server(image, "--unix", tmp_path / "sock", "--laddr", "127.0.0.1", "--lport", "0")
    model = Model(size, content, TRIM_IS_A_HINT)

    def connect(i):
        return s.client(s.addresses[i // 4 % 2], **dialect(i))

    exercise(connect, model, random_seed(), SECONDS)
    s.stop()
    model.check_image(image)


@pytest.mark.parametrize("size", [0, 1, 512])
def test_random_operations_on_a_tiny_disk(server, disk, size):
    image = disk(size)
    s = server(image)
    model = Model(size)
    exercise(lambda i: s.client(**dialect(i)), model, random_seed(),
             min(SECONDS, 0.5))
    s.stop()
    model.check_image(image)


# Would the model notice?  Testers have looked at half of what they read, have
# ignored errors, and have asked the files of the server what is right.

def read_of(model, start, data):
    """A READ that finds that data."""
    model.end_read(model.begin_read(start, len(data)), data)


@pytest.mark.hazard("oracle that compares every second block")
def test_model_finds_one_wrong_bit_wherever_it_is():
    content = pattern(0, 5 * 4096 + 77)
    model = Model(len(content), content)
    read_of(model, 0, content)
    for at in [*range(0, len(content), 4096), *range(4095, len(content), 4096), len(content) - 1]:
        wrong = bytearray(content)
        wrong[at] ^= 1
        with pytest.raises(AssertionError, match=f"found at {at}:"):
            read_of(model, 0, bytes(wrong))
    read_of(model, 0, content)


@pytest.mark.hazard("oracle that ignores errors")
@pytest.mark.parametrize("command", FLAGS, ids=COMMANDS.get)
def test_model_finds_an_error_and_a_success_that_are_wrong(command):
    """For each command."""
    model = Model(4096)
    for error, other in (0, NBD_EIO), (0, NBD_ENOTSUP), (PAST_THE_END.get(command, NBD_EINVAL), 0):
        op = Operation(command, 0, 512, error=error)
        op.phase = 0
        op.begin(model)
        reply = Reply(1, Request(command, 0, 512, 0))
        reply.error = other
        with pytest.raises(AssertionError, match=COMMANDS[command]):
            op.end(model, reply)


@pytest.mark.hazard("oracle that compares with the server's own files")
def test_model_finds_what_image_and_replies_agree_on(disk):
    """A write that was acknowledged and lost: both have the old bytes."""
    old = pattern(0, 3 * 4096)
    model, image = Model(len(old), old), disk(content=old)
    model.check_image(image)
    model.end_write(model.begin_write(4096, 100, 0))
    with pytest.raises(AssertionError, match="found at 4096:"):
        read_of(model, 0, old)
    with pytest.raises(AssertionError, match="found at 4096:"):
        model.check_image(image)
    new = old[:4096] + NOISE[:100] + old[4196:]
    read_of(model, 0, new)
    image.write_bytes(new)
    model.check_image(image)
