"""The outer half of scripts/kvm-host: starts QEMU and passes streams, signals and the exit status through."""

import argparse
import collections
import ctypes
import fcntl
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import tty

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402

PASSED = ("RUST_", "CARGO_", "RUSTUP_", "MICROVM_", "LC_")
PASSED_WHOLE = ("CI", "TERM", "COLORTERM", "NO_COLOR", "LANG", "HOME", "PATH", "XDG_CACHE_HOME")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
CHUNK = 1 << 16
FAILED = 125


def parse():
    parser = argparse.ArgumentParser()
    for name in ("smp", "memory", "checkout", "cache", "kernel", "initramfs", "output"):
        parser.add_argument("--" + name)
    parser.add_argument("--icount", action="store_true")
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def shares(options):
    """Tag, folder and whether it is writable, parents first: a later one is mounted over an earlier one."""
    folders = {options.cache: False, options.checkout: True}
    if options.output:
        folders[options.output] = True
    existing = sorted(folder for folder in folders if os.path.isdir(folder))
    return [(f"share{i}", folder, folders[folder]) for i, folder in enumerate(existing)]


def qemu(options, console, sockets):
    """The emulated host. On -M microvm this kernel cannot calibrate its clock; on q35 it can."""
    here = os.path.dirname(os.path.abspath(__file__))
    mounted = shares(options)
    words = [f"{tag}{'=' if writable else ':'}{folder}" for tag, folder, writable in mounted]
    init = " ".join(f'"{word}"' for word in [os.path.join(here, "agent.py"), *words])
    # An emulated host whose processors wait for each other for ever must end, not hang: panic, then no reboot.
    line = "console=ttyS0 reboot=t panic=-1 softlockup_panic=1 quiet tsc=reliable mitigations=off -- @ " + init
    accel = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"] if options.icount else ["-accel", "tcg,thread=multi"]
    args = ["qemu-system-x86_64", "-M", "q35", *accel, "-cpu", "EPYC,+svm,+npt", "-m", options.memory,
            "-smp", "1" if options.icount else options.smp, "-nodefaults", "-no-user-config", "-display", "none",
            "-no-reboot", "-serial", f"file:{console}", "-kernel", options.kernel, "-initrd", options.initramfs,
            "-append", line, "-device", "virtio-serial-pci"]
    for tag, folder, writable in [("root", "/", False), *mounted]:
        readonly = "" if writable else ",readonly=on"
        path = folder.replace(",", ",,")
        args += ["-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{readonly}",
                 "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    for name, end in sockets.items():
        args += ["-chardev", f"socket,id={name},fd={end.fileno()}",
                 "-device", f"virtserialport,chardev={name},name=kvm-host.{name}"]
    return subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            pass_fds=[end.fileno() for end in sockets.values()], start_new_session=True,
                            preexec_fn=die_with_parent)


