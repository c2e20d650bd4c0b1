"""Several images at one port, each by its name (--export)."""

import functools
import json
import os
import random
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from conftest import SERVER, loop_device, make_disk, need, preload, raise_descriptor_limit
from nbd import *
from test_control import bgctl, done, refused_in_one_line, state
from test_snapshot import Load, Numbered, Snapshots, leave, names

MIB = 1 << 20
ANY_PORT = ["--laddr", "127.0.0.1", "--lport", "0"]
SIZES = {"": 3 * MIB, "a": MIB, "b/c": 2 * MIB + 511}
READ_ONLY = NBD_FLAG_READ_ONLY
hazard = pytest.mark.hazard


@functools.cache
def content(name, size):
    return pattern(0, size, seed=sum(name.encode()) % 251 + 1)


def exports(images):
    return [word for name, path in images.items() for word in ("--export", f"{name}={path}")]


@pytest.fixture
def images(disk):
    """{name: path} of images that all differ; "" is the default."""
    return {name: disk(content=content(name, size), name=f"disk-of-{name.replace('/', '-')}.img")
            for name, size in SIZES.items()}


@pytest.fixture
def named(images):
    return {name: path for name, path in images.items() if name}


@pytest.fixture
def several(server, images, named):
    """A target with all of them."""
    return server(images[""], *exports(named))


def refused(done, status, *words):
    """One line, with these words, and that status."""
    assert done.returncode == status and not done.stdout, done
    assert done.stderr.count("\n") == 1 and all(str(w) in done.stderr for w in words), done


# The table

def test_each_name_is_its_own_disk(several):
    for name, size in SIZES.items():
        with several.client(name=name) as c:
            assert c.size == size and c.pread(size) == content(name, size)
        with several.client(name=name, how="export_name") as c:
            assert c.size == size and c.pread(1, size - 1) == content(name, size)[-1:]


def test_list_tells_names_and_descriptions(several, images):
    c = several.hello()
    replies = c.ask(NBD_OPT_LIST)
    assert [(r.name, r.data[4 + r.name_length:].decode()) for r in replies] == [
        (name, path.name) for name, path in images.items()]
    assert c.list() == list(SIZES)


def test_information_is_that_of_the_export(several, images):
    c = several.hello()
    for name, path in images.items():
        info = c.info(name, [NBD_INFO_NAME, NBD_INFO_DESCRIPTION])
        assert (info.size, info.name, info.description) == (SIZES[name], name, path.name)
        assert info.flags & NBD_FLAG_CAN_MULTI_CONN and not info.flags & READ_ONLY


@hazard("a client reaches an export that it did not name")
@pytest.mark.parametrize("name", ["c", "A", "a ", "aa", "b", "b/", "b/c/", "/a", "*", "\u20ac",
                                  "x" * 4096], ids=lambda name: ascii(name)[1:9])
def test_name_that_is_not_there_is_refused(several, name):
    """The handshake goes on, but where the protocol has no way to say no.  The log tells of all."""
    c = several.hello()
    c.structured_reply()
    for option, data in ((NBD_OPT_INFO, info_data(name)), (NBD_OPT_GO, info_data(name)),
                         (NBD_OPT_LIST_META_CONTEXT, meta_data(name)),
                         (NBD_OPT_SET_META_CONTEXT, meta_data(name, ["base:allocation"]))):
        assert c.refused(option, data) == NBD_REP_ERR_UNKNOWN
    c.go("a")
    assert c.pread(100) == content("a", 100)
    c = several.hello()
    c.option(NBD_OPT_EXPORT_NAME, octets(name))
    c.expect_closed()
    line = re.compile(rf"127\.0\.0\.1:\d+: refused: there is no export '{re.escape(name[:900])}")
    until(lambda: len(line.findall(several.log())) == 5, what="a line for each")


def test_without_default_the_empty_name_is_refused(server, named):
    s = server(args=["--target", *ANY_PORT, *exports(named)])
    c = s.hello()
    assert c.list() == list(named)
    assert c.refused(NBD_OPT_GO, info_data("")) == NBD_REP_ERR_UNKNOWN
    c.go("b/c")
    assert c.size == SIZES["b/c"]
    c = s.hello()
    c.option(NBD_OPT_EXPORT_NAME)
    c.expect_closed()


