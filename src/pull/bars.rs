//! Bars of progress on a terminal, one for each layer that comes, and nothing elsewhere.

use std::io::{self, IsTerminal};
use std::sync::Mutex;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use microvm::image::Progress;

const TEMPLATE: &str =
    "{msg:>12} {prefix:<9} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";

/// All bars.
pub struct Bars {
    all: Option<MultiProgress>,
    /// That of the layer that is being unpacked.
    unpacked: Mutex<Option<ProgressBar>>,
}

/// The bar of one layer.
pub struct Bar(Option<ProgressBar>);

impl Bars {
    pub fn new(quiet: bool) -> Self {
        let all = (!quiet && io::stderr().is_terminal()).then(MultiProgress::new);
        Self { all, unpacked: Mutex::new(None) }
    }

    /// A layer that is downloaded.
    pub fn layer(&self, what: &str, bytes: u64) -> Bar {
        Bar(self.add(what, "download", bytes))
    }

    fn add(&self, what: &str, doing: &'static str, bytes: u64) -> Option<ProgressBar> {
        let style = ProgressStyle::with_template(TEMPLATE).unwrap_or(ProgressStyle::default_bar());
        let bar = self.all.as_ref()?.add(ProgressBar::new(bytes)).with_style(style);
        bar.set_prefix(doing);
        // A digest, of which no letter does anything to a terminal.
        bar.set_message(what.to_string());
        Some(bar)
    }

    /// Takes them off the screen.
    pub fn clear(&self) {
        if let Some(all) = &self.all {
            // What cannot be written does not stay on the screen either.
            let _ = all.clear();
        }
    }
}

impl Bar {
    /// How far it is.
    pub fn at(&self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.set_position(bytes);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bars {
    fn start(&self, what: &str, bytes: u64) {
        let Ok(mut unpacked) = self.unpacked.lock() else { return };
        if let Some(before) = unpacked.take() {
            before.finish_and_clear();
        }
        *unpacked = self.add(what, "unpack", bytes);
    }

    fn advance(&self, bytes: u64) {
        if let Ok(unpacked) = self.unpacked.lock()
            && let Some(bar) = &*unpacked
        {
            bar.inc(bytes);
        }
    }
}
