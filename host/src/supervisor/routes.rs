//! Whether the VM's networks hide a network that this host reaches: a VPN's, mostly.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::config::Subnets;

/// Shorter prefixes are default routes, or halves of one, as VPNs set them.
const SHORTEST: u8 = 8;

/// A route of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Route {
    interface: String,
    network: Ipv4Net,
}

/// What a person should know of the networks, one sentence for each that is hidden.
pub fn conflicts(subnets: &Subnets) -> Vec<String> {
    conflicts_in(&std::fs::read_to_string("/proc/net/route").unwrap_or_default(), subnets)
}

fn conflicts_in(table: &str, subnets: &Subnets) -> Vec<String> {
    let overlap = |one: &Ipv4Net, other: &Ipv4Net| one.contains(other) || other.contains(one);
    let networks = [
        ("the VM's network", "subnet", subnets.vm),
        ("docker's bridge", "docker-subnet", subnets.bridge.trunc()),
        ("what docker's networks are cut from,", "docker-subnet", subnets.pool),
    ];
    let mut told = Vec::new();
    for Route { interface, network } in parse(table) {
        for (what, setting, ours) in &networks {
            // A docker of the host has the same default: who has two of them knows.
            let is_docker = interface.starts_with("docker") || interface.starts_with("br-");
            if overlap(ours, &network) && !is_docker {
                told.push(format!(
                    "{what} {ours} overlaps with {network}, which this host reaches over {interface}: the VM \
                     does not reach it there; choose another `{setting}` in the profile"
                ));
            }
        }
    }
    told
}

/// The main table, without default routes (proc_net(5): addresses are hexadecimal, in the host's byte order).
fn parse(table: &str) -> Vec<Route> {
    let address = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::swap_bytes).map(Ipv4Addr::from);
    let route = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (destination, mask) = (address(fields.get(1)?)?, address(fields.get(7)?)?);
        let network = Ipv4Net::with_netmask(destination, mask).ok()?;
        (network.prefix_len() >= SHORTEST).then(|| Route { interface: (*fields[0]).to_owned(), network })
    };
    table.lines().skip(1).filter_map(route).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n\
        eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0\n\
        eth0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n\
        tun0 0000A8C0 00000000 0001 0 0 0 0000FFFF 0 0 0\n\
        tun1 00000080 00000000 0001 0 0 0 00000080 0 0 0\n\
        docker0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0\n\
        nonsense\n";

    #[test]
    fn a_vpn_that_would_be_hidden_is_told() {
        let told = conflicts_in(TABLE, &Subnets::default());
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].contains("192.168.0.0/16") && told[0].contains("tun0") && told[0].contains("`subnet`")
        );
        let other = Subnets { vm: "10.9.8.0/24".parse().unwrap(), ..Subnets::default() };
        assert_eq!(conflicts_in(TABLE, &other), Vec::<String>::new());
        let docker = Subnets { bridge: "192.168.9.1/24".parse().unwrap(), ..other };
        assert!(conflicts_in(TABLE, &docker)[0].contains("`docker-subnet`"));
    }
}
