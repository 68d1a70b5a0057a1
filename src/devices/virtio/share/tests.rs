//! Requests of a driver that keeps the rules, and of one that does not.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use crate::sandbox::Confined;

use super::super::testing::{self, Buffer, Driver};
use super::wire::{ENTRY_OUT, ROOT, op, set};
use super::*;

const ROOMY: u32 = 4096;
const MANY: Limits = Limits { inodes: 1000, handles: 100 };

/// A share and its driver, which has said INIT.
struct Rig {
    driver: Driver,
    counters: ShareCounters,
    session: Arc<Session>,
    _threads: Threads,
    dir: TempDir,
    unique: u64,
}

fn header(opcode: u32, unique: u64, node: u64, len: usize) -> Vec<u8> {
    let words = [&(40 + len as u32).to_le_bytes()[..], &opcode.to_le_bytes(), &unique.to_le_bytes()];
    [&words.concat()[..], &node.to_le_bytes(), &[0; 16]].concat()
}

fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn short(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// What a `fuse_entry_out` says.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    node: u64,
    size: u64,
    mode: u32,
    links: u32,
    owner: (u32, u32),
}

impl Entry {
    fn parse(bytes: &[u8]) -> Self {
        Self { node: long(bytes, 0), ..Self::of_attributes(&bytes[40..]) }
    }

    fn of_attributes(bytes: &[u8]) -> Self {
        let owner = (short(bytes, 68), short(bytes, 72));
        Self { node: 0, size: long(bytes, 8), mode: short(bytes, 60), links: short(bytes, 64), owner }
    }
}

fn init_args(major: u32, minor: u32) -> Vec<u8> {
    u32s(&[&[major, minor, 1 << 17, u32::MAX][..], &[0; 12]].concat())
}

fn rig_with(dir: TempDir, options: &str, limits: Limits) -> Rig {
    rig_of(dir, "", options, limits)
}

/// Of what has that name in `dir`.
fn rig_of(dir: TempDir, shared: &str, options: &str, limits: Limits) -> Rig {
    let mut text = dir.path().join(shared).into_os_string();
    text.push(",tag=test");
    text.push(options);
    let config = ShareConfig::parse(&text).unwrap();
    let (share, server) = Share::open(&config, 0, limits, &Registry::default()).unwrap();
    let (counters, session) = (share.counters(), share.session.clone());
    let threads = server.start(Confined::threads_alone()).unwrap();
    let mut driver = Driver::start(Box::new(share), &[64, 512]);
    driver.free_buffers();
    let mut rig = Rig { driver, counters, session, _threads: threads, dir, unique: 0 };
    rig.good(op::INIT, 0, &init_args(7, 37));
    rig
}

fn rig() -> Rig {
    rig_with(tempfile::tempdir().unwrap(), "", MANY)
}

fn readonly() -> Rig {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "host").unwrap();
    fs::create_dir(dir.path().join("folder")).unwrap();
    rig_with(dir, ",readonly", MANY)
}

impl Rig {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A request and its answer: an error's number or 0, and what stands behind the header.
    fn ask_with(&mut self, opcode: u32, node: u64, args: &[u8], room: u32) -> (i32, Vec<u8>) {
        self.unique += 1;
        self.driver.free_buffers();
        let request =
            self.driver.filled(&[header(opcode, self.unique, node, args.len()), args.to_vec()].concat());
        let answer = self.driver.buffer(16 + room);
        self.driver.offer(1, &[request], &[answer]);
        let (_, written) = self.driver.wait_used(1);
        let bytes = self.driver.bytes(answer);
        assert_eq!((short(&bytes, 0), long(&bytes, 8)), (written, self.unique), "a header that is none");
        assert!(bytes[written as usize..].iter().all(|b| *b == 0xaa), "more was written than was said");
        (-(short(&bytes, 4) as i32), bytes[16..written as usize].to_vec())
    }

    fn ask(&mut self, opcode: u32, node: u64, args: &[u8]) -> (i32, Vec<u8>) {
        self.ask_with(opcode, node, args, ROOMY)
    }

    #[track_caller]
    fn good(&mut self, opcode: u32, node: u64, args: &[u8]) -> Vec<u8> {
        let (error, bytes) = self.ask(opcode, node, args);
        assert_eq!(error, 0, "operation {opcode}: {}", std::io::Error::from_raw_os_error(error));
        bytes
    }

    fn error(&mut self, opcode: u32, node: u64, args: &[u8]) -> i32 {
        self.ask(opcode, node, args).0
    }

    #[track_caller]
    fn lookup(&mut self, parent: u64, text: &str) -> Entry {
        Entry::parse(&self.good(op::LOOKUP, parent, &name(text)))
    }

    #[track_caller]
    fn open(&mut self, node: u64, flags: i32) -> u64 {
        long(&self.good(op::OPEN, node, &u32s(&[flags as u32, 0])), 0)
    }

    #[track_caller]
    fn create(&mut self, parent: u64, text: &str, flags: i32, mode: u32) -> (Entry, u64) {
        let bytes = self.good(op::CREATE, parent, &create_args(text, flags, mode));
        (Entry::parse(&bytes), long(&bytes, ENTRY_OUT))
    }

    #[track_caller]
    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> u32 {
        short(&self.good(op::WRITE, 0, &write_args(handle, offset, data)), 0)
    }

    #[track_caller]
    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Vec<u8> {
        let (error, bytes) = self.ask_with(op::READ, 0, &read_args(handle, offset, size), size);
        assert_eq!(error, 0);
        bytes
    }

    fn setattr(&mut self, node: u64, what: u32, change: impl FnOnce(&mut [u8])) -> (i32, Vec<u8>) {
        let mut args = vec![0; 88];
        args[..4].copy_from_slice(&what.to_le_bytes());
        change(&mut args);
        self.ask(op::SETATTR, node, &args)
    }

    fn chmod(&mut self, node: u64, mode: u32) -> (i32, Vec<u8>) {
        self.setattr(node, set::MODE, |args| args[68..72].copy_from_slice(&mode.to_le_bytes()))
    }

    /// Names and kinds in a folder.
    fn list(&mut self, node: u64) -> Vec<(String, u32)> {
        let handle = long(&self.good(op::OPENDIR, node, &u32s(&[0, 0])), 0);
        let (mut all, mut offset) = (Vec::new(), 0);
        loop {
            let args = [&u64s(&[handle, offset])[..], &u32s(&[200, 0]), &u64s(&[0, 0])].concat();
            let bytes = self.good(op::READDIR, node, &args);
            if bytes.is_empty() {
                break;
            }
            let mut at = 0;
            while at < bytes.len() {
                let len = short(&bytes, at + 16) as usize;
                offset = long(&bytes, at + 8);
                let text = String::from_utf8(bytes[at + 24..at + 24 + len].to_vec()).unwrap();
                let end = at + 24 + len.next_multiple_of(8);
                assert!(
                    bytes[at + 24 + len..end].iter().all(|b| *b == 0),
                    "what fills {text} up is not zero"
                );
                all.push((text, short(&bytes, at + 20)));
                at = end;
            }
        }
        self.good(op::RELEASEDIR, node, &u64s(&[handle, 0, 0]));
        all.sort();
        all
    }
}

