//! A container: its root file system, its surroundings, its program.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use microvm::guest::{GuestSpec, ProcessSpec, SPEC_PATH, hosts, resolv_conf};
use rustix::fs::FileType;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::rootfs::{self, Overlay};
use super::{Failed, failed, network, shares};
use microvm::guest::users::{self, User};

static WANTS_AGENT: AtomicBool = AtomicBool::new(false);

/// What the host wants run, where it wants a container.
pub fn spec() -> Result<Option<GuestSpec>, Failed> {
    match fs::read(SPEC_PATH) {
        Ok(text) => {
            // A description of another version's is told, too.
            WANTS_AGENT.store(true, Ordering::Relaxed);
            let spec: GuestSpec =
                serde_json::from_slice(&text).map_err(|e| Failed(format!("{SPEC_PATH}: {e}")))?;
            WANTS_AGENT.store(spec.agent, Ordering::Relaxed);
            Ok(Some(spec))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed(SPEC_PATH)(e)),
    }
}

/// Whether the host waits for the program's streams. Asked for when something failed, maybe within the container.
pub fn wants_agent() -> bool {
    WANTS_AGENT.load(Ordering::Relaxed)
}

/// Makes the container, which is this process's own world from then on.
pub fn enter(spec: &GuestSpec) -> Result<(), Failed> {
    rootfs::mount_all(spec)?;
    let name = rustix::system::sethostname(spec.hostname.as_bytes());
    name.map_err(|e| failed("the host name")(e.into()))?;
    let address = spec.network.as_ref().map(|network| network.address);
    let files = [
        Overlay::new(rootfs::HOSTNAME, &format!("{}\n", spec.hostname))?,
        Overlay::new(rootfs::HOSTS, &hosts(&spec.hostname, address))?,
        Overlay::new(rootfs::RESOLV_CONF, &resolv_conf(spec.network.as_ref()))?,
    ];
    let shares = shares::prepare_all(&spec.mounts)?;
    rootfs::enter()?;
    for file in &files {
        if let Err(e) = file.put() {
            say!("{}: {e}", file.path());
        }
    }
    // Behind the files, none of which is written into a folder of the host's.
    shares::mount_all(&shares)?;
    if let Err(e) = network::set_up(spec.network.as_ref()) {
        say!("the network cannot be set up: {e}");
    }
    Ok(())
}

/// Standard input, output and error of a program.
pub type Streams = [Stdio; 3];

/// Starts the program, in a session of its own.
///
/// # Errors
/// As [`Command::spawn`]'s, and what stands in the way of its user or folder; of [`io::ErrorKind::Other`] where there is
/// no such user.
pub fn start(process: &ProcessSpec, streams: Streams) -> io::Result<Child> {
    let (program, arguments) = process.args.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let user = users::find(&process.user, Path::new("/etc")).map_err(io::Error::other)?;
    // As Docker: a folder that is not there is made.
    fs::create_dir_all(&process.cwd)?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("HOME", &user.home);
    command.envs(process.env.iter().filter_map(|word| word.split_once('=')));
    command.current_dir(&process.cwd);
    let [input, output, error] = streams;
    command.stdin(input).stdout(output).stderr(error);
    let terminal = process.terminal;
    let groups: Vec<_> = user.groups.iter().copied().map(Gid::from_raw).collect();
    // SAFETY: between fork and exec only system calls are made, and nothing is allocated.
    unsafe { command.pre_exec(move || become_user(&user, &groups, terminal)) };
    command.spawn()
}

fn become_user(user: &User, groups: &[Gid], terminal: bool) -> io::Result<()> {
    rustix::process::setsid()?;
    if terminal {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
    }
    // Programs open /dev/stdout again by its name, which is for the owner of the pipe or terminal alone. Not all have one.
    for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        if is_its_own(stream) {
            let _ = rustix::fs::fchown(stream, Some(Uid::from_raw(user.uid)), None);
        }
    }
    // While it still may: groups, group, user. libc's functions would wake threads that a forked child has not.
    set_thread_groups(groups)?;
    let (gid, uid) = (Gid::from_raw(user.gid), Uid::from_raw(user.uid));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// A pipe or a terminal, which nobody else has; not the console, nor /dev/null.
fn is_its_own(stream: BorrowedFd<'_>) -> bool {
    let kind = rustix::fs::fstat(stream).map(|stat| FileType::from_raw_mode(stat.st_mode));
    match kind {
        Ok(FileType::Fifo) => true,
        Ok(FileType::CharacterDevice) => rustix::termios::isatty(stream),
        _ => false,
    }
}
