//! What the file says of ports and sockets, checked: `[[forward]]`, `[[socket]]` and `host-ports`.

use std::path::{Path, PathBuf};

use dhow_protocol::ports::Protocol;

use super::ConfigError;
use super::file::{RawForward, RawSocket};
use crate::forward::rules::{Action, Passages, PortRange, Rule, Side, SocketRule, parse_endpoint};

/// Static forwards of one rule, and ports of the host that the guest may reach, at the most.
const PORTS_MAX: usize = 256;
/// Longest path of a unix socket: `sun_path` and its NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// Checks everything; `home` replaces a leading `~` of paths on the host.
///
/// # Errors
/// [`ConfigError::Value`] with the first mistake.
pub(super) fn resolve(
    forwards: &[RawForward],
    sockets: &[RawSocket],
    host_ports: &[String],
    home: Option<&Path>,
) -> Result<Passages, ConfigError> {
    let mut guests: Vec<_> =
        sockets.iter().filter_map(|raw| raw.guest.as_ref().zip(raw.listen.as_ref())).collect();
    let count = guests.len();
    guests.sort();
    guests.dedup();
    if guests.len() < count {
        return Err(bad("socket", "two sockets have one path in the guest", "give each its own"));
    }
    Ok(Passages {
        rules: forwards.iter().map(rule).collect::<Result<_, _>>()?,
        sockets: sockets.iter().map(|raw| socket(raw, home)).collect::<Result<_, _>>()?,
        host_ports: ports(host_ports)?,
    })
}

fn bad(setting: &'static str, problem: impl Into<String>, hint: &str) -> ConfigError {
    ConfigError::Value { setting, problem: problem.into(), hint: hint.to_owned() }
}

fn rule(raw: &RawForward) -> Result<Rule, ConfigError> {
    const SETTING: &str = "forward";
    const ENDPOINT: &str =
        "write \"8080\", \"3000-3010\", \"127.0.0.1:8080\", \"[::1]:80\" or an address alone";
    let Some(guest) = &raw.guest else {
        return Err(bad(SETTING, "a rule has no `guest`", "name the guest's port: guest = \"8080\""));
    };
    let endpoint = |text: &str| parse_endpoint(text).map_err(|problem| bad(SETTING, problem, ENDPOINT));
    let (address, given) = endpoint(guest)?;
    let ports = given.unwrap_or(PortRange::ALL);
    let protocol = match raw.protocol.as_deref() {
        None => None,
        Some("tcp") => Some(Protocol::Tcp),
        Some("udp") => Some(Protocol::Udp),
        Some(other) => {
            let hint = "write \"tcp\" or \"udp\", or leave it out for both";
            return Err(bad(SETTING, format!("{other:?} is no protocol that is forwarded"), hint));
        }
    };
    if raw.ignore {
        if raw.host.is_some() || raw.always {
            let problem = format!("the rule for {guest} ignores it and says more");
            return Err(bad(SETTING, problem, "leave `host` and `static` out, or `ignore`"));
        }
        return Ok(Rule { protocol, address, ports, action: Action::Ignore });
    }
    let (host_address, host_ports) = raw.host.as_deref().map_or(Ok((None, None)), endpoint)?;
    let host_ports = host_ports.unwrap_or(ports);
    if host_ports.count() != ports.count() {
        let problem = format!(
            "the rule for {guest} has {} ports in the guest and {} on the host",
            ports.count(),
            host_ports.count()
        );
        return Err(bad(SETTING, problem, "make both ranges of one length"));
    }
    if raw.always && (given.is_none() || ports.count() > PORTS_MAX) {
        let problem = format!("the static rule for {guest} is for more than {PORTS_MAX} ports");
        return Err(bad(SETTING, problem, "name the ports that must be there before the guest listens"));
    }
    let action = Action::Forward { address: host_address, first_port: host_ports.first, always: raw.always };
    Ok(Rule { protocol, address, ports, action })
}

fn socket(raw: &RawSocket, home: Option<&Path>) -> Result<SocketRule, ConfigError> {
    const SETTING: &str = "socket";
    let listen = match raw.listen.as_deref() {
        Some("host") => Side::Host,
        Some("guest") => Side::Guest,
        _ => {
            let hint = "write listen = \"host\" where the server is in the guest, \"guest\" where it is here";
            return Err(bad(SETTING, "a socket does not say where Dhow listens", hint));
        }
    };
    let (Some(host), Some(guest)) = (&raw.host, &raw.guest) else {
        return Err(bad(SETTING, "a socket has no path on one of the sides", "give it `host` and `guest`"));
    };
    let path: PathBuf = match (Path::new(host).strip_prefix("~"), home) {
        (Ok(below), Some(home)) => home.join(below),
        _ => host.into(),
    };
    for (path, shown) in [(path.as_path(), host), (Path::new(guest), guest)] {
        if !path.is_absolute() || shown.contains('\0') {
            return Err(bad(SETTING, format!("{shown:?} is no absolute path"), "begin it with a slash"));
        }
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            let problem = format!("{shown:?} is longer than the {SOCKET_PATH_MAX} bytes of a socket's path");
            return Err(bad(SETTING, problem, "choose a shorter path"));
        }
    }
    Ok(SocketRule { listen, host: path, guest: guest.clone() })
}

