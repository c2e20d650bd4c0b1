"""A disk moves to another host while a machine uses it.

The machine is virtual (see vm.py) and runs Linux's own client.  Of the disk, the
first part holds an ext4 file system, full of files before the move, in which a
script writes more; the second part numbered blocks, which vm/writer.c writes and
reads, over a connection of its own, and times.  Both go on through all of it:
attach to the proxy, copy, switch, end of the origin.
"""

import hashlib
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

import vm
from conftest import SERVER, need, skip
from nbd import SANITIZED, until

MIB, BLOCK = 1 << 20, 4096
FILES, NUMBERED = 192 * MIB, 16 * MIB       # the parts of the disk
BULK = 40 * MIB                             # one file of those that are there before
LINK_SPEED = 16 * MIB                       # bytes per second: the copy takes some seconds
PATIENCE = 400 if SANITIZED else 300
PAUSE_LIMIT = 30                            # seconds; a loose bound, the figure is printed
WRITE_STRIDE = 7919                         # of vm/writer.c


# The machine

@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    try:
        booted = vm.Guest(tmp_path_factory.mktemp("machine"),
                          deadline=3000 if SANITIZED else 1200, extra=[vm.compiled("writer")])
    except vm.Missing as e:
        skip(str(e))
    with booted:
        yield booted


@pytest.fixture
def kernel(machine, server):
    """The machine, whose kernel must find no fault with what it is served,
    unless `may_complain` is set."""
    machine.may_complain = False
    machine.run("cleanup; rm -f $TMP/stop; mark_kernel_log")
    yield machine
    machine.run("cleanup")
    complaints = machine.run("kernel_complaints")
    assert machine.may_complain or not complaints, complaints


# The disk

