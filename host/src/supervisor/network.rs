//! The guest's network: which card, which addresses, which proxies.

use std::net::Ipv4Addr;

use dhow_parent::SpawnedChild;
use dhow_protocol::boot::NetworkConfig;
use ipnet::Ipv4Net;

use super::processes::{ProcessError, Processes};
use super::record::NetworkKind;
use crate::config::Subnets;
use crate::qemu::command::{Network, Reconnect};

/// Hosts of the VM's own network. Each VM has its own card and its own passt, so VMs do not see each other.
const GATEWAY: u32 = 1;
const GUEST: u32 = 2;
/// Only for QEMU's own name server, which nobody asks.
const SLIRP_DNS: u32 = 3;
/// On the guest's `lo`, so that no packet leaves for it; not 127.*, which dockerd would not hand on.
const DNS: u32 = 53;
/// On `lo` as well: what `host.docker.internal` means.
const HOST: u32 = 254;
/// Ethernet's: what passt and slirp take without further settings.
const MTU: u16 = 1500;

/// Variables of the host that tell programs which proxy to use.
const PROXY_VARIABLES: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "FTP_PROXY",
    "NO_PROXY",
];

/// A network that is up on the host's side.
pub struct Plan {
    /// QEMU's side of the card.
    pub card: Option<Network>,
    /// The guest's side.
    pub guest: NetworkConfig,
    /// What a successor must know of it.
    pub kind: NetworkKind,
    /// passt, where it is the way.
    pub passt: Option<SpawnedChild>,
    /// What a person should know.
    pub notice: Option<String>,
}

impl Plan {
    /// The guest's environment: the host's proxies, then the profile's own.
    pub fn environment(&self, own: &[(String, String)]) -> Vec<(String, String)> {
        let proxies = PROXY_VARIABLES
            .iter()
            .filter_map(|name| {
                Some(((*name).to_owned(), std::env::var(name).ok().filter(|value| !value.is_empty())?))
            })
            .filter(|(name, _)| own.iter().all(|(mine, _)| mine != name));
        proxies.chain(own.iter().cloned()).collect()
    }
}

/// Starts passt, or falls back to QEMU's own network; `qemu` is its version.
///
/// # Errors
/// When passt is there and does not come up.
pub async fn bring_up(
    processes: &Processes<'_>,
    qemu: (u32, u32),
    subnets: &Subnets,
) -> Result<Plan, ProcessError> {
    let net = subnets.vm;
    let guest = NetworkConfig {
        address: at(net, GUEST),
        prefix: net.prefix_len(),
        gateway: at(net, GATEWAY),
        dns: at(net, DNS),
        host: at(net, HOST),
        bridge: (subnets.bridge.addr(), subnets.bridge.prefix_len()),
        pool: (subnets.pool.network(), subnets.pool.prefix_len(), subnets.pool_size),
        mtu: MTU,
    };
    let passt = start_passt(processes, net).await?;
    if passt.is_some() {
        let reconnect = Reconnect::of_version(qemu);
        let card = Network::Passt { socket: processes.paths.passt_socket(), reconnect };
        let kind = NetworkKind::Passt { reconnects: reconnect != Reconnect::Never };
        return Ok(Plan { card: Some(card), guest, kind, passt, notice: None });
    }
    let card = Network::Slirp {
        network: net.to_string(),
        gateway: at(net, GATEWAY).to_string(),
        dns: at(net, SLIRP_DNS).to_string(),
    };
    let notice = "passt is not installed: the VM uses QEMU's own network, through which it reaches every \
                  service on this host's loopback; install passt to close that"
        .to_owned();
    Ok(Plan { card: Some(card), guest, kind: NetworkKind::Slirp, passt, notice: Some(notice) })
}

/// Starts passt, where it is installed. QEMU connects to it.
///
/// # Errors
/// When it does not come up.
pub async fn start_passt(
    processes: &Processes<'_>,
    net: Ipv4Net,
) -> Result<Option<SpawnedChild>, ProcessError> {
    processes.passt(&passt_arguments(net)).await
}

/// A host of a network.
fn at(net: Ipv4Net, host: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(net.network()) + host)
}

/// passt(1): no inbound ports, no map of the gateway to the host's loopback, our addresses.
fn passt_arguments(net: Ipv4Net) -> Vec<String> {
    let address = at(net, GUEST).to_string();
    let gateway = at(net, GATEWAY).to_string();
    let netmask = net.netmask().to_string();
    let mut arguments: Vec<String> = [
        "--foreground",
        "--quiet",
        // It ends with QEMU, also where nobody is left to end it.
        "--one-off",
        "--no-map-gw",
        "--ipv4-only",
        "--tcp-ports",
        "none",
        "--udp-ports",
        "none",
        "--no-dhcp",
        "--no-ndp",
        "--no-dhcpv6",
        "--no-ra",
        "--dns",
        "none",
    ]
    .map(str::to_owned)
    .to_vec();
    for (option, value) in [("--netmask", netmask), ("--address", address), ("--gateway", gateway)] {
        arguments.extend([option.to_owned(), value]);
    }
    // As root passt becomes nobody, who cannot reach the socket's folder; it is still confined by
    // its own seccomp and namespaces.
    if rustix::process::geteuid().is_root() {
        arguments.extend(["--runas".to_owned(), "0:0".to_owned()]);
    }
    arguments
}
