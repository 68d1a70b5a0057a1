//! `microvm pull` from Debian's `docker-registry`, of images that skopeo, umoci and buildah make.

mod common;

use std::fs;
use std::process::Command;

use common::images::{Images, by_umoci, tool, with_stacked};
use common::registry::Registry;
use common::{assert_fails, stderr};
use serde_json::{Value, json};

/// The file systems of an image's layers.
fn layers(images: &Images, name: &str) -> Vec<Vec<u8>> {
    let image = images.json(&["inspect", name]);
    let path = |layer: &Value| layer["path"].as_str().unwrap().to_string();
    image[0]["layers"].as_array().unwrap().iter().map(|layer| fs::read(path(layer)).unwrap()).collect()
}

#[test]
fn what_skopeo_pushes_is_what_is_pulled() {
    let images = Images::new();
    let registry = Registry::plain(&images.host);
    by_umoci(&images);
    let push = |from: &str, tag: &str| {
        let registry = &registry.address;
        tool(
            &images,
            &format!("skopeo copy -q --dest-tls-verify=false {from} docker://{registry}/app:{tag}"),
        );
    };
    push("oci:oci:app", "oci");
    push("--format v2s2 oci:oci:app", "docker");
    tool(&images, "skopeo copy -q --dest-decompress oci:oci:app dir:plain");
    tool(&images, "skopeo copy -q --dest-compress --dest-compress-format zstd dir:plain oci:zstd:app");
    push("--preserve-digests oci:zstd:app", "zstd");
    images.done(&["import", "oci", "--name", "imported"]);
    let imported = layers(&images, "imported");
    for tag in ["oci", "docker", "zstd"] {
        let name = format!("{}/app:{tag}", registry.address);
        let pulled = images.pulled(&name);
        let inspect = format!("skopeo inspect --tls-verify=false docker://{name}");
        let inspected: Value = serde_json::from_str(&tool(&images, &inspect)).unwrap();
        assert_eq!(inspected["Digest"], pulled["digest"], "{tag}");
        // The layers are there by digest, but for those that are packed anew.
        assert_eq!(pulled["fetched"] == json!(0), tag != "zstd", "{tag}");
        assert_eq!(layers(&images, &name), imported, "{tag}");
    }
    // On its own, and file for file.
    images.done(&["prune", "--all"]);
    let name = format!("{}/app:zstd", registry.address);
    images.pulled(&name);
    let compare = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/compare_trees.py");
    let unpack = "umoci unpack --image oci:app want >/dev/null";
    with_stacked(&images, &name, &format!("{unpack}; python3 {compare} stacked want/rootfs 500"));
}

#[test]
fn what_buildah_pushes_is_pulled() {
    let images = Images::new();
    let registry = Registry::plain(&images.host);
    let address = &registry.address;
    // For several machines, of which the other has nothing that could be unpacked here.
    let script = format!(
        "export XDG_RUNTIME_DIR=$PWD/run; mkdir run\n\
         b() {{ buildah --storage-driver vfs --root $PWD/root --runroot $PWD/run \"$@\"; }}\n\
         for arch in amd64 arm64; do\n\
             c=$(b from --arch $arch scratch); echo $arch >f; b copy -q $c f /etc/f\n\
             b config --cmd '[\"/bin/sh\"]' --env A=b --user 5:6 $c; b commit -q $c app:$arch\n\
             b push -q --tls-verify=false app:$arch docker://{address}/app:$arch\n\
         done\n\
         b manifest create list >/dev/null\n\
         for arch in arm64 amd64; do b manifest add --tls-verify=false list docker://{address}/app:$arch; done\n\
         b manifest push -q --tls-verify=false --all list docker://{address}/app:all"
    );
    tool(&images, &script);
    let name = format!("{address}/app:all");
    let (all, one) = (images.pulled(&name), images.pulled(&format!("{address}/app:amd64")));
    assert_eq!(all["digest"], one["digest"]);
    assert_ne!(all["registry_digest"], all["digest"]);
    let config = &images.json(&["inspect", &name])[0]["config"]["config"];
    assert_eq!((&config["Cmd"], &config["User"]), (&json!(["/bin/sh"]), &json!("5:6")));
    assert_fails(&images.pull(&[&format!("{address}/app:arm64")]), 1, &["linux/arm64"]);
    with_stacked(&images, &name, "[ $(cat stacked/etc/f) = amd64 ]");
}

