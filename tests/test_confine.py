"""What a server gives up before it serves anybody: root (--user), and what it will not need.

intruder.c, preloaded, does in one thread of the server what somebody would try who has taken it
over, and reports the outcome of each attempt.  With --no-sandbox the same attempts succeed.
"""

import contextlib
import ctypes
import errno
import grp
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest

from conftest import SERVER, build_library, is_portable, need, preload, skip
from nbd import *
from test_control import bgctl, done
from test_proxy import proxy, original
from test_service import (ANY_PORT, CLONE_NEWNS, MS_BIND, MS_PRIVATE, MS_REC, alone, block_device,
                          daemon, foster, mount, refused, unshare)

SIZE = 65536
INTRUDER_SIGNAL = signal.SIGRTMAX - 3
ALLOWED, DENIED = 0, errno.EACCES
hazard = pytest.mark.hazard
libc = ctypes.CDLL(None, use_errno=True)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
LANDLOCK = libc.syscall(CREATE_RULESET, None, 0, 1)     # its version


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


@pytest.fixture
def place():
    """A directory that other users can get to, with an image."""
    path = Path(tempfile.mkdtemp(prefix="xnbd-test-"))
    path.chmod(0o755)
    (path / "disk.img").write_bytes(pattern(0, SIZE))
    yield path
    shutil.rmtree(path)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def need_sandbox():
    if is_portable():
        pytest.skip("this build has no sandbox (XNBD_PORTABLE)")
    if SANITIZED:
        pytest.skip("what a sanitizer opens must stay open")
    if LANDLOCK < 1:
        skip("needs a kernel with Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK, lsm=)")


def threads(s):
    return [int(name) for name in os.listdir(f"/proc/{s.proc.pid}/task")]


def of_threads(s, field):
    """What /proc says of that field: the values of all threads, without doubles.  One that ends
    while they are listed has none.  A sanitizer's own thread is there before ours, and stays what
    it was."""
    own = sorted(threads(s))
    if SANITIZED:
        del own[1:2]
    texts = []
    for tid in own:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            texts.append(Path(f"/proc/{s.proc.pid}/task/{tid}/status").read_text())
    return {re.search(rf"(?m)^{field}:\s*(.*?)\s*$", text)[1] for text in texts}


# The intruder

@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build_library("intruder", tmp_path_factory)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """One that needs no file but itself: those of libraries cannot be read either."""
    path = tmp_path_factory.mktemp("program") / "program"
    subprocess.run([need("cc", "gcc"), "-static", "-x", "c", "-o", path, "-"],
                   input=b"int main(void) { return 0; }", check=True)
    return path


class Intruder:
    """What somebody can do in a server that was started with env=self.environment."""

    def __init__(self, library, program, directory, port, abstract):
        self.outside, self.inside = directory / "outside", directory / "inside"
        self.report = directory / "report"
        for path in (self.outside, self.inside):
            path.mkdir()
        (self.outside / "file").write_text("secret")
        shutil.copy(program, self.inside / "program")
        self.environment = preload(library, INTRUDER_REPORT=self.report,
                                   INTRUDER_OUTSIDE=self.outside, INTRUDER_INSIDE=self.inside,
                                   INTRUDER_PORT=port, INTRUDER_ABSTRACT=abstract)

    def attempts(self, s, thread):
        """{what is tried: its errno} in that thread."""
        self.report.write_text("")
        for path in (self.outside, self.inside):
            (path / "new").unlink(missing_ok=True)
            (path / "victim").touch()
        (self.inside / "directory").rmdir() if (self.inside / "directory").exists() else None
        if libc.tgkill(s.proc.pid, thread, INTRUDER_SIGNAL):
            raise ProcessLookupError(thread)
        until(lambda: "end 0\n" in self.report.read_text(), what="the intruder's report")
        lines = [line.rpartition(" ") for line in self.report.read_text().splitlines()]
        return {name: int(number) for name, _, number in lines if name != "end"}


@pytest.fixture
def intruder(library, program, tmp_path_factory):
    name = f"xnbd-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen(64)
        yield Intruder(library, program, tmp_path_factory.mktemp("intruder"), tcp.getsockname()[1],
                       name)