fn ports(raw: &[String]) -> Result<Vec<u16>, ConfigError> {
    const SETTING: &str = "host-ports";
    let mut ports = std::collections::BTreeSet::new();
    for text in raw {
        let range = PortRange::parse(text)
            .map_err(|problem| bad(SETTING, problem, "write ports and ranges: [5432, \"8000-8010\"]"))?;
        ports.extend((range.first..=range.last).take(PORTS_MAX + 1));
        if ports.len() > PORTS_MAX {
            let problem = format!("more than {PORTS_MAX} ports of the host are opened to the guest");
            return Err(bad(SETTING, problem, "name those that the guest needs"));
        }
    }
    Ok(ports.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(guest: &str, host: Option<&str>) -> RawForward {
        RawForward { guest: Some(guest.into()), host: host.map(Into::into), ..RawForward::default() }
    }

    fn raw_socket(listen: &str, host: &str, guest: &str) -> RawSocket {
        RawSocket { listen: Some(listen.into()), host: Some(host.into()), guest: Some(guest.into()) }
    }

    #[test]
    fn rules_keep_their_order_and_their_meaning() {
        let forwards = [
            RawForward { ignore: true, ..forward("127.0.0.1", None) },
            RawForward { protocol: Some("udp".into()), ..forward("53", Some("0.0.0.0:5353")) },
            RawForward { always: true, ..forward("3000-3010", Some("4000-4010")) },
            forward("*", None),
        ];
        let rules = resolve(&forwards, &[], &[], None).unwrap().rules;
        assert_eq!(rules[0].action, Action::Ignore);
        assert_eq!((rules[0].ports, rules[1].protocol), (PortRange::ALL, Some(Protocol::Udp)));
        let address = Some([0, 0, 0, 0].into());
        assert_eq!(rules[1].action, Action::Forward { address, first_port: 5353, always: false });
        assert_eq!(rules[2].action, Action::Forward { address: None, first_port: 4000, always: true });
        assert_eq!(rules[3].action, Action::Forward { address: None, first_port: 1, always: false });
    }

    #[test]
    fn mistakes_in_rules_are_told() {
        for (raw, part) in [
            (RawForward::default(), "no `guest`"),
            (forward("x", None), "neither a port"),
            (forward("80", Some("host:80")), "no IP address"),
            (forward("80-90", Some("80")), "11 ports in the guest and 1 on the host"),
            (RawForward { protocol: Some("sctp".into()), ..forward("80", None) }, "no protocol"),
            (RawForward { ignore: true, ..forward("80", Some("81")) }, "says more"),
            (RawForward { always: true, ..forward("127.0.0.1", None) }, "more than 256"),
        ] {
            let error = resolve(&[raw], &[], &[], None).unwrap_err();
            assert!(error.to_string().contains(part) && error.hint().is_some(), "{error}");
        }
    }

    #[test]
    fn sockets_have_absolute_paths() {
        let home = Path::new("/home/me");
        let good = raw_socket("guest", "~/agent", "/run/agent");
        let rule = SocketRule { listen: Side::Guest, host: home.join("agent"), guest: "/run/agent".into() };
        assert_eq!(resolve(&[], &[good], &[], Some(home)).unwrap().sockets, [rule]);
        for raw in [
            RawSocket::default(),
            raw_socket("both", "/a", "/b"),
            raw_socket("host", "a", "/b"),
            raw_socket("host", "/a", "b"),
            raw_socket("host", "/a", &"/b".repeat(60)),
            RawSocket { guest: None, ..raw_socket("host", "/a", "/b") },
        ] {
            assert!(resolve(&[], &[raw], &[], Some(home)).unwrap_err().hint().is_some());
        }
    }

    #[test]
    fn ports_of_the_host_are_few() {
        let ports = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
            resolve(&[], &[], &texts, None).map(|passages| passages.host_ports)
        };
        assert_eq!(ports(&["8002", "8000-8002", "5432"]).unwrap(), [5432, 8000, 8001, 8002]);
        assert!(ports(&["*"]).is_err() && ports(&["0"]).is_err() && ports(&["1-300"]).is_err());
    }
}
