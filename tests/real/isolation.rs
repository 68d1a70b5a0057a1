//! One image in a VM, an ordinary container and a plain chroot: the same program sees the same.

use std::fs;
use std::io::Read;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::common::images::Tar;
use super::common::{Host, own_stderr, stderr, stdout};
use super::container::host_with_image;
use microvm::image::Digest;

pub const ALL: [&str; 3] = ["vm", "container", "process"];
const GROUPS: &str = "/sys/fs/cgroup/microvm";

/// A host with an image `two` of two layers, of which the upper one changes and hides some of the lower one.
pub fn host() -> Host {
    let host = host_with_image("tuned", "vmlinux", None);
    let lower = fs::read(host.dir.path().join("box.tar")).unwrap();
    let upper = Tar(Vec::new())
        .dir("opt")
        .file("opt/both", b"upper\n")
        .dir("keep")
        .file("keep/index", b"of the image\n")
        .file("opt/.wh.hidden", b"")
        .dir("etc")
        .link("etc/resolv.conf", "/../../escaped")
        .end();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Env": ["PATH=/bin", "FROM_IMAGE=1"], "Cmd": ["sh", "-c", "echo default"] },
        "rootfs": { "type": "layers", "diff_ids": [Digest::of(&lower), Digest::of(&upper)] },
    });
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": ["two:latest"], "Layers": ["1.tar", "2.tar"] }]);
    let archive = Tar(Vec::new())
        .file("manifest.json", manifest.to_string().as_bytes())
        .file("config.json", config.to_string().as_bytes())
        .file("1.tar", &lower)
        .file("2.tar", &upper)
        .end();
    let path = host.file("two.tar", &archive);
    let output = host.microvm(["image", "import", path.to_str().unwrap()]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    host
}

fn command(host: &Host, isolation: &str, words: &[&str]) -> Command {
    let own = ["run", "--rm", "--network", "none", "--timeout", "120s", "--isolation", isolation];
    host.microvm(own.iter().chain(words))
}

fn run(host: &Host, isolation: &str, words: &[&str]) -> Output {
    command(host, isolation, words).output().unwrap()
}

/// What programs see that is the same wherever they run.
const LOOK: &str =
    "busybox env | busybox sort; busybox id; busybox pwd; busybox hostname; busybox cat /opt/both
busybox find / -xdev -exec busybox stat -c '%n %A %u %g' {} ';' | busybox sort
busybox grep -c box /etc/hosts; echo mine >/srv/x; busybox cat /srv/x; echo error >&2; exit 9";

