//! What a container costs: `cargo bench --bench containers`.
//!
//! Here: `microvm image import` of some 1 GiB of this machine's files, beside gzip, which only unpacks it. In the counting
//! host (`scripts/kvm-host --icount`, see boot.rs): `microvm run --rm IMAGE true` from exec to exit beside `microvm boot` of
//! the same kernel and program, and beside the same image in a container and in a chroot on the host's kernel; and images
//! of many layers.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use common::{Result, Row, cache, in_counting_host, in_memory, root, run, table};
use microvm::image::Digest;
use serde_json::json;

/// Of the image that is imported, before it is packed.
const IMPORT_BYTES: u64 = 1 << 30;
/// Layers of the images that are run.
const LAYERS: [usize; 3] = [1, 10, 40];

fn main() -> Result<()> {
    in_counting_host(outside, inside)
}

fn outside(work: &Path) -> Result<()> {
    import(&work.with_extension("import"))?;
    run(root().join("guest-kernels/build"), &["tuned"])?;
    fs::copy(cache().join("kernels/tuned/vmlinux"), work.join("tuned"))?;
    let (initrd, init) = (work.join("initrd"), PathBuf::from(env!("CARGO_BIN_EXE_microvm-init")));
    let flags = ["--output", initrd.to_str().unwrap(), "--init", init.to_str().unwrap(), "--no-applets"];
    // busybox is fetched by it, too.
    run(root().join("guest-kernels/initramfs"), &flags)?;
    LAYERS.iter().try_for_each(|layers| image(*layers, &work.join(format!("{layers}.tar"))))
}

/// Makes a docker-archive of busybox with so many layers.
fn image(layers: usize, path: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut names, mut ids) = (Vec::new(), Vec::new());
    for number in 0..layers {
        let tree = dir.path().join(format!("tree{number}"));
        fs::create_dir_all(tree.join("etc"))?;
        fs::write(tree.join(format!("etc/layer{number}")), format!("{number}\n"))?;
        if number == 0 {
            fs::create_dir(tree.join("bin"))?;
            fs::copy(cache().join("busybox-static/bin/busybox"), tree.join("bin/busybox"))?;
            symlink("busybox", tree.join("bin/true"))?;
        }
        let name = format!("{number}.tar");
        let (layer, tree) = (dir.path().join(&name), tree.display().to_string());
        run("tar", &["-C", &tree, "-cf", layer.to_str().unwrap(), "."])?;
        ids.push(Digest::of(&fs::read(layer)?).to_string());
        names.push(name);
    }
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": ids },
    });
    fs::write(dir.path().join("config.json"), config.to_string())?;
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": [format!("layers{layers}:latest")], "Layers": names }]);
    fs::write(dir.path().join("manifest.json"), manifest.to_string())?;
    let folder = dir.path().display().to_string();
    let flags = ["-C", &folder, "-cf", path.to_str().unwrap(), "manifest.json", "config.json"];
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    run("tar", &[&flags[..], &names].concat())
}

