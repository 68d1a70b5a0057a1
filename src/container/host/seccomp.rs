//! The system calls that an ordinary container may make: the profile that distributions install for podman
//! (`containers/common`, `pkg/seccomp`), which is Docker's with some more calls, in the words of the OCI runtime specification (`linux.seccomp`).

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Where it is installed (Debian: golang-github-containers-common), what its administrator has changed first.
const PLACES: [&str; 2] = ["/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json"];

/// This machine's architecture as rules have it, and as `archMap` has it.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: (&str, &str) = ("amd64", "SCMP_ARCH_X86_64");
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: (&str, &str) = ("arm64", "SCMP_ARCH_AARCH64");

/// What is read of a profile. What is not known of it is an error: half a profile is none.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    /// The number's name.
    #[serde(rename = "defaultErrno")]
    _default_errno: Option<String>,
    #[serde(default)]
    arch_map: Vec<Architecture>,
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Architecture {
    architecture: String,
    sub_architectures: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    names: Vec<String>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(rename = "errno")]
    _errno: Option<String>,
    args: Option<Vec<Value>>,
    #[serde(rename = "comment")]
    _comment: Option<String>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
}

/// When a rule holds.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Condition {
    #[serde(default)]
    arches: Vec<String>,
    #[serde(default)]
    caps: Vec<String>,
    min_kernel: Option<String>,
}

/// The profile that is installed, for a program with these capabilities, and where it is. `None`: there is none.
pub fn installed(capabilities: &[&str]) -> Option<(&'static str, Value)> {
    let path = PLACES.into_iter().find(|path| Path::new(path).exists())?;
    let text = fs::read(path).map_err(|e| e.to_string());
    let profile = text.and_then(|text| serde_json::from_slice::<Profile>(&text).map_err(|e| e.to_string()));
    match profile {
        Ok(profile) => Some((path, profile.to_oci(capabilities))),
        Err(e) => {
            log::warn!("the container has no seccomp profile: {path}: {e}");
            None
        }
    }
}

impl Profile {
    fn to_oci(&self, capabilities: &[&str]) -> Value {
        let has: HashSet<_> = capabilities.iter().copied().collect();
        let rules = self.syscalls.iter().filter(|rule| rule.holds(&has)).map(Rule::to_oci);
        let mut profile = json!({
            "defaultAction": self.default_action,
            "architectures": self.architectures(),
            "syscalls": rules.collect::<Vec<_>>(),
        });
        if let Some(errno) = self.default_errno_ret {
            profile["defaultErrnoRet"] = errno.into();
        }
        profile
    }

    /// This machine's, with those whose programs it runs, too.
    fn architectures(&self) -> Vec<&str> {
        let own = self.arch_map.iter().filter(|map| map.architecture == ARCHITECTURE.1);
        let others = own.flat_map(|map| map.sub_architectures.iter().flatten().map(String::as_str));
        std::iter::once(ARCHITECTURE.1).chain(others).collect()
    }
}

impl Rule {
    /// As Docker reads them: all capabilities of `includes` must be there, and none of `excludes`.
    fn holds(&self, has: &HashSet<&str>) -> bool {
        let is_here = |arches: &[String]| arches.iter().any(|arch| arch == ARCHITECTURE.0);
        let (wanted, unwanted) = (&self.includes, &self.excludes);
        // Every kernel that containers are run on by this program is newer (openat2, Linux 5.6) than any that is asked for.
        let is_new = unwanted.min_kernel.is_none();
        is_new
            && (wanted.arches.is_empty() || is_here(&wanted.arches))
            && !is_here(&unwanted.arches)
            && wanted.caps.iter().all(|cap| has.contains(cap.as_str()))
            && !unwanted.caps.iter().any(|cap| has.contains(cap.as_str()))
    }

    fn to_oci(&self) -> Value {
        let mut rule = Map::new();
        rule.insert("names".into(), json!(self.names));
        rule.insert("action".into(), json!(self.action));
        if let Some(errno) = self.errno_ret {
            rule.insert("errnoRet".into(), json!(errno));
        }
        if let Some(args) = self.args.as_ref().filter(|args| !args.is_empty()) {
            rule.insert("args".into(), json!(args));
        }
        rule.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROFILE: &str = r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "defaultErrno": "ENOSYS",
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
                    {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}],
        "syscalls": [
            {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW", "args": [], "comment": "", "includes": {}, "excludes": {}},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]},
            {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
            {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "errno": "EPERM",
             "excludes": {"caps": ["CAP_SYS_CHROOT"]}},
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["s390_pci_mmio_read"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390"]}},
            {"names": ["sync_file_range2"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["amd64", "arm64"]}},
            {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}}
        ]
    }"#;

    #[test]
    fn rules_are_those_of_the_capabilities_and_the_machine() {
        let profile: Profile = serde_json::from_str(PROFILE).unwrap();
        let oci = profile.to_oci(&["CAP_SYS_CHROOT", "CAP_CHOWN"]);
        assert_eq!((&oci["defaultAction"], &oci["defaultErrnoRet"]), (&json!("SCMP_ACT_ERRNO"), &json!(38)));
        assert_eq!(oci["architectures"].as_array().unwrap().len(), 2);
        let allowed = json!({ "names": ["read", "write"], "action": "SCMP_ACT_ALLOW" });
        let with_args = json!([{ "index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ" }]);
        let expected = json!([
            allowed,
            { "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": with_args },
            { "names": ["chroot"], "action": "SCMP_ACT_ALLOW" },
            { "names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 },
            { "names": ["ptrace"], "action": "SCMP_ACT_ALLOW" },
        ]);
        assert_eq!(oci["syscalls"], expected);
    }

    #[test]
    fn what_is_not_known_of_a_profile_is_an_error() {
        let text = PROFILE.replace("\"caps\"", "\"maxKernel\"");
        assert!(serde_json::from_str::<Profile>(&text).is_err());
    }

    #[test]
    fn the_installed_one_is_read() {
        let Some((path, profile)) = installed(&["CAP_SYS_CHROOT"]) else {
            return eprintln!("no profile is installed here: not tested");
        };
        let rules = profile["syscalls"].as_array().unwrap();
        let allows = |name: &str| {
            rules.iter().any(|rule| {
                rule["action"] == "SCMP_ACT_ALLOW" && rule["names"].as_array().unwrap().contains(&json!(name))
            })
        };
        assert!(allows("read") && allows("chroot") && !allows("bpf") && !allows("kexec_load"), "{path}");
    }
}
