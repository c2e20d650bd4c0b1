"""Sockets that somebody else opened, and telling that somebody that we are ready:
sd_listen_fds(3) and sd_notify(3), by hand and by systemd's own program."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess

import pytest

from conftest import SERVER, need
from nbd import *
from test_service import in_step, refused

FIRST = 3                               # the first descriptor that is passed
SIZE = 65536


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


@contextlib.contextmanager
def numbers_taken(count):
    """No descriptor of this process that a child may need has a number that passing uses."""
    with contextlib.ExitStack() as held:
        while (fd := os.dup(0)) < FIRST + count:
            held.callback(os.close, fd)
        held.callback(os.close, fd)
        yield


def passing(sockets, **environment):
    """For preexec_fn: passes sockets as systemd does; `environment` says otherwise."""
    numbers = [s.fileno() for s in sockets]

    def prepare():
        high = [fcntl.fcntl(n, fcntl.F_DUPFD, FIRST + len(numbers)) for n in numbers]
        for i, fd in enumerate(high):
            os.dup2(fd, FIRST + i)
        os.environ.update({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(numbers)),
                           **environment})

    return {"preexec_fn": prepare, "pass_fds": range(FIRST, FIRST + len(numbers))}


@pytest.fixture
def passed(server, image):
    """passed(sockets, *options): a server that gets the sockets."""
    def start(sockets, *options, **environment):
        with numbers_taken(len(sockets)):
            return server(args=["--target", *options, image], **passing(sockets, **environment))

    return start


@pytest.fixture
def refusal(run_server, image):
    """refusal(sockets, *options): the end of a server that does not want the sockets."""
    def run(sockets, *options, **environment):
        with numbers_taken(len(sockets)):
            return run_server("--target", *options, image, **passing(sockets, **environment))

    return run


@pytest.fixture
def tcp():
    with socket.create_server(("127.0.0.1", 0)) as s:
        yield s


@pytest.fixture
def unix(tmp_path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "passed.sock"))
        s.listen()
        yield s


# Sockets

def test_passed_socket_is_served_and_no_other(passed, tcp):
    s = passed([tcp])
    assert s.addresses == [tcp.getsockname()]
    with s.client() as a, s.client() as b:
        in_step(a)
        in_step(b)


def test_passed_unix_socket_is_left_where_it_is(passed, unix):
    s = passed([unix])
    assert s.addresses == [unix.getsockname()]
    in_step(s.client())
    s.stop()
    assert re.search(r"unix client \d+: connected", s.log())
    assert os.path.exists(unix.getsockname())


def test_all_passed_sockets_are_served(passed, tcp, unix):
    with socket.create_server(("127.0.0.2", 0)) as other:
        s = passed([tcp, unix, other])
        for sock in (tcp, unix, other):
            in_step(s.client(address=sock.getsockname()))


def test_client_that_comes_before_the_server_is_served(passed, tcp):
    early = Client(tcp.getsockname())
    s = passed([tcp])
    s.clients.append(early)
    in_step(early.negotiate())


def test_client_that_comes_between_two_servers_is_served(passed, tcp):
    passed([tcp]).stop()
    between = Client(tcp.getsockname())
    s = passed([tcp])
    s.clients.append(between)
    in_step(between.negotiate())


def test_passed_socket_that_blocks_does_not_block_the_server(passed, unix):
    """Nor is a connection that is gone before it is accepted waited for."""
    unix.setblocking(True)
    s = passed([unix])
    assert fcntl.fcntl(unix, fcntl.F_GETFL) & os.O_NONBLOCK
    assert s.is_served()


def test_passed_sockets_survive_the_way_into_the_background(run_server, image, tcp, tmp_path):
    pidfile = tmp_path / "pid"
    with numbers_taken(1):
        done = run_server("--target", "--daemonize", "--pidfile", pidfile, "--logpath",
                          tmp_path / "log", image, **passing([tcp]))
    assert done.returncode == 0, done
    try:
        with Client(tcp.getsockname()) as c:
            in_step(c.negotiate())
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)
    until(lambda: not pidfile.exists(), what="the daemon's end")


def test_cow_target_and_proxy_take_passed_sockets(server, image, tcp, unix, tmp_path):
    with numbers_taken(1):
        origin = server(args=["--cow-target", image], **passing([unix]))
        proxy = server(args=["--proxy", f"unix:{unix.getsockname()}", tmp_path / "cache",
                             tmp_path / "map", tmp_path / "ctl"], **passing([tcp]))
    in_step(proxy.client())
    proxy.stop()
    in_step(origin.client())


def test_sockets_for_another_process_are_not_touched(passed, tcp, tmp_path):
    """The variables are inherited by whoever does not remove them."""
    path = str(tmp_path / "own.sock")
    s = passed([tcp], "--unix", path, LISTEN_PID=str(os.getpid()))
    assert s.addresses == [path]
    assert s.is_served()


def test_single_client_is_not_looked_for_among_the_passed(server, image):
    """With Accept=yes systemd passes the connection both ways."""
    ours, theirs = socket.socketpair()
    with theirs, numbers_taken(1):
        s = server(args=["--target", "--inetd", image], wait=False, stdin=theirs,
                   **passing([theirs]))
    with Client(ours) as c:
        in_step(c.negotiate())
        c.disc()
    assert s.wait() == 0


# What is refused

@pytest.mark.parametrize("name, value", [("LISTEN_FDS", "one"), ("LISTEN_FDS", "-1"),
                                         ("LISTEN_FDS", ""), ("LISTEN_FDS", "99999999999"),
                                         ("LISTEN_PID", "me")])
def test_variables_that_are_no_numbers_are_named(refusal, tcp, name, value):
    refused(refusal([tcp], **{name: value}), 1, name, f"'{value}'")


def test_more_sockets_than_there_are_is_refused(refusal, tcp):
    refused(refusal([tcp], LISTEN_FDS="2"), 1, "LISTEN_FDS", f"descriptor {FIRST + 1}")


def datagram():
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def unconnected():
    return socket.socket(socket.AF_INET)


def connected():
    return socket.socketpair()[0]


@pytest.mark.parametrize("make", [datagram, unconnected, connected, lambda: open(os.devnull)],
                         ids=["datagram", "unconnected", "connected", "no socket"])
def test_what_does_not_listen_is_refused(refusal, make):
    with make() as sock:
        refused(refusal([sock]), 1, "LISTEN_FDS", f"descriptor {FIRST}")


@pytest.mark.parametrize("option", ["--laddr=127.0.0.1", "--lport=0", "--unix=own.sock"])
def test_a_place_to_listen_contradicts_passed_sockets(refusal, tcp, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    refused(refusal([tcp], option), 1, "LISTEN_FDS", option.partition("=")[0])
    assert not (tmp_path / "own.sock").exists()


# Notification

@pytest.fixture(params=["a file", "an abstract name"])
def supervisor(tmp_path, monkeypatch, request):
    """A socket that NOTIFY_SOCKET names."""
    name = f"@xnbd-{os.getpid()}" if "abstract" in request.param else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind("\0" + name[1:] if name[0] == "@" else name)
        s.settimeout(DEADLINE)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield s


def test_supervisor_is_told_when_clients_can_connect(server, image, tmp_path, supervisor):
    path = str(tmp_path / "disk.sock")
    s = server(image, "--unix", path, wait=False)
    assert supervisor.recv(100) == b"READY=1"
    s.address = path
    assert s.is_served()
    s.stop()
    supervisor.setblocking(False)
    with pytest.raises(BlockingIOError):
        supervisor.recv(100)


def test_supervisor_is_not_told_of_a_server_that_cannot_start(run_server, tmp_path, supervisor):
    assert run_server("--target", tmp_path / "nowhere").returncode == 1
    supervisor.setblocking(False)
    with pytest.raises(BlockingIOError):
        supervisor.recv(100)


@pytest.mark.parametrize("name", ["", "/", "@", "x" * 200, "/nowhere/notify", "@nobody-listens"])
def test_supervisor_that_is_not_there_costs_nothing(server, image, monkeypatch, name):
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert server(image).is_served()


# systemd's own program

def test_systemd_starts_the_server_for_the_first_client(image, tmp_path):
    activate = need("systemd-socket-activate", "systemd")
    path, log = str(tmp_path / "disk.sock"), tmp_path / "log"
    proc = subprocess.Popen([activate, "-l", path, SERVER, "--target", "--logpath", log, image],
                            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: os.path.exists(path), what="the socket")
        with until(lambda: client_of(path), what="listening") as c:
            in_step(c.negotiate())
        until(lambda: f"listening on unix:{path}\n" in log.read_text(), what="a line in the log")
    finally:
        proc.terminate()
        assert proc.wait(DEADLINE) == 0
    assert os.path.exists(path)


def client_of(path):
    try:
        return Client(path)
    except ConnectionRefusedError:
        return None
