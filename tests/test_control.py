"""The control socket of a proxy, and xnbd-bgctl.

Commands go through the program, or as lines through a socket.  What a server
says that no good one would, comes from a pretended one.
"""

import contextlib
import fcntl
import functools
import json
import os
import random
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest

from conftest import CRASH, SERVER, Server, need_holes, terminal
from nbd import *
from origin import Origin, failing
from test_service import Adopted, foster, read_pid

BGCTL = os.environ.get("XNBD_BGCTL", str(Path(SERVER).with_name("xnbd-bgctl")))
PAGE = Path(__file__).resolve().parent.parent / "man/xnbd-bgctl.1"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4096
BLOCKS = 65                     # the last one is ragged
SIZE = 64 * BLOCK + 77
CONTENT = pattern(0, SIZE)
LINE_MAX, CONNECTIONS = 8192, 16
hazard = pytest.mark.hazard

OPTIONS = {"query", "watch", "snapshot", "cache-all", "cache-all2", "switch", "shutdown", "reconnect", "json", "progress",
           "blocks-per-request", "force", "exportname", "help", "version"}
COMMANDS = ["help", "query", "snapshot", "cache-all", "cache-all2", "stop-copy", "switch", "reconnect"]
OF_A_PROXY = ["bitmap", "origin", "origin-export", "origin-link", "origin-reason", "origin-links",
              "block-size", "blocks", "cached-blocks", "cached-percent", "written-blocks",
              "fetched-bytes", "origin-requests", "copy", "copy-rate", "copy-failed-blocks",
              "copy-error"]
COUNTERS = ["reads", "writes", "flushes", "others", "read-bytes", "written-bytes", "errors",
            "max-us", "p50-us", "p99-us"]
STATE = ["mode", "image", "size", "readonly", "export", "uptime", "confined", "clients",
         "pending-requests", "pending-requests-limit", "buffer-bytes", "buffer-bytes-limit", *OF_A_PROXY, "snapshot",
         "snapshot-last", "snapshot-error", *COUNTERS, "delays-us", "client"]
SOMETIMES = {"export", "origin-reason", "copy-error", "snapshot-last", "snapshot-error"}
TEXTS = {"mode", "image", "bitmap", "origin", "origin-export", "origin-link",
         "origin-reason", "copy", "copy-error", "snapshot", "snapshot-last", "snapshot-error"}


# xnbd-bgctl

def start_bgctl(*arguments, **popen):
    return subprocess.Popen([BGCTL, *map(str, arguments)], **{
        "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
        "text": True, "errors": "replace", **popen})


def end_of(process, timeout=DEADLINE):
    """Of start_bgctl(), as a CompletedProcess."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert not CRASH.search(err or ""), err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def bgctl(*arguments, timeout=DEADLINE, **popen):
    return end_of(start_bgctl(*arguments, **popen), timeout)


def done(result, out=""):
    """It ended well and said nothing on stderr."""
    assert (result.returncode, result.stderr) == (0, ""), result
    assert out is None or result.stdout == out, result
    return result


def refused(result, status, *named):
    """It ended with that status, and its last line on stderr has the names."""
    assert result.returncode == status, result
    assert not result.stdout, result
    lines = result.stderr.splitlines()
    assert lines and all(line.startswith("xnbd-bgctl: ") for line in lines), result
    for name in named:
        assert str(name) in lines[-1], result
    return lines[:-1]


def refused_in_one_line(result, status, *named):
    assert not refused(result, status, *named), result


def state(control):
    """What --query says."""
    return json.loads(done(bgctl("--query", "--json", control), out=None).stdout)


def copy_ends(control, seconds=DEADLINE):
    """Until no copy runs: how it ended."""
    until(lambda: state(control)["copy"] != "running", seconds, "the end of the copy")
    return state(control)["copy"]


# The socket

class Control(Transport):
    """A connection to a control socket that speaks lines."""

    def __init__(self, path):
        super().__init__(path)
        self.input = self.sock.makefile("rb")

    def line(self):
        """The next line, None at the end."""
        try:
            line = self.input.readline()
        except ConnectionResetError:
            return None
        check(not line or line.endswith(b"\n"), f"half a line: {line!r}")
        return line[:-1].decode() if line else None

    def lines(self):
        """The lines of an answer, with "ok" or "error: ..." at its end."""
        found = []
        while not found or not (found[-1] == "ok" or found[-1].startswith("error: ")):
            line = self.line()
            check(line is not None, f"closed within an answer: {found}")
            found.append(line)
        return found

    def ask(self, command):
        self.send(command.encode() + b"\n")
        return self.lines()

    def values(self, command="query"):
        """{name: value} of an answer that ends well."""
        *lines, end = self.ask(command)
        assert end == "ok", end
        return dict(line.split(": ", 1) for line in lines)

    def object(self):
        """The JSON object that the server makes of its state."""
        *lines, end = self.ask("query json")
        assert end == "ok" and all(line.startswith("json: ") for line in lines), end
        return json.loads("\n".join(line[len("json: "):] for line in lines))

    def is_closed(self):
        return self.line() is None

    def close(self):
        self.input.close()
        super().close()


@pytest.fixture
def connect():
    """connect(control): a Control that is closed at the end."""
    with contextlib.ExitStack() as stack:
        def make(control):
            return stack.enter_context(contextlib.closing(Control(control)))

        yield make


# Proxies

@pytest.fixture
def origin():
    with Origin(CONTENT) as one:
        yield one


@pytest.fixture
def run_proxy(server, tmp_path):
    """run_proxy(origin, *options): a proxy, with its .control."""
    def start(origin, *options, image="cache", **keywords):
        files = [tmp_path / image, tmp_path / "map", tmp_path / "ctl"]
        s = server(args=["--proxy", "--unix", tmp_path / "nbd", *options, *origin.arguments,
                         *files], **keywords)
        s.image, s.bitmap, s.control = files
        return s

    return start


@pytest.fixture
def proxy(run_proxy, origin):
    return run_proxy(origin)


def is_served(control):
    """Somebody who asks is answered."""
    assert done(bgctl("--query", control), out=None).stdout.startswith("mode: ")
    return True


def is_answered_beside(s, blocks):
    """Others wait, for whatever; this client reads what is cached, and writes whole blocks."""
    with s.client(timeout=5) as c:
        for at in blocks:
            c.pread(4096, at)
            c.pwrite(pattern(at, 4096), at)
    return True


@hazard("requests that wait shut out those that need not")
@pytest.mark.parametrize("length", [64 * 1024, 1 << 20])
def test_reads_that_wait_for_the_origin_shut_nobody_out(run_proxy, length):
    """They hold no memory, however many there are."""
    with Origin(lambda at, length: pattern(at, length), size=256 << 20) as o:
        s = run_proxy(o, "--origin-timeout", "600")
        s.client().pread(4096, 255 << 20)
        o.freeze()
        waiting = [s.client() for _ in range(150)]
        for i, c in enumerate(waiting):
            c.request(NBD_CMD_READ, i << 20, length)
        until(lambda: state(s.control)["pending-requests"] == 150, what="all of them")
        assert state(s.control)["buffer-bytes"] == 0
        assert is_answered_beside(s, [255 << 20])
        o.thaw()
        for i, c in enumerate(waiting):
            assert [r.data for r in c.collect_all().values()] == [pattern(i << 20, length)]


@hazard("requests that wait shut out those that need not")
@pytest.mark.parametrize("length", [1 << 18, 32 << 20])
def test_clients_that_take_no_replies_shut_nobody_out(run_proxy, length):
    """Of what the origin has to bring; then of what is here, also after a switch."""
    with Origin(lambda at, length: pattern(at, length), size=64 << 20) as o:
        s = run_proxy(o)
        s.client().pread(4096, 63 << 20)
        paused = [s.client() for _ in range(120)]
        for c in paused:
            for i in range(4):
                c.request(NBD_CMD_READ, i * length % (32 << 20), length)
        assert is_answered_beside(s, [63 << 20, 62 << 20])
        s.settle()
        assert is_answered_beside(s, [61 << 20])
        done(bgctl("--cache-all", s.control), out=None)
        done(bgctl("--switch", s.control), out=None)
        assert is_answered_beside(s, [60 << 20])
        assert state(s.control)["buffer-bytes"] <= 64 << 20


@hazard("requests that wait shut out those that need not")
def test_writes_that_wait_for_the_origin_shut_nobody_out(run_proxy):
    """These do hold memory: more than may be, all together."""
    with Origin(lambda at, length: pattern(at, length), size=256 << 20) as o:
        s = run_proxy(o, "--origin-timeout", "600", "--max-buf-size", "64K")
        s.client().pread(4096, 255 << 20)
        o.freeze()
        waiting = [s.client() for _ in range(40)]
        for i, c in enumerate(waiting):
            c.request(NBD_CMD_WRITE, (i << 20) + 1, 64 * 1024, payload=bytes(64 * 1024))
        until(lambda: state(s.control)["pending-requests"] >= 40, what="all of them")
        assert is_answered_beside(s, [255 << 20])
        o.thaw()
        for c in waiting:
            assert not any(r.error for r in c.collect_all().values())


@hazard("requests that wait shut out those that need not")
def test_clients_that_take_no_replies_shut_nobody_out_of_a_full_disk(run_proxy):
    """What they asked for cannot be stored: each holds one piece of it."""
    with Origin(lambda at, length: pattern(at, length), size=256 << 20) as o:
        s = run_proxy(o)
        s.client().pread(4096, 0)
        resource.prlimit(s.proc.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        paused = [s.client() for _ in range(120)]
        for i, c in enumerate(paused):
            c.request(NBD_CMD_READ, (8 + i) << 20, 1 << 20)
        until(lambda: state(s.control)["buffer-bytes"] >= 100 << 18, what="a piece of most of them")
        with s.client(timeout=5) as c:
            for at in 0, 4096, 200 << 20, 201 << 20:
                assert c.pread(4096, at) == pattern(at, 4096)
            c.pwrite(pattern(0, 4096), 0)
        assert state(s.control)["buffer-bytes"] <= (3 << 20) + (121 << 18)


@hazard("a client floods the log")
def test_failure_to_cache_is_told_once_though_zeros_find_room(run_proxy):
    """They become holes, which a full disk has room for."""
    def content(at, length):
        return pattern(at, length) if at >> 20 & 1 else bytes(length)

    with Origin(content, size=64 << 20) as o:
        s = run_proxy(o)
        resource.prlimit(s.proc.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        with s.client() as c:
            for i in range(400):
                at = (1 + i % 60 << 20) + i * 4096
                assert c.pread(4096, at) == content(at, 4096)
            assert s.log().count("cannot cache what is read from the origin") == 1, s.log()
            resource.prlimit(s.proc.pid, resource.RLIMIT_FSIZE,
                             (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            time.sleep(1.1)         # without a failure
            c.pread(4096, 63 << 20)
            until(lambda: "is cached again" in s.log(), what="the end of it")


@pytest.mark.parametrize("port", ["0", "65536", "75845", "10809x", "http"])
def test_reconnect_needs_a_port(run_proxy, origin, port):
    s = run_proxy(origin)
    refused(bgctl("--reconnect", s.control, "127.0.0.1", port), 1, "PORT")
    assert s.client().pread(4096) == CONTENT[:4096]


# A pretended server

class Pretender:
    """Listens at path and answers a line with bytes, or by function(socket); "help" is answered first."""

    def __init__(self, path, answer):
        self.path, self.answer, self.lines = path, answer, []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                with sock, contextlib.suppress(OSError):
                    self._answer(sock)

    def _answer(self, sock):
        lines = sock.makefile("rb")
        line = lines.readline()
        if line == b"help\n":
            sock.sendall(b"command: help\nok\n")
            line = lines.readline()
        self.lines.append(line.decode(errors="surrogateescape"))
        if callable(self.answer):
            self.answer(sock)
        else:
            sock.sendall(self.answer)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class Silent(Pretender):
    """Greets with these bytes, if any, and says nothing else until it is left."""

    def _answer(self, sock):
        threading.Thread(target=self._keep, args=[sock.dup()], daemon=True).start()

    def _keep(self, sock):
        with sock, contextlib.suppress(OSError):
            sock.sendall(self.answer)
            while sock.recv(100):
                pass


@pytest.fixture
def pretend(tmp_path):
    """pretend(answer): a Pretender."""
    with contextlib.ExitStack() as stack:
        yield lambda answer: stack.enter_context(
            contextlib.closing(Pretender(tmp_path / "pretended", answer)))


# The command line

def test_help_tells_all_options():
    result = done(bgctl("--help"), out=None)
    assert set(re.findall(r"(?m)^  (?:-\w, |    )--([a-z0-9-]+)", result.stdout)) == OPTIONS
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


def test_version_is_the_servers(run_server):
    version = run_server("--version").stdout.split()[1]
    for option in "--version", "-V":
        done(bgctl(option), out=f"xnbd-bgctl {version}\n")
    assert bgctl("-h").stdout == bgctl("--help").stdout


USAGE_ERRORS = [
    # arguments, what the line must name
    ([], "--query"),
    (["ctl"], "--query"),
    (["--query"], "CONTROL_SOCKET"),
    (["--query", "ctl", "extra"], "extra"),
    (["--query", "--switch", "ctl"], "--switch"), (["-q", "-s", "ctl"], "--switch"), (["-qs", "ctl"], "--switch"),
    (["--query", "--query", "ctl"], "--query"),
    (["--switch", "--shutdown", "ctl"], "--shutdown"),
    (["--query", "--bogus", "ctl"], "--bogus"), (["--bogus", "-q", "ctl"], "--bogus"),
    (["--query", "-j", "ctl"], "-j"),
    (["--cache", "ctl"], "--cache"),
    (["--query=yes", "ctl"], "--query"),
    (["--query", "--json=1", "ctl"], "--json"),
    (["--query", "--progress", "ctl"], "--progress"),
    (["--query", "--force", "ctl"], "--force"),
    (["--switch", "--json", "ctl"], "--json"),
    (["--cache-all2", "--progress", "ctl"], "--progress"),
    (["--switch", "--blocks-per-request", "1", "ctl"], "--blocks-per-request"),
    (["--switch", "--exportname", "x", "ctl"], "--exportname"),
    (["--cache-all", "ctl", "--blocks-per-request"], "--blocks-per-request"),
    (["--watch"], "CONTROL_SOCKET"), (["--watch=0", "ctl"], "--watch"), (["--watch=", "ctl"], "--watch"),
    (["--watch=3601", "ctl"], "3601"), (["--watch", "x", "ctl"], "'x'"),
    (["--watch=1", "2", "ctl"], "ctl"), (["--watch", "--json", "ctl"], "--json"),
    (["--snapshot", "--force", "ctl"], "--force"), (["--snapshot", "ctl", "extra"], "extra"),
    (["--reconnect"], "CONTROL_SOCKET"),
    (["--reconnect", "ctl"], "HOST"),
    (["--reconnect", "ctl", "host"], "PORT"),
    (["--reconnect", "ctl", "host", "1", "extra"], "extra"),
    (["--reconnect", "ctl", "", "1"], "HOST"),
    (["--reconnect", "ctl", "host", ""], "PORT"),
    (["--reconnect", "ctl", "two words", "1"], "two words"),
    (["--reconnect", "ctl", "unix:two words"], "two words"),
    (["--reconnect", "ctl", "host", "1\nswitch force"], "PORT"),
    (["--reconnect", "--exportname", "x\nswitch force", "ctl", "host", "1"], "--exportname"),
    (["--reconnect", "--exportname", "x" * LINE_MAX, "ctl", "host", "1"], "too long"),
]
USAGE_ERRORS += [(["--cache-all", "--blocks-per-request", value, "ctl"], "--blocks-per-request")
                 for value in ["", "0", "-1", "x", "8193", "1K", "0x10", " 1", "1" * 30]]


@pytest.mark.parametrize("arguments, named", USAGE_ERRORS,
                         ids=lambda a: " ".join(a)[:40] if isinstance(a, list) else "")
def test_wrong_command_line_is_refused(arguments, named):
    refused_in_one_line(bgctl(*arguments), 2, named)


@pytest.mark.parametrize("arguments, line", [
    (["--query"], "query"), (["--q"], "query"), (["--query", "--js"], "query json"),
    (["--cache-all"], "cache-all"), (["--cache-all2"], "cache-all2"),
    (["--cache-all", "--blocks=7"], "cache-all 7"), (["--cache-all", "--bl", "7"], "cache-all 7"),
    (["--cache-all2", "--blocks-per-request", "8192"], "cache-all2 8192"),
    (["--switch"], "switch"), (["--force", "--switch"], "switch force"),
    (["--snapshot"], "snapshot"), (["--sn"], "snapshot"),
    (["--sw", "--f"], "switch force"), (["-q"], "query"), (["-c"], "cache-all"),
    (["-C", "--bl=7"], "cache-all2 7"), (["-s", "--force"], "switch force")], ids=lambda a: " ".join(a) if isinstance(a, list) else "")
@pytest.mark.parametrize("last", [True, False], ids=["before", "behind"])
def test_options_become_a_line(pretend, arguments, line, last):
    """Abbreviated, by letter or not, before the socket's path or behind it."""
    server = pretend(b"ok\n")
    result = bgctl(*([*arguments, server.path] if last else [server.path, *arguments]))
    done(result)
    assert server.lines == [line + "\n"]


