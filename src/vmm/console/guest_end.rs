//! The guest's end of a console: COM1 or hvc0, made before there is a place for what it prints.

use std::io;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout::{SERIAL_GSI, SERIAL_LEN, SERIAL_PORT};
use crate::bus::Bus;
use crate::devices::DeviceControl;
use crate::devices::legacy::{ConsoleOutput, SerialInput, serial_port};
use crate::devices::virtio::console::{Console as VirtioConsole, ConsoleCounters, ConsolePort};
use crate::metrics::{Counter, Metric, Registry};
use crate::sandbox::Kept;
use crate::sys::event::new_event;
use crate::vm::Vm;

use super::ConsoleError;

/// The serial port's name in the list of devices.
const SERIAL_ID: &str = "com1";
const SERIAL_OUTPUT: Metric = Metric::counter(
    "microvm_serial_output_bytes_total",
    "Bytes that the guest has printed on the serial port.",
);
const SERIAL_INPUT: Metric =
    Metric::counter("microvm_serial_input_bytes_total", "Bytes that the guest was sent on the serial port.");
const CONSOLE_OUTPUT: Metric = Metric::counter(
    "microvm_console_output_bytes_total",
    "Bytes that the guest has printed on the virtio console.",
);
const CONSOLE_INPUT: Metric = Metric::counter(
    "microvm_console_input_bytes_total",
    "Bytes that the guest was sent on the virtio console.",
);
const CONSOLE_DROPPED: Metric = Metric::counter(
    "microvm_console_dropped_bytes_total",
    "Bytes that the guest has printed on the virtio console while nobody read it.",
);

/// What the guest prints, and the way in for what it is sent.
pub(in crate::vmm) struct GuestEnd {
    /// The flag that says where it goes.
    pub flag: &'static str,
    pub output: Arc<ConsoleOutput>,
    pub port: Port,
    pub received: Counter,
    /// Signalled when the guest has taken all its input.
    pub drained: Arc<EventFd>,
}

/// Where the guest takes its input from.
pub(in crate::vmm) enum Port {
    Serial(SerialInput),
    Virtio(ConsolePort),
}

impl Port {
    /// Gives the guest as much of `bytes` as there is room for, and says how much that was.
    pub fn send(&self, bytes: &[u8]) -> usize {
        match self {
            Self::Serial(input) => input.send(bytes),
            Self::Virtio(port) => port.send(bytes),
        }
    }
}

impl GuestEnd {
    /// Puts COM1 on the bus, and its descriptors on the list of those that stay open.
    ///
    /// # Errors
    /// A descriptor or its interrupt is missing, or its ports are taken.
    pub fn serial(
        vm: &Vm,
        ports: &mut Bus,
        metrics: &Registry,
        kept: &mut Kept,
    ) -> Result<Self, ConsoleError> {
        let counters = metrics.group(&[("device", SERIAL_ID)]);
        let output = Arc::new(ConsoleOutput::new(counters.counter(SERIAL_OUTPUT)));
        let drained = Arc::new(new_event()?);
        let interrupt = vm.irqfd(SERIAL_GSI)?;
        kept.add("the serial port's interrupt", &interrupt);
        let (device, input) = serial_port(interrupt, output.clone(), drained.clone());
        ports.insert("COM1", SERIAL_PORT.into(), SERIAL_LEN.into(), Arc::new(Mutex::new(device)))?;
        let received = counters.counter(SERIAL_INPUT);
        Ok(Self { flag: "--serial", output, port: Port::Serial(input), received, drained })
    }

    /// A virtio console and its end.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn virtio(metrics: &Registry) -> io::Result<(VirtioConsole, Self)> {
        let counters = metrics.group(&[("device", VirtioConsole::ID)]);
        let output = Arc::new(ConsoleOutput::new(counters.counter(CONSOLE_OUTPUT)));
        let (drained, received) = (Arc::new(new_event()?), counters.counter(CONSOLE_INPUT));
        let device_counters = ConsoleCounters { dropped: counters.counter(CONSOLE_DROPPED) };
        let device = VirtioConsole::new(output.clone(), drained.clone(), device_counters)?;
        let port = Port::Virtio(device.port());
        Ok((device, Self { flag: "--console", output, port, received, drained }))
    }

    /// It in the list of devices. It has nothing to change.
    pub fn control(&self) -> Box<dyn DeviceControl> {
        let port = match &self.port {
            Port::Serial(_) => None,
            Port::Virtio(port) => Some(port.clone()),
        };
        Box::new(ConsoleControl { output: self.output.clone(), port })
    }
}

struct ConsoleControl {
    output: Arc<ConsoleOutput>,
    /// Of a virtio console.
    port: Option<ConsolePort>,
}

impl DeviceControl for ConsoleControl {
    fn id(&self) -> &str {
        if self.port.is_some() { VirtioConsole::ID } else { SERIAL_ID }
    }

    fn kind(&self) -> &'static str {
        if self.port.is_some() { "console" } else { "serial" }
    }

    fn describe(&self) -> Value {
        let unwritten = self.output.unwritten();
        match &self.port {
            None => json!({ "unwritten_bytes": unwritten }),
            Some(port) => {
                let (columns, rows) = port.size();
                let active = port.is_active();
                json!({ "unwritten_bytes": unwritten, "active": active, "columns": columns, "rows": rows })
            }
        }
    }
}
