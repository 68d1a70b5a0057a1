//! The guest's half of `cargo bench --bench devices`, which also runs on the host itself: for the floor. On each line of standard input it sets a job up, says `@ready`,
//! does it at the next line, and says `@done`. Data is checked: a job that reads what it should not ends the program.

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::process::Command;

use io_uring::{IoUring, opcode, types};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    // What is typed before the console is open is lost.
    println!("@started");
    let mut lines = io::stdin().lock().lines();
    while let Some(line) = lines.next().transpose()? {
        let words: Vec<_> = line.split_whitespace().collect();
        let job: Box<dyn FnOnce() -> Result<()>> = match words[..] {
            ["blk", name, access, order, size, depth, count] => {
                let disk = Disk::open(name, access == "write", order == "random", size.parse()?)?;
                let (depth, count) = (depth.parse()?, count.parse()?);
                Box::new(move || disk.run(depth, count))
            }
            ["net", interface, address] => {
                let ip = |words: &str| Command::new("ip").args(words.split(' ')).status();
                ip(&format!("addr add {address} dev {interface}"))?;
                ip(&format!("link set {interface} up"))?;
                Box::new(|| Ok(()))
            }
            ["tcp-send", to, mib] => {
                let (stream, mib) = (TcpStream::connect(to)?, mib.parse()?);
                Box::new(move || send(stream, mib))
            }
            ["tcp-receive", from, mib] => {
                let (stream, mib) = (TcpStream::connect(from)?, mib.parse()?);
                Box::new(move || receive(stream, mib))
            }
            ["vsock-echo", port, count] => {
                let (stream, count) = (connect_vsock(port.parse()?)?, count.parse()?);
                Box::new(move || echo(stream, count))
            }
            ["unix-echo", path, count] => {
                let (stream, count) = (UnixStream::connect(path)?, count.parse()?);
                Box::new(move || echo(stream, count))
            }
            _ => break,
        };
        println!("@ready");
        lines.next().transpose()?;
        job()?;
        println!("@done");
    }
    Ok(())
}

/// The unit that the disk's pattern is made of: each starts with its own number.
const BLOCK: usize = 4096;

struct Disk {
    file: File,
    write: bool,
    random: bool,
    size: usize,
    /// In operations.
    len: u64,
}

#[repr(align(4096))]
#[derive(Clone)]
struct Page(#[allow(dead_code)] [u8; BLOCK]);

/// A buffer as direct I/O needs it.
struct Buffer(Vec<Page>);

impl Buffer {
    fn new(size: usize) -> Self {
        Self(vec![Page([0; BLOCK]); size / BLOCK])
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: pages are arrays of bytes without padding, their alignment being their size; borrowed as the whole.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * BLOCK) }
    }

    fn stamp(&mut self, first: u64) {
        for (i, block) in self.bytes().chunks_mut(BLOCK).enumerate() {
            block[..8].copy_from_slice(&(first + i as u64).to_le_bytes());
        }
    }

    fn check(&mut self, first: u64) -> Result<()> {
        for (i, block) in self.bytes().chunks(BLOCK).enumerate() {
            if block[..8] != (first + i as u64).to_le_bytes() {
                return Err(format!("block {} has the data of another", first + i as u64).into());
            }
        }
        Ok(())
    }
}

impl Disk {
    fn open(name: &str, write: bool, random: bool, size: usize) -> Result<Self> {
        let path = format!("/dev/{name}");
        let file = File::options().read(true).write(write).custom_flags(libc::O_DIRECT).open(path)?;
        let sectors: u64 = std::fs::read_to_string(format!("/sys/block/{name}/size"))?.trim().parse()?;
        Ok(Self { file, write, random, size, len: sectors * 512 / size as u64 })
    }

    /// Number of the block at which operation `number` starts.
    fn place(&self, number: u64) -> u64 {
        let blocks = (self.size / BLOCK) as u64;
        let operation = if self.random { number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20 } else { number };
        operation % self.len * blocks
    }

