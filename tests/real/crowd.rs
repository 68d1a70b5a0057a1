//! Many VMs of one image at once, and `kill -9` of whatever runs.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::common::fake_registry::{Fake, Image};
use super::common::images::Tar;
use super::common::{Host, stdout};
use super::life::{microvm, ok, ps, sh, tuned};
use super::status;

/// Every file below a folder.
fn below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| if path.is_dir() && !path.is_symlink() { below(&path) } else { vec![path] })
        .collect()
}

/// There is no container, and nothing is left of any.
#[track_caller]
fn assert_no_containers(host: &Host) {
    assert_eq!(ps(host), Vec::<Value>::new());
    let containers = host.data().join("containers");
    let names = fs::read_dir(containers).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["lock"]);
    let sockets = host.runtime();
    let left: Vec<_> =
        fs::read_dir(&sockets).into_iter().flatten().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?} with {:?}", below(&sockets));
}

/// All images can be removed, and then nothing is left of any.
#[track_caller]
fn assert_images_go(host: &Host) {
    let images: Vec<Value> = serde_json::from_str(&ok(host, "image ls --format json")).unwrap();
    for name in images.iter().flat_map(|image| image["names"].as_array().unwrap()) {
        ok(host, &format!("image rm {}", name.as_str().unwrap()));
    }
    ok(host, "image prune");
    let images = host.data().join("images");
    assert_eq!(below(&images), [images.join("lock")]);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn twenty_run_at_once() {
    let host = tuned();
    let names: BTreeSet<_> = (0..20).map(|number| format!("vm{number}")).collect();
    let at_once = |words: &dyn Fn(&str) -> String| {
        let start = |name: &String| {
            let mut command = microvm(&host, &words(name));
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let all: Vec<_> = names.iter().map(start).collect();
        let outputs = all.into_iter().map(|child| child.wait_with_output().unwrap());
        let check = |output| {
            status(&output, 0);
            stdout(&output)
        };
        outputs.map(check).collect::<Vec<_>>()
    };
    at_once(&|name| format!("run -d --name {name} --network none --memory 128M box busybox sleep 100000"));
    let list = ps(&host);
    assert!(list.iter().all(|vm| vm["state"] == "running"), "{list:?}");
    let listed: BTreeSet<_> = list.iter().map(|vm| vm["name"].as_str().unwrap().to_string()).collect();
    assert_eq!((list.len(), &listed), (20, &names));
    assert_eq!(ok(&host, "ps -q").lines().count(), 20);
    let answers = at_once(&|name| format!("exec {name} busybox hostname"));
    assert_eq!(answers, names.iter().map(|name| format!("{name}\n")).collect::<Vec<_>>());

    // The one layer is there once, and all have the same.
    let layers = below(&host.data().join("images/layers"));
    assert_eq!(layers.len(), 1, "{layers:?}");
    for vm in &list {
        let open = fs::read_dir(format!("/proc/{}/fd", vm["pid"])).unwrap();
        let mut open = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        assert!(open.any(|path| path == layers[0]), "{vm}");
    }
    let used = |path: &PathBuf| fs::metadata(path).unwrap().blocks() * 512;
    let containers: u64 = below(&host.data().join("containers")).iter().map(used).sum();
    assert!(containers < used(&layers[0]), "{containers} bytes");

    let all = Vec::from_iter(names.iter().map(String::as_str)).join(" ");
    ok(&host, &format!("rm --force {all}"));
    assert_no_containers(&host);
    assert_images_go(&host);
}

/// SplitMix64, by its authors' reference: numbers that another run gets again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) as usize
    }
}

/// What is done at random, with the name of a container and the registry's image.
const DEEDS: [&str; 16] = [
    "run -d --network none --memory 128M --name NAME box busybox sleep 100000",
    "run -d --network none --memory 128M --name NAME box busybox sleep 100000",
    "run -d --rm --network none --memory 128M --name NAME box busybox sleep 100000",
    "run -d --network none --memory 128M --storage 64M --name NAME box busybox sleep 100000",
    "run -d --network none --memory 128M -v kept:/mnt --name NAME box busybox sleep 100000",
    "run --rm --network none --memory 128M box busybox sleep 2",
    "run --pull always --network none --memory 128M --name NAME PULLED nothing",
    "exec NAME busybox sleep 2",
    "rm --force NAME",
    "stop --time 1s NAME",
    "prune --force",
    "pull PULLED",
    "image import other.tar --name other",
    "image rm other",
    "image rm PULLED",
    "image prune",
];
/// More than so many processes are too many for an emulated processor.
const CROWD: usize = 12;

/// What goes on at once.
struct Chaos<'a> {
    host: &'a Host,
    random: Random,
    /// Where all say what is wrong.
    errors: fs::File,
    children: Vec<Child>,
    deeds: usize,
    /// Deeds that came to their own end.
    finished: usize,
    kills: usize,
}

