//! The runtime's `config.json` (OCI runtime specification 1.0): a container as Docker makes it.

use serde_json::{Value, json};

use crate::guest::ProcessSpec;
use crate::guest::users::User;

/// What Docker leaves to root in a container.
pub const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Those that a container gets. Its devices are what a control group lets it have; where there is none, it makes none.
#[must_use]
pub fn capabilities(has_cgroup: bool) -> Vec<&'static str> {
    CAPABILITIES.into_iter().filter(|name| has_cgroup || *name != "CAP_MKNOD").collect()
}

/// What Docker hides, as it tells of the host.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// What changes the host.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// One processor for 100 ms in each 100 ms, in microseconds.
pub const CPU_PERIOD: u64 = 100_000;

/// What the host lays over a file or folder of the container's.
pub struct Bind {
    /// On the host.
    pub source: String,
    /// In the container.
    pub target: String,
    /// How it is mounted besides (mount(8)).
    pub options: &'static [&'static str],
}

/// What a container is to be.
pub struct Bundle<'a> {
    /// The program.
    pub process: &'a ProcessSpec,
    /// Who runs it.
    pub user: &'a User,
    /// The host's name in it.
    pub hostname: &'a str,
    /// Its root folder, on the host.
    pub root: String,
    /// Nothing can be written to the root file system.
    pub read_only: bool,
    /// Files and folders of the host's in it, in this order.
    pub binds: Vec<Bind>,
    /// Where its network name space is; one without a network where there is none.
    pub network: Option<String>,
    /// `/run` is a tmpfs: the image has nothing there.
    pub run: bool,
    /// Its control group, from the root of the hierarchy; none where the host has no cgroup 2.
    pub cgroup: Option<String>,
    /// Most memory, in bytes.
    pub memory: Option<u64>,
    /// Most processors.
    pub cpus: Option<u32>,
    /// The system calls that it may make (`linux.seccomp`).
    pub seccomp: Option<Value>,
}

impl Bundle<'_> {
    /// The text of `config.json`.
    #[must_use]
    pub fn to_config(&self) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "root": { "path": self.root, "readonly": self.read_only },
            "hostname": self.hostname,
            "process": process(self.process, self.user, self.cgroup.is_some()),
            "mounts": self.mounts(),
            "linux": self.linux(),
        })
    }

    fn mounts(&self) -> Vec<Value> {
        let mount = |kind: &str, target: &str, options: &str| {
            let options: Vec<_> = options.split(',').collect();
            json!({ "type": kind, "source": kind, "destination": target, "options": options })
        };
        let mut mounts = vec![
            mount("proc", "/proc", "nosuid,noexec,nodev"),
            mount("tmpfs", "/dev", "nosuid,strictatime,mode=755,size=65536k"),
            mount("devpts", "/dev/pts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
            mount("tmpfs", "/dev/shm", "nosuid,noexec,nodev,mode=1777,size=65536k"),
            mount("mqueue", "/dev/mqueue", "nosuid,noexec,nodev"),
            mount("sysfs", "/sys", "nosuid,noexec,nodev,ro"),
        ];
        if self.cgroup.is_some() {
            mounts.push(mount("cgroup", "/sys/fs/cgroup", "nosuid,noexec,nodev,relatime,ro"));
        }
        if self.run {
            mounts.push(mount("tmpfs", "/run", "nosuid,nodev,mode=755"));
        }
        let bind = |bind: &Bind| {
            let options = [&["bind", "rprivate"], bind.options].concat();
            json!({ "type": "bind", "source": bind.source, "destination": bind.target,
                    "options": options })
        };
        mounts.extend(self.binds.iter().map(bind));
        mounts
    }

    fn linux(&self) -> Value {
        let mut namespaces = vec!["pid", "mount", "uts", "ipc", "network"];
        let mut linux = json!({ "maskedPaths": MASKED, "readonlyPaths": READ_ONLY });
        if let Some(cgroup) = &self.cgroup {
            namespaces.push("cgroup");
            linux["cgroupsPath"] = json!(cgroup);
            let mut resources = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
            if let Some(bytes) = self.memory {
                resources["memory"] = json!({ "limit": bytes });
            }
            if let Some(cpus) = self.cpus {
                resources["cpu"] = json!({ "quota": u64::from(cpus) * CPU_PERIOD, "period": CPU_PERIOD });
            }
            linux["resources"] = resources;
        }
        let namespace = |kind: &&str| match (*kind, &self.network) {
            ("network", Some(path)) => json!({ "type": kind, "path": path }),
            _ => json!({ "type": kind }),
        };
        if let Some(seccomp) = &self.seccomp {
            linux["seccomp"] = seccomp.clone();
        }
        linux["namespaces"] = namespaces.iter().map(namespace).collect();
        linux
    }
}

