//! What the host's side and the device share: target, size and statistics.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::config::Size;

use super::super::Interrupt;
use super::PAGE;

/// A target that the guest cannot reach.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("a balloon of {asked} is larger than the guest's memory of {memory}: ask for less")]
pub struct TargetTooLarge {
    /// What was asked for.
    pub asked: Size,
    /// What the guest has.
    pub memory: Size,
}

/// What the guest says of its memory (§5.5.6.3), as of its last answer. A field that it did not tell is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// By tag: swapped in and out, major and minor faults, free, total, available, disk caches, and so on.
    pub values: [Option<u64>; BalloonStats::TAGS],
}

impl BalloonStats {
    /// Tags 0 to 15 have a meaning; others are left out.
    pub const TAGS: usize = 16;
    /// `VIRTIO_BALLOON_S_MEMFREE`: bytes that are unused.
    pub const FREE: usize = 4;
    /// `VIRTIO_BALLOON_S_MEMTOT`: bytes in all.
    pub const TOTAL: usize = 5;
    /// `VIRTIO_BALLOON_S_AVAIL`: bytes that can be had without swapping.
    pub const AVAILABLE: usize = 6;
}

/// A balloon at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonStatus {
    /// How large it should be.
    pub target: Size,
    /// How large it is, as the driver says; at most the guest's memory.
    pub actual: Size,
    /// A driver serves it.
    pub active: bool,
    /// What the guest told last.
    pub stats: BalloonStats,
}

/// The host's end of a balloon. Clones share it.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

struct Shared {
    memory: Size,
    /// In pages, as `actual`.
    target: AtomicU32,
    actual: AtomicU32,
    driver: Mutex<Option<Arc<Interrupt>>>,
    stats: Mutex<BalloonStats>,
}

fn pages(size: Size) -> u32 {
    u32::try_from(size.0 / PAGE).unwrap_or(u32::MAX)
}

fn size(pages: u32) -> Size {
    Size(u64::from(pages) * PAGE)
}

impl BalloonHandle {
    pub(super) fn new(target: Size, memory: Size) -> Self {
        Self(Arc::new(Shared {
            memory,
            target: AtomicU32::new(pages(target)),
            actual: AtomicU32::new(0),
            driver: Mutex::default(),
            stats: Mutex::default(),
        }))
    }

    /// Asks the guest for a balloon of this size, rounded down to whole pages. Never waits: the driver does it in its
    /// own time, or when it is loaded.
    ///
    /// # Errors
    /// The guest has not that much memory.
    pub fn set_target(&self, target: Size) -> Result<(), TargetTooLarge> {
        if target > self.0.memory {
            return Err(TargetTooLarge { asked: target, memory: self.0.memory });
        }
        let change = || self.0.target.store(pages(target), Ordering::SeqCst);
        match self.driver().as_ref() {
            Some(interrupt) => interrupt.change_config(change),
            None => change(),
        }
        Ok(())
    }

    /// Its state now.
    #[must_use]
    pub fn status(&self) -> BalloonStatus {
        BalloonStatus {
            target: size(self.0.target.load(Ordering::SeqCst)),
            actual: size(self.actual()).min(self.0.memory),
            active: self.driver().is_some(),
            stats: *self.stats(),
        }
    }

    pub(super) fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::SeqCst)
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.0.actual.store(pages, Ordering::SeqCst);
    }

    /// `num_pages` and `actual` (§5.5.4).
    pub(super) fn config_space(&self) -> [u8; 8] {
        let target = self.0.target.load(Ordering::SeqCst);
        (u64::from(target) | u64::from(self.actual()) << 32).to_le_bytes()
    }

    /// A driver has started. Its balloon is empty.
    pub(super) fn start(&self, interrupt: Arc<Interrupt>) {
        self.set_actual(0);
        *self.stats() = BalloonStats::default();
        *self.driver() = Some(interrupt);
    }

    /// Nobody listens any more.
    pub(super) fn stop(&self) {
        *self.driver() = None;
    }

    pub(super) fn stats(&self) -> MutexGuard<'_, BalloonStats> {
        self.0.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn driver(&self) -> MutexGuard<'_, Option<Arc<Interrupt>>> {
        self.0.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
