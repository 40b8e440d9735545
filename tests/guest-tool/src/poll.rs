//! Looks for listening ports every so often, as WSL 2 and Lima do, and prints what comes and goes.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use crate::serve::say;

/// Prints "+PORT" and "-PORT", for ever.
pub fn poll(milliseconds: &str) -> io::Result<()> {
    let period = milliseconds.parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut known = BTreeSet::new();
    loop {
        let now = listening()?;
        now.difference(&known).for_each(|port| say(&format!("+{port}")));
        known.difference(&now).for_each(|port| say(&format!("-{port}")));
        known = now;
        std::thread::sleep(Duration::from_millis(period));
    }
}

/// proc_net_tcp(5): local address and port in hexadecimal, and the state; 0A is LISTEN.
fn listening() -> io::Result<BTreeSet<u16>> {
    let text = std::fs::read_to_string("/proc/net/tcp")?;
    let port = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (_, port) = fields.get(1)?.rsplit_once(':')?;
        (*fields.get(3)? == "0A").then(|| u16::from_str_radix(port, 16).ok())?
    };
    Ok(text.lines().skip(1).filter_map(port).collect())
}
