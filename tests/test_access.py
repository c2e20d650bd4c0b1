"""Who may connect: --allow, --max-connections, --unix-mode."""

import contextlib
import os
import re
import resource
import socket
import stat

import pytest

from conftest import skip
from nbd import *
from test_activation import numbers_taken, passing
from test_service import refused, tcp_pair

SIZE = 65536
hazard = pytest.mark.hazard


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


def allow(*rules):
    return [word for rule in rules for word in ("--allow", rule)]


def from_address(s, source, address=None):
    """A client whose address is `source`, port chosen."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    sock = socket.socket(family)
    sock.settimeout(DEADLINE)
    sock.bind((source, 0))
    sock.connect(address or (s.address[0], s.port))
    client = Client(sock)
    s.clients.append(client)
    return client


def is_greeted(client):
    """The server's first word is there, or the connection has ended without one."""
    with client, contextlib.suppress(Closed):
        client.greeting()
        return True
    return False


def admits(s, source):
    return is_greeted(from_address(s, source))


@pytest.fixture
def allowing(server, image):
    """allowing(*rules): a server that does not look ready to those it refuses."""
    def start(*rules, where=("--laddr", "127.0.0.1", "--lport", "0"), options=()):
        s = server(args=["--target", *where, *allow(*rules), *options, image], wait=False)
        until(lambda: s.addresses or s.proc.poll() is not None, what="listening")
        s.address = s.addresses[0]
        return s

    return start


# Rules

@hazard("address rule matched as a text prefix")
def test_address_does_not_admit_those_that_begin_like_it(allowing):
    s = allowing("127.0.0.1", "127.0.0.30")
    assert admits(s, "127.0.0.1") and admits(s, "127.0.0.30")
    for other in ("127.0.0.10", "127.0.0.100", "127.0.0.3", "127.0.0.2", "127.0.0.31", "127.0.1.1",
                  "127.10.0.1"):
        assert not admits(s, other), other
    assert s.proc.poll() is None


def flipped(number, bit):
    """The address with one bit changed, of which the first is 0."""
    return ".".join(map(str, (number ^ 1 << 31 - bit).to_bytes(4, "big")))


@hazard("address rule matched as a text prefix")
@pytest.mark.parametrize("bits", range(9, 33))
def test_prefix_is_exact_to_the_bit(allowing, bits):
    """127.85.170.86 has no two bytes alike; what differs behind the prefix is admitted."""
    number = int.from_bytes(bytes([127, 85, 170, 86]), "big")
    network = number >> 32 - bits << 32 - bits
    s = allowing(f"{'.'.join(map(str, network.to_bytes(4, 'big')))}/{bits}")
    assert admits(s, "127.85.170.86")
    assert not admits(s, flipped(number, bits - 1))
    if bits < 31:
        assert admits(s, flipped(number, bits))
        assert admits(s, flipped(number, 31))


def test_prefix_of_no_bits_admits_all_of_its_kind_only(allowing):
    assert admits(allowing("0.0.0.0/0"), "127.0.0.9")
    assert not admits(allowing("::/0"), "127.0.0.9")
    here = ("--laddr", "::1", "--lport", "0")
    assert admits(allowing("::/0", where=here), "::1")
    assert not admits(allowing("0.0.0.0/0", where=here), "::1")


@pytest.mark.parametrize("rule, admitted", [
    ("::1", True), ("0:0:0:0:0:0:0:1", True), ("::1/128", True), ("::/127", True), ("::/64", True),
    ("[::1]", True), ("[::1]/128", True), ("[::]/64", True), ("[::2]", False),
    ("::2", False), ("::2/127", False), ("::", False), ("::10", False), ("1::", False),
    ("8000::/1", False), ("::ffff:0.0.0.1", False), ("0.0.0.1", False)])
def test_rules_of_ipv6(allowing, rule, admitted):
    assert admits(allowing(rule, where=("--laddr", "::1", "--lport", "0")), "::1") == admitted


@pytest.fixture
def both():
    """A socket that takes IPv4 clients, too, and shows their addresses as mapped ones."""
    with socket.socket(socket.AF_INET6) as s:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        s.bind(("::", 0))
        s.listen()
        yield s


@pytest.fixture
def passed(server, image):
    """passed(sock, *rules): a server that gets the socket."""
    def start(sock, *rules):
        with numbers_taken(1):
            s = server(args=["--target", *allow(*rules), image], wait=False, **passing([sock]))
        until(lambda: s.addresses, what="listening")
        s.address = s.addresses[0]
        return s

    return start


@pytest.mark.parametrize("rule", ["127.0.0.2", "127.0.0.2/31", "::ffff:127.0.0.2",
                                  "::ffff:7f00:2/127"])
