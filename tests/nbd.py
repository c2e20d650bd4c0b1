"""A raw NBD client for tests: it parses strictly and can send anything.

Every step of the handshake and of the transmission phase is a method of its
own, so a test can stop, repeat or spoil any of them.  What comes back is
checked against the specification (doc/proto.md of NetworkBlockDevice/nbd);
a server that breaks it raises Violation.

    with server.client(structured=True) as c:       # negotiated, see conftest.py
        c.pwrite(b"abc", 0)
        a = c.request(NBD_CMD_READ, 0, 512)         # pipelined: sent, not awaited
        b = c.request(NBD_CMD_FLUSH)
        c.collect(b)
        data = c.collect(a).data

This module has the name of libnbd's; a test of libnbd imports that in a
process of its own.
"""

import array
import os
import socket
import struct
import sys
import time

SANITIZED = os.environ.get("XNBD_SANITIZED") == "1"
DEADLINE = 90 if SANITIZED else 40      # seconds: for what should happen at once

# Magic numbers
INIT_PASSWD = 0x4e42444d41474943
IHAVEOPT = 0x49484156454F5054
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x3e889045565a9
NBD_REQUEST_MAGIC = 0x25609513
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC = 0x668e33ef
NBD_EXTENDED_REQUEST_MAGIC = 0x21e41c71
NBD_EXTENDED_REPLY_MAGIC = 0x6e8a278c

# Handshake flags
NBD_FLAG_FIXED_NEWSTYLE = 1 << 0
NBD_FLAG_NO_ZEROES = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0
NBD_FLAG_C_NO_ZEROES = 1 << 1

# Transmission flags
NBD_FLAG_HAS_FLAGS = 1 << 0
NBD_FLAG_READ_ONLY = 1 << 1
NBD_FLAG_SEND_FLUSH = 1 << 2
NBD_FLAG_SEND_FUA = 1 << 3
NBD_FLAG_ROTATIONAL = 1 << 4
NBD_FLAG_SEND_TRIM = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6
NBD_FLAG_SEND_DF = 1 << 7
NBD_FLAG_CAN_MULTI_CONN = 1 << 8
NBD_FLAG_SEND_RESIZE = 1 << 9
NBD_FLAG_SEND_CACHE = 1 << 10
NBD_FLAG_SEND_FAST_ZERO = 1 << 11
NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12

# Options
NBD_OPT_EXPORT_NAME = 1
NBD_OPT_ABORT = 2
NBD_OPT_LIST = 3
NBD_OPT_PEEK_EXPORT = 4
NBD_OPT_STARTTLS = 5
NBD_OPT_INFO = 6
NBD_OPT_GO = 7
NBD_OPT_STRUCTURED_REPLY = 8
NBD_OPT_LIST_META_CONTEXT = 9
NBD_OPT_SET_META_CONTEXT = 10
NBD_OPT_EXTENDED_HEADERS = 11

# Option replies
NBD_REP_ACK = 1
NBD_REP_SERVER = 2
NBD_REP_INFO = 3
NBD_REP_META_CONTEXT = 4
NBD_REP_FLAG_ERROR = 1 << 31
NBD_REP_ERR_UNSUP = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG = NBD_REP_FLAG_ERROR + 9
NBD_REP_ERR_EXT_HEADER_REQD = NBD_REP_FLAG_ERROR + 10

# Information types
NBD_INFO_EXPORT = 0
NBD_INFO_NAME = 1
NBD_INFO_DESCRIPTION = 2
NBD_INFO_BLOCK_SIZE = 3

# Commands and their flags
NBD_CMD_READ = 0
NBD_CMD_WRITE = 1
NBD_CMD_DISC = 2
NBD_CMD_FLUSH = 3
NBD_CMD_TRIM = 4
NBD_CMD_CACHE = 5
NBD_CMD_WRITE_ZEROES = 6
NBD_CMD_BLOCK_STATUS = 7
NBD_CMD_RESIZE = 8

