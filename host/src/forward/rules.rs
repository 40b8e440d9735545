//! What a profile says of ports and sockets between host and guest. Pure.
//!
//! A rule for ports: `guest = "ADDRESS:PORTS"` and what becomes of it; the first one that fits a listener
//! decides. `docs/ports.md` is for people.

use std::net::IpAddr;
use std::path::PathBuf;

use bincode::{Decode, Encode};
use dhow_protocol::ports::{Listener, Protocol};

/// Ports from `first` to `last`; neither is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl PortRange {
    /// Every port.
    pub const ALL: Self = Self { first: 1, last: u16::MAX };

    /// Whether `port` is one of them.
    #[must_use]
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// How many there are.
    #[must_use]
    pub fn count(self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    /// "80" or "3000-3010"; "*" is every port.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::ALL);
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
        let (Some(first), Some(last)) = (port(first), port(last)) else {
            return Err(format!("{text:?} is neither a port (1 to 65535) nor a range of ports"));
        };
        if first > last {
            return Err(format!("the range {text:?} ends before it begins"));
        }
        Ok(Self { first, last })
    }
}

/// What becomes of a listener of the guest that a rule fits.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Action {
    /// It is left alone.
    Ignore,
    /// It is forwarded.
    Forward {
        /// The host's address; that of the loopback of the listener's family where absent.
        address: Option<IpAddr>,
        /// The host's port for the first port of the rule's range; the others follow it.
        first_port: u16,
        /// The host listens whether or not the guest does.
        always: bool,
    },
}

/// A rule for the guest's listening ports.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Rule {
    /// One protocol; both where absent.
    pub protocol: Option<Protocol>,
    /// The address that the guest's socket is bound to; any where absent.
    pub address: Option<IpAddr>,
    /// The guest's ports.
    pub ports: PortRange,
    /// What becomes of them.
    pub action: Action,
}

impl Rule {
    /// Whether it is about this listener.
    #[must_use]
    pub fn fits(&self, listener: &Listener) -> bool {
        self.protocol.is_none_or(|protocol| protocol == listener.protocol)
            && self.address.is_none_or(|address| means(address, listener.address))
            && self.ports.contains(listener.port)
    }

    /// Listeners that are forwarded whether or not they are there: of a static rule, over TCP where it
    /// names no protocol.
    pub fn statics(&self) -> impl Iterator<Item = Listener> + '_ {
        let always = matches!(self.action, Action::Forward { always: true, .. });
        let ports = if always { Some(self.ports.first..=self.ports.last) } else { None };
        ports.into_iter().flatten().map(|port| Listener {
            protocol: self.protocol.unwrap_or(Protocol::Tcp),
            address: self.address.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED.into()),
            port,
        })
    }
}

/// Whether a rule's address is that of a listener. A wildcard is either: docker's proxy listens on both.
fn means(rule: IpAddr, listener: IpAddr) -> bool {
    let (rule, listener) = (rule.to_canonical(), listener.to_canonical());
    rule == listener || rule.is_unspecified() && listener.is_unspecified()
}

/// Which side a rule's socket is listened at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Side {
    /// The host: its programs reach a socket of the guest.
    Host,
    /// The guest: its programs reach a socket of the host.
    Guest,
}

/// A unix socket that leads to the other side.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SocketRule {
    /// Where Dhow listens.
    pub listen: Side,
    /// The socket's path on the host, absolute.
    pub host: PathBuf,
    /// The socket's path in the guest, absolute.
    pub guest: String,
}

/// Everything that passes between host and guest by rule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Passages {
    /// For the guest's listeners; the first that fits decides.
    pub rules: Vec<Rule>,
    /// Unix sockets.
    pub sockets: Vec<SocketRule>,
    /// Ports of the host's loopback that the guest may reach, in order.
    pub host_ports: Vec<u16>,
}

/// "ADDRESS:PORTS", "ADDRESS" or "PORTS", as in a rule: `[::1]:80`, `127.0.0.1`, `3000-3010`.
///
/// # Errors
/// What is wrong, for a person.
pub fn parse_endpoint(text: &str) -> Result<(Option<IpAddr>, Option<PortRange>), String> {
    if let Ok(address) = text.parse() {
        return Ok((Some(address), None));
    }
    let Some((address, ports)) = text.rsplit_once(':') else {
        return Ok((None, Some(PortRange::parse(text)?)));
    };
    let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
    let address = bare.parse().map_err(|_| format!("{address:?} is no IP address"))?;
    Ok((Some(address), Some(PortRange::parse(ports)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rule(guest: &str) -> Rule {
        let (address, ports) = parse_endpoint(guest).unwrap();
        Rule { protocol: None, address, ports: ports.unwrap_or(PortRange::ALL), action: Action::Ignore }
    }

    fn listener(address: &str) -> Listener {
        let address: std::net::SocketAddr = address.parse().unwrap();
        Listener { protocol: Protocol::Tcp, address: address.ip(), port: address.port() }
    }

    #[test]
    fn what_is_written_is_what_is_meant() {
        for (text, address, ports) in [
            ("80", None, Some((80, 80))),
            ("3000-3010", None, Some((3000, 3010))),
            ("*", None, Some((1, 65_535))),
            ("127.0.0.1", Some("127.0.0.1"), None),
            ("::1", Some("::1"), None),
            ("[::1]:80", Some("::1"), Some((80, 80))),
            ("0.0.0.0:1-2", Some("0.0.0.0"), Some((1, 2))),
        ] {
            let expected = (
                address.map(|address| address.parse().unwrap()),
                ports.map(|(first, last)| PortRange { first, last }),
            );
            assert_eq!(parse_endpoint(text), Ok(expected), "{text}");
        }
        for text in ["", "0", "65536", "5-4", "1-", "-1", "x", "x:80", "[::1:80", "1.2.3.4:", "80,81"] {
            assert!(parse_endpoint(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_rule_fits_by_address_port_and_protocol() {
        assert!(rule("80").fits(&listener("0.0.0.0:80")));
        assert!(rule("127.0.0.1:*").fits(&listener("[::ffff:127.0.0.1]:9")));
        assert!(!rule("127.0.0.1:80").fits(&listener("0.0.0.0:80")));
        assert!(
            rule("0.0.0.0:80").fits(&listener("[::]:80")) && !rule("0.0.0.0:80").fits(&listener("[::1]:80"))
        );
        assert!(!rule("80-90").fits(&listener("0.0.0.0:91")));
        let udp = Rule { protocol: Some(Protocol::Udp), ..rule("80") };
        assert!(!udp.fits(&listener("0.0.0.0:80")));
    }

    #[test]
    fn a_static_rule_names_its_listeners() {
        let action = Action::Forward { address: None, first_port: 9000, always: true };
        let rule = Rule { action, ..rule("127.0.0.1:80-81") };
        let listeners: Vec<_> = rule.statics().collect();
        assert_eq!(listeners, [listener("127.0.0.1:80"), listener("127.0.0.1:81")]);
        assert!(listeners.iter().all(|listener| rule.fits(listener)));
        assert_eq!(super::tests::rule("80").statics().count(), 0);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "[0-9a-f:.\\[\\]*-]{0,30}") {
            if let Ok((_, Some(ports))) = parse_endpoint(&text) {
                prop_assert!(ports.first > 0 && ports.first <= ports.last);
            }
        }
    }
}
