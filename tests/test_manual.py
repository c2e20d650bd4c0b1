"""The manual page: it tells the options that there are, and its examples work.

Every literal display of its EXAMPLES is one session, and a test.  It runs as it
is written, in an empty directory with an image `disk.img`, but for two things:
the addresses, see `addressed`, and a server in the foreground, which a reader
leaves in another terminal: the lines after it run while it serves, then it is
stopped.  Lines run under `sh -eu`.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SERVER, make_disk, need, need_module
from nbd import until

PAGE = Path(__file__).resolve().parent.parent / "man/xnbd-server.8"
MIB = 1 << 20
DEFAULT_PORT = "8520"

# Programs of the examples that not every machine has, and their packages.
PACKAGES = {"qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "nbdinfo": "libnbd-bin", "nbdsh": "python3-libnbd"}


# The page

def section(title):
    """The lines of a section."""
    text = re.split(r"(?m)^\.Sh (.*)\n", PAGE.read_text())
    return text[text.index(title) + 1].splitlines()


def plain(line):
    """What a literal line of mdoc looks like when it is shown."""
    shown = line.replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\e", "\0")
    assert "\\" not in shown, f"an escape that this test does not know: {line}"
    return shown.replace("\0", "\\")


def sessions():
    """The lines of each literal display of EXAMPLES; a continued line is one."""
    text = "\n".join(section("EXAMPLES"))
    displays = re.findall(r"(?ms)^\.Bd -literal.*?\n(.*?)^\.Ed", text)
    return [plain(d).replace("\\\n", " ").splitlines() for d in displays]


def name(session):
    """What tells this session from the others."""
    text = " ".join(session)
    usual = r"--(?!target|unix|laddr|lport|daemonize|pidfile|logpath)[a-z-]+"
    return "".join(re.findall(usual + r"|(?<=kill )-\w+", text)).lstrip("-") or "plain"


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
    """Ends the daemons that a session that failed has left."""
    for path in directory.glob("*.pid"):
        with contextlib.suppress(ValueError, ProcessLookupError, FileNotFoundError):
            os.kill(int(path.read_text()), signal.SIGTERM)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The current directory has an image, and PATH the server under test; nbdsh
    runs under the Python of the tests, which `need_module` has looked at."""
    directory, programs = tmp_path / "place", tmp_path / "bin"
    directory.mkdir()
    programs.mkdir()
    (programs / "xnbd-server").symlink_to(SERVER)
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


@pytest.mark.parametrize("session", sessions(), ids=name)
def test_example_works(session, place, server):
    need_programs(session)
    if "--create" in " ".join(session):
        (place / "disk.img").unlink()
    port = free_port()
    before = (place / "disk.img").read_bytes() if "--cow-target" in str(session) else None
    play([addressed(line, port) for line in session], server)
    assert before is None or (place / "disk.img").read_bytes() == before
    # A daemon that was told to end removes its pidfile last.
    until(lambda: not list(place.glob("*.pid")), what="the daemons' end")


def test_examples_are_found_and_show_the_usual_options():
    """So that a page whose examples are not found does not pass."""
    shown = set(re.findall(r"--[a-z-]+", str(sessions())))
    assert {"--target", "--cow-target", "--create", "--cow-file", "--lport", "--laddr", "--unix",
            "--inetd", "--readonly", "--daemonize", "--pidfile", "--logpath"} <= shown


def test_what_an_example_writes_is_on_the_disk(place, server):
    session = next(s for s in sessions() if "pwrite" in " ".join(s))
    need_programs(session)
    play(session, server)
    assert (place / "disk.img").read_bytes()[:6] == b"hello\0"


# Options

def told():
    """{option: name of its value, or None} of the page's lists."""
    items = re.findall(r"(?m)^\.It Fl -([a-z-]+)(?: Ar (\S+))?$", PAGE.read_text())
    assert len(items) == len(dict(items)), "an option is told twice"
    return {option: value or None for option, value in items}


def offered(run_server):
    """The same of --help."""
    items = re.findall(r"(?m)^  --([a-z-]+)(?: ([A-Z]+))?  ", run_server("--help").stdout)
    return {option: value.lower() or None for option, value in items}


def test_manual_and_help_tell_the_same_options(run_server):
    assert told() == offered(run_server)


def test_manual_mentions_no_option_that_there_is_not(run_server):
    mentioned = set(re.findall(r"Fl -([a-z][a-z-]+)", PAGE.read_text()))
    assert mentioned == set(offered(run_server))




def test_default_port_of_the_manual_is_that_of_help(run_server):
    text = " ".join(section("DESCRIPTION"))
    assert f"The default is {DEFAULT_PORT}." in text
    assert f"({DEFAULT_PORT})" in run_server("--help").stdout
