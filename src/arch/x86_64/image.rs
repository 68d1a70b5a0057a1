//! What a kernel file says of itself: which parts go where in guest memory, and where the guest starts.
//!
//! Nothing is loaded here. The file may be anything, so every number from it is checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use thiserror::Error;
use vm_memory::ByteValued;

use super::elf;
use super::layout::HIGH_RAM;

/// A file that can be read anywhere.
pub trait ReadAt {
    /// Its size in bytes.
    fn size(&self) -> u64;
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// The file ends before, or cannot be read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// An open regular file and its size.
pub struct SizedFile<'a> {
    /// The file.
    pub file: &'a File,
    /// Its size when it was opened.
    pub len: u64,
}

impl ReadAt for SizedFile<'_> {
    fn size(&self) -> u64 {
        self.len
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

impl ReadAt for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let part = start.and_then(|s| self.get(s..s.checked_add(buf.len())?));
        buf.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A part of the file and its place in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts in the file.
    pub file_offset: u64,
    /// Bytes that come from the file; the rest is zero.
    pub file_size: u64,
    /// Where it starts in guest memory.
    pub address: u64,
    /// Bytes in guest memory, at least `file_size`.
    pub memory_size: u64,
}

impl Segment {
    /// One past the last address. Checked not to wrap when the image was read.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address + self.memory_size
    }
}

/// Where and how the guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, `hvm_start_info` in EBX (Xen's PVH boot protocol).
    Pvh(u32),
    /// Long mode, `boot_params` in RSI (Linux 64-bit boot protocol).
    Linux64(u64),
}

/// A kernel file that can be booted.
#[derive(Clone, Debug)]
pub struct Image {
    /// What goes where, none overlapping.
    pub segments: Vec<Segment>,
    /// The start.
    pub entry: Entry,
    /// The header of a bzImage, to be handed back in `boot_params`.
    pub setup_header: Option<setup_header>,
    /// The kernel uses memory up to here before it looks at the memory map.
    pub needs_memory_to: u64,
}

/// Why a file is no kernel that can be booted. Each message says what to do.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Reading failed or the file ended.
    #[error("the file ends in the middle of {0}: it is truncated, get it again")]
    Truncated(&'static str),
    /// Nothing in it.
    #[error("the file is empty: get it again")]
    Empty,
    /// A compressed file.
    #[error("this is a {format} file, not a kernel: unpack it first ({command})")]
    Compressed {
        /// Its format.
        format: &'static str,
        /// What unpacks it.
        command: &'static str,
    },
    /// Something known that is no kernel.
    #[error("this is {0}, not a kernel: give an x86-64 ELF vmlinux or a bzImage")]
    NotAKernel(&'static str),
    /// Something unknown.
    #[error("not a kernel that is known here: give an x86-64 ELF vmlinux or a bzImage")]
    Unknown,
    /// A bzImage from before Linux 3.8, or a 32-bit one.
    #[error(
        "this bzImage has no 64-bit entry point (boot protocol {0:#06x}): build it for x86-64, Linux 3.8 or later"
    )]
    No64BitEntry(u16),
    /// The ELF program headers contradict themselves.
    #[error("ELF segment {index} {what}: the file is damaged, get it again")]
    BadSegment {
        /// Which program header.
        index: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// An entry point outside of what is loaded.
    #[error("the entry point {0:#x} is outside of the loaded segments: the file is damaged, get it again")]
    BadEntry(u64),
    /// The file cannot be read.
    #[error("cannot be read")]
    Read(#[source] io::Error),
}

/// Reads into `buf`, telling an early end from other errors.
pub(super) fn read(
    file: &dyn ReadAt,
    buf: &mut [u8],
    offset: u64,
    what: &'static str,
) -> Result<(), ImageError> {
    file.read_at(buf, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => ImageError::Truncated(what),
        _ => ImageError::Read(e),
    })
}

/// Reads a kernel file's headers.
///
/// # Errors
/// What the file is instead of a kernel, or what is wrong with it.
pub fn parse(file: &dyn ReadAt) -> Result<Image, ImageError> {
    if file.size() == 0 {
        return Err(ImageError::Empty);
    }
    let mut magic = [0; 8];
    let have = file.size().min(8) as usize;
    read(file, &mut magic[..have], 0, "its first bytes")?;
    match magic {
        [0x7f, b'E', b'L', b'F', ..] => elf::parse(file),
        _ if is_bzimage(file) => parse_bzimage(file),
        _ => Err(identify(&magic)),
    }
}

