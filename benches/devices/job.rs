//! The jobs: what the guest is told, and the host's side of it.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::{env, fs};

use crate::Result;
use crate::vmm::Vmm;

/// A disk in the host's memory.
pub const DISK: &str = "/dev/ram0";
const DISK_SIZE: usize = 256 << 20;
pub const TAP: &str = "bench0";
pub const VSOCK_CID: u32 = 42;
/// In memory: no socket can be bound on the file system of the checkout.
pub const VSOCK_SOCKET: &str = "/tmp/bench-vsock";
const VSOCK_PORT: u32 = 5000;
const HOST: &str = "192.168.77.1";
const TCP_PORT: u16 = 5000;
const MIB: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Block,
    Net,
    /// The host's kernel serves its queues.
    NetVhost,
    Vsock,
}

impl Device {
    fn is_net(self) -> bool {
        matches!(self, Self::Net | Self::NetVhost)
    }
}

pub struct Job {
    pub name: &'static str,
    pub device: Device,
    /// The words for the guest, before the number of operations.
    command: &'static str,
    pub operations: usize,
}

pub const JOBS: [Job; 11] = [
    job("block: 4 KiB random read, depth 1", Device::Block, "blk read random 4096 1", 5000),
    job("block: 4 KiB random read, depth 32", Device::Block, "blk read random 4096 32", 20000),
    job("block: 4 KiB random write, depth 1", Device::Block, "blk write random 4096 1", 5000),
    job("block: 4 KiB random write, depth 32", Device::Block, "blk write random 4096 32", 20000),
    job("block: 1 MiB sequential read", Device::Block, "blk read sequential 1048576 1", 500),
    job("block: 1 MiB sequential write", Device::Block, "blk write sequential 1048576 1", 500),
    job("tap: TCP from the guest, per MiB", Device::Net, "tcp-send", 64),
    job("tap: TCP to the guest, per MiB", Device::Net, "tcp-receive", 64),
    job("tap, vhost: TCP from the guest, per MiB", Device::NetVhost, "tcp-send", 64),
    job("tap, vhost: TCP to the guest, per MiB", Device::NetVhost, "tcp-receive", 64),
    job("vsock: echo of 64 bytes", Device::Vsock, "vsock-echo", 5000),
];

const fn job(name: &'static str, device: Device, command: &'static str, operations: usize) -> Job {
    Job { name, device, command, operations }
}

impl Job {
    /// What the guest does first.
    pub fn setup(&self) -> Option<&'static str> {
        self.device.is_net().then_some("net 192.168.77.2/24")
    }

    pub fn words(&self) -> String {
        match self.device {
            Device::Block => format!("{} {}", self.command, self.operations),
            Device::Net | Device::NetVhost => {
                format!("{} {HOST}:{TCP_PORT} {}", self.command, self.operations)
            }
            Device::Vsock => format!("{} {VSOCK_PORT} {}", self.command, self.operations),
        }
    }

    /// Starts the host's side of one run.
    pub fn start_peer(&self, vmm: Vmm) -> Result<Option<JoinHandle<Result<()>>>> {
        let operations = self.operations;
        let peer = match (self.device, self.command) {
            (Device::Block, _) => return Ok(None),
            (Device::Net | Device::NetVhost, command) => {
                let listener = TcpListener::bind((HOST, TCP_PORT))?;
                let send = command == "tcp-receive";
                thread::spawn(move || {
                    let (mut stream, _) = listener.accept()?;
                    if send { give(&mut stream, operations) } else { take(&mut stream, operations) }
                })
            }
            (Device::Vsock, _) if vmm == Vmm::Microvm => {
                let path = PathBuf::from(format!("{VSOCK_SOCKET}_{VSOCK_PORT}"));
                let _ = fs::remove_file(&path);
                let listener = UnixListener::bind(path)?;
                thread::spawn(move || echo(listener.accept()?.0, operations))
            }
            (Device::Vsock, _) => {
                let listener = crate::vsock::listen(VSOCK_PORT)?;
                thread::spawn(move || echo(crate::vsock::accept(&listener)?, operations))
            }
        };
        Ok(Some(peer))
    }
}

fn take(stream: &mut (impl Read + Write), mib: usize) -> Result<()> {
    let mut chunk = vec![0; MIB];
    for _ in 0..mib {
        stream.read_exact(&mut chunk)?;
    }
    Ok(stream.write_all(&[1])?)
}

fn give(stream: &mut (impl Read + Write), mib: usize) -> Result<()> {
    // The guest says when it begins.
    stream.read_exact(&mut [0])?;
    let chunk = vec![0x5a; MIB];
    for _ in 0..mib {
        stream.write_all(&chunk)?;
    }
    Ok(())
}

fn echo(mut stream: impl Read + Write, count: usize) -> Result<()> {
    let mut bytes = [0; 64];
    for _ in 0..count {
        stream.read_exact(&mut bytes)?;
        stream.write_all(&bytes)?;
    }
    Ok(())
}

/// A disk in memory with the guest's pattern, and a tap.
pub fn prepare_host() -> Result<()> {
    let modules = env::var("MICROVM_BENCH_MODULES")?;
    let find = Command::new("find").args([&modules, "-name", "brd.ko"]).output()?;
    let module = String::from_utf8(find.stdout)?;
    run("insmod", &[module.trim(), "rd_nr=1", &format!("rd_size={}", DISK_SIZE >> 10)])?;
    let mut disk = fs::File::options().write(true).open(DISK)?;
    let mut block = [0; 4096];
    for number in 0..(DISK_SIZE / block.len()) as u64 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        disk.write_all(&block)?;
    }
    disk.sync_all()?;
    run("ip", &["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
    run("ip", &["addr", "add", &format!("{HOST}/24"), "dev", TAP])?;
    run("ip", &["link", "set", TAP, "up"])
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program).args(args).status()?;
    if status.success() { Ok(()) } else { Err(format!("{program} {args:?} failed: {status}").into()) }
}
