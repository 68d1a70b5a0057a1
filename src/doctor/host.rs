//! The rest of the host: devices, cgroups, name spaces, confinement, memory.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use crate::sandbox::{Lack, Layers};

use super::Check;

pub(super) fn checks() -> Vec<Check> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    vec![
        device("tun", "/dev/net/tun", "sudo modprobe tun (virtual networks need it)"),
        device("vhost-net", "/dev/vhost-net", "sudo modprobe vhost_net (for --net tap=NAME,vhost=on)"),
        device("vhost-vsock", "/dev/vhost-vsock", "sudo modprobe vhost_vsock (only other VMMs need it)"),
        cgroups(&read("/proc/self/mountinfo")),
        user_namespaces(
            &read("/proc/sys/user/max_user_namespaces"),
            &read("/proc/sys/kernel/unprivileged_userns_clone"),
        ),
        seccomp(Layers::of_host()),
        landlock(Layers::of_host()),
        io_uring(&read("/proc/sys/kernel/io_uring_disabled")),
        transparent_huge_pages(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
        huge_pages(&read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")),
        memory(),
        Check::ok("host kernel", read("/proc/sys/kernel/osrelease").trim()),
    ]
}

fn device(name: &'static str, path: &str, advice: &str) -> Check {
    match OpenOptions::new().read(true).write(true).open(Path::new(path)) {
        Ok(_) => Check::ok(name, format!("{path} can be opened")),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Check::missing(
            name,
            format!("{path} may not be opened"),
            "run as root, or allow your group to open it",
        ),
        Err(_) => Check::missing(name, format!("{path} is not there"), advice),
    }
}

/// Reads a mount table (proc(5), mountinfo): the type stands behind the lone hyphen.
fn cgroups(mounts: &str) -> Check {
    let has = |kind: &str| {
        mounts.lines().any(|l| l.split(" - ").nth(1).is_some_and(|t| t.split(' ').next() == Some(kind)))
    };
    match (has("cgroup2"), has("cgroup")) {
        (true, false) => Check::ok("cgroups", "version 2"),
        (true, true) => Check::missing(
            "cgroups",
            "versions 1 and 2 mixed",
            "boot the host with systemd.unified_cgroup_hierarchy=1",
        ),
        (false, true) => {
            Check::missing("cgroups", "version 1", "boot the host with systemd.unified_cgroup_hierarchy=1")
        }
        (false, false) => {
            Check::missing("cgroups", "not mounted", "sudo mount -t cgroup2 none /sys/fs/cgroup")
        }
    }
}

fn user_namespaces(most: &str, unprivileged: &str) -> Check {
    const NAME: &str = "user namespaces";
    match (most.trim().parse::<u64>(), unprivileged.trim()) {
        (Ok(0), _) => Check::missing(NAME, "none allowed", "sudo sysctl user.max_user_namespaces=15000"),
        (Ok(_), "0") => {
            Check::missing(NAME, "for root only", "sudo sysctl kernel.unprivileged_userns_clone=1")
        }
        (Ok(_), _) => Check::ok(NAME, "allowed"),
        (Err(_), _) => Check::missing(NAME, "not in this kernel", "use a host kernel with CONFIG_USER_NS"),
    }
}

fn landlock(layers: Layers) -> Check {
    let lacks: Vec<_> = layers.lacks().filter(|l| l.what.starts_with("Landlock")).collect();
    landlock_of(layers.landlock_abi(), &lacks)
}

fn landlock_of(abi: u32, lacks: &[Lack]) -> Check {
    match lacks {
        [] => Check::ok("Landlock", format!("ABI {abi}")),
        [_] if abi == 0 => Check::missing(
            "Landlock",
            "not there",
            "boot the host with landlock in its lsm= list (Linux 5.13 or later)",
        ),
        [.., last] => Check::missing(
            "Landlock",
            format!("ABI {abi}: --sandbox strict needs more"),
            format!("use Linux {} or later on the host", last.since),
        ),
    }
}

fn seccomp(layers: Layers) -> Check {
    seccomp_of(layers.lacks().find(|l| !l.what.starts_with("Landlock")))
}

fn seccomp_of(lack: Option<Lack>) -> Check {
    match lack {
        None => Check::ok("seccomp", "filters can be installed"),
        Some(lack) => Check::missing(
            "seccomp",
            format!("{} not there", lack.what),
            format!(
                "microvm confines itself less: use Linux {} or later, with CONFIG_SECCOMP_FILTER",
                lack.since
            ),
        ),
    }
}

fn io_uring(disabled: &str) -> Check {
    match disabled.trim() {
        // The switch came with Linux 6.6.
        "" | "0" => Check::ok("io_uring", "allowed"),
        "1" => Check::missing("io_uring", "for a group only", "sudo sysctl kernel.io_uring_disabled=0"),
        _ => Check::missing("io_uring", "switched off", "sudo sysctl kernel.io_uring_disabled=0"),
    }
}

fn transparent_huge_pages(setting: &str) -> Check {
    let word = setting.split(['[', ']']).nth(1).unwrap_or("not there");
    let advice =
        "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled (guests boot with fewer faults)";
    match word {
        "always" => Check::ok("transparent huge pages", word),
        _ => Check::missing("transparent huge pages", word, advice),
    }
}

fn huge_pages(free: &str) -> Check {
    match free.trim().parse::<u64>() {
        Ok(0) | Err(_) => Check::missing(
            "huge pages",
            "none free",
            "only for --memory hugepages=2M: echo N | sudo tee /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        ),
        Ok(n) => Check::ok("huge pages", format!("{n} of 2 MiB free")),
    }
}

fn memory() -> Check {
    let info = rustix::system::sysinfo();
    let mib = |n: u64| n.saturating_mul(info.mem_unit.into()) >> 20;
    Check::ok("memory", format!("{} MiB, {} MiB free", mib(info.totalram as u64), mib(info.freeram as u64)))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    const LACK: Lack = Lack { what: "Landlock's TCP rules", since: "6.7" };

    #[test]
    fn cgroup_versions_are_told_apart() {
        let v1 = "30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let v2 = "31 24 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        for (mounts, found) in [
            (v1.into(), "version 1"),
            (v2.into(), "version 2"),
            (format!("{v1}{v2}"), "versions 1 and 2 mixed"),
        ] {
            let mounts: String = mounts;
            assert_eq!(cgroups(&mounts).found, found);
        }
        assert_eq!(cgroups("").state, State::Missing);
    }

    #[test]
    fn every_lack_has_advice() {
        let checks = [
            user_namespaces("0\n", ""),
            user_namespaces("100\n", "0\n"),
            user_namespaces("", ""),
            landlock_of(0, &[LACK]),
            landlock_of(3, &[LACK, LACK]),
            seccomp_of(Some(LACK)),
            io_uring("2\n"),
            transparent_huge_pages("always [madvise] never"),
            huge_pages("0\n"),
            device("tun", "/nonexistent", "advice"),
        ];
        for check in checks {
            assert!(check.state == State::Missing && check.advice.is_some(), "{check:?}");
        }
    }

    #[test]
    fn what_is_there_is_ok() {
        for check in [
            user_namespaces("100\n", ""),
            landlock_of(6, &[]),
            seccomp_of(None),
            io_uring(""),
            transparent_huge_pages("[always] madvise"),
            huge_pages("7"),
        ] {
            assert_eq!(check.state, State::Ok, "{check:?}");
        }
    }
}
