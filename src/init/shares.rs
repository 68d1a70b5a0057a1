//! Folders of the host's, mounted in the container.

use std::fs;

use microvm::guest::MountSpec;
use rustix::mount::{MountFlags, mount};

use super::{Failed, failed};

/// Mounts all of them, those that lie in others after these. Called inside, so that a link in the image leads to a place
/// inside.
pub fn mount_all(mounts: &[MountSpec]) -> Result<(), Failed> {
    let mut mounts: Vec<_> = mounts.iter().collect();
    mounts.sort_by_key(|mount| &mount.path);
    mounts.into_iter().try_for_each(mount_one)
}

fn mount_one(spec: &MountSpec) -> Result<(), Failed> {
    let what = format!("the shared folder at {}", spec.path);
    fs::create_dir_all(&spec.path).map_err(failed(&what))?;
    // No device of the host's is one of the guest's.
    let flags = if spec.read_only { MountFlags::NODEV | MountFlags::RDONLY } else { MountFlags::NODEV };
    let mounted = mount(spec.tag.as_str(), spec.path.as_str(), "virtiofs", flags, None);
    mounted.map_err(|e| failed(&format!("{what} (virtiofs, tag {})", spec.tag))(e.into()))
}
