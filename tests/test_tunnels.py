"""Ways over a network that is not trusted: ssh, stunnel and WireGuard, with the commands and
files of README.md."""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from conftest import SERVER, make_disk, need, skip
from nbd import *

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
SIZE = 3 << 20
CONTENT = pattern(0, SIZE)


def run(*command, **keywords):
    return subprocess.run([str(c) for c in command], check=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, text=True, **keywords).stdout


@pytest.fixture
def start(tmp_path):
    """start(*command): a program in the background, whose log is .log; ended with the test."""
    with contextlib.ExitStack() as stack:
        def run_one(*command, **keywords):
            log = tmp_path / f"log{len(stack._exit_callbacks)}"
            with open(log, "wb") as out:
                one = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL,
                                       stdout=out, stderr=out, start_new_session=True, **keywords)
            one.log = log
            stack.callback(end, one)
            return one

        yield run_one


def end(process):
    """All that it has started, too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait(DEADLINE)


def wait_for_socket(path, program):
    until(lambda: path.is_socket() or program.poll() is not None, what=str(path))
    assert program.poll() is None, program.log.read_text()


@pytest.fixture
def image(disk):
    return disk(content=CONTENT)


def whole_disk_through(path):
    """All of the disk, read, and a write that is flushed, through a Unix socket."""
    with Client(str(path)) as c:
        c.negotiate()
        assert c.pread(SIZE) == CONTENT
        c.pwrite(b"through", 4095)
        c.flush()
        assert c.pread(9, 4094) == CONTENT[4094:4095] + b"through" + CONTENT[4102:4103]
        c.disc()


# ssh

@pytest.fixture
def ssh(tmp_path):
    """The words of an ssh that reaches an sshd of ours, which has no port: each connection
    has a process of its own, at the other end of a pipe."""
    sshd, client = need("sshd", "openssh-server"), need("ssh", "openssh-client")
    keygen = need("ssh-keygen", "openssh-client")
    for name in "host", "user", "other":
        run(keygen, "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = tmp_path / "sshd_config"
    config.write_text(f"HostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
                      "PasswordAuthentication no\nUsePAM no\nStrictModes no\nPidFile none\n")
    return [client, "-F", "none", "-o", f"ProxyCommand={sshd} -i -f {config}", "-o", "BatchMode=yes",
            "-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "StrictHostKeyChecking=accept-new",
            "-i", tmp_path / "user"]


def ssh_command_of_readme(remote, local):
    """Its words behind `ssh`."""
    line, = re.findall(r"(?m)^    ssh (-N .*-L .*sock.*) host-a$", README)
    return line.replace("/run/xnbd/disk.sock", str(remote)).replace("disk.sock", str(local)).split()


def test_unix_socket_through_ssh(server, image, ssh, start, tmp_path):
    s, local = server(image, "--unix", tmp_path / "remote"), tmp_path / "local"
    tunnel = start(*ssh, *ssh_command_of_readme(s.unix, local), "host-a")
    wait_for_socket(local, tunnel)
    whole_disk_through(local)


def test_proxy_moves_a_disk_through_ssh(server, image, ssh, start, tmp_path):
    """Also when the tunnel was cut meanwhile."""
    origin, local = server(image, "--unix", tmp_path / "remote", "--readonly"), tmp_path / "local"
    command = [*ssh, *ssh_command_of_readme(origin.unix, local), "host-a"]
    tunnel = start(*command)
    wait_for_socket(local, tunnel)
    s = server(args=["--proxy", "--unix", tmp_path / "here", f"unix:{local}",
                     *(tmp_path / f"cache.{kind}" for kind in ("img", "map", "ctl"))])
    with s.client() as c:
        assert c.pread(4096) == CONTENT[:4096]
        end(tunnel)
        local.unlink(missing_ok=True)
        wait_for_socket(local, start(*command))
        assert c.pread(SIZE) == CONTENT
        c.disc()


def test_ssh_without_the_key_gets_nothing(server, image, ssh, tmp_path):
    s = server(image, "--unix", tmp_path / "remote")
    words = [tmp_path / "other" if w == tmp_path / "user" else w for w in ssh]
    done = subprocess.run([*words, *ssh_command_of_readme(s.unix, tmp_path / "local"), "host-a"],
                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 255 and "Permission denied" in done.stderr
    assert not (tmp_path / "local").exists()


# stunnel

def stunnel_file_of_readme(tmp_path, which, **replaced):
    """Writes the file of that name in README.md, with paths of ours."""
    text = re.search(rf"(?ms)^    # {which}\n(.*?)\n\n(?!    )", README).group(1)
    text = re.sub(r"(?m)^    ", "", text)
    for old, new in replaced.items():
        text, count = re.subn(rf"(?m)^({old} = ).*", rf"\g<1>{new}", text)
        assert count == 1, (old, text)
    path = tmp_path / Path(which).name
    path.write_text(f"foreground = yes\npid =\ndebug = info\n{text}\n")
    return path


@pytest.fixture
def stunnel(tmp_path, start, image):
    """stunnel(pem): both ends; the path of the socket that clients connect to.  The server
    knows a.pem and the client has `pem`."""
    program, openssl = need("stunnel", "stunnel4"), need("openssl", "openssl")
    for name in "a", "b", "stranger":
        run(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", tmp_path / f"{name}.key",
            "-out", tmp_path / f"{name}.crt", stderr=subprocess.DEVNULL)
    middle, local = tmp_path / "tls.sock", tmp_path / "local.sock"

    def pair(client="b"):
        def files(own, other):
            return {"cert": tmp_path / f"{own}.crt", "key": tmp_path / f"{own}.key",
                    "CAfile": tmp_path / f"{other}.crt"}

        one = start(program, stunnel_file_of_readme(
            tmp_path, "/etc/stunnel/xnbd-server.conf", accept=middle, exec=SERVER,
            execArgs=f"xnbd-server --target --inetd {image}", **files("a", "b")))
        wait_for_socket(middle, one)
        two = start(program, stunnel_file_of_readme(
            tmp_path, "/etc/stunnel/xnbd-client.conf", accept=local, connect=middle,
            **files(client, "a")))
        wait_for_socket(local, two)
        return local

    return pair


def test_server_behind_stunnel(stunnel, image):
    local = stunnel()
    whole_disk_through(local)
    with Client(str(local)) as c:          # another process serves it
        assert c.negotiate().pread(7, 4095) == b"through"
        c.disc()
    assert image.read_bytes()[4095:4102] == b"through"


def test_stunnel_without_the_right_certificate_gets_nothing(stunnel):
    local = stunnel(client="stranger")
    with Client(str(local)) as c, pytest.raises((Closed, OSError)):
        c.negotiate()


# WireGuard

def ip(*words):
    run(need("ip", "iproute2"), *" ".join(words).split())


@pytest.fixture
def hosts(tmp_path, start):
    """The names of two network name spaces, with a network between them that only WireGuard,
    run by wireguard-go, is to use: 10.9.9.1 is the first, 10.9.9.2 the second."""
    wireguard, wg = need("wireguard-go", "wireguard-go"), need("wg", "wireguard-tools")
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        skip("needs root and /dev/net/tun")
    names = [f"xnbd{os.getpid()}{which}" for which in "ab"]
    keys = [run(wg, "genkey") for _ in names]
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns add", name)
            stack.callback(ip, "netns del", name)
        ip(f"link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
        for i, name in enumerate(names):
            (tmp_path / name).write_text(
                f"[Interface]\nPrivateKey = {keys[i]}ListenPort = 51820\n[Peer]\nPublicKey = "
                f"{subprocess.run([wg, 'pubkey'], input=keys[1 - i], text=True, stdout=-1).stdout}"
                f"Endpoint = 192.0.2.{2 - i}:51820\nAllowedIPs = 10.9.9.{2 - i}/32\n")
            device, inside = f"{name}w"[-15:], ["netns", "exec", name]
            one = start("ip", *inside, "env", "WG_PROCESS_FOREGROUND=1", wireguard, device)
            wait_for_socket(Path(f"/var/run/wireguard/{device}.sock"), one)
            run("ip", *inside, wg, "setconf", device, tmp_path / name)
            for words in (f"addr add 192.0.2.{i + 1}/24 dev veth0", "link set veth0 up",
                          f"addr add 10.9.9.{i + 1}/24 dev {device}", f"link set {device} up"):
                ip("-n", name, words)
        yield names


def test_server_that_listens_inside_wireguard_alone(hosts, start, image):
    there, here = (["ip", "netns", "exec", name] for name in hosts)
    s = start(*there, SERVER, "--target", "--laddr", "10.9.9.1", image)
    until(lambda: "listening on 10.9.9.1:8520" in s.log.read_text() or s.poll() is not None)
    code = ("import sys, nbd; c = nbd.Client((sys.argv[1], 8520)).negotiate(); "
            "print(c.pread(%d) == nbd.pattern(0, %d))" % (SIZE, SIZE))
    python = [*here, "/usr/bin/python3", "-c", code]
    assert run(*python, "10.9.9.1", cwd=Path(__file__).parent) == "True\n"
    outside = subprocess.run([*python, "192.0.2.1"], cwd=Path(__file__).parent,
                             stderr=subprocess.PIPE, text=True)
    assert "ConnectionRefusedError" in outside.stderr
