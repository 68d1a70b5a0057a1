//! The system calls that each kind of thread may make, each line with its reason. `docs/security.md` has these tables
//! word for word, which is a test.
//!
//! A new kind of thread is a variant of [`ThreadKind`], a table here and its filter in `seccomp.rs`. A thread that the
//! VMM thread starts while the guest runs, as a device's worker, has the VMM thread's filter *and* its own: what a worker
//! needs must stand in both.

use super::bpf::{Check, Rule, allow, allow_if, fails};

/// A kind of thread; each may make other system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs the event loop, activates devices, starts their workers.
    Vmm,
    /// The same in a VM that has a socket device, whose worker it starts.
    VmmWithVsock,
    /// Runs the guest.
    Vcpu,
    /// Writes out what the guest prints.
    Console,
    /// Serves a virtio device.
    Worker,
    /// Serves the socket device, with the host's programs at the other end.
    Vsock,
    /// Starts and stops the kernel's own worker for a network card.
    Vhost,
    /// Does the requests to a shared folder.
    Share,
    /// The same where nothing may be changed.
    ReadOnlyShare,
    /// Removes files of the VM's at its end: the socket device's, or what was kept of a container.
    Cleaner,
    /// Serves the control socket.
    Control,
    /// Has a container's streams.
    Streams,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: [Self; 12] = [
        Self::Vmm,
        Self::VmmWithVsock,
        Self::Vcpu,
        Self::Console,
        Self::Worker,
        Self::Vsock,
        Self::Vhost,
        Self::Share,
        Self::ReadOnlyShare,
        Self::Cleaner,
        Self::Control,
        Self::Streams,
    ];

    /// Its tables. Each call stands in one of them only.
    pub(super) const fn tables(self) -> &'static [&'static [Rule]] {
        match self {
            Self::Vmm => &[COMMON, VMM, WORKERS],
            Self::VmmWithVsock => &[COMMON, VMM, WORKERS, VSOCK],
            Self::Vcpu => &[COMMON, VCPU],
            Self::Console => &[COMMON, CONSOLE],
            Self::Worker => &[COMMON, WORKERS, WORKER],
            Self::Vsock => &[COMMON, VSOCK_WORKER, VSOCK],
            Self::Vhost => &[COMMON, VHOST],
            Self::Share => &[COMMON, SHARES, SHARE],
            Self::ReadOnlyShare => &[COMMON, SHARES, READ_ONLY_SHARE],
            Self::Cleaner => &[COMMON, CLEANER],
            Self::Control => &[COMMON, CONTROL],
            Self::Streams => &[COMMON, STREAMS],
        }
    }
}

// Requests of ioctl(2): Linux, `include/uapi/linux/kvm.h`, `include/uapi/linux/if_tun.h`,
// `include/uapi/linux/vhost.h`, `include/uapi/asm-generic/ioctls.h`.
const KVM_RUN: (&str, u32) = ("KVM_RUN", 0xae80);
const KVM_KVMCLOCK_CTRL: (&str, u32) = ("KVM_KVMCLOCK_CTRL", 0xaead);
const KVM_GET_REGS: (&str, u32) = ("KVM_GET_REGS", 0x8090_ae81);
const KVM_TRANSLATE: (&str, u32) = ("KVM_TRANSLATE", 0xc018_ae85);
const TUNSETOFFLOAD: (&str, u32) = ("TUNSETOFFLOAD", 0x4004_54d0);
const TUNSETQUEUE: (&str, u32) = ("TUNSETQUEUE", 0x4004_54d9);
const VHOST_SET_FEATURES: (&str, u32) = ("VHOST_SET_FEATURES", 0x4008_af00);
const VHOST_SET_VRING_NUM: (&str, u32) = ("VHOST_SET_VRING_NUM", 0x4008_af10);
const VHOST_SET_VRING_ADDR: (&str, u32) = ("VHOST_SET_VRING_ADDR", 0x4028_af11);
const VHOST_SET_VRING_BASE: (&str, u32) = ("VHOST_SET_VRING_BASE", 0x4008_af12);
const VHOST_GET_VRING_BASE: (&str, u32) = ("VHOST_GET_VRING_BASE", 0xc008_af12);
const VHOST_SET_VRING_KICK: (&str, u32) = ("VHOST_SET_VRING_KICK", 0x4008_af20);
const VHOST_SET_VRING_CALL: (&str, u32) = ("VHOST_SET_VRING_CALL", 0x4008_af21);
const VHOST_NET_SET_BACKEND: (&str, u32) = ("VHOST_NET_SET_BACKEND", 0x4008_af30);
const FIONBIO: (&str, u32) = ("FIONBIO", 0x5421);
const TIOCGWINSZ: (&str, u32) = ("TIOCGWINSZ", 0x5413);
const TCSETS: (&str, u32) = ("TCSETS", 0x5402);
const TCSETS2: (&str, u32) = ("TCSETS2", 0x402c_542b);

