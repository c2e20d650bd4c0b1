"""Fixtures of the tests: disk images, servers, skips and time limits."""

import contextlib
import faulthandler
import functools
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import nbd
from nbd import DEADLINE, SANITIZED, until

HERE = Path(__file__).resolve().parent
SERVER = os.environ.get("XNBD_SERVER", str(HERE.parent / "xnbd-server"))
TIME_LIMIT = 900 if SANITIZED else 240      # seconds for one test
STOP_LIMIT = 5                              # seconds from SIGTERM to the end
POLL = 0.002                                # seconds
# What a sanitizer, or the C library's checks, print before they end a program.
CRASH = re.compile(r"Sanitizer|runtime error|Assertion .*failed|stack smashing"
                   r"|corrupted|double free|free\(\): invalid")


# Skips

def skip(reason):
    """Skips the running test, by name; with XNBD_NO_SKIP=1 it fails."""
    if os.environ.get("XNBD_NO_SKIP") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def need(program, package):
    """The path of a program; skips if it is absent."""
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    return path or skip(f"needs {program} ({package})")


def terminal():
    """The two ends of a terminal."""
    try:
        return os.openpty()
    except OSError as e:
        skip(f"needs a terminal of its own (/dev/pts): {e.strerror}")


def need_module(module, package):
    """Skips if another process cannot import that Python module.  (In this
    one `nbd` is the raw client, not libnbd.)"""
    found = subprocess.run([sys.executable, "-c", f"import {module}"], cwd="/",
                           stderr=subprocess.DEVNULL)
    if found.returncode:
        skip(f"needs Python's {module} ({package})")


@functools.cache
def is_portable():
    """Whether the server is built without all that only Linux has."""
    return "portable" in subprocess.run([SERVER, "--version"], stdout=subprocess.PIPE,
                                        text=True).stdout


def need_holes():
    """Skips for such a server: it keeps holes, and neither makes nor finds them.  That
    is no lack of the machine's, and never a failure."""
    if is_portable():
        pytest.skip("this build makes no holes (XNBD_PORTABLE)")


def need_punch(directory):
    """Skips if the server, or the file system, cannot punch holes."""
    need_holes()
    probe = Path(directory) / "punch-probe"
    probe.write_bytes(b"x" * 65536)
    punched = subprocess.run([need("fallocate", "util-linux"), "-p", "-l", "65536", probe],
                             stderr=subprocess.DEVNULL)
    probe.unlink()
    if punched.returncode:
        skip("needs a file system that can punch holes")


def need_copies(directory):
    """Skips if snapshots in that directory are clones, and no copies that take some time."""
    probe = Path(directory) / "clone-probe"
    probe.write_bytes(bytes(65536))
    cloned = subprocess.run(["cp", "--reflink=always", probe, probe.with_suffix(".2")],
                            stderr=subprocess.DEVNULL).returncode == 0
    for path in probe, probe.with_suffix(".2"):
        path.unlink(missing_ok=True)
    if cloned and not is_portable():
        skip("needs a file system that shares no blocks, for TMPDIR")


# Time limit

def pytest_configure(config):
    if threading.current_thread() is threading.main_thread():   # a worker of xdist may begin in another one
        # A job in the background of a shell has it ignored, and so would have what it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Fixtures put away what they made, also when a job is cancelled.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "limit(seconds): how long this test may take")
    config.addinivalue_line(
        "markers", "hazard(what): how servers of this kind have failed before")
    config.addinivalue_line(
        "markers", "meanwhile(work=f): runs f(directory, stack) from the file's first test on")


# What takes long because it waits

class Meanwhile(threading.Thread):
    """work(directory, stack) in a thread.  What it starts, it leaves to the stack to end."""

    def __init__(self, work, directory, stack):
        super().__init__(daemon=True)
        self.work, self.arguments, self.error = work, (directory, stack), None
        self.start()

    def run(self):
        try:
            self.work(*self.arguments)
        except BaseException as e:
            self.error = e

    def result(self):
        self.join()
        if self.error:
            raise self.error


def is_meanwhile(item):
    return item.get_closest_marker("meanwhile") is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """What runs meanwhile is asked last, of the tests of its file, how it went."""
    files = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (files.index(item.path), is_meanwhile(item)))


