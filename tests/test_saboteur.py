"""A saboteur on the line: it cuts, resets, stalls, delays or spoils at one exact byte.

Between a client and the server, and between a proxy and its origin, on either way, at
every byte of a short session.  saboteur.py has the relay that does it, and what the bytes that
passed must mean to the server.

NBD has no checksums.  So a changed byte of a payload is stored, or served, as it came; a
changed byte of a header is an error, the end of the connection, or what the header says now.
Nothing else may change, nobody else may notice, and what was acknowledged is there.

make check cuts and resets at every byte, and does the rest at some.  XNBD_SABOTAGE=all does all
of it at every byte, in all modes.
"""

import contextlib
import os
import socket
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import Server, is_portable
from nbd import *
from origin import Origin
from saboteur import *

ALL = os.environ.get("XNBD_SABOTAGE") == "all"
ALLOCATION = "base:allocation"
hazard = pytest.mark.hazard
limit = pytest.mark.limit(3600 if ALL or SANITIZED else 300)


def every(n, of):
    """A step for range(): `n`, or 1 if everything is wanted."""
    return range(0, of, 1 if ALL else n)


def in_parallel(cases, work, threads):
    """work(case) for each; fails with the failures, or the first of them."""
    def attempt(case):
        try:
            work(case)
        except Exception:
            return f"{case}: {traceback.format_exc()}"

    with ThreadPoolExecutor(threads) as pool:
        failures = [failure for failure in pool.map(attempt, cases) if failure]
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:5])


# Between a client and the server

REGION = 3 * BLOCK              # for one session each, in turns
REGIONS = 64
HOLE_AT, HOLE = REGIONS * REGION, 65536
SIZE = HOLE_AT + HOLE
CONTENT = pattern(0, HOLE_AT) + bytes(HOLE)
WORKERS = 4


ANSWERED = "a request was answered"


class Step:
    """Something that a client sends, and how it waits for the answer."""

    def __init__(self, data, wait):
        self.data, self.wait = data, wait


def option_step(number, data=b"", then=lambda c, replies: None):
    return Step(option_header(number, len(data)) + data,
                lambda c: then(c, c.option_replies(number)))


def request_step(cookie, command, offset=0, length=0, flags=0, payload=b""):
    length = length or len(payload)

    def wait(c):
        c.expect(cookie, Request(command, offset, length, flags))
        c.collect(cookie)
        return ANSWERED

    return Step(request_header(command, offset, length, flags, cookie) + payload, wait)


def say_structured(c, replies):
    c.structured = True


def note_contexts(c, replies):
    c.contexts = dict(reply.context for reply in replies)


def note_size(c, replies):
    c.size = Info(replies).size


def export_named(c):
    c.size, c.flags = c.unpack(">QH")


def greeted(flags=NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
    return Step(struct.pack(">I", flags), lambda c: c.greeting())


def farewell():
    return Step(request_header(NBD_CMD_DISC), lambda c: c.recv_until_closed())


def structured_session(region, seed):
    """Handshake with GO; a hole, extents, a write over the end of a block, what it wrote."""
    place = region + BLOCK - 8
    return [
        greeted(),
        option_step(NBD_OPT_STRUCTURED_REPLY, then=say_structured),
        option_step(NBD_OPT_SET_META_CONTEXT, meta_data("", [ALLOCATION]), note_contexts),
        option_step(NBD_OPT_GO, info_data("", [NBD_INFO_BLOCK_SIZE]), note_size),
        request_step(0x4101, NBD_CMD_READ, region + 100, 16),
        request_step(0x4202, NBD_CMD_READ, HOLE_AT, 200),      # zeros, which are sent as data
        request_step(0x4303, NBD_CMD_BLOCK_STATUS, HOLE_AT - BLOCK, 2 * BLOCK),
        request_step(0x4404, NBD_CMD_WRITE, place, payload=pattern(place, 16, seed)),
        request_step(0x4505, NBD_CMD_FLUSH),
        request_step(0x4606, NBD_CMD_READ, place - 8, 32),
        farewell(),
    ]


def simple_session(region, seed):
    """EXPORT_NAME and simple replies; FUA, zeroing."""
    place = region + BLOCK - 8
    return [
        greeted(),
        Step(option_header(NBD_OPT_EXPORT_NAME, 2) + b"ab", export_named),
        request_step(0x5101, NBD_CMD_READ, region + 100, 16),
        request_step(0x5202, NBD_CMD_WRITE, place, flags=NBD_CMD_FLAG_FUA,
                     payload=pattern(place, 16, seed)),
        request_step(0x5303, NBD_CMD_WRITE_ZEROES, region + 2 * BLOCK, 100),
        request_step(0x5404, NBD_CMD_READ, place - 8, 32),
        farewell(),
    ]


SESSIONS = {"structured": structured_session, "simple": simple_session}
sessions = pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS)


