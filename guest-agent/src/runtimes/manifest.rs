//! `bundle.toml`: what a bundle says of itself and of its daemons. Parsing and checks, no I/O.
//!
//! ```text
//! name = "docker"            a folder's name: [a-z0-9-]{1,32}
//! version = "26.1.5"         for people
//! base = "trixie"            release of the base that its programs are linked against
//! left_behind = ["…-shim"]   file names of programs that outlive their daemon by intent
//!
//! [[daemon]]                 in the order of their start
//! name = "dockerd"
//! argv = ["{bundle}/bin/dockerd", "--config-file", "{config}"]
//! ready_socket = "/run/docker.sock"    ready when it takes a connection …
//! ready_path = "/_ping"                … and answers a GET of this with 200
//! config = "{bundle}/etc/daemon.json"  copied to {config} before each start
//! end_config = "{bundle}/etc/end.json" copied there before the runtime is stopped, then SIGHUP;
//! end_path = "/info"                   SIGTERM when the answer to a GET of this …
//! end_text = "\"LiveRestore…\":false"  … has this text in it
//! ```
//! `{bundle}` is the folder where the bundle is seen, `{config}` the daemon's own settings file; of the VM's network
//! there are `{host}`, the address of the host's services, `{bridge}` and `{pool}` for docker's networks.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Longest name of a bundle or a daemon, in bytes.
const NAME_LIMIT: usize = 32;
/// Longest version, in bytes.
const VERSION_LIMIT: usize = 64;
/// Most daemons of a bundle, and most strings in one list.
const LIST_LIMIT: usize = 64;
/// Longest string of any other key, in bytes.
const STRING_LIMIT: usize = 4096;
/// Longest path of a unix socket, in bytes: `sun_path` of unix(7) without its final NUL.
const SOCKET_LIMIT: usize = 107;

/// Why a `bundle.toml` is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not the TOML that is expected.
    #[error("bundle.toml is not what this version of Dhow expects")]
    Syntax(#[source] toml::de::Error),
    /// A value that is out of bounds.
    #[error("{key} in bundle.toml {fault}")]
    Value {
        /// The key, and of which daemon.
        key: String,
        /// What is wrong with it.
        fault: &'static str,
    },
}

/// What stands in a command line for something of this VM, by name.
pub type Variables = Vec<(&'static str, String)>;

/// What a bundle is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its name.
    pub name: String,
    /// For people.
    pub version: String,
    /// Release of the base it was made for.
    pub base: String,
    /// File names of programs that outlive their daemons, and end with the runtime.
    pub left_behind: Vec<String>,
    /// In the order of their start.
    pub daemons: Vec<DaemonSpec>,
}

/// A daemon, with all paths filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSpec {
    /// Its name, unique in all bundles that run together.
    pub name: String,
    /// Absolute path of the program, and arguments.
    pub argv: Vec<String>,
    /// When it is ready; at once where absent.
    pub ready: Option<Readiness>,
    /// Its settings file.
    pub config: Option<Config>,
}

/// How a daemon shows that it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Takes a connection.
    pub socket: PathBuf,
    /// Answers a GET of this with 200.
    pub path: Option<String>,
}

/// A daemon's settings file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the daemon reads it.
    pub file: PathBuf,
    /// Its content, in the bundle.
    pub source: PathBuf,
    /// Other settings, taken before the runtime is stopped.
    pub end: Option<EndConfig>,
}

/// Settings with which a daemon ends what it would otherwise leave running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndConfig {
    /// Their content, in the bundle.
    pub source: PathBuf,
    /// The daemon has taken them when a GET of this …
    pub path: String,
    /// … has this in its answer.
    pub text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManifest {
    name: String,
    version: String,
    base: String,
    #[serde(default)]
    left_behind: Vec<String>,
    daemon: Vec<RawDaemon>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDaemon {
    name: String,
    argv: Vec<String>,
    ready_socket: Option<String>,
    ready_path: Option<String>,
    config: Option<String>,
    end_config: Option<String>,
    end_path: Option<String>,
    end_text: Option<String>,
}

/// Whether `name` can be that of a bundle or a daemon: `[a-z0-9-]{1,32}`.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=NAME_LIMIT).contains(&name.len()) && name.bytes().all(plain)
}

/// Whether `version` can be shown as it is.
#[must_use]
pub fn is_version(version: &str) -> bool {
    (1..=VERSION_LIMIT).contains(&version.len()) && version.bytes().all(|byte| byte.is_ascii_graphic())
}

