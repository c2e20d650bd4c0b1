#!/usr/bin/python3
"""Measures xnbd-server beside other NBD servers; `make bench` runs it.

Every round runs every workload on every server, one after the other (A B C D, D C B A, ...), each time on a
freshly started server, so that what the machine does meanwhile, and what one leaves to the next, hits all of
them alike. What is shown is the median of the rounds; "spread" is (highest - lowest) / median, and says how
much a difference is worth. Server CPU is user + system time of the server's processes, read from /proc before
and after a run; "client" is the load generator's (tests/load), "others" is what the rest of the machine took,
in CPUs. "vs peer" is the rate divided by that of the best peer on the same line. "limit" is a server that
touches no disk: it answers all that has come by one send, out of one buffer, which is what sockets cost at
least. "store" is the same, with one pwrite() of what each request brings, and knows nothing of blocks, bits or
errors: what a server costs that keeps what is written.

The proxies' origin is nbdkit for all of them: a peer's program, so that nobody plays at home, and one that can
answer late (its delay filter sleeps in a thread for each request: with 512 threads a connection, the delay does not
bound the rate of whoever keeps enough in flight). The line "origin" reads it directly; "relay" passes the bytes on
and stores them, without knowing what they are: what a proxy must do at least. A copy counts each 256 KiB
as a request; its CPU is that of the copying program and, for xnbd-bgctl, of the proxy. What was copied is compared.
"""
import argparse
import contextlib
import ctypes
import fcntl
import filecmp
import fnmatch
import glob
import json
import mmap
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
LOAD = os.path.join(HERE, "load")
TICK = os.sysconf("SC_CLK_TCK")
LIBC = ctypes.CDLL(None, use_errno=True)
PREFIX = "xnbd-bench-"

# Where an image lies. A file system in memory lacks RWF_NOWAIT, so reads use a real file in the page cache;
# writes use memory, or the disk's writeback would be measured.
PLACES = {
    "memory": ("/dev/shm", "in memory (%s)"),
    "cached": ("/var/tmp", "on disk, all of it in the page cache (%s)"),
    "cold": ("/var/tmp", "on disk, page cache dropped before each run (%s)"),
}

# {listen} is the server's own tcp or unix words; {scratch} is a directory of this run, beside the image; {origin} is
# the HOST:PORT of a proxy's origin. "before" is run first, "copier" is what copies all of the origin.
PEERS = {
    "nbdkit": {
        "version": "nbdkit --version",
        "target": "nbdkit -f {listen} file {image}",
        "cow": "nbdkit -f {listen} --filter=cow file {image}",
        "proxy": "nbdkit -f {listen} --filter=cow nbd uri=nbd://{origin} cow-on-read=true",
        "tcp": "-i 127.0.0.1 -p {port}", "unix": "-U {socket}",
    },
    "qemu-nbd": {
        "version": "qemu-nbd --version",
        "target": "qemu-nbd -f raw --cache=writeback -e 16 -t {listen} {image}",
        "cow": "qemu-nbd -f raw --cache=writeback -e 16 -t --snapshot {listen} {image}",
        "before": "qemu-img create -q -f qcow2 -b nbd://{origin} -F raw {scratch}/overlay",
        "proxy": "qemu-nbd --cache=writeback -e 16 -t {listen} --image-opts driver=copy-on-read,file.driver=qcow2,"
                 "file.file.driver=file,file.file.filename={scratch}/overlay",
        "tcp": "-b 127.0.0.1 -p {port}", "unix": "-k {socket}",
    },
    "nbd-server": {
        "version": "nbd-server -V",
        "target": "nbd-server -C {scratch}/config -p {scratch}/pid",
        "cow": "nbd-server -C {scratch}/config -p {scratch}/pid",
        "tcp": "listenaddr = 127.0.0.1\nport = {port}", "unix": "unixsock = {socket}",
        "config": "[generic]\n{listen}\n[bench]\nexportname = {image}\ncowdir = {scratch}\n"
                  "flush = true\nfua = true\ncopyonwrite = {cow}\n",
        "export": "bench",
        "daemon": True,     # in the foreground it would serve one connection and end
    },
    "nbdcopy": {
        "version": "nbdcopy --version",
        "copier": "nbdcopy nbd://{origin} {scratch}/cache",
    },
}
OURS = {
    "version": "{path} --version",
    "target": "{path} --target {listen} {image}",
    "cow": "{path} --cow-target {listen} {image}",
    "proxy": "{path} --proxy {listen} {ohost} {oport} {scratch}/cache {scratch}/bitmap {scratch}/control",
    "copier": "{bgctl} --cache-all {scratch}/control",
    "query": "{bgctl} --query {scratch}/control",
    "tcp": "--laddr 127.0.0.1 --lport {port}", "unix": "--unix {socket}",
}
ORIGIN = {
    "tcp": PEERS["nbdkit"]["tcp"],
    "plain": "nbdkit -f {listen} file {image}",
    "delay": "nbdkit -f {listen} -t 512 --filter=delay file {image} rdelay={delay}ms delay-extents={delay}ms",
    "large": "nbdkit -f {listen} pattern 64G",      # more than anyone reads: data that take no room
}
# What is measured besides, where a row's "versus" names it: the origin itself, without a proxy; a relay that does
# nothing but pass on what comes and store it, which no proxy that stores what it reads can do without; and the limit.
RELAY = {
    "tcp": "{port}",
    "proxy": LOAD + " --relay {listen} --store {scratch}/cache {origin}",
}
NULL = {
    "tcp": "{port}",
    **dict.fromkeys(("target", "cow"), LOAD + " --null {listen} --size {size} --block-size {bs}"),
}
STORE = {
    "tcp": "{port}",
    "target": NULL["target"] + " --store {image}",
    "cow": NULL["cow"] + " --store {scratch}/store",
}
BESIDE = {"origin": ORIGIN, "relay": RELAY, "limit": NULL, "store": STORE}
MODE_OPTION = {"target": "--target", "cow": "--cow-target", "proxy": "--proxy"}

