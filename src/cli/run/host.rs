//! `microvm run --isolation container|process`: the image on the host's own kernel.

use std::fs;
use std::io;

use crate::config::{NetBackend, NetConfig, Vhost};
use crate::container::{
    Claim, ContainerError, Containers, HostContainer, HostError, HostWishes, Isolation, Life, Network,
    Wanted, make_storage, record_end,
};
use crate::metrics::{Clock, Timeline, write_timeline};
use crate::sys::daemon::{Detached, Ready, detach};

use super::super::{CliError, say};
use super::{RunArgs, announce, record};

pub(super) fn run(args: &RunArgs, id: &str, wanted: &Wanted, clock: Clock) -> Result<u8, CliError> {
    refuse(args)?;
    let host = HostContainer::of(wanted, args.isolation)?;
    let claim = Containers::of_user()?.add(&record(args, id, wanted, &host.program))?;
    let ready = match args.detach.then(detach).transpose()? {
        Some(Detached::Parent(waiting)) => {
            // The other process has them: here they would keep an ended container from being seen as one.
            drop((host, claim));
            return announce(waiting, id);
        }
        Some(Detached::Child(ready)) => Some(ready),
        None => None,
    };
    let timeline = Timeline::new(clock, args.timeline.is_some());
    let status = run_here(args, host, wanted, claim, ready, &timeline)?;
    if status == 124 && args.timeout.is_some() {
        say("--timeout passed; the container was killed");
    }
    if let Some(format) = args.timeline {
        // As of a VM's: where nobody reads it, nothing is lost.
        let _ = write_timeline(&timeline, format.into(), &mut io::stderr().lock());
    }
    Ok(status)
}

/// Runs it in this process, and writes down how it ended.
fn run_here(
    args: &RunArgs,
    host: HostContainer,
    wanted: &Wanted,
    claim: Claim,
    ready: Option<Ready>,
    timeline: &Timeline,
) -> Result<u8, CliError> {
    let Claim { folder, lock, end, log, leavings } = claim;
    let wishes = HostWishes {
        isolation: args.isolation,
        memory: args.memory.as_ref().map(|memory| memory.size.0),
        cpus: args.cpus,
        timeout: args.timeout,
        cgroup_parent: args.cgroup_parent.clone(),
    };
    let is_detached = ready.is_some();
    let made = args.storage.map_or(Ok(()), |size| make_storage(&folder, size).map(drop));
    let run = made.and_then(|()| {
        let mut volumes = wanted.volumes.iter().enumerate();
        volumes.try_for_each(|(number, volume)| volume.make(number, &folder))?;
        host.run(wanted, &wishes, Life { lock, log, ready }, timeline)
    });
    let status = match run {
        Ok(status) => status,
        Err(ContainerError::Host(HostError::Runtime { message, status })) => {
            // Else the runtime has said it here.
            if is_detached {
                say(&message);
            }
            status
        }
        Err(e) => {
            // What never ran is no container.
            let _ = fs::remove_dir_all(folder);
            return Err(e.into());
        }
    };
    if args.rm {
        leavings.remove();
        // What its volumes have.
        if let Err(e) = Containers::of_user().and_then(|all| all.clean()) {
            log::warn!("something of the container is left: {}", super::super::chain(&e));
        }
    } else if let Err(e) = record_end(&end, status) {
        log::warn!("how the container ended cannot be written down: {e}");
    }
    Ok(status)
}

/// Refuses flags that mean nothing here: which, and why.
fn refuse(args: &RunArgs) -> Result<(), CliError> {
    let isolation = args.isolation;
    let refused = |flag: &str, why: &str| Err(CliError::Usage(format!("{flag}: {why}")));
    let of_vm = [
        ("--kernel", args.kernel.is_some()),
        ("--serial", args.serial.is_some()),
        ("--metrics", args.metrics.is_some()),
        ("--allow-software-kvm", args.allow_software_kvm),
    ];
    if let Some((flag, _)) = of_vm.into_iter().find(|(_, given)| *given) {
        return refused(
            flag,
            &format!("--isolation {isolation} runs on the host's own kernel, without a VM"),
        );
    }
    if let Some(volume) = args.volume.iter().find(|volume| volume.has_owner()) {
        let why = format!("uid= and gid= are for a VM: with --isolation {isolation} owners are the host's");
        return refused(&format!("--volume {volume}"), &why);
    }
    let card = match &args.network {
        Some(Network::Card(card)) => Some(card),
        _ => None,
    };
    if isolation == Isolation::Process {
        let own =
            "--isolation process has the host's own network: leave the flag out, or use another isolation";
        return match card {
            Some(_) => refused("--network", own),
            None if !args.publish.is_empty() => refused("--publish", own),
            None => Ok(()),
        };
    }
    match card {
        Some(card) if matches!(card.backend, NetBackend::Tap(_)) => {
            refused("--network tap", "it is a VM's: --isolation container has user and none")
        }
        Some(NetConfig { vhost, iops, bandwidth, .. })
            if *vhost != Vhost::Off || iops.is_some() || bandwidth.is_some() =>
        {
            refused(
                "--network",
                "vhost, iops and bandwidth are of a VM's card, which --isolation container has not: leave them out",
            )
        }
        _ => Ok(()),
    }
}
