"""The server as a program: its command line, images, sockets, log, and its
life from the start to the end.

What a refusal must look like (STYLE.md): one line on stderr that names the
argument and the reason, exit 1, or 2 where the command line itself is wrong.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import resource
import select
import signal
import socket
import stat
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest

from conftest import SERVER, is_portable, loop_device, make_disk, need, skip, terminal
from nbd import *

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
ROOT = Path(__file__).resolve().parent.parent
SIZE = MIB + 77
OPTIONS = {"target", "lport", "laddr", "unix", "unix-mode", "allow", "max-connections",
           "max-per-host", "keepalive", "max-queue-size", "max-buf-size", "inetd",
           "connected-fd", "oldstyle", "readonly", "create", "threads", "daemonize", "pidfile",
           "logpath", "syslog", "user", "no-sandbox", "quiet", "verbose", "stats", "ctl", "help",
           "version"}
hazard = pytest.mark.hazard
ANY_PORT = ["--laddr", "127.0.0.1", "--lport", "0"]


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


def refused(done, status, *names):
    """It ended with that status and one line, which contains the names."""
    assert done.returncode == status, done
    assert not done.stdout, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done
    assert lines[0].startswith("xnbd-server: "), done
    for name in names:
        assert str(name) in lines[0], done


def in_step(c):
    assert c.pread(512, 1000) == pattern(1000, 512)


# Linux only: what a process can be deprived of

libc = ctypes.CDLL(None, use_errno=True)
PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 24, 36
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000


def bound_by_modes():
    """For preexec_fn: even root obeys the modes of files."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def unshare(flags):
    """Into namespaces of its own; True if that was allowed."""
    return (libc.unshare(flags) == 0
            or libc.unshare(flags | CLONE_NEWUSER) == 0)


def mount(source, target, flags):
    return libc.mount(os.fsencode(source), os.fsencode(target), None, flags, None) == 0


