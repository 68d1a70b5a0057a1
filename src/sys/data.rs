//! Where this user's kernels and images are kept.

use std::env;
use std::path::PathBuf;

/// `$MICROVM_DATA`, else `microvm` in `$XDG_DATA_HOME` or in `~/.local/share` (XDG base directory specification, which has
/// relative paths ignored). `None`: there is no home either.
#[must_use]
pub fn data_folder() -> Option<PathBuf> {
    let path = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || Some(path("HOME")?.join(".local/share"));
    path("MICROVM_DATA").or_else(|| Some(path("XDG_DATA_HOME").or_else(home)?.join("microvm")))
}
