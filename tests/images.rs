//! `microvm image`: archives made here, good and hostile, and images that umoci and skopeo make.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;

use common::images::{Images, Tar, by_umoci, gzip, tool, with_stacked};
use common::{assert_fails, in_child};
use microvm::image::Digest;
use serde_json::{Value, json};
use tar::EntryType;

/// The import fails with one line that has `words`, and leaves nothing behind.
#[track_caller]
fn refused(images: &Images, args: &[&str], words: &[&str]) {
    let output = images.run(&[&["import"], args].concat());
    assert_fails(&output, 1, words);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

/// An OCI layout that is written part by part, so that any part can be wrong.
struct Oci {
    dir: PathBuf,
}

impl Oci {
    fn new(dir: PathBuf) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir }
    }

    fn blob(&self, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({ "digest": digest, "size": bytes.len() })
    }

    fn config(&self, architecture: &str, layers: &[&[u8]]) -> Value {
        let ids: Vec<_> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let config = json!({ "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": ids } });
        self.blob(config.to_string().as_bytes())
    }

    /// An image of plain layers.
    fn image(&self, architecture: &str, layers: &[&[u8]]) -> Value {
        let blobs: Vec<_> = layers.iter().map(|layer| self.blob(layer)).collect();
        self.manifest(&self.config(architecture, layers), &blobs)
    }

    fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        let mut descriptor = self.blob(manifest.to_string().as_bytes());
        descriptor["mediaType"] = json!("application/vnd.oci.image.manifest.v1+json");
        descriptor
    }

    fn index(&self, manifests: &[Value]) {
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(self.dir.join("index.json"), index.to_string()).unwrap();
    }
}

#[test]
fn an_archive_of_files_is_an_image() {
    let images = Images::new();
    let tar = Tar::default()
        .dir("./")
        .dir("/etc")
        .file("etc/hosts", b"x")
        .hard("etc/h", "/etc/hosts")
        .link("l", "/../x");
    let tar = tar.end();
    images.host.file("plain.tar", &tar);
    images.host.file("packed.tar.gz", &gzip(&tar));
    let zstd = zstd::encode_all(&tar[..], 1).unwrap();
    images.host.file("packed.tar.zst", &zstd);
    let id = images.json(&["import", "plain.tar", "--name", "files", "--format", "json"])[0]["id"].clone();
    for packed in ["packed.tar.gz", "packed.tar.zst"] {
        assert_eq!(images.json(&["import", packed, "--format", "json"])[0]["id"], id, "{packed}");
    }
    let list = images.json(&["ls", "--format", "json"]);
    assert_eq!(list.as_array().unwrap().len(), 3, "one configuration, three manifests: {list}");
    let layers = images.files().iter().filter(|f| f.extension().is_some_and(|e| e == "erofs")).count();
    assert_eq!(layers, 1);
    assert!(images.done(&["ls"]).contains("docker.io/library/files:latest"));
}

#[test]
fn the_same_archive_is_the_same_file_system() {
    let tar = Tar::default().dir("a").file("a/x", &[1; 10_000]).file("a/y", b"small").end();
    let layer = || {
        let images = Images::new();
        images.host.file("files.tar", &tar);
        images.done(&["import", "files.tar", "--name", "x"]);
        let image = images.json(&["inspect", "x"]);
        fs::read(image[0]["layers"][0]["path"].as_str().unwrap()).unwrap()
    };
    assert_eq!(layer(), layer());
}

#[test]
fn paths_that_escape_are_refused() {
    let images = Images::new();
    for (name, tar) in [
        ("../x", Tar::default().file("../x", b"")),
        ("a/../../x", Tar::default().file("a/../../x", b"")),
        ("/..", Tar::default().dir("/..")),
        ("a/x", Tar::default().link("a", "/etc").file("a/x", b"")),
        ("a/b/x", Tar::default().link("a", ".").dir("c").file("a/b/x", b"")),
        ("../../etc/passwd", Tar::default().hard("x", "../../etc/passwd")),
        ("a/passwd", Tar::default().link("a", "/etc").hard("x", "a/passwd")),
        ("..", Tar::default().file("a/.wh...", b"").file("../", b"")),
    ] {
        images.host.file("bad.tar", &tar.end());
        refused(&images, &["bad.tar"], &["bad.tar", name]);
    }
}

