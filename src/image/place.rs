//! Where images are.

use std::path::PathBuf;

use super::error::ImageError;

/// `$MICROVM_DATA/images`, else `$XDG_DATA_HOME/microvm/images`, else `$HOME/.local/share/microvm/images`.
///
/// # Errors
/// No variable holds an absolute path.
pub fn folder() -> Result<PathBuf, ImageError> {
    // The XDG base directory specification: a relative path is to be ignored.
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let own = absolute("MICROVM_DATA");
    let data = || absolute("XDG_DATA_HOME").map(|path| path.join("microvm"));
    let home = || absolute("HOME").map(|path| path.join(".local/share/microvm"));
    own.or_else(data).or_else(home).map(|path| path.join("images")).ok_or(ImageError::NoPlace)
}
