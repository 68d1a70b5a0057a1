#![allow(dead_code, reason = "each bench uses its part")]
//! What benches share: the way into the counting host, and rows of a table measured there.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs of each sample; the first is warm-up.
const RUNS: usize = 6;
const INSIDE: &str = "MICROVM_BENCH_INSIDE";
const WORK: &str = "MICROVM_BENCH_WORK";

/// What is measured: a name and a command.
pub struct Row {
    pub name: String,
    pub args: Vec<String>,
    /// It has a `--timeline`, which tells of VM exits.
    pub is_vm: bool,
}

/// Runs `outside`, which fills the folder it is given, and then this program again in `scripts/kvm-host --icount` for
/// `inside`, with a copy of that folder in memory, so that no row pays for the file system that the host's files come
/// through.
pub fn in_counting_host(
    outside: impl FnOnce(&Path) -> Result<()>,
    inside: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    // Cargo runs this for `cargo test --benches`, too, where nothing is to be measured.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    if let Some(name) = std::env::var_os(INSIDE) {
        let work = &inside_folder(&name);
        fs::create_dir_all(work)?;
        for entry in fs::read_dir(std::env::var(WORK)?)? {
            let entry = entry?;
            fs::copy(entry.path(), work.join(entry.file_name()))?;
        }
        for program in [env!("CARGO_BIN_EXE_microvm"), env!("CARGO_BIN_EXE_microvm-init")] {
            let program = Path::new(program);
            fs::copy(program, work.join(program.file_name().unwrap()))?;
        }
        return inside(work);
    }
    let name = env!("CARGO_CRATE_NAME");
    let work = root().join("target/bench").join(name);
    // What an earlier bench put there would be copied, too.
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    outside(&work)?;
    let status = Command::new(root().join("scripts/kvm-host"))
        .args(["--icount", "--memory", "4G", "--"])
        .arg(std::env::current_exe()?)
        .arg("--bench")
        .env(INSIDE, name)
        .env(WORK, &work)
        // Its own images and containers.
        .env("MICROVM_DATA", inside_folder(name.as_ref()).join("data"))
        .env("XDG_RUNTIME_DIR", inside_folder(name.as_ref()))
        .status()?;
    if status.success() { Ok(()) } else { Err(format!("the bench failed: {status}").into()) }
}

/// In the counting host.
fn inside_folder(name: &OsStr) -> PathBuf {
    Path::new("/tmp").join(name)
}

/// Puts copies in memory over programs with their libraries, and over other files, where they are there: each opening of
/// one through the file system of the counting host's outside costs milliseconds, whatever is in its cache.
pub fn in_memory(programs: &[&str], files: &[&str]) -> Result<()> {
    let mut all: Vec<PathBuf> = files.iter().map(PathBuf::from).collect();
    for program in programs {
        all.push(program.into());
        let libraries = Command::new("ldd").arg(program).output()?;
        let text = String::from_utf8(libraries.stdout)?;
        all.extend(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    }
    let folder = Path::new("/tmp/in-memory");
    fs::create_dir_all(folder)?;
    all.retain(|path| path.is_file());
    all.iter_mut().try_for_each(|path| path.canonicalize().map(|real| *path = real))?;
    all.sort();
    all.dedup();
    for (number, path) in all.iter().enumerate() {
        let copy = folder.join(number.to_string());
        fs::copy(path, &copy)?;
        run("mount", &["--bind", copy.to_str().ok_or("no name")?, path.to_str().ok_or("no name")?])?;
    }
    Ok(())
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where the project's scripts keep what they fetch and build (scripts/lib.sh).
pub fn cache() -> PathBuf {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    var("MICROVM_CACHE").unwrap_or_else(|| {
        var("XDG_CACHE_HOME").or(var("HOME").map(|h| h.join(".cache"))).unwrap_or_default().join("microvm")
    })
}

/// Runs a program of this project's scripts, or another one.
pub fn run(program: impl AsRef<Path>, args: &[&str]) -> Result<()> {
    let program = program.as_ref();
    let status = Command::new(program).args(args).status()?;
    if status.success() { Ok(()) } else { Err(format!("{} failed: {status}", program.display()).into()) }
}

/// Measures the rows, in two series: with grace periods of the host's RCU expedited, and as they are by default.
pub fn table(rows: &[Row]) -> Result<()> {
    println!(
        "{:<12} {:<44} {:>10} {:>10} {:>10} {:>9}",
        "series", "from exec to exit", "median M", "min M", "max M", "VM exits"
    );
    for (series, expedited) in [("expedited", "1"), ("default", "0")] {
        fs::write("/sys/kernel/rcu_expedited", expedited)?;
        for row in rows {
            let mut samples = (0..RUNS).map(|_| measure(&row.args)).collect::<Result<Vec<_>>>()?;
            samples.remove(0);
            samples.sort();
            let exits = if row.is_vm { exits(&row.args)? } else { String::new() };
            let millions = |d: Duration| d.as_nanos() as f64 / 1e6;
            println!(
                "{series:<12} {:<44} {:>10.2} {:>10.2} {:>10.2} {exits:>9}",
                row.name,
                millions(samples[samples.len() / 2]),
                millions(samples[0]),
                millions(samples[samples.len() - 1])
            );
        }
    }
    Ok(())
}

fn measure(args: &[String]) -> Result<Duration> {
    let begin = Instant::now();
    let mut command = Command::new(&args[0]);
    let status =
        command.args(&args[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    let took = begin.elapsed();
    if status.success() { Ok(took) } else { Err(format!("a sample failed ({status}): {args:?}").into()) }
}

/// VM exits of one more run. The timeline costs time, so no measured run has it.
fn exits(args: &[String]) -> Result<String> {
    // Behind the subcommand, as an image's own arguments may follow.
    let output = Command::new(&args[0])
        .arg(&args[1])
        .arg("--timeline=json")
        .args(&args[2..])
        .stdin(Stdio::null())
        .output()?;
    // The emulated host's kernel is old: the sandbox has a warning before it.
    let text = String::from_utf8(output.stderr)?;
    let json: serde_json::Value = serde_json::from_str(text.lines().last().ok_or("no timeline")?)?;
    Ok(json["exits"]["total"].to_string())
}