#[test]
fn archives_that_make_no_sense_are_refused() {
    let images = Images::new();
    for (words, tar) in [
        ("not in the layer", Tar::default().hard("x", "missing")),
        ("to a folder", Tar::default().dir("d").hard("x", "d")),
        ("should be", Tar::default().file("f", b"").file("f/x", b"")),
        ("of nothing", Tar::default().file("d/.wh.", b"")),
        ("without a target", Tar::default().link("l", "")),
        ("another format", Tar::default().entry(EntryType::GNUSparse, "s", "", b"")),
        ("map of a sparse", pax(Tar::default(), "GNU.sparse.map", "5,1,4,1").file("s", b"xx")),
        ("map of a sparse", pax(Tar::default(), "GNU.sparse.map", "0,1,4").file("s", b"x")),
        ("map of a sparse", pax(Tar::default(), "GNU.sparse.map", "0,1").file("s", b"xx")),
        ("map of a sparse", pax(Tar::default(), "GNU.sparse.map", "18446744073709551615,2").file("s", b"xx")),
        ("map of a sparse", pax(Tar::default(), "GNU.sparse.map", "9,2").file("s", b"xx")),
        ("version that is not known", pax(Tar::default(), "GNU.sparse.new", "1").file("s", b"x")),
        ("map of a sparse", pax(Tar::default(), "GNU.sparse.major", "1").file("s", &[b'1'; 512])),
        ("cut off", pax(Tar::default(), "GNU.sparse.major", "1").file("s", b"1\n")),
        (
            "bytes of files",
            pax(pax(Tar::default(), "GNU.sparse.map", "0,1"), "GNU.sparse.size", "99999999999999")
                .file("s", b"x"),
        ),
        ("not known", Tar::default().entry(EntryType::new(b'Z'), "s", "", b"")),
        (
            "too many headers",
            (0..20).fold(Tar::default(), |tar, _| tar.entry(EntryType::GNULongName, "l", "", b"x")),
        ),
        ("more than 1 MiB", Tar::default().entry(EntryType::XHeader, "x", "", &vec![b'x'; 2 << 20])),
        ("pax record", Tar::default().entry(EntryType::XHeader, "x", "", b"999 path=x\n").file("f", b"")),
        ("larger than Linux", long_xattr()),
    ] {
        images.host.file("bad.tar", &tar.end());
        refused(&images, &["bad.tar"], &["bad.tar", words]);
    }
    images.host.file("bad.tar", b"this is text");
    refused(&images, &["bad.tar"], &["bad.tar"]);
    refused(&images, &["missing.tar"], &["missing.tar", "No such file"]);
    refused(&images, &["/dev/null"], &["neither a file nor a folder"]);
}

/// Attributes of more than 64 KiB.
fn long_xattr() -> Tar {
    let record = format!("70027 SCHILY.xattr.user.a={}\n", "x".repeat(70_000));
    assert_eq!(record.len(), 70_027);
    Tar::default().entry(EntryType::XHeader, "x", "", record.as_bytes()).file("f", b"")
}

#[test]
fn what_is_cut_off_is_refused() {
    let images = Images::new();
    let tar = Tar::default().dir("d").file("f", &[7; 5000]).end();
    let packed = gzip(&tar);
    for bytes in
        [&tar[..700], &tar[..1200], &tar[..3000], &tar[..tar.len() - 1024], &packed[..packed.len() - 9]]
    {
        images.host.file("cut.tar", bytes);
        refused(&images, &["cut.tar"], &["cut.tar"]);
    }
}

