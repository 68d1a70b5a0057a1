//! The containers of this user, running and ended.
//!
//! ```text
//! containers/ID/record.json   what it is, written once
//! containers/ID/lock          locked by its VM's process, whose number is in it: who can lock it knows the VM is dead
//! containers/ID/end.json      how it ended; empty before, and for ever where its process was killed
//! containers/ID/log.0, log.1  what its program printed
//! containers/ID/storage       the disk of --storage
//! containers/ID/volumes/N     its volumes without a name
//! containers/lock             held by who adds or removes
//! ```
//!
//! There is no daemon. A folder is made under a name with a dot and renamed when it is whole, so nobody sees half of one.

use std::any::Any;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, open, unlinkat};
use rustix::io::{Errno, retry_on_intr};
use serde::{Deserialize, Serialize};

use crate::config::is_name;
use crate::guest::ProcessSpec;
use crate::guest::status::KILLED;
use crate::sandbox::{Confined, Folder, Kept, SandboxError};
use crate::sys::data::data_folder;
use crate::sys::fork::leave_behind;
use crate::sys::remove_tree::remove_tree;
use crate::vmm::{Service, clean_up_at_end};

use super::ContainerError;
use super::host::Isolation;
use super::log::{self, LogWriter};
use super::storage;

const RECORD: &str = "record.json";
const LOCK: &str = "lock";
const END: &str = "end.json";
/// Digits of an id, as Docker shows them.
const ID_BYTES: usize = 6;

/// What a container is, from its beginning.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Twelve hexadecimal digits.
    pub id: String,
    /// What its user calls it.
    pub name: String,
    /// The image as it was asked for.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// When it was made.
    pub created: String,
    /// Its program.
    pub process: ProcessSpec,
    /// What `stop` sends first.
    pub stop_signal: u8,
    /// It goes when it ends.
    pub rm: bool,
    /// Published ports, as they were given.
    #[serde(default)]
    pub ports: Vec<String>,
    /// Shared folders, as they were given.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// What is between its program and the host.
    #[serde(default)]
    pub isolation: Isolation,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Its exit status.
    pub status: u8,
    /// When. Not known of one that was killed.
    pub time: Option<String>,
}

/// Whether a container runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its VM's process lives.
    Running(u32),
    /// It does not.
    Ended(Ended),
}

/// All containers of this user.
pub struct Containers {
    folder: PathBuf,
}

/// A container that is there.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its folder.
    pub folder: PathBuf,
    /// What it is.
    pub record: Record,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> ContainerError {
    move |source| ContainerError::Store { path: path.into(), source }
}

