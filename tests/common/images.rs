//! A store of images of a test's own, archives made here, and what real tools make of images.
#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use microvm::image::Store;
use serde_json::Value;
use tar::{EntryType, Header};

use super::{Host, stderr, stdout};

/// A test's own store.
pub struct Images {
    pub host: Host,
}

impl Images {
    pub fn new() -> Self {
        Self { host: Host::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.host.dir.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.host.microvm([&["image"], args].concat());
        command.env("MICROVM_DATA", self.path("data"));
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    pub fn done(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        stdout(&output)
    }

    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.done(args)).unwrap()
    }

    pub fn pull_command(&self, args: &[&str]) -> Command {
        let mut command = self.host.microvm([&["pull"], args].concat());
        command.env("MICROVM_DATA", self.path("data")).env("DOCKER_CONFIG", self.path("docker"));
        command
    }

    pub fn pull(&self, args: &[&str]) -> Output {
        self.pull_command(args).output().unwrap()
    }

    /// A pull that goes well, as JSON.
    #[track_caller]
    pub fn pulled(&self, name: &str) -> Value {
        let output = self.pull(&[name, "--format", "json"]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output), "");
        serde_json::from_str(&stdout(&output)).unwrap()
    }

    pub fn store(&self) -> Store {
        Store::at(self.path("data/images")).unwrap()
    }

    /// Every file of the store but its lock.
    pub fn files(&self) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        walk(&self.path("data"), &mut found);
        found.retain(|path| !path.ends_with("lock"));
        found
    }
}

/// An archive, entry by entry, without the `tar` crate's checks of names.
#[derive(Default)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn entry(self, kind: EntryType, name: &str, link: &str, data: &[u8]) -> Self {
        let mode = if kind == EntryType::Directory { 0o750 } else { 0o644 };
        self.entry_with(kind, name, link, data, |header| header.set_mode(mode))
    }

    fn entry_with(
        mut self,
        kind: EntryType,
        name: &str,
        link: &str,
        data: &[u8],
        set: impl FnOnce(&mut Header),
    ) -> Self {
        let mut header = Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        set(&mut header);
        header.set_uid(5);
        header.set_gid(6);
        header.set_mtime(7);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, "", data)
    }

    pub fn dir(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, "", b"")
    }

    pub fn dir_with_mode(self, name: &str, mode: u32) -> Self {
        self.entry_with(EntryType::Directory, name, "", b"", |header| header.set_mode(mode))
    }

    pub fn file_with_mode(self, name: &str, mode: u32, data: &[u8]) -> Self {
        self.entry_with(EntryType::Regular, name, "", data, |header| header.set_mode(mode))
    }

    /// A character device for everybody.
    pub fn device(self, name: &str, major: u32, minor: u32) -> Self {
        self.entry_with(EntryType::Char, name, "", b"", |header| {
            header.set_mode(0o666);
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    }

    pub fn link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, target, b"")
    }

    pub fn hard(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, target, b"")
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Runs a tool that `scripts/test` has installed.
#[track_caller]
pub fn tool(images: &Images, line: &str) -> String {
    let mut command = Command::new("sh");
    command.args(["-euc", line]).current_dir(images.host.dir.path());
    let output = command.env("MICROVM_DATA", images.path("data")).output().unwrap();
    assert!(output.status.success(), "{line}: {}{}", stdout(&output), stderr(&output));
    stdout(&output)
}

/// An image of three layers by umoci: as much of what a layer can hold as this user may make.
pub fn by_umoci(images: &Images) {
    tool(images, include_str!("../host/image.sh"));
}

/// Mounts an image's layers as `stacked` and runs a script beside it. False: it needs root, and a kernel with EROFS and
/// overlayfs.
pub fn with_stacked(images: &Images, name: &str, script: &str) -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let is_root = rustix::process::geteuid().is_root();
    if !is_root || !["erofs", "overlay"].iter().all(|name| known.contains(name)) {
        eprintln!("left out: it needs root, and a kernel with erofs and overlay");
        return false;
    }
    let image = images.json(&["inspect", name]);
    let layers = image[0]["layers"].as_array().unwrap();
    let mut mounts = String::from("mkdir -p stacked\n");
    for (i, layer) in layers.iter().enumerate() {
        mounts += &format!("mkdir -p m{i}; mount -t erofs -o loop,ro {} m{i}\n", layer["path"]);
    }
    let mut stack: Vec<_> = (0..layers.len()).rev().map(|i| format!("m{i}")).collect();
    if stack.len() == 1 {
        // overlayfs wants two.
        mounts += "mkdir -p nothing\n";
        stack.push("nothing".into());
    }
    mounts += &format!("mount -t overlay overlay -o lowerdir={} stacked\n", stack.join(":"));
    fs::write(images.path("script.sh"), mounts + script).unwrap();
    tool(images, "unshare -m sh -eu script.sh");
    true
}
