"""Clients that say nothing, or whose hosts are gone; many of them beside a few that work.

Who has been silent for a while is parked, where there are many: a thread of its own polls them.
"""

import concurrent.futures
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SERVER, need, skip
from nbd import *
from test_access import is_greeted
from test_control import bgctl, done
from test_order import SlowDisk
from test_protocol import evict

MIB = 1 << 20
MANY = 60
READ, WRITE = NBD_CMD_READ, NBD_CMD_WRITE
hazard = pytest.mark.hazard


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, 4 * MIB))


@pytest.fixture
def parked(server, image):
    """parked(*options, count=MANY): (server, clients), who have been silent until they were parked."""
    def start(*options, count=MANY):
        s = server(image, "--threads", "2", *options)
        clients = []
        for i in range(count):
            clients.append(s.client())
            assert clients[i].pread(512, 512 * i) == pattern(512 * i, 512)
            if i == 8:          # too few to be parked, and all other threads are there
                threads = s.status("Threads")
        until(lambda: s.status("Threads") > threads, what="the thread for those who are silent")
        time.sleep(1)           # for all of them; what follows holds in any case
        return s, clients
    return start


@hazard("many who are silent slow down who works")
def test_silent_clients_are_served_when_they_speak(parked):
    s, clients = parked()
    dice = random.Random(1)
    for _ in range(3):
        for c in dice.sample(clients, MANY // 2):
            at = clients.index(c) * 4096
            c.pwrite(at.to_bytes(4, "big") * 128, at)
            assert c.pread(512, at) == at.to_bytes(4, "big") * 128
        time.sleep(0.6)
    assert clients[0].pread(4096, 2 * MIB) == pattern(2 * MIB, 4096)


@hazard("a client that speaks now and then changes threads each time")
def test_client_that_comes_back_soon_is_not_parked_again_and_again(server, image):
    """The parking thread, which comes when there are many, hears less and less of it."""
    s = server(image, "--threads", "1")
    tasks = Path(f"/proc/{s.proc.pid}/task")
    before = set(os.listdir(tasks))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(s.client()) for _ in range(12)]
        parking = (set(os.listdir(tasks)) - before).pop()

        def heard(seconds):
            status = tasks / parking / "status"
            begun = status.read_text().split("voluntary_ctxt_switches:")[1].split()[0]
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.4)
                for c in clients:
                    c.pread(512)
            return int(status.read_text().split("voluntary_ctxt_switches:")[1].split()[0]) - int(begun)

        heard(4)
        assert heard(4) <= 20       # of some 44 where each comes and goes each time; a busy machine is silent once


def test_silent_clients_end_with_the_server(parked):
    s, clients = parked()
    s.stop()
    for c in clients:
        c.expect_closed()


@pytest.mark.parametrize("end", ["disc", "close", "reset"])
def test_silent_client_that_leaves_makes_room(parked, end):
    s, clients = parked("--max-connections", str(MANY))
    s.raw().expect_closed()
    getattr(clients.pop(), end)()
    until(lambda: is_greeted(s.raw()), what="room for one more")
    assert clients[5].pread(512) == pattern(0, 512)


def test_each_request_counts_once_while_clients_come_and_go(parked, tmp_path):
    """Whoever asks meanwhile: a client is told by one thread or by another, never by two or none."""
    control = tmp_path / "ctl"
    s, clients = parked("--ctl", control)

    def reads():
        lines = done(bgctl("--query", control), out=None).stdout.splitlines()
        names = [line.split(": ", 1) for line in lines]
        assert sum(name == "client" for name, _ in names) == MANY
        return int(dict(names)["reads"])

    told = MANY
    assert reads() == told
    dice = random.Random(2)
    for _ in range(40):
        for c in dice.sample(clients, 5):
            c.pread(512)
            told += 1
        assert reads() == told


@hazard("a request is lost while its client is parked, or comes back")
def test_change_is_not_lost_on_the_way(parked):
    """A request that comes while its client is being parked is carried out like any other."""
    s, clients = parked()
    for round in range(100):
        c = clients[round % 5]
        c.pwrite(bytes([round]) * 4096, 4096 * (round % 5))
        time.sleep(random.Random(round).choice([0, 0.01, 0.24, 0.26]))
    assert clients[9].pread(1, 4096 * 4) == bytes([99])


# Hosts

IN_PLACE = """
import sys, nbd
idle, busy = (nbd.Client(("10.9.8.1", 8520)).negotiate() for _ in range(2))
assert idle.pread(1) and busy.pread(1)
for _ in range(8):
    busy.request(nbd.NBD_CMD_READ, 0, 4 << 20)
print("ready", flush=True)
sys.stdin.read()
"""


