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
/// Of the floor's network, whose cards are a pair: `FLOOR_CARD` and, in the namespace, `FLOOR_PEER`.
pub const NAMESPACE: &str = "bench";
const FLOOR_CARD: &str = "floor0";
const FLOOR_PEER: &str = "floor1";
pub const VSOCK_CID: u32 = 42;
/// In memory: no socket can be bound on the file system of the checkout.
pub const VSOCK_SOCKET: &str = "/tmp/bench-vsock";
const VSOCK_PORT: u32 = 5000;
const HOST: &str = "192.168.77.1";
const FLOOR_HOST: &str = "192.168.78.1";
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
    pub fn is_net(self) -> bool {
        matches!(self, Self::Net | Self::NetVhost)
    }
}

#[derive(Clone, Copy)]
pub struct Job {
    pub name: &'static str,
    pub device: Device,
    /// The words for the guest, before the number of operations.
    command: &'static str,
    pub operations: usize,
}

pub const JOBS: [Job; 11] = [
    job("block: 4 KiB random read, depth 1", Device::Block, "read random 4096 1", 5000),
    job("block: 4 KiB random read, depth 32", Device::Block, "read random 4096 32", 20000),
    job("block: 4 KiB random write, depth 1", Device::Block, "write random 4096 1", 5000),
    job("block: 4 KiB random write, depth 32", Device::Block, "write random 4096 32", 20000),
    job("block: 1 MiB sequential read", Device::Block, "read sequential 1048576 1", 500),
    job("block: 1 MiB sequential write", Device::Block, "write sequential 1048576 1", 500),
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
    pub fn setup(&self, vmm: Vmm) -> Option<String> {
        let words = match vmm {
            Vmm::Floor => format!("net {FLOOR_PEER} 192.168.78.2/24"),
            Vmm::Microvm | Vmm::Qemu => "net eth0 192.168.77.2/24".into(),
        };
        self.device.is_net().then_some(words)
    }

    pub fn words(&self, vmm: Vmm) -> String {
        let Self { command, operations, .. } = self;
        match (self.device, vmm) {
            (Device::Block, Vmm::Floor) => format!("blk {} {command} {operations}", &DISK["/dev/".len()..]),
            (Device::Block, _) => format!("blk vda {command} {operations}"),
            (Device::Net | Device::NetVhost, _) => {
                format!("{command} {}:{TCP_PORT} {operations}", address(vmm))
            }
            (Device::Vsock, Vmm::Floor) => format!("unix-echo {VSOCK_SOCKET}_{VSOCK_PORT} {operations}"),
            (Device::Vsock, _) => format!("{command} {VSOCK_PORT} {operations}"),
        }
    }

    /// Starts the host's side of one run.
    pub fn start_peer(&self, vmm: Vmm) -> Result<Option<JoinHandle<Result<()>>>> {
        let operations = self.operations;
        let peer = match (self.device, self.command) {
            (Device::Block, _) => return Ok(None),
            (Device::Net | Device::NetVhost, command) => {
                let listener = TcpListener::bind((address(vmm), TCP_PORT))?;
                let send = command == "tcp-receive";
                thread::spawn(move || {
                    let (mut stream, _) = listener.accept()?;
                    if send { give(&mut stream, operations) } else { take(&mut stream, operations) }
                })
            }
            (Device::Vsock, _) if vmm != Vmm::Qemu => {
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

/// Of the host's side.
fn address(vmm: Vmm) -> &'static str {
    if vmm == Vmm::Floor { FLOOR_HOST } else { HOST }
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
    load("brd.ko", &["rd_nr=1", &format!("rd_size={}", DISK_SIZE >> 10)])?;
    load("veth.ko", &[])?;
    let mut disk = fs::File::options().write(true).open(DISK)?;
    let mut block = [0; 4096];
    for number in 0..(DISK_SIZE / block.len()) as u64 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        disk.write_all(&block)?;
    }
    disk.sync_all()?;
    run("ip", &["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"])?;
    run("ip", &["addr", "add", &format!("{HOST}/24"), "dev", TAP])?;
    run("ip", &["link", "set", TAP, "up"])?;
    run("ip", &["netns", "add", NAMESPACE])?;
    let pair = ["link", "add", FLOOR_CARD, "type", "veth", "peer", "name", FLOOR_PEER, "netns", NAMESPACE];
    run("ip", &pair)?;
    run("ip", &["addr", "add", &format!("{FLOOR_HOST}/24"), "dev", FLOOR_CARD])?;
    run("ip", &["link", "set", FLOOR_CARD, "up"])
}

fn load(module: &str, parameters: &[&str]) -> Result<()> {
    let modules = env::var("MICROVM_BENCH_MODULES")?;
    let find = Command::new("find").args([&modules, "-name", module]).output()?;
    let path = String::from_utf8(find.stdout)?;
    run("insmod", &[&[path.trim()], parameters].concat())
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program).args(args).status()?;
    if status.success() { Ok(()) } else { Err(format!("{program} {args:?} failed: {status}").into()) }
}
