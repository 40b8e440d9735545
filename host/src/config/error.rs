//! Why settings or folders could not be used, in sentences that a person can act on.

use std::path::PathBuf;

/// Why a profile's settings or folders cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a profile's name.
    #[error("{0:?} cannot be a profile's name")]
    ProfileName(String),
    /// Neither the variable nor a home folder is there.
    #[error("cannot tell where {what} belongs: neither {variable} nor HOME is set to an absolute path")]
    NoFolder {
        /// What was to be put somewhere.
        what: &'static str,
        /// The variable that would have told.
        variable: &'static str,
    },
    /// A folder of Dhow's that somebody else could write to, or that is none.
    #[error("{} is not safe to use: {problem}", path.display())]
    Unsafe {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A unix socket's path has a fixed room (`sockaddr_un`).
    #[error("the socket path {} has {got} bytes; the kernel takes at most {limit}", path.display())]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Its length.
        got: usize,
        /// The most it may have.
        limit: usize,
    },
    /// A file or folder could not be read, made or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// "read", "create", …
        action: &'static str,
        /// What it was about.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{}, line {line}: not valid TOML: {problem}", path.display())]
    Syntax {
        /// The profile file.
        path: PathBuf,
        /// Line of the mistake, from 1.
        line: usize,
        /// What the parser expected.
        problem: String,
    },
    /// A key that Dhow does not know.
    #[error("{}, line {line}: unknown key `{key}`", path.display())]
    UnknownKey {
        /// The profile file.
        path: PathBuf,
        /// Line of the key, from 1.
        line: usize,
        /// The key.
        key: String,
        /// Known keys that look alike.
        near: Vec<&'static str>,
        /// All known keys there.
        known: Vec<&'static str>,
    },
    /// A value of a wrong type.
    #[error("{}, line {line}: `{key}` must be {expected}", path.display())]
    Type {
        /// The profile file.
        path: PathBuf,
        /// Line of the key, from 1.
        line: usize,
        /// The key.
        key: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A value that makes no sense.
    #[error("{setting}: {problem}")]
    Value {
        /// The setting, as in the file.
        setting: &'static str,
        /// What is wrong.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// A folder that cannot be shared.
    #[error("cannot share {}: {problem}", path.display())]
    Mount {
        /// The folder as given.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do.
        hint: String,
    },
}

impl ConfigError {
    /// What to do about it, where there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::ProfileName(_) => {
                "use up to 31 lower-case letters, digits and hyphens, beginning with a letter or digit".to_owned()
            }
            Self::NoFolder { .. } => "set HOME, or DHOW_HOME to a folder for all that Dhow keeps".to_owned(),
            Self::Unsafe { path, .. } => {
                format!(
                    "it must be a folder of yours that nobody else may enter (chmod 700 {}), or set DHOW_HOME",
                    path.display()
                )
            }
            Self::SocketPath { .. } => {
                "set DHOW_HOME or XDG_RUNTIME_DIR to a folder with a shorter path, or use a shorter profile name"
                    .to_owned()
            }
            Self::UnknownKey { near, known, .. } => match near.as_slice() {
                [] => format!("the keys are {}", known.join(", ")),
                near => format!("did you mean `{}`?", near.join("` or `")),
            },
            Self::Value { hint, .. } | Self::Mount { hint, .. } => hint.clone(),
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "free some space on that disk and try again; nothing was changed".to_owned()
            }
            Self::Io { .. } | Self::Syntax { .. } | Self::Type { .. } => return None,
        };
        Some(hint)
    }
}
