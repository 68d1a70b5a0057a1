//! Attacks from inside: a program that is really confined, by the functions that `microvm boot` calls, tries what a guest
//! would that has broken out. And running VMs, looked at from outside.
//!
//! `victim` is the program; each attack runs it anew, because a refused call ends it.

mod common;

use std::ffi::{CStr, c_int, c_long};
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, OnceLock};

use common::{Host, SPIN, assert_fails, own_stderr, power_off, print, stderr, stdout, terminal};
use microvm::config::Sandbox;
use microvm::sandbox::{Confined, Folder, Kept, Layers, ThreadKind};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use tempfile::TempDir;

const REFUSED: i32 = 159;
/// The user and group "nobody".
const NOBODY: u32 = 65534;

/// A system call: its result, or the error's number below zero.
fn call<const N: usize>(number: c_long, arguments: [c_long; N]) -> c_long {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: whoever calls this passes pointers to what lives for the call, or none at all.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => -c_long::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        n => n,
    }
}

fn text(text: &CStr) -> c_long {
    text.as_ptr() as c_long
}

const CWD: c_long = libc::AT_FDCWD as c_long;

/// 127.0.0.1, port 9 (`struct sockaddr_in`).
const LOCALHOST: [u8; 16] = [2, 0, 0, 9, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];

fn with_socket(family: c_int, number: c_long, address: &[u8]) -> c_long {
    let socket = call(libc::SYS_socket, [family.into(), libc::SOCK_STREAM.into(), 0]);
    if socket < 0 {
        socket
    } else {
        call(number, [socket, address.as_ptr() as c_long, address.len() as c_long])
    }
}

/// Another process of the same user: the parent, asked for while that is allowed.
static PARENT: OnceLock<u32> = OnceLock::new();

fn parent() -> c_long {
    (*PARENT.get_or_init(std::os::unix::process::parent_id)).into()
}

/// One word of a process's memory, read or written.
fn other_memory(number: c_long) -> c_long {
    let mut word = 0_u64;
    let vector = [&raw mut word as u64, 8];
    let vector = vector.as_ptr() as c_long;
    call(number, [parent(), vector, 1, vector, 1, 0])
}

fn executable_page(protection: c_int) -> c_long {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    call(libc::SYS_mmap, [0, 4096, protection.into(), flags.into(), -1, 0])
}

fn made_executable(number: c_long) -> c_long {
    let page = executable_page(libc::PROT_READ | libc::PROT_WRITE);
    call(number, [page, 4096, (libc::PROT_READ | libc::PROT_EXEC).into(), -1])
}

/// A process of its own, or what a thread would be.
fn new_process(flags: c_int) -> c_long {
    match call(libc::SYS_clone, [flags.into(), 0, 0, 0, 0]) {
        // SAFETY: ends the new process at once.
        0 => unsafe { libc::_exit(0) },
        n => n,
    }
}

/// An attack: what it tries, its name, and the call that the sandbox refuses.
struct Attack {
    name: &'static str,
    refused: &'static str,
    run: fn() -> c_long,
}

macro_rules! attacks {
    ($($name:ident: $refused:literal => $run:expr;)*) => {
        &[$(Attack { name: stringify!($name), refused: $refused, run: || $run }),*]
    };
}

/// What no thread may do.
const ATTACKS: &[Attack] = attacks! {
    notification: "ioctl" => call(libc::SYS_ioctl, [-1, 0x4040_ae79, 0]);
    interrupt: "ioctl" => call(libc::SYS_ioctl, [-1, 0x4020_ae76, 0]);
    open_passwd: "openat" => call(libc::SYS_openat, [CWD, text(c"/etc/passwd"), libc::O_RDONLY.into()]);
    open_the_old_way: "open" => call(libc::SYS_open, [text(c"/etc/passwd"), libc::O_RDONLY.into()]);
    open_in_a_new_way: "openat2" => call(libc::SYS_openat2, [CWD, text(c"/etc/passwd"), [0_u64; 3].as_ptr() as c_long, 24]);
    write_a_file: "openat" => call(libc::SYS_openat, [CWD, text(c"/tmp/microvm-attack"), (libc::O_WRONLY | libc::O_CREAT).into(), 0o600]);
    open_memory: "openat" => call(libc::SYS_openat, [CWD, text(c"/proc/self/mem"), libc::O_RDWR.into()]);
    remove_a_file: "unlink" => call(libc::SYS_unlink, [text(c"/nonexistent/x")]);
    make_a_folder: "mkdir" => call(libc::SYS_mkdir, [text(c"/tmp/microvm-attack-folder"), 0o700]);
    read_a_folder: "getdents64" => call(libc::SYS_getdents64, [0, 0, 0]);
    change_a_mode: "chmod" => call(libc::SYS_chmod, [text(c"/nonexistent"), 0o777]);
    tcp_connect: "socket" => with_socket(libc::AF_INET, libc::SYS_connect, &LOCALHOST);
    tcp_bind: "socket" => with_socket(libc::AF_INET, libc::SYS_bind, &LOCALHOST);
    tcp6: "socket" => call(libc::SYS_socket, [libc::AF_INET6.into(), libc::SOCK_STREAM.into(), 0]);
    netlink: "socket" => call(libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0]);
    host_vsock: "socket" => call(libc::SYS_socket, [libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0]);
    unix_bind: "bind" => call(libc::SYS_bind, [-1, 0, 0]);
    fork: "fork" => call::<0>(libc::SYS_fork, []);
    clone_a_process: "clone" => new_process(libc::SIGCHLD);
    clone_a_namespace: "clone" => new_process(libc::CLONE_NEWUSER | libc::SIGCHLD);
    unshare: "unshare" => call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into()]);
    exec: "execve" => call(libc::SYS_execve, [text(c"/bin/true"), 0, 0]);
    exec_at: "execveat" => call(libc::SYS_execveat, [CWD, text(c"/bin/true"), 0, 0, 0]);
    ptrace: "ptrace" => call(libc::SYS_ptrace, [libc::PTRACE_SEIZE.into(), parent(), 0, 0]);
    read_another_process: "process_vm_readv" => other_memory(libc::SYS_process_vm_readv);
    write_another_process: "process_vm_writev" => other_memory(libc::SYS_process_vm_writev);
    kill: "kill" => call(libc::SYS_kill, [parent(), 0]);
    kill_a_thread_of_another: "tgkill" => call(libc::SYS_tgkill, [parent(), parent(), 0]);
    take_a_descriptor: "pidfd_open" => call(libc::SYS_pidfd_open, [parent(), 0]);
    map_code: "mmap" => executable_page(libc::PROT_READ | libc::PROT_EXEC);
    map_writable_code: "mmap" => executable_page(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    protect_code: "mprotect" => made_executable(libc::SYS_mprotect);
    protect_code_with_a_key: "pkey_mprotect" => made_executable(libc::SYS_pkey_mprotect);
    memory_file: "memfd_create" => call(libc::SYS_memfd_create, [text(c"x"), 0]);
    poison_memory: "madvise" => call(libc::SYS_madvise, [0, 0, libc::MADV_HWPOISON.into()]);
    become_another_user: "setuid" => call(libc::SYS_setuid, [1]);
    chroot: "chroot" => call(libc::SYS_chroot, [text(c"/tmp")]);
    mount: "mount" => call(libc::SYS_mount, [0, text(c"/tmp"), text(c"tmpfs"), 0, 0]);
    capabilities_back: "capset" => call(libc::SYS_capset, [0, 0]);
    dumpable_again: "prctl" => call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1]);
    executable_stacks: "personality" => call(libc::SYS_personality, [libc::READ_IMPLIES_EXEC.into()]);
    own_ring: "io_uring_setup" => call(libc::SYS_io_uring_setup, [1, 0]);
    bpf: "bpf" => call(libc::SYS_bpf, [0, 0, 0]);
    perf: "perf_event_open" => call(libc::SYS_perf_event_open, [0, 0, 0, 0, 0]);
    fault_handler: "userfaultfd" => call(libc::SYS_userfaultfd, [0]);
    keys: "keyctl" => call(libc::SYS_keyctl, [0, 0]);
    module: "init_module" => call(libc::SYS_init_module, [0, 0, text(c"")]);
    type_into_the_terminal: "ioctl" => call(libc::SYS_ioctl, [0, libc::TIOCSTI as c_long, text(c"x")]);
    new_vm: "ioctl" => call(libc::SYS_ioctl, [-1, 0xae01, 0]);
    other_handler: "rt_sigaction" => call(libc::SYS_rt_sigaction, [libc::SIGSYS.into(), 0, 0, 8]);
    pass_descriptors: "fcntl" => call(libc::SYS_fcntl, [0, libc::F_DUPFD.into(), 0]);
    other_interface: "unknown" => call(0x4000_0000 | libc::SYS_getpid, [0]);
};

