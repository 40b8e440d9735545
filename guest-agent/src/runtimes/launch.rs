//! How a daemon is started: its command, environment and name among the children of PID 1.

use std::path::Path;
use std::pin::Pin;

use dhow_parent::{ParentError, ParentLink, Spawn, SpawnedChild};

use super::log::Log;
use super::manifest::DaemonSpec;
use super::store::Digest;

/// First part of the names of children that are daemons.
const PREFIX: &str = "daemon:";
/// Daemons go last when memory runs out. Their containers do not inherit it: dockerd gives each
/// process of a container the container's own value, 0 unless asked otherwise.
const OOM_SCORE_ADJ: i32 = -500;
/// After the bundle's own programs.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is on its way from [`Launch::spawn`].
pub type Spawning<'a> = Pin<Box<dyn Future<Output = Result<SpawnedChild, ParentError>> + Send + 'a>>;

/// Starts processes that outlive the worker. A trait, so that supervision can be tested without
/// PID 1.
pub trait Launch: Send + Sync {
    /// Starts one.
    fn spawn(&self, spawn: Spawn) -> Spawning<'_>;
}

impl Launch for ParentLink {
    fn spawn(&self, spawn: Spawn) -> Spawning<'_> {
        Box::pin(ParentLink::spawn(self, spawn))
    }
}

/// A daemon's name among the children of PID 1; a later worker knows it again by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildName {
    /// The bundle.
    pub bundle: String,
    /// The daemon.
    pub daemon: String,
    /// The image that it was started from.
    pub digest: Digest,
}

impl ChildName {
    /// The name of a child that is a daemon; `None` for any other.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(PREFIX)?.split(':');
        let (bundle, daemon, digest) = (parts.next()?, parts.next()?, parts.next()?);
        let digest = digest.parse().ok()?;
        parts.next().is_none().then(|| Self { bundle: bundle.to_owned(), daemon: daemon.to_owned(), digest })
    }
}

impl std::fmt::Display for ChildName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{PREFIX}{}:{}:{}", self.bundle, self.daemon, self.digest)
    }
}

/// The daemon's environment: what was given, and what it cannot be without.
#[must_use]
pub fn environment(bundle: &Path, given: &[(String, String)]) -> Vec<(String, String)> {
    let own = [
        ("PATH".to_owned(), format!("{}/bin:{SYSTEM_PATH}", bundle.display())),
        ("HOME".to_owned(), "/root".to_owned()),
        ("LANG".to_owned(), "C.UTF-8".to_owned()),
    ];
    let given = given.iter().filter(|(key, _)| own.iter().all(|(name, _)| name != key)).cloned();
    let given: Vec<_> = given.collect();
    own.into_iter().chain(given).collect()
}

/// What PID 1 is asked for: the daemon, its output in its log.
///
/// # Errors
/// When not even /dev/null can be opened.
pub fn request(
    name: &ChildName,
    spec: &DaemonSpec,
    environment: &[(String, String)],
    log: &Log,
) -> std::io::Result<Spawn> {
    let stdout = log.open()?;
    let stderr = stdout.try_clone()?;
    Ok(Spawn {
        name: name.to_string(),
        argv: spec.argv.clone(),
        env: environment.to_vec(),
        cwd: Some("/".to_owned()),
        stdout: Some(stdout.into()),
        stderr: Some(stderr.into()),
        oom_score_adj: Some(OOM_SCORE_ADJ),
        ..Spawn::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_name_comes_back() {
        let name = ChildName { bundle: "docker".into(), daemon: "dockerd".into(), digest: Digest([7; 32]) };
        assert_eq!(ChildName::parse(&name.to_string()), Some(name.clone()));
        for other in ["worker", "daemon:", "daemon:a:b", "daemon:a:b:c", &format!("{name}:d"), "exec:a:b:c"] {
            assert_eq!(ChildName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn the_path_begins_with_the_bundle_and_proxies_stay() {
        let given =
            [("http_proxy", "http://p"), ("PATH", "/evil")].map(|(key, value)| (key.into(), value.into()));
        let environment = environment(Path::new("/opt/dhow/docker"), &given);
        let value = |key: &str| {
            let mut values =
                environment.iter().filter(|(name, _)| name == key).map(|(_, value)| value.as_str());
            let value = values.next();
            assert_eq!(values.next(), None, "{key}");
            value
        };
        assert!(value("PATH").unwrap().starts_with("/opt/dhow/docker/bin:/usr/local/sbin:"));
        assert_eq!(value("http_proxy"), Some("http://p"));
        assert_eq!(value("HOME"), Some("/root"));
    }
}
