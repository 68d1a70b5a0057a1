//! The default kernel command line, and the reason for each word. docs/boot.md has the same table; a test compares.

use linux_loader::loader::Cmdline;

use crate::config::{ConfigError, KernelConfig, MAX_CMDLINE, check_cmdline};

/// The console, given where there is a serial port.
pub const CONSOLE: &str = "console=ttyS0";

/// Words and what each is for.
pub const DEFAULT: &[(&str, &str)] = &[
    ("quiet", "each printed character costs two VM exits; `--append loglevel=7` prints all again"),
    ("panic=-1", "a panic ends the VM at once instead of hanging"),
    (
        "reboot=k",
        "one write to port 0x64 resets; hardware-reduced ACPI makes Linux try EFI and the BIOS first",
    ),
    ("pci=off", "there is no PCI bus to look for"),
    ("8250.nr_uarts=1", "there is one serial port; each further one would be probed"),
    ("8250.skip_txen_test=1", "no test for a bug of old UARTs"),
    ("i8042.noaux", "no mouse port: looking for one waits"),
    ("i8042.nokbd", "no keyboard: looking for one waits"),
    ("tsc=reliable", "KVM's TSC needs no watchdog, and no measuring between vCPUs"),
    ("no_timer_check", "no wait to see whether a timer interrupt comes"),
    (
        "io_delay=none",
        "no write to port 0x80 after each port access: an exit each, and 0x80 takes timeline marks",
    ),
    ("random.trust_cpu=on", "RDRAND seeds the random numbers, instead of a wait for entropy"),
    ("cryptomgr.notests", "no self-tests of algorithms at each boot"),
    ("rcupdate.rcu_expedited=1", "each wait for readers is short instead of a few timer ticks"),
];

/// Given to a guest with one vCPU.
pub const ONE_CPU: (&str, &str) = (
    "noreplace-smp",
    "lock prefixes stay: the kernel would patch thousands of places of its text to drop them",
);

/// The whole command line: default words (or `--cmdline`), then `--append`.
///
/// # Errors
/// Longer than Linux takes.
pub fn command_line(kernel: &KernelConfig, serial: bool, cpus: u32) -> Result<Cmdline, ConfigError> {
    let mut words = Vec::new();
    match &kernel.cmdline {
        Some(line) => words.push(line.as_str()),
        None => {
            words.extend(serial.then_some(CONSOLE));
            words.extend(DEFAULT.iter().map(|(word, _)| *word));
            words.extend((cpus == 1).then_some(ONE_CPU.0));
        }
    }
    words.push(&kernel.append);
    let line = words.join(" ").trim().to_string();
    check_cmdline(&line)?;
    // The capacity counts the NUL.
    Cmdline::try_from(&line, MAX_CMDLINE + 1).map_err(|_| ConfigError::CmdlineTooLong(line.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmConfig;

    fn line(change: impl Fn(&mut KernelConfig), serial: bool) -> String {
        let mut kernel = VmConfig::new("k".into()).kernel;
        change(&mut kernel);
        command_line(&kernel, serial, 1).unwrap().as_cstring().unwrap().into_string().unwrap()
    }

    #[test]
    fn append_stands_last_and_cmdline_replaces() {
        let text = line(|k| k.append = "loglevel=7 -- /bin/true".into(), true);
        assert!(text.starts_with("console=ttyS0 quiet"), "{text}");
        assert!(text.ends_with("loglevel=7 -- /bin/true"), "{text}");
        assert_eq!(line(|k| (k.cmdline, k.append) = (Some("a".into()), "b".into()), true), "a b");
    }

    #[test]
    fn no_serial_port_no_console() {
        assert!(!line(|_| {}, false).contains("console="));
    }

    #[test]
    fn the_sum_of_both_has_a_limit() {
        let mut kernel = VmConfig::new("k".into()).kernel;
        kernel.append = "x".repeat(MAX_CMDLINE - 20);
        assert!(matches!(command_line(&kernel, true, 2), Err(ConfigError::CmdlineTooLong(_))));
    }

    #[test]
    fn the_docs_explain_every_word() {
        let docs = include_str!("../../../docs/boot.md");
        for (word, _) in DEFAULT.iter().chain(&[(CONSOLE, ""), ONE_CPU]) {
            assert!(docs.contains(&format!("| `{word}` |")), "docs/boot.md lacks a row for {word}");
        }
    }
}