@pytest.fixture(scope="module", autouse=True)
def all_meanwhile(request, tmp_path_factory):
    """{work: Meanwhile} of the file's tests with that mark."""
    works = [item.get_closest_marker("meanwhile").kwargs["work"] for item in request.session.items
             if item.path == request.path and is_meanwhile(item)]
    with contextlib.ExitStack() as stack:
        yield {work: Meanwhile(work, tmp_path_factory.mktemp("meanwhile"), stack)
               for work in works}


@pytest.fixture
def meanwhile(request, all_meanwhile):
    """meanwhile(): waits for the work of the test's mark, and fails as it did."""
    return all_meanwhile[request.node.get_closest_marker("meanwhile").kwargs["work"]].result


@pytest.fixture(autouse=True)
def time_limit(request):
    """A test that hangs fails, and says where it was."""
    def expired(*_):
        faulthandler.dump_traceback(sys.__stderr__)
        raise TimeoutError(f"the test took longer than {seconds} s")

    marker = request.node.get_closest_marker("limit")
    seconds = marker.args[0] if marker else TIME_LIMIT
    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Disk images

def make_disk(path, size=None, content=b"", sparse=True):
    """Writes content, then zeros up to size: as a hole, or allocated."""
    size = len(content) if size is None else size
    with open(path, "wb") as f:
        f.write(content)
        if not sparse:
            for at in range(len(content), size, 1 << 20):
                f.write(bytes(min(1 << 20, size - at)))
    os.truncate(path, size)     # when it is closed: XFS has given back what it took in advance
    return path


@pytest.fixture
def tmp_path(request, tmp_path):
    """pytest's, and emptied when the test has passed: a whole run would leave 13 GB."""
    failed = request.session.testsfailed
    yield tmp_path
    if request.session.testsfailed == failed:
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_stays(request, tmp_path_factory):
    """Of a run in which no test failed."""
    yield
    if not request.session.testsfailed:
        shutil.rmtree(tmp_path_factory.getbasetemp(), ignore_errors=True)