/// What a vCPU, the console and the control socket's thread may not do beside; the VMM thread may.
const NARROW: &[Attack] = attacks! {
    start_a_thread: "clone" => call(libc::SYS_clone, [0x003d_0f00, 0, 0, 0, 0]);
    start_a_thread_anew: "clone3" => call(libc::SYS_clone3, [0, 0]);
    any_socket: "socket" => call(libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0]);
    another_filter: "seccomp" => call(libc::SYS_seccomp, [1, 0, 0]);
    rename_itself: "prctl" => call(libc::SYS_prctl, [libc::PR_SET_NAME.into(), text(c"x")]);
    write_an_image: "pwrite64" => call(libc::SYS_pwrite64, [-1, 0, 0, 0]);
    watch: "epoll_ctl" => call(libc::SYS_epoll_ctl, [-1, 0, 0, 0]);
    connect_an_interrupt: "ioctl" => call(libc::SYS_ioctl, [-1, 0x4020_ae76, 0]);
};

/// What the console and the control socket's thread may not do beside; a vCPU may.
const CONSOLE_ONLY: &[Attack] = attacks! {
    run_a_guest: "ioctl" => call(libc::SYS_ioctl, [-1, 0xae80, 0]);
    read_own_memory: "process_vm_readv" => call(libc::SYS_process_vm_readv, [std::process::id().into(), 0, 0, 0, 0, 0]);
};

/// What the workers of devices need, with arguments that do nothing. Started by the VMM thread, they have its filter.
const WORK: &[Attack] = attacks! {
    readv: "" => call(libc::SYS_readv, [-1, 0, 0]);
    writev: "" => call(libc::SYS_writev, [-1, 0, 0]);
    pread: "" => call(libc::SYS_pread64, [-1, 0, 0, 0]);
    pwrite: "" => call(libc::SYS_pwrite64, [-1, 0, 0, 0]);
    preadv: "" => call(libc::SYS_preadv, [-1, 0, 0, 0, 0]);
    pwritev: "" => call(libc::SYS_pwritev, [-1, 0, 0, 0, 0]);
    preadv2: "" => call(libc::SYS_preadv2, [-1, 0, 0, 0, 0, 0]);
    pwritev2: "" => call(libc::SYS_pwritev2, [-1, 0, 0, 0, 0, 0]);
    fsync: "" => call(libc::SYS_fsync, [-1]);
    fdatasync: "" => call(libc::SYS_fdatasync, [-1]);
    fallocate: "" => call(libc::SYS_fallocate, [-1, 0, 0, 0]);
    ring: "" => call(libc::SYS_io_uring_enter, [-1, 0, 0, 0, 0, 0]);
    sendto: "" => call(libc::SYS_sendto, [-1, 0, 0, 0, 0, 0]);
    recvfrom: "" => call(libc::SYS_recvfrom, [-1, 0, 0, 0, 0, 0]);
    sendmsg: "" => call(libc::SYS_sendmsg, [-1, 0, 0]);
    recvmsg: "" => call(libc::SYS_recvmsg, [-1, 0, 0]);
    eventfd: "" => call(libc::SYS_eventfd2, [0, 0]);
    timer: "" => call(libc::SYS_timerfd_create, [libc::CLOCK_MONOTONIC.into(), 0]);
    set_timer: "" => call(libc::SYS_timerfd_settime, [-1, 0, 0, 0]);
    epoll: "" => call(libc::SYS_epoll_create1, [0]);
    watch: "" => call(libc::SYS_epoll_ctl, [-1, 0, 0, 0]);
    give_back: "" => call(libc::SYS_madvise, [0, 0, libc::MADV_REMOVE.into()]);
    offloads: "" => call(libc::SYS_ioctl, [-1, 0x4004_54d0, 0]);
};

/// What the socket device's worker has to do; no other worker may, and no thread of a VM without such a device.
const VSOCK_WORK: &[Attack] = attacks! {
    accept: "accept4" => call(libc::SYS_accept4, [-1, 0, 0, 0]);
    connect: "connect" => call(libc::SYS_connect, [-1, 0, 0]);
    stream: "socket" => unix_socket(libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC);
    shutdown: "shutdown" => call(libc::SYS_shutdown, [-1, 0]);
};

