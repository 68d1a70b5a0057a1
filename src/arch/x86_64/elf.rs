//! ELF `vmlinux` files: program headers and the PVH note.

use vm_memory::ByteValued;

use super::image::{Entry, Image, ImageError, ReadAt, Segment, read};
use super::layout::HIGH_RAM;

/// ELF64 file header (System V ABI, chapter 4).
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct FileHeader {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    program_headers: u64,
    section_headers: u64,
    flags: u32,
    header_size: u16,
    program_header_size: u16,
    program_header_count: u16,
    section_header_size: u16,
    section_header_count: u16,
    names_section: u16,
}

/// ELF64 program header (System V ABI, chapter 5).
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

// SAFETY: integers only, no padding: 16 + 2+2+4 + 3*8 + 4 + 6*2 = 64 bytes, each field at its natural alignment.
unsafe impl ByteValued for FileHeader {}
// SAFETY: integers only, no padding: 2*4 + 6*8 = 56 bytes, each field at its natural alignment.
unsafe impl ByteValued for ProgramHeader {}

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const EXECUTABLE: u16 = 2;
const MACHINE_X86_64: u16 = 62;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// More than any kernel has; it bounds the work on a hostile file.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// More than any kernel's notes take.
const MAX_NOTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note, named "Xen", with the PVH entry point.
const PHYS32_ENTRY: u32 = 18;

/// Reads an ELF kernel. PVH where it has the note, else the 64-bit boot protocol.
pub(super) fn parse(file: &dyn ReadAt) -> Result<Image, ImageError> {
    let mut header = FileHeader::default();
    read(file, header.as_mut_slice(), 0, "the ELF header")?;
    check_header(&header)?;
    let programs = read_program_headers(file, &header)?;
    let segments = load_segments(&programs, file.size())?;
    let entry = match find_pvh_entry(file, &programs)? {
        Some(entry) => Entry::Pvh(entry),
        None => Entry::Linux64(header.entry),
    };
    let address = match entry {
        Entry::Pvh(address) => address.into(),
        Entry::Linux64(address) => address,
    };
    if !segments.iter().any(|s| (s.address..s.end()).contains(&address)) {
        return Err(ImageError::BadEntry(address));
    }
    let needs_memory_to = segments.iter().map(Segment::end).max().unwrap_or(0);
    Ok(Image { segments, entry, setup_header: None, needs_memory_to })
}

fn check_header(header: &FileHeader) -> Result<(), ImageError> {
    if header.ident[4] != CLASS_64 || header.ident[5] != LITTLE_ENDIAN || header.machine != MACHINE_X86_64 {
        return Err(ImageError::NotAKernel("an ELF file for another processor"));
    }
    if header.kind != EXECUTABLE {
        return Err(ImageError::NotAKernel("a shared library, an object file or an ordinary program"));
    }
    Ok(())
}

fn read_program_headers(file: &dyn ReadAt, header: &FileHeader) -> Result<Vec<ProgramHeader>, ImageError> {
    let size = size_of::<ProgramHeader>();
    let bad = |what| ImageError::BadSegment { index: 0, what };
    if usize::from(header.program_header_size) != size {
        return Err(bad("has a header of the wrong size"));
    }
    if header.program_header_count > MAX_PROGRAM_HEADERS {
        return Err(bad("is one of too many"));
    }
    let mut programs = vec![ProgramHeader::default(); header.program_header_count.into()];
    for (i, program) in programs.iter_mut().enumerate() {
        let offset = header.program_headers.checked_add((i * size) as u64);
        let offset = offset.ok_or(ImageError::Truncated("the ELF program headers"))?;
        read(file, program.as_mut_slice(), offset, "the ELF program headers")?;
    }
    Ok(programs)
}

fn load_segments(programs: &[ProgramHeader], file_len: u64) -> Result<Vec<Segment>, ImageError> {
    let mut segments: Vec<Segment> = Vec::new();
    for (index, p) in programs.iter().enumerate() {
        if p.kind != LOAD || p.memory_size == 0 {
            continue;
        }
        let bad = |what| ImageError::BadSegment { index, what };
        let file_end = p.offset.checked_add(p.file_size).ok_or_else(|| bad("wraps around in the file"))?;
        if file_end > file_len {
            return Err(ImageError::Truncated("an ELF segment"));
        }
        if p.file_size > p.memory_size {
            return Err(bad("is larger in the file than in memory"));
        }
        let end = p.physical_address.checked_add(p.memory_size);
        let end = end.ok_or_else(|| bad("wraps around the end of memory"))?;
        if p.physical_address < HIGH_RAM {
            return Err(bad("lies in the first MiB, which holds the boot tables"));
        }
        if segments.iter().any(|s| s.address < end && p.physical_address < s.end()) {
            return Err(bad("overlaps another one"));
        }
        segments.push(Segment {
            file_offset: p.offset,
            file_size: p.file_size,
            address: p.physical_address,
            memory_size: p.memory_size,
        });
    }
    if segments.is_empty() {
        return Err(ImageError::NotAKernel("an ELF file without anything to load"));
    }
    Ok(segments)
}

