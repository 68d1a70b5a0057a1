//! io_uring for [`Operation`]s: many with one system call, none of which waits.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::file_io::{Action, Operation, Pinned, write_flags};

/// The operations that [`entry`] makes.
const ALLOWED: [u8; 4] =
    [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];

/// A ring, with the operations that the kernel has. It owns them until they have ended, memory and file with them.
pub struct Ring<M: Pinned> {
    ring: IoUring,
    /// By the number that the kernel knows them by.
    slots: Vec<Option<Operation<M>>>,
    free: Vec<usize>,
}

impl<M: Pinned> Ring<M> {
    /// A ring for `size` operations at a time. `event` is signalled when one has ended.
    ///
    /// # Errors
    /// This host has no io_uring, or refuses it (`kernel.io_uring_disabled`, seccomp, old kernels).
    pub fn new(size: u16, event: &EventFd) -> io::Result<Self> {
        // No filter of system calls sees what goes through a ring, so the ring itself allows what disks need, alone.
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(size.into())?;
        let submitter = ring.submitter();
        submitter.register_eventfd(event.as_raw_fd())?;
        submitter.register_restrictions(&mut ALLOWED.map(Restriction::sqe_op))?;
        submitter.register_enable_rings()?;
        let slots = (0..size).map(|_| None).collect();
        Ok(Self { ring, slots, free: (0..size.into()).collect() })
    }

    /// Queues an operation. It comes back where there is no room.
    ///
    /// # Errors
    /// There is no room.
    pub fn push(&mut self, operation: Operation<M>) -> Result<(), Operation<M>> {
        if operation.is_harmful() {
            return Err(operation);
        }
        let Some(slot) = self.free.pop() else { return Err(operation) };
        let operation = self.slots[slot].insert(operation);
        let entry = entry(operation).user_data(slot as u64);
        // SAFETY: what the entry points to, pieces and the memory behind them, is owned by the slot until the kernel
        // has given it back: `complete` alone empties slots, by what the kernel says has ended, and `drop` waits for
        // all. The pieces are on the heap, so they stay where they are when the operation moves.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => Ok(()),
            Err(_) => {
                self.free.push(slot);
                Err(self.slots[slot].take().unwrap_or_else(|| unreachable!("it was put there above")))
            }
        }
    }

    /// Hands what was pushed to the kernel, and waits until at least `wait` operations have ended.
    ///
    /// # Errors
    /// The kernel is out of something (`EAGAIN`, `EBUSY`): what was pushed is kept for the next time.
    pub fn submit(&mut self, wait: usize) -> io::Result<()> {
        if wait == 0 && self.ring.submission().is_empty() {
            return Ok(());
        }
        loop {
            match self.ring.submit_and_wait(wait) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }

    /// The next operation that has ended.
    pub fn complete(&mut self) -> Option<(Operation<M>, io::Result<usize>)> {
        let entry = self.ring.completion().next()?;
        let slot = entry.user_data() as usize;
        let operation = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        let result = usize::try_from(entry.result());
        Some((operation, result.map_err(|_| io::Error::from_raw_os_error(-entry.result()))))
    }

    /// How many operations the kernel has.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl<M: Pinned> AsRawFd for Ring<M> {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl<M: Pinned> Drop for Ring<M> {
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.submit(1).is_err() {
                std::thread::yield_now();
            }
            while self.complete().is_some() {}
        }
    }
}

fn entry<M: Pinned>(operation: &Operation<M>) -> squeue::Entry {
    let fd = types::Fd(operation.file.as_raw_fd());
    let (address, count) = operation.pieces();
    let (count, offset) = (count as u32, operation.offset);
    match operation.action {
        Action::Read => opcode::Readv::new(fd, address.cast(), count).offset(offset).build(),
        Action::Write { durable } => {
            let write = opcode::Writev::new(fd, address.cast(), count).offset(offset);
            write.rw_flags(write_flags(durable)).build()
        }
        Action::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Action::PunchHole(len) | Action::ZeroRange(len) => {
            let flags = operation.fallocate_flags().bits() as i32;
            opcode::Fallocate::new(fd, len).offset(offset).mode(flags).build()
        }
    }
}