/// Sockets that it has no use for, and what other workers may do.
const NO_VSOCK_WORK: &[Attack] = attacks! {
    datagrams: "socket" => unix_socket(libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC);
    packets: "socket" => unix_socket(libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC);
    netlink: "socket" => call(libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0]);
    send_a_descriptor: "sendmsg" => call(libc::SYS_sendmsg, [-1, 0, 0]);
    receive_a_descriptor: "recvmsg" => call(libc::SYS_recvmsg, [-1, 0, 0]);
    overwrite_an_image: "pwrite64" => call(libc::SYS_pwrite64, [-1, 0, 0, 0]);
};

fn unix_socket(kind: c_int) -> c_long {
    call(libc::SYS_socket, [libc::AF_UNIX.into(), kind.into(), 0])
}

/// Removes a file in the folder of the list, and one beside it.
const REMOVALS: &[Attack] = attacks! {
    remove_inside: "unlink" => remove("inside");
    remove_outside: "unlink" => remove("../outside");
};

/// The same with the call that the control socket's thread has for its socket and its folder.
const REMOVALS_AT: &[Attack] = attacks! {
    remove_inside_at: "unlinkat" => remove_at("inside", 0);
    remove_outside_at: "unlinkat" => remove_at("../outside", 0);
    remove_folder_at: "unlinkat" => remove_at("", libc::AT_REMOVEDIR);
};

fn remove_at(name: &str, flags: c_int) -> c_long {
    let folder = std::env::var(FOLDER).unwrap_or_else(|_| "/nonexistent".into());
    let path = std::ffi::CString::new(format!("{folder}/{name}")).unwrap();
    call(libc::SYS_unlinkat, [CWD, text(&path), flags.into()])
}

fn remove(name: &str) -> c_long {
    let folder = std::env::var(FOLDER).unwrap();
    let path = std::ffi::CString::new(format!("{folder}/{name}")).unwrap();
    call(libc::SYS_unlink, [text(&path)])
}

const SHARE: &str = "MICROVM_TEST_SHARE";

/// A path below the shared folder, or beside it.
fn path_of(name: &str) -> std::ffi::CString {
    let folder = std::env::var(SHARE).unwrap_or_else(|_| "/nonexistent".into());
    std::ffi::CString::new(format!("{folder}/{name}")).unwrap()
}

fn open_shared(name: &str, flags: c_int, mode: c_long) -> c_long {
    call(libc::SYS_openat, [CWD, text(&path_of(name)), flags.into(), mode])
}

fn with_two(number: c_long, from: &str, to: &str) -> c_long {
    call(number, [CWD, text(&path_of(from)), CWD, text(&path_of(to)), 0])
}

const MAKE: c_int = libc::O_WRONLY | libc::O_CREAT;

/// What a thread of any share may do.
const SHARED: &[Attack] = attacks! {
    read_shared: "openat" => open_shared("inside", libc::O_RDONLY, 0);
    list_shared: "openat" => open_shared(".", libc::O_RDONLY | libc::O_DIRECTORY, 0);
};

/// What a thread may do where its share can be written, and is refused where it cannot.
const SHARED_CHANGES: &[Attack] = attacks! {
    write_shared: "openat" => open_shared("inside", libc::O_RDWR, 0);
    empty_shared: "openat" => open_shared("inside", libc::O_TRUNC, 0);
    make_shared: "openat" => open_shared("new", MAKE, 0o644);
    folder_shared: "mkdirat" => call(libc::SYS_mkdirat, [CWD, text(&path_of("folder")), 0o755]);
    link_shared: "linkat" => with_two(libc::SYS_linkat, "inside", "link");
    symbolic_shared: "symlinkat" => call(libc::SYS_symlinkat, [text(c"x"), CWD, text(&path_of("symbolic"))]);
    rename_shared: "renameat2" => with_two(libc::SYS_renameat2, "inside", "renamed");
    remove_shared: "unlinkat" => call(libc::SYS_unlinkat, [CWD, text(&path_of("inside")), 0]);
    time_shared: "utimensat" => call(libc::SYS_utimensat, [CWD, text(&path_of("inside")), 0, 0]);
    mode_shared: "fchmod" => call(libc::SYS_fchmod, [open_shared("inside", libc::O_RDONLY, 0), 0o600]);
};

/// What lies beside the share, or leads there, which Landlock refuses.
const SHARED_OUTSIDE: &[Attack] = attacks! {
    read_beside: "" => open_shared("../outside", libc::O_RDONLY, 0);
    list_beside: "" => open_shared("..", libc::O_RDONLY | libc::O_DIRECTORY, 0);
    read_by_a_link: "" => open_shared("way-out", libc::O_RDONLY, 0);
};

/// The same for changes.
const SHARED_OUTSIDE_CHANGES: &[Attack] = attacks! {
    write_beside: "openat" => open_shared("../outside", libc::O_WRONLY, 0);
    make_beside: "openat" => open_shared("../made", MAKE, 0o644);
    folder_beside: "mkdirat" => call(libc::SYS_mkdirat, [CWD, text(&path_of("../made")), 0o755]);
    remove_beside: "unlinkat" => call(libc::SYS_unlinkat, [CWD, text(&path_of("../outside")), 0]);
    rename_out: "renameat2" => with_two(libc::SYS_renameat2, "inside", "../made");
    rename_in: "renameat2" => with_two(libc::SYS_renameat2, "../outside", "made");
    link_out: "linkat" => with_two(libc::SYS_linkat, "inside", "../made");
    link_in: "linkat" => with_two(libc::SYS_linkat, "../outside", "made");
    symbolic_beside: "symlinkat" => call(libc::SYS_symlinkat, [text(c"x"), CWD, text(&path_of("../made"))]);
};

/// What no thread of a share may do, in it or elsewhere.
const NOT_SHARED: &[Attack] = attacks! {
    set_user_id: "fchmod" => call(libc::SYS_fchmod, [0, 0o4755]);
    made_set_user_id: "openat" => open_shared("new", MAKE, 0o4755);
    mode_by_name: "fchmodat" => call(libc::SYS_fchmodat, [CWD, text(&path_of("inside")), 0o777]);
    give_away: "fchownat" => call(libc::SYS_fchownat, [CWD, text(&path_of("inside")), 1, 1, 0]);
    attribute: "fsetxattr" => call(libc::SYS_fsetxattr, [0, text(c"user.x"), 0, 0, 0]);
    device: "mknodat" => call(libc::SYS_mknodat, [CWD, text(&path_of("new")), (libc::S_IFIFO | 0o644).into(), 0]);
    by_handle: "open_by_handle_at" => call(libc::SYS_open_by_handle_at, [0, 0, 0]);
    go_there: "fchdir" => call(libc::SYS_fchdir, [0]);
    another_thread: "clone" => call(libc::SYS_clone, [0x003d_0f00, 0, 0, 0, 0]);
    watch_files: "inotify_init1" => call(libc::SYS_inotify_init1, [0]);
};

