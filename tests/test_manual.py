"""The manual pages: they tell the options that there are, and their examples work.

Every literal display of an EXAMPLES section is one session, and a test.  It runs
as it is written, in an empty directory with an image `disk.img`, but for two
things: the addresses, see `addressed`, and a server in the foreground, which a
reader leaves in another terminal: the lines after it run while it serves, then
it is stopped.  Lines run under `sh -eu`.  Where a page takes more for granted,
such as a proxy that runs, see `prepare`.

README.md's section about moving a disk is a session on two hosts, and runs too.
"""

import contextlib
import errno
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SERVER, make_disk, need, need_module, skip
from nbd import until

BGCTL = os.environ.get("XNBD_BGCTL", str(Path(SERVER).with_name("xnbd-bgctl")))
PROGRAMS = {"xnbd-server": SERVER, "xnbd-bgctl": BGCTL}
ROOT = Path(__file__).resolve().parent.parent
SERVER_PAGE, CONTROL_PAGE, BITMAP_PAGE = PAGES = [
    ROOT / "man" / page for page in ("xnbd-server.8", "xnbd-bgctl.1", "xnbd-bitmap.5")]
MIB = 1 << 20
DEFAULT_PORT = "8520"
OPTION = "-([a-z][a-z0-9-]+)"

# Programs of the examples that not every machine has, and their packages.
PACKAGES = {"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "nbdinfo": "libnbd-bin",
            "nbdsh": "python3-libnbd", "socat": "socat"}


# The pages

def section(page, title):
    """The text of a section."""
    text = re.split(r"(?m)^\.Sh (.*)\n", page.read_text())
    return text[text.index(title) + 1]


def plain(line):
    """What a literal line of mdoc looks like when it is shown."""
    shown = line.replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\e", "\0")
    assert "\\" not in shown, f"an escape that this test does not know: {line}"
    return shown.replace("\0", "\\")


def sessions(page):
    """The lines of each literal display of EXAMPLES; a continued line is one."""
    displays = re.findall(r"(?ms)^\.Bd -literal.*?\n(.*?)^\.Ed", section(page, "EXAMPLES"))
    return [plain(d).replace("\\\n", " ").splitlines() for d in displays]


def name(session):
    """What tells this session from the others."""
    text = " ".join(session)
    usual = r"--(?!target|unix|laddr|lport|daemonize|pidfile|logpath)[a-z0-9-]+"
    told = re.findall(usual + r"|(?<=kill )-\w+|\b(?:socat|od|rm)\b", text)
    return "".join(dict.fromkeys(told)).lstrip("-") or "plain"


def all_sessions():
    return [pytest.param(page, session, id=f"{page.stem}-{name(session)}")
            for page in PAGES for session in sessions(page)]


# Running a session

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def is_server(line):
    return line.startswith("xnbd-server ")


def in_foreground(line):
    return is_server(line) and "--daemonize" not in line


def addressed(line, port):
    """The one place where examples are changed: a free port takes the place of
    the default one, whether it is named or not, and a server that would listen
    on all addresses listens on loopback."""
    words = line.replace(DEFAULT_PORT, str(port)).split(" ")
    if is_server(line) and not {"--unix", "--inetd", "--connected-fd"} & set(words):
        if "--lport" not in words:
            words[1:1] = ["--lport", str(port)]
        if "--laddr" not in words:
            words[1:1] = ["--laddr", "127.0.0.1"]
    return " ".join(words)


def stop_daemons(directory):
    """Ends the daemons that a session has left."""
    for path in directory.glob("**/*.pid"):
        with contextlib.suppress(ValueError, ProcessLookupError, FileNotFoundError):
            os.kill(int(path.read_text()), signal.SIGTERM)