#[test]
fn archives_that_grow_are_stopped() {
    let images = Images::new();
    // In a file, and behind the archive's end.
    let large = Tar::default().file("f", &vec![0; 8 << 20]).end();
    let behind = [Tar::default().file("f", b"").end(), vec![0; 8 << 20]].concat();
    for (bytes, words) in [(large, "bytes of files"), (behind, "larger than")] {
        images.host.file("bomb.tar.gz", &gzip(&bytes));
        refused(&images, &["bomb.tar.gz", "--max-size", "4M"], &["bomb.tar.gz", words]);
    }
    // A path of a thousand folders, a thousand times, is what counts, not the archive's size.
    let deep = (0..2000).fold(Tar::default(), |tar, i| {
        let path = format!("{i}/{}", "d/".repeat(1900));
        tar.entry(EntryType::GNULongName, "l", "", path.as_bytes()).file("x", b"")
    });
    images.host.file("deep.tar", &deep.end());
    refused(&images, &["deep.tar"], &["deep.tar", "more than"]);
}

#[test]
fn wrong_digests_are_refused() {
    let layer = Tar::default().file("f", &[7; 5000]).end();
    let images = Images::new();
    let oci = Oci::new(images.path("oci"));
    let manifest = oci.image("amd64", &[&layer]);
    oci.index(std::slice::from_ref(&manifest));
    let parts = fs::read_dir(images.path("oci/blobs/sha256")).unwrap().map(|e| e.unwrap().path());
    for part in parts.collect::<Vec<_>>() {
        let good = fs::read(&part).unwrap();
        let mut bad = good.clone();
        // In the layer, within the file's data: only its digest tells.
        let at = bad.len() / 2;
        bad[at] ^= 1;
        let name = part.file_name().unwrap().to_str().unwrap();
        fs::write(&part, &bad).unwrap();
        refused(&images, &["oci"], &[name]);
        fs::write(&part, &good[..good.len() - 1]).unwrap();
        refused(&images, &["oci"], &[name]);
        fs::remove_file(&part).unwrap();
        refused(&images, &["oci"], &[name, "missing"]);
        fs::write(&part, &good).unwrap();
    }
    // The layer is what the manifest says, and not what the configuration says.
    let other = Tar::default().end();
    let config = oci.config("amd64", &[&other]);
    let manifest = oci.manifest(&config, &[oci.blob(&layer)]);
    oci.index(&[manifest]);
    refused(&images, &["oci"], &[&Digest::of(&other).hex()]);
    oci.index(&[oci.manifest(&config, &[])]);
    refused(&images, &["oci"], &["different numbers"]);
}

#[test]
fn this_machines_image_is_taken() {
    let images = Images::new();
    let oci = Oci::new(images.path("oci"));
    let layer = Tar::default().file("f", b"ours").end();
    let other = oci.image("arm64", &[&Tar::default().file("f", b"arm").end()]);
    let platform = |mut descriptor: Value, architecture: &str| {
        descriptor["platform"] = json!({ "os": "linux", "architecture": architecture });
        descriptor
    };
    oci.index(std::slice::from_ref(&other));
    refused(&images, &["oci"], &["linux/arm64"]);
    oci.index(&[platform(other.clone(), "arm64")]);
    refused(&images, &["oci"], &["none for linux/amd64"]);
    let ours = oci.image("amd64", &[&layer]);
    let list = json!({ "schemaVersion": 2, "manifests": [platform(other, "arm64"), platform(ours.clone(), "amd64")] });
    let mut inner = oci.blob(list.to_string().as_bytes());
    inner["mediaType"] = json!("application/vnd.oci.image.index.v1+json");
    inner["annotations"] = json!({ "org.opencontainers.image.ref.name": "example.com/app:3" });
    oci.index(&[inner]);
    let imported = images.json(&["import", "oci", "--format", "json"]);
    assert_eq!(imported[0]["digest"], ours["digest"]);
    assert_eq!(imported[0]["names"], json!(["example.com/app:3"]));
    // By digest, too.
    let digest = ours["digest"].as_str().unwrap();
    images.done(&["inspect", &format!("example.com/app@{digest}"), digest, &digest[7..15]]);
    assert_fails(&images.run(&["inspect", "example.com/app:4"]), 1, &["no image", "example.com/app:4"]);
    assert_fails(&images.run(&["inspect", "Not A Name"]), 1, &["no image"]);
}