def alone(prepare):
    """prepare as a preexec_fn; skips where that is not allowed."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if prepare() else 1)
    if os.waitpid(pid, 0)[1]:
        skip("needs namespaces (root)")
    return prepare


# The command line

def test_help_tells_all_options(run_server):
    done = run_server("--help")
    assert done.returncode == 0 and not done.stderr
    assert set(re.findall(r"--([a-z-]+)", done.stdout)) >= OPTIONS
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_version_is_told(run_server):
    done = run_server("--version")
    assert done.returncode == 0 and not done.stderr
    assert re.fullmatch(r"xnbd-server \d+(\.\d+)+\S*\n", done.stdout)
    assert run_server("-V").stdout == done.stdout
    assert run_server("-h").stdout == run_server("--help").stdout


USAGE_ERRORS = [
    # arguments, what the line must name
    ([], "--target"),
    (["--lport", "0"], "--target"),
    (["--target", "--bogus"], "--bogus"),
    (["--target", "--readonlyy"], "--readonlyy"),
    (["--target", "-x"], "-x"),
    (["-t", "-c"], "--cow-target"),
    (["-tl"], "--lport"),
    (["-t", "-l", "x"], "--lport"),
    (["--target", "--l", "0"], "--l"),
    (["--target", "--readonly=yes"], "--readonly"),
    (["--target", "--proxy"], "--proxy"),
    (["--cow-target", "--target"], "--target"),
]
# They follow "--target" and stand before an image that exists.
USAGE_ERRORS += [(["--target", option, value], option) for option, values in {
    "--lport": ["", "x", "80x", "-1", "65536", "0x50", "1.5", " 1", "99999999999999999999"],
    "--stats": ["", "0", "-1", "x", "1.5", "86401"],
    "--threads": ["", "0", "-1", "two", "4294967297"],
    "--max-connections": ["", "0", "-1", "many", "65537"],
    "--max-per-host": ["", "0", "-1", "many", "65537"],
    "--keepalive": ["", "-1", "x", "1.5", "36001"],
    "--connected-fd": ["", "-1", "x", "0x3", "2147483648"],
    "--create": ["", "K", "1Q", "1KB", "-1", "1.5G", "1 G", "16777216T",
                 "99999999999999999999"],
    "--unix": [""], "--logpath": [""], "--pidfile": [""], "--user": [""],
}.items() for value in values]
CONTRADICTIONS = [
    "--inetd --daemonize", "--inetd --connected-fd=3", "--inetd --lport=0",
    "--inetd --laddr=127.0.0.1", "--inetd --unix=sock", "--inetd --threads=2",
    "--inetd --max-connections=2", "--inetd --max-per-host=2", "--connected-fd=3 --max-per-host=2",
    "--connected-fd=3 --max-connections=2",
    "--connected-fd=3 --daemonize", "--connected-fd=3 --lport=0", "--connected-fd=3 --unix=sock",
    "--connected-fd=3 --laddr=::1", "--connected-fd=3 --oldstyle", "--connected-fd=3 --threads=2",
    "--quiet --verbose", "--logpath=log --syslog", "--create=1M --readonly",
]


def quoted(arguments):
    return " ".join(repr(a) if not a or " " in a else a for a in arguments)


@pytest.mark.hazard("a misspelt option is ignored")
@pytest.mark.parametrize("arguments, named", USAGE_ERRORS,
                         ids=[quoted(a) for a, _ in USAGE_ERRORS])
def test_wrong_usage_is_named(run_server, image, arguments, named):
    refused(run_server(*arguments, image), 2, named)


@pytest.mark.parametrize("options", CONTRADICTIONS)
def test_contradiction_is_named(run_server, image, tmp_path, options):
    """Either of the two may be named."""
    done = run_server("--target", *options.split(), image, cwd=tmp_path)
    refused(done, 2)
    assert any(option.split("=")[0] in done.stderr for option in options.split())
    assert os.listdir(tmp_path) == [image.name]


@pytest.mark.parametrize("option", ["--lport", "--laddr", "--unix", "--create", "--threads",
                                    "--pidfile", "--logpath", "--connected-fd"])
def test_missing_value_is_named(run_server, option):
    refused(run_server("--target", option), 2, option)


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("way", ["closed", "full"])
def test_output_that_cannot_be_written_is_an_error(run_server, option, way):
    with open("/dev/full", "w") as full:
        done = run_server(option, stdout=full, preexec_fn=lambda: way == "full" or os.close(1))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "standard output" in done.stderr


def test_control_characters_do_not_reach_the_log(run_server):
    refused(run_server("--target", *ANY_PORT, "\x1b[31m\n\x7f\x9b ä.img"), 1, "?[31m???? ä.img")
    raw = os.fsdecode(b"\x9b31m \x80\x9f\xc3\xa4\xa4.img")        # no UTF-8
    refused(run_server("--target", *ANY_PORT, raw, errors="surrogateescape"), 1,
            os.fsdecode(b"?31m ??\xc3\xa4\xa4.img"))


def test_missing_image_argument_is_named(run_server):
    refused(run_server("--target", *ANY_PORT), 2, "DISK_IMAGE")


def test_second_image_argument_is_named(run_server, image):
    refused(run_server("--target", *ANY_PORT, image, "another.img"), 2, "another.img")


def test_options_may_be_abbreviated_and_follow_the_image(server, image):
    s = server(args=["--target", image, "--laddr=127.0.0.1", "--lp", "0", "--read"])
    assert s.client().flags & NBD_FLAG_READ_ONLY


def test_letters_of_the_original_are_understood(server, run_server, image):
    s = server(args=["-tr", "-l0", "--laddr=127.0.0.1", image])
    assert s.client().flags & NBD_FLAG_READ_ONLY
    cow = server(args=["-c", *ANY_PORT, image])
    assert not cow.client().flags & NBD_FLAG_READ_ONLY
    refused(run_server("-p"), 2, "REMOTE_HOST")
    refused(run_server("-t", "-L", "", image), 2, "--logpath")
    refused(run_server("-t", "-i", "-d", image), 2, "--inetd", "--daemonize")


def test_image_may_look_like_an_option(server, tmp_path):
    make_disk(tmp_path / "--readonly", content=pattern(0, SIZE))
    s = server(args=["--target", *ANY_PORT, "--", "--readonly"], cwd=tmp_path)
    c = s.client()
    assert not c.flags & NBD_FLAG_READ_ONLY
    in_step(c)


# Images

def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


def dangling_link(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [Path.mkdir, fifo, unix_socket, dangling_link, lambda path: None],
                         ids=["directory", "fifo", "socket", "dangling link", "missing"])
@pytest.mark.parametrize("options", [[], ["--readonly"]], ids=["writable", "readonly"])
def test_what_is_no_image_is_refused_by_name(run_server, tmp_path, make, options):
    path = tmp_path / "no.img"
    make(path)
    refused(run_server("--target", *ANY_PORT, *options, path), 1, path)


def test_missing_image_hints_at_create(run_server, tmp_path):
    path = tmp_path / "no.img"
    refused(run_server("--target", *ANY_PORT, path), 1, path, "--create")
    for options in (["--target", "--readonly"], ["--cow-target"]):
        done = run_server(*options, *ANY_PORT, path)
        refused(done, 1, path)
        assert "--create" not in done.stderr


FORMATS = [("qcow2", b"QFI\xfb\0\0\0\3"), ("VMDK", b"KDMV\1\0\0\0"), ("VMDK", b"COWD"),
           ("VMDK", b"# Disk DescriptorFile\nversion=1\n"),
           ("VDI", b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe")]


@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
@pytest.mark.parametrize("name, head", FORMATS)
def test_image_of_another_format_is_told_and_served(server, disk, mode, name, head):
    image = disk(SIZE, head)
    s = server(args=[mode, *ANY_PORT, image])
    until(lambda: re.search(f"image {image} looks like {name}: .* raw image\n", s.log()),
          what="the remark")
    assert s.client().pread(len(head)) == head


@pytest.mark.parametrize("mode", ["--target", "--cow-target"])
def test_empty_image_is_told(server, disk, mode):
    s = server(args=[mode, *ANY_PORT, disk(0)])
    until(lambda: "is empty" in s.log(), what="the remark")
    assert s.client().size == 0


def test_usual_image_is_not_remarked_on(server, image):
    s = server(image)
    s.stop()
    assert "looks like" not in s.log() and "empty" not in s.log()


def test_character_device_is_refused(run_server):
    refused(run_server("--target", *ANY_PORT, "/dev/zero"), 1, "/dev/zero")


def test_file_under_a_file_is_refused(run_server, image):
    refused(run_server("--target", *ANY_PORT, image / "x"), 1, image / "x")


@pytest.mark.parametrize("mode, options", [(0o000, []), (0o000, ["--readonly"]), (0o444, []),
                                           (0o222, []), (0o222, ["--readonly"])])
def test_image_without_permission_is_refused(run_server, image, mode, options):
    image.chmod(mode)
    done = run_server("--target", *ANY_PORT, *options, image, preexec_fn=bound_by_modes)
    refused(done, 1, image, "ermission denied")


def test_write_protected_image_is_served_readonly(server, image):
    image.chmod(0o444)
    c = server(image, "--readonly", preexec_fn=bound_by_modes).client()
    assert c.error_of(NBD_CMD_WRITE, 0, payload=b"x") == NBD_EPERM
    in_step(c)


def test_image_behind_a_symlink_is_served(server, image, tmp_path):
    (tmp_path / "link").symlink_to(image.name)
    in_step(server(tmp_path / "link").client())


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, SIZE])
def test_image_of_any_size_keeps_it(server, disk, size):
    """The whole of it is overwritten, and there is nothing else afterwards."""
    image = disk(content=pattern(0, size))
    s = server(image)
    with s.client(structured=True) as c:
        assert c.size == size
        if size:
            c.pwrite(pattern(0, size, seed=0x5a))
            c.zero(1, size - 1)
            assert c.pread(size) == pattern(0, size - 1, seed=0x5a) + b"\0"
        assert c.error_of(NBD_CMD_WRITE, size, payload=b"x") == NBD_ENOSPC
    s.stop()
    assert image.read_bytes() == (pattern(0, size - 1, seed=0x5a) + b"\0" if size else b"")


def largest_file(directory, most):
    """Makes a sparse file as large as that file system allows, at least 4 TiB."""
    path = Path(directory) / "large.img"
    for size in (most, 64 * TIB + 1, 16 * TIB, 16 * TIB - 4096, 8 * TIB + 1, 4 * TIB + 4097):
        try:
            return make_disk(path, size), size
        except OSError:
            path.unlink(missing_ok=True)
    return skip(f"needs a file system with files of over 4 TiB ({directory})")


def test_sparse_image_as_large_as_the_file_system_allows(server, tmp_path):
    image, size = largest_file(tmp_path, (1 << 63) - 1)
    places = [0, 2 * GIB - 5, 4 * GIB - 5, 2 * TIB - 5, 4 * TIB - 5, size - 4097, size - 10]
    s = server(image)
    with s.client(structured=True, contexts=["base:allocation"]) as c:
        assert c.size == size
        for at in places:
            c.pwrite(at.to_bytes(10, "big"), at)
        for at in places:
            assert c.pread(10, at) == at.to_bytes(10, "big")
        assert c.pread(MIB, TIB) == bytes(MIB)
        assert c.block_status(4096, size - 4096)["base:allocation"]
        assert c.error_of(NBD_CMD_READ, size - 9, 10) == NBD_EINVAL
        assert c.error_of(NBD_CMD_WRITE, size - 9, payload=bytes(10)) == NBD_ENOSPC
    s.stop()
    assert image.stat().st_size == size
    with open(image, "rb") as f:
        for at in places:
            assert os.pread(f.fileno(), 10, at) == at.to_bytes(10, "big")
    image.unlink()


@pytest.fixture
def block_device(tmp_path):
    """A loop device and its file."""
    backing = make_disk(tmp_path / "backing", content=pattern(0, 4 * MIB))
    with loop_device(backing) as device:
        yield device, backing
        subprocess.run([need("blockdev", "util-linux"), "--setrw", device], check=True)


def test_block_device_is_an_image(server, block_device):
    device, backing = block_device
    expected = bytearray(pattern(0, 4 * MIB))
    s = server(device)
    with s.client(structured=True, contexts=["base:allocation"]) as c:
        assert c.size == 4 * MIB
        assert c.pread(4 * MIB) == expected
        for at, length in [(0, 1), (511, 2), (70000, 100000), (4 * MIB - 3, 3)]:
            c.pwrite(pattern(at, length, seed=9), at)
            expected[at:at + length] = pattern(at, length, seed=9)
        for at, length in [(MIB, 65536), (2 * MIB + 5, 130000), (4 * MIB - 5000, 4000)]:
            c.zero(length, at, NBD_CMD_FLAG_NO_HOLE if at == MIB else 0)
            expected[at:at + length] = bytes(length)
        c.cache(MIB)
        assert c.block_status(MIB)["base:allocation"]
        c.flush()
        assert c.pread(4 * MIB) == expected
        c.trim(8192, 3 * MIB)
        trimmed = c.pread(8192, 3 * MIB)
        assert trimmed in (bytes(8192), expected[3 * MIB:][:8192])
        expected[3 * MIB:3 * MIB + 8192] = trimmed
    s.stop()
    assert backing.read_bytes() == expected


def test_block_device_readonly(server, run_server, block_device):
    device, backing = block_device
    subprocess.run([need("blockdev", "util-linux"), "--setro", device], check=True)
    refused(run_server("--target", *ANY_PORT, device), 1, device)
    c = server(device, "--readonly").client()
    assert c.error_of(NBD_CMD_WRITE_ZEROES, 0, 512) == NBD_EPERM
    assert c.pread(4 * MIB) == pattern(0, 4 * MIB)


# --create

@pytest.mark.parametrize("text, size", [
    ("0", 0), ("1", 1), ("4097", 4097), ("3K", 3 * KIB), ("5M", 5 * MIB), ("2G", 2 * GIB),
    ("4T", 4 * TIB), ("1m", MIB)])
def test_create_makes_a_sparse_private_image(server, tmp_path, text, size):
    image = tmp_path / "new.img"
    s = server(image, "--create", text, umask=0)
    assert s.client().size == size
    s.stop()
    assert image.stat().st_size == size
    assert image.stat().st_blocks * 512 <= 4096
    assert stat.S_IMODE(image.stat().st_mode) == 0o600


def test_create_leaves_an_image_alone(server, image):
    mode = image.stat().st_mode
    s = server(image, "--create", "1G")
    assert s.client().size == SIZE
    s.stop()
    assert image.read_bytes() == pattern(0, SIZE) and image.stat().st_mode == mode


@pytest.mark.parametrize("size, name", [("1M", "nowhere/new.img"), ("8388608T", "new.img")])
def test_create_that_fails_leaves_nothing(run_server, tmp_path, size, name):
    done = run_server("--target", *ANY_PORT, "--create", size, name, cwd=tmp_path)
    assert done.returncode in (1, 2)
    refused(done, done.returncode, name if done.returncode == 1 else size)
    assert not os.listdir(tmp_path)


def test_create_that_cannot_start_may_be_repeated(run_server, server, tmp_path):
    """A first start that fails for another reason does not spoil the next."""
    options = ["--create", "1M", tmp_path / "new.img"]
    refused(run_server("--target", "--laddr", "203.0.113.77", "--lport", "0", *options), 1,
            "203.0.113.77")
    assert server(args=["--target", *ANY_PORT, *options]).client().size == MIB


# Listening on TCP

def need_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        skip("needs IPv6 on the loopback interface")


def test_several_addresses_share_one_free_port(server, image):
    need_ipv6()
    names = ["127.0.0.1", "127.0.0.2", "::1"]
    s = server(args=["--target", "--lport", "0", *[f"--laddr={n}" for n in names], image])
    assert [host for host, _ in s.addresses] == names
    assert len({port for _, port in s.addresses}) == 1 and s.port
    for address in s.addresses:
        in_step(s.client(address))
    with pytest.raises(ConnectionRefusedError):
        s.raw(("127.0.0.3", s.port))


def test_name_is_listened_on_at_all_its_addresses(server, image):
    known = {a[4][0] for a in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    s = server(args=["--target", "--lport", "0", "--laddr", "localhost", image])
    assert {host for host, _ in s.addresses} == known
    for address in s.addresses:
        in_step(s.client(address))


def test_default_is_port_8520_of_all_addresses(server, image):
    """In a network of its own, where nobody else has that port."""
    need_ipv6()
    s = server(args=["--target", image], wait=False,
               preexec_fn=alone(lambda: unshare(CLONE_NEWNET)))
    until(lambda: len(s.addresses) >= 2 or s.proc.poll() is not None, what="listening")
    assert sorted(s.addresses) == [("0.0.0.0", 8520), ("::", 8520)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_in_use_is_named(server, run_server, image, host):
    if host == "::1":
        need_ipv6()
    s = server(image, "--laddr", host, "--lport", "0")
    refused(run_server("--target", "--laddr", host, "--lport", s.port, image), 1, s.port,
            "in use")
    assert s.is_served()


def test_address_may_have_brackets(server, image):
    need_ipv6()
    assert server(args=["--target", "--lport", "0", "--laddr", "[::1]", image]).addresses[0][0] == "::1"


def test_address_that_is_named_twice_counts_once(server, image):
    names = ["127.0.0.1", "127.0.0.2", "localhost", "127.0.0.1"]
    s = server(args=["--target", "--lport", "0", *[f"--laddr={n}" for n in names], image], wait=False)
    until(lambda: len(s.addresses) >= 2 or s.proc.poll() is not None, what="listening")
    assert len(s.addresses) == len(set(s.addresses)), s.log()
    in_step(s.client(s.addresses[1]))


def own_hosts(path, text):
    """For preexec_fn: /etc/hosts has this text."""
    path.write_text(text)
    return alone(lambda: unshare(CLONE_NEWNS) and mount("none", "/", MS_REC | MS_PRIVATE)
                 and mount(path, "/etc/hosts", MS_BIND))


def test_name_whose_addresses_repeat_is_listened_on_once(server, image, tmp_path):
    s = server(args=["--target", "--lport", "0", "--laddr", "disk.invalid", image],
               preexec_fn=own_hosts(tmp_path / "hosts", 2 * "127.0.0.1 disk.invalid\n"))
    assert len(s.addresses) == 1
    in_step(s.client())


def test_address_of_a_name_that_cannot_be_had_is_logged(server, image, tmp_path):
    hosts = own_hosts(tmp_path / "hosts", "203.0.113.77 disk.invalid\n127.0.0.1 disk.invalid\n")
    s = server(args=["--target", "--lport", "0", "--laddr", "disk.invalid", image], preexec_fn=hosts)
    assert [host for host, _ in s.addresses] == ["127.0.0.1"]
    assert f"cannot listen on 203.0.113.77:{s.port}: Cannot assign requested address" in s.log()


def test_port_is_free_again_after_the_end(server, image):
    """Although connections to it may still be in TIME_WAIT."""
    first = server(image)
    c = first.client()
    first.stop()
    c.close()
    assert server(image, "--laddr", "127.0.0.1", "--lport", first.port).is_served()


@pytest.mark.parametrize("name", ["203.0.113.77", "name.invalid", "256.1.1.1", ""])
def test_address_that_is_not_ours_is_named(run_server, image, name):
    done = run_server("--target", "--lport", "0", "--laddr", name, image)
    refused(done, 2 if not name and done.returncode == 2 else 1, name)


def test_one_bad_address_of_several_is_enough(run_server, image):
    done = run_server("--target", *ANY_PORT, "--laddr", "203.0.113.77", image)
    refused(done, 1, "203.0.113.77")


# Listening on a Unix socket

@pytest.fixture
def path(tmp_path):
    """Where Unix sockets of the tests are."""
    return tmp_path / "sock"


def test_unix_socket_is_served_alone_and_removed(server, image, path):
    s = server(image, "--unix", path)
    assert s.addresses == [str(path)]
    in_step(s.client())
    s.stop()
    assert not path.exists()


def test_unix_socket_beside_tcp(server, image, path):
    s = server(image, "--unix", path, *ANY_PORT)
    assert s.unix == str(path) and s.port
    for address in s.addresses:
        in_step(s.client(address))


@pytest.mark.hazard("a stale Unix socket stops the next start")
def test_stale_unix_socket_is_replaced(server, image, path):
    unix_socket(path)
    in_step(server(image, "--unix", path).client())


@pytest.mark.hazard("a stale Unix socket stops the next start")
def test_unix_socket_of_a_killed_server_is_replaced(server, image, path):
    server(image, "--unix", path).kill()
    assert path.exists()
    in_step(server(image, "--unix", path).client())


@pytest.mark.hazard("a live Unix socket is stolen")
def test_live_unix_socket_is_refused(server, run_server, image, path):
    s = server(image, "--unix", path)
    refused(run_server("--target", "--unix", path, image), 1, path)
    assert s.is_served()


def test_unix_socket_of_a_stopped_process_is_live(run_server, image, path):
    """One that does not accept, and whose queue is full."""
    with socket.socket(socket.AF_UNIX) as s, socket.socket(socket.AF_UNIX) as waiting:
        s.bind(str(path))
        s.listen(0)
        waiting.connect(str(path))
        refused(run_server("--target", "--unix", path, image), 1, path)
    assert path.is_socket()


@pytest.mark.hazard("a live Unix socket is stolen: nor is another file")
@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, dangling_link],
                         ids=["file", "directory", "dangling link"])
def test_what_is_no_socket_is_not_replaced(run_server, image, path, make):
    make(path)
    before = path.lstat()
    refused(run_server("--target", "--unix", path, image), 1, path)
    assert path.lstat() == before


def test_socket_of_a_later_server_is_not_removed(server, image, path):
    first = server(image, "--unix", path)
    path.unlink()
    later = server(image, "--unix", path)
    first.stop()
    assert later.is_served()


@pytest.mark.parametrize("length, status", [(107, 0), (108, 1), (200, 1), (5000, 1)])
def test_unix_path_too_long_is_refused(server, run_server, image, tmp_path, monkeypatch, length,
                                       status):
    """The system's limit is 107 bytes."""
    monkeypatch.chdir(tmp_path)
    name = "s" * length
    if status:
        done = run_server("--target", "--unix", name, image)
        refused(done, status, name[:107])
    else:
        in_step(server(image, "--unix", name).client())


