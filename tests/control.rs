//! The control socket of running VMs: what it does, who may have it, and clients of every kind.

mod common;

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{Host, SPIN, assert_fails, own_stderr, power_off, print, smp, stderr, stdout};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

/// Far longer than anything here takes, and shorter than a hang.
const LONG: Duration = Duration::from_secs(60);

/// A user's run-time folder, and the VMs in it.
struct Station {
    host: Host,
}

impl Station {
    fn new() -> Self {
        let host = Host::new();
        fs::create_dir(host.dir.path().join("run")).unwrap();
        Self { host }
    }

    fn run_dir(&self) -> PathBuf {
        self.host.dir.path().join("run")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.run_dir().join("microvm").join(name).join("control.sock")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.host.microvm(args);
        command.env("XDG_RUNTIME_DIR", self.run_dir());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn boot(&self, code: &[u8], flags: &[&str]) -> Command {
        let kernel = self.host.kernel(code);
        let mut command = self.host.boot(&kernel, flags);
        command.env("XDG_RUNTIME_DIR", self.run_dir());
        command
    }

    /// A VM called `name`, once its guest has printed the letter that `code` must begin with.
    fn start(&self, name: &str, code: &[u8], flags: &[&str]) -> Vm {
        let flags = [&["--name", name], flags].concat();
        let mut child = self.boot(code, &flags).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Vm { child, socket: self.socket(name) }
    }

    /// A VM that does nothing.
    fn idle(&self, name: &str) -> Vm {
        self.start(name, &[print("u"), SPIN.to_vec()].concat(), &[])
    }
}

/// A running VM. It is killed when the test is over.
struct Vm {
    child: Child,
    socket: PathBuf,
}

impl Vm {
    fn http(&self) -> Http {
        Http::connect(&self.socket)
    }

    /// One request by a client of its own.
    #[track_caller]
    fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        self.http().ask(method, path, body)
    }

    #[track_caller]
    fn set_state(&self, state: &str) {
        let expected = json!({ "state": state });
        assert_eq!(self.ask("PUT", "/vm/state", Some(expected.clone())), (200, expected));
    }

    /// The next client is served.
    #[track_caller]
    fn assert_serves(&self) {
        assert_eq!(self.ask("GET", "/vm", None).0, 200);
    }

    fn printed(&self) -> u64 {
        let (status, device) = self.ask("GET", "/devices/com1", None);
        assert_eq!(status, 200);
        device["counters"]["microvm_serial_output_bytes_total"].as_u64().unwrap()
    }