/// What ends a thread by itself, and must not look like a refused call.
const CRASHES: &[Attack] = attacks! {
    panic: "" => panic!("a panic on\ntwo lines");
    abort: "" => std::process::abort();
};

fn attack(name: &str) -> &'static Attack {
    let all =
        [ATTACKS, NARROW, CONSOLE_ONLY, WORK, VSOCK_WORK, NO_VSOCK_WORK, REMOVALS, REMOVALS_AT, CRASHES];
    let shared = [SHARED, SHARED_CHANGES, SHARED_OUTSIDE, SHARED_OUTSIDE_CHANGES, NOT_SHARED];
    let all = all.iter().chain(&shared);
    all.flat_map(|a| a.iter()).find(|a| a.name == name).expect("an attack of this name")
}

const ENVIRONMENT: &str = "MICROVM_TEST_VICTIM";
const FOLDER: &str = "MICROVM_TEST_FOLDER";
const PARENT_FOLDER: &str = "MICROVM_TEST_PARENT_FOLDER";

/// Confines itself as `microvm boot` does, then runs one attack in a thread of one kind and says what it got.
#[test]
#[ignore = "run by the other tests, as a process of its own"]
fn victim() {
    let Ok(words) = std::env::var(ENVIRONMENT) else { return };
    let words: Vec<_> = words.split(' ').collect();
    let [level, thread, name] = words[..] else { panic!("three words: {words:?}") };
    parent();
    let level = if level == "off" { Sandbox::Off } else { Sandbox::On };
    let files = std::env::var_os(FOLDER).map(|f| Folder::Files(f.into()));
    let folders = std::env::var_os(PARENT_FOLDER).map(|f| Folder::Folders(f.into()));
    let shared = std::env::var_os(SHARE).map(|f| Folder::Shared {
        folder: Arc::new(fs::File::open(f).unwrap().into()),
        readonly: thread == "readonly",
    });
    let mut kept = Kept::default();
    if let Some(Folder::Shared { folder, .. }) = &shared {
        kept.add("a shared folder", &**folder);
    }
    let folders: Vec<_> = files.into_iter().chain(folders).chain(shared).collect();
    let confined = Layers::find(level).unwrap().confine_process(&kept, &folders).unwrap();
    let run = attack(name).run;
    match thread {
        // Everything but system calls.
        "process" => answer(run()),
        "vmm" => {
            confined.confine_thread(ThreadKind::Vmm).unwrap();
            answer(run());
        }
        "vcpu0" => in_thread(confined, ThreadKind::Vcpu, thread, run),
        "console" => in_thread(confined, ThreadKind::Console, thread, run),
        "cleaner" => in_thread(confined, ThreadKind::Cleaner, thread, run),
        "control" => in_thread(confined, ThreadKind::Control, thread, run),
        "share" => in_thread(confined, ThreadKind::Share, thread, run),
        "readonly" => in_thread(confined, ThreadKind::ReadOnlyShare, thread, run),
        // As a device's worker: started when the VMM thread is confined.
        "worker" => {
            confined.confine_thread(ThreadKind::Vmm).unwrap();
            in_thread(confined, ThreadKind::Worker, thread, run);
        }
        "vsock" => {
            confined.confine_thread(ThreadKind::VmmWithVsock).unwrap();
            in_thread(confined, ThreadKind::Vsock, thread, run);
        }
        "neighbour" => {
            confined.confine_thread(ThreadKind::VmmWithVsock).unwrap();
            in_thread(confined, ThreadKind::Worker, thread, run);
        }
        "late" => {
            confined.confine_thread(ThreadKind::Vmm).unwrap();
            in_thread(confined, ThreadKind::Console, thread, run);
        }
        other => panic!("no thread {other}"),
    }
}

fn in_thread(confined: Confined, kind: ThreadKind, name: &str, run: fn() -> c_long) {
    let thread = confined.spawn(kind, name.into(), 256 << 10, move || answer(run())).unwrap();
    let _ = thread.join();
}

/// Ends the process here: the test harness around it needs calls that are refused.
fn answer(result: c_long) {
    eprintln!("answer {result}");
    // SAFETY: ends the process, running nothing of ours.
    unsafe { libc::_exit(0) }
}

/// Who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    /// Whoever runs the tests.
    Same,
    /// Nobody; only root can become it.
    Nobody,
}

fn is_root() -> bool {
    rustix::process::getuid().is_root()
}

fn users() -> Vec<User> {
    if is_root() { vec![User::Same, User::Nobody] } else { vec![User::Same] }
}

/// Not by a descriptor of this process: another test that forks now would keep it open, and a program that is open for
/// writing cannot be run.
fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

/// This program, where nobody can run it.
struct Victims {
    folder: TempDir,
}

impl Victims {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        copy_program(&std::env::current_exe().unwrap(), &folder.path().join("victim"));
        Self { folder }
    }

    fn command(&self, user: User, level: &str, thread: &str, attack: &str) -> Command {
        let mut command = Command::new(self.folder.path().join("victim"));
        command.args(["--ignored", "--exact", "victim", "--nocapture", "--test-threads=1"]);
        command.env(ENVIRONMENT, format!("{level} {thread} {attack}")).current_dir("/").stdin(Stdio::null());
        if user == User::Nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    fn run(&self, user: User, level: &str, thread: &str, attack: &str) -> Output {
        self.command(user, level, thread, attack).output().unwrap()
    }

    /// What the attack's last call returned.
    #[track_caller]
    fn answer(&self, user: User, level: &str, thread: &str, attack: &str) -> c_long {
        let output = self.run(user, level, thread, attack);
        let text = stderr(&output);
        let answer = text.lines().find_map(|l| l.strip_prefix("answer "));
        let answer =
            answer.unwrap_or_else(|| panic!("{user:?} {thread} {attack}: {:?} {text}", output.status));
        answer.parse().unwrap()
    }

    #[track_caller]
    fn is_refused(&self, user: User, thread: &str, attack: &Attack) {
        let output = self.run(user, "on", thread, attack.name);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(REFUSED), "{user:?} {thread} {}: {text}", attack.name);
        // The main thread has the program's name, or its test's.
        let thread = if thread == "vmm" { "victim" } else { thread };
        let expected = format!("microvm: the sandbox refused the system call {} (", attack.refused);
        let line = text.lines().find(|l| l.starts_with(&expected));
        let line = line.unwrap_or_else(|| panic!("{}: {text}", attack.name));
        assert!(line.contains(&format!("of thread {thread}: ")), "{line}");
    }
}

