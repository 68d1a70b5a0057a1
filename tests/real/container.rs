//! Containers: `microvm-init` with its layers, surroundings and program, and `microvm run`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use microvm::guest::{GuestSpec, ProcessSpec};

use super::common::{Host, stdout};
use super::{initrd, kernel, status};

/// Debian's kernel has the file systems as modules, the tuned one built in.
const KERNELS: [(&str, &str); 2] = [("stock-6.1", "bzImage"), ("tuned", "vmlinux")];

/// Two layers: a system with users, and one over it that changes and hides some of it.
pub struct Image {
    host: Host,
    layers: Vec<PathBuf>,
}

impl Image {
    pub fn new() -> Self {
        let host = Host::new();
        let lower = host.dir.path().join("lower");
        let upper = host.dir.path().join("upper");
        for folder in ["bin", "etc", "opt", "srv"] {
            fs::create_dir_all(lower.join(folder)).unwrap();
        }
        // The guest's own root has it at this path.
        fs::copy(busybox(), lower.join("bin/busybox")).unwrap();
        symlink("busybox", lower.join("bin/sh")).unwrap();
        fs::write(lower.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:\n").unwrap();
        fs::write(lower.join("etc/group"), "web:x:34:\nlog:x:4:web\n").unwrap();
        fs::write(lower.join("opt/both"), "lower\n").unwrap();
        fs::write(lower.join("opt/hidden"), "lower\n").unwrap();
        chown(lower.join("srv"), Some(33), Some(34)).unwrap();
        fs::create_dir_all(upper.join("opt")).unwrap();
        fs::create_dir_all(upper.join("etc")).unwrap();
        fs::write(upper.join("opt/both"), "upper\n").unwrap();
        run(Command::new("mknod").arg(upper.join("opt/hidden")).args(["c", "0", "0"]));
        // A link out of the container, which must not be followed before its root is the root.
        symlink("/../../escaped", upper.join("etc/resolv.conf")).unwrap();
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o711)).unwrap();
        let layers = [lower, upper].iter().map(|folder| erofs(folder)).collect();
        Self { host, layers }
    }

    /// Runs a container as `change` has it.
    fn run(&self, kernel: (&str, &str), change: impl FnOnce(&mut GuestSpec)) -> Output {
        self.run_with(kernel, &[], change)
    }

    /// The same with shared folders of the host's.
    pub fn run_with(
        &self,
        (name, file): (&str, &str),
        shares: &[String],
        change: impl FnOnce(&mut GuestSpec),
    ) -> Output {
        let ids: Vec<_> = (0..self.layers.len()).map(|n| format!("layer{n}")).collect();
        let process = ProcessSpec {
            args: Vec::new(),
            env: vec!["PATH=/bin".into(), "GREETING=hello world".into()],
            cwd: "/".into(),
            user: String::new(),
            terminal: false,
            input: false,
            size: None,
        };
        let mut spec = GuestSpec {
            layers: ids.clone(),
            storage: None,
            read_only: false,
            hostname: "box".into(),
            network: None,
            agent: false,
            mounts: Vec::new(),
            process,
        };
        change(&mut spec);
        let mut archive = fs::read(initrd(name)).unwrap();
        archive.extend(spec.to_initramfs(None));
        let archive = self.host.file("initrd", &archive);
        let mut command = self.host.microvm(["boot", "--timeout", "120s", "--exit-code-port", "0xf4"]);
        command.arg("--kernel").arg(kernel(name).join(file)).arg("--initrd").arg(archive);
        for (id, layer) in ids.iter().zip(&self.layers) {
            command.arg("--disk").arg(format!("{},readonly,id={id}", layer.display()));
        }
        command.args(shares.iter().flat_map(|share| ["--share", share]));
        command.args(["--append", "microvm.exit_code_port=0xf4"]).output().unwrap()
    }

    fn sh(&self, kernel: (&str, &str), user: &str, script: &str) -> Output {
        self.run(kernel, |spec| {
            spec.process.args = ["sh", "-c", script].map(String::from).to_vec();
            spec.process.user = user.into();
        })
    }
}

pub fn busybox() -> PathBuf {
    let cache = kernel("any").parent().unwrap().parent().unwrap().join("busybox-static");
    let output =
        Command::new("find").arg(cache).args(["-path", "*/bin/busybox", "-type", "f"]).output().unwrap();
    PathBuf::from(stdout(&output).lines().next().expect("guest-kernels/initramfs has unpacked it"))
}