def test_unix_socket_in_no_directory_is_refused(run_server, image, tmp_path):
    where = tmp_path / "nowhere" / "sock"
    refused(run_server("--target", "--unix", where, image), 1, where)


@pytest.mark.hazard("two starts at once")
@pytest.mark.parametrize("option", ["--unix", "--ctl"])
def test_socket_of_a_server_that_starts_is_not_stolen(server, image, tmp_path, option):
    """It is bound, and does not listen yet; its server has the directory locked."""
    path = tmp_path / "sockets" / "sock"
    path.parent.mkdir()
    directory = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    with socket.socket(socket.AF_UNIX) as first:
        first.bind(str(path))
        own = path.lstat().st_ino
        s = server(image, *ANY_PORT, option, path, wait=False)
        s.expected_status = 1
        until(lambda: s.proc.poll() is not None or str(path.parent) in
              [os.readlink(fd) for fd in Path(f"/proc/{s.proc.pid}/fd").iterdir()], what="start")
        first.listen()
        os.close(directory)
        assert s.wait() == 1 and "another server is listening there" in s.log()
        assert path.lstat().st_ino == own


def locked_directory(directory, stack):
    (directory / "disk.img").write_bytes(bytes(512))
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    done = subprocess.run([SERVER, "--target", "--unix", directory / "sock", directory / "disk.img"],
                          stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          timeout=DEADLINE)
    os.close(fd)
    refused(done, 1, directory / "sock", "lock")


