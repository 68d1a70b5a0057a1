//! `microvm cp`: files and folders between the host and a running container.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::container::{Agent, Container, ContainerError, Containers};
use crate::guest::archive::append;
use crate::guest::wire::Request;
use crate::sys::signals::{Signal, Signals};

use super::super::CliError;
use super::unpack::{take_out, unpack};

const AFTER_HELP: &str = "One of the two is CONTAINER:PATH. Where the destination is a folder the copy goes into it, else it is called as the
destination says. Links stay links. On the host files are this user's; what comes out of a container never leaves the
destination, whatever its archive says.

Exit status:
  0  done
  1  a file or the container is not there, or the disk is full
  2  wrong usage
  128 and a signal's number: that signal came while files were unpacked

Examples:
  microvm cp site web:/srv
  microvm cp web:/var/log/app.log .
  microvm cp web:/etc - | tar t";

/// Flags of `microvm cp`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct CpArgs {
    /// A path, CONTAINER:PATH, or - for a tar archive on standard input
    source: String,
    /// A path, CONTAINER:PATH, or - for a tar archive on standard output
    destination: String,
}

/// One of the two places.
enum Place {
    Host(PathBuf),
    Guest(String, String),
    /// `-`.
    Archive,
}

impl Place {
    /// As Docker: a path with a slash before the first colon, or none, is the host's.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            _ if text == "-" => Self::Archive,
            Some((name, path)) if !name.is_empty() && !name.contains('/') && name != "." => {
                Self::Guest(name.into(), path.into())
            }
            _ => Self::Host(text.into()),
        }
    }
}

pub fn run(args: &CpArgs) -> Result<u8, CliError> {
    match (Place::parse(&args.source), Place::parse(&args.destination)) {
        (Place::Guest(name, path), to @ (Place::Host(_) | Place::Archive)) => {
            fetch(&Containers::of_user()?.find(&name)?, &path, &to)
        }
        (from @ (Place::Host(_) | Place::Archive), Place::Guest(name, path)) => {
            bring(&from, &Containers::of_user()?.find(&name)?, &path)
        }
        _ => Err(CliError::Usage(
            "cp: one of the two must be CONTAINER:PATH, and the other a path or -".into(),
        )),
    }
}

/// From the guest, whose archive is not trusted.
fn fetch(container: &Container, path: &str, to: &Place) -> Result<u8, CliError> {
    let mut agent = Agent::connect(container)?;
    agent.send(&Request::Read { path: path.into() })?;
    let Place::Host(target) = to else {
        agent.receive(&mut io::stdout().lock())?;
        return Ok(0);
    };
    let failed = |source| CliError::Copy { path: target.clone(), source };
    // Into a new folder beside the destination, and out of it under the right name: nothing that is there is in its way.
    let (folder, name) = match (target.is_dir(), target.file_name()) {
        (false, Some(name)) => (parent(target), Some(name)),
        _ => (target.as_path(), None),
    };
    // As it was asked for, not as the guest calls it: that could be any file's name.
    let Some(name) = name.or(Path::new(path).file_name()) else {
        return Err(CliError::Usage(format!(
            "cp: {path:?} has no name: name the copy, too, in a folder that is there"
        )));
    };
    let archive = receive(&mut agent, folder)?;
    // Until here nothing has a name, and a signal may end this at once.
    let mut archive = Stoppable { archive, signals: Signals::new().map_err(failed)?, signal: None };
    let work = folder.join(format!(".microvm-cp-{}", std::process::id()));
    // What the container keeps from others is kept from others here.
    fs::DirBuilder::new().mode(0o700).create(&work).map_err(failed)?;
    // What is in "/" comes without it.
    let top = if Path::new(path).file_name().is_some() { work.clone() } else { work.join(name) };
    let unpacked = fs::create_dir_all(&top).and_then(|()| unpack(&mut archive, &top));
    let done = unpacked.and_then(|()| take_out(&work, folder, name));
    let _ = fs::remove_dir_all(&work);
    match archive.signal {
        Some(signal) => Ok(128 + signal),
        None => done.map(|()| 0).map_err(failed),
    }
}

/// An archive that cannot be read any more when a signal has come to end this process.
struct Stoppable {
    archive: File,
    signals: Signals,
    signal: Option<u8>,
}