#[test]
fn attacks_are_refused_in_every_thread() {
    let victims = Victims::new();
    for user in users() {
        for attack in ATTACKS {
            for thread in ["vmm", "vcpu0", "console", "cleaner", "control"] {
                victims.is_refused(user, thread, attack);
            }
        }
    }
}

#[test]
fn narrow_threads_may_not_do_what_the_vmm_may() {
    let victims = Victims::new();
    for user in users() {
        for attack in NARROW {
            for thread in ["vcpu0", "console", "cleaner", "control"] {
                victims.is_refused(user, thread, attack);
            }
        }
        for attack in CONSOLE_ONLY {
            victims.is_refused(user, "console", attack);
            victims.is_refused(user, "cleaner", attack);
            victims.is_refused(user, "control", attack);
        }
        for attack in REMOVALS_AT {
            for thread in ["vmm", "vcpu0", "console"] {
                victims.is_refused(user, thread, attack);
            }
        }
    }
}

#[test]
fn a_thread_that_is_started_late_is_confined_twice() {
    let victims = Victims::new();
    for attack in ATTACKS.iter().take(4).chain(NARROW) {
        victims.is_refused(User::Same, "late", attack);
    }
    for attack in ATTACKS.iter().take(4) {
        victims.is_refused(User::Same, "worker", attack);
    }
}

#[test]
fn workers_of_devices_may_do_their_work() {
    let victims = Victims::new();
    for work in WORK {
        // Whatever comes of it, it is not refused.
        victims.answer(User::Same, "on", "worker", work.name);
    }
}

#[test]
fn sockets_are_for_the_vsock_alone() {
    let victims = Victims::new();
    for work in VSOCK_WORK {
        victims.answer(User::Same, "on", "vsock", work.name);
        for thread in ["vmm", "worker", "neighbour"] {
            victims.is_refused(User::Same, thread, work);
        }
    }
    for attack in ATTACKS.iter().chain(NO_VSOCK_WORK).chain(REMOVALS_AT) {
        victims.is_refused(User::Same, "vsock", attack);
    }
}

/// A folder that is shared, anew for each attack, and what lies beside it.
struct Shared {
    dir: TempDir,
}

impl Shared {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        for (path, mode) in [(dir.path().to_path_buf(), 0o777), (dir.path().join("folder"), 0o777)] {
            fs::create_dir_all(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        for name in ["folder/inside", "outside"] {
            let path = dir.path().join(name);
            fs::write(&path, name).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        }
        std::os::unix::fs::symlink("../outside", dir.path().join("folder/way-out")).unwrap();
        Self { dir }
    }

    fn run(&self, victims: &Victims, user: User, thread: &str, attack: &Attack) -> Output {
        let mut command = victims.command(user, "on", thread, attack.name);
        command.env(SHARE, self.dir.path().join("folder")).output().unwrap()
    }

