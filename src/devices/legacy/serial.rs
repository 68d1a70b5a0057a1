//! COM1: a 16550A as vm-superio has it, with its interrupt on an irqfd and its output in a [`ConsoleOutput`].

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Action, BusDevice};

use super::ConsoleOutput;

/// The interrupt line.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the event loop that the guest has read all of its input.
struct Events(Arc<EventFd>);

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Full only after 2⁶⁴ - 2 writes without a read.
        let _ = self.0.write(1);
    }
}

/// Output through a shared buffer.
struct Output(Arc<ConsoleOutput>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self.0).write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = Arc<Mutex<Serial<Interrupt, Events, Output>>>;

/// COM1 as the guest sees it.
pub struct SerialPort {
    uart: Uart,
    output: Arc<ConsoleOutput>,
    drained: Arc<EventFd>,
}

/// The modem control register. Its loopback bit keeps input out.
const MODEM_CONTROL: u64 = 4;

/// The end of COM1 that a host's keyboard is plugged into.
pub struct SerialInput(Uart);

/// A port that raises `interrupt`, prints to `output`, and signals `drained` when its input is used up.
#[must_use]
pub fn serial_port(
    interrupt: EventFd,
    output: Arc<ConsoleOutput>,
    drained: Arc<EventFd>,
) -> (SerialPort, SerialInput) {
    let uart = Serial::with_events(Interrupt(interrupt), Events(drained.clone()), Output(output.clone()));
    let uart = Arc::new(Mutex::new(uart));
    (SerialPort { uart: uart.clone(), output, drained }, SerialInput(uart))
}

impl SerialInput {
    /// Gives the guest as much of `input` as its FIFO takes, and says how much that was.
    pub fn send(&self, input: &[u8]) -> usize {
        let mut uart = lock(&self.0);
        let room = uart.fifo_capacity().min(input.len());
        if room == 0 { 0 } else { uart.enqueue_raw_bytes(&input[..room]).unwrap_or(0) }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = lock(&self.uart).read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        // Without the UART's lock: the event loop takes it for input, and must not wait for the reader of our output.
        self.output.wait_for_room();
        if let [byte] = data {
            // An interrupt that cannot be raised is the host's trouble; the guest must not fill the log with it.
            let _ = lock(&self.uart).write(offset as u8, *byte);
        }
        if offset == MODEM_CONTROL {
            // Input that the loopback kept out can come now, and no read of data will say so.
            let _ = self.drained.write(1);
        }
        Action::None
    }
}

fn lock(uart: &Uart) -> std::sync::MutexGuard<'_, Serial<Interrupt, Events, Output>> {
    uart.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> (SerialPort, SerialInput, Arc<ConsoleOutput>, Arc<EventFd>) {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (output, drained) = (Arc::new(ConsoleOutput::default()), Arc::new(event()));
        let (port, input) = serial_port(event(), output.clone(), drained.clone());
        (port, input, output, drained)
    }

    #[test]
    fn accesses_of_odd_width_do_nothing() {
        let (mut port, _, output, _) = port();
        for width in [2, 3, 4, 8] {
            assert_eq!(port.write(0, &vec![b'x'; width]), Action::None);
            port.read(0, &mut vec![0; width]);
        }
        output.close();
        assert!(output.take().is_none());
    }

    #[test]
    fn leaving_the_loopback_asks_for_input() {
        let (mut port, input, _, drained) = port();
        port.write(MODEM_CONTROL, &[0x10]);
        assert_eq!(input.send(b"k"), 0);
        drained.read().unwrap();
        port.write(MODEM_CONTROL, &[0]);
        assert_eq!(drained.read().unwrap(), 1);
        assert_eq!(input.send(b"k"), 1);
    }

    #[test]
    fn input_stops_at_a_full_fifo_and_goes_on_when_drained() {
        let (mut port, input, _, drained) = port();
        let sent = input.send(&[b'k'; 100]);
        assert!(sent < 100);
        assert_eq!(input.send(b"k"), 0);
        let mut byte = [0];
        for _ in 0..sent {
            port.read(0, &mut byte);
        }
        assert_eq!(byte, [b'k']);
        assert_eq!(drained.read().unwrap(), 1);
        assert_eq!(input.send(b"k"), 1);
    }
}