    fn run(self, depth: usize, count: u64) -> Result<()> {
        if depth > 1 { self.run_deep(depth, count) } else { self.run_one_by_one(count) }
    }

    fn run_one_by_one(self, count: u64) -> Result<()> {
        let mut buffer = Buffer::new(self.size);
        for number in 0..count {
            let place = self.place(number);
            if self.write {
                buffer.stamp(place);
                self.file.write_all_at(buffer.bytes(), place * BLOCK as u64)?;
            } else {
                self.file.read_exact_at(buffer.bytes(), place * BLOCK as u64)?;
                buffer.check(place)?;
            }
        }
        Ok(())
    }

    fn run_deep(self, depth: usize, count: u64) -> Result<()> {
        let mut ring = IoUring::new(depth as u32)?;
        let mut buffers: Vec<_> = (0..depth).map(|_| (Buffer::new(self.size), 0)).collect();
        let mut free: Vec<_> = (0..depth).collect();
        let (mut started, mut ended) = (0, 0);
        while ended < count {
            while started < count {
                let Some(slot) = free.pop() else { break };
                let (buffer, place) = &mut buffers[slot];
                *place = self.place(started);
                let (fd, offset) = (types::Fd(self.file.as_raw_fd()), *place * BLOCK as u64);
                let entry = if self.write {
                    buffer.stamp(*place);
                    opcode::Write::new(fd, buffer.bytes().as_ptr(), self.size as u32).offset(offset).build()
                } else {
                    opcode::Read::new(fd, buffer.bytes().as_mut_ptr(), self.size as u32)
                        .offset(offset)
                        .build()
                };
                // SAFETY: the buffer lives as long as `buffers`, and is not touched until the operation has ended.
                unsafe { ring.submission().push(&entry.user_data(slot as u64)) }?;
                started += 1;
            }
            ring.submit_and_wait(1)?;
            let done: Vec<_> = ring.completion().map(|e| (e.user_data() as usize, e.result())).collect();
            for (slot, result) in done {
                if result != self.size as i32 {
                    return Err(format!("an operation ended with {result}").into());
                }
                let (buffer, place) = &mut buffers[slot];
                if !self.write {
                    buffer.check(*place)?;
                }
                free.push(slot);
                ended += 1;
            }
        }
        Ok(())
    }
}

const MIB: usize = 1 << 20;
const CHUNK: usize = 64 << 10;

fn send(mut stream: impl Read + Write, mib: usize) -> Result<()> {
    let chunk = vec![0x5a; CHUNK];
    for _ in 0..mib * MIB / CHUNK {
        stream.write_all(&chunk)?;
    }
    // The other side answers when it has all of it.
    Ok(stream.read_exact(&mut [0])?)
}

fn receive(mut stream: impl Read + Write, mib: usize) -> Result<()> {
    stream.write_all(&[1])?;
    let mut chunk = vec![0; CHUNK];
    for _ in 0..mib * MIB / CHUNK {
        stream.read_exact(&mut chunk)?;
    }
    Ok(())
}

fn echo(mut stream: impl Read + Write, count: u64) -> Result<()> {
    let (mut sent, mut back) = ([0; 64], [0; 64]);
    for number in 0..count {
        sent[..8].copy_from_slice(&number.to_le_bytes());
        stream.write_all(&sent)?;
        stream.read_exact(&mut back)?;
        if sent != back {
            return Err(format!("echo {number} came back changed").into());
        }
    }
    Ok(())
}

fn connect_vsock(port: u32) -> Result<File> {
    // SAFETY: makes a descriptor, which is owned from here on.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: just made, and nobody else's.
    let socket = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let address = libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as u16,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: libc::VMADDR_CID_HOST,
        svm_zero: [0; 4],
    };
    let len = size_of_val(&address) as u32;
    // SAFETY: the address lives until the call returns, and `len` is its size.
    match unsafe { libc::connect(fd, (&raw const address).cast(), len) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error().into()),
    }
}
