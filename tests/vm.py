"""A real Linux kernel to test the server with: machines that run shell scripts.

A Guest is a small virtual machine: Debian's cloud kernel with nbd.ko, and an
initramfs of busybox, two nbd-clients and the ext4 tools of this host.  The
kernel and busybox's source are fetched once, and nothing is installed.  It is
emulated, so no /dev/kvm is needed; it boots in a few seconds.  A Local machine
is this one, as root, where its kernel has NBD devices.  Scripts do not notice
the difference:

    with vm.Guest(directory) as guest:
        guest.run("attach $DEV debian -C 4", PORT=port) # raises Failed, returns output
        job = guest.start("dd if=$DEV of=/dev/null; echo done")
        job.wait_for("done")                            # while others run
        job.wait()

Every script runs under `sh -eu` with vm/lib.sh before it, and finds
    HOST        where this host's loopback servers are reached
    DEV, DEV2   NBD devices that are free for it
    MNT, TMP    an empty directory to mount on, and one for files
    TREE        a tree of files to copy; `tree` of the machine is the same here
    BUSYBOX     a busybox that has the nbd-client applet

A guest powers off when it is closed, by itself at its deadline, and is killed
if it does neither.  Its console is in `directory`/console.log.

    python3 tests/vm.py                 fetches and builds what a guest needs
    python3 tests/vm.py SCRIPT          runs a script in a fresh guest
"""

import hashlib
import itertools
import lzma
import os
import platform
import random
import re
import select
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = ["virtio_pci", "virtio_console", "virtio_net", "virtio_blk", "nbd", "ext4"]   # and what they need
MODULE_OPTIONS = {"nbd": "nbds_max=4"}
# Without these two features the card tells of each buffer that it gets.  With them QEMU before
# 9.1 may wait for ever for buffers that are there: "No route to host" in the guest.
NETWORK_CARD = "virtio-net-pci,netdev=net,romfile=,event_idx=off,mrg_rxbuf=off"
CPUS = 4                # the kernel client uses a connection per processor
GUEST_PROGRAMS = {      # of this host: the package each comes from
    "nbd-client": "nbd-client", "mkfs.ext4": "e2fsprogs", "e2fsck": "e2fsprogs",
    "fstrim": "util-linux"}


class Missing(Exception):
    """This machine lacks something: "needs program (package)"."""


class Failed(AssertionError):
    """A script failed, or a machine did not answer in time."""


def program(name, package):
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not path:
        raise Missing(f"needs {name} ({package})")
    return path


# What is fetched or built once, and kept

