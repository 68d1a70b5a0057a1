//! `microvm logs`: what a container's program has printed.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::thread;

use clap::Args;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::container::{Container, ContainerError, Containers, LogReader, LogRecord};
use crate::sys::watch::{Happened, Watch};

use super::super::CliError;

const AFTER_HELP: &str =
    "What was printed as errors comes as errors here. The newest 16 MiB at least are there.

Exit status:
  0  done
  1  there is no such container, or its log is damaged
  2  wrong usage

Examples:
  microvm logs web
  microvm logs -f --tail 10 web
  microvm logs -t web 2>&1 | less";

/// Flags of `microvm logs`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct LogsArgs {
    /// Go on as the program prints more, until it ends
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last N lines
    #[arg(short = 'n', long, value_name = "N")]
    tail: Option<usize>,
    /// Put the time before each line
    #[arg(short, long)]
    timestamps: bool,
    /// The container: its name, its id or the first digits of it
    container: String,
}

pub fn run(args: &LogsArgs) -> Result<u8, CliError> {
    let container = Containers::of_user()?.find(&args.container)?;
    let failed = |source| ContainerError::Store { path: container.folder.clone(), source };
    let mut reader = LogReader::open(&container.folder).map_err(failed)?;
    // Watched from before the first look on, so that nothing is missed.
    let watch = args.follow.then(|| watch(&container, &reader)).transpose().map_err(failed)?;
    let mut printer = Printer { timestamps: args.timestamps, at_line_start: true };
    let mut first = Vec::new();
    while let Some(record) = reader.next_record().map_err(failed)? {
        match args.tail {
            Some(_) => first.push(record),
            None => printer.print(&record)?,
        }
    }
    last_lines(first, args.tail.unwrap_or(0)).iter().try_for_each(|record| printer.print(record))?;
    if let Some(mut watch) = watch {
        let mut happened = Happened::Change;
        loop {
            while let Some(record) = reader.next_record().map_err(failed)? {
                printer.print(&record)?;
            }
            // In this order: what it printed last is there when it has ended.
            if happened == Happened::End {
                break;
            }
            happened = watch.wait().map_err(failed)?;
        }
    }
    Ok(0)
}

/// Watches the log, and the container's end: the lock goes after the log is closed, so that no event of a file tells it.
fn watch(container: &Container, reader: &LogReader) -> io::Result<Watch> {
    let (end, to_end) = pipe_with(PipeFlags::CLOEXEC)?;
    let container = container.clone();
    thread::Builder::new().name("end".into()).spawn(move || {
        // One that was removed meanwhile has ended, too.
        let _ = container.wait();
        drop(to_end);
    })?;
    Watch::new(reader.paths(), end)
}

/// The records of the last `count` lines of each stream together.
fn last_lines(records: Vec<LogRecord>, count: usize) -> Vec<LogRecord> {
    let mut kept = VecDeque::new();
    let mut lines = 0;
    for (index, mut record) in records.into_iter().rev().enumerate() {
        // The line feed at the very end ends the last line, and begins none.
        let end = record.bytes.len() - usize::from(index == 0 && record.bytes.ends_with(b"\n"));
        let starts = (0..end).rev().filter(|place| record.bytes[*place] == b'\n');
        let cut = starts.take(count - lines).collect::<Vec<_>>();
        if cut.len() == count - lines {
            if let Some(place) = cut.last() {
                record.bytes.drain(..=*place);
                kept.push_front(record);
            }
            break;
        }
        lines += cut.len();
        kept.push_front(record);
    }
    kept.into()
}

struct Printer {
    timestamps: bool,
    at_line_start: bool,
}

impl Printer {
    fn print(&mut self, record: &LogRecord) -> io::Result<()> {
        let mut text = Vec::with_capacity(record.bytes.len());
        if self.timestamps {
            let time = humantime::format_rfc3339_millis(record.time).to_string();
            for line in record.bytes.split_inclusive(|byte| *byte == b'\n') {
                if std::mem::replace(&mut self.at_line_start, line.ends_with(b"\n")) {
                    text.extend_from_slice(time.as_bytes());
                    text.push(b' ');
                }
                text.extend_from_slice(line);
            }
        } else {
            text.extend_from_slice(&record.bytes);
        }
        if record.is_error { io::stderr().write_all(&text) } else { io::stdout().write_all(&text) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn the_last_lines_are_found_across_records() {
        let tail = |texts: &[&str], count| {
            let records = texts.iter().map(|text| LogRecord {
                time: UNIX_EPOCH,
                is_error: false,
                bytes: text.as_bytes().to_vec(),
            });
            let kept = last_lines(records.collect(), count);
            String::from_utf8(kept.into_iter().flat_map(|r| r.bytes).collect()).unwrap()
        };
        assert_eq!(tail(&["a\nb\nc\n"], 2), "b\nc\n");
        assert_eq!(tail(&["a\n", "b\n", "c\n"], 2), "b\nc\n");
        assert_eq!(tail(&["a\nb", "b\nc"], 2), "bb\nc");
        assert_eq!(tail(&["a\nb\n"], 5), "a\nb\n");
        assert_eq!(tail(&["a\nb\n"], 0), "");
        assert_eq!(tail(&[], 3), "");
    }
}
