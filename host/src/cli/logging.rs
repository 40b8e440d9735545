//! Logs on standard error, which is a file in the log folder for Dhow's own processes.

use std::io;
use std::os::fd::AsFd;

use tracing_subscriber::EnvFilter;

use super::output::write_all;

/// The level, as tracing's filters are written.
const VARIABLE: &str = "DHOW_LOG";

/// Where a full disk or a reader that left costs a line, never the process: an error here would be
/// printed by the logger, and failing in that is a panic.
struct Lossy;

impl io::Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = write_all(io::stderr().as_fd(), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// For Dhow's own processes: `DHOW_LOG`, else info.
pub fn for_process() {
    init(EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new("info")));
}

/// For commands, whose standard error is the user's: only what `DHOW_LOG` asks for.
pub fn for_command() {
    if let Ok(filter) = EnvFilter::try_from_env(VARIABLE) {
        init(filter);
    }
}

fn init(filter: EnvFilter) {
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(|| Lossy).init();
}