def die_with_parent():
    """Nobody else would end QEMU where this program is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def window_size(fd):
    return list(struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))[:2])


class Relay:
    """Everything between our own streams and the sockets. One thread, one selector, no polling."""

    def __init__(self, options, ends):
        self.ends = ends
        self.selector = selectors.DefaultSelector()
        self.lines = wire.Lines()
        self.pending = {name: collections.deque() for name in ("control", "stdin")}
        self.received = {"stdout": 0, "stderr": 0}
        self.sent_in = 0
        self.exit = None
        self.started = False
        self.terminals = [fd for fd in range(3) if os.isatty(fd)]
        self.options = options
        for name in ("control", "stdout", "stderr"):
            self.selector.register(ends[name], selectors.EVENT_READ, name)

    def start(self):
        """Tells the agent what to run; only then is standard input read."""
        environment = {k: v for k, v in os.environ.items() if k.startswith(PASSED) or k in PASSED_WHOLE}
        environment["MICROVM_CACHE"] = self.options.cache
        size = window_size(self.terminals[0]) if self.terminals else None
        self.tell(start={"command": self.options.command, "environment": environment, "folder": os.getcwd(),
                         "fallback": self.options.checkout, "terminals": self.terminals, "size": size})
        self.started = True
        try:
            self.selector.register(0, selectors.EVENT_READ, "input")
        except (PermissionError, ValueError, OSError):
            self.pump_file()

    def pump_file(self):
        """A regular file cannot be watched; it is read as fast as the socket takes it."""
        if self.sent_in is not None and not self.pending["stdin"]:
            self.read_input()

    def read_input(self):
        try:
            data = os.read(0, CHUNK)
        except OSError:
            data = b""
        if data:
            self.sent_in += len(data)
            self.send("stdin", data)
            return
        self.tell(input_ends_after=self.sent_in)
        self.sent_in = None
        self.unwatch_input()

    def unwatch_input(self):
        try:
            self.selector.unregister(0)
        except KeyError:
            pass

    def tell(self, **fields):
        self.send("control", wire.message(**fields))

    def send(self, name, data):
        self.pending[name].append(data)
        self.watch(name)
        if name == "stdin":
            self.unwatch_input()

    def watch(self, name):
        events = selectors.EVENT_WRITE if self.pending[name] else 0
        if name == "control":
            events |= selectors.EVENT_READ
        end = self.ends[name]
        known = end in self.selector.get_map()
        if events and known:
            self.selector.modify(end, events, name)
        elif events:
            self.selector.register(end, events, name)
        elif known:
            self.selector.unregister(end)

    def flush(self, name):
        data = self.pending[name].popleft()
        sent = self.ends[name].send(data)
        if sent < len(data):
            self.pending[name].appendleft(data[sent:])
        self.watch(name)
        if name == "stdin" and not self.pending[name] and self.sent_in is not None:
            try:
                self.selector.register(0, selectors.EVENT_READ, "input")
            except (PermissionError, ValueError, OSError):
                self.pump_file()

    def receive(self, name):
        """Takes what came on a port. False: QEMU is gone."""
        data = self.ends[name].recv(CHUNK)
        if not data:
            return False
        if name == "control":
            for fields in self.lines.feed(data):
                if "ready" in fields:
                    self.start()
                if "exit" in fields:
                    self.exit = fields
        else:
            self.received[name] += len(data)
            write_all(1 if name == "stdout" else 2, data)
        return True

    def done(self):
        return self.exit is not None and all(self.received[name] >= self.exit[name] for name in self.received)

    def run(self, wakeup):
        self.selector.register(wakeup, selectors.EVENT_READ, "signal")
        while not self.done():
            for key, events in self.selector.select():
                if key.data == "signal":
                    self.signals(wakeup.recv(64))
                elif key.data == "input":
                    self.read_input()
                elif events & selectors.EVENT_WRITE:
                    self.flush(key.data)
                elif not self.receive(key.data):
                    return None
        return self.exit["exit"]

    def signals(self, numbers):
        for number in numbers:
            if number == signal.SIGWINCH:
                if self.terminals and self.started:
                    self.tell(size=window_size(self.terminals[0]))
            elif self.started:
                self.tell(signal=number)
            else:
                # Nothing runs yet that could be told.
                raise SystemExit(128 + number)


def write_all(fd, data):
    """Where nobody reads any more, the command goes on all the same."""
    try:
        while data:
            data = data[os.write(fd, data):]
    except OSError:
        pass


def main():
    options = parse()
    wakeup, wakeup_end = socket.socketpair()
    wakeup_end.setblocking(False)
    signal.set_wakeup_fd(wakeup_end.fileno())
    for number in (*SIGNALS, signal.SIGWINCH):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    ours, theirs = {}, {}
    for name in wire.PORTS:
        ours[name], theirs[name] = socket.socketpair()
    with tempfile.NamedTemporaryFile(prefix="kvm-host-console-") as console:
        process = qemu(options, console.name, theirs)
        for end in theirs.values():
            end.close()
        relay = Relay(options, ours)
        before = termios.tcgetattr(0) if 0 in relay.terminals else None
        status = None
        try:
            if before:
                tty.setraw(0)
            status = relay.run(wakeup)
        finally:
            if before:
                termios.tcsetattr(0, termios.TCSADRAIN, before)
            if status is not None:
                # The command's writes to the checkout are on their way: the agent syncs, then switches off.
                process.wait(timeout=60)
            process.kill()
            complaint = process.communicate()[1].decode(errors="replace")
        if status is None:
            console.seek(0)
            said = (complaint + console.read().decode(errors="replace")).splitlines()
            # What TCG leaves out of the processor is no trouble.
            said = [line.strip() for line in said if line.strip() and "TCG doesn't support" not in line]
            print(f"kvm-host: the emulated host died: {said[-1] if said else 'it said nothing'}", file=sys.stderr)
            for line in said if "MICROVM_KVM_HOST_DEBUG" in os.environ else []:
                print(line, file=sys.stderr)
            return FAILED
        return status


sys.exit(main())