EVERYTHING = ["read outside", "write outside", "list outside", "create outside", "remove outside",
              "list inside", "write inside", "create inside", "remove inside",
              "make a directory inside", "read the users", "execute", "execute inside", "connect",
              "bind", "connect abstract", "signal", "become root"]
FORBIDDEN = {**dict.fromkeys(EVERYTHING, DENIED),
             **dict.fromkeys(["connect", "bind"], DENIED if LANDLOCK >= 4 else ALLOWED),
             **dict.fromkeys(["connect abstract", "signal"],
                             errno.EPERM if LANDLOCK >= 6 else ALLOWED)}
ROOT = ALLOWED if os.geteuid() == 0 else errno.EPERM
FORBIDDEN["become root"] = ROOT         # which --user is for
# What each use of the directory `inside` leaves.
SNAPSHOTS = ["list inside", "write inside", "create inside", "remove inside"]
LOG = ["write inside", "create inside"]
REMOVAL = ["remove inside"]


def but(*allowed):
    return {**FORBIDDEN, **dict.fromkeys(allowed, ALLOWED)}


def busy(s, address):
    """It has threads of each kind."""
    with s.client(address=address) as c:
        c.pwrite(b"x" * 5000, 100)
        c.flush()
        s.proc.send_signal(signal.SIGUSR1)
        c.pread(512)


def nothing_failed(s):
    assert not re.search("denied|cannot (re|open|remove|make)", s.log())


def check_all_threads(intruder, s, expected):
    assert intruder.attempts(s, s.proc.pid) == expected
    for thread in threads(s):
        with contextlib.suppress(ProcessLookupError):       # it has ended
            assert intruder.attempts(s, thread) == expected, thread


def copy(image, intruder):
    return shutil.copy(image, intruder.inside / "disk.img")


@hazard("a server that was taken over reaches other files")
def test_target_reaches_its_directory_only(server, image, intruder, tmp_path):
    need_sandbox()
    s = server(copy(image, intruder), "--unix", tmp_path / "sock", env=intruder.environment)
    busy(s, tmp_path / "sock")
    assert len(threads(s)) > 2
    check_all_threads(intruder, s, but(*SNAPSHOTS))


@hazard("a server that was taken over reaches other files")
def test_device_does_not_open_the_directory_of_devices(server, block_device, intruder, tmp_path):
    need_sandbox()
    (intruder.inside / "disk").symlink_to(block_device[0])
    s = server(intruder.inside / "disk", "--unix", tmp_path / "sock", env=intruder.environment)
    check_all_threads(intruder, s, FORBIDDEN)


@pytest.mark.parametrize("options", [[], ["--cow-file", "overlay"], ["--cow-dir", "."]])
def test_copy_on_write_target_reaches_no_file(server, image, intruder, tmp_path, options):
    need_sandbox()
    s = server(args=["--cow-target", *ANY_PORT, *options, copy(image, intruder)],
               env=intruder.environment, cwd=intruder.inside)
    busy(s, s.address)
    check_all_threads(intruder, s, FORBIDDEN)


@hazard("rights that one thread keeps")
def test_files_of_a_killed_server_do_not_start_a_thread_too_early(server, image, intruder):
    """What it has to commit at once waits for the sandbox."""
    need_sandbox()
    args = ["--cow-target", *ANY_PORT, "--cow-file", intruder.inside / "overlay",
            copy(image, intruder)]
    s = server(args=args)
    with s.client() as c:
        c.pwrite(b"x" * 5000, 100)
        s.kill()
    s = server(args=args, env=intruder.environment)
    until(lambda: len(threads(s)) > 2, what="a thread that commits")    # and that of the log
    check_all_threads(intruder, s, FORBIDDEN)


@pytest.mark.parametrize("options, left", [
    (["--logpath", "log"], LOG), (["--pidfile", "pid"], REMOVAL),
    (["--unix", "sock"], REMOVAL), (["--unix", "sock", "--logpath", "log"], REMOVAL + LOG),
    (["--logpath", "/dev/stderr"], [])])
def test_what_comes_later_stays_possible_and_no_more(server, image, intruder, options, left):
    need_sandbox()
    own = [] if "--unix" in options else ANY_PORT
    s = server(args=["--cow-target", *own, *options, image], env=intruder.environment,
               cwd=intruder.inside, wait=False)
    until(lambda: s.addresses or "listening" in "".join(
        p.read_text() for p in intruder.inside.glob("log")), what="listening")
    check_all_threads(intruder, s, but(*left))


