"""A relay between two who speak NBD, that damages what passes at one exact byte.

    with Relay(server.address) as relay:
        relay.damages.append(Damage(UP, "cut", 100))       # for the next connection
        c = nbd.Client(relay.address)

UP is the way to the server, DOWN the way back.  `after` bytes of that way pass as they are; then

    "cut"       the receiver sees the end, the sender a closed connection
    "reset"     both see a reset
    "stall"     nothing more passes on that way until resume()
    "delay"     the same, for `size` milliseconds
    "flip"      the next byte comes changed: XOR `size`
    "lose"      the next byte does not come
    "double"    the last `size` bytes come once more

A Passage is one connection.  It records what it took from each side, and what it gave to the
other, so that a test can say what the bytes meant to who got them:

    Replay(bytes)           nbd.Client that reads recorded replies
    Story(bytes, size)      what a server must make of the bytes that it got
    Blocks(content)         a disk of which some blocks may be one thing or another
"""

import collections
import itertools
import selectors
import socket
import struct
import threading
import time

from nbd import *

UP, DOWN = "up", "down"
OTHER = {UP: DOWN, DOWN: UP}
HOWS = ("cut", "reset", "stall", "delay", "flip", "lose", "double")
BLOCK = 4096


class Damage:
    """What happens on one way of a connection; see above."""

    def __init__(self, way, how, after, size=1):
        assert way in OTHER and how in HOWS
        self.way, self.how, self.after, self.size = way, how, after, size

    def __repr__(self):
        return f"Damage({self.way!r}, {self.how!r}, {self.after}, {self.size})"

    @property
    def needs(self):
        """How many bytes of that way there must be for it to happen."""
        return self.after + (self.how in ("flip", "lose"))

    def spoil(self, head, rest):
        """What comes instead of `rest` behind `head`."""
        if self.how == "flip":
            return bytes([rest[0] ^ self.size]) + rest[1:]
        if self.how == "lose":
            return rest[1:]
        return head[len(head) - self.size:] + rest