NBD_CMD_FLAG_FUA = 1 << 0
NBD_CMD_FLAG_NO_HOLE = 1 << 1
NBD_CMD_FLAG_DF = 1 << 2
NBD_CMD_FLAG_REQ_ONE = 1 << 3
NBD_CMD_FLAG_FAST_ZERO = 1 << 4
NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5

# Structured replies
NBD_REPLY_FLAG_DONE = 1 << 0
NBD_REPLY_TYPE_NONE = 0
NBD_REPLY_TYPE_OFFSET_DATA = 1
NBD_REPLY_TYPE_OFFSET_HOLE = 2
NBD_REPLY_TYPE_BLOCK_STATUS = 5
NBD_REPLY_TYPE_BLOCK_STATUS_EXT = 6
NBD_REPLY_TYPE_ERROR = (1 << 15) + 1
NBD_REPLY_TYPE_ERROR_OFFSET = (1 << 15) + 2

NBD_STATE_HOLE = 1 << 0
NBD_STATE_ZERO = 1 << 1

# Errors
NBD_EPERM = 1
NBD_EIO = 5
NBD_ENOMEM = 12
NBD_EINVAL = 22
NBD_ENOSPC = 28
NBD_EOVERFLOW = 75
NBD_ENOTSUP = 95
NBD_ESHUTDOWN = 108
ERRORS = (NBD_EPERM, NBD_EIO, NBD_ENOMEM, NBD_EINVAL, NBD_ENOSPC,
          NBD_EOVERFLOW, NBD_ENOTSUP, NBD_ESHUTDOWN)

STRING_MAX = 4096           # proto.md, "Conventions"
PAYLOAD_MAX = 32 << 20      # proto.md, "Size constraints"
READ_MAX = 64 << 20         # of this server, which is more than it says
U64 = 1 << 64
EXTENDED = "extended"       # more than structured replies, see Handshake.negotiate()

OPTIONS = {number: name for name, number in list(globals().items())
           if name.startswith("NBD_OPT_")}
COMMANDS = {number: name for name, number in list(globals().items())
            if name.startswith("NBD_CMD_") and "FLAG" not in name}


class Violation(AssertionError):
    """The server broke the protocol."""


class Closed(ConnectionError):
    """The server closed the connection; `got` is what came before that."""

    def __init__(self, got=b""):
        super().__init__(f"connection closed after {len(got)} bytes of the message")
        self.got = bytes(got)


class NbdError(Exception):
    """A command was answered with an error."""

    def __init__(self, reply, request):
        super().__init__(f"{request}: error {reply.error} {reply.message}")
        self.errno = reply.error
        self.reply = reply


class OptionError(Exception):
    """An option was answered with an error."""

    def __init__(self, reply):
        super().__init__(f"option {reply.option}: NBD_REP_ERR "
                         f"{reply.type - NBD_REP_FLAG_ERROR} {reply.data!r}")
        self.type = reply.type
        self.reply = reply


def check(condition, text):
    if not condition:
        raise Violation(text)


def until(condition, seconds=DEADLINE, what="the condition", pause=0.01):
    """Polls until condition() is true and returns its value."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true in {seconds} s")
        time.sleep(pause)


def once(work, attempts=5):
    """work() must pass once: for what a stall of the machine may spoil, and a mistake of the
    server always does."""
    for left in reversed(range(attempts)):
        try:
            return work()
        except AssertionError:
            if not left:
                raise


def pattern(offset, length, seed=0xa5):
    """Bytes of a disk on which every 8-byte word names its own offset, so
    that no two blocks are equal and none is zero."""
    first = offset & ~7
    words = array.array("Q", range(first | seed << 56,
                                   (offset + length + 7 & ~7) | seed << 56, 8))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()[offset - first:offset - first + length]


def octets(text):
    return text.encode() if isinstance(text, str) else bytes(text)


def string(text):
    """A length and the bytes, as options hold names and queries."""
    return struct.pack(">I", len(octets(text))) + octets(text)


def info_data(name="", infos=()):
    """The data of NBD_OPT_INFO and NBD_OPT_GO."""
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_data(name="", queries=()):
    """The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""
    return (string(name) + struct.pack(">I", len(queries))
            + b"".join(string(query) for query in queries))