    #[track_caller]
    fn status(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that reads responses by their length.
struct Http {
    stream: UnixStream,
}

impl Http {
    fn connect(socket: &PathBuf) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        Self { stream }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    #[track_caller]
    fn ask(&mut self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let body = body.map(|b| b.to_string()).unwrap_or_default();
        self.send(&request(method, path, &format!("Content-Length: {}\r\n", body.len()), &body));
        let response = self.response().expect("an answer");
        (response.status, serde_json::from_str(&response.body).unwrap_or(Value::Null))
    }

    /// The next response; `None` at the end of the connection.
    #[track_caller]
    fn response(&mut self) -> Option<Answer> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            match self.stream.read(&mut byte).unwrap() {
                0 if head.is_empty() => return None,
                0 => panic!("the head ends in the middle: {}", String::from_utf8_lossy(&head)),
                _ => head.push(byte[0]),
            }
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.lines().find_map(|l| l.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.map_or(0, |l| l.parse().unwrap())];
        self.stream.read_exact(&mut body).unwrap();
        Some(Answer { status, head, body: String::from_utf8(body).unwrap() })
    }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

fn request(method: &str, path: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n{body}").into_bytes()
}

/// Waits for something that another process does.
#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < LONG, "never came true: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Prints 0, 1, … 127, 0, 1, … without end, and reads a port in between; ends the VM if a read comes out wrong.
fn count() -> Vec<u8> {
    // xor ebx, ebx; again: mov dx, 0x3f8; mov al, bl; out dx, al; inc bl; and bl, 0x7f
    let print = [0x31, 0xdb, 0x66, 0xba, 0xf8, 3, 0x88, 0xd8, 0xee, 0xfe, 0xc3, 0x80, 0xe3, 0x7f];
    // in al, 0x7f; cmp al, -1; je again
    [&print[..], &[0xe4, 0x7f, 0x3c, 0xff, 0x74, 0xee], &power_off()].concat()
}

/// The same on another vCPU, in 16-bit code, with 128 to 255.
fn count_high() -> Vec<u8> {
    // mov bl, 0x80; again: mov dx, 0x3f8; mov al, bl; out dx, al; inc bl; or bl, 0x80; jmp again
    vec![0xb3, 0x80, 0xba, 0xf8, 3, 0x88, 0xd8, 0xee, 0xfe, 0xc3, 0x80, 0xcb, 0x80, 0xeb, 0xf3]
}

/// Prints 0, 1, … 127, 0, 1, … without end and faster: 1024 numbers in one instruction.
fn count_fast() -> Vec<u8> {
    // mov esi, LOAD + 18; mov ecx, 1024; mov dx, 0x3f8; rep outsb; jmp to the start
    let code = [0xbe, 0x12, 0, 0x20, 0, 0xb9, 0, 4, 0, 0, 0x66, 0xba, 0xf8, 3, 0xf3, 0x6e, 0xeb, 0xee];
    [code.to_vec(), (0..128).collect::<Vec<u8>>().repeat(8)].concat()
}

/// Each number of a counting vCPU is there once, in order.
#[track_caller]
fn assert_counts(bytes: &[u8], high: bool) {
    let mine = bytes.iter().filter(|b| (**b >= 128) == high);
    let wrong = mine.zip((0..128u8).cycle()).position(|(byte, expected)| byte & 0x7f != expected);
    assert_eq!(wrong, None, "a byte was lost or printed twice");
}

#[test]
fn a_paused_guest_prints_nothing_and_goes_on_where_it_was() {
    let station = Station::new();
    let mut child = station.boot(&count(), &["--name", "a", "--serial", "file=out"]).spawn().unwrap();
    eventually("the socket is there", || station.socket("a").exists());
    let mut vm = Vm { child, socket: station.socket("a") };
    for _ in 0..3 {
        let before = vm.printed();
        eventually("the guest prints", || vm.printed() > before);
        vm.set_state("paused");
        let at_pause = vm.printed();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(100) {
            assert_eq!(vm.printed(), at_pause, "it runs while it is paused");
        }
        assert_eq!(vm.ask("GET", "/vm", None).1["state"], "paused");
        vm.set_state("running");
        eventually("the guest prints again", || vm.printed() > at_pause);
    }
    vm.set_state("paused");
    let printed = vm.printed();
    vm.set_state("stopped");
    assert_eq!(vm.status(), Some(143));
    let out = fs::read(station.host.dir.path().join("out")).unwrap();
    assert_eq!(out.len() as u64, printed, "output was lost");
    assert_counts(&out, false);
    child = station.boot(&power_off(), &["--name", "a"]).spawn().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "the name is free again");
}

#[test]
fn two_hundred_pauses_in_heavy_port_io_lose_nothing() {
    let station = Station::new();
    let code = smp(&count_high(), &count());
    let flags = ["--name", "a", "--cpus", "2", "--serial", "file=out", "--metrics", "metrics.json"];
    let child = station.boot(&code, &flags).spawn().unwrap();
    eventually("the socket is there", || station.socket("a").exists());
    let mut vm = Vm { child, socket: station.socket("a") };
    let mut http = vm.http();
    let mut last = 0;
    for round in 0..200 {
        for state in ["paused", "running"] {
            let body = json!({ "state": state });
            assert_eq!(http.ask("PUT", "/vm/state", Some(body.clone())), (200, body), "{round}");
        }
        if round % 20 == 19 {
            eventually("the guest goes on", || vm.printed() > last);
            last = vm.printed();
        }
    }
    drop(http);
    vm.set_state("stopped");
    assert_eq!(vm.status(), Some(143), "the guest ended by itself: a port read came out wrong");
    let out = fs::read(station.host.dir.path().join("out")).unwrap();
    assert!(out.contains(&200) && out.contains(&100), "one of the vCPUs printed nothing");
    assert_counts(&out, false);
    assert_counts(&out, true);
    let text = fs::read_to_string(station.host.dir.path().join("metrics.json")).unwrap();
    let metrics = metrics_json(&text);
    assert_eq!(metrics["microvm_pauses_total"], json!([{ "labels": {}, "value": 200 }]));
}

#[test]
fn a_vcpu_that_waits_for_the_consoles_reader_can_be_paused() {
    let station = Station::new();
    let mut vm = station.start("a", &count_fast(), &["--timeout", "5m"]);
    // The smallest pipe there is: soon full.
    let pipe = vm.child.stdout.as_ref().unwrap();
    rustix::pipe::fcntl_setpipe_size(pipe, 4096).unwrap();
    let unwritten =
        |vm: &Vm| vm.ask("GET", "/devices/com1", None).1["state"]["unwritten_bytes"].as_u64().unwrap();
    eventually("the buffer is full", || unwritten(&vm) >= 64 << 10);
    for _ in 0..3 {
        vm.set_state("paused");
        vm.set_state("running");
    }
    // More than pipe and buffer hold.
    let mut read = vec![0; 80 << 10];
    vm.child.stdout.as_mut().unwrap().read_exact(&mut read).unwrap();
    // The first one was read at the start.
    assert_counts(&[&[0], read.as_slice()].concat(), false);
}

#[test]
fn vcpus_that_wait_to_be_started_can_be_paused() {
    let station = Station::new();
    let vm = station.start("a", &[print("u"), SPIN.to_vec()].concat(), &["--cpus", "4"]);
    for _ in 0..20 {
        vm.set_state("paused");
        vm.set_state("paused");
        vm.set_state("running");
        vm.set_state("running");
    }
}

#[test]
fn a_paused_vm_can_be_ended_in_every_way() {
    let station = Station::new();
    let mut vm = station.idle("a");
    vm.set_state("paused");
    Command::new("kill").arg(vm.child.id().to_string()).status().unwrap();
    assert_eq!(vm.status(), Some(143));
    // Long enough for a slow host to come to the guest's letter.
    let mut vm = station.start("b", &[print("u"), SPIN.to_vec()].concat(), &["--timeout", "6s"]);
    vm.set_state("paused");
    assert_eq!(vm.status(), Some(124), "the time limit goes on while a VM is paused");
    let mut vm = station.idle("c");
    vm.set_state("paused");
    let output = station.run(&["ctl", "c", "stop"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(vm.child.try_wait().unwrap().unwrap().code(), Some(143), "ctl stop waits for the process");
    assert!(!vm.socket.parent().unwrap().exists(), "the VM's folder is left behind");
    assert_eq!(vm.status(), Some(143));
}

#[test]
fn ps_lists_the_living_and_with_all_the_dead() {
    let station = Station::new();
    assert_eq!(stdout(&station.run(&["ps", "-q"])), "", "no folder yet");
    let (web, mut db) = (station.idle("web"), station.idle("db"));
    assert_eq!(stdout(&station.run(&["ps", "-q"])), "db\nweb\n");
    web.set_state("paused");
    let list: Value = serde_json::from_slice(&station.run(&["ps", "--format", "json"]).stdout).unwrap();
    assert_eq!(list[1]["name"], "web");
    assert_eq!(list[1]["pid"], web.child.id());
    assert_eq!((&list[0]["state"], &list[1]["state"]), (&json!("running"), &json!("paused")));
    db.child.kill().unwrap();
    db.child.wait().unwrap();
    assert!(db.socket.exists(), "nobody could remove it");
    let table = stdout(&station.run(&["ps"]));
    assert!(table.contains("web") && table.contains("16M") && !table.contains("db"), "{table}");
    let all = stdout(&station.run(&["ps", "-a"]));
    let dead = all.lines().find(|l| l.starts_with("db")).unwrap();
    assert!(dead.contains("dead"), "{all}");
    assert_fails(&station.run(&["ctl", "db", "state"]), 1, &["db", "dead"]);
    // The name is free for a new one.
    let mut db = station.idle("db");
    db.assert_serves();
    assert_eq!(stdout(&station.run(&["ps", "-q"])), "db\nweb\n");
    // What dead ones left can be removed, and nothing of a living one.
    db.child.kill().unwrap();
    db.child.wait().unwrap();
    let output = station.run(&["prune", "--force"]);
    assert!(output.status.success() && stdout(&output).contains("1 dead VMs"), "{output:?}");
    assert_eq!(stdout(&station.run(&["ps", "--all", "-q"])), "web\n");
    assert!(!db.socket.exists());
    web.assert_serves();
}

/// A VM that is killed while it makes its socket, or removes it, leaves a folder that is no VM's to anybody.
#[test]
fn prune_removes_what_a_vm_left_that_had_no_socket() {
    let station = Station::new();
    let web = station.idle("web");
    let folders = station.run_dir().join("microvm");
    for name in ["early", "late", "served"] {
        fs::create_dir(folders.join(name)).unwrap();
        fs::set_permissions(folders.join(name), Permissions::from_mode(0o700)).unwrap();
    }
    // Bound and not at its place.
    drop(UnixListener::bind(folders.join("late/.123.new")).unwrap());
    // Somebody's beside a VM.
    let _listening = UnixListener::bind(folders.join("served/own.sock")).unwrap();
    let output = station.run(&["prune", "--force"]);
    assert!(output.status.success() && stdout(&output).contains("2 dead VMs"), "{output:?}");
    let again = station.run(&["prune", "--force", "--format", "json"]);
    assert_eq!(stdout(&again), "{\"containers\":[],\"dead_vms\":0,\"freed\":0}\n");
    let left = fs::read_dir(&folders).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(BTreeSet::from_iter(left), ["served", "web"].map(OsString::from).into());
    assert!(folders.join("served/own.sock").exists());
    web.assert_serves();
}

#[test]
fn a_name_belongs_to_one_vm_at_a_time() {
    let station = Station::new();
    let vm = station.idle("web");
    let console = station.host.file("console", b"kept");
    let flags = ["--name", "web", "--serial", "file=console"];
    let output = station.boot(&power_off(), &flags).output().unwrap();
    assert_fails(&output, 1, &["--name web", "runs already"]);
    assert_eq!(fs::read(console).unwrap(), b"kept", "a VM that cannot be has emptied a file");
    vm.assert_serves();
    // Of many that start at once, one wins: the others end, and it runs on.
    let code = [print("u"), SPIN.to_vec()].concat();
    let start = |_| station.boot(&code, &["--name", "race"]).stderr(Stdio::null()).spawn().unwrap();
    let mut children: Vec<Child> = (0..6).map(start).collect();
    let ended = |children: &mut Vec<Child>| -> Vec<i32> {
        let statuses = children.iter_mut().filter_map(|c| c.try_wait().unwrap());
        statuses.map(|status| status.code().unwrap()).collect()
    };
    eventually("five have ended", || ended(&mut children).len() >= 5);
    assert_eq!(ended(&mut children), [1; 5]);
    eventually("the socket is there", || station.socket("race").exists());
    assert_eq!(station.run(&["ctl", "race", "stop"]).status.code(), Some(0));
    let mut all: Vec<i32> = children.iter_mut().map(|c| c.wait().unwrap().code().unwrap()).collect();
    all.sort_unstable();
    assert_eq!(all, [1, 1, 1, 1, 1, 143]);
}

#[test]
fn vms_without_a_name_get_one_each() {
    let station = Station::new();
    let code = [print("u"), SPIN.to_vec()].concat();
    let mut child = station.boot(&code, &[]).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let name = format!("vm-{}", child.id());
    let vm = Vm { child, socket: station.socket(&name) };
    vm.assert_serves();
    assert_eq!(stdout(&station.run(&["ps", "-q"])), format!("{name}\n"));
}

#[test]
fn only_this_user_can_get_in() {
    let station = Station::new();
    let vm = station.idle("a");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&vm.socket), 0o600);
    assert_eq!(mode(vm.socket.parent().unwrap()), 0o700);
    assert_eq!(mode(&station.run_dir().join("microvm")), 0o700);
    let elsewhere = station.host.dir.path().join("vm.sock");
    let code = [print("u"), SPIN.to_vec()].concat();
    let mut child = station.boot(&code, &["--control", "vm.sock"]).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let vm = Vm { child, socket: elsewhere };
    assert_eq!(mode(&vm.socket), 0o600);
}

#[test]
fn a_folder_that_others_can_change_is_not_used() {
    let station = Station::new();
    let base = station.run_dir().join("microvm");
    let boot = |flags: &[&str]| station.boot(&power_off(), flags).output().unwrap();
    fs::create_dir(&base).unwrap();
    fs::set_permissions(&base, fs::Permissions::from_mode(0o777)).unwrap();
    assert_fails(&boot(&["--name", "a"]), 1, &[base.to_str().unwrap(), "--control"]);
    // Whoever made it could answer in a VM's place.
    for client in [&["ps"][..], &["ctl", "a", "state"]] {
        assert_fails(&station.run(client), 1, &[base.to_str().unwrap(), "open to others"]);
    }
    // A VM that nobody gave a name runs without a socket.
    let output = boot(&[]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("no control socket"), "{}", stderr(&output));
    // Root alone gives folders away.
    fs::set_permissions(&base, fs::Permissions::from_mode(0o700)).unwrap();
    if chown(&base, Some(65534), None).is_ok() {
        assert_fails(&boot(&["--name", "a"]), 1, &[base.to_str().unwrap(), "another user's"]);
        assert_fails(&station.run(&["ctl", "a", "state"]), 1, &[base.to_str().unwrap(), "another user's"]);
    }
    fs::remove_dir(&base).unwrap();
    symlink(station.host.dir.path(), &base).unwrap();
    assert_fails(&boot(&["--name", "a"]), 1, &[base.to_str().unwrap(), "link"]);
    assert_fails(&station.run(&["ctl", "a", "state"]), 1, &[base.to_str().unwrap(), "link"]);
    fs::remove_file(&base).unwrap();
    // A socket in place of the VM's folder.
    fs::create_dir(&base).unwrap();
    fs::set_permissions(&base, fs::Permissions::from_mode(0o700)).unwrap();
    symlink("/tmp", base.join("a")).unwrap();
    assert_fails(&boot(&["--name", "a"]), 1, &["microvm/a", "link"]);
}

#[test]
fn a_socket_can_be_anywhere_but_over_something_else() {
    let station = Station::new();
    let path = station.host.dir.path().join("vm.sock");
    let code = [print("u"), SPIN.to_vec()].concat();
    let start = || {
        let mut child =
            station.boot(&code, &["--control", "vm.sock"]).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Vm { child, socket: path.clone() }
    };
    let boot = || station.boot(&power_off(), &["--control", "vm.sock"]).output().unwrap();
    let mut vm = start();
    assert_fails(&boot(), 1, &["vm.sock", "listens there already"]);
    let output = station.run(&["ctl", "./vm.sock", "state", "--format", "json"]);
    let state: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(state["pid"], vm.child.id());
    assert_eq!(stdout(&station.run(&["ps", "-aq"])), "", "not in the folder of names");
    // A dead VM's socket is replaced, and gone after a good end.
    vm.child.kill().unwrap();
    vm.child.wait().unwrap();
    assert!(path.exists());
    let mut vm = start();
    vm.set_state("stopped");
    assert_eq!(vm.status(), Some(143));
    assert!(!path.exists());
    // Anything else stays.
    fs::write(&path, "mine").unwrap();
    assert_fails(&boot(), 1, &["vm.sock", "no socket"]);
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    fs::remove_file(&path).unwrap();
    let long = "x".repeat(120);
    let output = station.boot(&power_off(), &["--control", &long]).output().unwrap();
    assert_fails(&output, 1, &["107 bytes"]);
    let output = station.boot(&power_off(), &["--control", "none/vm.sock"]).output().unwrap();
    assert_fails(&output, 1, &["none/vm.sock", "No such file"]);
    let output = station.boot(&power_off(), &["--control", "none"]).output().unwrap();
    assert_eq!((output.status.code(), own_stderr(&output)), (Some(0), String::new()));
    assert!(!station.run_dir().join("microvm").exists(), "none asks for no folder");
}

#[test]
fn a_socket_that_is_another_vms_by_now_stays() {
    let station = Station::new();
    let path = station.host.dir.path().join("vm.sock");
    let code = [print("u"), SPIN.to_vec()].concat();
    let start = || {
        let mut child =
            station.boot(&code, &["--control", "vm.sock"]).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Vm { child, socket: path.clone() }
    };
    let mut first = start();
    fs::remove_file(&path).unwrap();
    let second = start();
    // SAFETY: a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(first.child.id() as i32, libc::SIGTERM) }, 0);
    first.status();
    assert!(path.exists(), "the first VM removed the second one's socket");
    second.assert_serves();
}

#[test]
fn a_failed_start_leaves_no_folder() {
    let station = Station::new();
    let kernel = station.host.file("kernel", b"no kernel");
    let mut command = station.host.boot(&kernel, &["--name", "a", "--metrics", "m.json"]);
    let output = command.env("XDG_RUNTIME_DIR", station.run_dir()).output().unwrap();
    assert_fails(&output, 1, &["--kernel"]);
    assert_eq!(fs::read_dir(station.run_dir().join("microvm")).unwrap().count(), 0);
    let names: Vec<_> = station.host.files().iter().map(|p| p.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["kernel", "run"], "a file is left behind");
}

#[test]
fn bad_names_and_unknown_ones() {
    let station = Station::new();
    for name in ["", "..", "a/b", "a b", "-x", &"x".repeat(65)] {
        let output = station.boot(&power_off(), &[&format!("--name={name}")]).output().unwrap();
        assert_fails(&output, 2, &["--name"]);
    }
    assert_fails(&station.run(&["ctl", "nobody", "state"]), 1, &["no VM nobody", "microvm ps"]);
    // Not what a dead VM left behind, which one might remove.
    station.host.file("disk.img", b"precious");
    assert_fails(&station.run(&["ctl", "./disk.img", "state"]), 1, &["./disk.img is no socket"]);
    assert_fails(&station.run(&["ctl", "/", "state"]), 1, &["/ is no socket"]);
    assert_fails(&station.run(&["ctl", "./nobody.sock", "stop"]), 1, &["nobody.sock"]);
    let vm = station.idle("a");
    for (args, word) in [
        (&["ctl", "a"][..], ""),
        (&["ctl", "a", "explode"], "explode"),
        (&["ctl", "a", "device"], "ID"),
        (&["ctl", "a", "device", "com1", "target"], "KEY=VALUE"),
        (&["ctl", "a", "device", "../vm"], "no device's id"),
        (&["ps", "--format", "xml"], "xml"),
    ] {
        let output = station.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{args:?}: {}", stderr(&output));
    }
    assert_fails(&station.run(&["ctl", "a", "device", "disk9"]), 1, &["disk9"]);
    assert_fails(&station.run(&["ctl", "a", "device", "com1", "speed=9600"]), 1, &["nothing to change"]);
    vm.assert_serves();
}

#[test]
fn what_listens_and_is_no_vm_is_told_from_one() {
    let station = Station::new();
    let path = station.host.dir.path().join("other.sock");
    let other = UnixListener::bind(&path).unwrap();
    let serving = thread::spawn(move || {
        let (mut client, _) = other.accept().unwrap();
        client.write_all(b"220 smtp ready\r\n").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let _ = io::copy(&mut client, &mut io::sink());
    });
    assert_fails(&station.run(&["ctl", "./other.sock", "state"]), 1, &["other.sock", "no microvm"]);
    serving.join().unwrap();
}

#[test]
fn ctl_speaks_for_people_and_for_programs() {
    let station = Station::new();
    let vm = station.idle("a");
    let text = |args: &[&str]| {
        let output = station.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        stdout(&output)
    };
    assert!(text(&["ctl", "a", "state"]).contains("memory_bytes    16777216\n"));
    assert_eq!(text(&["ctl", "a", "pause"]), "state  paused\n");
    assert_eq!(text(&["ctl", "a", "unpause", "--format", "json"]), "{\"state\":\"running\"}\n");
    assert_eq!(text(&["ctl", "a", "devices"]), "rng   rng\ncom1  serial\n");
    assert!(
        text(&["ctl", "a", "device", "com1"]).contains("counters.microvm_serial_output_bytes_total  1\n")
    );
    assert!(text(&["ctl", "a", "metrics"]).contains("\nmicrovm_vcpus 1\n"));
    let json: Value = serde_json::from_str(&text(&["ctl", "a", "stats", "--format", "json"])).unwrap();
    assert_eq!(json["schema"], "microvm.metrics/1");
    vm.assert_serves();
}

#[test]
fn a_disks_limits_change_while_it_runs() {
    let station = Station::new();
    station.host.file("disk.img", &[0; 64 << 10]);
    let code = [print("u"), SPIN.to_vec()].concat();
    let vm = station.start("a", &code, &["--disk", "disk.img,id=data,iops=10", "--console", "file=hvc0"]);
    let device = |changes: &[&str]| station.run(&[&["ctl", "a", "device", "data"], changes].concat());
    let shown = stdout(&device(&[]));
    for line in ["state.iops", "10", "state.size", "64K", "counters.microvm_disk_reads_total", "0"] {
        assert!(shown.contains(line), "{shown}");
    }
    let output = device(&["iops=500", "bandwidth=1M"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let state = || vm.ask("GET", "/devices/data", None).1["state"].clone();
    let expected = json!({ "size": "64K", "readonly": false, "iops": 500, "bandwidth": "1M" });
    assert_eq!(state(), expected);
    assert_fails(&device(&["iops=0"]), 1, &["iops=0", "1 or more"]);
    assert_fails(&device(&["iops=5", "speed=1"]), 1, &["unknown field `speed`"]);
    assert_eq!(state(), expected, "a refused request changed something");
    assert_eq!(device(&["iops=null", "bandwidth=null"]).status.code(), Some(0));
    assert_eq!((&state()["iops"], &state()["bandwidth"]), (&Value::Null, &Value::Null));
    // Devices stand in the order of the guest's.
    let devices = stdout(&station.run(&["ctl", "a", "devices"]));
    assert_eq!(devices, "rng   rng\ndata  block\nhvc0  console\ncom1  serial\n");
    let console = vm.ask("GET", "/devices/hvc0", None).1;
    let state = json!({ "unwritten_bytes": 0, "active": false, "columns": 80, "rows": 25 });
    assert_eq!(console["state"], state, "{console}");
    assert_eq!(console["counters"]["microvm_console_dropped_bytes_total"], 0);
}

#[test]
fn a_share_is_shown_and_has_nothing_to_change() {
    let station = Station::new();
    let folder = tempfile::tempdir().unwrap();
    let code = [print("u"), SPIN.to_vec()].concat();
    let flag = format!("{},tag=src,readonly", folder.path().display());
    let vm = station.start("a", &code, &["--share", &flag]);
    let json = stdout(&station.run(&["ctl", "a", "device", "share0", "--format", "json"]));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["kind"], "share", "{json}");
    let state =
        json!({ "tag": "src", "path": folder.path(), "readonly": true, "known_files": 0, "open_files": 0 });
    assert_eq!(json["state"], state);
    assert_eq!(json["counters"]["microvm_share_requests_total"], 0, "{json}");
    assert_fails(&station.run(&["ctl", "a", "device", "share0", "tag=x"]), 1, &["nothing to change"]);
    vm.assert_serves();
}

#[test]
fn a_vsock_is_shown_and_has_nothing_to_change() {
    let station = Station::new();
    let code = [print("u"), SPIN.to_vec()].concat();
    let vm = station.start("a", &code, &["--vsock", "cid=5,socket=v.sock"]);
    let json = stdout(&station.run(&["ctl", "a", "device", "vsock", "--format", "json"]));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["kind"], "vsock", "{json}");
    let path = station.host.dir.path().canonicalize().unwrap().join("v.sock");
    assert_eq!(json["state"], json!({ "cid": 5, "socket": path, "open_connections": 0 }));
    assert_eq!(json["counters"]["microvm_vsock_connections_total"], 0, "{json}");
    assert_fails(&station.run(&["ctl", "a", "device", "vsock", "cid=6"]), 1, &["nothing to change"]);
    vm.assert_serves();
}

#[test]
fn each_path_and_method_has_its_answer() {
    let station = Station::new();
    let vm = station.idle("a");
    let (status, info) = vm.ask("GET", "/vm", None);
    assert_eq!((status, &info["name"], &info["cpus"]), (200, &json!("a"), &json!(1)));
    assert!(info["kernel"].as_str().unwrap().starts_with('/'), "{info}");
    assert!(info["started"].as_str().unwrap().ends_with('Z') && info["uptime_seconds"].as_f64() >= Some(0.0));
    let state = |body: &str| {
        let mut http = vm.http();
        http.send(&request("PUT", "/vm/state", &format!("content-LENGTH: {}\r\n", body.len()), body));
        let answer = http.response().unwrap();
        (answer.status, answer.body)
    };
    for (body, word) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "object is expected"),
        (" [\"paused\"]", "object is expected"),
        ("{}", "missing field `state`"),
        (r#"{"state":"paused","force":true}"#, "unknown field `force`"),
        (r#"{"state":"paused","state":"running"}"#, "duplicate field `state`"),
        (r#"{"state":"asleep"}"#, "unknown variant `asleep`"),
        (r#"{"state":7}"#, "expected"),
        ("{\"state\":\"paused\"} x", "trailing"),
        ("\u{0}", "expected value"),
        (&"{\"a\":".repeat(10_000), "unknown field `a`"),
    ] {
        let (status, text) = state(body);
        assert_eq!(status, 400, "{body:.40}: {text}");
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    for (method, path, status, allow) in [
        ("GET", "/", 404, ""),
        ("GET", "/vms", 404, ""),
        ("GET", "/vm/", 404, ""),
        ("GET", "/vm/../vm", 404, ""),
        ("GET", "/devices/", 404, ""),
        ("GET", "/devices/none", 404, ""),
        ("GET", "/devices/%2e%2e", 404, ""),
        ("GET", "/vm?all=1", 400, ""),
        ("POST", "/vm", 405, "Allow: GET, HEAD\r\n"),
        ("PUT", "/metrics", 405, "Allow: GET, HEAD\r\n"),
        ("GET", "/vm/state", 405, "Allow: PUT\r\n"),
        ("DELETE", "/devices/com1", 405, "Allow: GET, HEAD, PUT\r\n"),
        ("get", "/vm", 405, "Allow: GET, HEAD\r\n"),
        ("FROBNICATE", "/devices", 405, "Allow: GET, HEAD\r\n"),
    ] {
        let mut http = vm.http();
        http.send(&request(method, path, "", ""));
        let answer = http.response().unwrap();
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        assert!(answer.head.contains(allow), "{method} {path}: {}", answer.head);
    }
    let (status, error) = vm.ask("PUT", "/devices/com1", Some(json!({ "speed": 9600 })));
    assert_eq!((status, error), (405, json!({ "error": "this device has nothing to change" })));
    assert_eq!(vm.ask("PUT", "/devices/none", Some(json!({}))).0, 404);
    // Nested without end: refused by serde_json's limit, not by the thread's stack.
    let mut http = vm.http();
    let deep = "{\"a\":".repeat(10_000);
    http.send(&request("PUT", "/devices/com1", &format!("Content-Length: {}\r\n", deep.len()), &deep));
    let answer = http.response().unwrap();
    assert!(answer.status == 400 && answer.body.contains("recursion limit"), "{}", answer.body);
    assert_eq!(vm.ask("GET", "/vm", None).1["state"], "running", "a refused request changed something");
    // HEAD has the length of the body and no body.
    let mut http = vm.http();
    http.send(
        &[request("HEAD", "/devices", "", ""), request("GET", "/vm", "Connection: close\r\n", "")].concat(),
    );
    let mut all = String::new();
    http.stream.read_to_string(&mut all).unwrap();
    let second = all.find("\r\n\r\n").unwrap() + 4;
    assert!(all[second..].starts_with("HTTP/1.1 200"), "{all}");
}

#[test]
fn requests_in_pieces_in_a_row_and_from_one_who_stops_sending() {
    let station = Station::new();
    let vm = station.idle("a");
    let body = "{ \"state\" : \"paused\" }";
    let put = request("PUT", "/vm/state", &format!("Content-Length: {}\r\n", body.len()), body);
    // Byte by byte.
    let mut http = vm.http();
    put.iter().for_each(|byte| http.send(&[*byte]));
    assert_eq!(http.response().unwrap().status, 200);
    // Many at once: answered in order, on the connection that is already open.
    let row = [&put[..], &request("GET", "/nothing", "", ""), &request("GET", "/vm", "", "")].concat();
    http.send(&row.repeat(20));
    for _ in 0..20 {
        let statuses: Vec<u16> = (0..3).map(|_| http.response().unwrap().status).collect();
        assert_eq!(statuses, [200, 404, 200]);
    }
    // A client that sends no more is answered, and then the connection ends.
    let mut http = vm.http();
    http.send(&[request("GET", "/vm", "", ""), request("GET", "/devices", "", "")].concat());
    http.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!((http.response().unwrap().status, http.response().unwrap().status), (200, 200));
    assert!(http.response().is_none());
    // In the middle of a request, too.
    let mut http = vm.http();
    http.send(&put[..put.len() - 1]);
    http.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(http.response().unwrap().status, 400);
    assert!(http.response().is_none());
    // curl's way with a long body.
    let mut http = vm.http();
    http.send(&request("PUT", "/vm/state", "Content-Length: 19\r\nExpect: 100-continue\r\n", ""));
    assert_eq!(http.response().unwrap().status, 100);
    http.send(b"{\"state\":\"running\"}");
    assert_eq!(http.response().unwrap().status, 200);
    // One who goes without a word, and one who goes before the answer.
    drop(vm.http());
    let mut http = vm.http();
    http.send(&request("GET", "/metrics", "", "").repeat(50));
    drop(http);
    vm.assert_serves();
}

#[test]
fn hostile_requests_are_refused_and_the_next_client_is_served() {
    let station = Station::new();
    let vm = station.idle("a");
    let put = |headers: &str| request("PUT", "/vm/state", headers, "");
    for (bytes, status) in [
        (put("Content-Length: -1\r\n"), 400),
        (put("Content-Length: 18446744073709551616\r\n"), 413),
        (put("Content-Length: 65537\r\n"), 413),
        (put("Content-Length: 5\r\nContent-Length: 5\r\n"), 400),
        (put("Content-Length: 5, 5\r\n"), 400),
        (put("Transfer-Encoding: chunked\r\n"), 411),
        (put("TRANSFER-ENCODING: Chunked\r\nContent-Length: 5\r\n"), 400),
        (put("Transfer-Encoding: br\r\n"), 501),
        (put("Expect: nothing\r\n"), 417),
        (put(&"X: y\r\n".repeat(100)), 431),
        (put(&format!("X: {}\r\n", "y".repeat(9000))), 431),
        (format!("GET /{} HTTP/1.1\r\n", "a".repeat(20_000)).into_bytes(), 431),
        (b"GET /vm HTTP/3.0\r\n\r\n".to_vec(), 505),
        (b"GET /vm HTTP/1.1\r\n\r\n".to_vec(), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00".to_vec(), 400),
        (vec![0; 100], 400),
    ] {
        let mut http = vm.http();
        http.send(&bytes);
        let answer = http.response().unwrap();
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
        assert_eq!(answer.status, status, "{shown}: {}", answer.body);
        assert!(answer.head.contains("Connection: close"), "{shown}");
        http.stream.shutdown(Shutdown::Write).unwrap();
        assert!(http.response().is_none(), "{shown}");
        vm.assert_serves();
    }
    // A client that goes on sending what was refused reads why, instead of failing on its write.
    let mut http = vm.http();
    let body = vec![b'x'; 4 << 20];
    http.send(&put(&format!("Content-Length: {}\r\n", body.len())));
    http.send(&body);
    assert_eq!(http.response().unwrap().status, 413);
    vm.assert_serves();
}

#[test]
fn descriptors_that_a_client_passes_are_not_kept() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::os::fd::AsFd;

    let station = Station::new();
    let vm = station.idle("a");
    let folder = format!("/proc/{}/fd", vm.child.id());
    let count = || fs::read_dir(&folder).unwrap().count();
    let mut http = vm.http();
    assert_eq!(http.ask("GET", "/vm", None).0, 200);
    let before = count();
    let file = fs::File::open("/dev/null").unwrap();
    for _ in 0..50 {
        let (fds, mut space) =
            ([file.as_fd(); 4], [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))]);
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = request("GET", "/vm", "", "");
        let sent =
            sendmsg(&http.stream, &[io::IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
        assert_eq!(http.response().unwrap().status, 200);
    }
    assert_eq!(count(), before, "a client can fill the VM's descriptor table");
}

/// Bytes that come near to being a request.
fn nearly_a_request() -> impl Strategy<Value = Vec<u8>> {
    let words = [
        "GET /vm HTTP/1.1\r\n",
        "PUT /vm/state HTTP/1.1\r\n",
        "PUT /devices/com1 HTTP/1.1\r\n",
        "GET ",
        " HTTP/1.1",
        "Host: x\r\n",
        "Content-Length: 20\r\n",
        "Content-Length: ",
        "\r\n",
        "\r\n\r\n",
        "\n",
        "Expect: 100-continue\r\n",
        "{\"state\":\"paused\"}",
        "{\"state\":\"running\"}",
        "{\"a\":",
        "Connection: close\r\n",
        "/metrics",
        "-1",
    ];
    let word = prop_oneof![
        4 => proptest::sample::select(words.to_vec()).prop_map(|w| w.as_bytes().to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..64),
    ];
    proptest::collection::vec(word, 0..16).prop_map(|words| words.concat())
}

#[test]
fn any_bytes_leave_the_next_client_served() {
    let station = Station::new();
    let mut vm = station.idle("a");
    let mut runner = TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() });
    let socket = vm.socket.clone();
    let cases = proptest::collection::vec((nearly_a_request(), any::<bool>()), 1..4);
    let result = runner.run(&cases, |clients| {
        let mut open = Vec::new();
        for (bytes, ends) in clients {
            let mut http = Http::connect(&socket);
            // A refused client may be cut off while it sends.
            let _ = http.stream.write_all(&bytes);
            if ends {
                http.stream.shutdown(Shutdown::Write).unwrap();
                // To the end, within the read's limit: the connection does not hang.
                let end = io::copy(&mut http.stream, &mut io::sink());
                let reset = |e: &io::Error| e.kind() == io::ErrorKind::ConnectionReset;
                prop_assert!(end.as_ref().is_ok() || end.as_ref().is_err_and(reset), "{:?}", end);
            } else {
                open.push(http);
            }
        }
        prop_assert_eq!(Http::connect(&socket).ask("GET", "/vm", None).0, 200);
        Ok(())
    });
    result.unwrap();
    assert!(vm.child.try_wait().unwrap().is_none(), "the VM has ended");
}

#[test]
fn sixty_four_clients_at_once() {
    let station = Station::new();
    let vm = station.idle("a");
    let mut clients: Vec<Http> = (0..64).map(|_| vm.http()).collect();
    for _ in 0..5 {
        clients.iter_mut().for_each(|c| c.send(&request("GET", "/vm", "", "")));
        clients.iter_mut().for_each(|c| assert_eq!(c.response().unwrap().status, 200));
    }
    // And in parallel, with changes of state among them.
    thread::scope(|scope| {
        for i in 0..64 {
            let vm = &vm;
            scope.spawn(move || match i % 4 {
                0 => vm.set_state("paused"),
                1 => vm.set_state("running"),
                2 => assert_eq!(vm.ask("GET", "/metrics", None).0, 200),
                _ => vm.assert_serves(),
            });
        }
    });
}

#[test]
fn slow_clients_hold_nobody_up_and_are_sent_away() {
    let station = Station::new();
    let vm = station.idle("a");
    let mut slow: Vec<Http> = (0..20).map(|_| vm.http()).collect();
    slow.iter_mut().for_each(|c| c.send(b"GET /vm HTTP/1.1\r\nHost:"));
    // One that asks for much and reads nothing.
    let mut deaf = vm.http();
    deaf.stream.set_nonblocking(true).unwrap();
    let many = request("GET", "/metrics", "", "").repeat(1000);
    let _ = deaf.stream.write(&many);
    for _ in 0..5 {
        vm.assert_serves();
    }
    // Whoever came behind them is served, and their time is not over yet.
    slow[0].stream.set_nonblocking(true).unwrap();
    let early = slow[0].stream.read(&mut [0]);
    assert!(early.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock), "served after the slow ones alone");
    slow[0].stream.set_nonblocking(false).unwrap();
    for client in &mut slow {
        let answer = client.response().unwrap();
        assert_eq!(answer.status, 408, "{}", answer.body);
    }
}

#[test]
fn more_clients_than_there_is_room_for() {
    let station = Station::new();
    let vm = station.idle("a");
    // Those between two requests give way.
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut http = vm.http();
        assert_eq!(http.ask("GET", "/vm", None).0, 200);
        clients.push(http);
    }
    assert!(clients[0].response().is_none(), "the first one was not sent away");
    let last = clients.last_mut().unwrap();
    assert_eq!(last.ask("GET", "/vm", None).0, 200);
    drop(clients);
    // Those that say nothing at all are waited for, but not for long.
    let silent: Vec<Http> = (0..150).map(|_| vm.http()).collect();
    vm.assert_serves();
    drop(silent);
}