# One row, one workload. goal: the least ratio to the best peer; versus: (peer, the least ratio to that one); own:
# (other row, the least ratio of ours to ours there); p50_own: (other row, the most); prep: loads to run first,
# unmeasured; pattern "once" ends early when each block was touched; passes: how often over the disk, not how long.
# Proxies: origin, delay: a line of ORIGIN; copy: measure the copying, not the load; during: a copy goes on meanwhile.
# images: the image is so many times --image-size large (the first second of a slow copy should not be all of it).
DEFAULTS = {"mode": "target", "net": "tcp", "place": "cached", "images": 1, "conns": 1, "depth": 64, "bs": 4096,
            "size": 0, "pattern": "random", "read": 100, "flush": 0, "passes": 0, "goal": None, "own": None,
            "versus": (("limit", None),), "p99": None, "p50_own": None, "prep": (), "origin": None, "delay": 0,
            "copy": False, "during": False, "peers": True}
WRITES = (("limit", None), ("store", None))
PROXY = {"mode": "proxy", "place": "memory", "origin": "plain", "versus": ()}
COPY = dict(PROXY, origin="delay", copy=True, bs=262144, images=4, goal=1.0)
WHOLE = {"pattern": "sequential", "bs": 262144, "depth": 16, "passes": 1}
ROWS = [dict(DEFAULTS, **row) for row in (
    {"name": "read-1", "text": "4 KiB random reads, 1 in flight", "depth": 1, "goal": 1.3},
    {"name": "read-64", "text": "4 KiB random reads, 64 in flight", "goal": 2.2},
    {"name": "write-64", "text": "4 KiB random writes, 64 in flight", "read": 0, "place": "memory",
     "versus": WRITES, "goal": 2.2},
    {"name": "read-4x32", "text": "4 KiB random reads, 4 connections x 32", "conns": 4, "depth": 32, "goal": 4.0},
    {"name": "write-4x32", "text": "4 KiB random writes, 4 connections x 32", "conns": 4, "depth": 32, "read": 0,
     "place": "memory", "versus": WRITES, "goal": 3.0},
    {"name": "seq-read", "text": "256 KiB sequential reads, 16 in flight", "pattern": "sequential", "bs": 262144,
     "depth": 16, "goal": 1.6},
    {"name": "seq-write", "text": "256 KiB sequential writes, 16 in flight", "pattern": "sequential", "bs": 262144,
     "depth": 16, "read": 0, "place": "memory", "versus": WRITES, "goal": 1.3},
    {"name": "mixed", "text": "4 KiB random, 70 % reads, FLUSH every 100, 64 in flight", "read": 70, "flush": 100,
     "place": "memory", "goal": 1.5},
    {"name": "cold-read", "text": "4 KiB random reads, 32 in flight, not in the page cache", "depth": 32,
     "place": "cold", "pattern": "once", "versus": (), "goal": 1.0, "p99": "nbdkit"},
    {"name": "unix-read", "text": "4 KiB random reads, 64 in flight, Unix socket", "net": "unix",
     "versus": (), "own": ("read-64", 1.0)},
    {"name": "cow-read", "text": "copy-on-write: 4 KiB random reads, 64 in flight", "mode": "cow", "goal": 5.0,
     "own": ("read-64", 0.85)},
    {"name": "cow-first", "text": "copy-on-write: first 4 KiB writes to blocks, 64 in flight", "mode": "cow",
     "read": 0, "place": "memory", "pattern": "once", "own": ("write-64", 0.5)},
    {"name": "cow-second", "text": "copy-on-write: further 4 KiB random writes, 64 in flight", "mode": "cow",
     "read": 0, "place": "memory", "size": 64 << 20, "prep": ({"pattern": "once"},), "versus": WRITES, "goal": 10.0,
     "own": ("write-64", 0.85)},
    dict(PROXY, name="proxy-read", text="proxy, all present: 4 KiB random reads, 64 in flight", place="cached",
         prep=(WHOLE,), own=("read-64", 0.9)),
    dict({**PROXY, **WHOLE}, name="proxy-cold", text="proxy, nothing present: 256 KiB sequential reads, 16 in flight",
         versus=(("origin", 0.8), ("nbdkit", 4.0), ("relay", None))),
    dict(COPY, name="copy-0", text="copy all of a disk to a file"),
    dict(COPY, name="copy-20", text="the same, the origin answers after 20 ms", delay=20, own=("copy-0", 0.85)),
    dict(COPY, name="copy-100", text="the same, the origin answers after 100 ms", delay=100, own=("copy-0", 0.85)),
    dict(PROXY, name="proxy-hit", text="proxy, 64 MiB present: 4 KiB random reads of these, 64 in flight",
         origin="large", size=64 << 20, prep=(WHOLE,), peers=False),
    dict(PROXY, name="proxy-hit-c", text="the same, while all is copied", origin="large", size=64 << 20,
         prep=(WHOLE,), during=True, own=("proxy-hit", 0.5), peers=False),
    dict(PROXY, name="proxy-miss", text="proxy, nothing present: 4 KiB random reads, 1 in flight", origin="large",
         pattern="once", depth=1, versus=(("origin", None),)),
    dict(PROXY, name="proxy-miss-c", text="the same, while all is copied", origin="large", pattern="once", depth=1,
         during=True, p50_own=("proxy-miss", 3.0), peers=False),
)]


