"""The functions that the small static programs have in place of musl's (small.c): compared
with the C library's, and used by programs that are built so."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import CRASH, need
from nbd import *

HERE = Path(__file__).absolute().parent
TOP = HERE.parent
NAMES = ["vfprintf", "strtoul", "strtoull", "getopt_long", "optarg", "optind", "opterr", "optopt",
         "qsort", "strstr", "mbstowcs", "gmtime_r"]
KNOWN = re.compile(r"%([-0]*(\*|\d+)?(\.(\*|\d+)?)?(ll|[lzhj])?[sducx]|%)")


def test_functions_do_what_those_of_the_c_library_do(tmp_path):
    program = tmp_path / "small"
    renamed = [f"-D{name}=small_{name}" for name in NAMES]
    cc = [need("cc", "gcc"), "-std=c11", "-O1", "-fno-builtin", "-U_FORTIFY_SOURCE"]
    subprocess.run([*cc, *renamed, "-c", "-o", tmp_path / "small.o", TOP / "small.c"], check=True)
    subprocess.run([*cc, "-o", program, HERE / "small.c", tmp_path / "small.o"], check=True)
    said = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.fullmatch(r"compared (\d+)\n", said)
    assert found and int(found[1]) > 10000, said


def test_formats_are_those_that_it_knows():
    """In the C text of both programs: another would end them."""
    count = 0
    for path in TOP.glob("*.c"):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        text = re.sub(r'"\s*PRI([ux])64(\s*")?', lambda m: f"ll{m[1]}" + ("" if m[2] else '"'), text)
        for literal in re.findall(r'"(?:[^"\\\n]|\\.)*"', text) if path.name != "small.c" else ():
            count += literal.count("%")
            assert "%" not in KNOWN.sub("", literal), (path.name, literal)
    assert count > 300


def test_failed_assertion_ends_the_program_and_tells_where(tmp_path):
    musl, program = need("musl-gcc", "musl-tools"), tmp_path / "program"
    define, = re.findall(r'"(-D__assert_fail.*)"', (TOP / "Makefile").read_text())
    (tmp_path / "program.c").write_text("#include <assert.h>\nint main(int n, char **v)\n"
                                        "{ (void)v;\nassert(n == 1); return 0; }\n")
    subprocess.run([musl, define, "-static", "-o", program, tmp_path / "program.c", TOP / "small.c"],
                   check=True)
    assert subprocess.run([program]).returncode == 0
    done = subprocess.run([program, "more"], stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGABRT
    assert re.fullmatch(r"Assertion at .*program.c:4 failed\n", done.stderr)
    assert CRASH.search(done.stderr)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder with both programs, built so."""
    need("musl-gcc", "musl-tools")
    where = tmp_path_factory.mktemp("small")
    subprocess.run(["make", "-s", "-C", TOP, "static", f"STATIC_BUILD={where}"], check=True)
    return where


def test_static_program_is_under_160_kib(small):
    """With all that it can do: what embedded systems have room for."""
    assert (small / "xnbd-server").stat().st_size < 160 * 1024


def test_static_program_serves_under_a_name_and_logs_in_utc(small, disk, tmp_path):
    """getaddrinfo(), the address of a client, numbers, the time."""
    log, pid = tmp_path / "log", tmp_path / "pid"
    subprocess.run([small / "xnbd-server", "--target", "--laddr=localhost", "--th", "2",
                    disk(size=1 << 20), "--lport", "0", "--logpath", log, "--daemonize",
                    f"--pidfile={pid}"], check=True)
    try:
        port = int(re.search(r"listening on 127\.0\.0\.1:(\d+)\n", log.read_text())[1])
        with Client(("127.0.0.1", port)).negotiate() as c:
            c.pwrite(b"there", 4096)
            assert c.pread(5, 4096) == b"there"
            c.disc()
    finally:
        subprocess.run(["kill", pid.read_text().strip()], check=True)
    until(lambda: not pid.exists())
    now = time.strftime("%Y-%m-%dT%H:", time.gmtime())
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ: listening", log.read_text())
    assert now in log.read_text() or time.gmtime().tm_min == 0


@pytest.mark.parametrize("arguments, said", [
    (["--nothing"], "unknown or ambiguous option '--nothing'"),
    (["--target", "--c"], "unknown or ambiguous option '--c'"),
    (["--target", "image", "--lport"], "option '--lport' needs a value: PORT"),
    (["--target=1"], "option '--target' takes no value, as in '--target=1'"),
    (["-x"], "unknown option '-x'"),
    (["--target", "--lport", "65536", "image"], "'65536' is not a number from 0 to 65535"),
    (["--target", "--create", "1X", "image"], "'1X' is not a size such as 512M or 10G"),
    (["--target", "a", "b"], "DISK_IMAGE is the last argument, 'b' is too much"),
])
def test_static_program_refuses_what_the_other_does(small, arguments, said):
    done = subprocess.run([small / "xnbd-server", *arguments], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and said in done.stderr
