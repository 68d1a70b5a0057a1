"""Compares two folders file for file: type, mode, owner, time, content, links, devices, extended attributes."""

import hashlib
import os
import stat
import sys


def describe(path):
    s = os.lstat(path)
    names = [n for n in os.listxattr(path, follow_symlinks=False) if not n.startswith("trusted.overlay.")]
    content = ""
    if stat.S_ISLNK(s.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(s.st_mode):
        with open(path, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
    return {
        "mode": oct(s.st_mode),
        "owner": (s.st_uid, s.st_gid),
        "time": s.st_mtime_ns,
        "device": s.st_rdev,
        "links": 0 if stat.S_ISDIR(s.st_mode) else s.st_nlink,
        "content": content,
        "xattrs": {n: os.getxattr(path, n, follow_symlinks=False) for n in names},
    }


def scan(root):
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, root)] = describe(path)
    return found


one, other = scan(sys.argv[1]), scan(sys.argv[2])
different = [path for path in sorted(one.keys() | other.keys()) if one.get(path) != other.get(path)]
for path in different[:20]:
    print(path, one.get(path), other.get(path), sep="\n  ")
if different or len(one) < int(sys.argv[3]):
    sys.exit(f"{len(different)} differences, {len(one)} files")