def cache():
    """A directory that outlives the tests: $XNBD_TEST_CACHE, or the user's."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("XNBD_TEST_CACHE") or Path(base, "xnbd-tests"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def kept(name, make):
    """cache()/name, filled by make(directory) if it is not there yet: whole or
    not at all, also when two test runs do it at once."""
    final = cache() / name
    if not final.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            made = Path(scratch, "made")
            made.mkdir()
            make(made)
            try:
                made.rename(final)
            except OSError:
                if not final.exists():
                    raise
    return final


def compiled(name):
    """vm/NAME.c, compiled.  It lies where a guest mounts nothing."""
    source = HERE / f"vm/{name}.c"
    version, compiler = hashlib.md5(source.read_bytes()).hexdigest()[:8], program("cc", "gcc")
    return kept(f"{name}-{version}", lambda directory: subprocess.run(
        [compiler, "-O2", "-o", directory / name, source], check=True)) / name


def quiet(*command, needed, **kw):
    """Runs a command that only works on a machine equipped for it."""
    done = subprocess.run([str(c) for c in command], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, **kw)
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:]
        raise Missing(f"needs {needed}: {command[0]} failed: {' '.join(last)}")
    return done.stdout


def kernel():
    """The directory of an unpacked kernel package (boot/, lib/modules/)."""
    found = sorted(cache().glob("linux-image-*"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else fetch_kernel()


def fetch_kernel():
    needed = f"a Linux kernel ({KERNEL_PACKAGE}, downloaded, not installed)"
    program("apt-get", "apt")
    depends = quiet("apt-cache", "depends", KERNEL_PACKAGE, needed=needed)
    name = re.search(r"Depends: (linux-image-\d\S*)", depends)
    if not name:
        raise Missing(f"needs {needed}")

    def unpack(directory):
        with tempfile.TemporaryDirectory() as scratch:
            quiet("apt-get", "-q", "download", name[1], needed=needed, cwd=scratch)
            for package in Path(scratch).glob("*.deb"):
                quiet("dpkg-deb", "-x", package, directory, needed=needed)

    return kept(name[1], unpack)


# Debian's busybox is built without the nbd-client applet, so this builds it.

def busybox_with_client():
    """A static busybox with the nbd-client applet."""
    installed = program("busybox", "busybox-static")
    if "nbd-client" in quiet(installed, "--list", needed="busybox").split():
        return Path(installed)
    return kept("busybox-nbd-client", build_busybox) / "busybox"


def build_busybox(directory):
    for tool, package in (("gcc", "gcc"), ("make", "make"), ("apt-get", "apt")):
        program(tool, package)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        with tarfile.open(fetch_source("busybox", scratch)) as archive:
            archive.extractall(scratch)
        source = next(p.parent for p in scratch.glob("*/Makefile"))
        needed = "busybox with the nbd-client applet (built from its source)"
        quiet("make", "allnoconfig", needed=needed, cwd=source)
        config = source / ".config"
        config.write_text(re.sub("# (CONFIG_(STATIC|LFS|NBDCLIENT|TRUE)) is not set", r"\1=y",
                                 config.read_text()))
        quiet("make", f"-j{os.cpu_count()}", needed=needed, cwd=source)
        shutil.copy2(source / "busybox", directory)


def fetch_source(name, directory):
    """Downloads a source package's tarball from the mirrors apt knows, without
    touching apt's own configuration."""
    lists, parts = directory / "lists", directory / "parts"
    lists.mkdir()
    parts.mkdir()
    for number, old in enumerate([Path("/etc/apt/sources.list"),
                                  *Path("/etc/apt/sources.list.d").glob("*")]):
        if old.suffix in (".list", ".sources") and old.exists():
            text = re.sub(r"(?m)^Types:.*$", "Types: deb-src", old.read_text())
            text = re.sub(r"(?m)^deb\s", "deb-src ", text)
            (parts / f"{number}{old.suffix}").write_text(text)
    apt = ["apt-get", "-q", "-o", "Dir::Etc::sourcelist=/dev/null",
           "-o", f"Dir::Etc::sourceparts={parts}", "-o", f"Dir::State::lists={lists}",
           "-o", f"Dir::Cache={directory}", "-o", "APT::Sandbox::User="]
    # A repository without sources makes this fail, and does not matter.
    subprocess.run([*apt, "update"], stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    needed = f"the source of {name} (apt-get source {name})"
    quiet(*apt, "--download-only", "source", name, needed=needed, cwd=directory)
    return next(directory.glob(f"{name}_*.orig.tar.*"))


# The initramfs

def libraries(path):
    """The shared libraries of a program, and its loader."""
    told = subprocess.run(["ldd", path], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True).stdout
    return re.findall(r"(/\S+) \(0x", told)


def find_module(tree, name):
    """The file of a module; None if it is built in."""
    pattern = re.sub("[-_]", "[-_]", name) + ".ko*"
    return next(tree.rglob(pattern), None)


def module_image(path):
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def load_order(tree, names, order=None):
    """{name: image} of modules and what they depend on, dependencies first."""
    order = {} if order is None else order
    for name in names:
        path = name not in order and find_module(tree, name)
        if path:
            image = module_image(path)
            depends = re.search(rb"\0depends=([^\0]*)", image)
            load_order(tree, depends[1].decode().split(",") if depends else [], order)
            order[name] = image
    return order


def cpio(entries):
    """An archive in the "newc" format: {path: (mode, content)}."""
    archive = bytearray()
    entries = {**entries, "TRAILER!!!": (0, b"")}
    for number, (name, (mode, content)) in enumerate(entries.items()):
        name = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % f for f in fields) + name
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def with_parents(files):
    """Puts the directories that files are in before them."""
    entries = {d: (0o40755, b"") for d in ("dev", "proc", "sys", "run", "tmp", "etc")}
    for path, entry in files.items():
        for parent in reversed(Path(path).parents[:-1]):
            entries.setdefault(str(parent), (0o40755, b""))
        entries[path] = entry
    return entries


def make_tree(directory):
    """A tree of files with sizes at the edges, and their checksums in `sums`."""
    content = random.Random(1).randbytes(3000000)
    (directory / "tree").mkdir()
    for size in (0, 1, 511, 512, 4095, 4096, 4097, 65537, 1000001, len(content)):
        for copy in range(5 if size < 100000 else 1):
            parent = directory / "tree" / f"d{copy}"
            parent.mkdir(exist_ok=True)
            (parent / str(size)).write_bytes(content[copy:][:size])
    sums = [f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.relative_to(directory / 'tree')}\n"
            for p in sorted(directory.glob("tree/*/*"))]
    (directory / "sums").write_text("".join(sums))
    return directory / "tree"


