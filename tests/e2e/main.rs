//! End-to-end tests: the real `dhow`, a real VM under emulation, the real docker.
//!
//! `cargo test -p dhow-tests --test e2e -- FILTER` runs the cases whose names hold FILTER, or one of
//! 'FILTER|FILTER'; `--skip`, `--exact` and `--list` are as with Rust's own tests. The files under test come from `make`, or from
//! DHOW_BIN, DHOW_IMAGE, DHOW_GUEST_TOOL, DHOW_BUSYBOX and DHOW_FIO.

#![allow(missing_docs, clippy::unwrap_used)]

mod cli;
mod crash;
mod datagrams;
mod docker;
mod failures;
mod floods;
mod forwards;
mod lifecycle;
mod mounts;
mod network;
mod ports;
mod profiles;
mod published;
mod rules;
mod selftest;
mod unprivileged;

use std::process::ExitCode;

use dhow_tests::{Body, Case, report, shared, vm};
use libtest_mimic::{Arguments, Trial};
use nix::sys::signal::{SigSet, Signal};

/// All cases: those of the shared VM first, so that it is started once.
fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = [
        selftest::cases(),
        cli::cases(),
        docker::cases(),
        forwards::cases(),
        mounts::cases(),
        network::cases(),
        ports::cases(),
        datagrams::cases(),
        published::cases(),
        floods::cases(),
        crash::cases(),
        lifecycle::cases(),
        failures::cases(),
        unprivileged::cases(),
        rules::cases(),
        profiles::cases(),
    ]
    .concat();
    cases.sort_by_key(|case| matches!(case.body, Body::Own(_)));
    cases
}

/// Whoever ends the suite in its middle ends its VMs, too.
fn clean_up_on_signals() {
    let mut signals = SigSet::empty();
    signals.extend([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    // Of this thread and all that it starts; commands begin with none blocked.
    signals.thread_block().expect("blocked signals");
    std::thread::spawn(move || {
        let signal = signals.wait().expect("a signal");
        eprintln!("ended by {signal}; ending what runs");
        drop(vm::clean_up());
        std::process::exit(128 + signal as i32);
    });
}

fn main() -> ExitCode {
    clean_up_on_signals();
    let mut arguments = Arguments::from_args();
    // One after another: they share a VM, and a machine.
    arguments.test_threads = Some(1);
    // Between the lines of `--quiet` nobody sees what takes so long.
    let loud = arguments.quiet;
    report::install();
    let mut cases = cases();
    if let Some(filters) = arguments.filter.take_if(|filter| filter.contains('|')) {
        cases.retain(|case| filters.split('|').any(|filter| case.name.contains(filter)));
    }
    let trials = cases.into_iter().map(|case| {
        let name = case.name.clone();
        Trial::test(name, move || case.run(loud))
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    shared::stop();
    let left = vm::clean_up();
    if !left.is_empty() {
        report::fault(format!("left running at the end: {left:?}"));
    }
    for case in report::passed_the_second_time() {
        eprintln!("passed the second time only: {case}");
    }
    let faults = report::faults();
    for fault in &faults {
        eprintln!("the suite fails: {fault}");
    }
    if faults.is_empty() { conclusion.exit_code() } else { ExitCode::from(101) }
}
