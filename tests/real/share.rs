//! Shared folders, as kernels of distributions mount them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use microvm::guest::MountSpec;

use super::common::{Host, stderr, stdout};
use super::{boot, fact, initrd, kernel, read_until, sha256, status};

/// The oldest that has the driver as a module, the newest, which has it built in, and ours.
const KERNELS: [(&str, &str); 3] =
    [("stock-6.1", "bzImage"), ("stock-6.12", "bzImage"), ("tuned", "vmlinux")];

const BIG: u32 = 100 << 20;

fn sum_of_files(folder: &Path) -> String {
    let script = "find . -type f | LC_ALL=C sort | xargs cat | sha256sum";
    let output = Command::new("sh").args(["-c", script]).current_dir(folder).output().unwrap();
    stdout(&output).trim().into()
}

/// A folder to share in one that is not, both of the host's.
fn prepare(host: &Host) -> std::path::PathBuf {
    let share = host.dir.path().join("share");
    for folder in ["folder", "host/a/b"] {
        fs::create_dir_all(share.join(folder)).unwrap();
    }
    let secret = host.file("secret", b"secret of the host\n");
    symlink(secret, share.join("out")).unwrap();
    let big: Vec<u8> = (0..BIG / 4).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(share.join("big"), big).unwrap();
    for n in 0..150 {
        let folder = if n % 2 == 0 { "host/a" } else { "host/a/b" };
        fs::write(share.join(folder).join(format!("file-{n}")), format!("{n}\n").repeat(n)).unwrap();
    }
    fs::write(share.join("changing"), "before\n").unwrap();
    share
}

