//! Privileges that are given up: new ones, capabilities, and being looked into.

use caps::CapSet;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitiesSecureBits, set_capabilities_secure_bits, set_no_new_privs};

use super::{SandboxError, layer};

/// No program that is run from here on gets more than we have (`no_new_privs`, Linux 3.5).
pub(super) fn forbid_new() -> Result<(), SandboxError> {
    set_no_new_privs(true).map_err(layer("set no_new_privs"))
}

/// Drops every capability, and for root what would give them back.
pub(super) fn drop_capabilities() -> Result<(), SandboxError> {
    let failed = layer("drop its capabilities");
    if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).map_err(&failed)? {
        // User 0 is a user like any other, for good: one call for what the bounding set would take forty for.
        let bits = CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
        set_capabilities_secure_bits(bits).map_err(layer("lock root's privileges away"))?;
    }
    // The permitted set takes the effective one with it.
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Permitted] {
        caps::clear(None, set).map_err(&failed)?;
    }
    Ok(())
}

/// No core dump, and no other process of this user may attach or read our memory, which has the guest's.
pub(super) fn hide_memory() -> Result<(), SandboxError> {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(layer("forbid core dumps"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(layer("hide its memory"))
}