#[test]
#[ignore = "needs hardware-grade KVM"]
fn isolations_show_the_same_container() {
    let host = host();
    for flags in
        [&["--hostname", "box"][..], &["--hostname", "box", "-u", "web:6", "-w", "/tmp/new", "-e", "OWN=x y"]]
    {
        let words = [flags, &["two", "sh", "-c", LOOK]].concat();
        let [vm, container, process] = ALL.map(|isolation| run(&host, isolation, &words));
        assert_eq!(vm.status.code(), Some(9), "{}", stderr(&vm));
        assert!(stdout(&vm).contains("FROM_IMAGE=1") && stdout(&vm).contains("\nupper\n"), "{}", stdout(&vm));
        assert!(stdout(&vm).contains("\n/opt/both ") && !stdout(&vm).contains("/opt/hidden"));
        for (isolation, output) in [("container", container), ("process", process)] {
            assert_eq!(output.status.code(), Some(9), "{isolation}: {}", stderr(&output));
            assert_eq!(stdout(&output), stdout(&vm), "{isolation} {flags:?}");
            assert_eq!(own_stderr(&output), own_stderr(&vm), "{isolation} {flags:?}");
        }
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn isolations_end_alike() {
    let host = host();
    for (words, expected) in [
        (&["two"][..], 0),
        (&["two", "sh", "-c", "exit 3"], 3),
        (&["two", "nothing"], 127),
        (&["two", "/etc/passwd"], 126),
        (&["two", "/opt"], 126),
        (&["-u", "nobody", "two", "true"], 125),
        (&["--read-only", "two", "sh", "-c", "echo >/srv/x || exit 5"], 5),
        (&["two", "sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137),
        (&["--timeout", "5s", "two", "busybox", "sleep", "1000"], 124),
    ] {
        // Its own time limit comes first.
        for isolation in ALL {
            let own = ["run", "--rm", "--network", "none", "--isolation", isolation];
            let output = host.microvm(own.iter().chain(words)).output().unwrap();
            assert_eq!(output.status.code(), Some(expected), "{isolation} {words:?}: {}", stderr(&output));
        }
    }
}

/// Docker's profile, where it is installed, which scripts/test sees to. A VM's program has a kernel of its own to itself.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_container_has_a_seccomp_profile() {
    let host = host();
    let script = "busybox grep Seccomp: /proc/self/status";
    for (isolation, mode) in [("container", 2), ("process", 0)] {
        let output = run(&host, isolation, &["two", "sh", "-c", script]);
        assert_eq!(stdout(&output), format!("Seccomp:\t{mode}\n"), "{isolation}: {}", stderr(&output));
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn limits_are_kept() {
    let host = host();
    let limits = ["--memory", "64M", "--cpus", "1", "two", "sh", "-c"];
    let show = "busybox cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    let output = run(&host, "container", &[&limits[..], &[show]].concat());
    assert_eq!(stdout(&output), "67108864\n100000 100000\n", "{}", stderr(&output));
    // More than there may be, in a file of the memory's own.
    let fill = "busybox dd if=/dev/zero of=/big bs=1M count=200 2>/dev/null; exit 7";
    for isolation in ["container", "process"] {
        let output = run(&host, isolation, &[&limits[..], &[fill]].concat());
        let code = output.status.code();
        // The kernel kills dd, or all of it.
        assert!(matches!(code, Some(7 | 137)), "{isolation}: {code:?} {}", stderr(&output));
        let fits = "busybox dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null && exit 8";
        let output = run(&host, isolation, &[&limits[..], &[fits]].concat());
        assert_eq!(output.status.code(), Some(8), "{isolation}: {}", stderr(&output));
    }
    assert_eq!(groups(), Vec::<String>::new());
}

/// Control groups that are left.
pub fn groups() -> Vec<String> {
    let entries = fs::read_dir(GROUPS).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    folders.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn nothing_is_left_of_what_was_killed() {
    let host = host();
    for isolation in ["container", "process"] {
        let mut command = command(&host, isolation, &["--memory", "64M", "two", "sh", "-c"]);
        command.arg("busybox sleep 1000 & echo started; busybox sleep 1000").stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let mut started = [0; 8];
        output.read_exact(&mut started).unwrap();
        assert_eq!(&started, b"started\n");
        assert_ne!(groups(), Vec::<String>::new());
        child.kill().unwrap();
        child.wait().unwrap();
        // Everything that has it open is gone then.
        output.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(groups(), Vec::<String>::new(), "{isolation}");
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains("overlay") && !mounts.contains("/mnt"), "{mounts}");
    let loops = Command::new("losetup").arg("-a").output().unwrap();
    assert_eq!(stdout(&loops), "");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_signal_goes_to_the_program() {
    let host = host();
    for isolation in ALL {
        let script = "trap 'echo got; exit 9' TERM; echo started; while :; do busybox sleep 1; done";
        let mut command = command(&host, isolation, &["two", "sh", "-c", script]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        output.read_exact(&mut [0; 8]).unwrap();
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&child),
            rustix::process::Signal::TERM,
        )
        .unwrap();
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!((child.wait().unwrap().code(), rest.as_str()), (Some(9), "got\n"), "{isolation}");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_comparison_has_all_figures() {
    let host = host();
    let page = host.dir.path().join("page.html");
    let mut command = host.microvm(["compare", "--runs", "2", "--format", "json", "--html"]);
    command.arg(&page).args(["two", "--", "sh", "-c", "echo same; echo errors >&2"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let series = report["series"].as_array().unwrap();
    let kinds: Vec<_> = series.iter().map(|series| series["isolation"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["process", "container", "vm"]);
    for series in series {
        for sample in series["samples"].as_array().unwrap() {
            let (start, total) = (&sample["start_ns"], &sample["total_ns"]);
            assert!(start.as_u64().unwrap() > 0 && start.as_u64() < total.as_u64(), "{sample}");
            assert!(sample["memory_bytes"].as_u64().unwrap() > 1 << 20, "{sample}");
            assert_eq!(
                sample["exits"].as_u64().is_some_and(|n| n > 100),
                series["isolation"] == "vm",
                "{sample}"
            );
            assert_eq!(sample["vm_memory"].is_object(), series["isolation"] == "vm", "{sample}");
        }
        assert_eq!(series["samples"].as_array().unwrap().len(), 2);
    }
    // A kernel and its memory are more than a process.
    let memory = |n: usize| series[n]["samples"][0]["memory_bytes"].as_u64().unwrap();
    assert!(memory(2) > memory(0) + (16 << 20), "{} {}", memory(2), memory(0));
    // Most of it is the guest's.
    let told = |what: &str| series[2]["samples"][0]["vm_memory"][what].as_u64().unwrap();
    let (guest, own) = (told("guest_bytes"), told("microvm_bytes"));
    assert!(guest > 16 << 20 && own > 1 << 20 && own < 16 << 20, "{guest} {own}");
    assert!(guest + own < memory(2) * 5 / 4, "{guest} {own} {}", memory(2));
    assert!(fs::read_to_string(&page).unwrap().contains("</html>"));
    assert_eq!(groups(), Vec::<String>::new());
    // What differs is not compared.
    let words = ["compare", "--runs", "1", "two", "--", "sh", "-c", "echo $$"];
    let output = host.microvm(words).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is not the first sample's"), "{}", stderr(&output));
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn an_images_links_lead_nowhere_else() {
    let host = host();
    let outside = host.file("passwd", b"evil:x:1:1::/:\n");
    let out = format!("/../..{}", outside.display());
    let archive = Tar(Vec::new())
        .dir("etc")
        .link("etc/passwd", &out)
        .link("etc/hosts", &format!("{out}.made"))
        .link("dev", &format!("/../..{}", host.dir.path().display()))
        .end();
    let path = host.file("links.tar", &archive);
    let import = ["image", "import", path.to_str().unwrap(), "--name", "links"];
    assert!(host.microvm(import).status().unwrap().success());
    let before = host.files();
    for isolation in ["container", "process"] {
        let output = run(&host, isolation, &["-u", "evil", "links", "/x"]);
        assert_eq!(output.status.code(), Some(125), "{isolation}");
        assert!(stderr(&output).contains("no user \"evil\""), "{isolation}: {}", stderr(&output));
        assert_eq!(run(&host, isolation, &["links", "/x"]).status.code(), Some(125), "{isolation}");
    }
    assert_eq!(host.files(), before, "something was made outside");
}
