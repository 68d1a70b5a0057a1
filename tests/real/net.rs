//! Network cards with real kernels. Each test has a network of its own, so that it changes nothing of the host's: it
//! needs root.

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::common::{Host, assert_fails, power_off, stderr, stdout};
use super::{boot, boot_with, fact, read_until, sha256, status};

/// The host's router, which passt answers for; the host's own address, which passt gives to the guest.
const ROUTER: &str = "10.77.0.1";
const OWN: &str = "10.77.0.2";
/// Another address of the host, where its name server is.
pub const NAMES: &str = "10.77.9.1";

/// Runs `test` in a network and a mount table of its own.
pub fn in_own_network(test: impl FnOnce() + Send) {
    let enter = || {
        // SAFETY: takes flags alone. What is shared no longer is this thread's, and its threads' and programs'.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) };
        assert_eq!(result, 0, "no network of its own: {}", std::io::Error::last_os_error());
        run("mount --make-rprivate /");
        run("ip link set lo up");
        test();
    };
    let result = thread::scope(|scope| scope.spawn(enter).join());
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn run(words: &str) {
    let mut words = words.split(' ');
    let program = words.next().unwrap();
    let status = Command::new(program).args(words).status().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(status.success(), "{program}");
}

pub fn add_tap(name: &str, address: &str) {
    run(&format!("ip tuntap add mode tap {name}"));
    let name = name.split(' ').next().unwrap();
    run(&format!("ip addr add {address}/24 dev {name}"));
    run(&format!("ip link set {name} up"));
}

/// A web server on port 8000 that answers everything with many bytes, and what takes them back on port 8001.
pub struct Server {
    bytes: Vec<u8>,
    web: TcpListener,
    back: TcpListener,
}

impl Server {
    pub fn new(mib: usize) -> Self {
        // Blocks that differ. Made fast: this is a debug build, and may run on a processor that is emulated.
        let mut block: Vec<u8> =
            (0..1u32 << 14).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        let mut bytes = Vec::with_capacity(mib << 20);
        for number in 0..mib << 4 {
            block[..8].copy_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(&block);
        }
        let listen = |port| {
            let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
            set_socket_timeout(&listener, Timeout::Recv, Some(LONG)).unwrap();
            listener
        };
        Self { bytes, web: listen(8000), back: listen(8001) }
    }

    pub fn sum(&self, host: &Host) -> String {
        sha256(&host.file("sum", &self.bytes))
    }

    /// Answers one request, and takes the answer back.
    pub fn serve(&self) {
        let mut stream = accept(&self.web);
        let mut request = BufReader::new(&stream);
        if request.fill_buf().is_ok_and(|bytes| bytes.is_empty()) {
            return;
        }
        read_head(&mut request);
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", self.bytes.len());
        // A guest that fails hangs up.
        if stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&self.bytes)).is_err() {
            return;
        }
        drop(stream);
        let mut stream = accept(&self.back);
        // passt of Debian 12 resets a connection that the guest opened and is told nothing on for 24 s, however
        // much the guest sends (docs/network.md): a slow machine needs longer.
        stream.write_all(b"ready\n").unwrap();
        self.check(stream);
    }

    /// Reads as much as there was and closes: busybox' nc does not say where its input ends, but sees that.
    #[track_caller]
    fn check(&self, stream: impl Read) {
        let mut bytes = Vec::new();
        stream.take(self.bytes.len() as u64).read_to_end(&mut bytes).unwrap();
        assert!(bytes == self.bytes, "{} bytes of {} came, or others", bytes.len(), self.bytes.len());
    }

    /// Has a guest that failed before it came.
    pub fn give_up(&self) {
        for port in [8000, 8001] {
            let _ = TcpStream::connect(("127.0.0.1", port));
        }
    }
}

/// A guest that does not come, or falls silent, ends the test.
#[track_caller]
fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().unwrap_or_else(|e| panic!("the guest does not come: {e}"));
    bound(&stream);
    stream
}

/// Neither reading nor writing takes longer than a VM has.
fn bound(stream: &TcpStream) {
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.set_write_timeout(Some(LONG)).unwrap();
}

/// Reads the lines of a request or an answer up to the empty one.
fn read_head(stream: &mut impl BufRead) {
    let mut line = String::from("first");
    while !line.trim().is_empty() {
        line.clear();
        stream.read_line(&mut line).unwrap();
    }
}