@pytest.mark.parametrize("arguments, line", [
    (["host", "10809"], "host 10809"), (["::1", "1"], "::1 1"),
    (["--exportname", "disk", "host", "1"], "host 1 disk"),
    (["--exportname", "two words", "host", "1"], "host 1 two words"),
    (["--exportname", "", "host", "1"], "host 1 "),
    (["--exportname", "ärger", "host", "1"], "host 1 ärger"),
    (["unix:/a/b"], "unix:/a/b -"), (["unix:/a/b", "1"], "unix:/a/b -"),
    (["--exportname=x", "unix:/a/b"], "unix:/a/b - x"),
    (["unix:b"], "unix:{here}/b -")], ids=str)
def test_remote_becomes_a_line(pretend, tmp_path, arguments, line):
    """A path is told from the root: the server may have another directory."""
    server = pretend(b"ok\n")
    for command in "--reconnect", "-r":
        done(bgctl(command, server.path, *arguments, cwd=tmp_path))
        assert server.lines.pop() == "reconnect " + line.format(here=tmp_path) + "\n"


def test_old_name_of_switch_is_deprecated(pretend):
    server = pretend(b"ok\n")
    result = bgctl("--shutdown", server.path)
    assert (result.returncode, result.stdout) == (0, "")
    assert "--switch" in result.stderr and len(result.stderr.splitlines()) == 1
    assert server.lines == ["switch\n"]


@pytest.mark.parametrize("arguments", [["--watch=2"], ["--w=2"], ["--watch", "2"], ["--wa", "2"]],
                         ids=" ".join)
def test_watch_takes_seconds(pretend, arguments):
    """In both ways, before the socket.  The first line is that of a second."""
    server = pretend(b"ok\n")
    begun = time.monotonic()
    process = start_bgctl(*arguments, server.path)
    process.stdout.readline()
    assert time.monotonic() - begun >= 1
    process.stdout.readline()
    assert time.monotonic() - begun >= 3
    process.send_signal(signal.SIGINT)
    assert end_of(process).returncode == 0 and server.lines == 3 * ["query\n"]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_watch_can_be_left_before_the_first_answer(pretend, number, status):
    server = pretend(lambda sock: sock.recv(1))     # until bgctl has gone
    process = start_bgctl("--watch", server.path)
    until(lambda: server.lines, what="the first look")
    process.send_signal(number)
    assert end_of(process).returncode == status


# Servers that do not answer well

EACH = ["--query", "--cache-all", "--cache-all2", "--switch", "--reconnect", "--snapshot", "--watch"]


def arguments_of(command, control):
    return [command, control] + (["host", "1"] if command == "--reconnect" else [])