class Failed(Exception):
    """A server did not start, or did not stand the load."""


# ---- processes and their CPU ----

def die_with_parent():
    """Runs in the child: kill -9 of the bench must not leave servers behind."""
    LIBC.prctl(1, signal.SIGKILL)       # PR_SET_PDEATHSIG


def process_tree(root):
    """{pid: ticks of user and system time, its reaped children's included} of root and its descendants."""
    ticks, parent = {}, {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as f:
            pid, rest = f.read().split(" (", 1)
            fields = rest.rsplit(")", 1)[1].split()
            ticks[int(pid)], parent[int(pid)] = sum(map(int, fields[11:15])), int(fields[1])
    tree = {root}
    while True:
        more = {pid for pid, up in parent.items() if up in tree} - tree
        if not more:
            return {pid: ticks[pid] for pid in tree if pid in ticks}
        tree |= more


def machine_busy():
    with open("/proc/stat") as f:
        n = list(map(int, f.readline().split()[1:9]))
    return (sum(n) - n[3] - n[4]) / TICK


def wait_for_calm(seconds):
    """Until the rest of the machine takes less than a tenth of a CPU, for at most that long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        busy = machine_busy()
        time.sleep(0.3)
        if machine_busy() - busy <= 0.03:
            return


class Running:
    """A server process, from its start to its end. words: what the text in braces of its command stands for."""

    def __init__(self, server, mode, row, words):
        scratch = words["scratch"]
        self.log = "%s/log-%s" % (scratch, mode)
        self.pidfile = scratch + "/pid" if "daemon" in server else None
        with socket.socket() as s:      # a free port
            s.bind(("127.0.0.1", 0))
            tcp, sock = s.getsockname(), "%s/socket-%s" % (scratch, mode)
        self.address, self.target = (sock, "unix:" + sock) if row["net"] == "unix" else (tcp, "%s:%d" % tcp)
        words = dict(words, port=tcp[1], socket=sock, cow="true" if mode == "cow" else "false")
        words["listen"] = server[row["net"]].format(**words)
        with open(scratch + "/config", "w") as f:
            f.write(server.get("config", "").format(**words))
        if mode == "proxy" and "before" in server:
            call(filled(server["before"], words), 0)
        with open(self.log, "w") as log:
            try:
                self.pid = subprocess.Popen(filled(server[mode], words), stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, env=dict(os.environ, TMPDIR=scratch),
                                            start_new_session=True, preexec_fn=die_with_parent).pid
            except OSError as e:
                raise Failed(str(e)) from None
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def wait_ready(self):
        deadline = time.monotonic() + 10
        while not self.greets():
            if self.has_ended() and not self.pidfile or time.monotonic() > deadline:
                raise Failed("did not start: " + self.last_words())
            time.sleep(0.02)
        if self.pidfile:
            with open(self.pidfile) as f:
                self.pid = int(f.read())    # ours since PR_SET_CHILD_SUBREAPER

    def greets(self):
        with socket.socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET) as s:
            s.settimeout(5)
            with contextlib.suppress(OSError):
                s.connect(self.address)
                return s.recv(8) == b"NBDMAGIC"
        return False

    def last_words(self):
        with open(self.log, errors="replace") as f:
            return (f.read().strip().splitlines() or ["(nothing said)"])[-1]

    def has_ended(self, within=0.0):
        deadline = time.monotonic() + within
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.01)
        return True

    def cpu_seconds(self, most=None):
        """And how many processes; waits for those beyond `most` to end, so that all have been counted."""
        deadline = time.monotonic() + 1
        tree = process_tree(self.pid)
        while most and len(tree) > most and time.monotonic() < deadline:
            time.sleep(0.02)
            tree = process_tree(self.pid)
        return sum(tree.values()) / TICK, len(tree)

    def stop(self):
        family = process_tree(self.pid)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            for pid in family if not self.has_ended() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)
            self.has_ended(6)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()


def filled(command, words):
    return shlex.split(command.format(**words))


# ---- images ----

def workspace(place, stack):
    """A directory of this run. Those of runs that were killed, and their servers, are removed first."""
    for old in glob.glob(os.path.join(place, PREFIX + "*")):
        with contextlib.suppress(OSError), lock(old):
            for path in glob.glob("/proc/[0-9]*/cmdline"):
                with contextlib.suppress(OSError), open(path) as f:
                    if old + "/" in f.read():
                        os.kill(int(path.split("/")[2]), signal.SIGKILL)
            shutil.rmtree(old, ignore_errors=True)
    path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
    stack.enter_context(lock(path))
    stack.callback(shutil.rmtree, path, ignore_errors=True)
    return path


@contextlib.contextmanager
def lock(directory):
    """Held by a run that is alive."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


class Images:
    """One image for each place and size, made when it is first needed, shared by the servers, which run one at a
    time."""

    def __init__(self, stack):
        self.stack, self.dirs = stack, {}

    def directory(self, place, size):
        top = PLACES[place][0]
        if (top, size) not in self.dirs:
            if free_bytes(place) < 3 * size:
                sys.exit("bench: %s: less than three times the image's %d MiB is free" % (top, size >> 20))
            self.dirs[top, size] = workspace(top, self.stack)
            image = self.dirs[top, size] + "/image"
            if place == "memory":       # which costs more when a virtual machine is given it for the first time
                subprocess.run([LOAD, "--make-image", image, "--size", str(2 * size)], check=True)
                os.unlink(image)
            subprocess.run([LOAD, "--make-image", image, "--size", str(size)], check=True)
            subprocess.run(["sync", image], check=True)
        return self.dirs[top, size]

    @contextlib.contextmanager
    def ready(self, place, size):
        """The image, in or out of the page cache, and a directory beside it for one run."""
        top = self.directory(place, size)
        prepare_cache(top + "/image", place)
        with tempfile.TemporaryDirectory(dir=top) as scratch:
            yield top + "/image", scratch


def free_bytes(place):
    free = shutil.disk_usage(PLACES[place][0]).free
    if place == "memory":
        with open("/proc/meminfo") as f:
            free = min(free, int(re.search(r"MemAvailable:\s+(\d+)", f.read()).group(1)) << 10)
    return free


def prepare_cache(path, place):
    with open(path, "r+b", buffering=0) as f:
        while place == "cached" and f.read(1 << 22):
            pass
        for _ in range(5 if place == "cold" else 0):
            os.fsync(f)
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if resident(f) < 0.01:
                return
            if os.geteuid() == 0:
                with open("/proc/sys/vm/drop_caches", "w") as drop:
                    drop.write("1\n")
    if place == "cold":
        raise Failed("the page cache could not be dropped")


def resident(f):
    """The part of a file that is in the page cache."""
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as m:
        start = ctypes.c_char.from_buffer(m)
        pages = (ctypes.c_ubyte * (len(m) // mmap.PAGESIZE))()
        LIBC.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(m)), pages)
        del start
        return sum(b & 1 for b in pages) / len(pages)


def file_system(path):
    with open("/proc/mounts") as f:
        mounts = [line.split()[1:3] for line in f]
    return max((m for m in mounts if (path + "/").startswith(m[0].rstrip("/") + "/")), key=lambda m: len(m[0]))[1]


# ---- one run ----

def call(argv, seconds):
    try:
        return subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=seconds + 90,
                              preexec_fn=die_with_parent)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Failed(str(e)) from None


