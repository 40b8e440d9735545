//! The guest's network: which card, which addresses, which proxies.

use std::net::Ipv4Addr;

use dhow_parent::SpawnedChild;
use dhow_protocol::boot::NetworkConfig;

use super::processes::{ProcessError, Processes};
use super::record::NetworkKind;
use crate::qemu::command::{Network, Reconnect};

/// The VM's own network. Each VM has its own card and its own passt, so VMs do not see each other.
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);
/// On the guest's `lo`, so that no packet leaves for it; not 127.*, which dockerd would not hand on.
const DNS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 53);
/// On `lo` as well: what `host.docker.internal` means.
const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 254);
/// Only for QEMU's own name server, which nobody asks.
const SLIRP_DNS: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 3);
const PREFIX: u8 = 24;
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
pub async fn bring_up(processes: &Processes<'_>, qemu: (u32, u32)) -> Result<Plan, ProcessError> {
    let guest =
        NetworkConfig { address: GUEST, prefix: PREFIX, gateway: GATEWAY, dns: DNS, host: HOST, mtu: MTU };
    let passt = start_passt(processes).await?;
    if passt.is_some() {
        let reconnect = Reconnect::of_version(qemu);
        let card = Network::Passt { socket: processes.paths.passt_socket(), reconnect };
        let kind = NetworkKind::Passt { reconnects: reconnect != Reconnect::Never };
        return Ok(Plan { card: Some(card), guest, kind, passt, notice: None });
    }
    let card = Network::Slirp {
        network: "192.168.127.0/24".to_owned(),
        gateway: GATEWAY.to_string(),
        dns: SLIRP_DNS.to_string(),
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
pub async fn start_passt(processes: &Processes<'_>) -> Result<Option<SpawnedChild>, ProcessError> {
    processes.passt(&passt_arguments()).await
}

/// passt(1): no inbound ports, no map of the gateway to the host's loopback, our addresses.
fn passt_arguments() -> Vec<String> {
    let address = GUEST.to_string();
    let gateway = GATEWAY.to_string();
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
        "--netmask",
        "255.255.255.0",
        "--no-dhcp",
        "--no-ndp",
        "--no-dhcpv6",
        "--no-ra",
        "--dns",
        "none",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend(["--address".to_owned(), address, "--gateway".to_owned(), gateway]);
    // As root passt becomes nobody, who cannot reach the socket's folder; it is still confined by
    // its own seccomp and namespaces.
    if rustix::process::geteuid().is_root() {
        arguments.extend(["--runas".to_owned(), "0:0".to_owned()]);
    }
    arguments
}