/// 16, or what a machine that is slower still is asked for.
fn transfer_mib() -> usize {
    std::env::var("MICROVM_TEST_MIB").ok().map_or(16, |text| text.parse().unwrap())
}

/// What a transfer takes: the guest keeps the file in memory, of which its file system has half. Much time, for an
/// emulated host.
fn with_room(mut command: Command) -> Command {
    command.args(["--memory", &format!("{}M", 384 + 2 * transfer_mib())]);
    command
}

/// What a transfer may take, on either side.
const TIME: [&str; 2] = ["--timeout", "600s"];
const LONG: Duration = Duration::from_secs(600);

/// What the card counted, from the file of `--metrics`.
fn counter(metrics: &Path, name: &str) -> u64 {
    let text = std::fs::read_to_string(metrics).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let metric = json["metrics"].as_array().unwrap().iter().find(|m| m["name"] == name);
    let samples = metric.and_then(|m| m["samples"].as_array()).unwrap_or_else(|| panic!("no {name}: {text}"));
    let one = samples.iter().find(|s| s["labels"]["device"] == "net0");
    one.and_then(|s| s["value"].as_u64()).unwrap_or_else(|| panic!("no {name} of net0: {text}"))
}

/// The bytes went through the card, both ways.
#[track_caller]
fn assert_counted(metrics: &Path, server: &Server) {
    for name in ["microvm_net_rx_bytes_total", "microvm_net_tx_bytes_total"] {
        let count = counter(metrics, name);
        assert!(count > server.bytes.len() as u64, "{name} {count}");
    }
}

/// A file through a tap to the guest and back.
#[track_caller]
fn tap_transfers(name: &str, file: &str, queues: usize, flags: &[&str]) {
    // One after the other, so that some of them take another queue than the first where there are several.
    let times = if queues > 1 { 4 } else { 1 };
    let words = format!("net 172.30.0.2 172.30.0.1 {times}");
    let transfers = Transfers { times, queues, net: "tap=tap0", words: &words };
    in_own_network(|| {
        let (output, server, metrics) = transfers.run((name, file), flags, |_| {});
        assert_eq!(fact(&stdout(&output), "queues"), queues.to_string());
        assert_counted(&metrics, &server);
    });
}

/// Files through a tap to the guest and back, one after the other.
struct Transfers<'a> {
    times: usize,
    queues: usize,
    net: &'a str,
    words: &'a str,
}

