//! The docker context that points at a profile.

mod cli;
mod context;

pub use context::{Activation, ContextName, activate, deactivate, remove};