def option_header(option, length, magic=IHAVEOPT):
    return struct.pack(">QII", magic, option, length)


def request_header(command, offset=0, length=0, flags=0, cookie=0,
                   magic=NBD_REQUEST_MAGIC):
    """The 28 bytes of a request; proto.md, "Request message"."""
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)


def extended_header(command, offset=0, length=0, flags=0, cookie=0,
                    magic=NBD_EXTENDED_REQUEST_MAGIC):
    """The 32 bytes of one with extended headers."""
    return struct.pack(">IHHQQQ", magic, flags, command, cookie, offset, length)


class OptionReply:
    """One reply to an option."""

    def __init__(self, option, type, data):
        self.option, self.type, self.data = option, type, data
        self.is_error = bool(type & NBD_REP_FLAG_ERROR)
        self.is_final = self.is_error or type == NBD_REP_ACK
        self._check()

    def __repr__(self):
        return f"OptionReply({self.option}, {self.type:#x}, {self.data[:64]!r})"

    def _check(self):
        if self.is_error:
            check(len(self.data) <= STRING_MAX, f"{self}: error text too long")
            self.data.decode()
            check(NBD_REP_ERR_UNSUP <= self.type <= NBD_REP_ERR_EXT_HEADER_REQD,
                  f"{self}: no such error")
            return
        least = {NBD_REP_ACK: 0, NBD_REP_SERVER: 4, NBD_REP_INFO: 2,
                 NBD_REP_META_CONTEXT: 4}
        check(self.type in least, f"{self}: no such reply")
        check(len(self.data) >= least[self.type], f"{self}: too short")
        if self.type == NBD_REP_ACK:
            check(not self.data, f"{self}: ACK with data")
        elif self.type == NBD_REP_SERVER:
            check(self.name_length <= len(self.data) - 4, f"{self}: name too long")

    @property
    def name_length(self):
        return struct.unpack_from(">I", self.data)[0]

    @property
    def name(self):
        """The export of a SERVER reply."""
        return self.data[4:4 + self.name_length].decode()

    @property
    def context(self):
        """Id and name of a META_CONTEXT reply."""
        return self.name_length, self.data[4:].decode()


class Info:
    """What INFO or GO told: raw replies by type, and the parsed ones."""

    def __init__(self, replies):
        self.raw = {}
        for reply in replies:
            check(reply.type == NBD_REP_INFO, f"{reply} among information")
            self._add(*struct.unpack_from(">H", reply.data), reply.data[2:])
        check(NBD_INFO_EXPORT in self.raw, "no NBD_INFO_EXPORT")
        self.size, self.flags = struct.unpack(">QH", self.raw[NBD_INFO_EXPORT])
        check(self.size < 1 << 63, f"size {self.size}")

    def _add(self, kind, data):
        sizes = {NBD_INFO_EXPORT: 10, NBD_INFO_BLOCK_SIZE: 12}
        check(kind not in self.raw, f"information {kind} twice")
        check(len(data) == sizes.get(kind, len(data)), f"information {kind}: {data!r}")
        self.raw[kind] = data

    def text(self, kind):
        check(len(self.raw[kind]) <= STRING_MAX, "string too long")
        return self.raw[kind].decode()

    @property
    def name(self):
        return self.text(NBD_INFO_NAME)

    @property
    def description(self):
        return self.text(NBD_INFO_DESCRIPTION)

    @property
    def block_size(self):
        """(minimum, preferred, maximum)"""
        return struct.unpack(">III", self.raw[NBD_INFO_BLOCK_SIZE])


class Request:
    """A command that was sent and whose reply has not come yet."""

    def __init__(self, command, offset, length, flags):
        self.command, self.flags = command, flags
        self.offset, self.length = offset, length

    def __repr__(self):
        name = COMMANDS.get(self.command, self.command)
        return f"{name}({self.offset}, {self.length}, flags={self.flags:#x})"