impl Chaos<'_> {
    /// Every process of `microvm` that was started here, or by what was.
    fn processes(&self) -> Vec<Pid> {
        let program = Path::new(env!("CARGO_BIN_EXE_microvm"));
        let ours = format!("MICROVM_DATA={}", self.host.data().display());
        let is_ours = |folder: &Path| {
            fs::read_link(folder.join("exe")).is_ok_and(|exe| exe == program)
                && fs::read(folder.join("environ"))
                    .is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one == ours.as_bytes()))
        };
        let folders = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
        let number = |folder: PathBuf| Pid::from_raw(folder.file_name()?.to_str()?.parse().ok()?);
        folders.filter(|folder| is_ours(folder)).filter_map(number).collect()
    }

    fn step(&mut self, pulled: &str) {
        self.reap();
        // As many numbers whatever is done, so that what runs then changes nothing of what is drawn later.
        let [kind, deed, name, victim, pause] = [(); 5].map(|()| self.random.next());
        let processes = self.processes();
        if processes.len() > CROWD || kind % 6 == 0 {
            if !processes.is_empty() {
                self.kill(processes[victim % processes.len()]);
            }
        } else {
            let name = format!("c{}", name % 5);
            let words = DEEDS[deed % DEEDS.len()].replace("NAME", &name).replace("PULLED", pulled);
            let mut command: Command = microvm(self.host, &words);
            command.stdout(Stdio::null()).stderr(self.errors.try_clone().unwrap());
            self.children.push(command.spawn().unwrap());
            self.deeds += 1;
        }
        thread::sleep(Duration::from_millis(pause as u64 % 1000));
    }

    fn reap(&mut self) {
        self.children.retain_mut(|child| {
            let status = child.try_wait().unwrap();
            self.finished += usize::from(status.is_some_and(|status| status.code().is_some()));
            status.is_none()
        });
    }

    fn kill(&mut self, pid: Pid) {
        // Unless it has ended meanwhile.
        self.kills += usize::from(kill_process(pid, Signal::KILL).is_ok());
    }

    fn kill_all(&mut self) {
        // One may just be starting another.
        loop {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            processes.into_iter().for_each(|pid| self.kill(pid));
            self.reap();
        }
        for child in &mut self.children {
            child.wait().unwrap();
        }
    }
}

/// A number that the environment gives.
fn given(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// For 30 seconds, or `MICROVM_CHAOS_SECONDS`; `MICROVM_CHAOS_SEED` has the same drawn again. It needs root, to see whose
/// processes are its own.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn whatever_is_killed_leaves_nothing_that_stays() {
    let seconds = given("MICROVM_CHAOS_SECONDS").unwrap_or(30);
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = given("MICROVM_CHAOS_SEED").unwrap_or_else(now);
    println!("MICROVM_CHAOS_SEED={seed} MICROVM_CHAOS_SECONDS={seconds}");

    let host = tuned();
    let archive = |size: usize| {
        let data = |number: usize| (0..size).map(|at| ((at * number) >> 3) as u8).collect::<Vec<_>>();
        let files = (0..40).map(|number| (format!("file{number}"), data(number)));
        files.fold(Tar::default(), |tar, (name, data)| tar.file(&name, &data)).end()
    };
    host.file("other.tar", &archive(30_000));
    let image = Image::new(&[&archive(10_000), &archive(40_000)]);
    let registry = Fake::new(move |request| image.answer(request));
    let said = host.file("errors", b"");
    let files = host.files();
    let errors = fs::File::options().append(true).open(&said).unwrap();

    let mut chaos = Chaos {
        host: &host,
        random: Random(seed),
        errors,
        children: Vec::new(),
        deeds: 0,
        finished: 0,
        kills: 0,
    };
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(seconds) {
        chaos.step(&registry.app());
    }
    chaos.kill_all();
    println!("{} commands, {} of them not killed; {} kills", chaos.deeds, chaos.finished, chaos.kills);
    let said = fs::read_to_string(said).unwrap();
    assert!(!said.contains("panicked"), "{said}");

    let left = ps(&host);
    println!("{} containers are left", left.len());
    assert!(left.iter().all(|vm| vm["state"] != "running"), "{left:?}");
    assert_eq!(ok(&host, "ps -q"), "");
    ok(&host, "prune --force");
    assert_no_containers(&host);
    let folders = fs::read_dir(host.data()).unwrap().map(|entry| entry.unwrap().file_name());
    let known = ["containers", "images", "kernels", "volumes"];
    let unknown: Vec<_> = folders.filter(|name| !known.iter().any(|known| name == known)).collect();
    assert_eq!(unknown, Vec::<std::ffi::OsString>::new());
    assert_eq!(below(&host.data().join("volumes")), Vec::<PathBuf>::new());
    assert_eq!(host.files(), files);

    // What is there is whole.
    let output = sh(&host, "run --rm --network none --timeout 120s box", "busybox cat /opt/both").output();
    let output = output.unwrap();
    status(&output, 0);
    assert_eq!(stdout(&output), "lower\n");
    ok(&host, &format!("pull {}", registry.app()));
    ok(&host, "image import other.tar --name other");
    assert_images_go(&host);
}
