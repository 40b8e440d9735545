//! renameat2(2) with its flags, which no busybox applet calls.

use std::ffi::CString;
use std::io;

/// Renames `from` to `to` with `flags`.
pub fn rename(from: &str, to: &str, flags: libc::c_uint) -> io::Result<()> {
    let [from, to] = [CString::new(from)?, CString::new(to)?];
    // SAFETY: both strings end in NUL and live through the call.
    let result = unsafe {
        libc::syscall(libc::SYS_renameat2, libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