@pytest.fixture
def disk(tmp_path):
    """disk(size, content, sparse, name): makes an image, returns its Path."""
    made = []

    def make(size=None, content=b"", sparse=True, name=None):
        path = tmp_path / (name or f"disk{len(made) or ''}.img")
        made.append(make_disk(path, size, content, sparse))
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def loop_device(backing):
    """The path of one on that file; skips where there is none."""
    losetup = need("losetup", "mount")
    done = subprocess.run([losetup, "--show", "-f", backing], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    if done.returncode:
        skip("needs a loop device (root, CONFIG_BLK_DEV_LOOP)")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run([losetup, "-d", device], check=True)


# Servers

class Server:
    """A running server.

    .proc .port .unix .addresses   what was started and where it listens
    .log()                         everything it has logged
    .client(**kw) .raw(**kw)       a negotiated client; one that has only connected
    .uri                           nbd:// or nbd+unix://, for other programs
    .stop()                        SIGTERM, and the checks of a good end
    .expected_status               what stop() and the teardown must find (0);
                                   None if anything but a crash will do
    """

    def __init__(self, arguments, directory, number, popen):
        self.arguments = [str(a) for a in arguments]
        self.stderr = directory / f"server{number}.log"
        self.clients = []
        self.expected_status = 0
        self.terminated = False         # a second signal would end it at once
        with open(self.stderr, "ab") as log:
            self.proc = subprocess.Popen([SERVER, *self.arguments], **{
                "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **popen})

    def logfile(self):
        """The file of --logpath, if there is one."""
        found = re.search(r"--logpath[= ](\S+)", " ".join(self.arguments))
        return Path(found.group(1)) if found else None

    def has_written_its_log(self):
        """Whether the log's thread, the first one after the main thread, has nothing to do."""
        threads = Path(f"/proc/{self.proc.pid}/task")
        with contextlib.suppress(OSError, IndexError):      # it has ended, or not begun
            thread = sorted(map(int, os.listdir(threads)))[1]
            stat = (threads / str(thread) / "stat").read_text()
            return stat.rpartition(")")[2].split()[0] not in "RD"
        return True

    def log(self):
        until(self.has_written_its_log, what="a thread that writes the log", pause=0.001)
        text = self.stderr.read_text(errors="replace")
        other = self.logfile()
        if other and other.is_file():
            text += other.read_text(errors="replace")
        return text

    @property
    def addresses(self):
        """(host, port) or a path for each line "listening on"."""
        return [parse_address(line) for line in
                re.findall(r"listening on (.*)\n", self.log())]

    @property
    def port(self):
        return next((a[1] for a in self.addresses if isinstance(a, tuple)), None)

    @property
    def unix(self):
        return next((a for a in self.addresses if isinstance(a, str)), None)

    @property
    def uri(self):
        first = self.addresses[0]
        if isinstance(first, str):
            return f"nbd+unix:///?socket={first}"
        host = f"[{first[0]}]" if ":" in first[0] else first[0]
        return f"nbd://{host}:{first[1]}"

    def wait_ready(self):
        """Until it says where it listens, all places, and a connection is accepted."""
        places = [word for word in map(str, self.proc.args)
                  if re.fullmatch("--(laddr|unix)(=.*)?", word)]
        until(lambda: len(self.addresses) >= max(1, len(places)) or self.proc.poll() is not None,
              what="listening")
        if not self.addresses:
            raise AssertionError(f"server ended, status {self.proc.returncode}: "
                                 f"{self.log()}")
        self.address = self.addresses[0]
        nbd.Transport(self.address).close()
        return self

    def raw(self, address=None, **kw):
        """A client that has connected and not read a byte."""
        client = nbd.Client(address or self.address, **kw)
        self.clients.append(client)
        return client

    def hello(self, **kw):
        """A client that may send options."""
        return self.raw(**kw).hello()

    def client(self, address=None, timeout=DEADLINE, rcvbuf=None, **kw):
        """A client in the transmission phase; see Handshake.negotiate()."""
        return self.raw(address, timeout=timeout, rcvbuf=rcvbuf).negotiate(**kw)

    def is_served(self):
        """A new client is served (raises if not), and the server lives."""
        with nbd.Client(self.address) as c:
            c.negotiate()
            c.pread(min(512, c.size))
            c.disc()
        assert self.proc.poll() is None, self.log()
        return True

    def status(self, field):
        """A number of /proc/PID/status, such as VmRSS (in KiB) or Threads."""
        text = Path(f"/proc/{self.proc.pid}/status").read_text()
        return int(re.search(rf"^{field}:\s+(\d+)", text, re.M).group(1))

    def rss(self):
        return self.status("VmRSS") * 1024

    def cpu(self):
        """Seconds of CPU time used so far."""
        fields = Path(f"/proc/{self.proc.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sockets(self):
        """How many sockets it has open: listeners and connections."""
        directory, count = f"/proc/{self.proc.pid}/fd", 0
        for fd in os.listdir(directory):
            try:
                count += os.readlink(f"{directory}/{fd}").startswith("socket:")
            except FileNotFoundError:       # closed meanwhile
                pass
        return count

    def is_asleep(self):
        """No thread runs, nor would if this machine were not busy, nor waits for the disk."""
        states = set()
        for stat in Path(f"/proc/{self.proc.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):      # ended meanwhile
                states.add(stat.read_text().rpartition(")")[2].split()[0])
        return states <= {"S", "I", "T", "t"}

    def settle(self):
        """Until it has nothing to do any more: for a while nothing was done."""
        seen = []

        def calm():
            seen.append(self.cpu() if self.is_asleep() else None)
            return len(seen) >= 4 and None not in seen[-4:] and len(set(seen[-4:])) == 1

        until(calm, pause=0.05, what="a server that is not busy")

    def terminate(self, number=signal.SIGTERM):
        self.terminated = True
        self.proc.send_signal(number)

    def wait(self, seconds=STOP_LIMIT):
        """Waits for the end and checks how it ended.  The time is counted in polls: where
        the machine is too busy for this process, it is for the server."""
        for _ in range(int(seconds / POLL)):
            if self.proc.poll() is not None:
                break
            time.sleep(POLL)
        status = self.proc.poll()
        if status is None:
            self.kill()
            raise AssertionError(f"server did not end in {seconds} s: {self.log()}")
        log = self.log()
        assert not CRASH.search(log), log
        expected = self.expected_status
        assert status == expected or (expected is None and status >= 0), (
            f"server ended with status {status}: {log}")
        return status

    def stop(self, seconds=STOP_LIMIT):
        """SIGTERM; it must end well within 5 seconds."""
        if self.proc.poll() is None and not self.terminated:
            self.terminate()
        return self.wait(seconds)

    def kill(self):
        """SIGKILL; the end is not checked any more."""
        self.expected_status = -signal.SIGKILL
        self.proc.kill()
        self.proc.wait()


def parse_address(text):
    """(host, port), or the path after "unix:"."""
    if text.startswith("unix:"):
        return text[len("unix:"):]
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def arguments_of(image, options):
    """The default command line; --unix replaces the TCP address."""
    own = {"--unix", "--laddr", "--lport"} & {str(o).split("=")[0] for o in options}
    where = [] if own else ["--laddr", "127.0.0.1", "--lport", "0"]
    return ["--target", *where, *options, image]


@pytest.fixture
def server(tmp_path):
    """server(image, *options): starts a server and waits until it listens.

    server(image, "--readonly")         --target --laddr 127.0.0.1 --lport 0 --readonly IMAGE
    server(image, "--unix", path)       no TCP address unless one is given
    server(args=[...])                  exactly these arguments
    wait=False                          does not wait; the test calls wait_ready()
    further keywords                    go to subprocess.Popen
    """
    started = []

    def start(image=None, *options, args=None, wait=True, **popen):
        if args is None:
            args = arguments_of(image, options)
        one = Server(args, tmp_path, len(started), popen)
        started.append(one)
        return one.wait_ready() if wait else one

    yield start
    end_all(started)


@pytest.fixture
def target(server, image):
    """A writable server of the image that the tests of a file have as a fixture."""
    return server(image)


def end_all(servers):
    """Stops every server, and only then complains about the first bad end.
    Clients leave first: a server that stops waits a little for those who stay."""
    problems = []
    for one in servers:
        for client in one.clients:
            client.close()
        try:
            one.stop(DEADLINE)
        except AssertionError as e:
            problems.append(e)
    if problems:
        raise problems[0]


@pytest.fixture
def run_server():
    """run_server(*arguments): runs the server to its end (for refusals, --help);
    returns subprocess.CompletedProcess with text."""
    def run(*arguments, timeout=DEADLINE, **kw):
        done = subprocess.run([SERVER, *map(str, arguments)], **{
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE, "text": True, "timeout": timeout, **kw})
        assert done.returncode >= 0 and not CRASH.search(done.stderr), done
        return done

    return run


# What is preloaded into a server

def build_library(name, tmp_path_factory, *options):
    """tests/NAME.c, built."""
    path = tmp_path_factory.mktemp(name) / f"{name}.so"
    subprocess.run([need("cc", "gcc"), "-shared", "-fPIC", "-O1", *options, "-o", path,
                    HERE / f"{name}.c", "-ldl"], check=True)
    return path


def preload(library, **settings):
    """The environment of a server with that library, which finds the settings there."""
    asan = os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"
    return {**os.environ, "LD_PRELOAD": str(library), "ASAN_OPTIONS": asan,
            **{name: str(value) for name, value in settings.items()}}


class SharedPage:
    """Numbers that this process and a library share; .environment is for the server."""

    NUMBER = struct.Struct("=I")

    def __init__(self, path, library, **settings):
        path.write_bytes(bytes(mmap.PAGESIZE))
        with open(path, "r+b") as f:
            self.page = mmap.mmap(f.fileno(), mmap.PAGESIZE)
        self.environment = preload(library, SHARED_PAGE=path, **settings)

    def get(self, word):
        return self.NUMBER.unpack_from(self.page, self.NUMBER.size * word)[0]

    def set(self, word, value):
        self.NUMBER.pack_into(self.page, self.NUMBER.size * word, value)


@pytest.fixture(scope="session")
def slow_library(tmp_path_factory):
    return build_library("slow", tmp_path_factory)


def raise_descriptor_limit(wanted):
    """Lets this process and the servers it starts open that many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY:
        hard = max(hard, wanted)            # which only root may raise
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except ValueError:
        skip(f"needs {wanted} open files (ulimit -n)")


@pytest.fixture
def ram():
    """A directory in memory, where there is one: nothing here is about disks."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="xnbd-test-", dir=place))
    yield path
    shutil.rmtree(path)
