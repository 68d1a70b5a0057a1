//! What a VM may be called.

/// The longest name in bytes. With the folder before it, the socket's path fits the 107 bytes that Linux has for one.
pub(super) const MAX_NAME: usize = 64;

/// Whether `text` can be a VM's name. It becomes a folder, so it has no slash, no dot in front and nothing that a shell
/// or a terminal would take for something else.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    first && text.len() <= MAX_NAME && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_a_path() {
        for good in ["a", "web-1", "vm_2.old", "0", &"x".repeat(MAX_NAME)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", "-a", ".a", "a/b", "a b", "a\n", "ä", "a\0", &"x".repeat(MAX_NAME + 1)] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }
}
