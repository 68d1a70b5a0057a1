//! `microvm doctor` on this machine, whatever it is, and on devices that are none.

mod common;

use common::{Host, power_off, stderr, stdout};

fn json(flags: &[&str]) -> (Option<i32>, serde_json::Value) {
    let output = Host::new().microvm([&["doctor", "--json"], flags].concat()).output().unwrap();
    (output.status.code(), serde_json::from_slice(&output.stdout).expect("JSON"))
}

#[test]
fn the_exit_status_is_what_boot_will_do() {
    let (status, report) = json(&[]);
    let host = Host::new();
    let kernel = host.kernel(&power_off());
    let boot = host.microvm([std::path::Path::new("boot"), "--kernel".as_ref(), &kernel]).output().unwrap();
    assert_eq!(boot.status.success(), report["boot"], "{}", stderr(&boot));
    assert_eq!(status, Some(if boot.status.success() { 0 } else { 1 }));
}

#[test]
fn devices_that_are_none_are_fatal() {
    let host = Host::new();
    let plain = host.file("plain", b"x");
    for device in ["/nonexistent", plain.to_str().unwrap(), "/dev/null"] {
        let (status, report) = json(&["--kvm-device", device]);
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|c| c["name"] == "KVM device").unwrap();
        assert_eq!((status, &check["state"]), (Some(1), &"fatal".into()), "{check}");
        assert!(check["advice"].as_str().unwrap().len() > 10, "{check}");
    }
}

#[test]
fn the_table_has_no_colours_in_a_pipe() {
    let output = Host::new().microvm(["doctor"]).output().unwrap();
    let text = stdout(&output);
    assert!(text.contains("KVM device") && !text.contains('\x1b'), "{text}");
}

#[test]
fn every_lack_says_what_to_do() {
    let (_, report) = json(&[]);
    assert_eq!(report["schema"], "microvm.doctor/1");
    for check in report["checks"].as_array().unwrap() {
        assert!(check["state"] == "ok" || check["advice"].is_string(), "{check}");
    }
}
