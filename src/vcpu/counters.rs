//! Exit counters of one vCPU: ours, and KVM's own through its statistics descriptor.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::kvm_stats_header;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::metrics::{ExitSource, Exits};

ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);

/// Why an exit came out to us.
#[derive(Clone, Copy)]
pub(super) enum Reason {
    IoOut,
    IoIn,
    MmioRead,
    MmioWrite,
    Interrupted,
}

const REASONS: [&str; 5] = ["port write", "port read", "mmio read", "mmio write", "interrupted"];

/// KVM's counters that say why an exit happened, with the names that the timeline gives them (KVM API 4.133;
/// arch/x86/kvm/x86.c, `kvm_vcpu_stats_desc`). What has no counter (CPUID, MSRs, page faults handled without a
/// new page) is in the total alone.
const KVM_REASONS: [(&str, &str); 8] = [
    ("io_exits", "port i/o"),
    ("mmio_exits", "mmio"),
    ("halt_exits", "halt"),
    ("irq_exits", "host interrupt"),
    ("irq_window_exits", "interrupt window"),
    ("nmi_window_exits", "nmi window"),
    ("pf_taken", "page fault"),
    ("hypercalls", "hypercall"),
];
const KVM_TOTAL: &str = "exits";

pub(super) struct Counters {
    ours: [AtomicU64; REASONS.len()],
    kvm: Option<KvmStats>,
}

impl Counters {
    /// `count` asks for KVM's counters, too; a host older than Linux 5.14 has none.
    pub(super) fn new(vcpu: &VcpuFd, count: bool) -> Self {
        let kvm = count.then(|| KvmStats::open(vcpu)).and_then(|stats| {
            stats.inspect_err(|e| log::info!("this host's KVM counts no exits for us: {e}")).ok()
        });
        Self { ours: Default::default(), kvm }
    }

    /// Where KVM's own are read from.
    pub(super) fn file(&self) -> Option<&File> {
        self.kvm.as_ref().map(|stats| &stats.file)
    }

    pub(super) fn add(&self, reason: Reason) {
        self.ours[reason as usize].fetch_add(1, Ordering::Relaxed);
    }
}

impl ExitSource for Counters {
    fn exits(&self) -> Exits {
        let ours = REASONS.iter().zip(&self.ours).map(|(name, n)| (*name, n.load(Ordering::Relaxed)));
        let mut exits = Exits { user: ours.filter(|(_, n)| *n != 0).collect(), ..Exits::default() };
        if let Some(stats) = &self.kvm {
            (exits.total, exits.kvm) = stats.read();
        }
        exits
    }
}

/// KVM's binary statistics of one vCPU.
struct KvmStats {
    file: File,
    /// Name and place in the file of each counter of [`KVM_REASONS`] and of the total.
    counters: Vec<(&'static str, u64)>,
}

impl KvmStats {
    fn open(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the request takes no argument and touches no memory of ours.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is open, new, and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd.as_raw_fd()) };
        let mut head = [0; size_of::<kvm_stats_header>()];
        file.read_exact_at(&mut head, 0)?;
        let word = |i: usize| u32::from_ne_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
        // flags, name_size, num_desc, id_offset, desc_offset, data_offset
        let (name_size, count, descriptors, data) = (word(4) as usize, word(8), word(16), word(20));
        let size = 16 + name_size;
        let mut all = vec![0; size * count as usize];
        file.read_exact_at(&mut all, descriptors.into())?;
        let counters = all.chunks_exact(size).filter_map(|d| {
            let end = d[16..].iter().position(|b| *b == 0)?;
            let name = std::str::from_utf8(&d[16..16 + end]).ok()?;
            let offset = u32::from_ne_bytes([d[8], d[9], d[10], d[11]]);
            Some((known(name)?, u64::from(data) + u64::from(offset)))
        });
        Ok(Self { counters: counters.collect(), file })
    }

    /// The total, and the counters that are not zero.
    fn read(&self) -> (Option<u64>, BTreeMap<&'static str, u64>) {
        let mut bytes = [0; 8];
        let values = self.counters.iter().filter_map(|(name, at)| {
            self.file.read_exact_at(&mut bytes, *at).ok()?;
            Some((*name, u64::from_ne_bytes(bytes)))
        });
        let mut values: BTreeMap<_, _> = values.collect();
        let total = values.remove(KVM_TOTAL);
        values.retain(|_, n| *n != 0);
        (total, values)
    }
}

fn known(name: &str) -> Option<&'static str> {
    if name == KVM_TOTAL {
        return Some(KVM_TOTAL);
    }
    KVM_REASONS.iter().find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours)
}
