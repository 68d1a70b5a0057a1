//! The files and folders that a guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::metrics::Gauge;

/// An open file or folder.
pub struct Handle {
    pub file: Arc<File>,
    pub is_folder: bool,
    /// Held by who reads a folder: where it stands is part of the open file.
    pub place: Mutex<()>,
}

/// All of them, by the numbers that the guest was given.
pub struct Handles {
    table: Mutex<Table>,
    most: usize,
    count: Gauge,
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

impl Handles {
    /// Room for `most`. `count` shows how many there are.
    pub fn new(most: usize, count: Gauge) -> Self {
        Self { table: Mutex::default(), most, count }
    }

    /// Takes an open file or folder in, and gives it a number that was never given before.
    ///
    /// # Errors
    /// `EMFILE`: as many are open as may be.
    pub fn add(&self, file: File, is_folder: bool) -> Result<u64, Errno> {
        let handle = Handle { file: Arc::new(file), is_folder, place: Mutex::new(()) };
        let mut table = self.lock();
        if table.open.len() >= self.most {
            return Err(Errno::MFILE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(handle));
        self.count.set(table.open.len() as u64);
        Ok(number)
    }

    /// An open file.
    pub fn file(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.get(number).and_then(|h| if h.is_folder { Err(Errno::ISDIR) } else { Ok(h) })
    }

    /// An open folder.
    pub fn folder(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.get(number).and_then(|h| if h.is_folder { Ok(h) } else { Err(Errno::NOTDIR) })
    }

    /// One of either.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.lock().open.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// The guest has closed it.
    pub fn close(&self, number: u64) -> Result<(), Errno> {
        let mut table = self.lock();
        let closed = table.open.remove(&number);
        self.count.set(table.open.len() as u64);
        // Closing may take long.
        drop(table);
        closed.map(drop).ok_or(Errno::BADF)
    }

    /// Closes all.
    pub fn clear(&self) {
        let mut table = self.lock();
        let old = std::mem::take(&mut table.open);
        self.count.set(0);
        drop(table);
        drop(old);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
