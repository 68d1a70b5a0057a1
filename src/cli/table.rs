//! Tables on standard output.

use std::io::{self, Write};

use clap::ValueEnum;

/// How a list is written.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

/// Writes rows, the head among them, in columns as wide as their widest cell.
pub(super) fn write<const N: usize>(
    rows: impl Iterator<Item = [String; N]>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let rows: Vec<_> = rows.collect();
    for row in &rows {
        let cells = row.iter().enumerate().map(|(i, cell)| {
            let width = rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
            format!("{cell:<width$}")
        });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}