/// Each metric of a `microvm.metrics/1` document with its samples.
fn metrics_json(text: &str) -> Value {
    let document: Value = serde_json::from_str(text).unwrap();
    assert_eq!(document["schema"], "microvm.metrics/1");
    let metrics = document["metrics"].as_array().unwrap();
    metrics.iter().map(|m| (m["name"].as_str().unwrap().to_string(), m["samples"].clone())).collect()
}

/// Checks Prometheus text by the rules of its format, and returns the series with their values.
#[track_caller]
fn prometheus(text: &str) -> Vec<(String, u64)> {
    let (mut series, mut seen, mut families) = (Vec::new(), HashSet::new(), HashSet::new());
    let mut family = String::new();
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            family = rest.split(' ').next().unwrap().to_string();
            assert!(families.insert(family.clone()), "{family} stands in two places");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, family);
            assert!(matches!(kind, "counter" | "gauge"), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
        } else {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let labels = name.strip_prefix(&family).unwrap_or_else(|| panic!("{line} is not of {family}"));
            let inside = labels.strip_prefix('{').and_then(|l| l.strip_suffix('}'));
            assert!(labels.is_empty() || inside.is_some(), "{line}");
            for label in inside.unwrap_or("a=\"\"").split("\",") {
                let (name, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
                assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
                assert!(!value.trim_end_matches('"').contains('"'), "{line}");
            }
            assert!(seen.insert(name.to_string()), "{name} stands there twice");
            series.push((name.to_string(), value.parse().unwrap()));
        }
    }
    series
}

