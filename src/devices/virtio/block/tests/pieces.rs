//! A disk of several files.

use std::os::fd::AsRawFd;
use std::path::Path;

use super::*;

/// A disk of files with so many sectors each, and all of its bytes. Each sector has its own number on the disk.
struct Pieces {
    files: Vec<NamedTempFile>,
    driver: Driver,
    all: Vec<u8>,
}

fn files(sectors: &[u64]) -> (Vec<NamedTempFile>, Vec<u8>) {
    let mut all = Vec::new();
    let mut file = |count: &u64| {
        let start = all.len();
        let first = start as u64 / SECTOR;
        (first..first + count).for_each(|number| all.extend([number as u8; SECTOR as usize]));
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&all[start..]).unwrap();
        file
    };
    let files = sectors.iter().map(&mut file).collect();
    (files, all)
}

fn config_of(paths: &[&Path], options: &str) -> DiskConfig {
    let mut text = paths[0].as_os_str().to_owned();
    text.push(options);
    let more = paths[1..].iter().map(|path| path.into()).collect();
    DiskConfig { more, readonly: true, ..DiskConfig::parse(&text).unwrap() }
}

fn open(paths: &[&Path], options: &str) -> Result<Block, BlockError> {
    Block::open(&config_of(paths, options), 0, 1, &Registry::default())
}

impl Pieces {
    fn new(sectors: &[u64], options: &str) -> Option<Self> {
        let (files, all) = files(sectors);
        let paths: Vec<_> = files.iter().map(NamedTempFile::path).collect();
        let block = open(&paths, options).ok()?;
        let driver = Driver::start_with(Box::new(block), &[QUEUE_SIZE], u64::MAX);
        Some(Self { files, driver, all })
    }

    /// By each engine that this host has.
    fn by_all(sectors: &[u64]) -> Vec<Self> {
        let all: Vec<_> = ENGINES.iter().filter_map(|options| Self::new(sectors, options)).collect();
        assert!(!all.is_empty());
        all
    }

    /// Reads into buffers of these lengths: the status and the bytes.
    fn read(&mut self, sector: u64, lens: &[u32]) -> (u8, Vec<u8>) {
        let d = &mut self.driver;
        let (head, status) = (d.filled(&header(0, sector)), d.buffer(1));
        let rooms: Vec<_> = lens.iter().map(|len| d.buffer(*len)).collect();
        let writable: Vec<_> = rooms.iter().copied().chain([status]).collect();
        d.offer(0, &[head], &writable);
        let (_, written) = d.wait_used(0);
        let status = d.bytes(status)[0];
        assert_eq!(written, if status == OK { lens.iter().sum::<u32>() + 1 } else { 1 });
        (status, rooms.into_iter().flat_map(|room| d.bytes(room)).collect())
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        let d = &mut self.driver;
        let (head, data, status) = (d.filled(&header(kind, sector)), d.filled(data), d.buffer(1));
        let readable: Vec<_> = [head, data].into_iter().filter(|b| b.1 > 0).collect();
        d.offer(0, &readable, &[status]);
        d.wait_used(0);
        d.bytes(status)[0]
    }

    #[track_caller]
    fn check(&mut self, sector: u64, lens: &[u32]) {
        let start = (sector * SECTOR) as usize;
        let len = lens.iter().sum::<u32>() as usize;
        assert_eq!(self.read(sector, lens), (OK, self.all[start..start + len].to_vec()), "{sector} {lens:?}");
    }
}

#[test]
fn several_files_are_read_as_one() {
    for mut disk in Pieces::by_all(&[16, 1, 1, 1, 8, 24, 8]) {
        disk.check(0, &[512]);
        disk.check(8, &[4096]);
        // To the end of a file, from the beginning of one, and over it.
        disk.check(15, &[512]);
        disk.check(16, &[512]);
        disk.check(15, &[1024]);
        disk.check(19, &[4096, 4096]);
        // Over several, in pieces of memory that end elsewhere.
        disk.check(14, &[100, 924, 4096, 4, 508, 512]);
        disk.check(0, &[59 * 512]);
        disk.check(58, &[512]);
        disk.check(15, &[16; 160]);
        assert_eq!(disk.read(58, &[1024]).0, IO_ERROR);
    }
}

#[test]
fn as_many_files_as_there_may_be() {
    for mut disk in Pieces::by_all(&[1; crate::config::MAX_PIECES]) {
        disk.check(0, &[255 * 512]);
        disk.check(200, &[512]);
        disk.check(254, &[512]);
    }
}

#[test]
fn many_requests_over_many_files_at_a_time() {
    for mut disk in Pieces::by_all(&[1; 40]) {
        let mut reads = Vec::new();
        for sector in 0..30u64 {
            let d = &mut disk.driver;
            let (head, room) = (d.filled(&header(0, sector)), d.buffer(10 * 512 + 1));
            d.post(0, &[head], &[room]);
            reads.push(room);
        }
        disk.driver.notify(0);
        reads.iter().for_each(|_| assert_eq!(disk.driver.wait_used(0).1, 10 * 512 + 1));
        for (sector, room) in reads.into_iter().enumerate() {
            let expected = [&disk.all[sector * 512..(sector + 10) * 512], &[OK]].concat();
            assert_eq!(disk.driver.bytes(room), expected);
        }
    }
}