/// A program as the runtime takes it, in `config.json` or alone, in a container that has a control group or none.
#[must_use]
pub fn process(spec: &ProcessSpec, user: &User, has_cgroup: bool) -> Value {
    let capabilities = capabilities(has_cgroup);
    let mut env = vec![format!("HOME={}", user.home)];
    // The image may say another one.
    spec.env.iter().for_each(|word| super::super::set_variable(&mut env, word));
    let mut process = json!({
        "terminal": spec.terminal,
        "args": spec.args,
        "env": env,
        "cwd": spec.cwd,
        "user": {
            "uid": user.uid,
            "gid": user.gid,
            "additionalGids": user.groups,
        },
        "capabilities": {
            "bounding": capabilities,
            "effective": capabilities,
            "permitted": capabilities,
        },
        "noNewPrivileges": false,
    });
    if let Some(size) = spec.size {
        process["consoleSize"] = json!({ "height": size.rows, "width": size.columns });
    }
    process
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::TerminalSize;

    fn config(change: impl FnOnce(&mut Bundle<'_>, &mut ProcessSpec)) -> Value {
        let process: ProcessSpec =
            serde_json::from_str(r#"{"args": ["sh", "-c", "x"], "env": ["A=1"], "cwd": "/srv"}"#).unwrap();
        let user = User { uid: 33, gid: 34, groups: vec![4], home: "/www".into() };
        let mut bundle = Bundle {
            process: &process,
            user: &user,
            hostname: "box",
            root: "/work/root".into(),
            read_only: false,
            binds: vec![Bind { source: "/work/hosts".into(), target: "/etc/hosts".into(), options: &[] }],
            network: None,
            run: true,
            cgroup: Some("/microvm/x".into()),
            memory: None,
            cpus: None,
            seccomp: None,
        };
        let mut changed = process.clone();
        change(&mut bundle, &mut changed);
        Bundle { process: &changed, ..bundle }.to_config()
    }

    fn kinds(config: &Value) -> Vec<&str> {
        let namespaces = config["linux"]["namespaces"].as_array().unwrap();
        namespaces.iter().map(|n| n["type"].as_str().unwrap()).collect()
    }

    #[test]
    fn the_program_is_the_plans() {
        let config = config(|_, process| process.env.push("HOME=/own".into()));
        let process = &config["process"];
        assert_eq!(process["args"], json!(["sh", "-c", "x"]));
        assert_eq!(process["env"], json!(["A=1", "HOME=/own"]));
        assert_eq!(process["user"], json!({ "uid": 33, "gid": 34, "additionalGids": [4] }));
        assert_eq!((&process["cwd"], &process["terminal"]), (&json!("/srv"), &json!(false)));
        assert_eq!(config["hostname"], "box");
    }

    #[test]
    fn without_a_control_group_no_device_is_made() {
        let has = |config: &Value, set: &str| {
            config["process"]["capabilities"][set].as_array().unwrap().contains(&json!("CAP_MKNOD"))
        };
        let (with, without) = (config(|_, _| ()), config(|bundle, _| bundle.cgroup = None));
        for set in ["bounding", "effective", "permitted"] {
            assert!(has(&with, set) && !has(&without, set), "{set}");
        }
    }

    #[test]
    fn limits_are_the_control_groups() {
        let limited = config(|bundle, _| (bundle.memory, bundle.cpus) = (Some(64 << 20), Some(2)));
        let resources = &limited["linux"]["resources"];
        assert_eq!(resources["memory"]["limit"], 64 << 20);
        assert_eq!(resources["cpu"], json!({ "quota": 200_000, "period": 100_000 }));
        assert!(kinds(&limited).contains(&"cgroup"));
        let none = config(|bundle, _| bundle.cgroup = None);
        assert!(none["linux"]["resources"].is_null() && none["linux"]["cgroupsPath"].is_null());
        assert_eq!(kinds(&none), ["pid", "mount", "uts", "ipc", "network"]);
    }

    #[test]
    fn mounts_are_dockers_and_the_containers_files() {
        let has = |config: &Value, target: &str| {
            config["mounts"].as_array().unwrap().iter().any(|mount| mount["destination"] == target)
        };
        let own = config(|bundle, _| bundle.run = false);
        assert!(has(&own, "/proc") && has(&own, "/etc/hosts") && !has(&own, "/run"));
        assert!(has(&config(|_, _| ()), "/run"));
        let volume = || Bind { source: "/src".into(), target: "/data".into(), options: &["nodev", "ro"] };
        let with_volume = config(|bundle, _| bundle.binds.push(volume()));
        let last = with_volume["mounts"].as_array().unwrap().last().unwrap();
        assert_eq!(last["options"], json!(["bind", "rprivate", "nodev", "ro"]));
        let read_only = config(|bundle, _| bundle.read_only = true);
        assert_eq!(read_only["root"], json!({ "path": "/work/root", "readonly": true }));
    }

    #[test]
    fn a_network_is_a_name_space_that_is_there() {
        let has = |config: &Value, expected: Value| {
            config["linux"]["namespaces"].as_array().unwrap().contains(&expected)
        };
        assert!(has(&config(|_, _| ()), json!({ "type": "network" })));
        let connected = config(|bundle, _| bundle.network = Some("/work/network".into()));
        assert!(has(&connected, json!({ "type": "network", "path": "/work/network" })));
    }

    #[test]
    fn a_profile_is_passed_on() {
        assert!(config(|_, _| ())["linux"]["seccomp"].is_null());
        let profile = json!({ "defaultAction": "SCMP_ACT_ERRNO" });
        let config = config(|bundle, _| bundle.seccomp = Some(profile.clone()));
        assert_eq!(config["linux"]["seccomp"], profile);
    }

    #[test]
    fn a_terminal_has_its_size() {
        let config = config(|_, process| {
            (process.terminal, process.size) = (true, Some(TerminalSize { columns: 80, rows: 24 }));
        });
        assert_eq!(config["process"]["consoleSize"], json!({ "height": 24, "width": 80 }));
        assert_eq!(config["process"]["terminal"], true);
    }
}