/// Twelve random digits.
///
/// # Panics
/// Never: the kernel has random bytes from the first moment of user space on.
#[must_use]
pub fn new_id() -> String {
    let mut bytes = [0; ID_BYTES];
    // Fewer bytes than 256 come at once (getrandom(2)).
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Containers {
    /// This user's. The folder need not be there yet.
    ///
    /// # Errors
    /// The user has no home.
    pub fn of_user() -> Result<Self, ContainerError> {
        Ok(Self { folder: data_folder().ok_or(ContainerError::NoPlace)?.join("containers") })
    }

    /// The folder of the container with this id.
    #[must_use]
    pub fn folder_of(&self, id: &str) -> PathBuf {
        self.folder.join(id)
    }

    /// Adds a container, which runs from then on until what this returns is dropped or its process ends.
    ///
    /// # Errors
    /// Its name is another one's, or the disk fails.
    pub fn add(&self, record: &Record) -> Result<Claim, ContainerError> {
        if !is_name(&record.name) {
            return Err(ContainerError::Name(record.name.clone()));
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder).map_err(failed(&self.folder))?;
        let _guard = self.lock()?;
        if self.sweep()?.iter().any(|c| c.record.name == record.name || c.record.id == record.name) {
            return Err(ContainerError::NameTaken(record.name.clone()));
        }
        let new = self.folder.join(format!(".{}", record.id));
        let folder = self.folder_of(&record.id);
        let made = Claim::make(&new, record).and_then(|files| {
            fs::rename(&new, &folder)?;
            let open = |path| open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
            let (own, all) = (open(&folder)?, open(&self.folder)?);
            Ok((files, own, all))
        });
        match made {
            Ok(((lock, end, log), own, all)) => Ok(Claim {
                folder: folder.clone(),
                lock,
                end,
                log,
                leavings: Leavings { path: folder, folder: own, all, id: record.id.clone() },
            }),
            Err(e) => {
                let _ = fs::remove_dir_all(&new);
                Err(failed(&folder)(e))
            }
        }
    }

    /// All containers, the newest first.
    ///
    /// # Errors
    /// The folder is there and cannot be read.
    pub fn list(&self) -> Result<Vec<Container>, ContainerError> {
        let entries = match fs::read_dir(&self.folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed(&self.folder))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let folders = names.filter(|name| !name.starts_with('.') && name != LOCK);
        // One that is being removed meanwhile is none.
        let mut all: Vec<_> = folders.filter_map(|name| self.read(&name)).collect();
        all.sort_by(|a, b| (&b.record.created, &b.record.id).cmp(&(&a.record.created, &a.record.id)));
        Ok(all)
    }

    fn read(&self, id: &str) -> Option<Container> {
        let folder = self.folder_of(id);
        let text = fs::read(folder.join(RECORD)).ok()?;
        Some(Container { folder, record: serde_json::from_slice(&text).ok()? })
    }

    /// The container of this name or id, or whose id begins so.
    ///
    /// # Errors
    /// There is none, or there are several.
    pub fn find(&self, text: &str) -> Result<Container, ContainerError> {
        let all = self.list()?;
        if let Some(found) = all.iter().find(|c| c.record.name == text || c.record.id == text) {
            return Ok(found.clone());
        }
        let mut found = all.iter().filter(|c| !text.is_empty() && c.record.id.starts_with(text));
        match (found.next(), found.next()) {
            (Some(container), None) => Ok(container.clone()),
            (Some(_), Some(_)) => Err(ContainerError::Ambiguous(text.into())),
            (None, _) => Err(ContainerError::NotFound(text.into())),
        }
    }

    /// Removes an ended container, and says how many bytes it had.
    ///
    /// # Errors
    /// It runs, or the disk fails.
    pub fn remove(&self, container: &Container) -> Result<u64, ContainerError> {
        let _guard = self.lock()?;
        self.remove_locked(container)
    }

    fn remove_locked(&self, container: &Container) -> Result<u64, ContainerError> {
        if let State::Running(_) = container.state()? {
            return Err(ContainerError::Running(container.record.name.clone()));
        }
        let gone = self.folder.join(format!(".{}", container.record.id));
        match fs::rename(&container.folder, &gone) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(ContainerError::NotFound(container.record.name.clone()));
            }
            renamed => renamed.map_err(failed(&container.folder))?,
        }
        remove_tree(&gone).map_err(failed(&gone))
    }

    /// Removes what killed processes left: unfinished folders, half removed ones, and containers that were to go when
    /// they ended.
    ///
    /// # Errors
    /// The disk fails.
    pub fn clean(&self) -> Result<(), ContainerError> {
        if !self.folder.exists() {
            return Ok(());
        }
        let _guard = self.lock()?;
        self.sweep().map(drop)
    }

    /// Has a process of its own remove a container when that has ended, for one whose own process is confined by then and
    /// may not look into folders. Called while this process has one thread.
    ///
    /// # Errors
    /// No process is left.
    pub fn clean_behind(self, container: &Path) -> io::Result<()> {
        let lock = container.join(LOCK);
        leave_behind(move || {
            // Gone already, else free when the container's process is.
            if let Ok(lock) = File::open(lock) {
                let _ = retry_on_intr(|| flock(&lock, FlockOperation::LockShared));
            }
            let _ = self.clean();
        })
    }

    /// Returns those that are left.
    fn sweep(&self) -> Result<Vec<Container>, ContainerError> {
        let mut left = Vec::new();
        for container in self.list()? {
            let removed =
                if container.record.rm { self.remove_locked(&container).map(Some) } else { Ok(None) };
            match removed {
                Ok(Some(_)) => super::forget_vm(&container),
                Ok(None) | Err(ContainerError::Running(_)) => left.push(container),
                Err(ContainerError::NotFound(_)) => {}
                Err(e) => return Err(e),
            }
        }
        // Behind them: a VM that ends removes its record without asking, so that one which was not listed above has none here.
        let entries = fs::read_dir(&self.folder).map_err(failed(&self.folder))?;
        for entry in entries.flatten() {
            // Nobody adds or removes now, so it is nobody's.
            if entry.file_name().as_encoded_bytes().starts_with(b".") || is_half_removed(&entry.path()) {
                let _ = remove_tree(&entry.path());
            }
        }
        Ok(left)
    }

    fn lock(&self) -> Result<File, ContainerError> {
        let path = self.folder.join(LOCK);
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.map_err(failed(&path))?;
        flock(&file, FlockOperation::LockExclusive).map_err(|e| failed(&path)(e.into()))?;
        Ok(file)
    }
}