#[track_caller]
fn shares(name: &str, file: &str) {
    let host = Host::new();
    let share = prepare(&host);
    let flag = format!("{},tag=test,uid=7,gid=8", share.display());
    let metrics = host.dir.path().join("metrics.json");
    let flags =
        ["--share", &flag, "--memory", "256M", "--timeout", "400s", "--metrics", metrics.to_str().unwrap()];
    let mut command = boot(name, file, "share", &flags);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let before = read_until(&mut child, "seen=before");
    // As an editor does: another file in its place.
    fs::write(share.join("changing.new"), "after\n").unwrap();
    fs::rename(share.join("changing.new"), share.join("changing")).unwrap();
    child.stdin.take().unwrap().write_all(b"after\n").unwrap();
    let output = child.wait_with_output().unwrap();
    status(&output, 0);
    let text = before + &stdout(&output);
    let sum = sha256(&share.join("big"));
    assert_eq!((fact(&text, "big"), fact(&text, "moved")), (&*sum, &*sum), "{name}");
    assert_eq!(sha256(&share.join("folder/moved")), sum, "{name}");
    for (what, expected) in [
        ("link", "guest"),
        ("out", "nothing"),
        ("exclusive", "yes"),
        ("short", "3 644 7:8"),
        ("mode", "711"),
        ("owner", "kept"),
        ("pipe", "refused"),
        ("files", "held"),
        ("program", "runs"),
        ("free", "yes"),
        ("changed", "after"),
        ("again", "after"),
    ] {
        assert_eq!(fact(&text, what), expected, "{name}, {what}: {text}");
    }
    assert_eq!(fact(&text, "host"), sum_of_files(&share.join("host")), "{name}");
    let tree = sum_of_files(&share.join("tree"));
    assert_eq!(fact(&text, "tree"), format!("110 {tree}"), "{name}");
    assert_eq!(fs::read_link(share.join("link")).unwrap(), Path::new("/tmp/own"));
    let mapped = fs::read(share.join("database/mapped")).unwrap();
    assert!(mapped.len() == 64 << 10 && mapped[5000..].starts_with(b"by a mapping"), "{name}");
    let short = fs::metadata(share.join("short")).unwrap();
    assert_eq!((short.len(), short.permissions().mode() & 0o7777), (3, 0o711), "{name}");
    assert_eq!(short.uid(), rustix::process::getuid().as_raw(), "{name}");
    assert_eq!(fs::read_to_string(share.join("last")).unwrap(), "last\n", "{name}");
    assert!(super::counter(&metrics, "microvm_share_written_bytes_total") >= BIG.into(), "{name}");
    // The guest has unmounted it.
    for left in ["microvm_share_known_files", "microvm_share_open_files"] {
        assert_eq!(super::counter(&metrics, left), 0, "{name}: {left}");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn share_with_stock_6_1() {
    shares(KERNELS[0].0, KERNELS[0].1);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn share_with_stock_6_12() {
    shares(KERNELS[1].0, KERNELS[1].1);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn share_with_tuned() {
    shares(KERNELS[2].0, KERNELS[2].1);
}

/// The host refuses, and not the guest's mount.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn share_read_only_is_the_hosts_to_enforce() {
    for (name, file) in KERNELS {
        let host = Host::new();
        let share = host.dir.path().join("share");
        fs::create_dir_all(share.join("folder")).unwrap();
        fs::write(share.join("file"), "host\n").unwrap();
        let before = fs::metadata(share.join("file")).unwrap();
        let flag = format!("{},tag=test,readonly", share.display());
        let output = boot(name, file, "share-readonly", &["--share", &flag]).output().unwrap();
        status(&output, 0);
        let text = stdout(&output);
        assert_eq!((fact(&text, "read"), fact(&text, "tried")), ("host", "all"), "{name}");
        assert!(!text.contains("did=") && !text.contains("other="), "{name}: {text}");
        let after = fs::metadata(share.join("file")).unwrap();
        assert_eq!(
            (after.mtime_nsec(), after.ctime_nsec(), after.mode()),
            (before.mtime_nsec(), before.ctime_nsec(), before.mode()),
            "{name}"
        );
        assert_eq!(fs::read_dir(&share).unwrap().count(), 2, "{name}");
        assert!(!stderr(&output).contains("sandbox refused"), "{name}: {}", stderr(&output));
    }
}

/// A user's folder, without root: the guest's root has that user's rights and no more.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn share_needs_no_root() {
    if !rustix::process::getuid().is_root() {
        return eprintln!("skipped: only root can make another's file");
    }
    const NOBODY: u32 = 65534;
    let host = Host::new();
    fs::set_permissions(host.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let share = host.dir.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("foreign"), "root's alone").unwrap();
    fs::set_permissions(share.join("foreign"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(&share, fs::Permissions::from_mode(0o700)).unwrap();
    chown(&share, Some(NOBODY), Some(NOBODY)).unwrap();
    // Wherever the checkout is, others need not be let in.
    let copy = |from: &Path, name: &str| {
        let to = host.dir.path().join(name);
        fs::copy(from, &to).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
        to
    };
    let mut command = Command::new(copy(Path::new(env!("CARGO_BIN_EXE_microvm")), "microvm"));
    command.args(["boot", "--timeout", "120s", "--control", "none", "--exit-code-port", "0xf4", "--kernel"]);
    command.arg(copy(&kernel("tuned").join("vmlinux"), "vmlinux")).arg("--initrd");
    command.arg(copy(&initrd("tuned"), "initrd")).arg("--share");
    command.arg(format!("{},tag=test,uid=7,gid=8", share.display()));
    command.args(["--append", "microvm.exit_code_port=0xf4 -- /bin/check share-of-a-user"]);
    let output = command.uid(NOBODY).gid(NOBODY).current_dir("/").stdin(Stdio::null()).output().unwrap();
    status(&output, 0);
    let text = stdout(&output);
    for (what, expected) in [
        ("files", "held"),
        ("own", "7:8 700"),
        ("foreign", "65534:65534 600"),
        ("foreign-read", "no"),
        ("given", "no"),
    ] {
        assert_eq!(fact(&text, what), expected, "{what}: {text}");
    }
    assert_eq!(fs::metadata(share.join("control")).unwrap().uid(), NOBODY);
}

/// Two shares of a container, one in the other, which it need have no folders for.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn share_is_mounted_in_a_container() {
    let image = super::container::Image::new();
    let host = Host::new();
    let (source, data) = (host.dir.path().join("source"), host.dir.path().join("data"));
    fs::create_dir_all(&source).unwrap();
    fs::create_dir_all(&data).unwrap();
    fs::create_dir(source.join("data")).unwrap();
    fs::write(source.join("file"), "source\n").unwrap();
    let shares = [
        format!("{},tag=src,readonly", source.display()),
        format!("{},tag=data,uid=33,gid=34", data.display()),
    ];
    for kernel in [KERNELS[0], KERNELS[2]] {
        let script = "busybox cat /work/src/file; (echo no >/work/src/new) 2>/dev/null || echo refused; \
            echo mine >/work/src/data/file && busybox stat -c '%u:%g' /work/src/data/file; exit 4";
        let change = |spec: &mut microvm::guest::GuestSpec| {
            let mount = |tag: &str, path: &str, read_only| MountSpec {
                tag: tag.into(),
                path: path.into(),
                read_only,
                ..MountSpec::default()
            };
            // In the other order, too.
            spec.mounts = vec![mount("data", "/work/src/data", false), mount("src", "/work/src", true)];
            spec.process.args = ["sh", "-c", script].map(String::from).to_vec();
            spec.process.user = "web".into();
        };
        let output = image.run_with(kernel, &shares, change);
        status(&output, 4);
        let text = stdout(&output);
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        let at = lines.iter().position(|line| *line == "source").unwrap_or_else(|| panic!("{text}"));
        assert_eq!(lines[at..], ["source", "refused", "33:34"], "{kernel:?}: {text}");
        assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "mine\n");
        fs::remove_file(data.join("file")).unwrap();
        let missing = image.run_with(kernel, &[], |spec| change(spec));
        status(&missing, 125);
        assert!(stdout(&missing).contains("the shared folder at /work/src"), "{}", stdout(&missing));
    }
}
