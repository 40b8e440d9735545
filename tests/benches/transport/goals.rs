//! What the numbers ought to be, beside what they are.

use std::fmt::Write as _;

use dhow_tests::table::Table;

/// A list in Markdown: each goal, whether it is met, and the figure.
pub fn check(table: &Table) -> String {
    let mut list = String::from("Goals:\n");
    let mut goal = |text: &str, met: bool, figure: f64, unit: &str| {
        let word = if met { "met" } else { "MISSED" };
        let _ = writeln!(list, "- {text}: {word}, {figure:.2}{unit}");
    };
    for towards in ["host → guest", "guest → host"] {
        let row = format!("iperf3 {towards}, Mbit/s");
        let dhow = table.median(&row, "dhow");
        let over_ssh = dhow / table.median(&row, "ssh -L");
        goal(&format!("TCP forward, {towards}, at least 4 × ssh -L"), over_ssh >= 4.0, over_ssh, " ×");
        let over_hostfwd = dhow / table.median(&row, "hostfwd");
        goal(
            &format!("TCP forward, {towards}, at least 1 × hostfwd"),
            over_hostfwd >= 1.0,
            over_hostfwd,
            " ×",
        );
        for streams in [1, 8] {
            for size in ["4 KiB", "64 KiB", "1 MiB"] {
                let row = format!("{towards}, {streams} streams, writes of {size}, MB/s");
                let of_bare = table.median(&row, "dhow") / table.median(&row, "vsock");
                let text =
                    format!("{towards}, {streams} streams, writes of {size}, at least 0.85 × bare vsock");
                goal(&text, of_bare >= 0.85, of_bare, " ×");
            }
        }
    }
    let ping = "docker /_ping, new connection, ms";
    let of_ssh = table.median(ping, "dhow") / table.median(ping, "ssh -L");
    goal("/_ping on a new connection, at most 1/3 of ssh -L", of_ssh <= 1.0 / 3.0, of_ssh, " ×");
    let loaded = table.median("echo beside 8 bulk streams, p99 ms", "dhow")
        / table.median("echo of 64 B, 1 connections, p99 ms", "dhow");
    goal("p99 of the echo beside 8 bulk streams, at most 10 × its idle value", loaded <= 10.0, loaded, " ×");
    // The flood takes the guest's processors from everything; hostfwd shows how much, for it does not go
    // through the device.
    let kept = |way| {
        table.median("echo beside a flood of refused requests, round trips/s", way)
            / table.median("echo of 64 B, 1 connections, round trips/s", way)
    };
    let beside = kept("dhow") / kept("hostfwd");
    goal(
        "echo beside a flood of refused requests, at least 0.8 × what hostfwd keeps",
        beside >= 0.8,
        beside,
        " ×",
    );
    let idle = table.median("idle vsock device, % of a core", "dhow");
    goal("device's processor time when idle, below 1 %", idle < 1.0, idle, " %");
    for (process, limit) in
        [("keeper", 2.0), ("vsock device", 8.0), ("supervisor", 12.0), ("worker in the guest", 8.0)]
    {
        let rss = table.median(&format!("RssAnon of {process}, MiB"), "dhow");
        goal(&format!("RssAnon of {process}, at most {limit} MiB"), rss <= limit, rss, " MiB");
    }
    list
}