const NOT_EXECUTABLE: &[Check] = &[Check::Without(2, "protection", ("PROT_EXEC", libc::PROT_EXEC as u32))];

/// `CLONE_VM`, `CLONE_FS`, `CLONE_FILES`, `CLONE_SIGHAND`, `CLONE_THREAD`, `CLONE_SYSVSEM`, `CLONE_SETTLS`,
/// `CLONE_PARENT_SETTID`, `CLONE_CHILD_CLEARTID`: what glibc and musl pass for a thread. Any other set is no thread of
/// ours.
const THREAD: (&str, u32) = ("those of a thread", 0x003d_0f00);

/// What every thread needs for being one of a Rust program with glibc.
pub(super) const COMMON: &[Rule] = &[
    allow(libc::SYS_read, "event descriptors, standard input, device files"),
    allow(libc::SYS_write, "event descriptors, the console, the log, the line about a refused call"),
    allow(libc::SYS_close, "descriptors that are dropped"),
    allow_if(
        libc::SYS_fcntl,
        &[Check::Is(1, "command", &[("F_GETFD", libc::F_GETFD as u32)])],
        "debug builds check a descriptor before they close it",
    ),
    allow(libc::SYS_futex, "locks, channels, waiting for a thread's end"),
    allow(libc::SYS_sched_yield, "locks and channels that spin"),
    allow(libc::SYS_restart_syscall, "a wait that SIGSTOP interrupted goes on"),
    allow(libc::SYS_clock_gettime, "time limits, where the kernel's vDSO cannot tell the time"),
    allow(libc::SYS_getrandom, "keys of hash tables"),
    allow(libc::SYS_brk, "malloc"),
    allow_if(libc::SYS_mmap, NOT_EXECUTABLE, "malloc, stacks; never code"),
    allow_if(libc::SYS_mprotect, NOT_EXECUTABLE, "malloc, stacks; never code"),
    allow(libc::SYS_munmap, "malloc, stacks, guest memory at the end"),
    allow(libc::SYS_mremap, "realloc; it keeps the protection"),
    allow_if(
        libc::SYS_madvise,
        &[Check::Is(
            2,
            "advice",
            &[
                ("MADV_DONTNEED", libc::MADV_DONTNEED as u32),
                ("MADV_FREE", libc::MADV_FREE as u32),
                ("MADV_REMOVE", libc::MADV_REMOVE as u32),
            ],
        )],
        "malloc and stacks give memory back, and so does a balloon",
    ),
    allow(libc::SYS_rt_sigreturn, "return from the kick's handler"),
    allow(libc::SYS_rt_sigprocmask, "kicking and starting a thread, abort"),
    allow_if(
        libc::SYS_rt_sigaction,
        &[Check::Is(
            0,
            "signal",
            &[
                ("SIGABRT", libc::SIGABRT as u32),
                ("SIGSEGV", libc::SIGSEGV as u32),
                ("SIGBUS", libc::SIGBUS as u32),
            ],
        )],
        "abort, and a crash that ends as one",
    ),
    allow(libc::SYS_sigaltstack, "Rust's stack for overflows is set up and taken down with its thread"),
    allow(libc::SYS_getpid, "glibc's abort and pthread_kill"),
    allow(libc::SYS_gettid, "glibc's abort, the name of a thread that overflows"),
    allow_if(libc::SYS_tgkill, &[Check::OwnProcess(0)], "the kick of a vCPU, abort"),
    allow(
        libc::SYS_sched_getaffinity,
        "glibc counts processors for its malloc and finds the stack of a thread",
    ),
    allow(libc::SYS_exit, "the end of a thread"),
    allow(libc::SYS_exit_group, "the end of the process, also upon a refused call"),
];

