//! Containers whose guest is a hostile one of ours: what the commands that ask it make of it. No VM is needed for that.

mod common;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use common::{Host, SPIN, assert_fails, in_child, own_session, stderr, stdout, terminal};
use microvm::guest::wire::{Kind, read_frame, write_frame};

/// More than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A container of a user that runs as far as anybody can see, and whose guest is a thread of the test.
struct Fake {
    host: Host,
    /// Its lock is held here.
    lock: File,
}

const NAME: &str = "web";

impl Fake {
    /// Each connection is given to `guest`, once its request has come.
    fn new(guest: impl Fn(UnixStream, Vec<u8>) + Send + 'static) -> Self {
        let mut host = Host::new();
        let (data, run) = (host.dir.path().join("data"), host.dir.path().join("run"));
        host.env = vec![
            ("MICROVM_DATA".into(), data.clone().into()),
            ("XDG_RUNTIME_DIR".into(), run.clone().into()),
        ];
        let folder = data.join("containers/0123456789ab");
        fs::create_dir_all(&folder).unwrap();
        let record = r#"{"id": "0123456789ab", "name": "web", "image": "box", "image_id": "0", "rm": false,
            "created": "2026-01-01T00:00:00Z", "process": {"args": ["true"]}, "stop_signal": 15}"#;
        for (name, text) in
            [("record.json", record), ("lock", "1"), ("end.json", ""), ("log.0", ""), ("log.1", "")]
        {
            fs::write(folder.join(name), text).unwrap();
        }
        let lock = File::open(folder.join("lock")).unwrap();
        // SAFETY: a plain system call on a descriptor that is open.
        assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
        fs::create_dir(&run).unwrap();
        listen(&run.join("microvm"), guest);
        Self { host, lock }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = self.host.microvm(args);
        finish(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn target(&self) -> PathBuf {
        let target = self.host.dir.path().join("target");
        fs::create_dir_all(&target).unwrap();
        target
    }
}

/// Serves the socket of the container's socket device below `base`.
fn listen(base: &Path, guest: impl Fn(UnixStream, Vec<u8>) + Send + 'static) {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(base.join(NAME)).unwrap();
    let listener = UnixListener::bind(base.join(NAME).join("vsock.sock")).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            let mut line = Vec::new();
            // Nothing is sent behind the line before it is answered.
            BufReader::new(&stream).read_until(b'\n', &mut line).unwrap();
            (&stream).write_all(b"OK 1024\n").unwrap();
            let mut request = Vec::new();
            if let Ok(Some(Kind::Request)) = read_frame(&mut &stream, &mut request) {
                guest(stream, request);
            }
        }
    });
}

/// Waits for the end, which comes.
fn finish(mut child: Child) -> Output {
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = |from: &mut dyn Read| {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).map(|_| bytes)
    };
    let end = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            panic!("it hangs");
        }
        thread::sleep(Duration::from_millis(10));
    }
    let status = child.wait().unwrap();
    Output { status, stdout: read(&mut out).unwrap(), stderr: read(&mut err).unwrap() }
}

