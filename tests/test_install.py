"""What is installed works where it was put, goes away again, and can be packaged; and the
examples of services do what they say."""

import os
import pwd
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import conftest
from conftest import SERVER, make_disk, need
from nbd import *

ROOT = Path(__file__).resolve().parent.parent
SIZE = 65536
INSTALLED = """
    bin/xnbd-bgctl sbin/xnbd-server
    share/man/man1/xnbd-bgctl.1 share/man/man5/xnbd-bitmap.5 share/man/man8/xnbd-server.8
    share/bash-completion/completions/xnbd-bgctl share/bash-completion/completions/xnbd-server
    share/zsh/site-functions/_xnbd share/doc/xnbd/examples/inetd.conf
    share/doc/xnbd/examples/xnbd.init share/doc/xnbd/examples/xnbd.service
    share/doc/xnbd/examples/xnbd@.service share/doc/xnbd/examples/xnbd-activated.service
    share/doc/xnbd/examples/xnbd-activated.socket""".split()


def run(*command, **keywords):
    done = subprocess.run([str(c) for c in command], text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **keywords)
    assert done.returncode == 0, done
    return done.stdout


def make(*arguments):
    """make, with the programs that are tested, if make has made them."""
    build = Path(SERVER).parent
    own = [f"BUILD={build}"] if (build / "xnbd.o").exists() else []
    return run("make", "-s", "-C", ROOT, *own, *arguments, timeout=conftest.TIME_LIMIT)


def files(directory):
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()}


@pytest.fixture
def prefix(tmp_path):
    """A folder that is installed to."""
    make("install", f"PREFIX={tmp_path}/usr")
    return tmp_path / "usr"


@pytest.fixture
def examples(prefix):
    return prefix / "share/doc/xnbd/examples"


@pytest.fixture
def image(disk):
    return disk(content=pattern(0, SIZE))


def in_step(c):
    assert c.pread(SIZE) == pattern(0, SIZE)


# make install

@pytest.mark.parametrize("where", [[], ["PREFIX=/usr"], ["PREFIX=/opt/a", "SBINDIR=/opt/b"]],
                         ids=["default", "prefix", "folders"])
def test_destdir_has_all_that_is_installed_and_nothing_after_uninstall(tmp_path, where):
    make("install", f"DESTDIR={tmp_path}", *where)
    place = dict(w.split("=") for w in where)
    prefix = place.get("PREFIX", "/usr/local")
    sbin = place.get("SBINDIR", f"{prefix}/sbin")
    assert files(tmp_path) == {(f"{prefix}/{f}" if f[0] != "s" or f[1] != "b"
                                else f"{sbin}/xnbd-server").lstrip("/") for f in INSTALLED}
    unit = (tmp_path / f".{prefix}/share/doc/xnbd/examples/xnbd.service").read_text()
    assert f"ExecStart={sbin}/xnbd-server " in unit
    make("uninstall", f"DESTDIR={tmp_path}", *where)
    assert files(tmp_path) == set()
    assert not (tmp_path / f".{prefix}/share/doc/xnbd").exists()


def test_installed_programs_run(prefix, image, server, monkeypatch):
    for program in "sbin/xnbd-server", "bin/xnbd-bgctl":
        assert run(prefix / program, "--version").startswith(Path(program).name)
    monkeypatch.setattr(conftest, "SERVER", str(prefix / "sbin/xnbd-server"))
    in_step(server(image).client())


# Flags and static programs

def dry_run(tmp_path, *arguments):
    """What would be called: (compile, link) of the server."""
    lines = make("-n", f"BUILD={tmp_path}/build", *arguments).splitlines()
    return ([line for line in lines if " -c " in line],
            [line for line in lines if " -o " in line and " -c " not in line])


def test_flags_of_the_user_take_nothing_away_that_is_needed(tmp_path):
    """They come last, so that they can take hardening back."""
    compiled, linked = dry_run(tmp_path, "CFLAGS=-O0 -fno-stack-protector", "LDFLAGS=-no-pie",
                               "CPPFLAGS=-DX")
    assert len(compiled) > 20 and len(linked) == 2
    for line in compiled:
        words = line.split()
        assert {"-std=c11", "-D_FILE_OFFSET_BITS=64", "-pthread", "-fPIE", "-DX", "-O0"} <= set(words)
        assert words.index("-fstack-protector-strong") < words.index("-fno-stack-protector")
    for line in linked:
        words = line.split()
        assert "-pthread" in words and words.index("-pie") < words.index("-no-pie")


def elf(program):
    return run(need("readelf", "binutils"), "-hlWd", program, env={**os.environ, "LC_ALL": "C"})


