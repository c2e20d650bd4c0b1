#!/usr/bin/python3
"""Measures what xnbd-server takes besides time: memory, size, the processor at rest; and how cost grows with the
number of connections and with the size of a proxy's disk. `make footprint` runs it, and `make bench` behind the rates.

Memory is what /proc/PID/smaps_rollup calls Rss; "peak" is the most so far, VmHWM. "static" is a build with a static
musl libc. Disks that need no data are sparse files in /dev/shm, where a file may be of any size; bitmaps, and images
whose lines say so, are on a real disk.
"""
import argparse
import contextlib
import fcntl
import fnmatch
import glob
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import bench
import nbd

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
MODES = ("target", "cow", "proxy")
F_SETPIPE_SZ = 1031


# ---- a server ----

class Server:
    """A running one; start_ms is the time until it said that it listens."""

    def __init__(self, path, *arguments):
        out, into = os.pipe()
        fcntl.fcntl(into, F_SETPIPE_SZ, MIB)    # room for all that it will log
        began = time.monotonic()
        self.proc = subprocess.Popen([path, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=into, stderr=into)
        os.close(into)
        self.pipe, said = open(out, "rb", buffering=0), b""
        while not (found := re.search(rb"listening on (.*)\n", said)):
            more = self.pipe.read(4096)
            if not more:
                raise bench.Failed("did not start: " + said.decode(errors="replace").strip())
            said += more
        self.start_ms = (time.monotonic() - began) * 1000
        self.target = found.group(1).decode()
        host, _, port = self.target.rpartition(":")
        self.address = port if host == "unix" else (host, int(port))

    def proc_file(self, name):
        with open("/proc/%d/%s" % (self.proc.pid, name)) as f:
            return f.read()

    def number(self, name, field):
        return int(re.search(r"^%s:\s+(\d+)" % field, self.proc_file(name), re.M).group(1))

    def rss(self):
        with contextlib.suppress(OSError):
            return self.number("smaps_rollup", "Rss") * KIB
        return self.number("status", "VmRSS") * KIB

    def peak(self):
        return self.number("status", "VmHWM") * KIB

    def ticks(self):
        return sum(map(int, self.proc_file("stat").rpartition(")")[2].split()[11:13]))

    def wake_ups(self):
        """How often its threads went to sleep: each time, something had woken them."""
        count = 0
        for path in glob.glob("/proc/%d/task/*/status" % self.proc.pid):
            with contextlib.suppress(OSError), open(path) as f:
                count += int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", f.read(), re.M).group(1))
        return count

    def client(self):
        return nbd.Client(self.address).negotiate()

    def load(self, **options):
        words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
        done = bench.call([bench.LOAD, *words, self.target], options.get("seconds", 0))
        result = json.loads(done.stdout) if done.stdout else {"failed": done.stderr.strip()}
        if result["failed"]:
            raise bench.Failed("the load failed: " + result["failed"])
        return result

    def stop(self):
        self.proc.terminate()
        try:
            self.proc.wait(10)
        except subprocess.TimeoutExpired:
            self.proc.kill()
            self.proc.wait()
        self.pipe.close()


class Site:
    """Where servers and their files are, for one line of the table."""

    def __init__(self, opts, stack):
        self.opts, self.stack, self.count = opts, stack, 0
        self.memory, self.disk = [stack.enter_context(tempfile.TemporaryDirectory(prefix=bench.PREFIX, dir=top))
                                  for top in ("/dev/shm", "/var/tmp")]

    def path(self, name, place=None):
        self.count += 1
        return "%s/%s%d" % (place or self.memory, name, self.count)

    def image(self, size, place=None):
        """A sparse one."""
        path = self.path("image", place)
        with open(path, "wb") as f:
            f.truncate(size)
        return path

    def full_image(self, size, place=None):
        path = self.path("image", place)
        subprocess.run([bench.LOAD, "--make-image", path, "--size", str(size)], check=True)
        return path

    def run(self, *arguments, path=None):
        server = Server(path or self.opts.server, *arguments)
        self.stack.callback(server.stop)
        return server

    def origin(self, image):
        return self.run("--target", "--unix", self.path("origin"), image)

    def start(self, mode, image, path=None, place=None, files=None):
        where = ["--laddr", "127.0.0.1", "--lport", "0"]
        if mode == "target":
            return self.run("--target", *where, image, path=path)
        if mode == "cow":
            return self.run("--cow-target", *where, "--cow-dir", place or self.memory, image, path=path)
        files = files or self.files(place)
        server = self.run("--proxy", *where, "unix:" + self.origin(image).address, *files, path=path)
        server.control = files[2]
        return server

    def files(self, place=None):
        """A proxy's: its image, bitmap and control socket."""
        return self.path("cache", place), self.path("bitmap", self.disk), self.path("control")


# ---- what is measured: each yields (what, value, unit, the least value that is too much or None) ----

def idle(site):
    for build, path, bound in ("dynamic", site.opts.server, 2 * MIB), ("static", site.opts.static, MIB):
        for mode in MODES if path else ():
            server = site.start(mode, site.image(GIB), path)
            time.sleep(0.5)     # a proxy makes its second connection
            yield "idle, %s, %s" % (mode, build), server.rss(), "MiB", bound


def crowd(site):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard >= 0 else 4096, hard))
    for mode in MODES:
        server = site.start(mode, site.image(GIB))
        server.client().disc()
        before = server.rss()
        clients = [server.client() for _ in range(1000)]
        yield "1000 idle connections, %s" % mode, server.rss() - before, "MiB", 8 * MIB
        for client in clients:
            client.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def writers(site):
    for mode, place in [("target", site.memory)] + [(mode, site.disk) for mode in MODES]:
        server = site.start(mode, site.image(GIB, place), place=place)
        server.load(connections=16, depth=64, block_size="1M", read_percent=0, seconds=site.opts.seconds)
        yield "16 clients, 64 x 1 MiB writes, %s %s, peak" % (
            mode, "in memory" if place == site.memory else "on disk"), server.peak(), "MiB", 64 * MIB


