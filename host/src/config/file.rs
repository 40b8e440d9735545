//! The profile file as written: TOML with comments, every mistake named with its line.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use toml_edit::{ArrayOfTables, Document, Item, Table, Value};

use super::ConfigError;
use super::profile::Acceleration;

/// All keys, in the order of the template.
pub(super) const KEYS: [&str; 14] = [
    "cpus",
    "memory",
    "disk",
    "mounts",
    "image",
    "activate",
    "acceleration",
    "subnet",
    "docker-subnet",
    "host-ports",
    "forward-agent",
    "env",
    "forward",
    "socket",
];

/// A new profile's file: every key with its default.
pub(super) const TEMPLATE: &str = r##"# Settings of a Dhow profile. `dhow start` saves its flags here and keeps your comments.
# A change takes effect at the next `dhow restart`. What is commented out shows the default.

# Virtual CPUs. The default is 2, or 1 where the host has no more.
# cpus = 2

# Memory: "4GiB", "512MiB"; a bare number is GiB.
# memory = "2GiB"

# Size of the data disk: images, volumes and the guest's home. Sparse: it takes what is used.
# It can grow, but not shrink.
# disk = "100GiB"

# Host folders that the guest sees at the same path: "PATH" (writable) or "PATH:ro".
# `~` is your home. [] shares nothing.
# mounts = ["~"]

# Folder of the system image. The default is the newest one installed.
# image = "/path/to/image"

# Make Dhow's docker context the current one at start, and restore the one before at stop.
# activate = true

# "auto": KVM where it works, else emulation. "kvm": KVM or an error. "tcg": emulation.
# acceleration = "auto"

# Networks of the VM (24 bits) and of docker's bridges. Change them where a VPN of yours has the same.
# subnet = "192.168.127.0/24"
# docker-subnet = "10.200.0.0/16"

# Ports of this host's loopback that containers reach at host.docker.internal, and the guest at
# host.dhow.internal: numbers and "FIRST-LAST". None by default.
# host-ports = [5432, "8000-8010"]

# Lead /run/host-services/ssh-auth.sock in the guest to this host's ssh-agent (SSH_AUTH_SOCK at start).
# forward-agent = false

# Environment of the guest's daemons and commands. The host's proxy variables are there by themselves.
# [env]
# TZ = "Europe/Berlin"

# What becomes of ports that the guest listens on; the first rule that fits decides. Without one a port is
# forwarded to the same port of this host's loopback. More in docs/ports.md.
# [[forward]]
# guest = "0.0.0.0:8080"
# host = "127.0.0.1:9090"
# protocol = "tcp"
# static = true

# A unix socket that leads to the other side; `listen` says where Dhow makes it: "host" or "guest".
# [[socket]]
# listen = "host"
# host = "~/containerd.sock"
# guest = "/run/containerd/containerd.sock"
"##;

/// The settings that a file names, of the right type but not checked otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RawProfile {
    pub cpus: Option<i64>,
    pub memory: Option<String>,
    pub disk: Option<String>,
    pub mounts: Option<Vec<String>>,
    pub image: Option<PathBuf>,
    pub activate: Option<bool>,
    pub acceleration: Option<Acceleration>,
    pub subnet: Option<String>,
    pub docker_subnet: Option<String>,
    /// Each a port or a range, as text.
    pub host_ports: Vec<String>,
    pub forward_agent: Option<bool>,
    pub environment: Vec<(String, String)>,
    pub forwards: Vec<RawForward>,
    pub sockets: Vec<RawSocket>,
}

/// A `[[forward]]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RawForward {
    pub guest: Option<String>,
    pub host: Option<String>,
    pub protocol: Option<String>,
    pub ignore: bool,
    pub always: bool,
}

/// A `[[socket]]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RawSocket {
    pub listen: Option<String>,
    pub host: Option<String>,
    pub guest: Option<String>,
}

/// A file's text; `None` where there is no file.
pub(super) fn read_text(path: &Path) -> Result<Option<String>, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::Io { action: "read", path: path.to_owned(), source }),
    }
}

impl RawProfile {
    /// What the file at `path` says; `None` where there is no file.
    ///
    /// # Errors
    /// As [`RawProfile::parse`], and when the file cannot be read.
    pub fn read(path: &Path) -> Result<Option<Self>, ConfigError> {
        read_text(path)?.map(|text| Self::parse(path, &text)).transpose()
    }