    /// What the attack's last call returned, or `None` where it was refused.
    #[track_caller]
    fn answer(victims: &Victims, user: User, thread: &str, attack: &Attack) -> Option<c_long> {
        let shared = Self::new();
        let output = shared.run(victims, user, thread, attack);
        let error = stderr(&output);
        let outside = fs::read_to_string(shared.dir.path().join("outside"));
        assert_eq!(outside.ok().as_deref(), Some("outside"), "{thread} {}", attack.name);
        assert!(!shared.dir.path().join("made").exists(), "{thread} {}", attack.name);
        if output.status.code() == Some(REFUSED) {
            let refused = format!("refused the system call {} (", attack.refused);
            assert!(error.contains(&refused), "{thread} {}: {error}", attack.name);
            return None;
        }
        let answer = error.lines().find_map(|l| l.strip_prefix("answer "));
        Some(answer.unwrap_or_else(|| panic!("{thread} {}: {error}", attack.name)).parse().unwrap())
    }
}

/// A thread of a share does its work in its folder and nothing outside of it; where it is read-only, it has no call that
/// changes anything.
#[test]
fn shares_are_confined_to_their_folder() {
    if Layers::of_host().landlock_abi() == 0 {
        return eprintln!("skipped: no Landlock here");
    }
    let victims = Victims::new();
    for user in users() {
        let answer = |thread, attack| Shared::answer(&victims, user, thread, attack);
        for attack in SHARED {
            for thread in ["share", "readonly"] {
                assert!(answer(thread, attack) >= Some(0), "{user:?} {thread} {}", attack.name);
            }
        }
        for attack in SHARED_CHANGES {
            // What is another's only root could change, and root has no right left to.
            let answered = answer("share", attack);
            let theirs =
                user == User::Nobody && ["time_shared", "mode_shared", "link_shared"].contains(&attack.name);
            let exists = Some(-c_long::from(libc::EEXIST));
            assert!(
                theirs || answered >= Some(0) || answered == exists,
                "{user:?} {}: {answered:?}",
                attack.name
            );
            assert_eq!(answer("readonly", attack), None, "{user:?} {}", attack.name);
        }
        for attack in SHARED_OUTSIDE {
            for thread in ["share", "readonly"] {
                assert_eq!(
                    answer(thread, attack),
                    Some(-c_long::from(libc::EACCES)),
                    "{thread} {}",
                    attack.name
                );
            }
        }
        for attack in SHARED_OUTSIDE_CHANGES {
            let answered = answer("share", attack);
            let refusals = [libc::EACCES, libc::EXDEV, libc::EPERM].map(|e| Some(-c_long::from(e)));
            assert!(refusals.contains(&answered), "{user:?} {}: {answered:?}", attack.name);
            assert_eq!(answer("readonly", attack), None, "{user:?} {}", attack.name);
        }
        for attack in NOT_SHARED {
            for thread in ["share", "readonly"] {
                assert_eq!(answer(thread, attack), None, "{user:?} {thread} {}", attack.name);
            }
        }
    }
}

/// What every thread is refused a share's is, too; what it has the calls for is refused by Landlock.
#[test]
fn shares_may_do_no_more_than_their_work() {
    let victims = Victims::new();
    let may = ["open_passwd", "write_a_file", "open_memory", "read_a_folder"];
    for attack in ATTACKS {
        if !may.contains(&attack.name) {
            victims.is_refused(User::Same, "share", attack);
        }
        if !["open_passwd", "read_a_folder"].contains(&attack.name) {
            victims.is_refused(User::Same, "readonly", attack);
        }
    }
    if Layers::of_host().landlock_abi() > 0 {
        for name in &may[..3] {
            let answer = victims.answer(User::Same, "on", "share", name);
            assert_eq!(answer, -c_long::from(libc::EACCES), "{name}");
        }
    }
}

#[test]
fn glibc_goes_back_from_clone3() {
    let answer = Victims::new().answer(User::Same, "on", "vmm", "start_a_thread_anew");
    assert_eq!(answer, -c_long::from(libc::ENOSYS));
}

/// Without a filter the layers below hold; and without any the same attacks get through, or this test shows nothing.
#[test]
fn each_layer_holds_alone() {
    let (access, permission) = (-c_long::from(libc::EACCES), -c_long::from(libc::EPERM));
    let victims = Victims::new();
    let abi = Layers::of_host().landlock_abi();
    for user in users() {
        for (name, needs, expected) in [
            ("open_passwd", 1, access),
            ("write_a_file", 1, access),
            ("open_memory", 1, access),
            ("make_a_folder", 1, access),
            ("exec", 1, access),
            ("ptrace", 1, permission),
            ("read_another_process", 1, permission),
            ("write_another_process", 1, permission),
            ("tcp_connect", 4, access),
            ("tcp_bind", 4, access),
            ("kill", 6, permission),
            ("become_another_user", 0, permission),
            ("chroot", 0, permission),
            ("mount", 0, permission),
        ] {
            if needs > abi {
                eprintln!("{name}: this host's Landlock cannot");
                continue;
            }
            let answer = victims.answer(user, "on", "process", name);
            assert_eq!(answer, expected, "{user:?} {name}");
        }
    }
    let unconfined = ["open_passwd", "open_memory", "kill", "clone_a_process", "protect_code", "memory_file"];
    for name in unconfined {
        assert!(victims.answer(User::Same, "off", "process", name) >= 0, "{name} fails without a sandbox");
    }
    if is_root() {
        for name in ["ptrace", "become_another_user", "chroot"] {
            assert!(victims.answer(User::Same, "off", "process", name) >= 0, "{name} fails for root");
        }
    }
    assert_eq!(victims.run(User::Same, "off", "process", "exec").status.code(), Some(0));
}

#[test]
fn a_folder_on_the_list_allows_removal_alone() {
    if Layers::of_host().landlock_abi() == 0 {
        return eprintln!("skipped: no Landlock here");
    }
    let victims = Victims::new();
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let run = |attack: &str, folder: &Path| {
        let mut command = victims.command(User::Same, "on", "process", attack);
        stderr(&command.env(FOLDER, folder).output().unwrap())
    };
    for (name, attack, remains) in
        [("folder/inside", "remove_inside", false), ("outside", "remove_outside", true)]
    {
        let file = dir.path().join(name);
        fs::write(&file, "").unwrap();
        let text = run(attack, &folder);
        assert!(text.contains("answer "), "{text}");
        assert_eq!(file.exists(), remains, "{name}: {text}");
    }
    // What this attack writes lies in /tmp, so that a right too many would let it through.
    assert!(run("write_a_file", Path::new("/tmp")).contains(&format!("answer -{}", libc::EACCES)));
    let text = run("remove_inside", Path::new("/nonexistent"));
    assert!(text.contains("open a folder for Landlock"), "{text}");
}

/// As at the end of a VM: the files of its folder, then the folder, but not what is in the folder of another VM.
#[test]
fn who_made_a_socket_removes_what_is_its_own() {
    if Layers::of_host().landlock_abi() == 0 {
        return eprintln!("skipped: no Landlock here");
    }
    let victims = Victims::new();
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    let (inside, outside) = (folder.join("inside"), dir.path().join("outside"));
    let run_in = |thread: &str, attack: &str, parent: bool| {
        let mut command = victims.command(User::Same, "on", thread, attack);
        command.env(FOLDER, &folder);
        if parent {
            command.env(PARENT_FOLDER, dir.path());
        }
        let text = stderr(&command.output().unwrap());
        text.lines().find_map(|l| l.strip_prefix("answer ")).unwrap_or_else(|| panic!("{text}")).to_string()
    };
    let run = |attack: &str, parent: bool| run_in("control", attack, parent);
    let refused = format!("-{}", libc::EACCES);
    fs::write(&inside, "").unwrap();
    // A vsock's socket.
    assert_eq!(run_in("cleaner", "remove_inside_at", false), "0");
    fs::write(&inside, "").unwrap();
    fs::write(&outside, "").unwrap();
    assert_eq!(run("remove_outside_at", true), refused);
    assert_eq!(run("remove_inside_at", true), "0");
    assert_eq!(run("remove_folder_at", false), refused);
    assert_eq!(run("remove_folder_at", true), "0");
    assert!(outside.exists() && !folder.exists());
}

#[test]
fn a_panic_is_told_and_no_violation() {
    let victims = Victims::new();
    for thread in ["vmm", "vcpu0", "console", "control", "worker", "vsock", "cleaner", "late"] {
        let mut command = victims.command(User::Same, "on", thread, "panic");
        let text = stderr(&command.env("RUST_BACKTRACE", "full").output().unwrap());
        let line = text.lines().find(|l| l.contains("a panic on two lines"));
        let line = line.unwrap_or_else(|| panic!("{thread}: {text}"));
        assert!(line.starts_with("microvm: thread ") && line.contains("tests/sandbox.rs"), "{line}");
        assert!(thread == "vmm" || !text.contains("refused"), "{thread}: {text}");
        let output = victims.run(User::Same, "on", thread, "abort");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{thread}: {}", stderr(&output));
    }
}

/// A VM that prints a letter and then runs without end, in a process that is killed when this goes out of scope.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Self(child)
    }

    fn proc(&self) -> PathBuf {
        Path::new("/proc").join(self.0.id().to_string())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spin() -> Vec<u8> {
    [print("r"), SPIN.to_vec()].concat()
}

/// `microvm boot FLAGS` by `user`, for whom the program, the guest and a KVM device are put where they may be used.
fn boot_as(host: &Host, user: User, code: &[u8], flags: &[&str]) -> Command {
    let kernel = host.kernel(code);
    let ordinary = host.boot(&kernel, flags);
    if user == User::Same {
        return ordinary;
    }
    fs::set_permissions(host.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (program, device) = (host.dir.path().join("microvm"), host.dir.path().join("kvm"));
    copy_program(Path::new(ordinary.get_program()), &program);
    let number = rustix::fs::stat("/dev/kvm").unwrap().st_rdev;
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(rustix::fs::CWD, &device, rustix::fs::FileType::CharacterDevice, mode, number)
        .unwrap();
    fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();
    let mut command = Command::new(program);
    command.args(ordinary.get_args()).arg("--kvm-device").arg(device);
    command.current_dir(host.dir.path()).stdin(Stdio::null()).uid(NOBODY).gid(NOBODY);
    command
}

/// How many filters each call of a process passes.
fn filters(process: &str) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    status.lines().find_map(|l| l.strip_prefix("Seccomp_filters:"))?.trim().parse().ok()
}

#[test]
fn every_thread_of_a_running_vm_is_confined() {
    for user in users() {
        let host = Host::new();
        for folder in ["s", "r"] {
            let path = host.dir.path().join(folder);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        }
        let flags = ["--cpus", "3", "--control", "control.sock", "--vsock", "cid=3,socket=v"];
        let shares = ["--share", "s,tag=s", "--share", "r,tag=r,readonly"];
        let flags = [&flags[..], &shares].concat();
        let vm = Running::start(&mut boot_as(&host, user, &spin(), &flags));
        let mut names = Vec::new();
        for task in fs::read_dir(vm.proc().join("task")).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
                line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_string()
            };
            assert_eq!(
                (field("Seccomp"), field("NoNewPrivs")),
                ("2".into(), "1".into()),
                "{user:?} {status}"
            );
            for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
                assert_eq!(field(set), "0000000000000000", "{user:?} {status}");
            }
            // Linux 5.9. This process may have some, which the VM has taken over.
            if let Some(before) = filters("self") {
                let now = field("Seccomp_filters").parse();
                assert_eq!(now, Ok(before + 1), "a vCPU's exit would pass several filters: {status}");
            }
            names.push(field("Name"));
        }
        for name in
            ["microvm", "vcpu0", "vcpu1", "vcpu2", "console", "vsock-file", "control", "share0", "share1"]
        {
            assert!(names.iter().any(|n| n == name), "no {name} among {names:?}");
        }
        let limits = fs::read_to_string(vm.proc().join("limits")).unwrap();
        let core = limits.lines().find(|l| l.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
        // What cannot be dumped belongs to root, whoever runs it.
        let owner = rustix::fs::stat(vm.proc().join("mem")).unwrap().st_uid;
        assert_eq!(owner, 0, "another process of this user could read the guest's memory");
    }
}