#[test]
fn metrics_are_prometheus_text_and_only_grow_under_load() {
    let station = Station::new();
    let code = smp(&count_high(), &count());
    let child = station.boot(&code, &["--name", "a", "--cpus", "2", "--serial", "file=out"]).spawn().unwrap();
    eventually("the socket is there", || station.socket("a").exists());
    let vm = Vm { child, socket: station.socket("a") };
    let mut http = vm.http();
    let mut before: Vec<(String, u64)> = Vec::new();
    for _ in 0..100 {
        http.send(&request("GET", "/metrics", "", ""));
        let answer = http.response().unwrap();
        assert!(answer.head.contains("Content-Type: text/plain; version=0.0.4"), "{}", answer.head);
        let now = prometheus(&answer.body);
        for (name, value) in before.iter().filter(|(name, _)| name.contains("_total")) {
            let later = now.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name} is gone"));
            assert!(later.1 >= *value, "{name} fell");
        }
        before = now;
    }
    eventually("both vCPUs count exits", || {
        http.send(&request("GET", "/metrics", "", ""));
        let series = prometheus(&http.response().unwrap().body);
        let writes = |vcpu| format!("microvm_vcpu_exits_total{{vcpu=\"{vcpu}\",reason=\"port write\"}}");
        (0..2).all(|vcpu| series.iter().any(|(name, value)| *name == writes(vcpu) && *value > 100))
    });
    // The same as JSON.
    http.send(&request("GET", "/metrics", "Accept: application/json\r\n", ""));
    let json = metrics_json(&http.response().unwrap().body);
    assert_eq!(json["microvm_vcpus"][0]["value"], 2);
}

