//! `microvm-init`.
fn main() {}