/// Names a file by its first bytes.
fn identify(magic: &[u8; 8]) -> ImageError {
    let compressed = |format, command| ImageError::Compressed { format, command };
    match magic {
        [0x1f, 0x8b, ..] => compressed("gzip", "gunzip"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => compressed("xz", "unxz"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => compressed("zstd", "unzstd"),
        [0x04, 0x22, 0x4d, 0x18, ..] | [0x02, 0x21, 0x4c, 0x18, ..] => compressed("lz4", "unlz4"),
        [b'B', b'Z', b'h', ..] => compressed("bzip2", "bunzip2"),
        [0x5d, 0, 0, ..] => compressed("lzma", "unlzma"),
        [b'P', b'K', 3, 4, ..] => compressed("zip", "unzip"),
        [b'0', b'7', b'0', b'7', b'0', ..] => {
            ImageError::NotAKernel("a cpio archive (an initramfs: use --initrd)")
        }
        [b'M', b'Z', ..] => ImageError::NotAKernel("an EFI program or a kernel of another processor"),
        [b'#', b'!', ..] => ImageError::NotAKernel("a script"),
        [b'Q', b'F', b'I', 0xfb, ..] => ImageError::NotAKernel("a qcow2 disk image"),
        [b'!', b'<', b'a', b'r', b'c', ..] => {
            ImageError::NotAKernel("an archive (a Debian package or a library)")
        }
        _ => ImageError::Unknown,
    }
}

/// Offset of the setup header in a bzImage (Linux, Documentation/arch/x86/boot.rst).
const SETUP_HEADER: u64 = 0x1f1;
/// `"HdrS"`.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The first protocol with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;
/// `xloadflags`: the kernel has a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry, counted from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;

fn read_setup_header(file: &dyn ReadAt) -> Result<setup_header, ImageError> {
    let mut header = setup_header::default();
    read(file, header.as_mut_slice(), SETUP_HEADER, "the bzImage's setup header")?;
    Ok(header)
}

fn is_bzimage(file: &dyn ReadAt) -> bool {
    read_setup_header(file).is_ok_and(|h| {
        let (magic, boot_flag) = (h.header, h.boot_flag);
        magic == HEADER_MAGIC && boot_flag == 0xaa55
    })
}

fn parse_bzimage(file: &dyn ReadAt) -> Result<Image, ImageError> {
    let header = read_setup_header(file)?;
    let (version, flags, sectors) = (header.version, header.xloadflags, header.setup_sects);
    if version < PROTOCOL_2_12 || flags & XLF_KERNEL_64 == 0 {
        return Err(ImageError::No64BitEntry(version));
    }
    // boot.rst: "if the setup_sects field contains 0, the real value is 4"; the boot sector comes before them.
    let file_offset = (u64::from(if sectors == 0 { 4 } else { sectors }) + 1) * 512;
    // `syssize` counts 16-byte units; what follows (a signature) is no part of the kernel.
    let file_size = u64::from(header.syssize) * 16;
    if file_size <= ENTRY_64 || file.size() < file_offset.saturating_add(file_size) {
        return Err(ImageError::Truncated("the bzImage's compressed kernel"));
    }
    let segment = Segment { file_offset, file_size, address: HIGH_RAM, memory_size: file_size };
    // The kernel unpacks itself to its preferred address and uses `init_size` bytes there.
    let unpacked = { header.pref_address }.saturating_add({ header.init_size }.into());
    Ok(Image {
        segments: vec![segment],
        entry: Entry::Linux64(HIGH_RAM + ENTRY_64),
        setup_header: Some(header),
        needs_memory_to: unpacked.max(segment.end()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bzimage() -> Vec<u8> {
        let mut header =
            setup_header { header: HEADER_MAGIC, boot_flag: 0xaa55, version: 0x20f, ..Default::default() };
        header.setup_sects = 7;
        header.xloadflags = XLF_KERNEL_64;
        header.syssize = 0x100;
        header.pref_address = 0x100_0000;
        header.init_size = 0x20_0000;
        let mut file = vec![0; 8 * 512 + 0x1000];
        file[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        file
    }

    fn parse_bytes(bytes: &[u8]) -> Result<Image, ImageError> {
        parse(&bytes)
    }

    #[test]
    fn a_bzimage_is_read() {
        let image = parse_bytes(&bzimage()).unwrap();
        assert_eq!(image.entry, Entry::Linux64(0x10_0200));
        let segment = Segment { file_offset: 4096, file_size: 4096, address: 0x10_0000, memory_size: 4096 };
        assert_eq!(image.segments, [segment]);
        assert_eq!(image.needs_memory_to, 0x120_0000);
    }

    #[test]
    fn a_truncated_bzimage_is_told() {
        let file = bzimage();
        assert!(matches!(parse_bytes(&file[..file.len() - 1]), Err(ImageError::Truncated(_))));
    }

    #[test]
    fn a_32_bit_bzimage_is_told() {
        let mut file = bzimage();
        file[0x236..0x238].fill(0);
        assert!(matches!(parse_bytes(&file), Err(ImageError::No64BitEntry(0x20f))));
    }

    #[test]
    fn other_files_are_named() {
        for (bytes, word) in [
            (&b"\x1f\x8b\x08xxxxx"[..], "gunzip"),
            (b"\x28\xb5\x2f\xfdxxxx", "unzstd"),
            (b"\xfd7zXZ\0", "unxz"),
            (b"070701", "--initrd"),
            (b"#!/bin/sh\n", "a script"),
            (b"", "empty"),
            (b"h", "not a kernel"),
        ] {
            let text = parse_bytes(bytes).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = parse_bytes(&bytes);
        }

        #[test]
        fn no_damage_to_a_bzimage_panics(at in 0usize..0x270, value: u8) {
            let mut file = bzimage();
            file[at] = value;
            if let Ok(image) = parse_bytes(&file) {
                for s in &image.segments {
                    prop_assert!(s.file_offset + s.file_size <= file.len() as u64);
                }
            }
        }
    }
}