@pytest.mark.meanwhile(work=locked_directory)
def test_directory_that_stays_locked_holds_no_start_up(meanwhile):
    meanwhile()


def test_stale_socket_in_a_directory_that_cannot_be_locked_is_left(server, run_server, image,
                                                                   tmp_path):
    """One that may be written to and not be read."""
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o300)
    in_step(server(image, "--unix", directory / "sock", preexec_fn=bound_by_modes).client())
    unix_socket(directory / "stale")
    done = run_server("--target", "--unix", directory / "stale", image, preexec_fn=bound_by_modes)
    refused(done, 1, directory / "stale", "ermission denied")


# The log

STAMP = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\S* \S")


def visit(server):
    server.client(name="a\nb").disc()
    server.is_served()


def test_log_lines_name_the_program(server, image):
    s = server(image)
    visit(s)
    s.stop()
    lines = s.log().splitlines()
    assert lines and all(line.startswith("xnbd-server: ") for line in lines)


def test_log_file_has_times_and_stderr_nothing(server, image, tmp_path):
    s = server(image, "--logpath", tmp_path / "log")
    visit(s)
    s.stop()
    assert s.stderr.read_text() == ""
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines and all(STAMP.match(line) for line in lines)


def test_log_file_is_appended_to(server, image, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    server(image, "--logpath", log)
    assert log.read_text().startswith("before\n") and "listening on" in log.read_text()


def test_hangup_reopens_the_log_file(server, image, tmp_path):
    log, old = tmp_path / "log", tmp_path / "log.1"
    s = server(image, "--logpath", log)
    for _ in range(3):
        log.rename(old)
        s.proc.send_signal(signal.SIGHUP)
        until(log.exists, what="a new log file")
        until(lambda: log.stat().st_size, what="its first line")
        size = old.stat().st_size
        visit(s)
        assert old.stat().st_size == size
    s.stop()
    assert log.read_text() and old.stat().st_size == size


def test_log_file_that_cannot_be_reopened_costs_nothing(server, image, tmp_path):
    directory = tmp_path / "logs"
    directory.mkdir()
    s = server(image, "--logpath", directory / "log")
    directory.rename(tmp_path / "moved")
    s.proc.send_signal(signal.SIGHUP)
    moved = tmp_path / "moved" / "log"
    until(lambda: "reopen" in moved.read_text(), what="the complaint")
    assert s.is_served()


def test_hangup_without_log_file_is_harmless(server, image):
    s = server(image)
    s.proc.send_signal(signal.SIGHUP)
    assert s.is_served()


@pytest.mark.parametrize("option", ["--logpath", "--pidfile"])
@pytest.mark.parametrize("name", ["nowhere/file", "directory"])
def test_file_that_cannot_be_written_is_refused(run_server, image, tmp_path, option, name):
    (tmp_path / "directory").mkdir()
    done = run_server("--target", *ANY_PORT, option, name, image, cwd=tmp_path)
    refused(done, 1, name)


class Syslog:
    """A directory to be /dev, in which `log` is a socket of ours."""

    def __init__(self, directory):
        self.directory = directory / "dev"
        self.directory.mkdir()
        os.mknod(self.directory / "null")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(self.directory / "log"))
        self.sock.settimeout(DEADLINE)

    def enter(self):
        null = self.directory / "null"
        return (unshare(CLONE_NEWNS) and mount("none", "/", MS_REC | MS_PRIVATE)
                and mount("/dev/null", null, MS_BIND)
                and mount(self.directory, "/dev", MS_BIND | MS_REC))

    def wait_for(self, text):
        while text not in (line := self.sock.recv(4096).decode()):
            pass
        return line


@pytest.fixture
def syslog(tmp_path):
    log = Syslog(tmp_path)
    yield log
    log.sock.close()


def test_syslog_gets_the_log_and_stderr_nothing(server, image, path, syslog):
    s = server(image, "--syslog", "--unix", path, wait=False, preexec_fn=alone(syslog.enter))
    line = syslog.wait_for("listening on")
    assert line.startswith("<") and f"xnbd-server[{s.proc.pid}]: " in line
    s.address = str(path)
    assert s.is_served()
    s.stop()
    assert s.log() == ""


# A log that nobody reads

class Unread:
    """Where a log goes: a pipe, a terminal, a FIFO, syslog.  It holds little."""

    def __init__(self, kind, directory, stack):
        self.options, self.popen, self.ends = [], {}, ()
        if kind == "syslog":
            self.options = ["--syslog"]
            syslog = Syslog(directory)
            stack.callback(syslog.sock.close)
            self.popen = {"preexec_fn": alone(syslog.enter)}
            self.read = lambda: syslog.sock.recv(4096) + b"\n"
            return
        if kind == "fifo":
            self.options = ["--logpath", directory / "log"]
            os.mkfifo(directory / "log")
            self.out = os.open(directory / "log", os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(self.out, True)
        else:
            self.out, self.into = os.openpty() if kind == "terminal" else os.pipe()
            self.popen = {"stderr": self.into}
            stack.callback(os.close, self.into)
        if kind != "terminal":
            fcntl.fcntl(self.out, 1031, 4096)       # F_SETPIPE_SZ
        stack.callback(os.close, self.out)
        self.read = lambda: os.read(self.out, 65536)


@pytest.fixture(params=["pipe", "terminal", "fifo", "syslog"])
def unread(request, tmp_path):
    with contextlib.ExitStack() as stack:
        yield Unread(request.param, tmp_path, stack)


def ready(s, path):
    """Waits until a server is there whose log cannot be read."""
    s.address = str(path)

    def connects():
        with contextlib.suppress(OSError):
            return s.raw()

    until(connects).close()
    return s


LONG = 240      # lines of 1024 bytes: more than there is room for


def fill(s):
    """A client has that many such lines logged."""
    c = s.hello()
    for _ in range(LONG):
        assert c.refused(NBD_OPT_INFO, info_data("x" * 4000)) == NBD_REP_ERR_UNKNOWN
    return c


@hazard("whoever should read the log does not")
def test_log_that_nobody_reads_costs_lines_only(server, image, path, unread):
    s = ready(server(args=["--target", "--unix", path, "--export", f"a={image}", *unread.options],
                     wait=False, **unread.popen), path)
    c = fill(s)
    c.go("a")
    in_step(c)
    in_step(s.client(name="a"))
    log, lost = b"", 0
    while not 0 < LONG - len(re.findall(rb": refused: .*x\s", log)) <= lost:
        log += unread.read()
        lost = sum(map(int, re.findall(rb"(\d+) lines of the log were lost\s", log)))
    fill(s).close()
    s.stop()


@hazard("whoever should read the log does not: a start that fails")
def test_start_that_fails_waits_for_no_reader(server, path):
    out, into = os.pipe()
    os.set_blocking(into, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(into, b"x")
    os.set_blocking(into, True)
    s = server("nowhere.img", "--unix", path, wait=False, stderr=into)
    s.expected_status = 1
    s.wait()
    os.close(into)
    os.close(out)


@hazard("whoever should read the log does not: a FIFO without a reader")
def test_fifo_is_a_log_without_a_reader(server, image, path, tmp_path):
    os.mkfifo(tmp_path / "log")
    s = ready(server(image, "--unix", path, "--logpath", tmp_path / "log", wait=False), path)
    s.proc.send_signal(signal.SIGHUP)
    assert s.is_served()
    with open(tmp_path / "log") as log:
        lines = iter(log.readline, "")
        assert any("listening on" in line for line in lines)
        assert any("log file reopened" in line for line in lines)
    assert s.is_served()


# What is a log

@hazard("an image is named as the log file")
@pytest.mark.parametrize("content", [
    pattern(0, 5000), bytes(4096), b"QFI\xfb\0\0\0\3", b"a name and zeros\0", b"text\n\x01"],
    ids=["image", "zeros", "qcow2", "tar", "one byte"])
def test_file_that_is_no_text_is_no_log(run_server, image, tmp_path, content):
    log = tmp_path / "log"
    log.write_bytes(content)
    refused(run_server("--target", *ANY_PORT, "--logpath", log, image), 1, log, "text")
    assert log.read_bytes() == content


@hazard("an image is named as the log file: a block device")
def test_block_device_is_no_log(run_server, image, block_device):
    device, backing = block_device
    refused(run_server("--target", *ANY_PORT, "--logpath", device, image), 1, device, "block device")
    assert backing.read_bytes() == pattern(0, 4 * MIB)


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "null", "terminal"])
def test_log_may_be(server, image, tmp_path, path, kind):
    log = tmp_path / "log"
    ends = os.openpty() if kind == "terminal" else ()
    if kind in ("empty", "text"):
        log.write_text("\x1b[1mä\x1b[m\t\r\n" if kind == "text" else "")
    name = {"null": "/dev/null", "terminal": ends and os.ttyname(ends[1])}.get(kind, log)
    s = ready(server(image, "--unix", path, "--logpath", name, wait=False), path)
    assert s.is_served()
    if kind == "terminal":
        told = b""
        while b"listening on" not in told:
            told += os.read(ends[0], 4096)
    for fd in ends:
        os.close(fd)