def is_hardened(program):
    """A PIE whose relocated data is read-only before main()."""
    said = elf(program)
    return bool(re.search(r"Type: +DYN", said) and "GNU_RELRO" in said
                and re.search(r"FLAGS.*NOW", said) and re.search(r"GNU_STACK.* RW ", said))


def test_programs_are_hardened(tmp_path):
    make("all", f"BUILD={tmp_path}", "-j2")
    for program in tmp_path / "xnbd-server", tmp_path / "xnbd-bgctl":
        assert is_hardened(program)
        symbols = run("readelf", "--dyn-syms", "-W", program)
        assert "__stack_chk_fail" in symbols and "_chk@GLIBC" in symbols


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """The folder with both programs, linked with musl."""
    need("musl-gcc", "musl-tools")
    where = tmp_path_factory.mktemp("static")
    make("static", f"STATIC_BUILD={where}", "-j2")
    return where


@pytest.mark.parametrize("program", ["xnbd-server", "xnbd-bgctl"])
def test_static_programs_are_hardened_and_need_no_library(static, program):
    assert is_hardened(static / program)
    said = elf(static / program)
    assert "INTERP" not in said and "NEEDED" not in said


def test_static_server_is_under_200_kib(static):
    """What embedded systems have room for."""
    assert (static / "xnbd-server").stat().st_size < 200 * 1024


def test_static_server_knows_names_of_hosts_and_users(static, image, server, monkeypatch):
    user = ["--user", "nobody"] if os.getuid() == 0 else []
    monkeypatch.setattr(conftest, "SERVER", str(static / "xnbd-server"))
    s = server(args=["--target", "--laddr", "localhost", "--lport", "0", *user, image])
    in_step(s.client())
    if user:
        assert s.status("Uid") == pwd.getpwnam("nobody").pw_uid


# make check, make smoke

