//! The guest agent: `dhow-agent init` is PID 1, `dhow-agent serve` the worker it restarts.

fn main() {}
