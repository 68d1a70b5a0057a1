//! The layers of one image, lowest first: stored as they came, and as file systems.

use std::io::{self, Read, Write};
use std::thread;

use super::super::decode::{self, Packing};
use super::super::digest::{Digest, HashingReader};
use super::super::erofs::{self, Found};
use super::super::error::ImageError;
use super::super::layer::{Layer, LayerError};
use super::super::manifest::Descriptor;
use super::super::record::LayerRecord;
use super::super::source::Part;
use super::super::store::{Store, Temporary};
use super::super::tar::TarError;
use super::{Counted, ImportOptions, blob_path};

/// Where a layer is, and what is said of it.
pub(super) struct Given {
    /// Its path in the source.
    pub path: String,
    /// The digest of what lies there.
    pub blob: Option<Digest>,
    /// Its bytes.
    pub size: Option<u64>,
}

impl Given {
    /// A layer of a manifest.
    pub fn of(descriptor: &Descriptor) -> Self {
        let digest = descriptor.digest;
        Self { path: blob_path(&digest), blob: Some(digest), size: Some(descriptor.size) }
    }
}

/// An image's layers so far.
pub(super) struct Layers<'a> {
    store: &'a Store,
    options: &'a ImportOptions<'a>,
    done: Vec<(LayerRecord, Packing)>,
}

/// What one pass over a layer gives.
struct Pass {
    layer: Layer,
    writer: erofs::Writer<std::fs::File>,
    blob: (Digest, u64),
    diff_id: Digest,
    packing: Packing,
    ended: bool,
}

impl<'a> Layers<'a> {
    pub fn new(store: &'a Store, options: &'a ImportOptions) -> Self {
        Self { store, options, done: Vec::new() }
    }

    pub fn done(&self) -> &[(LayerRecord, Packing)] {
        &self.done
    }

    pub fn into_records(self) -> Vec<LayerRecord> {
        self.done.into_iter().map(|(layer, _)| layer).collect()
    }

    /// Adds the next layer, unless the store has it. `diff_id` is the digest its plain archive should have; without, its
    /// end must be marked, as nothing else would tell that it is whole.
    pub fn add(
        &mut self,
        given: &Given,
        diff_id: Option<Digest>,
        open: impl FnOnce() -> Result<Part, ImageError>,
    ) -> Result<(), ImageError> {
        // An older docker-archive tells the digest of the plain archive alone, and has it plain.
        if let (Some(diff_id), Some(blob)) = (diff_id, given.blob.or(diff_id))
            && let Some(there) = self.there(diff_id, blob)
        {
            self.done.push((there, Packing::Plain));
            return Ok(());
        }
        let part = open()?;
        if given.size.is_some_and(|size| size != part.size) {
            return Err(refused(given, TarError::Truncated));
        }
        let what = given.blob.or(diff_id).map(|digest| digest.short());
        let what = what.as_deref().or(given.path.rsplit('/').next()).unwrap_or_default();
        self.options.progress.start(what, part.size);
        // What was downloaded is in its place already.
        let is_stored = given.blob.is_some_and(|blob| self.store.blob(&blob).exists());
        let stored = if is_stored { None } else { Some(self.store.temporary()?) };
        let image = self.store.temporary()?;
        let pass = self.read(part, stored.as_ref(), &image).map_err(|source| layer_error(given, source))?;
        if let Some(wanted) = given.blob.filter(|wanted| *wanted != pass.blob.0) {
            if is_stored {
                // Its disk has changed it. Whoever gets the image once more gets this once more.
                let _ = std::fs::remove_file(self.store.blob(&wanted));
            }
            return Err(ImageError::Digest { name: wanted.to_string(), found: pass.blob.0 });
        }
        if let Some(wanted) = diff_id.filter(|wanted| *wanted != pass.diff_id) {
            return Err(ImageError::Digest {
                name: format!("{} ({wanted})", given.path),
                found: pass.diff_id,
            });
        }
        if diff_id.is_none() && !pass.ended {
            return Err(refused(given, TarError::Truncated));
        }
        self.keep(given, pass, stored, image)
    }

    /// The layer as the store has it.
    fn there(&self, diff_id: Digest, blob: Digest) -> Option<LayerRecord> {
        let blob_size = self.store.blob(&blob).metadata().ok()?.len();
        let keys = [diff_id, self.chained(diff_id)];
        let size = |key: &Digest| Some((*key, self.store.layer(key).metadata().ok()?.len()));
        let (image, image_size) = keys.iter().find_map(size)?;
        Some(LayerRecord { diff_id, blob, blob_size, image, image_size })
    }