fn create_args(text: &str, flags: i32, mode: u32) -> Vec<u8> {
    [u32s(&[flags as u32, mode, 0, 0]), name(text)].concat()
}

fn write_args(handle: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let head = [&u64s(&[handle, offset])[..], &u32s(&[data.len() as u32, 0]), &u64s(&[0, 0])].concat();
    [&head[..], data].concat()
}

fn read_args(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [&u64s(&[handle, offset])[..], &u32s(&[size, 0]), &u64s(&[0, 0])].concat()
}

/// For tests of all kinds of devices.
pub fn rig_of_any_kind() -> testing::Rig {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "host").unwrap();
    let text = format!("{},tag=any", dir.path().display());
    let config = ShareConfig::parse(text.as_ref()).unwrap();
    let (share, server) = Share::open(&config, 0, MANY, &Registry::default()).unwrap();
    let threads = server.start(Confined::threads_alone()).unwrap();
    let ask = |driver: &mut Driver, opcode, args: &[u8]| {
        let request = driver.filled(&[header(opcode, 1, ROOT, args.len()), args.to_vec()].concat());
        let answer = driver.buffer(300);
        driver.offer(1, &[request], &[answer]);
        driver.wait_used(1);
        driver.bytes(answer)
    };
    testing::Rig {
        name: "share",
        driver: Driver::start(Box::new(share), &[16, 16]),
        sizes: vec![16, 16],
        queues: vec![0, 1],
        stir: Box::new(|| {}),
        offer: Box::new(|driver| {
            for queue in 0..2 {
                let request = driver.filled(&[header(op::LOOKUP, 1, ROOT, 5), name("file")].concat());
                let answer = driver.buffer(300);
                driver.post(queue, &[request], &[answer]);
            }
        }),
        works: Box::new(move |driver| {
            // They live as long as the device is tested.
            let _ = &threads;
            assert_eq!(short(&ask(driver, op::INIT, &init_args(7, 31)), 4), 0);
            let answer = ask(driver, op::LOOKUP, &name("file"));
            assert_eq!((short(&answer, 4), Entry::parse(&answer[16..]).size), (0, 4));
            assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"host");
        }),
    }
}

#[test]
fn the_configuration_has_tag_and_queues() {
    let mut rig = rig();
    let mut words = [0; 10];
    for (at, word) in words.iter_mut().enumerate() {
        *word = rig.driver.read(0x100 + 4 * at as u64);
    }
    assert_eq!((words[0].to_le_bytes(), words[1], words[9]), (*b"test", 0, 1));
    assert_eq!(rig.driver.read(8), 26);
}

#[test]
fn init_is_answered_with_what_both_know() {
    let mut rig = rig();
    let bytes = rig.good(op::INIT, 0, &init_args(7, 41));
    assert_eq!((bytes.len(), short(&bytes, 0), short(&bytes, 4)), (64, 7, 31));
    let known = (1 << 0) | (1 << 3) | (1 << 5) | (1 << 12) | (1 << 13) | (1 << 14) | (1 << 18) | (1 << 22);
    assert_eq!((short(&bytes, 12), short(&bytes, 20)), (known, 1 << 20));
    // A future version is told ours, and asks again; an old one is refused.
    assert_eq!(short(&rig.good(op::INIT, 0, &init_args(8, 0)), 0), 7);
    assert_eq!(rig.error(op::LOOKUP, ROOT, &name("x")), libc::EIO);
    for (major, minor) in [(7, 30), (6, 99)] {
        assert_eq!(rig.error(op::INIT, 0, &init_args(major, minor)), libc::EPROTO);
    }
    assert_eq!(rig.error(op::INIT, 0, &[7, 0, 0, 0]), libc::EINVAL);
}

#[test]
fn before_init_and_after_destroy_nothing_is_done() {
    let mut rig = rig();
    rig.good(op::DESTROY, 0, &[]);
    assert_eq!(rig.error(op::MKDIR, ROOT, &[u32s(&[0o777, 0]), name("x")].concat()), libc::EIO);
    assert!(!rig.path("x").exists());
}

#[test]
fn what_is_written_is_read_on_both_sides() {
    let mut rig = rig();
    let (entry, handle) = rig.create(ROOT, "new", libc::O_RDWR | libc::O_EXCL, 0o100_640);
    assert_eq!((entry.mode, entry.size, entry.owner), (0o100_640, 0, (0, 0)));
    assert_eq!(rig.write(handle, 3, b"hello"), 5);
    assert_eq!(fs::read(rig.path("new")).unwrap(), b"\0\0\0hello");
    assert_eq!(rig.read(handle, 1, 4), b"\0\0he");
    assert_eq!(rig.read(handle, 6, 4000), b"lo");
    assert_eq!(rig.read(handle, 1 << 40, 10), b"");
    let file = File::options().write(true).open(rig.path("new")).unwrap();
    file.write_all_at(b"HOST", 4).unwrap();
    assert_eq!(rig.read(handle, 0, 100), b"\0\0\0hHOST");
    assert_eq!(rig.error(op::CREATE, ROOT, &create_args("new", libc::O_EXCL, 0o600)), libc::EEXIST);
    let (again, other) = rig.create(ROOT, "new", libc::O_WRONLY | libc::O_TRUNC, 0o600);
    assert_eq!((again.node, again.size), (entry.node, 0));
    assert_eq!(rig.error(op::READ, 0, &read_args(other, 0, 1)), libc::EBADF);
    for sync in [0, 1] {
        rig.good(op::FSYNC, entry.node, &[u64s(&[handle]), u32s(&[sync, 0])].concat());
    }
    rig.good(op::RELEASE, entry.node, &u64s(&[handle, 0, 0]));
    assert_eq!(rig.error(op::READ, 0, &read_args(handle, 0, 1)), libc::EBADF);
    assert_eq!((rig.counters.written_bytes.get(), rig.counters.open.get()), (5, 1));
}

