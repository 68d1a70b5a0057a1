//! Containers from `microvm run` to `microvm rm`: streams, signals, `exec`, `cp`, and ends of all kinds.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::common::{Host, stderr, stdout};
use super::container::host_with_image;
use super::net::{NAMES, add_route_and_names, in_own_network};
use super::{initrd, status};

pub fn tuned() -> Host {
    host_with_image("tuned", "vmlinux", None)
}

/// `microvm WORDS`, whose words stand between blanks.
pub fn microvm(host: &Host, words: &str) -> Command {
    // Shown where the test fails.
    eprintln!("microvm {words}");
    host.microvm(words.split_whitespace())
}

fn outcome(host: &Host, words: &str) -> Output {
    microvm(host, words).output().unwrap()
}

/// The output of a command that succeeds.
#[track_caller]
pub fn ok(host: &Host, words: &str) -> String {
    let output = outcome(host, words);
    status(&output, 0);
    stdout(&output)
}

/// A shell's script as the program of `words`.
pub fn sh(host: &Host, words: &str, script: &str) -> Command {
    let mut command = microvm(host, words);
    command.args(["sh", "-c", script]);
    command
}

fn with_input(command: &mut Command, bytes: Vec<u8>) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let writer = thread::spawn(move || input.write_all(&bytes));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    output
}

pub fn ps(host: &Host) -> Vec<Value> {
    serde_json::from_str(&ok(host, "ps -a --format json")).unwrap()
}