impl Transfers<'_> {
    /// `meanwhile` gets the VM's running process. What comes back is checked.
    #[track_caller]
    fn run(
        &self,
        (name, file): (&str, &str),
        flags: &[&str],
        meanwhile: impl FnOnce(&mut Child),
    ) -> (Output, Server, PathBuf) {
        add_tap(if self.queues > 1 { "tap0 multi_queue" } else { "tap0" }, "172.30.0.1");
        let (host, server) = (Host::new(), Server::new(transfer_mib()));
        let metrics = Host::new().dir.keep().join("metrics.json");
        let mut command = with_room(boot(name, file, self.words, &[&TIME, flags].concat()));
        command.args(["--net", self.net, "--metrics"]).arg(&metrics);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = thread::scope(|scope| {
            scope.spawn(|| (0..self.times).for_each(|_| server.serve()));
            meanwhile(&mut child);
            let output = child.wait_with_output().unwrap();
            if !output.status.success() {
                (0..self.times).for_each(|_| server.give_up());
            }
            status(&output, 0);
            let text = stdout(&output);
            let sums = text.lines().filter_map(|line| line.trim().strip_prefix("sum="));
            assert_eq!(sums.collect::<Vec<_>>(), vec![server.sum(&host); self.times], "{text}");
            output
        });
        (output, server, metrics)
    }
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn net_tap_stock_6_1() {
    tap_transfers("stock-6.1", "bzImage", 1, &[]);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn net_tap_stock_6_1_with_two_queues() {
    tap_transfers("stock-6.1", "bzImage", 2, &["--cpus", "2"]);
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn net_tap_tuned() {
    tap_transfers("tuned", "vmlinux", 1, &["--discovery", "cmdline"]);
}

/// The kernel serves the card: the VM has what it takes, and counts nothing.
fn assert_vhost(metrics: &Path) {
    let text = std::fs::read_to_string(metrics).unwrap();
    assert!(!text.contains("microvm_net_rx_bytes_total"), "the VM's own thread serves the card: {text}");
}

/// Each thread has its filter. The kernel's own worker, which runs no code of ours, is a thread from Linux 6.4 on.
fn assert_confined(vm: u32) {
    let mut names = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{vm}/task")).unwrap() {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim();
        let name = field("Name:");
        assert!(name.starts_with("vhost-") || field("Seccomp:") == "2", "{status}");
        names.push(name.to_string());
    }
    assert!(names.contains(&"net0".into()), "{names:?}");
}

#[test]
#[ignore = "needs hardware-grade KVM and vhost-net"]
fn net_vhost_stock_6_1_with_two_queues() {
    let words = "net 172.30.0.2 172.30.0.1 4";
    let transfers = Transfers { times: 4, queues: 2, net: "tap=tap0,vhost=on", words };
    in_own_network(|| {
        let (output, _, metrics) = transfers.run(("stock-6.1", "bzImage"), &["--cpus", "2"], |_| {});
        assert_eq!(fact(&stdout(&output), "queues"), "2");
        assert_vhost(&metrics);
    });
}

/// A driver that goes, and comes again.
#[test]
#[ignore = "needs hardware-grade KVM and vhost-net"]
fn net_vhost_serves_one_driver_after_the_other() {
    let words = "net-rebind 172.30.0.2 172.30.0.1";
    let transfers = Transfers { times: 2, queues: 2, net: "tap=tap0,vhost=auto", words };
    let flags = ["--discovery", "cmdline", "--cpus", "2"];
    in_own_network(|| {
        let (output, _, metrics) = transfers.run(("tuned", "vmlinux"), &flags, |_| {});
        assert_eq!(stdout(&output).matches("queues=2").count(), 2);
        assert_vhost(&metrics);
    });
}

/// Pauses while a file is under way lose nothing, and the kernel touches nothing in them.
#[test]
#[ignore = "needs hardware-grade KVM and vhost-net"]
fn net_vhost_is_paused_under_traffic() {
    let run = Host::new();
    let transfers =
        Transfers { times: 2, queues: 1, net: "tap=tap0,vhost=on", words: "net 172.30.0.2 172.30.0.1 2" };
    let socket = run.dir.path().join("control");
    let flags = ["--discovery", "cmdline", "--control", socket.to_str().unwrap()];
    in_own_network(|| {
        let ctl = |action: &str| {
            let output = run.microvm(["ctl"]).arg(&socket).arg(action).output().unwrap();
            status(&output, 0);
        };
        let (_, _, metrics) = transfers.run(("tuned", "vmlinux"), &flags, |child| {
            read_until(child, "begins=yes");
            assert_confined(child.id());
            let received = || {
                let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
                text.lines().find(|l| l.contains("tap0")).unwrap().to_string()
            };
            let first = received();
            for _ in 0..10 {
                ctl("pause");
                let before = received();
                let taken = |line: &str| line.split_whitespace().nth(2).unwrap().to_string();
                for _ in 0..1000 {
                    thread::yield_now();
                }
                // The guest sends nothing.
                assert_eq!(taken(&received()), taken(&before));
                ctl("resume");
            }
            assert_ne!(received(), first, "no traffic");
        });
        assert_vhost(&metrics);
    });
}

/// A host without vhost-net: one line with `on`, and our own thread with `auto`.
#[test]
#[ignore = "needs hardware-grade KVM and vhost-net"]
fn net_vhost_that_is_not_there() {
    in_own_network(|| {
        let host = Host::new();
        let empty = host.file("nothing", b"");
        add_tap("tap0", "172.30.1.1");
        let boot = |vhost: &str| {
            let net = format!("tap=tap0,vhost={vhost}");
            let flags = ["--net", &net, "--discovery", "cmdline"];
            boot("tuned", "vmlinux", "exit 0", &flags).env("RUST_LOG", "error").output().unwrap()
        };
        // No device, whatever its name says.
        run(&format!("mount --bind {} /dev/vhost-net", empty.display()));
        assert_fails(&boot("on"), 1, &["--net vhost=on", "vhost=off"]);
        status(&boot("auto"), 0);
        run("umount /dev/vhost-net");
    });
}

/// A host with a default route, which is where passt takes the guest's address from, and a name server of its own.
pub fn add_route_and_names(host: &Host) {
    add_tap("route0", OWN);
    run(&format!("ip route add default via {ROUTER}"));
    run(&format!("ip addr add {NAMES}/32 dev lo"));
    let names = host.file("resolv.conf", format!("nameserver {NAMES}\n").as_bytes());
    run(&format!("mount --bind {} /etc/resolv.conf", names.display()));
    let socket = UdpSocket::bind("0.0.0.0:53").unwrap();
    // It ends with the test program.
    thread::spawn(move || answer_names(&socket));
}

/// A name server to which every name is the router's.
fn answer_names(socket: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((len, client)) = socket.recv_from(&mut query) {
        let Some(question) = query.get(12..len) else { continue };
        // The name, then its type and class.
        let Some(end) = question.iter().position(|b| *b == 0).map(|zero| zero + 5) else { continue };
        let Some(question) = question.get(..end) else { continue };
        let is_a = question[end - 4..end - 2] == [0, 1];
        let counts = [0, 1, 0, u8::from(is_a), 0, 0, 0, 0];
        let mut answer = [&query[..2], &[0x81, 0x80], &counts, question].concat();
        if is_a {
            // The name of the question, type and class, a minute, and four bytes of address.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(ROUTER.parse::<Ipv4Addr>().unwrap().octets());
        }
        let _ = socket.send_to(&answer, client);
    }
}

/// passt in this thread's network.
fn passts() -> Vec<PathBuf> {
    let network = |process: &Path| std::fs::read_link(process.join("ns/net")).ok();
    let own = network(Path::new("/proc/thread-self"));
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|e| Some(e.ok()?.path()));
    let is_passt = |process: &PathBuf| {
        std::fs::read_to_string(process.join("comm")).is_ok_and(|name| name.starts_with("passt"))
    };
    processes.filter(is_passt).filter(|process| network(process) == own).collect()
}