/// As Linux has a page each: the kernel reads and writes all of them itself.
#[test]
fn pieces_of_guest_memory_are_read_and_written_in_order() {
    let mut rig = rig();
    let (_, handle) = rig.create(ROOT, "big", libc::O_RDWR, 0o600);
    let data: Vec<u8> = (0..1_u32 << 20).map(|i| (i / 251) as u8 ^ i as u8).collect();
    let head = [header(op::WRITE, 9, 0, 40), write_args(handle, 5, &[])].concat();
    let head = [&head[..56], &u32s(&[data.len() as u32])[..], &head[60..]].concat();
    let pages: Vec<Buffer> = data.chunks(4096).map(|page| rig.driver.filled(page)).collect();
    let (head, answer) = (rig.driver.filled(&head), rig.driver.buffer(24));
    rig.driver.offer(1, &[&[head], &pages[..]].concat(), &[answer]);
    assert_eq!(rig.driver.wait_used(1).1, 24);
    assert_eq!(short(&rig.driver.bytes(answer), 16), data.len() as u32);
    assert_eq!(fs::read(rig.path("big")).unwrap()[5..], data[..]);
    rig.driver.free_buffers();
    let args = read_args(handle, 5, data.len() as u32);
    let (head, answer) = ([header(op::READ, 9, 0, 40), args].concat(), rig.driver.buffer(16));
    let head = rig.driver.filled(&head);
    let pages: Vec<Buffer> = (0..256).map(|_| rig.driver.buffer(4096)).collect();
    rig.driver.offer(1, &[head], &[&[answer], &pages[..]].concat());
    assert_eq!(rig.driver.wait_used(1).1 as usize, 16 + data.len());
    assert!(pages.iter().flat_map(|page| rig.driver.bytes(*page)).eq(data));
}

#[test]
fn a_tree_is_made_renamed_linked_and_removed() {
    let mut rig = rig();
    let folder = Entry::parse(&rig.good(op::MKDIR, ROOT, &[u32s(&[0o750, 0]), name("d")].concat()));
    assert_eq!(folder.mode, 0o040_750);
    let (file, _) = rig.create(folder.node, "f", libc::O_WRONLY, 0o644);
    let link = rig.good(op::LINK, ROOT, &[u64s(&[file.node]), name("second")].concat());
    assert_eq!((Entry::parse(&link).node, Entry::parse(&link).links), (file.node, 2));
    rig.good(op::SYMLINK, folder.node, &[name("s"), name("../../../etc/passwd")].concat());
    let link = rig.lookup(folder.node, "s");
    assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(rig.good(op::READLINK, link.node, &[]), b"../../../etc/passwd");
    assert_eq!(rig.error(op::READLINK, file.node, &[]), libc::EINVAL);
    rig.good(op::MKNOD, folder.node, &[u32s(&[0o100_600, 0, 0, 0]), name("plain")].concat());
    rig.good(op::RENAME, folder.node, &[u64s(&[ROOT]), name("f"), name("moved")].concat());
    let no_replace = [&u64s(&[ROOT])[..], &u32s(&[1, 0]), &name("second"), &name("moved")].concat();
    assert_eq!(rig.error(op::RENAME2, ROOT, &no_replace), libc::EEXIST);
    let whiteout = [&u64s(&[ROOT])[..], &u32s(&[4, 0]), &name("second"), &name("x")].concat();
    assert_eq!(rig.error(op::RENAME2, ROOT, &whiteout), libc::EINVAL);
    // What the guest knows is the same file wherever it lies.
    let expected: Vec<_> =
        [(".", 4), ("..", 4), ("plain", 8), ("s", 10)].map(|(n, k)| (n.to_string(), k)).to_vec();
    assert_eq!(rig.list(folder.node), expected);
    assert_eq!(rig.lookup(ROOT, "moved").node, file.node);
    rig.good(op::UNLINK, folder.node, &name("plain"));
    rig.good(op::UNLINK, folder.node, &name("s"));
    assert_eq!(rig.error(op::UNLINK, ROOT, &name("d")), libc::EISDIR);
    rig.good(op::RMDIR, ROOT, &name("d"));
    assert!(!rig.path("d").exists());
    let stat = rig.good(op::STATFS, ROOT, &[]);
    assert_eq!((stat.len(), short(&stat, 44)), (80, 255));
}

#[test]
fn names_that_lead_elsewhere_are_refused_everywhere() {
    let mut rig = rig();
    fs::write(rig.path("file"), "").unwrap();
    let node = rig.lookup(ROOT, "file").node;
    for bad in ["..", ".", "", "a/b", "/etc", "../file", "file/"] {
        let bad = name(bad);
        let mode = u32s(&[0o755, 0]);
        for (opcode, args) in [
            (op::LOOKUP, bad.clone()),
            (op::UNLINK, bad.clone()),
            (op::RMDIR, bad.clone()),
            (op::MKDIR, [&mode[..], &bad].concat()),
            (op::MKNOD, [&u32s(&[0o100_644, 0, 0, 0])[..], &bad].concat()),
            (op::CREATE, [&u32s(&[0, 0o644, 0, 0])[..], &bad].concat()),
            (op::SYMLINK, [&bad[..], &name("x")].concat()),
            (op::LINK, [&u64s(&[node])[..], &bad].concat()),
            (op::RENAME, [&u64s(&[ROOT])[..], &bad, &name("x")].concat()),
            (op::RENAME, [&u64s(&[ROOT])[..], &name("file"), &bad].concat()),
            (op::RENAME2, [&u64s(&[ROOT])[..], &u32s(&[0, 0]), &name("file"), &bad].concat()),
        ] {
            assert_eq!(rig.error(opcode, ROOT, &args), libc::EINVAL, "{opcode} {bad:?}");
        }
    }
    // Without the NUL that ends it.
    assert_eq!(rig.error(op::LOOKUP, ROOT, b"file"), libc::EINVAL);
    assert_eq!(fs::read_dir(rig.dir.path()).unwrap().count(), 1);
}

#[test]
fn symbolic_links_are_never_followed() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let mut rig = rig();
    symlink(outside.path(), rig.path("folder")).unwrap();
    symlink(outside.path().join("secret"), rig.path("file")).unwrap();
    symlink(outside.path().join("made"), rig.path("dangling")).unwrap();
    symlink("/proc/self/root", rig.path("magic")).unwrap();
    for text in ["folder", "file", "magic", "dangling"] {
        let link = rig.lookup(ROOT, text);
        assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(rig.error(op::OPEN, link.node, &u32s(&[0, 0])), libc::ELOOP);
        assert_eq!(rig.error(op::OPENDIR, link.node, &u32s(&[0, 0])), libc::ELOOP);
        assert_eq!(rig.error(op::LOOKUP, link.node, &name("secret")), libc::ENOTDIR);
        assert_eq!(rig.error(op::CREATE, link.node, &create_args("x", libc::O_WRONLY, 0o644)), libc::ENOTDIR);
        assert_eq!(rig.error(op::CREATE, ROOT, &create_args(text, libc::O_WRONLY, 0o644)), libc::ELOOP);
        assert_eq!(rig.chmod(link.node, 0o777).0, libc::EOPNOTSUPP);
        assert_ne!(rig.setattr(link.node, set::SIZE, |_| {}).0, 0);
        // Of the link itself.
        assert_eq!(rig.setattr(link.node, set::MTIME, |args| args[40] = 7).0, 0);
        rig.good(op::LINK, ROOT, &[u64s(&[link.node]), name(&format!("{text}2"))].concat());
        assert!(rig.path(&format!("{text}2")).symlink_metadata().unwrap().is_symlink());
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
    assert_ne!(fs::metadata(outside.path().join("secret")).unwrap().mtime(), 7);
}

