//! A kernel file of any bytes: it is refused, or all its segments lie in the file and above the first MiB.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm::arch::x86_64::image::parse;

/// Stamps what makes a file an ELF file or a bzImage, which a fuzzer takes long to guess.
fn stamped(data: &[u8]) -> Vec<u8> {
    let mut file = data.to_vec();
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = file.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    match data.first().map(|b| b % 4) {
        // 64 bits, little-endian; an executable for x86-64 with program headers of 56 bytes.
        Some(1 | 2) => {
            put(0, b"\x7fELF\x02\x01\x01");
            put(16, &[2, 0, 62, 0]);
            put(54, &[56, 0]);
        }
        Some(3) => {
            put(0x1fe, &[0x55, 0xaa]);
            put(0x202, b"HdrS");
        }
        _ => {}
    }
    file
}

fuzz_target!(|data: &[u8]| {
    let data = stamped(data);
    let Ok(image) = parse(&data.as_slice()) else { return };
    for segment in &image.segments {
        let end = segment.file_offset.checked_add(segment.file_size).expect("wraps in the file");
        assert!(end <= data.len() as u64, "past the end of the file");
        assert!(segment.address >= 1 << 20, "over the boot tables");
        assert!(segment.address + segment.file_size <= image.needs_memory_to, "memory is understated");
    }
});