def test_single_export_has_no_other_name(server, named):
    s = server(args=["--target", *ANY_PORT, "--export", f"a={named['a']}"])
    c = s.hello()
    assert c.list() == ["a"] and c.refused(NBD_OPT_INFO, info_data("b")) == NBD_REP_ERR_UNKNOWN


@hazard("a client reaches an export that it did not name: its range")
def test_ranges_are_those_of_the_export(several):
    """The other disks are larger, or smaller."""
    for name, size in SIZES.items():
        with several.client(name=name) as c:
            assert c.size == size
            assert c.error_of(NBD_CMD_READ, size - 1, 2) in (NBD_EINVAL, NBD_EOVERFLOW)
            assert c.error_of(NBD_CMD_WRITE, size, payload=b"x") == NBD_ENOSPC
            assert c.error_of(NBD_CMD_WRITE_ZEROES, 0, size + 1) in (NBD_EINVAL, NBD_ENOSPC)
            assert c.pread(size) == content(name, size)


def test_writes_go_to_the_export_and_to_no_other(several, images):
    clients = {name: several.client(name=name) for name in SIZES}
    for name, c in clients.items():
        c.pwrite(f"this is {name}".encode(), 4000)
        c.zero(5000, 70000)
    for c in clients.values():
        c.flush()
    for name, path in images.items():
        expected = bytearray(content(name, SIZES[name]))
        expected[70000:75000] = bytes(5000)
        text = f"this is {name}".encode()
        expected[4000:4000 + len(text)] = text
        assert path.read_bytes() == expected == clients[name].pread(SIZES[name])


def test_connections_of_one_export_see_each_other(several):
    """CAN_MULTI_CONN, for each of them."""
    for name in SIZES:
        with several.client(name=name) as a, several.client(name=name) as b:
            a.pwrite(b"seen", 12345, NBD_CMD_FLAG_FUA)
            assert b.pread(4, 12345) == b"seen"


def test_context_of_one_name_does_not_hold_for_another(several):
    c = several.hello()
    c.structured_reply()
    c.set_meta_context("a")
    c.go("b/c")
    assert c.error_of(NBD_CMD_BLOCK_STATUS, 0, 4096) == NBD_EINVAL
    with several.client(name="a", contexts=["base:allocation"]) as c:
        runs = c.block_status(MIB)["base:allocation"]
        assert sum(length for length, _ in runs) == MIB


def test_log_tells_which_export_a_client_has(several):
    several.client(name="b/c")
    several.client()
    until(lambda: re.search(r"client \d+: connected$|:\d+: connected$", several.log(), re.M))
    assert re.search(r": connected to b/c$", several.log(), re.M)


# Names

LENGTHS = [1, 2, 255, 256, 257, 3000, 4095, 4096]


@hazard("names of 0 to 4097 bytes, in the table")
def test_names_of_many_sizes(server, disk):
    """All of them at once would not fit into a LIST."""
    few = {"n" * length: disk(content=content(str(length), 4096 + length)) for length in LENGTHS}
    s = server(args=["--target", *ANY_PORT, *exports(few)])
    c = s.hello()
    assert c.list() == list(few)
    for name in few:
        assert c.info(name).size == 4096 + len(name)
        for wrong in (name[:-1], name + "n"):
            if wrong not in few and len(wrong) <= 4096:
                assert c.refused(NBD_OPT_INFO, info_data(wrong)) == NBD_REP_ERR_UNKNOWN
    assert c.refused(NBD_OPT_INFO, info_data("n" * 4097)) == NBD_REP_ERR_TOO_BIG
    for name in few:
        with s.client(name=name, how="export_name") as c:
            assert c.pread(c.size) == content(str(len(name)), 4096 + len(name))


@pytest.mark.parametrize("name", ["x y", "a/b/../c", "\u20ac\U0001f4be", "-", "--export", "\n"])
def test_name_may_be_any_text(server, disk, name):
    s = server(disk(), "--export", f"{name}={disk(5000)}")
    assert s.hello().list() == ["", name]
    assert s.client(name=name).size == 5000