def test_file_that_is_replaced_by_no_text_is_not_opened_again(server, image, tmp_path):
    log = tmp_path / "log"
    s = server(image, "--no-sandbox", "--logpath", log)
    log.rename(tmp_path / "old")
    log.write_bytes(bytes(100))
    s.proc.send_signal(signal.SIGHUP)
    until(lambda: "cannot reopen" in (tmp_path / "old").read_text(), what="the complaint")
    assert log.read_bytes() == bytes(100) and s.is_served()


# The journal

def journal_of(path, inode=0):
    st = path.stat()
    return {**os.environ, "JOURNAL_STREAM": f"{st.st_dev}:{st.st_ino + inode}"}


@pytest.mark.parametrize("is_journal", [True, False])
def test_journal_is_told_levels(server, image, tmp_path, is_journal):
    """If standard error is it, and not where it was redirected."""
    stderr = tmp_path / "server0.log"
    stderr.touch()
    s = server(args=["--cow-target", "--verbose", *ANY_PORT, image],
               env=journal_of(stderr, not is_journal))
    s.proc.send_signal(signal.SIGUSR1)
    until(lambda: "SIGUSR1 ignored" in s.log(), what="an error")
    s.client().disc()
    s.stop()
    lines = s.log().splitlines()
    if not is_journal:
        assert all(line.startswith("xnbd-server: ") for line in lines)
        return
    assert all(re.match("<[367]>xnbd-server: ", line) for line in lines)
    for line in ("<3>xnbd-server: SIGUSR1", "<6>.* connected", "<7>.* flags"):
        assert re.search(line, s.log())


def test_journal_is_told_the_level_of_a_refusal(server, tmp_path):
    stderr = tmp_path / "server0.log"
    stderr.touch()
    s = server(args=["--bogus"], wait=False, env=journal_of(stderr))
    s.expected_status = 2
    s.wait()
    assert s.log().startswith("<3>xnbd-server: ")


# Many clients

def leaves_at_once(s):
    s.raw().close()


def is_refused(s):
    with s.raw() as c:
        c.expect_closed()


def is_served_and_leaves(s):
    s.client().disc()


def asks_for_another_export(s):
    with s.hello() as c:
        c.option(NBD_OPT_EXPORT_NAME, b"nowhere")
        c.expect_closed()


@hazard("a client floods the log: by connections")
@pytest.mark.parametrize("come, errors, events, options", [
    (leaves_at_once, 0, 1, []), (is_refused, 1, 0, ["--allow", "127.0.0.2"]),
    (is_served_and_leaves, 0, 2, []), (asks_for_another_export, 1, 1, ["--export", "a={}"])],
    ids=lambda value: getattr(value, "__name__", ""))
def test_flood_of_clients_is_counted_not_told(server, image, come, errors, events, options):
    """The first 500 lines, of errors and of events, are there, and the number of the others."""
    options = [word.format(image) for word in options]
    s = server(args=["--target", *ANY_PORT, *options, *[image] * ("--export" not in options)])
    until(lambda: re.search(r"disconnected|refused", s.log()), what="the end of who looked")
    begun, count = time.monotonic(), 600
    for _ in range(count):
        come(s)

    def told():
        found = len(re.findall(r"127\.0\.0\.1:\d+: ", s.log()))
        others = re.findall(r"(\d+) more lines about clients were left out\n", s.log())
        return found, sum(map(int, others))

    until(lambda: sum(told()) == 1 + (errors + events) * count, what="a line about all of them")
    kinds = (errors > 0) + (events > 0)
    assert 500 * kinds <= told()[0] <= (500 + 5 * (time.monotonic() - begun)) * kinds + 1


@hazard("a file that was named by mistake is overwritten")
@pytest.mark.parametrize("content", [b"12345\n", b"text", b""])
@pytest.mark.parametrize("words", ["--logpath F F", "--pidfile F F", "--logpath F --export a=F",
                                   "--logpath L --pidfile L F", "--pidfile L F",
                                   "--create 1M --logpath N N"])
def test_log_and_pidfile_are_not_what_else_is_there(run_server, tmp_path, words, content):
    """F is an image, L a link to it or, if there is none, a log; N is not there."""
    image = tmp_path / "image"
    image.write_bytes(content)
    if "--logpath L" not in words:
        (tmp_path / "link").hardlink_to(image)
    names = {"F": image, "L": tmp_path / "link", "N": tmp_path / "new", "a=F": f"a={image}"}
    done = run_server("--target", "--unix", tmp_path / "sock",
                      *(names.get(word, word) for word in words.split()))
    assert done.returncode == 1
    assert re.search(r"needed for the disk|is the log, too", done.stderr.splitlines()[-1]), done
    assert image.read_bytes() == content


def test_what_was_left_out_is_told_at_the_end(server, image):
    s = server(image)
    for _ in range(2000):       # however slow: 500 lines at once, and 5 a second
        leaves_at_once(s)
    s.stop()
    assert re.search(r"\d+ more lines about clients were left out\n", s.log())


def test_threads_take_no_signals(server, image):
    s = server(image)
    in_step(s.client())
    masks = {}
    for task in Path(f"/proc/{s.proc.pid}/task").iterdir():
        mask = int(re.search(r"SigBlk:\s+(\w+)", (task / "status").read_text()).group(1), 16)
        masks[int(task.name)] = {n for n in range(1, 32) if not mask >> n - 1 & 1}
    assert len(masks) > 2 and masks.pop(s.proc.pid)
    assert all(taken == {signal.SIGKILL, signal.SIGSTOP} for taken in masks.values())


# One client: --inetd, --connected-fd

def tcp_pair():
    """Two ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


pairs = pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair], ids=["unix", "tcp"])


@pytest.fixture
def single(server, image, tmp_path):
    """single(options, pair, **popen): a server of one client, and the client.
    The options may have a {fd} in them; popen's values THEIRS are the socket."""
    def start(options, pair=socket.socketpair, log=True, **popen):
        ours, theirs = pair()
        own = ["--logpath", tmp_path / "log"] if log else []
        args = ["--target", *options.format(fd=theirs.fileno()).split(), *own, image]
        popen = {k: theirs if v is THEIRS else v for k, v in popen.items()}
        with theirs:
            s = server(args=args, wait=False, pass_fds=[theirs.fileno()], **popen)
        s.clients.append(Client(ours))
        return s, s.clients[-1]

    return start


THEIRS = object()


def connected(c):
    """In the transmission phase without a handshake."""
    c.size = SIZE
    return c


@pairs
@pytest.mark.parametrize("leave", [Client.disc, Client.close, Client.shutdown_write,
                                   Client.reset])
def test_inetd_serves_one_client_and_ends(single, pair, leave):
    s, c = single("--inetd", pair, stdin=THEIRS, stdout=THEIRS)
    c.negotiate(structured=True)
    assert c.pread(SIZE) == pattern(0, SIZE)
    leave(c)
    assert s.wait() == 0


