//! Folders and files of the host's, mounted in the container.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use microvm::guest::MountSpec;
use microvm::guest::copy::copy_contents;
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, mount, mount_bind};

use super::{Failed, failed};

/// Where the roots of shares are that are one file: outside of the container.
const ASIDE: &str = "/f";

/// A share that is to be mounted in the container.
pub struct Share<'a> {
    spec: &'a MountSpec,
    /// It is this one file.
    file: Option<OwnedFd>,
}

/// Prepares all of them, those that lie in others after these. Called outside of the container.
pub fn prepare_all(mounts: &[MountSpec]) -> Result<Vec<Share<'_>>, Failed> {
    let mut mounts: Vec<_> = mounts.iter().collect();
    mounts.sort_by_key(|mount| &mount.path);
    mounts.into_iter().map(prepare).collect()
}

fn prepare(spec: &MountSpec) -> Result<Share<'_>, Failed> {
    let open_file = |name: &String| {
        let aside = Path::new(ASIDE).join(&spec.tag);
        fs::create_dir_all(&aside).map_err(failed(ASIDE))?;
        mount_share(spec, &aside)?;
        let file = open(aside.join(name), OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        file.map_err(|e| failed(&format!("the shared file {name}"))(e.into()))
    };
    Ok(Share { spec, file: spec.file.as_ref().map(open_file).transpose()? })
}

/// Mounts all of them. Called inside, so that a link in the image leads to a place inside.
pub fn mount_all(shares: &[Share<'_>]) -> Result<(), Failed> {
    shares.iter().try_for_each(Share::mount)
}

impl Share<'_> {
    fn mount(&self) -> Result<(), Failed> {
        let path = Path::new(&self.spec.path);
        let what = format!(
            "the shared {} at {}",
            if self.file.is_some() { "file" } else { "folder" },
            path.display()
        );
        make_mount_point(path, self.file.is_some()).map_err(failed(&what))?;
        if let Some(file) = &self.file {
            let bound = mount_bind(format!("/proc/self/fd/{}", file.as_raw_fd()), path);
            return bound.map_err(|e| failed(&what)(e.into()));
        }
        // Before it is covered.
        let image = self.spec.fill.then(|| File::open(path)).transpose().map_err(failed(&what))?;
        mount_share(self.spec, path)?;
        let fill = |image: &File| copy_contents(image.as_fd(), File::open(path)?.as_fd());
        let filled: io::Result<()> = image.as_ref().map_or(Ok(()), fill);
        filled.map_err(failed(&format!("what the image has at {}, for a new volume,", path.display())))
    }
}

/// Makes an empty folder or file to mount something over, and the folders that it is in, where there is none.
fn make_mount_point(path: &Path, is_file: bool) -> io::Result<()> {
    if !is_file {
        return fs::create_dir_all(path);
    }
    if path.exists() {
        return Ok(());
    }
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    File::create(path).map(drop)
}

fn mount_share(spec: &MountSpec, target: &Path) -> Result<(), Failed> {
    // No device of the host's is one of the guest's.
    let flags = if spec.read_only { MountFlags::NODEV | MountFlags::RDONLY } else { MountFlags::NODEV };
    let mounted = mount(spec.tag.as_str(), target, "virtiofs", flags, None);
    let what = format!("the shared folder at {} (virtiofs, tag {})", spec.path, spec.tag);
    mounted.map_err(|e| failed(&what)(e.into()))
}
