//! Why a command failed, in a sentence and a hint; `main.rs` prints both, once.

use std::io;
use std::path::PathBuf;

use dhow_protocol::codec::CodecError;

use crate::config::{ConfigError, ProfileName};
use crate::images::store::ImageError;
use crate::keeper::KeeperError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The settings or the folders.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No keeper.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// No image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The command needs a VM.
    #[error("the VM of profile {0} is not running")]
    NotRunning(ProfileName),
    /// Neither settings nor data of that name.
    #[error("there is no profile {0}")]
    NoProfile(ProfileName),
    /// A deadline has passed.
    #[error("{who} did not answer within {seconds} s{reason}")]
    Silent {
        /// Whose answer was awaited.
        who: &'static str,
        /// For how long.
        seconds: u64,
        /// Why, where it can be told; begins with a colon.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// The connection ended before the answer.
    #[error("the supervisor ended before it answered")]
    Gone,
    /// The API's socket cannot be used.
    #[error("cannot reach the supervisor at {}", path.display())]
    Reach {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// An answer that is none.
    #[error("the supervisor's answer cannot be understood")]
    Answer(#[source] CodecError),
    /// An answer to another question.
    #[error("the supervisor gave an answer of the wrong kind")]
    Kind,
    /// The supervisor says why not.
    #[error("{message}")]
    Refused {
        /// Its words.
        message: String,
        /// Its hint.
        hint: Option<String>,
    },
    /// Standard output cannot be written.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
    /// The system refused something.
    #[error("cannot {what}")]
    System {
        /// "read /x".
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something that only one command can run into.
    #[error("{problem}")]
    Other {
        /// What happened.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// A signal ended the command, which has said so itself.
    #[error("interrupted by signal {0}")]
    Interrupted(i32),
}

impl CommandError {
    /// Something that only one command can run into.
    pub fn other(problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Other { problem: problem.into(), hint: hint.into() }
    }

    /// The system refused something.
    pub fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }

    /// What to do next, where there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Config(error) => return error.hint(),
            Self::Refused { hint, .. } => return hint.clone(),
            Self::Silent { hint, .. } | Self::Other { hint, .. } => hint.clone(),
            Self::Image(_) => {
                "make one with `make image`, and name its folder with `dhow start --image DIR`".to_owned()
            }
            Self::NotRunning(profile) => format!("start it with `{} start`", invocation(profile)),
            Self::NoProfile(_) => "`dhow list` shows the profiles there are".to_owned(),
            Self::Gone => "`dhow status` says what is left; `dhow logs keeper` may say why".to_owned(),
            Self::Answer(_) | Self::Kind => {
                "a supervisor of another version may be running: `dhow restart` brings both to one".to_owned()
            }
            _ => return None,
        })
    }

    /// The exit status that says it.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            // Whoever read the output has seen enough.
            Self::Output(source) if source.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Interrupted(signal) => signal_status(*signal),
            _ => 1,
        }
    }

    /// Whether there is something to print.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        matches!(self, Self::Interrupted(_)) || self.status() == 0
    }
}

/// The shells' exit status for an end by a signal: 128 and its number.
#[must_use]
pub fn signal_status(signal: i32) -> u8 {
    u8::try_from(signal.clamp(0, 127)).unwrap_or(127) + 128
}

/// `dhow`, with the profile where it is not the default one: for hints that can be pasted.
#[must_use]
pub fn invocation(profile: &ProfileName) -> String {
    if profile.is_default() { "dhow".to_owned() } else { format!("dhow -p {profile}") }
}
