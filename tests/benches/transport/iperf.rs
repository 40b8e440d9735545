//! iperf3 through a forward: a client that nobody here wrote.

use std::net::SocketAddr;

use dhow_tests::command::Cmd;

use crate::bulk::Direction;

/// Mbit/s that the receiver saw, in three seconds.
///
/// # Panics
/// When iperf3 fails.
pub fn sample(address: SocketAddr, direction: Direction) -> f64 {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let port = address.port().to_string();
    let mut client = Cmd::new("iperf3").env("PATH", path);
    client = client.args(["--client", "127.0.0.1", "--port", &port, "--time", "3", "--json"]);
    if direction == Direction::ToHost {
        client = client.arg("--reverse");
    }
    let report = client.ok();
    let report: serde_json::Value = serde_json::from_str(&report).expect("iperf3's report");
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    rate.unwrap_or_else(|| panic!("iperf3 by {address}: {}", report["error"])) / 1e6
}
