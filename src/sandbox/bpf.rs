//! From tables of rules to filters, at compile time: nothing is left to do at start but to hand one over.
//!
//! The rules of a filter form a binary tree over the call's number, not a list as those that seccompiler makes, and are
//! as short as they can be: when a filter is installed, the kernel compiles it anew for each thread and runs it once for
//! each of its 450 system calls (`seccomp_cache_prepare`). That both decide alike is a test.

use seccompiler::sock_filter;

/// What is allowed, on which condition, and why.
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "names and reasons are for people and docs/security.md, which is a test")
)]
pub(super) struct Rule {
    pub number: u32,
    pub answer: Answer,
    pub checks: &'static [Check],
    pub why: &'static str,
}

/// What becomes of a call that passes its checks.
#[derive(Clone, Copy)]
pub(super) enum Answer {
    Allow,
    /// It fails with this error: for calls that libraries try and can do without.
    Errno(u16),
}

/// A condition on the low 32 bits of an argument (0 to 5), which are all that the kernel looks at in these calls.
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "names and reasons are for people and docs/security.md, which is a test")
)]
pub(super) enum Check {
    /// It is one of these, by their names.
    Is(u8, &'static str, &'static [(&'static str, u32)]),
    /// It has none of these bits.
    Without(u8, &'static str, (&'static str, u32)),
    /// It is the number of this process.
    OwnProcess(u8),
}

pub(super) const fn allow(number: libc::c_long, why: &'static str) -> Rule {
    Rule { number: number as u32, answer: Answer::Allow, checks: &[], why }
}

pub(super) const fn allow_if(number: libc::c_long, checks: &'static [Check], why: &'static str) -> Rule {
    Rule { number: number as u32, answer: Answer::Allow, checks, why }
}

pub(super) const fn fails(number: libc::c_long, errno: libc::c_int, why: &'static str) -> Rule {
    Rule { number: number as u32, answer: Answer::Errno(errno as u16), checks: &[], why }
}

/// Instructions that a filter may have; a table that makes more does not compile.
const ROOM: usize = 640;
/// Rules that a filter may have.
const MAX_RULES: usize = 128;
/// Places of a filter that have the number of this process.
const MAX_MARKS: usize = 4;

// Classic BPF (Linux, `include/uapi/linux/filter.h`, `bpf_common.h`): accumulator loads, jumps, returns.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

// `struct seccomp_data` (Linux, `include/uapi/linux/seccomp.h`), in bytes.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// `AUDIT_ARCH_X86_64`.
const X86_64: u32 = 0xc000_003e;

/// SIGSYS, whose handler says which call it was; where that is not in place, the kernel ends the process.
const REFUSE: u32 = libc::SECCOMP_RET_TRAP;

/// Rules that share their two returns, so that jumps reach them.
const SECTION: usize = 48;
/// Jumps whose distance is known at the section's end.
const TO_ALLOW: u8 = 254;
const TO_REFUSE: u8 = 255;

/// A filter.
pub(super) struct Program {
    code: [sock_filter; ROOM],
    len: usize,
    marks: [usize; MAX_MARKS],
    marked: usize,
}

impl Program {
    /// Makes one filter of `tables`. Each call stands in one rule only.
    pub(super) const fn new(tables: &[&'static [Rule]]) -> Self {
        let mut program = Self {
            code: [const { instruction(RETURN, 0, 0, REFUSE) }; ROOM],
            len: 0,
            marks: [0; MAX_MARKS],
            marked: 0,
        };
        let (rules, count) = sorted(tables);
        program.add(LOAD, 0, 0, ARCHITECTURE);
        // A call by way of the 32-bit interface has other numbers.
        program.add(IF_EQUAL, 1, 0, X86_64);
        program.add(RETURN, 0, 0, REFUSE);
        program.add(LOAD, 0, 0, NUMBER);
        program.section(&rules, 0, count);
        program
    }

    /// The filter for process `own`.
    pub(super) fn code(&self, own: u32) -> Vec<sock_filter> {
        let mut code = self.code[..self.len].to_vec();
        for mark in &self.marks[..self.marked] {
            code[*mark].k = own;
        }
        code
    }

    /// Rules that end in the same two returns, or two such halves: a conditional jump reaches 255 instructions far, a
    /// plain one any number.
    const fn section(&mut self, rules: &[Option<&'static Rule>; MAX_RULES], from: usize, to: usize) {
        if to - from > SECTION {
            let middle = usize::midpoint(from, to);
            self.add(IF_AT_LEAST, 0, 1, number(rules, middle));
            let jump = self.len;
            self.add(JUMP, 0, 0, 0);
            self.section(rules, from, middle);
            self.code[jump].k = (self.len - jump - 1) as u32;
            return self.section(rules, middle, to);
        }
        let start = self.len;
        self.tree(rules, from, to);
        self.end(start);
    }

    /// Adds the two returns, and directs the jumps from `start` on to them.
    const fn end(&mut self, start: usize) {
        let mut i = start;
        while i < self.len {
            if is_conditional(self.code[i].code) {
                self.code[i].jt = self.resolved(i, self.code[i].jt);
                self.code[i].jf = self.resolved(i, self.code[i].jf);
            }
            i += 1;
        }
        self.add(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW);
        self.add(RETURN, 0, 0, REFUSE);
    }

    const fn resolved(&self, from: usize, jump: u8) -> u8 {
        match jump {
            TO_ALLOW => distance(from, self.len),
            TO_REFUSE => distance(from, self.len + 1),
            near => near,
        }
    }

    const fn tree(&mut self, rules: &[Option<&'static Rule>; MAX_RULES], from: usize, to: usize) {
        let middle = usize::midpoint(from, to);
        if to - from == 1 {
            let Some(rule) = rules[middle] else { panic!("a table without rules") };
            return self.leaf(rule);
        }
        let branch = self.len;
        self.add(IF_AT_LEAST, 0, 0, number(rules, middle));
        self.tree(rules, from, middle);
        self.code[branch].jt = distance(branch, self.len);
        self.tree(rules, middle, to);
    }

    const fn leaf(&mut self, rule: &'static Rule) {
        match rule.answer {
            Answer::Allow if rule.checks.is_empty() => self.add(IF_EQUAL, TO_ALLOW, TO_REFUSE, rule.number),
            Answer::Allow => {
                self.add(IF_EQUAL, 0, TO_REFUSE, rule.number);
                let mut i = 0;
                while i < rule.checks.len() {
                    self.check(&rule.checks[i], i + 1 == rule.checks.len());
                    i += 1;
                }
            }
            Answer::Errno(errno) => {
                self.add(IF_EQUAL, 0, TO_REFUSE, rule.number);
                self.add(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32);
            }
        }
    }

    const fn check(&mut self, check: &'static Check, last: bool) {
        let (Check::Is(argument, ..) | Check::Without(argument, ..) | Check::OwnProcess(argument)) = check;
        self.add(LOAD, 0, 0, ARGUMENTS + 8 * *argument as u32);
        let passed = if last { TO_ALLOW } else { 0 };
        match check {
            Check::Is(_, _, values) => {
                let mut i = 0;
                while i < values.len() {
                    let left = values.len() - i - 1;
                    let found = if last { TO_ALLOW } else { left as u8 };
                    self.add(IF_EQUAL, found, if left == 0 { TO_REFUSE } else { 0 }, values[i].1);
                    i += 1;
                }
            }
            Check::Without(_, _, bits) => self.add(IF_ANY_BIT, TO_REFUSE, passed, bits.1),
            Check::OwnProcess(_) => {
                self.marks[self.marked] = self.len;
                self.marked += 1;
                self.add(IF_EQUAL, passed, TO_REFUSE, 0);
            }
        }
    }

    const fn add(&mut self, code: u16, if_true: u8, if_false: u8, k: u32) {
        self.code[self.len] = instruction(code, if_true, if_false, k);
        self.len += 1;
    }
}

const fn is_conditional(code: u16) -> bool {
    matches!(code, IF_EQUAL | IF_AT_LEAST | IF_ANY_BIT)
}

/// How far a jump at `from` to `to` is.
const fn distance(from: usize, to: usize) -> u8 {
    let distance = to - from - 1;
    assert!(distance < TO_ALLOW as usize, "a jump is too far: make SECTION smaller");
    distance as u8
}

const fn number(rules: &[Option<&'static Rule>; MAX_RULES], at: usize) -> u32 {
    match rules[at] {
        Some(rule) => rule.number,
        None => panic!("a table without rules"),
    }
}

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// All rules by their numbers, and how many they are.
const fn sorted(tables: &[&'static [Rule]]) -> ([Option<&'static Rule>; MAX_RULES], usize) {
    let mut rules = [None; MAX_RULES];
    let mut count: usize = 0;
    let mut t = 0;
    while t < tables.len() {
        let mut r = 0;
        while r < tables[t].len() {
            let rule = &tables[t][r];
            let mut at = count;
            while let Some(before) = at.checked_sub(1)
                && let Some(other) = rules[before]
            {
                let other: &Rule = other;
                assert!(other.number != rule.number, "a call stands in two rules");
                if other.number < rule.number {
                    break;
                }
                rules[at] = rules[before];
                at = before;
            }
            rules[at] = Some(rule);
            count += 1;
            r += 1;
        }
        t += 1;
    }
    (rules, count)
}