def wait_for_daemons(directory):
    """A daemon that was told to end removes its pidfile last."""
    until(lambda: not list(directory.glob("**/*.pid")), what="the daemons' end")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The current directory has an image, and PATH the programs under test; nbdsh
    runs under the Python of the tests, which `need_module` has looked at."""
    directory, programs = tmp_path / "place", tmp_path / "bin"
    directory.mkdir()
    programs.mkdir()
    for program, path in PROGRAMS.items():
        (programs / program).symlink_to(path)
    (programs / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (programs / "python3").chmod(0o755)
    make_disk(directory / "disk.img", MIB)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    yield directory
    stop_daemons(directory)


def run(lines):
    """Runs lines as a shell script, which must succeed."""
    done = subprocess.run(["sh", "-eu", "-c", "\n".join(lines)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{lines}:\n{done.stdout}"


def play(session, server):
    """Runs a session, whose foreground server, if it has one, serves to its end."""
    at = next((i for i, line in enumerate(session) if in_foreground(line)), None)
    if at is None:
        run(session)
        return
    run(session[:at])
    one = server(args=shlex.split(session[at])[1:])
    run(session[at + 1:])
    one.stop()


def need_programs(session):
    text = "\n".join(session)
    for program, package in PACKAGES.items():
        if re.search(rf"\b{program} ", text):
            need(program, package)
    if "nbdsh" in text:
        need_module("nbd", "python3-libnbd")
    if "--user" in text and os.getuid() != 0:
        skip("needs root")


def start_proxy(port):
    """A proxy with the control socket that examples name, and its origin."""
    run([f"xnbd-server --target --laddr 127.0.0.1 --lport {port} --daemonize --pidfile a.pid"
         " disk.img",
         "xnbd-server --proxy --unix b.sock --daemonize --pidfile b.pid"
         f" 127.0.0.1 {port} cache.img cache.map ctl.sock"])


def prepare(page, session, place, port):
    """What a page takes for granted."""
    if "--create" in " ".join(session):
        (place / "disk.img").unlink()
    if page == BITMAP_PAGE:
        run(["xnbd-server --cow-target --cow-file work.cow --unix a.sock --daemonize --pidfile a.pid"
             " disk.img", 'kill "$(cat a.pid)"'])
        wait_for_daemons(place)
    if page == CONTROL_PAGE and not any(map(is_server, session)):
        start_proxy(port)


@pytest.mark.parametrize("page, session", all_sessions())
def test_example_works(page, session, place, server):
    need_programs(session)
    port = free_port()
    prepare(page, session, place, port)
    granted = set(place.glob("*.pid"))
    before = (place / "disk.img").read_bytes() if "--cow-target" in str(session) else None
    play([addressed(line, port) for line in session], server)
    assert before is None or (place / "disk.img").read_bytes() == before
    if granted:
        stop_daemons(place)
    wait_for_daemons(place)


def test_examples_are_found_and_show_the_usual_options():
    """So that a page whose examples are not found does not pass."""
    def shown(page):
        return set(re.findall(r"--[a-z0-9-]+", str(sessions(page))))

    assert {"--target", "--cow-target", "--proxy", "--create", "--cow-file", "--lport", "--laddr",
            "--unix", "--inetd", "--readonly", "--daemonize", "--pidfile",
            "--logpath"} <= shown(SERVER_PAGE)
    assert {"--query", "--json", "--cache-all", "--cache-all2", "--progress", "--switch",
            "--reconnect"} <= shown(CONTROL_PAGE)
    assert len(sessions(BITMAP_PAGE)) > 1


def test_what_an_example_writes_is_on_the_disk(place, server):
    session = next(s for s in sessions(SERVER_PAGE) if "pwrite" in " ".join(s))
    need_programs(session)
    play(session, server)
    assert (place / "disk.img").read_bytes()[:6] == b"hello\0"


def test_moved_disk_has_what_was_written_during_the_move(place):
    session = next(s for s in sessions(SERVER_PAGE) if "--cache-all --progress" in " ".join(s))
    need_programs(session)
    make_disk(place / "disk.img", content=bytes([2]) * MIB)
    port = free_port()
    run([addressed(line, port) for line in session])
    wait_for_daemons(place)
    assert (place / "disk.img").read_bytes() == bytes([2]) * MIB
    assert (place / "new.img").read_bytes() == bytes([1]) * 65536 + bytes([2]) * (MIB - 65536)


# Options

def told(page):
    """{option: (letter, name of its value, be it needed or not)} of the page's lists; "" for none."""
    text = page.read_text().replace(" Ns = Ns Ar ", "=")
    items = re.findall(rf"(?m)^\.It (?:Fl (\w) , )?Fl {OPTION}(?: Ns Op = Ns)?(?: Ar (\S+))?$", text)
    options = {option: (letter, value) for letter, option, value in items}
    assert len(items) == len(options), "an option is told twice"
    return options


def help_of(program):
    return subprocess.run([PROGRAMS[program], "--help"], stdout=subprocess.PIPE, text=True,
                          check=True).stdout


def offered(program):
    """The same of --help."""
    items = re.findall(rf"(?m)^  (?:-(\w), |    )-{OPTION}(?: \[?([A-Z=]+)\]?(?= ))? +\S", help_of(program))
    return {option: (letter, value.lower()) for letter, option, value in items}


