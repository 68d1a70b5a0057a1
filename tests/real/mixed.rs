//! All six devices of one guest with four vCPUs at once, each checked by what comes back. For `MICROVM_TEST_SECONDS`,
//! 20 by default. Needs root, for its network.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::common::{Host, own_stderr, stdout};
use super::net::{Server, add_tap, in_own_network};
use super::{assert_clean, boot, ext4, fact, status, try_read_until};

/// What the host's web server has, small enough for many rounds.
const TRANSFER_MIB: usize = 2;
/// The ports of `vsock echo` in the guest, and of the host's own echo.
const GUEST_ECHO: u32 = 5;
const HOST_ECHO: u32 = 9000;
/// Far longer than a balloon takes in the slowest host.
const LONG: Duration = Duration::from_secs(120);
/// What Linux says once where a vCPU had no processor for a while, as in an emulated host: no device's doing.
const SLOW_HOST: &str = "hrtimer: interrupt took";
/// What the allocator may hold on to, or the threads of a queue touch late.
const GROWTH_KIB: u64 = 512;

fn seconds() -> u64 {
    std::env::var("MICROVM_TEST_SECONDS").ok().map_or(20, |text| text.parse().unwrap())
}

/// What the host's side knows while the load lasts.
struct Load {
    host: Host,
    vm: u32,
    server: Server,
    is_over: AtomicBool,
    echoes: AtomicU64,
}

impl Load {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.host.dir.path().join(name)
    }

    /// The guest fetches the file and sends it back, again and again.
    fn serve_web(&self) {
        while !self.is_over() {
            self.server.serve();
        }
    }

    /// Echoes what the guest's programs send.
    fn serve_echo(&self, listener: &UnixListener) {
        for stream in listener.incoming().take_while(|_| !self.is_over()) {
            let (mut stream, mut bytes) = (stream.unwrap(), Vec::new());
            stream.read_to_end(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
        }
    }

    /// Has the guest echo, a little and a lot.
    fn ask_echo(&self) {
        while !self.is_over() {
            let round = self.echoes.fetch_add(1, Ordering::SeqCst);
            let sent: Vec<u8> =
                (0..[1, 4096, 300_000][round as usize % 3]).map(|i| (i ^ round) as u8).collect();
            let stream = UnixStream::connect(self.path("vsock")).unwrap();
            stream.set_read_timeout(Some(LONG)).unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            writeln!(&stream, "CONNECT {GUEST_ECHO}").unwrap();
            let mut answer = String::new();
            reader.read_line(&mut answer).unwrap();
            assert!(answer.starts_with("OK "), "round {round}: {answer:?}");
            let mut back = Vec::new();
            thread::scope(|scope| {
                scope.spawn(|| {
                    (&stream).write_all(&sent).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                });
                reader.read_to_end(&mut back).unwrap();
            });
            assert!(back == sent, "round {round}: other bytes came back");
        }
    }

    /// The balloon follows its target, which goes up and down. Says how often.
    fn move_balloon(&self) -> u64 {
        let mut rounds = 0;
        for target in ["96M", "16M", "128M", "0"].into_iter().cycle() {
            if self.is_over() {
                break;
            }
            self.balloon(&[&format!("target={target}")]);
            let begin = Instant::now();
            while self.balloon(&[])["actual"] != target {
                assert!(begin.elapsed() < LONG, "{target}: {}", self.balloon(&[]));
                thread::sleep(Duration::from_millis(20));
            }
            rounds += 1;
        }
        rounds
    }

    /// What the VMM takes, from when its devices have been at work for a while.
    fn watch_memory(&self) -> Vec<u64> {
        let mut samples = Vec::new();
        let (every, mut next) = (Duration::from_secs(1), Instant::now());
        while !self.is_over() {
            if Instant::now() >= next {
                samples.push(self.own_memory());
                next += every;
            }
            thread::sleep(Duration::from_millis(20));
        }
        samples
    }

    /// `microvm ctl mixed device balloon CHANGES`
    fn balloon(&self, changes: &[&str]) -> Value {
        let args = [&["ctl", "mixed", "--format", "json", "device", "balloon"], changes].concat();
        let output = self.host.microvm(args).env("XDG_RUNTIME_DIR", self.host.dir.path()).output().unwrap();
        status(&output, 0);
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["state"].clone()
    }

    /// KiB of the VMM's in the host's memory but for the guest's, which is a memory file.
    fn own_memory(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.vm)).unwrap();
        let value = |name| {
            let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
        };
        value("RssAnon:") + value("RssFile:")
    }
}

/// The host's kernel log from here on; `None` where we may not read it.
fn kernel_log() -> Option<File> {
    let mut log = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").ok()?;
    log.seek(SeekFrom::End(0)).ok()?;
    Some(log)
}

/// Nothing in the host's log about what we use is a warning or worse. A record: `PRIORITY,…;TEXT`.
fn assert_quiet(log: Option<File>) {
    let mut record = [0; 8192];
    let Some(mut log) = log else {
        return eprintln!("the host's kernel log is not checked: it cannot be read");
    };
    while let Ok(len @ 1..) = log.read(&mut record) {
        let text = String::from_utf8_lossy(&record[..len]).into_owned();
        let level = text.split(',').next().and_then(|p| p.parse::<u32>().ok()).unwrap_or(0) & 7;
        let ours = ["kvm", "microvm", "tap0", "BUG", "lockup", "stall", "hung", "blocked for"];
        assert!(level > 4 || !ours.iter().any(|word| text.contains(word)), "the host's log: {text}");
    }
}