/// A folder that the guest knows becomes a link to elsewhere: what the guest knows is the folder still.
#[test]
fn a_name_that_becomes_a_link_leads_nowhere_else() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("f"), "outside").unwrap();
    let mut rig = rig();
    fs::create_dir(rig.path("d")).unwrap();
    fs::write(rig.path("d/f"), "inside").unwrap();
    let (folder, file) = (rig.lookup(ROOT, "d").node, rig.path("d/f"));
    let node = rig.lookup(folder, "f").node;
    fs::rename(rig.path("d"), rig.path("old")).unwrap();
    symlink(outside.path(), rig.path("d")).unwrap();
    fs::write(file.with_file_name("g"), "").unwrap_or_default();
    for node in [node, rig.lookup(folder, "f").node] {
        let handle = rig.open(node, libc::O_RDONLY);
        assert_eq!(rig.read(handle, 0, 100), b"inside");
    }
    rig.create(folder, "new", libc::O_WRONLY, 0o600);
    assert!(rig.path("old/new").exists() && !outside.path().join("new").exists());
}

#[test]
fn pipes_sockets_and_devices_are_neither_opened_nor_made() {
    let mut rig = rig();
    let fifo = rig.path("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(rig.path("socket")).unwrap();
    for text in ["fifo", "socket"] {
        let node = rig.lookup(ROOT, text).node;
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
            assert_eq!(rig.error(op::OPEN, node, &u32s(&[flags as u32, 0])), libc::EACCES);
            assert_eq!(rig.error(op::CREATE, ROOT, &create_args(text, flags, 0o644)), libc::EACCES);
        }
        assert_ne!(rig.setattr(node, set::SIZE, |_| {}).0, 0);
        assert_eq!(rig.chmod(node, 0o777).0, libc::EOPNOTSUPP);
    }
    for kind in [libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFBLK, libc::S_IFDIR, libc::S_IFLNK, 0]
    {
        let args = [u32s(&[kind | 0o644, 0x0103, 0, 0]), name("new")].concat();
        assert_eq!(rig.error(op::MKNOD, ROOT, &args), libc::EPERM);
    }
    assert!(!rig.path("new").exists());
}

#[test]
fn set_user_id_never_reaches_the_host() {
    let mut rig = rig();
    let (file, _) = rig.create(ROOT, "created", libc::O_WRONLY, 0o106_755);
    rig.good(op::MKNOD, ROOT, &[u32s(&[0o106_755, 0, 0, 0]), name("made")].concat());
    rig.good(op::MKDIR, ROOT, &[u32s(&[0o7777, 0]), name("folder")].concat());
    let (error, bytes) = rig.chmod(file.node, 0o106_711);
    assert_eq!((error, Entry::of_attributes(&bytes[16..]).mode), (0, 0o100_711));
    for (text, mode) in [("created", 0o711), ("made", 0o755), ("folder", 0o1777)] {
        assert_eq!(fs::metadata(rig.path(text)).unwrap().mode() & 0o7777, mode, "{text}");
    }
    // A folder keeps what the host gave it.
    fs::set_permissions(rig.path("folder"), fs::Permissions::from_mode(0o2755)).unwrap();
    let node = rig.lookup(ROOT, "folder").node;
    assert_eq!(rig.chmod(node, 0o700).0, 0);
    assert_eq!(fs::metadata(rig.path("folder")).unwrap().mode() & 0o7777, 0o2700);
}

#[test]
fn owners_are_mapped_and_given_to_nobody() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("ours"), "").unwrap();
    let others = File::create(dir.path().join("others")).unwrap();
    // Root alone can make another's file.
    let is_root = std::os::unix::fs::fchown(&others, Some(12345), Some(12345)).is_ok();
    let mut rig = rig_with(dir, ",uid=999,gid=998", MANY);
    let ours = rig.lookup(ROOT, "ours");
    assert_eq!(ours.owner, (999, 998));
    if is_root {
        assert_eq!(rig.lookup(ROOT, "others").owner, (65534, 65534));
    }
    let mut chown = |what, uid: u32, gid: u32| {
        let change = |args: &mut [u8]| {
            args[76..80].copy_from_slice(&uid.to_le_bytes());
            args[80..84].copy_from_slice(&gid.to_le_bytes());
        };
        rig.setattr(ours.node, what, change).0
    };
    assert_eq!(chown(set::UID | set::GID, 999, 998), 0);
    for (what, uid, gid) in
        [(set::UID, 0, 0), (set::UID, 65534, 0), (set::GID, 0, 0), (set::UID | set::GID, 999, 1)]
    {
        assert_eq!(chown(what, uid, gid), libc::EPERM);
    }
}