@hazard("rights that one thread keeps")
def test_proxy_can_look_up_names_and_connect(proxy, image, intruder):
    need_sandbox()
    p = proxy(image, place=intruder.inside, env=intruder.environment)
    busy(p, p.address)
    p.cache_all()
    assert len(threads(p)) > 2
    check_all_threads(intruder, p, but(*SNAPSHOTS, "read the users", "connect"))


@pytest.mark.parametrize("way", [str, lambda path: os.path.relpath(path, "/etc")],
                         ids=["absolute", "relative"])
def test_proxy_can_read_what_resolv_conf_is_a_link_to(proxy, image, intruder, tmp_path, way):
    """In an /etc of its own."""
    need_sandbox()
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "passwd").touch()
    (etc / "resolv.conf").symlink_to(way(intruder.outside / "file"))
    p = proxy(image, place=intruder.inside, env=intruder.environment, preexec_fn=alone(
        lambda: unshare(CLONE_NEWNS) and mount("none", "/", MS_REC | MS_PRIVATE)
        and mount(etc, "/etc", MS_BIND)))
    check_all_threads(intruder, p, but(*SNAPSHOTS, "read the users", "connect", "read outside",
                                       "list outside"))


@pytest.mark.parametrize("name", ["hosts", "resolv.conf", "nsswitch.conf", "gai.conf"])
def test_proxy_can_read_what_links_lead_to(proxy, image, intruder, tmp_path, name):
    """By way of a link to a directory, of one to a link, and of one that is relative."""
    need_sandbox()
    etc, middle = tmp_path / "etc", tmp_path / "middle"
    for path in (etc, middle):
        path.mkdir()
    (etc / "passwd").touch()
    (etc / "static").symlink_to(middle)
    (etc / name).symlink_to(f"static/{name}")
    (middle / name).symlink_to(os.path.relpath(intruder.outside / "file", middle))
    p = proxy(image, place=intruder.inside, env=intruder.environment, preexec_fn=alone(
        lambda: unshare(CLONE_NEWNS) and mount("none", "/", MS_REC | MS_PRIVATE)
        and mount(etc, "/etc", MS_BIND)))
    check_all_threads(intruder, p, but(*SNAPSHOTS, "read the users", "connect", "read outside",
                                       "list outside"))


@pytest.mark.parametrize("options, expected", [([], "yes"), (["--no-sandbox"], "no")])
def test_query_and_log_tell_whether_it_is_confined(server, image, tmp_path, options, expected):
    need_sandbox()
    s = server(image, *ANY_PORT, "--ctl", tmp_path / "ctl", *options)
    assert f"confined: {expected}\n" in done(bgctl("--query", tmp_path / "ctl"), out=None).stdout
    line = "not confined: --no-sandbox" if options else "confined to the files that are needed"
    assert f" {line}\n" in s.log()


def test_daemon_is_confined(daemon, image, intruder, tmp_path):
    need_sandbox()
    s = daemon(image, "--unix", tmp_path / "sock", env=intruder.environment)
    check_all_threads(intruder, s, FORBIDDEN)


def test_without_sandbox_all_of_that_is_possible(server, image, intruder, tmp_path):
    s = server(copy(image, intruder), "--unix", tmp_path / "sock", "--no-sandbox",
               env=intruder.environment)
    expected = {**dict.fromkeys(EVERYTHING, ALLOWED), "become root": ROOT}
    assert intruder.attempts(s, s.proc.pid) == expected


@pytest.mark.parametrize("options", [[], ["--no-sandbox"]])
def test_no_thread_gets_privileges(server, proxy, image, tmp_path, options):
    one = server(image, "--unix", tmp_path / "sock", *options)
    busy(one, tmp_path / "sock")
    for s in (one, proxy(one, *options)):
        assert of_threads(s, "NoNewPrivs") == {"1"}


# Kernels