def initramfs(tree, extra=()):
    """The guest's file system, with further programs of this host."""
    files = {"bin/busybox": program("busybox", "busybox-static"),
             "bin/busybox-nbd": busybox_with_client(),
             **{name: HERE / "vm" / name for name in ("init", "agent", "lib.sh")}}
    for path in [*(program(n, p) for n, p in GUEST_PROGRAMS.items()), *extra]:
        files[str(path).lstrip("/")] = path
    for path in list(files.values()):
        files.update((library.lstrip("/"), library) for library in libraries(path))
    for path in [tree.parent / "sums", *tree.glob("*/*")]:
        files[str(path.relative_to(tree.parent))] = path
    entries = {name: (0o100755, Path(path).read_bytes()) for name, path in files.items()}
    modules = load_order(kernel() / "lib/modules", MODULES)
    for name, image in modules.items():
        entries[f"modules/{name}.ko"] = (0o100644, image)
    loading = "".join(f"insmod /modules/{name}.ko {MODULE_OPTIONS.get(name, '')}\n"
                      for name in modules)
    entries["modules/load"] = (0o100755, loading.encode())
    return cpio(with_parents(entries))


# Machines

class Job:
    """A script that runs on a machine."""

    def __init__(self, machine, number):
        self.machine = machine
        self.number = number
        self.lines = []
        self.status = None

    @property
    def output(self):
        return "".join(line + "\n" for line in self.lines)

    def _until(self, condition, seconds, what):
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.machine.receive(deadline):
                raise Failed(f"no {what} (in {seconds} s at most):\n{self.output}"
                             f"{self.machine.state()}")

    def wait_for(self, text, seconds=200):
        """Until a line of output contains the text; returns that line."""
        def found():
            return next((line for line in self.lines if text in line), None)

        self._until(lambda: found() is not None or self.status is not None,
                    seconds, f"line {text!r}")
        if found() is None:
            raise Failed(f"ended without {text!r}:\n{self.output}")
        return found()

    def wait(self, seconds=200, check=True):
        """Until it ends; a status other than 0 raises Failed."""
        self._until(lambda: self.status is not None, seconds, "end of the script")
        if check and self.status:
            raise Failed(f"script ended with status {self.status}:\n{self.output}"
                         f"{self.machine.state()}")
        return self.status


class Machine:
    """Runs scripts by way of vm/agent, at the other end of a channel."""

    def __init__(self, directory):
        self.tree = make_tree(Path(directory))
        self.channel, self.agent_end = socket.socketpair()
        self.jobs = {}
        self.numbers = itertools.count(1)
        self.unread = b""
        self.up = False

    def start(self, script, **variables):
        """Starts a script; the variables are set in its environment."""
        job = Job(self, str(next(self.numbers)))
        self.jobs[job.number] = job
        settings = "".join(f"{k}={quoted(v)}\n"
                           for k, v in {**self.variables(), **variables}.items())
        whole = "set -eu\n" + settings + ". $LIB\n" + script
        line = whole.replace("\\", "\\\\").replace("\n", "\\n")
        try:
            self.channel.sendall(f"{job.number} {line}\n".encode())
        except OSError as e:
            raise Failed(f"the machine is gone ({e}):\n{self.state()}") from None
        return job

    def run(self, script, seconds=200, **variables):
        """Runs a script to its end, which must be good; returns its output."""
        job = self.start(script, **variables)
        job.wait(seconds)
        return job.output

    def receive(self, deadline):
        """Takes in what the agent said; False when there is no more to come."""
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self.channel], [], [], left)[0]:
            return False
        data = self.channel.recv(65536)
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace"))
        return bool(data)

    def _take(self, line):
        said = re.match(r"(\d+)([|=])(.*)", line)
        if line == "up":
            self.up = True
        elif said and said[2] == "|":
            self.jobs[said[1]].lines.append(said[3])
        elif said:
            self.jobs[said[1]].status = int(said[3] or 255)

    def wait_up(self, seconds):
        deadline = time.monotonic() + seconds
        while not self.up:
            if not self.receive(deadline):
                state = self.state()
                self.close()
                raise Failed(f"the machine did not come up (in {seconds} s):\n{state}")
        self.run("mkdir -p $MNT")

    def variables(self):
        raise NotImplementedError

    def state(self):
        """What helps to understand a failure."""
        return ""

    def close(self):
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def quoted(value):
    return "'" + str(value).replace("'", "'\\''") + "'"


