//! Runs in a guest of tests/real/share.rs, in the folder that its argument names: what databases ask of files. Each line
//! of its output is something that held; the first that does not ends it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

fn open(path: &str) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// A mapping that is shared with the file.
struct Mapping(*mut u8, usize);

impl Mapping {
    fn new(file: &File, len: usize) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert!(at != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Self(at.cast(), len)
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.1);
        // SAFETY: it lies in the mapping, which nothing refers to.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.wrapping_add(at), bytes.len()) };
    }

    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.1);
        // SAFETY: as above, and nobody else writes to it now.
        unsafe { std::slice::from_raw_parts(self.0.wrapping_add(at), len) }.to_vec()
    }

    fn sync(&self) {
        // SAFETY: the mapping that is ours.
        assert_eq!(unsafe { libc::msync(self.0.cast(), self.1, libc::MS_SYNC) }, 0);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that is ours, and nothing refers to it.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

fn mapped() {
    let file = open("mapped");
    file.set_len(64 << 10).unwrap();
    file.write_all_at(b"by a call", 100).unwrap();
    let mapping = Mapping::new(&file, 64 << 10);
    assert_eq!(mapping.read(100, 9), b"by a call");
    mapping.write(5000, b"by a mapping");
    let mut bytes = [0; 12];
    file.read_exact_at(&mut bytes, 5000).unwrap();
    assert_eq!(&bytes, b"by a mapping");
    mapping.sync();
}

fn locked() {
    let (first, second) = (open("lock"), open("lock"));
    let lock = |file: &File, how| {
        // SAFETY: no memory is involved.
        unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) == 0 }
    };
    assert!(lock(&first, libc::LOCK_EX) && !lock(&second, libc::LOCK_SH));
    assert!(lock(&first, libc::LOCK_UN) && lock(&second, libc::LOCK_SH));
    let record = |file: &File| {
        // SAFETY: a plain structure of numbers.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::F_WRLCK as i16;
        // SAFETY: the kernel reads the structure, which lives until the call returns.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) == 0 }
    };
    assert!(record(&first) && !record(&second));
}

fn made_once() {
    let make = || OpenOptions::new().write(true).create_new(true).mode(0o600).open("once");
    make().unwrap();
    assert_eq!(make().unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(fs::metadata("once").unwrap().permissions().mode() & 0o777, 0o600);
}

fn appended() {
    let add = || OpenOptions::new().append(true).create(true).open("log").unwrap();
    let (mut first, mut second) = (add(), add());
    for n in 0..20 {
        writeln!(first, "first {n}").unwrap();
        writeln!(second, "second {n}").unwrap();
    }
    let text = fs::read_to_string("log").unwrap();
    assert!(text.lines().count() == 40 && text.starts_with("first 0\nsecond 0\nfirst 1\n"), "{text}");
}

/// As a database writes its control file.
fn replaced() {
    fs::write("control", "old").unwrap();
    let mut old = File::open("control").unwrap();
    let mut new = File::create("control.tmp").unwrap();
    new.write_all(b"new").unwrap();
    new.sync_all().unwrap();
    fs::rename("control.tmp", "control").unwrap();
    File::open(".").unwrap().sync_all().unwrap();
    let mut text = String::new();
    old.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), fs::read_to_string("control").unwrap().as_str()), ("old", "new"));
}

/// What has no name any more is a file as long as it is open.
fn removed() {
    let mut file = open("gone");
    file.write_all(b"still here").unwrap();
    fs::remove_file("gone").unwrap();
    assert!(!Path::new("gone").exists());
    file.seek(SeekFrom::Start(6)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    file.set_len(4).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
    let stat = file.metadata().unwrap();
    assert_eq!((text.as_str(), stat.len(), stat.nlink(), stat.mode() & 0o777), ("here", 4, 0, 0o640));
}

fn long() {
    let file = open("long");
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, 1 << 20) }, 0);
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    file.set_len(10).unwrap();
    file.set_len(5000).unwrap();
    let mut bytes = vec![1; 5000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|b| *b == 0));
    let synced = OpenOptions::new().write(true).custom_flags(libc::O_DSYNC).open("long").unwrap();
    synced.write_all_at(b"at once", 8192).unwrap();
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open("long");
    assert!(direct.is_ok(), "{direct:?}");
    file.sync_data().unwrap();
}

/// The folder of a database that is its user's alone.
fn owned() {
    fs::create_dir("data").unwrap();
    fs::set_permissions("data", fs::Permissions::from_mode(0o700)).unwrap();
    let stat = fs::metadata("data").unwrap();
    std::os::unix::fs::chown("data", Some(stat.uid()), Some(stat.gid())).unwrap();
    assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o700, 7, 8));
}

fn main() {
    let folder = std::env::args_os().nth(1).expect("a folder");
    std::env::set_current_dir(folder).unwrap();
    for (what, run) in [
        ("mapped", mapped as fn()),
        ("locked", locked),
        ("made once", made_once),
        ("appended", appended),
        ("replaced", replaced),
        ("removed", removed),
        ("long", long),
        ("owned", owned),
    ] {
        run();
        println!("held: {what}");
    }
    println!("files=held");
}