#[test]
fn none_of_several_files_is_written() {
    for mut disk in Pieces::by_all(&[2, 2, 2]) {
        for sector in [0, 1, 4, 5, 6, u64::MAX / 512, u64::MAX] {
            assert_eq!(disk.status(1, sector, &[7; 1024]), IO_ERROR, "{sector}");
            assert_ne!(disk.status(11, 0, &range(sector, 2, 0)), OK, "{sector}");
            assert_ne!(disk.status(13, 0, &range(sector, 2, 1)), OK, "{sector}");
        }
        assert_eq!(disk.status(4, 0, &[]), OK);
        // What lies behind the last one is not there, nor is anything before the first.
        for sector in [6, 7, 1 << 55, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
            assert_eq!(disk.read(sector, &[512]), (IO_ERROR, vec![NONE; 512]), "{sector}");
        }
        let on_host: Vec<u8> =
            disk.files.iter().flat_map(|file| std::fs::read(file.path()).unwrap()).collect();
        assert_eq!(on_host, disk.all);
    }
}

#[test]
fn a_file_of_several_that_changed_its_length() {
    for mut disk in Pieces::by_all(&[8, 8, 8]) {
        let middle = disk.files[1].as_file();
        // Longer: the next file's bytes are where they were.
        middle.write_all_at(&[0xee; 4096], 4096).unwrap();
        disk.check(14, &[2048]);
        disk.check(0, &[24 * 512]);
        // Shorter: an error for what is missing, and only for that.
        disk.files[1].as_file().set_len(1024).unwrap();
        disk.check(0, &[10 * 512]);
        assert_eq!(disk.read(9, &[1024]).0, IO_ERROR);
        assert_eq!(disk.read(0, &[24 * 512]).0, IO_ERROR);
        disk.check(16, &[8 * 512]);
        disk.files[1].as_file().set_len(0).unwrap();
        assert_eq!(disk.read(8, &[512]).0, IO_ERROR);
        assert_eq!(disk.read(7, &[1024]).0, IO_ERROR);
        disk.check(7, &[512]);
    }
}

#[test]
fn what_is_no_piece_is_named() {
    let (good, dir) = (image(1024), tempfile::tempdir().unwrap());
    let odd = image(1000);
    for (path, words) in [
        (odd.path(), "1000 bytes, which is no whole number"),
        (image(100).path(), ""),
        (dir.path(), "neither a file nor a block device"),
        (Path::new("/dev/null"), "neither a file nor a block device"),
    ] {
        for paths in [[good.path(), path, good.path()], [path, good.path(), good.path()]] {
            let error = open(&paths, "").err().unwrap().to_string();
            assert!(error.contains(words) && error.contains(path.to_str().unwrap()), "{error}");
        }
    }
    // Files in memory can be as long as an offset can be.
    let huge = rustix::fs::memfd_create("huge", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&huge, 1 << 62).unwrap();
    let huge = format!("/proc/self/fd/{}", huge.as_raw_fd());
    let error = open(&[Path::new(&huge); 2], "").err().unwrap().to_string();
    assert!(error.contains(&huge) && error.contains("2⁶³"), "{error}");
}

#[test]
fn too_few_descriptors_are_told_from_other_errors() {
    for (errno, words) in [(libc::EMFILE, "ulimit -n"), (libc::EACCES, "")] {
        let source = io::Error::from_raw_os_error(errno);
        let error = BlockError::from(ImageError::Open { path: "a.img".into(), source }).to_string();
        assert!(error.contains("a.img") && error.contains(words), "{error}");
    }
}

#[test]
fn each_of_several_files_is_locked() {
    let (files, _) = files(&[2, 2, 2]);
    let paths: Vec<_> = files.iter().map(NamedTempFile::path).collect();
    // VMs share them, and a disk may have one twice.
    let readers = [open(&paths, "").unwrap(), open(&paths, "").unwrap(), open(&[paths[0]; 2], "").unwrap()];
    let write = |file| Block::open(&config(file, ""), 0, 1, &Registry::default());
    for file in &files {
        assert!(
            matches!(write(file), Err(BlockError::Image(ImageError::Locked(path))) if path == file.path())
        );
    }
    drop(readers);
    let writer = write(&files[2]).unwrap();
    assert!(matches!(open(&paths, ""), Err(BlockError::Image(ImageError::Locked(path))) if path == paths[2]));
    drop(writer);
    open(&paths, "").unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Several files and their concatenation in one are the same disk.
    #[test]
    fn several_files_are_their_concatenation(
        sectors in prop::collection::vec(1u64..12, 1..9),
        requests in prop::collection::vec(
            (prop_oneof![8 => 0u64..100, 1 => any::<u64>()], prop::collection::vec(1u32..3000, 1..6), any::<bool>()),
            1..12),
        engine in prop::sample::select(&ENGINES[..]),
    ) {
        let Some(mut disk) = Pieces::new(&sectors, engine) else { return Ok(()) };
        let mut plain = NamedTempFile::new().unwrap();
        plain.write_all(&disk.all).unwrap();
        let block = Block::open(&config(&plain, ",readonly"), 0, 1, &Registry::default()).unwrap();
        let driver = Driver::start_with(Box::new(block), &[QUEUE_SIZE], u64::MAX);
        let mut plain = Pieces { files: vec![plain], driver, all: Vec::new() };
        for (sector, mut lens, whole) in requests {
            if whole {
                let sum: u32 = lens.iter().sum();
                lens.push(sum.next_multiple_of(512) - sum);
                lens.retain(|len| *len > 0);
            }
            prop_assert_eq!(disk.read(sector, &lens), plain.read(sector, &lens));
        }
    }
}
