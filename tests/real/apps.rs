//! Servers that people run, Debian's nginx and PostgreSQL (scripts/test.d/app-images), with the clients that they use.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::common::{Host, stderr, stdout};
use super::container::{host_with_kernel, run};
use super::life::{microvm, ok, ps};
use super::net::{add_route_and_names, in_own_network};
use super::status;

/// A host with the image `app`.
fn host_with(app: &str) -> Host {
    let host = host_with_kernel("tuned", "vmlinux", None);
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/apps").join(app).join("images");
    run(Command::new("cp").arg("-a").arg(images).arg(host.data()));
    host
}

fn curl(words: &[&str]) -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--noproxy", "*"]).args(words);
    command
}

#[test]
#[ignore = "needs hardware-grade KVM, passt and curl"]
fn nginx_answers_curl_a_thousand_times() {
    in_own_network(|| {
        let host = host_with("web");
        add_route_and_names(&host);
        let mut command = microvm(&host, "run -d --name web -p 127.0.0.1:8080:80 --memory 256M web nginx -g");
        status(&command.arg("daemon off;").output().unwrap(), 0);
        let site = "http://127.0.0.1:8080";
        let until_it_listens = ["--retry", "120", "--retry-delay", "1", "--retry-all-errors"];
        status(&curl(&until_it_listens).arg(format!("{site}/first")).output().unwrap(), 0);

        // A connection for each, and each answer.
        let each = ["--header", "Connection: close", "--write-out", "%{http_code} %{num_connects}\n"];
        let output = curl(&each).arg(format!("{site}/?[1-1000]")).output().unwrap();
        status(&output, 0);
        assert!(stdout(&output) == "hello from nginx\n200 1\n".repeat(1000), "{}", stdout(&output));

        // What the server says of it.
        let log = ok(&host, "exec web busybox cat /var/log/nginx/access.log");
        let mut counted = BTreeMap::<u32, u32>::new();
        for line in log.lines() {
            let Some((_, rest)) = line.split_once("\"GET /?") else { continue };
            let (number, rest) = rest.split_once(' ').unwrap();
            assert!(rest.starts_with("HTTP/1.1\" 200 17 ") && rest.contains("curl"), "{line}");
            *counted.entry(number.parse().unwrap()).or_default() += 1;
        }
        assert_eq!(counted, (1..=1000).map(|number| (number, 1)).collect());

        ok(&host, "stop web");
        // It ends as it should, and nobody listens any more.
        assert_eq!(ok(&host, "wait web"), "0\n");
        let refused = curl(&[site]).output().unwrap();
        assert_eq!(refused.status.code(), Some(7), "{}", stderr(&refused));
        ok(&host, "rm web");
    });
}

const DATABASE: &str = "--network none --memory 512M -u postgres -v pgdata:/data:uid=100,gid=100";

/// Starts the database server, and returns what it had printed when it took connections.
fn start_database(host: &Host) -> String {
    let words = "db postgres -D /data/db -k /tmp";
    ok(host, &format!("run -d --name db {DATABASE} {words}"));
    let mut follow = microvm(host, "logs -f db").stderr(Stdio::piped()).spawn().unwrap();
    let mut printed = String::new();
    let mut lines = BufReader::new(follow.stderr.take().unwrap()).lines();
    while !printed.contains("ready to accept connections") {
        let line = lines.next().unwrap_or_else(|| panic!("the database ended: {printed}"));
        printed += &(line.unwrap() + "\n");
    }
    follow.kill().unwrap();
    follow.wait().unwrap();
    printed
}

fn psql(host: &Host) -> Command {
    microvm(
        host,
        "exec -i -u postgres -e PGHOST=/tmp db psql --no-psqlrc --quiet --no-align --tuples-only -v ON_ERROR_STOP=1",
    )
}

#[track_caller]
fn ask(host: &Host, query: &str) -> String {
    let output = psql(host).args(["-c", query]).output().unwrap();
    status(&output, 0);
    stdout(&output).trim().into()
}

#[test]
#[ignore = "needs hardware-grade KVM"]
fn postgresql_keeps_what_it_has_committed() {
    let host = host_with("db");
    let words = "initdb -D /data/db -A trust --no-sync --no-instructions --locale=C -E UTF8";
    ok(&host, &format!("run --rm {DATABASE} db {words}"));
    start_database(&host);
    ask(
        &host,
        "create table n as select g from generate_series(1, 10000) g; create table acknowledged (g int)",
    );
    let sum = "select count(*), sum(g) from n";
    assert_eq!(ask(&host, sum), "10000|50005000");
    ok(&host, "stop --time 120s db");
    assert_eq!(ok(&host, "wait db"), "0\n");
    assert!(stderr(&microvm(&host, "logs db").output().unwrap()).contains("database system is shut down"));
    ok(&host, "rm db");

    // Another container with its volume.
    let printed = start_database(&host);
    assert!(printed.contains("database system was shut down at"), "{printed}");
    assert_eq!(ask(&host, sum), "10000|50005000");

    // The VM dies in the middle of commits.
    let mut client = psql(&host).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = client.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        // Until nobody reads it any more.
        (1..).try_for_each(|g| writeln!(input, "insert into acknowledged values ({g}) returning g;"))
    });
    let mut acknowledged = 0;
    for line in BufReader::new(client.stdout.take().unwrap()).lines().map_while(Result::ok) {
        acknowledged += 1;
        assert_eq!(line, acknowledged.to_string());
        if acknowledged == 20 {
            let pid = ps(&host)[0]["pid"].as_i64().unwrap() as i32;
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
    }
    assert!(acknowledged >= 20, "{acknowledged}");
    client.wait().unwrap();
    writer.join().unwrap().unwrap_err();
    assert_eq!(ok(&host, "wait db"), "137\n");
    assert_eq!(ps(&host)[0]["state"], "dead");
    ok(&host, "rm db");

    let printed = start_database(&host);
    assert!(printed.contains("automatic recovery in progress"), "{printed}");
    let kept = ask(&host, "select count(*), max(g) from acknowledged");
    let (count, last) = kept.split_once('|').unwrap();
    assert_eq!(count, last);
    assert!(count.parse::<u32>().unwrap() >= acknowledged, "{count} of {acknowledged} commits are there");
    assert_eq!(ask(&host, sum), "10000|50005000");
    ok(&host, "stop --time 120s db");
    assert_eq!(ok(&host, "wait db"), "0\n");
    ok(&host, "rm db");
}
