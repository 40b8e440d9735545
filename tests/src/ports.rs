//! Servers in the guest and in containers, and what becomes of their ports.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use super::command::Running;
use super::container::Container;
use super::net::local;
use super::vm::{TOOL, Vm};
use super::wait::SOON;

/// A server of the guest tool in the guest, at an address with a port.
///
/// # Panics
/// When it does not listen.
pub fn serve(vm: &Vm, kind: &str, address: SocketAddr) -> Running {
    let running = vm.exec(&[TOOL, kind, &address.to_string()]).spawn();
    running.expect("listening");
    running
}

/// The host's endpoints of a guest's port, as `dhow ports` tells them, and the reasons of those without.
///
/// # Panics
/// When that is no list.
pub fn listed(vm: &Vm, protocol: &str, port: u16) -> Vec<(String, Result<String, String>)> {
    let all = vm.json(&["ports", "--json"]);
    let entries = all.as_array().expect("a list").iter().filter(|entry| {
        let guest = entry["guest"].as_str().unwrap_or_default();
        entry["protocol"] == protocol && guest.ends_with(&format!(":{port}"))
    });
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    entries
        .map(|entry| {
            let host = text(&entry["host"]).ok_or_else(|| text(&entry["reason"]).unwrap_or_default());
            (text(&entry["guest"]).unwrap_or_default(), host)
        })
        .collect()
}

/// The first exchange with a container's server that was published just now.
///
/// # Errors
/// With how it was refused.
pub fn first_exchange(port: u16) -> Result<(), String> {
    first_exchange_at(local(port))
}

/// As [`first_exchange`], elsewhere.
///
/// # Errors
/// With how it was refused.
pub fn first_exchange_at(address: SocketAddr) -> Result<(), String> {
    let mut stream = TcpStream::connect(address).map_err(|error| format!("connect: {error}"))?;
    stream.set_read_timeout(Some(SOON)).map_err(|error| format!("deadline: {error}"))?;
    stream.write_all(b"source 5 1\n").map_err(|error| format!("write: {error}"))?;
    match stream.read_to_end(&mut Vec::new()) {
        Ok(5) => Ok(()),
        Ok(other) => Err(format!("{other} bytes")),
        // docker's proxy has nobody to pass it on to yet.
        Err(error) => Err(format!("read: {error}")),
    }
}

/// A container whose server is published at `port`. docker's proxy listens when this returns; the server itself may be
/// a moment late.
///
/// # Panics
/// When docker does not start it.
pub fn published<'a>(vm: &'a Vm, port: u16) -> Container<'a> {
    vm.container(&["-p", &format!("{port}:7000")], &["guest-tool", "serve", "0.0.0.0:7000"])
}

/// Whether this host has an IPv6 loopback.
pub fn host_has_ipv6() -> bool {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()
}
