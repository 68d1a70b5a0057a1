"""The host's side of the vsock tests in tests/real_kernels.rs. Argument: the path of `--vsock`.

Its counterpart in the guest is tests/guest/vsock.rs, which says what serves each port.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

PATH = sys.argv[1]
COUNT = 1000
# So many are under way at once.
BATCH = 50
BEGIN = time.monotonic()


def say(text):
    print(f"{text} ({time.monotonic() - BEGIN:.1f} s)", flush=True)


def ask(port):
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(60)
    stream.connect(PATH)
    stream.sendall(b"CONNECT %d\n" % port)
    return stream


def read_ok(stream, port):
    line = b""
    while not line.endswith(b"\n"):
        byte = stream.recv(1)
        if not byte:
            raise ConnectionError(f"no answer for port {port}")
        line += byte
    assert line.startswith(b"OK "), line


def connect(port):
    stream = ask(port)
    read_ok(stream, port)
    return stream


def listen(port):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{PATH}_{port}")
    listener.listen(128)
    listener.settimeout(120)
    return listener


def read_all(stream):
    parts = []
    while part := stream.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def expect(stream, data):
    got = read_all(stream)
    assert got == data, f"{len(got)} of {len(data)} bytes"


def send_all(stream, data):
    stream.sendall(data)
    stream.shutdown(socket.SHUT_WR)


def echo(data):
    """Sends and receives at once, ends its own direction first, and compares."""
    with connect(5) as stream:
        sender = threading.Thread(target=send_all, args=(stream, data))
        sender.start()
        expect(stream, data)
        sender.join()


def send_back(listener):
    """Takes all that the guest sends, then sends it back: only one direction is open at a time."""
    stream, _ = listener.accept()
    with stream:
        send_all(stream, read_all(stream))


def is_over(stream):
    """The guest's end is gone: an end of data, or a reset."""
    try:
        while stream.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    stream.close()


if len(sys.argv) > 2:
    # The program that gets killed: it takes a little and then nothing.
    connect(int(sys.argv[2])).recv(10000)
    print("ready", flush=True)
    time.sleep(1000)

large, small = listen(9000), listen(9001)
print("listening", flush=True)
send_back(large)
say("1 MiB from the guest")
for _ in range(COUNT):
    send_back(small)
say(f"{COUNT} connections from the guest")
while time.monotonic() < BEGIN + 100:
    try:
        with connect(6) as first:
            first.shutdown(socket.SHUT_WR)
            read_all(first)
        break
    except ConnectionError:
        time.sleep(0.1)

echo(os.urandom(1 << 20))
say("1 MiB to the guest and back")
for first in range(0, COUNT, BATCH):
    streams = {number: ask(5) for number in range(first, first + BATCH)}
    for number, stream in streams.items():
        read_ok(stream, 5)
        send_all(stream, b"%d:" % number * 50)
    for number, stream in streams.items():
        expect(stream, b"%d:" % number * 50)
        stream.close()
say(f"{COUNT} connections to the guest")

with connect(6) as half:
    data = os.urandom(100_000)
    send_all(half, data)
    expect(half, data)
say("half-closed")

with subprocess.Popen([sys.executable, "-I", "-S", "-B", __file__, PATH, "7"], stdout=subprocess.PIPE) as victim:
    assert victim.stdout.readline() == b"ready\n"
    victim.send_signal(signal.SIGKILL)
say("killed one")

try:
    connect(12345)
    raise SystemExit("a port where nobody listens was accepted")
except ConnectionError:
    say("refused")

# The guest resets the device with connections open, one of them with data under way, and starts it again.
idle, busy = connect(6), connect(7)
for stream in ask(9), idle, busy:
    is_over(stream)
echo(b"still here")
say("reset and started again")
try:
    connect(8).close()
except ConnectionError:
    pass  # the VM may be gone before its answer is through
