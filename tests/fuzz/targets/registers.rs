//! A driver that reads and writes a device's registers, configuration and rings in any way and order. Afterwards a reset
//! brings the device back.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use microvm::bus::BusDevice;
use microvm::devices::virtio::rng::Rng;
use microvm::devices::virtio::{Interrupt, MmioTransport, Transport, TransportParts, VirtioDevice, VmmThread};
use microvm::vm::Memory;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Register(u8, u32),
    /// The next step of a driver's proper start: random ones alone would hardly ever get there.
    Status(u8),
    Features,
    Queue { index: u8, size: u8, rings: [u16; 3] },
    Write(u16, &'a [u8]),
    Read(u16, u8),
    Memory(u16, &'a [u8]),
}

fuzz_target!(|steps: Vec<Step>| {
    let memory = Memory::new(&"2M".parse().unwrap()).unwrap();
    let mut mmio = transport(Box::new(Rng::new(&microvm::metrics::Registry::default())), &memory);
    let word = |mmio: &mut MmioTransport, at: u64, value: u32| mmio.write(at, &value.to_le_bytes());
    for step in steps.iter().take(256) {
        match step {
            Step::Register(at, value) => drop(word(&mut mmio, u64::from(*at) & !3, *value)),
            Step::Status(n) => drop(word(&mut mmio, 0x70, [1, 3, 11, 15][usize::from(*n % 4)])),
            Step::Features => {
                word(&mut mmio, 0x24, 1);
                word(&mut mmio, 0x20, 1);
            }
            Step::Queue { index, size, rings } => {
                word(&mut mmio, 0x30, u32::from(index % 4));
                word(&mut mmio, 0x38, 1 << (size % 10));
                for (register, ring) in [0x80, 0x90, 0xa0].into_iter().zip(rings) {
                    word(&mut mmio, register, u32::from(*ring) & !0xf);
                }
                word(&mut mmio, 0x44, 1);
            }
            Step::Write(at, data) => drop(mmio.write(u64::from(at % 0x1000), &data[..data.len().min(8)])),
            Step::Read(at, len) => mmio.read(u64::from(at % 0x1000), &mut vec![0; usize::from(len % 9)]),
            Step::Memory(at, data) => memory.guest().write_slice(data, GuestAddress(u64::from(*at))).unwrap(),
        }
    }
    word(&mut mmio, 0x70, 0);
    let mut status = [0xff; 4];
    mmio.read(0x70, &mut status);
    assert_eq!(status, [0; 4], "no way back");
});

fn transport(device: Box<dyn VirtioDevice>, memory: &Memory) -> MmioTransport {
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let notify = device.queue_sizes().iter().map(|_| Arc::new(event())).collect();
    MmioTransport::new(Transport::new(TransportParts {
        device,
        memory: memory.clone(),
        interrupt: Arc::new(Interrupt::new(event())),
        notify,
        vmm: VmmThread::inline().unwrap(),
    }))
}