fn inside(work: &Path) -> Result<()> {
    let path = |name: &str| work.join(name).display().to_string();
    let microvm = path("microvm");
    for layers in LAYERS {
        run(&microvm, &["image", "import", &path(&format!("{layers}.tar"))])?;
    }
    run(&microvm, &["kernel", "import", &path("tuned"), "--name", "tuned"])?;
    let files = ["/etc/ld.so.cache", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/resolv.conf"];
    let programs = ["/usr/bin/crun", "/usr/bin/passt", "/usr/bin/passt.avx2"];
    in_memory(&programs, &[&files[..], &["/usr/share/containers/seccomp.json"]].concat())?;
    // What makes passt find a network.
    for words in ["tuntap add mode tap route0", "addr add 10.77.0.2/24 dev route0", "link set route0 up"] {
        run("ip", &words.split(' ').collect::<Vec<_>>())?;
    }
    run("ip", &["route", "add", "default", "via", "10.77.0.1"])?;
    let words = |text: &str| -> Vec<String> {
        std::iter::once(microvm.clone()).chain(text.split_whitespace().map(String::from)).collect()
    };
    let row = |name: &str, text: &str| Row { name: name.into(), args: words(text), is_vm: true };
    let host = |isolation: &str| {
        let text = format!("run --rm --network none --isolation {isolation} layers1 true");
        Row { is_vm: false, ..row(&format!("run, one layer, --isolation {isolation}"), &text) }
    };
    let boot = format!(
        "boot --kernel {} --initrd {} --serial null --exit-code-port 0xf4 --append microvm.exit_code_port=0xf4",
        path("tuned"),
        path("initrd")
    );
    let mut boot = row("boot, microvm-init and the same program", &boot);
    *boot.args.last_mut().unwrap() += " -- /bin/busybox true";
    let mut rows = vec![boot, host("process"), host("container")];
    rows.push(row("run, one layer, with a network", "run --rm layers1 true"));
    rows.extend(
        LAYERS.map(|n| row(&format!("run, layers: {n}"), &format!("run --rm --network none layers{n} true"))),
    );
    table(&rows)
}

/// Imports a large image, and has gzip unpack it.
fn import(work: &Path) -> Result<()> {
    fs::create_dir_all(work)?;
    let archive = work.join("image.tar.gz");
    let bytes = pack(&archive)?;
    let packed = archive.metadata()?.len();
    println!("import of {} MiB, {} MiB packed (gzip -6)", bytes >> 20, packed >> 20);
    let data = work.join("data");
    let mut import = Command::new(env!("CARGO_BIN_EXE_microvm"));
    import.args(["image", "import"]).arg(&archive).env("MICROVM_DATA", &data);
    let mut gzip = Command::new("gzip");
    gzip.arg("-dc").arg(&archive);
    for (name, command) in [("microvm image import", &mut import), ("gzip -dc >/dev/null", &mut gzip)] {
        let _ = fs::remove_dir_all(&data);
        let used = used(command)?;
        println!("  {name:<24} {used}");
    }
    Ok(fs::remove_dir_all(work)?)
}

/// Packs files of this machine, in order of their names, until there are enough.
fn pack(archive: &Path) -> Result<u64> {
    let (mut bytes, mut files, mut folders) = (0, Vec::new(), vec![PathBuf::from("/usr")]);
    while let Some(folder) = folders.pop() {
        let mut entries = fs::read_dir(&folder)?.collect::<std::io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (meta, path) = (entry.metadata()?, entry.path());
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_file() && meta.nlink() == 1 && bytes < IMPORT_BYTES {
                bytes += meta.len();
                files.push(path);
            }
        }
    }
    let mut tar = Command::new("tar")
        .args(["-C", "/", "--null", "--files-from=-", "-czf"])
        .arg(archive)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut list = tar.stdin.take().ok_or("no input")?;
    for file in files {
        list.write_all(file.strip_prefix("/")?.as_os_str().as_encoded_bytes())?;
        list.write_all(&[0])?;
    }
    drop(list);
    if tar.wait()?.success() { Ok(bytes) } else { Err("tar failed".into()) }
}

/// Time and memory of a command.
fn used(command: &mut Command) -> Result<String> {
    let begin = Instant::now();
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    let mut status = 0;
    // SAFETY: both places are valid for writing, and the child is ours and has not been waited for.
    let waited = unsafe { libc::wait4(child.id() as i32, &raw mut status, 0, usage.as_mut_ptr()) };
    let took = begin.elapsed();
    // SAFETY: zeros are a valid structure, and the kernel has filled it.
    let usage = unsafe { usage.assume_init() };
    if waited < 0 || status != 0 {
        return Err(format!("{command:?} failed").into());
    }
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Ok(format!(
        "{:6.1} s, of processors {:6.1} s, at most {:4} MiB of memory",
        took.as_secs_f64(),
        seconds(usage.ru_utime) + seconds(usage.ru_stime),
        usage.ru_maxrss >> 10
    ))
}