    /// What `text` says; `path` is for messages.
    ///
    /// # Errors
    /// Text that is no TOML, unknown keys and values of a wrong type.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let document = Document::parse(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            problem: error.message().to_owned(),
        })?;
        let file = File { path, text };
        let mut raw = Self::default();
        for (name, item) in document.as_table() {
            let at = Setting { file: &file, table: document.as_table(), name };
            match name {
                "cpus" => raw.cpus = Some(at.want(item.as_integer(), "a whole number, such as 2")?),
                "memory" => raw.memory = Some(at.size(item)?),
                "disk" => raw.disk = Some(at.size(item)?),
                "mounts" => raw.mounts = Some(at.strings(item)?),
                "image" => raw.image = Some(at.string(item, "a path in quotes")?.into()),
                "activate" => raw.activate = Some(at.want(item.as_bool(), "true or false")?),
                "acceleration" => {
                    let known = item.as_str().and_then(|text| Acceleration::from_str(text, false).ok());
                    raw.acceleration = Some(at.want(known, "\"auto\", \"kvm\" or \"tcg\"")?);
                }
                "subnet" => raw.subnet = Some(at.string(item, "\"ADDRESS/BITS\"")?),
                "docker-subnet" => raw.docker_subnet = Some(at.string(item, "\"ADDRESS/BITS\"")?),
                "host-ports" => raw.host_ports = at.ports(item)?,
                "forward-agent" => {
                    raw.forward_agent = Some(at.want(item.as_bool(), "true or false")?);
                }
                "env" => raw.environment = at.environment(item)?,
                "forward" => {
                    raw.forwards = at.tables(item, "[[forward]]").map(|tables| forwards(&file, tables))??;
                }
                "socket" => {
                    raw.sockets = at.tables(item, "[[socket]]").map(|tables| sockets(&file, tables))??;
                }
                _ => return Err(at.unknown(&KEYS)),
            }
        }
        Ok(raw)
    }
}

fn forwards(file: &File, tables: &ArrayOfTables) -> Result<Vec<RawForward>, ConfigError> {
    let one = |table: &Table| {
        let mut raw = RawForward::default();
        for (name, item) in table {
            let at = Setting { file, table, name };
            match name {
                "guest" => raw.guest = Some(at.endpoint(item)?),
                "host" => raw.host = Some(at.endpoint(item)?),
                "protocol" => raw.protocol = Some(at.string(item, "\"tcp\" or \"udp\"")?),
                "ignore" => raw.ignore = at.want(item.as_bool(), "true or false")?,
                "static" => raw.always = at.want(item.as_bool(), "true or false")?,
                _ => return Err(at.unknown(&["guest", "host", "protocol", "ignore", "static"])),
            }
        }
        Ok(raw)
    };
    tables.iter().map(one).collect()
}

fn sockets(file: &File, tables: &ArrayOfTables) -> Result<Vec<RawSocket>, ConfigError> {
    let one = |table: &Table| {
        let mut raw = RawSocket::default();
        for (name, item) in table {
            let at = Setting { file, table, name };
            match name {
                "listen" => raw.listen = Some(at.string(item, "\"host\" or \"guest\"")?),
                "host" => raw.host = Some(at.string(item, "a path in quotes")?),
                "guest" => raw.guest = Some(at.string(item, "a path in quotes")?),
                _ => return Err(at.unknown(&["listen", "host", "guest"])),
            }
        }
        Ok(raw)
    };
    tables.iter().map(one).collect()
}

struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

/// A key in a table of the file.
struct Setting<'a> {
    file: &'a File<'a>,
    table: &'a Table,
    name: &'a str,
}