#[test]
fn times_and_lengths_are_set() {
    let mut rig = rig();
    let (file, handle) = rig.create(ROOT, "f", libc::O_RDWR, 0o444);
    let size = |args: &mut [u8]| args[16..24].copy_from_slice(&1000_u64.to_le_bytes());
    // By an open file also where its permissions forbid another opening.
    let by_handle = |args: &mut [u8]| {
        size(args);
        args[8..16].copy_from_slice(&handle.to_le_bytes());
    };
    let (error, bytes) = rig.setattr(file.node, set::SIZE | set::FH, by_handle);
    assert_eq!((error, Entry::of_attributes(&bytes[16..]).size), (0, 1000));
    let huge = |args: &mut [u8]| args[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(rig.setattr(file.node, set::SIZE, huge).0, libc::EFBIG);
    let times = |args: &mut [u8]| {
        args[32..40].copy_from_slice(&1_000_000_000_u64.to_le_bytes());
        args[40..48].copy_from_slice(&1_000_000_001_u64.to_le_bytes());
        args[60..64].copy_from_slice(&5_u32.to_le_bytes());
    };
    assert_eq!(rig.setattr(file.node, set::ATIME | set::MTIME, times).0, 0);
    let stat = fs::metadata(rig.path("f")).unwrap();
    assert_eq!((stat.atime(), stat.mtime(), stat.mtime_nsec()), (1_000_000_000, 1_000_000_001, 5));
    let bad = |args: &mut [u8]| args[60..64].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(rig.setattr(file.node, set::MTIME, bad).0, libc::EINVAL);
    assert_eq!(rig.setattr(file.node, set::MTIME_NOW, |_| {}).0, 0);
    assert!(fs::metadata(rig.path("f")).unwrap().mtime() > 1_700_000_000);
    for (mode, expected) in
        [(0, 0), (1, 0), (3, 0), (0x10, 0), (0x40, libc::EOPNOTSUPP), (8, libc::EOPNOTSUPP)]
    {
        let args = [u64s(&[handle, 0, 4096]), u32s(&[mode, 0])].concat();
        let error = rig.error(op::FALLOCATE, file.node, &args);
        // Not every file system can.
        assert!(error == expected || error == libc::EOPNOTSUPP, "{mode}: {error}");
    }
}

#[test]
fn a_read_only_share_changes_nothing_whatever_is_asked() {
    let mut rig = readonly();
    let (file, folder) = (rig.lookup(ROOT, "file").node, rig.lookup(ROOT, "folder").node);
    let handle = rig.open(file, libc::O_RDONLY);
    assert_eq!(rig.read(handle, 0, 10), b"host");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC] {
        assert_eq!(rig.error(op::OPEN, file, &u32s(&[flags as u32, 0])), libc::EROFS);
    }
    assert_eq!(rig.error(op::OPEN, file, &u32s(&[3, 0])), libc::EINVAL);
    for (opcode, node, args) in [
        (op::WRITE, file, write_args(handle, 0, b"x")),
        (op::SETATTR, file, vec![0; 88]),
        (op::CREATE, ROOT, create_args("new", 0, 0o644)),
        (op::CREATE, ROOT, create_args("file", 0, 0o644)),
        (op::MKNOD, ROOT, [u32s(&[0o100_644, 0, 0, 0]), name("new")].concat()),
        (op::MKDIR, ROOT, [u32s(&[0o755, 0]), name("new")].concat()),
        (op::SYMLINK, ROOT, [name("new"), name("x")].concat()),
        (op::LINK, ROOT, [u64s(&[file]), name("new")].concat()),
        (op::UNLINK, ROOT, name("file")),
        (op::RMDIR, ROOT, name("folder")),
        (op::RENAME, ROOT, [u64s(&[folder]), name("file"), name("file")].concat()),
        (op::RENAME2, ROOT, [&u64s(&[folder])[..], &u32s(&[0, 0]), &name("file"), &name("f")].concat()),
        (op::FALLOCATE, file, [u64s(&[handle, 0, 10]), u32s(&[0, 0])].concat()),
    ] {
        assert_eq!(rig.error(opcode, node, &args), libc::EROFS, "{opcode}");
    }
    rig.good(op::FSYNC, file, &u64s(&[handle, 0]));
    let names: Vec<_> = rig.list(ROOT).into_iter().map(|(text, _)| text).collect();
    assert_eq!(names, [".", "..", "file", "folder"]);
    assert_eq!(fs::read(rig.path("file")).unwrap(), b"host");
}

#[test]
fn files_and_open_files_are_bounded_and_come_free_again() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..20 {
        fs::write(dir.path().join(format!("f{n}")), "").unwrap();
    }
    let mut rig = rig_with(dir, "", Limits { inodes: 10, handles: 4 });
    let nodes: Vec<_> = (0..10).map(|n| rig.lookup(ROOT, &format!("f{n}")).node).collect();
    assert_eq!(rig.error(op::LOOKUP, ROOT, &name("f10")), libc::EMFILE);
    // What is known is no other.
    assert_eq!(rig.lookup(ROOT, "f3").node, nodes[3]);
    let handles: Vec<_> = (0..4).map(|_| rig.open(nodes[0], libc::O_RDONLY)).collect();
    assert_eq!(rig.error(op::OPEN, nodes[0], &u32s(&[0, 0])), libc::EMFILE);
    assert_eq!(rig.error(op::OPENDIR, ROOT, &u32s(&[0, 0])), libc::EMFILE);
    assert_eq!(rig.error(op::CREATE, ROOT, &create_args("f0", 0, 0o644)), libc::EMFILE);
    rig.good(op::RELEASE, nodes[0], &u64s(&[handles[0], 0, 0]));
    rig.open(nodes[0], libc::O_RDONLY);
    assert_eq!((rig.counters.inodes.get(), rig.counters.open.get()), (10, 4));
    // Known twice, so it is forgotten after the second time.
    for _ in 0..2 {
        assert!(rig.error(op::LOOKUP, ROOT, &name("f10")) == libc::EMFILE);
        forget(&mut rig, nodes[3], 1);
    }
    let new = rig.lookup(ROOT, "f10").node;
    assert!(!nodes.contains(&new), "a number is given again");
    assert_eq!(rig.error(op::GETATTR, nodes[3], &[0; 16]), libc::ESTALE);
    // More than there is, of nothing, and of the root.
    for (node, times) in [(new, u64::MAX), (new, 1), (u64::MAX, 1), (0, 1), (ROOT, u64::MAX)] {
        forget(&mut rig, node, times);
    }
    rig.good(op::GETATTR, ROOT, &[0; 16]);
    assert_eq!(rig.counters.inodes.get(), 9);
    let batch = [u32s(&[u32::MAX, 0]), u64s(&[nodes[0], 9, nodes[1], 9])].concat();
    let request = [header(op::BATCH_FORGET, 0, 0, batch.len()), batch].concat();
    let request = rig.driver.filled(&request);
    rig.driver.offer(0, &[request], &[]);
    assert_eq!(rig.driver.wait_used(0).1, 0);
    assert_eq!(rig.counters.inodes.get(), 7);
}

fn forget(rig: &mut Rig, node: u64, times: u64) {
    let request = [header(op::FORGET, 0, node, 8), u64s(&[times])].concat();
    let request = rig.driver.filled(&request);
    rig.driver.offer(0, &[request], &[]);
    assert_eq!(rig.driver.wait_used(0).1, 0);
}

