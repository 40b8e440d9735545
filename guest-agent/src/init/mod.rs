//! PID 1.

/// Brings the system up, runs the worker, powers off. Never returns but by powering off.
pub fn main() -> std::process::ExitCode {
    unimplemented_yet()
}

fn unimplemented_yet() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}
