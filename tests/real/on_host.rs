//! Volumes, networks, storage and the life of containers that have no VM, as far as they can be the same as of those that
//! have one.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::common::{Host, stderr, stdout};
use super::container::host_with_image;
use super::isolation::{ALL, groups, host};
use super::net::{NAMES, add_route_and_names, in_own_network};
use super::status;

fn busybox() -> Vec<u8> {
    fs::read(super::container::busybox()).unwrap()
}

const ON_HOST: [&str; 2] = ["container", "process"];

/// `microvm WORDS`, whose words stand between blanks, and behind them a script for a shell.
fn microvm(host: &Host, words: &str, script: Option<&str>) -> Command {
    eprintln!("microvm {words}");
    let mut command = host.microvm(words.split_whitespace());
    command.args(script.iter().flat_map(|script| ["two", "sh", "-c", script]));
    command
}

fn run(host: &Host, isolation: &str, words: &str, script: &str) -> Output {
    let words = format!("run --network none --timeout 120s --isolation {isolation} {words}");
    microvm(host, &words, Some(script)).output().unwrap()
}

#[track_caller]
fn ok(host: &Host, words: &str) -> String {
    let output = microvm(host, words, None).output().unwrap();
    status(&output, 0);
    stdout(&output)
}

fn ps(host: &Host) -> Vec<Value> {
    serde_json::from_str(&ok(host, "ps -a --format json")).unwrap()
}

/// What containers of this host have left.
fn left(host: &Host) -> Vec<String> {
    let data = host.env.iter().find(|(name, _)| name == "MICROVM_DATA").map(|(_, path)| path.clone());
    let folder = std::path::PathBuf::from(data.unwrap()).join("containers");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).filter(|name| name != "lock").collect()
}

/// A host whose data folder the test knows.
fn host_with_data() -> Host {
    let mut host = host();
    let run = host.microvm(["ps"]);
    let data = run.get_envs().find(|(name, _)| *name == "MICROVM_DATA").and_then(|(_, path)| path);
    let data = data.unwrap().to_owned();
    host.env.push(("MICROVM_DATA".into(), data));
    host
}

const LOOK: &str = "busybox cat /data/file /etc/sub/app.conf; busybox ls /etc/sub
(echo no >/ro/new) 2>/dev/null || echo refused; (echo no >/etc/sub/app.conf) 2>/dev/null || echo refused
busybox rm /etc/sub/app.conf 2>/dev/null || echo kept
echo mine >/data/made; busybox ls /data/inner; busybox cat /keep/index; busybox stat -c %a /keep
echo more >>/keep/index; busybox mkdir -p /gone/a/b && busybox chmod 0 /gone/a; busybox ls /gone; echo written >/write; exit 6";

