//! `microvm kernel`, and what boots the kernel that it chose.

mod common;

use common::{Host, assert_fails, out, power_off, stdout};

#[test]
fn the_chosen_kernel_is_booted_where_none_is_named() {
    let host = Host::new();
    assert_fails(&host.microvm(["boot"]).output().unwrap(), 2, &["--kernel", "microvm kernel import"]);
    host.kernel(&power_off());
    let other = common::elf(&[out(0xf4, 42), power_off()].concat(), common::Protocol::Pvh);
    host.file("other", &other);
    for words in
        [&["import", "vmlinux"][..], &["import", "other", "--name", "second"], &["default", "second"]]
    {
        let output = host.microvm(["kernel"].iter().chain(words)).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", common::stderr(&output));
    }
    let list = stdout(&host.microvm(["kernel", "ls"]).output().unwrap());
    let rows: Vec<Vec<_>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[1], ["second", "vmlinux", "1M", "-", "yes"], "{list}");
    assert_eq!(rows[2], ["vmlinux", "vmlinux", "1M", "-", "-"], "{list}");
    let flags =
        ["boot", "--allow-software-kvm", "--memory", "16M", "--timeout", "60s", "--exit-code-port", "0xf4"];
    assert_eq!(host.microvm(flags).status().unwrap().code(), Some(42));
    let json = stdout(&host.microvm(["kernel", "ls", "--format", "json"]).output().unwrap());
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()[0]["default"], true);
}

#[test]
fn bad_input_is_one_line() {
    let host = Host::new();
    host.kernel(&power_off());
    host.file("text", b"no kernel");
    let run = |words: &[&str]| host.microvm(["kernel"].iter().chain(words)).output().unwrap();
    assert!(run(&["import", "vmlinux", "--name", "a"]).status.success());
    for (words, expected) in [
        (&["import", "text"][..], &["text", "not a kernel"][..]),
        (&["import", "nothing"], &["nothing", "No such file"]),
        (&["import", "."], &["\"\"", "no name for a kernel"]),
        (&["import", "vmlinux", "--name", "a"], &["kernel a is there already", "--name"]),
        (&["import", "vmlinux", "--name", "../b"], &["../b", "no name for a kernel"]),
        (&["import", "vmlinux", "--name", "b", "--initrd", "nothing"], &["nothing"]),
        (&["default", "b"], &["no kernel b", "microvm kernel ls"]),
        (&["rm", "b"], &["no kernel b"]),
    ] {
        assert_fails(&run(words), 1, expected);
    }
    assert_eq!(stdout(&run(&["ls", "-q"])), "a\n");
    assert_fails(&run(&["rm"]), 2, &["NAMES"]);
}