/// Looks for the PVH note. A note that is damaged is an error; none at all is `None`.
fn find_pvh_entry(file: &dyn ReadAt, programs: &[ProgramHeader]) -> Result<Option<u32>, ImageError> {
    for p in programs.iter().filter(|p| p.kind == NOTE) {
        let mut notes = vec![0; p.file_size.min(MAX_NOTES) as usize];
        read(file, &mut notes, p.offset, "the ELF notes")?;
        if let Some(entry) = pvh_note(&notes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Walks notes: name size, descriptor size and type, then name and descriptor, each padded to four bytes.
fn pvh_note(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (head, rest) = notes.split_at_checked(12)?;
        let word = |i: usize| u32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        let (name_size, desc_size, kind) = (word(0) as usize, word(4) as usize, word(8));
        let (name, rest) = rest.split_at_checked(name_size.checked_next_multiple_of(4)?)?;
        let desc = rest.get(..desc_size)?;
        if kind == PHYS32_ENTRY && name.starts_with(b"Xen\0") {
            // Four bytes, or eight with the upper ones zero: the entry is 32-bit code.
            return Some(u32::from_le_bytes(desc.get(..4)?.try_into().ok()?));
        }
        notes = rest.get(desc_size.checked_next_multiple_of(4)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::image;
    use super::*;

    /// Offset of program header `i`'s field in the files made here.
    fn field(i: usize, offset: usize) -> usize {
        64 + i * 56 + offset
    }

    /// A vmlinux of two segments, 4096 bytes in the file each, and a PVH note.
    fn vmlinux() -> Vec<u8> {
        let header = FileHeader {
            ident: [0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            kind: EXECUTABLE,
            machine: MACHINE_X86_64,
            entry: 0x20_0000,
            program_headers: 64,
            program_header_size: 56,
            program_header_count: 3,
            ..Default::default()
        };
        let load = |offset, physical_address| ProgramHeader {
            kind: LOAD,
            offset,
            physical_address,
            file_size: 4096,
            memory_size: 8192,
            ..Default::default()
        };
        let note = ProgramHeader { kind: NOTE, offset: 256, file_size: 20, ..Default::default() };
        let mut file = vec![0; 4096 * 3];
        file[..64].copy_from_slice(header.as_slice());
        for (i, p) in [load(4096, 0x20_0000), load(8192, 0x30_0000), note].iter().enumerate() {
            file[field(i, 0)..field(i + 1, 0)].copy_from_slice(p.as_slice());
        }
        file[256..276].copy_from_slice(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0\x10\0\x20\0");
        file
    }

    fn with(at: usize, bytes: &[u8]) -> Result<Image, ImageError> {
        let mut file = vmlinux();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        image::parse(&file.as_slice())
    }

    fn message(at: usize, value: u64) -> String {
        with(at, &value.to_le_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn pvh_is_preferred() {
        let image = image::parse(&vmlinux().as_slice()).unwrap();
        assert_eq!(image.entry, Entry::Pvh(0x20_0010));
        assert_eq!(image.segments.len(), 2);
        assert_eq!(image.needs_memory_to, 0x30_2000);
    }

    #[test]
    fn without_the_note_it_is_the_64_bit_protocol() {
        assert_eq!(with(268, b"No").unwrap().entry, Entry::Linux64(0x20_0000));
    }

    #[test]
    fn damaged_segments_are_refused() {
        assert!(message(field(1, 24), 0x20_0000).contains("overlaps"));
        assert!(message(field(1, 24), 0x1000).contains("first MiB"));
        assert!(message(field(1, 24), u64::MAX - 100).contains("wraps around the end of memory"));
        assert!(message(field(1, 8), u64::MAX - 100).contains("wraps around in the file"));
        assert!(message(field(1, 8), 1 << 40).contains("truncated"));
        assert!(message(field(1, 40), 1).contains("larger in the file"));
    }

    #[test]
    fn a_segment_of_no_length_is_left_out() {
        assert_eq!(with(field(1, 40), &[0; 8]).unwrap().segments.len(), 1);
    }

    #[test]
    fn an_entry_outside_is_refused() {
        assert!(matches!(with(272, &[0; 4]), Err(ImageError::BadEntry(0))));
    }

    #[test]
    fn other_elf_files_are_named() {
        assert!(with(4, &[1]).unwrap_err().to_string().contains("another processor"));
        assert!(with(16, &[3]).unwrap_err().to_string().contains("ordinary program"));
        assert!(with(56, &[0]).unwrap_err().to_string().contains("without anything to load"));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let file = vmlinux();
        for len in 0..file.len() {
            assert!(image::parse(&&file[..len]).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn damage_never_panics(changes in proptest::collection::vec((0usize..300, any::<u8>()), 1..12)) {
            let mut file = vmlinux();
            for (at, value) in changes {
                file[at] = value;
            }
            if let Ok(image) = image::parse(&file.as_slice()) {
                for s in &image.segments {
                    prop_assert!(s.file_offset + s.file_size <= file.len() as u64);
                    prop_assert!(s.address.checked_add(s.memory_size).is_some());
                }
            }
        }

        #[test]
        fn notes_never_panic(notes: Vec<u8>) {
            let _ = pvh_note(&notes);
        }
    }
}