class Filter(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def failing(number, error, argument=None):
    """For preexec_fn: that system call fails, or that with such a first argument."""
    PR_SET_SECCOMP, MODE_FILTER, ALLOW, ERRNO = 22, 2, 0x7fff0000, 0x50000
    which = [] if argument is None else [(0x20, 0, 0, 16), (0x15, 0, 1, argument)]
    code = [(0x20, 0, 0, 0), (0x15, 0, len(which) + 1, number), *which,
            (0x06, 0, 0, ERRNO | error), (0x06, 0, 0, ALLOW)]
    text = b"".join(struct.pack("=HBBI", *c) for c in code)

    def prepare():
        libc.prctl(38, 1, 0, 0, 0)
        if libc.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(Filter(len(code), text)), 0, 0):
            os._exit(77)

    return prepare


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_kernel_without_landlock_is_no_obstacle(server, image, intruder, tmp_path, error):
    s = server(copy(image, intruder), "--unix", tmp_path / "sock", env=intruder.environment,
               preexec_fn=failing(CREATE_RULESET, error))
    s.address = str(tmp_path / "sock")
    assert s.is_served()
    assert intruder.attempts(s, s.proc.pid)["read outside"] == ALLOWED
    assert "not confined: this system has no Landlock\n" in s.log()


@pytest.mark.parametrize("number", [ADD_RULE, RESTRICT_SELF])
def test_server_that_cannot_be_confined_does_not_start(run_server, image, tmp_path, number):
    need_sandbox()
    options = ["--target", "--unix", tmp_path / "sock", "--pidfile", tmp_path / "pid", image]
    refused(run_server(*options, preexec_fn=failing(number, errno.ENOMEM)), 1, "--no-sandbox",
            "Cannot allocate memory")
    assert os.listdir(tmp_path) == [image.name]


def test_server_that_may_stay_unconfined_starts(server, image, tmp_path):
    s = server(image, "--unix", tmp_path / "sock", "--no-sandbox",
               preexec_fn=failing(RESTRICT_SELF, errno.ENOMEM))
    s.address = str(tmp_path / "sock")
    assert s.is_served()


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES, errno.EINVAL, errno.EAFNOSUPPORT])
@pytest.mark.parametrize("where", [[], ["--laddr", "localhost"]], ids=["all", "a name"])
def test_system_that_refuses_ipv6_leaves_ipv4(server, image, error, where):
    """A filter of system calls, or a kernel without it."""
    if os.uname().machine != "x86_64":
        skip("needs the number of socket()")
    s = server(args=["--target", "--lport", "0", *where, image], wait=False,
               preexec_fn=failing(41, error, socket.AF_INET6))
    until(lambda: s.addresses or s.proc.poll() is not None, what="listening")
    [address] = s.addresses
    assert "." in address[0]
    if not where:
        assert f"cannot listen on [::]:{address[1]}: Address family not supported" in s.log()


# What goes on in spite of it

def test_all_that_comes_later_works(server, image, tmp_path):
    files = {name: tmp_path / name for name in ("sock", "log", "pid")}
    s = server(image, "--unix", files["sock"], "--logpath", files["log"], "--pidfile", files["pid"])
    s.address = str(files["sock"])
    files["log"].rename(tmp_path / "log.1")
    s.proc.send_signal(signal.SIGHUP)
    until(files["log"].exists, what="a new log")
    s.proc.send_signal(signal.SIGUSR1)
    until(lambda: ": complete:" in s.log(), what="a snapshot")
    [snapshot] = tmp_path.glob("disk.img.snapshot.*")
    assert snapshot.read_bytes() == pattern(0, SIZE)
    s.stop()
    assert not files["sock"].exists() and not files["pid"].exists()
    nothing_failed(s)


def test_bitmap_that_was_closed_in_order_knows_its_boot(server, image, tmp_path):
    """Nothing of /proc can be read then."""
    s = server(image, args=["--cow-target", *ANY_PORT, "--cow-file", tmp_path / "overlay", image])
    with s.client() as c:
        c.pwrite(b"x" * 4096, 0)
        c.disc()
    s.stop()
    header = Path(f"{tmp_path}/overlay.map").read_bytes()[:64]
    boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    assert header[56:60] == b"\1\0\0\0" and header[40:56] == boot