class Reply:
    """The whole answer to one command.

    error    0 or the (first) error of the answer
    data     for READ: the bytes; holes are zeros
    chunks   [(type, offset, length)], empty for a simple reply
    extents  {context id: [(length, status)]} for BLOCK_STATUS
    """

    def __init__(self, cookie, request):
        self.cookie, self.request = cookie, request
        self.error, self.message = 0, ""
        self.data = None
        self.chunks, self.extents = [], {}
        self.done = False

    @property
    def structured(self):
        return bool(self.chunks)

    def __repr__(self):
        return f"Reply to {self.request}: error {self.error} {self.message}"


class Transport:
    """A socket with exact reads; a Closed tells that the peer has gone."""

    def __init__(self, address, timeout=DEADLINE, rcvbuf=None):
        if isinstance(address, socket.socket):
            self.sock = address
            self.sock.settimeout(timeout)
            return
        unix = not isinstance(address, tuple)
        family = (socket.AF_UNIX if unix else
                  socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        if rcvbuf is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self.sock.settimeout(timeout)
        self.sock.connect(str(address) if unix else address)
        if not unix:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data):
        """Sends bytes as they are."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as e:
            raise Closed() from e

    def recv(self, length):
        """Exactly that many bytes."""
        data = bytearray(length)
        view, have = memoryview(data), 0
        while have < length:
            try:
                count = self.sock.recv_into(view[have:])
            except ConnectionResetError as e:
                raise Closed(data[:have]) from e
            if not count:
                raise Closed(data[:have])
            have += count
        return bytes(data)

    def recv_until_closed(self):
        """Everything up to the end of the connection, however it ends."""
        parts = []
        try:
            while part := self.sock.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)

    def expect_closed(self, seconds=8):
        """The server closes at once, without another byte; so does the client
        then.  8 s is less than the deadline of a handshake, which closes too."""
        self.sock.settimeout(seconds)
        rest = self.recv_until_closed()
        self.close()
        check(not rest, f"expected a close, got {rest[:64]!r}")

    def unpack(self, layout):
        return struct.unpack(layout, self.recv(struct.calcsize(layout)))

    def shutdown_write(self):
        self.sock.shutdown(socket.SHUT_WR)

    def close(self):
        self.sock.close()

    def reset(self):
        """Closes with RST where the transport has such a thing."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                             struct.pack("ii", 1, 0))
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class Handshake(Transport):
    """The handshake, a step at a time.  negotiate() does it all."""

    def __init__(self, address, timeout=DEADLINE, rcvbuf=None):
        super().__init__(address, timeout, rcvbuf)
        self.no_zeroes = self.structured = self.extended = False
        self.contexts = {}          # id: name, as selected
        self.size = self.flags = None

    def greeting(self):
        """Reads the newstyle greeting; returns the handshake flags."""
        passwd, magic, flags = self.unpack(">QQH")
        check(passwd == INIT_PASSWD, f"greeting {passwd:#x}")
        check(magic == IHAVEOPT, f"not newstyle: {magic:#x}")
        return flags

    def oldstyle_greeting(self):
        """Reads the whole oldstyle handshake; returns the handshake flags."""
        passwd, magic, self.size, handshake, self.flags = self.unpack(">QQQHH")
        check(passwd == INIT_PASSWD, f"greeting {passwd:#x}")
        check(magic == OLDSTYLE_MAGIC, f"not oldstyle: {magic:#x}")
        self._zeroes()
        return handshake

    def client_flags(self, flags=NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
        self.no_zeroes = bool(flags & NBD_FLAG_C_NO_ZEROES)
        self.send(struct.pack(">I", flags))

    def hello(self, flags=NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
        """Greeting and client flags; options may follow."""
        self.greeting()
        self.client_flags(flags)
        return self

    def option(self, option, data=b"", length=None, magic=IHAVEOPT):
        """Sends an option; `length` may lie about its data."""
        if length is None:
            length = len(data)
        self.send(option_header(option, length, magic) + data)

    def option_reply(self, option):
        """Reads one reply, which must be to that option."""
        magic, echo, kind, length = self.unpack(">QIII")
        check(magic == OPTION_REPLY_MAGIC, f"option reply magic {magic:#x}")
        check(echo == option, f"reply to option {echo}, expected {option}")
        check(length <= 65536, f"option reply of {length} bytes")
        return OptionReply(option, kind, self.recv(length))

    def option_replies(self, option):
        """Reads up to the ACK and returns what came before it; an error
        raises OptionError, whose `before` is what came before it."""
        replies = []
        while True:
            reply = self.option_reply(option)
            if reply.is_error:
                error = OptionError(reply)
                error.before = replies
                raise error
            if reply.is_final:
                return replies
            replies.append(reply)

    def ask(self, option, data=b""):
        """Sends an option and reads all its replies."""
        self.option(option, data)
        return self.option_replies(option)

    def refused(self, option, data=b""):
        """Sends an option that must fail; returns the error's type."""
        try:
            replies = self.ask(option, data)
        except OptionError as e:
            check(not e.before, f"information before the error: {e.before}")
            return e.type
        raise AssertionError(f"option {option} was not refused: {replies}")

    def info(self, name="", infos=(), option=NBD_OPT_INFO):
        return Info(self.ask(option, info_data(name, infos)))

    def go(self, name="", infos=()):
        """NBD_OPT_GO; transmission begins."""
        info = self.info(name, infos, NBD_OPT_GO)
        self.size, self.flags = info.size, info.flags
        return info

    def export_name(self, name=""):
        """NBD_OPT_EXPORT_NAME; transmission begins."""
        self.option(NBD_OPT_EXPORT_NAME, octets(name))
        self.size, self.flags = self.unpack(">QH")
        if not self.no_zeroes:
            self._zeroes()

    def _zeroes(self):
        check(self.recv(124) == bytes(124), "the 124 zero bytes are not zero")

    def list(self):
        """The names of the exports."""
        replies = self.ask(NBD_OPT_LIST)
        check(all(r.type == NBD_REP_SERVER for r in replies), f"{replies}")
        return [reply.name for reply in replies]

    def abort(self):
        self.ask(NBD_OPT_ABORT)

    def structured_reply(self):
        check(not self.ask(NBD_OPT_STRUCTURED_REPLY), "reply before the ACK")
        self.structured = True

    def extended_headers(self):
        check(not self.ask(NBD_OPT_EXTENDED_HEADERS), "reply before the ACK")
        self.structured = self.extended = True

    def _meta_contexts(self, option, name, queries):
        replies = self.ask(option, meta_data(name, queries))
        check(all(r.type == NBD_REP_META_CONTEXT for r in replies), f"{replies}")
        return [reply.context for reply in replies]

    def list_meta_context(self, name="", queries=()):
        """The names of the contexts that match."""
        return [context for _, context in self._meta_contexts(
            NBD_OPT_LIST_META_CONTEXT, name, queries)]

    def set_meta_context(self, name="", queries=("base:allocation",)):
        """Selects contexts; returns {id: name}."""
        self.contexts = {}
        replies = self._meta_contexts(NBD_OPT_SET_META_CONTEXT, name, queries)
        self.contexts = dict(replies)
        check(len(self.contexts) == len(replies), f"a context id twice: {replies}")
        return self.contexts

    def negotiate(self, name="", structured=False, contexts=(), no_zeroes=True,
                  how="go", oldstyle=False):
        """The whole handshake; how is "go" or "export_name"; structured may be EXTENDED."""
        if oldstyle:
            self.oldstyle_greeting()
            return self
        self.greeting()
        self.client_flags(NBD_FLAG_C_FIXED_NEWSTYLE
                          | (NBD_FLAG_C_NO_ZEROES if no_zeroes else 0))
        if structured == EXTENDED:
            self.extended_headers()
        elif structured or contexts:
            self.structured_reply()
        if contexts:
            self.set_meta_context(name, contexts)
        self.go(name) if how == "go" else self.export_name(name)
        return self


class Client(Handshake):
    """A client of one export, its replies parsed and checked."""

    def __init__(self, address, timeout=DEADLINE, rcvbuf=None):
        super().__init__(address, timeout, rcvbuf)
        self.pending = {}           # cookie: Reply under construction
        self.finished = {}          # cookie: Reply nobody has asked for yet
        self.next_cookie = 0x1122334455667788

    def request(self, command, offset=0, length=0, flags=0, payload=b"",
                cookie=None):
        """Sends a request and returns its cookie without waiting.  WRITE's
        length is that of its payload, unless a length is given."""
        if command == NBD_CMD_WRITE and not length:
            length = len(payload)
        if cookie is None:
            cookie = self.next_cookie
            self.next_cookie = (cookie + 1) % U64
        self.expect(cookie, Request(command, offset, length, flags))
        header = self.header(command, offset, length, flags, cookie)
        self.send(header + payload if len(payload) < 65536 else header)
        if len(payload) >= 65536:
            self.send(payload)
        return cookie

    def header(self, command, offset=0, length=0, flags=0, cookie=0):
        """A request's header, as was negotiated; a WRITE has PAYLOAD_LEN where it must."""
        if not self.extended:
            return request_header(command, offset, length, flags, cookie)
        if command == NBD_CMD_WRITE:
            flags |= NBD_CMD_FLAG_PAYLOAD_LEN
        return extended_header(command, offset, length, flags, cookie)

    def expect(self, cookie, request):
        """Says that a reply with that cookie may come."""
        if request.command != NBD_CMD_DISC:
            assert cookie not in self.pending, "the test reuses a cookie"
            self.pending[cookie] = Reply(cookie, request)

    def collect(self, cookie=None):
        """The Reply with that cookie, or the next one if None."""
        if cookie is None:
            return self.finished.popitem()[1] if self.finished else self._next_reply()
        while cookie not in self.finished:
            reply = self._next_reply()
            self.finished[reply.cookie] = reply
        return self.finished.pop(cookie)

    def _next_reply(self):
        """Reads messages until one of them completes a reply."""
        while True:
            reply = self._read_message()
            if reply.done:
                del self.pending[reply.cookie]
                return reply

    def collect_all(self):
        """{cookie: Reply} for everything that was sent."""
        while self.pending:
            reply = self._next_reply()
            self.finished[reply.cookie] = reply
        replies, self.finished = self.finished, {}
        return replies

    def call(self, command, offset=0, length=0, flags=0, payload=b""):
        """One request and its Reply, which may be an error."""
        return self.collect(self.request(command, offset, length, flags, payload))

    def error_of(self, *args, **kw):
        """One request; the error of its reply, 0 for success."""
        return self.call(*args, **kw).error

    def _done(self, *args, **kw):
        reply = self.call(*args, **kw)
        if reply.error:
            raise NbdError(reply, reply.request)
        return reply

    def pread(self, length, offset=0, flags=0):
        return self._done(NBD_CMD_READ, offset, length, flags).data

    def pwrite(self, data, offset=0, flags=0):
        self._done(NBD_CMD_WRITE, offset, 0, flags, data)

    def flush(self, flags=0):
        self._done(NBD_CMD_FLUSH, flags=flags)

    def trim(self, length, offset=0, flags=0):
        self._done(NBD_CMD_TRIM, offset, length, flags)

    def zero(self, length, offset=0, flags=0):
        self._done(NBD_CMD_WRITE_ZEROES, offset, length, flags)

    def cache(self, length, offset=0, flags=0):
        self._done(NBD_CMD_CACHE, offset, length, flags)

    def block_status(self, length, offset=0, flags=0):
        """{context name: [(length, status)]}"""
        reply = self._done(NBD_CMD_BLOCK_STATUS, offset, length, flags)
        return {self.contexts[i]: extents for i, extents in reply.extents.items()}

    def disc(self):
        """Says goodbye; the server must close and say nothing."""
        self.request(NBD_CMD_DISC)
        self.expect_closed()

    # Replies

    def _read_message(self):
        """Reads one simple reply or one chunk; returns its Reply."""
        magic, = self.unpack(">I")
        if self.extended:
            check(magic == NBD_EXTENDED_REPLY_MAGIC, f"reply magic {magic:#x}")
            flags, kind, cookie, offset, length = self.unpack(">HHQQQ")
            reply = self._reply(cookie)
            check(offset == reply.request.offset, f"{reply}: of offset {offset}")
            return self._chunk(flags, kind, cookie, length)
        if magic == NBD_SIMPLE_REPLY_MAGIC:
            return self._simple(*self.unpack(">IQ"))
        check(magic == NBD_STRUCTURED_REPLY_MAGIC, f"reply magic {magic:#x}")
        return self._chunk(*self.unpack(">HHQI"))

    def _reply(self, cookie):
        check(cookie in self.pending, f"reply with an unknown cookie {cookie:#x}")
        return self.pending[cookie]

    def _simple(self, error, cookie):
        reply = self._reply(cookie)
        request = reply.request
        check(not reply.chunks, f"{reply}: simple reply after chunks")
        check(not (self.structured and request.command == NBD_CMD_READ),
              f"{reply}: simple reply though structured replies were negotiated")
        check(error or request.command != NBD_CMD_BLOCK_STATUS,
              f"{reply}: BLOCK_STATUS succeeds without chunks")
        if error:
            self._error(reply, error)
        elif request.command == NBD_CMD_READ:
            reply.data = self.recv(request.length)
        reply.done = True
        return reply

    @staticmethod
    def _error(reply, error):
        request = reply.request
        check(error in ERRORS, f"{reply}: error {error} is not in the protocol")
        check(error != NBD_ENOTSUP or request.flags & NBD_CMD_FLAG_FAST_ZERO,
              f"{reply}: ENOTSUP without FAST_ZERO")
        check(error != NBD_EOVERFLOW or request.command != NBD_CMD_WRITE,
              f"{reply}: EOVERFLOW for a WRITE")
        reply.error = reply.error or error

    def _chunk(self, flags, kind, cookie, length):
        check(self.structured, "structured reply that was not negotiated")
        reply = self._reply(cookie)
        parsers = {NBD_REPLY_TYPE_NONE: self._chunk_none,
                   NBD_REPLY_TYPE_OFFSET_DATA: self._chunk_data,
                   NBD_REPLY_TYPE_OFFSET_HOLE: self._chunk_hole,
                   (NBD_REPLY_TYPE_BLOCK_STATUS_EXT if self.extended else
                    NBD_REPLY_TYPE_BLOCK_STATUS): self._chunk_block_status,
                   NBD_REPLY_TYPE_ERROR: self._chunk_error,
                   NBD_REPLY_TYPE_ERROR_OFFSET: self._chunk_error}
        check(kind in parsers, f"{reply}: chunk type {kind}")
        check(not flags & ~NBD_REPLY_FLAG_DONE, f"{reply}: chunk flags {flags:#x}")
        reply.done = bool(flags & NBD_REPLY_FLAG_DONE)
        check(kind != NBD_REPLY_TYPE_NONE or reply.done, f"{reply}: NONE without DONE")
        parsers[kind](reply, kind, length)
        if reply.done:
            self._check_complete(reply)
        return reply

    def _chunk_none(self, reply, kind, length):
        check(length == 0, f"{reply}: NONE of {length} bytes")
        reply.chunks.append((kind, None, 0))

    def _content(self, reply, kind, offset, length):
        """Checks the range of a piece of a READ; returns where it goes."""
        request = reply.request
        check(request.command == NBD_CMD_READ, f"{reply}: content")
        check(length > 0, f"{reply}: empty content chunk")
        check(request.offset <= offset
              and offset + length <= request.offset + request.length,
              f"{reply}: chunk {offset}+{length} outside the request")
        for _, other, size in reply.chunks:
            check(other is None or not size or other + size <= offset
                  or offset + length <= other,
                  f"{reply}: chunk {offset}+{length} overlaps {other}+{size}")
        reply.chunks.append((kind, offset, length))
        if reply.data is None:
            reply.data = bytearray(request.length)
        return offset - request.offset

    def _chunk_data(self, reply, kind, length):
        check(length > 8, f"{reply}: OFFSET_DATA of {length} bytes")
        offset, = self.unpack(">Q")
        at = self._content(reply, kind, offset, length - 8)
        reply.data[at:at + length - 8] = self.recv(length - 8)

    def _chunk_hole(self, reply, kind, length):
        check(length == 12, f"{reply}: OFFSET_HOLE of {length} bytes")
        offset, size = self.unpack(">QI")
        self._content(reply, kind, offset, size)

    def _chunk_error(self, reply, kind, length):
        tail = 8 if kind == NBD_REPLY_TYPE_ERROR_OFFSET else 0
        check(6 + tail <= length <= 6 + tail + STRING_MAX,
              f"{reply}: error chunk of {length} bytes")
        error, size = self.unpack(">IH")
        check(size == length - 6 - tail, f"{reply}: message of {size} bytes")
        reply.message = self.recv(size).decode()
        check(error, f"{reply}: error chunk without error")
        self._error(reply, error)
        offset = self.unpack(">Q")[0] if tail else None
        request = reply.request
        check(offset is None or 0 <= offset - request.offset < request.length,
              f"{reply}: error at {offset}")
        reply.chunks.append((kind, offset, 0))

    def _chunk_block_status(self, reply, kind, length):
        request = reply.request
        check(request.command == NBD_CMD_BLOCK_STATUS, f"{reply}: extents")
        head, size, word = (8, 16, "Q") if self.extended else (4, 8, "I")
        count = (length - head) // size
        check(count >= 1 and length == head + count * size, f"{reply}: extents of {length} bytes")
        context, told = self.unpack(">II") if self.extended else (*self.unpack(">I"), 0)
        check(told in (0, count), f"{reply}: {told} extents, not {count}")
        words = self.unpack(f">{2 * count}{word}")
        check(context in self.contexts, f"{reply}: context {context} not selected")
        check(context not in reply.extents, f"{reply}: context {context} twice")
        extents = list(zip(words[::2], words[1::2]))
        self._check_extents(reply, extents)
        reply.extents[context] = extents
        reply.chunks.append((kind, None, length))

    def _check_extents(self, reply, extents):
        """proto.md, "NBD_REPLY_TYPE_BLOCK_STATUS"."""
        request = reply.request
        sizes = [size for size, _ in extents]
        check(all(sizes), f"{reply}: extent of length 0: {extents}")
        check(sum(sizes[:-1]) < request.length,
              f"{reply}: extents behind the request: {extents}")
        check(request.offset + sum(sizes) <= self.size,
              f"{reply}: extents behind the export: {extents}")
        if request.flags & NBD_CMD_FLAG_REQ_ONE:
            check(len(extents) == 1 and sizes[0] <= request.length,
                  f"{reply}: REQ_ONE: {extents}")

    def _check_complete(self, reply):
        """What only the last chunk of a reply shows."""
        request = reply.request
        if request.command == NBD_CMD_READ:
            self._check_read(reply)
        elif request.command == NBD_CMD_BLOCK_STATUS and not reply.error:
            check(set(reply.extents) == set(self.contexts),
                  f"{reply}: contexts {set(reply.extents)}")

    @staticmethod
    def _check_read(reply):
        request = reply.request
        content = [c for c in reply.chunks if c[0] in (NBD_REPLY_TYPE_OFFSET_DATA,
                                                       NBD_REPLY_TYPE_OFFSET_HOLE)]
        if request.flags & NBD_CMD_FLAG_DF:
            check(len(content) <= 1, f"{reply}: DF but {len(content)} chunks")
        if reply.error:
            reply.data = None
            return
        check(sum(size for _, _, size in content) == request.length,
              f"{reply}: chunks do not cover the request")
        reply.data = bytes(reply.data or b"")