def test_first_equals_sign_ends_the_name(server, disk):
    s = server(disk(), f"--export=a={disk(7777, name='b=c.img')}")
    assert s.hello().list() == ["", "a"] and s.client(name="a").size == 7777


@pytest.mark.parametrize("value, words", [
    ("a", ["NAME=PATH", "'a'"]), ("=a.img", ["NAME=PATH", "=a.img"]), ("a=", ["NAME=PATH", "a="]),
    ("", ["NAME=PATH"]), (b"\xff=a.img", ["UTF-8"]), (b"\xed\xa0\x80=a.img", ["UTF-8"]),
    ("n" * 4097 + "=a.img", ["4096", "nnn"]),
], ids=lambda v: str(v)[:12] if not isinstance(v, list) else None)
def test_wrong_names_are_refused(run_server, disk, value, words):
    done = subprocess.run([SERVER, "--target", "--export", value, disk()], capture_output=True)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode(errors="replace")
    refused(done, 2, "--export", *words)


def test_same_name_twice_is_refused(run_server, disk):
    done = run_server("--target", *exports({"x": disk(), "y": disk()}), "--export", "x=other")
    refused(done, 2, "--export", "'x'")


# The answer to LIST

ROOM = 32 * 1024 - 20           # of all entries
ENTRY = 20 + 4


@hazard("more exports than LIST can tell")
def test_list_of_64_long_names(server, tmp_path):
    many = {f"{i:02}" + "n" * 440: make_disk(tmp_path / f"{i}.img", i) for i in range(64)}
    s = server(args=["--target", *ANY_PORT, *exports(many)])
    c = s.hello()
    assert c.list() == list(many)
    assert [c.info(name).size for name in many] == list(range(64))


@hazard("more exports than LIST can tell: the last byte")
def test_list_is_full_to_the_last_byte_or_refused(server, run_server, tmp_path):
    path = make_disk(tmp_path / "12345678", 4096)
    few = {f"{i}" + "n" * 4080: path for i in range(7)}
    left = ROOM - len(few) * (ENTRY + 4081 + 8) - ENTRY - 8
    words = ["--target", "--readonly", *ANY_PORT, *exports(few)]
    s = server(args=[*words, "--export", f"{'m' * left}={path}"])
    c = s.hello()
    replies = c.ask(NBD_OPT_LIST)
    assert sum(20 + len(r.data) for r in replies) == ROOM and len(replies) == 8
    done = run_server(*words, "--export", f"{'m' * (left + 1)}={path}")
    refused(done, 1, "--export", "LIST", ROOM + 1, ROOM)


def test_hundreds_of_exports(server, tmp_path):
    """Each with a name, a disk and a place among the descriptors."""
    many = {f"disk {i}": make_disk(tmp_path / f"{i}.img", content=b"%09d" % i) for i in range(600)}
    raise_descriptor_limit(8192)
    s = server(args=["--target", *ANY_PORT, *exports(many)])
    assert len(s.hello().list()) == 600
    for i in random.Random(1).sample(range(600), 40):
        assert s.client(name=f"disk {i}").pread(9) == b"%09d" % i


# Images

@hazard("two exports write to one image")
@pytest.mark.parametrize("how", ["same path", "other path", "symbolic link", "hard link",
                                 "default"])
def test_image_that_is_exported_twice_is_refused(run_server, tmp_path, how):
    image = make_disk(tmp_path / "disk.img", MIB)
    other = tmp_path / "other.img"
    if how == "symbolic link":
        other.symlink_to(image)
    elif how == "hard link":
        os.link(image, other)
    else:
        other = image if how == "same path" else f"{tmp_path}/./disk.img"
    words = [image] if how == "default" else ["--export", f"x={image}"]
    done = run_server("--target", *ANY_PORT, *words, "--export", f"a={other}")
    refused(done, 1, other, image, "--readonly")