def load(row, export, target, seconds):
    end = ["--count", row["passes"] * row["size"] // row["bs"]] if row["passes"] else ["--seconds", seconds]
    done = call([LOAD, "--connections", row["conns"], "--depth", row["depth"], "--block-size", row["bs"],
                 "--pattern", row["pattern"], "--read-percent", row["read"], "--flush-every", row["flush"],
                 "--size", row["size"], *end, "--export", export, target], seconds)
    if not done.stdout:
        raise Failed(done.stderr.strip() or "the load ended with status %d" % done.returncode)
    result = json.loads(done.stdout)
    failed = result.pop("failed") or (not result["requests"] and "no request was answered")
    if failed:
        raise Failed("%s (%d errors)" % (failed, result["errors"]))
    return result


def fio(row, export, target, seconds):
    uri = "nbd+unix:///%s?socket=%s" % (export, target[5:]) if row["net"] == "unix" else \
        "nbd://%s/%s" % (target, export)
    kind = ("rand" if row["pattern"] == "random" else "") + {0: "write", 100: "read"}.get(row["read"], "rw")
    done = call(["fio", "--name=bench", "--ioengine=nbd", "--uri=" + uri, "--bs=%d" % row["bs"], "--thread",
                 "--rw=" + kind, "--iodepth=%d" % row["depth"], "--numjobs=%d" % row["conns"], "--time_based",
                 "--runtime=%g" % seconds, "--group_reporting", "--norandommap", "--fsync=%d" % row["flush"],
                 "--rwmixread=%d" % row["read"], "--output-format=json"], seconds)
    if done.returncode:
        raise Failed("fio: " + (done.stderr.strip().splitlines() or ["failed"])[-1])
    job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    return {"fio_req_s": job["read"]["iops"] + job["write"]["iops"]}


def warm_memory(size):
    """A virtual machine gives its host back what nobody uses; who is the first to use it again would pay for all."""
    with contextlib.suppress(OSError), mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS |
                                                 mmap.MAP_POPULATE):
        pass


