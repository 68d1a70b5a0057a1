"""Writes Docker's archive of an image with COUNT layers, called layers:COUNT, on a static busybox.

Usage: layers.py COUNT BUSYBOX ARCHIVE

Layer N adds /n/N, writes N into /top and adds /gone/N, which layer N + 1 removes.
"""

import hashlib
import io
import json
import sys
import tarfile


def add(tar, name, content=b"", mode=0o644, link=None):
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    if link:
        entry.type, entry.linkname = tarfile.SYMTYPE, link
    tar.addfile(entry, io.BytesIO(content))


def archive(fill):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        fill(tar)
    return out.getvalue()


def layer(number, busybox):
    def fill(tar):
        if number == 0:
            add(tar, "bin/busybox", busybox, 0o755)
            for name in ["sh", "cat", "ls", "true"]:
                add(tar, f"bin/{name}", link="busybox")
        else:
            add(tar, f"gone/.wh.{number - 1}")
        add(tar, f"gone/{number}")
        add(tar, f"n/{number}", f"{number}\n".encode())
        add(tar, "top", f"{number}\n".encode())

    return archive(fill)


def main(count, busybox, path):
    with open(busybox, "rb") as file:
        busybox = file.read()
    layers = [layer(number, busybox) for number in range(count)]
    ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": ids},
    }
    names = [f"{number}.tar" for number in range(count)]
    manifest = [{"Config": "config.json", "RepoTags": [f"layers:{count}"], "Layers": names}]

    def fill(tar):
        # The first entry tells an image's archive.
        add(tar, "manifest.json", json.dumps(manifest).encode())
        add(tar, "config.json", json.dumps(config).encode())
        for name, content in zip(names, layers):
            add(tar, name, content)

    with open(path, "wb") as file:
        file.write(archive(fill))


main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
