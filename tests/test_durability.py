"""What failing disks must not break: an error of stable storage is never forgotten, and a block
is the origin's or what was written last, whatever became of the disk below.

Disks fail here in three ways: a thin volume that is full loses what the kernel writes back to it
(a loop device on a tmpfs); a file system is full, or dies and is mounted again; and stable.c,
preloaded into a server, fails its calls on files of certain names.

What is on a disk is only ever learnt by reading through NBD.  The header of a bitmap file is read
where its fields are a promise: xnbd-bitmap(5).
"""

import collections
import contextlib
import errno
import fcntl
import functools
import os
import re
import struct
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from conftest import SERVER, SharedPage, build_library, loop_device, make_disk, need, skip
from nbd import *
from origin import Origin
from test_cow import fnv1a
from test_proxy import Control, Refused
from test_service import block_device
from test_snapshot import Snapshots, leave, names

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BLOCK = 4096
SIZE = MIB + 77
ADDRESS = ["--laddr", "127.0.0.1", "--lport", "0"]
READ, WRITE, FLUSH, TRIM = NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, NBD_CMD_TRIM
ZEROES, STATUS, CACHE = NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE
FUA, NO_HOLE = NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE
ALLOCATION = "base:allocation"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
hazard = pytest.mark.hazard
kinds = pytest.mark.parametrize("kind", ["proxy", "kept"])
all_kinds = pytest.mark.parametrize("kind", ["proxy", "kept", "target"])


# What the log says

LOST = "stable|not durable"     # an error of stable storage was met
COMMITTED = "committed"         # a start believes the committed map alone
NO_BOOT_ID = "boot.id"          # it cannot be read
NO_SNAPSHOT = "snapshot.*fail"  # one was not made


def says(server, what):
    """The lines of its log that say so."""
    return [line for line in server.log().splitlines() if re.search(what, line, re.IGNORECASE)]


# Contents

def original(at, length):
    """What the origin, or the base, has."""
    return pattern(at, length)


def written(at, length):
    """What clients write."""
    return pattern(at, length, seed=1)


def is_either(got, at):
    """Each block is the origin's, or was written whole."""
    return all(got[i:i + BLOCK] in (original(at + i, len(got[i:i + BLOCK])),
                                    written(at + i, len(got[i:i + BLOCK])))
               for i in range(0, len(got), BLOCK))


def disk_with(size, changes):
    """A whole disk that was written at {offset: length}."""
    data = bytearray(original(0, size))
    for at, length in changes.items():
        data[at:at + length] = written(at, length)
    return bytes(data)


# Faults

class Faults(SharedPage):
    """The page that is shared with stable.c in one server: struct control."""

    CALLS = ["fdatasync", "fsync", "pwrite", "fallocate", "ftruncate", "link"]
    KINDS = {"end before": 1000, "end after": 1001}
    MASK, KIND, SKIP, TIMES, INJECTED = range(5)
    NAME = 20
    EVER = (1 << 32) - 1

    def arm(self, calls, kind, name="*", skip=0, times=1):
        """So many of these calls, on files whose path matches name, fail from now on, after
        those that are skipped."""
        self.disarm()
        self.set(self.INJECTED, 0)
        self.set(self.MASK, sum(1 << self.CALLS.index(call) for call in calls.split()))
        self.set(self.KIND, self.KINDS.get(kind) or getattr(errno, kind))
        self.set(self.SKIP, skip)
        name = str(name).encode() + b"\0"
        self.page[self.NAME:self.NAME + len(name)] = name
        self.set(self.TIMES, times)

    def disarm(self):
        self.set(self.TIMES, 0)

    @property
    def injected(self):
        return self.get(self.INJECTED)


@pytest.fixture(scope="session")
def stable(tmp_path_factory):
    return build_library("stable", tmp_path_factory)


@pytest.fixture
def faults(tmp_path, stable):
    return Faults(tmp_path / "faults.control", stable)


# Volumes

