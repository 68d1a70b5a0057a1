//! `microvm pull` from registries that do what they should not.

mod common;

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use common::fake_registry::{CONFIG, Fake, INDEX, Image, MANIFEST, Reply, Request, descriptor};
use common::images::{Images, Tar, gzip};
use common::{assert_fails, stderr, stdout, terminal};
use microvm::image::{Digest, ImageError, PullOptions, PullPolicy, ensure};
use serde_json::{Value, json};

/// A layer that is no pattern, so that nothing comes out right by chance.
fn layer(name: &str, bytes: usize) -> Vec<u8> {
    let mut state = name.len() as u64;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    });
    Tar::default().file(name, &noise.take(bytes).collect::<Vec<_>>()).end()
}

/// A pull that fails with one line, and after which nothing is registered.
#[track_caller]
fn refused(images: &Images, args: &[&str], words: &[&str]) {
    assert_fails(&images.pull(args), 1, &[&[args[0], "cannot be pulled"], words].concat());
    assert_eq!(images.json(&["ls", "--format", "json"]), json!([]));
}

/// What a login has left.
fn log_in(images: &Images, host: &str, user: &str, password: &str) {
    let auth = BASE64_STANDARD.encode(format!("{user}:{password}"));
    write_config(images, &json!({ "auths": { host: { "auth": auth } } }));
}

fn write_config(images: &Images, config: &Value) {
    fs::create_dir_all(images.path("docker")).unwrap();
    fs::write(images.path("docker/config.json"), config.to_string()).unwrap();
}