of_each_program = pytest.mark.parametrize("page, program", [
    (SERVER_PAGE, "xnbd-server"), (CONTROL_PAGE, "xnbd-bgctl")], ids=lambda v: str(v).split("/")[-1])


@of_each_program
def test_manual_and_help_tell_the_same_options(page, program):
    assert told(page) == offered(program)


@of_each_program
def test_manual_mentions_all_options_and_none_that_there_is_not(page, program):
    """xnbd-bgctl's page mentions some of the server's."""
    mentioned = set(re.findall(rf"(?:Fl|,) {OPTION}", page.read_text()))
    assert set(offered(program)) <= mentioned <= set(offered(program)) | set(offered("xnbd-server"))


def test_manual_of_the_format_mentions_options_of_the_server():
    mentioned = set(re.findall(rf"Fl {OPTION}", BITMAP_PAGE.read_text()))
    assert mentioned and mentioned <= set(offered("xnbd-server"))


def test_default_port_of_the_manual_is_that_of_help():
    assert f"The default is {DEFAULT_PORT}." in " ".join(
        section(SERVER_PAGE, "DESCRIPTION").splitlines())
    assert f"({DEFAULT_PORT})" in help_of("xnbd-server")


# The form

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_manual_is_well_formed(page):
    """But for what it refers to, which need not be installed."""
    need("mandoc", "mandoc")
    lint = subprocess.run(["mandoc", "-T", "lint", page], stdout=subprocess.PIPE, text=True).stdout
    complaints = [line for line in lint.splitlines() if "referenced manual not found" not in line]
    assert not complaints


# README.md

def readme_session():
    """The commands of the section about moving a disk: (host, line)."""
    text = (ROOT / "README.md").read_text()
    text = re.search(r"(?ms)^## Move a disk.*?\n(.*?)^## ", text).group(1).replace("\\\n", " ")
    host, found = None, []
    for line in text.splitlines():
        if line.startswith("On host "):
            host = line.split()[2].strip(",.:")
        if line.startswith("    "):
            found.append((host, line.strip()))
    return found


def on_this_machine(host, line, ports):
    """One machine is both hosts: each has a directory and a port."""
    line = re.sub(r"\bhost-a 8520\b", f"127.0.0.1 {ports['A']}", line)
    line = line.replace("--lport 8520", f"--lport {ports[host]}")
    return f"cd {host}; {addressed(line, ports[host])}; cd .."


def test_readme_moves_a_disk(place):
    session = readme_session()
    assert {host for host, _ in session} == {"A", "B"}
    content = bytes(range(256)) * (MIB // 256)
    for host in "AB":
        (place / host).mkdir()
    make_disk(place / "A" / "disk.img", content=content)
    ports = {"A": free_port(), "B": free_port()}
    run([on_this_machine(host, line, ports) for host, line in session])
    wait_for_daemons(place / "A")
    stop_daemons(place)
    wait_for_daemons(place)
    assert (place / "A" / "disk.img").read_bytes() == content
    assert (place / "B" / "disk.img").read_bytes() == content


def strings_of_the_programs():
    """All that they may say: C strings, joined where the compiler joins them."""
    text = "".join(path.read_text() for path in ROOT.glob("*.c"))
    text = re.sub(r'"\s*(?:PRI[a-z]+64\s*)?"', "", text)
    return [s.replace('\\"', '"') for s in re.findall(r'"((?:[^"\\\n]|\\.)*)"', text)]


def test_messages_that_readme_explains_are_said():
    """The text between what differs ("..."), by the programs or by the C library."""
    part = (ROOT / "README.md").read_text().partition("## Troubleshooting\n")[2].partition("\n## ")[0]
    of_libc = {os.strerror(e) for e in (errno.EADDRINUSE, errno.EACCES, errno.ECONNREFUSED, errno.EPERM)}
    said, found = "\n".join(strings_of_the_programs()), []
    for message in re.findall(r"(?m)^\| (?:a client says |writes fail with )?`(.*?)`", part):
        message = re.sub("|".join(of_libc), "...", message)
        found += [(piece, message) for piece in re.split(r"(?: is )?\.\.\.|^the (?:image|cache) is |\bunix:|\d+ s|: | (?=\()", message)
                  if len(piece) > 3]
    assert len(found) > 15
    for piece, message in found:
        assert piece.strip(" )(;") in said, (piece, message)