/// Whether this is a container's folder without its record, which goes first, and nobody is at work in it.
fn is_half_removed(folder: &Path) -> bool {
    let is_missing = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    let is_unlocked = || match File::open(folder.join(LOCK)) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockShared).is_ok(),
        Err(e) => is_missing(&e),
    };
    fs::symlink_metadata(folder.join(RECORD)).is_err_and(|e| is_missing(&e)) && is_unlocked()
}

impl Container {
    /// Whether it runs now.
    ///
    /// # Errors
    /// It has been removed, or the disk fails.
    pub fn state(&self) -> Result<State, ContainerError> {
        let mut lock = self.open(LOCK)?;
        match flock(&lock, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                lock.read_to_string(&mut pid).map_err(failed(&self.folder))?;
                Ok(State::Running(pid.trim().parse().unwrap_or(0)))
            }
            Err(e) => Err(failed(&self.folder)(e.into())),
            Ok(()) => self.ended(&mut self.open(END)?).map(State::Ended),
        }
    }

    /// Waits until it has ended, and says how.
    ///
    /// # Errors
    /// It has been removed, or the disk fails.
    pub fn wait(&self) -> Result<Ended, ContainerError> {
        // Opened now: one that goes with its end takes the name of this file along.
        let mut end = self.open(END)?;
        let lock = self.open(LOCK)?;
        loop {
            match flock(&lock, FlockOperation::LockShared) {
                Ok(()) => return self.ended(&mut end),
                Err(Errno::INTR) => {}
                Err(e) => return Err(failed(&self.folder)(e.into())),
            }
        }
    }

    fn open(&self, name: &str) -> Result<File, ContainerError> {
        File::open(self.folder.join(name)).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => ContainerError::NotFound(self.record.name.clone()),
            _ => failed(&self.folder)(e),
        })
    }

    fn ended(&self, end: &mut File) -> Result<Ended, ContainerError> {
        let mut text = Vec::new();
        end.read_to_end(&mut text).map_err(failed(&self.folder))?;
        // Nothing was written, or not all: killed, as far as anybody knows.
        Ok(serde_json::from_slice(&text).unwrap_or(Ended { status: KILLED, time: None }))
    }
}

/// A container that this process runs.
pub struct Claim {
    /// Its folder.
    pub folder: PathBuf,
    /// Held as long as the container runs.
    pub lock: File,
    /// For [`record_end`].
    pub end: File,
    /// Its log.
    pub log: LogWriter,
    /// What removes it.
    pub leavings: Leavings,
}