def measure(name, server, row, images, opts, tool):
    with contextlib.ExitStack() as stack:
        image, scratch = stack.enter_context(images.ready(row["place"], row["image"]))
        if row["place"] == "memory":
            warm_memory(row["image"])
        words = {"path": server.get("path"), "bgctl": server.get("bgctl"), "image": image, "scratch": scratch,
                 "delay": row["delay"], "size": row["image"], "bs": row["bs"]}
        running = origin = None
        if row["origin"]:
            running = origin = stack.enter_context(Running(ORIGIN, row["origin"], row, words))
            words["origin"], (words["ohost"], words["oport"]) = origin.target, origin.address
        if name != "origin" and row["mode"] in server:
            running = stack.enter_context(Running(server, row["mode"], row, words))
        if row["copy"]:
            result = measure_copy(server, row, running, words, opts)
        else:
            result = measure_load(server, row, running, origin, words, opts, tool)
        for r in {running, origin} - {None}:
            if r.has_ended():
                raise Failed("a server ended: " + r.last_words())
        return result


def measure_load(server, row, running, origin, words, opts, tool):
    export = server.get("export", "")
    for prep in row["prep"]:
        load(dict(row, **prep), export, running.target, 60)
    if row["prep"]:
        subprocess.run(["sync", "-f", words["scratch"]], check=True)
    wait_for_calm(opts.calm)
    with copying(server, words) if row["during"] else contextlib.nullcontext({}) as copied:
        feeding = origin if origin is not running else None
        busy, (before, processes), before_feeding = machine_busy(), running.cpu_seconds(), cpu_of(feeding)
        result = tool(row, export, running.target, opts.seconds)
        if tool is load:
            busy = machine_busy() - busy
            add_cpu(result, running.cpu_seconds(processes)[0] - before, cpu_of(feeding) - before_feeding, busy)
    result.update(copied)
    return result


def cpu_of(running):
    return running.cpu_seconds()[0] if running else 0


def add_cpu(result, server, origin, machine):
    """CPU seconds that each has used: for each request, and what is left for the rest of the machine."""
    requests = result["requests"]
    result["server_cpu_us"] = server * 1e6 / requests
    if origin:
        result["origin_cpu_us"] = origin * 1e6 / requests
    known = server + origin + result["client_cpu_us"] * requests / 1e6
    result["others"] = max(0.0, machine - known) / result["seconds"]


@contextlib.contextmanager
def copying(server, words):
    """Copies in the background; its rate is in the result at the end."""
    result = {}
    with subprocess.Popen(filled(server["copier"], words), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          preexec_fn=die_with_parent) as copier:
        try:
            began, before = time.monotonic(), cached_bytes(server, words)
            while cached_bytes(server, words) == before and time.monotonic() < began + 10:
                time.sleep(0.02)
            began, before = time.monotonic(), cached_bytes(server, words)
            yield result
            result["copy_mib_s"] = (cached_bytes(server, words) - before) / (time.monotonic() - began) / (1 << 20)
            if copier.poll() is not None:
                raise Failed("the copy ended before the load")
        finally:
            copier.terminate()


def cached_bytes(server, words):
    found = re.search(r"^cached-blocks: (\d+)", call(filled(server["query"], words), 0).stdout, re.M)
    if not found:
        raise Failed("the proxy does not tell how much it has")
    return int(found.group(1)) * 4096