/// passt ends by itself once its VM has.
#[track_caller]
fn assert_passt_ends() {
    let begin = Instant::now();
    while !passts().is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(20), "passt goes on");
        thread::yield_now();
    }
}

/// From the guest to the host and back through passt, a name, and from the host to the guest by a published port.
/// `kernel_words` and `address` say where the guest's address comes from.
fn user_transfers((name, file, discovery): (&str, &str, &str), address: &str, kernel_words: &str) {
    in_own_network(|| {
        let (host, server) = (Host::new(), Server::new(transfer_mib()));
        add_route_and_names(&host);
        let metrics = host.dir.path().join("metrics.json");
        let flags = [
            &TIME[..],
            &["--net", "user,host-loopback", "-p", "127.0.0.1:8080:80", "--discovery", discovery],
        ]
        .concat();
        let words = format!("net-user {address} {ROUTER}");
        let mut command = with_room(boot_with(name, file, kernel_words, &words, &flags));
        command.arg("--metrics").arg(&metrics).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| server.serve());
            read_until(&mut child, &format!("resolved={ROUTER}"));
            read_until(&mut child, &format!("sum={}", server.sum(&host)));
            read_until(&mut child, "listening=80");
        });
        assert_eq!(passts().len(), 1);
        // As every client of the web does, this one speaks first: passt of Debian 12 does not complete a connection
        // before (docs/network.md).
        let mut stream = TcpStream::connect("127.0.0.1:8080").unwrap();
        bound(&stream);
        stream.write_all(b"GET /file HTTP/1.0\r\n\r\n").unwrap();
        let mut stream = BufReader::new(stream);
        read_head(&mut stream);
        server.check(stream);
        child.stdin.take().unwrap().write_all(b"end\n").unwrap();
        status(&child.wait_with_output().unwrap(), 0);
        assert_passt_ends();
        assert_counted(&metrics, &server);
    });
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn net_user_stock_6_1_by_dhcp() {
    user_transfers(("stock-6.1", "bzImage", "acpi"), "dhcp", "");
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn net_user_tuned_by_the_kernels_own_words() {
    let words = format!("ip={OWN}::{ROUTER}:255.255.255.0::eth0:off");
    user_transfers(("tuned", "vmlinux", "cmdline"), OWN, &words);
}

/// A server on the host's loopback address is out of reach unless the user wants it.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn net_user_keeps_the_hosts_loopback_to_itself() {
    in_own_network(|| {
        let host = Host::new();
        add_route_and_names(&host);
        let server = TcpListener::bind("127.0.0.1:8000").unwrap();
        server.set_nonblocking(true).unwrap();
        for (net, reached) in [("user", "no"), ("user,host-loopback", "yes")] {
            let words = format!("net-apart {ROUTER}");
            let output = boot("tuned", "vmlinux", &words, &["--net", net]).output().unwrap();
            status(&output, 0);
            let text = stdout(&output);
            assert_eq!(fact(&text, "resolved"), ROUTER, "{net}: {text}");
            assert_eq!(fact(&text, "reached"), reached, "{net}: {text}");
            assert_eq!(server.accept().is_ok(), reached == "yes", "{net}");
        }
    });
}

