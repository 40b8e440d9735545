//! iperf3 through a forward: a client that nobody here wrote.

use std::net::SocketAddr;

use dhow_tests::command::Cmd;
use dhow_tests::{SOON, wait_for};

use crate::bulk::Direction;

/// Mbit/s that the receiver saw, in three seconds.
///
/// # Panics
/// When iperf3 fails.
pub fn sample(address: SocketAddr, direction: Direction) -> f64 {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let port = address.port().to_string();
    // The server takes one client at a time, and a moment after each; it turns others away until then.
    wait_for(&format!("iperf3 by {address}"), SOON, || {
        let mut client = Cmd::new("iperf3").env("PATH", &path);
        client = client.args(["--client", "127.0.0.1", "--port", &port, "--time", "3", "--json"]);
        if direction == Direction::ToHost {
            client = client.arg("--reverse");
        }
        let report = client.run().text();
        let report: serde_json::Value = serde_json::from_str(&report).map_err(|error| error.to_string())?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        rate.map(|rate| rate / 1e6).ok_or_else(|| report["error"].to_string())
    })
}