def measure_copy(server, row, running, words, opts):
    wait_for_calm(opts.calm)
    before, began = copy_cpu(running), time.monotonic()
    done = call(filled(server["copier"], words), 60)
    seconds = time.monotonic() - began
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["the copy failed"])[-1])
    if not filecmp.cmp(words["image"], words["scratch"] + "/cache", shallow=False):
        raise Failed("the copy differs")
    size = os.path.getsize(words["image"])
    requests = size / row["bs"]
    return {"seconds": seconds, "requests": requests, "req_s": requests / seconds,
            "mib_s": size / seconds / (1 << 20), "server_cpu_us": (copy_cpu(running) - before) * 1e6 / requests}


def copy_cpu(running):
    """Of the program that copies, and of the proxy that does it for it."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime + cpu_of(running)


def run_all(opts, rows, servers, images, runs):
    """Appends to runs, so that what was measured survives an interruption."""
    for turn in range(opts.rounds * len(rows)):
        round_, row = turn // len(rows), rows[turn % len(rows)]
        tools = [load] + [fio] * (opts.fio and row["pattern"] != "once" and not row["prep"] and not row["origin"])
        takers = contenders(row, servers)
        order = list(takers)[::-1 if round_ % 2 else 1]
        for name, tool in [(n, t) for t in tools for n in order]:
            run = {"round": round_, "workload": row["name"], "server": name}
            try:
                run.update(measure(name, takers[name], row, images, opts, tool))
            except Failed as e:
                run["failed"] = str(e)
            runs.append(run)
            said = run.get("failed") or "%.0f req/s" % (run["req_s"] if tool is load else run["fio_req_s"])
            how = "copy" if row["copy"] else tool.__name__
            print("round %d/%d  %-12s %-12s %-4s %s" % (round_ + 1, opts.rounds, row["name"], name, how, said),
                  file=sys.stderr)


def contenders(row, servers):
    """Those of the servers that take part in a row, and what they are compared with besides."""
    def takes_part(server):
        if "path" in server:
            return row["mode"] in server["modes"]
        return row["peers"] and ("copier" if row["copy"] else row["mode"]) in server

    beside = {n: BESIDE[n] for n, _ in row["versus"] if n in BESIDE}
    return {**{n: s for n, s in servers.items() if takes_part(s)}, **beside}


# ---- results ----

class Results:
    def __init__(self, runs):
        self.runs = {}
        for run in runs:
            self.runs.setdefault((run["workload"], run["server"]), []).append(run)

    def all(self, workload, server, figure):
        return {r["round"]: r[figure] for r in self.runs.get((workload, server), ()) if figure in r}

    def median(self, workload, server, figure="req_s"):
        values = self.all(workload, server, figure).values()
        return statistics.median(values) if values else None

    def spread(self, *key):
        values = self.all(*key, "req_s").values()
        return (max(values) - min(values)) / statistics.median(values)

    def ratio(self, mine, other, figure="req_s"):
        a, b = self.median(*mine, figure), self.median(*other, figure)
        return a / b if a and b else None

    def by_round(self, mine, other, figure="req_s"):
        """Two servers on one workload, compared within each round: the median of the ratios, lowest, highest."""
        a, b = self.all(*mine, figure), self.all(*other, figure)
        ratios = [a[r] / b[r] for r in a if b.get(r)]
        return [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None

    def best_peer(self, workload):
        return max((p for p in PEERS if self.median(workload, p)), key=lambda p: self.median(workload, p),
                   default=None)


COLUMNS = (("req/s", "req_s", "%.0f"), ("MiB/s", "mib_s", "%.1f"), ("p50 us", "p50_us", "%.1f"),
           ("p99 us", "p99_us", "%.1f"), ("CPU us/rq", "server_cpu_us", "%.2f"),
           ("client us", "client_cpu_us", "%.2f"), ("origin us", "origin_cpu_us", "%.2f"),
           ("others", "others", "%.2f"), ("fio req/s", "fio_req_s", "%.0f"), ("copy MiB/s", "copy_mib_s", "%.1f"))


def print_row(row, servers, results, out):
    where, what = PLACES[row["place"]]
    print("\n%s: %s\n  image of %d MiB %s; %s" % (
        row["name"], row["text"], row["image"] >> 20, what % ("%s, %s" % (where, file_system(where))),
        "Unix socket" if row["net"] == "unix" else "loopback TCP"), file=out)
    takers = contenders(row, servers)
    columns = [c for c in COLUMNS if any(results.median(row["name"], name, c[1]) is not None for name in takers)]
    print("  %-12s" % "server" + "".join("%11s" % c[0] for c in columns) + "  spread vs peer", file=out)
    for name in [n for n in servers if "path" in servers[n] and n not in takers]:
        print("  %-12s left out: no %s" % (name, MODE_OPTION[row["mode"]]), file=out)
    for name in takers:
        key = row["name"], name
        if results.median(*key):
            ratio = results.ratio(key, (row["name"], results.best_peer(row["name"])))
            figures = [(form, results.median(*key, figure)) for _, figure, form in columns]
            print("  %-12s" % name + "".join("%11s" % ("-" if v is None else form % v) for form, v in figures) +
                  "%7.0f%%" % (results.spread(*key) * 100) + ("%8.2f" % ratio if ratio else ""), file=out)
        for reason in sorted({r["failed"] for r in results.runs.get(key, ()) if "failed" in r}):
            print("  %-12s FAILED: %s" % (name, reason), file=out)


def summarize(row, name, first, results):
    """The ratios of one of our servers on one workload, and what they should be."""
    key, peer = (row["name"], name), results.best_peer(row["name"])
    line = {"workload": row["name"], "server": name, "peer": peer, "goal": row["goal"],
            "ratio": results.ratio(key, (row["name"], peer)),
            "possible": results.ratio((row["name"], "limit"), (row["name"], peer)),
            "cpu_ratio": results.ratio(key, (row["name"], peer), "server_cpu_us")}
    if row["p99"]:
        line["p99_peer"] = row["p99"]
        line["p99_ratio"] = results.ratio(key, (row["name"], row["p99"]), "p99_us")
    if row["versus"]:
        line["versus"] = [(p, results.ratio(key, (row["name"], p)), goal) for p, goal in row["versus"]]
    if row["p50_own"]:
        line["p50_own"], line["p50_own_goal"] = row["p50_own"]
        line["p50_own_ratio"] = results.ratio(key, (row["p50_own"][0], name), "p50_us")
    if row["own"]:
        line["own"], line["own_goal"] = row["own"]
        line["own_ratio"] = results.ratio(key, (row["own"][0], name))
    if name != first:
        line["to_first"] = results.by_round(key, (row["name"], first))
        line["cpu_to_first"] = results.by_round(key, (row["name"], first), "server_cpu_us")
    return line


def verdict(ratio, goal, possible=None):
    if not goal or ratio >= goal:
        return "%.2f" % ratio + (" (met %.2f)" % goal if goal else "")
    return "%.2f (SHORT of %.2f%s)" % (ratio, goal, "; the limit is %.2f" % possible if possible else "")


def print_summary(lines, first, out):
    print("\nratios of ours (rate: more is better; CPU a request: less is better)", file=out)
    for line in lines:
        parts = []
        if line["ratio"]:
            parts.append("%s x %s, CPU %.2f" % (verdict(line["ratio"], line["goal"], line["possible"]),
                                                line["peer"], line["cpu_ratio"] or 0))
        if line.get("p99_ratio"):
            parts.append("p99 %.2f x that of %s (at most 1)" % (line["p99_ratio"], line["p99_peer"]))
        parts += [verdict(ratio, goal) + (" of the limit" if p == "limit" else " x " + p)
                  for p, ratio, goal in line.get("versus", ()) if ratio]
        if line.get("p50_own_ratio"):
            parts.append("median latency %.2f x that of our %s (at most %g)" % (
                line["p50_own_ratio"], line["p50_own"], line["p50_own_goal"]))
        if line.get("own_ratio"):
            parts.append("%s x our %s" % (verdict(line["own_ratio"], line["own_goal"]), line["own"]))
        for figure, label in (("to_first", "rate"), ("cpu_to_first", "CPU")):
            if line.get(figure):
                parts.append("%s %.3f [%.3f to %.3f] x %s" % (label, *line[figure], first))
        print("  %-12s %-8s %s" % (line["workload"], line["server"], "; ".join(parts) or "-"), file=out)


# ---- what it runs on, and the command line ----

def version(command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return None
    return next((s.strip() for s in done.stdout.splitlines() if re.search(r"\d\.\d", s)), "(version unknown)")


def modes_of(path):
    """The modes that --help lists as working."""
    text = subprocess.run([path, "--help"], capture_output=True, text=True).stdout
    return {mode for mode, option in MODE_OPTION.items()
            if re.search(r"^\s+(-\w, )?%s\b(?!.*\bnot in this version\b)" % option, text, re.M)}


def find_servers(opts):
    """{name: how to start it}, ours first; what is missing is named and left out."""
    servers = {}
    for arg in opts.server or ["xnbd=" + os.path.join(os.path.dirname(HERE), "xnbd-server")]:
        name, path = arg.split("=", 1) if "=" in arg else ("xnbd", arg)
        path = os.path.abspath(path)
        if arg != "none" and os.access(path, os.X_OK):
            servers[name] = dict(OURS, path=path, bgctl=os.path.join(os.path.dirname(path), "xnbd-bgctl"),
                                 modes=modes_of(path), version=version([path, "--version"]))
        elif arg != "none":
            print("bench: %s: not there; left out" % path, file=sys.stderr)
    for name, spec in PEERS.items():
        if opts.peers == "all" or name in opts.peers.split(","):
            servers[name] = dict(spec, version=version(spec["version"].split()))
            if not servers[name]["version"]:
                print("bench: %s: not installed; left out" % name, file=sys.stderr)
                del servers[name]
    return servers


def machine():
    with open("/proc/cpuinfo") as f:
        model = re.search(r"model name\s*:\s*(.*)", f.read())
    return {"cpu": model.group(1) if model else platform.machine(), "cores": os.cpu_count(),
            "kernel": platform.release(), "load_average": os.getloadavg()[0],
            "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=2, help="of each run (default 2)")
    p.add_argument("--calm", type=float, default=0, metavar="SECONDS", help="before each run, wait at most that long "
                   "for other programs to be quiet")
    p.add_argument("--workload", action="append", metavar="GLOB", help="only these rows; may be repeated")
    p.add_argument("--server", action="append", metavar="[NAME=]PATH", help="ours; may be repeated, to compare "
                   "builds with the first one in the same run; none: only peers")
    p.add_argument("--peers", default="all", metavar="all|none|NAME,...")
    p.add_argument("--place", choices=("memory", "cached"), help="where the images lie, instead of each row's place")
    p.add_argument("--image-size", type=int, default=1024, metavar="MIB")
    p.add_argument("--fio", action="store_true", help="let fio's nbd engine measure the same as well")
    p.add_argument("--json", metavar="FILE|-", help="all figures; with - the tables go to standard error")
    p.add_argument("--list", action="store_true", help="show the workloads and end")
    opts = p.parse_args()
    rows = [r for r in ROWS if not opts.workload or any(fnmatch.fnmatch(r["name"], g) for g in opts.workload)]
    if not rows or opts.rounds < 1 or opts.seconds <= 0:
        p.error("--rounds and --seconds must be positive" if rows else "no such workload; --list shows them")
    if opts.place:
        rows = [dict(r, place=r["place"] if r["place"] == "cold" else opts.place) for r in rows]
    return opts, rows


def report(opts, rows, servers, host, runs, out):
    ours, results = [s for s in servers if s not in PEERS], Results(runs)
    for row in rows:
        print_row(row, servers, results, out)
    lines = [summarize(row, name, ours[0], results) for row in rows for name in ours
             if row["mode"] in servers[name]["modes"]]
    if lines:
        print_summary(lines, ours[0], out)
    others = [r["others"] for r in runs if "others" in r]
    if others and statistics.median(others) > 0.2:
        print("\nThe machine was not quiet: other programs took %.1f CPUs. Rates tell then who got the processor;"
              "\nthe CPU that a request takes can be compared all the same." % statistics.median(others), file=out)
    if opts.json:
        with contextlib.nullcontext(sys.stdout) if opts.json == "-" else open(opts.json, "w") as f:
            json.dump({"machine": host, "servers": {n: s["version"] for n, s in servers.items()}, "summary": lines,
                       "rounds": opts.rounds, "seconds": opts.seconds, "workloads": rows, "runs": runs}, f, indent=1)
            f.write("\n")


def prepared(row, size):
    """A row with the size of its image: the usual one, if there is no room for a larger."""
    image = size * row["images"]
    if row["images"] > 1 and free_bytes(row["place"]) < 3 * image:
        print("bench: %s: with %d MiB only, there is no room for more" % (row["name"], size >> 20), file=sys.stderr)
        image = size
    return dict(row, image=image, size=row["size"] or (size if row["passes"] or row["prep"] else 0))


def main():
    opts, rows = parse()
    if opts.list:
        print("\n".join("%-12s %s" % (row["name"], row["text"]) for row in rows))
        return 0
    if not os.access(LOAD, os.X_OK):
        sys.exit("bench: %s is not built: make tests/load" % LOAD)
    LIBC.prctl(36, 1, 0, 0, 0)      # PR_SET_CHILD_SUBREAPER
    for sig in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, lambda n, frame: sys.exit(128 + n))
    out = sys.stderr if opts.json == "-" else sys.stdout
    servers, host, runs = find_servers(opts), machine(), []
    ours = [s["modes"] for s in servers.values() if "path" in s] or [set(MODE_OPTION)]
    for row in [r for r in rows if r["mode"] not in set().union(*ours)]:
        print("bench: %s: skipped until %s works" % (row["name"], MODE_OPTION[row["mode"]]), file=sys.stderr)
        rows.remove(row)
    rows = [prepared(row, opts.image_size << 20) for row in rows]
    print("%(cpu)s, %(cores)d cores, %(memory_mib)d MiB, Linux %(kernel)s, load average %(load_average).2f; "
          "%(started)s" % host, file=out)
    for name, server in servers.items():
        print("  %-12s %s%s" % (name, server["version"], ", " + server["path"] if "path" in server else ""), file=out)
    print("%d rounds of %g s" % (opts.rounds, opts.seconds), file=out, flush=True)
    with contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        run_all(opts, rows, servers, Images(stack), runs)
    report(opts, rows, servers, host, runs, out)
    return 1 if not runs or any("failed" in r for r in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
