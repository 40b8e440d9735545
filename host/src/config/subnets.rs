//! The networks of the VM and of docker's bridges: `subnet` and `docker-subnet`.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::ConfigError;

/// The VM's own network where the profile names none.
const VM: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 127, 0), 24);
/// docker's, likewise: its own default, and of its others the upper half of 172.16.0.0/12 in smaller pieces.
const DOCKER_BRIDGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(172, 17, 0, 1), 16);
const DOCKER_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(172, 24, 0, 0), 13);
/// Bits of each network that docker cuts from its pool by default, and from a profile's.
const DOCKER_SIZE: u8 = 20;
const CUSTOM_SIZE: u8 = 24;
/// Of the VM's network: it has room for addresses at its end.
const VM_PREFIX: u8 = 24;
/// A pool has several networks.
const POOL_PREFIXES: std::ops::RangeInclusive<u8> = 8..=22;

/// The networks of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnets {
    /// Between the VM and this host.
    pub vm: Ipv4Net,
    /// docker0, with its own address.
    pub bridge: Ipv4Net,
    /// What docker cuts other networks from.
    pub pool: Ipv4Net,
    /// Bits of each of them.
    pub pool_size: u8,
}

impl Default for Subnets {
    fn default() -> Self {
        Self { vm: VM, bridge: DOCKER_BRIDGE, pool: DOCKER_POOL, pool_size: DOCKER_SIZE }
    }
}

/// Checks what a profile says.
///
/// # Errors
/// [`ConfigError::Value`] for what is no network, or has no room.
pub(super) fn resolve(vm: Option<&str>, docker: Option<&str>) -> Result<Subnets, ConfigError> {
    let mut subnets = Subnets::default();
    if let Some(text) = vm {
        subnets.vm = parse("subnet", text)?;
        if subnets.vm.prefix_len() != VM_PREFIX {
            let problem = format!("{text:?} is no network of {VM_PREFIX} bits");
            return Err(bad("subnet", problem, "write one such as \"192.168.200.0/24\""));
        }
    }
    if let Some(text) = docker {
        const HINT: &str = "write one such as \"10.200.0.0/16\": docker's networks are cut from it";
        subnets.pool = parse("docker-subnet", text)?;
        if !POOL_PREFIXES.contains(&subnets.pool.prefix_len()) {
            let problem = format!("{text:?} has not between 8 and 22 bits");
            return Err(bad("docker-subnet", problem, HINT));
        }
        subnets.pool_size = CUSTOM_SIZE;
        let first = Ipv4Addr::from(u32::from(subnets.pool.network()) + 1);
        subnets.bridge = Ipv4Net::new_assert(first, CUSTOM_SIZE);
    }
    let overlap = |one: &Ipv4Net, other: &Ipv4Net| one.contains(other) || other.contains(one);
    if overlap(&subnets.vm, &subnets.pool) || overlap(&subnets.vm, &subnets.bridge.trunc()) {
        let problem = format!("{} of the VM and {} of docker overlap", subnets.vm, subnets.pool);
        return Err(bad("subnet", problem, "choose networks that are apart"));
    }
    Ok(subnets)
}

fn parse(setting: &'static str, text: &str) -> Result<Ipv4Net, ConfigError> {
    let usable = |net: &Ipv4Net| {
        let address = net.addr();
        !(address.is_loopback()
            || address.is_multicast()
            || address.is_unspecified()
            || address.octets()[0] >= 240)
    };
    let net = text.parse::<Ipv4Net>().ok().filter(|net| net.addr() == net.network() && usable(net));
    let hint = "write ADDRESS/BITS, the address being the network's first";
    net.ok_or_else(|| bad(setting, format!("{text:?} is no IPv4 network that can be used"), hint))
}

fn bad(setting: &'static str, problem: String, hint: &str) -> ConfigError {
    ConfigError::Value { setting, problem, hint: hint.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_as_written() {
        assert_eq!(resolve(None, None).unwrap(), Subnets::default());
        let subnets = resolve(Some("10.9.8.0/24"), Some("10.200.0.0/16")).unwrap();
        assert_eq!(subnets.vm.to_string(), "10.9.8.0/24");
        assert_eq!(subnets.bridge.to_string(), "10.200.0.1/24");
        assert_eq!((subnets.pool.to_string(), subnets.pool_size), ("10.200.0.0/16".to_owned(), 24));
    }

    #[test]
    fn what_is_no_network_is_told() {
        for (vm, docker) in [
            (Some("10.9.8.1/24"), None),
            (Some("10.9.8.0/25"), None),
            (Some("10.9.8.0"), None),
            (Some("fd00::/64"), None),
            (None, Some("10.0.0.0/24")),
            (None, Some("10.0.0.0/7")),
            (Some("172.17.5.0/24"), None),
            (Some("172.24.5.0/24"), None),
            (Some("127.0.0.0/24"), None),
            (Some("224.0.0.0/24"), None),
            (Some("0.0.0.0/24"), None),
            (None, Some("192.168.0.0/16")),
        ] {
            assert!(resolve(vm, docker).unwrap_err().hint().is_some(), "{vm:?} {docker:?}");
        }
    }
}