    /// Names a layer that depends on those below it.
    fn chained(&self, diff_id: Digest) -> Digest {
        let below = self.done.iter().map(|(layer, _)| layer.diff_id);
        let chain: Vec<_> = below.chain([diff_id]).map(|digest| digest.to_string()).collect();
        Digest::of(chain.join(" ").as_bytes())
    }

    /// One pass: stores what comes and hashes it, unpacks it, hashes that and makes the image.
    fn read(&self, part: Part, stored: Option<&Temporary>, image: &Temporary) -> Result<Pass, LayerError> {
        let unreadable = |e: io::Error| LayerError::Tar(TarError::Read(e));
        let limits = self.options.limits;
        let counted = Counted { inner: part.data, progress: self.options.progress };
        let mut blob = HashingReader::new(
            Copied { inner: counted, copy: stored.map(|stored| &stored.file) },
            limits.bytes,
        );
        let out = image.file.try_clone().map_err(LayerError::Write)?;
        let (packing, made, diff_id) = thread::scope(|scope| {
            let (packing, sniffed) = decode::sniff(&mut blob).map_err(unreadable)?;
            let unpacked = decode::unpacked(packing, sniffed).map_err(unreadable)?;
            let mut plain = HashingReader::new(decode::ahead(scope, unpacked), limits.bytes);
            let mut layer = Layer::new(limits);
            let (writer, tar) = layer.make(&mut plain, out)?;
            let ended = tar.was_ended();
            let (diff_id, _) = plain.finish().map_err(unreadable)?;
            Ok::<_, LayerError>((packing, (layer, writer, ended), diff_id))
        })?;
        let blob = blob.finish().map_err(unreadable)?;
        let (layer, writer, ended) = made;
        Ok(Pass { layer, writer, blob, diff_id, packing, ended })
    }

    fn keep(
        &mut self,
        given: &Given,
        mut pass: Pass,
        stored: Option<Temporary>,
        image: Temporary,
    ) -> Result<(), ImageError> {
        // The lowest, too: the same archive may stand above others in another image.
        let chained = pass.layer.leans_on_others();
        if chained {
            self.adapt(&mut pass.layer)?;
        }
        let key = if chained { self.chained(pass.diff_id) } else { pass.diff_id };
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&key.0[..16]);
        let written = pass.writer.finish(pass.layer.tree(), uuid);
        let file = written.map_err(|e| layer_error(given, LayerError::Write(e)))?;
        let image_size = file.metadata().map_err(|e| layer_error(given, LayerError::Write(e)))?.len();
        let (blob, blob_size) = pass.blob;
        let place = self.store.layer(&key);
        // One that is there is the same, and VMs may have it open.
        if !place.exists() {
            image.keep(&place)?;
        }
        if let Some(stored) = stored.filter(|_| !self.store.blob(&blob).exists()) {
            stored.keep(&self.store.blob(&blob))?;
        }
        let record = LayerRecord { diff_id: pass.diff_id, blob, blob_size, image: key, image_size };
        self.done.push((record, pass.packing));
        Ok(())
    }

    /// overlayfs shows the owner and mode of a folder as its uppermost layer has them: where a layer only passes through
    /// a folder, these are what the layers below say. And it hides a root's entries one by one alone.
    fn adapt(&self, layer: &mut Layer) -> Result<(), ImageError> {
        let mut below = Vec::new();
        for (record, _) in self.done.iter().rev() {
            let path = self.store.layer(&record.image);
            let failed = |source| ImageError::Store { path: path.clone(), source };
            let opened = erofs::Reader::open(&path).map_err(failed)?;
            if layer.is_opaque() {
                opened.names().map_err(failed)?.iter().for_each(|name| layer.hide(name));
            } else {
                below.push((path, opened));
            }
        }
        let mut broken = None;
        layer.describe(|path| {
            for (place, layer) in &below {
                match layer.folder(path) {
                    Ok(Found::Folder(meta)) => return Some(meta),
                    Ok(Found::Hidden) => return None,
                    Ok(Found::Nothing) => {}
                    Err(source) => broken = Some(ImageError::Store { path: place.clone(), source }),
                }
            }
            None
        });
        broken.map_or(Ok(()), Err)
    }
}

fn refused(given: &Given, source: TarError) -> ImageError {
    layer_error(given, source.into())
}

fn layer_error(given: &Given, source: LayerError) -> ImageError {
    ImageError::Layer { name: given.path.clone(), source }
}

/// Writes what is read through it to a file, where there is one.
struct Copied<'a, R> {
    inner: R,
    copy: Option<&'a std::fs::File>,
}

impl<R: Read> Read for Copied<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(mut copy) = self.copy {
            let written = copy.write_all(&buffer[..count]);
            // Whoever reads would take it for the layer's own.
            written.map_err(|e| io::Error::new(e.kind(), format!("the store cannot be written: {e}")))?;
        }
        Ok(count)
    }
}