class Volume:
    """A file system of its own, mounted at .place; of a kind that needs a device, on a file or
    on the given one."""

    MAKE = {"ext2": ("e2fsprogs", ["-q", "-F", "-m", "0"]),
            "ext4": ("e2fsprogs", ["-q", "-F", "-m", "0"]),
            "thin": ("e2fsprogs", ["-q", "-F", "-m", "0", "-O", "^has_journal"]),
            "journal": ("e2fsprogs", ["-q", "-F", "-m", "0", "-J", "size=1",
                                        "-E", "lazy_journal_init=1"]),
            "btrfs": ("btrfs-progs", ["-q"]), "xfs": ("xfsprogs", ["-q"]),
            "vfat": ("dosfstools", [])}
    SHUTDOWN = 0x8004587d       # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
    NO_LOG_FLUSH = 2

    def __init__(self, place, kind, size, device=None):
        self.place, self.kind, self.size, self.device = place, kind, size, device
        self.mounted = False
        place.mkdir()
        if kind in self.MAKE:
            self.make_file_system()
        self.mount()

    @property
    def type(self):
        return "ext4" if self.kind in ("thin", "journal") else self.kind

    def make_file_system(self):
        package, options = self.MAKE[self.kind]
        self.device = self.device or make_disk(self.place.with_suffix(".device"), self.size)
        subprocess.run([need(f"mkfs.{self.type}", package), *options, self.device], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def mount(self):
        options = {"tmpfs": [f"size={self.size}"], "ramfs": []}.get(self.kind, ["loop"])
        if self.kind == "thin":
            options = ["errors=continue"]
        elif self.kind == "journal":
            options = []
        done = subprocess.run([need("mount", "mount"), "-t", self.type,
                               *(["-o", ",".join(options)] if options else []),
                               self.device or "none", self.place],
                              stderr=subprocess.PIPE, text=True)
        if done.returncode:
            skip(f"needs to mount {self.type} (root): {done.stderr.splitlines()[0]}")
        self.mounted = True

    def unmount(self, *options):
        if self.mounted:
            subprocess.run(["umount", *options, self.place], check=True)
        self.mounted = False

    def mount_again(self):
        self.unmount()
        self.mount()

    def repair(self):
        """As an operator would, after an error of the device."""
        self.unmount()
        done = subprocess.run([need("e2fsck", "e2fsprogs"), "-f", "-y", self.device],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode & ~3 == 0, done.stdout
        self.mount()

    def die(self):
        """What the kernel has not yet written is lost."""
        fd = os.open(self.place, os.O_RDONLY)
        fcntl.ioctl(fd, self.SHUTDOWN, struct.pack("I", self.NO_LOG_FLUSH))
        os.close(fd)

    def grow(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.place], check=True)

    def fill(self):
        """Until nobody gets another block."""
        size, at = 64 * MIB, 0
        with open(self.place / "fill", "wb", buffering=0) as f:
            while size >= BLOCK:
                try:
                    os.posix_fallocate(f.fileno(), at, size)
                    at += size
                except OSError as e:
                    assert e.errno == errno.ENOSPC, e
                    size //= 2
            f.seek(at)
            with contextlib.suppress(OSError):
                while f.write(bytes(BLOCK)):
                    pass
            os.fsync(f.fileno())

    def make_room(self):
        (self.place / "fill").unlink()
        subprocess.run(["sync", "-f", self.place], check=True)


@pytest.fixture
def volume(tmp_path):
    """volume(kind, size): a new Volume."""
    made = []

    def make(kind, size, **options):
        made.append(Volume(tmp_path / f"volume{len(made)}", kind, size, **options))
        return made[-1]

    yield make
    for one in reversed(made):
        one.unmount("-l")
        if one.device and one.kind not in ("thin", "journal"):
            one.device.unlink()


class Thin:
    """A block device of some size for which there is less room.  What the kernel writes back to
    it fails when that is used up."""

    file_system = None      # on it

    def __init__(self, volume, size, stack):
        self.volume, self.size = volume, size
        self.backing = make_disk(volume.place / "thin", size)
        self.path = Path(stack.enter_context(loop_device(self.backing)))

    def make_room(self):
        self.volume.grow(4 * self.size)
        if self.file_system:
            self.file_system.repair()


@pytest.fixture
def thin(volume):
    with contextlib.ExitStack() as stack:
        yield lambda size, room: Thin(volume("tmpfs", room), size, stack)


def drop(path):
    """The page cache forgets what of a file is written back, or failed to be."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


# Disks and their servers

FAILED, WHOLE, CHANGED = 1, 2, 4        # flags of a bitmap file


class Header(collections.namedtuple("Header", "magic version kind block size fingerprint boot"
                                              " clean flags image_instance map_instance")):
    """That of a bitmap file."""

    LAYOUT = "<8sIIQQQ16sIIQQ"

    @classmethod
    def of(cls, path):
        with open(path, "rb") as f:
            data = f.read(88)
        assert struct.unpack("<Q", data[80:])[0] == fnv1a(data[:80]), "the checksum is wrong"
        return cls(*struct.unpack(cls.LAYOUT, data[:80]))


class Store:
    """A disk of one mode that keeps what it holds, which servers are started of.

    .image .map         its files; a plain target has no map
    """

    def __init__(self, kind, server, place, size, image, map, base, stack):
        self.kind, self.start_server, self.place, self.size = kind, server, place, size
        self.image = image or place / "image"
        self.map = map or self.image.with_name(self.image.name + ".map")
        self.has_map = kind != "target"
        self.control = place / "control"
        if kind == "proxy":
            self.origin = stack.enter_context(Origin(original, size=size))
        elif kind == "kept":
            self.base = base
            if not base.exists():
                make_disk(base, content=original(0, size))
            self.map = self.image.with_name(self.image.name + ".map")
        elif not self.image.exists():
            make_disk(self.image, content=original(0, size))

    def arguments(self, *options):
        if self.kind == "proxy":
            return ["--proxy", *ADDRESS, *options, *self.origin.arguments, self.image, self.map,
                    self.control]
        if self.kind == "kept":
            return ["--cow-target", *ADDRESS, *options, "--cow-file", self.image, self.base]
        return ["--target", *ADDRESS, *options, self.image]

    def start(self, *options, faults=None, **keywords):
        if faults:
            keywords["env"] = faults.environment
        return self.start_server(args=self.arguments(*options), **keywords)

    def client(self, server):
        return server.client(structured=True, contexts=[ALLOCATION])

    def file(self, name):
        return self.map if name == "map" else self.image

    def header(self):
        return Header.of(self.map)

    def spoil(self, *kept):
        """What a failed writeback may do: all is junk but these parts, (offset, length)."""
        junk = bytearray(os.urandom(self.size))
        with open(self.image, "r+b") as f:
            for at, length in kept:
                junk[at:at + length] = os.pread(f.fileno(), length, at)
            os.pwrite(f.fileno(), junk, 0)

    def ask(self, line):
        with Control(self.control) as control:
            return control.ask(line)


@pytest.fixture
def store(server, tmp_path):
    """store(kind, size=SIZE, place=..., image=..., map=..., base=...)"""
    with contextlib.ExitStack() as stack:
        def make(kind, size=SIZE, place=None, image=None, map=None, base=None):
            place = place or tmp_path / "disk"
            place.mkdir(exist_ok=True)
            return Store(kind, server, place, size, image, map, base or tmp_path / "base", stack)

        make.base = tmp_path / "base"
        yield make


def end(server, status=0):
    """Its clients go, and it ends with that status."""
    server.expected_status = status
    leave(server)


def holds(store, content, **keywords):
    """Starts it and finds these bytes; returns the server."""
    s = store.start(**keywords)
    with s.client() as c:
        assert c.pread(c.size) == content
        assert c.error_of(FLUSH) == 0
    return s


# Errors of stable storage

EVERYTHING = {
    "READ": (READ, 0, BLOCK), "READ of what is not held": (READ, SIZE - 5 * BLOCK, BLOCK),
    "WRITE": (WRITE, 0, 0, 0, written(0, BLOCK)),
    "WRITE of a part": (WRITE, 40 * BLOCK + 7, 0, 0, b"x"),
    "WRITE with FUA": (WRITE, 0, 0, FUA, written(0, BLOCK)),
    "FLUSH": (FLUSH,), "TRIM": (TRIM, 0, BLOCK), "WRITE_ZEROES": (ZEROES, 0, BLOCK),
    "BLOCK_STATUS": (STATUS, 0, BLOCK), "CACHE": (CACHE, 0, BLOCK)}
FLUSHES = {
    "FLUSH": (FLUSH,), "WRITE with FUA": (WRITE, 0, 0, FUA, written(0, BLOCK)),
    "TRIM with FUA": (TRIM, 0, BLOCK, FUA), "WRITE_ZEROES with FUA": (ZEROES, 0, BLOCK, FUA)}


def errors(client, requests):
    return {name: client.error_of(*request) for name, request in requests.items()}


def has_ended(store, server, *clients):
    """Every request is answered with EIO, on old connections and on new ones."""
    for c in (*clients, store.client(server), server.client()):
        told = errors(c, {name: request for name, request in EVERYTHING.items()
                          if c.contexts or request[0] != STATUS})
        assert set(told.values()) == {NBD_EIO}, told
    assert store.header().flags & FAILED
    return True


def fails_each_flush(server, *clients):
    """But reads and writes go on."""
    for c in (*clients, server.client()):
        told = errors(c, FLUSHES)
        assert all(error in (NBD_EIO, NBD_ENOSPC) for error in told.values()), told
        c.pwrite(written(0, BLOCK))
        assert c.pread(BLOCK) == written(0, BLOCK)
    return True


SYNCS = [("fdatasync", "EIO", "image", "stop"), ("fdatasync", "ENOSPC", "image", "kill"),
         ("fdatasync", "EDQUOT", "image", "stop"), ("fdatasync", "EIO", "map", "stop"),
         ("pwrite", "EIO", "map", "kill")]
FLUSHED = (0, 4 * BLOCK)                # what was committed before


def flushed(store, **options):
    """Starts it.  Returns the server and a client, which has flushed FLUSHED."""
    s = store.start(**options)
    c = store.client(s)
    c.pwrite(written(*FLUSHED))
    c.flush()
    return s, c


def loses(store, faults, call="fdatasync", error="EIO", where="image"):
    """Starts it, and lets a sync fail, which is met by a FLUSH or just before.  Returns the
    server and an old client."""
    s, c = flushed(store, faults=faults)
    faults.arm(call, error, store.file(where))
    c.error_of(WRITE, 10 * BLOCK, payload=written(10 * BLOCK, 4 * BLOCK))
    c.error_of(READ, 20 * BLOCK, 10 * BLOCK)
    assert c.error_of(FLUSH), "FLUSH succeeds"
    assert faults.injected == 1
    return s, c


def only_committed_is_believed(store):
    """After an error of the image, and though what was not committed has become junk."""
    store.spoil(FLUSHED)
    s = holds(store, disk_with(store.size, dict([FLUSHED])))
    assert says(s, COMMITTED), s.log()
    s.kill()
    s = holds(store, disk_with(store.size, dict([FLUSHED])))
    assert not store.header().flags & FAILED
    end(s)
    s = holds(store, disk_with(store.size, dict([FLUSHED])))
    assert not says(s, COMMITTED), s.log()


@hazard("an error of writeback is told once, and zeros are served and committed")
@kinds
@pytest.mark.parametrize("call, error, where, ending", SYNCS)
def test_error_of_stable_storage_ends_an_export_that_has_a_map(store, faults, kind, call, error,
                                                               where, ending):
    disk = store(kind)
    s, c = loses(disk, faults, call, error, where)
    assert has_ended(disk, s, c)
    assert len(says(s, LOST)) == 1, s.log()
    s.kill() if ending == "kill" else end(s, 1)
    if where == "image":
        only_committed_is_believed(disk)
    else:
        all_is_as_somebody_wrote_it(disk)


def all_is_as_somebody_wrote_it(disk):
    """After an error of the map: the image is good, and may have been made durable before."""
    for _ in range(2):
        s = disk.start()
        with s.client() as c:
            got = c.pread(c.size)
            c.flush()
        assert got[:FLUSHED[1]] == written(*FLUSHED) and is_either(got, 0)
        end(s)
    assert not disk.header().flags & FAILED


@kinds
def test_map_that_cannot_be_written_any_more_ends_the_export(store, faults, kind):
    """Not even that stable storage has failed can be noted."""
    disk = store(kind)
    s, c = flushed(disk, faults=faults)
    faults.arm("pwrite fdatasync fsync", "EIO", disk.map, times=Faults.EVER)
    c.error_of(WRITE, 10 * BLOCK, payload=written(10 * BLOCK, 4 * BLOCK))
    assert c.error_of(FLUSH) == NBD_EIO
    for one in c, disk.client(s):
        told = errors(one, EVERYTHING)
        assert set(told.values()) == {NBD_EIO}, told
    assert len(says(s, LOST)) == 1, s.log()
    end(s, 1)
    all_is_as_somebody_wrote_it(disk)


@kinds
@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT"])
def test_map_without_space_costs_one_request(store, faults, kind, error):
    """No stable storage has failed."""
    disk = store(kind, 4 * GIB, base=make_disk(store.base, 4 * GIB))
    s, c = flushed(disk, faults=faults)
    faults.arm("pwrite fallocate", error, disk.map)
    assert c.error_of(WRITE, 2 * GIB, payload=written(0, BLOCK)) == NBD_ENOSPC
    assert faults.injected == 1
    assert c.pread(BLOCK, 2 * GIB) != written(0, BLOCK)
    c.flush()
    c.pwrite(written(0, BLOCK), 2 * GIB)
    c.flush()
    faults.arm("pwrite fallocate", error, disk.map)
    assert c.error_of(READ, 3 * GIB, BLOCK) == 0, "what is read need not be kept"
    faults.disarm()
    c.flush()
    assert not disk.header().flags & FAILED and not says(s, LOST), s.log()
    s.kill()
    with disk.start().client() as c:
        assert c.pread(BLOCK, 2 * GIB) == written(0, BLOCK)
        assert c.pread(FLUSHED[1]) == written(*FLUSHED)


@hazard("the file of a mapping is truncated: SIGBUS")
@kinds
def test_map_that_others_truncate_harms_no_client(store, kind):
    """What is held is known from memory."""
    disk = store(kind)
    s = disk.start()
    with s.client() as c:
        c.pwrite(written(*FLUSHED))
        os.truncate(disk.map, 0)
        for at in range(0, SIZE, 64 * BLOCK):
            assert is_either(c.pread(min(64 * BLOCK, SIZE - at), at), at)
        assert c.pread(FLUSHED[1]) == written(*FLUSHED)
    assert s.is_served()
    s.expected_status = None


@hazard("an error of writeback is told once, and zeros are served and committed")
@kinds
def test_error_that_no_client_asked_for_ends_the_export(store, faults, kind):
    """A commit that is due by time meets it."""
    disk = store(kind)
    s, c = flushed(disk, faults=faults)
    faults.arm("fdatasync", "EIO", disk.image)
    c.pwrite(written(10 * BLOCK, BLOCK), 10 * BLOCK)
    until(lambda: faults.injected, what="a commit")
    until(lambda: c.error_of(READ, 0, BLOCK) == NBD_EIO, 3, what="the end of the export")
    assert has_ended(disk, s, c)
    end(s, 1)
    only_committed_is_believed(disk)


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT"])
def test_target_fails_each_flush_after_an_error_and_reads_on(store, faults, error):
    """An fdatasync() that succeeds later says nothing of what was lost."""
    disk = store("target")
    s, c = loses(disk, faults, error=error)
    assert fails_each_flush(s, c)
    assert c.pread(4 * BLOCK, 10 * BLOCK) == written(10 * BLOCK, 4 * BLOCK)
    assert len(says(s, LOST)) == 1, s.log()
    end(s, 1)
    with disk.start().client() as c:
        c.flush()
        c.pwrite(b"x", 0, FUA)


# A thin volume

THIN, ROOM = 12 * MIB, 4 * MIB
WANTED = [("proxy", "device"), ("target", "device"), ("proxy", "file"), ("kept", "file"),
          ("target", "file")]


def on_thin(kind, how, thin, volume, store, tmp_path):
    """A disk whose image is that device, or lies on it; and the device."""
    device = thin(THIN + (4 * MIB if how == "file" else 0), ROOM)
    if how == "device":
        if kind == "target":
            with open(device.path, "r+b") as f:
                f.write(original(0, 2 * MIB))
        return store(kind, THIN, image=device.path, map=tmp_path / "device.map"), device
    device.file_system = volume("journal", None, device=device.path)
    image = device.file_system.place / "image"
    if kind == "target":
        make_disk(image, THIN, original(0, 2 * MIB))
    disk = store(kind, THIN, image=image, map=tmp_path / "file.map")
    if kind == "kept":
        lies_elsewhere(disk, tmp_path / "kept.map")
    return disk, device


def lies_elsewhere(disk, path):
    """The map of an overlay is beside it by its name only: the disk below it is good."""
    end(disk.start())
    path.write_bytes(disk.map.read_bytes())
    disk.map_elsewhere = path
    bind_map(disk)


def bind_map(disk):
    subprocess.run(["mount", "--bind", disk.map_elsewhere, disk.map], check=True)


def dirties(disk, client):
    """More than there is room for, in either way that blocks are stored."""
    told = set()
    for at in range(MIB, THIN, 64 * KIB):
        request = (READ, at, 64 * KIB) if disk.kind == "proxy" else (
            WRITE, at, 0, 0, written(at, 64 * KIB))
        told.add(client.error_of(*request))
    assert told <= {0, NBD_EIO}, told


def wrong_blocks(client, size, may_fail=False):
    """Blocks that are neither refused, where that may be, nor as they must be: the first MiB
    as it was written, and the others the origin's."""
    wrong = []
    for at in range(0, size, 64 * KIB):
        reply = client.call(READ, at, 64 * KIB)
        if reply.error and may_fail:
            assert reply.error == NBD_EIO
        elif reply.error or reply.data != (written if at < MIB else original)(at, 64 * KIB):
            wrong.append(at)
    return wrong


@hazard("an error of writeback is told once, and zeros are served and committed")
@pytest.mark.parametrize("kind, how", WANTED)
def test_writeback_that_fails_below_the_image(store, thin, volume, tmp_path, kind, how):
    disk, device = on_thin(kind, how, thin, volume, store, tmp_path)
    s = disk.start()
    c = disk.client(s)
    c.pwrite(written(0, MIB))
    c.flush()
    dirties(disk, c)
    assert c.error_of(FLUSH), "FLUSH succeeds"
    drop(disk.image)
    if disk.has_map:
        assert has_ended(disk, s, c)
    else:
        assert fails_each_flush(s, c)
        assert c.error_of(READ, 2 * MIB, MIB) == 0
    assert len(says(s, LOST)) == 1, s.log()
    end(s, 1)
    drop(disk.image)
    if disk.has_map:
        origin_is_read_again(disk, device)


def origin_is_read_again(disk, device):
    """While the volume is full still, and when the operator has made room."""
    s = disk.start()
    assert says(s, COMMITTED), s.log()
    with s.client() as c:
        assert not wrong_blocks(c, THIN, may_fail=True)
    end(s, None)
    drop(disk.image)
    if disk.kind == "kept":
        subprocess.run(["umount", disk.map], check=True)
    device.make_room()
    if disk.kind == "kept":
        bind_map(disk)
    for _ in range(2):
        s = disk.start()
        with s.client() as c:
            assert not wrong_blocks(c, THIN)
            c.flush()
        end(s)
        drop(disk.image)


@hazard("a page of the map that cannot be written back is dropped, and its bits are lost")
def test_writeback_that_fails_below_the_map(store, thin, volume):
    """The image is good: what was read or written is right, or refused.  A FLUSH that succeeds
    has made the map durable."""
    device = thin(THIN, ROOM)
    place = volume("thin", None, device=device.path).place
    disk = store("proxy", 16 * GIB, map=place / "map")
    s, c = flushed(disk)
    device.volume.fill()
    held = {}
    told = writes_far(c, disk.size, held)
    assert set(told) <= {0, NBD_ENOSPC, NBD_EIO}
    subprocess.run(["sync", "-f", place], stderr=subprocess.DEVNULL)
    drop(disk.map)
    lost = c.error_of(FLUSH)
    for at in held:
        reply = c.call(READ, at, BLOCK)
        assert reply.error == NBD_EIO if lost else reply.data == written(at, BLOCK)
    s.kill()
    device.volume.make_room()
    drop(disk.map)
    s = disk.start()
    with s.client() as c:
        assert c.pread(FLUSHED[1]) == written(*FLUSHED)
        for at in held:
            got = c.pread(BLOCK, at)
            assert is_either(got, at) if lost else got == written(at, BLOCK), at
        c.flush()
    end(s)


# An error is told across

def test_error_met_by_one_export_is_told_to_all_of_the_image(server, faults, disk, tmp_path):
    image, other = disk(content=original(0, SIZE)), tmp_path / "other name.img"
    os.link(image, other)
    s = server(args=["--target", *ADDRESS, "--readonly", "--export", f"a={image}", "--export",
                     f"b={other}"], env=faults.environment)
    a, b = s.client(name="a"), s.client(name="b")
    assert a.error_of(FLUSH) == 0 and b.error_of(FLUSH) == 0
    faults.arm("fdatasync", "EIO", "*.img")
    met = a.error_of(FLUSH)
    assert bool(met) == bool(faults.injected)       # a server that only reads need not sync
    for c in a, b, s.client(name="a"), s.client(name="b"):
        assert c.error_of(FLUSH) == met
        assert c.pread(BLOCK) == original(0, BLOCK)
    assert bool(faults.injected) == bool(met) == len(says(s, LOST)), s.log()
    s.expected_status = None


def migrated(disk, **keywords):
    """A proxy that has become the disk; and a client that was there before."""
    s = disk.start(**keywords)
    c = disk.client(s)
    c.pwrite(written(0, disk.size - BLOCK))
    c.flush()
    return s, c


@hazard("the old committer eats the error of writeback, and FLUSH after a switch says 0")
@pytest.mark.parametrize("force", ["", " force"])
def test_error_of_a_commit_that_was_due_before_a_switch_is_told_after_it(store, faults, force):
    disk = store("proxy")
    s, c = migrated(disk, faults=faults)
    c.pwrite(written(disk.size - BLOCK, BLOCK), disk.size - BLOCK)
    c.pwrite(written(disk.size // BLOCK * BLOCK, 77), disk.size // BLOCK * BLOCK)
    disk.ask("switch" + force)
    faults.arm("fdatasync", "EIO", disk.image)
    c.pwrite(written(5 * BLOCK, BLOCK), 5 * BLOCK)
    with contextlib.suppress(AssertionError):
        until(lambda: faults.injected, 1.5)             # by a timer, if there is one
    for _ in range(2):
        assert c.error_of(FLUSH) == NBD_EIO and s.client().error_of(FLUSH) == NBD_EIO
    assert faults.injected == 1
    reply = c.call(READ, 0, BLOCK)
    assert reply.error == NBD_EIO or reply.data == written(0, BLOCK)
    assert len(says(s, LOST)) == 1, s.log()
    end(s, 1)


@hazard("the old committer eats the error of writeback, and FLUSH after a switch says 0")
def test_writeback_that_fails_after_a_switch(store, thin, tmp_path):
    device = thin(8 * MIB, 16 * MIB)
    device.backing.write_bytes(bytes(8 * MIB))
    disk = store("proxy", 8 * MIB, image=device.path, map=tmp_path / "device.map")
    s, c = migrated(disk)
    c.trim(MIB, 4 * MIB)
    c.flush()
    device.volume.fill()
    c.pwrite(written(disk.size - BLOCK, BLOCK), disk.size - BLOCK)
    disk.ask("switch")
    c.pwrite(written(4 * MIB, MIB), 4 * MIB)
    with contextlib.suppress(AssertionError):
        until(lambda: says(s, LOST), 1.5)               # by a timer, if there is one
    assert c.error_of(FLUSH) and c.error_of(FLUSH), "FLUSH succeeds, and blocks are lost"
    assert s.client().error_of(FLUSH)
    end(s, 1)


def test_switch_is_refused_after_an_error(store, faults):
    """It meets the error itself; so do all that follow."""
    disk = store("proxy")
    s, c = flushed(disk, faults=faults)
    disk.ask("cache-all")
    c.pwrite(written(disk.size - 77, 77), disk.size - 77)
    faults.arm("fdatasync", "EIO", disk.image)
    for line in "switch", "switch", "switch force":
        with pytest.raises(Refused):
            disk.ask(line)
    assert faults.injected == 1
    assert has_ended(disk, s, c)
    assert dict(disk.ask("query"))["mode"] == "proxy"
    end(s, 1)
    only_committed_is_believed(disk)


def test_snapshot_of_an_image_that_has_lost_data_fails(store, faults):
    disk = store("target")
    s, c = loses(disk, faults)
    before = names(disk.image)
    snapshots = Snapshots(s)
    snapshots.signal()
    until(lambda: snapshots.over() or says(s, NO_SNAPSHOT))
    assert not snapshots.count("complete"), "a copy of lost data"
    line, = says(s, NO_SNAPSHOT)
    assert re.search(f"{LOST}|input/output error", line, re.IGNORECASE), line
    assert names(disk.image) == before
    end(s, 1)


@kinds
@pytest.mark.parametrize("calls, where", [
    ("fsync fdatasync", ""), ("pwrite", "/*"), ("fsync fdatasync", "/*")],
    ids=["directory", "header", "sync of the header"])
def test_error_of_stable_storage_at_the_first_start_is_one_line(store, faults, kind, calls, where):
    disk = store(kind)
    faults.arm(calls, "EIO", f"{disk.place}{where}")
    is_refused(disk, faults)
    end(holds(disk, original(0, disk.size)))


@kinds
def test_error_of_the_header_at_a_later_start_is_one_line(store, faults, kind):
    disk = store(kind)
    s = disk.start()
    with s.client() as c:
        c.pwrite(written(*FLUSHED))
    s.kill()
    faults.arm("pwrite", "EIO", disk.map)
    is_refused(disk, faults)
    end(holds(disk, disk_with(disk.size, dict([FLUSHED]))))


def is_refused(disk, faults):
    """It does not start, and says so in a line."""
    s = disk.start(faults=faults, wait=False)
    until(lambda: s.proc.poll() is not None or s.addresses, what="an end")
    assert not s.addresses and faults.injected == 1, s.log()
    s.expected_status = 1
    s.wait()
    assert len(s.log().splitlines()) == 1, s.log()
    assert str(disk.place) in s.log()


# Full file systems

FULL = [("ext4", "sparse", 24 * MIB), ("tmpfs", "sparse", 8 * MIB), ("btrfs", "sparse", 128 * MIB),
        ("btrfs", "reflink", 128 * MIB), ("xfs", "sparse", 320 * MIB),
        ("xfs", "reflink", 320 * MIB)]


def copy_map(disk, how):
    """As an operator does, who moves a cache: what was not yet written is a hole then."""
    copy = disk.map.with_name("copy")
    option = "--sparse=always" if how == "sparse" else "--reflink=always"
    subprocess.run(["cp", option, disk.map, copy], check=True)
    if how == "reflink":
        disk.map.rename(disk.map.with_name("other"))     # which shares its blocks
    copy.rename(disk.map)


def writes_far(client, size, held):
    """A block in each GiB.  Those that are told to be written are added to what is held."""
    told = []
    for at in range(GIB - 10 * BLOCK, size, GIB):
        told.append(client.error_of(WRITE, at, payload=written(at, BLOCK)))
        if not told[-1]:
            held[at] = BLOCK
    return told


def shows(client, size, held):
    for at in [0, *range(GIB - 10 * BLOCK, size, GIB)]:
        expected = written if at in held else original
        assert client.pread(BLOCK, at) == expected(at, BLOCK), at
        assert client.pread(BLOCK, at + BLOCK) == original(at + BLOCK, BLOCK), at
    return True


@hazard("full disk under the bitmap file: SIGBUS")
@pytest.mark.parametrize("ending", ["runs on", "killed"])
@pytest.mark.parametrize("kind, how, size", FULL)
def test_full_file_system_under_the_map_is_enospc_of_a_write(store, volume, kind, how, size,
                                                             ending):
    place = volume(kind, size)
    disk = store("proxy", 8 * GIB, map=place.place / "map")
    held = {0: BLOCK}
    s = disk.start()
    with s.client() as c:
        c.pwrite(written(0, BLOCK))
        c.flush()
    end(s)
    copy_map(disk, how)
    s = disk.start()
    c = s.client()
    place.fill()
    told = writes_far(c, disk.size, held)
    assert set(told) <= {0, NBD_ENOSPC} and NBD_ENOSPC in told, told
    assert shows(c, disk.size, held)
    c.pwrite(written(0, BLOCK))
    assert c.error_of(FLUSH) in (0, NBD_ENOSPC)
    assert s.is_served()
    if ending == "killed":
        s.kill()
        starts_or_says_why(disk, held)
        place.make_room()
        s = disk.start()
        c = s.client()
        assert shows(c, disk.size, held)
    else:
        place.make_room()
    c.flush()
    assert not any(writes_far(c, disk.size, held))
    assert shows(c, disk.size, held)
    s.kill()
    s = disk.start()
    with s.client() as c:
        assert shows(c, disk.size, held)
        c.flush()
    end(s)


def starts_or_says_why(disk, held):
    """On the full file system."""
    s = disk.start(wait=False)
    until(lambda: s.proc.poll() is not None or s.addresses, what="a start")
    if s.addresses:
        with s.wait_ready().client() as c:
            assert shows(c, disk.size, held)
        s.kill()
    else:
        s.expected_status = 1
        assert "space" in s.log() and len(s.log().splitlines()) == 1, s.log()


@all_kinds
@pytest.mark.parametrize("system, size", [("ext4", 24 * MIB), ("tmpfs", 8 * MIB)])
def test_full_file_system_under_the_image_is_enospc_of_a_write(store, volume, tmp_path, kind,
                                                               system, size):
    """What is read is answered, though it cannot be kept."""
    place = volume(system, size)
    if kind == "target":
        make_disk(place.place / "image", 16 * MIB)
    disk = store(kind, 16 * MIB, image=place.place / "image",
                 map=tmp_path / "image.map" if kind == "proxy" else None)
    s = disk.start()
    c = s.client()
    c.pwrite(written(0, MIB))
    c.flush()
    place.fill()
    told = {at: c.error_of(WRITE, at, payload=written(at, 64 * KIB))
            for at in range(2 * MIB, 16 * MIB, MIB)}
    assert NBD_ENOSPC in told.values() and set(told.values()) <= {0, NBD_ENOSPC}, told
    assert shows_what_it_told(c, disk, told) and s.is_served()
    c.pwrite(written(0, MIB))
    assert c.error_of(FLUSH) in (0, NBD_ENOSPC)
    place.make_room()
    c.flush()
    c.pwrite(written(2 * MIB, 64 * KIB), 2 * MIB)
    told[2 * MIB] = 0
    c.flush()
    s.kill()
    s = disk.start()
    with s.client() as c:
        assert shows_what_it_told(c, disk, told)
    end(s)


def shows_what_it_told(client, disk, told):
    """Of a write that failed, a part may have been carried out."""
    assert client.pread(MIB) == written(0, MIB)
    for at, error in told.items():
        old = original(at, BLOCK) if disk.has_map else bytes(BLOCK)
        assert client.pread(BLOCK, at) in ([written(at, BLOCK)] + [old] * (error != 0)), at
        assert client.pread(BLOCK, at + 128 * KIB) == (
            original(at + 128 * KIB, BLOCK) if disk.has_map else bytes(BLOCK)), at
    return True


# File systems that can do less

SIMPLE = ["ext2", "ramfs", "tmpfs", *(["vfat"] if re.search(
    r"\bvfat$", Path("/proc/filesystems").read_text(), re.M) else [])]


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """The server on musl, built in a hurry."""
    need("musl-gcc", "musl-tools")
    where = tmp_path_factory.mktemp("static")
    subprocess.run(["make", "-s", "-j2", "-C", Path(__file__).parent.parent, "static",
                    f"STATIC_BUILD={where}", "STATIC_CFLAGS=-O0"], check=True)
    return where / "xnbd-server"


@pytest.fixture(params=["server", "static"])
def program(request):
    """For Popen: the server, and one on musl, whose posix_fallocate() has no fallback."""
    if request.param == "server":
        return {}
    return {"executable": request.getfixturevalue("static")}


@kinds
@pytest.mark.parametrize("system", SIMPLE)
def test_simple_file_systems_serve_as_others_do(store, volume, program, kind, system):
    place = volume(system, 16 * MIB)
    disk = store(kind, place=place.place / "disk")
    expected = bytearray(original(0, disk.size))
    s = disk.start(**program)
    with s.client() as c:
        for at, length in [(3, 5), (BLOCK, 2 * BLOCK), (100 * BLOCK + 9, 50000), (SIZE - 3, 3)]:
            c.pwrite(written(at, length), at)
            expected[at:at + length] = written(at, length)
        c.zero(3 * BLOCK + 5, 50 * BLOCK + 1)
        expected[50 * BLOCK + 1:53 * BLOCK + 6] = bytes(3 * BLOCK + 5)
        c.trim(4 * BLOCK, 60 * BLOCK)
        expected[60 * BLOCK:64 * BLOCK] = trimmed = c.pread(4 * BLOCK, 60 * BLOCK)
        assert trimmed in (bytes(4 * BLOCK), original(60 * BLOCK, 4 * BLOCK))
        c.flush()
        c.pwrite(written(200 * BLOCK, BLOCK + 1), 200 * BLOCK)
        expected[200 * BLOCK:201 * BLOCK + 1] = written(200 * BLOCK, BLOCK + 1)
        assert c.pread(SIZE) == expected
    s.kill()
    s = holds(disk, expected, **program)
    end(s)
    end(holds(disk, expected, **program))


# Size

@kinds
def test_disk_of_16_tib_starts_at_once_and_takes_what_is_used(store, volume, kind):
    place = volume("tmpfs", 64 * MIB).place
    disk = store(kind, 16 * TIB, place=place / "disk", base=make_disk(place / "base", 16 * TIB))

    def starts():
        begin = time.monotonic()
        s = disk.start()
        if time.monotonic() - begin > 0.7:
            s.kill()
            raise AssertionError("a slow start")
        return s

    def starts_afresh():
        for path in disk.image, disk.map:
            path.unlink(missing_ok=True)
        return starts()

    def takes_little(s):
        assert SANITIZED or s.status("VmHWM") < 32 * KIB, "KiB of memory"
        assert disk.map.stat().st_blocks * 512 < 256 * KIB, "bytes of disk"
        return True

    s = once(starts_afresh)
    with s.client() as c:
        assert c.size == 16 * TIB
        c.pwrite(b"end", c.size - BLOCK)
        c.flush()
        c.pwrite(b"middle", 8 * TIB)
        assert takes_little(s)
    s.kill()
    s = once(starts)
    with s.client() as c:
        assert c.pread(3, c.size - BLOCK) == b"end" and c.pread(6, 8 * TIB) == b"middle"
        c.flush()
    assert takes_little(s)
    end(s)
    end(once(starts))


# Version 1 of the bitmap file

OLD = {"clean": (1, True), "clean, of another boot": (1, False), "killed": (0, True),
       "of another boot": (0, False)}
BEFORE, AFTER = {0, 1, 5, 256}, {9, 10}         # the last commit


def boot_id():
    return uuid.UUID(BOOT_ID.read_text().strip()).bytes


@functools.cache
def fingerprint(size):
    """That of a base of less than 256 blocks: of all of them."""
    return fnv1a(original(0, size))


def bits(blocks):
    map = bytearray(BLOCK)
    for block in blocks:
        map[block // 8] |= 1 << block % 8
    return bytes(map)


def version_1(disk, how):
    """Files as version 1.0.0 left them.  Returns {offset: length} of what they hold."""
    clean, is_this_boot = OLD[how]
    header = struct.pack("<8sIIQQQ16sII", b"xnbdbmap", 1, 2 if disk.kind == "proxy" else 1, BLOCK,
                         disk.size, 0 if disk.kind == "proxy" else fingerprint(disk.size),
                         boot_id() if is_this_boot else uuid.uuid4().bytes, clean, 0)
    committed = BEFORE | AFTER if clean else BEFORE
    disk.map.write_bytes((header + struct.pack("<Q", fnv1a(header))).ljust(BLOCK, b"\0")
                         + bits(committed) + bits(BEFORE | AFTER))
    held = {block * BLOCK: min(BLOCK, disk.size - block * BLOCK)
            for block in (BEFORE | AFTER if is_this_boot else committed)}
    make_disk(disk.image, content=bytes(disk.size))
    with open(disk.image, "r+b") as f:
        for at, length in held.items():
            os.pwrite(f.fileno(), written(at, length), at)
    disk.spoil(*held.items())
    return held


@kinds
@pytest.mark.parametrize("how", list(OLD))
def test_bitmap_file_of_version_1_is_taken_over(store, kind, how):
    disk = store(kind)
    held = version_1(disk, how)
    expected = disk_with(disk.size, held)
    s = holds(disk, expected)
    end(s)
    header = disk.header()
    assert (header.version, header.clean, header.boot) == (2, 1, boot_id())
    assert header.kind == (2 if kind == "proxy" else 1) and header.size == disk.size
    s = holds(disk, expected)
    s.kill()
    end(holds(disk, expected))


@kinds
@pytest.mark.parametrize("moment", ["end before", "end after"])
def test_kill_while_version_1_is_taken_over_loses_nothing(store, faults, kind, moment):
    disk = store(kind)
    for number in range(40):
        held = version_1(disk, "killed")
        faults.arm("pwrite fsync fdatasync ftruncate link", moment, f"{disk.place}/*", skip=number)
        s = disk.start(faults=faults, wait=False)
        until(lambda: s.proc.poll() is not None or s.addresses, what="a start")
        s.kill()
        end(holds(disk, disk_with(disk.size, held)))
        assert disk.header().version == 2
        if not faults.injected:
            break
    assert number > 0, "no call was met"


# kill -9

WRAPPERS = {
    "as it is": "exec",
    "own mounts": "exec unshare -m",
    "hardened": """exec unshare -m sh -c '
        mount --make-rprivate / && mount --rbind "$PLACE" "$PLACE" && mount -o remount,bind,ro / &&
        mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys &&
        mount --bind /sys /sys && mount -o remount,bind,ro /sys &&
        mount -t tmpfs -o mode=1777 tmpfs /dev/shm && exec "$@"' sh""",
    "no /sys": """exec unshare -m sh -c 'mount -t tmpfs -o ro tmpfs /sys && exec "$@"' sh""",
    "no boot id": f"""exec unshare -m sh -c 'mount --bind /dev/null {BOOT_ID} && exec "$@"' sh"""}


@pytest.fixture
def wrapped(tmp_path):
    """wrapped(how, place): for Popen, a server in such surroundings."""
    def make(how, place=tmp_path):
        need("unshare", "util-linux")
        script = tmp_path / f"{how.replace('/', '')}.sh"
        if script.exists():
            return {"executable": script}
        script.write_text(f"#!/bin/sh\nPLACE={place}\nexport PLACE\n"
                          f"{WRAPPERS[how]} {SERVER} \"$@\"\n")
        script.chmod(0o755)
        tried = subprocess.run([script, "--version"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
        if tried.returncode:
            skip(f"needs mounts of its own (root): {tried.stderr.strip()}")
        return {"executable": script}

    return make


KILLS = [("proxy", "here", "as it is", "as it is"), ("proxy", "here", "own mounts", "own mounts"),
         ("proxy", "here", "hardened", "hardened"), ("proxy", "here", "no /sys", "no /sys"),
         ("proxy", "here", "hardened", "no /sys"), ("proxy", "here", "no /sys", "own mounts"),
         ("proxy", "ext4", "own mounts", "hardened"), ("proxy", "xfs", "own mounts", "hardened"),
         ("proxy", "btrfs", "own mounts", "hardened"),
         ("proxy", "tmpfs", "own mounts", "hardened"), ("kept", "here", "as it is", "as it is"),
         ("kept", "here", "hardened", "hardened"), ("kept", "xfs", "own mounts", "hardened"),
         ("kept", "tmpfs", "own mounts", "hardened")]
VOLUMES = {"ext4": 24 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB, "tmpfs": 16 * MIB}


@hazard("kill -9 loses what was acknowledged")
@pytest.mark.parametrize("kind, system, first, second", KILLS)
def test_kill_loses_nothing_that_was_acknowledged(store, volume, wrapped, tmp_path, kind, system,
                                                  first, second):
    place = volume(system, VOLUMES[system]).place / "disk" if system != "here" else None
    disk = store(kind, place=place)
    changes = {}
    for how in first, second, first:
        s = disk.start(**wrapped(how, tmp_path))
        with s.client() as c:
            assert c.pread(c.size) == disk_with(disk.size, changes)
            for i in range(8):
                at = (len(changes) * 9 + i) * BLOCK + 5
                c.pwrite(written(at, BLOCK), at)
                changes[at] = BLOCK
            if disk.kind == "proxy":
                assert c.pread(BLOCK, SIZE - BLOCK) == original(SIZE - BLOCK, BLOCK)
        s.kill()
        assert not says(s, COMMITTED), s.log()
    end(holds(disk, disk_with(disk.size, changes), **wrapped(first, tmp_path)))


# A file system that comes back

@hazard("the file system dies and is mounted again without a reboot: the live map is believed")
@kinds
@pytest.mark.parametrize("system, how", [
    ("ext4", "dies"), ("xfs", "dies"), ("ext4", "is unmounted"), ("xfs", "is unmounted"),
    ("btrfs", "is unmounted")])
def test_file_system_that_is_mounted_again_has_no_block_that_nobody_wrote(store, volume, kind,
                                                                           system, how):
    """The map reaches the disk, and the blocks that it speaks of do not: the kernel may write
    back in any order."""
    place = volume(system, VOLUMES[system])
    disk = store(kind, 4 * MIB, place=place.place / "disk")
    s = disk.start()
    with s.client() as c:
        c.pwrite(written(*FLUSHED))
        c.flush()
        c.pwrite(written(MIB, MIB), MIB)
        c.pread(MIB, 2 * MIB)
        with open(disk.map, "r+b") as f:
            os.fsync(f.fileno())
        if how == "dies":
            place.die()
    s.kill()
    place.mount_again()
    s = disk.start()
    with s.client() as c:
        assert c.pread(FLUSHED[1]) == written(*FLUSHED)
        assert is_either(c.pread(MIB, MIB), MIB), "blocks that nobody wrote"
        assert c.pread(2 * MIB, 2 * MIB) == original(2 * MIB, 2 * MIB)
        assert c.pread(MIB - FLUSHED[1], FLUSHED[1]) == original(FLUSHED[1], MIB - FLUSHED[1])
        c.flush()
    if how == "dies":
        assert says(s, COMMITTED), s.log()
    end(s)


@kinds
@pytest.mark.parametrize("system", ["ext4", "xfs"])
def test_server_that_ended_in_order_finds_all_on_a_file_system_mounted_again(store, volume, kind,
                                                                              system):
    place = volume(system, VOLUMES[system])
    disk = store(kind, place=place.place / "disk")
    s = disk.start()
    with s.client() as c:
        c.pwrite(written(MIB // 2, 70000), MIB // 2)
    end(s)
    place.mount_again()
    end(holds(disk, disk_with(disk.size, {MIB // 2: 70000})))


@kinds
def test_start_after_a_reboot_says_that_only_what_was_committed_counts(store, kind):
    disk = store(kind)
    s = disk.start()
    with s.client() as c:
        c.pwrite(written(*FLUSHED))
        c.flush()
        c.pwrite(written(30 * BLOCK, 2 * BLOCK), 30 * BLOCK)
        assert disk.header().boot == boot_id()
    s.kill()
    header = disk.header()._replace(boot=uuid.uuid4().bytes)
    data = struct.pack(Header.LAYOUT, *header)
    with open(disk.map, "r+b") as f:
        f.write(data + struct.pack("<Q", fnv1a(data)))
    disk.spoil(FLUSHED, (30 * BLOCK, 2 * BLOCK))
    s = disk.start()
    assert says(s, COMMITTED), s.log()
    with s.client() as c:
        got = c.pread(c.size)
    assert got[:FLUSHED[1]] == written(*FLUSHED) and is_either(got, 0)
    end(s)
    s = disk.start()
    assert not says(s, COMMITTED), s.log()
    end(s)


@kinds
def test_no_boot_id_is_said_once_and_costs_what_was_not_flushed(store, wrapped, kind):
    disk = store(kind)
    without = wrapped("no boot id")
    s = disk.start(**without)
    with s.client() as c:
        c.pwrite(written(*FLUSHED))
        c.flush()
        c.pwrite(written(30 * BLOCK, 2 * BLOCK), 30 * BLOCK)
    assert len(says(s, NO_BOOT_ID)) == 1, s.log()
    s.kill()
    disk.spoil(FLUSHED, (30 * BLOCK, 2 * BLOCK))
    s = disk.start(**without)
    assert len(says(s, NO_BOOT_ID)) == 1, s.log()
    with s.client() as c:
        assert c.pread(FLUSHED[1]) == written(*FLUSHED)
        assert is_either(c.pread(2 * BLOCK, 30 * BLOCK), 30 * BLOCK)
        assert c.pread(MIB // 2, MIB // 2) == original(MIB // 2, MIB // 2)
    end(s)
    s = disk.start()
    assert not says(s, NO_BOOT_ID)
    end(s)


# Whether clients have written

def test_proxy_that_is_only_read_says_so(store):
    disk = store("proxy")
    for _ in range(2):
        s = disk.start()
        with s.client() as c:
            c.pread(MIB // 2)
            c.cache(MIB // 4, MIB // 2)
            c.flush()
            assert c.error_of(WRITE, disk.size, payload=b"x") == NBD_ENOSPC
            assert not disk.header().flags & CHANGED
        end(s)
        assert disk.header()[1:3] == (2, 2) and not disk.header().flags & CHANGED


CHANGES = {"WRITE": (WRITE, 5 * BLOCK, 0, 0, written(5 * BLOCK, BLOCK)),
           "WRITE of a held part": (WRITE, 7, 0, 0, b"x"), "TRIM": (TRIM, 5 * BLOCK, BLOCK),
           "WRITE_ZEROES": (ZEROES, 5 * BLOCK, BLOCK)}


@pytest.mark.parametrize("change", list(CHANGES))
def test_first_change_is_noted_before_it_is_answered(store, change):
    disk = store("proxy")
    s = disk.start()
    with s.client() as c:
        c.pread(4 * BLOCK)
        c.flush()
        assert not disk.header().flags & CHANGED
        assert c.error_of(*CHANGES[change]) == 0
        assert disk.header().flags & CHANGED
    s.kill()
    assert disk.header().flags & CHANGED
    for _ in range(2):
        end(disk.start())
        assert disk.header().flags & CHANGED


@pytest.mark.parametrize("moment", ["end before", "end after"])
def test_kill_at_the_first_write_leaves_no_block_without_the_note(store, faults, moment):
    """What is read of the block afterwards tells whether it was stored."""
    for number in range(12):
        disk = store("proxy")
        for path in disk.image, disk.map:
            path.unlink(missing_ok=True)
        s = disk.start(faults=faults)
        with s.client() as c:
            faults.arm("pwrite fdatasync fsync", moment, f"{disk.place}/*", skip=number)
            with contextlib.suppress(ConnectionError):
                c.pwrite(written(5 * BLOCK, BLOCK), 5 * BLOCK, FUA)
        s.kill()
        s = disk.start()
        with s.client() as c:
            got = c.pread(BLOCK, 5 * BLOCK)
        assert is_either(got, 5 * BLOCK)
        assert got == original(5 * BLOCK, BLOCK) or disk.header().flags & CHANGED
        end(s)
        if not faults.injected:
            break
    assert number > 2


@pytest.mark.parametrize("system", ["ext4", "xfs"])
def test_note_of_the_first_write_is_as_durable_as_the_block(store, volume, system):
    place = volume(system, VOLUMES[system])
    disk = store("proxy", place=place.place / "disk")
    s = disk.start()
    with s.client() as c:
        c.pread(4 * BLOCK)
        c.flush()
        c.pwrite(written(5 * BLOCK, BLOCK), 5 * BLOCK, FUA)
        place.die()
    s.kill()
    place.mount_again()
    assert disk.header().flags & CHANGED
    s = disk.start()
    with s.client() as c:
        assert c.pread(BLOCK, 5 * BLOCK) == written(5 * BLOCK, BLOCK)
    end(s)


# --create

@hazard("--create killed in the middle leaves an empty image, which is served then")
@pytest.mark.parametrize("calls", ["ftruncate", "link", "fsync fdatasync"])
@pytest.mark.parametrize("moment", ["end before", "end after"])
def test_kill_in_create_leaves_no_image_of_another_size(server, faults, tmp_path, calls, moment):
    image = tmp_path / "new.img"
    for number in range(10):
        faults.arm(calls, moment, skip=number)
        s = server(image, "--create", "4M", wait=False, env=faults.environment)
        until(lambda: s.proc.poll() is not None or s.addresses, what="a start")
        s.kill()
        assert not image.exists() or image.stat().st_size == 4 * MIB
        s = server(image, "--create", "4M")
        with s.client() as c:
            assert c.size == 4 * MIB
        end(s)
        image.unlink()
        if not faults.injected:
            break
    assert number > 0 or calls != "ftruncate", "no call was met"


# fallocate()

LACKS = [(mode, error) for error in ("ENODEV", "EPERM", "EOPNOTSUPP")
         for mode in ("target", "device", "throw-away", "kept", "proxy")
         if error == "ENODEV" or mode in ("target", "kept", "proxy")]


@pytest.mark.parametrize("mode, error", LACKS)
def test_zeroes_and_trims_work_where_fallocate_does_not(server, store, faults, request, mode,
                                                         error):
    faults.arm("fallocate", error, times=Faults.EVER)
    size = 4 * MIB
    if mode == "device":
        device, _ = request.getfixturevalue("block_device")
        s = server(device, env=faults.environment)
    elif mode == "throw-away":
        disk = store("kept", size)
        s = server(args=["--cow-target", *ADDRESS, disk.base], env=faults.environment)
    else:
        disk = store(mode, size)
        s = disk.start(faults=faults)
    expected = bytearray(original(0, size))
    with s.client() as c:
        c.pwrite(written(0, MIB))
        expected[:MIB] = written(0, MIB)
        for at, length, flags in [(4096, 65536, 0), (MIB + 5, 70000, 0), (200000, 4096, NO_HOLE),
                                  (2 * MIB, 65536, FUA)]:
            c.zero(length, at, flags)
            expected[at:at + length] = bytes(length)
        for at in 512 * KIB, 3 * MIB:
            c.trim(65536, at)
            trimmed = c.pread(65536, at)
            assert trimmed in (bytes(65536), expected[at:at + 65536])
            expected[at:at + 65536] = trimmed
        c.flush()
        assert c.pread(size) == expected
    end(s)
    if mode in ("kept", "proxy"):
        end(holds(disk, expected))