impl Manifest {
    /// Reads `text`; `bundle` is the folder where the bundle is seen, `configs` where the daemons'
    /// settings files are put, `variables` what else `{NAME}` stands for.
    ///
    /// # Errors
    /// As [`ManifestError`] says.
    pub fn parse(
        text: &str,
        bundle: &Path,
        configs: &Path,
        variables: &Variables,
    ) -> Result<Self, ManifestError> {
        let raw: RawManifest = toml::from_str(text).map_err(ManifestError::Syntax)?;
        check("name", is_name(&raw.name), "is not one of a-z, 0-9 and -, at most 32 of them")?;
        check("version", is_version(&raw.version), "is not 1 to 64 visible ASCII characters")?;
        check("base", is_name(&raw.base), "is not the name of a release")?;
        let count = raw.daemon.len();
        check("daemon", (1..=LIST_LIMIT).contains(&count), "is there less than once or too often")?;
        let file_name = |name: &String| !name.is_empty() && !name.contains('/') && name.len() <= STRING_LIMIT;
        let fits = raw.left_behind.len() <= LIST_LIMIT && raw.left_behind.iter().all(file_name);
        check("left_behind", fits, "has something else than file names")?;
        let daemons = raw
            .daemon
            .into_iter()
            .map(|daemon| daemon.resolve(bundle, configs, variables))
            .collect::<Result<Vec<_>, _>>()?;
        let names: HashSet<_> = daemons.iter().map(|daemon| daemon.name.as_str()).collect();
        check("daemon", names.len() == daemons.len(), "is there twice under one name")?;
        Ok(Self {
            name: raw.name,
            version: raw.version,
            base: raw.base,
            left_behind: raw.left_behind,
            daemons,
        })
    }
}

