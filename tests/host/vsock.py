"""The host's side of the vsock tests in tests/real_kernels.rs. Argument: the path of `--vsock`.

Its counterpart in the guest is examples/guest_vsock.rs.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

PATH = sys.argv[1]


def checksum(data, total=0):
    for byte in data:
        total = (total * 31 + byte) & 0xFFFFFFFF
    return total


def connect(port):
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(120)
    stream.connect(PATH)
    stream.sendall(b"CONNECT %d\n" % port)
    line = b""
    while not line.endswith(b"\n"):
        byte = stream.recv(1)
        if not byte:
            raise ConnectionError(f"no answer for port {port}")
        line += byte
    assert line.startswith(b"OK "), line
    return stream


def read_all(stream):
    parts = []
    while part := stream.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def echo(data):
    """Sends and receives at once, ends its own direction first, and compares."""
    with connect(5) as stream:
        def send():
            stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
        sender = threading.Thread(target=send)
        sender.start()
        got = read_all(stream)
        sender.join()
    assert got == data, f"{len(got)} of {len(data)} bytes"


def serve_guest(listener):
    """Counts what the guest sends until its end, and tells it."""
    stream, _ = listener.accept()
    data = read_all(stream)
    stream.sendall(b"%d %d\n" % (len(data), checksum(data)))
    stream.close()


if len(sys.argv) > 2:
    # The program that gets killed: it takes a little and then nothing.
    connect(int(sys.argv[2])).recv(10000)
    print("ready", flush=True)
    time.sleep(1000)

listener = socket.socket(socket.AF_UNIX)
listener.bind(PATH + "_9000")
listener.listen()
print("listening", flush=True)
serve_guest(listener)
while True:
    try:
        with connect(6) as first:
            first.shutdown(socket.SHUT_WR)
            read_all(first)
        break
    except ConnectionError:
        time.sleep(0.1)

echo(os.urandom(1 << 20))
print("1 MiB echoed", flush=True)
for number in range(1000):
    echo(b"%d:" % number * 50)
print("1000 connections", flush=True)

threads = [threading.Thread(target=echo, args=(os.urandom(5000),)) for _ in range(50)]
failed = []
threading.excepthook = lambda args: failed.append(args.exc_value)
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
print("50 at once", flush=True)

with connect(6) as half:
    data = os.urandom(100_000)
    half.sendall(data)
    half.shutdown(socket.SHUT_WR)
    assert read_all(half) == b"%d %d\n" % (len(data), checksum(data))
print("half-closed", flush=True)

with subprocess.Popen([sys.executable, __file__, PATH, "7"], stdout=subprocess.PIPE) as victim:
    assert victim.stdout.readline() == b"ready\n"
    victim.send_signal(signal.SIGKILL)
echo(b"still here")
print("killed one", flush=True)

try:
    connect(12345)
    raise SystemExit("a port where nobody listens was accepted")
except ConnectionError:
    print("refused", flush=True)
try:
    connect(8).close()
except ConnectionError:
    pass  # the VM may be gone before its answer is through
