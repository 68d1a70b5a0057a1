//! What stands around the subcommands: help, completions, man pages, exit statuses.

mod common;

use common::{Host, stdout};

#[test]
fn completions_know_the_subcommands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Host::new().microvm(["completions", shell]).output().unwrap();
        let text = stdout(&output);
        assert!(text.contains("boot") && text.contains("timeline"), "{shell}: {text}");
    }
}

#[test]
fn man_pages_are_written() {
    let host = Host::new();
    assert!(host.microvm(["man", "."]).status().unwrap().success());
    let page = std::fs::read_to_string(host.dir.path().join("microvm-boot.1")).unwrap();
    assert!(page.contains("exit\\-code\\-port"), "{page}");
    let output = host.microvm(["man", "/nonexistent"]).output().unwrap();
    common::assert_fails(&output, 1, &["/nonexistent"]);
}

#[test]
fn help_has_examples_and_exit_statuses() {
    for command in ["boot", "doctor"] {
        let output = Host::new().microvm([command, "--help"]).output().unwrap();
        let text = stdout(&output);
        assert!(output.status.success());
        assert!(text.contains("Examples:") && text.contains("Exit status:"), "{command}: {text}");
    }
}

#[test]
fn no_subcommand_is_wrong_usage() {
    assert_eq!(Host::new().microvm::<&str>([]).output().unwrap().status.code(), Some(2));
    assert_eq!(Host::new().microvm(["--version"]).output().unwrap().status.code(), Some(0));
}
