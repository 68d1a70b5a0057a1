//! From a registry into a VM: an image that real tools made and pushed.

use std::process::Command;

use super::common::registry::Registry;
use super::common::{Host, stderr, stdout};
use super::container::{busybox, host_with_image};
use super::status;

/// Runs a script of tools that `scripts/test` has installed, in the host's folder.
#[track_caller]
fn tools(host: &Host, script: &str) {
    let output = Command::new("sh").args(["-euc", script]).current_dir(host.dir.path()).output().unwrap();
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn what_was_pushed_is_pulled_and_run() {
    let host = host_with_image("tuned", "vmlinux", None);
    let registry = Registry::plain(&host);
    let name = format!("{}/team/app:1", registry.address);
    let busybox = busybox();
    tools(
        &host,
        &format!(
            "mkdir -p below/bin above/etc
             cp {} below/bin/busybox; ln -s busybox below/bin/cat
             echo pushed > above/etc/word
             umoci init --layout oci; umoci new --image oci:app
             umoci insert --image oci:app below /; umoci insert --image oci:app above /
             umoci config --image oci:app --config.entrypoint cat --config.cmd /etc/word --config.env PATH=/bin
             skopeo copy -q --dest-tls-verify=false oci:oci:app docker://{name}
             rm -r oci",
            busybox.display()
        ),
    );
    let run = |flags: &[&str]| {
        let words = ["run", "--rm", "--timeout", "120s"].iter().chain(flags);
        host.microvm(words).arg(&name).output().unwrap()
    };
    let missing = run(&["--pull", "never"]);
    status(&missing, 125);
    assert!(stderr(&missing).contains(&name), "{}", stderr(&missing));
    for flags in [&[][..], &["--pull", "always"]] {
        let output = run(flags);
        status(&output, 0);
        assert_eq!(stdout(&output), "pushed\n", "{flags:?}");
    }
    // It is here now, whatever becomes of the registry.
    drop(registry);
    assert_eq!(stdout(&run(&[])), "pushed\n");
    status(&run(&["--pull", "always"]), 125);
}