fn partials(images: &Images) -> Vec<PathBuf> {
    fs::read_dir(images.path("data/images/partial")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn an_image_is_pulled_once() {
    let images = Images::new();
    let (plain, other) = (layer("a", 50_000), layer("bb", 300_000));
    let image = Image::new(&[&plain, &other, &plain]);
    let registry = Fake::new(move |request| image.answer(request));
    let first = images.pulled(&registry.app());
    assert_eq!(first["fetched"], plain.len() + other.len());
    assert_eq!(first["name"], format!("{}:latest", registry.app()));
    let before = registry.asked().len();
    let second = images.pulled(&registry.app());
    assert_eq!((&second["fetched"], &second["id"]), (&json!(0), &first["id"]));
    assert_eq!(registry.asked().len(), before + 2, "how it speaks, and the manifest");
    // One line for people, the id for scripts.
    let id = &first["id"].as_str().unwrap()[7..19];
    assert_eq!(stdout(&images.pull(&[&registry.app()])), format!("{id}  {}:latest\n", registry.app()));
    assert_eq!(stdout(&images.pull(&[&registry.app(), "-q"])), format!("{id}\n"));
    let image = images.json(&["inspect", &registry.app()]);
    assert_eq!(image[0]["layers"].as_array().unwrap().len(), 3);
    images.done(&["rm", &registry.app()]);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_digest_is_a_name() {
    let images = Images::new();
    let image = Image::new(&[&layer("a", 10)]);
    let digest = Digest::of(&image.manifest);
    let registry = Fake::new(move |request| image.answer(request));
    let name = format!("{}@{digest}", registry.app());
    assert_eq!(images.pulled(&name)["name"], name);
    images.done(&["inspect", &name]);
    // The tag beside it says nothing.
    let both = format!("{}:any@{digest}", registry.app());
    assert_eq!(images.pulled(&both)["name"], name);
    images.done(&["inspect", &both]);
    assert!(images.done(&["prune"]).contains("Freed: 0"), "it has a name");
    assert!(images.done(&["rm", &name]).contains("Deleted: "));
    let other = format!("{}@{}", registry.app(), Digest::of(b"other"));
    refused(&images, &[&other], &["has no such digest"]);
}

#[test]
fn what_is_not_there_is_said() {
    let images = Images::new();
    let image = Image::new(&[]);
    let registry = Fake::new(move |request| image.answer(request));
    refused(&images, &[&format!("{}:missing", registry.app())], &["no such image or tag"]);
    refused(&images, &[&format!("{}/missing", registry.address)], &["no such image or tag"]);
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    refused(&images, &[&format!("{closed}/app")], &["Connection refused"]);
    assert_fails(&images.pull(&["Not A Name"]), 2, &["Not A Name"]);
    assert_fails(&images.pull(&["app", "--timeout", "0s"]), 2, &["--timeout 0"]);
    let mut alone = images.pull_command(&["app"]);
    assert_fails(&alone.env("MICROVM_PULL", "/missing").output().unwrap(), 1, &["/missing", "MICROVM_PULL"]);
    let mut ends = images.pull_command(&["app"]);
    assert_fails(&ends.env("MICROVM_PULL", "/bin/true").output().unwrap(), 1, &["without an answer"]);
}

#[test]
fn a_layer_that_is_another_is_refused() {
    let images = Images::new();
    let (good, bad) = (layer("a", 5000), layer("b", 5000));
    let image = Image::new(&[&good]);
    let digest = Digest::of(&good).to_string();
    let (path, other) = (digest.clone(), bad.clone());
    let registry = Fake::new(move |request| match request.path.ends_with(&path) {
        true => Reply::new(200, other.clone()),
        false => image.answer(request),
    });
    refused(&images, &[&registry.app()], &[&digest, &Digest::of(&bad).to_string()]);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_manifest_or_configuration_that_is_another_is_refused() {
    for word in ["manifests", "blobs"] {
        let images = Images::new();
        let image = Image::new(&[]);
        let digest = Digest::of(&image.manifest);
        let registry = Fake::new(move |request| {
            let mut reply = image.answer(request);
            if request.path.contains(word) {
                // As good JSON as before.
                reply.body.push(b' ');
                reply.sent += 1;
            }
            reply
        });
        refused(&images, &[&format!("{}@{digest}", registry.app())], &["has the digest"]);
    }
    // What the registry itself says of a tag.
    let images = Images::new();
    let image = Image::new(&[]);
    let registry = Fake::new(move |request| match request.path.contains("manifests") {
        true => image.answer(request).with("Docker-Content-Digest", Digest::of(b"another")),
        false => image.answer(request),
    });
    refused(&images, &[&registry.app()], &["has the digest"]);
}

#[test]
fn wrong_sizes_are_refused() {
    let content = layer("a", 5000);
    for (size, words) in
        [(content.len() - 1, "should have"), (content.len() + 1, "too early"), (1 << 40, "more than")]
    {
        let images = Images::new();
        let image = Image::changed(&[&content], |manifest| manifest["layers"][0]["size"] = json!(size));
        let registry = Fake::new(move |request| image.answer(request));
        refused(&images, &[&registry.app()], &[words]);
    }
    for (size, words) in [(1, "has the digest"), (5 << 20, "more than")] {
        let images = Images::new();
        let image = Image::changed(&[], |manifest| manifest["config"]["size"] = json!(size));
        let registry = Fake::new(move |request| image.answer(request));
        refused(&images, &[&registry.app()], &[words]);
    }
}

#[test]
fn what_is_no_image_is_refused() {
    let image = Image::new(&[]);
    let list = json!({ "schemaVersion": 2, "manifests": [], "layers": [] }).to_string();
    let helm = json!({ "schemaVersion": 2, "config": descriptor("application/vnd.cncf.helm.config.v1+json", b""), "layers": [] });
    for (manifest, words) in [
        (vec![b' '; 5 << 20], "more than"),
        (b"{}".to_vec(), "missing field"),
        (b"<html>".to_vec(), "not as OCI has it"),
        (json!({ "schemaVersion": 1, "fsLayers": [] }).to_string().into(), "schema 1"),
        (list.into(), "both"),
        (helm.to_string().into(), "helm"),
    ] {
        let images = Images::new();
        let registry = Fake::new(move |request| match request.path.contains("manifests") {
            true => Reply::new(200, manifest.clone()),
            false => Reply::new(200, "{}"),
        });
        refused(&images, &[&registry.app()], &[words]);
    }
    drop(image);
}

/// A list with these platforms, which all have the same image, and how it is answered.
fn listed(platforms: &[Value]) -> (Vec<u8>, Image) {
    let image = Image::new(&[]);
    let entry = |platform: &Value| {
        let mut entry = descriptor(MANIFEST, &image.manifest);
        entry["platform"] = platform.clone();
        entry
    };
    let entries: Vec<_> = platforms.iter().map(entry).collect();
    let list = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
    (list.to_string().into_bytes(), image)
}

#[test]
fn this_machines_image_is_taken_of_a_list() {
    let ours = json!({ "os": "linux", "architecture": "amd64" });
    let arm = json!({ "os": "linux", "architecture": "arm64", "variant": "v8" });
    let unknown = json!({ "os": "unknown", "architecture": "unknown" });
    let newest = json!({ "os": "linux", "architecture": "amd64", "variant": "v9" });
    let v1 = json!({ "os": "linux", "architecture": "amd64", "variant": "v1" });
    for (platforms, taken) in [
        (vec![arm.clone(), unknown.clone(), ours], true),
        (vec![newest.clone(), v1], true),
        (vec![arm, newest, unknown], false),
    ] {
        let images = Images::new();
        let (list, image) = listed(&platforms);
        let digest = Digest::of(&list);
        let manifest = Digest::of(&image.manifest);
        let registry = Fake::new(move |request| match request.path.ends_with("manifests/latest") {
            true => Reply::new(200, list.clone()).with("Content-Type", INDEX),
            false if request.path.ends_with(&digest.hex()) => Reply::new(200, list.clone()),
            false => image.answer(request),
        });
        if !taken {
            refused(&images, &[&registry.app()], &["none for linux/amd64", "linux/arm64/v8, linux/amd64/v9"]);
            continue;
        }
        let pulled_image = images.pulled(&registry.app());
        assert_eq!(pulled_image["digest"], json!(manifest));
        assert_eq!(pulled_image["registry_digest"], json!(digest));
        // By the list's digest, too, which is what people copy.
        let name = format!("{}@{digest}", registry.app());
        images.pulled(&name);
        images.done(&["inspect", &name]);
    }
}

#[test]
fn an_image_for_another_machine_is_refused() {
    let images = Images::new();
    let config =
        json!({ "architecture": "arm64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
    let config = config.to_string().into_bytes();
    let descriptor = descriptor(CONFIG, &config);
    let mut image = Image::changed(&[], |manifest| manifest["config"] = descriptor);
    image.blobs.insert(Digest::of(&config).to_string(), config);
    let registry = Fake::new(move |request| image.answer(request));
    refused(&images, &[&registry.app()], &["linux/arm64"]);
}

#[test]
fn a_broken_download_goes_on() {
    let images = Images::new();
    let content = layer("a", 900_000);
    let length = content.len();
    let image = Image::new(&[&content]);
    let path = Digest::of(&content).to_string();
    let word = path.clone();
    let registry = Fake::new(move |request| {
        let reply = image.answer(request);
        // Five connections, more than are tried without any use.
        let cut = reply.body.len().min(200_000);
        if request.path.ends_with(&path) { reply.cut(cut) } else { reply }
    });
    assert_eq!(images.pulled(&registry.app())["fetched"], length);
    let ranges: Vec<_> = registry.asked_for(&word).iter().map(|r| r.headers.get("range").cloned()).collect();
    assert_eq!(ranges.len(), length.div_ceil(200_000));
    assert_eq!(ranges[..2], [None, Some("bytes=200000-".into())]);
}

#[test]
fn a_registry_without_ranges_starts_again() {
    let images = Images::new();
    let content = layer("a", 300_000);
    let length = content.len();
    let image = Image::new(&[&content]);
    let path = Digest::of(&content).to_string();
    let registry = Fake::new(move |request| {
        if !request.path.ends_with(&path) {
            return image.answer(request);
        }
        let whole = Reply::new(200, content.clone());
        if request.before == 0 { whole.cut(100_000) } else { whole }
    });
    assert_eq!(images.pulled(&registry.app())["fetched"], length + 100_000);
}

#[test]
fn a_download_that_brings_nothing_ends() {
    let images = Images::new();
    let content = layer("a", 300_000);
    let image = Image::new(&[&content]);
    let path = Digest::of(&content).to_string();
    let word = path.clone();
    let registry = Fake::new(move |request| {
        let reply = image.answer(request);
        if request.path.ends_with(&path) { reply.cut(10) } else { reply }
    });
    refused(&images, &[&registry.app()], &["layer"]);
    assert_eq!(registry.asked_for(&word).len(), 4);
    // What has come stays until somebody tidies up.
    assert_eq!(fs::metadata(&partials(&images)[0]).unwrap().len(), 40);
    images.done(&["prune"]);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

/// Waits until a layer has so many bytes on the disk.
fn wait_for_partial(images: &Images, bytes: u64) {
    let arrived = || {
        let files = fs::read_dir(images.path("data/images/partial")).into_iter().flatten().flatten();
        files.map(|entry| entry.metadata().map_or(0, |meta| meta.len())).any(|length| length >= bytes)
    };
    let start = Instant::now();
    while !arrived() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing comes");
        std::thread::yield_now();
    }
}

#[test]
fn a_killed_pull_is_gone_on_with() {
    let images = Images::new();
    let content = layer("a", 900_000);
    let length = content.len();
    let image = Image::new(&[&content]);
    let path = Digest::of(&content).to_string();
    let word = path.clone();
    let registry = Fake::new(move |request| {
        let reply = image.answer(request);
        let stalls = request.path.ends_with(&path) && request.before == 0;
        if stalls { reply.cut(400_000).hanging() } else { reply }
    });
    let mut first = images.pull_command(&[&registry.app()]).stdout(Stdio::null()).spawn().unwrap();
    wait_for_partial(&images, 400_000);
    // SIGKILL: microvm has no time to tell microvm-pull, which ends all the same and gives up its lock.
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(images.json(&["ls", "--format", "json"]), json!([]));
    assert_eq!(images.pulled(&registry.app())["fetched"], length - 400_000);
    assert_eq!(registry.asked_for(&word)[1].headers["range"], "bytes=400000-");
    assert_eq!(partials(&images), Vec::<PathBuf>::new());
}

#[test]
fn a_partial_file_that_is_wrong_is_dropped() {
    let images = Images::new();
    let content = layer("a", 100_000);
    let length = content.len();
    let digest = Digest::of(&content);
    let image = Image::new(&[&content]);
    let registry = Fake::new(move |request| image.answer(request));
    for bytes in [1000, 2 * length] {
        let store = images.store();
        fs::write(store.partial(&digest), vec![7; bytes]).unwrap();
        let fetched = images.pulled(&registry.app())["fetched"].as_u64().unwrap();
        assert!(fetched >= length as u64);
        images.done(&["rm", &registry.app()]);
    }
}

#[test]
fn a_layer_that_its_disk_has_changed_is_got_once_more() {
    let images = Images::new();
    let content = layer("a", 1000);
    let digest = Digest::of(&content);
    let image = Image::new(&[&content]);
    let registry = Fake::new(move |request| image.answer(request));
    let mut changed = content.clone();
    changed[600] ^= 1;
    fs::write(images.store().blob(&digest), changed).unwrap();
    refused(&images, &[&registry.app()], &[&digest.to_string(), "is broken"]);
    assert_eq!(images.pulled(&registry.app())["fetched"], content.len());
}

#[test]
fn two_pulls_at_once_download_once() {
    let images = Images::new();
    let (one, two) = (layer("a", 400_000), layer("bb", 400_000));
    let length = one.len() + two.len();
    let image = Image::new(&[&one, &two]);
    let registry = Fake::new(move |request| image.answer(request));
    let start = |_| {
        let mut command = images.pull_command(&[&registry.app(), "--format", "json"]);
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let all: Vec<_> = (0..4).map(start).collect();
    let outputs = all.into_iter().map(|pull| pull.wait_with_output().unwrap());
    let answers: Vec<Value> = outputs.map(|output| serde_json::from_str(&stdout(&output)).unwrap()).collect();
    assert_eq!(answers.iter().map(|answer| answer["fetched"].as_u64().unwrap()).sum::<u64>(), length as u64);
    assert_eq!(images.json(&["ls", "--format", "json"]).as_array().unwrap().len(), 1);
    images.done(&["rm", &registry.app()]);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_hanging_registry_is_given_up() {
    let content = layer("a", 300_000);
    let digest = Digest::of(&content).hex();
    for word in ["v2/".into(), "manifests".into(), "blobs".into(), digest] {
        let images = Images::new();
        let image = Image::new(&[&content]);
        let name: String = word.clone();
        let registry = Fake::new(move |request| match request.path.contains(&name) {
            true => Reply::new(200, vec![b' '; 100]).cut(0).hanging(),
            false => image.answer(request),
        });
        let start = Instant::now();
        refused(&images, &[&registry.app(), "--timeout", "300ms"], &[&registry.address.to_string()]);
        assert!(start.elapsed() < Duration::from_secs(30), "{word}");
    }
}

#[test]
fn a_busy_registry_is_asked_again() {
    for (status, path) in [(429, "manifests"), (503, "blobs"), (500, "manifests")] {
        let images = Images::new();
        let image = Image::new(&[&layer("a", 100)]);
        let registry = Fake::new(move |request| match request.path.contains(path) && request.before == 0 {
            true => Reply::new(status, "").with("Retry-After", "1"),
            false => image.answer(request),
        });
        let start = Instant::now();
        images.pulled(&registry.app());
        assert!(start.elapsed() >= Duration::from_secs(1));
    }
}

#[test]
fn a_registry_that_stays_busy_is_given_up() {
    for (status, wait, asked, words) in [
        (429, "3600", 1, "429"),
        (429, "1", 4, "fewer requests"),
        (502, "1", 4, "answers 502"),
        (501, "1", 1, "501"),
    ] {
        let images = Images::new();
        let registry = Fake::new(move |request| match request.path.contains("manifests") {
            true => Reply::new(status, "").with("Retry-After", wait),
            false => Reply::new(200, ""),
        });
        refused(&images, &[&registry.app()], &[words]);
        assert_eq!(registry.asked_for("manifests").len(), asked);
    }
}

/// Wants `Bearer TOKEN` for everything.
fn guarded(image: &Image, request: &Request, token: &str, realm: &str) -> Reply {
    if request.headers.get("authorization").is_some_and(|value| value == &format!("Bearer {token}")) {
        return image.answer(request);
    }
    let challenge = format!(r#"Bearer realm="{realm}",service="the service",scope="repository:app:pull""#);
    Reply::new(401, "{}").with("WWW-Authenticate", challenge)
}

#[test]
fn a_token_is_fetched_where_the_registry_says() {
    let images = Images::new();
    let tokens = Fake::new(|request| match request.headers.get("authorization").map(String::as_str) {
        None => Reply::new(200, r#"{"token":"anonymous"}"#),
        Some("Basic dTpw") => Reply::new(200, r#"{"access_token":"known"}"#),
        Some(_) => Reply::new(401, ""),
    });
    let realm = format!("http://{}/token?x=y", tokens.address);
    for wanted in ["anonymous", "known"] {
        let image = Image::new(&[&layer(wanted, 100)]);
        let realm = realm.clone();
        let registry = Fake::new(move |request| guarded(&image, request, wanted, &realm));
        if wanted == "known" {
            refused(&images, &[&registry.app()], &["docker login", &registry.address.to_string()]);
            log_in(&images, &registry.address.to_string(), "u", "wrong");
            refused(&images, &[&registry.app()], &["user name or password", "docker/config.json"]);
            log_in(&images, &registry.address.to_string(), "u", "p");
        }
        images.pulled(&registry.app());
        images.done(&["rm", &registry.app()]);
    }
    let asked = &tokens.asked()[0].path;
    assert_eq!(asked, "/token?x=y&scope=repository%3Aapp%3Apull&service=the%20service");
}

#[test]
fn an_identity_token_gets_a_token() {
    let images = Images::new();
    let tokens = Fake::new(|request| match request.body.contains("refresh_token=se%26cret&") {
        true => Reply::new(200, r#"{"access_token":"known"}"#),
        false => Reply::new(400, ""),
    });
    let realm = format!("http://{}/token", tokens.address);
    let image = Image::new(&[]);
    let registry = Fake::new(move |request| guarded(&image, request, "known", &realm));
    write_config(
        &images,
        &json!({ "auths": { registry.address.to_string(): { "identitytoken": "se&cret" } } }),
    );
    images.pulled(&registry.app());
    assert!(tokens.asked()[0].body.contains("grant_type=refresh_token"));
}

#[test]
fn a_program_keeps_the_password() {
    let images = Images::new();
    let image = Image::new(&[]);
    let registry = Fake::new(move |request| match request.headers.get("authorization").map(String::as_str) {
        Some("Basic dTpw") => image.answer(request),
        _ => Reply::new(401, "").with("WWW-Authenticate", r#"Basic realm="x""#),
    });
    let path = std::env::var("PATH").unwrap();
    let run = |script: &str| {
        let program = images.host.file("docker-credential-mine", format!("#!/bin/sh\n{script}\n").as_bytes());
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = images.pull_command(&[&registry.app()]);
        command.env("PATH", format!("{}:{path}", images.host.dir.path().display())).output().unwrap()
    };
    write_config(&images, &json!({ "credsStore": "mine" }));
    let good = run(r#"read server; echo "{\"ServerURL\":\"$server\",\"Username\":\"u\",\"Secret\":\"p\"}""#);
    assert!(good.status.success(), "{}", stderr(&good));
    images.done(&["rm", &registry.app()]);
    let none = run("echo credentials not found in native keychain; exit 1");
    assert_fails(&none, 1, &["docker login"]);
    assert_fails(&run("echo locked; exit 1"), 1, &["docker/config.json", "docker-credential-mine", "locked"]);
    write_config(&images, &json!({ "credsStore": "../mine" }));
    assert_fails(&run(""), 1, &["../mine"]);
    fs::write(images.path("docker/config.json"), "{").unwrap();
    assert_fails(&run(""), 1, &["docker/config.json"]);
}

#[test]
fn a_login_is_for_the_registry_alone() {
    let images = Images::new();
    let content = layer("a", 1000);
    let image = Image::new(&[&content]);
    let blob = content.clone();
    // Another host, as a content network is; what it asks for, it does not get either.
    let elsewhere = Fake::new(move |request| match request.path.as_str() {
        "/blob?signature" => Reply::new(200, blob.clone()),
        _ => Reply::new(401, "").with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let (place, digest) = (elsewhere.address, Digest::of(&content).to_string());
    let target = Arc::new(Mutex::new(format!("http://{place}/blob?signature")));
    let location = target.clone();
    let registry = Fake::new(move |request| {
        if request.headers.get("authorization").is_none_or(|value| value != "Basic dTpw") {
            return Reply::new(401, "").with("WWW-Authenticate", r#"Basic realm="x""#);
        }
        match request.path.ends_with(&digest) {
            true => Reply::new(307, "").with("Location", location.lock().unwrap()),
            false => image.answer(request),
        }
    });
    log_in(&images, &registry.address.to_string(), "u", "p");
    images.pulled(&registry.app());
    images.done(&["rm", &registry.app()]);
    *target.lock().unwrap() = format!("//{place}/asks");
    refused(&images, &[&registry.app()], &[&place.to_string(), "401"]);
    assert_eq!(elsewhere.asked().len(), 2);
    assert!(elsewhere.asked().iter().all(|request| !request.headers.contains_key("authorization")));
    *target.lock().unwrap() = "ftp://x/".into();
    refused(&images, &[&registry.app()], &["ftp://x/", "no place"]);
}

#[test]
fn redirects_have_an_end() {
    let images = Images::new();
    let registry = Fake::new(move |request| match request.path.as_str() {
        "/v2/" => Reply::new(200, ""),
        path => Reply::new(302, "").with("Location", path),
    });
    refused(&images, &[&registry.app()], &["too many"]);
    assert_eq!(registry.asked_for("manifests").len(), 6);
}

#[test]
fn a_challenge_that_makes_no_sense_is_refused() {
    for challenge in
        ["", "Negotiate", "Bearer", r#"Bearer realm="not a place""#, r#"Basic realm="x", Bearer realm=""#]
    {
        let images = Images::new();
        let registry = Fake::new(move |request| match request.path.as_str() {
            "/v2/" => Reply::new(401, ""),
            _ => Reply::new(401, "").with("WWW-Authenticate", challenge),
        });
        refused(&images, &[&registry.app()], &["login"]);
    }
}

#[test]
fn a_layer_that_escapes_is_refused() {
    let images = Images::new();
    let bad = gzip(&Tar::default().file("../x", b"").end());
    let image = Image::new(&[&bad]);
    let registry = Fake::new(move |request| image.answer(request));
    refused(&images, &[&registry.app()], &["../x", "leads out"]);
    images.done(&["prune"]);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

#[test]
fn three_layers_come_at_once() {
    let images = Images::new();
    let contents: Vec<_> = (1..7).map(|length| layer(&"x".repeat(length), 100)).collect();
    let image = Image::new(&contents.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let config = serde_json::from_slice::<Value>(&image.manifest).unwrap()["config"]["digest"].clone();
    let (running, most) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let (three, seen) = (Barrier::new(3), most.clone());
    let registry = Fake::new(move |request| {
        let is_layer = request.path.contains("blobs") && !request.path.ends_with(config.as_str().unwrap());
        if is_layer {
            seen.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // Comes back when three are waiting: with fewer, the pull gives up.
            three.wait();
            running.fetch_sub(1, Ordering::SeqCst);
        }
        image.answer(request)
    });
    images.pulled(&registry.app());
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[test]
fn a_token_that_has_expired_is_renewed() {
    let images = Images::new();
    let tokens =
        Fake::new(|request| Reply::new(200, json!({ "token": request.before.to_string() }).to_string()));
    let realm = format!("http://{}/token", tokens.address);
    let (image, used) = (Image::new(&[&layer("a", 100)]), AtomicUsize::new(0));
    // Each is good for one answer.
    let registry = Fake::new(move |request| {
        let next = used.load(Ordering::SeqCst);
        let reply = guarded(&image, request, &next.to_string(), &realm);
        if reply.status == 200 {
            used.store(next + 1, Ordering::SeqCst);
        }
        reply
    });
    images.pulled(&registry.app());
    assert_eq!(tokens.asked().len(), 3, "for the manifest, the configuration and the layer");
}

#[test]
fn bars_are_for_terminals() {
    let images = Images::new();
    let content = layer("a", 300_000);
    let image = Image::new(&[&content]);
    let registry = Fake::new(move |request| image.answer(request));
    let (mut screen, terminal) = terminal();
    let mut command = images.pull_command(&[&registry.app()]);
    let output = command.stderr(terminal).output().unwrap();
    drop(command);
    assert!(output.status.success());
    assert_eq!(stdout(&output).lines().count(), 1);
    let mut seen = Vec::new();
    // The end of a terminal that nobody has open any more is an error.
    let _ = screen.read_to_end(&mut seen);
    let seen = String::from_utf8_lossy(&seen);
    assert!(seen.contains("download") && seen.contains(&Digest::of(&content).short()), "{seen}");
}

#[test]
fn a_proxy_is_used_for_other_machines() {
    let images = Images::new();
    let proxy = Fake::new(|_| Reply::new(502, ""));
    let run = |name: &str| {
        let mut command = images.pull_command(&["--plain-http", name]);
        command.env("ALL_PROXY", format!("http://{}", proxy.address)).env_remove("NO_PROXY");
        command.output().unwrap()
    };
    assert_fails(&run("registry.invalid/app"), 1, &["registry.invalid"]);
    let asked = proxy.asked().len();
    assert!(asked > 0 && proxy.asked()[0].path.contains("registry.invalid"), "{:?}", proxy.asked());
    let image = Image::new(&[]);
    let registry = Fake::new(move |request| image.answer(request));
    assert!(run(&registry.app()).status.success());
    assert_eq!(proxy.asked().len(), asked);
}

#[test]
fn an_image_is_ensured_as_a_policy_says() {
    let images = Images::new();
    let image = Image::new(&[]);
    let registry = Fake::new(move |request| image.answer(request));
    let (store, options) = (images.store(), PullOptions::default());
    let ensure = |policy| ensure(&store, &registry.app(), policy, &options);
    let never = ensure(PullPolicy::Never).unwrap_err();
    assert!(matches!(never, ImageError::NotFound(_)), "{never}");
    // The program is not beside a test.
    let missing = ensure(PullPolicy::Missing).unwrap_err().to_string();
    assert!(missing.contains("microvm-pull"), "{missing}");
    images.pulled(&registry.app());
    for policy in [PullPolicy::Never, PullPolicy::Missing] {
        assert_eq!(ensure(policy).unwrap().names, [format!("{}:latest", registry.app())]);
    }
    assert!(ensure(PullPolicy::Always).is_err());
}

#[test]
fn process_1_can_pull() {
    let images = Images::new();
    let image = Image::new(&[]);
    let registry = Fake::new(move |request| image.answer(request));
    // As in a container: the one whose parent has gone has 1 for a parent, too.
    let mut command = Command::new("unshare");
    command.args(["-rpf", env!("CARGO_BIN_EXE_microvm"), "pull", &registry.app()]);
    let output = command.env("MICROVM_DATA", images.path("data")).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}
