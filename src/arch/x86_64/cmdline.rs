//! The default kernel command line, and the reason for each word. docs/boot.md has the same table; a test compares.

use linux_loader::loader::Cmdline;

use super::layout::{VIRTIO_MMIO_LEN, VirtioSlot};
use crate::config::{ConfigError, KernelConfig, MAX_CMDLINE, check_cmdline};

/// The serial port as a console.
pub const SERIAL_CONSOLE: (&str, &str) =
    ("console=ttyS0", "the serial port is a console; left out where there is none (`--serial null`)");
/// The virtio console.
pub const VIRTIO_CONSOLE: (&str, &str) = ("console=hvc0", "with `--console` only: hvc0 is a console");

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

/// The root file system is on the first disk.
pub const ROOT: &str = "root=/dev/vda rw";
/// As [`ROOT`], on a disk that cannot be written.
pub const ROOT_READ_ONLY: &str = "root=/dev/vda ro";

/// What the command line tells of the machine.
#[derive(Clone, Copy, Debug)]
pub struct CmdlineConfig<'a> {
    /// The consoles that are there. The last one is `/dev/console`: init's input and output.
    pub consoles: &'a [&'static str],
    /// Number of vCPUs.
    pub cpus: u32,
    /// What tells of the root file system, where it is on a disk.
    pub root: Option<&'static str>,
    /// The virtio-mmio devices to tell of: those that ACPI does not tell of.
    pub virtio: &'a [VirtioSlot],
}

/// The whole command line: default words (or `--cmdline`), the devices, then `--append`.
///
/// # Errors
/// Longer than Linux takes.
pub fn command_line(kernel: &KernelConfig, config: CmdlineConfig) -> Result<Cmdline, ConfigError> {
    let CmdlineConfig { consoles, cpus, root, virtio } = config;
    // Linux, Documentation/admin-guide/kernel-parameters.txt: `virtio_mmio.device=<size>@<baseaddr>:<irq>`.
    let device =
        |s: &VirtioSlot| format!("virtio_mmio.device={VIRTIO_MMIO_LEN:#x}@{:#x}:{}", s.address, s.gsi);
    let devices: Vec<_> = virtio.iter().map(device).collect();
    let mut words = Vec::new();
    match &kernel.cmdline {
        Some(line) => words.push(line.as_str()),
        None => {
            words.extend(consoles);
            words.extend(DEFAULT.iter().map(|(word, _)| *word));
            words.extend((cpus == 1).then_some(ONE_CPU.0));
        }
    }
    words.extend(devices.iter().map(String::as_str));
    words.extend(root);
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

    fn line(change: impl Fn(&mut KernelConfig), consoles: &[&'static str]) -> String {
        let mut kernel = VmConfig::new("k".into()).kernel;
        change(&mut kernel);
        command_line(&kernel, CmdlineConfig { consoles, cpus: 1, root: None, virtio: &[] })
            .unwrap()
            .as_cstring()
            .unwrap()
            .into_string()
            .unwrap()
    }

    #[test]
    fn append_stands_last_and_cmdline_replaces() {
        let text = line(|k| k.append = "loglevel=7 -- /bin/true".into(), &["console=ttyS0", "console=hvc0"]);
        assert!(text.starts_with("console=ttyS0 console=hvc0 quiet"), "{text}");
        assert!(text.ends_with("loglevel=7 -- /bin/true"), "{text}");
        assert_eq!(
            line(|k| (k.cmdline, k.append) = (Some("a".into()), "b".into()), &["console=hvc0"]),
            "a b"
        );
    }

    #[test]
    fn devices_stand_before_what_goes_to_init() {
        let mut kernel = VmConfig::new("k".into()).kernel;
        kernel.append = "-- /bin/sh".into();
        let virtio = [VirtioSlot { address: 0xe000_0000, gsi: 5 }];
        let config = CmdlineConfig { consoles: &[], cpus: 2, root: Some(ROOT), virtio: &virtio };
        let text = command_line(&kernel, config).unwrap().as_cstring().unwrap().into_string().unwrap();
        assert!(
            text.ends_with(" virtio_mmio.device=0x1000@0xe0000000:5 root=/dev/vda rw -- /bin/sh"),
            "{text}"
        );
    }

    #[test]
    fn no_console_no_word() {
        assert!(!line(|_| {}, &[]).contains("console="));
    }

    #[test]
    fn the_sum_of_both_has_a_limit() {
        let mut kernel = VmConfig::new("k".into()).kernel;
        kernel.append = "x".repeat(MAX_CMDLINE - 20);
        assert!(matches!(
            command_line(&kernel, CmdlineConfig { consoles: &[], cpus: 2, root: None, virtio: &[] }),
            Err(ConfigError::CmdlineTooLong(_))
        ));
    }

    #[test]
    fn the_docs_explain_every_word() {
        let docs = include_str!("../../../docs/boot.md");
        for (word, _) in DEFAULT.iter().chain(&[SERIAL_CONSOLE, VIRTIO_CONSOLE, ONE_CPU]) {
            assert!(docs.contains(&format!("| `{word}` |")), "docs/boot.md lacks a row for {word}");
        }
    }
}
