//! `microvm compare`: the same image and command in a process, a container and a VM.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::fs::{Access, access};
use rustix::io::Errno;

use crate::compare::{Fingerprint, Measure, Plan, Report, Series, measure, short, to_html};
use crate::config::MemoryConfig;
use crate::container::Isolation;

use super::CliError;
use super::boot::parse_timeout;
use super::table::{self, Format};

const AFTER_HELP: &str = "Each isolation is run in turn (A B C A B C) by this program itself, a warm-up first that does not count. A sample that
fails, or prints something else than the first one, ends the comparison: it is not left out. It needs root, and for
containers crun or runc. docs/compare.md says what is in each figure.

Exit status:
  0  done
  1  a sample failed, or the page cannot be written
  2  wrong usage

Examples:
  sudo microvm compare alpine -- true
  sudo microvm compare --runs 50 --html compare.html python:3 -- python -c 'print(6 * 7)'
  sudo microvm compare --isolation process,container --format json alpine -- true | jq '.series[].measures'";

/// More says nothing more, and takes days.
const MAX_RUNS: u64 = 10_000;

/// Flags of `microvm compare`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct CompareArgs {
    /// Samples of each isolation that count
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=MAX_RUNS))]
    runs: u64,
    /// Which take part, in the order of their turns; ratios are to the first
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "process,container,vm")]
    isolation: Vec<Isolation>,
    /// Memory of each [default: a VM's own; no limit for the others]
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
    /// Processors of each [default: 1 of a VM's; no limit for the others]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// The VM's kernel by its name in microvm kernel ls [default: the one of microvm kernel default]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// A run that takes longer has failed
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = parse_timeout)]
    timeout: Duration,
    /// How the report is written
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// Write the report as a page for browsers, too
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// The image: a name, a digest or the first digits of an id
    image: String,
    /// The command and its arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(super) fn run(args: CompareArgs) -> Result<u8, CliError> {
    let plan = plan(&args)?;
    args.html.as_deref().map_or(Ok(()), can_write)?;
    let bar = bar((plan.runs + 1) * plan.isolations.len());
    let samples = measure(&plan, || bar.inc(1));
    bar.finish_and_clear();
    let report = Report::new(&plan, samples?, Fingerprint::of_host());
    if let Some(path) = &args.html {
        fs::write(path, to_html(&report)).map_err(|e| failed(path, e))?;
    }
    let mut out = io::stdout().lock();
    match args.format {
        Format::Json => {
            serde_json::to_writer_pretty(&mut out, &report).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        Format::Table => write_table(&report, &mut out)?,
    }
    Ok(0)
}

/// Asked before minutes of measuring. What is there stays until there is something to take its place.
fn can_write(path: &Path) -> Result<(), CliError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if path.is_dir() {
        return Err(failed(path, Errno::ISDIR.into()));
    }
    let target = if path.exists() { path } else { folder };
    access(target, Access::WRITE_OK).map_err(|e| failed(path, e.into()))
}

fn failed(path: &Path, source: io::Error) -> CliError {
    CliError::Html { path: path.into(), source }
}

fn plan(args: &CompareArgs) -> Result<Plan, CliError> {
    let usage = |words: String| Err(CliError::Usage(words));
    if let Some(text) = &args.memory
        && let Err(e) = text.parse::<MemoryConfig>()
    {
        return usage(format!("--memory {text:?}: {e}"));
    }
    let twice = |(index, isolation): &(usize, &Isolation)| args.isolation[..*index].contains(isolation);
    if let Some((_, isolation)) = args.isolation.iter().enumerate().find(twice) {
        return usage(format!("--isolation names {isolation} twice"));
    }
    Ok(Plan {
        image: args.image.clone(),
        command: args.command.clone(),
        runs: usize::try_from(args.runs).unwrap_or(1),
        isolations: args.isolation.clone(),
        memory: args.memory.clone(),
        cpus: args.cpus,
        kernel: args.kernel.clone(),
        timeout: args.timeout,
        measures_memory: Plan::can_measure_memory(),
    })
}

fn bar(steps: usize) -> ProgressBar {
    // Nothing is drawn where standard error is no terminal.
    let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta}");
    bar.with_style(style.unwrap_or(ProgressStyle::default_bar()))
}

fn write_table(report: &Report, out: &mut dyn Write) -> io::Result<()> {
    let to_base = format!("TO {}", report.base().to_uppercase());
    let head = ["MEASURE", "ISOLATION", "MIN", "MEDIAN", "P95", &to_base, "95% INTERVAL"].map(String::from);
    let count = report.series.first().map_or(0, |series| series.measures.len());
    let is_there = |index: usize| move |series: &&Series| series.measures[index].summary.is_some();
    let rows = (0..count).flat_map(|index| {
        let series = report.series.iter().filter(is_there(index));
        series.map(move |series| row(series.isolation, &series.measures[index]))
    });
    table::write(std::iter::once(head).chain(rows), out)?;
    writeln!(out)?;
    let kinds = report.series.iter().map(|series| series.isolation);
    let head: Vec<_> =
        std::iter::once("STAGE".into()).chain(kinds.map(|kind| kind.name().to_uppercase())).collect();
    let stages = report.series.first().map_or(0, |series| series.stages.len());
    let cells = |index: usize| -> Vec<String> {
        let name = report.series.first().map_or("", |series| series.stages[index].name).to_string();
        let times = report.series.iter().map(|series| {
            let stage = &series.stages[index];
            stage.ms.map_or_else(
                || stage.what.split(':').next().unwrap_or_default().into(),
                |ms| format!("{} ms", short(ms)),
            )
        });
        std::iter::once(name).chain(times).collect()
    };
    let rows: Vec<_> = std::iter::once(head).chain((0..stages).map(cells)).collect();
    table::write(rows.into_iter().map(padded), out)?;
    writeln!(out, "\n{}", report.host.line())?;
    report.remarks.iter().try_for_each(|remark| writeln!(out, "Note: {remark}"))
}

/// Of a table with one column for the names and up to three isolations.
fn padded(cells: Vec<String>) -> [String; 4] {
    let mut cells = cells.into_iter();
    std::array::from_fn(|_| cells.next().unwrap_or_default())
}

fn row(isolation: Isolation, measure: &Measure) -> [String; 7] {
    let unit = if measure.unit.is_empty() { String::new() } else { format!(" ({})", measure.unit) };
    let none = || "-".to_string();
    let values = measure.summary.map(|s| [s.min, s.median, s.p95].map(short));
    let [min, median, p95] = values.unwrap_or_else(|| [none(), none(), none()]);
    let ratio = measure.ratio.map_or_else(none, |ratio| short(ratio.value));
    let interval = measure.ratio.map_or_else(none, |r| format!("{} - {}", short(r.low), short(r.high)));
    [format!("{}{unit}", measure.name), isolation.name().into(), min, median, p95, ratio, interval]
}