def test_image_may_be_exported_twice_read_only(server, disk):
    image = disk(content=content("x", MIB))
    s = server(image, "--readonly", "--export", f"a={image}")
    for name in "", "a":
        c = s.client(name=name)
        assert c.flags & READ_ONLY and c.pread(MIB) == content("x", MIB)
        assert c.error_of(NBD_CMD_WRITE, 0, payload=b"x") == NBD_EPERM


def test_device_that_is_exported_twice_is_refused(run_server, disk):
    with loop_device(disk(MIB)) as device:
        refused(run_server("--target", *ANY_PORT, *exports({"a": device, "b": device})), 1, device)


def test_image_that_is_not_there_is_named(run_server, disk, tmp_path):
    done = run_server("--target", "--unix", tmp_path / "sock", disk(512),
                      *exports({"a": disk(512), "b": tmp_path / "nowhere.img"}))
    refused(done, 1, "nowhere.img")
    assert not (tmp_path / "sock").exists()


def test_create_makes_all_that_are_not_there(server, disk, tmp_path):
    old = disk(content=content("old", 5000))
    new = {"x": tmp_path / "x.img", "y": tmp_path / "y.img"}
    s = server(tmp_path / "default.img", "--create", "2M", *exports({"old": old, **new}))
    sizes = {name: s.hello().info(name).size for name in s.hello().list()}
    assert sizes == {"": 2 * MIB, "old": 5000, "x": 2 * MIB, "y": 2 * MIB}
    assert old.read_bytes() == content("old", 5000)
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in new.values())


# Options that do not go together

@pytest.mark.parametrize("words, named_words", [
    (["--target", "--oldstyle"], ["--oldstyle", "--export"]),
    (["--target", "--connected-fd=3"], ["--connected-fd", "--export"]),
    (["--proxy"], ["--export"]),
    (["--cow-target", "--cow-file", "cow"], ["--cow-file"]),
], ids=["oldstyle", "connected-fd", "proxy", "cow-file"])
def test_contradictions_are_refused(run_server, disk, tmp_path, words, named_words):
    done = run_server(*words, "--export", f"a={disk()}", disk(), cwd=tmp_path)
    refused(done, 2, *named_words)
    assert not (tmp_path / "cow").exists()


def test_image_is_needed_where_there_is_no_export(run_server):
    refused(run_server("--target", *ANY_PORT), 2, "DISK_IMAGE")


def test_inetd_serves_one_client_by_name(images, named):
    here, there = socket.socketpair()
    with subprocess.Popen([SERVER, "--target", "--inetd", *exports(named)], stdin=there,
                          stderr=subprocess.DEVNULL) as proc, there:
        there.close()
        with Client(here).negotiate(name="a") as c:
            assert c.pread(MIB) == content("a", MIB)
            c.disc()
        assert proc.wait(DEADLINE) == 0


# Copy on write

