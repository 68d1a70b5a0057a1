//! The KVM device and what it can do.

use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use crate::vm::{HostKvm, OpenKvmError};

use super::Check;

/// Modules that serve `/dev/kvm`.
const MODULES: [&str; 3] = ["kvm_intel", "kvm_amd", "kvm_pvm"];

/// What boots without, but is better with: name, capability, what is lost.
const OPTIONAL: [(&str, Cap, &str); 3] = [
    ("TSC-deadline timer", Cap::TscDeadlineTimer, "guests get an i8254 timer, and closing a VM is slower"),
    ("kvmclock control", Cap::KvmclockCtrl, "a paused guest sees a soft lockup when it goes on"),
    ("MSI routing", Cap::IrqRouting, "interrupts cannot be routed anew"),
];

const EMULATED: &str = "run it in an emulated host: scripts/kvm-host -- microvm boot ...";

pub(super) fn checks(device: &Path) -> Vec<Check> {
    let mut checks = vec![module(&|name| Path::new("/sys/module").join(name).exists())];
    match HostKvm::open(device) {
        Ok(host) => {
            checks.push(Check::ok("KVM device", format!("{} can be opened", device.display())));
            checks.push(tier(&host));
            checks.push(limits(host.kvm()));
            checks.extend(OPTIONAL.map(|(name, cap, loss)| {
                if host.kvm().check_extension(cap) {
                    Check::ok(name, "there")
                } else {
                    Check::missing(name, "not there", format!("{loss}; a newer host kernel may have it"))
                }
            }));
        }
        Err(error) => checks.push(unusable(&error)),
    }
    checks
}

fn module(loaded: &dyn Fn(&str) -> bool) -> Check {
    match MODULES.iter().find(|name| loaded(name)) {
        Some(name) => Check::ok("KVM module", *name),
        // Built into the kernel it has no folder, so this alone stops nobody.
        None => Check::missing(
            "KVM module",
            "none is loaded",
            "sudo modprobe kvm_intel (or kvm_amd), unless it is built in",
        ),
    }
}

/// The message of these errors names the device first and ends with what to do.
fn unusable(error: &OpenKvmError) -> Check {
    let text = error.to_string();
    let (found, advice) = text.split_once(": ").unwrap_or((&text, EMULATED));
    Check::fatal("KVM device", found, advice)
}

fn tier(host: &HostKvm) -> Check {
    if host.tier().is_hardware() {
        Check::ok("tier", host.tier().to_string())
    } else {
        let found = "software: guest kernels are interpreted, some 10 million instructions a second";
        Check::fatal("tier", found, EMULATED)
    }
}

fn limits(kvm: &Kvm) -> Check {
    let (cpus, slots) = (kvm.get_max_vcpus(), kvm.get_nr_memslots());
    Check::ok(
        "KVM limits",
        format!("API {}, {cpus} vCPUs and {slots} memory slots a VM", kvm.get_api_version()),
    )
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_module_is_named() {
        assert_eq!(module(&|name| name == "kvm_amd").found, "kvm_amd");
        assert_eq!(module(&|_| false).state, State::Missing);
    }

    #[test]
    fn an_unusable_device_says_what_to_do() {
        for error in [OpenKvmError::Absent("/dev/kvm".into()), OpenKvmError::Denied("/dev/kvm".into())] {
            let check = unusable(&error);
            assert!(check.found.starts_with("/dev/kvm"), "{check:?}");
            assert!(check.advice.is_some_and(|a| a.len() > 20));
        }
    }
}