def test_check_names_what_is_missing_and_installs_nothing(shell_alone, tmp_path):
    for name in "apt-get", "sudo":
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n: >$TMPDIR/called\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = subprocess.run([ROOT / "tests/run"], env={**shell_alone, "PYTHONHOME": "/nowhere"},
                          stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("type: apt-get install -y python3-pytest qemu-utils\n"), done
    assert os.listdir(shell_alone["TMPDIR"]) == []


def smoke(directory, **keywords):
    return subprocess.run([ROOT / "tests/smoke.sh", directory], text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **keywords)


@pytest.fixture
def shell_alone(tmp_path):
    """An environment that has the programs of every system, and nothing else; TMPDIR is empty."""
    for directory in "bin", "empty":
        (tmp_path / directory).mkdir()
    for name in "sh cat cmp cp dirname grep head mkdir mktemp rm sed sleep test".split():
        (tmp_path / "bin" / name).symlink_to(need(name, "coreutils"))
    return {"PATH": str(tmp_path / "bin"), "TMPDIR": str(tmp_path / "empty")}


def test_smoke_passes_with_a_shell_alone_and_leaves_nothing(shell_alone):
    make("smoke")
    done = smoke(Path(SERVER).parent, env=shell_alone)
    assert done.returncode == 0 and done.stdout.endswith("smoke: passed\n"), done.stdout
    assert os.listdir(shell_alone["TMPDIR"]) == []


@pytest.mark.parametrize("broken, word", [
    ("xnbd-server", "--daemonize"), ("xnbd-bgctl", "--switch"), ("tests/load", "--verify")])
def test_smoke_fails_where_a_program_does(tmp_path, shell_alone, broken, word):
    """Here each program says that all is well, and does nothing, where it sees one word."""
    runner = tmp_path / "runner"
    runner.write_text(f'''#!/bin/sh
case "$*" in *{broken}*{word}*) exit 0 ;; esac
exec "$@"
''')
    runner.chmod(0o755)
    done = smoke(Path(SERVER).parent, env={**shell_alone, "RUN": str(runner)})
    assert done.returncode and "smoke: failed" in done.stdout, done.stdout
    assert os.listdir(shell_alone["TMPDIR"]) == []


# Completion

def options_of(program):
    return set(re.findall(r"(?m)^  (?:-\w, |    )(--[a-z0-9-]+)", run(program, "--help")))


BASH = """
source "$1"
complete -p "$2" | grep -q -- '-o default -F _xnbd '     # files, where there is no reply
_xnbd "$2" "$3" "$2"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(params=["sbin/xnbd-server", "bin/xnbd-bgctl"])
def program(prefix, monkeypatch, request):
    """The path of a program, whose folder is in PATH."""
    path = prefix / request.param
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def test_bash_completes_options_and_files(prefix, program):
    def complete(word):
        script = prefix / "share/bash-completion/completions" / program.name
        return run(need("bash", "bash"), "-euc", BASH, "bash", script, program.name,
                   word).split()

    options = options_of(program)
    assert set(complete("-")) == options
    assert set(complete("--re")) == {o for o in options if o.startswith("--re")} != set()
    assert complete("di") == complete("--nothing") == []


ZSH = """
_describe() { print -l -- $options }
_files() { print files }
fpath=($1)
autoload -Uz _xnbd
words=($2 $3) PREFIX=$3
_xnbd
"""


def test_zsh_describes_options_and_completes_files(prefix, program):
    def complete(word):
        return run(need("zsh", "zsh"), "-fc", ZSH, "zsh", prefix / "share/zsh/site-functions",
                   program.name, word).splitlines()

    told = re.findall(r"(?m)^  (?:-\w, |    )(--[a-z0-9-]+)(?: [][A-Z=]+)? +(.*)", run(program, "--help"))
    assert complete("--") == [":".join(option) for option in told] != []
    assert complete("di") == ["files"]


# Services

UNITS = ["xnbd.service", "xnbd@.service", "xnbd-activated.service", "xnbd-activated.socket"]


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_has_no_complaint(examples, unit):
    analyze = need("systemd-analyze", "systemd")
    path = examples / unit.replace("@", "@data")
    if "@" in unit:
        (examples / unit).rename(path)
    assert run(analyze, "verify", "--man=no", path) == ""


@pytest.mark.parametrize("unit", [u for u in UNITS if u.endswith("service")])
def test_systemd_calls_the_service_safe(examples, unit):
    """Its mark goes from 0, the best, to 10; it counts a network that is needed."""
    run(need("systemd-analyze", "systemd"), "security", "--offline=true", "--threshold=20",
        examples / unit)


@pytest.mark.parametrize("unit", ["xnbd.service", "xnbd@.service"])
def test_command_of_a_service_serves(examples, server, unit, tmp_path):
    """With folders of ours in the place of the system's, and a port that is free."""
    make_disk(tmp_path / "disk.img", content=pattern(0, SIZE))
    (tmp_path / "xnbd").mkdir()
    command = re.search(r"(?m)^ExecStart=(.*)", (examples / unit).read_text()).group(1)
    for name, value in [("/var/lib/xnbd", tmp_path), ("%t", tmp_path), ("%i", "disk")]:
        command = command.replace(name, str(value))
    words = shlex.split(command)
    assert words[0].endswith("/sbin/xnbd-server")
    port = ["--lport", "0"] if "--laddr" in words else []
    in_step(server(args=words[1:] + port).client())


def test_line_for_inetd_serves(examples, server, image):
    line, = [entry for entry in (examples / "inetd.conf").read_text().splitlines()
             if entry and entry[0] != "#"]
    port, kind, protocol, wait, _, path, name, *arguments = line.split()
    assert (port, kind, protocol, wait, name) == ("8520", "stream", "tcp", "nowait", "xnbd-server")
    assert path.endswith("/sbin/xnbd-server") and Path(path).exists()
    arguments = [image if a == "/var/lib/xnbd/disk.img" else a for a in arguments]
    ours, theirs = socket.socketpair()
    with theirs:
        s = server(args=arguments, wait=False, stdin=theirs, stdout=theirs, stderr=theirs)
    with Client(ours) as c:
        in_step(c.negotiate())
        c.disc()
    assert s.wait() == 0


@pytest.fixture
def inetd(tmp_path):
    """inetd(line): the super-server, with that line in its file; ended with the test."""
    program, started = need("inetd", "openbsd-inetd"), []

    def start(line):
        config = tmp_path / "inetd.conf"
        config.write_text(line + "\n")
        started.append(subprocess.Popen([program, "-i", config], stdin=subprocess.DEVNULL))

    yield start
    for one in started:
        one.terminate()
        one.wait(DEADLINE)


def test_line_for_inetd_serves_under_inetd(examples, inetd, image, tmp_path):
    """A real one, on a Unix socket in the place of the port, and as this user."""
    line, = [entry for entry in (examples / "inetd.conf").read_text().splitlines()
             if entry and entry[0] != "#"]
    path = tmp_path / "inetd.sock"
    words = [str(image) if w == "/var/lib/xnbd/disk.img" else w for w in line.split()]
    words[0], words[2], words[4] = str(path), "unix", pwd.getpwuid(os.geteuid()).pw_name
    inetd(" ".join(words))
    until(path.is_socket, what="inetd's socket")
    for _ in range(2):                  # one after the other, and each has a server
        with Client(str(path)) as c:
            in_step(c.negotiate())
            assert c.error_of(NBD_CMD_WRITE, payload=b"x") == NBD_EPERM
            c.disc()


class InitScript:
    """The script, with files of ours."""

    def __init__(self, examples, options, directory):
        self.script, self.defaults = examples / "xnbd.init", directory / "defaults"
        self.pidfile = directory / "pid"
        self.defaults.write_text(f"PIDFILE='{self.pidfile}'\nOPTIONS='{options}'\n")

    def __call__(self, command):
        done = subprocess.run(["/bin/sh", self.script, command], text=True, timeout=2 * DEADLINE,
                              env={**os.environ, "DEFAULTS": str(self.defaults)},
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        return done.returncode, done.stdout

    def pid(self):
        return int(self.pidfile.read_text())


@pytest.fixture
def init(examples, image, tmp_path):
    script = InitScript(examples, f"--target --unix {tmp_path}/sock --logpath {tmp_path}/log "
                                  f"{image}", tmp_path)
    yield script
    script("stop")


def test_init_script_starts_tells_and_stops(init, tmp_path):
    assert init("status") == (3, "xnbd: does not run\n")
    assert init("start") == (0, "xnbd: started\n")
    pid = init.pid()
    assert init("start") == (0, f"xnbd: runs already, process {pid}\n")
    assert init("status") == (0, f"xnbd: runs, process {pid}\n")
    with Client(str(tmp_path / "sock")) as c:
        in_step(c.negotiate())
    assert init("restart") == (0, "xnbd: stopped\nxnbd: started\n")
    assert init.pid() != pid
    (tmp_path / "log").rename(tmp_path / "log.1")
    assert init("reload") == (0, "")
    until(lambda: (tmp_path / "log").exists(), what="a new log file")
    assert init("stop") == (0, "xnbd: stopped\n")
    assert init("stop") == (0, "xnbd: does not run\n")
    assert init("reload")[0] != 0
    assert not init.pidfile.exists() and not (tmp_path / "sock").exists()


def test_init_script_leaves_another_process_alone(init):
    """That has the number of a server that was killed."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    init.pidfile.write_text(f"{other.pid}\n")
    assert init("status")[0] == 3
    assert init("stop") == (0, "xnbd: does not run\n")
    assert other.poll() is None
    other.communicate(b"\n")
    assert init("start") == (0, "xnbd: started\n")


def test_init_script_tells_what_it_cannot_do(init, tmp_path):
    assert init("dance")[0] == 2
    (tmp_path / "disk.img").rename(tmp_path / "elsewhere")
    status, said = init("start")
    assert status == 1 and "cannot open image" in said
    init.defaults.write_text("")
    status, said = init("start")
    assert status == 6 and "OPTIONS" in said


# A package

def repository(directory):
    """A repository with one commit, always the same, of what is here; also where this
    folder is none."""
    who = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER")
           for what, value in (("NAME", "x"), ("EMAIL", "x@y"), ("DATE", "1700000000 +0000"))}
    directory.mkdir()
    git = [need("git", "git"), f"--git-dir={directory}/.git"]
    run(*git, "init", "-q")
    run(*git, f"--work-tree={ROOT}", "add", "-A", ".", cwd=ROOT)
    run(*git, "commit", "-q", "-m", "x", cwd=directory, env={**os.environ, **who})
    run("git", "reset", "-q", "--hard", cwd=directory)
    return directory


@pytest.mark.limit(400)
def test_debian_package_is_the_same_each_time_it_is_built(tmp_path):
    """In another folder, at another time, from a tarball of its own; and what is in it runs."""
    need("dpkg-buildpackage", "dpkg-dev")
    need("dh", "debhelper")
    found = []
    for name in "one", "the-other":
        source = repository(tmp_path / name)
        run("make", "-s", "deb", cwd=source, env={**os.environ, "DEB_BUILD_OPTIONS":
                                                  "noautodbgsym parallel=2"})
        tarball, = source.glob("build/xnbd-*.tar.gz")
        package, = source.glob("build/deb/xnbd_*.deb")
        found.append([(p.name, p.read_bytes()) for p in (tarball, package)])
    assert found[0] == found[1]
    run("dpkg-deb", "-x", package, tmp_path / "root")
    assert {f"usr/{f}".replace("zsh/site-functions", "zsh/vendor-completions") +
            (".gz" if "/man/" in f else "") for f in INSTALLED} <= files(tmp_path / "root")
    version = run(tmp_path / "root/usr/sbin/xnbd-server", "--version").split()[1]
    assert package.name.startswith(f"xnbd_{version}-1_")
