//! The log: standard error, warnings only unless `--verbose` or `RUST_LOG` asks for more.

use log::LevelFilter;

/// Starts the log. `verbosity` counts `--verbose`; `RUST_LOG` wins over it.
pub fn start(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    env_logger::Builder::new().filter_level(level).parse_default_env().format_target(false).init();
}
