//! The memory balloon with Debian's kernel: what the guest gives up is not the VMM's any more.

use std::fs;
use std::io::Write;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::common::Host;
use super::{boot, read_until, status};

const MIB: u64 = 1 << 20;
/// Far longer than a guest takes for anything here, in the slowest host.
const LONG: Duration = Duration::from_secs(60);

/// A guest that takes memory and gives it back as it is told (`check memory`).
struct Guest {
    child: Child,
    host: Host,
}

impl Guest {
    fn start(memory: &str, balloon: &str) -> Self {
        let host = Host::new();
        let mut command = boot("stock-6.1", "bzImage", "memory", &["--memory", memory, "--balloon", balloon]);
        command.args(["--name", "guest"]).env("XDG_RUNTIME_DIR", host.dir.path());
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut guest = Self { child, host };
        read_until(&mut guest.child, "ttyS0_irq=");
        guest
    }

    /// Types a line, and waits for what the guest says to it.
    #[track_caller]
    fn tell(&mut self, line: &str, answer: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
        read_until(&mut self.child, answer);
    }

    /// `microvm ctl guest device balloon CHANGES`
    #[track_caller]
    fn balloon(&self, changes: &[&str]) -> Value {
        let args = [&["ctl", "guest", "--format", "json", "device", "balloon"], changes].concat();
        let output = self.host.microvm(args).env("XDG_RUNTIME_DIR", self.host.dir.path()).output().unwrap();
        status(&output, 0);
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["state"].clone()
    }

    /// Bytes of the VMM's that are in the host's memory.
    fn resident(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Sets the target and waits until the balloon is that large.
    #[track_caller]
    fn inflate(&self, target: &str) {
        self.balloon(&[&format!("target={target}")]);
        self.eventually("the balloon has its size", |g| g.balloon(&[])["actual"] == target);
    }

    /// Waits for what the guest does in its own time.
    #[track_caller]
    fn eventually(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !is_so(self) {
            let (balloon, resident) = (self.balloon(&[]), self.resident() / MIB);
            assert!(begin.elapsed() < LONG, "never came true: {what}; {balloon}, {resident} MiB resident");
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[track_caller]
    fn end(mut self) {
        self.tell("end", "");
        status(&self.child.wait_with_output().unwrap(), 0);
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn balloon_gives_memory_to_the_host_and_back() {
    for memory in ["512M", "512M,backing=memfd"] {
        let mut guest = Guest::start(memory, "0,stats=1");
        // Written to and freed: the host does not know that the guest has no use for it.
        guest.tell("fill 160", "filled=0");
        guest.tell("free", "freed=0");
        let full = guest.resident();
        assert!(full > 160 * MIB, "{memory}: {full}");
        // More than the guest has beside that.
        guest.inflate("384M");
        guest.eventually("the host has memory back", |g| g.resident() + 100 * MIB < full);
        let small = guest.resident();
        guest.inflate("0");
        guest.tell("fill 160", "filled=0");
        assert!(guest.resident() > small + 100 * MIB, "{memory}: what did the guest write to?");
        guest.eventually("the guest tells of its memory", |g| g.balloon(&[])["free_bytes"].is_u64());
        let stats = guest.balloon(&[]);
        let bytes = |name: &str| stats[name].as_u64().unwrap();
        assert!((400 * MIB..512 * MIB).contains(&bytes("total_bytes")), "{stats}");
        assert!(bytes("available_bytes") < bytes("total_bytes"), "{stats}");
        guest.end();
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn balloon_reports_free_pages() {
    let mut guest = Guest::start("512M", "0,free-page-reporting");
    guest.tell("fill 160", "filled=0");
    let full = guest.resident();
    assert!(full > 160 * MIB, "{full}");
    guest.tell("free", "freed=0");
    // Nobody asks for it.
    guest.eventually("the host has memory back", |g| g.resident() + 100 * MIB < full);
    guest.end();
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn balloon_deflates_before_a_program_is_killed() {
    for (balloon, allocated) in [("0,deflate-on-oom", true), ("0", false)] {
        let mut guest = Guest::start("256M", balloon);
        guest.inflate("128M");
        // More than is left.
        // Refused (1), because the guest knows what it has given up, or killed (137).
        let answer = if allocated { "allocated=0" } else { "allocated=1" };
        guest.tell("allocate 120", answer);
        let deflated = guest.balloon(&[])["actual"] != "128M";
        assert_eq!(deflated, allocated, "{balloon}: {}", guest.balloon(&[]));
        guest.end();
    }
}
