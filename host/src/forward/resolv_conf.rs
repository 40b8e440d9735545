//! resolv.conf(5): which servers the host asks, and how it completes short names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use dhow_protocol::control::SearchList;

/// Where the host's resolver has its settings.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// MAXNS: further ones are not asked.
const MAX_SERVERS: usize = 3;
/// glibc took six until 2.26, and knows no limit since.
const MAX_DOMAINS: usize = 32;
/// Of a name (RFC 1035, 2.3.4), without the dot at its end.
const MAX_NAME: usize = 253;
/// Larger values count as this one.
const MAX_NDOTS: u32 = 15;

/// The name servers of a resolv.conf; that of this machine where it names none, as resolv.conf(5)
/// says.
pub(super) fn servers(text: &str) -> Vec<SocketAddr> {
    let mut servers: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next()? == "nameserver").then_some(words.next()?)
        })
        .filter_map(server)
        .take(MAX_SERVERS)
        .collect();
    if servers.is_empty() {
        servers.push((Ipv4Addr::LOCALHOST, 53).into());
    }
    servers
}

/// An address, for link-local IPv6 with its interface (`fe80::1%eth0`).
fn server(word: &str) -> Option<SocketAddr> {
    let Some((address, scope)) = word.split_once('%') else {
        return Some(SocketAddr::new(word.parse::<IpAddr>().ok()?, 53));
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let scope = scope.parse().ok().or_else(|| nix::net::if_::if_nametoindex(scope).ok())?;
    Some(SocketAddrV6::new(address, 53, 0, scope).into())
}

/// How the host completes names, by the text of its resolv.conf.
#[must_use]
pub fn search_list(text: &str) -> SearchList {
    search_list_of(text, &nix::unistd::gethostname().unwrap_or_default().to_string_lossy())
}

/// The last `search` or `domain` that names something holds; without any, the search list is what follows the
/// first dot of the host's name. A keyword must begin its line.
fn search_list_of(text: &str, hostname: &str) -> SearchList {
    let mut domains: Vec<&str> = hostname.split_once('.').map(|(_, domain)| domain).into_iter().collect();
    let mut ndots = None;
    for line in text.lines() {
        let Some((keyword, rest)) = line.split_once([' ', '\t']) else { continue };
        let mut words = rest.split_ascii_whitespace().peekable();
        match keyword {
            "search" if words.peek().is_some() => domains = words.collect(),
            // The older word, for one domain only.
            "domain" if words.peek().is_some() => domains = words.take(1).collect(),
            "options" => {
                let mut values = words.filter_map(|word| word.strip_prefix("ndots:")?.parse::<u32>().ok());
                ndots = values.next_back().map(|value| value.min(MAX_NDOTS)).or(ndots);
            }
            _ => {}
        }
    }
    let domains = domains.into_iter().map(|domain| domain.trim_end_matches('.'));
    SearchList {
        domains: domains.filter(|domain| is_name(domain)).take(MAX_DOMAINS).map(str::to_owned).collect(),
        ndots: ndots.and_then(|ndots| ndots.try_into().ok()),
    }
}

/// Whether `domain` is a name that can be looked up, and not `.`, with which systemd says that there is none.
fn is_name(domain: &str) -> bool {
    let sound = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=MAX_NAME).contains(&domain.len()) && domain.bytes().all(sound) && !domain.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_as_resolv_conf_says() {
        let text = "# x\nsearch a\nnameserver 10.0.0.1\n nameserver\t::1 \nnameserver bad\nnameserver fe80::1%1\nnameserver 10.0.0.4\n";
        let servers = super::servers(text);
        assert_eq!(servers[..2], ["10.0.0.1:53".parse().unwrap(), "[::1]:53".parse().unwrap()]);
        assert!(matches!(servers[2], SocketAddr::V6(server) if server.scope_id() == 1));
        assert_eq!(servers.len(), 3);
        assert_eq!(super::servers("options x\n"), ["127.0.0.1:53".parse().unwrap()]);
    }

    fn list(domains: &[&str], ndots: Option<u8>) -> SearchList {
        SearchList { domains: domains.iter().map(|&domain| domain.to_owned()).collect(), ndots }
    }

    #[test]
    fn search_as_resolv_conf_says() {
        let none = list(&[], None);
        assert_eq!(search_list_of("", "laptop"), none);
        assert_eq!(search_list_of("", "laptop.home.test"), list(&["home.test"], None));
        let text = "search a.test b.test.\n# search x\n; search y\noptions edns0 ndots:3 trust-ad\n";
        assert_eq!(search_list_of(text, "laptop.home.test"), list(&["a.test", "b.test"], Some(3)));
        assert_eq!(search_list_of("search a b\ndomain c d\n", ""), list(&["c"], None));
        assert_eq!(search_list_of("domain c\nsearch a b\n", ""), list(&["a", "b"], None));
        // What names nothing changes nothing, and what is indented is no keyword.
        let text = "search a\nsearch\ndomain \n search b\noptions ndots:2\noptions debug\n";
        assert_eq!(search_list_of(text, ""), list(&["a"], Some(2)));
        assert_eq!(search_list_of("options ndots:300\n", ""), list(&[], Some(15)));
        assert_eq!(search_list_of("search .\noptions ndots:99\n", "laptop.home.test"), list(&[], Some(15)));
    }

    #[test]
    fn what_is_no_name_is_left_out() {
        let long = "a".repeat(254);
        assert_eq!(
            search_list_of(&format!("search {long} a..b \u{e9} ok _x-y.z $(x)\n"), ""),
            list(&["ok", "_x-y.z"], None)
        );
        let many = "d ".repeat(100);
        assert_eq!(
            search_list_of(&format!("search {many}\noptions ndots:x ndots:-1\n"), "").domains.len(),
            MAX_DOMAINS
        );
    }
}
