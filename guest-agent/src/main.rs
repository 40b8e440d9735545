//! The guest agent: as PID 1 (`/init`) it is the dumb parent, as `dhow-agent serve` the worker that
//! PID 1 restarts.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("serve") => {
            dhow_agent::init::exempt_from_oom();
            dhow_agent::serve::main()
        }
        _ if std::process::id() == 1 => dhow_agent::init::main(),
        _ => {
            eprintln!("dhow-agent runs in Dhow's guest: PID 1 there, and `dhow-agent serve` below it");
            ExitCode::from(2)
        }
    }
}