def test_proxy_goes_over_to_an_origin_by_name_and_becomes_a_target(server, proxy, image):
    """The first one is known by a number, so that nothing was looked up before."""
    origin = server(image)
    p = proxy(["127.0.0.1", str(origin.port)])
    done(bgctl("--reconnect", p.control, "localhost", origin.port))
    assert p.query("origin").startswith("localhost:")
    p.migrate()
    p.proc.send_signal(signal.SIGUSR1)
    until(lambda: ": complete:" in p.log(), what="a snapshot")
    p.stop()
    assert not p.control.exists()
    nothing_failed(p)


def test_proxy_goes_over_to_an_origin_at_a_unix_socket(server, proxy, image, tmp_path):
    first = server(image)
    p = proxy(first)
    with tempfile.TemporaryDirectory() as elsewhere:
        second = server(image, "--unix", f"{elsewhere}/sock")
        done(bgctl("--reconnect", p.control, f"unix:{elsewhere}/sock"))
        first.stop()
        p.cache_all()
        second.stop()


# Another user

NOBODY = pwd.getpwnam("nobody")
DAEMON = grp.getgrnam("daemon")


def identity(s, uid, gid):
    """All threads have that user and that group, and nothing of root."""
    assert of_threads(s, "Uid") == {"\t".join([str(uid)] * 4)}
    assert of_threads(s, "Gid") == {"\t".join([str(gid)] * 4)}
    assert of_threads(s, "Groups") == {str(gid)}
    for field in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert of_threads(s, field) == {"0" * 16}, field


@needs_root
@hazard("root comes back")
@pytest.mark.parametrize("user, uid, gid", [
    ("nobody", NOBODY.pw_uid, NOBODY.pw_gid), ("nobody:daemon", NOBODY.pw_uid, DAEMON.gr_gid),
    (str(NOBODY.pw_uid), NOBODY.pw_uid, NOBODY.pw_gid), ("nobody:4711", NOBODY.pw_uid, 4711),
    ("4712:4711", 4712, 4711), ("4712:daemon", 4712, DAEMON.gr_gid)])
def test_server_becomes_the_user_for_ever(server, image, intruder, tmp_path, user, uid, gid):
    s = server(copy(image, intruder), "--unix", tmp_path / "sock", "--user", user, "--no-sandbox",
               env=intruder.environment, preexec_fn=lambda: os.setgroups([0, 4713]))
    s.address = str(tmp_path / "sock")
    assert s.is_served()
    identity(s, uid, gid)
    assert intruder.attempts(s, s.proc.pid)["become root"] == errno.EPERM


@needs_root
def test_all_threads_of_a_proxy_are_the_user(proxy, image):
    p = proxy(image, "--user", "nobody")
    busy(p, p.address)
    p.cache_all()
    identity(p, NOBODY.pw_uid, NOBODY.pw_gid)
    assert p.control.stat().st_uid == NOBODY.pw_uid
    assert stat.S_IMODE(p.control.stat().st_mode) == 0o600


@needs_root
def test_daemon_becomes_the_user(daemon, image, tmp_path):
    s = daemon(image, "--user", "nobody", "--unix", tmp_path / "sock")
    identity(s, NOBODY.pw_uid, NOBODY.pw_gid)


@needs_root
def test_socket_belongs_to_the_user(server, place):
    """Who may connect then, as the mode says, and what is later removed by that user."""
    os.chown(place, NOBODY.pw_uid, -1)
    s = server(place / "disk.img", "--unix", place / "sock", "--unix-mode", "0660", "--user",
               "nobody:daemon", "--pidfile", place / "pid")
    found = (place / "sock").stat()
    assert (found.st_uid, found.st_gid) == (NOBODY.pw_uid, DAEMON.gr_gid)
    assert stat.S_IMODE(found.st_mode) == 0o660
    s.address = str(place / "sock")
    s.proc.send_signal(signal.SIGUSR1)
    until(lambda: ": complete:" in s.log(), what="a snapshot")
    [snapshot] = place.glob("disk.img.snapshot.*")
    assert snapshot.stat().st_uid == NOBODY.pw_uid
    s.stop()
    assert sorted(p.name for p in place.iterdir()) == ["disk.img", snapshot.name]
    assert " later: " not in s.log()