@pytest.mark.parametrize("what, reason", [
    ("nowhere", "No such file"), ("file", "no server"), ("stale", "no server"),
    ("x" * 200, "200 bytes"), ("", "no server"), ("file/ctl", "Not a directory")],
    ids=["nothing", "file", "stale", "long", "empty", "directory"])
def test_socket_without_server_is_named(tmp_path, what, reason):
    (tmp_path / "file").write_text("")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    refused_in_one_line(bgctl("--query", what, cwd=tmp_path), 1, what, reason)


@pytest.mark.parametrize("command", EACH)
@pytest.mark.parametrize("answer", [b"", b"o", b"ok", b"name: value\n", b"progress: 1 2 3\nfail"],
                         ids=repr)
def test_connection_that_is_closed_is_an_error(pretend, command, answer):
    server = pretend(answer)
    refused_in_one_line(bgctl(*arguments_of(command, server.path)), 1, server.path, "closed")


@pytest.mark.parametrize("command", EACH)
def test_error_is_told(pretend, command):
    server = pretend(b"error: because of: \xff\x1b[31m \xc2\x9b31m\n")
    refused_in_one_line(bgctl(*arguments_of(command, server.path)), 1,
                        "because of: \ufffd?[31m ??31m")


GARBAGE = [b"\n", b"hello\n", b"HTTP/1.1 400 Bad Request\r\n", b"\0\0: \n", b": x\n", b"ok \n",
           b"OK\n", b"ok\r\n", b"error\n", b"Name: value\n", b"name:value\n", b"\xff\xfe: 1\n",
           b"a b: c\n", b"name: value\n" * 2000 + b"x\n"]


@pytest.mark.parametrize("command", EACH)
@pytest.mark.parametrize("answer", GARBAGE, ids=lambda a: repr(a[:20]))
def test_garbage_is_an_error(pretend, command, answer):
    server = pretend(answer)
    refused_in_one_line(bgctl(*arguments_of(command, server.path)), 1, server.path)


@pytest.mark.parametrize("value", ["", "1", "1 2", "1 2 3 4", "x 2 3", "-1 2 3", "1  2 3", "1 2 3 ",
                                   "1.5 2 3", "0x1 2 3"])
def test_progress_that_is_none_is_an_error(pretend, value):
    server = pretend(f"progress: {value}\nok\n".encode())
    refused_in_one_line(bgctl("--cache-all", "--progress", server.path), 1, server.path)


@pytest.mark.parametrize("command", EACH)
@pytest.mark.parametrize("flood", [b"x" * 65536, b"name: value\n" * 5000, b"progress: 1 2 3\n"])
def test_endless_answer_does_no_harm(pretend, command, flood):
    """A line, and the lines of --query, have a bound; the others may last."""
    def answer(sock):
        with contextlib.suppress(OSError):
            for _ in range(40):
                sock.sendall(flood)

    server = pretend(answer)
    refused_in_one_line(bgctl(*arguments_of(command, server.path)), 1, server.path)


@pytest.mark.parametrize("command", EACH)
@pytest.mark.parametrize("options", [[], ["--oldstyle"]], ids=["newstyle", "oldstyle"])
def test_socket_for_clients_is_no_control_socket(server, disk, tmp_path, command, options):
    """At once, though an old server waits for more."""
    s = server(disk(SIZE), "--unix", tmp_path / "nbd", *options)
    refused_in_one_line(bgctl(*arguments_of(command, s.unix)), 1, f"{s.unix} is no control socket", "NBDMAGIC")


@pytest.mark.parametrize("command", EACH)
@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2", b"* OK IMAP4 ready\r\n", b"\0\0\0\x2a", b"{}", b"\x16\3\1",
                                      b"220 mail ESMTP\r\n", b"hello, what do you want?\n"], ids=repr)
def test_greeting_of_another_server_is_no_control_socket(tmp_path, command, greeting):
    with contextlib.closing(Silent(tmp_path / "other", greeting)) as server:
        refused_in_one_line(bgctl(*arguments_of(command, server.path)), 1, server.path,
                            "is no control socket")


def test_answer_in_single_bytes_is_understood(pretend):
    def answer(sock):
        for byte in b"mode: proxy\nsize: 5\nok\n":
            sock.sendall(bytes([byte]))

    done(bgctl("--query", pretend(answer).path), out="mode: proxy\nsize: 5\n")


def test_json_is_what_the_server_tells(pretend):
    """A line for each of its lines, blanks in front included."""
    server = pretend(b'json: {\njson:   "size": 5\njson: }\nok\n')
    done(bgctl("--query", "--json", server.path), out='{\n  "size": 5\n}\n')
    assert server.lines == ["query json\n"]


def test_query_of_many_clients_is_understood(pretend):
    """As many as --max-connections allows."""
    lines = "".join(f"client: 127.0.0.1:{n} reads 1 in-flight 0\n" for n in range(65536))
    done(bgctl("--query", pretend(f"{lines}ok\n".encode()).path), out=lines)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["lines", "json"])
def test_query_shows_all_or_nothing(pretend, options):
    server = pretend(b"mode: proxy\nsize: 5\n")
    refused_in_one_line(bgctl("--query", *options, server.path), 1, "closed")


def with_output(*arguments, output, program=BGCTL):
    """Run with a standard output that takes nothing: full, or closed."""
    close = f'exec "$0" "$@" >{"&-" if output == "closed" else "/dev/full"}'
    return bgctl("-c", close, program, *arguments, stdout=None, executable="/bin/sh")


outputs = pytest.mark.parametrize("output", ["closed", "full"])


@pytest.mark.hazard("the log in the image: an answer in a socket")
@outputs
@pytest.mark.parametrize("options", [["--query"], ["--query", "--json"], ["--watch"], ["--snapshot"]],
                         ids=" ".join)
def test_output_that_cannot_be_written_is_an_error(server, disk, tmp_path, options, output):
    """And the control socket does not become the output."""
    s = server(disk(SIZE), "--ctl", tmp_path / "ctl")
    result = with_output(*options, tmp_path / "ctl", output=output)
    assert result.returncode == 1, result
    assert result.stderr.startswith("xnbd-bgctl: cannot write to standard output: "), result
    assert result.stderr.count("\n") == 1
    assert s.is_served()


@outputs
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_cannot_be_written_is_an_error(option, output, program=BGCTL):
    result = with_output(option, output=output, program=program)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result
    assert "cannot write to standard output: " in result.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_of_the_server_that_cannot_be_written_is_an_error(option):
    test_help_that_cannot_be_written_is_an_error(option, "full", SERVER)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_command_without_output_needs_none(proxy, closed):
    """What it says on standard error does not go to the server."""
    result = bgctl("-c", f'exec "$0" "$@" {closed}', BGCTL, "--switch", "--force", proxy.control,
                   executable="/bin/sh")
    assert result.returncode == 0, result
    subset(state(proxy.control), mode="target")


def test_parts_that_failed_are_named(pretend):
    server = pretend(b"progress: 0 9 0\nfailed: 4096 8192\nfailed: 65536 77\nfailed-more: 12\n"
                     b"error: 5 blocks could not be copied\n")
    first, second, more = refused(bgctl("--cache-all", server.path), 1, "5 blocks")
    assert "8192 bytes" in first and "4096" in first.split("8192 bytes")[1]
    assert "77 bytes" in second and "65536" in second
    assert "12" in more


def test_zeroed_blocks_are_told(pretend):
    result = bgctl("--switch", "--force", pretend(b"zeroed: 17\nok\n").path)
    assert result.returncode == 0 and not result.stdout
    assert result.stderr.count("\n") == 1 and "17 blocks" in result.stderr


# Progress

def on_terminal(width, *arguments):
    """What xnbd-bgctl draws on a terminal of that width, and its status."""
    master, slave = terminal()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = start_bgctl(*arguments, stderr=slave, stdout=subprocess.DEVNULL)
    os.close(slave)
    drawn = b""
    with contextlib.suppress(OSError):          # Linux: EIO when the other end has gone
        while part := os.read(master, 65536):
            drawn += part
    os.close(master)
    return drawn.decode(), process.wait(DEADLINE)


def frames(drawn, width):
    """Each state of the line that is drawn over; none reaches the last column."""
    *bars, end = drawn.replace("\r\n", "\n").split("\r")[1:] or [""]
    room = (width or 80) - 1
    bars.append(end.rstrip("\n"))
    assert all(len(bar) <= room and "\n" not in bar for bar in bars), drawn
    return bars


PROGRESS = ["0 1000 0", "1 1000 4096", "500 1000 104857600", "999 1000 1", "1000 1000 0"]


def progress(*values):
    return "".join(f"progress: {value}\n" for value in values).encode()


@hazard("progress bar without a terminal, width 0")
@pytest.mark.parametrize("width", [0, 1, 2, 5, 9, 20, 40, 80, 300, 1000, 65535])
def test_bar_fits_the_terminal(pretend, width):
    server = pretend(progress(*PROGRESS) + b"ok\n")
    drawn, status = on_terminal(width, "--cache-all", "--progress", server.path)
    bars = frames(drawn, width)
    assert status == 0 and drawn.endswith("\n")
    assert width != 0 or all(bar.startswith("[") and len(bar) == 79 for bar in bars)
    if width == 0 or width >= 20:
        assert [re.search(r"\d+\.\d%", bar).group() for bar in bars] == [
            "0.0%", "0.1%", "50.0%", "99.9%", "100.0%"]


@pytest.mark.parametrize("width", [80, 300])
def test_bar_has_rate_and_time_left(pretend, width):
    server = pretend(progress("25600 102400 104857600") + b"ok\n")
    drawn, _ = on_terminal(width, "--cache-all", "--progress", server.path)
    bar, = frames(drawn, width)
    drawn_part, text = re.fullmatch(r"\[(=* *)\]  (25\.0%  100\.0 MiB/s  0:00:0[23] left) *",
                                    bar).groups()
    assert abs(drawn_part.count("=") / len(drawn_part) - 0.25) < 0.05
    assert len(bar) >= width - 2


