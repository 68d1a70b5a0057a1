//! Starting each program with the same guest, and talking to the guest.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs};

use crate::Result;
use crate::job::{DISK, Device, NAMESPACE, TAP, VSOCK_CID, VSOCK_SOCKET};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    Microvm,
    Qemu,
    /// None: the guest's program on the host itself, beside its peer. What no VMM can do with less.
    Floor,
}

pub struct Guest {
    vmm: Vmm,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// Names the guest's program, for the floor.
pub const PROGRAM: &str = "MICROVM_BENCH_PROGRAM";
/// What it says on standard error.
const LOG: &str = "/tmp/bench-vmm.log";
const WORDS: &str = "quiet -- /bin/bench";

impl Guest {
    /// Boots the guest with one device.
    pub fn boot(vmm: Vmm, work: &Path, device: Device) -> Result<Self> {
        let mut command = match vmm {
            Vmm::Microvm => microvm(work, device),
            Vmm::Qemu => qemu(work, device),
            Vmm::Floor => floor(device)?,
        };
        let log =
            fs::File::create(work.join("last-vmm.log")).or_else(|_| fs::File::create("/tmp/vmm.log"))?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn()?;
        let input = child.stdin.take().ok_or("no input")?;
        let output = BufReader::new(child.stdout.take().ok_or("no output")?);
        let mut guest = Self { vmm, child, input, output };
        guest.wait_for("@started")?;
        Ok(guest)
    }

    /// Has the guest do a job: how long it took, and how many exits.
    pub fn run(&mut self, words: &str) -> Result<(Duration, u64)> {
        self.say(words)?;
        self.wait_for("@ready")?;
        let (before, exits) = (Instant::now(), self.exits()?);
        self.say("go")?;
        self.wait_for("@done")?;
        Ok((before.elapsed(), self.exits()? - exits))
    }

    pub fn end(mut self) -> Result<()> {
        self.say("end")?;
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the VM ended with {status}").into()) }
    }

    fn say(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.input, "{line}")?)
    }

    fn wait_for(&mut self, wanted: &str) -> Result<()> {
        let mut seen = String::new();
        loop {
            let from = seen.len();
            if self.output.read_line(&mut seen)? == 0 {
                let log = fs::read_to_string(LOG)?;
                return Err(format!("the guest ended before {wanted}:\n{seen}{log}").into());
            }
            if seen[from..].trim() == wanted {
                return Ok(());
            }
        }
    }

    /// As KVM counts them, whichever program it is.
    fn exits(&self) -> Result<u64> {
        if self.vmm == Vmm::Floor {
            return Ok(0);
        }
        let own = format!("{}-", self.child.id());
        for entry in fs::read_dir("/sys/kernel/debug/kvm")? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(|n| n.starts_with(&own)) {
                return Ok(fs::read_to_string(entry.path().join("exits"))?.trim().parse()?);
            }
        }
        Err("KVM shows no counters of the VM".into())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Where a measurement failed; else it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A network card's other end is in a network namespace of its own: two TCP stacks, as with a guest.
fn floor(device: Device) -> Result<Command> {
    let program = env::var_os(PROGRAM).ok_or("no program")?;
    if !device.is_net() {
        return Ok(Command::new(program));
    }
    let mut command = Command::new("ip");
    command.args(["netns", "exec", NAMESPACE]).arg(program);
    Ok(command)
}

fn microvm(work: &Path, device: Device) -> Command {
    let mut command = Command::new(work.join("microvm"));
    command.args(["boot", "--memory", "256M", "--append", WORDS]);
    command.arg("--kernel").arg(work.join("vmlinux")).arg("--initrd").arg(work.join("initrd"));
    match device {
        Device::Block => command.args(["--disk", &format!("{DISK},direct")]),
        Device::Net => command.args(["--net", &format!("tap={TAP}")]),
        Device::NetVhost => command.args(["--net", &format!("tap={TAP},vhost=on")]),
        Device::Vsock => command.args(["--vsock", &format!("cid={VSOCK_CID},socket={VSOCK_SOCKET}")]),
    };
    command
}

fn qemu(work: &Path, device: Device) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "microvm,accel=kvm", "-cpu", "host", "-m", "256M", "-smp", "1"]);
    command.args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"]);
    command.arg("-kernel").arg(work.join("vmlinux")).arg("-initrd").arg(work.join("initrd"));
    command.args(["-append", &format!("console=ttyS0 reboot=t panic=-1 8250.nr_uarts=1 {WORDS}")]);
    match device {
        Device::Block => command.args([
            "-drive",
            &format!("id=d,file={DISK},format=raw,if=none,cache=none,aio=io_uring"),
            "-device",
            "virtio-blk-device,drive=d",
        ]),
        Device::Net => command.args(net_of_qemu("off")),
        Device::NetVhost => command.args(net_of_qemu("on")),
        Device::Vsock => command.args(["-device", &format!("vhost-vsock-device,guest-cid={VSOCK_CID}")]),
    };
    command
}

fn net_of_qemu(vhost: &str) -> [String; 4] {
    let netdev = format!("tap,id=n,ifname={TAP},script=no,downscript=no,vhost={vhost}");
    ["-netdev".into(), netdev, "-device".into(), "virtio-net-device,netdev=n".into()]
}