def bytes_of(steps):
    return b"".join(step.data for step in steps)


def drive(address, steps, blind_from=None):
    """A client that waits for each answer; from that byte on it no more waits, since what it
    sends is spoilt.  Returns how many requests were answered."""
    count = [0]
    try:
        with Client(address) as c:
            follow(c, steps, blind_from, count)
    except ConnectionError:             # Closed, too
        pass
    return count[0]


def follow(c, steps, blind_from, count):
    sent = 0
    for i, step in enumerate(steps):
        sent += len(step.data)
        if blind_from is not None and sent > blind_from:
            c.send(bytes_of(steps[i:]))
            c.shutdown_write()
            c.recv_until_closed()
            break
        c.send(step.data)
        count[0] += step.wait(c) is ANSWERED


# What the server made of it

def read_options(story, heard):
    """The answers to the options."""
    heard.greeting()
    for number, outcome in story.options:
        if outcome == "close":
            break
        if number == NBD_OPT_EXPORT_NAME:
            heard.no_zeroes = story.no_zeroes
            heard.size, _ = heard.unpack(">QH")
            assert heard.size == story.size
            heard.no_zeroes or heard.recv(124)
            continue
        try:
            replies = heard.option_replies(number)
        except OptionError as e:
            assert outcome == "error", f"option {number} was refused: {e}"
            continue
        assert outcome == "ok", f"option {number} was not refused"
        if number == NBD_OPT_GO:
            assert Info(replies).size == story.size
        elif number == NBD_OPT_SET_META_CONTEXT:
            heard.contexts = dict(reply.context for reply in replies)
        elif number == NBD_OPT_STRUCTURED_REPLY:
            heard.structured = True


def read_answers(story, said, torn):
    """[Reply], in the order of the operations; those that did not come are not done.  torn:
    the relay may not have taken all that a portable build said, which sends it at once."""
    heard = Replay(said, size=story.size)
    replies = []
    try:
        read_options(story, heard)
        if story.transmits:
            replies = [heard.owe(op.cookie, op.request) for op in story.operations]
            heard.size = story.size
            heard.read_replies()
    except Closed:
        whole = not heard.left or torn and is_portable()
        assert whole or story.fate == "lost", "the last message is not whole"
    assert replies or heard.left <= 20, f"{heard.left} bytes after the handshake"
    return replies or [Reply(op.cookie, op.request) for op in story.operations]


def check_answer(blocks, reply, also=()):
    """Data and extents are those of the disk."""
    request, wrong = reply.request, None
    if request.command == NBD_CMD_READ:
        wrong = blocks.check(reply.data, request.offset, also)
    elif request.command == NBD_CMD_BLOCK_STATUS:
        at = request.offset
        for size, status in next(iter(reply.extents.values())):
            if status & NBD_STATE_ZERO:
                wrong = wrong or blocks.check(bytes(size), at, also)
            at += size
    assert not wrong, f"{reply}: {wrong}"


def judge(blocks, passage, answered, torn):
    """What passed on that connection is a possible story, and what the disk may be now.
    answered: so many requests were answered before the next one was sent."""
    story = Story(passage.given[UP], SIZE)
    if story.is_ambiguous:
        blocks.apply([], story.operations)
        return story
    replies = read_answers(story, passage.taken[DOWN], torn)
    pairs = list(zip(story.operations, replies))
    for op, reply in pairs:
        assert not reply.done or reply.error in op.errors, f"{op}: {reply}"
        assert reply.done or torn or story.fate == "lost", f"{op}: no reply"
    for op, reply in pairs[:answered]:
        assert reply.done, f"{op}: the client got a reply that was not sent"
        if not reply.error:
            check_answer(blocks, reply)
            blocks.apply([op], [])
    rest = pairs[answered:]
    done = [op for op, reply in rest if reply.done and not reply.error]
    may = [op for op, reply in rest if not reply.done]
    for op, reply in rest:
        if reply.done and not reply.error:
            check_answer(blocks, reply, done + may)
    blocks.apply(done, may)
    return story