def test_bases_stay_as_they_are(server, images, named):
    s = server(args=["--cow-target", *ANY_PORT, *exports(named), images[""]])
    clients = {name: s.client(name=name) for name in SIZES}
    for name, c in clients.items():
        c.pwrite(f"this is {name}".encode() * 1000, 3000)
        c.zero(MIB // 4, MIB // 2)
    for name, c in clients.items():
        text = f"this is {name}".encode() * 1000
        assert c.pread(len(text), 3000) == text and not any(c.pread(MIB // 4, MIB // 2))
        assert c.pread(3000) == content(name, 3000)
    for c in clients.values():
        c.close()
    s.stop()
    assert all(path.read_bytes() == content(name, SIZES[name]) for name, path in images.items())
    assert names(images[""]) == {path.name for path in images.values()}


def test_one_base_has_an_overlay_for_each_export(server, disk):
    base = disk(content=content("x", MIB))
    s = server(args=["--cow-target", *ANY_PORT, *exports({"a": base, "b": base})])
    with s.client(name="a") as a, s.client(name="b") as b:
        a.pwrite(b"for a", 100)
        b.pwrite(b"for b", 100)
        assert (a.pread(5, 100), b.pread(5, 100)) == (b"for a", b"for b")
        assert a.pread(1000, 8192) == content("x", MIB)[8192:9192]


def test_overlay_of_the_one_export_may_be_kept(server, disk, tmp_path):
    base = disk(content=content("x", MIB))
    words = ["--cow-target", *ANY_PORT, "--cow-file", tmp_path / "cow", "--export", f"a={base}"]
    s = server(args=words)
    with s.client(name="a") as c:
        c.pwrite(b"kept", 5)
        c.flush()
    s.stop()
    assert server(args=words).client(name="a").pread(9) == content("x", 5) + b"kept"


def test_overlays_go_to_one_directory(server, named, tmp_path):
    place = tmp_path / "overlays"
    place.mkdir()
    s = server(args=["--cow-target", *ANY_PORT, "--cow-dir", place, *exports(named)])
    for name in named:
        s.client(name=name).pwrite(b"x" * 4096)
    opened = [os.readlink(f) for f in Path(f"/proc/{s.proc.pid}/fd").iterdir()]
    assert sum(path.startswith(str(place)) for path in opened) == len(named)
    assert not list(place.iterdir())


# Snapshots

def test_each_export_gets_a_snapshot(several, images):
    snapshots = Snapshots(several)
    with several.client(name="a") as c:
        c.pwrite(b"before")
        snapshots.signal()
        until(lambda: snapshots.over() == len(SIZES))
        c.pwrite(b"behind")
    assert not snapshots.lines("failed")
    found = {re.sub(r"\.snapshot\.\d+$", "", path): Path(path)
             for path, _ in snapshots.lines("complete")}
    assert found.keys() == {str(path) for path in images.values()}
    for name, path in images.items():
        expected = content(name, SIZES[name])
        if name == "a":
            expected = b"before" + expected[6:]
        assert found[str(path)].read_bytes() == expected


def test_snapshots_under_load_are_each_one_instant(server, tmp_path):
    """Of two exports, which share connections' threads, and have instants of their own."""
    model = {name: Numbered(12 * MIB // 2048 + 1) for name in "ab"}
    images = {name: model[name].make_image(tmp_path / f"{name}.img") for name in "ab"}
    s = server(args=["--target", *ANY_PORT, "--threads", "3", *exports(images)])
    loads = {name: Load(Named(s, name), model[name]) for name in "ab"}
    snapshots = Snapshots(s)

    def turn_all(condition):
        while not condition():
            for load in loads.values():
                load.run_for(20)

    turn_all(lambda: all(load.done > 200 for load in loads.values()))
    for round_ in range(1, 4):
        before = {name: m.tick() for name, m in model.items()}
        snapshots.signal()
        turn_all(lambda: snapshots.count("started") == 2 * round_)
        after = {name: m.tick() for name, m in model.items()}
        turn_all(lambda: snapshots.over() == 2 * round_)
        for path, _ in snapshots.lines("complete")[-2:]:
            name = Path(path).name[0]
            model[name].check_instant(Path(path).read_bytes(), before[name], after[name])
            Path(path).unlink()
    assert not snapshots.lines("failed")
    for load in loads.values():
        load.drain()
    leave(s)
    for name in "ab":
        model[name].check_instant(images[name].read_bytes(), model[name].now, model[name].now)


class Named:
    """A server, as seen by who asks for one export."""

    def __init__(self, server, name):
        self.server, self.name = server, name

    def client(self, **kw):
        return self.server.client(name=self.name, **kw)


def test_daemon_finds_images_with_relative_paths(run_server, tmp_path):
    for name in "ab":
        make_disk(tmp_path / f"{name}.img", content=content(name, MIB))
    done = run_server("--target", "--unix", "sock", "--daemonize", "--pidfile", "pid",
                      "--logpath", "log", "--export=a=a.img", "--export=b=b.img", cwd=tmp_path)
    assert done.returncode == 0, done
    pid = int((tmp_path / "pid").read_text())
    try:
        os.kill(pid, signal.SIGUSR1)
        until(lambda: (tmp_path / "log").read_text().count(": complete") == 2)
    finally:
        os.kill(pid, signal.SIGTERM)
        until(lambda: not (tmp_path / "pid").exists())
    for name in "ab":
        path, = tmp_path.glob(f"{name}.img.snapshot.*")
        assert path.read_bytes() == content(name, MIB)


# A disk that does not answer

WAITING = 40                    # requests: more than a lane has threads
ALLOCATION = "base:allocation"


@pytest.fixture(params=[1, 4], ids=["one thread", "four threads"])
def stuck(request, server, disk, slow_library, tmp_path):
    """A server; a client of export "a", whose disk does not answer, and its requests; what
    the disk waits for; a client of export "b", which may share the thread."""
    images = {name: disk(content=content(name, MIB), name=f"{name}.img") for name in "ab"}
    flag = tmp_path / "while"
    s = server(args=["--target", *ANY_PORT, "--threads", request.param, *exports(images)],
               env=preload(slow_library, SLOW_COLD=1, SLOW_IMAGE=images["a"], SLOW_WHILE=flag))
    a, b = (s.client(name=name, contexts=[ALLOCATION]) for name in "ab")
    flag.touch()
    cookies = [a.request(NBD_CMD_READ, i * 5000, 4096) for i in range(WAITING)]
    until(lambda: s.status("Threads") >= 16, what="reads that wait")
    yield s, a, cookies, flag, b
    flag.unlink(missing_ok=True)


def use(c, name, size):
    """Each command, all of which go to the disk."""
    expected = bytearray(content(name, size))
    for i in range(30):
        at = i * 30011
        expected[at:at + 100] = bytes([i]) * 100
        c.pwrite(bytes([i]) * 100, at, NBD_CMD_FLAG_FUA if i % 2 else 0)
        assert c.pread(5000, at) == expected[at:at + 5000]
    c.flush()
    c.zero(10000, 2000)
    expected[2000:12000] = bytes(10000)
    c.trim(8192, 65536)
    c.cache(4096, 0)
    assert c.block_status(65536)
    assert c.pread(65536) == expected[:65536]


@hazard("a disk that hangs holds up another export")
def test_disk_that_hangs_holds_up_its_own_export_only(stuck):
    s, a, cookies, flag, b = stuck
    use(b, "b", MIB)
    with s.client(name="b") as other, s.client(name="a") as waiting:
        other.flush()
        cookie = waiting.request(NBD_CMD_FLUSH)
        other.pread(5000)
        assert not waiting.finished
    assert not a.finished and len(a.pending) == WAITING
    flag.unlink()
    for i, cookie in enumerate(cookies):
        assert a.collect(cookie).data == content("a", MIB)[i * 5000:i * 5000 + 4096]
    use(a, "a", MIB)


@hazard("a disk that hangs holds up another export: its snapshot")
def test_snapshot_of_another_export_does_not_wait_for_a_disk_that_hangs(stuck):
    s, a, cookies, flag, b = stuck
    snapshots = Snapshots(s)
    snapshots.signal()
    until(lambda: snapshots.over() == 1, what="a snapshot")
    (path, _), = snapshots.lines("complete")
    assert "/b.img.snapshot." in path and Path(path).read_bytes() == content("b", MIB)
    use(b, "b", MIB)
    flag.unlink()
    until(lambda: snapshots.over() == 2, what="the other snapshot")
    for cookie in cookies:
        assert not a.collect(cookie).error


@hazard("SIGTERM with a disk that hangs, and another export")
def test_server_ends_in_time_though_a_disk_hangs(stuck):
    """A disk that kept a thread is told by the status."""
    s, a, cookies, flag, b = stuck
    use(b, "b", MIB)
    b.close()
    a.close()
    s.expected_status = 1
    s.stop()
    assert "1 connections wait for the disk" in s.log()


# Many

@hazard("a client reaches an export that it did not name: a thousand clients")
def test_a_thousand_clients_of_several_exports(several):
    """They come and go, some without a word, and each gets its own disk."""
    before = len(os.listdir(f"/proc/{several.proc.pid}/fd"))
    dice = random.Random(7)
    for _ in range(1000):
        name = dice.choice(list(SIZES))
        with Client(several.address) as c:
            c.negotiate(name=name, how=dice.choice(["go", "export_name"]))
            at = dice.randrange(SIZES[name] - 3000)
            assert c.pread(3000, at) == content(name, SIZES[name])[at:at + 3000]
            if dice.random() < 0.5:
                c.disc()
    until(lambda: several.sockets() == 1)
    assert len(os.listdir(f"/proc/{several.proc.pid}/fd")) <= before + 2 * 16


def test_killed_server_starts_again(several, server, images, named):
    with several.client(name="a") as c:
        c.pwrite(b"written", 99)
    several.kill()
    s = server(images[""], *exports(named))
    assert s.client(name="a").pread(7, 99) == b"written"


# Other programs

def test_nbdinfo_lists_all(several):
    done = subprocess.run([need("nbdinfo", "libnbd-bin"), "--list", "--json", several.uri],
                          stdout=subprocess.PIPE, check=True)
    found = {e["export-name"]: e["export-size"] for e in json.loads(done.stdout)["exports"]}
    assert found == SIZES


def test_qemu_finds_an_export_by_its_name(several, images):
    done = subprocess.run([need("qemu-img", "qemu-utils"), "info", "--output", "json",
                           f"{several.uri}/a"], stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout)["virtual-size"] == MIB
    subprocess.run([need("qemu-io", "qemu-utils"), "-f", "raw", "-c",
                    "write -P 7 4k 4k", f"{several.uri}/a"], check=True, stdout=subprocess.DEVNULL)
    assert images["a"].read_bytes()[4096:8192] == b"\7" * 4096
    lost = subprocess.run(["qemu-img", "info", f"{several.uri}/nowhere"], stderr=subprocess.PIPE)
    assert lost.returncode and b"nowhere" in lost.stderr


def test_nbd_client_lists_all(several):
    done = subprocess.run([need("nbd-client", "nbd-client"), "-l", "127.0.0.1", str(several.port)],
                          stdout=subprocess.PIPE, text=True)
    assert all(name in done.stdout for name in SIZES), done


# The control socket

@pytest.fixture
def controlled(server, images, named, tmp_path):
    s = server(images[""], *exports(named), "--ctl", tmp_path / "ctl")
    s.control = tmp_path / "ctl"
    return s


def test_query_tells_each_export(controlled):
    values = state(controlled.control)
    assert values["export"] == [{"name": name, "size": size, "snapshot": "idle"}
                                for name, size in SIZES.items()]
    assert "image" not in values and "size" not in values
    lines = done(bgctl("--query", controlled.control), out=None).stdout.splitlines()
    assert [f"export: {name} size {size} snapshot idle" for name, size in SIZES.items()] == \
        [line for line in lines if line.startswith("export: ")]


def test_query_of_one_export_that_has_a_name_tells_its_image(server, images, tmp_path):
    server(args=["--target", *ANY_PORT, *exports({"a": images["a"]}), "--ctl", tmp_path / "ctl"])
    values = state(tmp_path / "ctl")
    assert values["image"] == str(images["a"]) and values["size"] == SIZES["a"]
    assert "export" not in values


@pytest.mark.parametrize("name", SIZES)
def test_snapshot_command_makes_one_of_the_export_that_it_names(controlled, images, name):
    path = done(bgctl("--snapshot", "--exportname", name, controlled.control), out=None).stdout
    path = Path(path.rstrip("\n"))
    assert path.name.startswith(images[name].name + ".snapshot.")
    assert path.read_bytes() == content(name, SIZES[name])
    assert [p for p in path.parent.iterdir() if ".snapshot." in p.name] == [path]


def test_snapshot_command_needs_the_name_of_one_of_several(controlled):
    refused_in_one_line(bgctl("--snapshot", controlled.control), 1, "several exports")
    refused_in_one_line(bgctl("--snapshot", "--exportname", "x", controlled.control), 1,
                        "no export of that name")


def test_snapshot_command_of_the_only_export_needs_no_name(server, images, tmp_path):
    server(args=["--target", *ANY_PORT, *exports({"a": images["a"]}), "--ctl", tmp_path / "ctl"])
    for words in [], ["--exportname", "a"]:
        path = done(bgctl("--snapshot", *words, tmp_path / "ctl"), out=None).stdout.rstrip("\n")
        assert Path(path).read_bytes() == content("a", SIZES["a"])