impl Claim {
    fn make(folder: &Path, record: &Record) -> io::Result<(File, File, LogWriter)> {
        DirBuilder::new().mode(0o700).create(folder)?;
        let create =
            |name| OpenOptions::new().write(true).create_new(true).mode(0o600).open(folder.join(name));
        create(RECORD)?.write_all(&serde_json::to_vec_pretty(record)?)?;
        let lock = create(LOCK)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        Ok((lock, create(END)?, LogWriter::create(folder)?))
    }
}

/// Says in a container's lock which process runs it: this one, after it may have forked.
///
/// # Errors
/// The disk is full.
pub fn set_process(mut lock: &File) -> io::Result<()> {
    lock.write_all(std::process::id().to_string().as_bytes())
}

/// Writes down how a container ended.
///
/// # Errors
/// The disk is full.
pub fn record_end(mut end: &File, status: u8) -> io::Result<()> {
    let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    end.write_all(&serde_json::to_vec(&Ended { status, time: Some(time) })?)
}

impl Service for Leavings {
    fn keep(&self, kept: &mut Kept) -> Vec<Folder> {
        kept.add("the container's folder", &self.folder);
        kept.add("the folder of all containers", &self.all);
        let all = self.path.parent().unwrap_or(Path::new("/"));
        vec![Folder::Files(self.path.clone()), Folder::Folders(all.into())]
    }

    fn start(self: Box<Self>, confined: Confined) -> Result<Box<dyn Any>, SandboxError> {
        clean_up_at_end(confined, "container", RemovedWhenDropped(*self))
    }
}

struct RemovedWhenDropped(Leavings);

impl Drop for RemovedWhenDropped {
    fn drop(&mut self) {
        self.0.remove();
    }
}

/// Removes a container's folder at the end of its VM, from within a process that may remove files there and nothing else.
#[derive(Debug)]
pub struct Leavings {
    path: PathBuf,
    folder: OwnedFd,
    all: OwnedFd,
    id: String,
}

