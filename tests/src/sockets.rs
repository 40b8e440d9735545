//! Which sockets processes of the host have.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use super::process::Process;

/// Addresses on which `processes` listen over `protocol`, "tcp" or "udp"; a UDP socket that is connected is somebody's
/// client.
///
/// # Panics
/// When /proc does not say what it should.
pub fn listening(processes: &[Process], protocol: &str) -> Vec<SocketAddr> {
    let mut inodes = HashSet::new();
    for process in processes {
        let fds = match std::fs::read_dir(format!("/proc/{}/fd", process.pid)) {
            Ok(fds) => fds,
            // It has just ended.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => panic!("the sockets of {process:?}: {error}"),
        };
        let links = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
        // proc_pid_fd(5): "socket:[2248868]".
        inodes.extend(links.filter_map(|link| {
            let text = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned();
            Some(text)
        }));
    }
    let mut found = Vec::new();
    // States: TCP_LISTEN, and TCP_CLOSE for a UDP socket without a peer (net/tcp_states.h).
    let state = if protocol == "tcp" { "0A" } else { "07" };
    for table in [protocol.to_owned(), format!("{protocol}6")] {
        // Without IPv6 there are no tables of it.
        let text = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let [address, inode] = [1, 9].map(|at| fields.get(at).expect("a field of a socket"));
            if fields[3] == state && inodes.contains(*inode) {
                found.push(socket_address(address).unwrap_or_else(|| panic!("no address: {line}")));
            }
        }
    }
    found
}

/// `0100007F:1F90`: words of 32 bits in the machine's order, and the port.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words =
        (0..address.len()).step_by(8).map(|at| u32::from_str_radix(address.get(at..at + 8)?, 16).ok());
    let bytes: Vec<u8> = words.collect::<Option<Vec<_>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let address: IpAddr = match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok()?.into(),
        _ => <[u8; 16]>::try_from(bytes).ok()?.into(),
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}
