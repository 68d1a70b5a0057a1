//! The filters, made at compile time, and handing one to the kernel.

use super::bpf::Program;
use super::rules::ThreadKind;
use super::{SandboxError, layer};

static VMM: Program = Program::new(ThreadKind::Vmm.tables());
static VMM_WITH_VSOCK: Program = Program::new(ThreadKind::VmmWithVsock.tables());
static VCPU: Program = Program::new(ThreadKind::Vcpu.tables());
static CONSOLE: Program = Program::new(ThreadKind::Console.tables());
static WORKER: Program = Program::new(ThreadKind::Worker.tables());
static VSOCK: Program = Program::new(ThreadKind::Vsock.tables());
static VHOST: Program = Program::new(ThreadKind::Vhost.tables());
static SHARE: Program = Program::new(ThreadKind::Share.tables());
static READ_ONLY_SHARE: Program = Program::new(ThreadKind::ReadOnlyShare.tables());
static CLEANER: Program = Program::new(ThreadKind::Cleaner.tables());
static CONTROL: Program = Program::new(ThreadKind::Control.tables());
static STREAMS: Program = Program::new(ThreadKind::Streams.tables());

fn program(kind: ThreadKind) -> &'static Program {
    match kind {
        ThreadKind::Vmm => &VMM,
        ThreadKind::VmmWithVsock => &VMM_WITH_VSOCK,
        ThreadKind::Vcpu => &VCPU,
        ThreadKind::Console => &CONSOLE,
        ThreadKind::Worker => &WORKER,
        ThreadKind::Vsock => &VSOCK,
        ThreadKind::Vhost => &VHOST,
        ThreadKind::Share => &SHARE,
        ThreadKind::ReadOnlyShare => &READ_ONLY_SHARE,
        ThreadKind::Cleaner => &CLEANER,
        ThreadKind::Control => &CONTROL,
        ThreadKind::Streams => &STREAMS,
    }
}