EXTREMES = ["0 0 0", "0 1 0", "1 1 1", f"0 {2**64 - 1} 1", f"{2**64 - 2} {2**64 - 1} {2**64 - 1}",
            f"{2**64 - 1} 1 0", f"0 {2**52} 1"]


@pytest.mark.parametrize("width", [0, 1, 80])
@pytest.mark.parametrize("values", EXTREMES)
def test_bar_of_extreme_numbers_is_drawn(pretend, width, values):
    server = pretend(progress(values, values) + b"ok\n")
    drawn, status = on_terminal(width, "--cache-all", "--progress", server.path)
    assert status == 0
    cached, blocks, _ = map(int, values.split())
    if width == 80:
        assert all(("100.0%" in bar) == (cached >= blocks) for bar in frames(drawn, width))


@pytest.mark.parametrize("width", [1, 20, 80, 300])
def test_bar_tells_why_the_origin_is_down(pretend, width):
    """In place of rate and time, as long as it is down."""
    server = pretend(b"origin-reason: no answer for 15 s\n" + progress("250 1000 0") + progress("250 1000 1048576")
                     + b"ok\n")
    drawn, status = on_terminal(width, "--cache-all", "--progress", server.path)
    down, up = frames(drawn, width)
    assert status == 0
    if width >= 80:
        assert re.fullmatch(r"(\[=+ +\]  )?25\.0%  the origin is down: no answer for 15 s *", down)
        assert "25.0%  1.0 MiB/s" in up


@pytest.mark.parametrize("length", [1000, LINE_MAX])
def test_long_reason_does_no_harm(pretend, length):
    server = pretend(b"origin-reason: " + b"x" * length + b"\n" + progress("1 2 3") + b"ok\n")
    assert bgctl("--cache-all", "--progress", server.path).returncode == 0
    drawn, status = on_terminal(80, "--cache-all", "--progress", server.path)
    assert status == 0 and len(frames(drawn, 80)) == 1


def test_error_stands_below_the_bar(pretend):
    server = pretend(progress("1 2 3") + b"failed: 4096 4096\n" + progress("1 2 0")
                     + b"error: 1 block is missing\n")
    drawn, status = on_terminal(80, "--cache-all", "--progress", server.path)
    assert status == 1
    lines = drawn.replace("\r\n", "\n").splitlines()
    assert [line for line in lines if "xnbd-bgctl: " in line] == [
        line for line in lines if line.startswith("xnbd-bgctl: ")], drawn
    assert lines[-1] == "xnbd-bgctl: 1 block is missing"


@hazard("progress bar without a terminal")
def test_progress_without_terminal_is_lines(pretend):
    """A few: one at the beginning, then every 5 seconds, and one at the end."""
    server = pretend(progress(*PROGRESS, "1000 1000 0") + b"ok\n")
    result = bgctl("--cache-all", "--progress", server.path)
    assert result.returncode == 0 and not result.stdout
    first, last = result.stderr.splitlines()
    assert first.startswith("xnbd-bgctl: 0.0%") and last.startswith("xnbd-bgctl: 100.0%")
    assert "\r" not in result.stderr


def test_without_progress_nothing_is_said(pretend):
    done(bgctl("--cache-all", pretend(progress(*PROGRESS) + b"ok\n").path))


# Deadlines: all of them at once, while other tests run

SILENCE, IDLE = 10, 60


class Ending(threading.Thread):
    """Does something, and takes the time from before it was begun to its end."""

    def __init__(self, begin, wait):
        super().__init__(daemon=True)
        self.begun, self.result, self.wait = time.monotonic(), None, wait
        self.subject = begin()
        self.start()

    def run(self):
        self.result = self.wait(self.subject)
        self.seconds = time.monotonic() - self.begun

    def check(self, least):
        """Not earlier, and not much later."""
        until(lambda: not self.is_alive(), least + 2 * DEADLINE, "the deadline")
        assert least - 0.1 < self.seconds < least + DEADLINE
        return self.result


def idle(control, sent):
    """A connection that sends that, and then waits for its end."""
    def begin():
        c = Control(control)
        c.sock.settimeout(3 * IDLE)
        c.send(sent)
        return c

    return Ending(begin, Control.is_closed)


def deadlines(directory, stack):
    origin = stack.enter_context(Origin(CONTENT))
    s, stopped = [Server(["--proxy", "--unix", directory / f"nbd{i}", *origin.arguments,
                          directory / f"cache{i}", directory / f"map{i}", directory / f"ctl{i}"],
                         directory, i, {}) for i in range(2)]
    control, stopped.control = directory / "ctl0", directory / "ctl1"
    for one in s, stopped:
        stack.callback(one.kill)
        one.wait_ready()
    stopped.proc.send_signal(signal.SIGSTOP)
    origin.hold()
    silent = stack.enter_context(contextlib.closing(
        Silent(directory / "pretended", b"")))
    waits, asks, deaf = (Control(control) for _ in range(3))
    waits.send(b"cache-all\n")
    deaf.send(b"help\n" * 100)
    closed = [idle(control, b""), idle(control, b"quer")]
    given_up = [Ending(functools.partial(start_bgctl, *arguments_of(command, path)),
                       lambda process: end_of(process, SILENCE + 2 * DEADLINE))
                for command in EACH for path in (silent.path, stopped.control)]

    for one in given_up:
        refused_in_one_line(one.check(SILENCE), 1, f"{SILENCE} s")
    stopped.proc.send_signal(signal.SIGCONT)
    subset(state(stopped.control), mode="proxy", copy="idle", origin=origin.label, snapshot="idle")
    assert asks.ask("help")[-1] == "ok"
    assert all(one.check(IDLE) for one in closed)
    assert asks.ask("help")[-1] == "ok"
    origin.release()
    assert waits.lines()[-1] == "ok"
    s.stop()


@hazard("an idle, half-sent, oversized or garbage message blocks the server")
@pytest.mark.limit(300)
@pytest.mark.meanwhile(work=deadlines)
def test_deadlines(meanwhile):
    """bgctl gives up a server that is silent, and the server a client that is;
    but not one that waits for its answer, or asked something meanwhile."""
    meanwhile()


# query

