"""An NBD server to be a proxy's origin: it answers as a test wants it to.

    with Origin(pattern(0, SIZE)) as origin:            # on a free port of 127.0.0.1
        s = server(args=["--proxy", *options, *origin.arguments, image, bitmap, control])
        ...
        assert origin.read_bytes() == SIZE

It listens within `with`, or from start() to stop().  The end fails if a client
did what no proxy may (`violations`): any command but READ, BLOCK_STATUS and
DISC, a range outside the disk, one that breaks the block sizes, a flag that was
not offered, a cookie that is in flight already.

The disk

    Origin(content)             bytes; blocks of 4 KiB that are all zero are holes
    Origin({0: b"..", ..}, size=N)      sparse: data at these offsets, holes elsewhere
    Origin(function, size=N)    function(offset, length) -> bytes; all of it is data
    .size .pread(length, offset) .extents(length, offset) -> [(length, status)]

Where it is: .arguments of the proxy's command line, .address for nbd.Client, .uri for other
programs, .label as logs call it ("127.0.0.1:PORT", "unix:PATH"), .port

Options: keywords of Origin() and of .set(), and attributes that may change at any time.  For
connections made from then on:

    unix=PATH           listens on a Unix socket instead (not an attribute)
    style="newstyle"    "no-go": fixed newstyle that knows EXPORT_NAME alone; "not-fixed";
                        "oldstyle"
    structured=True  allocation=True  no_zeroes=True  multi_conn=True     what is offered
    flags=0             further transmission flags
    block_size=None     (minimum, preferred, maximum) to tell, and to insist on
    names=None          the exports that exist (any)
    told_size=None      a size to tell instead of the true one
    greeting=None       bytes to send instead of the first words of a handshake
    answers={}          {option: function(connection, data) -> bytes or an end} instead of
                        the usual replies; option_reply() makes some

For requests that arrive from then on:

    order="fifo"        of the replies to what arrived together: "reversed"; "random";
                        "mixed": random, and chunks of several replies take turns
    batch=0.005         seconds in which requests arrive together, unless "fifo"
    fragment=None       bytes for each send(); or a function() -> bytes
    chunk=None          data bytes in a chunk at most, with structured replies
    holes=True          holes are chunks of their own, with structured replies
    shuffle=False       the chunks of a reply come in random order
    delay=0             seconds from the request to its reply; or a function(request)
    errors=None         function(request) -> an error of NBD, or 0; see failing()
    seed=0              of what is random

Requests

    .requests           [Request] in the order of arrival, of all connections
        .command .offset .length .flags .cookie .number (of the connection, from 0)
        .connection .arrived .answered (monotonic seconds, or None) .held
    .reads() .statuses()        those of a kind: [Request]
    .read_bytes()               how much data was asked for
    .counts()                   Counter: how often each block of 4 KiB was asked for
    .wait(condition, n=1)       until so many requests meet condition(request): [Request]

    .hold(which=None)   answers none of them (that meet which(request)) until
    .release(which=None)        which lets those go that meet it; all, and those to come, if None
    .held               [Request] that wait for release()

Connections

    .connections        [Connection] in the order of accept(), also those that have ended
        .number .made .ended (monotonic seconds, or None) .name (that was asked for)
        .options [(option, data)] .phase ("handshake", "transmission", "ended")
        .said_goodbye (DISC or ABORT) .sent (bytes) .why (how it ended)
        .drop(reset=False)
    .open               those that have not ended
    .wait_connections(n)        until so many were made: [Connection]

Failures

    .die(reset=False)           stops listening, drops all connections
    .come_back(**options)       listens again, on the same port; told_size and so on may change
    .freeze(reading=True)       sends nothing more, keeps the connections and accepts more;
                                with reading=False it is as if stopped: reads and accepts nothing
    .thaw()
    .faults.append(Fault(..))   for the next connection; each takes one from the left
    .misbehave(action, times=1, which=None)     the next so many READs (that meet which; or
                        BLOCK_STATUS where that is what the action is for) are answered by
                        action(request) -> bytes, [bytes] of messages, or an end; times=None:
                        all, until
    .behave()
    failing(start, end, error=NBD_EIO)          for errors=
    Fault(after, how="close")   "close", "reset", "stall" (silent, but open), "skip", "double",
                        "flip" (a byte is left out, sent twice, changed): what happens
                        once `after` bytes were sent on a connection, from its beginning on
    CLOSE RESET SILENCE         ends: what an answer may be instead of bytes

    BAD_REPLIES         {name: action}: answers to READ that break the protocol, where structured
                        replies were negotiated; BAD_SIMPLE_REPLIES where they were not
    ODD_REPLIES         {name: (action, whether it is an error)}: unusual ones, good or harmless
    BAD_STATUSES        {name: action}: answers to BLOCK_STATUS that break the protocol
    ODD_STATUSES        {name: action}: unusual ones, good or harmless
    BAD_HANDSHAKES      {name: options of Origin}: handshakes that no client can use
    ODD_HANDSHAKES      {name: options of Origin}: unusual ones, and good
"""

import collections
import os
import random
import socket
import struct
import threading
import time

from nbd import *

__all__ = ["Origin", "Fault", "failing", "option_reply", "CLOSE", "RESET", "SILENCE",
           "BAD_REPLIES", "BAD_SIMPLE_REPLIES", "ODD_REPLIES", "BAD_STATUSES", "ODD_STATUSES",
           "BAD_HANDSHAKES", "ODD_HANDSHAKES"]

BLOCK = 4096
DATA, HOLE = 0, NBD_STATE_HOLE | NBD_STATE_ZERO
ALLOCATION, ALLOCATION_ID = b"base:allocation", 0x2a2a
CLOSE, RESET, SILENCE = "close", "reset", "silence"
READ_ONLY_COMMANDS = (NBD_CMD_READ, NBD_CMD_BLOCK_STATUS, NBD_CMD_DISC)
ZEROS = bytes(BLOCK)


class Gone(Exception):
    """The connection has ended; why is its text."""


# The disk

