//! The control queue (virtio 1.3 §5.1.6.5), for the one command that is offered: how many pairs of queues are used.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::super::{ActiveQueue, Chain, Interrupt, QueueError};
use super::switch::Switch;

/// `VIRTIO_NET_CTRL_MQ` and `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const SET_PAIRS: [u8; 2] = [4, 0];
/// Class, command, and a little-endian number of pairs.
const COMMAND_LEN: u32 = 4;
const OK: u8 = 0;
const ERROR: u8 = 1;

/// The control queue and what it controls.
pub(super) struct Commands {
    pub(super) queue: ActiveQueue,
    chain: Chain,
    /// Of every pair but the first that the driver has set up.
    switches: Vec<Arc<Switch>>,
}

impl Commands {
    pub(super) fn new(queue: ActiveQueue, switches: Vec<Arc<Switch>>) -> Self {
        Self { queue, chain: Chain::default(), switches }
    }

    /// Does what the driver asks for, at most a queue full of it.
    pub(super) fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &Interrupt,
    ) -> Result<(), QueueError> {
        self.queue.queue.disable_notify(memory)?;
        for _ in 0..self.queue.queue.size() {
            if self.queue.queue.pop(memory, &mut self.chain)? {
                let written = self.one(memory)?;
                self.queue.queue.push_used(memory, self.chain.head(), written)?;
                self.queue.queue.publish_to(memory, interrupt)?;
            } else if !self.queue.queue.enable_notify(memory)? {
                return Ok(());
            }
        }
        self.queue.serve_again();
        Ok(())
    }

    /// Does one command, and says how many bytes the answer has. Without room for one nothing is done.
    fn one(&self, memory: &GuestMemoryMmap) -> Result<u32, QueueError> {
        if self.chain.writable_len() == 0 {
            return Ok(0);
        }
        let answer = if self.set_pairs(memory)? { OK } else { ERROR };
        self.chain.write(memory, 0, &[answer])?;
        Ok(1)
    }

    fn set_pairs(&self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        if self.chain.readable_len() != COMMAND_LEN {
            return Ok(false);
        }
        let [class, command, low, high]: [u8; COMMAND_LEN as usize] = self.chain.read_obj(memory, 0)?;
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        if [class, command] != SET_PAIRS || !(1..=self.switches.len() + 1).contains(&pairs) {
            return Ok(false);
        }
        for (index, switch) in self.switches.iter().enumerate() {
            switch.turn(index + 1 < pairs);
        }
        Ok(true)
    }
}
