//! How host names are looked up.

use std::ffi::{CStr, c_char, c_int};

unsafe extern "C" {
    /// glibc: what `nsswitch.conf` would say of a database, for this process.
    fn __nss_configure_lookup(database: *const c_char, line: *const c_char) -> c_int;
}

/// Has host names looked up in `/etc/hosts` and by DNS alone, whatever `nsswitch.conf` says. What else it may name are
/// libraries, which a static program would load together with another libc.
pub fn use_built_in() {
    const HOSTS: &CStr = c"hosts";
    const SOURCES: &CStr = c"files dns";
    // SAFETY: both are C strings that are never freed, and the call keeps no other thread from anything: it is made
    // before there is one.
    let failed = unsafe { __nss_configure_lookup(HOSTS.as_ptr(), SOURCES.as_ptr()) };
    debug_assert_eq!(failed, 0, "glibc knows the database");
}