@pairs
@pytest.mark.parametrize("leave", [Client.disc, Client.close])
def test_connected_fd_serves_one_client_and_ends(single, pair, leave):
    s, c = single("--connected-fd {fd}", pair)
    connected(c)
    assert c.pread(SIZE) == pattern(0, SIZE)
    c.pwrite(b"abc", SIZE - 3)
    assert c.error_of(NBD_CMD_READ, SIZE, 1) == NBD_EINVAL
    leave(c)
    assert s.wait() == 0


def test_connected_fd_may_be_standard_input(single):
    s, c = single("--connected-fd 0", stdin=THEIRS)
    in_step(connected(c))
    c.disc()
    assert s.wait() == 0


def test_inetd_client_that_leaves_at_once(single):
    s, c = single("--inetd", stdin=THEIRS)
    c.close()
    assert s.wait() == 0


@pytest.mark.parametrize("options", ["--inetd --readonly", "--connected-fd {fd} --readonly"])
def test_single_client_of_a_readonly_image(single, options):
    s, c = single(options, stdin=THEIRS)
    c.negotiate() if "--inetd" in options else connected(c)
    assert c.error_of(NBD_CMD_WRITE, 0, payload=b"x") == NBD_EPERM
    in_step(c)


def test_inetd_speaks_oldstyle(single):
    s, c = single("--inetd --oldstyle", stdin=THEIRS)
    c.negotiate(oldstyle=True)
    assert c.size == SIZE
    in_step(c)
    c.disc()
    assert s.wait() == 0


def test_oldstyle_greets_every_client(server, image, path):
    s = server(image, "--oldstyle", "--unix", path, *ANY_PORT)
    for address in s.addresses * 2:
        in_step(s.client(address, oldstyle=True))


@pytest.mark.parametrize("options", ["--inetd", "--inetd --oldstyle", "--connected-fd {fd}"])
def test_no_text_reaches_the_client_when_stderr_is_its_socket(single, options):
    """As inetd starts servers; without --logpath."""
    s, c = single(options, log=False, stdin=THEIRS, stdout=THEIRS, stderr=THEIRS)
    if options == "--inetd":
        c.negotiate()
    elif "--oldstyle" in options:
        c.negotiate(oldstyle=True)
    in_step(connected(c))
    c.request(NBD_CMD_DISC)
    c.expect_closed()
    assert s.wait() == 0


@pytest.mark.parametrize("options, status", [("--inetd --bogus", 2), ("--inetd --lport=x", 2),
                                             ("--inetd --logpath=/nowhere/log", 1),
                                             ("--inetd --pidfile=/nowhere/pid", 1)])
def test_no_refusal_reaches_the_client_when_stderr_is_its_socket(single, options, status):
    s, c = single(options, log=False, stdin=THEIRS, stdout=THEIRS, stderr=THEIRS)
    s.expected_status = status
    c.expect_closed()
    s.wait()


def test_inetd_logs_to_syslog(single, syslog):
    s, c = single("--inetd", log=False, stdin=THEIRS, preexec_fn=alone(syslog.enter))
    c.negotiate().disc()
    syslog.wait_for("onnected")
    s.wait()
    assert s.log() == ""


@pytest.mark.parametrize("options", ["--inetd", "--connected-fd 0"])
@pytest.mark.parametrize("kind", ["null", "pipe", "file", "listener"])
def test_what_is_no_connection_is_refused(run_server, image, options, kind):
    with open(os.devnull) as null, open(image) as file, \
            socket.create_server(("127.0.0.1", 0)) as listener:
        r, w = os.pipe()
        stdin = {"null": null, "file": file, "listener": listener, "pipe": r}[kind]
        done = run_server("--target", *options.split(), image, stdin=stdin)
        os.close(r)
        os.close(w)
    refused(done, 1, options.split()[0], "socket")


def test_connected_fd_that_is_not_open_is_refused(run_server, image):
    refused(run_server("--target", "--connected-fd", "777", image), 1, "777")


@hazard("a stop that comes while a client leaves is missed")
def test_stop_while_a_client_leaves_ends_at_once(server, image):
    """At many moments: its thread may be about to sleep."""
    for n in range(25):
        s = server(image)
        with s.client():
            pass
        time.sleep(n * 0.0004)
        begun = time.monotonic()
        assert s.stop() == 0 and time.monotonic() - begun < 3


@pytest.mark.parametrize("options", ["--inetd", "--connected-fd {fd}"])
def test_single_client_is_closed_when_the_server_is_stopped(single, options):
    s, c = single(options, stdin=THEIRS)
    c.negotiate() if options == "--inetd" else connected(c)
    in_step(c)
    s.stop()
    c.expect_closed()


def client_of(path):
    """None if nobody listens there yet."""
    try:
        return Client(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None


def test_super_server_of_systemd(image, path, tmp_path):
    """Started once for each client, with the connection on descriptors 0 to 2."""
    activate = need("systemd-socket-activate", "systemd")
    with open(tmp_path / "activate.log", "wb") as log:
        proc = subprocess.Popen([activate, "--accept", "--inetd", "-l", path, SERVER, "--target",
                                 "--inetd", image], stdin=subprocess.DEVNULL, stdout=log,
                                stderr=log)
    try:
        with until(lambda: client_of(path), what="listening") as a, Client(path) as b:
            for c in (a, b):
                in_step(c.negotiate())
            a.disc()
            in_step(b)
        until(lambda: (tmp_path / "activate.log").read_text().count("died with code 0") == 2,
              what="the end of both servers")
    finally:
        proc.terminate()
        proc.wait()


# --daemonize

class Adopted:
    """A process that another one started and left to us; as a Popen."""

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=DEADLINE):
        try:
            until(lambda: self.poll() is not None, timeout)
        except AssertionError:
            raise subprocess.TimeoutExpired(str(self.pid), timeout) from None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def read_pid(path):
    return int(re.fullmatch(r"(\d+)\n", path.read_text())[1])


