//! A progress bar on a terminal, and nothing elsewhere.

use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::image::Progress;

const TEMPLATE: &str =
    "{msg:>12} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";

/// The bar, made when it is first needed.
pub(super) struct Bar {
    shown: bool,
    bar: OnceLock<ProgressBar>,
}

impl Bar {
    pub fn new(quiet: bool) -> Self {
        Self { shown: !quiet && io::stderr().is_terminal(), bar: OnceLock::new() }
    }

    /// Takes it off the screen.
    pub fn clear(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn start(&self, what: &str, bytes: u64) {
        if !self.shown {
            return;
        }
        let bar = self.bar.get_or_init(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.with_style(ProgressStyle::with_template(TEMPLATE).unwrap_or(ProgressStyle::default_bar()))
        });
        // What an archive calls its parts ends on a terminal.
        bar.set_message(what.chars().filter(|c| !c.is_control()).take(12).collect::<String>());
        bar.set_length(bytes);
        bar.reset();
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = self.bar.get() {
            bar.inc(bytes);
        }
    }
}
