//! resolv.conf(5) of the guest. dockerd takes its search list over into containers when they start.

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use dhow_protocol::control::SearchList;

/// Where resolvers look.
pub(crate) const PATH: &str = "/etc/resolv.conf";

/// Has the guest ask `server` (nobody without one) and complete names as `search` says.
///
/// # Errors
/// As writing files fails; the old settings hold then.
pub(crate) fn write(server: Option<Ipv4Addr>, search: &SearchList) -> io::Result<()> {
    replace(Path::new(PATH), &text(server, search))
}

fn text(server: Option<Ipv4Addr>, search: &SearchList) -> String {
    let mut text = server.map_or_else(String::new, |server| format!("nameserver {server}\n"));
    if !search.domains.is_empty() {
        text.extend(["search ", &search.domains.join(" "), "\n"]);
    }
    if let Some(ndots) = search.ndots {
        text.extend(["options ndots:", &ndots.to_string(), "\n"]);
    }
    text
}

/// Whoever reads meanwhile sees the old or the new text, whole. No fsync: `/etc` ends with the boot.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let replaced = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, path));
    if replaced.is_err() {
        // The error above is the one to tell.
        let _ = std::fs::remove_file(&new);
    }
    replaced
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_written() {
        let server = Some(Ipv4Addr::new(10, 0, 0, 53));
        let none = SearchList::default();
        assert_eq!(text(None, &none), "");
        assert_eq!(text(server, &none), "nameserver 10.0.0.53\n");
        let search = SearchList { domains: vec!["a.test".to_owned(), "b".to_owned()], ndots: Some(2) };
        assert_eq!(text(server, &search), "nameserver 10.0.0.53\nsearch a.test b\noptions ndots:2\n");
    }

    #[test]
    fn the_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        for text in ["one\n", "another\n"] {
            replace(&path, text).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
