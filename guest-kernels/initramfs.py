"""Writes the initramfs of guest-kernels/initramfs: a cpio archive ("newc"), without root and always the same bytes.

Arguments: OUTPUT INIT BUSYBOX APPLET,… [--file SRC:DST]… [--modules KERNELDIR MOD,…]…
Owner 0:0, time 0, entries sorted by path: nothing of the machine that makes it gets in.
"""

import os
import stat
import sys

# What a stock kernel needs as modules for virtio devices and the usual file systems. Names that a kernel has
# built in are skipped.
DEFAULT_MODULES = (
    "pvpanic-mmio", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_console", "virtio_balloon",
    "vmw_vsock_virtio_transport", "ext4", "overlay", "erofs", "squashfs", "virtiofs",
)


def fail(message):
    sys.exit(f"initramfs: {message}")


def read(path, what):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        fail(f"{what} {path}: {error.strerror}")


def module_name(path):
    """modprobe's name of a module: no folder, no suffix, and '-' is '_'."""
    return os.path.basename(path).split(".ko")[0].replace("-", "_")


class Modules:
    """The modules of one kernel, in an order in which they can be loaded."""

    def __init__(self, kernel):
        parent = os.path.join(kernel, "lib/modules")
        versions = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
        self.kernel = kernel
        self.order, self.done = [], set()
        self.paths, self.needs, self.builtin, self.alias, self.soft = {}, {}, set(), {}, {}
        self.folder = os.path.join(parent, versions[0]) if versions else None
        if not self.folder:
            return
        for line in self.lines("modules.dep"):
            path, needs = line.split(":", 1)
            self.paths[module_name(path)] = path
            self.needs[module_name(path)] = [module_name(need) for need in needs.split()]
        self.builtin = {module_name(line) for line in self.lines("modules.builtin")}
        for line in self.lines("modules.alias"):
            word, alias, name = line.split(None, 2)
            if word == "alias":
                self.alias.setdefault(alias.replace("-", "_"), name.strip())
        # "softdep NAME pre: A B post: C": without a modprobe in the guest, A and B must be there first.
        for line in self.lines("modules.softdep"):
            words = line.split()
            if words and words[0] == "softdep" and "pre:" in words:
                end = words.index("post:") if "post:" in words else len(words)
                self.soft[words[1].replace("-", "_")] = words[words.index("pre:") + 1:end]

    def lines(self, name):
        data = read(os.path.join(self.folder, name), "the module index").decode()
        return [line for line in data.splitlines() if line and not line.startswith("#")]

    def add(self, wanted, optional):
        name = wanted.replace("-", "_")
        if name not in self.paths:
            name = self.alias.get(name, name)
        if name in self.done or name in self.builtin:
            return
        if name not in self.paths:
            if not optional:
                fail(f"--modules: the kernel in {self.kernel} has no module {wanted}")
            return
        self.done.add(name)
        for before in self.soft.get(name, []):
            self.add(before, True)
        for need in self.needs[name]:
            self.add(need, False)
        self.order.append(name)

    def content(self, name):
        path = os.path.join(self.folder, self.paths[name])
        data = read(path, "module")
        if path.endswith(".xz"):
            import lzma
            return lzma.decompress(data)
        if not path.endswith(".ko"):
            fail(f"module {path}: compressed in a way that is not supported")
        return data


def newc(entries):
    """The archive's bytes of {path: (mode, content, device)}."""
    out = bytearray()

    def entry(number, path, mode, data, device):
        name = path.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        out.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        out.extend(bytes(-len(out) % 4))
        out.extend(data)
        out.extend(bytes(-len(out) % 4))

    for number, path in enumerate(sorted(entries), 1):
        entry(number, path, *entries[path])
    entry(0, "TRAILER!!!", 0, b"", (0, 0))
    out.extend(bytes(-len(out) % 512))
    return out


def main(output, init, busybox, applets, *options):
    entries = {}

    def put(path, mode, data=b"", device=(0, 0)):
        path = os.path.normpath(path).lstrip("/")
        parent = os.path.dirname(path)
        if parent and parent not in entries:
            put(parent, stat.S_IFDIR | 0o755)
        entries[path] = (mode, data, device)

    def put_file(source, path, mode=None):
        data = read(source, "cannot read")
        mode = mode or (0o755 if os.stat(source).st_mode & 0o111 else 0o644)
        put(path, stat.S_IFREG | mode, data)

    for folder in ("proc", "sys", "dev", "tmp", "root", "etc", "mnt", "run"):
        put(folder, stat.S_IFDIR | (0o1777 if folder == "tmp" else 0o755))
    put("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    put("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    put_file(busybox, "bin/busybox", 0o755)
    for applet in filter(None, applets.split(",")):
        put("bin/" + applet, stat.S_IFLNK | 0o777, b"busybox")
    put_file(init, "init", 0o755)

    options, number = list(options), 0
    while options:
        option = options.pop(0)
        if option == "--file":
            source, separator, path = options.pop(0).rpartition(":")
            if not separator or not path.strip("/"):
                fail("--file takes SRC:DST")
            put_file(source, path)
        elif option == "--modules":
            modules, names = Modules(options.pop(0)), options.pop(0)
            for name in DEFAULT_MODULES if names == "default" else filter(None, names.split(",")):
                modules.add(name, names == "default")
            for name in modules.order:
                put(f"modules/{number:02}-{name}.ko", stat.S_IFREG | 0o644, modules.content(name))
                number += 1

    with open(output, "wb") as file:
        file.write(newc(entries))


main(*sys.argv[1:])
