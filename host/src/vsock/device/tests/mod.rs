//! The device against a guest of our own: real rings, real sockets, no VM.
#![allow(clippy::unwrap_used)]

mod bulk;
mod client;
mod crowds;
mod guest;
mod hostile;
mod lifecycle;
mod process;
mod rings;