/// A command that goes on, when it has printed its first line.
fn after_first_line(mut command: Command) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    if line.is_empty() {
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        panic!("it ended: {text}");
    }
    (child, out)
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Three million bytes that are not text.
fn data() -> Vec<u8> {
    (0..3_000_000_u32)
        .flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[..1].to_vec())
        .collect()
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn run_keeps_streams_apart_and_gives_input() {
    let stock = Some(initrd("stock-6.1"));
    for host in [tuned(), host_with_image("stock-6.1", "bzImage", stock)] {
        let script = "echo out; echo err >&2; echo again >/dev/stdout; exit 3";
        let output = sh(&host, "run --rm -u web --timeout 120s box", script).output().unwrap();
        status(&output, 3);
        assert_eq!(stdout(&output), "out\nagain\n");
        assert!(stderr(&output).lines().any(|line| line == "err"), "{}", stderr(&output));
        let output = with_input(&mut microvm(&host, "run -i --rm --timeout 120s box busybox cat"), data());
        status(&output, 0);
        assert!(output.stdout == data(), "{} bytes came back", output.stdout.len());
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn run_ends_when_nobody_reads_its_output() {
    let (mut child, out) = after_first_line(microvm(&tuned(), "run --rm --timeout 120s box busybox yes"));
    drop(out);
    // 128 and SIGPIPE, as here.
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn signals_go_to_the_program() {
    let host = tuned();
    let wait = "echo ready; while :; do busybox sleep 1; done";
    let script = format!("trap 'echo bye; exit 5' TERM; {wait}");
    let (mut child, mut out) = after_first_line(sh(&host, "run --rm --timeout 120s box", &script));
    signal(&child, Signal::TERM);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("bye\n", Some(5)));
    // One without a handler ends by it.
    let (mut child, _out) = after_first_line(sh(&host, "run --rm --timeout 120s box", wait));
    signal(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(ps(&host), Vec::<Value>::new());
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn life_in_the_background() {
    let host = tuned();
    let script = "echo started; echo oops >&2; busybox cat >/dev/null; while :; do busybox sleep 1; done";
    let output = sh(&host, "run -d --name web box", script).output().unwrap();
    status(&output, 0);
    let id = stdout(&output).trim().to_string();
    assert_eq!(id.len(), 12, "{id}");
    let list = ps(&host);
    assert_eq!(
        (&list[0]["name"], &list[0]["state"], &list[0]["image"]),
        (&"web".into(), &"running".into(), &"box".into())
    );

    // Its name is taken, and it cannot be removed.
    let taken = output_of(&host, "run --name web box true", 125);
    assert!(taken.contains("--name web"), "{taken}");
    assert!(output_of(&host, "rm web", 1).contains("runs"));

    let mut follow =
        microvm(&host, "logs -f web").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let logs = outcome(&host, &format!("logs {}", &id[..6]));
    assert_eq!((stdout(&logs), stderr(&logs)), ("started\n".into(), "oops\n".into()));

    // Other programs in it.
    assert_eq!(
        stdout(
            &sh(&host, "exec -u web -w /opt -e A=b web", "busybox id -u; busybox pwd; echo $A")
                .output()
                .unwrap()
        ),
        "33\n/opt\nb\n"
    );
    for (script, expected) in [("exit 7", 7), ("kill -9 $$", 137)] {
        status(&sh(&host, "exec web", script).output().unwrap(), expected);
    }
    assert!(output_of(&host, "exec web nothing", 127).contains("nothing"));
    assert!(output_of(&host, "exec web /etc/passwd", 126).contains("/etc/passwd"));
    let echoed = with_input(&mut microvm(&host, "exec -i web busybox cat"), data());
    assert!(echoed.status.success() && echoed.stdout == data());
    let all: Vec<_> = (0..100)
        .map(|n| {
            let mut command = sh(&host, "exec web", &format!("echo {n}; exit {}", n % 5));
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (n, child) in all.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        status(&output, n as i32 % 5);
        assert_eq!(stdout(&output), format!("{n}\n"));
    }

    // Files to it and back.
    let folder = host.dir.path().join("site");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("data"), data()).unwrap();
    fs::write(folder.join("sub/small"), "x").unwrap();
    std::os::unix::fs::symlink("data", folder.join("link")).unwrap();
    for words in [
        "cp site web:/opt",
        "cp web:/opt/site back",
        "cp site/data web:/opt/renamed",
        "cp web:/opt/renamed .",
    ] {
        ok(&host, words);
    }
    let back = host.dir.path().join("back");
    assert!(fs::read(back.join("data")).unwrap() == data() && back.join("sub/small").is_file());
    assert_eq!(fs::read_link(back.join("link")).unwrap(), PathBuf::from("data"));
    assert!(fs::read(host.dir.path().join("renamed")).unwrap() == data());
    assert!(output_of(&host, "cp web:/nothing .", 1).contains("/nothing"));
    assert!(output_of(&host, "cp nothing web:/", 1).contains("nothing"));

    let inspected: Value = serde_json::from_str(&ok(&host, "inspect web")).unwrap();
    assert_eq!(
        (&inspected[0]["Id"], &inspected[0]["State"]["Status"]),
        (&id.as_str().into(), &"running".into())
    );
    let stats: Value = serde_json::from_str(&ok(&host, "stats --no-stream --format json")).unwrap();
    assert!(stats[0]["name"] == "web" && stats[0]["resident_bytes"].as_u64() > Some(1 << 20), "{stats}");

    // Its end is seen by all who wait for it.
    let wait = microvm(&host, "wait web").stdout(Stdio::piped()).spawn().unwrap();
    ok(&host, "stop web");
    assert_eq!(stdout(&wait.wait_with_output().unwrap()), "143\n");
    let mut followed = String::new();
    follow.stdout.take().unwrap().read_to_string(&mut followed).unwrap();
    assert!(follow.wait().unwrap().success() && followed == "started\n");
    assert_eq!((&ps(&host)[0]["state"], &ps(&host)[0]["exit_status"]), (&"exited".into(), &143.into()));
    assert_eq!(ok(&host, "ps -q"), "");
    assert!(output_of(&host, "exec web true", 125).contains("does not run"));
    assert_eq!(ok(&host, "logs --tail 2 web"), "started\n");
    ok(&host, "rm web");
    assert!(output_of(&host, "logs web", 1).contains("no container web"));
}

/// What a command that fails says.
#[track_caller]
fn output_of(host: &Host, words: &str, expected: i32) -> String {
    let output = outcome(host, words);
    status(&output, expected);
    let text = stderr(&output);
    let own: Vec<_> = text.lines().filter(|line| line.starts_with("microvm:")).collect();
    assert_eq!(own.len(), 1, "{words}: {text}");
    own[0].into()
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn ends_of_all_kinds_leave_what_can_be_removed() {
    let host = tuned();
    let forever = "trap '' TERM; echo ready; while :; do busybox sleep 1; done";
    // A program that is not there is known before the command returns.
    assert!(output_of(&host, "run -d --name never box nothing", 127).contains("nothing"));
    for name in ["stubborn", "killed", "shot"] {
        status(&sh(&host, &format!("run -d --name {name} box"), forever).output().unwrap(), 0);
    }
    status(&sh(&host, "run -d --rm --name gone box", forever).output().unwrap(), 0);
    ok(&host, "stop --time 1 stubborn");
    ok(&host, "kill killed");
    let pids: Vec<_> = ps(&host)
        .iter()
        .filter(|vm| vm["name"] == "shot" || vm["name"] == "gone")
        .map(|vm| vm["pid"].as_i64().unwrap())
        .collect();
    for pid in &pids {
        kill_process(Pid::from_raw(*pid as i32).unwrap(), Signal::KILL).unwrap();
    }
    for (name, expected) in
        [("never", "127\n"), ("stubborn", "137\n"), ("killed", "137\n"), ("shot", "137\n")]
    {
        assert_eq!(ok(&host, &format!("wait {name}")), expected, "{name}");
    }
    let states: Vec<_> = ps(&host)
        .iter()
        .map(|vm| format!("{} {}", vm["name"].as_str().unwrap(), vm["state"].as_str().unwrap()))
        .collect();
    for state in ["never exited", "stubborn exited", "killed exited", "shot dead"] {
        assert!(states.iter().any(|s| s == state), "{state}: {states:?}");
    }
    ok(&host, "prune --force");
    assert_eq!(ps(&host), Vec::<Value>::new());
    // The name of a killed one can be had again, and one that ends by itself with --rm leaves nothing.
    for name in ["gone", "shot"] {
        let output =
            microvm(&host, &format!("run --rm --timeout 120s --name {name} box true")).output().unwrap();
        status(&output, 127);
    }
    assert_eq!(ps(&host), Vec::<Value>::new());
    ok(&host, "image rm box");
}

/// A disk of its own in place of a folder, as long as this lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn at(folder: PathBuf) -> Self {
        fs::create_dir_all(&folder).unwrap();
        mount(&["-t", "tmpfs", "-o", "size=256k", "none"], &folder);
        Self(folder)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn mount(flags: &[&str], folder: &Path) {
    assert!(Command::new("mount").args(flags).arg(folder).status().unwrap().success());
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_disk_that_is_full_or_read_only_is_told_and_keeps_nothing() {
    let host = tuned();
    let disk = SmallDisk::at(host.run.path().join("data/containers"));
    // Its log has no room for that; its reader has.
    let output = sh(&host, "run --name long box", "busybox yes | busybox head -c 3000000").output().unwrap();
    status(&output, 0);
    assert_eq!(output.stdout.len(), 3_000_000);
    let kept = ok(&host, "logs long");
    assert!(kept.len() > 10_000 && kept.chars().all(|c| "y\n".contains(c)), "{} bytes", kept.len());
    ok(&host, "rm long");
    assert!(fs::write(disk.0.join("fill"), vec![0; 1 << 20]).is_err(), "it is larger than it should be");
    for words in ["run box true", "run -d box true", "run --rm box true", "run --storage 64M box true"] {
        assert!(output_of(&host, words, 125).contains("No space left"));
    }
    mount(&["-o", "remount,ro"], &disk.0);
    assert!(output_of(&host, "run box true", 125).contains("Read-only"));
    assert_eq!(ps(&host), Vec::<Value>::new());
    mount(&["-o", "remount,rw"], &disk.0);
    fs::remove_file(disk.0.join("fill")).unwrap();
    let left: Vec<_> = fs::read_dir(&disk.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["lock"]);
}

/// The body of an answer to a request over HTTP.
fn get(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET /both HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.into()))
}

#[test]
#[ignore = "needs hardware-grade KVM and passt"]
fn run_has_a_network() {
    in_own_network(|| {
        let host = tuned();
        // No default route: no network, and a line that says so.
        let output = sh(&host, "run --rm --timeout 120s box", "busybox ip addr").output().unwrap();
        status(&output, 0);
        assert!(!stdout(&output).contains("eth0"), "{}", stdout(&output));
        assert!(stderr(&output).contains("no default route"), "{}", stderr(&output));

        add_route_and_names(&host);
        let script =
            "busybox ip -4 addr show eth0; busybox ip route; busybox cat /etc/resolv.conf /etc/hosts";
        let output = sh(&host, "run --rm --timeout 120s --hostname me box", script).output().unwrap();
        status(&output, 0);
        let text = stdout(&output);
        for words in ["10.0.2.15/24", "default via 10.0.2.2", &format!("nameserver {NAMES}"), "10.0.2.15\tme"]
        {
            assert!(text.contains(words), "{words}: {text}");
        }
        let output =
            sh(&host, "run --rm --timeout 120s --network none box", "busybox ip addr").output().unwrap();
        assert!(!stdout(&output).contains("eth0") && !stderr(&output).contains("no network"), "{output:?}");

        // Out of it, and into it.
        let outside = TcpListener::bind((NAMES, 8000)).unwrap();
        let answering = thread::spawn(move || {
            let (mut stream, _) = outside.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom outside\n").unwrap();
        });
        let script = "busybox httpd -p 80 -h /opt && busybox wget -qO- http://$OUTSIDE:8000/ && exec busybox sleep 1000";
        let mut command = microvm(&host, "run -d --name web -p 127.0.0.1:8080:80");
        let started =
            command.arg("-e").arg(format!("OUTSIDE={NAMES}")).args(["box", "sh", "-c", script]).output();
        status(&started.unwrap(), 0);
        answering.join().unwrap();
        let mut follow = microvm(&host, "logs -f web").stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(follow.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "from outside\n");
        for number in 0..1000 {
            assert_eq!(get("127.0.0.1:8080").unwrap(), "lower\n", "request {number}");
        }
        assert!(output_of(&host, "run --name other -p 127.0.0.1:8080:80 box true", 125).contains("8080"));
        ok(&host, "rm --force web");
        follow.wait().unwrap();
    });
}

/// What a container writes to a disk takes none of its memory; a folder of the host's outlives it.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn run_has_storage_and_volumes() {
    let host = tuned();
    let script =
        "busybox dd if=/dev/zero of=/big bs=1M count=300 2>/dev/null && busybox wc -c </big; busybox df /";
    let run = |words: &str, script: &str| {
        sh(&host, &format!("run --rm --timeout 120s {words} box"), script).output().unwrap()
    };
    let output = run("--memory 256M --storage 1G", script);
    status(&output, 0);
    assert!(stdout(&output).starts_with("314572800\n"), "{}", stdout(&output));

    let folder = host.dir.path().join("shared");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("given"), "from the host\n").unwrap();
    let script = "busybox cat /mnt/given; busybox id -u >/mnt/written; (echo x >/ro/no) 2>/dev/null || echo refused; echo kept >/var/keep/f";
    let output = run("-v ./shared:/mnt -v ./shared:/ro:ro -v named:/var/keep", script);
    status(&output, 0);
    assert_eq!(stdout(&output), "from the host\nrefused\n");
    assert_eq!(fs::read_to_string(folder.join("written")).unwrap(), "0\n");
    assert!(!folder.join("no").exists());
    let output = run("-v named:/other:ro,uid=33 -u web", "busybox cat /other/f; busybox stat -c %u /other/f");
    assert_eq!(stdout(&output), "kept\n33\n");
    for (words, expected) in [
        ("run -v ./missing:/x box true", "missing"),
        ("run -v shared box true", "\"shared\" is no volume"),
        ("run --storage 1M box true", "--storage 1M"),
    ] {
        let output = outcome(&host, words);
        assert!(
            matches!(output.status.code(), Some(2 | 125)) && stderr(&output).contains(expected),
            "{output:?}"
        );
    }
    assert_eq!(ps(&host), Vec::<Value>::new());
}
