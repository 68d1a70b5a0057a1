//! `microvm-init`: process 1 of a guest that runs one program.
//!
//! It mounts what a program expects, runs the program, and switches the machine off. The program is that of a container,
//! where the initramfs has a description of one (`microvm::guest`), else what stands behind ` -- ` on the kernel's
//! command line. On the way it writes the timeline's marks to I/O port 0x80. With the word
//! `microvm.exit_code_port=PORT` on the command line the program's status becomes that of `microvm`.

/// Says something on the console, where there is one: a guest need not have any, and writing to none must not end process 1,
/// as `eprintln!` would.
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "microvm-init: {}", format_args!($($words)*));
    }};
}

mod agent;
mod archive;
mod console;
mod container;
mod modules;
mod network;
mod partitions;
mod port;
mod programs;
mod rootfs;
mod session;
mod shares;
mod vsock;

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;

use microvm::arch::x86_64::layout::MARK_PORT;
use microvm::guest::GuestSpec;
use microvm::guest::status::{NOT_STARTED, of_error};
use microvm::guest::wire::{Failure, Kind, PORT, write_json};
use microvm::metrics::Phase;
use rustix::mount::{MountFlags, mount};
use rustix::process::getpid;
use rustix::system::{RebootCommand, reboot};

use port::Port;

/// What failed, in words.
struct Failed(String);

/// Says of which part an error is.
fn failed(what: &str) -> impl Fn(io::Error) -> Failed {
    move |e| Failed(format!("{what}: {e}"))
}

fn main() {
    let marks = Port::open(MARK_PORT);
    let mark = |ended: Phase| {
        if let (Some(port), Some(byte)) = (&marks, ended.mark()) {
            port.write(byte);
        }
    };
    mark(Phase::UserSpace);
    if !getpid().is_init() {
        eprintln!("microvm-init: this is process 1 of a guest; on a host there is nothing for it to do");
        std::process::exit(2);
    }
    mount_all();
    if let Some(result) = modules::load_all() {
        console::reopen();
        result.unwrap_or_else(|e| say!("{e}"));
    }
    // A container need not have the file that says which.
    let status_port = status_port();
    let program = prepare();
    let is_container = !matches!(program, Ok(Program::Words(_)));
    mark(Phase::InitReady);
    let status = match program.and_then(|program| run(program, &mark)) {
        Ok(status) => status,
        Err(Failed(words)) => {
            say!("{words}");
            tell_host(words);
            NOT_STARTED
        }
    };
    mark(Phase::WorkloadEnd);
    console::drain();
    rustix::fs::sync();
    // Ends the VM.
    status_port.iter().for_each(|port| {
        if is_container { port.write16(status.into()) } else { port.write(status.min(127)) }
    });
    end();
}

/// Mounts the kernel's file systems. The program may do without one that fails.
fn mount_all() {
    let nothing = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let mounts = [
        ("proc", "/proc", nothing),
        ("sysfs", "/sys", nothing),
        ("devtmpfs", "/dev", MountFlags::NOSUID),
        ("tmpfs", "/tmp", MountFlags::NOSUID | MountFlags::NODEV),
    ];
    for (kind, target, flags) in mounts {
        let _ = std::fs::create_dir(target);
        // Busy: the kernel has mounted it already.
        if let Err(e) = mount(kind, target, kind, flags, None).or_else(unless_busy) {
            say!("{target} cannot be mounted: {e}");
        }
    }
}

fn unless_busy(error: rustix::io::Errno) -> rustix::io::Result<()> {
    if error == rustix::io::Errno::BUSY { Ok(()) } else { Err(error) }
}

/// What is run.
enum Program {
    /// A container's, which is there.
    Container(Box<GuestSpec>),
    /// The words of the kernel's command line, in the initramfs.
    Words(Vec<OsString>),
}

/// Makes the container, where the host wants one.
fn prepare() -> Result<Program, Failed> {
    match container::spec()? {
        Some(spec) => container::enter(&spec).map(|()| Program::Container(Box::new(spec))),
        None => Ok(Program::Words(std::env::args_os().skip(1).collect())),
    }
}

/// Runs the program until it has ended itself, and returns its status.
fn run(program: Program, mark: &dyn Fn(Phase)) -> Result<u8, Failed> {
    thread::Builder::new().name("reaper".into()).spawn(|| programs::reap()).map_err(failed("the reaper"))?;
    match program {
        Program::Container(spec) if spec.agent => {
            let (streams, requests) = vsock::connect(PORT)
                .and_then(|streams| Ok((streams, vsock::connect(PORT)?)))
                .map_err(failed("the host cannot be reached (virtio-vsock)"))?;
            agent::start(requests).map_err(failed("the host's requests cannot be taken"))?;
            mark(Phase::WorkloadStart);
            Ok(session::run_main(&spec.process, streams))
        }
        Program::Container(spec) => {
            mark(Phase::WorkloadStart);
            let name = spec.process.args.first().map_or("no program".into(), String::clone);
            let streams = || [Stdio::inherit(), Stdio::inherit(), Stdio::inherit()];
            Ok(run_here(&name, || container::start(&spec.process, streams())))
        }
        Program::Words(words) => {
            mark(Phase::WorkloadStart);
            let name = words.first().map_or("no program".into(), |word| word.display().to_string());
            Ok(run_here(&name, || start(&words)))
        }
    }
}

/// A host that waits for the program's streams gets the reason in their place.
fn tell_host(message: String) {
    if container::wants_agent()
        && let Ok(mut stream) = vsock::connect(PORT)
        && write_json(&mut stream, Kind::Failed, &Failure { status: NOT_STARTED, message }).is_ok()
    {
        // It closes its end when it has read that.
        let _ = stream.read(&mut [0]);
    }
}

/// Runs a program on the console.
fn run_here(name: &str, start: impl FnOnce() -> io::Result<Child>) -> u8 {
    let mut code = [NOT_STARTED];
    match programs::start(start).and_then(|(_, mut status)| status.read_exact(&mut code)) {
        Ok(()) => code[0],
        Err(e) => {
            say!("{name} cannot be run: {e}");
            of_error(&e)
        }
    }
}

fn start(words: &[OsString]) -> io::Result<Child> {
    let (program, arguments) = words.split_first().ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "give one behind ` -- ` on the kernel's command line")
    })?;
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    // A session of its own, so that the console can become its terminal.
    // SAFETY: setsid is async-signal-safe and touches no memory of the parent's.
    unsafe { command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from)) };
    command.spawn()
}

/// Where the host takes the program's status, if the command line names a port for it.
fn status_port() -> Option<Port> {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let word = line.split_whitespace().find_map(|w| w.strip_prefix("microvm.exit_code_port="))?;
    let number = match word.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    };
    Port::open(number?)
}

fn end() -> ! {
    rustix::fs::sync();
    if let Err(e) = reboot(RebootCommand::PowerOff) {
        say!("the machine cannot be switched off: {e}");
    }
    // Process 1 must not end: the kernel would panic.
    loop {
        std::thread::park();
    }
}
