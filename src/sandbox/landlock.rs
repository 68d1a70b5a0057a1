//! Landlock: no path, no TCP port, no process outside, whatever the system calls are.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};

use super::{Lack, SandboxError, layer};

/// The newest interface whose every right is asked for; an older kernel enforces what it knows of it.
const NEWEST: ABI = ABI::V9;

/// What each version of the interface brought (Linux, `Documentation/userspace-api/landlock.rst`). Version 9's rules for
/// sockets that have a path are not missed: only with `--vsock` can a thread connect at all, which docs/security.md tells.
const FEATURES: [(u32, Lack); 5] = [
    (1, Lack { what: "Landlock", since: "5.13, with landlock in its lsm= list" }),
    (3, Lack { what: "Landlock's truncation rules", since: "6.2" }),
    (4, Lack { what: "Landlock's TCP rules", since: "6.7" }),
    (5, Lack { what: "Landlock's device rules", since: "6.10" }),
    (6, Lack { what: "Landlock's rules for signals and abstract sockets", since: "6.12" }),
];

/// What version `abi` lacks. Where there is no Landlock at all, that alone.
pub(super) fn lacks(abi: u32) -> impl Iterator<Item = Lack> {
    let count = if abi == 0 { 1 } else { usize::MAX };
    FEATURES.into_iter().filter(move |(since, _)| *since > abi).map(|(_, lack)| lack).take(count)
}

/// A folder in which, or a file with which, one thing is still allowed, and nothing else.
#[derive(Clone, Debug)]
pub enum Folder {
    /// Removing files, in it and in the folders below it.
    Files(PathBuf),
    /// Removing empty folders, in it and in the folders below it.
    Folders(PathBuf),
    /// Connections to sockets in it and in the folders below it; before version 9, to sockets anywhere.
    Sockets(PathBuf),
    /// Files and folders, in it and in the folders below it, can be read; and where it is not `readonly` be made, changed
    /// and removed. Nothing in it is a program to run, and no device, socket or pipe can be made.
    Shared {
        /// The folder.
        folder: Arc<OwnedFd>,
        /// Reading alone.
        readonly: bool,
    },
    /// A file can be read, and where it is not `readonly` be written.
    SharedFile {
        /// The file.
        file: Arc<OwnedFd>,
        /// Reading alone.
        readonly: bool,
    },
}

/// What a share that can be written needs beside reading.
fn writing() -> BitFlags<AccessFs> {
    AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSym
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer
}

/// Takes every right away from this thread and those that it starts, but for `folders`.
pub(super) fn restrict(folders: &[Folder]) -> Result<(), SandboxError> {
    let failed = layer("restrict itself by Landlock");
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(&failed)?;
    for folder in folders {
        let (path, right) = match folder {
            Folder::Files(path) => (path, AccessFs::RemoveFile),
            Folder::Folders(path) => (path, AccessFs::RemoveDir),
            Folder::Sockets(path) => (path, AccessFs::ResolveUnix),
            Folder::Shared { folder, readonly } => {
                let reading = AccessFs::ReadFile | AccessFs::ReadDir;
                let rights = if *readonly { reading } else { reading | writing() };
                rules = rules.add_rule(PathBeneath::new(folder, rights)).map_err(&failed)?;
                continue;
            }
            Folder::SharedFile { file, readonly } => {
                let reading = BitFlags::from(AccessFs::ReadFile);
                let rights =
                    if *readonly { reading } else { reading | AccessFs::WriteFile | AccessFs::Truncate };
                rules = rules.add_rule(PathBeneath::new(file, rights)).map_err(&failed)?;
                continue;
            }
        };
        let folder = PathFd::new(path).map_err(layer("open a folder for Landlock"))?;
        rules = rules.add_rule(PathBeneath::new(folder, right)).map_err(&failed)?;
    }
    rules.restrict_self().map_err(&failed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_lacks_what_came_later() {
        assert_eq!(lacks(0).map(|l| l.what).collect::<Vec<_>>(), ["Landlock"]);
        assert_eq!(lacks(2).count(), 4);
        assert_eq!((lacks(6).count(), lacks(9).count()), (0, 0));
    }
}
