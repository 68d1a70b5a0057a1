//! A queue over any bytes, served as devices do: every buffer that comes out lies in memory, nothing loops or panics.
#![no_main]

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use microvm::devices::virtio::{Chain, F_EVENT_IDX, F_INDIRECT_DESC, Queue, QueueSetup};
use microvm::vm::Memory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

static MEMORY: LazyLock<Memory> = LazyLock::new(|| Memory::new(&"2M".parse().unwrap()).unwrap());

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    size: u16,
    rings: [u32; 3],
    indirect: bool,
    event_idx: bool,
    /// What the guest writes between two rounds, and where.
    rounds: Vec<(u16, u16, &'a [u8])>,
    memory: &'a [u8],
}

fuzz_target!(|input: Input| {
    let memory = MEMORY.guest();
    let bytes = &input.memory[..input.memory.len().min(1 << 16)];
    memory.write_slice(&[0; 1 << 16], GuestAddress(0)).unwrap();
    memory.write_slice(bytes, GuestAddress(0)).unwrap();
    let [descriptors, available, used] = input.rings.map(u64::from);
    let setup = QueueSetup { size: input.size, ready: true, descriptors, available, used };
    let features = if input.indirect { F_INDIRECT_DESC } else { 0 } | if input.event_idx { F_EVENT_IDX } else { 0 };
    let Ok(mut queue) = Queue::new(memory, setup, 256, features) else { return };
    let mut chain = Chain::default();
    for (at, value, data) in input.rounds.iter().take(64) {
        let data = &data[..data.len().min(256)];
        memory.write_slice(data, GuestAddress(u64::from(*at))).unwrap();
        let _ = memory.write_obj(*value, GuestAddress(available + 2));
        for _ in 0..queue.size() {
            match queue.pop(memory, &mut chain) {
                Ok(true) => check(&chain, queue.size()),
                Ok(false) => break,
                Err(_) => return,
            }
            queue.push_used(memory, chain.head(), chain.writable_len()).unwrap();
        }
        if queue.publish(memory).is_err() || queue.enable_notify(memory).is_err() {
            return;
        }
    }
});

fn check(chain: &Chain, size: u16) {
    assert!(chain.head() < size);
    assert!(chain.readable().len() + chain.writable().len() <= size.into());
    for segment in chain.readable().iter().chain(chain.writable()) {
        assert!(segment.len > 0);
        MEMORY.guest().get_slice(segment.address, segment.len as usize).expect("a buffer outside of memory");
    }
}
