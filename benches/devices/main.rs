//! What an operation of a device costs, in instructions and VM exits, next to QEMU's microvm machine.
//!
//! `cargo bench --bench devices` builds what it needs and measures in the emulated host in counting mode, where a clock
//! counts executed instructions (docs/benchmarks.md). Both programs boot the same kernel and initramfs and the same
//! program in it does the same work on the same disk, tap and socket; the guest checks what it reads. The floor is that program on
//! the host itself: on the disk, between two network namespaces, over a Unix socket. `--quick` does a tenth of the
//! operations; `--events` tells what happens in microvm.

mod events;
mod job;
mod vmm;
mod vsock;

use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;
use std::{env, fs, thread};

use job::{JOBS, Job};
use vmm::{Guest, Vmm};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const WORK: &str = "MICROVM_BENCH_WORK";
/// Runs of each job; the first is warm-up, and the median of the others is told.
const RUNS: usize = 4;
/// A run tells of itself by a line, and takes seconds.
const SILENCE: Duration = Duration::from_secs(300);

fn main() -> Result<()> {
    match env::var_os(WORK) {
        Some(work) => inside(Path::new(&work)),
        None => outside(),
    }
}

fn outside() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let work = root.join("target/bench-devices");
    fs::create_dir_all(&work)?;
    let run = |program: &str, args: &[&str]| -> Result<()> {
        let status = Command::new(root.join(program)).args(args).status()?;
        if status.success() { Ok(()) } else { Err(format!("{program} failed: {status}").into()) }
    };
    run("guest-kernels/build", &["tuned"])?;
    run("guest-kernels/fetch-stock", &["emulated-host"])?;
    fs::copy(cache().join("kernels/tuned/vmlinux"), work.join("vmlinux"))?;
    fs::copy(env!("CARGO_BIN_EXE_microvm"), work.join("microvm"))?;
    let program = env::current_exe()?;
    // Beside this program: TARGET/PROFILE/deps/devices-…, TARGET/PROFILE/examples/bench_guest.
    let guest = program.ancestors().nth(2).ok_or("no folder")?.join("examples/bench_guest");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--quiet", "--example", "bench_guest"])
        .current_dir(root)
        .status()?;
    if !status.success() {
        return Err("the guest's program cannot be built".into());
    }
    let file = format!("{}:/bin/bench", guest.display());
    run("guest-kernels/initramfs", &["--output", text(&work.join("initrd"))?, "--file", &file])?;
    let child = Command::new(root.join("scripts/kvm-host"))
        .args(["--icount", "--memory", "3G", "--"])
        .arg(program)
        .args(env::args().skip(1))
        .env(WORK, &work)
        .env(vmm::PROGRAM, guest)
        .env("MICROVM_BENCH_MODULES", cache().join("kernels/emulated-host/lib/modules"))
        .stderr(Stdio::piped())
        .spawn()?;
    let status = wait(child)?;
    if status.success() { Ok(()) } else { Err(format!("the bench failed: {status}").into()) }
}

/// Passes on what the emulated host says of itself, and ends it when it falls silent: its processor has stood still in a
/// guest, with the host's own clock interrupts held back, so that nothing inside could notice.
fn wait(mut host: Child) -> Result<ExitStatus> {
    let errors = host.stderr.take().ok_or("no standard error")?;
    let (said, heard) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(errors).lines().map_while(io::Result::ok) {
            eprintln!("{line}");
            let _ = said.send(());
        }
    });
    loop {
        match heard.recv_timeout(SILENCE) {
            Ok(()) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(host.wait()?),
            Err(RecvTimeoutError::Timeout) => {
                host.kill()?;
                host.wait()?;
                return Err("the emulated host stands still (docs/benchmarks.md): run this again".into());
            }
        }
    }
}

fn cache() -> PathBuf {
    let var = |name| env::var_os(name).map(PathBuf::from);
    var("MICROVM_CACHE").unwrap_or_else(|| {
        var("XDG_CACHE_HOME").or(var("HOME").map(|h| h.join(".cache"))).unwrap_or_default().join("microvm")
    })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| "a path that is no UTF-8".into())
}

fn inside(work: &Path) -> Result<()> {
    fs::write("/sys/kernel/rcu_expedited", "1")?;
    job::prepare_host()?;
    let wanted: Vec<_> = env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    println!(
        "{:<36} {:>9} {:>9} {:>9} {:>6}   {:>9} {:>9} {:>6}",
        "per operation", "floor", "microvm", "QEMU", "ratio", "microvm", "QEMU", "ratio"
    );
    println!("{:<36} {:^36}   {:^26}", "", "thousand instructions", "VM exits");
    for job in JOBS.iter().filter(|j| wanted.is_empty() || wanted.iter().any(|w| j.name.contains(&**w))) {
        let mut job = *job;
        job.operations /= if is_quick() { 10 } else { 1 };
        let job = &job;
        let floor = measure(job, Vmm::Floor, work)?;
        let ours = measure(job, Vmm::Microvm, work)?;
        let theirs = measure(job, Vmm::Qemu, work)?;
        println!(
            "{:<36} {:>9.2} {:>9.2} {:>9.2} {:>6.2}   {:>9.3} {:>9.3} {:>6.2}",
            job.name,
            floor.instructions / 1e3,
            ours.instructions / 1e3,
            theirs.instructions / 1e3,
            ours.instructions / theirs.instructions,
            ours.exits,
            theirs.exits,
            ours.exits / theirs.exits
        );
    }
    Ok(())
}

/// What one operation costs.
#[derive(Clone, Copy)]
struct Cost {
    instructions: f64,
    exits: f64,
}

/// Fewer operations, one run after the warm-up: for finding out, not for telling.
fn is_quick() -> bool {
    env::args().any(|a| a == "--quick")
}

fn measure(job: &Job, vmm: Vmm, work: &Path) -> Result<Cost> {
    let mut guest = Guest::boot(vmm, work, job.device)?;
    if let Some(setup) = job.setup(vmm) {
        guest.run(&setup)?;
    }
    let mut costs = Vec::new();
    let runs = if is_quick() { 2 } else { RUNS };
    for run in 1..=runs {
        // It takes minutes: who reads standard error sees that it goes on, as `wait` does.
        eprintln!("{}: {vmm:?}, run {run} of {runs}", job.name);
        let peer = job.start_peer(vmm)?;
        let (time, exits) = guest.run(&job.words(vmm))?;
        peer.map_or(Ok(()), |p| p.join().map_err(|_| "the host's side panicked")?)?;
        let per = |total: f64| total / job.operations as f64;
        costs.push(Cost { instructions: per(time.as_nanos() as f64), exits: per(exits as f64) });
    }
    costs.remove(0);
    costs.sort_by(|a, b| a.instructions.total_cmp(&b.instructions));
    if vmm == Vmm::Microvm && env::args().any(|a| a == "--events") {
        let peer = job.start_peer(vmm)?;
        let trace = events::Trace::start()?;
        guest.run(&job.words(vmm))?;
        trace.tell(job.operations)?;
        peer.map_or(Ok(()), |p| p.join().map_err(|_| "the host's side panicked")?)?;
    }
    guest.end()?;
    Ok(costs[costs.len() / 2])
}