/// Leaves descriptors open for the program to come, as a careless parent would.
fn leak() -> c_int {
    for fd in [3, 77, 500] {
        // SAFETY: touches no memory.
        if unsafe { libc::dup2(libc::STDIN_FILENO, fd) } < 0 {
            return -1;
        }
    }
    0
}

/// Runs `setup` in the child between fork and exec.
fn in_child(command: &mut Command, setup: impl Fn() -> c_int + Send + Sync + 'static) -> &mut Command {
    let checked = move || if setup() < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: each `setup` below makes system calls alone, which is all that is allowed after fork.
    unsafe { command.pre_exec(checked) }
}

fn open_files(vm: &Running) -> Vec<String> {
    let mut files: Vec<_> = fs::read_dir(vm.proc().join("fd"))
        .unwrap()
        .map(|e| {
            fs::read_link(e.unwrap().path()).unwrap().to_str().unwrap().split_once(':').map_or_else(
                || String::from("a path"),
                |(kind, name)| {
                    format!("{kind}:{}", name.trim_end_matches(|c: char| c.is_ascii_digit() || c == ']'))
                },
            )
        })
        .collect();
    files.sort();
    files
}

#[test]
fn only_named_descriptors_are_open() {
    if !is_root() {
        return eprintln!("skipped: only root can look into a process that is not dumpable");
    }
    let host = Host::new();
    let kernel = host.kernel(&spin());
    let metrics = ["--control", "control.sock", "--metrics", "metrics.json"];
    let vsock = ["--vsock", "cid=3,socket=v"];
    fs::create_dir(host.dir.path().join("s")).unwrap();
    let share = ["--share", "s,tag=s"];
    let flags =
        [&["--cpus", "2", "--memory", "16M,backing=memfd", "--timeline"][..], &metrics, &vsock, &share];
    let flags = flags.concat();
    let named = [
        "/memfd:guest-memory (deleted)",
        "a path", // standard input, again for the serial port
        "a path",
        "a path", // the folders of the control socket and the vsock's, the file of --metrics, what memory is taken
        "a path",
        "a path",
        "a path",
        "a path", // the shared folder, twice, and that of descriptors
        "a path",
        "a path",
        // Event loop, serial port twice; the control thread's end; what devices want done; notifications and interrupt of
        // the random numbers, of the vsock, and of the share.
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventfd",
        "anon_inode:[eventpoll",
        "anon_inode:[io_uring", // the VM's end
        "anon_inode:[signalfd",
        "anon_inode:[timerfd",
        "anon_inode:kvm-vcpu-stats:",
        "anon_inode:kvm-vcpu-stats:",
        "anon_inode:kvm-vcpu:",
        "anon_inode:kvm-vcpu:",
        "anon_inode:kvm-vm",
        "pipe:[", // standard output, again for the serial port, and standard error
        "pipe:[",
        "pipe:[",
        "socket:[", // the control socket, the vsock's
        "socket:[",
    ];
    for sandbox in ["on", "off"] {
        let mut command = host.boot(&kernel, &[&flags[..], &["--sandbox", sandbox]].concat());
        let vm = Running::start(in_child(command.stderr(Stdio::piped()), leak));
        let files = open_files(&vm);
        if sandbox == "on" {
            assert_eq!(files, named);
        } else {
            assert!(files.len() > named.len() + 2, "nothing leaked, so nothing was shown: {files:?}");
        }
    }
}

