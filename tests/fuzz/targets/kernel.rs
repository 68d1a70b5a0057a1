//! A kernel file of any bytes: it is refused, or all its segments lie in the file and above the first MiB.
#![no_main]

use libfuzzer_sys::fuzz_target;
use microvm::arch::x86_64::image::parse;

fuzz_target!(|data: &[u8]| {
    let Ok(image) = parse(&data) else { return };
    for segment in &image.segments {
        let end = segment.file_offset.checked_add(segment.file_size).expect("wraps in the file");
        assert!(end <= data.len() as u64, "past the end of the file");
        assert!(segment.address >= 1 << 20, "over the boot tables");
        assert!(segment.address + segment.file_size <= image.needs_memory_to, "memory is understated");
    }
});
