"""The Linux kernel's own client, in a virtual machine (see vm.py) and, where
this machine has /dev/nbd0, also on this one.

After each test the server has ended, and the image it leaves is checked here
with e2fsprogs: what the kernel wrote must be there, without the kernel.
"""

import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest

import vm
from conftest import SERVER, need, need_punch, skip
from nbd import DEADLINE, NBD_CMD_WRITE, NBD_REQUEST_MAGIC, SANITIZED, pattern, until
from saboteur import UP, Relay
from test_order import calm, is_asked, over, read, serve
from test_proxy import original, proxy

BLOCK, KIB, MIB, TIB = 4096, 1 << 10, 1 << 20, 1 << 40
DISK = 64 * MIB
BOOT_LASTS = 1800 if SANITIZED else 900

# What differs: busybox knows no fixed newstyle negotiation and hands the
# socket over by ioctl, Debian's client by netlink.  With several connections
# the kernel has a queue for each.  It complains after 30 s without an answer,
# which on a busy machine may be lost on the emulated network and sent again;
# unless it is told to wait longer.
BUSYBOX = "busybox -t 300"
DEBIAN = "debian -t 300 -N root/disk-1"
CLIENTS = [
    pytest.param(BUSYBOX + " -N root/disk-1", id="busybox"),
    pytest.param(DEBIAN + " -b 512", id="nbd-client"),
    pytest.param(DEBIAN + " -b 4096 -C 4", id="nbd-client-4-connections"),
    pytest.param(DEBIAN + " -b 1024 -nonetlink", id="nbd-client-ioctl"),
]

# CI cannot install a kernel with NBD devices for itself.
MACHINES = ["guest"]
if Path("/dev/nbd0").exists() or os.environ.get("XNBD_NO_SKIP") != "1":
    MACHINES.append("local")


@pytest.fixture(scope="module", params=MACHINES)
def machine(request, tmp_path_factory):
    """A machine with the kernel's client; one boot serves all tests."""
    directory = tmp_path_factory.mktemp("machine")
    try:
        if request.param == "guest":
            booted = vm.Guest(directory, deadline=BOOT_LASTS)
        else:
            booted = vm.Local(directory)
    except vm.Missing as e:
        skip(str(e))
    with booted:
        yield booted


@pytest.fixture
def kernel(machine, server):
    """The machine, with nothing connected before and after the test; at its
    end the kernel must have found no fault, unless `may_complain` is set."""
    need("e2fsck", "e2fsprogs")
    machine.may_complain = False
    machine.run("cleanup; mark_kernel_log")
    yield machine
    machine.run("cleanup")
    complaints = machine.run("kernel_complaints")
    assert machine.may_complain or not complaints, complaints


@pytest.fixture
def image(disk):
    """A disk full of old data, so that nothing passes for being zero."""
    return disk(content=b"\xa5" * DISK, name="image")


def allocated(image):
    return image.stat().st_blocks * 512


def checksum(image):
    return hashlib.md5(image.read_bytes()).hexdigest()


def make_file_system(image, tree):
    """Puts a file system that holds the tree on the image."""
    subprocess.run([need("mkfs.ext4", "e2fsprogs"), "-q", "-F", "-b", "4096",
                    "-d", tree.parent, image], check=True)