/// A filter that answers one call so, if an argument is this; put in before exec, it makes a host without the call.
fn host_that(
    number: c_long,
    argument: Option<(u8, u64)>,
    action: SeccompAction,
) -> impl Fn() -> c_int + Send + Sync + 'static {
    let condition = |(i, v)| SeccompCondition::new(i, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, v).unwrap();
    let rules = argument.map(|a| SeccompRule::new(vec![condition(a)]).unwrap()).into_iter().collect();
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new([(number, rules)].into(), SeccompAction::Allow, action, architecture);
    let code: seccompiler::BpfProgram = filter.unwrap().try_into().unwrap();
    move || if seccompiler::apply_filter(&code).is_ok() { 0 } else { -1 }
}

fn errno(number: c_int) -> SeccompAction {
    SeccompAction::Errno(number as u32)
}

#[test]
fn what_a_host_lacks_is_one_warning_or_an_error() {
    let host = Host::new();
    let kernel = host.kernel(&[print("ran"), power_off()].concat());
    for (number, lacks) in [
        (libc::SYS_landlock_create_ruleset, "Landlock"),
        (libc::SYS_seccomp, "seccomp filters"),
        (libc::SYS_close_range, "close_range"),
    ] {
        let boot = |sandbox: &str| {
            let mut command = host.boot(&kernel, &["--sandbox", sandbox, "--serial", "file=out"]);
            let output =
                in_child(&mut command, host_that(number, None, errno(libc::ENOSYS))).output().unwrap();
            (output, fs::read_to_string(host.dir.path().join("out")).ok())
        };
        let _ = fs::remove_file(host.dir.path().join("out"));
        let (output, printed) = boot("strict");
        assert_fails(&output, 1, &["--sandbox strict", lacks, "--sandbox on"]);
        assert_eq!(printed, None, "something is left behind");
        let (output, printed) = boot("on");
        let text = stderr(&output);
        assert_eq!((output.status.code(), printed.as_deref()), (Some(0), Some("ran")), "{text}");
        assert!(text.lines().count() == 1 && text.contains("WARN") && text.contains(lacks), "{text}");
        let (output, printed) = boot("off");
        assert_eq!(
            (output.status.code(), printed.as_deref(), stderr(&output)),
            (Some(0), Some("ran"), String::new())
        );
    }
}

#[test]
fn a_filter_that_fails_stops_the_start() {
    let host = Host::new();
    let mut command = host.boot(&host.kernel(&[print("ran"), power_off()].concat()), &[]);
    // The kernel has filters, but none can be set.
    let set = (0, libc::SECCOMP_SET_MODE_FILTER.into());
    let refuses = host_that(libc::SYS_seccomp, Some(set), errno(libc::ENOMEM));
    let output = in_child(&mut command, refuses).output().unwrap();
    assert_ends(&output, 1, &["cannot install a seccomp filter", "--sandbox off"]);
    assert_eq!(stdout(&output), "", "the guest has run unconfined");
}

#[test]
fn this_host_is_strict_or_says_what_it_lacks() {
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let output = host.boot(&kernel, &["--sandbox", "strict"]).output().unwrap();
    match Layers::of_host().lacks().next() {
        None => assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), "")),
        Some(lack) => assert_fails(&output, 1, &["--sandbox strict", lack.what, lack.since]),
    }
    let output = host.boot(&kernel, &["--sandbox", "maybe"]).output().unwrap();
    assert_fails(&output, 2, &["--sandbox", "on, strict and off"]);
    let config = format!(r#"{{"kernel": {{"path": {kernel:?}}}, "sandbox": "maybe"}}"#);
    host.file("vm.json", config.as_bytes());
    assert_fails(&host.microvm(["boot", "--config", "vm.json"]).output().unwrap(), 2, &["maybe", "strict"]);
}

#[test]
fn off_confines_nothing() {
    let host = Host::new();
    let vm = Running::start(&mut host.boot(&host.kernel(&spin()), &["--sandbox", "off"]));
    let status = |path: PathBuf| {
        let status = fs::read_to_string(path.join("status")).unwrap();
        let fields = status
            .lines()
            .filter(|l| ["Seccomp:", "NoNewPrivs:", "CapEff:"].iter().any(|f| l.starts_with(f)));
        fields.map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(status(vm.proc()), status("/proc/self".into()), "as this process, its parent");
}

/// `xgetbv`: a software KVM cannot emulate it, and reads it out of guest memory; a processor takes it for invalid.
const XGETBV: [u8; 3] = [0x0f, 0x01, 0xd0];

#[test]
fn an_emulation_failure_is_told_and_no_violation() {
    let output = Host::new().boot_code(&XGETBV, &[]);
    assert_eq!(output.status.code(), Some(102), "{}", stderr(&output));
    assert!(!stderr(&output).contains("cannot emulate") || stderr(&output).contains("[0f 01 d0 "));
}

/// The run failed with this line; an old host's warning about what it lacks may stand before it.
#[track_caller]
fn assert_ends(output: &Output, status: i32, words: &[&str]) {
    let text = own_stderr(output);
    assert_eq!((output.status.code(), text.lines().count()), (Some(status), 1), "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

#[test]
fn a_violation_of_a_running_vm_names_it_and_gives_the_terminal_back() {
    let host = Host::new();
    let (_ours, theirs) = terminal();
    let before = rustix::termios::tcgetattr(&theirs).unwrap();
    let mut command = host.boot(&host.kernel(&spin()), &["--timeout", "5s"]);
    // The VMM thread's first call after the terminal is raw and everything runs.
    let trap = host_that(libc::SYS_epoll_wait, None, SeccompAction::Trap);
    let session = move || {
        // SAFETY: takes no argument.
        unsafe { libc::setsid() };
        // SAFETY: the request takes an integer.
        if unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } < 0 { -1 } else { trap() }
    };
    let stdin = theirs.as_fd().try_clone_to_owned().unwrap();
    let output = in_child(command.stdin(stdin).stdout(Stdio::null()), session).output().unwrap();
    assert_ends(&output, REFUSED, &["system call epoll_wait (", "of thread microvm:"]);
    let after = rustix::termios::tcgetattr(&theirs).unwrap();
    assert_eq!((after.local_modes, after.input_modes), (before.local_modes, before.input_modes));
}

#[test]
fn a_violation_of_a_vcpu_ends_the_process() {
    const KVM_RUN: u64 = 0xae80;
    let host = Host::new();
    let mut command = host.boot(&host.kernel(&spin()), &["--timeout", "5s"]);
    let trap = host_that(libc::SYS_ioctl, Some((1, KVM_RUN)), SeccompAction::Trap);
    let output = in_child(&mut command, trap).output().unwrap();
    assert_ends(&output, REFUSED, &["system call ioctl (16) of thread vcpu0:"]);
}
