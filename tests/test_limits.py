"""Few descriptors, few threads: a server says in one line that it cannot start, or it works."""

import contextlib
import errno
import os
import re
import resource
import signal

import pytest

from conftest import is_portable, skip
from nbd import *
from test_confine import needs_root, place
from test_control import bgctl, done
from test_faults import EVER, Control, library
from test_proxy import proxy, original
from test_service import in_step

SIZE = (1 << 20) + 77
hazard = pytest.mark.hazard
needs_exact_counts = pytest.mark.skipif(SANITIZED, reason="a sanitizer has threads and descriptors")


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


def limit_files(count):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def is_started(s):
    """Whether it listens; if not, it has ended with status 1 and one line."""
    until(lambda: s.addresses or s.proc.poll() is not None, what="start or end")
    if s.proc.poll() is None:
        return True
    s.expected_status = 1
    assert s.wait() == 1 and len(s.log().splitlines()) == 1, s.log()
    return False


def check_served(s, control):
    """A client and a question at the same time; and it ends as it should."""
    with Client(s.addresses[0]) as c:
        c.negotiate()
        in_step(c)
        assert "mode: " in done(bgctl("--query", control), out=None).stdout
        c.disc()
    assert s.stop() == 0


# Descriptors

MODES = {
    "target": ["--target", "IMAGE"],
    "cow": ["--cow-target", "IMAGE"],
    "cow-file": ["--cow-target", "--cow-file", "overlay", "IMAGE"],
    "proxy": ["--proxy", "unix:ORIGIN", "cache", "map", "ctl"],
}


@needs_exact_counts
@hazard("few descriptors")
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_descriptors_is_refused_or_enough(server, image, tmp_path, monkeypatch, mode):
    """From those that the C library needs to begin; and forty are enough for each mode."""
    monkeypatch.chdir(tmp_path)
    words = {"IMAGE": image, "unix:ORIGIN": "unix:origin"}
    if mode == "proxy":
        server(image, "--readonly", "--unix", "origin")
    own = [] if mode == "proxy" else ["--ctl", "ctl"]
    works = []
    for count in range(4, 41):
        s = server(args=["--unix", "sock", "--pidfile", "pid", *own,
                         *[words.get(word, word) for word in MODES[mode]]], wait=False,
                   preexec_fn=limit_files(count))
        works.append(is_started(s))
        if works[-1]:
            check_served(s, "ctl")
        assert not os.path.exists("sock") and not os.path.exists("pid")
    assert works == sorted(works) and works[-1]


@needs_exact_counts
@hazard("few descriptors: clients take them all")
@pytest.mark.parametrize("count", [24, 40])
def test_clients_leave_descriptors_to_the_server(server, image, tmp_path, monkeypatch, count):
    """For questions, a new log file and snapshots, though more want to come than there are."""
    monkeypatch.chdir(tmp_path)
    s = server(image, "--unix", "sock", "--ctl", "ctl", "--logpath", "log",
               preexec_fn=limit_files(count))
    crowd = [s.raw() for _ in range(2 * count)]
    until(lambda: "connections already" in s.log(), what="a refusal")
    assert "cannot accept" not in s.log()
    os.rename("log", "log.1")
    s.proc.send_signal(signal.SIGHUP)
    until(lambda: os.path.exists("log"), what="a new log")
    for _ in range(3):
        done(bgctl("--query", "ctl"), out=None)
        done(bgctl("--snapshot", "ctl"), out=None)
    for c in crowd:
        c.close()
    until(lambda: "\nclients: 0\n" in done(bgctl("--query", "ctl"), out=None).stdout, what="room")
    assert not re.search("cannot (open|accept|make)", s.log()) and s.is_served()


@needs_exact_counts
@hazard("few descriptors: clients take them all")
def test_clients_leave_descriptors_for_a_new_link(server, proxy, image):
    origin = server(image, "--readonly")
    port = origin.port
    p = proxy(["localhost", port], preexec_fn=limit_files(40))
    crowd = [p.raw() for _ in range(80)]
    until(lambda: "connections already" in p.log(), what="a refusal")
    origin.stop()
    until(lambda: p.query("origin-link") == "down", what="the loss of the link")
    server(image, "--readonly", "--laddr", "127.0.0.1", "--lport", port)
    until(lambda: p.query("origin-link") == "up", what="a new link")
    for c in crowd:
        c.close()


@hazard("poll() fails for ever")
def test_poll_that_fails_ends_the_server_with_a_line(server, library, image, tmp_path):
    control = Control(tmp_path / "faults", library)
    s = server(image, "--unix", tmp_path / "sock", env=control.environment)
    s.expected_status = 1
    control.arm("poll", errno.EINVAL, times=EVER)
    with contextlib.suppress(OSError):
        s.raw()
    assert s.wait() == 1
    assert re.search(r"cannot wait for \d+ descriptors: Invalid argument\n", s.log())


# Threads

USER = 64738        # nobody else's, since the limit is that of a user


def limit_threads(count):
    def prepare():
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        resource.setrlimit(resource.RLIMIT_NPROC, (count, count))

    return prepare


@pytest.fixture
def limited(server, place):
    """limited(count): a server whose user may have so many threads."""
    place.chmod(0o777)
    (place / "disk.img").write_bytes(pattern(0, SIZE))
    (place / "disk.img").chmod(0o666)

    def start(count, *options):
        return server(args=[*options, "--target", "--unix", place / "sock", place / "disk.img"],
                      wait=False, preexec_fn=limit_threads(count))

    return start


@needs_root
@needs_exact_counts
@hazard("no threads")
def test_server_without_threads_does_not_start(limited):
    """One for the log, one for clients and one for the disk are the least, beside the first."""
    for count in (1, 2, 3):
        assert not is_started(limited(count))


@needs_root
@needs_exact_counts
@hazard("no threads: a line for each request")
def test_threads_that_cannot_be_made_are_logged_once(limited):
    s = limited(4)
    assert is_started(s)
    s.address = s.addresses[0]
    clients = [s.client() for _ in range(4)]
    for _ in range(10):
        sent = [(c, c.request(NBD_CMD_TRIM, n * 4096, 4096)) for n in range(50) for c in clients]
        for c, cookie in sent:
            assert not c.collect(cookie).error
    for c in clients:
        c.flush()
    assert s.log().count("cannot start") == 1 and "thread" in s.log()