/// The event loop, and what it does for devices.
pub(super) const VMM: &[Rule] = &[
    allow(libc::SYS_epoll_wait, "the event loop"),
    allow(libc::SYS_epoll_ctl, "the event loop's descriptors come and go"),
    allow(libc::SYS_poll, "is there input, is there room for output"),
    allow(libc::SYS_ppoll, "is there input, is there room for output"),
    allow_if(
        libc::SYS_ioctl,
        &[Check::Is(
            1,
            "request",
            &[
                TCSETS,
                TCSETS2,
                TIOCGWINSZ,
                TUNSETOFFLOAD,
                TUNSETQUEUE,
                FIONBIO,
                VHOST_SET_FEATURES,
                VHOST_SET_VRING_NUM,
                VHOST_SET_VRING_ADDR,
                VHOST_SET_VRING_BASE,
                VHOST_GET_VRING_BASE,
                VHOST_SET_VRING_KICK,
                VHOST_SET_VRING_CALL,
                VHOST_NET_SET_BACKEND,
            ],
        )],
        "the terminal as it was, and its size; a tap's offloads and queues; sockets that do not block; a vhost-net's rings, \
         but never its memory: a VM without vhost has no descriptor that takes these",
    ),
    allow_if(libc::SYS_clone, &[Check::Is(0, "flags", &[THREAD])], "threads of devices; never a process"),
    fails(libc::SYS_clone3, libc::ENOSYS, "its flags cannot be seen here; glibc goes back to clone"),
    allow(libc::SYS_rseq, "glibc registers it for a new thread"),
    allow(libc::SYS_set_robust_list, "glibc registers it for a new thread"),
    allow_if(
        libc::SYS_prctl,
        &[Check::Is(
            0,
            "option",
            &[
                ("PR_GET_NAME", libc::PR_GET_NAME as u32),
                ("PR_SET_NAME", libc::PR_SET_NAME as u32),
                ("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS as u32),
            ],
        )],
        "the name of a new thread, and of one whose call is refused; seccompiler sets no_new_privs with each filter",
    ),
    allow_if(
        libc::SYS_seccomp,
        &[Check::Is(0, "operation", &[("SECCOMP_SET_MODE_FILTER", libc::SECCOMP_SET_MODE_FILTER)])],
        "a new thread confines itself further",
    ),
];

/// What the workers of devices need: the VMM thread starts them, so it must be allowed the same.
pub(super) const WORKERS: &[Rule] = &[
    allow(libc::SYS_readv, "a tap or a socket into guest memory"),
    allow(libc::SYS_writev, "guest memory to a tap or a socket"),
    allow(libc::SYS_pread64, "an image; KVM's exit counters"),
    allow(libc::SYS_pwrite64, "an image"),
    allow(libc::SYS_preadv, "an image into guest memory"),
    allow(libc::SYS_pwritev, "guest memory to an image"),
    allow(libc::SYS_preadv2, "an image into guest memory"),
    allow(libc::SYS_pwritev2, "guest memory to an image, also through its cache"),
    allow(libc::SYS_fsync, "a guest's flush"),
    allow(libc::SYS_fdatasync, "a guest's flush"),
    allow(libc::SYS_fallocate, "a guest's discard and write of zeroes"),
    allow(
        libc::SYS_io_uring_enter,
        "images by io_uring; a ring is made and restricted before confinement only",
    ),
    allow(libc::SYS_sendto, "a socket"),
    allow(libc::SYS_recvfrom, "a socket"),
    allow(libc::SYS_sendmsg, "a socket from pieces of guest memory"),
    allow(libc::SYS_recvmsg, "a socket into pieces of guest memory"),
    allow(libc::SYS_eventfd2, "a worker's wake-up"),
    allow(libc::SYS_timerfd_create, "a rate limit's refill"),
    allow(libc::SYS_timerfd_settime, "a rate limit's refill"),
    allow(libc::SYS_epoll_create1, "a worker's event loop"),
];

/// `SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC`: a connection that nobody waits for.
const STREAM: (&str, u32) =
    ("a stream", (libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) as u32);

/// What the socket device's worker needs besides, and so the VMM thread that starts it. No VM without such a device has
/// these calls, and in one that does no other worker.
pub(super) const VSOCK: &[Rule] = &[
    allow(libc::SYS_accept4, "a host's program at a vsock"),
    allow_if(
        libc::SYS_socket,
        &[Check::Is(0, "family", &[("AF_UNIX", libc::AF_UNIX as u32)]), Check::Is(1, "type", &[STREAM])],
        "a guest's vsock connection to a program of the host; never the network",
    ),
    allow(libc::SYS_connect, "the same; there are Unix streams alone to connect"),
    allow(libc::SYS_shutdown, "a half-closed vsock connection"),
];

/// What the socket device's worker needs that stands in the VMM thread's tables, too.
const VSOCK_WORKER: &[Rule] = &[
    allow(libc::SYS_epoll_wait, "the worker's event loop"),
    allow(libc::SYS_epoll_ctl, "connections come and go"),
    allow(libc::SYS_recvfrom, "a host's program to the guest"),
    allow(libc::SYS_sendto, "the guest to a host's program"),
    allow(libc::SYS_timerfd_settime, "the time limits of connections"),
    RESTORE_TERMINAL,
    PRCTL_GET_NAME,
];

const VCPU: &[Rule] = &[
    allow_if(
        libc::SYS_ioctl,
        &[Check::Is(
            1,
            "request",
            &[KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS, KVM_TRANSLATE, TCSETS, TCSETS2],
        )],
        "runs the guest; tells it of a pause; says where it was when KVM gave up on it; a panic gives the terminal back",
    ),
    allow_if(
        libc::SYS_process_vm_readv,
        &[Check::OwnProcess(0)],
        "reads the guest's instruction where its page may be gone, when KVM gave up on it",
    ),
    allow(libc::SYS_pread64, "KVM's exit counters, at the guest's marks"),
    PRCTL_GET_NAME,
];

const CONSOLE: &[Rule] = &[
    allow(libc::SYS_poll, "is there room for output"),
    allow(libc::SYS_ppoll, "is there room for output"),
    RESTORE_TERMINAL,
    PRCTL_GET_NAME,
];

/// What a device's worker needs that stands in the VMM thread's own table, too.
const WORKER: &[Rule] = &[
    allow(libc::SYS_epoll_wait, "a worker's event loop"),
    allow(libc::SYS_epoll_ctl, "a worker's descriptors come and go"),
    allow_if(
        libc::SYS_ioctl,
        &[Check::Is(1, "request", &[TCSETS, TCSETS2, TUNSETOFFLOAD, TUNSETQUEUE, FIONBIO])],
        "a tap's offloads, and which of its queues the guest uses; sockets that do not block; a panic gives the terminal back",
    ),
    PRCTL_GET_NAME,
];

/// It moves no data.
const VHOST: &[Rule] = &[
    allow(libc::SYS_epoll_wait, "the worker's event loop"),
    allow(libc::SYS_epoll_ctl, "the worker's event loop"),
    allow(libc::SYS_poll, "is the tap still there"),
    allow(libc::SYS_ppoll, "is the tap still there"),
    allow_if(
        libc::SYS_ioctl,
        &[Check::Is(
            1,
            "request",
            &[TCSETS, TCSETS2, TUNSETOFFLOAD, TUNSETQUEUE, VHOST_NET_SET_BACKEND, VHOST_GET_VRING_BASE],
        )],
        "the kernel's worker stops for a pause or a reset, and goes on; a tap's offloads, and which of its queues the guest \
         uses; a panic gives the terminal back",
    ),
    PRCTL_GET_NAME,
];

/// What the threads of any share need. Where a path leads is Landlock's to say: to the shared folders, for what is done
/// with a file; looking at one, which `O_PATH` and `statx` are, it does not restrict.
const SHARES: &[Rule] = &[
    allow(libc::SYS_statx, "what describes a file"),
    allow(libc::SYS_readlinkat, "what a symbolic link says; nobody follows it"),
    allow(libc::SYS_fstatfs, "how much room there is"),
    allow(libc::SYS_getdents64, "what a folder holds"),
    allow(libc::SYS_lseek, "where to go on in a folder"),
    allow(libc::SYS_preadv2, "a file into guest memory"),
    RESTORE_TERMINAL,
    PRCTL_GET_NAME,
];

/// What opens a file for more than reading.
const CHANGING: (&str, u32) = (
    "O_WRONLY, O_RDWR, O_CREAT and O_TRUNC",
    (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) as u32,
);

/// Whatever its guest asks for and whatever it finds in this thread, nothing can be changed by these.
const READ_ONLY_SHARE: &[Rule] = &[allow_if(
    libc::SYS_openat,
    &[Check::Without(2, "flags", CHANGING)],
    "a file or a folder of the share; never for writing",
)];

const SET_USER_ID: (&str, u32) = ("S_ISUID", libc::S_ISUID);

/// What the threads of a share that can be written need besides. No call that gives a file to somebody else, and none for
/// extended attributes, devices, sockets and pipes.
const SHARE: &[Rule] = &[
    allow_if(libc::SYS_openat, &[Check::Without(3, "mode", SET_USER_ID)], "a file or a folder of the share"),
    allow(libc::SYS_pwritev2, "guest memory to a file"),
    allow(libc::SYS_ftruncate, "a file's length"),
    allow(libc::SYS_fallocate, "room for a file, and holes"),
    allow(libc::SYS_fsync, "a guest's fsync"),
    allow(libc::SYS_fdatasync, "a guest's fdatasync"),
    allow_if(libc::SYS_mkdirat, &[Check::Without(2, "mode", SET_USER_ID)], "a folder"),
    allow(libc::SYS_symlinkat, "a symbolic link"),
    allow(libc::SYS_linkat, "another name of a file"),
    allow(libc::SYS_renameat2, "another name instead"),
    allow(libc::SYS_unlinkat, "no name any more"),
    allow_if(
        libc::SYS_fchmod,
        &[Check::Without(1, "mode", SET_USER_ID)],
        "permissions, of what is open: opening it is Landlock's to allow",
    ),
    allow(libc::SYS_utimensat, "times of a file"),
    allow_if(
        libc::SYS_unshare,
        &[Check::Is(0, "flags", &[("CLONE_FS", libc::CLONE_FS as u32)])],
        "a umask of its own",
    ),
    allow(libc::SYS_umask, "that, which lets the guest's permissions be"),
];

/// This thread does nothing while the guest runs, so that no thread that the guest gives work can remove a file.
const CLEANER: &[Rule] = &[
    allow(libc::SYS_newfstatat, "is the vsock's socket still there, or another's"),
    allow(
        libc::SYS_unlinkat,
        "that socket, or a container that is not kept, at the end; Landlock allows it in their folders alone",
    ),
    RESTORE_TERMINAL,
    PRCTL_GET_NAME,
];

/// The control socket's thread also removes the socket at the end, so that no thread that the guest gives work has to.
const CONTROL: &[Rule] = &[
    allow(libc::SYS_ppoll, "waits for clients"),
    allow(libc::SYS_accept4, "a client comes"),
    allow(libc::SYS_recvfrom, "a request"),
    allow(libc::SYS_sendto, "an answer"),
    allow(libc::SYS_shutdown, "the end of the answers, for a client that is refused"),
    allow(libc::SYS_pread64, "KVM's exit counters, for GET /metrics"),
    allow(libc::SYS_newfstatat, "is the control socket still there, or another's"),
    allow(
        libc::SYS_unlinkat,
        "the socket and its folder at the end; Landlock allows it in their folders alone",
    ),
    RESTORE_TERMINAL,
    PRCTL_GET_NAME,
];

/// The program's streams to standard output and the log, standard input to the program.
const STREAMS: &[Rule] = &[
    allow(libc::SYS_poll, "is there input, is there room for output"),
    allow(libc::SYS_ppoll, "is there input, is there room for output"),
    allow(libc::SYS_recvfrom, "the guest's frames"),
    allow(libc::SYS_sendto, "frames for the guest"),
    allow(libc::SYS_shutdown, "the guest is told that all was passed on"),
    allow(libc::SYS_ftruncate, "the older half of the log, when the newer one is full"),
    allow_if(
        libc::SYS_ioctl,
        &[Check::Is(1, "request", &[TCSETS, TCSETS2])],
        "a terminal is the program's while that runs; a panic gives it back",
    ),
    PRCTL_GET_NAME,
];

const RESTORE_TERMINAL: Rule = allow_if(
    libc::SYS_ioctl,
    &[Check::Is(1, "request", &[TCSETS, TCSETS2])],
    "a panic gives the terminal back",
);

const PRCTL_GET_NAME: Rule = allow_if(
    libc::SYS_prctl,
    &[Check::Is(0, "option", &[("PR_GET_NAME", libc::PR_GET_NAME as u32)])],
    "the name of a thread whose call is refused",
);
