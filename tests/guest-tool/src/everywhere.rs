//! A hostile guest's program: listens on as many ports as it can, and flaps two of them without end.

use std::io;
use std::net::{Ipv4Addr, TcpListener};

use crate::serve::say;

/// A port that is denied on the host, and that root may take in the guest.
const SSH: u16 = 22;

/// Listens on `count` ports from `first` on, those that are free.
pub fn listen(first: &str, count: &str) -> io::Result<()> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let (first, count): (u16, u16) = (first.parse().map_err(wrong)?, count.parse().map_err(wrong)?);
    let most = libc::rlimit { rlim_cur: 1 << 17, rlim_max: 1 << 17 };
    // SAFETY: the struct is whole, and the call only reads it.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &most) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let bind = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
    let all: Vec<_> = (first..first.saturating_add(count)).filter_map(|port| bind(port).ok()).collect();
    say(&format!("listening on {}", all.len()));
    let flapping = first.saturating_sub(1);
    loop {
        // What is taken by somebody else is left alone.
        drop((bind(SSH), bind(flapping)));
    }
}
