//! The same image and command in a process, a container and a VM, measured in turn.

mod host;
mod html;
mod report;
mod sample;
mod stages;
mod stats;

use std::time::Duration;

use thiserror::Error;

use crate::container::{Cgroup, Isolation};

pub use host::Fingerprint;
pub use html::{short, to_html};
pub use report::{Measure, Report, Series};
pub use sample::{Phase, Printed, Sample, VmMemory};
pub use stages::{Stage, stages};
pub use stats::{Ratio, Summary, median, quantile};

/// Nothing can be compared.
#[derive(Debug, Error)]
pub enum CompareError {
    /// A run that failed. It is not left out: the others would then be of what is left.
    #[error("nothing is compared: {isolation}, {}: {reason}", round_name(*round))]
    Sample {
        /// Of which kind.
        isolation: Isolation,
        /// 0 is the warm-up.
        round: usize,
        /// What happened.
        reason: String,
    },
}

fn round_name(round: usize) -> String {
    if round == 0 { "warm-up".into() } else { format!("run {round}") }
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image.
    pub image: String,
    /// The command; the image's own where it is empty.
    pub command: Vec<String>,
    /// Samples of each kind that count.
    pub runs: usize,
    /// The kinds, in the order in which they take turns. Ratios are to the first.
    pub isolations: Vec<Isolation>,
    /// `--memory` for all of them.
    pub memory: Option<String>,
    /// `--cpus` for all of them.
    pub cpus: Option<u32>,
    /// `--kernel` for VMs.
    pub kernel: Option<String>,
    /// A run that takes longer has failed.
    pub timeout: Duration,
    /// Control groups of version 2 are there, to charge memory to.
    pub measures_memory: bool,
}

/// The name of each sample's container, so that what they print of it is the same.
const HOSTNAME: &str = "compare";

impl Plan {
    /// Whether control groups can tell what memory a run takes.
    #[must_use]
    pub fn can_measure_memory() -> bool {
        Cgroup::is_there()
    }

    /// What stands behind `microvm` and before the image.
    fn arguments(&self, isolation: Isolation) -> Vec<String> {
        let mut words = vec!["run", "--rm", "--pull", "never", "--timeline=json", "--network", "none"];
        let timeout = format!("{}ms", self.timeout.as_millis());
        words.extend(["--isolation", isolation.name(), "--hostname", HOSTNAME, "--timeout", &timeout]);
        let mut words: Vec<_> = words.into_iter().map(String::from).collect();
        let mut add = |flag: &str, value: Option<String>| {
            words.extend(value.into_iter().flat_map(|value| [flag.into(), value]));
        };
        add("--memory", self.memory.clone());
        add("--cpus", self.cpus.map(|cpus| cpus.to_string()));
        add("--kernel", self.kernel.clone().filter(|_| isolation == Isolation::Vm));
        words
    }
}

/// Takes the samples in turn (A B C A B C), a warm-up first that does not count, and checks each: it must have ended with
/// status 0 and printed what the very first one did. `step` is called after each.
///
/// # Errors
/// A sample failed: which, and why.
pub fn measure(plan: &Plan, mut step: impl FnMut()) -> Result<Vec<Vec<Sample>>, CompareError> {
    let mut samples: Vec<Vec<Sample>> = plan.isolations.iter().map(|_| Vec::new()).collect();
    let mut expected: Option<Printed> = None;
    for round in 0..=plan.runs {
        for (series, isolation) in samples.iter_mut().zip(&plan.isolations) {
            let mut sample = sample::take(plan, *isolation, round)?;
            let printed = std::mem::take(&mut sample.printed);
            let expected = expected.get_or_insert_with(|| printed.clone());
            if let Some(reason) = difference(expected, &printed) {
                return Err(CompareError::Sample { isolation: *isolation, round, reason });
            }
            if round > 0 {
                series.push(sample);
            }
            step();
        }
    }
    Ok(samples)
}

/// How what was printed differs from what the first sample printed.
fn difference(expected: &Printed, printed: &Printed) -> Option<String> {
    let streams = [
        ("standard output", &expected.output, &printed.output),
        ("standard error", &expected.errors, &printed.errors),
    ];
    let (stream, expected, printed) =
        streams.into_iter().find(|(_, expected, printed)| expected != printed)?;
    let lines = |bytes: &[u8]| -> Vec<String> {
        String::from_utf8_lossy(bytes).lines().map(|line| line.escape_debug().take(80).collect()).collect()
    };
    let (expected, printed) = (lines(expected), lines(printed));
    let same = expected.iter().zip(&printed).take_while(|(a, b)| a == b).count();
    let line = |lines: &[String]| lines.get(same).map_or("nothing".into(), |line| format!("{line:?}"));
    Some(format!(
        "its {stream} is not the first sample's: line {} is {} instead of {}: compare a command that always prints \
         the same",
        same + 1,
        line(&printed),
        line(&expected)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(output: &str, errors: &str) -> Printed {
        Printed { output: output.into(), errors: errors.into() }
    }

    #[test]
    fn outputs_must_be_the_same() {
        assert_eq!(difference(&printed("a\n", ""), &printed("a\n", "")), None);
        let words = difference(&printed("a\nb\n", ""), &printed("a\nc\n", "")).unwrap();
        assert!(
            words.contains("standard output") && words.contains("line 2 is \"c\" instead of \"b\""),
            "{words}"
        );
        let words = difference(&printed("a\n", "x"), &printed("a\n", "")).unwrap();
        assert!(words.contains("standard error") && words.contains("nothing instead of \"x\""), "{words}");
    }

    #[test]
    fn only_vms_have_kernels() {
        let plan = Plan {
            image: "i".into(),
            command: Vec::new(),
            runs: 1,
            isolations: Isolation::ALL.to_vec(),
            memory: Some("64M".into()),
            cpus: None,
            kernel: Some("tuned".into()),
            timeout: Duration::from_secs(2),
            measures_memory: false,
        };
        let words = |isolation| plan.arguments(isolation).join(" ");
        assert!(
            words(Isolation::Vm).contains("--kernel tuned") && words(Isolation::Vm).contains("--memory 64M")
        );
        assert!(!words(Isolation::Process).contains("--kernel"));
        assert!(
            words(Isolation::Container).contains("--isolation container --hostname compare --timeout 2000ms")
        );
    }

    #[test]
    fn a_failure_says_which_sample() {
        let error = CompareError::Sample { isolation: Isolation::Vm, round: 0, reason: "no".into() };
        assert_eq!(error.to_string(), "nothing is compared: vm, warm-up: no");
    }
}
