//! `lo`, the network card, and the guest's names.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use dhow_protocol::boot::{BootConfig, NetworkConfig};
use dhow_protocol::control::SearchList;
use dhow_protocol::errors::chain;
use netlink_packet_route::link::LinkMessage;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use super::error::InitError;
use crate::resolv_conf;

const INTERFACES: &str = "/sys/class/net";
const LOOPBACK: &str = "lo";
const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";

#[derive(Debug, thiserror::Error)]
enum NetworkError {
    #[error("the VM has no network card")]
    NoCard,
    #[error("the host's network settings are impossible: a prefix of {0} bits")]
    Prefix(u8),
    #[error("cannot speak with the kernel about its network")]
    Netlink(#[source] io::Error),
    #[error("cannot {what} {interface}")]
    Request { what: &'static str, interface: String, source: rtnetlink::Error },
}

/// Sets the network up. A guest without it is still of use, so that problems are logged, and not the
/// end of the boot.
pub(crate) fn configure(config: &BootConfig) {
    let configured = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(NetworkError::Netlink)
        .and_then(|runtime| runtime.block_on(set_up(config.network.as_ref())));
    if let Err(error) = configured {
        tracing::error!(error = chain(&error), "the guest has no network");
    }
}

async fn set_up(config: Option<&NetworkConfig>) -> Result<(), NetworkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Netlink)?;
    // Ends with the runtime.
    tokio::spawn(connection);
    // The kernel adds 127.0.0.1 and ::1 by itself.
    change(&handle, LOOPBACK, "switch on", LinkUnspec::new_with_name(LOOPBACK).up().build()).await?;
    let Some(config) = config else { return Ok(()) };
    if config.prefix > 32 {
        return Err(NetworkError::Prefix(config.prefix));
    }
    let card = card(Path::new(INTERFACES)).ok_or(NetworkError::NoCard)?;
    for address in [config.dns, config.host] {
        add_address(&handle, LOOPBACK, address, 32).await?;
    }
    let up = LinkUnspec::new_with_name(&card).mtu(u32::from(config.mtu)).up().build();
    change(&handle, &card, "switch on", up).await?;
    add_address(&handle, &card, config.address, config.prefix).await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(config.gateway).build();
    let added = handle.route().add(route).execute().await;
    added.map_err(|source| NetworkError::Request {
        what: "add the default route to",
        interface: card,
        source,
    })
}

async fn change(
    handle: &Handle,
    interface: &str,
    what: &'static str,
    message: LinkMessage,
) -> Result<(), NetworkError> {
    let changed = handle.link().change(message).execute().await;
    changed.map_err(|source| NetworkError::Request { what, interface: interface.to_owned(), source })
}

async fn add_address(
    handle: &Handle,
    interface: &str,
    address: Ipv4Addr,
    prefix: u8,
) -> Result<(), NetworkError> {
    let index =
        nix::net::if_::if_nametoindex(interface).map_err(|error| NetworkError::Netlink(error.into()))?;
    let added = handle.address().add(index, IpAddr::V4(address), prefix).replace().execute().await;
    added.map_err(|source| NetworkError::Request {
        what: "add an address to",
        interface: interface.to_owned(),
        source,
    })
}

/// The first interface, by name, that a device is behind; `lo` and tunnels have none.
fn card(folder: &Path) -> Option<String> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries
        .filter(|entry| entry.path().join("device").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .min()
}

/// The guest's name, and where it looks up others: all names are asked of the agent's forwarder.
///
/// # Errors
/// As writing the files fails.
pub(crate) fn set_names(config: &BootConfig) -> Result<(), InitError> {
    nix::unistd::sethostname(&config.hostname).map_err(InitError::at("set the hostname", HOSTNAME))?;
    let write =
        |path: &'static str, text: String| fs::write(path, text).map_err(InitError::at("write", path));
    write(HOSTNAME, format!("{}\n", config.hostname))?;
    write(HOSTS, hosts(&config.hostname))?;
    let server = config.network.map(|network| network.dns);
    resolv_conf::write(server, &SearchList::default()).map_err(InitError::at("write", resolv_conf::PATH))
}

fn hosts(hostname: &str) -> String {
    format!("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 {hostname}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_card_is_the_first_interface_with_a_device() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(card(dir.path()), None);
        for name in ["lo", "eth1", "eth0", "dummy0"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(card(dir.path()), None);
        for name in ["eth1", "eth0"] {
            std::fs::create_dir(dir.path().join(name).join("device")).unwrap();
        }
        assert_eq!(card(dir.path()).as_deref(), Some("eth0"));
    }
}