#[test]
fn an_older_docker_archive_is_read() {
    let images = Images::new();
    let layer = Tar::default().file("f", b"x").end();
    let top = Tar::default().file("g", b"y").end();
    let ids = [Digest::of(&layer), Digest::of(&top), Digest::of(&layer)];
    let config =
        json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": ids } });
    let config = config.to_string();
    let id = Digest::of(config.as_bytes());
    let manifest = |tag: &str| json!([{ "Config": format!("{}.json", id.hex()), "RepoTags": [tag], "Layers": ["a/layer.tar", "b/layer.tar", "c/layer.tar"] }]);
    // Layers that are the same are links.
    let archive = |tag: &str| {
        let tar = Tar::default()
            .dir("a/")
            .file("a/layer.tar", &layer)
            .file("b/layer.tar", &top)
            .link("c/layer.tar", "../a/layer.tar");
        tar.file("x.json", b"{}")
            .file(&format!("{}.json", id.hex()), config.as_bytes())
            .file("manifest.json", manifest(tag).to_string().as_bytes())
            .end()
    };
    // The first entry tells an image's archive: Docker's folders have names of 64 digits.
    let named = |tar: Vec<u8>| [Tar::default().file("repositories", b"{}").0, tar].concat();
    images.host.file("old.tar", &named(archive("app:1")));
    images.host.file("old.tar.gz", &gzip(&named(archive("app:2"))));
    let one = images.json(&["import", "old.tar", "--format", "json"]);
    let two = images.json(&["import", "old.tar.gz", "--format", "json"]);
    assert_eq!(one[0]["id"], json!(id));
    assert_eq!(one[0]["digest"], two[0]["digest"]);
    assert_eq!(images.json(&["ls", "--format", "json"])[0]["names"].as_array().unwrap().len(), 2);
    images.host.file("bad.tar", &named(archive("not a name")));
    assert_fails(&images.run(&["import", "bad.tar"]), 1, &["not a name"]);
}

#[test]
fn an_image_of_as_many_layers_as_docker_lets_it_have_is_imported() {
    let images = Images::new();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/layers.py");
    tool(&images, &format!("python3 {script} 127 {script} layers.tar"));
    images.done(&["import", "layers.tar"]);
    let image = images.json(&["inspect", "layers:127"]);
    assert_eq!(image[0]["layers"].as_array().unwrap().len(), 127);
}

