//! The worker.

/// Serves the host's streams until PID 1 ends it.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}