def check_image(image, kernel):
    """The file system on the image, and the machine's tree in it, are whole."""
    done = subprocess.run([need("e2fsck", "e2fsprogs"), "-fn", image],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    copy = image.with_suffix(".tree")
    copy.mkdir()
    subprocess.run([need("debugfs", "e2fsprogs"), "-R", f"rdump /tree {copy}", image],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    difference = subprocess.run(["diff", "-r", kernel.tree, copy / "tree"],
                                stdout=subprocess.PIPE, text=True)
    assert difference.returncode == 0, difference.stdout


# ext4

WRITE_TREE = """
attach $DEV $CLIENT
mkfs.ext4 -q -F $DEV
mount $DEV $MNT
copy_tree
sync
"""
REMOUNT_AND_VERIFY = """
umount $MNT
mount $DEV $MNT
verify_tree
umount $MNT
e2fsck -fn $DEV
"""
RECONNECT_AND_VERIFY = """
detach $DEV $CLIENT
attach $DEV $CLIENT
mount -o ro $DEV $MNT
verify_tree
umount $MNT
detach $DEV $CLIENT
"""


@pytest.mark.parametrize("client", CLIENTS)
def test_ext4_survives_remount_and_reconnect(kernel, server, image, client):
    s = server(image)
    kernel.run(WRITE_TREE + REMOUNT_AND_VERIFY + RECONNECT_AND_VERIFY,
               CLIENT=client, PORT=s.port)
    s.stop()
    check_image(image, kernel)


@pytest.mark.parametrize("client", [BUSYBOX, DEBIAN])
def test_fstrim_gives_space_back_and_spares_files(kernel, server, image, client):
    """What is trimmed lies between files that stay."""
    need_punch(image.parent)
    s = server(image)
    kernel.run(WRITE_TREE + """
        for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
                for file in stays.$i rubbish.$i; do
                        dd if=$TREE/d0/1000001 of=$MNT/$file bs=100k count=$((1 + i % 3)) \
                                conv=fsync 2>/dev/null
                done
        done
        for i in 1 2 3 4 5 6 7 8 9; do cat $TREE/d0/3000000; done >$MNT/rubbish
        sync
        rm $MNT/rubbish*
        sync
        fstrim $MNT
        umount $MNT
        mount $DEV $MNT
        for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
                cmp -n $((102400 * (1 + i % 3))) $MNT/stays.$i $TREE/d0/1000001
        done
        """ + REMOUNT_AND_VERIFY + "detach $DEV $CLIENT", CLIENT=client, PORT=s.port)
    s.stop()
    check_image(image, kernel)
    assert allocated(image) < 25 * MIB


def test_ext4_on_an_oldstyle_server(kernel, server, image):
    s = server(image, "--oldstyle")
    kernel.run(WRITE_TREE + REMOUNT_AND_VERIFY + RECONNECT_AND_VERIFY,
               CLIENT=BUSYBOX, PORT=s.port)
    s.stop()
    check_image(image, kernel)


# Overlays

REPLACE_TREE = """
attach $DEV $CLIENT
mount $DEV $MNT
verify_tree             # the base's
cp -R $MNT/tree $MNT/copy
rm -r $MNT/tree
mv $MNT/copy $MNT/tree
sync
fstrim $MNT
"""


def cow_target(*options):
    return ["--cow-target", "--laddr", "127.0.0.1", "--lport", "0", *options]


@pytest.mark.parametrize("client", [BUSYBOX, DEBIAN + " -C 4"])
def test_ext4_on_a_cow_target_leaves_the_base_alone(kernel, server, image, client):
    make_file_system(image, kernel.tree)
    before = checksum(image)
    s = server(args=cow_target(image))
    kernel.run(REPLACE_TREE + REMOUNT_AND_VERIFY + RECONNECT_AND_VERIFY,
               CLIENT=client, PORT=s.port)
    s.stop()
    assert checksum(image) == before


def test_ext4_on_a_kept_overlay_survives_a_restart(kernel, server, image, tmp_path):
    make_file_system(image, kernel.tree)
    before = checksum(image)
    arguments = cow_target("--cow-file", tmp_path / "overlay", image)
    s = server(args=arguments)
    kernel.run(REPLACE_TREE + REMOUNT_AND_VERIFY + "detach $DEV $CLIENT",
               CLIENT=DEBIAN, PORT=s.port)
    s.stop()
    s = server(args=arguments)
    kernel.run("attach $DEV $CLIENT; mount $DEV $MNT" + REMOUNT_AND_VERIFY + RECONNECT_AND_VERIFY,
               CLIENT=DEBIAN, PORT=s.port)
    s.stop()
    assert checksum(image) == before


# The server ends under a mounted file system

WRITE_UNTIL_IT_FAILS = WRITE_TREE + """
echo synced
while dd if=$TREE/d0/3000000 of=$MNT/more bs=64k conv=fsync; do
        echo more
done
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_synced_survives_the_end_of_a_busy_server(kernel, server, image, number):
    kernel.may_complain = True
    s = server(image)
    job = kernel.start(WRITE_UNTIL_IT_FAILS, CLIENT=DEBIAN + " -C 4 -t 5", PORT=s.port)
    job.wait_for("synced")
    job.wait_for("more")
    if number == signal.SIGTERM:
        s.stop()
    else:
        s.kill()
    job.wait()
    kernel.run("cleanup")
    again = server(image)
    kernel.run("""
        attach $DEV $CLIENT
        mount $DEV $MNT         # replays the journal
        verify_tree
        """ + REMOUNT_AND_VERIFY, CLIENT=DEBIAN, PORT=again.port)
    kernel.run("cleanup")
    again.stop()
    check_image(image, kernel)


# Several clients and connections

def test_four_connections_carry_writes_of_four_processors(kernel, server, image):
    """Each processor has its own connection.  A flush goes over one of them."""
    s = server(image)
    told = kernel.run("""
        attach $DEV $CLIENT
        connections
        for i in 0 1 2 3; do
                taskset $((1 << i)) dd if=$TREE/d0/3000000 of=$DEV bs=40000 seek=$((i * 100)) \\
                        count=75 conv=fsync 2>/dev/null &
        done
        wait
        blockdev --flushbufs $DEV
        for i in 0 1 2 3; do
                taskset $((8 >> i)) dd if=$DEV bs=40000 skip=$((i * 100)) count=75 2>/dev/null |
                        md5sum
        done
        detach $DEV $CLIENT
        """, CLIENT=DEBIAN + " -C 4", PORT=s.port).split()
    s.stop()
    assert told[0] == "4"
    part = (kernel.tree / "d0/3000000").read_bytes()
    assert told[1::2] == [hashlib.md5(part).hexdigest()] * 4
    data = image.read_bytes()
    assert data[:16000000] == (part + b"\xa5" * 1000000) * 4


def test_what_one_client_flushed_the_other_reads(kernel, server, image):
    s = server(image)
    kernel.run("""
        attach $DEV debian -t 300
        attach $DEV2 busybox -t 300
        for i in 1 2 3 4 5 6 7 8; do
                dd if=$TREE/d0/3000000 of=$DEV bs=64k skip=$i count=1 conv=fsync 2>/dev/null
                blockdev --flushbufs $DEV2
                dd if=$TREE/d0/3000000 bs=64k skip=$i count=1 2>/dev/null >$TMP/part
                dd if=$DEV2 bs=64k count=1 2>/dev/null | cmp - $TMP/part
        done
        detach $DEV debian
        detach $DEV2 busybox
        """, PORT=s.port)


# A connection is cut

GIVES_UP_AFTER = 10     # seconds: then the kernel repeats a request on another connection
PREPARE = """
attach $DEV debian -C 4 -b 512 -t $SECONDS
for byte in 0 1 2; do
        head -c 32768 /dev/zero | tr '\\0' $byte >$TMP/$byte
done
taskset 1 dd if=$TMP/0 of=$DEV bs=4096 count=1 oflag=direct
"""
WRITE_TWICE = """
taskset 1 dd if=$TMP/1 of=$DEV bs=$LENGTH seek=$AT count=1 oflag=direct,seek_bytes
echo answered
taskset 4 dd if=$TMP/2 of=$DEV bs=$LENGTH seek=$AT count=1 oflag=direct,seek_bytes \\
        conv=fsync
"""


class Writes:
    """A script that writes 1s on the first processor, whose connection is cut.  When that is
    answered, it writes 2s to the same place on another processor, and flushes."""

    def __init__(self, kernel, at, length):
        self.at, self.length = at, length
        self.job = kernel.start(WRITE_TWICE, LENGTH=length, AT=at)

    def connections(self, relay):
        """Those by which the 1s have gone to the server."""
        return carriers(relay, self.at, b"1" * self.length)

    def are_repeated(self, relay):
        return len(self.connections(relay)) > 1


def carriers(relay, at, payload):
    """The connections by which a write of that payload has gone to the server, as a whole."""
    magic, command, rest = map(re.escape, (
        struct.pack(">I", NBD_REQUEST_MAGIC), struct.pack(">H", NBD_CMD_WRITE),
        struct.pack(">QI", at, len(payload)) + payload))
    request = re.compile(magic + b".." + command + b".{8}" + rest, re.DOTALL)
    return [p for p in relay.passages if request.search(bytes(p.given[UP]))]


def start_together(kernel, connection, places):
    """Writes to these (position, length), which the server gets in one piece."""
    started = []
    connection.pause(UP)
    for at, length in places:
        before = connection.waiting(UP)
        started.append(Writes(kernel, at, length))
        until(lambda: connection.waiting(UP) >= before + length, what="a write of the kernel")
    connection.let_go(UP)
    return started


def hold_up_loop(kernel, s, connection):
    """Two writes at once, the first of which the disk holds up, and with it the connection's
    loop.  After a slow write a loop leaves others to a worker, so this may take some attempts.
    Returns the writes of all."""
    writes = []
    for at in range(MIB, 2 * MIB, 64 * KIB):
        s.slow.hold(at, BLOCK)
        writes += start_together(kernel, connection, [(at, BLOCK), (at + MIB, 2 * BLOCK)])
        if s.slow.caught():
            return writes
        s.slow.release()
        for one in writes:
            one.job.wait()
    pytest.fail("no loop was held up")


def connect_four(kernel, relay):
    """Returns the connection of the first processor, which has written 0s to the first block."""
    kernel.may_complain = True
    kernel.run(PREPARE, PORT=relay.port, SECONDS=GIVES_UP_AFTER)
    first, = carriers(relay, 0, b"0" * BLOCK)
    return first


def check_outcome(kernel, server, s, relay, expected):
    """What the kernel reads, what another client reads, and what is there after a restart."""
    told = kernel.run("""
        connections
        dd if=$DEV bs=1M iflag=direct 2>/dev/null | md5sum
        detach $DEV debian
        """, PORT=relay.port).split()
    assert 1 <= int(told[0]) <= 3, "not tested: no connection was cut"
    assert read(s, len(expected)) == expected
    assert told[1] == hashlib.md5(expected).hexdigest()
    s.stop()
    assert read(server(args=s.arguments), len(expected)) == expected


@pytest.mark.hazard("a write that was repeated on another connection lands over a newer one: "
                    "the kernel")
@pytest.mark.parametrize("mode, how", [
    ("target", "reset"), ("proxy", "close"), ("cow-file", "given up by the kernel")])
def test_newer_writes_outlive_those_of_a_connection_that_was_cut(serve, server, kernel, mode, how):
    """The disk holds up one of its writes.  The server has received another one with that, and a
    third is in its socket.  The kernel repeats them all, and two are answered before the disk
    goes on."""
    expected = pattern(0, 4 * MIB)
    s = serve(mode, "--threads", 5, content=expected)
    with Relay(s.address) as relay:
        first = connect_four(kernel, relay)
        *others, held, taken = hold_up_loop(kernel, s, first)
        left = Writes(kernel, 3 * MIB, 32 * KIB)
        until(lambda: left.connections(relay) == [first], what="a write that is in the socket")
        if how in ("reset", "close"):
            first.drop(reset=how == "reset")
        for one in taken, left:
            one.job.wait()
            assert one.are_repeated(relay)
        until(lambda: held.are_repeated(relay), what="the first write, repeated")
        with contextlib.suppress(vm.Failed):
            held.job.wait(2)            # seconds in which a wrong server would have answered
        s.slow.release()
        held.job.wait()
        calm(s)
        expected = over(expected, 0, b"0" * BLOCK)
        for one in [*others, held, taken, left]:
            expected = over(expected, one.at, b"2" * one.length)
        check_outcome(kernel, server, s, relay, expected)


@pytest.mark.hazard("a write that was repeated on another connection lands over a newer one: "
                    "the kernel, and a silent origin")
def test_newer_writes_outlive_one_that_waited_for_the_origin(serve, server, kernel):
    """Its connection was cut.  The repeated one waits, too, until the whole blocks are written."""
    expected = pattern(0, 4 * MIB)
    s = serve("proxy", "--threads", 5, content=expected)
    with Relay(s.address) as relay:
        first = connect_four(kernel, relay)
        s.quiet()
        s.origin.hold()
        one = Writes(kernel, 2 * MIB + 512, BLOCK)
        is_asked(s, 2 * MIB)
        first.drop(reset=True)
        until(lambda: one.are_repeated(relay), what="the write, repeated")
        kernel.run("dd if=$TMP/0 of=$DEV bs=8192 seek=256 count=1 oflag=direct conv=fsync")
        one.job.wait()
        s.origin.release()
        s.quiet()
        calm(s)
        for at, data in (0, b"0" * BLOCK), (2 * MIB, b"0" * 2 * BLOCK), (one.at, b"2" * one.length):
            expected = over(expected, at, data)
        check_outcome(kernel, server, s, relay, expected)


# The kernel's largest requests

def test_requests_of_32_mib(kernel, server, disk):
    """One read and one write, as the kernel counts them, copy half a disk."""
    half = random.Random(2).randbytes(32 * MIB)
    image = disk(2 * len(half), content=half)
    s = server(image)
    told = kernel.run("""
        attach $DEV $CLIENT
        cd /sys/block/${DEV##*/}
        echo 32768 >queue/max_sectors_kb
        before=$(awk '{ print $1 + $5, $3 + $7 }' stat)
        dd if=$DEV of=$TMP/half bs=32M count=1 iflag=direct 2>/dev/null
        dd if=$TMP/half of=$DEV bs=32M count=1 seek=1 oflag=direct 2>/dev/null
        rm $TMP/half
        echo $before $(awk '{ print $1 + $5, $3 + $7 }' stat)
        detach $DEV $CLIENT
        """, CLIENT=DEBIAN, PORT=s.port).split()
    s.stop()
    assert image.read_bytes() == half + half
    requests, sectors = int(told[2]) - int(told[0]), int(told[3]) - int(told[1])
    assert sectors == 2 * 65536
    assert requests == 2, f"not tested: the kernel made {requests} requests of it"


# Swap

# To swap to a server on the same machine could end in a deadlock.
@pytest.mark.parametrize("machine", ["guest"], indirect=True)
def test_swap_on_an_export(kernel, server, image):
    """A process that may use little memory copies a large file to memory."""
    s = server(image)
    used = kernel.run("""
        attach $DEV $CLIENT -swap
        mkswap $DEV >/dev/null
        swapon $DEV
        mkdir -p $TMP/cgroup
        mount -t cgroup2 none $TMP/cgroup
        echo +memory >$TMP/cgroup/cgroup.subtree_control
        mkdir -p $TMP/cgroup/small
        echo 4M >$TMP/cgroup/small/memory.high
        for i in 1 2 3 4 5; do cat $TREE/d0/3000000; done | (
                echo 0 >$TMP/cgroup/small/cgroup.procs          # this process
                cat >$TMP/swapped
        )
        awk -v dev=$DEV '$1 == dev { print $4 }' /proc/swaps
        expected=$(for i in 1 2 3 4 5; do cat $TREE/d0/3000000; done | md5sum)
        [ "$expected" = "$(md5sum <$TMP/swapped)" ]
        rm $TMP/swapped
        swapoff $DEV
        rmdir $TMP/cgroup/small
        umount $TMP/cgroup
        detach $DEV $CLIENT
        """, CLIENT=DEBIAN, PORT=s.port)
    assert int(used) > 8000     # KiB


# What the kernel makes of the export's flags and size

QUEUE = """
attach $DEV $CLIENT
cd /sys/block/${DEV##*/}
cat ro queue/write_cache queue/fua queue/logical_block_size
[ $(cat queue/discard_max_bytes) -gt 0 ] && echo discards || echo keeps
blockdev --getsize64 $DEV
"""


def test_kernel_uses_flush_fua_and_trim(kernel, server, image):
    s = server(image)
    told = kernel.run(QUEUE, CLIENT="debian -b 512", PORT=s.port).splitlines()
    assert told == ["0", "write back", "1", "512", "discards", str(DISK)]


@pytest.mark.parametrize("client", [BUSYBOX + " -b 4096", DEBIAN + " -b 512"])
def test_disk_of_5_tib(kernel, server, disk, client):
    size = 5 * TIB + 4096
    s = server(disk(size))
    told = kernel.run("""
        attach $DEV $CLIENT
        blockdev --getsize64 $DEV
        for block in 1048575 1048576 536870912 1342177280; do   # 4 GiB, 2 TiB, the last one
                { echo $block; cat $TREE/d0/4096; } |
                        dd of=$DEV bs=4096 seek=$block count=1 iflag=fullblock \\
                                conv=fsync 2>/dev/null
        done
        blockdev --flushbufs $DEV
        for block in 1048575 1048576 536870912 1342177280; do
                dd if=$DEV bs=4096 skip=$block count=1 2>/dev/null | head -n 1
        done
        detach $DEV $CLIENT
        """, CLIENT=client, PORT=s.port).split()
    assert told == [str(size), "1048575", "1048576", "536870912", "1342177280"]


def test_disk_of_a_ragged_size_is_used_up_to_its_last_sector(kernel, server, disk):
    s = server(disk(content=b"\xa5" * (MIB + 700)))
    told = kernel.run("""
        attach $DEV debian -b 512
        blockdev --getsize64 $DEV
        dd if=$DEV bs=512 2>/dev/null | tr -d '\\245' | wc -c
        detach $DEV debian
        """, PORT=s.port).split()
    assert told == [str(MIB + 512), "0"]


# Read-only

@pytest.mark.parametrize("client", [BUSYBOX, DEBIAN + " -C 4"])
def test_read_only_export_is_mounted_and_never_written(kernel, server, image, client):
    """The last write is one that the kernel was talked into: it must reach the
    server, fail, and leave the connection in order."""
    kernel.may_complain = True
    make_file_system(image, kernel.tree)
    before = checksum(image)
    s = server(image, "--readonly")
    told = kernel.run("""
        attach $DEV $CLIENT
        cat /sys/block/${DEV##*/}/ro
        ! mount -o rw $DEV $MNT 2>/dev/null || ! touch $MNT/file 2>/dev/null || echo "wrote a file"
        umount $MNT 2>/dev/null || true
        mount -o ro $DEV $MNT
        verify_tree
        umount $MNT
        ! dd if=$TREE/d0/3000000 of=$DEV bs=4096 count=1 conv=fsync 2>/dev/null || echo wrote
        blockdev --setrw $DEV
        ! dd if=$TREE/d0/3000000 of=$DEV bs=4096 count=9 conv=fsync 2>/dev/null || echo wrote
        blockdev --flushbufs $DEV
        e2fsck -fn $DEV >/dev/null 2>&1
        detach $DEV $CLIENT
        """, CLIENT=client, PORT=s.port).split("\n")
    s.stop()
    assert told == ["1", ""]
    assert checksum(image) == before


# --inetd

class SuperServer:
    """Accepts on loopback and starts a program for each client, with the
    socket as its standard input and output."""

    def __init__(self, command, log):
        self.command = command
        self.log = open(log, "wb")
        self.children = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client:
                self.children.append(subprocess.Popen(
                    self.command, stdin=client, stdout=client, stderr=self.log))

    def statuses(self):
        """How each program ended, once its client has left."""
        return [child.wait(DEADLINE) for child in self.children]

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for child in self.children:
            child.kill()
            child.wait()
        self.log.close()


@pytest.mark.parametrize("client, connections", [(BUSYBOX, 2), (DEBIAN + " -C 4", 8)])
def test_ext4_through_a_super_server(kernel, image, tmp_path, client, connections):
    s = SuperServer([SERVER, "--target", "--inetd", "--logpath", tmp_path / "log", image],
                    tmp_path / "stderr")
    try:
        kernel.run(WRITE_TREE + REMOUNT_AND_VERIFY + RECONNECT_AND_VERIFY,
                   CLIENT=client, PORT=s.port)
        assert s.statuses() == [0] * connections
    finally:
        s.close()
    assert (tmp_path / "stderr").read_text() == ""
    check_image(image, kernel)


def test_ext4_through_systemd_socket_activate(kernel, image, tmp_path):
    activate = need("systemd-socket-activate", "systemd")
    log = tmp_path / "activate.log"
    listener = socket.create_server(("127.0.0.1", 0))
    # It takes a socket that is passed to it as its own; --listen has no port 0.
    command = ["sh", "-c", 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"', "sh",
               activate, "--accept", "--inetd", SERVER,
               "--target", "--inetd", f"--logpath={tmp_path}/log", image]
    with open(log, "wb") as f:
        s = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                             close_fds=False,
                             preexec_fn=lambda: os.dup2(listener.fileno(), 3))
    try:
        kernel.run(WRITE_TREE + REMOUNT_AND_VERIFY + RECONNECT_AND_VERIFY,
                   CLIENT=BUSYBOX, PORT=listener.getsockname()[1])
        ends = until(lambda: re.findall(r"Child \d+ died with code (\d+)", log.read_text()))
        assert set(ends) == {"0"}, log.read_text()
    finally:
        s.terminate()
        s.wait()
        listener.close()
    check_image(image, kernel)
