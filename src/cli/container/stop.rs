//! `microvm stop` and `microvm kill`.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use clap::Args;

use crate::container::{
    Agent, Container, ContainerError, Containers, HostProcess, Isolation, State, parse_signal,
};
use crate::control::{self, Client, wait_for_end};
use crate::guest::wire::{MAIN_SESSION, Request};

use super::super::{CliError, boot::parse_timeout};
use super::for_each;

const STOP_HELP: &str = "The program is sent the image's StopSignal, else SIGTERM. A VM that still runs then is closed, and its exit status
is 137.

Exit status:
  0  all have ended
  1  one is not there, or cannot be stopped
  2  wrong usage

Examples:
  microvm stop web db
  microvm stop --time 1m db";

/// Flags of `microvm stop`.
#[derive(Args)]
#[command(after_help = STOP_HELP)]
pub struct StopArgs {
    /// How long the program has to end, as 10s or 1m
    #[arg(short, long, value_name = "DURATION", default_value = "10s", value_parser = parse_seconds)]
    time: Duration,
    /// Containers: a name, an id or the first digits of it
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

const KILL_HELP: &str = "With KILL the VM ends, whatever its guest does.

Exit status:
  0  all were sent the signal
  1  one is not there, does not run or does not answer
  2  wrong usage

Examples:
  microvm kill web
  microvm kill --signal HUP web";

/// Flags of `microvm kill`.
#[derive(Args)]
#[command(after_help = KILL_HELP)]
pub struct KillArgs {
    /// The signal, by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = parse_signal)]
    signal: u8,
    /// Containers: a name, an id or the first digits of it
    #[arg(required = true, value_name = "CONTAINER")]
    containers: Vec<String>,
}

/// How long a VM's process has, once its VM is closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
const KILL: u8 = libc::SIGKILL as u8;

/// As Docker, a number alone is seconds.
fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse().map(Duration::from_secs).or_else(|_| parse_timeout(text))
}

pub fn run_stop(args: &StopArgs) -> Result<u8, CliError> {
    let all = Containers::of_user()?;
    Ok(for_each(&args.containers, |name| {
        let container = all.find(name)?;
        if stop(&container, args.time)? {
            writeln!(io::stdout(), "{name}")?;
        }
        Ok(())
    }))
}

/// Stops it. `false`: it had ended.
pub fn stop(container: &Container, time: Duration) -> Result<bool, CliError> {
    if container.record.isolation != Isolation::Vm {
        return stop_on_host(container, time);
    }
    let Some(vm) = connect(container)? else { return Ok(false) };
    let process = vm.process();
    let asked = signal(container, container.record.stop_signal);
    let ended = asked.is_ok() && process.as_ref().is_some_and(|process| wait_for_end(process, time));
    if !ended {
        close(container)?;
    }
    container.wait().map(drop).or_else(unless_gone)?;
    Ok(true)
}

/// The same, of one that has no VM.
fn stop_on_host(container: &Container, time: Duration) -> Result<bool, CliError> {
    let Some(host) = HostProcess::of(container)? else { return Ok(false) };
    host.signal(container.record.stop_signal)?;
    if !wait_for_end(&host.process, time) {
        close(container)?;
    }
    container.wait().map(drop).or_else(unless_gone)?;
    Ok(true)
}

pub fn run_kill(args: &KillArgs) -> Result<u8, CliError> {
    let all = Containers::of_user()?;
    Ok(for_each(&args.containers, |name| {
        let container = all.find(name)?;
        if args.signal == KILL {
            if !close(&container)? {
                return Err(ContainerError::NotRunning(container.record.name.clone()).into());
            }
        } else {
            signal(&container, args.signal)?;
        }
        writeln!(io::stdout(), "{name}")?;
        Ok(())
    }))
}

/// Sends its program a signal.
fn signal(container: &Container, signal: u8) -> Result<(), ContainerError> {
    if container.record.isolation != Isolation::Vm {
        let not_running = || ContainerError::NotRunning(container.record.name.clone());
        return HostProcess::of(container)?.ok_or_else(not_running)?.signal(signal);
    }
    let mut agent = Agent::connect(container)?;
    match agent.ask(&Request::Signal { session: MAIN_SESSION, signal }) {
        // It ended by that, before the answer was on its way.
        Err(_) if !matches!(container.state(), Ok(State::Running(_))) => Ok(()),
        asked => asked,
    }
}

/// Closes the VM, or kills what there is instead, and waits for its process. `false`: it had ended.
pub fn close(container: &Container) -> Result<bool, CliError> {
    if container.record.isolation != Isolation::Vm {
        let Some(host) = HostProcess::of(container)? else { return Ok(false) };
        host.signal(KILL)?;
        return wait_for_close(container, Some(&host.process)).map(|()| true);
    }
    let Some(vm) = connect(container)? else { return Ok(false) };
    let process = vm.process();
    let body = serde_json::json!({ "state": "stopped" });
    match vm.ask("PUT", "/vm/state", Some(&body), "application/json") {
        // It may have ended by itself just now.
        Err(_) if matches!(container.state(), Ok(State::Ended(_)) | Err(ContainerError::NotFound(_))) => {}
        answer => drop(answer?),
    }
    wait_for_close(container, process.as_ref()).map(|()| true)
}

fn wait_for_close(container: &Container, process: Option<&OwnedFd>) -> Result<(), CliError> {
    if process.is_some_and(|process| !wait_for_end(process, CLOSE_LIMIT)) {
        let name = &container.record.name;
        return Err(CliError::Usage(format!("container {name} has stopped, but its process is still there")));
    }
    Ok(())
}

/// `None`: it has ended.
fn connect(container: &Container) -> Result<Option<Client>, CliError> {
    let name = &container.record.name;
    match container.state() {
        Ok(State::Running(_)) => {}
        Ok(State::Ended(_)) | Err(ContainerError::NotFound(_)) => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    match Client::connect(name, control::socket_path(name)?) {
        Err(_) if !matches!(container.state(), Ok(State::Running(_))) => Ok(None),
        client => Ok(Some(client?)),
    }
}

/// One that goes with its end is gone when it has ended.
fn unless_gone(error: ContainerError) -> Result<(), ContainerError> {
    if matches!(error, ContainerError::NotFound(_)) { Ok(()) } else { Err(error) }
}
