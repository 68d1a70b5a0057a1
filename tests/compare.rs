//! `microvm compare` and `microvm run --isolation`: what they refuse. What they do is tested where kernels run
//! (tests/real/isolation.rs).

mod common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Output;

use common::{Host, assert_fails};

fn host_with_image() -> Host {
    let host = Host::new();
    let archive = common::images::Tar(Vec::new()).dir("bin").file("bin/x", b"no program").end();
    let path = host.file("box.tar", &archive);
    let output = host.microvm(["image", "import", path.to_str().unwrap(), "--name", "box"]).output().unwrap();
    assert!(output.status.success(), "{}", common::stderr(&output));
    host
}

fn microvm(host: &Host, words: &str) -> Output {
    host.microvm(words.split_whitespace()).output().unwrap()
}

#[test]
fn a_comparison_that_cannot_be_is_refused() {
    let host = Host::new();
    for (words, status, expected) in [
        ("compare", 2, "<IMAGE>"),
        ("compare --runs 0 box", 2, "--runs"),
        ("compare --runs 10001 box", 2, "--runs"),
        ("compare --runs x box", 2, "--runs"),
        ("compare --isolation jail box", 2, "vm, container and process"),
        ("compare --isolation vm,vm box", 2, "vm twice"),
        ("compare --isolation , box", 2, "--isolation"),
        ("compare --memory much box", 2, "--memory"),
        ("compare --timeout soon box", 2, "--timeout"),
        ("compare --format xml box", 2, "--format"),
        ("compare --html /nowhere/x box", 1, "--html /nowhere/x"),
    ] {
        assert_fails(&microvm(&host, words), status, &[expected]);
    }
}

#[test]
fn a_failed_sample_ends_the_comparison() {
    let host = host_with_image();
    // No kernel was imported.
    let output = microvm(&host, "compare --isolation vm --runs 1 box -- /bin/x");
    assert_fails(&output, 1, &["nothing is compared: vm, warm-up", "status 125", "microvm kernel import"]);
    let kernel = host.kernel(&common::power_off());
    assert!(host.microvm(["kernel", "import"]).arg(kernel).status().unwrap().success());
    let output = microvm(&host, "compare --isolation vm --runs 1 nobox");
    assert_fails(&output, 1, &["nothing is compared", "nobox"]);
    let page = host.dir.path().join("page.html");
    let output = microvm(&host, &format!("compare --isolation vm --html {} box", page.display()));
    assert_fails(&output, 1, &["nothing is compared"]);
    assert!(!page.exists(), "a page without figures");
}

#[test]
fn flags_that_an_isolation_lacks_are_refused() {
    let host = host_with_image();
    const BOTH: &[&str] = &["container", "process"];
    for (flag, isolations, words) in [
        ("--kernel k", BOTH, "--kernel: --isolation"),
        ("--serial null", BOTH, "--serial: --isolation"),
        ("--metrics m", BOTH, "--metrics: --isolation"),
        ("--allow-software-kvm", BOTH, "--allow-software-kvm: --isolation"),
        ("-v /tmp:/x:uid=3", BOTH, "uid= and gid= are for a VM"),
        ("-p 80:80", &["process"], "--publish: --isolation process has the host's own network"),
        ("--network user", &["process"], "--network: --isolation process has the host's own network"),
        ("--network tap=t0", BOTH, "--network"),
        ("--network user,iops=5", &["container"], "of a VM's card"),
    ] {
        for isolation in isolations {
            let output = microvm(&host, &format!("run --isolation {isolation} {flag} box /bin/x"));
            assert_fails(&output, 125, &[words, isolation]);
        }
    }
    assert_fails(
        &microvm(&host, "run --isolation jail box"),
        2,
        &["--isolation", "vm, container and process"],
    );
}

#[test]
fn mounting_needs_root() {
    if !rustix::process::geteuid().is_root() {
        let host = host_with_image();
        assert_fails(&microvm(&host, "run --isolation process box /bin/x"), 125, &["root", "sudo"]);
        return;
    }
    // Where an ordinary user can reach it.
    let dir = tempfile::tempdir().unwrap();
    let set = |path: &std::path::Path| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    set(dir.path());
    let program = dir.path().join("microvm");
    // By another program: a descriptor for writing that another test's child took over just now would keep it from being run.
    let copied = std::process::Command::new("cp")
        .args([env!("CARGO_BIN_EXE_microvm").as_ref(), program.as_os_str()])
        .status();
    assert!(copied.unwrap().success());
    let mut command = std::process::Command::new(&program);
    command
        .args(["run", "--isolation", "container", "box", "x"])
        .env("MICROVM_DATA", dir.path().join("data"));
    let output = command.current_dir("/").uid(65534).gid(65534).output().unwrap();
    assert_fails(&output, 125, &["root", "sudo"]);
}