#[test]
fn metrics_are_in_a_file_at_the_end() {
    let station = Station::new();
    let code = [print("hello"), power_off()].concat();
    let output = station.boot(&code, &["--metrics", "m.json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let metrics = metrics_json(&fs::read_to_string(station.host.dir.path().join("m.json")).unwrap());
    let printed = json!([{ "labels": { "device": "com1" }, "value": 5 }]);
    assert_eq!(metrics["microvm_serial_output_bytes_total"], printed);
    let port_writes = metrics["microvm_vcpu_exits_total"].as_array().unwrap();
    assert!(
        port_writes.iter().any(|s| s["labels"]["reason"] == "port write" && s["value"] == 6),
        "{metrics}"
    );
    // What cannot be written to is told before the guest runs.
    for path in ["/nonexistent/m.json", "run"] {
        let output = station.boot(&code, &["--metrics", path]).output().unwrap();
        assert_fails(&output, 1, &["--metrics", path]);
        assert_eq!(stdout(&output), "");
    }
    let kernel = station.host.kernel(&code);
    let output = station.boot(&code, &["--metrics", "./vmlinux"]).output().unwrap();
    assert_fails(&output, 2, &["--metrics", "is the kernel"]);
    assert!(fs::metadata(&kernel).unwrap().len() > 0);
    // A full device costs the file, not the status.
    let output = station.boot(&code, &["--metrics", "/dev/full"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("--metrics"), "{}", stderr(&output));
}

#[test]
fn help_has_examples_and_exit_statuses() {
    for command in ["ps", "ctl"] {
        let text = stdout(&Host::new().microvm([command, "--help"]).output().unwrap());
        assert!(text.contains("Examples:") && text.contains("Exit status:"), "{command}: {text}");
    }
}