def numbered(block, number):
    """What the writer's request of that number makes of a block."""
    return b"%07d %07d\n" % (block, number) * (BLOCK // 16)


def numbered_part(requests=0):
    """All of the part, after that many writes."""
    blocks = NUMBERED // BLOCK
    last = [0] * blocks
    for k in range(1, requests + 1):
        last[k * WRITE_STRIDE % blocks] = k
    return b"".join(map(numbered, range(blocks), last))


def numbered_part_of(image):
    with open(image, "rb") as f:
        f.seek(FILES)
        return f.read()


def make_disk(image, tree):
    """The disk as it is before the move."""
    files = image.with_suffix(".files")
    shutil.copytree(tree, files / "tree")
    (files / "bulk").write_bytes(bulk())
    subprocess.run([need("mkfs.ext4", "e2fsprogs"), "-q", "-F", "-b", str(BLOCK), "-d", files,
                    image, f"{FILES // 1024}k"], check=True)
    with open(image, "r+b") as f:
        f.seek(FILES)
        f.write(numbered_part())
    shutil.rmtree(files)


def bulk():
    return random.Random(3).randbytes(BULK)


def checksum(image):
    return hashlib.md5(image.read_bytes()).hexdigest()


def extract(image, directory):
    """Copies the files out of a file system that must be whole."""
    done = subprocess.run([need("e2fsck", "e2fsprogs"), "-fn", image],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    directory.mkdir()
    subprocess.run([need("debugfs", "e2fsprogs"), "-R", f"rdump / {directory}", image],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# The link to the origin

class SlowLink:
    """Passes on connections to a port, and what comes back not faster than
    .speed, over all of them: a copy that takes its time."""

    def __init__(self, port):
        self.origin = "127.0.0.1", port
        self.speed = LINK_SPEED
        self.lock, self.free_at = threading.Lock(), 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near = self.listener.accept()[0]
                far = socket.create_connection(self.origin)
            except OSError:
                return
            self.sockets += [near, far]
            for args in ((near, far, lambda n: None), (far, near, self._take_time)):
                threading.Thread(target=pass_on, args=args, daemon=True).start()

    def _take_time(self, count):
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + count / self.speed
            free_at = self.free_at
        time.sleep(max(0, free_at - time.monotonic()))

    def close(self):
        for s in self.sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:         # it is closed already
                pass
            s.close()


def pass_on(source, sink, before):
    """Until either of them is closed; then closes the sink."""
    try:
        while data := source.recv(65536):
            before(len(data))
            sink.sendall(data)
    except OSError:
        pass
    try:
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def slow_link():
    links = []

    def make(port):
        links.append(SlowLink(port))
        return links[-1]

    yield make
    for link in links:
        link.close()


# The move

class Move:
    """An origin, whose image must stay as it is, the slow link to it, and the
    proxy, which makes the image in another place."""

    def __init__(self, server, link, source, directory):
        self.server, self.source = server, source
        self.before = checksum(source)
        self.origin = server(source)
        self.link = link(self.origin.port)
        self.image = directory / "moved"
        self.control = directory / "control"
        self.arguments = ["--proxy", "--laddr", "127.0.0.1", "--lport", "0",
                          "127.0.0.1", self.link.port, self.image, directory / "bitmap",
                          self.control]

    def start_proxy(self):
        self.proxy = self.server(args=self.arguments)
        return self.proxy.port

    def switch(self):
        """After it the origin is gone."""
        bgctl("--switch", self.control)
        self.origin.kill()
        self.link.close()
        assert query(self.control)["mode"] == "target"

    def end(self):
        self.proxy.stop()
        assert checksum(self.source) == self.before


@pytest.fixture
def move(kernel, server, disk, slow_link, tmp_path):
    source = disk(FILES + NUMBERED, name="source")
    make_disk(source, kernel.tree)
    return Move(server, slow_link, source, tmp_path)


# xnbd-bgctl

def bgctl(*arguments):
    """Runs it to a good end; returns what it said."""
    program = os.environ.get("XNBD_BGCTL", Path(SERVER).with_name("xnbd-bgctl"))
    done = subprocess.run([program, *map(str, arguments)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=PATIENCE)
    assert done.returncode == 0, done
    return done


def query(control):
    return dict(line.split(": ", 1) for line in bgctl("--query", control).stdout.splitlines())


# What the machine does meanwhile

USE_DISK = """
attach $DEV debian -C 4 -b 4096 $OPTIONS
attach $DEV2 debian -b 4096 -t 300
mount $DEV $MNT
i=0
until [ -e $TMP/stop ]; do
        i=$((i + 1))
        { echo $i; head -c $((i * 7919 % 200000)) $TREE/d0/3000000; } |
                dd of=$MNT/slot$((i % 20)) bs=64k iflag=fullblock conv=fsync 2>/dev/null
        echo "file $i"
done
"""
READ_ALL = """
echo 3 >/proc/sys/vm/drop_caches
verify_tree
md5sum <$MNT/bulk
"""
STOP_USING = """
umount $MNT
detach $DEV debian
detach $DEV2 debian
"""


def slot_content(number, tree):
    """What a file holds that was the loop's, in that turn."""
    return b"%d\n" % number + (tree / "d0/3000000").read_bytes()[:number * 7919 % 200000]


def turns(job):
    """How often the loop has written a file."""
    while job.machine.receive(time.monotonic() + 0.01):
        pass
    return sum(line.startswith("file") for line in job.lines)


class Phases:
    """The writer, and how long its requests take in each phase."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.job = kernel.start("exec $WRITER $DEV2 $FIRST $BLOCKS", FIRST=FILES // BLOCK,
                                BLOCKS=NUMBERED // BLOCK, WRITER=vm.compiled("writer"))
        self.figures = {}
        self._await("begun", 1)

    def _await(self, word, count):
        until(lambda: self._seen(word) >= count, seconds=PATIENCE, what=f"{word} {count}")

    def _seen(self, word):
        self.kernel.receive(time.monotonic() + 0.01)
        assert self.job.status is None or word == "written", self.job.output
        return sum(line.startswith(word) for line in self.job.lines)

    def next(self, name):
        """Ends the phase, which had that name, and begins one."""
        count = len(self.figures) + 1
        self.kernel.run("kill -USR1 $(pidof writer)")
        self._await("phase", count)
        said = [line for line in self.job.lines if line.startswith("phase")][-1]
        self.figures[name] = [int(n) for n in re.findall(r"\d+", said)]
        self._await("begun", count + 1)

    def end(self):
        """Returns how many writes there were, all of which it has found again."""
        self.kernel.run("kill $(pidof writer)")
        return int(self.job.wait_for("written", PATIENCE).split()[1])

    def longest(self, name):
        """Seconds."""
        return self.figures[name][2] / 1e6

    def __str__(self):
        return "; ".join(f"{name}: {n} requests, mean {mean / 1000:.1f} ms, "
                         f"longest {longest / 1000:.1f} ms"
                         for name, (n, mean, longest) in self.figures.items())


def wait_for_files(job, count):
    """Until the loop has written that many more."""
    job.wait_for(f"file {turns(job) + count}", PATIENCE)


def check_files(image, tree, slots, copy):
    """The file system is whole, and holds what was there before, and what was
    written in those turns of the loop."""
    extract(image, copy)
    assert (copy / "bulk").read_bytes() == bulk()
    assert subprocess.run(["diff", "-r", tree, copy / "tree"]).returncode == 0
    for i in slots:
        assert (copy / f"slot{i % 20}").read_bytes() == slot_content(i, tree), i


@pytest.mark.limit(1800 if SANITIZED else 1000)
def test_a_disk_moves_while_a_machine_writes_to_it(kernel, move, tmp_path):
    files = kernel.start(USE_DISK, PORT=move.start_proxy(), OPTIONS="-t 300")
    files.wait_for("file 3", PATIENCE)
    blocks = Phases(kernel)
    wait_for_files(files, 3)
    blocks.next("on the proxy")
    began = time.monotonic()
    assert "100" in bgctl("--cache-all", "--progress", move.control).stderr
    copying = time.monotonic() - began
    blocks.next("copying")
    move.switch()
    wait_for_files(files, 3)
    blocks.next("the switch")
    assert kernel.run(READ_ALL, PATIENCE).split()[0] == hashlib.md5(bulk()).hexdigest()
    wait_for_files(files, 3)
    blocks.next("the target")

    requests = blocks.end()
    kernel.run("touch $TMP/stop")
    files.wait(PATIENCE)
    kernel.run(STOP_USING, PATIENCE)
    move.end()
    print(f"\nmigration: copied in {copying:.1f} s; {blocks}")
    assert move.image.stat().st_size == FILES + NUMBERED
    assert numbered_part_of(move.image) == numbered_part(requests)
    last = turns(files)
    check_files(move.image, kernel.tree, range(max(1, last - 19), last + 1), tmp_path / "files")
    assert blocks.longest("the switch") < PAUSE_LIMIT


@pytest.mark.limit(1800 if SANITIZED else 1000)
def test_a_proxy_killed_in_mid_copy_keeps_what_was_synced_and_goes_on(kernel, move, tmp_path):
    """The kernel does not wait for the proxy to come back, but for a request, now
    and then, until its time is over: the file system gets errors, and is
    mounted anew."""
    kernel.may_complain = True
    move.link.speed = LINK_SPEED / 4        # so that the copy is far from its end then
    files = kernel.start(USE_DISK, PORT=move.start_proxy(), OPTIONS="-t 5")
    files.wait_for("file 3", PATIENCE)
    bgctl("--cache-all2", move.control)
    wait_for_files(files, 1)
    before = query(move.control)
    assert before["copy"] == "running"
    move.proxy.kill()
    move.link.speed = 8 * LINK_SPEED
    files.wait(PATIENCE, check=False)
    kernel.run("cleanup")

    kernel.run("attach $DEV debian -t 300; mount $DEV $MNT", PORT=move.start_proxy())
    assert int(query(move.control)["cached-blocks"]) >= int(before["cached-blocks"])
    bgctl("--cache-all", move.control)
    move.switch()
    kernel.run(READ_ALL + "umount $MNT; detach $DEV debian", PATIENCE)
    move.end()
    assert numbered_part_of(move.image) == numbered_part()
    last = turns(files)     # which was synced; the next one may be there in part, in another slot
    check_files(move.image, kernel.tree, range(max(1, last - 18), last + 1), tmp_path / "files")