impl Read for Stoppable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(signal) = self.signals.take() {
            if let Signal::End(number) = signal {
                self.signal = Some(number);
            }
        }
        if self.signal.is_some() { Err(io::ErrorKind::BrokenPipe.into()) } else { self.archive.read(buffer) }
    }
}

impl Seek for Stoppable {
    fn seek(&mut self, position: io::SeekFrom) -> io::Result<u64> {
        self.archive.seek(position)
    }
}

/// The archive goes to a file first: what unpacks it then reads no stream that may end in the middle.
fn receive(agent: &mut Agent, folder: &Path) -> Result<File, CliError> {
    let failed = |source| CliError::Copy { path: folder.into(), source };
    let mut file = tempfile(folder).map_err(failed)?;
    agent.receive(&mut file)?;
    Ok(file)
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// To the guest.
fn bring(from: &Place, container: &Container, path: &str) -> Result<u8, CliError> {
    let mut agent = Agent::connect(container)?;
    match from {
        Place::Host(source) => {
            let failed = |e| CliError::Copy { path: source.clone(), source: e };
            let (folder, name) = target(container, source, path).map_err(failed)?;
            agent.send(&Request::Write { path: folder })?;
            agent.supply(&mut pack(source, &name).map_err(failed)?)?;
        }
        _ => {
            agent.send(&Request::Write { path: path.into() })?;
            agent.supply(&mut io::stdin().lock())?;
        }
    }
    Ok(0)
}

/// The folder in the guest, and the name in it.
fn target(container: &Container, source: &Path, path: &str) -> io::Result<(String, PathBuf)> {
    let own = source.canonicalize()?.file_name().map_or_else(|| ".".into(), PathBuf::from);
    if is_folder(container, path) {
        return Ok((path.into(), own));
    }
    let (folder, name) = path.trim_end_matches('/').rsplit_once('/').unwrap_or((".", path));
    Ok((if folder.is_empty() { "/".into() } else { folder.into() }, name.into()))
}

/// An empty archive can be unpacked into folders alone.
fn is_folder(container: &Container, path: &str) -> bool {
    let asked = Agent::connect(container).and_then(|mut agent| {
        agent.send(&Request::Write { path: path.into() })?;
        agent.supply(&mut io::empty())
    });
    !matches!(asked, Err(ContainerError::Refused { .. }))
}

/// An archive of `source`, in a file without a name.
fn pack(source: &Path, name: &Path) -> io::Result<impl Read + use<>> {
    let mut archive = tar::Builder::new(io::BufWriter::new(tempfile(&std::env::temp_dir())?));
    // A link to a folder that is named itself stands for the folder.
    let path = if source.is_dir() { source.canonicalize()? } else { source.into() };
    append(&mut archive, name, &path)?;
    let mut file = archive.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.flush()?;
    file.rewind()?;
    Ok(io::BufReader::new(file))
}

/// A file in `folder` that has no name, or not for long where the file system asks for one.
fn tempfile(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(CWD, folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let path = folder.join(format!(".microvm-cp-{}", std::process::id()));
            let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        }
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_ends_with_a_signal() {
        // In a thread of its own, as its signals stay blocked.
        let test = || {
            let mut archive = tempfile(&std::env::temp_dir()).unwrap();
            archive.write_all(b"text").unwrap();
            archive.rewind().unwrap();
            let mut archive = Stoppable { archive, signals: Signals::new().unwrap(), signal: None };
            let mut two = [0; 2];
            archive.read_exact(&mut two).unwrap();
            // SAFETY: to this thread, which has blocked it.
            assert_eq!(unsafe { libc::raise(libc::SIGTERM) }, 0);
            assert!(archive.read_exact(&mut two).is_err());
            assert_eq!((two, archive.signal), (*b"te", Some(15)));
        };
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn a_colon_makes_it_a_containers() {
        assert!(
            matches!(Place::parse("web:/a:b"), Place::Guest(name, path) if name == "web" && path == "/a:b")
        );
        assert!(matches!(Place::parse("-"), Place::Archive));
        for host in ["a", "./a:b", "/a:b", ":a", "."] {
            assert!(matches!(Place::parse(host), Place::Host(_)), "{host}");
        }
    }
}
