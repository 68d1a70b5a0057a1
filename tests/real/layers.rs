//! Images of many layers.

use std::process::{Command, Output};
use std::time::Instant;

use super::common::{Host, stderr, stdout};
use super::container::{busybox, host_with_image};
use super::{initrd, status};

/// As many as Docker lets an image have.
const DOCKERS: usize = 127;

/// As many as a guest's Linux makes partitions of a disk.
const MOST: usize = 255;

/// Imports an image of so many layers, which is called `layers:COUNT`.
fn import(host: &Host, count: usize) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/layers.py");
    let archive = host.dir.path().join("layers.tar");
    let mut make = Command::new("python3");
    make.args([script, &count.to_string()]).args([&busybox(), &archive]);
    assert!(make.status().unwrap().success());
    let output = host.microvm(["image", "import", archive.to_str().unwrap()]).output().unwrap();
    status(&output, 0);
}

fn run(host: &Host, isolation: &str, count: usize) -> Output {
    let flags = ["run", "--rm", "--network", "none", "--timeout", "120s", "--isolation", isolation];
    let image = format!("layers:{count}");
    host.microvm(flags.iter().chain(&[
        &*image,
        "sh",
        "-c",
        "cat /top; ls /gone; cat /n/*; : >/new && exit 7",
    ]))
    .output()
    .unwrap()
}

/// Each layer's file is there, and what upper ones have changed and removed is.
#[track_caller]
fn check(output: &Output, count: usize) {
    status(output, 7);
    let text = stdout(output);
    let (top, all) = text.split_once('\n').unwrap();
    let (gone, all) = all.split_once('\n').unwrap();
    let last = (count - 1).to_string();
    assert_eq!((top, gone), (&*last, &*last));
    let mut numbers: Vec<usize> = all.lines().map(|line| line.parse().unwrap()).collect();
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..count), "{text}");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn images_of_many_layers_run() {
    let stock = Some(initrd("stock-6.1"));
    let newer = Some(initrd("stock-6.12"));
    for (name, file, initrd, counts) in [
        ("tuned", "vmlinux", None, &[40, DOCKERS, MOST][..]),
        ("stock-6.1", "bzImage", stock, &[40, DOCKERS]),
        ("stock-6.12", "bzImage", newer, &[DOCKERS]),
    ] {
        let host = host_with_image(name, file, initrd);
        for count in counts {
            import(&host, *count);
            let begin = Instant::now();
            check(&run(&host, "vm", *count), *count);
            eprintln!("{name}: {count} layers in {:?}", begin.elapsed());
        }
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn images_of_many_layers_run_on_the_host() {
    let host = host_with_image("tuned", "vmlinux", None);
    import(&host, MOST);
    for isolation in ["process", "container"] {
        check(&run(&host, isolation, MOST), MOST);
    }
    // And the same limit holds everywhere.
    import(&host, MOST + 1);
    for isolation in ["vm", "process", "container"] {
        let output = run(&host, isolation, MOST + 1);
        status(&output, 125);
        let text = stderr(&output);
        assert!(text.contains("layers:256 has 256 layers") && text.contains("1 to 255"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}
