//! `-it` under a real terminal: a shell in tmux, in which people type.

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

use super::common::{Host, stdout};
use super::life::{ok, ps, tuned};
use super::status;

/// For each thing that is to appear.
const LONG: Duration = Duration::from_secs(120);
/// Between two looks at the screen.
const LOOK: Duration = Duration::from_millis(100);

/// A tmux server with one window, where the host's shell runs.
struct Tmux<'a> {
    host: &'a Host,
    socket: PathBuf,
}

impl<'a> Tmux<'a> {
    fn start(host: &'a Host, [lines, columns]: [u16; 2]) -> Self {
        let tmux = Self { host, socket: host.dir.path().join("tmux") };
        let (x, y) = (columns.to_string(), lines.to_string());
        tmux.done(&["-f", "/dev/null", "new-session", "-d", "-x", &x, "-y", &y, "sh", "-i"]);
        tmux
    }

    fn ask(&self, words: &[&str]) -> Output {
        let mut command = self.host.command("tmux");
        command.env_remove("TMUX").env("MICROVM", env!("CARGO_BIN_EXE_microvm"));
        command.arg("-S").arg(&self.socket).args(words).output().unwrap()
    }

    #[track_caller]
    fn done(&self, words: &[&str]) -> String {
        let output = self.ask(words);
        status(&output, 0);
        stdout(&output)
    }

    #[track_caller]
    fn enter(&self, line: &str) {
        eprintln!("> {line}");
        self.done(&["send-keys", "-l", line]);
        self.press("Enter");
    }

    #[track_caller]
    fn press(&self, key: &str) {
        self.done(&["send-keys", key]);
    }

    /// So that what is waited for is not what was shown before.
    #[track_caller]
    fn clear(&self) {
        self.done(&["send-keys", "-R"]);
    }

    #[track_caller]
    fn resize(&self, [lines, columns]: [u16; 2]) {
        self.done(&["resize-window", "-x", &columns.to_string(), "-y", &lines.to_string()]);
    }

    /// Waits until a line of the screen is this one. What is typed is shown, too, and must not be the same.
    #[track_caller]
    fn shows(&self, line: &str) {
        let begin = Instant::now();
        loop {
            let screen = self.done(&["capture-pane", "-p"]);
            if screen.lines().any(|shown| shown.trim_end() == line) {
                return;
            }
            assert!(begin.elapsed() < LONG, "no {line:?} on the screen:\n{screen}");
            thread::sleep(LOOK);
        }
    }

    /// A session of a shell in a guest by `command`, which somebody makes larger, interrupts and leaves.
    fn session(&self, command: &str, [old, new]: [[u16; 2]; 2]) {
        let size = |[lines, columns]: [u16; 2]| format!("{lines} {columns}");
        self.resize(old);
        self.clear();
        self.enter(&format!("stty -g >before; $MICROVM {command}; s=$?; stty -g >after; echo status=$s"));
        self.shows("/ #");
        self.enter("echo a terminal of $(busybox stty size)");
        self.shows(&format!("a terminal of {}", size(old)));
        self.enter(&format!(
            "until [ \"$(busybox stty size)\" = '{}' ]; do busybox sleep 1; done; echo resi''zed",
            size(new)
        ));
        self.resize(new);
        self.shows("resized");
        self.enter("sh -c 'echo star''ted; exec busybox sleep 10000'");
        self.shows("started");
        self.press("C-c");
        self.enter("echo it ended with $?");
        self.shows("it ended with 130");
        self.enter("exit 7");
        self.shows("status=7");
        // The host's terminal is as it was.
        let [before, after] = ["before", "after"].map(|name| self.host.dir.path().join(name));
        assert_eq!(fs::read_to_string(after).unwrap(), fs::read_to_string(before).unwrap());
    }
}

impl Drop for Tmux<'_> {
    fn drop(&mut self) {
        self.ask(&["kill-server"]);
    }
}

#[test]
#[ignore = "needs hardware-grade KVM and tmux"]
fn a_shell_is_used_in_a_terminal() {
    let host = tuned();
    let tmux = Tmux::start(&host, [30, 100]);
    tmux.session("run -it --rm --network none --name term box sh", [[30, 100], [41, 123]]);
    assert_eq!(ps(&host), Vec::<serde_json::Value>::new());

    ok(&host, "run -d --network none --name bg box busybox sleep 100000");
    tmux.session("exec -it bg sh", [[24, 80], [50, 132]]);
    assert_eq!(ps(&host)[0]["state"], "running");
    // End of input, as Ctrl-D gives it, ends a shell.
    tmux.clear();
    tmux.enter(
        "$MICROVM exec -it bg sh -c 'while read -r line; do echo it has $line; done; exit 5'; echo status=$?",
    );
    tmux.enter("typed");
    tmux.shows("it has typed");
    tmux.press("C-d");
    tmux.shows("status=5");
    ok(&host, "rm --force bg");
}

/// Closing the window hangs up.
#[test]
#[ignore = "needs hardware-grade KVM and tmux"]
fn a_container_ends_with_its_terminal() {
    let host = tuned();
    let tmux = Tmux::start(&host, [30, 100]);
    tmux.enter("$MICROVM run -it --network none --name term box sh");
    tmux.shows("/ #");
    drop(tmux);
    // 128 and SIGHUP.
    assert_eq!(ok(&host, "wait term"), "129\n");
    ok(&host, "rm term");
}