def test_mapped_client_is_an_ipv4_client(passed, both, rule):
    """At a socket that was passed; the other way round as well."""
    s, port = passed(both, rule), both.getsockname()[1]
    assert is_greeted(from_address(s, "127.0.0.2", ("127.0.0.1", port)))
    assert not is_greeted(from_address(s, "127.0.0.20", ("127.0.0.1", port)))
    assert not is_greeted(from_address(s, "::1", ("::1", port)))
    assert "[::ffff:127.0.0.20]:" in s.log()


def test_mapped_rule_means_an_ipv4_client(allowing):
    s = allowing("::ffff:127.0.0.2/128")
    assert admits(s, "127.0.0.2") and not admits(s, "127.0.0.3")


def link_local():
    """(address, interface, its number) of this machine, or None."""
    with open("/proc/net/if_inet6") as f:
        for line in f:
            address, number, _, scope, _, name = line.split()
            if scope == "20":
                groups = ":".join(address[i:i + 4] for i in range(0, 32, 4))
                return groups, name, int(number, 16)
    return None


def test_zone_is_that_of_the_client(passed):
    found = link_local()
    if not found:
        skip("needs an interface with a link-local IPv6 address")
    address, name, number = found
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind((address, 0, 0, number))
        sock.listen()
        for rule, admitted in [(f"fe80::%{name}/10", True), (f"{address}%{number}", True),
                               (address, True), ("fe80::%lo/10", False),
                               (f"{address}%{number + 1000}", False)]:
            s = passed(sock, rule)
            ours = socket.socket(socket.AF_INET6)
            ours.settimeout(DEADLINE)
            ours.connect(sock.getsockname())
            assert is_greeted(Client(ours)) == admitted, rule
            s.stop()


BAD_RULES = {
    "": "address", "host": "address", "10.0.0": "address", "10.0.0.1.1": "address",
    "010.0.0.1": "address", "[127.0.0.1]": "address", "[::1": "address", "::1]": "address",
    "[::1]/129": "prefix", "::1::": "address", "1" * 200: "address",
    "10.0.0.1/": "0 to 32", "10.0.0.1/33": "0 to 32", "10.0.0.1/-1": "0 to 32",
    "10.0.0.1/8x": "0 to 32", "10.0.0.1/255.0.0.0": "0 to 32", "::1/129": "0 to 128",
    "10.0.0.1/24": "10.0.0.0/24", "10.0.0.1/0": "0.0.0.0/0", "2001:db8::1/32": "2001:db8::/32",
    "::ffff:10.0.0.1/104": "10.0.0.0/8", "::ffff:0:0/95": "::fffe:0:0/95",
    "127.0.0.1%lo": "zone", "::1%lo": "zone", "fe80::1%no-such": "zone", "fe80::1%": "zone",
}


@pytest.mark.parametrize("rule", BAD_RULES)
def test_rule_that_is_none_is_named_with_what_is_wrong(run_server, image, rule):
    refused(run_server("--target", "--allow", rule, image), 2, "--allow", f"'{rule}'",
            BAD_RULES[rule])


# Who is asked, and when

def test_refused_client_is_closed_before_the_greeting(allowing):
    s = allowing("127.0.0.2")
    from_address(s, "127.0.0.1").expect_closed()
    until(lambda: "refused" in s.log(), what="a line in the log")
    assert re.search(r"127\.0\.0\.1:\d+: refused: no --allow has its address\n", s.log())


def test_clients_of_unix_sockets_are_not_asked(allowing, tmp_path):
    path = str(tmp_path / "sock")
    s = allowing("127.0.0.2", options=["--unix", path])
    with s.client(address=path) as c:
        assert c.pread(512) == pattern(0, 512)
    assert not is_greeted(from_address(s, "127.0.0.1", next(a for a in s.addresses if a != path)))


def test_allow_without_tcp_is_refused(run_server, image, tmp_path):
    refused(run_server("--target", "--unix", tmp_path / "sock", *allow("::1"), image), 2, "--allow")
    for option in "--max-per-host", "--keepalive":
        refused(run_server("--target", "--unix", tmp_path / "sock", option, "2", image), 2, option)
    assert os.listdir(tmp_path) == [image.name]


def test_allow_with_a_passed_unix_socket_alone_is_refused(run_server, image, tmp_path):
    with socket.socket(socket.AF_UNIX) as sock, numbers_taken(1):
        sock.bind(str(tmp_path / "passed"))
        sock.listen()
        refused(run_server("--target", *allow("::1"), image, **passing([sock])), 1, "--allow")


@pytest.mark.parametrize("option", ["--inetd", "--connected-fd=0"])
def test_allow_with_a_single_client_of_a_unix_socket_is_refused(run_server, image, option):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        refused(run_server("--target", option, *allow("::1"), image, stdin=theirs), 1, "--allow")


