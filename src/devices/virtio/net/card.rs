//! What a card is to its driver, whoever serves the queues.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::Mac;

use super::super::{ActivateError, Activation, ActiveQueue, take_queue};
use super::commands::Commands;
use super::{F_CTRL_VQ, F_MAC, F_MQ, F_MTU, F_STATUS};

const QUEUE_SIZE: u16 = 256;
/// Linux has one command under way.
const COMMANDS_SIZE: u16 = 64;
const LINK_UP: u16 = 1;

/// What the card, its threads and the control socket know.
pub(super) struct Shared {
    pub(super) id: String,
    pub(super) mac: Mac,
    /// What the other end is called, as in `--net`.
    pub(super) name: String,
    /// Whether the kernel serves the queues.
    pub(super) is_vhost: bool,
    pub(super) link: AtomicBool,
}

impl Shared {
    pub(super) fn has_link(&self) -> bool {
        self.link.load(Ordering::SeqCst)
    }

    /// The other end is gone for good.
    pub(super) fn lose_link(&self) {
        self.link.store(false, Ordering::SeqCst);
    }
}

/// What the driver finds.
pub(super) struct Card {
    pub(super) shared: Arc<Shared>,
    pub(super) features: u64,
    pub(super) queue_sizes: Vec<u16>,
    mtu: u16,
    pairs: usize,
}

impl Card {
    /// A card with so many pairs of queues, on a backend of these features and this MTU.
    pub(super) fn new(shared: Shared, features: u64, mtu: Option<u16>, pairs: usize) -> Self {
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        let mut features = features | F_MAC | F_STATUS | if mtu.is_some() { F_MTU } else { 0 };
        if pairs > 1 {
            features |= F_CTRL_VQ | F_MQ;
            queue_sizes.push(COMMANDS_SIZE);
        }
        Self { shared: Arc::new(shared), features, queue_sizes, mtu: mtu.unwrap_or(0), pairs }
    }

    /// The configuration space (§5.1.4): address, link, number of queue pairs, MTU.
    pub(super) fn config(&self) -> [u8; 12] {
        let mut space = [0; 12];
        let link = if self.shared.has_link() { LINK_UP } else { 0 };
        space[..6].copy_from_slice(&self.shared.mac.0);
        space[6..8].copy_from_slice(&link.to_le_bytes());
        space[8..10].copy_from_slice(&(self.pairs as u16).to_le_bytes());
        space[10..].copy_from_slice(&self.mtu.to_le_bytes());
        space
    }

    /// The queues of each pair that the driver has set up, from the first without a gap. Without [`F_MQ`] there is one
    /// pair, and the queue for commands comes right behind it (§5.1.2).
    pub(super) fn take_queues(&self, activation: &mut Activation) -> Result<CardQueues, ActivateError> {
        let has = |feature| activation.features & feature != 0;
        let most = if has(F_MQ) { self.pairs } else { 1 };
        let has_commands = has(F_CTRL_VQ);
        let queues = &mut activation.queues;
        let commands = if has_commands { take_queue(queues, 2 * most as u16).ok() } else { None };
        let mut pairs = vec![PairQueues::take(queues, 0)?];
        pairs.extend((1..most).map_while(|pair| PairQueues::take(queues, pair).ok()));
        let commands = commands.map(|queue| Commands::new(queue, pairs.len()));
        Ok(CardQueues { pairs, commands })
    }
}

/// The queues that a driver has set up.
pub(super) struct CardQueues {
    /// At least one.
    pub(super) pairs: Vec<PairQueues>,
    pub(super) commands: Option<Commands>,
}

/// A pair of queues.
pub(super) struct PairQueues {
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
}

impl PairQueues {
    fn take(queues: &mut Vec<ActiveQueue>, pair: usize) -> Result<Self, ActivateError> {
        let rx = take_queue(queues, 2 * pair as u16)?;
        Ok(Self { rx, tx: take_queue(queues, 2 * pair as u16 + 1)? })
    }
}
