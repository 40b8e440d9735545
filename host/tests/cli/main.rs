//! The real `dhow` binary in a home of its own, against a supervisor that the test plays.

// A failed assumption of a test ends it.
#![allow(clippy::unwrap_used)]

mod bench;
mod delete;
mod exec;
mod fake;
mod logs;
mod real;
mod show;
mod silence;
mod start;
mod terminal;
mod usage;