@needs_root
@hazard("what --user may not do shows when it is too late")
@pytest.mark.parametrize("options", [[], ["--no-sandbox"]])
def test_what_the_user_may_not_do_is_told(server, place, options):
    """At the start, and when it is to be done.  The directory belongs to root."""
    s = server(place / "disk.img", "--unix", place / "sock", "--user", "nobody",
               "--pidfile", place / "pid", "--logpath", place / "log", *options)
    for deed in (f"make snapshots of {place}/disk.img", f"remove unix:{place}/sock",
                 f"remove pidfile {place}/pid", f"open log file {place}/log"):
        line = f" --user nobody: cannot {deed} later: Permission denied\n"
        assert (place / "log").read_text().count(line) == 1
    (place / "log").rename(place / "log.1")
    with open(place / "log.1") as log:
        s.proc.send_signal(signal.SIGHUP)
        s.proc.send_signal(signal.SIGUSR1)
        told = []
        until(lambda: told.append(log.read()) or "snapshot" in "".join(told)
              and "reopen" in "".join(told), what="two lines")
        s.stop()
        lines = "".join(told) + log.read()
    for line in (f"cannot reopen log file {place}/log: Permission denied",
                 f"snapshot of {place}/disk.img: failed: Permission denied",
                 f"cannot remove unix:{place}/sock: Permission denied",
                 f"cannot remove pidfile {place}/pid: Permission denied"):
        assert lines.count(line + "\n") == 1, lines


@needs_root
def test_log_that_is_the_users_is_no_matter_of_its_directory(server, place):
    """As logrotate creates one."""
    (place / "log").touch()
    os.chown(place / "log", NOBODY.pw_uid, -1)
    s = server(place / "disk.img", "--readonly", *ANY_PORT, "--user", "nobody", "--logpath",
               place / "log")
    assert "open log file" not in (place / "log").read_text()
    s.proc.send_signal(signal.SIGHUP)
    until(lambda: "log file reopened" in (place / "log").read_text(), what="the log, opened again")


@needs_root
@hazard("what --user may not do shows when it is too late")
def test_origin_that_the_user_may_not_connect_to_is_told(server, proxy, image, place):
    sock = place / "sock"
    server(image, "--unix", sock, "--unix-mode", "0666")
    assert "again" not in proxy([f"unix:{sock}"], "--user", "nobody").log()
    sock.chmod(0o600)
    p = proxy([f"unix:{sock}"], "--user", "nobody", name="other")
    line = f"--user nobody: cannot connect to origin unix:{sock} again: Permission denied\n"
    assert p.log().count(line) == 1


@needs_root
@pytest.mark.parametrize("user, named", [
    ("no-such-user", "no such user"), ("nobody:no-such-group", "no such group"), ("4712", "group"),
    ("root", "root"), ("0", "root"), ("0:4711", "root"), ("nobody:", "no such group"),
    (":daemon", "no such user"), ("-1:4711", "no such user"), ("4294967295:4711", "no such user"),
    ("nobody:4294967295", "no such group"), ("nobod", "no such user"), ("x", "no such user")])
def test_user_that_there_is_not_is_named(run_server, tmp_path, user, named):
    """Before anything is created."""
    refused(run_server("--target", *ANY_PORT, "--create", "1M", "--user", user, tmp_path / "new"),
            1, f"--user {user}", named)
    assert os.listdir(tmp_path) == []


@needs_root
def test_only_root_becomes_another_user(run_server, place):
    """Who may not get to where the program is has it opened by root."""
    with open(SERVER, "rb") as program:
        refused(run_server("--target", *ANY_PORT, "--user", "nobody", place / "disk.img",
                           executable=f"/dev/fd/{program.fileno()}", pass_fds=[program.fileno()],
                           preexec_fn=lambda: os.setuid(4711)), 1, "--user", "root")


@needs_root
def test_user_who_cannot_be_become_is_told(run_server, image, tmp_path):
    """In a namespace that does not know that user."""
    def prepare():
        libc.unshare(0x10000000) == 0 or os._exit(77)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text("0 0 1")

    done = run_server("--target", *ANY_PORT, "--user", "4712:4711", image, preexec_fn=prepare)
    if done.returncode == 77:
        skip("needs user namespaces")
    refused(done, 1, "cannot become user 4712")
