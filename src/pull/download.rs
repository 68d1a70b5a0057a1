//! Downloads of layers: a few at once, each into a file that stays when it is interrupted, and is gone on with.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use microvm::image::{Descriptor, Digest, Store, is_at, keep};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

use super::bars::{Bar, Bars};
use super::error::PullError;
use super::http::{TRIES, backoff, host};
use super::registry::Registry;

/// Downloads at once.
const AT_ONCE: usize = 3;

/// A connection that brought so many bytes more than any before was of use, and the next one is a first try.
const OF_USE: u64 = 64 << 10;

/// Downloads that go on in threads of their own.
pub struct Downloads(Arc<Shared>);

struct Shared {
    registry: Registry,
    store: Arc<Store>,
    bars: Arc<Bars>,
    layers: Vec<Descriptor>,
    next: AtomicUsize,
    fetched: AtomicU64,
    ended: Mutex<HashMap<Digest, Result<(), PullError>>>,
    one_more: Condvar,
}

impl Downloads {
    /// Starts to download those of the layers that the store does not have.
    pub fn start(registry: Registry, store: Arc<Store>, bars: Arc<Bars>, layers: &[Descriptor]) -> Self {
        let mut missing: Vec<Descriptor> = Vec::new();
        for layer in layers {
            // Several layers may be the same, as empty ones are.
            let is_new = missing.iter().all(|there| there.digest != layer.digest);
            if is_new && !store.blob(&layer.digest).exists() {
                missing.push(layer.clone());
            }
        }
        let shared = Arc::new(Shared {
            registry,
            store,
            bars,
            layers: missing,
            next: AtomicUsize::new(0),
            fetched: AtomicU64::new(0),
            ended: Mutex::default(),
            one_more: Condvar::new(),
        });
        for _ in 0..AT_ONCE.min(shared.layers.len()) {
            let shared = shared.clone();
            // They end with the process, which waits for none of them when another has failed.
            thread::spawn(move || shared.work());
        }
        Self(shared)
    }

    /// Waits until a layer is in the store.
    pub fn wait(&self, digest: &Digest) -> Result<(), PullError> {
        if self.0.layers.iter().all(|layer| layer.digest != *digest) {
            return Ok(());
        }
        let mut ended = self.0.ended.lock().map_err(|_| PullError::Stopped)?;
        loop {
            match ended.remove(digest) {
                Some(Ok(())) => {
                    ended.insert(*digest, Ok(()));
                    return Ok(());
                }
                Some(failed) => return failed,
                None => ended = self.0.one_more.wait(ended).map_err(|_| PullError::Stopped)?,
            }
        }
    }

    /// Bytes that have come over the network.
    pub fn fetched(&self) -> u64 {
        self.0.fetched.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn work(&self) {
        while let Some(layer) = self.layers.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let result = self.fetch(layer);
            let Ok(mut ended) = self.ended.lock() else { return };
            ended.insert(layer.digest, result);
            self.one_more.notify_all();
        }
    }

    fn fetch(&self, layer: &Descriptor) -> Result<(), PullError> {
        let place = self.store.blob(&layer.digest);
        let Some(mut partial) = self.claim(layer)? else { return Ok(()) };
        let bar = self.bars.layer(&layer.digest.short(), layer.size);
        let before = partial.length;
        self.fill(&mut partial, layer, &bar)?;
        if before > 0 && partial.digest() != layer.digest {
            // What was there may be what a power cut has left.
            partial.restart()?;
            self.fill(&mut partial, layer, &bar)?;
        }
        let found = partial.digest();
        if found != layer.digest {
            let _ = std::fs::remove_file(&partial.path);
            return Err(PullError::Digest { name: layer.digest.to_string(), found });
        }
        keep(&partial.file, &partial.path, &place)?;
        Ok(())
    }

    /// The layer's file, ours alone, with what is in it. Another process may be downloading the same layer: then this
    /// waits for it. `None`: it has brought it.
    fn claim(&self, layer: &Descriptor) -> Result<Option<Partial>, PullError> {
        let path = self.store.partial(&layer.digest);
        let failed = |source| PullError::File { path: path.clone(), source };
        loop {
            if self.store.blob(&layer.digest).exists() {
                return Ok(None);
            }
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).read(true).write(true).mode(0o600);
            let file = options.open(&path).map_err(failed)?;
            flock(&file, FlockOperation::LockExclusive).map_err(|e| failed(e.into()))?;
            // In its place by now, otherwise.
            if is_at(&file, &path) {
                return Partial::resume(file, path, layer.size).map(Some);
            }
        }
    }

    /// Downloads until all bytes are there, over as many connections as that takes.
    fn fill(&self, partial: &mut Partial, layer: &Descriptor, bar: &Bar) -> Result<(), PullError> {
        let (mut tries, mut furthest) = (1, partial.length);
        while partial.length < layer.size {
            let Err(reason) = self.stream(partial, layer, bar)? else { continue };
            if partial.length >= furthest + OF_USE {
                tries = 0;
            }
            furthest = furthest.max(partial.length);
            if tries == TRIES {
                let reason = format!("layer {}: {reason}", layer.digest.short());
                return Err(PullError::Unreachable { host: host(&self.registry.uri()), reason });
            }
            tries += 1;
            thread::sleep(backoff(tries.saturating_sub(1)));
        }
        Ok(())
    }

    /// Downloads over one connection. The inner error is that the connection has broken.
    fn stream(
        &self,
        partial: &mut Partial,
        layer: &Descriptor,
        bar: &Bar,
    ) -> Result<Result<(), String>, PullError> {
        let mut piece = self.registry.piece(layer, partial.length)?;
        if piece.start == 0 {
            partial.restart()?;
        }
        bar.at(partial.length);
        let mut buffer = vec![0; 128 << 10];
        loop {
            let count = match piece.body.read(&mut buffer) {
                Ok(0) if partial.length < layer.size => return Ok(Err("it ends too early".into())),
                Ok(0) => return Ok(Ok(())),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Err(e.to_string())),
            };
            self.fetched.fetch_add(count as u64, Ordering::Relaxed);
            if count as u64 > layer.size - partial.length {
                let _ = std::fs::remove_file(&partial.path);
                let name = layer.digest.to_string();
                return Err(PullError::Size { name, size: layer.size, found: "more".into() });
            }
            partial.append(&buffer[..count])?;
            bar.at(partial.length);
        }
    }
}

/// A layer that is not whole yet.
struct Partial {
    file: File,
    path: PathBuf,
    hash: Sha256,
    length: u64,
}

impl Partial {
    /// Goes on behind what is there, unless that is too much.
    fn resume(file: File, path: PathBuf, size: u64) -> Result<Self, PullError> {
        let mut partial = Self { file, path, hash: Sha256::new(), length: 0 };
        let length = partial.hash_file().map_err(|e| partial.failed(e))?;
        partial.length = length;
        if length > size {
            partial.restart()?;
        }
        Ok(partial)
    }

    fn hash_file(&mut self) -> io::Result<u64> {
        let mut buffer = vec![0; 128 << 10];
        let mut length = 0;
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(length),
                Ok(count) => {
                    self.hash.update(&buffer[..count]);
                    length += count as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn restart(&mut self) -> Result<(), PullError> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|e| self.failed(e))?;
        self.hash = Sha256::new();
        self.length = 0;
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), PullError> {
        self.file.write_all(bytes).map_err(|e| self.failed(e))?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn digest(&self) -> Digest {
        Digest(self.hash.clone().finalize().into())
    }

    fn failed(&self, source: io::Error) -> PullError {
        PullError::File { path: self.path.clone(), source }
    }
}
