//! The control queue (virtio 1.3 §5.1.6.5), for the one command that is offered: how many pairs of queues are used.

use vm_memory::GuestMemoryMmap;

use super::super::{ActiveQueue, Chain, Interrupt, QueueError};

/// `VIRTIO_NET_CTRL_MQ` and `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const SET_PAIRS: [u8; 2] = [4, 0];
/// Class, command, and a little-endian number of pairs.
const COMMAND_LEN: u32 = 4;
const OK: u8 = 0;
const ERROR: u8 = 1;

/// The control queue.
pub(super) struct Commands {
    pub(super) queue: ActiveQueue,
    chain: Chain,
    /// How many pairs the driver has set up.
    pub(super) pairs: usize,
}

impl Commands {
    pub(super) fn new(queue: ActiveQueue, pairs: usize) -> Self {
        Self { queue, chain: Chain::default(), pairs }
    }

    /// Does what the driver asks for, at most a queue full of it: `use_pairs` has the first so many pairs used, and no other
    /// receives anything when it returns (§5.1.6.5.6.1).
    pub(super) fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        interrupt: &Interrupt,
        use_pairs: &mut dyn FnMut(usize),
    ) -> Result<(), QueueError> {
        self.queue.queue.disable_notify(memory)?;
        for _ in 0..self.queue.queue.size() {
            if self.queue.queue.pop(memory, &mut self.chain)? {
                let written = self.one(memory, use_pairs)?;
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
    fn one(&self, memory: &GuestMemoryMmap, use_pairs: &mut dyn FnMut(usize)) -> Result<u32, QueueError> {
        if self.chain.writable_len() == 0 {
            return Ok(0);
        }
        let pairs = self.wanted_pairs(memory)?;
        pairs.iter().for_each(|pairs| use_pairs(*pairs));
        let answer = if pairs.is_some() { OK } else { ERROR };
        self.chain.write(memory, 0, &[answer])?;
        Ok(1)
    }

    /// How many pairs the driver wants; none where it asks for something else.
    fn wanted_pairs(&self, memory: &GuestMemoryMmap) -> Result<Option<usize>, QueueError> {
        if self.chain.readable_len() != COMMAND_LEN {
            return Ok(None);
        }
        let [class, command, low, high]: [u8; COMMAND_LEN as usize] = self.chain.read_obj(memory, 0)?;
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        let is_good = [class, command] == SET_PAIRS && (1..=self.pairs).contains(&pairs);
        Ok(is_good.then_some(pairs))
    }
}
