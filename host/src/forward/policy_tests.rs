//! Decisions, with and without rules.

use super::*;
use crate::forward::rules::{PortRange, parse_endpoint};
use proptest::prelude::*;

fn policy() -> Policy {
    Policy { first_port: 1024, limit: 4, denied: vec![22, 5000], rules: Vec::new() }
}

fn ruled(rules: Vec<Rule>) -> Policy {
    Policy { limit: 100, rules, ..policy() }
}

fn rule(guest: &str, action: Action) -> Rule {
    let (address, ports) = parse_endpoint(guest).unwrap();
    Rule { protocol: None, address, ports: ports.unwrap_or(PortRange::ALL), action }
}

fn to(address: Option<&str>, first_port: u16) -> Action {
    let address = address.map(|address| address.parse().unwrap());
    Action::Forward { address, first_port, always: false }
}

fn listener(address: &str) -> Listener {
    let address: SocketAddr = address.parse().unwrap();
    Listener { protocol: Protocol::Tcp, address: address.ip(), port: address.port() }
}

fn end(address: &str) -> HostEnd {
    HostEnd { protocol: Protocol::Tcp, address: address.parse().unwrap() }
}

fn bound(addresses: &[&str]) -> Decision {
    Decision::Bind(addresses.iter().map(|address| end(address)).collect())
}

#[test]
fn whatever_the_guest_binds_the_host_binds_its_loopback() {
    let none = BTreeMap::new();
    for (guest, host) in [
        ("0.0.0.0:8080", &["127.0.0.1:8080"][..]),
        ("127.0.0.1:8080", &["127.0.0.1:8080"]),
        ("127.0.0.2:8080", &["127.0.0.1:8080"]),
        ("10.1.2.3:8080", &["127.0.0.1:8080"]),
        ("[::]:8080", &["127.0.0.1:8080", "[::1]:8080"]),
        ("[::1]:8080", &["[::1]:8080"]),
        ("[::ffff:1.2.3.4]:8080", &["127.0.0.1:8080"]),
    ] {
        assert_eq!(policy().decide(&listener(guest), &none), bound(host), "{guest}");
    }
}

#[test]
fn both_wildcards_share_a_port_and_udp_has_its_own() {
    let (v4, v6) = (listener("0.0.0.0:8080"), listener("[::]:8080"));
    let taken = BTreeMap::from([(end("127.0.0.1:8080"), v4)]);
    assert_eq!(policy().decide(&v6, &taken), bound(&["[::1]:8080"]));
    assert_eq!(policy().decide(&v4, &taken), bound(&[]));
    assert!(matches!(policy().decide(&listener("10.0.0.1:8080"), &taken), Decision::Wait(why)
        if why == "port 8080 leads to 127.0.0.1:8080 of the guest already"));
    let udp = Listener { protocol: Protocol::Udp, ..v4 };
    let udp_end = HostEnd { protocol: Protocol::Udp, ..end("127.0.0.1:8080") };
    assert_eq!(policy().decide(&udp, &taken), Decision::Bind(vec![udp_end]));
}

#[test]
fn refusals_say_why() {
    let none = BTreeMap::new();
    for (guest, part) in [
        ("0.0.0.0:80", "ip_unprivileged_port_start"),
        ("0.0.0.0:22", "only where a rule"),
        ("0.0.0.0:5000", "only where a rule"),
        ("0.0.0.0:0", "no port"),
    ] {
        let Decision::Refuse(why) = policy().decide(&listener(guest), &none) else { panic!("{guest}") };
        assert!(why.contains(part), "{why}");
    }
    let root = Policy { first_port: 0, ..policy() };
    assert_eq!(root.decide(&listener("0.0.0.0:80"), &none), bound(&["127.0.0.1:80"]));
}

#[test]
fn the_first_rule_that_fits_decides() {
    let none = BTreeMap::new();
    let policy = ruled(vec![
        rule("127.0.0.1:8080", Action::Ignore),
        rule("8080-8090", to(None, 9080)),
        rule("*", to(Some("0.0.0.0"), 1)),
    ]);
    assert!(matches!(policy.decide(&listener("127.0.0.1:8080"), &none), Decision::Refuse(why)
        if why.contains("ignores")));
    assert_eq!(policy.decide(&listener("0.0.0.0:8080"), &none), bound(&["127.0.0.1:9080"]));
    assert_eq!(policy.decide(&listener("[::]:8085"), &none), bound(&["127.0.0.1:9085", "[::1]:9085"]));
    assert_eq!(policy.decide(&listener("10.0.0.1:7000"), &none), bound(&["0.0.0.0:7000"]));
    // What is denied by default, a rule allows; what the kernel refuses, no rule does.
    assert_eq!(
        ruled(vec![rule("22", to(None, 2222))]).decide(&listener("0.0.0.0:22"), &none),
        bound(&["127.0.0.1:2222"])
    );
    assert!(matches!(policy.decide(&listener("0.0.0.0:80"), &none), Decision::Refuse(_)));
    let beyond = ruled(vec![rule("100-65535", to(None, 60_000))]);
    assert!(matches!(beyond.decide(&listener("0.0.0.0:60000"), &none), Decision::Refuse(_)));
}

#[test]
fn a_wildcard_of_the_host_leaves_the_loopback_to_nobody_else() {
    let policy = ruled(vec![rule("0.0.0.0:8080", to(Some("0.0.0.0"), 8080))]);
    let (v4, v6) = (listener("0.0.0.0:8080"), listener("[::]:8080"));
    let taken = BTreeMap::from([(end("0.0.0.0:8080"), v4)]);
    assert!(matches!(policy.decide(&v6, &taken), Decision::Wait(why) if why.contains("leads to")));
    assert!(matches!(policy.decide(&listener("127.0.0.1:8080"), &taken), Decision::Wait(_)));
    assert_eq!(policy.decide(&listener("[::1]:8080"), &taken), bound(&["[::1]:8080"]));
}

#[test]
fn endpoints_are_reachable_in_the_guest() {
    for (guest, target) in [
        ("0.0.0.0:1", "127.0.0.1:1"),
        ("[::]:1", "[::1]:1"),
        ("10.0.0.1:1", "10.0.0.1:1"),
        ("[::ffff:10.0.0.1]:1", "10.0.0.1:1"),
    ] {
        assert_eq!(endpoint(&listener(guest)), target.parse().unwrap());
    }
}

proptest! {
    #[test]
    fn only_loopback_never_twice_never_too_many(
        guests in proptest::collection::vec((any::<IpAddr>(), any::<u16>(), any::<bool>()), 0..40)
    ) {
        let (policy, mut taken) = (policy(), BTreeMap::new());
        for (address, port, udp) in guests {
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let guest = Listener { protocol, address, port };
            if let Decision::Bind(ends) = policy.decide(&guest, &taken) {
                prop_assert!(!ends.is_empty() || taken.values().any(|own| *own == guest));
                for end in ends {
                    prop_assert!(end.address.ip().is_loopback());
                    prop_assert_eq!((end.address.port(), end.protocol), (port, protocol));
                    prop_assert!(port >= 1024 && port != 5000);
                    prop_assert!(taken.insert(end, guest).is_none());
                }
            }
        }
        prop_assert!(taken.len() <= policy.limit);
    }
}
