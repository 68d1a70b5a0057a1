//! Keeps programs small. All of them are linked with packed relocations (glibc 2.36; an older linker leaves them as they
//! are), of which there are thousands, for each at its start to work off. `microvm-init` ends by an abort, and never unwinds
//! a stack, so the tables for that, a tenth of the program, stay out of it.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/src/init/no-unwind.ld");
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    if std::env::var("PROFILE").as_deref() == Ok("release") {
        println!("cargo:rustc-link-arg-bin=microvm-init=-Wl,-T,{script}");
    }
}