class Passage:
    """One connection through a relay.  All but waiting and reading is its thread's.

    .taken[way]     bytes that came
    .given[way]     bytes that were passed on
    .struck         Event: the damage has happened
    .over           Event: both sides have ended, or the relay has
    """

    def __init__(self, relay, client, server, damage):
        self.relay, self.damage = relay, damage
        self.sink = {UP: server, DOWN: client}
        self.taken = {UP: bytearray(), DOWN: bytearray()}
        self.given = {UP: bytearray(), DOWN: bytearray()}
        self.ended = {UP: False, DOWN: False}       # what came from there
        self.deaf = {UP: False, DOWN: False}        # takes nothing more of that way
        self.kept = b""
        self.struck, self.over = threading.Event(), threading.Event()

    def __repr__(self):
        return f"{self.damage} {len(self.taken[UP])} up, {len(self.taken[DOWN])} down"

    def source(self, way):
        return self.sink[OTHER[way]]

    def begin(self):
        for way in OTHER:
            self._listen(way)
        if self.damage:
            self._take(self.damage.way, b"")

    def _listen(self, way):
        self.relay.selector.register(self.source(way), selectors.EVENT_READ, (self, way))

    def _unlisten(self, way):
        try:
            self.relay.selector.unregister(self.source(way))
        except (KeyError, ValueError):
            pass

    def ready(self, way):
        """There is something to take, or an end."""
        if self.over.is_set():
            return
        try:
            data = self.source(way).recv(65536)
        except OSError:
            data = b""
        if data:
            self._take(way, data)
        else:
            self._end(way)

    def _end(self, way):
        """That side has closed, or reset; the other one is told so."""
        self._unlisten(way)
        self.ended[way] = True
        try:
            self.sink[way].shutdown(socket.SHUT_WR)
        except OSError:
            pass
        if self.ended[OTHER[way]]:
            self.close()

    def _take(self, way, data):
        d, before = self.damage, bytes(self.taken[way])
        self.taken[way] += data
        if not d or d.way != way or self.struck.is_set():
            self._give(way, data)
        elif len(self.taken[way]) < d.needs:
            self._give(way, data)
        else:
            head = data[:d.after - len(before)]
            self._give(way, head)
            self._strike(way, (before + head), data[len(head):])

    def _give(self, way, data):
        if self.over.is_set() or self.deaf[way] or not data:
            return
        self.given[way] += data
        try:
            self.sink[way].sendall(data)
        except OSError:
            self.deaf[way] = True       # its end is found by receiving

    def _strike(self, way, head, rest):
        d = self.damage
        self.struck.set()
        if d.how == "cut":
            self._cut(way)
        elif d.how == "reset":
            self.close(reset=True)
        elif d.how in ("stall", "delay"):
            self.kept = rest
            self._unlisten(way)
            if d.how == "delay":
                self.relay.later(d.size / 1000, lambda: self._go_on(way))
        else:
            self._give(way, d.spoil(head, rest))

    def _cut(self, way):
        """Who receives sees the end, and what it says is only recorded."""
        self._unlisten(way)
        self.ended[way] = self.deaf[OTHER[way]] = True
        try:
            self.sink[way].shutdown(socket.SHUT_WR)
        except OSError:
            pass
        self.source(way).close()
        if self.ended[OTHER[way]]:
            self.close()

    def _go_on(self, way):
        if not self.over.is_set():
            kept, self.kept = self.kept, b""
            self._give(way, kept)
            self._listen(way)

    def resume(self):
        """Ends a stall; for any thread."""
        self.relay.call(lambda: self._go_on(self.damage.way))

    def pause(self, way):
        """Until let_go(), which passes on all that has come in one piece, what comes that way
        stays in its socket; both for any thread but the relay's."""
        paused = threading.Event()
        self.relay.call(lambda: (self._unlisten(way), paused.set()))
        paused.wait()

    def let_go(self, way):
        self.relay.call(lambda: self._listen(way))

    def waiting(self, way):
        """How many bytes stay there."""
        try:
            return len(self.source(way).recv(65536, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return 0

    def drop(self, reset=False):
        """Ends both sides; for any thread."""
        self.relay.call(lambda: self.close(reset))

    def close(self, reset=False):
        if self.over.is_set():
            return
        for way in OTHER:
            self._unlisten(way)
            if reset and self.sink[way].fileno() >= 0:
                self.sink[way].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                          struct.pack("ii", 1, 0))
            self.sink[way].close()
        self.over.set()


class Relay:
    """Listens on a free port of 127.0.0.1, and passes everything on to `target`.

    .damages        for the next connections, one each; none: no damage
    .passages       those that were made
    """

    def __init__(self, target):
        self.target = target
        self.damages, self.passages = collections.deque(), []
        self.calls, self.timers = collections.deque(), []
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.address = ("127.0.0.1", self.port)
        self.bell, self.ear = socket.socketpair()
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.selector.register(self.ear, selectors.EVENT_READ, None)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.stopped = False

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.call(lambda: setattr(self, "stopped", True))
        self.thread.join()
        for sock in (self.listener, self.bell, self.ear):
            sock.close()

    def call(self, function):
        """Lets the relay's thread do it."""
        self.calls.append(function)
        self.bell.send(b"x")

    def later(self, seconds, function):
        self.timers.append((time.monotonic() + seconds, function))

    def next_passage(self, n):
        """The n-th that was made, once it is."""
        until(lambda: len(self.passages) > n, what=f"connection {n}")
        return self.passages[n]

    def _run(self):
        while not self.stopped:
            self._turn()
        for passage in self.passages:
            passage.close()
        self.selector.close()

    def _turn(self):
        now = time.monotonic()
        wait = max(0, min(due for due, _ in self.timers) - now) if self.timers else None
        for key, _ in self.selector.select(wait):
            if key.fileobj is self.listener:
                self._accept()
            elif key.fileobj is self.ear:
                self.ear.recv(4096)
            else:
                passage, way = key.data
                passage.ready(way)
        while self.calls:
            self.calls.popleft()()
        now = time.monotonic()
        due = [t for t in self.timers if t[0] <= now]
        self.timers = [t for t in self.timers if t[0] > now]
        for _, function in due:
            function()

    def _accept(self):
        client, _ = self.listener.accept()
        family = socket.AF_INET if isinstance(self.target, tuple) else socket.AF_UNIX
        server = socket.socket(family)
        try:
            server.connect(self.target)
        except OSError:
            client.close()
            server.close()
            return
        for sock in (client, server):
            if sock.family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        passage = Passage(self, client, server, self.damages.popleft() if self.damages else None)
        self.passages.append(passage)
        passage.begin()


# What bytes mean

class Replay(Client):
    """Reads recorded bytes as strictly as nbd.Client does, but may meet a cookie twice."""

    def __init__(self, data, structured=False, contexts=(), size=None):
        self.data, self.at = bytes(data), 0
        self.start = 0              # where the last message begins
        self.no_zeroes, self.structured, self.extended = True, structured, False
        self.contexts, self.size, self.flags = dict(contexts), size, None
        self.owed = []              # [Reply] that may come
        self.sock = None

    def recv(self, length):
        part = self.data[self.at:self.at + length]
        if len(part) < length:
            raise Closed(part)
        self.at += length
        return part

    @property
    def left(self):
        return len(self.data) - self.at

    def owe(self, cookie, request):
        self.owed.append(Reply(cookie, request))
        return self.owed[-1]

    def _reply(self, cookie):
        for reply in self.owed:
            if reply.cookie == cookie and not reply.done:
                return reply
        raise Violation(f"reply with the cookie {cookie:#x}, which nobody waits for")

    def read_replies(self):
        """All that there is.  Closed if the last one is not whole."""
        complete = []
        try:
            while self.left:
                self.start = self.at
                complete.append(self._read_message())
        finally:                    # a last chunk without its data is none
            for reply in self.owed:
                reply.done = reply.done and reply in complete


class Operation:
    """A request that a server got, and what it may do."""

    def __init__(self, request, cookie, payload, errors):
        self.request, self.cookie, self.payload = request, cookie, payload
        self.errors = errors        # that may be the reply; 0: success
        self.whole = request.command != NBD_CMD_WRITE or len(payload) == request.length

    def __repr__(self):
        return f"{self.request} {'' if self.whole else 'in part '}errors {self.errors}"

    @property
    def changes(self):
        return 0 in self.errors and self.request.length > 0 and self.request.command in (
            NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES)

    def touches(self, start, end):
        return self.request.offset < end and start < self.request.offset + self.request.length

    def outcomes(self, block, start):
        """What the block that begins at `start` may be then."""
        a = max(self.request.offset, start) - start
        b = min(self.request.offset + self.request.length, start + len(block)) - start
        if self.request.command == NBD_CMD_WRITE:
            at = start + a - self.request.offset
            data = self.payload[at:at + b - a]
            if len(data) < b - a:           # a block is never stored in part
                return {block}
            new = block[:a] + data + block[b:]
            return {new} if self.whole else {block, new}
        new = block[:a] + bytes(b - a) + block[b:]
        return {new} if self.request.command == NBD_CMD_WRITE_ZEROES else {block, new}


def is_string(data):
    """proto.md, "Conventions"."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return len(data) <= STRING_MAX and 0 not in data


def take_string(data):
    """A string and what follows it; ValueError if there is none."""
    length, = struct.unpack_from(">I", data)
    if length > len(data) - 4 or not is_string(data[4:4 + length]):
        raise ValueError
    return data[4:4 + length], data[4 + length:]


class Story:
    """What a server must make of the bytes that it got, up to the end of its input.

    .options        [(number, "ok", "error" or "close")] in order
    .operations     [Operation] in order
    .fate           "left": DISC: all before it is carried out and answered;
                    "lost": an end without it, wherever: what has been answered is done, and the
                    rest may be, or not; the connection may end within a reply
    """

    def __init__(self, data, size, readonly=False):
        self.data, self.at, self.size, self.readonly = bytes(data), 0, size, readonly
        self.options, self.operations, self.fate = [], [], "lost"
        self.structured = self.allocation = self.transmits = False
        self.context_of = None      # the export that a context was selected for
        try:
            self._handshake()
            while self.transmits and self._request():
                pass
        except EOFError:
            pass

    @property
    def is_ambiguous(self):
        """Different requests have one cookie: nobody can tell which one a reply is to."""
        first = {op.cookie: op for op in reversed(self.operations)}
        return any(repr(op) != repr(first[op.cookie]) for op in self.operations)

    def _get(self, layout):
        size = struct.calcsize(layout)
        return struct.unpack(layout, self._bytes(size))

    def _bytes(self, length):
        if len(self.data) - self.at < length:
            raise EOFError
        self.at += length
        return self.data[self.at - length:self.at]

    # Handshake

    def _handshake(self):
        flags, = self._get(">I")
        if flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
            return
        self.fixed = bool(flags & NBD_FLAG_C_FIXED_NEWSTYLE)
        self.no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        while not self.transmits:
            magic, number, length = self._get(">QII")
            if magic != IHAVEOPT:
                return
            data = self._bytes(length)
            outcome = self._option(number, data)
            self.options.append((number, outcome))
            if outcome == "close":
                return

    def _option(self, number, data):
        if number == NBD_OPT_EXPORT_NAME:
            if is_string(data):
                self._choose(data)
            return "ok" if self.transmits else "close"
        if not self.fixed or number == NBD_OPT_ABORT:
            return "close"
        known = {NBD_OPT_LIST: lambda: not data, NBD_OPT_STRUCTURED_REPLY: lambda: not data,
                 NBD_OPT_INFO: lambda: self._info_name(data) is not None,
                 NBD_OPT_GO: lambda: self._info_name(data) is not None,
                 NBD_OPT_LIST_META_CONTEXT: lambda: self._contexts(data) is not None,
                 NBD_OPT_SET_META_CONTEXT: lambda: self._set_contexts(data)}
        ok = number in known and known[number]()
        if ok and number == NBD_OPT_STRUCTURED_REPLY:
            self.structured = True
        if ok and number == NBD_OPT_GO:
            self._choose(self._info_name(data))
        return "ok" if ok else "error"

    @staticmethod
    def _info_name(data):
        """The name that INFO or GO asks for, or None if the option is malformed."""
        try:
            name, data = take_string(data)
            count, = struct.unpack_from(">H", data)
        except (struct.error, ValueError):
            return None
        return name if len(data) == 2 + 2 * count else None

    def _contexts(self, data):
        """(name of the export, [query]), or None if the option is malformed."""
        try:
            name, data = take_string(data)
            (count,), data, queries = struct.unpack_from(">I", data), data[4:], []
            for _ in range(count):
                query, data = take_string(data)
                queries.append(query)
        except (struct.error, ValueError):
            return None
        return None if data or not self.structured else (name, queries)

    def _set_contexts(self, data):
        found = self._contexts(data)
        self.context_of = found[0] if found and b"base:allocation" in found[1] else None
        return found is not None

    def _choose(self, name):
        """The export of that name; a context that was selected for another name is void."""
        self.allocation = self.context_of == name
        self.transmits = True

    # Transmission

    def _request(self):
        """Takes one request; returns whether another one may follow."""
        magic, flags, command, cookie, offset, length = self._get(">IHHQQI")
        if magic != NBD_REQUEST_MAGIC:
            return False
        if command == NBD_CMD_DISC:
            self.fate = "left"
            return False
        request = Request(command, offset, length, flags)
        payload = b""
        if command == NBD_CMD_WRITE:
            payload = self.data[self.at:self.at + length]
            self.at += len(payload)
        self.operations.append(Operation(request, cookie, payload, self._errors(request)))
        return self.operations[-1].whole

    def _errors(self, r):
        """proto.md, "Error values"."""
        allowed = {NBD_CMD_READ: NBD_CMD_FLAG_DF * self.structured, NBD_CMD_WRITE: 0,
                   NBD_CMD_TRIM: 0, NBD_CMD_FLUSH: 0, NBD_CMD_CACHE: 0,
                   NBD_CMD_WRITE_ZEROES: NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
                   NBD_CMD_BLOCK_STATUS: NBD_CMD_FLAG_REQ_ONE}
        if r.command not in allowed or r.flags & ~(allowed[r.command] | NBD_CMD_FLAG_FUA):
            return {NBD_EINVAL}
        if r.command == NBD_CMD_FLUSH:
            return {NBD_EINVAL} if r.offset or r.length else {0}
        if r.command == NBD_CMD_BLOCK_STATUS and not self.allocation:
            return {NBD_EINVAL}
        writes = r.command in (NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES)
        if writes and self.readonly:
            return {NBD_EPERM}
        if r.length > (READ_MAX if r.command == NBD_CMD_READ else PAYLOAD_MAX) and \
                r.command in (NBD_CMD_READ, NBD_CMD_WRITE):
            return {NBD_EINVAL, NBD_EOVERFLOW, NBD_ENOSPC}
        if r.length > self.size or r.offset > self.size - r.length:
            return {NBD_ENOSPC if writes and r.command != NBD_CMD_TRIM else NBD_EINVAL}
        if not r.length:
            return {0, NBD_EINVAL}
        fast = r.command == NBD_CMD_WRITE_ZEROES and r.flags & NBD_CMD_FLAG_FAST_ZERO
        return {0, NBD_ENOTSUP} if fast else {0}


# A disk

class Blocks:
    """For each block the contents that it may have."""

    def __init__(self, content):
        self.size = len(content)
        self.block = [{bytes(content[at:at + BLOCK])} for at in range(0, len(content), BLOCK)]

    def check(self, data, offset=0, also=()):
        """Data that was read there is possible; `also`: operations that may have been done."""
        for at in range(offset & -BLOCK, offset + len(data), BLOCK):
            a, b = max(at, offset), min(at + BLOCK, offset + len(data))
            part = data[a - offset:b - offset]
            possible = self._after(at, [], also)
            if not any(block[a - at:b - at] == part for block in possible):
                return f"wrong data at {a}+{b - a}: {part[:64]}..."
        return None

    def apply(self, done, may):
        """Operations that were all done, and others that may be, in any order."""
        for i, at in enumerate(range(0, self.size, BLOCK)):
            if any(op.touches(at, at + BLOCK) for op in (*done, *may)):
                self.block[i] = self._after(at, done, may)

    def _after(self, at, done, may):
        """What the block there may be."""
        done = [op for op in done if op.changes and op.touches(at, at + BLOCK)]
        may = [op for op in may if op.changes and op.touches(at, at + BLOCK)]
        found = set()
        for n in range(len(may) + 1):
            for chosen in itertools.combinations(may, n):
                for order in itertools.permutations([*done, *chosen]):
                    found |= self._in_order(at, order)
        return found

    def _in_order(self, at, operations):
        possible = self.block[at // BLOCK]
        for op in operations:
            possible = set().union(*(op.outcomes(block, at) for block in possible))
        return possible