#[test]
fn encryption_and_a_password_are_asked_for() {
    let images = Images::new();
    tool(
        &images,
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem
         openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=registry -keyout key.pem -out req.pem
         printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n' >ext
         openssl x509 -req -in req.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out cert.pem
         htpasswd -Bbn somebody 'pass:word' >htpasswd",
    );
    let tls = ", tls: {certificate: cert.pem, key: key.pem}";
    let registry = Registry::start(&images.host, tls, "auth: {htpasswd: {realm: here, path: htpasswd}}\n");
    by_umoci(&images);
    let address = &registry.address;
    let name = format!("{address}/app:1");
    let known = |name: &str| {
        let mut command = images.pull_command(&[name]);
        command.env("SSL_CERT_FILE", images.path("ca.pem"));
        command
    };
    let push = format!(
        "skopeo copy -q --dest-tls-verify=false --dest-creds somebody:pass:word oci:oci:app docker://{name}"
    );
    tool(&images, &push);
    assert_fails(&images.pull(&[&name]), 1, &["certificate", "UnknownIssuer", "SSL_CERT_FILE"]);
    assert_fails(&known(&name).output().unwrap(), 1, &["docker login", address]);
    // As podman leaves a login; docker's is asked first, and has none.
    let log_in = "mkdir -p docker run/containers; echo '{}' >docker/config.json
        skopeo login --tls-verify=false --authfile run/containers/auth.json -u somebody -p";
    tool(&images, &format!("{log_in} pass:word {address} >/dev/null"));
    let output = known(&name).env("XDG_RUNTIME_DIR", images.path("run")).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let wrong = json!({ "auths": { address: { "username": "somebody", "password": "wrong" } } });
    fs::write(images.path("docker/config.json"), wrong.to_string()).unwrap();
    assert_fails(&known(&name).output().unwrap(), 1, &["docker/config.json", "refuses"]);
    // By a name that its certificate does not have, and without the encryption it wants.
    let other = name.replace("127.0.0.1", "127.0.0.2");
    assert_fails(&known(&other).output().unwrap(), 1, &["127.0.0.2"]);
    assert_fails(&images.pull(&["--plain-http", &name]), 1, &["answers 400"]);
}

#[test]
fn a_disk_that_is_full_registers_nothing() {
    let images = Images::new();
    let registry = Registry::plain(&images.host);
    by_umoci(&images);
    let name = format!("{}/app:1", registry.address);
    tool(&images, &format!("skopeo copy -q --dest-tls-verify=false oci:oci:app docker://{name}"));
    fs::create_dir_all(images.path("data")).unwrap();
    // A shell on that disk: the disk goes with it.
    let microvm = env!("CARGO_BIN_EXE_microvm");
    let script = format!(
        "mount -t tmpfs -o size=2m,mode=700 none data; {microvm} pull {name}; echo $? >status; {microvm} image ls --format json >list; {microvm} image prune >&2"
    );
    let mut shell = Command::new("unshare");
    shell.args(["-rm", "sh", "-uc", &script]).current_dir(images.host.dir.path());
    let output = shell.env("MICROVM_DATA", images.path("data")).output().unwrap();
    let said = stderr(&output);
    assert_eq!(fs::read_to_string(images.path("status")).unwrap(), "1\n", "{said}");
    assert_eq!(fs::read_to_string(images.path("list")).unwrap(), "[]\n", "{said}");
    let first = said.lines().next().unwrap();
    assert!(first.contains(&name) && first.contains("No space left"), "{said}");
    assert!(said.contains("Freed: ") && !said.contains("Freed: 0"), "{said}");
}