class Ground:
    """A server, a relay before it, and what may be on its disk."""

    def __init__(self, server, content, thrifty):
        self.server, self.relay = server, Relay(server.address)
        self.blocks, self.turn = Blocks(content), 0
        self.thrifty = thrifty      # a proxy, which is to have something left to fetch

    @property
    def region(self):
        return self.turn % (REGIONS - 1) * REGION

    def steps(self, session):
        self.turn += 1
        return session(self.region, self.turn % 255 + 1)

    def clean(self, session):
        """A session without damage; returns how many bytes go each way.  What all sessions
        use is made the same in all modes: a hole, and a block that is held."""
        before = len(self.relay.passages)
        with Client(self.server.address) as c:
            c.negotiate().zero(HOLE, HOLE_AT)
            c.pread(BLOCK, HOLE_AT - BLOCK)
        steps = self.steps(session)
        answered = drive(self.relay.address, steps)
        passage = self.ended(before)
        judge(self.blocks, passage, answered, False)
        self.verify()
        assert passage.taken[UP] == passage.given[UP] == bytes_of(steps)
        return {way: len(passage.taken[way]) for way in (UP, DOWN)}

    def ended(self, number):
        passage = self.relay.next_passage(number)
        assert passage.over.wait(DEADLINE), f"{passage} does not end"
        return passage

    def attempt(self, session, damage):
        """A session that the damage concerns, and the disk afterwards."""
        before, steps = len(self.relay.passages), self.steps(session)
        self.relay.damages.append(damage)
        spoilt = damage.how in ("flip", "lose", "double")
        answered = drive(self.relay.address, steps, damage.after if spoilt else None)
        passage = self.ended(before)
        assert passage.struck.is_set(), f"{damage} did not happen"
        # Who is reset may not know all that it was sent before.
        story = judge(self.blocks, passage, answered, damage.how in ("cut", "reset"))
        if damage.how == "delay":
            assert story.fate == "left" and passage.given[UP] == bytes_of(steps)
        self.verify()

    def stall(self, session, damage):
        """The session stands still while others work, and goes on then."""
        before, steps = len(self.relay.passages), self.steps(session)
        self.relay.damages.append(damage)
        with ThreadPoolExecutor(1) as pool:
            driven = pool.submit(drive, self.relay.address, steps)
            passage = self.relay.next_passage(before)
            assert passage.struck.wait(DEADLINE), f"{damage} did not happen"
            assert self.server.is_served()
            passage.resume()
            answered = driven.result()
        assert judge(self.blocks, self.ended(before), answered, False).fate == "left"
        assert passage.given[UP] == bytes_of(steps)
        self.verify()

    def verify(self, offset=0, length=SIZE):
        """The next client is served, and finds what may be there.  A write that was not
        answered may be under way still."""
        if self.thrifty and length == SIZE:
            offset, length = self.region, REGION
        with Client(self.server.address) as c:
            c.negotiate(structured=self.turn % 2)
            until(lambda: not self.blocks.check(c.pread(length, offset), offset),
                  what="the right disk")
            c.disc()

    def end(self):
        self.thrifty = False
        self.verify()
        self.server.stop()


def make_target(server, ram, number):
    image = ram / f"image{number}"
    image.write_bytes(b"")
    os.truncate(image, SIZE)
    with open(image, "r+b") as f:
        f.write(CONTENT[:HOLE_AT])
    return server(image)


def make_cow(server, ram, number):
    base = ram / f"base{number}"
    base.write_bytes(CONTENT[:HOLE_AT])
    os.truncate(base, SIZE)
    return server(args=["--cow-target", "--laddr", "127.0.0.1", "--lport", "0", base])


def make_proxy(server, ram, number, origin):
    files = [ram / f"{name}{number}" for name in ("cache", "bitmap", "control")]
    return server(args=["--proxy", "--laddr", "127.0.0.1", "--lport", "0", *origin.arguments,
                        *files])


