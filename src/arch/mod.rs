//! What differs between processor architectures: pure functions over memory and plain structs.

pub mod x86_64;