#[test]
#[ignore = "needs hardware-grade KVM"]
fn volumes_are_the_same_wherever_the_program_runs() {
    let host = host_with_data();
    let (shared, inner) = (host.dir.path().join("shared"), host.dir.path().join("inner"));
    fs::create_dir(&shared).unwrap();
    fs::create_dir(&inner).unwrap();
    fs::write(shared.join("file"), "of the host\n").unwrap();
    fs::write(inner.join("deep"), "").unwrap();
    host.file("app.conf", b"configured\n");
    host.file("secret.conf", b"secret\n");
    let written = host.file("write", b"");
    for isolation in ALL {
        let volumes = format!(
            "-v ./shared:/data -v ./shared:/ro:ro -v ./app.conf:/etc/sub/app.conf:ro -v {isolation}:/keep -v ./inner:/data/inner \
             -v /gone -v ./write:/write"
        );
        for (time, kept) in ["of the image\n", "of the image\nmore\n"].into_iter().enumerate() {
            let output = run(&host, isolation, &format!("--rm {volumes}"), LOOK);
            status(&output, 6);
            let expected =
                format!("of the host\nconfigured\napp.conf\nrefused\nrefused\nkept\ndeep\n{kept}750\na\n");
            assert_eq!(stdout(&output), expected, "{isolation}, time {time}");
        }
        assert_eq!(fs::read_to_string(shared.join("made")).unwrap(), "mine\n", "{isolation}");
        fs::remove_file(shared.join("made")).unwrap();
        assert!(!shared.join("new").exists());
        assert_eq!(fs::read(host.dir.path().join("app.conf")).unwrap(), b"configured\n");
        assert_eq!(fs::read(&written).unwrap(), b"written\n", "{isolation}");
        // With a VM another process removes it.
        let begin = Instant::now();
        while !left(&host).is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(60), "{isolation}: {:?} stays", left(&host));
            thread::yield_now();
        }
        // One that stays goes with `rm`.
        status(&run(&host, isolation, &format!("--name stays {volumes}"), LOOK), 6);
        assert_eq!(left(&host).len(), 1);
        ok(&host, "rm stays");
        assert_eq!(left(&host), Vec::<String>::new(), "{isolation}");
    }
    for isolation in ON_HOST {
        let output = run(&host, isolation, "--rm -v ./missing:/x", "true");
        status(&output, 125);
        assert!(stderr(&output).contains("missing"), "{}", stderr(&output));
    }
    assert_eq!(left(&host), Vec::<String>::new());
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_volumes_place_is_looked_up_inside() {
    let host = host();
    let outside = host.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(host.dir.path().join("file"), "volume\n").unwrap();
    fs::set_permissions(host.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Links to this folder's place, which is a place in the container here, and by way of a process of the host's.
    let archive = super::common::images::Tar(Vec::new())
        .dir("srv")
        .link("srv/out", &format!("/../..{}", outside.display()))
        .link("srv/proc", &format!("/proc/1/root{}", outside.display()))
        .end();
    let lower = host.file("link.tar", &archive);
    ok(&host, &format!("image import {} --name links", lower.display()));
    let before = host.files();
    for isolation in ON_HOST {
        for place in ["/srv/out/file", "/srv/proc/file", "/srv/proc/../../file"] {
            let run =
                format!("run --rm --network none --isolation {isolation} -v ./file:{place} -w {place}x");
            let output = microvm(&host, &format!("{run} links /x"), None).output().unwrap();
            // Without a program in it the image only shows where things were made.
            assert_ne!(output.status.code(), Some(0), "{isolation} {place}");
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{isolation} {place}");
        }
    }
    assert_eq!(host.files(), before);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn storage_is_a_disk_of_its_own_wherever_the_program_runs() {
    let host = host_with_data();
    let script = "busybox dd if=/dev/zero of=/big bs=1M count=200 2>/dev/null || echo full
        busybox rm /big; busybox dd if=/dev/zero of=/big bs=1M count=40 2>/dev/null && busybox wc -c </big";
    for isolation in ALL {
        let output = run(&host, isolation, "--rm --storage 100M", script);
        status(&output, 0);
        assert_eq!(stdout(&output), "full\n41943040\n", "{isolation}: {}", stderr(&output));
        assert_eq!(left(&host), Vec::<String>::new(), "{isolation}");
    }
    assert_eq!(stdout(&Command::new("losetup").arg("-a").output().unwrap()), "");
}

fn get(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /both HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text.split_once("\r\n\r\n").map_or(text.clone(), |(_, body)| body.into())
}

#[test]
#[ignore = "needs hardware-grade KVM and passt"]
fn a_container_has_the_network_of_a_vm() {
    in_own_network(|| {
        let host = host_with_data();
        let look = "busybox ip -4 addr show eth0 2>/dev/null | busybox grep -o 'inet [^ ]*'; busybox ip route | busybox head -1
            busybox cat /etc/resolv.conf; busybox tail -1 /etc/hosts";
        let run = |words: &str, script: &str| {
            let words = format!("run --timeout 120s --rm --hostname me {words}");
            microvm(&host, &words, Some(script)).output().unwrap()
        };
        let without = run("--isolation container", look);
        status(&without, 0);
        assert!(stderr(&without).contains("no default route"), "{}", stderr(&without));
        assert!(!stdout(&without).contains("10.0.2"), "{}", stdout(&without));

        add_route_and_names(&host);
        let [vm, container] =
            ["vm", "container"].map(|isolation| run(&format!("--isolation {isolation}"), look));
        assert!(stdout(&vm).contains("inet 10.0.2.15/24\n"), "{}", stdout(&vm));
        assert_eq!(stdout(&container).trim(), stdout(&vm).trim(), "{}", stderr(&container));
        let none = run("--isolation container --network none", "busybox ip addr");
        assert!(!stdout(&none).contains("eth0") && !stderr(&none).contains("no network"), "{none:?}");

        // Out of it and into it, and not to what listens on the host's loopback address alone.
        let outside = TcpListener::bind((NAMES, 8000)).unwrap();
        let inside = TcpListener::bind("127.0.0.1:8001").unwrap();
        let answering = thread::spawn(move || {
            let (mut stream, _) = outside.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom outside\n").unwrap();
        });
        let script = format!(
            "busybox httpd -p 80 -h /opt && busybox wget -qO- http://{NAMES}:8000/
            for host in 127.0.0.1 10.0.2.2; do busybox timeout 5 busybox nc $host 8001 </dev/null && echo reached; done
            echo done; exec busybox sleep 1000"
        );
        let words = "run -d --name web --isolation container -p 127.0.0.1:8080:80";
        status(&microvm(&host, words, Some(&script)).output().unwrap(), 0);
        answering.join().unwrap();
        let mut follow = microvm(&host, "logs -f web", None).stdout(Stdio::piped()).spawn().unwrap();
        let lines: Vec<_> =
            BufReader::new(follow.stdout.take().unwrap()).lines().take(2).map(Result::unwrap).collect();
        assert_eq!(lines, ["from outside", "done"]);
        drop(inside);
        assert_eq!(get("127.0.0.1:8080"), "upper\n");
        let taken = run("--isolation container -p 127.0.0.1:8080:80", "true");
        status(&taken, 125);
        assert!(stderr(&taken).contains("8080"), "{}", stderr(&taken));
        ok(&host, "rm --force web");
        follow.wait().unwrap();
        // What served it has ended with it.
        assert!(TcpListener::bind("127.0.0.1:8080").is_ok());
        assert_eq!(left(&host), Vec::<String>::new());
    });
}

/// It prints `started`, and what it gets.
const HEED: &str =
    "trap 'echo got USR1' USR1; trap 'echo got TERM; exit 7' TERM; echo error >&2; echo started
    while :; do busybox sleep 1 & wait; done";

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_container_without_a_vm_is_listed_stopped_and_removed() {
    let host = host_with_data();
    for isolation in ON_HOST {
        let start = format!("run -d --name web --network none --isolation {isolation}");
        let output = microvm(&host, &start, Some(HEED)).output().unwrap();
        status(&output, 0);
        let id = stdout(&output).trim().to_string();
        let all = ps(&host);
        assert_eq!(all.len(), 1);
        for (field, expected) in
            [("name", "web"), ("isolation", isolation), ("state", "running"), ("id", &*id)]
        {
            assert_eq!(all[0][field], *expected, "{all:?}");
        }
        let mut follow = microvm(&host, "logs -f web", None).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert_eq!(lines.next().as_deref(), Some("started"), "{isolation}");
        ok(&host, "kill --signal USR1 web");
        assert_eq!(lines.next().as_deref(), Some("got USR1"), "{isolation}");
        let twice = microvm(&host, &start, Some("true")).output().unwrap();
        assert!(stderr(&twice).contains("of this name is there"), "{}", stderr(&twice));
        for refused in ["exec -u nobody web true", "stats --no-stream web", "cp web:/etc/passwd .", "rm web"]
        {
            let output = microvm(&host, refused, None).output().unwrap();
            assert_ne!(output.status.code(), Some(0), "{refused}");
            assert_eq!(stderr(&output).lines().count(), 1, "{refused}: {}", stderr(&output));
        }
        let words = ["exec", "-e", "OWN=x", "-u", "web", "-w", "/opt", "web", "sh", "-c"];
        let look = "echo $OWN $FROM_IMAGE; busybox id -u; busybox pwd; busybox hostname; busybox cat; exit 5";
        let output = host.microvm(words.iter().chain([&look])).output().unwrap();
        status(&output, 5);
        assert_eq!(stdout(&output), "x 1\n33\n/opt\nweb\n", "{isolation}: {}", stderr(&output));
        for (program, expected) in [("nothing", 127), ("/etc/passwd", 126)] {
            let output = microvm(&host, &format!("exec web {program}"), None).output().unwrap();
            assert_eq!(output.status.code(), Some(expected), "{isolation}: {}", stderr(&output));
        }
        assert_eq!(ok(&host, "stop --time 60s web"), "web\n");
        assert_eq!(lines.next().as_deref(), Some("got TERM"), "{isolation}");
        follow.wait().unwrap();
        assert_eq!(ok(&host, "wait web"), "7\n");
        let output = microvm(&host, "logs web", None).output().unwrap();
        assert_eq!(
            (stdout(&output).lines().count(), stderr(&output).as_str()),
            (3, "error\n"),
            "{isolation}"
        );
        let state: Value = serde_json::from_str(&ok(&host, "inspect web")).unwrap();
        assert_eq!((&state[0]["Isolation"], &state[0]["State"]["ExitCode"]), (&isolation.into(), &7.into()));
        ok(&host, "rm web");

        // One that is not asked, and one whose own process is killed.
        status(&microvm(&host, &start, Some(HEED)).output().unwrap(), 0);
        ok(&host, "kill web");
        assert_eq!(ok(&host, "wait web"), "137\n");
        assert_eq!(ps(&host)[0]["state"], "exited");
        ok(&host, "rm web");
        status(&microvm(&host, &start, Some(HEED)).output().unwrap(), 0);
        let pid =
            ps(&host)[0]["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        assert_eq!(ok(&host, "wait web"), "137\n");
        assert_eq!(ps(&host)[0]["state"], "dead");
        assert!(ok(&host, "prune --force").starts_with("web\n"));

        // A program of a volume's, whose start is not seen.
        fs::copy(super::container::busybox(), host.dir.path().join("own")).unwrap();
        let words = format!(
            "run -d --name own --network none --isolation {isolation} -v ./own:/own/busybox two /own/busybox sleep 1000"
        );
        status(&microvm(&host, &words, None).output().unwrap(), 0);
        ok(&host, "rm --force own");

        // In the background a failure is told, too.
        let words = format!("run -d --rm --network none --isolation {isolation} two nothing");
        let output = microvm(&host, &words, None).output().unwrap();
        status(&output, 127);
        assert!(stderr(&output).contains("nothing"), "{isolation}: {}", stderr(&output));
        assert_eq!((ps(&host), left(&host), groups()), (Vec::new(), Vec::new(), Vec::new()), "{isolation}");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn flags_mean_the_same_wherever_the_program_runs() {
    let host = host_with_data();
    host.file("vars", b"# none\nA=of a file\nB=2\n");
    for isolation in ALL {
        let words =
            "--rm --name box --hostname other --env-file ./vars --pull never --read-only --timeline=json";
        let script = "echo $A $B; busybox hostname; (echo x >/x) 2>/dev/null || echo refused; echo error >&2";
        let output = run(&host, isolation, words, script);
        status(&output, 0);
        assert_eq!(stdout(&output), "of a file 2\nother\nrefused\n", "{isolation}");
        let errors = stderr(&output);
        let timeline: Value = serde_json::from_str(errors.lines().last().unwrap()).unwrap();
        let phases: Vec<_> =
            timeline["phases"].as_array().unwrap().iter().map(|p| p["name"].as_str()).collect();
        for phase in ["start", "workload-setup", "workload"] {
            assert!(phases.contains(&Some(phase)), "{isolation}: {phases:?}");
        }
        assert!(errors.contains("error\n"), "{isolation}: {errors}");
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_new_volume_is_whole_for_all_who_ask_at_once() {
    let host = host_with_image("tuned", "vmlinux", None);
    let mut archive = super::common::images::Tar(Vec::new()).dir("data");
    for number in 0..400 {
        archive = archive.file(&format!("data/{number}"), b"text");
    }
    let layer =
        host.file("many.tar", &archive.dir("bin").file_with_mode("bin/busybox", 0o755, &busybox()).end());
    ok(&host, &format!("image import {} --name many", layer.display()));
    for isolation in ["process", "vm"] {
        let words = format!(
            "run --rm --network none --isolation {isolation} -v {isolation}:/data many /bin/busybox ls /data"
        );
        let begin = || microvm(&host, &words, None).stdout(Stdio::piped()).spawn().unwrap();
        for child in (0..4).map(|_| begin()).collect::<Vec<_>>() {
            let output = child.wait_with_output().unwrap();
            let count = stdout(&output).lines().count();
            assert_eq!((output.status.code(), count), (Some(0), 400), "{isolation}");
        }
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn what_an_image_holds_opens_nothing_of_the_hosts() {
    let host = Host::new();
    let archive = super::common::images::Tar(Vec::new())
        .dir_with_mode("srv", 0o755)
        // /dev/kmsg, which no container's control group has.
        .device("srv/device", 1, 11)
        .link("srv/out", "/proc/1/root")
        .dir_with_mode("bin", 0o755)
        .file_with_mode("bin/busybox", 0o755, &busybox())
        .end();
    let layer = host.file("hostile.tar", &archive);
    ok(&host, &format!("image import {} --name hostile", layer.display()));
    for isolation in ON_HOST {
        for flags in ["", "--read-only"] {
            let words = format!(
                "run --rm --network none {flags} --isolation {isolation} hostile /bin/busybox head -c 1 /srv/device"
            );
            let output = microvm(&host, &words, None).output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{isolation}: {}", stderr(&output));
            assert!(stderr(&output).contains("/srv/device"), "{isolation}: {}", stderr(&output));
        }
    }
    ok(&host, "run -d --name web --isolation process hostile /bin/busybox sleep 1000");
    let exec = |words: &str| microvm(&host, &format!("exec {words}"), None).output().unwrap();
    let output = exec("-u 1000 -w /srv web /bin/busybox pwd");
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), "/srv\n"), "{}", stderr(&output));
    let output = exec("-u 1000 -w /srv/out web /bin/busybox ls");
    status(&output, 125);
    assert!(stderr(&output).contains("/srv/out") && stdout(&output).is_empty(), "{}", stderr(&output));
    ok(&host, "rm --force web");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn a_volume_that_could_not_be_filled_is_still_a_new_one() {
    let host = Host::new();
    let mut archive = super::common::images::Tar(Vec::new())
        .dir("data")
        .file("data/file", b"text")
        .dir_with_mode("bin", 0o755)
        .file_with_mode("bin/busybox", 0o755, &busybox());
    for depth in 1..45 {
        archive = archive.dir(&format!("data{}", "/d".repeat(depth)));
    }
    let layer = host.file("deep.tar", &archive.end());
    ok(&host, &format!("image import {} --name deep", layer.display()));
    let words = "run --rm --network none --isolation process -v new:/data deep /bin/busybox find /data";
    let with_few = format!("ulimit -n 64; exec {} {words}", env!("CARGO_BIN_EXE_microvm"));
    let output = host.command("sh").args(["-c", &with_few]).output().unwrap();
    status(&output, 125);
    assert!(stderr(&output).contains("volumes/new: Too many open files"), "{}", stderr(&output));
    assert_eq!(ok(&host, words).lines().count(), 46);
}