/// The lines that the guest numbered and printed on hvc0: all of them, and in order.
#[track_caller]
fn assert_printed(file: &Path, count: u64) {
    let text = fs::read_to_string(file).unwrap();
    let numbers = text.lines().filter_map(|line| line.trim().strip_prefix("console line "));
    let numbers: Vec<u64> = numbers.map(|n| n.parse().unwrap()).collect();
    assert!(numbers.iter().copied().eq(0..count), "{} lines of {count}", numbers.len());
}

/// What the VMM takes in the first half of the time is what it takes to the end.
#[track_caller]
fn assert_no_growth(samples: &[u64]) {
    let (early, late) = samples.split_at(samples.len().div_ceil(2));
    let (early, late) = (early.iter().max().unwrap(), late.iter().max().unwrap_or(&0));
    assert!(*late <= early + GROWTH_KIB, "the VMM grows: {samples:?} KiB");
}

fn start(host: &Host, kernel: (&str, &str), disk: &Path) -> Child {
    let path = |name: &str| host.dir.path().join(name).display().to_string();
    let limit = format!("{}s", seconds() + 400);
    let words = format!("mixed {} 172.30.0.2 172.30.0.1", seconds());
    let mut command =
        boot(kernel.0, kernel.1, &words, &["--timeout", &limit, "--cpus", "4", "--name", "mixed"]);
    command.args(["--memory", "512M,backing=memfd", "--net", "tap=tap0"]).arg("--disk").arg(disk);
    command.args(["--vsock", &format!("cid=3,socket={}", path("vsock"))]);
    command.args(["--console", &format!("file={}", path("hvc0")), "--metrics", &path("metrics.json")]);
    command.args(["--balloon", "0,deflate-on-oom,free-page-reporting,stats=1"]);
    command.env("XDG_RUNTIME_DIR", host.dir.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// What the guest prints up to `text`; where the VM ends before, why.
#[track_caller]
fn reach(child: &mut Child, text: &str) -> String {
    try_read_until(child, text).unwrap_or_else(|seen| {
        let mut stderr = String::new();
        child.stderr.as_mut().unwrap().read_to_string(&mut stderr).unwrap();
        panic!("{} before {text:?}: {stderr}{seen}", child.wait().unwrap())
    })
}

/// Ends the threads that serve the guest, also where this one panics.
struct Over<'a>(&'a Load);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::SeqCst);
        self.0.server.give_up();
        let _ = UnixStream::connect(self.0.path(&format!("vsock_{HOST_ECHO}")));
    }
}

fn mixed(name: &str, file: &str) {
    in_own_network(|| {
        add_tap("tap0", "172.30.0.1");
        let (host, server) = (Host::new(), Server::new(TRANSFER_MIB));
        let disk = ext4(&host);
        let sum = server.sum(&host);
        let listener = UnixListener::bind(host.dir.path().join(format!("vsock_{HOST_ECHO}"))).unwrap();
        let mut child = start(&host, (name, file), &disk);
        let load = Load { host, vm: child.id(), server, is_over: false.into(), echoes: 0.into() };
        thread::scope(|scope| {
            let over = Over(&load);
            scope.spawn(|| load.serve_web());
            scope.spawn(|| load.serve_echo(&listener));
            let mut text = reach(&mut child, "echoing");
            // Before that KVM notes model-specific registers that a kernel tries.
            let log = kernel_log();
            let balloon = scope.spawn(|| load.move_balloon());
            let memory = scope.spawn(|| load.watch_memory());
            let echoes = scope.spawn(|| load.ask_echo());
            text.push_str(&reach(&mut child, "load=over"));
            drop(over);
            let (rounds, own) = (balloon.join().unwrap(), memory.join().unwrap());
            echoes.join().unwrap();
            child.stdin.take().unwrap().write_all(b"end\n").unwrap();
            let output = child.wait_with_output().unwrap();
            text.push_str(&stdout(&output));
            let (least, most) = (own.iter().min(), own.iter().max());
            println!("{text}echoes={} balloon={rounds}", load.echoes.load(Ordering::SeqCst));
            println!("the VMM has {least:?} to {most:?} KiB of its own, in {} samples", own.len());
            status(&output, 0);
            assert_eq!(own_stderr(&output), "");
            assert_eq!(fact(&text, "transferred"), sum, "{text}");
            for work in ["disk", "net", "vsock", "rng"] {
                assert!(fact(&text, work).parse::<u64>().unwrap() > 0, "{work}: {text}");
            }
            assert!(rounds > 0 && load.echoes.load(Ordering::SeqCst) > 0);
            let complaints = text.lines().filter(|l| l.contains("kernel: ") && !l.contains(SLOW_HOST));
            let complaints: Vec<_> = complaints.collect();
            assert!(complaints.is_empty(), "the guest's log: {complaints:#?}");
            assert_printed(&load.path("hvc0"), fact(&text, "console").parse().unwrap());
            assert_no_growth(&own);
            assert_clean(&load.host, &disk, fact(&text, "sum"));
            assert_quiet(log);
        });
    });
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn mixed_load_stock_6_1() {
    mixed("stock-6.1", "bzImage");
}