class Disk:
    """What is on the disk: sorted runs of data, and holes between them."""

    def __init__(self, content, size=None):
        self.read_function = content if callable(content) else None
        if self.read_function:
            self.size, self.runs = size, [(0, size)]
            return
        pieces = content if isinstance(content, dict) else {0: content}
        self.pieces = sorted((offset, data) for offset, data in pieces.items() if data)
        end = max((offset + len(data) for offset, data in self.pieces), default=0)
        self.size = end if size is None else size
        assert end <= self.size and all(
            a + len(data) <= b for (a, data), (b, _) in zip(self.pieces, self.pieces[1:]))
        self.runs = list(self._find_runs())

    def _find_runs(self):
        """(start, end) of data, in whole blocks."""
        start = end = 0
        for at in sorted({block for offset, data in self.pieces
                          for block in range(offset & -BLOCK, offset + len(data), BLOCK)}):
            length = min(BLOCK, self.size - at)
            if self.read(at, length) == ZEROS[:length]:
                continue
            if at != end or start == end:
                if start < end:
                    yield start, end
                start = at
            end = at + length
        if start < end:
            yield start, end

    def read(self, offset, length):
        if self.read_function:
            return bytes(self.read_function(offset, length))
        if len(self.pieces) == 1 and self.pieces[0][0] == 0:
            return bytes(self.pieces[0][1][offset:offset + length]).ljust(length, b"\0")
        found = bytearray(length)
        for start, data in self.pieces:
            a, b = max(start, offset), min(start + len(data), offset + length)
            if a < b:
                found[a - offset:b - offset] = data[a - start:b - start]
        return bytes(found)

    def extents(self, offset, length):
        """[(start, end, whether it is data)] of a range."""
        found, at, end = [], offset, offset + length
        for start, stop in self.runs:
            if stop <= at or at >= end:
                continue
            if start >= end:
                break
            if at < start:
                found.append((at, start, False))
                at = start
            found.append((at, min(stop, end), True))
            at = min(stop, end)
        if at < end:
            found.append((at, end, False))
        return found


# Messages

def simple_reply(cookie, error=0, data=b"", magic=NBD_SIMPLE_REPLY_MAGIC):
    return struct.pack(">IIQ", magic, error, cookie) + data


def chunk_header(cookie, kind, length, done=False, magic=NBD_STRUCTURED_REPLY_MAGIC):
    return struct.pack(">IHHQI", magic, NBD_REPLY_FLAG_DONE if done else 0, kind, cookie, length)


def chunk(cookie, kind, payload=b"", done=False):
    return chunk_header(cookie, kind, len(payload), done) + payload


def data_chunk(cookie, offset, data, done=False):
    return chunk(cookie, NBD_REPLY_TYPE_OFFSET_DATA, struct.pack(">Q", offset) + data, done)


def hole_chunk(cookie, offset, length, done=False):
    return chunk(cookie, NBD_REPLY_TYPE_OFFSET_HOLE, struct.pack(">QI", offset, length), done)


def error_chunk(cookie, error, text=b"no", done=True, offset=None, kind=None):
    kind = kind or (NBD_REPLY_TYPE_ERROR if offset is None else NBD_REPLY_TYPE_ERROR_OFFSET)
    tail = b"" if offset is None else struct.pack(">Q", offset)
    return chunk(cookie, kind, struct.pack(">IH", error, len(text)) + text + tail, done)


def none_chunk(cookie):
    return chunk(cookie, NBD_REPLY_TYPE_NONE, done=True)


def status_chunk(cookie, extents, context=ALLOCATION_ID, done=True):
    return chunk(cookie, NBD_REPLY_TYPE_BLOCK_STATUS, struct.pack(">I", context) + b"".join(
        struct.pack(">II", *extent) for extent in extents), done)


def option_reply(option, kind, data=b"", length=None, magic=OPTION_REPLY_MAGIC):
    return struct.pack(">QIII", magic, option, kind,
                       len(data) if length is None else length) + data


def export_info(size, flags):
    return struct.pack(">HQH", NBD_INFO_EXPORT, size, flags)


# Faults

class Fault:
    """What happens to a connection after so many bytes of its output."""

    def __init__(self, after, how="close"):
        assert how in ("close", "reset", "stall", "skip", "double", "flip")
        self.after, self.how = after, how

    def __repr__(self):
        return f"Fault({self.after}, {self.how!r})"

    def spoil(self, byte):
        """What is sent instead of the byte after that."""
        return {"skip": b"", "double": byte * 2, "flip": bytes([byte[0] ^ 0xff])}[self.how]


def failing(start, end, error=NBD_EIO):
    """For errors=: requests that touch that range fail."""
    return lambda request: error * (request.offset < end
                                    and start < request.offset + request.length)


# Requests

class Request:
    """A request that the origin got."""

    def __init__(self, connection, command, flags, cookie, offset, length):
        self.connection, self.number = connection, connection.number
        self.command, self.flags, self.cookie = command, flags, cookie
        self.offset, self.length, self.end = offset, length, offset + length
        self.arrived, self.answered = time.monotonic(), None
        self.held, self.due = False, self.arrived
        self.answer = None          # a function that makes it, instead of the usual one

    def __repr__(self):
        name = COMMANDS.get(self.command, self.command)
        return f"{name} {self.offset}+{self.length} on {self.number}"

    @property
    def structured(self):
        return self.connection.structured

    @property
    def data(self):
        """What a READ should find."""
        return self.connection.origin.pread(self.length, self.offset)

    def touches(self, start, end):
        return self.offset < end and start < self.end