impl Setting<'_> {
    fn line(&self) -> usize {
        let span = self.table.key(self.name).and_then(toml_edit::Key::span);
        line_of(self.file.text, span.map_or(0, |span| span.start))
    }

    fn unknown(&self, known: &[&'static str]) -> ConfigError {
        let mut near: Vec<_> =
            known.iter().map(|key| (distance(self.name, key), *key)).filter(|(far, _)| *far <= 2).collect();
        near.sort_unstable();
        ConfigError::UnknownKey {
            path: self.file.path.to_owned(),
            line: self.line(),
            key: self.name.escape_debug().to_string(),
            near: near.into_iter().map(|(_, key)| key).collect(),
            known: known.to_vec(),
        }
    }

    fn want<T>(&self, value: Option<T>, expected: &'static str) -> Result<T, ConfigError> {
        value.ok_or_else(|| ConfigError::Type {
            path: self.file.path.to_owned(),
            line: self.line(),
            key: self.name.to_owned(),
            expected,
        })
    }

    fn string(&self, item: &Item, expected: &'static str) -> Result<String, ConfigError> {
        self.want(item.as_str().map(str::to_owned), expected)
    }

    fn size(&self, item: &Item) -> Result<String, ConfigError> {
        let number = item.as_integer().map(|number| number.to_string());
        self.want(number.or_else(|| item.as_str().map(str::to_owned)), "a size, such as \"4GiB\"")
    }

    fn strings(&self, item: &Item) -> Result<Vec<String>, ConfigError> {
        let strings = item
            .as_array()
            .and_then(|array| array.iter().map(|value| value.as_str().map(str::to_owned)).collect());
        self.want(strings, "a list of strings, such as [\"~\", \"/srv/data:ro\"]")
    }

    /// An endpoint of a rule; a bare number is a port.
    fn endpoint(&self, item: &Item) -> Result<String, ConfigError> {
        let number = item.as_integer().map(|number| number.to_string());
        let text = number.or_else(|| item.as_str().map(str::to_owned));
        self.want(text, "\"ADDRESS:PORT\", \"ADDRESS:FIRST-LAST\", an address or a port")
    }

    fn ports(&self, item: &Item) -> Result<Vec<String>, ConfigError> {
        let text = |value: &Value| {
            let number = value.as_integer().map(|number| number.to_string());
            number.or_else(|| value.as_str().map(str::to_owned))
        };
        let ports = item.as_array().and_then(|array| array.iter().map(text).collect());
        self.want(ports, "a list of ports, such as [5432, \"8000-8010\"]")
    }

    fn tables<'b>(&self, item: &'b Item, expected: &'static str) -> Result<&'b ArrayOfTables, ConfigError> {
        self.want(item.as_array_of_tables(), expected)
    }

    fn environment(&self, item: &Item) -> Result<Vec<(String, String)>, ConfigError> {
        let table = self.want(item.as_table_like(), "a table: [env] and lines such as NAME = \"value\"")?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        table
            .iter()
            .map(|(name, item)| Some((name.to_owned(), item.as_value().and_then(text)?)))
            .map(|pair| self.want(pair, "a table of strings, such as NAME = \"value\""))
            .collect()
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, right) in b.chars().enumerate() {
            let change = corner + usize::from(left != right);
            corner = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.chars().count()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RawProfile, ConfigError> {
        RawProfile::parse(Path::new("p.toml"), text)
    }

    #[test]
    fn the_template_names_every_key_and_says_nothing() {
        assert_eq!(parse(TEMPLATE).unwrap(), RawProfile::default());
        for key in KEYS {
            assert!(
                [format!("# {key} = "), format!("# [{key}]"), format!("# [[{key}]]")]
                    .iter()
                    .any(|shown| TEMPLATE.contains(shown)),
                "{key}"
            );
        }
        let active: String = TEMPLATE
            .lines()
            .filter_map(|line| line.strip_prefix("# "))
            .filter(|line| line.contains(" = ") || line.starts_with('['))
            .flat_map(|line| [line, "\n"])
            .collect();
        let raw = parse(&active).unwrap();
        assert_eq!((raw.cpus, raw.activate), (Some(2), Some(true)));
        assert_eq!(raw.environment, [("TZ".to_owned(), "Europe/Berlin".to_owned())]);
        assert_eq!((raw.forwards.len(), raw.sockets.len(), raw.host_ports.len()), (1, 1, 2));
    }

    #[test]
    fn sizes_may_be_numbers() {
        let raw = parse("memory = 4\ndisk = '20GiB'").unwrap();
        assert_eq!((raw.memory.as_deref(), raw.disk.as_deref()), (Some("4"), Some("20GiB")));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let cases = [
            (
                "cpus = 2\nmemroy = '2'\n",
                "p.toml, line 2: unknown key `memroy`",
                Some("did you mean `memory`?"),
            ),
            ("\n\nzebra = 1", "p.toml, line 3: unknown key `zebra`", Some("the keys are cpus,")),
            ("cpus = 'two'", "p.toml, line 1: `cpus` must be a whole number, such as 2", None),
            ("mounts = '~'", "p.toml, line 1: `mounts` must be a list of strings", None),
            (
                "# x\nacceleration = 'hvf'",
                "line 2: `acceleration` must be \"auto\", \"kvm\" or \"tcg\"",
                None,
            ),
            ("[env]\nA = 1", "`env` must be a table of strings", None),
            ("host-ports = 5", "line 1: `host-ports` must be a list of ports", None),
            ("forward = 5", "line 1: `forward` must be [[forward]]", None),
            (
                "[[forward]]\nguest = 80\n[[forward]]\ngest = 81",
                "line 4: unknown key `gest`",
                Some("did you mean `guest`"),
            ),
            ("[[socket]]\nzebra = ''", "line 2: unknown key `zebra`", Some("the keys are listen,")),
            ("cpus = 2\ncpus = 3", "line 2: not valid TOML", None),
            ("cpus 2", "line 1: not valid TOML", None),
        ];
        for (text, message, hint) in cases {
            let error = parse(text).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(error.hint().is_some(), hint.is_some(), "{error}");
            assert!(error.hint().unwrap_or_default().starts_with(hint.unwrap_or_default()), "{error}");
        }
    }
}