@pytest.fixture
def grounds(request, server, ram):
    """grounds(mode): so many servers of that mode as there are workers."""
    relays, origins = [], []

    def make(mode):
        made = []
        for number in range(WORKERS):
            if mode == "proxy":
                origins.append(Origin({0: CONTENT[:HOLE_AT]}, SIZE).start())
                s = make_proxy(server, ram, number, origins[-1])
            else:
                s = {"target": make_target, "cow": make_cow}[mode](server, ram, number)
            made.append(Ground(s, CONTENT, mode == "proxy"))
            relays.append(made[-1].relay.__enter__())
        return made

    yield make
    for relay in relays:
        relay.__exit__()
    for origin in origins:
        origin.stop()
        origin.check()


def lengths_of(grounds, session):
    """How many bytes go each way in that session; the same for all of them."""
    lengths = [ground.clean(session) for ground in grounds]
    assert all(one == lengths[0] for one in lengths), lengths
    return lengths[0]


def share(grounds, work, cases):
    """work(ground, case) for all cases, a worker for each ground."""
    cases = list(cases)
    count = len(grounds)

    def run(number):
        for case in cases[number::count]:
            try:
                work(grounds[number], case)
            except Exception as e:
                raise AssertionError(f"at {case}") from e

    in_parallel(range(count), run, count)
    for ground in grounds:
        ground.end()


MODES = ["target", "cow", "proxy"]
STEP = {"target": 1, "cow": 3, "proxy": 3}      # every so many bytes, in make check
modes = pytest.mark.parametrize("mode", MODES)


@limit
@hazard("handshake cut off at every byte; reset instead of close")
@hazard("client dies within a payload")
@sessions
@modes
@pytest.mark.parametrize("how", ["cut", "reset"])
def test_line_that_breaks_at_any_byte_costs_one_connection(grounds, mode, session, how):
    """Of the requests and of the replies.  What was answered is there, of what was not
    each block is old or new: before DISC all is carried out; without one the client is gone, and
    what has not begun is dropped, and a reply that is on its way."""
    made = grounds(mode)
    lengths = lengths_of(made, session)
    share(made, lambda g, damage: g.attempt(session, damage), [
        Damage(way, how, n) for way in (UP, DOWN) for n in every(STEP[mode], lengths[way] + 1)])


@limit
@sessions
@modes
@pytest.mark.parametrize("how", ["stall", "delay"])
def test_line_that_stands_still_at_any_byte_disturbs_nobody(grounds, mode, session, how):
    """And the session goes on where it was."""
    made = grounds(mode)
    lengths = lengths_of(made, session)
    work = Ground.stall if how == "stall" else Ground.attempt
    share(made, lambda g, damage: work(g, session, damage), [
        Damage(way, how, n, 2) for way in (UP, DOWN)
        for n in every(5 * STEP[mode], lengths[way] + 1)])


def spoilers(length, mode):
    """Damages of what a client sends: each byte changed somehow, lost, and sent again, alone,
    with what was before it, and with all of a header."""
    masks = [1 << bit for bit in range(8)] + [0xff]
    for n in range(length):
        for i, mask in enumerate(masks):
            if ALL or (n + i) % (3 * STEP[mode]) == 0:
                yield Damage(UP, "flip", n, mask)
    for n in every(2 * STEP[mode], length):
        yield Damage(UP, "lose", n)
    for n in every(2 * STEP[mode], length):
        for size in (1, 4, 28):
            if size <= n:
                yield Damage(UP, "double", n, size)


@limit
@hazard("transmission bytes among options; refused WRITE whose payload is not drained")
@sessions
@modes
def test_spoilt_byte_does_what_it_says_and_nothing_else(grounds, mode, session):
    """What the server makes of the bytes is what Story makes of them."""
    made = grounds(mode)
    lengths = lengths_of(made, session)
    share(made, lambda g, damage: g.attempt(session, damage), spoilers(lengths[UP], mode))


# Between a proxy and its origin

CONTEXT = 0x2a2a                # the number that origin.py has for base:allocation
DISK = BLOCK + 100              # a hole, and a short block of data
TRUE = bytes(BLOCK) + pattern(BLOCK, 100)
WRITTEN_AT, WRITTEN = BLOCK + 40, b"written"
THREADS = 24                    # cases at once; most of their time they wait
PATIENCE = 3 if SANITIZED else 1        # seconds until a silent origin is given up