class Connection:
    """One client.  A thread receives, another one sends the replies."""

    def __init__(self, origin, sock, number):
        self.origin, self.sock, self.number = origin, sock, number
        self.made, self.ended = time.monotonic(), None
        self.name, self.options = None, []
        self.phase, self.why = "handshake", None
        self.structured = self.allocation = self.no_zeroes = self.said_goodbye = False
        self.sent, self.fault = 0, origin.faults.popleft() if origin.faults else None
        self.in_flight = {}         # cookie: Request
        self.last_read = None       # that was answered
        self.waiting = []           # [Request] without a reply
        self.changed = threading.Condition()
        self.stalled = False

    def start(self):
        for work in (self._receive, self._answer):
            threading.Thread(target=self._run, args=[work], daemon=True).start()

    def __repr__(self):
        return f"connection {self.number} ({self.phase}, {self.sent} sent, {self.why})"

    def _run(self, work):
        try:
            work()
        except Gone as e:
            self.end(str(e))
        except OSError as e:
            self.end(f"client: {e}")
        except Exception as e:      # a mistake of the test's, or of this file's
            self.origin.violations.append(f"{self}: {type(e).__name__} {e}")
            self.end("mistake")
            raise

    def end(self, why, reset=False):
        with self.changed:
            if self.ended:
                return
            self.ended, self.why, self.phase = time.monotonic(), why, "ended"
            self.waiting.clear()
            self.changed.notify_all()
        try:
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                     struct.pack("ii", 1, 0))
            # Wakes the thread that receives, which keeps the socket open.
            self.sock.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()

    def drop(self, reset=False):
        self.end("dropped", reset)

    # Bytes

    def recv(self, length):
        data = bytearray()
        while len(data) < length:
            self.origin.wait_for_thaw(self, reading=True)
            part = self.sock.recv(min(length - len(data), 1 << 18))
            if not part:
                raise Gone("closed by the client")
            data += part
        return bytes(data)

    def unpack(self, layout):
        return struct.unpack(layout, self.recv(struct.calcsize(layout)))

    def send(self, data):
        """Sends, through the fault of the connection and in fragments."""
        if data in (CLOSE, RESET):
            self.end("an answer", reset=data == RESET)
            raise Gone("an answer")
        if data == SILENCE:
            return
        if self.fault and self.sent + len(data) > self.fault.after:
            data = self._strike(data)
        fragment, at = self.origin.fragment, 0
        while at < len(data):
            size = fragment() if callable(fragment) else fragment or len(data)
            self._send_part(data[at:at + size])
            at += size

    def _strike(self, data):
        """Does what the fault does; returns what to send then."""
        fault, self.fault = self.fault, None
        keep = max(0, fault.after - self.sent)
        if fault.how in ("close", "reset", "stall"):
            if keep:
                self._send_part(data[:keep])
            self.stalled = fault.how == "stall"
            if self.stalled:
                return b""
            self.end(repr(fault), reset=fault.how == "reset")
            raise Gone(repr(fault))
        return data[:keep] + fault.spoil(data[keep:keep + 1]) + data[keep + 1:]

    def _send_part(self, data):
        self.origin.wait_for_thaw(self)
        if not self.stalled:
            self.sent += len(data)      # before: the client may be fast
            self.sock.sendall(data)

    # Handshake

    def _receive(self):
        origin = self.origin
        if origin.greeting is not None:
            self.send(origin.greeting)
        elif origin.style == "oldstyle":
            self.send(struct.pack(">QQQHH124x", INIT_PASSWD, OLDSTYLE_MAGIC, origin.size_to_tell,
                                  0, origin.transmission_flags))
        else:
            self._haggle()
        if not self.ended:
            self.phase = "transmission"
        while True:
            self._take_request()

    def _haggle(self):
        fixed = self.origin.style != "not-fixed"
        no_zeroes = self.origin.no_zeroes and fixed
        offered = NBD_FLAG_FIXED_NEWSTYLE * fixed | NBD_FLAG_NO_ZEROES * no_zeroes
        self.send(struct.pack(">QQH", INIT_PASSWD, IHAVEOPT, offered))
        flags, = self.unpack(">I")
        self.no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        if flags & ~offered:
            self.violation(f"client flags {flags:#x}")
        while not self._take_option():
            pass

    def _take_option(self):
        """Takes an option; returns whether transmission begins."""
        magic, option, length = self.unpack(">QII")
        if magic != IHAVEOPT or length > 65536:
            self.violation(f"option magic {magic:#x}, option {option}, {length} bytes")
        data = self.recv(length)
        self.options.append((option, data))
        if option in self.origin.answers:
            answer = self.origin.answers[option](self, data)
            self.send(answer)
            return option == NBD_OPT_EXPORT_NAME or (answer != SILENCE and option == NBD_OPT_GO
                                                     and answer.endswith(GO_ACK))
        if self.origin.style == "not-fixed" and option != NBD_OPT_EXPORT_NAME:
            self.violation(f"option {option}, but not fixed newstyle")
        known = {NBD_OPT_EXPORT_NAME: self._export_name, NBD_OPT_ABORT: self._abort}
        if self.origin.style == "newstyle":
            known.update({NBD_OPT_GO: self._go, NBD_OPT_INFO: self._info,
                          NBD_OPT_LIST: self._list,
                          NBD_OPT_STRUCTURED_REPLY: self._structured_reply,
                          NBD_OPT_SET_META_CONTEXT: self._set_meta_context})
        return known.get(option, self._unknown)(option, data)

    def reply(self, option, kind, data=b""):
        self.send(option_reply(option, kind, data))

    def _unknown(self, option, data):
        self.reply(option, NBD_REP_ERR_UNSUP)

    def _abort(self, option, data):
        self.said_goodbye = True
        self.reply(option, NBD_REP_ACK)
        raise Gone("aborted by the client")

    def _choose(self, name):
        self.name = name.decode()
        return self.origin.names is None or self.name in self.origin.names

    def _export_name(self, option, data):
        if not self._choose(data):
            raise Gone("no such export")
        self.send(struct.pack(">QH", self.origin.size_to_tell, self.flags)
                  + bytes(0 if self.no_zeroes else 124))
        return True

    @property
    def flags(self):
        return self.origin.transmission_flags | NBD_FLAG_SEND_DF * self.structured

    def _name_in(self, data):
        length, = struct.unpack_from(">I", data)
        return data[4:4 + length], data[4 + length:]

    def _info(self, option, data):
        self._tell(option, data)

    def _go(self, option, data):
        return self._tell(option, data)

    def _tell(self, option, data):
        """Answers INFO or GO; returns whether there is such an export."""
        name, rest = self._name_in(data)
        if not self._choose(name):
            self.reply(option, NBD_REP_ERR_UNKNOWN)
            return False
        self.reply(option, NBD_REP_INFO, export_info(self.origin.size_to_tell, self.flags))
        if self.origin.block_size:
            self.reply(option, NBD_REP_INFO, struct.pack(">HIII", NBD_INFO_BLOCK_SIZE,
                                                         *self.origin.block_size))
        self.reply(option, NBD_REP_ACK)
        return True

    def _list(self, option, data):
        for name in self.origin.names or [""]:
            self.reply(option, NBD_REP_SERVER, string(name))
        self.reply(option, NBD_REP_ACK)

    def _structured_reply(self, option, data):
        self.structured = self.origin.structured
        self.reply(option, NBD_REP_ACK if self.structured else NBD_REP_ERR_UNSUP)

    def _set_meta_context(self, option, data):
        if not self.structured:
            self.violation("SET_META_CONTEXT without structured replies")
        self.allocation = self.origin.allocation and ALLOCATION in data
        if self.allocation:
            self.reply(option, NBD_REP_META_CONTEXT,
                       struct.pack(">I", ALLOCATION_ID) + ALLOCATION)
        self.reply(option, NBD_REP_ACK)

    # Requests

    def violation(self, text):
        self.origin.violations.append(f"{self}: {text}")
        raise Gone(f"violation: {text}")

    def _take_request(self):
        magic, flags, command, cookie, offset, length = self.unpack(">IHHQQI")
        if magic != NBD_REQUEST_MAGIC:
            self.violation(f"request magic {magic:#x}")
        request = Request(self, command, flags, cookie, offset, length)
        self.origin.note(request)
        if command == NBD_CMD_DISC:
            self.said_goodbye = True
            raise Gone("DISC")
        self._check(request)
        with self.changed:
            self.in_flight[cookie] = request
            self.waiting.append(request)
            self.changed.notify_all()

    def _check(self, request):
        if request.command not in READ_ONLY_COMMANDS:
            self.violation(f"{request} is not for an origin")
        if request.cookie in self.in_flight:
            self.violation(f"{request}: its cookie is in flight")
        allowed = {NBD_CMD_READ: NBD_CMD_FLAG_DF * self.structured,
                   NBD_CMD_BLOCK_STATUS: NBD_CMD_FLAG_REQ_ONE}[request.command]
        if request.flags & ~allowed:
            self.violation(f"{request}: flags {request.flags:#x}")
        if request.command == NBD_CMD_BLOCK_STATUS and not self.allocation:
            self.violation(f"{request}: no context was selected")
        self._check_range(request)

    def _check_range(self, request):
        least, _, most = self.origin.block_size or (1, BLOCK, PAYLOAD_MAX)
        if not request.length or request.end > self.origin.size:
            self.violation(f"{request}: outside the disk")
        if request.offset % least or (request.length % least and request.end < self.origin.size):
            self.violation(f"{request}: the block size is {least}")
        if request.command == NBD_CMD_READ and request.length > most:
            self.violation(f"{request}: at most {most}")

    # Replies

    def _answer(self):
        while not self.ended:
            batch = self._ready()
            for request, message, last in self._arrange(batch):
                if last:            # before its bytes: the client may be fast
                    with self.changed:
                        self.in_flight.pop(request.cookie, None)
                self.send(message)
                if last:
                    request.answered = time.monotonic()
                    if request.command == NBD_CMD_READ:
                        self.last_read = request

    def _ready(self):
        """Waits for requests that may be answered now, and takes them."""
        with self.changed:
            while not self.ended:
                now = time.monotonic()
                ready = [r for r in self.waiting if not r.held and r.due <= now]
                if ready:
                    ready = ready if self.origin.order == "fifo" else self._gather()
                    self.waiting = [r for r in self.waiting if r not in ready]
                    return ready
                due = [r.due for r in self.waiting if not r.held]
                self.changed.wait(min(due) - now if due else None)
        return []

    def _gather(self):
        """More may arrive together."""
        end = time.monotonic() + self.origin.batch
        while (left := end - time.monotonic()) > 0 and not self.ended:
            self.changed.wait(left)
        now = time.monotonic()
        return [r for r in self.waiting if not r.held and r.due <= now]

    def _arrange(self, batch):
        """(request, message, whether it is the last of its reply), in order."""
        order, dice = self.origin.order, self.origin.dice
        if order == "reversed":
            batch = batch[::-1]
        elif order in ("random", "mixed"):
            batch = dice.sample(batch, len(batch))
        if order != "mixed":
            for request in batch:
                messages = self.origin.answer_to(request)
                for i, message in enumerate(messages, 1):
                    yield request, message, i == len(messages)
            return
        queues = [(r, collections.deque(self.origin.answer_to(r))) for r in batch]
        while queues:
            request, messages = dice.choice(queues)
            yield request, messages.popleft(), not messages
            queues = [q for q in queues if q[1]]


