//! The page that a vCPU shares with KVM, mapped a second time for what must be reached beside `KVM_RUN`.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_4 as kvm_run_io};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const PAGE: usize = 4096;

/// `kvm_run` of one vCPU.
pub(super) struct RunPage(NonNull<u8>);

// SAFETY: the mapping belongs to no thread, and is only reached through atomic bytes.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(super) fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let page = unsafe { mmap(std::ptr::null_mut(), PAGE, prot, MapFlags::SHARED, fd, 0) }?;
        NonNull::new(page.cast()).map(Self).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Makes the next `KVM_RUN` return at once, also one that has not begun yet (KVM API, `immediate_exit`).
    pub(super) fn set_immediate_exit(&self, on: bool) {
        self.byte(offset_of!(kvm_run, immediate_exit)).store(on.into(), Ordering::SeqCst);
    }

    /// Width in bytes of each access of the last port I/O exit, which kvm-ioctls leaves out; at least 1.
    pub(super) fn io_size(&self) -> usize {
        let at = offset_of!(kvm_run, __bindgen_anon_1) + offset_of!(kvm_run_io, size);
        usize::from(self.byte(at).load(Ordering::Relaxed)).max(1)
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        debug_assert!(offset < PAGE);
        // SAFETY: both offsets are in the first part of `kvm_run`, which is smaller than the page mapped here.
        let byte = unsafe { self.0.as_ptr().add(offset) };
        // SAFETY: the byte stays mapped while `self` is borrowed; other writers are the kernel and this type.
        unsafe { AtomicU8::from_ptr(byte) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`, and every reference into it borrowed `self`.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), PAGE) };
    }
}
