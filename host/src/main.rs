//! The `dhow` binary: parse, dispatch, print the error chain and its hint.

use std::process::ExitCode;

use clap::Parser;
use dhow::cli::{self, Cli};

fn main() -> ExitCode {
    let status = cli::run(Cli::parse());
    ExitCode::from(status)
}