impl RawDaemon {
    fn resolve(
        self,
        bundle: &Path,
        configs: &Path,
        variables: &Variables,
    ) -> Result<DaemonSpec, ManifestError> {
        check("a daemon's name", is_name(&self.name), "is not one of a-z, 0-9 and -, at most 32 of them")?;
        let key = |key: &str| format!("{key} of {}", self.name);
        let file = configs.join(format!("{}.conf", self.name));
        let fill = |text: &str| {
            let text = text.replace("{bundle}", &bundle.to_string_lossy());
            let text = text.replace("{config}", &file.to_string_lossy());
            variables.iter().fold(text, |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
        };
        let count = self.argv.len();
        check(&key("argv"), (1..=LIST_LIMIT).contains(&count), "is empty or too long")?;
        let argv: Vec<String> = self.argv.iter().map(|part| fill(part)).collect();
        let sound = |part: &String| part.len() <= STRING_LIMIT && !part.contains('\0');
        check(&key("argv"), argv.iter().all(sound), "has a string that is too long or has a NUL")?;
        check(&key("argv"), argv[0].starts_with('/'), "does not begin with an absolute path")?;

        let ready = match (self.ready_socket.as_deref(), self.ready_path) {
            (Some(socket), path) => {
                let fits = socket.starts_with('/') && socket.len() <= SOCKET_LIMIT && !socket.contains('\0');
                check(&key("ready_socket"), fits, "is not an absolute path of at most 107 bytes")?;
                check_path(&key("ready_path"), path.as_deref())?;
                Some(Readiness { socket: socket.into(), path })
            }
            (None, None) => None,
            (None, Some(_)) => return Err(fault(&key("ready_path"), "needs a ready_socket")),
        };
        let end = match (self.end_config.as_deref(), self.end_path, self.end_text) {
            (Some(source), Some(path), Some(text)) => {
                check(&key("end_config"), self.config.is_some(), "needs a config that it replaces")?;
                check(&key("end_config"), ready.is_some(), "needs a ready_socket to ask")?;
                check_path(&key("end_path"), Some(&path))?;
                let fits = (1..=STRING_LIMIT).contains(&text.len());
                check(&key("end_text"), fits, "is empty or too long")?;
                Some(EndConfig { source: absolute(&key("end_config"), &fill(source))?, path, text })
            }
            (None, None, None) => None,
            _ => return Err(fault(&key("end_config"), "needs end_path and end_text, and they need it")),
        };
        let config = match self.config.as_deref() {
            Some(source) => {
                Some(Config { source: absolute(&key("config"), &fill(source))?, file: file.clone(), end })
            }
            None => None,
        };
        Ok(DaemonSpec { argv, ready, config, name: self.name })
    }
}

fn fault(key: &str, fault: &'static str) -> ManifestError {
    ManifestError::Value { key: key.to_owned(), fault }
}

fn check(key: &str, holds: bool, otherwise: &'static str) -> Result<(), ManifestError> {
    if holds { Ok(()) } else { Err(fault(key, otherwise)) }
}

/// A path that goes into a request line as it is.
fn check_path(key: &str, path: Option<&str>) -> Result<(), ManifestError> {
    let fits = |path: &str| {
        path.starts_with('/')
            && path.len() <= STRING_LIMIT
            && path.bytes().all(|byte| byte.is_ascii_graphic())
    };
    check(key, path.is_none_or(fits), "is not an absolute path in visible ASCII characters")
}

fn absolute(key: &str, path: &str) -> Result<PathBuf, ManifestError> {
    let fits = path.starts_with('/') && path.len() <= STRING_LIMIT && !path.contains('\0');
    check(key, fits, "is not an absolute path")?;
    Ok(path.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEAD: &str = "name = \"docker\"\nversion = \"26.1\"\nbase = \"trixie\"\n";

    fn parse(text: &str) -> Result<Manifest, ManifestError> {
        Manifest::parse(
            text,
            Path::new("/opt/dhow/docker"),
            Path::new("/run/x"),
            &vec![("host", "192.0.2.1".to_owned())],
        )
    }

    #[test]
    fn the_bundle_of_this_repository_is_understood() {
        let text = include_str!("../../../image/docker/bundle.toml").replace("@VERSION@", "26.1.5+dfsg1-9");
        let manifest = parse(&text).unwrap();
        assert_eq!((manifest.name.as_str(), manifest.version.as_str()), ("docker", "26.1.5+dfsg1-9"));
        let [containerd, dockerd] = &manifest.daemons[..] else { panic!("{manifest:?}") };
        assert_eq!(containerd.argv[0], "/opt/dhow/docker/bin/containerd");
        assert_eq!(
            containerd.ready,
            Some(Readiness { socket: "/run/containerd/containerd.sock".into(), path: None })
        );
        assert_eq!(dockerd.ready.as_ref().unwrap().path.as_deref(), Some("/_ping"));
        let config = dockerd.config.as_ref().unwrap();
        assert_eq!(config.file, Path::new("/run/x/dockerd.conf"));
        assert!(dockerd.argv.contains(&"/run/x/dockerd.conf".to_owned()));
        assert_eq!(config.end.as_ref().unwrap().path, "/info");
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_with_its_key() {
        let daemon = |rest: &str| format!("{HEAD}[[daemon]]\nname = \"x\"\nargv = [\"/x\"]\n{rest}");
        assert!(parse(&daemon("")).is_ok());
        let long = "a".repeat(33);
        for (text, named) in [
            (HEAD.to_owned(), "daemon"),
            (format!("{HEAD}daemon = []"), "daemon"),
            (daemon("").replace("docker", "../x"), "name"),
            (daemon("").replace("docker", &long), "name"),
            (daemon("").replace("26.1", "26 1"), "version"),
            (daemon("").replace("trixie", ""), "base"),
            (format!("left_behind = [\"a/b\"]\n{}", daemon("")), "left_behind"),
            (daemon("").replace("\"x\"", "\"X\""), "name"),
            (daemon("").replace("[\"/x\"]", "[]"), "argv of x"),
            (daemon("").replace("[\"/x\"]", "[\"x\"]"), "argv of x"),
            (daemon("").replace("[\"/x\"]", "[\"/x\", \"a\\u0000\"]"), "argv of x"),
            (daemon("[[daemon]]\nname = \"x\"\nargv = [\"/y\"]"), "twice"),
            (daemon("ready_path = \"/a\""), "ready_path of x"),
            (daemon("ready_socket = \"a\""), "ready_socket of x"),
            (daemon(&format!("ready_socket = \"/{}\"", "a".repeat(107))), "ready_socket of x"),
            (daemon("ready_socket = \"/a\"\nready_path = \"/a b\""), "ready_path of x"),
            (daemon("ready_socket = \"/a\"\nready_path = \"/a\\r\\nX: y\""), "ready_path of x"),
            (daemon("config = \"a\""), "config of x"),
            (daemon("config = \"/a\"\nend_config = \"/b\""), "end_config of x"),
            (
                daemon("end_config = \"/b\"\nend_path = \"/b\"\nend_text = \"b\"\nready_socket = \"/a\""),
                "end_config of x",
            ),
            (daemon("unknown = \"a\""), "expects"),
            (daemon("").replace("[\"/x\"]", "\"/x\""), "expects"),
            ("\0".to_owned(), "expects"),
        ] {
            let error = match parse(&text) {
                Ok(manifest) => panic!("{text}\nwas taken as {manifest:?}"),
                Err(error) => dhow_protocol::errors::chain(&error),
            };
            assert!(error.contains(named), "{text}\n{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "\\PC{0,200}", key in "[a-z_]{1,12}", value in "\\PC{0,20}") {
            let _ = parse(&text);
            let _ = parse(&format!("{HEAD}[[daemon]]\nname = \"x\"\nargv = [\"/x\"]\n{key} = \"{value}\""));
        }
    }
}
