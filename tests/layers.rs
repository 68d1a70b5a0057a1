//! Data flows one way: no module may import one that stands to its left in the layer order of `src/lib.rs`.

use std::fs;
use std::path::Path;

/// Left to right; modules of one group stand side by side and may import each other.
const LAYERS: &[&[&str]] = &[
    &["cli"],
    &["compare"],
    &["container"],
    &["doctor", "image", "kernels"],
    &["control"],
    &["vmm"],
    &["devices"],
    &["vcpu", "vm"],
    &["arch"],
    &["bus", "sandbox"],
    &["config"],
    &["guest", "logger", "metrics", "sys"],
];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|group| group.contains(&module))
}

/// Every `crate::MODULE` in the files below `dir`, with the file's own top module.
fn imports(dir: &Path, top: Option<&str>, found: &mut Vec<(String, String, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        let own = top.unwrap_or(&name).to_string();
        if path.is_dir() {
            imports(&path, Some(&own), found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            for part in text.split("crate::").skip(1) {
                let target: String =
                    part.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
                found.push((own.clone(), target, path.display().to_string()));
            }
        }
    }
}

#[test]
fn no_import_points_left() {
    let mut found = Vec::new();
    imports(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), None, &mut found);
    assert!(found.len() > 30, "the test sees only {} imports", found.len());
    for (own, target, file) in found {
        let (Some(from), Some(to)) = (layer(&own), layer(&target)) else { continue };
        assert!(to >= from, "{file}: {own} imports {target}, which stands to its left");
    }
}

#[test]
fn every_module_has_a_layer() {
    let lib = include_str!("../src/lib.rs");
    let modules: Vec<_> = lib.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let order: Vec<_> =
        modules.iter().map(|m| layer(m).unwrap_or_else(|| panic!("{m} has no layer"))).collect();
    assert!(order.is_sorted(), "src/lib.rs lists its modules in another order: {modules:?}");
}