fn erofs(folder: &Path) -> PathBuf {
    let image = folder.with_extension("erofs");
    run(Command::new("mkfs.erofs").arg(&image).arg(folder));
    image
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

const LOOK: &str = r#"
busybox id -u; busybox id -g; busybox id -G
busybox pwd; echo "$HOME $GREETING"
busybox hostname
busybox cat /opt/both
[ -e /opt/hidden ] || echo hidden
busybox stat -c %a /
echo mine >/srv/file && busybox cat /srv/file
(echo no >/etc/passwd) 2>/dev/null || echo refused
busybox grep -c box /etc/hosts
[ -e /escaped ] || echo kept
[ -c /dev/null ] && [ -d /proc/1 ] && [ -w /dev/shm ] && echo there
exit 9"#;

#[test]
#[ignore = "needs hardware-grade KVM"]
fn container_has_its_layers_users_and_surroundings() {
    let image = Image::new();
    for kernel in KERNELS {
        let output = image.sh(kernel, "web", LOOK);
        status(&output, 9);
        let text = stdout(&output);
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        let at = lines.iter().position(|line| *line == "33").unwrap_or_else(|| panic!("{text}"));
        let expected = [
            "33",
            "34",
            "34 4",
            "/",
            "/srv hello world",
            "box",
            "upper",
            "hidden",
            "711",
            "mine",
            "refused",
            "1",
            "kept",
            "there",
        ];
        assert_eq!(lines[at..], expected, "{kernel:?}: {text}");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn container_programs_end_as_dockers_do() {
    let image = Image::new();
    let tuned = KERNELS[1];
    for (args, user, expected, words) in [
        (&["nothing"][..], "", 127, "nothing"),
        (&["/etc/passwd"], "", 126, "/etc/passwd"),
        (&["sh", "-c", "exit 3"], "nobody", 125, "\"nobody\""),
        (&["sh", "-c", "kill -9 $$"], "", 137, ""),
        (&["sh", "-c", "busybox touch /x && exit 5"], "", 5, ""),
    ] {
        let output = image.run(tuned, |spec| {
            spec.process.args = args.iter().map(ToString::to_string).collect();
            spec.process.user = user.into();
        });
        status(&output, expected);
        assert!(stdout(&output).contains(words), "{args:?}: {}", stdout(&output));
    }
    let output = image.run(tuned, |spec| {
        spec.process.args = ["sh", "-c", "busybox touch /x || exit 5"].map(String::from).to_vec();
        spec.read_only = true;
    });
    status(&output, 5);
    let output = image.run(tuned, |spec| spec.layers.push("missing".into()));
    status(&output, 125);
    assert!(stdout(&output).contains("no disk missing"), "{}", stdout(&output));
}

/// A host with an image `box` and the kernel `name`.
pub fn host_with_image(name: &str, file: &str, initrd: Option<PathBuf>) -> Host {
    let image = Image::new();
    let mut host = Host::new();
    // Beside the release's microvm-init, which is what is shipped.
    let init =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("target/x86_64-unknown-linux-gnu/release/microvm-init");
    host.env.push(("MICROVM_INIT".into(), init.into()));
    let archive = host.dir.path().join("box.tar");
    run(Command::new("tar")
        .arg("-C")
        .arg(image.host.dir.path().join("lower"))
        .arg("-cf")
        .arg(&archive)
        .arg("."));
    let path = archive.to_str().unwrap();
    run(&mut host.microvm(["image", "import", path, "--name", "box"]));
    let mut import = host.microvm(["kernel", "import", "--name", name]);
    import.arg(kernel(name).join(file));
    if let Some(initrd) = initrd {
        import.arg("--initrd").arg(initrd);
    }
    run(&mut import);
    host
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn run_gives_the_programs_output_and_status() {
    let host = host_with_image("tuned", "vmlinux", None);
    let run = |words: &[&str]| {
        let words = ["run", "--rm", "--timeout", "120s"].iter().chain(words);
        host.microvm(words).env("FROM_HERE", "here").output().unwrap()
    };
    for (words, expected, printed) in [
        (&["box", "sh", "-c", "printf 'a\\nb\\n'; exit 3"][..], 3, "a\nb\n"),
        (&["--hostname", "other", "box", "busybox", "hostname"], 0, "other\n"),
        (
            &["-u", "web", "-w", "/tmp/x", "box", "busybox", "sh", "-c", "busybox id -u; busybox pwd"],
            0,
            "33\n/tmp/x\n",
        ),
        (
            &[
                "-e",
                "A=1",
                "-e",
                "FROM_HERE",
                "-e",
                "NOT_HERE",
                "box",
                "sh",
                "-c",
                "echo $A $FROM_HERE$NOT_HERE",
            ],
            0,
            "1 here\n",
        ),
        (&["--entrypoint", "busybox", "box", "echo", "-n", "x"], 0, "x"),
        (&["--cpus", "2", "--memory", "512M", "box", "busybox", "nproc"], 0, "2\n"),
        (&["--read-only", "box", "sh", "-c", "(busybox touch /x) 2>/dev/null || echo no"], 0, "no\n"),
        (&["box", "sh", "-c", "kill -9 $$"], 137, ""),
        (&["box", "/etc/passwd"], 126, ""),
        (&["box", "nothing"], 127, ""),
        (&["-u", "nobody", "box", "true"], 125, ""),
    ] {
        let output = run(words);
        status(&output, expected);
        assert_eq!(stdout(&output), printed, "{words:?}");
    }
    for (words, expected) in [
        (&["nobox", "true"][..], "nobox"),
        (&["box"], "no command"),
        (&["--kernel", "none", "box", "true"], "no kernel none"),
        (&["-t", "box", "true"], "no terminal"),
        (&["--hostname", "a b", "box", "true"], "--hostname \"a b\""),
    ] {
        let output = run(words);
        status(&output, 125);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(expected) && text.lines().count() == 1, "{words:?}: {text}");
    }
}
