//! Keeps `microvm-init` small: process 1 ends by an abort, and never unwinds a stack, so the tables for that, a tenth of the
//! program, stay out of it.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/src/init/no-unwind.ld");
    println!("cargo:rerun-if-changed={script}");
    if std::env::var("PROFILE").as_deref() == Ok("release") {
        println!("cargo:rustc-link-arg-bin=microvm-init=-Wl,-T,{script}");
    }
}