def children():
    """The processes that this one has, and of which it knows no end."""
    stats = [Path(entry.path, "stat") for entry in os.scandir("/proc") if entry.name.isdigit()]
    parents = {}
    for path in stats:
        try:
            parents[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()[1]
        except OSError:
            pass
    return {pid for pid, parent in parents.items() if parent == str(os.getpid())}


@pytest.fixture
def foster():
    """Daemons become children of this process, which then sees their end."""
    before = children()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    for pid in children() - before:
        Adopted(pid).kill()


@pytest.fixture
def daemon(foster, server, tmp_path):
    """daemon(image, *options): the server that is there when the prompt is."""
    def start(image, *options, log=("--logpath", tmp_path / "log"), **popen):
        s = server(image, "--daemonize", "--pidfile", tmp_path / "pid", *log, *options,
                   wait=False, **popen)
        status = s.proc.wait(DEADLINE)
        if status == 0:
            s.proc = Adopted(read_pid(tmp_path / "pid"))
        assert status == 0, s.log()
        return s

    return start


where = pytest.mark.parametrize("options", [["--unix", "sock"], ANY_PORT], ids=["unix", "tcp"])


@where
def test_prompt_returns_when_clients_can_connect(daemon, image, tmp_path, monkeypatch, options):
    """Nothing here waits for the server."""
    monkeypatch.chdir(tmp_path)
    s = daemon(image, *options)
    c = Client(s.addresses[0])
    in_step(c.negotiate())
    assert s.stderr.read_text() == ""
    assert s.stop() == 0
    assert sorted(os.listdir(tmp_path)) == ["disk.img", "log", "server0.log"]


def test_daemon_needs_no_directory(daemon, image, tmp_path, monkeypatch):
    """Relative paths of all files keep working, also when it ends."""
    monkeypatch.chdir(tmp_path)
    s = daemon(image.name, "--unix", "sock", "--pidfile", "pid", log=("--logpath", "log"))
    assert os.readlink(f"/proc/{s.proc.pid}/cwd") == "/"
    c = Client("sock").negotiate()
    in_step(c)
    os.rename("log", "log.1")
    s.proc.send_signal(signal.SIGHUP)
    until(lambda: os.path.exists("log"), what="a new log file")
    c.close()
    s.stop()
    assert sorted(os.listdir()) == ["disk.img", "log", "log.1", "server0.log"]


def test_daemon_lets_go_of_its_starter(daemon, image):
    """A pipe that the starter reads from ends, or it would wait for the server."""
    r, w = os.pipe()
    s = daemon(image, stdin=r, stdout=w, stderr=w)
    os.close(w)
    assert select.select([r], [], [], DEADLINE)[0], "the server has the pipe"
    assert os.read(r, 1) == b""
    os.close(r)
    fds = [os.readlink(f"/proc/{s.proc.pid}/fd/{n}") for n in (0, 1, 2)]
    assert fds == ["/dev/null"] * 3
    assert os.getsid(s.proc.pid) != os.getsid(0)


def test_daemon_closes_what_it_inherits(daemon, image):
    """Or a lock, or a pipe, of who started it would live on."""
    r, w = os.pipe()
    s = daemon(image, pass_fds=[w])
    os.close(w)
    assert select.select([r], [], [], DEADLINE)[0], "the server has the pipe"
    assert os.read(r, 1) == b""
    os.close(r)
    in_step(Client(s.addresses[0]).negotiate())


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/{}"])
def test_log_of_a_daemon_may_be_what_its_starter_had_open(daemon, image, tmp_path, name):
    with open(tmp_path / "log", "w") as log:
        daemon(image, log=("--logpath", name.format(log.fileno())), stdout=log,
               pass_fds=[log.fileno()])
    assert "listening on" in (tmp_path / "log").read_text()


def own_terminal(fd):
    os.setsid()
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def test_daemon_survives_its_terminal(daemon, image):
    """Whose end hangs up the processes that belong to it."""
    master, slave = terminal()
    s = daemon(image, stdin=slave, stdout=slave, stderr=slave,
               preexec_fn=lambda: own_terminal(slave))
    os.close(slave)
    os.close(master)
    s.address = s.addresses[0]
    assert s.is_served()
    assert os.getsid(s.proc.pid) == s.proc.pid
    controlling = Path(f"/proc/{s.proc.pid}/stat").read_text().rpartition(")")[2].split()[4]
    assert controlling == "0"


@pytest.mark.parametrize("options, named", [
    (["--logpath", "nowhere/log"], "nowhere/log"), (["--pidfile", "nowhere/pid"], "nowhere/pid"),
    (["--unix", "nowhere/sock"], "nowhere/sock"), (["--laddr", "203.0.113.77"], "203.0.113.77")])
def test_daemon_that_cannot_start_says_why(run_server, image, tmp_path, options, named):
    done = run_server("--target", "--daemonize", "--lport", "0", *options, image, cwd=tmp_path)
    refused(done, 1, named)
    assert os.listdir(tmp_path) == [image.name]


def test_daemon_without_image_says_why(run_server, tmp_path):
    """Also to the log file, for those who look there."""
    done = run_server("--target", "--daemonize", *ANY_PORT, "--logpath", "log", "nowhere.img",
                      cwd=tmp_path)
    refused(done, 1, "nowhere.img")
    assert "nowhere.img" in (tmp_path / "log").read_text()


def test_daemon_logs_to_syslog(daemon, image, syslog, path):
    s = daemon(image, "--unix", path, log=(), preexec_fn=alone(syslog.enter))
    assert f"xnbd-server[{s.proc.pid}]: " in syslog.wait_for("listening on")
    in_step(Client(path).negotiate())


# --pidfile

def test_pidfile_names_the_process_while_it_lives(server, image, tmp_path):
    pidfile = tmp_path / "pid"
    pidfile.write_text("123456789012345\n")
    s = server(image, "--pidfile", pidfile)
    assert read_pid(pidfile) == s.proc.pid
    s.stop()
    assert not pidfile.exists()


def test_server_that_cannot_start_leaves_no_pidfile(run_server, server, image, tmp_path):
    s = server(image)
    done = run_server("--target", "--laddr", "127.0.0.1", "--lport", s.port, "--pidfile", "pid",
                      image, cwd=tmp_path)
    refused(done, 1, s.port)
    assert not (tmp_path / "pid").exists()


@pytest.mark.hazard("two servers with one pidfile")
def test_pidfile_of_a_running_server_is_refused(server, run_server, image, tmp_path):
    s = server(image, "--pidfile", tmp_path / "pid")
    done = run_server("--target", *ANY_PORT, "--readonly", "--pidfile", tmp_path / "pid", image)
    refused(done, 1, tmp_path / "pid", "runs already")
    assert read_pid(tmp_path / "pid") == s.proc.pid
    s.kill()
    later = server(image, "--pidfile", tmp_path / "pid")
    assert read_pid(tmp_path / "pid") == later.proc.pid


@pytest.mark.hazard("two servers with one pidfile")
def test_pidfile_of_somebody_else_is_not_removed(server, image, tmp_path):
    s = server(image, "--pidfile", tmp_path / "pid")
    (tmp_path / "pid").unlink()
    (tmp_path / "pid").write_text("1\n")
    s.stop()
    assert (tmp_path / "pid").read_text() == "1\n"


def second_name(path):
    path.with_name("precious").write_text("1\n")
    os.link(path.with_name("precious"), path)


NO_PIDFILES = [fifo, unix_socket, dangling_link, second_name, Path.mkdir,
               lambda path: path.symlink_to("/dev/null"),
               *[lambda path, text=text: path.write_text(text)
                 for text in ("12", "\n", "12\n\n", "12\n13\n", "x\n", " 12\n", "-1\n", "1\0\n",
                              30 * "1" + "\n", "an image")]]


@pytest.mark.hazard("a pidfile that is none")
@pytest.mark.parametrize("make", NO_PIDFILES)
def test_what_is_no_pidfile_is_left_alone(run_server, image, tmp_path, make):
    """As an image is, by the wrong name."""
    path = tmp_path / "pid"
    make(path)
    before = path.lstat(), path.is_file() and path.read_bytes()
    refused(run_server("--target", *ANY_PORT, "--pidfile", path, image), 1, path)
    after = path.lstat(), path.is_file() and path.read_bytes()
    assert (before[0].st_ino, before[0].st_mtime_ns, before[1]) == (
        after[0].st_ino, after[0].st_mtime_ns, after[1])


def test_empty_pidfile_is_one(server, image, tmp_path):
    """Of a server that was killed before it wrote to it."""
    (tmp_path / "pid").touch()
    s = server(image, "--pidfile", tmp_path / "pid")
    assert read_pid(tmp_path / "pid") == s.proc.pid


@pytest.mark.parametrize("options, loops", [([], max(2, os.cpu_count())), (["--threads", "3"], 3)],
                         ids=["default", "three"])
def test_clients_are_spread_over_as_many_threads(image, server, options, loops):
    """By default one for each processor, and at least two.  They are counted before anything is
    read, for which there may be others."""
    s = server(image, *options, *ANY_PORT)
    until(lambda: "disconnected" in s.log(), what="the end of who looked whether it is ready")
    with_one = s.status("Threads")
    clients = [s.client() for _ in range(3 * loops)]
    assert s.status("Threads") == with_one + loops - 1
    assert all(c.pread(16) for c in clients)


# Many connections, few threads, few descriptors

def test_one_thread_serves_many_connections(server, image, path):
    """In turns, and at the same time as one that takes no replies.  (A second one polls those who
    are silent.)"""
    s = server(image, "--threads", "1", "--unix", path, *ANY_PORT)
    deaf = not_reading(s)
    before = s.status("Threads")
    clients = [s.client(s.addresses[i % 2], structured=i % 3) for i in range(60)]
    places = [(n * 1000, 70000) for n in range(8)]
    sent = [[c.request(NBD_CMD_READ, *place) for place in places] for c in clients]
    for c, cookies in zip(clients, sent):
        for (offset, length), cookie in zip(places, cookies):
            assert c.collect(cookie).data == pattern(offset, length)
    assert s.status("Threads") <= before + 1 or is_portable()   # workers do all that may wait
    deaf.close()


def descriptors(server):
    return len(os.listdir(f"/proc/{server.proc.pid}/fd"))


def limit_descriptors(server, limit):
    """Only the soft limit: the hard one could not be raised again."""
    _, hard = resource.prlimit(server.proc.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.proc.pid, resource.RLIMIT_NOFILE, (limit, hard))


@pytest.fixture
def starved(server, image, path):
    """A server without a free descriptor, its clients, and clients that wait.
    They are of a Unix socket, where connecting needs no accept()."""
    s = server(image, "--unix", path)
    clients = [s.client() for _ in range(10)]
    limit_descriptors(s, descriptors(s))
    return s, clients, [s.raw() for _ in range(20)]


def test_out_of_descriptors_accepting_pauses(starved):
    s, clients, _ = starved
    s.settle()
    before, lines, start = s.cpu(), len(s.log().splitlines()), time.monotonic()
    time.sleep(1)                       # a measurement
    took = time.monotonic() - start
    assert s.cpu() - before < 0.15 * took
    assert len(s.log().splitlines()) - lines < 10 * took
    in_step(clients[0])


def test_descriptors_that_come_back_are_used(starved):
    """By those who wait, in their order."""
    s, clients, waiting = starved
    for c, next_one in zip(clients, waiting):
        c.close()
        in_step(next_one.negotiate())


def test_accepting_resumes_when_the_system_has_descriptors_again(starved):
    """Without any connection ending."""
    s, clients, waiting = starved
    limit_descriptors(s, 1024)
    for c in waiting:
        in_step(c.negotiate())
    in_step(clients[0])


# The end

CLOSABLE = [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)]


