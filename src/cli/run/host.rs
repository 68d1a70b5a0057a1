//! `microvm run --isolation container|process`: the image on the host's own kernel.

use std::io;

use crate::container::{ContainerError, HostError, HostWishes, Network, run_on_host};
use crate::metrics::{Clock, Timeline, write_timeline};

use super::super::{CliError, say};
use super::{RunArgs, wanted};

pub(super) fn run(args: &RunArgs, name: &str, clock: Clock) -> Result<u8, CliError> {
    let isolation = args.isolation;
    if let Some(flag) = unknown(args) {
        return Err(CliError::Usage(format!(
            "{flag} is for --isolation vm: {isolation} has nothing like it"
        )));
    }
    let timeline = Timeline::new(clock, args.timeline.is_some());
    let wishes = HostWishes {
        isolation,
        memory: args.memory.as_ref().map(|memory| memory.size.0),
        cpus: args.cpus,
        timeout: args.timeout,
        cgroup_parent: args.cgroup_parent.clone(),
    };
    let status = match run_on_host(&wanted(args, name)?, &wishes, &timeline) {
        // It has said why.
        Err(ContainerError::Host(HostError::Runtime { status, .. })) => status,
        result => result?,
    };
    if status == 124 && args.timeout.is_some() {
        say("--timeout passed; the container was killed");
    }
    if let Some(format) = args.timeline {
        // As of a VM's: where nobody reads it, nothing is lost.
        let _ = write_timeline(&timeline, format.into(), &mut io::stderr().lock());
    }
    Ok(status)
}

/// The first flag that is for VMs alone.
fn unknown(args: &RunArgs) -> Option<&'static str> {
    let wants_network = args.network.as_ref().is_some_and(|network| *network != Network::None);
    let flags = [
        ("--detach", args.detach),
        ("--network", wants_network),
        ("--publish", !args.publish.is_empty()),
        ("--volume", !args.volume.is_empty()),
        ("--storage", args.storage.is_some()),
        ("--kernel", args.kernel.is_some()),
        ("--serial", args.serial.is_some()),
        ("--metrics", args.metrics.is_some()),
        ("--allow-software-kvm", args.allow_software_kvm),
    ];
    flags.into_iter().find_map(|(flag, given)| given.then_some(flag))
}