#[test]
fn folders_are_listed_with_what_describes_each() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..300 {
        fs::write(dir.path().join(format!("file-{n}")), vec![0; n]).unwrap();
    }
    let mut rig = rig_with(dir, "", Limits { inodes: 250, handles: 4 });
    let handle = long(&rig.good(op::OPENDIR, ROOT, &u32s(&[0, 0])), 0);
    let (mut offset, mut seen, mut known) = (0, Vec::new(), 0);
    loop {
        let args = [&u64s(&[handle, offset])[..], &u32s(&[ROOMY, 0]), &u64s(&[0, 0])].concat();
        let bytes = rig.good(op::READDIRPLUS, ROOT, &args);
        if bytes.is_empty() {
            break;
        }
        let mut at = 0;
        while at < bytes.len() {
            let (entry, dirent) = (Entry::parse(&bytes[at..]), at + ENTRY_OUT);
            let len = short(&bytes, dirent + 16) as usize;
            let text = String::from_utf8(bytes[dirent + 24..dirent + 24 + len].to_vec()).unwrap();
            if let (Some(size), true) = (text.strip_prefix("file-"), entry.node != 0) {
                assert_eq!(entry.size.to_string(), size);
                known += 1;
            }
            seen.push(text);
            offset = long(&bytes, dirent + 8);
            at = dirent + 24 + len.next_multiple_of(8);
        }
    }
    seen.sort();
    seen.dedup();
    // Those beyond the bound are names alone.
    assert_eq!((seen.len(), known, rig.counters.inodes.get()), (302, 250, 250));
    let nowhere = |offset: u64| [&u64s(&[handle, offset])[..], &u32s(&[ROOMY, 0]), &u64s(&[0, 0])].concat();
    for offset in [u64::MAX, 1 << 63, 12345] {
        let (error, _) = rig.ask(op::READDIR, ROOT, &nowhere(offset));
        assert!([0, libc::EINVAL].contains(&error), "{error}");
    }
    // No room for a single one.
    let small = [&u64s(&[handle, 0])[..], &u32s(&[10, 0]), &u64s(&[0, 0])].concat();
    assert_eq!(rig.good(op::READDIR, ROOT, &small), b"");
    assert_eq!(rig.error(op::READ, ROOT, &read_args(handle, 0, 10)), libc::EISDIR);
    rig.good(op::FSYNCDIR, ROOT, &[u64s(&[handle]), u32s(&[0, 0])].concat());
}

#[test]
fn the_parent_of_the_root_is_not_told() {
    let mut rig = rig();
    let handle = long(&rig.good(op::OPENDIR, ROOT, &u32s(&[0, 0])), 0);
    let args = [&u64s(&[handle, 0])[..], &u32s(&[ROOMY, 0]), &u64s(&[0, 0])].concat();
    let bytes = rig.good(op::READDIR, ROOT, &args);
    let above = fs::metadata(rig.dir.path().parent().unwrap()).unwrap().ino();
    assert!(bytes.len() >= 64 && bytes.chunks_exact(32).all(|entry| long(entry, 0) != above));
}

#[test]
fn extended_attributes_and_whatever_else_there_is_are_unknown() {
    let mut rig = rig();
    for opcode in (0..60).chain([4096, u32::MAX]) {
        if matches!(opcode, 1..=6 | 8..=18 | 20 | 26..=30 | 35 | 36 | 38 | 42..=45) {
            continue;
        }
        assert_eq!(rig.error(opcode, ROOT, &[0; 64]), libc::ENOSYS, "{opcode}");
    }
}

#[test]
fn lengths_that_lie_are_errors() {
    let mut rig = rig();
    let (file, handle) = rig.create(ROOT, "f", libc::O_RDWR, 0o644);
    // More to write than there is.
    let mut args = write_args(handle, 0, b"abc");
    args[16..20].copy_from_slice(&4_u32.to_le_bytes());
    assert_eq!(rig.error(op::WRITE, 0, &args), libc::EINVAL);
    assert_eq!(rig.error(op::WRITE, 0, &args[..39]), libc::EINVAL);
    assert_eq!(rig.write(handle, 0, b""), 0);
    for offset in [u64::MAX, 1 << 63] {
        assert_eq!(rig.error(op::WRITE, 0, &write_args(handle, offset, b"abc")), libc::EINVAL);
        assert_eq!(rig.ask_with(op::READ, 0, &read_args(handle, offset, 3), 3).0, libc::EINVAL);
    }
    let error = rig.error(op::WRITE, 0, &write_args(handle, i64::MAX as u64, b"abc"));
    assert!([libc::EINVAL, libc::EFBIG].contains(&error), "{error}");
    rig.write(handle, 0, b"contents");
    // More to read than there is room.
    assert_eq!(rig.ask_with(op::READ, 0, &read_args(handle, 0, u32::MAX), 4), (0, b"cont".to_vec()));
    assert_eq!(rig.error(op::WRITE, 0, &write_args(handle, 0, &vec![b'x'; (1 << 20) + 1])), libc::EINVAL);
    assert_eq!(rig.error(op::LOOKUP, ROOT, &vec![b'x'; 20000]), libc::E2BIG);
    assert_eq!(rig.error(op::LOOKUP, ROOT, &[vec![b'x'; 300], vec![0]].concat()), libc::ENAMETOOLONG);
    for opcode in [op::SETATTR, op::GETATTR, op::OPEN, op::RENAME, op::LINK, op::FALLOCATE, op::READDIR] {
        assert_eq!(rig.error(opcode, file.node, &[1, 2, 3]), libc::EINVAL, "{opcode}");
    }
    // The answer has no room: it is done, and the guest hears of an error.
    assert_eq!(rig.ask_with(op::LOOKUP, ROOT, &name("f"), 127).0, libc::EIO);
}

#[test]
fn a_chain_that_is_no_request_is_given_back() {
    let mut rig = rig();
    let short_request = rig.driver.filled(&header(op::MKDIR, 1, ROOT, 0)[..39]);
    let answer = rig.driver.buffer(100);
    rig.driver.offer(1, &[short_request], &[answer]);
    assert_eq!(rig.driver.wait_used(1).1, 0);
    // Nothing is done that the guest could not be told of.
    let args = [u32s(&[0o755, 0]), name("d")].concat();
    let request = rig.driver.filled(&[header(op::MKDIR, 1, ROOT, args.len()), args].concat());
    let answer = rig.driver.buffer(15);
    rig.driver.offer(1, &[request], &[answer]);
    assert_eq!(rig.driver.wait_used(1).1, 0);
    rig.driver.offer(1, &[request], &[]);
    assert_eq!(rig.driver.wait_used(1).1, 0);
    assert!(!rig.path("d").exists());
}