def with_write(content):
    return content[:WRITTEN_AT] + WRITTEN + content[WRITTEN_AT + len(WRITTEN):]


class Unlucky(Exception):
    """On a busy machine something took too long."""


class Line:
    """A proxy whose first or second link to the origin is damaged, and what its client finds.

    The session of a client: extents, a write into a block that has to be fetched, FLUSH, a read
    of everything.  In the handshake it is the second link that is damaged, after the first one
    was lost: a proxy does not start without a link.
    """

    def __init__(self, ram, kind, number, damage=None, handshake=None):
        self.kind, self.damage, self.handshake = kind, damage, handshake
        self.second = bool(damage) and damage.after <= handshake[damage.way]
        self.relay = Relay(kind.address)
        self.files = [ram / f"{name}{number}" for name in ("image", "bitmap", "control", "sock")]
        self.ram, self.number = ram, number
        self.errors = 0             # EIO that the client got

    @property
    def patience(self):
        """Seconds in which the origin has to answer: few where it will not."""
        torn = not self.damage or self.damage.how in ("cut", "reset", "delay")
        return DEADLINE if torn else PATIENCE

    def __enter__(self):
        self.relay.__enter__()
        if self.damage and not self.second:
            self.relay.damages.append(self.damage)
        image, bitmap, control, sock = self.files
        self.server = Server([
            "--proxy", "--unix", sock, "--origin-connections", "1",
            "--origin-timeout", self.patience, "127.0.0.1", self.relay.port,
            image, bitmap, control], self.ram, self.number, {})
        try:
            self._start()
        except BaseException:
            self.__exit__(True)
            raise
        return self

    def _start(self):
        try:
            self.server.wait_ready()
        except AssertionError as e:
            raise Unlucky if "no answer" in self.server.log() else e
        if self.damage and self.second:
            self.relay.damages.append(self.damage)
            self.relay.passages[0].drop()
            self.relay.next_passage(1)

    def __exit__(self, kind, *exception):
        if kind:
            self.server.kill()
        self.relay.__exit__()
        for path in (*self.files, self.server.stderr):
            path.unlink(missing_ok=True)

    @property
    def damaged(self):
        return self.relay.passages[self.second]

    def until_done(self, call, *args):
        """Repeats what gets EIO: the origin may have said so, but no error is for ever."""
        while True:
            try:
                return call(*args)
            except NbdError as e:
                assert e.errno == NBD_EIO, e
                self.errors += 1
                assert self.errors < 8, "EIO for ever"

    def session(self):
        """Returns the extents, and the disk's bytes."""
        with self.server.raw() as c:
            c.negotiate(structured=True, contexts=[ALLOCATION])
            assert c.size == DISK
            extents = self.until_done(c.block_status, DISK)[ALLOCATION]
            self.until_done(c.pwrite, WRITTEN, WRITTEN_AT)
            c.flush()
            return extents, self.until_done(c.pread, DISK)

    def ask(self):
        """The control socket answers, and says that all is here."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(self.files[2]))
            sock.sendall(b"query\n")
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile() as lines:
                said = lines.read().splitlines()
        assert said[-1] == "ok" and "cached-percent: 100.0" in said, said

    def stop(self, found):
        """It ends well, and what it served is what it has cached."""
        self.server.stop()
        image = self.files[0].read_bytes()
        assert image == found, "the cache image is not what was read"


class Credulous(Replay):
    """Ignores what may be ignored: extents behind the request; flags, errors and kinds of error
    chunks that nobody knows; an error in the form that was not negotiated."""

    def _check_extents(self, reply, extents):
        pass

    def _chunk(self, flags, kind, cookie, length):
        if kind < 1 << 15:
            return super()._chunk(flags & NBD_REPLY_FLAG_DONE, kind, cookie, length)
        reply = self._reply(cookie)
        check(length >= 6, f"{reply}: error chunk of {length} bytes")
        error, size = struct.unpack_from(">IH", self.recv(length))
        check(error and size <= length - 6, f"{reply}: error {error}, text of {size} bytes")
        self._error(reply, error)
        reply.done = bool(flags & NBD_REPLY_FLAG_DONE)
        return reply

    def _simple(self, error, cookie):
        if not error:
            return super()._simple(error, cookie)
        reply = self._reply(cookie)
        self._error(reply, error)
        reply.done = True
        return reply

    @staticmethod
    def _error(reply, error):
        reply.error = reply.error or error


CHUNK_HEADER = 20
READ_HEADER = request_header(NBD_CMD_READ)[:8]


def check_handshake(passage):
    """A link whose handshake makes no sense, or tells of another disk, is not used."""
    heard = Replay(passage.given[DOWN])
    try:
        heard.greeting()
        for number in (NBD_OPT_STRUCTURED_REPLY, NBD_OPT_SET_META_CONTEXT):
            with contextlib.suppress(OptionError):
                heard.option_replies(number)
        wrong = Info(heard.option_replies(NBD_OPT_GO)).size != DISK
    except (Violation, Closed, ValueError, OptionError):
        wrong = True
    assert not wrong or READ_HEADER not in passage.taken[UP], "it was used all the same"


def said_by_origin(line):
    """([Reply] that the damaged bytes make, as far as they make sense; what is wrong then)."""
    passage, wrong = line.damaged, None
    asked = bytes(passage.taken[UP][line.handshake[UP]:])
    heard = Credulous(passage.given[DOWN][line.handshake[DOWN]:], line.kind.structured,
                      {line.kind.context: ALLOCATION}, DISK)
    for at in range(0, len(asked) - 27, 28):
        _, flags, command, cookie, offset, length = struct.unpack_from(">IHHQQI", asked, at)
        if command != NBD_CMD_DISC:
            heard.owe(cookie, Request(command, offset, length, flags))
    try:
        heard.read_replies()
    except Closed:
        pass
    except ValueError:
        pass
    except Violation as e:          # which nobody sees before the whole header is there
        wrong = e if len(heard.data) - heard.start >= CHUNK_HEADER else None
    return [reply for reply in heard.owed if reply.done and not reply.error], wrong


def possible_blocks(replies):
    """For each block what it may be, by these replies."""
    possible = [{TRUE[:BLOCK]}, {TRUE[BLOCK:]}]
    for reply in replies:
        r = reply.request
        if r.command != NBD_CMD_READ:
            continue
        for i in range(2):
            a, b = max(r.offset, i * BLOCK), min(r.offset + r.length, DISK, (i + 1) * BLOCK)
            if b - a == len(TRUE[i * BLOCK:(i + 1) * BLOCK]):
                possible[i].add(bytes(reply.data[a - r.offset:b - r.offset]))
    return possible


def is_true(extents):
    """They name no data as zeros."""
    at = 0
    for size, status in extents:
        if status & NBD_STATE_ZERO and TRUE[at:at + size].strip(b"\0"):
            return False
        at += size
    return True


def check_found(line, extents, data):
    """What the client found is true, or is what damaged bytes say: never more.  A link that
    breaks the protocol is given up."""
    replies, wrong = said_by_origin(line)
    possible = possible_blocks(replies)
    assert any(data == with_write(a + b) for a in possible[0] for b in possible[1]), (
        f"wrong data: {[i for i in range(DISK) if data[i] != with_write(TRUE)[i]]}")
    lies = [reply for reply in replies
            if reply.extents and not is_true(reply.extents[line.kind.context])]
    assert lies or is_true(extents), f"extents {extents}"
    if not line.second:
        assert not wrong or line.damaged.over.wait(DEADLINE), f"it kept the link: {wrong}"
    elif line.kind.structured:
        check_handshake(line.damaged)


class Kind:
    """An origin, as a test has to know it."""

    def __init__(self, address, structured=True, context=CONTEXT, errors=False):
        self.address, self.structured, self.context = address, structured, context
        self.errors = errors        # whether damage may become an error that it tells


def length_of_line(ram, kind):
    """What a proxy and its origin say to each other: bytes of the handshake, and in all."""
    with Line(ram, kind, "clean") as line:
        handshake = {way: len(line.relay.passages[0].given[way]) for way in OTHER}
        extents, data = line.session()
        assert data == with_write(TRUE) and is_true(extents)
        passage, = line.relay.passages
        whole = {way: len(passage.given[way]) for way in OTHER}
        line.stop(data)
    return handshake, whole


def torn_lines(ram, kind, damages):
    """A proxy for each damage."""
    handshake, _ = length_of_line(ram, kind)
    in_parallel(list(enumerate(damages)),
                lambda case: torn_line(ram, kind, *case, handshake), THREADS)


def torn_line(ram, kind, number, damage, handshake):
    """Once more if the damage did not happen: a busy machine may keep the proxy from the link
    for so long that it is given up before."""
    for _ in range(10):
        happened = False
        with contextlib.suppress(Unlucky), Line(ram, kind, number, damage, handshake) as line:
            extents, data = line.session()
            happened = line.damaged.struck.wait(1)
            check_found(line, extents, data)
            assert kind.errors or not line.errors, f"{line.errors} errors"
            line.ask()
            if damage.how == "stall" and happened:
                line.damaged.resume()       # too late: what comes now is for nobody
                assert line.session()[1] == data
            line.stop(data)
        if happened:
            return
    raise AssertionError(f"{damage} did not happen")


@pytest.fixture
def origin():
    """origin(**options): a Kind, of an Origin with the disk; it checks what it is asked."""
    started = []

    def start(**options):
        started.append(Origin({BLOCK: TRUE[BLOCK:]}, DISK, chunk=40, **options).start())
        return Kind(started[-1].address, structured=options == {}, errors=options != {})

    yield start
    for one in started:
        one.stop()
        one.check()


styles = pytest.mark.parametrize("options", [
    {}, {"structured": False}, {"style": "no-go"}, {"style": "oldstyle"}],
    ids=["structured", "simple", "no-go", "oldstyle"])


def points(whole, options, n=1):
    """(way, byte): of the usual kind of origin every n-th, of others about a hundred."""
    steps = {way: n if options == {} else n + whole[way] // 50 for way in OTHER}
    return [(way, at) for way in OTHER for at in every(steps[way], whole[way])]


@limit
@hazard("origin closes at every byte")
@styles
@pytest.mark.parametrize("how", ["cut", "reset"])
def test_link_that_breaks_at_any_byte_is_made_anew(origin, ram, how, options):
    """Whether it broke for the proxy, or for the origin."""
    kind = origin(**options)
    _, whole = length_of_line(ram, kind)
    torn_lines(ram, kind, [Damage(way, how, n) for way, n in points(whole, options)])


@limit
@hazard("origin black-holed: it falls silent at every byte")
@styles
@pytest.mark.parametrize("how", ["stall", "delay"])
def test_link_that_falls_silent_at_any_byte_is_waited_for_or_made_anew(origin, ram, how, options):
    kind = origin(**options)
    _, whole = length_of_line(ram, kind)
    torn_lines(ram, kind, [Damage(way, how, n, 30) for way, n in points(whole, options, 7)])


def spoilers_of(length, way):
    """Damages of one way: each byte changed somehow, lost, and sent again, alone and with what
    was before it; of a long session about as many."""
    masks = [1 << bit for bit in range(8)] + [0xff]
    n = 1 + length // 500
    for at in every(n, length):
        for i, mask in enumerate(masks):
            if ALL or (at // n + i) % 9 == 0:
                yield Damage(way, "flip", at, mask)
    for at in every(5 * n, length):
        yield Damage(way, "lose", at)
        for size in (1, 20, 128):
            if size <= at:
                yield Damage(way, "double", at, size)


@limit
@hazard("origin sends: wrong magic, wrong cookie, a chunk outside the request")
@pytest.mark.parametrize("options", [{}, {"structured": False}, {"style": "oldstyle"}],
                         ids=["structured", "simple", "oldstyle"])
def test_spoilt_byte_of_an_origin_is_never_more_than_that(origin, ram, options):
    """A header that is wrong costs the link, or is the error that it says now; a byte of data
    is what came, and nothing else is."""
    kind = origin(**options)
    _, whole = length_of_line(ram, kind)
    torn_lines(ram, kind, spoilers_of(whole[DOWN], DOWN))


@limit
@hazard("replies matched in order of sending: an answer to a question that was not asked")
def test_spoilt_byte_on_the_way_to_an_origin_never_spoils_data(server, ram):
    """It answers another question, or refuses, or waits for more: the data is right."""
    image = ram / "origin"
    image.write_bytes(TRUE)
    kind = Kind(server(image, "--readonly").address, context=1, errors=True)
    _, whole = length_of_line(ram, kind)
    torn_lines(ram, kind, spoilers_of(whole[UP], UP))
    assert image.read_bytes() == TRUE