class Guest(Machine):
    """A virtual machine; up when it is made.

    deadline    seconds until it powers off, whatever happens
    extra       paths of further programs of this host to take along
    devices     further options of qemu
    """

    def __init__(self, directory, deadline=300, extra=(), memory=256, devices=()):
        super().__init__(directory)
        qemu = program("qemu-system-x86_64", "qemu-system-x86")
        if platform.machine() != "x86_64":
            raise Missing("needs an x86-64 machine (the guest runs its programs)")
        vmlinuz = next((kernel() / "boot").glob("vmlinuz-*"))
        initrd = Path(directory, "initramfs")
        initrd.write_bytes(initramfs(self.tree, extra))
        self.console = Path(directory, "console.log")
        self.deadline = time.monotonic() + deadline
        append = f"console=ttyS0 panic=-1 oops=panic random.trust_cpu=on deadline={deadline}"
        # One thread for all processors: here it takes half the time of one for each.
        self.proc = subprocess.Popen(
            [qemu, "-accel", "tcg,thread=single", "-cpu", "max", "-smp", str(CPUS),
             "-m", str(memory), "-nodefaults", "-display", "none", "-no-reboot",
             "-kernel", vmlinuz, "-initrd", initrd, "-append", append,
             "-netdev", "user,id=net", "-device", NETWORK_CARD,
             "-serial", f"file:{self.console}", "-device", "virtio-serial-pci",
             "-chardev", f"socket,id=agent,fd={self.agent_end.fileno()}",
             "-device", "virtserialport,chardev=agent", *map(str, devices)],
            stdin=subprocess.DEVNULL, stdout=open(Path(directory, "qemu.log"), "wb"),
            stderr=subprocess.STDOUT, pass_fds=[self.agent_end.fileno()])
        self.agent_end.close()
        self.wait_up(min(300, deadline))

    def variables(self):
        return {"HOST": "10.0.2.2", "DEV": "/dev/nbd0", "DEV2": "/dev/nbd1",
                "MNT": "/tmp/mnt", "TMP": "/tmp", "BUSYBOX": "/bin/busybox-nbd",
                "LIB": "/lib.sh", "TREE": "/tree"}

    def receive(self, deadline):
        return super().receive(min(deadline, self.deadline))

    def state(self):
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return "console:\n" + "\n".join(text.splitlines()[-30:])

    def close(self):
        """Powers off; a guest that does not is killed."""
        try:
            self.channel.sendall(b"off\n")
        except OSError:
            pass
        try:
            self.proc.wait(10)
        except subprocess.TimeoutExpired:
            self.proc.kill()
            self.proc.wait()
        self.channel.close()


class Local(Machine):
    """This machine and two of its NBD devices that nobody uses."""

    def __init__(self, directory):
        super().__init__(directory)
        self.devices = free_devices()
        if os.geteuid() != 0 or len(self.devices) < 2:
            raise Missing("needs /dev/nbd0 and root (modprobe nbd)")
        for name, package in GUEST_PROGRAMS.items():
            program(name, package)
        self.busybox = busybox_with_client()
        self.directory = Path(directory)
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        self.proc = subprocess.Popen(["sh", HERE / "vm/agent"], cwd=directory,
                                     stdin=self.agent_end, env={**os.environ, "PATH": path})
        self.agent_end.close()
        self.wait_up(10)

    def variables(self):
        return {"HOST": "127.0.0.1", "DEV": self.devices[0], "DEV2": self.devices[1],
                "MNT": self.directory / "mnt", "TMP": self.directory,
                "BUSYBOX": self.busybox, "LIB": HERE / "vm/lib.sh",
                "TREE": self.tree}

    def close(self):
        try:
            self.run("cleanup")
        finally:
            self.channel.close()    # the agent ends
            self.proc.wait(10)


def free_devices():
    """The NBD devices of this machine that are not connected."""
    return [f"/dev/{p.name}" for p in sorted(Path("/sys/block").glob("nbd*"))
            if not (p / "pid").exists() and (p / "size").read_text().strip() == "0"
            and Path("/dev", p.name).exists()]


def main(arguments):
    try:
        print(f"kernel: {kernel()}\nbusybox: {busybox_with_client()}", file=sys.stderr)
        if arguments:
            with tempfile.TemporaryDirectory() as directory, Guest(directory) as guest:
                print(guest.run(Path(arguments[0]).read_text(), 300), end="")
    except (Missing, Failed) as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main(sys.argv[1:])