/// Confines the calling thread to the system calls of `kind`.
pub(super) fn install(kind: ThreadKind) -> Result<(), SandboxError> {
    let code = program(kind).code(std::process::id());
    seccompiler::apply_filter(&code).map_err(layer("install a seccomp filter"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Write;

    use proptest::prelude::*;
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, TargetArch, sock_filter,
    };

    use super::super::bpf::{Answer, Check, Rule};
    use super::super::rules::{COMMON, VMM as VMM_RULES, VSOCK as VSOCK_RULES, WORKERS};
    use super::*;
    use crate::sys::syscalls;

    const OWN: u32 = 4321;

    fn rules(kind: ThreadKind) -> impl Iterator<Item = &'static Rule> {
        kind.tables().iter().flat_map(|t| t.iter())
    }

    /// What the kernel does with the instructions that are used here; the answer is the filter's.
    fn run(code: &[sock_filter], number: u32, architecture: u32, arguments: [u64; 6]) -> u32 {
        let mut data = vec![number, architecture, 0, 0];
        data.extend(arguments.iter().flat_map(|a| [*a as u32, (*a >> 32) as u32]));
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let i = &code[at];
            at += 1;
            let jump = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
            match i.code {
                0x20 => accumulator = data[i.k as usize / 4],
                0x05 => at += i.k as usize,
                0x15 => at += jump(accumulator == i.k),
                0x25 => at += jump(accumulator > i.k),
                0x35 => at += jump(accumulator >= i.k),
                0x45 => at += jump(accumulator & i.k != 0),
                0x54 => accumulator &= i.k,
                0x06 => return i.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn condition(argument: u8, op: SeccompCmpOp, value: u32) -> SeccompCondition {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value.into()).unwrap()
    }

    /// The values that a check takes, one by one.
    fn conditions(check: &Check) -> Vec<SeccompCondition> {
        match check {
            Check::Is(argument, _, values) => {
                values.iter().map(|v| condition(*argument, SeccompCmpOp::Eq, v.1)).collect()
            }
            Check::Without(argument, _, (_, bits)) => {
                vec![condition(*argument, SeccompCmpOp::MaskedEq(u64::from(*bits)), 0)]
            }
            Check::OwnProcess(argument) => vec![condition(*argument, SeccompCmpOp::Eq, OWN)],
        }
    }

    /// The same tables by way of seccompiler.
    fn reference(kind: ThreadKind) -> BpfProgram {
        let mut map = BTreeMap::new();
        for rule in rules(kind).filter(|r| matches!(r.answer, Answer::Allow)) {
            // Each check has alternatives, and every check must hold: all combinations.
            let mut combinations = vec![Vec::new()];
            for check in rule.checks {
                let alternatives = conditions(check);
                let with = |so_far: &Vec<SeccompCondition>| -> Vec<_> {
                    alternatives.iter().map(|c| [so_far.clone(), vec![c.clone()]].concat()).collect()
                };
                combinations = combinations.iter().flat_map(with).collect();
            }
            let is_checked = !rule.checks.is_empty();
            let alternatives = combinations.into_iter().filter(|_| is_checked);
            let alternatives = alternatives.map(|c| SeccompRule::new(c).unwrap()).collect();
            map.insert(rule.number.into(), alternatives);
        }
        SeccompFilter::new(map, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)
            .unwrap()
            .try_into()
            .unwrap()
    }

    const X86_64: u32 = 0xc000_003e;

    #[track_caller]
    fn decide_alike(number: u32, arguments: [u64; 6]) {
        for kind in ThreadKind::ALL {
            let ours = run(&program(kind).code(OWN), number, X86_64, arguments);
            let theirs = run(&reference(kind), number, X86_64, arguments);
            let fails = rules(kind).any(|r| r.number == number && matches!(r.answer, Answer::Errno(_)));
            if fails {
                assert_eq!(ours, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32, "{kind:?} {number}");
            } else {
                assert_eq!(ours, theirs, "{kind:?} {number} {arguments:x?}");
            }
        }
    }

    #[test]
    fn every_call_is_decided_as_seccompiler_does() {
        for number in (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
            decide_alike(number, [0; 6]);
            decide_alike(number, [u64::MAX; 6]);
            decide_alike(number, [OWN.into(); 6]);
        }
        for rule in ThreadKind::ALL.into_iter().flat_map(rules) {
            for check in rule.checks {
                let values: Vec<u32> = match check {
                    Check::Is(_, _, values) => values.iter().map(|v| v.1).collect(),
                    Check::Without(_, _, (_, bits)) => vec![*bits],
                    Check::OwnProcess(_) => vec![OWN],
                };
                for value in values.into_iter().flat_map(|v| [v.wrapping_sub(1), v, v | 1 << 31, v + 1]) {
                    // The upper half means nothing to the kernel in these calls.
                    decide_alike(rule.number, [u64::from(value); 6]);
                    decide_alike(rule.number, [u64::from(value) | 7 << 32; 6]);
                }
            }
        }
    }

    #[test]
    fn sockets_are_unix_streams_and_only_where_there_is_a_vsock() {
        let stream = (libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) as u64;
        let is_allowed = |kind, family: i32, what: u64| {
            let code = program(kind).code(OWN);
            let answer = run(&code, libc::SYS_socket as u32, X86_64, [family as u64, what, 0, 0, 0, 0]);
            answer == libc::SECCOMP_RET_ALLOW
        };
        for kind in ThreadKind::ALL {
            let may = matches!(kind, ThreadKind::Vsock | ThreadKind::VmmWithVsock);
            assert_eq!(is_allowed(kind, libc::AF_UNIX, stream), may, "{kind:?}");
            for (family, what) in [
                (libc::AF_INET, stream),
                (libc::AF_VSOCK, stream),
                (libc::AF_NETLINK, stream),
                (libc::AF_UNIX, stream & !(libc::SOCK_CLOEXEC as u64)),
                (libc::AF_UNIX, libc::SOCK_DGRAM as u64),
                (libc::AF_UNIX, libc::SOCK_SEQPACKET as u64),
            ] {
                assert!(!is_allowed(kind, family, what), "{kind:?} {family} {what:#x}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn arguments_are_decided_as_seccompiler_does(number in 0u32..480, arguments: [u64; 6]) {
            decide_alike(number, arguments);
        }
    }

    #[test]
    fn the_32_bit_interface_is_refused() {
        for kind in ThreadKind::ALL {
            for architecture in [0x4000_0003, 0] {
                let answer = run(&program(kind).code(OWN), 1, architecture, [0; 6]);
                assert_eq!(answer, libc::SECCOMP_RET_TRAP, "{kind:?}");
            }
        }
    }

    #[test]
    fn what_the_violation_handler_calls_is_allowed() {
        for kind in ThreadKind::ALL {
            let code = program(kind).code(OWN);
            for (number, first) in [
                (libc::SYS_write, 2),
                (libc::SYS_exit_group, 159),
                (libc::SYS_prctl, libc::PR_GET_NAME as u64),
                (libc::SYS_rt_sigprocmask, 0),
            ] {
                let answer = run(&code, number as u32, X86_64, [first, 0, 0, 0, 0, 0]);
                assert_eq!(answer, libc::SECCOMP_RET_ALLOW, "{kind:?} {number}");
            }
        }
    }

    /// A vCPU's exit costs this much at most.
    #[test]
    fn kvm_run_is_allowed_soon() {
        let code = program(ThreadKind::Vcpu).code(OWN);
        let data = [libc::SYS_ioctl as u32, X86_64];
        let (mut at, mut steps, mut accumulator) = (0, 0, 0);
        while code[at].code != 0x06 {
            let i = &code[at];
            (at, steps) = (at + 1, steps + 1);
            match i.code {
                0x20 => accumulator = data.get(i.k as usize / 4).copied().unwrap_or(0xae80),
                0x05 => at += i.k as usize,
                0x15 => at += usize::from(if accumulator == i.k { i.jt } else { i.jf }),
                0x35 => at += usize::from(if accumulator >= i.k { i.jt } else { i.jf }),
                other => panic!("instruction {other:#x}"),
            }
        }
        assert!(steps < 20, "{steps} instructions for a KVM_RUN");
    }

    /// The tables as docs/security.md has them.
    fn documented() -> String {
        let mut text = String::new();
        for (title, table) in [
            ("Every thread", COMMON),
            ("VMM thread", VMM_RULES),
            ("VMM thread, for the workers of devices, and these", WORKERS),
            ("Workers of devices", ThreadKind::Worker.tables()[2]),
            ("Worker of the socket device", ThreadKind::Vsock.tables()[1]),
            ("Worker of the socket device, and the VMM thread where there is one", VSOCK_RULES),
            ("Thread of a network card with vhost", ThreadKind::Vhost.tables()[1]),
            ("Threads of a share", ThreadKind::Share.tables()[1]),
            ("Threads of a share that can be written", ThreadKind::Share.tables()[2]),
            ("Threads of a share that is read-only", ThreadKind::ReadOnlyShare.tables()[2]),
            ("Cleaners", ThreadKind::Cleaner.tables()[1]),
            ("vCPU threads", ThreadKind::Vcpu.tables()[1]),
            ("Console thread", ThreadKind::Console.tables()[1]),
            ("Control thread", ThreadKind::Control.tables()[1]),
            ("Streams of a container's program", ThreadKind::Streams.tables()[1]),
        ] {
            write!(text, "\n### {title}\n\n| call | if | reason |\n|---|---|---|\n").unwrap();
            for rule in table {
                let name = syscalls::name(rule.number);
                let mut conditions: Vec<String> = rule.checks.iter().map(describe).collect();
                if let Answer::Errno(errno) = rule.answer {
                    let error = std::io::Error::from_raw_os_error(errno.into());
                    conditions.push(format!("never: {error}"));
                }
                writeln!(text, "| `{name}` | {} | {} |", conditions.join(", "), rule.why).unwrap();
            }
        }
        text
    }

    fn describe(check: &Check) -> String {
        match check {
            Check::Is(_, what, values) => {
                let names: Vec<_> = values.iter().map(|v| v.0).collect();
                format!("{what}: {}", names.join(", "))
            }
            Check::Without(_, what, (name, _)) => format!("{what} without {name}"),
            Check::OwnProcess(_) => "this process".into(),
        }
    }

    /// `MICROVM_WRITE_DOCS=1 cargo test documentation` writes them anew.
    #[test]
    fn the_documentation_has_the_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/security.md");
        let page = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- tables: begin -->\n", "\n<!-- tables: end -->");
        let (head, rest) = page.split_once(begin).unwrap();
        let (tables, tail) = rest.split_once(end).unwrap();
        let expected = documented();
        if std::env::var_os("MICROVM_WRITE_DOCS").is_some() {
            std::fs::write(path, [head, begin, &expected, end, tail].concat()).unwrap();
        } else {
            assert!(
                tables == expected,
                "docs/security.md is stale: MICROVM_WRITE_DOCS=1 cargo test documentation"
            );
        }
    }

    #[test]
    fn every_rule_has_a_name_and_a_reason() {
        for rule in ThreadKind::ALL.into_iter().flat_map(rules) {
            assert!(syscalls::name(rule.number) != "unknown" && rule.why.len() > 3, "{}", rule.number);
        }
    }
}