/// passt ends with a VM that is killed, and a passt that is killed takes the guest's link alone.
#[test]
#[ignore = "needs hardware-grade KVM"]
fn net_user_ends_together_or_not_at_all() {
    in_own_network(|| {
        let host = Host::new();
        add_route_and_names(&host);
        let start = |words| {
            let mut command = boot("tuned", "vmlinux", words, &["--net", "user", "--discovery", "cmdline"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let mut child = start("spin");
        read_until(&mut child, "ttyS0_irq=");
        assert_eq!(passts().len(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_passt_ends();

        let mut child = start("net-carrier");
        read_until(&mut child, "carrier=1");
        for passt in passts() {
            run(&format!("kill -9 {}", passt.file_name().unwrap().display()));
        }
        assert_link_is_lost(child.wait_with_output().unwrap());
    });
}

#[test]
#[ignore = "needs root"]
fn net_user_without_a_route() {
    in_own_network(|| {
        let host = Host::new();
        let output =
            host.boot(&host.kernel(&power_off()), &["--net", "user"]).env("RUST_LOG", "error").output();
        assert_fails(&output.unwrap(), 1, &["--net user", "default route", "--net tap=NAME"]);
    });
}

#[track_caller]
fn assert_link_is_lost(output: Output) {
    status(&output, 0);
    assert!(stdout(&output).contains("carrier=0"), "{}", stdout(&output));
    assert!(stderr(&output).contains("goes on without a link"), "{}", stderr(&output));
}

/// Taps that are busy, another user's, or of another kind: one line each. One that vanishes is a link that is lost.
#[test]
#[ignore = "needs root and taps"]
fn net_taps_that_cannot_be_used() {
    in_own_network(|| {
        let boot = |words| {
            let mut command =
                boot("tuned", "vmlinux", words, &["--net", "tap=tap0", "--discovery", "cmdline"]);
            // An old host kernel's sandbox has a warning in front.
            command.env("RUST_LOG", "warn,microvm::sandbox=error");
            command
        };
        add_tap("tap0", "172.30.1.1");
        let mut first = boot("net-carrier").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        read_until(&mut first, "carrier=1");
        assert_fails(&boot("exit 0").output().unwrap(), 1, &["--net tap=tap0", "busy"]);
        run("ip link del tap0");
        assert_link_is_lost(first.wait_with_output().unwrap());

        run("ip tuntap add tap0 mode tap user 1");
        assert_fails(&boot_as_nobody("tap0"), 1, &["--net tap=tap0", "may not use it"]);
        run("ip link del tap0");
        // The kernel would let another VM add a queue to such a tap.
        run("ip tuntap add tap0 mode tap multi_queue");
        run("ip link set tap0 up");
        let mut first = boot("spin").stdout(Stdio::piped()).spawn().unwrap();
        read_until(&mut first, "ttyS0_irq=");
        assert_fails(&boot("exit 0").output().unwrap(), 1, &["--net tap=tap0", "busy"]);
        first.kill().unwrap();
        first.wait().unwrap();
        assert_fails(&host_boot("lo"), 1, &["--net tap=lo", "no tap", "ip tuntap add"]);
    });
}

fn host_boot(tap: &str) -> Output {
    let host = Host::new();
    let net = format!("tap={tap}");
    host.boot(&host.kernel(&power_off()), &["--net", &net]).env("RUST_LOG", "error").output().unwrap()
}

/// `microvm boot` on a tap by a user who can read what it needs, wherever the checkout is.
fn boot_as_nobody(tap: &str) -> Output {
    let host = Host::new();
    let microvm = host.dir.path().join("microvm");
    std::fs::copy(env!("CARGO_BIN_EXE_microvm"), &microvm).unwrap();
    std::fs::set_permissions(host.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(microvm);
    command.args(["boot", "--net", &format!("tap={tap}"), "--control", "none", "--kernel"]);
    command.arg(host.kernel(&power_off())).env("RUST_LOG", "error");
    command.uid(65534).output().unwrap()
}