def structured_read(request):
    """The messages of a READ's usual answer."""
    origin, cookie = request.connection.origin, request.cookie
    pieces = []
    for start, end, is_data in origin.disk.extents(request.offset, request.length):
        if not is_data and origin.holes and not request.flags & NBD_CMD_FLAG_DF:
            pieces.append((start, end, True))
            continue
        step = end - start if request.flags & NBD_CMD_FLAG_DF else origin.chunk or end - start
        pieces += [(at, min(at + step, end), False) for at in range(start, end, step)]
    if request.flags & NBD_CMD_FLAG_DF:
        pieces = [(request.offset, request.end, False)]
    if origin.shuffle:
        origin.dice.shuffle(pieces)
    return [hole_chunk(cookie, a, b - a, i == len(pieces)) if hole
            else data_chunk(cookie, a, origin.disk.read(a, b - a), i == len(pieces))
            for i, (a, b, hole) in enumerate(pieces, 1)]


def block_status(request):
    """The message of a BLOCK_STATUS' usual answer."""
    runs = request.connection.origin.extents(request.length, request.offset)
    if request.flags & NBD_CMD_FLAG_REQ_ONE:
        runs = runs[:1]
    return [status_chunk(request.cookie, runs)]


class Origin:
    """See the beginning of this file."""

    style = "newstyle"
    structured = allocation = no_zeroes = multi_conn = holes = True
    flags = 0
    block_size = names = told_size = greeting = None
    order, batch = "fifo", 0.005
    fragment = chunk = errors = None
    shuffle = False
    delay = 0

    def __init__(self, content, size=None, unix=None, seed=0, **options):
        self.disk = Disk(content, size)
        self.size = self.disk.size
        self.unix = None if unix is None else str(unix)
        self.dice = random.Random(seed)
        self.answers = {}
        self.set(**options)
        self.requests, self.connections, self.violations = [], [], []
        self.faults = collections.deque()
        self.lock = threading.Lock()        # guards what follows, and requests
        self.holding = None                 # function(request): hold it
        self.actions = []                   # [[action, times, which, command]]
        self.frozen = None                  # None, "sending", "all"
        self.thawed = threading.Condition()
        self.keeper = self.listener = None
        self.port = None

    def set(self, **options):
        for name, value in options.items():
            assert name == "answers" or hasattr(type(self), name), name
            setattr(self, name, value)

    # Where it is

    @property
    def address(self):
        """For nbd.Client."""
        return self.unix or ("127.0.0.1", self.port)

    @property
    def arguments(self):
        """Of the command line: host and port, or unix:PATH."""
        return [f"unix:{self.unix}"] if self.unix else ["127.0.0.1", str(self.port)]

    @property
    def label(self):
        """As the proxy's log calls it."""
        return f"unix:{self.unix}" if self.unix else f"127.0.0.1:{self.port}"

    @property
    def uri(self):
        """For other programs."""
        return (f"nbd+unix:///?socket={self.unix}" if self.unix
                else f"nbd://127.0.0.1:{self.port}")

    def start(self):
        if not self.unix:
            # Bound, never listening: nobody else gets the port while this one is dead.
            self.keeper = self._bind(0)
            self.port = self.keeper.getsockname()[1]
        self._listen()
        return self

    def _bind(self, port):
        sock = socket.socket(socket.AF_UNIX if self.unix else socket.AF_INET)
        if self.unix:
            if os.path.exists(self.unix):
                os.unlink(self.unix)
            sock.bind(self.unix)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
        return sock

    def _listen(self):
        self.listener = self._bind(self.port)
        self.listener.listen(64)
        threading.Thread(target=self._accept, args=[self.listener], daemon=True).start()

    def _accept(self, listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.wait_for_thaw(reading=True)
            if not self.unix:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                alive = listener is self.listener
                if alive:
                    self.connections.append(Connection(self, sock, len(self.connections)))
                    self.connections[-1].start()
            if not alive:
                sock.close()

    def stop(self):
        self.die()
        self.thaw()
        if self.keeper:
            self.keeper.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, *exception):
        self.stop()
        if kind is None:
            self.check()

    def check(self):
        """No client did what no proxy may."""
        assert not self.violations, self.violations

    # The disk

    @property
    def size_to_tell(self):
        return self.size if self.told_size is None else self.told_size

    @property
    def transmission_flags(self):
        return (NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM
                | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_CAN_MULTI_CONN * self.multi_conn
                | self.flags)

    def pread(self, length, offset=0):
        return self.disk.read(offset, length)

    def extents(self, length, offset=0):
        return [(end - start, DATA if is_data else HOLE)
                for start, end, is_data in self.disk.extents(offset, length)]

    # What it was asked

    def note(self, request):
        delay = self.delay(request) if callable(self.delay) else self.delay
        request.due = request.arrived + delay
        with self.lock:
            request.held = bool(self.holding and self.holding(request))
            request.answer = self._action_for(request)
            self.requests.append(request)       # as it is from now on

    def reads(self):
        return [r for r in self.requests if r.command == NBD_CMD_READ]

    def statuses(self):
        return [r for r in self.requests if r.command == NBD_CMD_BLOCK_STATUS]

    def read_bytes(self):
        return sum(r.length for r in self.reads())

    def counts(self):
        return collections.Counter(block for r in self.reads()
                                   for block in range(r.offset // BLOCK, -(-r.end // BLOCK)))

    def wait(self, condition=lambda request: True, n=1, seconds=DEADLINE):
        def found():
            matching = [r for r in list(self.requests) if condition(r)]
            return matching if len(matching) >= n else None

        return until(found, seconds, f"request {n} of a kind")

    def hold(self, which=None):
        with self.lock:
            self.holding = which or (lambda request: request.command != NBD_CMD_DISC)

    def release(self, which=None):
        with self.lock:
            if which is None:
                self.holding = None
            for request in self.requests:
                if request.held and (which is None or which(request)):
                    request.held = False
        self._notify()

    @property
    def held(self):
        return [r for r in self.requests if r.held and not r.connection.ended]

    def _notify(self):
        for connection in self.connections:
            with connection.changed:
                connection.changed.notify_all()

    # What it answers

    def answer_to(self, request):
        """The messages of a reply."""
        if request.answer:
            answer = request.answer(request)
            return answer if isinstance(answer, list) else [answer]
        error = self.errors(request) if self.errors else 0
        if error and request.structured:
            return [error_chunk(request.cookie, error)]
        if error:
            return [simple_reply(request.cookie, error)]
        if request.command == NBD_CMD_BLOCK_STATUS:
            return block_status(request)
        if request.structured:
            return structured_read(request)
        return [simple_reply(request.cookie, 0, request.data)]

    def misbehave(self, action, times=1, which=None):
        command = (NBD_CMD_BLOCK_STATUS if action in STATUS_ACTIONS else NBD_CMD_READ)
        with self.lock:
            self.actions.append([action, times, which, command])

    def _action_for(self, request):
        for entry in self.actions:
            action, times, which, command = entry
            if request.command == command and (not which or which(request)):
                if times is not None:
                    entry[1] -= 1
                    if not entry[1]:
                        self.actions.remove(entry)
                return action
        return None

    def behave(self):
        """Ends misbehave()."""
        with self.lock:
            self.actions.clear()

    # Connections

    @property
    def open(self):
        return [c for c in list(self.connections) if not c.ended]

    def wait_connections(self, n, seconds=DEADLINE):
        until(lambda: len(self.connections) >= n, seconds, f"connection {n}")
        return list(self.connections)

    def die(self, reset=False):
        with self.lock:
            listener, self.listener = self.listener, None
        if listener:
            try:
                listener.shutdown(socket.SHUT_RDWR)     # wakes accept()
            except OSError:
                pass
            listener.close()
        for connection in self.open:
            connection.end("died", reset)

    def come_back(self, **options):
        self.set(**options)
        self._listen()

    def freeze(self, reading=True):
        with self.thawed:
            self.frozen = "sending" if reading else "all"

    def thaw(self):
        with self.thawed:
            self.frozen = None
            self.thawed.notify_all()

    def wait_for_thaw(self, connection=None, reading=False):
        """Returns when it may send; or with reading, receive."""
        with self.thawed:
            while self.frozen == "all" or self.frozen and not reading:
                self.thawed.wait(0.05)
                if connection and connection.ended or self.listener is None:
                    return


# Answers to READ that break the protocol.  Each is for the form that was negotiated.

def start_of(request, length=None):
    """The header of an answer with that many bytes of data."""
    length = request.length if length is None else length
    if not request.structured:
        return simple_reply(request.cookie)
    return (chunk_header(request.cookie, NBD_REPLY_TYPE_OFFSET_DATA, length + 8, True)
            + struct.pack(">Q", request.offset))


def whole(request, cookie=None):
    """A good answer, in one message."""
    cookie = request.cookie if cookie is None else cookie
    if not request.structured:
        return simple_reply(cookie, 0, request.data)
    return data_chunk(cookie, request.offset, request.data, True)


def whole_chunk(request):
    """The same without the end."""
    return data_chunk(request.cookie, request.offset, request.data)


def wrong(request):
    """Data as long as the request's, and all of it wrong."""
    return bytes(byte ^ 0xff for byte in request.data[:BLOCK]).ljust(request.length, b"?")


def wrong_magic(request):
    return b"\x66\x66\x66\x66" + whole(request)[4:]


def wrong_cookie(request):
    return whole(request, request.cookie ^ 1 << 63)


def cookie_of_an_answered_request(request):
    """Wrong data for whom it concerned, if anybody took it."""
    last = request.connection.last_read
    cookie = last.cookie if last else request.cookie + 1
    if not request.structured:
        return simple_reply(cookie, 0, wrong(request))
    return data_chunk(cookie, request.offset, wrong(request), True)


def answered_twice(request):
    return whole(request) + whole(request)


def other_form(request):
    """Simple replies where structured ones were negotiated, and the other way round."""
    if request.structured:
        return simple_reply(request.cookie, 0, request.data)
    return data_chunk(request.cookie, request.offset, request.data, True)


def extended_reply(request):
    return struct.pack(">IHHQQQ", NBD_EXTENDED_REPLY_MAGIC, 1, NBD_REPLY_TYPE_OFFSET_DATA,
                       request.cookie, request.offset, request.length + 8) + request.data


def chunks(*makers):
    """An answer of several chunks."""
    def action(request):
        assert request.structured, "chunks that were not negotiated"
        return [make(request) for make in makers]

    action.structured = True
    return action


def data_at(where, length, done=False):
    """A chunk of wrong data, at an offset that depends on the request."""
    return lambda r: data_chunk(r.cookie, where(r) % U64, b"?" * length, done)


def hole_at(where, length, done=False):
    return lambda r: hole_chunk(r.cookie, where(r) % U64, length(r), done)


def raw_chunk(kind, payload, length=None, done=True):
    """A chunk whose length may lie."""
    def make(r):
        data = payload(r) if callable(payload) else payload
        return chunk_header(r.cookie, kind, len(data) if length is None else length, done) + data

    return make


def place(r):
    return struct.pack(">Q", r.offset)


def finish(r):
    return none_chunk(r.cookie)


def extents_instead(r):
    return status_chunk(r.cookie, [(r.length, HOLE)])


HUGE = (1 << 32) - 1
BAD_REPLIES = {
    "wrong magic": wrong_magic,
    "magic of zeros": lambda r: bytes(4) + whole(r)[4:],
    "wrong cookie": wrong_cookie,
    "cookie of an answered request": cookie_of_an_answered_request,
    "answered twice": answered_twice,
    "the form that was not negotiated": other_form,
    "extended reply": extended_reply,
    "trailing garbage": lambda r: whole(r) + b"garbage!" * 8,
    "chunk before the request": chunks(data_at(lambda r: r.offset - 512, 1024), finish),
    "chunk behind the request": chunks(data_at(lambda r: r.end - 512, 1024), finish),
    "chunk far away": chunks(data_at(lambda r: r.offset + (1 << 40), 512), finish),
    "chunk at the end of 2^64": chunks(data_at(lambda r: -256, 512), finish),
    "hole behind the request": chunks(hole_at(lambda r: r.offset, lambda r: r.length + 1), finish),
    "hole before the request": chunks(hole_at(lambda r: r.offset - 1, lambda r: 2), finish),
    "hole that wraps": chunks(hole_at(lambda r: r.offset, lambda r: HUGE), finish),
    "hole of nothing": chunks(hole_at(lambda r: r.offset, lambda r: 0), finish),
    "data of nothing": chunks(data_at(lambda r: r.offset, 0), finish),
    "overlapping data": chunks(whole_chunk, data_at(lambda r: r.offset, 512), finish),
    "overlapping hole": chunks(whole_chunk, hole_at(lambda r: r.end - 512, lambda r: 512), finish),
    "overlap instead of a part": chunks(
        lambda r: data_chunk(r.cookie, r.offset, r.data[:r.length // 2]),
        lambda r: data_chunk(r.cookie, r.offset, r.data[:r.length - r.length // 2], True)),
    "missing bytes": chunks(lambda r: data_chunk(r.cookie, r.offset, r.data[:-1], True)),
    "missing first bytes": chunks(lambda r: data_chunk(r.cookie, r.offset + 1, r.data[1:], True)),
    "missing everything": chunks(finish),
    "none before the end": chunks(raw_chunk(NBD_REPLY_TYPE_NONE, b"", done=False), whole),
    "none with a payload": chunks(whole_chunk, raw_chunk(NBD_REPLY_TYPE_NONE, b"abcd")),
    "chunk after the end": chunks(whole, whole_chunk),
    "chunk of 4 GiB": chunks(raw_chunk(NBD_REPLY_TYPE_OFFSET_DATA, place, HUGE)),
    "chunk of 2 GiB": chunks(raw_chunk(NBD_REPLY_TYPE_OFFSET_DATA, place, 1 << 31)),
    "chunk without an offset": chunks(raw_chunk(NBD_REPLY_TYPE_OFFSET_DATA, b"abcd"), finish),
    "hole of 11 bytes": chunks(raw_chunk(NBD_REPLY_TYPE_OFFSET_HOLE, bytes(11)), finish),
    "hole of 4 GiB": chunks(raw_chunk(NBD_REPLY_TYPE_OFFSET_HOLE, place, HUGE)),
    "error chunk of 4 GiB": chunks(raw_chunk(NBD_REPLY_TYPE_ERROR, b"\0\0\0\5\xff\xff", HUGE)),
    "error text longer than its chunk": chunks(raw_chunk(
        NBD_REPLY_TYPE_ERROR, b"\0\0\0\5\xff\xffab"), finish),
    "error chunk of 3 bytes": chunks(raw_chunk(NBD_REPLY_TYPE_ERROR, b"\0\0\0"), finish),
    "error chunk without an error": chunks(lambda r: error_chunk(r.cookie, 0)),
    "unknown chunk": chunks(raw_chunk(0x1234, b"abcdefgh", done=False), whole),
    "unknown chunk of 4 GiB": chunks(raw_chunk(0x1234, b"", HUGE)),
    "unknown error chunk of 4 GiB": chunks(raw_chunk(0x8fff, b"\0\0\0\5\0\0", HUGE)),
    "extents": chunks(extents_instead),
}
BAD_SIMPLE_REPLIES = {name: action for name, action in BAD_REPLIES.items()
                      if not hasattr(action, "structured")}


# Unusual answers to READ, and good or harmless: (action, whether it is an error)

def either_form(structured, simple):
    return lambda r: structured(r) if r.structured else simple(r)


def byte_chunks(r):
    """A chunk for each of the last bytes, in reverse."""
    data, cut = r.data, r.length - 64
    small = [data_chunk(r.cookie, r.offset + i, data[i:i + 1]) for i in range(cut, r.length)]
    return [*reversed(small), data_chunk(r.cookie, r.offset, data[:cut]), finish(r)]


def part_then_error(r):
    return [data_chunk(r.cookie, r.offset, wrong(r)[:r.length // 2]),
            error_chunk(r.cookie, NBD_EIO, b"the rest is lost")]


def error_then_all(r):
    """An error before the end stays one, whatever follows."""
    return [error_chunk(r.cookie, NBD_EIO, done=False),
            data_chunk(r.cookie, r.offset, wrong(r)), finish(r)]


def error(number, text=b"", **keywords):
    return either_form(lambda r: error_chunk(r.cookie, number, text, **keywords),
                       lambda r: simple_reply(r.cookie, number))


def good(r):
    return whole(r)


ODD_REPLIES = {
    "all at once, then none": (either_form(lambda r: [whole_chunk(r), finish(r)], good), False),
    "chunks of a byte, backwards": (either_form(byte_chunks, good), False),
    "EINVAL": (error(NBD_EINVAL), True),
    "ENOMEM": (error(NBD_ENOMEM), True),
    "EPERM": (error(NBD_EPERM), True),
    "an error that nobody knows": (error(9999), True),
    "an error with a long text": (error(NBD_EIO, b"x" * STRING_MAX), True),
    "an error with a text that is no text": (error(NBD_EIO, b"\xff\0\n\r\x1b[2J" * 9), True),
    "an error at an offset": (either_form(
        lambda r: error_chunk(r.cookie, NBD_EIO, offset=r.offset + r.length - 1),
        lambda r: simple_reply(r.cookie, NBD_EIO)), True),
    "an error at an offset far away": (either_form(
        lambda r: error_chunk(r.cookie, NBD_EIO, offset=r.offset + (1 << 40)),
        lambda r: simple_reply(r.cookie, NBD_EIO)), True),
    "an error chunk that nobody knows": (either_form(
        lambda r: error_chunk(r.cookie, NBD_EIO, kind=0x8fff),
        lambda r: simple_reply(r.cookie, NBD_EIO)), True),
    "a part, then an error": (either_form(part_then_error,
                                          lambda r: simple_reply(r.cookie, NBD_EIO)), True),
    "an error, then data": (either_form(error_then_all,
                                        lambda r: simple_reply(r.cookie, NBD_EIO)), True),
}


# Answers to BLOCK_STATUS

def status(*extents, context=ALLOCATION_ID):
    """Lengths may be functions of the request."""
    def action(r):
        return status_chunk(r.cookie, [(length(r) if callable(length) else length, flags)
                                       for length, flags in extents], context)

    return action


def all_of_it(r):
    return r.length


BAD_STATUSES = {
    "extent of length 0": status((0, HOLE), (all_of_it, HOLE)),
    "only extents of length 0": status((0, HOLE)),
    "no extents": status(),
    "another context": status((all_of_it, HOLE), context=ALLOCATION_ID + 1),
    "the context twice": lambda r: [status_chunk(r.cookie, [(r.length, HOLE)], done=False),
                                    status_chunk(r.cookie, [(r.length, DATA)])],
    "half an extent": lambda r: chunk(r.cookie, NBD_REPLY_TYPE_BLOCK_STATUS, struct.pack(
        ">III", ALLOCATION_ID, r.length, HOLE) + b"abcd", True),
    "no context": lambda r: chunk(r.cookie, NBD_REPLY_TYPE_BLOCK_STATUS, b"", True),
    "extents of 4 GiB": lambda r: chunk_header(r.cookie, NBD_REPLY_TYPE_BLOCK_STATUS, HUGE, True)
    + struct.pack(">I", ALLOCATION_ID),
    "nothing": lambda r: none_chunk(r.cookie),
    "simple success": lambda r: simple_reply(r.cookie),
    "data": lambda r: data_chunk(r.cookie, r.offset, b"?" * 512, True),
    "hole": lambda r: hole_chunk(r.cookie, r.offset, 512, True),
}


def true_runs(r):
    return r.connection.origin.extents(r.length, r.offset)


def one_byte(r):
    return status_chunk(r.cookie, [(1, true_runs(r)[0][1])])


def odd_lengths(r):
    """Holes are told shorter than they are, and end within a block."""
    runs = []
    for length, flags in true_runs(r):
        cut = 1000 if flags == HOLE and length > 1000 else 1
        runs += [(length - cut, flags), (cut, DATA)] if length > cut else [(length, flags)]
    return status_chunk(r.cookie, runs)


def more_than_asked(*further):
    return lambda r: status_chunk(r.cookie, [*true_runs(r), *further])


def one_run_a_block(r):
    """As many extents as blocks, as no server should answer."""
    runs = [(min(BLOCK, length - at), flags) for length, flags in true_runs(r)
            for at in range(0, length, BLOCK)]
    return status_chunk(r.cookie, runs)


ODD_STATUSES = {
    "the first extent alone": lambda r: status_chunk(r.cookie, true_runs(r)[:1]),
    "an extent a block": one_run_a_block,
    "one byte": one_byte,
    "odd lengths": odd_lengths,
    "unknown flags": lambda r: status_chunk(r.cookie, [(length, flags | 0xfffffff0)
                                                       for length, flags in true_runs(r)]),
    "holes of data": lambda r: status_chunk(r.cookie, [(length, flags or NBD_STATE_HOLE)
                                                       for length, flags in true_runs(r)]),
    "extents behind the request": more_than_asked((512, HOLE), (BLOCK, DATA)),
    "extents that wrap": more_than_asked((HUGE, HOLE), (HUGE, DATA), (HUGE, HOLE)),
    "EIO": lambda r: error_chunk(r.cookie, NBD_EIO),
    "EINVAL as a simple reply": lambda r: simple_reply(r.cookie, NBD_EINVAL),
    "then none": lambda r: [status_chunk(r.cookie, true_runs(r), done=False), none_chunk(r.cookie)],
}
STATUS_ACTIONS = {*BAD_STATUSES.values(), *ODD_STATUSES.values()}


# Handshakes that no client can use

def go_with(*replies):
    """GO is answered by these; functions get the connection."""
    def answer(connection, data):
        return b"".join(reply(connection) if callable(reply) else reply for reply in replies)

    return {"answers": {NBD_OPT_GO: answer}}


GO_ACK = option_reply(NBD_OPT_GO, NBD_REP_ACK)


def go_reply(kind, data=b"", **keywords):
    return option_reply(NBD_OPT_GO, kind, data, **keywords)


def true_export(connection):
    return go_reply(NBD_REP_INFO, export_info(connection.origin.size, connection.flags))


def blocks(*sizes):
    return go_reply(NBD_REP_INFO, struct.pack(">HIII", NBD_INFO_BLOCK_SIZE, *sizes))


BAD_HANDSHAKES = {
    "nothing": {"greeting": CLOSE},
    "reset": {"greeting": RESET},
    "another protocol": {"greeting": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n" + b"x" * 200},
    "wrong magic": {"greeting": struct.pack(">QQH200x", INIT_PASSWD, IHAVEOPT ^ 1, 3)},
    "oldstyle, size over 2^63": {"style": "oldstyle", "told_size": 1 << 63},
    "EXPORT_NAME, size over 2^63": {"style": "no-go", "told_size": U64 - 1},
    "size over 2^63": {"told_size": 1 << 63},
    "size of 2^64 - 4096": {"told_size": U64 - BLOCK},
    "no such export": {"names": ["another"]},
    "no such export, no GO": {"names": ["another"], "style": "no-go"},
    "refused by policy": go_with(go_reply(NBD_REP_ERR_POLICY, b"not you")),
    "TLS required": go_with(go_reply(NBD_REP_ERR_TLS_REQD)),
    "shutting down": go_with(go_reply(NBD_REP_ERR_SHUTDOWN)),
    "closes at GO": {"answers": {NBD_OPT_GO: lambda *_: CLOSE}},
    "no export information": go_with(GO_ACK),
    "export information of 3 bytes": go_with(go_reply(NBD_REP_INFO, b"\0\0\1"), GO_ACK),
    "export information without flags": go_with(
        go_reply(NBD_REP_INFO, struct.pack(">HQ", NBD_INFO_EXPORT, 1 << 20)), GO_ACK),
    "wrong reply magic": go_with(true_export, option_reply(NBD_OPT_GO, NBD_REP_ACK, magic=7)),
    "reply to another option": go_with(true_export, option_reply(NBD_OPT_LIST, NBD_REP_ACK)),
    "unknown kind of reply": go_with(true_export, go_reply(77), GO_ACK),
    "reply of 4 GiB": go_with(go_reply(NBD_REP_INFO, b"\0\0", length=HUGE)),
    "error text of 4 GiB": go_with(go_reply(NBD_REP_ERR_POLICY, b"no", length=HUGE)),
    "minimum block of 0": go_with(true_export, blocks(0, BLOCK, 1 << 20), GO_ACK),
    "minimum block of 3": go_with(true_export, blocks(3, BLOCK, 1 << 20), GO_ACK),
    "minimum block of 1 MiB": go_with(true_export, blocks(1 << 20, 1 << 20, 1 << 25), GO_ACK),
    "maximum below minimum": go_with(true_export, blocks(BLOCK, BLOCK, 512), GO_ACK),
}


# Unusual handshakes, and good

def refusing(option, error):
    return lambda connection, data: option_reply(option, error, b"not here")


def chatty_go(connection, data):
    """Information that was not asked for, and in an unusual order."""
    return b"".join([
        go_reply(NBD_REP_INFO, struct.pack(">H", NBD_INFO_NAME) + b"a name"),
        go_reply(NBD_REP_INFO, struct.pack(">H", 4711) + b"whatever" * 500),
        go_reply(NBD_REP_INFO, struct.pack(">H", NBD_INFO_DESCRIPTION)), true_export(connection),
        blocks(1, BLOCK, HUGE), GO_ACK])


ODD_HANDSHAKES = {
    "no structured replies": {"structured": False},
    "no contexts": {"allocation": False},
    "no GO": {"style": "no-go"},
    "no GO, with zeroes": {"style": "no-go", "no_zeroes": False},
    "not fixed": {"style": "not-fixed"},
    "oldstyle": {"style": "oldstyle"},
    "no more than one connection": {"multi_conn": False},
    "unknown transmission flags": {"flags": 0xf000},
    "read-only": {"flags": NBD_FLAG_READ_ONLY},
    "much information": {"answers": {NBD_OPT_GO: chatty_go}},
    "structured replies against the policy": {
        "answers": {NBD_OPT_STRUCTURED_REPLY: refusing(NBD_OPT_STRUCTURED_REPLY,
                                                       NBD_REP_ERR_POLICY)}},
    "contexts are unknown": {
        "answers": {NBD_OPT_SET_META_CONTEXT: refusing(NBD_OPT_SET_META_CONTEXT,
                                                       NBD_REP_ERR_UNSUP)}},
    "block sizes": {"block_size": (512, BLOCK, 1 << 20)},
    "large minimum block": {"block_size": (65536, 65536, 65536)},
    "small maximum block": {"block_size": (BLOCK, BLOCK, BLOCK)},
    "no maximum block": {"block_size": (1, BLOCK, HUGE)},
}