def check_state(values):
    """What holds at any time, of a state as JSON."""
    names = [name for name in STATE if name in values or name not in SOMETIMES]
    if "bitmap" not in values:
        names = [name for name in names if name not in OF_A_PROXY]
    assert list(values) == names
    assert all(isinstance(value, str) == (name in TEXTS) for name, value in values.items())
    assert all(list(one) == ["address", *COUNTERS, "in-flight"] for one in values["client"])
    assert len(values["client"]) <= values["clients"]
    delays = values["delays-us"]
    assert delays == sorted(delays)
    assert sum(n for _, n in delays) <= sum(values[kind] for kind in COUNTERS[:4])
    assert values["snapshot"] in ("idle", "running")
    if "bitmap" not in values:
        return values
    cached, blocks = values["cached-blocks"], values["blocks"]
    assert blocks == -(-values["size"] // BLOCK) and 0 <= cached <= blocks
    assert values["cached-percent"] == (1000 * cached // blocks if blocks else 1000) / 10
    assert values["block-size"] == BLOCK
    assert values["mode"] in ("proxy", "target") and values["readonly"] in (True, False)
    assert values["origin-link"] in ("up", "down", "closed")
    assert ("origin-reason" in values) == (values["origin-link"] == "down")
    assert values["copy"] in ("idle", "running", "done", "failed")
    assert "copy-error" not in values or values["copy"] == "failed"
    return values


def subset(values, **expected):
    expected = {name.replace("_", "-"): value for name, value in expected.items()}
    assert {name: values.get(name) for name in expected} == expected


def left_alone(proxy):
    """Until whoever looked whether it listens has gone."""
    until(lambda: state(proxy.control)["clients"] == 0, what="no clients")


def test_query_of_a_fresh_proxy(proxy, origin):
    left_alone(proxy)
    subset(check_state(state(proxy.control)), mode="proxy", image=str(proxy.image),
           bitmap=str(proxy.bitmap), size=SIZE, readonly=False, origin=origin.label,
           origin_export="", origin_link="up", blocks=BLOCKS, cached_blocks=0, cached_percent=0.0,
           written_blocks=0, fetched_bytes=0, origin_requests=0, pending_requests=0,
           buffer_bytes=0, clients=0, copy="idle", copy_rate=0, copy_failed_blocks=0)


def test_query_lines_and_json_are_the_same(proxy, connect):
    left_alone(proxy)
    until(lambda: state(proxy.control)["origin-links"] == 2, what="both links")
    lines = done(bgctl("--query", proxy.control), out=None).stdout
    shown = dict(line.split(": ", 1) for line in lines.splitlines())
    c = connect(proxy.control)
    asked, told = c.values(), state(proxy.control)
    assert {**c.object(), "uptime": told["uptime"]} == told
    assert told.pop("client") == []
    assert told.pop("readonly") is False and told.pop("delays-us") == []
    told.pop("confined")
    for one in shown, asked:
        assert one.pop("readonly") == "no" and one.pop("delays-us") == ""
        one.pop("confined")
    told = {name: str(value) for name, value in told.items()}
    for one in shown, asked, told:
        assert int(one.pop("uptime")) < 1000
    assert shown == asked == told


def test_query_in_json_takes_no_other_word(proxy, connect):
    assert connect(proxy.control).ask("query jso") == ["error: query may be followed by 'json' only"]


def test_strings_in_json_are_quoted(run_proxy, origin, connect):
    s = run_proxy(origin, image='a"b\\c\udcff\u00e9')
    assert connect(s.control).object()["image"].endswith('a"b\\c\ufffd\u00e9')


@pytest.mark.parametrize("value", [b"\xff", b"a\xa0b", b"\xc3", b"\xc0\xaf", b"\xe0\x80\x80",
                                   b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98",
                                   b"\xf8\x88\x80\x80\x80", b"\xe2\x82x"], ids=repr)
def test_json_has_no_broken_characters(run_proxy, origin, value):
    """Which a path may have."""
    s = run_proxy(origin, image=os.fsdecode(b"<" + value + b">"))
    result = done(bgctl("--query", "--json", s.control, encoding="utf-8", errors="strict"), out=None)
    image = json.loads(result.stdout)["image"]
    assert re.search(r"/<a?\ufffd[\ufffd?]*[bx]?>$", image), ascii(image)


def test_query_follows_what_clients_do(proxy):
    left_alone(proxy)
    c = proxy.client()
    c.pwrite(b"x" * BLOCK * 3, BLOCK * 10)
    subset(check_state(state(proxy.control)), clients=1, cached_blocks=3, written_blocks=3)
    c.pread(BLOCK, 0)
    values = check_state(state(proxy.control))
    assert values["cached-blocks"] >= 4 and values["written-blocks"] == 3
    assert values["fetched-bytes"] >= BLOCK
    c.disc()
    until(lambda: state(proxy.control)["clients"] == 0, what="the client's end")


def test_query_tells_what_waits_for_the_origin(proxy, origin):
    origin.hold()
    c = proxy.client()
    c.request(NBD_CMD_READ, 0, BLOCK)
    origin.wait()
    values = check_state(state(proxy.control))
    assert values["origin-requests"] >= 1 and values["pending-requests"] >= 1
    origin.release()
    until(lambda: state(proxy.control)["pending-requests"] == 0, what="the answer")


def test_query_tells_limits_and_readonly(run_proxy, origin):
    s = run_proxy(origin, "--readonly", "--max-queue-size", "50", "--max-buf-size", "1000000")
    subset(check_state(state(s.control)), readonly=True, pending_requests_limit=50,
           buffer_bytes_limit=1000000)


def test_query_tells_the_name_of_the_export(run_proxy, origin):
    s = run_proxy(origin, "--target-exportname", "12")
    subset(check_state(state(s.control)), origin_export="12")


def test_query_masks_what_would_break_its_lines(run_proxy, origin, connect):
    """The image's name cannot add a line."""
    s = run_proxy(origin, image="x\ncopy: \x1b\r\t\x7f")
    c = connect(s.control)
    assert c.values()["image"].endswith("x?copy: ????")
    assert c.object()["image"].endswith("x?copy: ????")
    check_state(state(s.control))


def test_query_tells_why_the_link_is_down(proxy, origin):
    origin.die()
    until(lambda: state(proxy.control)["origin-link"] == "down", what="a link that is down")
    values = check_state(state(proxy.control))
    assert values["origin-reason"] and values["origin-links"] == 0
    watch = start_bgctl("--watch", proxy.control)
    assert re.match(r"origin down: \S.*; 0 requests/s, 0\.0 MiB/s read, .*, 0\.0 % cached, origin down\n", watch.stdout.readline())
    waiting = start_bgctl("--cache-all", "--progress", proxy.control)
    assert re.fullmatch(r"xnbd-bgctl: 0\.0%  the origin is down: \S.*\n", waiting.stderr.readline())
    origin.come_back()
    until(lambda: state(proxy.control)["origin-link"] == "up", what="a link that is up")
    until(lambda: re.match(r"\d+ requests/s, .* % cached, origin up$", watch.stdout.readline()), what="it in the view")
    watch.send_signal(signal.SIGINT)
    assert end_of(watch).returncode == 0
    result = end_of(waiting)
    assert result.returncode == 0 and re.search(r"(?m)^xnbd-bgctl: 100\.0%  0\.0 MiB/s  0:00:00 left$", result.stderr)


@hazard("100 percent while a block is missing")
def test_percent_is_100_only_when_all_is_here(run_proxy):
    """Here is one block in a hundred thousand that the origin cannot deliver."""
    bad = 55555 * BLOCK
    with Origin({bad: b"x" * BLOCK}, size=100000 * BLOCK) as origin:
        origin.errors = failing(bad, bad + BLOCK)
        s = run_proxy(origin)
        refused(bgctl("--cache-all", s.control), 1, "1 block")
        subset(check_state(state(s.control)), cached_blocks=99999, cached_percent=99.9)
        origin.errors = None
        done(bgctl("--cache-all", s.control))
        subset(check_state(state(s.control)), cached_blocks=100000, cached_percent=100.0)


# The socket and who may connect

@hazard("anyone may connect")
def test_socket_is_for_the_owner_alone(run_proxy, origin):
    """Whatever the umask."""
    s = run_proxy(origin, preexec_fn=lambda: os.umask(0))
    assert stat.S_IMODE(s.control.stat().st_mode) == 0o600
    s.stop()
    assert not s.control.exists()


@hazard("a stale Unix socket stops the next start")
def test_stale_socket_is_replaced(run_proxy, origin):
    run_proxy(origin).kill()
    s = run_proxy(origin)
    assert is_served(s.control)


@hazard("a live Unix socket is stolen")
def test_live_socket_is_left_alone(proxy, run_server, origin, tmp_path):
    result = run_server("--proxy", "--unix", tmp_path / "nbd2", *origin.arguments,
                        tmp_path / "cache2", tmp_path / "map2", proxy.control)
    assert result.returncode == 1
    assert str(proxy.control) in result.stderr.splitlines()[-1], result
    assert is_served(proxy.control)
    assert proxy.is_served()


def test_file_that_is_no_socket_is_left_alone(run_server, origin, tmp_path):
    (tmp_path / "ctl").write_text("precious")
    result = run_server("--proxy", "--unix", tmp_path / "nbd", *origin.arguments,
                        tmp_path / "cache", tmp_path / "map", tmp_path / "ctl")
    assert result.returncode == 1 and str(tmp_path / "ctl") in result.stderr, result
    assert (tmp_path / "ctl").read_text() == "precious"


@hazard("--daemonize: control acts on the wrong process; relative paths break after chdir")
def test_daemon_is_controlled(foster, server, origin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = server(args=["--proxy", "--unix", "nbd", "--daemonize", "--pidfile", "pid", "--logpath",
                     "log", *origin.arguments, "cache", "map", "ctl"], wait=False)
    assert s.proc.wait(DEADLINE) == 0, s.log()
    s.proc = Adopted(read_pid(tmp_path / "pid"))
    subset(check_state(state("ctl")), image=str(tmp_path / "cache"), bitmap=str(tmp_path / "map"))
    done(bgctl("--cache-all", "ctl"))
    done(bgctl("--switch", "ctl"))
    s.stop()
    assert (tmp_path / "cache").read_bytes() == CONTENT


# Lines

def test_help_names_the_commands(proxy, connect):
    *lines, end = connect(proxy.control).ask("help")
    assert end == "ok"
    assert [re.match(r"command: ([a-z0-9-]+)", line).group(1) for line in lines] == COMMANDS


def test_carriage_returns_are_accepted(proxy, connect):
    c = connect(proxy.control)
    c.send(b"help\r\nquery\r\n")
    assert c.lines()[-1] == c.lines()[-1] == "ok"


@pytest.mark.parametrize("line", [
    "", " ", "bogus", "QUERY", " query", "query ", "query x", "help  ", "stop-copy 1", "switch now",
    "switch force ", "switch  force", "cache-all x", "cache-all 0", "cache-all 8193",
    "cache-all -1", "cache-all 1 2", "cache-all ", "cache-all2 x", "reconnect", "reconnect host",
    "reconnect host ", "reconnect  1", "ok", "error: x", "\x1b[A", "ä", "q" * LINE_MAX])
def test_wrong_line_is_refused(proxy, origin, connect, line):
    """And nothing else happens: the next one is answered."""
    c = connect(proxy.control)
    answer, = c.ask(line)
    assert answer.startswith("error: ") and answer.isprintable()
    subset(c.values(), mode="proxy", copy="idle", origin=origin.label)


@pytest.mark.parametrize("line", [b"\0", b"query\0", b"\0query", b"switch\0 force",
                                  b"reconnect a\0b 1"], ids=repr)
def test_nul_byte_is_refused(proxy, connect, line):
    c = connect(proxy.control)
    c.send(line + b"\n")
    assert c.lines()[-1].startswith("error: ")
    assert c.ask("help")[-1] == "ok"


@hazard("an oversized message")
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("length, closed", [(LINE_MAX, False), (LINE_MAX + 1, True)])
def test_longest_line_is_taken(proxy, connect, ending, length, closed):
    c = connect(proxy.control)
    c.send(b"x" * length + ending)
    assert c.lines()[-1].startswith("error: ")
    if closed:
        assert c.is_closed()
    else:
        assert c.ask("help")[-1] == "ok"


@hazard("an oversized message")
@pytest.mark.parametrize("line", [b"x" * MIB, b"query " * 200000, bytes(MIB)],
                         ids=["one word", "words", "zeros"])
def test_line_without_end_costs_its_connection(proxy, connect, line):
    c = connect(proxy.control)
    with contextlib.suppress(Closed):
        c.send(line)
    assert c.line().startswith("error: ")
    assert c.is_closed()
    assert is_served(proxy.control)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_lines_may_come_in_pieces(proxy, connect, step):
    """And several at once; the answers are in order."""
    c, commands = connect(proxy.control), b"help\nbogus\nquery\n\nhelp\n"
    for at in range(0, len(commands), step):
        c.send(commands[at:at + step])
    answers = [c.lines() for _ in range(5)]
    assert answers[0] == answers[4] and answers[0][-1] == "ok"
    assert answers[1][0].startswith("error: ") and answers[3][0].startswith("error: ")
    assert answers[2][0] == "mode: proxy"


def test_half_closed_connection_gets_its_answers(proxy, connect):
    """As socat makes them."""
    c = connect(proxy.control)
    c.send(b"cache-all\nquery\nhel")
    c.shutdown_write()
    assert c.lines()[-1] == "ok"
    assert f"cached-blocks: {BLOCKS}" in c.lines()
    assert c.is_closed()


def test_command_of_a_client_that_left_at_once_is_carried_out(proxy, connect):
    c = connect(proxy.control)
    c.send(b"cache-all2\n")
    c.close()
    until(lambda: state(proxy.control)["copy"] == "done", what="the copy")


def test_commands_behind_one_under_way_wait_for_it(proxy, origin, connect):
    origin.hold()
    c = connect(proxy.control)
    c.send(b"cache-all\nquery\n")
    origin.wait()
    origin.release()
    answer = c.lines()
    assert answer[-1] == "ok" and answer[0].startswith("progress: 0 ")
    assert f"cached-blocks: {BLOCKS}" in c.lines()


# Clients that do not behave

def send_until_full(c, data):
    """How many bytes it takes that nobody reads."""
    c.sock.settimeout(0.3)
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            sent += c.sock.send(data)
    c.sock.settimeout(DEADLINE)
    return sent


def sends_nothing(c):
    pass


def sends_half_a_line(c):
    c.send(b"quer")


def sends_garbage(c):
    c.send(random.Random(1).randbytes(LINE_MAX))


def sends_too_much(c):
    with contextlib.suppress(Closed):
        c.send(b"x" * MIB)


def does_not_read(c):
    send_until_full(c, b"query\n" * 1000)


def does_not_read_progress(c):
    c.send(b"cache-all\n" * 100)


def leaves_in_the_middle(c):
    c.send(b"query\nque")
    c.close()


BAD_CLIENTS = [sends_nothing, sends_half_a_line, sends_garbage, sends_too_much, does_not_read,
               does_not_read_progress, leaves_in_the_middle]


@hazard("an idle, half-sent, oversized or garbage message blocks the server")
@pytest.mark.parametrize("misbehave", BAD_CLIENTS, ids=lambda f: f.__name__)
def test_bad_client_disturbs_nobody(proxy, connect, misbehave):
    for _ in range(5):
        misbehave(connect(proxy.control))
    assert is_served(proxy.control)
    assert proxy.is_served()
    done(bgctl("--cache-all", proxy.control))
    done(bgctl("--switch", proxy.control))


@pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps freed memory")
def test_answers_that_nobody_reads_take_no_memory(proxy, connect):
    is_served(proxy.control)
    before = proxy.rss()
    clients = [connect(proxy.control) for _ in range(8)]
    for c in clients:
        send_until_full(c, b"query\n" * 1000)
    assert proxy.rss() - before < 2 * MIB
    for c in clients:       # all that was taken is answered
        assert c.lines()[-1] == "ok"


def test_silent_clients_take_no_cpu(proxy, origin, connect):
    """Whatever they wait for, and however their connection is."""
    origin.hold()
    for command in b"", b"quer", b"cache-all\n", b"cache-all\nquery\n", b"x" * (LINE_MAX + 1):
        connect(proxy.control).send(command)
        half = connect(proxy.control)
        half.send(command)
        half.shutdown_write()
    does_not_read(connect(proxy.control))
    gone = connect(proxy.control)
    does_not_read(gone)
    gone.close()
    proxy.settle()
    before = proxy.cpu()
    time.sleep(1)               # a measurement
    assert proxy.cpu() - before < 0.15


@pytest.mark.parametrize("seed", range(10))
def test_noise_does_no_harm(proxy, connect, seed):
    """Words of the protocol, and bytes, in any order and any pieces."""
    dice = random.Random(seed)
    words = [b"query", b"help", b"cache-all", b"cache-all2", b"stop-copy", b" ", b"\n", b"\r\n",
             b"1", b"8193", b"\0", b"\xff", b"ok", b"error: ", b"x" * 3000]
    for _ in range(30):
        c = connect(proxy.control)
        with contextlib.suppress(Closed):
            for _ in range(dice.randrange(6)):
                c.send(b"".join(dice.choices(words, k=dice.randrange(1, 40))))
        if dice.random() < 0.7:
            c.close()
    assert is_served(proxy.control)
    copy_ends(proxy.control)


def test_one_more_connection_closes_the_one_idle_for_longest(proxy, connect):
    clients = [connect(proxy.control) for _ in range(CONNECTIONS)]
    for c in clients:
        assert c.ask("help")[-1] == "ok"
    assert clients[0].ask("help")[-1] == "ok"
    newcomer = connect(proxy.control)
    assert newcomer.ask("help")[-1] == "ok"
    assert clients[1].is_closed()
    for c in [clients[0], *clients[2:], newcomer]:
        assert c.ask("help")[-1] == "ok"


def test_connection_with_a_command_under_way_is_never_closed_for_another(proxy, origin, connect):
    origin.hold()
    busy = [connect(proxy.control) for _ in range(CONNECTIONS)]
    for c in busy:
        c.send(b"cache-all\n")
        assert c.line().startswith("progress: ")
    newcomer = connect(proxy.control)
    assert newcomer.lines() == ["error: too many connections"]
    assert newcomer.is_closed()
    refused_in_one_line(bgctl("--query", proxy.control), 1, "too many connections")
    busy.pop().close()
    until(lambda: bgctl("--query", proxy.control).returncode == 0, what="a free place")
    origin.release()
    assert all(c.lines()[-1] == "ok" for c in busy)


def test_many_connections_leave_nothing(proxy, connect):
    is_served(proxy.control)
    before = proxy.sockets()
    for _ in range(100):
        connect(proxy.control).send(b"query\n")
    for _ in range(100):
        connect(proxy.control).close()
    until(lambda: is_served(proxy.control) and proxy.sockets() <= before + CONNECTIONS,
          what="closed connections")


# Copies

BIG = 64 * MIB


def is_read(request):
    return request.command == NBD_CMD_READ


@pytest.fixture
def big():
    """An origin with more data than can be asked for at once."""
    with Origin(pattern, size=BIG) as origin:
        yield origin


def test_cache_all_copies_all(proxy, origin):
    done(bgctl("--cache-all", proxy.control))
    subset(check_state(state(proxy.control)), cached_blocks=BLOCKS, cached_percent=100.0,
           fetched_bytes=SIZE, copy="done", written_blocks=0)
    origin.die()
    assert proxy.client().pread(SIZE) == CONTENT


def test_cache_all_of_a_full_cache_returns_at_once(proxy, origin):
    for command in "--cache-all", "--cache-all", "--cache-all2", "--cache-all":
        done(bgctl(command, proxy.control))
    assert origin.read_bytes() <= SIZE + BLOCK
    assert set(origin.counts().values()) == {1}


def test_cache_all_keeps_what_clients_wrote(proxy):
    proxy.client().pwrite(b"new" * 1000, 5000)
    done(bgctl("--cache-all", proxy.control))
    done(bgctl("--switch", proxy.control))
    assert proxy.client().pread(SIZE) == CONTENT[:5000] + b"new" * 1000 + CONTENT[8000:]


def test_holes_are_not_transferred(run_proxy):
    need_holes()            # or all of the cache would be looked at
    data = {0: pattern(0, MIB), 5 * GIB + BLOCK: b"x" * BLOCK, 10 * GIB - BLOCK: b"y" * BLOCK}
    with Origin(data, size=10 * GIB) as origin:
        s = run_proxy(origin)
        done(bgctl("--cache-all", s.control))
        assert origin.read_bytes() < 8 * MIB
        done(bgctl("--switch", s.control))
        assert s.client().pread(MIB, 5 * GIB) == bytes(BLOCK) + b"x" * BLOCK + bytes(MIB - 2 * BLOCK)
    s.stop()
    assert s.image.stat().st_blocks * 512 < 16 * MIB


@pytest.mark.parametrize("blocks", [1, 3, 64])
@pytest.mark.parametrize("command", ["--cache-all", "--cache-all2"])
def test_requests_have_the_wanted_size(proxy, origin, blocks, command):
    done(bgctl(command, "--blocks-per-request", blocks, proxy.control))
    assert copy_ends(proxy.control) == "done"
    assert max(r.length for r in origin.reads()) <= blocks * BLOCK
    assert set(origin.counts().values()) == {1}


def test_cache_all2_returns_at_once_and_goes_on(proxy, origin):
    origin.hold()
    done(bgctl("--cache-all2", proxy.control))
    subset(check_state(state(proxy.control)), copy="running")
    done(bgctl("--cache-all2", proxy.control))
    origin.release()
    assert copy_ends(proxy.control) == "done"
    subset(check_state(state(proxy.control)), cached_percent=100.0, copy_rate=0)


def test_cache_all_while_one_runs_in_the_background_joins_it(proxy, origin):
    origin.hold()
    done(bgctl("--cache-all2", proxy.control))
    waiting = start_bgctl("--cache-all", proxy.control)
    origin.wait()
    assert waiting.poll() is None
    origin.release()
    done(end_of(waiting))
    assert set(origin.counts().values()) == {1}


def stopped(proxy, origin):
    """The copy has ended, with blocks still missing; nothing more is asked for."""
    state(proxy.control)        # so it has noticed who left before
    origin.release()
    assert copy_ends(proxy.control) != "done"
    until(lambda: state(proxy.control)["origin-requests"] == 0, what="the last answer")
    values, asked = check_state(state(proxy.control)), len(origin.requests)
    assert values["cached-blocks"] < values["blocks"]
    proxy.settle()
    assert len(origin.requests) == asked


@hazard("bgctl killed at any point: a foreground cache-all stops")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_interrupted_cache_all_stops(run_proxy, big, number):
    s = run_proxy(big)
    big.hold(is_read)
    waiting = start_bgctl("--cache-all", "--progress", s.control, preexec_fn=lambda: (
        number != signal.SIGKILL and signal.signal(number, signal.SIG_DFL)))     # under nohup
    big.wait(is_read)
    waiting.send_signal(number)
    assert end_of(waiting).returncode in (1, -number)
    stopped(s, big)
    assert s.is_served()


@pytest.mark.parametrize("command", ["cache-all", "cache-all2"])
def test_copy_that_nobody_wants_is_idle_while_the_origin_is_away(run_proxy, big, connect, command):
    """And goes on with what it lacks when somebody wants it again."""
    s = run_proxy(big)
    big.hold(is_read)
    c = connect(s.control)
    c.send(command.encode() + b"\n")
    big.wait(is_read)
    big.die()
    until(lambda: state(s.control)["origin-link"] == "down", what="a lost link")
    subset(check_state(state(s.control)), copy="running")
    c.close()
    assert connect(s.control).ask("stop-copy") == ["ok"]
    until(lambda: state(s.control)["copy"] == "idle", what="the end of the copy")
    assert check_state(state(s.control))["origin-requests"] > 0
    waiting = start_bgctl("--cache-all", s.control)
    until(lambda: state(s.control)["copy"] == "running", what="another copy")
    big.release()
    big.come_back()
    done(end_of(waiting, timeout=3 * DEADLINE))
    subset(check_state(state(s.control)), cached_percent=100.0, copy="done")


def test_interrupted_cache_all_stops_whatever_was_before_it(run_proxy, big):
    """Those that have ended do not want a copy any more."""
    s = run_proxy(big)
    big.errors = failing(0, 1000 * BLOCK)
    for command in "--cache-all", "--cache-all2":
        bgctl(command, s.control, timeout=3 * DEADLINE)
        assert copy_ends(s.control) == "failed"
    big.errors = None
    big.hold(is_read)
    waiting = start_bgctl("--cache-all", "--blocks-per-request", 1, s.control)
    until(lambda: big.held, what="a request")
    waiting.kill()
    end_of(waiting)
    stopped(s, big)


def test_cache_all_goes_on_where_it_was_stopped(run_proxy, big):
    s = run_proxy(big)
    big.hold(lambda r: is_read(r) and r.offset >= BIG // 2)
    waiting = start_bgctl("--cache-all", s.control)
    until(lambda: big.held, what="the second half")
    waiting.kill()
    end_of(waiting)
    stopped(s, big)
    before = state(s.control)["cached-blocks"]
    assert before > 0
    done(bgctl("--cache-all", s.control, timeout=3 * DEADLINE))
    subset(check_state(state(s.control)), cached_percent=100.0, fetched_bytes=BIG)


@pytest.mark.parametrize("other", ["--cache-all", "--cache-all2"])
def test_copy_that_somebody_else_wants_is_not_stopped(run_proxy, big, other):
    s = run_proxy(big)
    big.hold(is_read)
    waiting = start_bgctl("--cache-all", s.control)
    until(lambda: state(s.control)["copy"] == "running", what="a copy")
    stays = start_bgctl(other, *["--progress"] * (other == "--cache-all"), s.control)
    big.wait(is_read)
    if other == "--cache-all2":
        done(end_of(stays))
    else:
        assert "%" in stays.stderr.readline()       # it has an answer
    waiting.send_signal(signal.SIGINT)
    end_of(waiting)
    state(s.control)            # so it has noticed that
    big.release()
    assert end_of(stays, timeout=3 * DEADLINE).returncode == 0
    assert copy_ends(s.control, 3 * DEADLINE) == "done"
    subset(check_state(state(s.control)), cached_percent=100.0)


def test_two_at_once_end_both(proxy, origin):
    origin.hold()
    both = [start_bgctl("--cache-all", proxy.control) for _ in range(2)]
    origin.wait()
    origin.release()
    for one in both:
        done(end_of(one))
    assert set(origin.counts().values()) == {1}


def test_stop_copy_ends_the_background_copy(run_proxy, big, connect):
    s = run_proxy(big)
    c = connect(s.control)
    assert c.ask("stop-copy") == ["ok"]
    big.hold(is_read)
    assert c.ask("cache-all2") == c.ask("cache-all2") == ["ok"]
    big.wait(is_read)
    assert c.ask("stop-copy") == ["ok"]
    stopped(s, big)
    assert c.ask("stop-copy") == ["ok"]
    done(bgctl("--cache-all", s.control, timeout=3 * DEADLINE))


def test_stop_copy_leaves_a_foreground_copy(proxy, origin, connect):
    origin.hold()
    waiting = start_bgctl("--cache-all", proxy.control)
    origin.wait()
    c = connect(proxy.control)
    assert c.ask("cache-all2") == c.ask("stop-copy") == ["ok"]
    origin.release()
    done(end_of(waiting))


BAD = [(0, 1), (10, 13), (64, 65)]          # blocks


def bad_blocks(*runs):
    """For Origin.errors: the blocks of these runs cannot be read."""
    tests = [failing(start * BLOCK, end * BLOCK) for start, end in runs]
    return lambda request: next(filter(None, (test(request) for test in tests)), 0)


def named_parts(lines):
    """{(first block, length in bytes)} that lines on stderr name."""
    found = [re.search(r"(\d+) bytes at offset (\d+)$", line).groups() for line in lines]
    return {(int(offset) // BLOCK, int(length)) for length, offset in found}


@pytest.mark.parametrize("progress", [[], ["--progress"]], ids=["quiet", "progress"])
def test_blocks_that_the_origin_cannot_deliver_are_named(proxy, origin, progress):
    """All others are copied, and a later try gets the rest."""
    origin.errors = bad_blocks(*BAD)
    lines = refused(bgctl("--cache-all", *progress, proxy.control), 1, "5 blocks")
    parts = named_parts(line for line in lines if "%" not in line)
    assert parts == {(0, BLOCK), (10, 3 * BLOCK), (64, SIZE % BLOCK)}
    subset(check_state(state(proxy.control)), cached_blocks=BLOCKS - 5, copy="failed",
           copy_failed_blocks=5)
    origin.errors = None
    done(bgctl("--cache-all", proxy.control))
    subset(check_state(state(proxy.control)), cached_blocks=BLOCKS, copy="done",
           copy_failed_blocks=0)


def test_background_copy_tells_its_failure(proxy, origin):
    origin.errors = bad_blocks(*BAD)
    done(bgctl("--cache-all2", proxy.control))
    assert copy_ends(proxy.control) == "failed"
    values = check_state(state(proxy.control))
    assert values["copy-failed-blocks"] == 5 and values["copy-error"]


def test_many_bad_parts_are_counted(run_proxy):
    """More than the server keeps in memory."""
    with Origin(pattern, size=2000 * BLOCK) as origin:
        origin.errors = lambda r: NBD_EIO if any(
            block % 2 for block in range(r.offset // BLOCK, -(-r.end // BLOCK))) else 0
        s = run_proxy(origin)
        lines = refused(bgctl("--cache-all", s.control), 1, "1000 blocks")
        named = [line for line in lines if "bytes at offset" in line]
        more = re.search(r"\d+", lines[-1])
        assert len(named) == 1000 or len(named) + int(more.group()) == 1000


def test_copy_survives_an_outage_of_the_origin(run_proxy, big):
    s = run_proxy(big)
    big.hold(lambda r: is_read(r) and r.offset >= BIG // 2)
    waiting = start_bgctl("--cache-all", s.control)
    until(lambda: big.held, what="the second half")
    big.die()
    until(lambda: state(s.control)["origin-link"] == "down", what="a lost link")
    subset(check_state(state(s.control)), copy="running")
    assert waiting.poll() is None
    big.release()
    big.come_back()
    done(end_of(waiting, timeout=3 * DEADLINE))
    subset(check_state(state(s.control)), origin_link="up", cached_percent=100.0)


@hazard("origin black-holed: control socket works all along")
def test_commands_work_while_the_origin_is_frozen(proxy, origin, connect):
    proxy.client().pread(BLOCK)
    proxy.settle()
    origin.freeze(reading=False)
    proxy.client().request(NBD_CMD_READ, SIZE - 512, 512)
    done(bgctl("--cache-all2", proxy.control))
    subset(check_state(state(proxy.control)), copy="running")
    c = connect(proxy.control)
    c.send(b"cache-all\n")
    assert c.line().startswith("progress: ")
    assert proxy.client().pread(BLOCK) == CONTENT[:BLOCK]
    c.close()
    assert connect(proxy.control).ask("stop-copy") == ["ok"]
    refused_in_one_line(bgctl("--switch", proxy.control), 1, "blocks")
    origin.thaw()


def test_progress_is_told_each_second(proxy, origin, connect):
    """At once, and then until the end."""
    origin.hold()

    def ask():
        c, start = connect(proxy.control), time.monotonic()
        c.send(b"cache-all\n")
        for i in range(3):
            assert re.fullmatch(rf"progress: 0 {BLOCKS} \d+", c.line())
            assert i - 0.01 < time.monotonic() - start < i + 0.9
        return c

    c = once(ask)
    origin.release()
    *_, last, end = c.lines()
    assert last == f"progress: {BLOCKS} {BLOCKS} 0" and end == "ok"


def test_bar_of_a_real_copy_ends_full(proxy):
    drawn, status = on_terminal(80, "--cache-all", "--progress", proxy.control)
    assert status == 0
    assert "100.0%" in frames(drawn, 80)[-1]


# The switch

def test_switch_is_refused_with_the_numbers(proxy):
    proxy.client().pwrite(b"x" * BLOCK * 13, 0)
    refused_in_one_line(bgctl("--switch", proxy.control), 1,
                        f"{BLOCKS - 13} of {BLOCKS} blocks", "20.0 %")
    subset(check_state(state(proxy.control)), mode="proxy", origin_link="up")
    assert proxy.client().pread(SIZE)[13 * BLOCK:] == CONTENT[13 * BLOCK:]


def test_switch_makes_a_target(proxy, origin):
    c = proxy.client()
    done(bgctl("--cache-all", proxy.control))
    done(bgctl("--switch", proxy.control))
    until(lambda: not origin.open, what="the end of the links")
    origin.die()
    subset(check_state(state(proxy.control)), mode="target", size=SIZE, image=str(proxy.image),
           origin_link="closed", origin_links=0, cached_percent=100.0, clients=1)
    assert c.pread(SIZE) == CONTENT
    c.pwrite(b"new", 0)
    proxy.stop()
    assert proxy.image.read_bytes() == b"new" + CONTENT[3:]


def test_forced_switch_reads_as_zeros_what_was_missing(proxy):
    c = proxy.client()
    c.pwrite(b"x" * BLOCK * 2, BLOCK)
    result = bgctl("--switch", "--force", proxy.control)
    assert result.returncode == 0 and not result.stdout
    assert f"{BLOCKS - 2} blocks" in result.stderr, result
    expected = bytes(BLOCK) + b"x" * BLOCK * 2 + bytes(SIZE - 3 * BLOCK)
    assert c.pread(SIZE) == expected
    proxy.stop()
    assert proxy.image.read_bytes() == expected


def test_forced_switch_with_all_here_zeroes_nothing(proxy):
    done(bgctl("--cache-all", proxy.control))
    done(bgctl("--switch", "--force", proxy.control))
    assert proxy.client().pread(SIZE) == CONTENT


def test_forced_switch_ends_waiting_copies(run_proxy, big):
    """Nothing is missing any more."""
    s = run_proxy(big)
    big.hold(is_read)
    waiting = start_bgctl("--cache-all", s.control)
    big.wait(is_read)
    switching = start_bgctl("--switch", "--force", s.control)
    until(lambda: state(s.control)["mode"] == "target" or big.release(), what="the switch")
    assert end_of(switching).returncode == 0
    assert end_of(waiting).returncode in (0, 1)
    assert s.is_served()


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["plain", "forced"])
def test_switches_at_once_end_all(proxy, force):
    done(bgctl("--cache-all", proxy.control))
    results = [end_of(one) for one in
               [start_bgctl("--switch", *force, proxy.control) for _ in range(6)]]
    assert results[0].returncode == 0 or any(r.returncode == 0 for r in results), results
    for result in results:
        assert result.returncode == 0 or "target already" in result.stderr, result
    assert proxy.client().pread(SIZE) == CONTENT


def test_switches_of_one_connection_are_answered_in_order(proxy, connect):
    c = connect(proxy.control)
    assert c.ask("cache-all")[-1] == "ok"
    c.send(b"switch\nswitch\nquery\n")
    assert c.lines() == ["ok"]
    assert c.lines() == ["error: this is a target already"]
    assert c.lines()[0] == "mode: target"


def test_client_that_left_does_not_stop_its_switch(proxy, connect):
    c = connect(proxy.control)
    c.send(b"cache-all\n")
    assert c.lines()[-1] == "ok"
    c.send(b"switch\n")
    c.close()
    until(lambda: state(proxy.control)["mode"] == "target", what="the switch")


def test_signal_is_a_switch(proxy):
    """SIGUSR2, without force."""
    proxy.proc.send_signal(signal.SIGUSR2)
    until(lambda: "blocks" in proxy.log(), what="a refusal")
    assert state(proxy.control)["mode"] == "proxy"
    done(bgctl("--cache-all", proxy.control))
    proxy.proc.send_signal(signal.SIGUSR2)
    until(lambda: state(proxy.control)["mode"] == "target", what="the switch")
    assert proxy.client().pread(SIZE) == CONTENT


@pytest.fixture
def target(proxy):
    """A proxy that has become one."""
    done(bgctl("--cache-all", proxy.control))
    done(bgctl("--switch", proxy.control))
    return proxy


def test_commands_of_a_target(target, origin, connect):
    for command in "--cache-all", "--cache-all2":
        done(bgctl(command, target.control))
    for options in [], ["--force"]:
        refused_in_one_line(bgctl("--switch", *options, target.control), 1, "target already")
    refused_in_one_line(bgctl("--reconnect", target.control, *origin.arguments), 1, "no origin")
    c = connect(target.control)
    assert c.ask("stop-copy") == ["ok"]
    assert set(c.ask("cache-all")) == {f"progress: {BLOCKS} {BLOCKS} 0", "ok"}
    check_state(state(target.control))


# reconnect

@pytest.fixture
def other():
    """Another origin, of the same size but with other contents."""
    with Origin(bytes(255 - b for b in CONTENT), unix=None) as one:
        yield one


def moved(proxy, origin):
    """What is not here yet comes from that origin; the last block was not read before."""
    last = proxy.client().pread(77, SIZE - 77)
    subset(check_state(state(proxy.control)), origin=origin.label, origin_link="up")
    return last == origin.pread(77, SIZE - 77)


def test_reconnect_goes_over_to_another_origin(proxy, origin, other):
    done(bgctl("--reconnect", proxy.control, *other.arguments))
    until(lambda: not origin.open, what="the end of the old links")
    assert moved(proxy, other)


@pytest.mark.parametrize("reading", [True, False], ids=["silent", "stopped"])
def test_reconnect_does_not_need_the_old_origin(proxy, origin, other, reading):
    """Whose requests are asked again."""
    origin.freeze(reading)
    c = proxy.client()
    cookie = c.request(NBD_CMD_READ, SIZE - 77, 77)
    done(bgctl("--reconnect", proxy.control, *other.arguments))
    assert c.collect(cookie).data == other.pread(77, SIZE - 77)
    assert moved(proxy, other)
    origin.thaw()


def test_reconnect_leaves_a_dead_origin(proxy, origin, other):
    origin.die()
    until(lambda: state(proxy.control)["origin-link"] == "down", what="a lost link")
    done(bgctl("--reconnect", proxy.control, *other.arguments))
    assert moved(proxy, other)


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0, 10 * SIZE])
def test_reconnect_to_another_size_is_refused(proxy, origin, size):
    with Origin(bytes(size)) as wrong:
        refused_in_one_line(bgctl("--reconnect", proxy.control, *wrong.arguments), 1, size, SIZE)
        assert moved(proxy, origin)
        assert not wrong.reads()


def test_reconnect_to_nobody_is_refused(proxy, origin, other):
    other.die()
    refused_in_one_line(bgctl("--reconnect", proxy.control, *other.arguments), 1, other.port)
    assert moved(proxy, origin)


@pytest.mark.parametrize("remote", [["127.0.0.1", "x"], ["127.0.0.1", "65536"],
                                    ["nowhere.invalid", "1"], ["unix:nowhere"]], ids=" ".join)
def test_reconnect_to_nowhere_is_refused(proxy, origin, remote, tmp_path):
    refused_in_one_line(bgctl("--reconnect", proxy.control, *remote, cwd=tmp_path), 1)
    assert moved(proxy, origin)


def test_reconnect_over_a_unix_socket(proxy, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with Origin(CONTENT, unix=tmp_path / "elsewhere/sock") as other:
        done(bgctl("--reconnect", proxy.control, "unix:sock"))
        assert moved(proxy, other)


@pytest.mark.parametrize("options, name", [
    ([], "first"), (["--exportname", "second"], "second"), (["--exportname", ""], ""),
    (["--exportname", "two words"], "two words"), (["--exportname", "ä" * 2000], "ä" * 2000)],
    ids=["present", "new", "empty", "words", "long"])
def test_reconnect_asks_for_the_export(run_proxy, origin, other, options, name):
    s = run_proxy(origin, "--target-exportname", "first")
    done(bgctl("--reconnect", *options, s.control, *other.arguments))
    assert other.wait_connections(1)[0].name in (name, name.encode())
    if len(name) < 100:
        subset(state(s.control), origin_export=name)


def test_reconnect_to_an_export_that_is_not_there_is_refused(proxy, origin, other):
    other.names = ["there"]
    refused_in_one_line(bgctl("--reconnect", "--exportname", "gone", proxy.control,
                              *other.arguments), 1)
    assert moved(proxy, origin)


def test_reconnects_go_one_after_the_other(proxy, origin, other, connect):
    """One that waits for its origin does not keep the control socket."""
    other.freeze()
    first, second = connect(proxy.control), connect(proxy.control)
    first.send(f"reconnect {other.arguments[0]} {other.arguments[1]}\n".encode())
    other.wait_connections(1)
    answer, = second.ask(f"reconnect {origin.arguments[0]} {origin.arguments[1]}")
    assert "under way" in answer
    assert is_served(proxy.control)
    other.thaw()
    assert first.lines() == ["ok"]
    assert moved(proxy, other)


def test_client_that_left_does_not_stop_its_reconnect(proxy, other):
    other.freeze()
    waiting = start_bgctl("--reconnect", proxy.control, *other.arguments)
    other.wait_connections(1)
    waiting.kill()
    end_of(waiting)
    assert is_served(proxy.control)
    other.thaw()
    until(lambda: state(proxy.control)["origin"] == other.label, what="the other origin")


def test_server_that_ends_answers_who_waits(proxy, origin):
    """In time, too."""
    origin.hold()
    waiting = start_bgctl("--cache-all", proxy.control)
    origin.wait()
    proxy.stop()
    refused_in_one_line(end_of(waiting), 1, "the server ends")


@hazard("bgctl killed at any point: server unaffected")
def test_bgctl_killed_at_random_moments(proxy, origin, other):
    dice = random.Random(7)
    commands = [["--query"], ["--query", "--json"], ["--cache-all", "--progress"],
                ["--cache-all", "--blocks-per-request", "1"], ["--switch"]]
    origin.delay = 0.05
    until(lambda: state(proxy.control)["origin-links"] == 2, what="both links")
    sockets = proxy.sockets()
    for _ in range(50):
        command, *options = dice.choice(commands)
        one = start_bgctl(command, *options, proxy.control)
        time.sleep(dice.random() * 0.02)        # a moment, not a synchronisation
        one.kill()
        end_of(one)
    copy_ends(proxy.control)
    until(lambda: is_served(proxy.control) and proxy.sockets() <= sockets, what="closed sockets")
    assert proxy.is_served()
    done(bgctl("--cache-all", proxy.control))


# The manual page; its options and examples are in test_manual.py

def page_section(title):
    text = re.split(r"(?m)^\.Sh (.*)\n", PAGE.read_text())
    return text[text.index(title) + 1]


def test_manual_tells_all_lines_of_the_state():
    told = re.search(r"(?s)\.Ss The state\n(.*?)\n\.Sh ", PAGE.read_text()).group(1)
    names = re.findall(r"[a-z0-9-]+", " ".join(re.findall(r"(?m)^\.It Cm (.*)$", told)))
    assert names == STATE


def test_manual_tells_all_commands_of_the_socket():
    told = re.findall(r"(?m)^\.It Cm ([a-z0-9-]+)", page_section("CONTROL SOCKET"))
    assert told == COMMANDS