/// What was checked is what is used: a name that changes its bytes meanwhile is one of the two.
#[test]
fn a_request_that_changes_meanwhile_is_one_or_the_other() {
    let mut rig = rig();
    fs::create_dir(rig.path("dd")).unwrap();
    fs::write(rig.path("dd/x"), "").unwrap();
    let node = rig.lookup(ROOT, "dd").node;
    let args = name("xx");
    let request = rig.driver.filled(&[header(op::LOOKUP, 1, node, args.len()), args].concat());
    let at = GuestAddress(request.0 + 40);
    let memory = rig.driver.memory.clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for bytes in [b"..\0", b"xx\0", b"x\0\0", b"x/\0"] {
                    memory.guest().write_slice(bytes, at).unwrap();
                }
            }
        });
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(300) {
            let answer = rig.driver.buffer(300);
            rig.driver.offer(1, &[request], &[answer]);
            rig.driver.wait_used(1);
            let bytes = rig.driver.bytes(answer);
            let error = -(short(&bytes, 4) as i32);
            assert!([0, libc::ENOENT, libc::EINVAL].contains(&error), "{error}");
            rig.driver.free_buffers();
            rig.driver.buffer(8192);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_reset_forgets_everything() {
    let mut rig = rig();
    let (_, handle) = rig.create(ROOT, "f", libc::O_RDWR, 0o644);
    rig.driver.restart(&[64, 512]);
    assert_eq!((rig.counters.inodes.get(), rig.counters.open.get()), (0, 0));
    assert_eq!(rig.error(op::READ, 0, &read_args(handle, 0, 1)), libc::EIO);
    rig.good(op::INIT, 0, &init_args(7, 31));
    assert_eq!(rig.error(op::READ, 0, &read_args(handle, 0, 1)), libc::EBADF);
    let own = std::process::id();
    let open = fs::read_dir(format!("/proc/{own}/fd")).unwrap();
    let ours = open
        .filter(|e| fs::read_link(e.as_ref().unwrap().path()).is_ok_and(|to| to.starts_with(rig.path("f"))));
    assert_eq!(ours.count(), 0, "a descriptor is left");
}

/// Below `/` lies `/proc`, where the memory of this process is a file that it may write.
#[test]
fn what_is_mounted_in_the_folder_is_not_shared() {
    let config = ShareConfig { readonly: true, ..ShareConfig::new("/".into(), "root".into()) };
    let (share, server) = Share::open(&config, 0, MANY, &Registry::default()).unwrap();
    let (counters, session) = (share.counters(), share.session.clone());
    let _threads = server.start(Confined::threads_alone()).unwrap();
    let driver = Driver::start(Box::new(share), &[64, 512]);
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig { driver, counters, session, _threads, dir, unique: 0 };
    rig.good(op::INIT, 0, &init_args(7, 37));
    assert_eq!(rig.error(op::LOOKUP, ROOT, &name("proc")), libc::EXDEV);
    rig.lookup(ROOT, "etc");
    let handle = long(&rig.good(op::OPENDIR, ROOT, &u32s(&[0, 0])), 0);
    let args = [&u64s(&[handle, 0])[..], &u32s(&[65536, 0]), &u64s(&[0, 0])].concat();
    let (error, bytes) = rig.ask_with(op::READDIRPLUS, ROOT, &args, 65536);
    assert_eq!(error, 0);
    let at = bytes.windows(4).position(|text| text == b"proc").unwrap();
    assert_eq!(long(&bytes, at - 24 - ENTRY_OUT), 0, "it is told of all the same");
}

#[test]
fn a_reset_does_not_wait_for_a_queue_full_of_long_requests() {
    const THREADS: u64 = 4;
    let mut rig = rig();
    let handle = long(&rig.good(op::OPENDIR, ROOT, &u32s(&[0, 0])), 0);
    let folder = rig.session.handles.folder(handle).unwrap();
    let args = [&u64s(&[handle, 0])[..], &u32s(&[ROOMY, 0]), &u64s(&[0, 0])].concat();
    let request = rig.driver.filled(&[header(op::READDIR, 1, ROOT, args.len()), args].concat());
    let answer = rig.driver.buffer(16 + ROOMY);
    let (session, before) = (rig.session.clone(), rig.counters.requests.get());
    let (held, is_held) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Whoever reads the folder waits until the reset has begun.
            let _place = folder.place.lock().unwrap();
            held.send(()).unwrap();
            while !session.is_ending() {
                std::thread::yield_now();
            }
        });
        is_held.recv().unwrap();
        for _ in 0..250 {
            rig.driver.post(1, &[request], &[answer]);
        }
        rig.driver.notify(1);
        let requests = rig.counters.requests.clone();
        rig.driver.wait("it does not begin", |_| (requests.get() - before == THREADS).then_some(()));
        rig.driver.write(0x70, 0);
    });
    assert_eq!(rig.counters.requests.get() - before, THREADS, "more were done, though nobody waits for them");
}

/// What the share's threads still do when the device's own has nothing more to do.
#[test]
fn a_pause_and_a_reset_wait_for_reads_under_way() {
    const LEN: u32 = 1 << 20;
    const REQUESTS: u64 = 32;
    let mut rig = rig();
    let data: Vec<u8> = (0..8).flat_map(|i| vec![i; LEN as usize]).collect();
    fs::write(rig.path("big"), data).unwrap();
    for resets in [false, true] {
        let node = rig.lookup(ROOT, "big").node;
        let handle = rig.open(node, libc::O_RDONLY);
        rig.driver.free_buffers();
        let answer = rig.driver.buffer(16 + LEN);
        for i in 0..REQUESTS {
            let args = read_args(handle, (i % 8) * u64::from(LEN), LEN);
            let request = rig.driver.filled(&[header(op::READ, i, 0, args.len()), args].concat());
            rig.driver.post(1, &[request], &[answer]);
        }
        rig.driver.notify(1);
        rig.driver.wait("it does not begin", |d| (d.bytes((answer.0 + 16, 1))[0] != 0xaa).then_some(()));
        if resets {
            rig.driver.write(0x70, 0);
        } else {
            let workers = rig.driver.mmio.workers();
            workers.iter().for_each(WorkerControl::ask_to_pause);
            let deadline = Instant::now() + Duration::from_secs(10);
            assert!(workers.iter().all(|worker| worker.is_paused_by(deadline)));
            let ended = (0..REQUESTS).take_while(|_| rig.driver.try_used(1).is_some()).count();
            assert_eq!(ended as u64, REQUESTS, "some are still under way");
        }
        let before = rig.driver.shared_memory();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(50) {
            std::thread::yield_now();
        }
        assert!(rig.driver.shared_memory() == before, "it has written guest memory");
        rig.driver.mmio.workers().iter().for_each(WorkerControl::resume);
    }
}

#[test]
fn folders_that_cannot_be_shared_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path, readonly| {
        let config = ShareConfig { readonly, ..ShareConfig::new(path.into(), "t".into()) };
        Share::open(&config, 0, MANY, &Registry::default()).map(drop)
    };
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(matches!(open(&dir.path().join("none"), false), Err(ShareError::Open { .. })));
    assert!(matches!(open(&dir.path().join("file/x"), false), Err(ShareError::Open { .. })));
    assert!(matches!(open(Path::new("/dev/null"), false), Err(ShareError::NeitherFolderNorFile(_))));
    for path in ["/proc", "/proc/self/task", "/sys/kernel"] {
        assert!(matches!(open(Path::new(path), true), Err(ShareError::OfTheKernel(_))), "{path}");
    }
    open(dir.path(), true).unwrap();
    symlink(dir.path(), dir.path().join("link")).unwrap();
    open(&dir.path().join("link"), false).unwrap();
}

