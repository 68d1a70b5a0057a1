"""The inner half of scripts/kvm-host: runs the command in the emulated host, then switches it off."""

import ctypes
import fcntl
import glob
import os
import pty
import select
import signal
import struct
import sys
import termios

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402

CHUNK = 1 << 16
NOT_FOUND, NOT_RUNNABLE = 127, 126


def open_ports():
    ports = {}
    for name_file in glob.glob("/sys/class/virtio-ports/*/name"):
        with open(name_file) as f:
            name = f.read().strip().removeprefix("kvm-host.")
        ports[name] = os.open("/dev/" + name_file.split("/")[-2], os.O_RDWR)
    return ports


def write_all(fd, data):
    while data:
        data = data[os.write(fd, data):]


def set_size(fd, size):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


class Child:
    """The command, with a pipe or one shared pseudo-terminal for each of its streams."""

    def __init__(self, start):
        self.master = None
        ours, theirs, close = {}, {}, []
        if start["terminals"]:
            self.master, slave = pty.openpty()
            set_size(self.master, start["size"])
            close.append(slave)
        for fd in range(3):
            if fd in start["terminals"]:
                theirs[fd] = slave
            else:
                read, write = os.pipe()
                ours[fd], theirs[fd] = (write, read) if fd == 0 else (read, write)
                close.append(theirs[fd])
        self.pid = os.fork()
        if self.pid == 0:
            self.become(start, theirs)
        for fd in close:
            os.close(fd)
        self.stdin = ours.get(0, self.master)
        self.outputs = {}
        for fd, name in ((1, "stdout"), (2, "stderr")):
            if fd in ours:
                self.outputs[ours[fd]] = name
        if self.master is not None:
            # What is echoed and printed comes out of the one terminal.
            self.outputs[self.master] = "stdout" if 1 in start["terminals"] else "stderr"

    @staticmethod
    def become(start, theirs):
        os.setsid()
        if start["terminals"]:
            fcntl.ioctl(theirs[start["terminals"][0]], termios.TIOCSCTTY, 0)
        for fd in range(3):
            os.dup2(theirs[fd], fd)
        os.closerange(3, 256)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        folder = start["folder"] if os.path.isdir(start["folder"]) else start["fallback"]
        os.chdir(folder)
        command = start["command"]
        try:
            os.execvpe(command[0], command, start["environment"])
        except OSError as error:
            os.write(2, f"kvm-host: {command[0]} cannot be run: {error.strerror}\n".encode())
            os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_RUNNABLE)

    def kill(self, number):
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass


class Agent:
    def __init__(self):
        self.ports = open_ports()
        self.lines = wire.Lines()
        self.child = None
        self.input = bytearray()
        self.taken = 0
        self.input_end = None
        self.sent = {"stdout": 0, "stderr": 0}
        self.status = None

    def tell(self, **fields):
        write_all(self.ports["control"], wire.message(**fields))

    def run(self):
        self.tell(ready=True)
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while self.child is None:
            self.control()
        # Ends when the command has ended and, without waiting for what it left in the background, its output is read.
        while self.status is None or self.drain():
            self.step(wake_read)
        self.tell(exit=self.status, **self.sent)

    def drain(self):
        """Whether output of the ended command is still to be read right now."""
        outputs = list(self.child.outputs)
        return bool(outputs and select.select(outputs, [], [], 0)[0])

    def step(self, wake):
        child, ports = self.child, self.ports
        reads = [wake, ports["control"], *child.outputs]
        if len(self.input) < CHUNK and self.input_end is None or self.input_end != self.taken:
            reads.append(ports["stdin"])
        writes = [child.stdin] if self.input and child.stdin is not None else []
        readable, writable, _ = select.select(reads, writes, [])
        for fd in readable:
            if fd == wake:
                os.read(wake, 64)
                self.reap()
            elif fd == ports["control"]:
                self.control()
            elif fd == ports["stdin"]:
                data = os.read(fd, CHUNK)
                self.taken += len(data)
                self.input += data
            else:
                self.output(fd)
        if writable:
            self.feed()
        if self.input_end == self.taken and not self.input:
            self.close_input()

    def feed(self):
        """As much as the pipe takes for certain, so that a command that does not read stops nobody."""
        try:
            written = os.write(self.child.stdin, self.input[:4096])
            del self.input[:written]
        except OSError:
            self.close_input()
        if self.child.stdin is None:
            self.input.clear()

    def close_input(self):
        child = self.child
        if child.stdin is not None and child.stdin != child.master:
            os.close(child.stdin)
        child.stdin = None

    def output(self, fd):
        try:
            data = os.read(fd, CHUNK)
        except OSError:
            data = b""  # a terminal whose other side is closed
        if data:
            name = self.child.outputs[fd]
            write_all(self.ports[name], data)
            self.sent[name] += len(data)
        else:
            del self.child.outputs[fd]

    def control(self):
        for fields in self.lines.feed(os.read(self.ports["control"], CHUNK)):
            if "start" in fields:
                self.child = Child(fields["start"])
            if "signal" in fields:
                self.child.kill(fields["signal"])
            if "size" in fields and self.child.master is not None:
                set_size(self.child.master, fields["size"])
            if "input_ends_after" in fields:
                self.input_end = fields["input_ends_after"]

    def reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child.pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code


try:
    Agent().run()
finally:
    os.sync()
    power_off = 0x4321FEDC
    ctypes.CDLL(None).reboot(power_off)