impl Leavings {
    /// Removes it, but for what its volumes have: [`Containers::clean`] does.
    pub fn remove(&self) {
        // Its record first: without that it is no container any more.
        for name in [RECORD, END, LOCK, storage::FILE].iter().chain(&log::FILES) {
            let _ = unlinkat(&self.folder, *name, AtFlags::empty());
        }
        let _ = unlinkat(&self.all, &self.id, AtFlags::REMOVEDIR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Containers) {
        let dir = tempfile::tempdir().unwrap();
        let containers = Containers { folder: dir.path().join("containers") };
        (dir, containers)
    }

    fn record(name: &str) -> Record {
        let process = serde_json::from_str(r#"{"args": ["true"]}"#).unwrap();
        Record {
            id: new_id(),
            name: name.into(),
            image: "box".into(),
            image_id: "0".into(),
            created: humantime::format_rfc3339_nanos(SystemTime::now()).to_string(),
            process,
            stop_signal: 15,
            rm: false,
            ports: Vec::new(),
            volumes: Vec::new(),
            isolation: Isolation::Vm,
        }
    }

    #[test]
    fn a_container_runs_as_long_as_its_claim_and_ends_with_its_status() {
        let (_dir, containers) = store();
        assert!(containers.list().unwrap().is_empty());
        let claim = containers.add(&record("web")).unwrap();
        set_process(&claim.lock).unwrap();
        let container = containers.find("web").unwrap();
        assert_eq!(container.state().unwrap(), State::Running(std::process::id()));
        assert!(matches!(containers.remove(&container), Err(ContainerError::Running(_))));
        assert!(matches!(containers.add(&record("web")), Err(ContainerError::NameTaken(_))));
        record_end(&claim.end, 3).unwrap();
        drop(claim);
        assert_eq!(container.wait().unwrap().status, 3);
        assert!(containers.remove(&container).unwrap() > 0);
        assert!(matches!(containers.find("web"), Err(ContainerError::NotFound(_))));
    }

    #[test]
    fn one_whose_process_was_killed_is_dead() {
        let (_dir, containers) = store();
        drop(containers.add(&record("web")).unwrap());
        let container = containers.find("web").unwrap();
        assert_eq!(container.state().unwrap(), State::Ended(Ended { status: KILLED, time: None }));
    }

    #[test]
    fn names_ids_and_beginnings_of_ids_find_it() {
        let (_dir, containers) = store();
        let (mut a, mut b) = (record("a"), record("b"));
        (a.id, b.id) = ("abc111111111".into(), "abd111111111".into());
        let _claims = [containers.add(&a).unwrap(), containers.add(&b).unwrap()];
        assert_eq!(containers.find("a").unwrap().record.id, a.id);
        assert_eq!(containers.find("abd").unwrap().record.id, b.id);
        assert!(matches!(containers.find("ab"), Err(ContainerError::Ambiguous(_))));
        assert!(matches!(containers.find(""), Err(ContainerError::NotFound(_))));
        let ids: Vec<_> = containers.list().unwrap().into_iter().map(|c| c.record.name).collect();
        assert_eq!(ids, ["b", "a"]);
    }

    #[test]
    fn what_was_killed_while_it_removed_itself_goes_and_what_runs_stays() {
        let (_dir, containers) = store();
        containers.clean().unwrap();
        let (half, runs) = (containers.add(&record("a")).unwrap(), containers.add(&record("b")).unwrap());
        for claim in [&half, &runs] {
            fs::remove_file(claim.folder.join(RECORD)).unwrap();
        }
        let (half, lock) = (half.folder, half.lock);
        containers.clean().unwrap();
        assert!(half.exists() && runs.folder.exists());
        drop(lock);
        containers.clean().unwrap();
        assert!(!half.exists() && runs.folder.exists());
        // Its lock may have gone, too.
        fs::create_dir(&half).unwrap();
        drop(containers.add(&record("c")).unwrap());
        assert!(!half.exists() && runs.folder.exists() && containers.find("c").is_ok());
    }

    /// A VM that ends removes what it can, and another process the rest: whoever comes first, nothing is left.
    #[test]
    fn two_that_remove_one_container_leave_nothing() {
        let (_dir, containers) = store();
        for number in 0..1000 {
            let claim = containers.add(&Record { rm: true, ..record("web") }).unwrap();
            let volume = claim.folder.join("volumes/0");
            fs::create_dir_all(&volume).unwrap();
            fs::write(volume.join("file"), "").unwrap();
            let Claim { folder, lock, leavings, .. } = claim;
            let waiting = File::open(folder.join(LOCK)).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    drop(lock);
                    // At another moment each time.
                    (0..number * 10).for_each(|_| std::hint::spin_loop());
                    leavings.remove();
                });
                flock(&waiting, FlockOperation::LockShared).unwrap();
                drop(waiting);
                containers.clean().unwrap();
            });
            assert!(!folder.exists());
        }
    }

    #[test]
    fn leavings_go() {
        let (_dir, containers) = store();
        let claim = containers.add(&record("a")).unwrap();
        claim.leavings.remove();
        assert!(containers.list().unwrap().is_empty() && !claim.folder.exists());
        // What a killed process left: half a container, and one that was to go.
        fs::create_dir(containers.folder.join(".half")).unwrap();
        drop(containers.add(&Record { rm: true, ..record("b") }).unwrap());
        let _claim = containers.add(&record("c")).unwrap();
        let names: Vec<_> = containers.list().unwrap().into_iter().map(|c| c.record.name).collect();
        assert_eq!(names, ["c"]);
        assert!(!containers.folder.join(".half").exists());
    }
}