fn file_among_others() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "host").unwrap();
    fs::write(dir.path().join("secret"), "secret").unwrap();
    dir
}

#[test]
fn a_file_is_shared_without_those_beside_it() {
    let mut rig = rig_of(file_among_others(), "file", ",uid=7,gid=8", MANY);
    let root = Entry::of_attributes(&rig.good(op::GETATTR, ROOT, &[0; 16])[16..]);
    assert_eq!((root.mode, root.owner), (0o040_555, (7, 8)));
    assert_eq!(rig.list(ROOT), [(".".into(), 4), ("..".into(), 4), ("file".into(), 8)]);
    let all = [&u64s(&[0, 0])[..], &u32s(&[ROOMY, 0]), &u64s(&[0, 0])].concat();
    assert_eq!(rig.good(op::READDIRPLUS, ROOT, &all).len(), 3 * (ENTRY_OUT + 32));
    let file = rig.lookup(ROOT, "file");
    assert_eq!((file.size, file.mode & 0o170_000, file.owner), (4, 0o100_000, (7, 8)));
    for other in ["secret", "none", "fil", "file2"] {
        assert_eq!(rig.error(op::LOOKUP, ROOT, &name(other)), libc::ENOENT, "{other}");
        assert_eq!(rig.error(op::LOOKUP, file.node, &name(other)), libc::ENOTDIR, "{other}");
    }
    let handle = rig.open(file.node, libc::O_RDWR);
    assert_eq!(rig.read(handle, 0, 10), b"host");
    assert_eq!(rig.write(handle, 0, b"guest"), 5);
    assert_eq!(fs::read(rig.path("file")).unwrap(), b"guest");
    // What an editor does on the host is not followed, as with a bind mount.
    fs::write(rig.path("new"), "another").unwrap();
    fs::rename(rig.path("new"), rig.path("file")).unwrap();
    assert_eq!(rig.read(handle, 0, 10), b"guest");
    assert_eq!(rig.lookup(ROOT, "file").node, file.node);
}

#[test]
fn nothing_is_made_or_removed_beside_a_shared_file() {
    for (options, refused) in [("", libc::EPERM), (",readonly", libc::EROFS)] {
        let mut rig = rig_of(file_among_others(), "file", options, MANY);
        let file = rig.lookup(ROOT, "file").node;
        let rename = |to: u64| [u64s(&[to]), name("file"), name("b")].concat();
        for (opcode, args) in [
            (op::CREATE, create_args("new", libc::O_RDWR, 0o644)),
            (op::CREATE, create_args("file", libc::O_RDWR | libc::O_TRUNC, 0o644)),
            (op::MKNOD, [u32s(&[0o100_644, 0, 0, 0]), name("new")].concat()),
            (op::MKDIR, [u32s(&[0o755, 0]), name("new")].concat()),
            (op::SYMLINK, [name("new"), name("/etc")].concat()),
            (op::UNLINK, name("file")),
            (op::RMDIR, name("file")),
            (op::RENAME, rename(ROOT)),
            (op::RENAME2, [u64s(&[ROOT]), u32s(&[0, 0]), name("file"), name("b")].concat()),
            (op::LINK, [u64s(&[file]), name("new")].concat()),
            (op::SETATTR, vec![0; 88]),
        ] {
            assert_eq!(rig.error(opcode, ROOT, &args), refused, "{options} {opcode}");
            let of_file = rig.error(opcode, file, &args);
            // Without a change, SETATTR tells what the file is.
            assert!(of_file != 0 || (opcode == op::SETATTR && options.is_empty()), "{options} {opcode}");
        }
        for opcode in [op::OPEN, op::READLINK, op::FALLOCATE] {
            assert_ne!(rig.error(opcode, ROOT, &[0; 32]), 0, "{options} {opcode}");
        }
        let mut names: Vec<_> =
            fs::read_dir(rig.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["file", "secret"]);
        assert_eq!(fs::read(rig.path("file")).unwrap(), b"host");
    }
}

/// Set where the test below runs in a process of its own, whose limit it is.
const ALONE: &str = "MICROVM_TEST_ALONE";

#[test]
fn a_file_that_is_too_long_for_its_user_is_an_error() {
    if std::env::var_os(ALONE).is_none() {
        let name = concat!(module_path!(), "::a_file_that_is_too_long_for_its_user_is_an_error");
        let (_, name) = name.split_once("::").unwrap();
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let output = command.args(["--exact", name]).env(ALONE, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        return assert!(text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    }
    let limit = rustix::process::Rlimit { current: Some(4096), maximum: Some(4096) };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    let mut rig = rig();
    let (_, handle) = rig.create(ROOT, "f", libc::O_RDWR, 0o644);
    assert_eq!(rig.write(handle, 4000, &[7; 200]), 96);
    assert_eq!(rig.error(op::WRITE, 0, &write_args(handle, 4096, b"x")), libc::EFBIG);
    let args = [u64s(&[handle, 0, 8192]), u32s(&[0, 0])].concat();
    assert_eq!(rig.error(op::FALLOCATE, 0, &args), libc::EFBIG);
    assert_eq!(rig.read(handle, 4000, 200).len(), 96);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever is asked is answered, and nothing outside of the folder comes of it.
    #[test]
    fn any_request_is_answered(opcode in 0u32..60, node in 0u64..6, args in proptest::collection::vec(any::<u8>(), 0..120)) {
        let above = tempfile::tempdir().unwrap();
        let inner = TempDir::new_in(above.path()).unwrap();
        fs::write(above.path().join("x"), "above").unwrap();
        let mut rig = rig_with(inner, "", MANY);
        fs::write(rig.path("x"), "").unwrap();
        rig.lookup(ROOT, "x");
        // These have no answer.
        if ![op::FORGET, op::BATCH_FORGET, op::INTERRUPT].contains(&opcode) {
            rig.ask(opcode, node, &args);
        }
        prop_assert_eq!(fs::read_dir(above.path()).unwrap().count(), 2);
        prop_assert_eq!(fs::read(above.path().join("x")).unwrap(), b"above");
    }

    #[test]
    fn any_request_about_a_shared_file_is_answered(
        opcode in 0u32..60, node in 0u64..6, args in proptest::collection::vec(any::<u8>(), 0..120)
    ) {
        let mut rig = rig_of(file_among_others(), "file", "", MANY);
        rig.lookup(ROOT, "file");
        if ![op::FORGET, op::BATCH_FORGET, op::INTERRUPT].contains(&opcode) {
            rig.ask(opcode, node, &args);
        }
        prop_assert_eq!(fs::read_dir(rig.dir.path()).unwrap().count(), 2);
        prop_assert_eq!(fs::read(rig.path("secret")).unwrap(), b"secret");
    }
}