/// An archive of one file.
fn archive(name: &str, data: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(data.len() as u64);
    header.set_mode(0o4755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    builder.append_data(&mut header, name, data).unwrap();
    builder.into_inner().unwrap()
}

fn send(stream: &mut UnixStream, frames: &[(Kind, &[u8])]) {
    // Who asked may be gone.
    let _ = frames.iter().try_for_each(|(kind, bytes)| write_frame(stream, *kind, bytes));
}

#[test]
fn exec_shows_what_comes_and_ends_as_the_guest_says() {
    let fake = Fake::new(|mut stream, _| {
        let frames = [
            (Kind::Started, &[1, 0, 0, 0][..]),
            (Kind::Output, b"out"),
            (Kind::Error, b"err"),
            (Kind::Exited, &[7]),
        ];
        send(&mut stream, &frames);
    });
    let output = fake.run(&["exec", NAME, "true"]);
    assert_eq!(
        (output.status.code(), stdout(&output).as_str(), stderr(&output).as_str()),
        (Some(7), "out", "err")
    );
}

#[test]
fn exec_says_no_control_characters_of_the_guests() {
    let fake = Fake::new(|mut stream, _| {
        send(
            &mut stream,
            &[(Kind::Failed, br#"{"status": 126, "message": "\u001b]0;x\u0007\nmicrovm: no"}"#)],
        );
    });
    assert_fails(&fake.run(&["exec", NAME, "true"]), 126, &["]0;xmicrovm: no"]);
}

#[test]
fn exec_ends_by_a_signal_before_the_guest_says_anything() {
    let (asked, is_asked) = channel();
    let fake = Fake::new(silent(asked));
    let mut command = fake.host.microvm(["exec", NAME, "true"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _stream = is_asked.recv_timeout(PATIENCE).unwrap();
    interrupt(&child);
    assert_eq!(finish(child).status.code(), Some(130));
}

#[test]
fn exec_ends_by_a_signal_that_the_guest_does_not_take() {
    let (asked, is_asked) = channel();
    let fake = Fake::new(silent(asked));
    let mut command = fake.host.microvm(["exec", NAME, "true"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stream = is_asked.recv_timeout(PATIENCE).unwrap();
    send(&mut stream, &[(Kind::Started, &[1, 0, 0, 0]), (Kind::Output, b"x")]);
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    interrupt(&child);
    // The signal, which nobody answers.
    let _requests = is_asked.recv_timeout(PATIENCE).unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130));
    assert!(
        stderr(&output).contains("web does not take the signal: it does not answer"),
        "{}",
        stderr(&output)
    );
}

/// A guest that takes requests and says nothing.
fn silent(asked: Sender<UnixStream>) -> impl Fn(UnixStream, Vec<u8>) + Send + 'static {
    move |stream, _| asked.send(stream).unwrap()
}

fn interrupt(child: &Child) {
    // SAFETY: a plain system call; the child has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
}

#[test]
fn a_copy_has_the_name_that_was_asked_for() {
    let fake = Fake::new(|mut stream, _| {
        let sent = archive(".profile", b"its");
        send(&mut stream, &[(Kind::Output, &sent), (Kind::Output, b""), (Kind::Done, b"")]);
    });
    let target = fake.target();
    fs::write(target.join(".profile"), "mine").unwrap();
    let output = fake.run(&["cp", "web:/var/log/app.log", target.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(fs::read(target.join(".profile")).unwrap(), b"mine");
    assert_eq!(fs::read(target.join("app.log")).unwrap(), b"its");
    assert_eq!(target.join("app.log").metadata().unwrap().permissions().mode() & 0o7000, 0);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 2);
}

#[test]
fn a_copy_that_fails_leaves_nothing() {
    let fake = Fake::new(|mut stream, request| {
        // As long as the name of the file is, so much of it comes.
        let text = String::from_utf8(request).unwrap();
        let sent = archive("x", &[7; 4096]);
        let len = if text.contains("/cut") { 1000 } else { 0 };
        send(&mut stream, &[(Kind::Output, &sent[..len.max(1)])]);
        let end = if text.contains("/lost") { (Kind::Exited, &b"\0"[..]) } else { (Kind::Output, &b""[..]) };
        send(&mut stream, &[end, (Kind::Done, b"")]);
    });
    let target = fake.target();
    for path in ["web:/cut", "web:/lost", "web:/empty"] {
        let output = fake.run(&["cp", path, target.to_str().unwrap()]);
        assert_fails(&output, 1, &[]);
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0, "{path}");
    }
    assert_fails(&fake.run(&["cp", "web:/", target.to_str().unwrap()]), 2, &["no name"]);
}

#[test]
fn a_copy_that_is_broken_off_leaves_nothing() {
    let (asked, is_asked) = channel();
    let fake = Fake::new(silent(asked));
    let target = fake.target();
    let mut command = fake.host.microvm(["cp", "web:/x", target.to_str().unwrap()]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stream = is_asked.recv_timeout(PATIENCE).unwrap();
    send(&mut stream, &[(Kind::Output, &archive("x", &[7; 4096])[..1000])]);
    interrupt(&child);
    let output = finish(child);
    assert!(!output.status.success());
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

#[test]
fn one_that_has_ended_is_not_asked() {
    let fake = Fake::new(|_, _| panic!("it is asked"));
    // SAFETY: a plain system call on a descriptor that is open.
    assert_eq!(unsafe { libc::flock(fake.lock.as_raw_fd(), libc::LOCK_UN) }, 0);
    assert_fails(&fake.run(&["exec", NAME, "true"]), 125, &["web does not run", "ps -a"]);
    assert_fails(&fake.run(&["cp", "web:/x", "."]), 1, &["web does not run"]);
    assert_fails(&fake.run(&["kill", NAME]), 1, &["web does not run"]);
    let output = fake.run(&["wait", NAME]);
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), "137\n"));
    assert_eq!(fake.run(&["stop", NAME]).status.code(), Some(0));
    assert_eq!(fake.run(&["rm", NAME]).status.code(), Some(0));
    for args in
        [&["logs", NAME][..], &["rm", NAME], &["inspect", NAME], &["stop", NAME], &["cp", "web:/x", "."]]
    {
        assert_fails(&fake.run(args), 1, &["there is no container web", "ps -a"]);
    }
    assert_fails(&fake.run(&["exec", NAME, "true"]), 125, &["there is no container web"]);
}

/// Without a folder of its own for sockets a user has one in /tmp, which anybody may make first.
#[test]
fn what_others_may_write_to_is_not_asked() {
    let fake = Fake::new(|_, _| panic!("it is asked"));
    let base = fake.host.dir.path().join("run/microvm");
    fs::set_permissions(&base, fs::Permissions::from_mode(0o777)).unwrap();
    assert_fails(&fake.run(&["exec", NAME, "true"]), 125, &["microvm", "other"]);
}

#[test]
fn what_is_no_answer_is_told() -> io::Result<()> {
    let fake = Fake::new(|mut stream, request| {
        let frame: &[u8] = if request.len() % 2 == 0 { &[9, 0, 0, 0, 0] } else { &[4, 255, 255, 255, 255] };
        let _ = stream.write_all(frame);
    });
    for path in ["web:/a", "web:/ab"] {
        assert_fails(&fake.run(&["cp", path, "copy"]), 1, &["web", "no frame"]);
    }
    Ok(())
}

/// What `microvm run` needs, with a guest that does nothing for ever.
fn spinning() -> Host {
    let mut host = Host::new();
    host.env = vec![("MICROVM_INIT".into(), env!("CARGO_BIN_EXE_microvm-init").into())];
    let kernel = host.kernel(&SPIN);
    let rootfs = host.file("rootfs.tar", &archive("etc/passwd", b"root:x:0:0::/:/bin/sh\n"));
    for words in [["kernel", "import"], ["image", "import"]] {
        let file = if words[0] == "kernel" { &kernel } else { &rootfs };
        let output = host.microvm(words).arg(file).args(["--name", "box"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    }
    host
}

const RUN: [&str; 6] = ["run", "--allow-software-kvm", "--memory", "256M", "--network", "none"];

/// Waits until a container of this name runs and its VM answers.
fn until_it_runs(host: &Host, name: &str) {
    let end = Instant::now() + PATIENCE;
    loop {
        let output = host.microvm(["ps", "--quiet"]).output().unwrap();
        if stdout(&output).lines().any(|line| line == name) {
            return;
        }
        assert!(Instant::now() < end, "it does not start");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_vm_with_an_ended_containers_name_is_another_one() {
    let host = spinning();
    let output = host.microvm(RUN).args(["--name", "t", "--timeout", "1s", "box", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(124), "{}", stderr(&output));
    let kernel = host.dir.path().join("vmlinux");
    let mut vm = host.boot(&kernel, &["--name", "t"]).stdin(Stdio::null()).spawn().unwrap();
    until_it_runs(&host, "t");
    let output = host.microvm(["ps", "-a", "--format", "json"]).output().unwrap();
    vm.kill().unwrap();
    vm.wait().unwrap();
    let listed: Vec<serde_json::Value> = serde_json::from_str(&stdout(&output)).unwrap();
    let told: Vec<_> = listed.iter().map(|vm| (&vm["name"], &vm["state"], vm["image"].is_null())).collect();
    assert_eq!(told, [(&"t".into(), &"running".into(), true), (&"t".into(), &"exited".into(), false)]);
}

#[test]
fn ctrl_c_ends_a_guest_that_does_not_come_as_far_as_its_program() {
    let host = spinning();
    let (mut ours, theirs) = terminal();
    let mut command = host.microvm(RUN);
    command.args(["-it", "--name", "t", "box", "true"]).stdin(theirs);
    let child =
        in_child(&mut command, own_session).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until_it_runs(&host, "t");
    ours.write_all(b"\x03").unwrap();
    assert_eq!(finish(child).status.code(), Some(130));
    let output = host.microvm(["inspect", "t"]).output().unwrap();
    assert!(stdout(&output).contains("\"ExitCode\": 130"), "{}", stdout(&output));
}

#[test]
fn flags_that_cannot_be_are_one_line() {
    let host = Host::new();
    let file = host.file("vars", b"A=1\n=x\n");
    let long = "a".repeat(65);
    for (flags, words) in [
        (&["-e", "=x"][..], &["\"=x\"", "NAME=VALUE"][..]),
        (&["--env-file", file.to_str().unwrap()], &["vars", "\"=x\"", "NAME=VALUE"]),
        (&["--hostname", &long], &["--hostname", "at most 64"]),
        (&["-v", "a:/x", "-v", "b:/x/"], &["--volume b:/x/", "another"]),
    ] {
        let output = host.microvm([&["run"], flags, &["box"]].concat()).output().unwrap();
        assert_fails(&output, 125, words);
    }
}
