//! The thread of a vCPU, and how to get it out of the guest.
//!
//! A command is first put into the channel, then `immediate_exit` is set, then the signal sent. Whichever of the
//! three the thread meets first, it looks into the channel afterwards: no wake-up is lost, and nobody polls.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Action;
use crate::metrics::Timeline;
use crate::sandbox::{Confined, SandboxError, ThreadKind};
use crate::sys::signals;

use super::run_page::RunPage;
use super::{Fault, Outcome, Vcpu};

/// Something that concerns the whole VM happened on a vCPU; the vCPU waits for a command.
#[derive(Debug)]
pub enum VcpuEvent {
    /// A device asks for this.
    Device(Action),
    /// The vCPU cannot go on.
    Fault(Fault),
    /// The vCPU is parked, as [`VcpuThread::pause`] with this number asked.
    Parked(u64),
}

/// The default of 2 MiB is what a huge page fits: a thread that touches one page of it would take all.
const STACK: usize = 256 << 10;

enum Command {
    Run,
    Pause(u64),
    Stop,
}

/// A vCPU's thread.
pub struct VcpuThread {
    commands: Sender<Command>,
    page: Arc<RunPage>,
    gone: Receiver<Infallible>,
    thread: JoinHandle<Option<()>>,
}

/// Where vCPU threads report to.
#[derive(Clone)]
pub struct Reports {
    /// What happened.
    pub events: Sender<VcpuEvent>,
    /// Wakes the event loop.
    pub wake: Arc<EventFd>,
    /// Takes the guest's marks.
    pub timeline: Arc<Timeline>,
}

/// A signal that does nothing but interrupt `KVM_RUN`. Once per process, before the first kick.
///
/// # Errors
/// The system refuses the handler.
pub fn install_kick_handler() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).map_err(Into::into)
}

impl VcpuThread {
    /// Starts a confined thread for `vcpu`. The guest does not run before [`VcpuThread::resume`].
    ///
    /// # Errors
    /// No thread can be had, or it cannot be confined.
    pub fn start(vcpu: Vcpu, reports: Reports, confined: Confined) -> Result<Self, SandboxError> {
        let (commands, receiver) = mpsc::channel();
        let page = vcpu.page.clone();
        let (alive, gone) = mpsc::channel();
        let name = format!("vcpu{}", vcpu.index);
        let thread = confined.spawn(ThreadKind::Vcpu, name, STACK, move || {
            // A parent may have left it blocked, and then no kick would get through.
            signals::unblock(SIGRTMIN());
            run(vcpu, &receiver, &reports);
            drop(alive);
        })?;
        Ok(Self { commands, page, gone, thread })
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        self.send(Command::Run);
    }

    /// Asks the thread to park, out of the guest and of any device, with no port or memory access half done. It says
    /// so with [`VcpuEvent::Parked`] of the same `number`, which tells it from the answer to an earlier pause.
    pub fn pause(&self, number: u64) {
        self.send(Command::Pause(number));
    }

    /// Asks the thread to end. It does so once it is out of the guest and of any device.
    pub fn stop(&self) {
        self.send(Command::Stop);
    }

    /// Waits until the thread has ended, but not after `deadline`; says whether it has.
    #[must_use]
    pub fn join(self, deadline: Instant) -> bool {
        // Threads have no join with a limit. Nothing is ever sent here: the sender goes away with the vCPU.
        let limit = deadline.saturating_duration_since(Instant::now());
        let gone = self.gone.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected);
        gone && self.thread.join().is_ok()
    }

    fn send(&self, command: Command) {
        // A thread that has ended already needs no command.
        if self.commands.send(command).is_ok() {
            self.page.set_immediate_exit(true);
            let _ = self.thread.kill(SIGRTMIN());
        }
    }
}

/// Clears `immediate_exit`, then looks into the channel, then runs: a command that comes after the look sets it again.
fn run(mut vcpu: Vcpu, commands: &Receiver<Command>, reports: &Reports) {
    let mut running = false;
    loop {
        vcpu.page.set_immediate_exit(false);
        let command = match running {
            true => commands.try_recv(),
            false => commands.recv().map_err(|_| TryRecvError::Disconnected),
        };
        match command {
            Ok(Command::Run) => running = true,
            Ok(Command::Pause(number)) => {
                running = false;
                park(&mut vcpu, reports);
                report(reports, VcpuEvent::Parked(number));
            }
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => running = run_until_interrupted(&mut vcpu, reports),
        }
    }
}

/// Runs the guest. `true`: something interrupted it. `false`: it waits for the VM's answer to an event.
fn run_until_interrupted(vcpu: &mut Vcpu, reports: &Reports) -> bool {
    loop {
        match vcpu.run_once() {
            Outcome::Continue => {}
            Outcome::Interrupted => return true,
            outcome => {
                if let Some(event) = event_of(outcome, reports) {
                    report(reports, event);
                    return false;
                }
            }
        }
    }
}

/// Makes the vCPU's state complete. KVM finishes the access of the last exit (the value of an `in`, the RIP behind an
/// `out`, the second half of a write over two pages) only when it is entered again; with `immediate_exit` it does that
/// and runs no instruction of the guest.
fn park(vcpu: &mut Vcpu, reports: &Reports) {
    vcpu.page.set_immediate_exit(true);
    loop {
        match vcpu.run_once() {
            // The other half of an access.
            Outcome::Continue => {}
            Outcome::Interrupted => break,
            outcome => {
                let faulted = matches!(outcome, Outcome::Fault(_));
                if let Some(event) = event_of(outcome, reports) {
                    report(reports, event);
                }
                if faulted {
                    break;
                }
            }
        }
    }
    vcpu.tell_guest_of_pause();
}

/// What an outcome means for the whole VM.
fn event_of(outcome: Outcome, reports: &Reports) -> Option<VcpuEvent> {
    match outcome {
        Outcome::Continue | Outcome::Interrupted => None,
        Outcome::Device(Action::Mark(byte)) => {
            reports.timeline.guest_mark(byte);
            None
        }
        Outcome::Device(action) => Some(VcpuEvent::Device(action)),
        Outcome::Fault(fault) => Some(VcpuEvent::Fault(fault)),
    }
}

fn report(reports: &Reports, event: VcpuEvent) {
    // Nobody listens any more when the VM is being closed.
    if reports.events.send(event).is_ok() {
        let _ = reports.wake.write(1);
    }
}