def whole(site):
    size = 4 * GIB if bench.free_bytes("memory") > 6 * GIB else GIB
    image = site.full_image(size)
    for bs in "256K", "4K":
        server = site.start("target", image)
        server.load(depth=16, block_size=bs, pattern="sequential", count=size // KIB // int(bs[:-1]))
        yield "all of %d GiB was read, %siB at a time" % (size // GIB, bs), server.rss(), "MiB", 64 * MIB
        yield "    peak", server.peak(), "MiB", 64 * MIB


def binary(site):
    if site.opts.static:
        stripped = site.path("stripped")
        subprocess.run(["strip", "-o", stripped, site.opts.static], check=True)
        yield "static program, stripped", os.path.getsize(stripped), "KiB", 200 * KIB


def start(site):
    image = site.image(GIB)
    for build, path in ("dynamic", site.opts.server), ("static", site.opts.static):
        for mode in MODES if path else ():
            times, files = [], site.files()
            for _ in range(50):
                with contextlib.ExitStack() as stack:
                    once = Site.__new__(Site)
                    vars(once).update(vars(site), stack=stack)
                    times.append(once.start(mode, image, path, files=files).start_ms)
            yield "start to listening, %s, %s, median of 50" % (mode, build), statistics.median(times), "ms", 5


def rest(site):
    """All modes at once, with an idle client each that has read, written and flushed."""
    servers = {mode: site.start(mode, site.image(GIB)) for mode in MODES}
    clients = [server.client() for server in servers.values()]
    for client in clients:
        client.pread(MIB)
        client.pwrite(b"x" * 5000, 777)
        client.flush()
    time.sleep(3)               # what is done later, and once, is done
    before = {mode: (server.ticks(), server.wake_ups()) for mode, server in servers.items()}
    time.sleep(site.opts.rest)
    for mode, server in servers.items():
        ticks, wake_ups = server.ticks() - before[mode][0], server.wake_ups() - before[mode][1]
        yield "at rest for %g s, %s, CPU" % (site.opts.rest, mode), ticks * 1000 / bench.TICK, "ms", 1
        yield "    wake-ups", wake_ups, "", 1
    for client in clients:
        client.close()


def connections(site):
    image = site.full_image(256 * MIB)
    for count in 1, 4, 16, 64, 256:
        server = site.start("target", image)
        server.client().disc()
        before = server.ticks()
        done = server.load(connections=count, depth=4, seconds=site.opts.seconds)
        cpu = (server.ticks() - before) / bench.TICK
        yield "%d connections, 4 KiB reads, 4 in flight on each" % count, done["req_s"], "req/s", None
        yield "    CPU for each request", cpu * 1e6 / done["requests"], "us", None
        yield "    memory, peak", server.peak(), "MiB", None


def ask(control, line):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(control)
        s.sendall(line + b"\n")
        said = b""
        while not said.endswith(b"ok\n"):
            said += s.recv(4096)


def timed(work, *arguments):
    began = time.monotonic()
    work(*arguments)
    return (time.monotonic() - began) * 1000


def commit(client, n):
    client.pwrite(b"x" * 4096, n * 40960)
    client.flush()


def disks(site):
    for size, name in (GIB, "1 GiB"), (TIB, "1 TiB"), (16 * TIB, "16 TiB"):
        image, files = site.image(size), site.files()
        first = site.start("proxy", image, files=files)
        yield "proxy of %s, first start" % name, first.start_ms, "ms", None
        first.stop()
        server = site.start("proxy", image, files=files)
        yield "    start with a bitmap", server.start_ms, "ms", None
        yield "    memory", server.rss(), "MiB", None
        yield "    query", statistics.median(timed(ask, server.control, b"query") for _ in range(21)), "ms", None
        with server.client() as client:
            commit(client, 0)
            before = server.number("io", "wchar")
            times = [timed(commit, client, n) for n in range(1, 22)]
            written = (server.number("io", "wchar") - before) / len(times)
        yield "    a 4 KiB write and a FLUSH", statistics.median(times), "ms", None
        yield "    bytes written then, to all files and sockets", written, "KiB", 16 * KIB
        server.stop()
        os.unlink(files[1])


LINES = {f.__name__: f for f in (idle, crowd, writers, whole, binary, start, rest, connections, disks)}
UNITS = {"KiB": KIB, "MiB": MIB}


# ---- the table and the command line ----

def show(what, value, unit, bound, out):
    shown = [v / UNITS.get(unit, 1) for v in (value, bound) if v is not None]
    verdict = "" if bound is None else "   below %g: %s" % (shown[1], "met" if value < bound else "SHORT")
    digits = 0 if shown[0] >= 1000 or shown[0] == int(shown[0]) else 2
    print("%-58s %10.*f %-5s%s" % (what, digits, shown[0], unit, verdict), file=out, flush=True)


def parse():
    built = os.path.dirname(bench.HERE)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--server", metavar="PATH", default=built + "/xnbd-server")
    p.add_argument("--static", metavar="PATH|none", default=built + "/build/static/xnbd-server")
    p.add_argument("--only", action="append", metavar="GLOB", help="of " + ", ".join(LINES) + "; may be repeated")
    p.add_argument("--seconds", type=float, default=2, help="of each load (default 2)")
    p.add_argument("--rest", type=float, default=10, metavar="SECONDS", help="how long to look at rest (default 10)")
    p.add_argument("--json", metavar="FILE|-", help="all figures; with - the table goes to standard error")
    opts = p.parse_args()
    for path in opts.server, bench.LOAD:
        if not os.access(path, os.X_OK):
            p.error("%s is not built" % path)
    if not os.access(opts.static, os.X_OK):
        opts.static = print("footprint: %s: not there; left out" % opts.static, file=sys.stderr)
    return opts


def main():
    opts, failed, figures = parse(), False, []
    signal.signal(signal.SIGTERM, lambda n, frame: sys.exit(128 + n))
    out = sys.stderr if opts.json == "-" else sys.stdout
    host = bench.machine()
    print("%(cpu)s, %(cores)d cores, %(memory_mib)d MiB, Linux %(kernel)s, load average %(load_average).2f; "
          "%(started)s" % host, file=out)
    for name, measure in LINES.items():
        if opts.only and not any(fnmatch.fnmatch(name, glob) for glob in opts.only):
            continue
        try:
            with contextlib.ExitStack() as stack:
                for what, value, unit, bound in measure(Site(opts, stack)):
                    show(what, value, unit, bound, out)
                    figures.append({"group": name, "what": what.strip(), "value": value, "bound": bound,
                                    "unit": {"KiB": "bytes", "MiB": "bytes"}.get(unit, unit)})
        except (bench.Failed, OSError, subprocess.CalledProcessError, nbd.Closed) as e:
            failed = True
            print("%-58s FAILED: %s" % (name, e), file=out)
    if opts.json:
        with contextlib.nullcontext(sys.stdout) if opts.json == "-" else open(opts.json, "w") as f:
            json.dump({"machine": host, "figures": figures}, f, indent=1)
            f.write("\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