#[test]
fn names_move_and_images_go() {
    let images = Images::new();
    for name in ["one", "two"] {
        images.host.file(&format!("{name}.tar"), &Tar::default().file("f", name.as_bytes()).end());
        images.done(&["import", &format!("{name}.tar"), "--name", "app"]);
    }
    let list = images.json(&["ls", "--format", "json"]);
    assert_eq!(
        (&list[0]["names"], &list[1]["names"]),
        (&json!([]), &json!(["docker.io/library/app:latest"]))
    );
    images.done(&["import", "two.tar", "--name", "app:2"]);
    let id = list[1]["id"].as_str().unwrap().to_string();
    assert_fails(&images.run(&["rm", &id[7..19]]), 1, &["several names"]);
    assert_eq!(images.done(&["rm", "app:2"]), "Untagged: docker.io/library/app:2\n");
    let pruned = images.json(&["prune", "--format", "json"]);
    assert_eq!(pruned["images"].as_array().unwrap().len(), 1);
    assert!(pruned["freed"].as_u64().unwrap() > 4096, "{pruned}");
    // In use: as long as somebody has a lease.
    let store = images.store();
    let lease = store.lease(&store.find("app").unwrap().record).unwrap();
    assert_fails(&images.run(&["rm", "app"]), 1, &["app:latest", "in use"]);
    assert!(images.done(&["prune", "--all"]).contains("Freed: 0"));
    drop(lease);
    assert_fails(&images.run(&["rm", "missing"]), 1, &["missing"]);
    assert!(images.done(&["rm", "app"]).contains("Deleted: "));
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

#[test]
fn an_id_is_found_however_its_layers_are_packed() {
    let images = Images::new();
    let tar = Tar::default().file("f", b"x").end();
    images.host.file("plain.tar", &tar);
    images.host.file("packed.tar.gz", &gzip(&tar));
    let id = images.json(&["import", "plain.tar", "--format", "json"])[0]["id"].clone();
    images.done(&["import", "packed.tar.gz", "--name", "app"]);
    let id = &id.as_str().unwrap()[7..19];
    assert_eq!(images.json(&["inspect", id])[0]["names"], json!(["docker.io/library/app:latest"]));
    images.done(&["import", "plain.tar", "--name", "other"]);
    assert_fails(&images.run(&["rm", id]), 1, &["several names"]);
    assert_eq!(images.done(&["rm", "--force", id]).matches("Deleted: ").count(), 2);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
    let digest = format!("app@{}", Digest::of(b""));
    refused(&images, &["plain.tar", "--name", &digest], &["--name", "without a digest"]);
}

#[test]
fn odd_layouts_are_no_trap() {
    let images = Images::new();
    let oci = Oci::new(images.path("oci"));
    // Go writes empty lists so.
    let config =
        oci.blob(br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":null}}"#);
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": null });
    oci.index(&[oci.blob(manifest.to_string().as_bytes())]);
    images.done(&["import", "oci", "--name", "nothing"]);
    images.done(&["rm", "nothing"]);
    // A pipe that nobody writes to.
    let entry = oci.image("amd64", &[b"x"]);
    let part = images.path("oci/blobs/sha256").join(&entry["digest"].as_str().unwrap()[7..]);
    fs::remove_file(&part).unwrap();
    tool(&images, &format!("mkfifo {}", part.display()));
    oci.index(&[entry]);
    refused(&images, &["oci"], &["no regular file"]);
    // Records without a value say nothing.
    let tar = Tar::default().entry(EntryType::XHeader, "x", "", b"8 path=\n9 mtime=\n").file("f", b"x");
    images.host.file("files.tar", &tar.end());
    images.done(&["import", "files.tar", "--name", "files"]);
}

#[test]
fn imports_at_once_are_one_image() {
    let images = Images::new();
    images.host.file("files.tar", &Tar::default().file("f", &vec![7; 3 << 20]).end());
    let start =
        |_| images.command(&["import", "files.tar", "--name", "app"]).stdout(Stdio::null()).spawn().unwrap();
    let all: Vec<_> = (0..6).map(start).collect();
    for mut import in all {
        assert!(import.wait().unwrap().success());
    }
    assert_eq!(images.json(&["ls", "--format", "json"]).as_array().unwrap().len(), 1);
    images.done(&["rm", "app"]);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_killed_import_leaves_nothing_half() {
    let images = Images::new();
    images.host.file("files.tar", &Tar::default().file("f", &vec![7; 6 << 20]).end());
    for _ in 0..10 {
        let mut import =
            images.command(&["import", "files.tar", "--name", "app"]).stdout(Stdio::null()).spawn().unwrap();
        // Whenever it has come so far: another place each time on a busy machine.
        while fs::read_dir(images.path("data/images/tmp")).map_or(true, |mut dir| dir.next().is_none()) {
            if import.try_wait().unwrap().is_some() {
                break;
            }
        }
        import.kill().unwrap();
        import.wait().unwrap();
        // Either whole or not there.
        let list = images.json(&["ls", "--format", "json"]);
        assert!(list.as_array().unwrap().iter().all(|image| image["layers"] == 1), "{list}");
    }
    images.done(&["import", "files.tar", "--name", "app"]);
    images.done(&["inspect", "app"]);
    images.done(&["rm", "app"]);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
}

/// No file may have more than 1 MiB: as a disk that is full then.
fn small_files() -> i32 {
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
    // SAFETY: the structure is whole.
    unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }
}

#[test]
fn a_disk_that_is_full_registers_nothing() {
    let images = Images::new();
    images.host.file("files.tar", &Tar::default().file("f", &vec![7; 3 << 20]).end());
    let mut import = images.command(&["import", "files.tar", "--name", "app"]);
    let output = in_child(&mut import, small_files).output().unwrap();
    assert_fails(&output, 1, &["files.tar", "store cannot be written", "File too large"]);
    assert_eq!(images.files(), Vec::<PathBuf>::new());
    images.done(&["import", "files.tar", "--name", "app"]);
    let mut export = images.command(&["export", "app", "-o", "out.tar"]);
    let output = in_child(&mut export, small_files).output().unwrap();
    assert_fails(&output, 1, &["--output out.tar", "File too large"]);
    assert!(!images.host.files().iter().any(|path| path.to_string_lossy().contains("out.tar")));
}

#[test]
fn a_store_that_is_not_ours_is_refused() {
    let images = Images::new();
    fs::create_dir_all(images.path("data/images")).unwrap();
    fs::set_permissions(images.path("data/images"), fs::Permissions::from_mode(0o777)).unwrap();
    assert_fails(&images.run(&["ls"]), 1, &["own folder", "MICROVM_DATA"]);
    let mut nowhere = images.command(&["ls"]);
    for variable in ["MICROVM_DATA", "XDG_DATA_HOME", "HOME"] {
        nowhere.env_remove(variable);
    }
    assert_fails(&nowhere.output().unwrap(), 1, &["MICROVM_DATA"]);
}

#[test]
fn what_skopeo_writes_is_one_image_however_it_comes() {
    let images = Images::new();
    by_umoci(&images);
    tool(&images, "skopeo copy -q oci:oci:app oci-archive:oci.tar:example.com/app:1");
    tool(&images, "skopeo copy -q oci:oci:app docker-archive:docker.tar:example.com/app:2");
    tool(
        &images,
        "skopeo copy -q docker-archive:docker.tar oci-archive:zstd.tar --dest-compress-format zstd --dest-compress",
    );
    let layout = images.json(&["import", "oci", "--name", "app", "--format", "json"]);
    let archive = images.json(&["import", "oci.tar", "--format", "json"]);
    let docker = images.json(&["import", "docker.tar", "--format", "json"]);
    assert_eq!(layout[0]["digest"], archive[0]["digest"]);
    assert_eq!(archive[0]["names"], json!(["example.com/app:1"]));
    assert_eq!(docker[0]["names"], json!(["example.com/app:2"]));
    images.done(&["import", "zstd.tar", "--name", "zstd"]);
    let inner = tool(&images, "tar -xf zstd.tar; head -qc 4 blobs/sha256/* | od -An -tx1 | tr -d ' \n'");
    assert_eq!(inner.matches("28b52ffd").count(), 3, "{inner}");
    // Docker's archive has plain layers, and these others: their file systems are there already.
    let layers = images.files().iter().filter(|f| f.extension().is_some_and(|e| e == "erofs")).count();
    assert_eq!(layers, 3);
    // And out again.
    images.done(&["export", "app", "-o", "out.tar"]);
    let inspected: Value = serde_json::from_str(&tool(
        &images,
        "skopeo inspect oci-archive:out.tar:docker.io/library/app:latest",
    ))
    .unwrap();
    assert_eq!(inspected["Digest"], layout[0]["digest"]);
    tool(&images, "skopeo copy -q oci-archive:out.tar:docker.io/library/app:latest dir:out");
    images.done(&["rm", "app"]);
    images.done(&["prune", "--all"]);
    assert_eq!(images.json(&["import", "out.tar", "--format", "json"])[0]["digest"], layout[0]["digest"]);
}

#[test]
fn what_umoci_inserts_is_taken() {
    let images = Images::new();
    tool(
        &images,
        "umoci init --layout oci; umoci new --image oci:app; mkdir d; echo x >d/f
         umoci insert --image oci:app d /d",
    );
    images.done(&["import", "oci", "--name", "app"]);
    with_stacked(&images, "app", "[ $(cat stacked/d/f) = x ]");
}

#[test]
fn layers_are_sound_file_systems() {
    let images = Images::new();
    by_umoci(&images);
    images.done(&["import", "oci", "--name", "app"]);
    let image = images.json(&["inspect", "app"]);
    for layer in image[0]["layers"].as_array().unwrap() {
        tool(&images, &format!("fsck.erofs {}", layer["path"]));
    }
}

#[test]
fn stacked_layers_are_what_umoci_unpacks() {
    let images = Images::new();
    by_umoci(&images);
    images.done(&["import", "oci", "--name", "app"]);
    let compare = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/compare_trees.py");
    let unpack = "umoci unpack --image oci:app want >/dev/null";
    with_stacked(&images, "app", &format!("{unpack}; python3 {compare} stacked want/rootfs 500"));
}

/// A pax record of its own.
fn pax(tar: Tar, key: &str, value: &str) -> Tar {
    let record = format!(" {key}={value}\n");
    let digits = if record.len() < 98 { 2 } else { 3 };
    tar.entry(EntryType::XHeader, "x", "", format!("{}{record}", record.len() + digits).as_bytes())
}

/// A pax record of one extended attribute.
fn xattr(tar: Tar, name: &str, value: &str) -> Tar {
    pax(tar, &format!("SCHILY.xattr.{name}"), value)
}

#[test]
fn files_with_holes_are_whole() {
    let images = Images::new();
    tool(
        &images,
        "mkdir d; for i in $(seq 40); do printf %s $i | dd of=d/many bs=1 seek=$((i * 65536)) conv=notrunc status=none; done
         truncate -s 3M d/many; truncate -s 1M d/hole; echo start >d/start; truncate -s 200K d/start; echo x >d/plain
         for format in 'gnu' 'posix --sparse-version=0.0' 'posix --sparse-version=0.1' 'posix --sparse-version=1.0'; do
             tar -C d --sparse --format=$format -cf \"${format##*=}.tar\" .
         done
         tar -C d --format=posix -cf whole.tar .",
    );
    let layer = |name: &str| {
        images.done(&["import", &format!("{name}.tar"), "--name", "x"]);
        let image = images.json(&["inspect", "x"]);
        fs::read(image[0]["layers"][0]["path"].as_str().unwrap()).unwrap()
    };
    let whole = layer("whole");
    assert!(whole.len() > 4 << 20);
    for name in ["gnu", "0.0", "0.1", "1.0"] {
        assert!(
            fs::metadata(images.path(&format!("{name}.tar"))).unwrap().len() < 1 << 20,
            "{name} has holes"
        );
        let found = layer(name);
        // But for the name of the file system, and times, which GNU's format has to the second.
        assert_eq!(found.len(), whole.len(), "{name}");
        assert_eq!(found[8192..4 << 20], whole[8192..4 << 20], "{name}");
    }
}

#[test]
fn whiteouts_hide_what_is_below_and_nothing_else() {
    let images = Images::new();
    let below =
        Tar::default().dir("a").dir("a/b").file("a/b/old", b"").dir("c").file("c/old", b"").file("d", b"");
    let below = below.dir("e").file("e/old", b"").dir("f").file("f/old", b"").dir("g").file("g/old", b"");
    // Opaque before and behind what is in it; a whiteout before and behind what takes its name.
    let top = Tar::default().file("a/b/.wh..wh..opq", b"").file("a/b/new", b"").dir("c").file("c/new", b"");
    let top =
        top.file("c/.wh..wh..opq", b"").file(".wh.d", b"").file("d", b"new").file(".wh.e", b"").dir("e");
    let top = top.dir("f").file(".wh.f", b"").file("f/new", b"").file(".wh..wh.plnk", b"");
    // What the archive says of overlayfs is not believed, nor is an attribute that Linux does not have.
    let top = xattr(top, "trusted.overlay.opaque", "y").dir("g");
    let top = xattr(top, "strange.name", "y").file("g/new", b"");
    let oci = Oci::new(images.path("oci"));
    oci.index(&[oci.image("amd64", &[&below.end(), &top.end()])]);
    images.done(&["import", "oci", "--name", "app"]);
    let want = "./a ./a/b ./a/b/new ./c ./c/new ./d ./e ./f ./f/new ./g ./g/new ./g/old";
    let check = format!(
        "cd stacked; found=$(find . -mindepth 1 | sort | xargs); [ \"$found\" = '{want}' ] || {{ echo $found; exit 1; }}\n\
         [ $(cat d) = new ]; owner=$(stat -c %u:%g:%a:%Y a); [ $owner = 5:6:750:7 ] || {{ echo $owner; exit 1; }}"
    );
    with_stacked(&images, "app", &check);
}

#[test]
fn a_folder_is_as_the_layers_below_have_it_and_no_other_image() {
    let images = Images::new();
    let oci = Oci::new(images.path("oci"));
    let below = Tar::default().dir("a").dir("b").file("b/old", b"").end();
    let gone = Tar::default().file(".wh.b", b"").end();
    let top = Tar::default().file("a/x", b"").file("b/x", b"").end();
    let import = |name: &str, layers: &[&[u8]]| {
        oci.index(&[oci.image("amd64", layers)]);
        images.done(&["import", "oci", "--name", name]);
    };
    // The same archive, alone first: there its folders are nobody's.
    import("alone", &[&top]);
    import("app", &[&below, &top]);
    import("again", &[&below, &gone, &top]);
    with_stacked(&images, "alone", "cd stacked; [ $(stat -c %u:%a a) = 0:755 ]");
    with_stacked(
        &images,
        "app",
        "cd stacked; [ $(stat -c %u:%a a) = 5:750 ]; [ $(stat -c %u:%a b) = 5:750 ]",
    );
    // What is gone has left no owner either.
    with_stacked(
        &images,
        "again",
        "cd stacked; [ $(stat -c %u:%a a) = 5:750 ]; [ $(stat -c %u:%a b) = 0:755 ]",
    );
}

#[test]
fn an_opaque_root_hides_all() {
    let images = Images::new();
    let oci = Oci::new(images.path("oci"));
    let below = Tar::default().dir("a").file("a/old", b"").file("f", b"").dir("d").file("d/old", b"");
    let middle = Tar::default().file("g", b"").end();
    let top = Tar::default().file("d/new", b"").file(".wh..wh..opq", b"").file("f", b"new");
    oci.index(&[oci.image("amd64", &[&below.end(), &middle, &top.end()])]);
    images.done(&["import", "oci", "--name", "app"]);
    let check = "cd stacked; found=$(find . -mindepth 1 | sort | xargs); [ \"$found\" = './d ./d/new ./f' ] || { echo $found; exit 1; }\n\
         [ $(cat f) = new ]; [ $(stat -c %u:%a d) = 0:755 ]";
    with_stacked(&images, "app", check);
}

#[test]
fn lists_of_lists_have_an_end() {
    let images = Images::new();
    let oci = Oci::new(images.path("oci"));
    let mut entry = json!({ "digest": Digest::of(b""), "size": 0, "platform": { "os": "linux", "architecture": "arm64" } });
    for _ in 0..4 {
        let list = json!({ "schemaVersion": 2, "manifests": vec![entry; 500] });
        entry = oci.blob(list.to_string().as_bytes());
        entry["mediaType"] = json!("application/vnd.oci.image.index.v1+json");
    }
    oci.index(&[entry]);
    refused(&images, &["oci"], &["none for linux/amd64"]);
    oci.index(&[oci.manifest(&oci.config("amd64", &[]), &vec![oci.blob(b""); 501])]);
    refused(&images, &["oci"], &["more than 500 layers"]);
    images.host.file("oci/index.json", b"{}");
    refused(&images, &["oci"], &["index.json", "missing field"]);
    images.host.file("oci/index.json", &vec![b' '; 5 << 20]);
    refused(&images, &["oci"], &["index.json", "more than"]);
}