@pytest.mark.parametrize("rule, admitted", [("127.0.0.1", True), ("127.0.0.10", False)])
def test_single_client_is_asked(server, image, tmp_path, rule, admitted):
    """The server ends in any case when it has left."""
    ours, theirs = tcp_pair()
    with theirs:
        s = server(args=["--target", "--inetd", "--logpath", tmp_path / "log", *allow(rule), image],
                   wait=False, stdin=theirs)
    assert is_greeted(Client(ours)) == admitted
    assert s.wait() == 0
    assert ("refused" in s.log()) != admitted


def test_single_client_that_has_left_is_not_let_in(server, image, tmp_path):
    """Nobody can tell who it was."""
    ours, theirs = tcp_pair()
    with theirs:
        Client(ours).reset()
        s = server(args=["--target", "--inetd", "--logpath", tmp_path / "log",
                         *allow("127.0.0.1"), image], wait=False, stdin=theirs)
    assert s.wait() == 0
    assert "(unknown address): refused: no --allow has its address" in s.log()


# How many

@pytest.mark.parametrize("count", [1, 3])
def test_one_connection_too_many_is_closed(server, image, tmp_path, count):
    s = server(image, "--max-connections", count, "--unix", tmp_path / "sock", wait=False)
    until(lambda: s.addresses, what="listening")
    s.address = str(tmp_path / "sock")
    here = [s.client() for _ in range(count)]
    s.raw().expect_closed()
    until(lambda: f"refused: there are {count} connections already" in s.log(), what="a line")
    assert all(c.pread(512) == pattern(0, 512) for c in here)
    here.pop().disc()
    until(lambda: is_greeted(s.raw()), what="room for one more")


@hazard("one host takes all connections")
def test_one_connection_of_a_host_too_many_is_closed(server, image, tmp_path):
    """Of that host: others are not its business, nor are clients of a Unix socket."""
    s = server(args=["--target", "--max-per-host", "2", "--unix", tmp_path / "sock", "--laddr",
                     "127.0.0.1", "--lport", "0", image])
    until(lambda: "disconnected" in s.log(), what="the end of who looked whether it is ready")
    here = [from_address(s, "127.0.0.1", next(a for a in s.addresses if isinstance(a, tuple)))
            for _ in range(2)]
    for c in here:
        c.greeting()
    tcp = next(a for a in s.addresses if isinstance(a, tuple))
    from_address(s, "127.0.0.1", tcp).expect_closed()
    until(lambda: "refused: its host has 2 connections already" in s.log(), what="a line")
    for _ in range(2):
        from_address(s, "127.0.0.2", tcp).greeting()
    for _ in range(3):
        s.client(address=str(tmp_path / "sock"))
    here.pop().close()
    until(lambda: is_greeted(from_address(s, "127.0.0.1", tcp)), what="room for one more")


def test_more_connections_than_files_can_be_opened_is_told(server, image, tmp_path):

    s = server(image, "--max-connections", "60000", "--unix", tmp_path / "sock",
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    assert re.search(r"the limit of open files leaves room for \d+ connections\n", s.log())


# The mode of the socket

@pytest.mark.parametrize("mode, expected", [("0660", 0o660), ("600", 0o600), ("0777", 0o777),
                                            ("1", 0o001)])
@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_socket_has_the_mode_that_was_asked_for(server, image, tmp_path, mode, expected, mask):
    path = tmp_path / "sock"
    s = server(image, "--unix", path, "--unix-mode", mode, wait=False,
               preexec_fn=lambda: os.umask(mask))
    until(lambda: s.addresses, what="listening")
    assert stat.S_IMODE(path.stat().st_mode) == expected
    if os.access(path, os.W_OK):        # else nobody but root may connect
        assert s.wait_ready().is_served()


def test_umask_is_as_before(server, tmp_path):
    """What is created later has the mode that it had without the option."""
    image, log = tmp_path / "disk.img", tmp_path / "log"
    s = server(image, "--unix", tmp_path / "sock", "--unix-mode", "0777", "--create", "1M",
               "--pidfile", tmp_path / "pid", preexec_fn=lambda: os.umask(0o027))
    until((tmp_path / "pid").exists, what="a pidfile")
    assert stat.S_IMODE((tmp_path / "pid").stat().st_mode) == 0o640
    assert re.search(r"Umask:\s+0027", open(f"/proc/{s.proc.pid}/status").read())
    assert not log.exists()


@pytest.mark.parametrize("mode", ["", "0", "000", "8", "0o660", "rw", "1777", "-1", "0660x",
                                  "77777777777777777777777"])
def test_what_is_no_mode_is_named(run_server, image, tmp_path, mode):
    refused(run_server("--target", "--unix", tmp_path / "sock", "--unix-mode", mode, image), 2,
            "--unix-mode", f"'{mode}'")


def test_mode_without_a_socket_is_refused(run_server, image):
    refused(run_server("--target", "--unix-mode", "0660", image), 2, "--unix-mode", "--unix")