@pytest.mark.parametrize("closed", CLOSABLE, ids=str)
@pytest.mark.parametrize("options", [[], ["--logpath", "log"], ["--daemonize"]], ids=" ".join)
def test_closed_standard_descriptors_harm_nothing(foster, server, image, tmp_path, monkeypatch,
                                                  closed, options):
    """Files that are opened must not take their numbers: the log would go into
    the image."""
    monkeypatch.chdir(tmp_path)
    s = server(image, "--unix", "sock", "--pidfile", "pid", *options, wait=False,
               preexec_fn=lambda: [os.close(fd) for fd in closed])
    until(lambda: os.path.exists("pid") and os.path.exists("sock"), what="start")
    if "--daemonize" in options:
        assert s.proc.wait(DEADLINE) == 0
        s.proc = Adopted(read_pid(tmp_path / "pid"))
    s.address = "sock"
    assert s.is_served()
    s.stop()
    assert image.read_bytes() == pattern(0, SIZE)


@pytest.mark.hazard("the log in the image")
@pytest.mark.parametrize("closed", CLOSABLE, ids=str)
@pytest.mark.parametrize("options", [[], ["--daemonize"]], ids=" ".join)
def test_closed_standard_descriptors_without_devices(foster, server, image, tmp_path, monkeypatch,
                                                     closed, options):
    """There is no /dev/null that could stand there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dev").mkdir()

    def prepare():
        return (unshare(CLONE_NEWNS) and mount("none", "/", MS_REC | MS_PRIVATE)
                and mount(tmp_path / "dev", "/dev", MS_BIND))

    def begin(enter=alone(prepare)):
        enter()
        for fd in closed:
            os.close(fd)

    s = server(image, "--unix", "sock", "--pidfile", "pid", *options, wait=False, preexec_fn=begin)
    until(lambda: os.path.exists("pid") and os.path.exists("sock"), what="start")
    if options:
        assert s.proc.wait(DEADLINE) == 0
        s.proc = Adopted(read_pid(tmp_path / "pid"))
    s.address = "sock"
    assert s.is_served()
    files = [os.path.realpath(f"/proc/{s.proc.pid}/fd/{fd}") for fd in (0, 1, 2)]
    assert str(image) not in files and len(files) == 3
    s.stop()
    assert image.read_bytes() == pattern(0, SIZE)


def test_inetd_needs_no_devices(single, tmp_path):
    (tmp_path / "dev").mkdir()
    s, c = single("--inetd", stdin=THEIRS, stdout=THEIRS, stderr=THEIRS, preexec_fn=alone(
        lambda: unshare(CLONE_NEWNS) and mount("none", "/", MS_REC | MS_PRIVATE)
        and mount(tmp_path / "dev", "/dev", MS_BIND)))
    in_step(c.negotiate())
    c.disc()
    assert s.wait() == 0


def idle(server):
    server.client()


class Busy(threading.Thread):
    """A client that asks for more until it is told not to."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.client, self.end = server.client(structured=True), None
        self.start()

    def run(self):
        try:
            while True:
                in_step(self.client)
        except BaseException as e:
            self.end = e

    def ended_well(self):
        self.join(DEADLINE)
        return isinstance(self.end, Closed)


def half_handshaken(server):
    server.hello().send(option_header(NBD_OPT_GO, 100) + b"half")


def not_reading(server):
    """Its replies fill every buffer on the way; so do then its requests."""
    c = server.client()
    c.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        while True:
            c.request(NBD_CMD_READ, 0, MIB)
    c.sock.settimeout(DEADLINE)
    return c


@pytest.mark.parametrize("number, options", [(signal.SIGTERM, []),
                                             (signal.SIGINT, ["--threads", "1"])])
def test_ends_in_time_whatever_its_clients_do(server, image, path, number, options):
    s = server(image, "--unix", path, *options)
    busy = [Busy(s), Busy(s)]
    for client in [idle, half_handshaken, not_reading, idle]:
        client(s)
    s.terminate(number)
    assert s.wait() == 0
    assert not path.exists()
    assert all(b.ended_well() for b in busy)


def terminate(server, witness, number=signal.SIGTERM):
    """Sends the signal and waits until it has taken effect on an idle client."""
    server.terminate(number)
    witness.expect_closed()


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM),
                                           (signal.SIGINT, signal.SIGINT),
                                           (signal.SIGTERM, signal.SIGINT)])
def test_second_signal_ends_it_at_once(server, image, path, first, second):
    """While the first one is still waiting for a client."""
    s = server(image, "--unix", path)
    not_reading(s)
    terminate(s, s.client(), first)
    assert s.proc.poll() is None
    s.terminate(second)
    s.expected_status = 1
    s.wait()


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_requests_in_flight_are_answered_at_the_end(server, image, path, structured):
    """Those that were received, whose replies wait for the client to read them."""
    s = server(image, "--unix", path)
    c, witness = s.client(structured=structured), s.client()
    places = [(n * 1000, 65536 + n) for n in range(40)]
    sent = [c.request(NBD_CMD_READ, *place) for place in places]
    s.settle()
    c.collect(sent[0])
    terminate(s, witness)
    replies = 0
    with contextlib.suppress(Closed):
        for (offset, length), cookie in zip(places[1:], sent[1:]):
            assert c.collect(cookie).data == pattern(offset, length)
            replies += 1
    assert replies > 1
    assert s.wait() == 0


def test_request_after_the_signal_is_neither_answered_nor_carried_out(server, image, path):
    """While replies before it are still on their way."""
    s = server(image, "--unix", path, "--threads", "1")
    c, witness = s.client(), s.client()
    sent = [c.request(NBD_CMD_READ, 0, MIB) for _ in range(8)]
    s.settle()
    c.collect(sent[0])
    terminate(s, witness)
    c.request(NBD_CMD_WRITE, 0, payload=b"x" * 512)
    with contextlib.suppress(Closed):
        for cookie in sent[1:]:
            assert not c.collect(cookie).error
    c.expect_closed()
    assert s.wait() == 0
    assert image.read_bytes() == pattern(0, SIZE)


def test_request_of_an_idle_client_after_the_signal_is_not_served(server, image, path):
    s = server(image, "--unix", path)
    c, deaf = s.client(), not_reading(s)
    s.terminate()
    assert c.recv_until_closed() == b""
    try:
        c.request(NBD_CMD_WRITE, 0, payload=b"x" * 512)
    except Closed:
        pass
    deaf.close()
    s.wait()
    assert image.read_bytes() == pattern(0, SIZE)


# The project

def make(*arguments):
    """Installs the server under test, whatever else there is to build."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run([need("make", "make"), "-s", "-o", "all",
                           f"BUILD={Path(SERVER).parent}", *arguments], cwd=ROOT,
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)


def files_under(directory):
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()}


def test_install_and_uninstall(tmp_path):
    where = [f"DESTDIR={tmp_path}", "PREFIX=/usr"]
    done = make("install", *where)
    assert done.returncode == 0, done.stdout
    assert files_under(tmp_path) >= {"usr/sbin/xnbd-server", "usr/bin/xnbd-bgctl",
                                     "usr/share/man/man8/xnbd-server.8", "usr/share/man/man1/xnbd-bgctl.1"}
    program = tmp_path / "usr/sbin/xnbd-server"
    assert stat.S_IMODE(program.stat().st_mode) == 0o755
    assert subprocess.run([program, "--version"], stdout=subprocess.DEVNULL).returncode == 0
    done = make("uninstall", *where)
    assert done.returncode == 0, done.stdout
    assert not files_under(tmp_path)


def test_manual_pages_are_clean():
    pages = sorted((ROOT / "man").glob("*.[1-8]"))
    assert pages
    done = subprocess.run([need("mandoc", "mandoc"), "-Tlint", "-Wwarning", *pages],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
