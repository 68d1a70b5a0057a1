//! Debian's `docker-registry`, which `scripts/test` has installed.
#![allow(dead_code, reason = "each test program uses its part")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use super::Host;

/// A registry that ends with the test.
pub struct Registry {
    process: Child,
    pub address: String,
}

impl Registry {
    pub fn start(host: &Host, http: &str, more: &str) -> Self {
        let config = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '127.0.0.1:0'{http}}}\n{more}",
            host.dir.path().join("registry").display()
        );
        host.file("registry.yml", config.as_bytes());
        let mut command = Command::new("docker-registry");
        command.args(["serve", "registry.yml"]).current_dir(host.dir.path());
        let mut process = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        // It tells its port, and is then asked.
        let address = loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "docker-registry has ended");
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split(['"', ',']).next().unwrap().to_string();
            }
        };
        // Nobody else reads it, and a full pipe would stop it.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { process, address }
    }

    pub fn plain(host: &Host) -> Self {
        Self::start(host, "", "")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
