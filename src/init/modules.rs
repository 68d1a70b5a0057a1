//! Kernel modules, in the order of their names, which `guest-kernels/initramfs` chose by what they need.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::system::finit_module;

const FOLDER: &str = "/modules";

/// Loads every module of [`FOLDER`]; `None` without the folder, as there is nothing to do. An error names the first
/// module that the kernel refuses; the others are loaded all the same.
pub fn load_all() -> Option<io::Result<()>> {
    let entries = fs::read_dir(FOLDER).ok()?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "ko"));
    paths.sort();
    Some(paths.iter().map(|path| load(path)).fold(Ok(()), Result::and))
}

fn load(path: &Path) -> io::Result<()> {
    let failed = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    let file = File::open(path).map_err(failed)?;
    finit_module(&file, c"", 0).map_err(|e| failed(e.into()))
}