def ip(*words):
    subprocess.run([need("ip", "iproute2"), *" ".join(words).split()], check=True)


@pytest.fixture
def far(image):
    """far(seconds): (log, cut) of a server with that --keepalive, whose two clients are on another
    host: one is idle, one has replies under way.  cut() takes that host away."""
    if os.geteuid() != 0:
        skip("needs network namespaces (root)")
    names = [f"xnbd{os.getpid()}{which}" for which in "ab"]
    with contextlib.ExitStack() as stack:
        for i, name in enumerate(names):
            ip("netns add", name)
            stack.callback(ip, "netns del", name)
        ip(f"link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
        for i, name in enumerate(names):
            ip("-n", name, f"addr add 10.9.8.{i + 1}/24 dev veth0")
            ip("-n", name, "link set veth0 up")

        def start(seconds):
            log = image.with_name("log")
            inside = [["ip", "netns", "exec", name] for name in names]
            s = subprocess.Popen([*inside[0], SERVER, "--target", "--keepalive", str(seconds),
                                  "--logpath", log, image])
            stack.callback(s.wait)
            stack.callback(s.terminate)
            until(lambda: log.exists() and "listening" in log.read_text(), what="the server")
            c = subprocess.Popen([*inside[1], sys.executable, "-c", IN_PLACE], stdout=-1, stdin=-1,
                                 cwd=Path(__file__).parent)
            stack.callback(c.wait)
            stack.callback(c.kill)
            assert c.stdout.readline() == b"ready\n"
            return log, lambda: ip("-n", names[1], "link set veth0 down")
        yield start


def ends(log):
    return log.read_text().count("disconnected: ")


@hazard("a host that vanished keeps its connections")
def test_clients_whose_host_is_gone_are_noticed(far):
    log, cut = far(4)
    cut()
    until(lambda: ends(log) == 2, 60, "the end of both clients")
    assert "its host does not answer any more" in log.read_text()


@hazard("a host that is away for a moment loses its connections")
def test_clients_whose_host_was_away_for_a_moment_stay(far):
    log, cut = far(3600)
    cut()
    time.sleep(12)
    assert ends(log) == 0


@hazard("a paused machine loses its disk")
@pytest.mark.parametrize("structured", [False, True])
def test_client_that_takes_nothing_for_long_stays(server, image, structured):
    """Its host answers, though there is no room for one byte more."""
    s = server(image, "--keepalive", "2")
    with s.client(structured=structured) as c:
        wanted = [c.request(READ, 0, 4 * MIB) for _ in range(4)]
        time.sleep(12)
        for cookie in wanted:
            assert c.collect(cookie).data == pattern(0, 4 * MIB)


# Memory

@pytest.fixture
def usual_read_ahead(tmp_path):
    """What the kernel is reading ahead cannot be taken back: of 8 MiB at a time 16 MiB are soon full."""
    disk = Path("/sys/dev/block/%d:%d" % (os.major(tmp_path.stat().st_dev),
                                         os.minor(tmp_path.stat().st_dev))).resolve()
    for path in (disk / "queue/read_ahead_kb", disk.parent / "queue/read_ahead_kb"):
        with contextlib.suppress(OSError):
            before = path.read_text()
            path.write_text("128" if int(before) > 128 else before)
            yield
            path.write_text(before)
            return
    yield       # it is no disk, or not ours


@pytest.fixture
def cgroup(usual_read_ahead):
    """A directory of 16 MiB, with nothing to swap to."""
    for parent, bounds in (("/sys/fs/cgroup/memory", ["memory.limit_in_bytes",
                                                      "memory.memsw.limit_in_bytes"]),
                           ("/sys/fs/cgroup", ["memory.max"])):
        path = Path(parent) / f"xnbd{os.getpid()}"
        try:
            path.mkdir()
            (path / bounds[0]).write_text("16M")
        except OSError:
            with contextlib.suppress(OSError):
                path.rmdir()
            continue
        for name in (*bounds[1:], "memory.swap.max"):
            with contextlib.suppress(OSError):
                (path / name).write_text("0" if "swap" in name else "16M")
        yield path
        until(lambda: not (path / "cgroup.procs").read_text(), what="an end")
        path.rmdir()
        return
    skip("needs control groups with memory (root)")


def take_pieces(address, number, length, command):
    """Four at a time, all of them whole."""
    with Client(address).negotiate(structured=True) as c:
        for round in range(3 if length == MIB else 1):
            for i in range(4):
                at = (number * 37 + 4 * round + i) * length % (63 * MIB - length)
                c.request(command, at, length, payload=bytes(length) if command == WRITE else b"")
            for reply in c.collect_all().values():
                assert not reply.error
                if command == READ:
                    assert reply.data == pattern(reply.request.offset, length)


@hazard("16 MiB of memory, and clients that want more")
@pytest.mark.skipif(SANITIZED, reason="sanitizers take more themselves")
@pytest.mark.parametrize("command", [READ, WRITE], ids=["READ", "WRITE"])
@pytest.mark.parametrize("mode", ["target", "cow", "proxy"])
def test_16_mib_suffice(cgroup, server, disk, tmp_path, mode, command):
    """For eight clients and 1 MiB at a time, two and 32 MiB, of data that is not in the page cache."""
    image, where = disk(content=pattern(0, 64 * MIB)), tmp_path / "sock"
    evict(image)
    words = {"target": ["--target"], "cow": ["--cow-target"], "proxy": ["--proxy"]}[mode]
    files = [image]
    if mode == "proxy":
        server(image, "--unix", tmp_path / "origin", "--readonly")
        files = [f"unix:{tmp_path}/origin", *(tmp_path / name for name in ("cache", "map", "ctl"))]
    s = server(args=[*words, "--unix", where, *files], preexec_fn=lambda: (
        cgroup / "cgroup.procs").write_text(str(os.getpid())))
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        for result in [pool.submit(take_pieces, str(where), i, MIB if i < 8 else 32 * MIB, command)
                       for i in range(10)]:
            result.result()
    assert s.is_served()


@hazard("a server ends with status 1, and nobody knows why")
@pytest.mark.parametrize("to_file", [False, True], ids=["stderr", "file"])
def test_end_by_the_alarm_is_told(server, disk, tmp_path, to_file):
    """It comes where the main thread itself is held up."""
    s = server(disk(), *(["--logpath", tmp_path / "log"] if to_file else []))
    s.expected_status = 1
    s.terminate(signal.SIGALRM)
    s.wait()
    told = (tmp_path / "log").read_text() if to_file else s.log()
    assert told.endswith("xnbd-server: stopped, but the main thread waits for the disk\n")


# A start

@hazard("a start that waits for a silent origin cannot be ended")
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("options, first", [([], True), (["--daemonize"], False),
                                            (["--daemonize"], True)],
                         ids=["", "daemon", "who waits for the daemon"])
def test_signal_ends_a_start_that_waits(server, tmp_path, sig, options, first):
    """For an origin that accepts and says nothing; nothing is left behind."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        s = server(args=["--proxy", "--origin-timeout", "3600", *options, "--unix", tmp_path / "s",
                         "--logpath", tmp_path / "log", "127.0.0.1", silent.getsockname()[1],
                         *(tmp_path / name for name in ("cache", "map", "ctl"))], wait=False)
        s.expected_status = None
        client, _ = silent.accept()
        with client:
            children = Path(f"/proc/{s.proc.pid}/task/{s.proc.pid}/children").read_text().split()
            os.kill(s.proc.pid if first else int(children[0]), sig)
            assert s.wait() == (1 if options else 0)    # the first process: it is not ready
            assert not any(Path("/proc", pid).exists() for pid in children)
    assert not (tmp_path / "s").exists() and not (tmp_path / "ctl").exists()


@hazard("a start that is stopped leaves what it was making")
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["image", "overlay"])
def test_file_that_was_being_made_goes_with_the_start(server, disk, slow_library, tmp_path, sig, what):
    """While a slow disk makes it durable."""
    base = disk(content=pattern(0, 4096))
    words = {"image": ["--target", "--create", "1M", tmp_path / "new"],
             "overlay": ["--cow-target", "--cow-file", tmp_path / "new", base]}[what]
    slow = SlowDisk(tmp_path / "slow", slow_library)
    slow.hold_sync()
    before = set(os.listdir(tmp_path))
    s = server(args=[*words[:1], "--unix", tmp_path / "sock", *words[1:]], wait=False,
               env=slow.environment)
    slow.sync_caught()
    unfinished = set(os.listdir(tmp_path)) - before
    assert any(name.startswith("new") for name in unfinished)
    s.terminate(sig)
    assert s.wait() == 0
    assert not {name for name in os.listdir(tmp_path) if name.startswith("new")
                and len(name.rsplit(".", 1)[-1]) == 6}
