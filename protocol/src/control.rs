//! Control: requests with ids, deadlines and cancellation, and events. The only multiplexed stream.
//!
//! Frames are [`ToAgent`] and [`FromAgent`], each at most [`crate::codec::CONTROL_LIMIT`]. Answers
//! come in any order. A request is answered exactly once: by its result, by `Deadline` when the
//! guest did not finish it in time, or by `Cancelled`. A newer control stream replaces an older one.

use bincode::{Decode, Encode};

/// Host → guest.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToAgent {
    /// A request.
    Request {
        /// Chosen by the host, not reused within a stream.
        id: u64,
        /// The guest gives up after that many milliseconds.
        deadline_ms: u32,
        /// What is asked.
        request: ControlRequest,
    },
    /// The host no longer wants the answer. The guest stops where it can and answers `Cancelled`.
    Cancel {
        /// The request's id.
        id: u64,
    },
}

/// Guest → host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum FromAgent {
    /// The answer to a request.
    Response {
        /// The request's id.
        id: u64,
        /// Its result.
        result: Result<ControlResponse, ControlError>,
    },
    /// Something happened.
    Event(Event),
}

/// What the host can ask.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ControlRequest {
    /// Answered at once with `Pong`.
    Ping,
    /// What the guest is.
    Info,
    /// The host's clock: slewed to, stepped where more than half a second off.
    SetClock {
        /// Nanoseconds since 1970.
        unix_nanos: u64,
    },
    /// Mount a share; its `Files` stream has been opened before. Answered when it is mounted.
    Mount(MountRequest),
    /// Unmount a share.
    Unmount {
        /// Its number.
        share: u32,
    },
    /// Start the daemons of an installed bundle; answered when all are ready, or with why not.
    StartRuntime {
        /// The bundle's name.
        name: String,
    },
    /// Stop the daemons of a bundle.
    StopRuntime {
        /// The bundle's name.
        name: String,
    },
    /// End everything, write back, unmount, power off. Answered before it begins.
    PowerOff,
    /// How names are completed from now on. A container takes this over when it starts.
    SetSearch(SearchList),
}

/// How short names are completed (resolv.conf(5): `search` and `options ndots`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct SearchList {
    /// Domains that are tried, in their order; the host sends 32 of 253 bytes at the most.
    pub domains: Vec<String>,
    /// Names with that many dots or more are tried as they are first; the resolver's own default (1) without it.
    pub ndots: Option<u8>,
}

/// A share to mount.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MountRequest {
    /// Number of the share, unique in a boot.
    pub share: u32,
    /// Absolute path in the guest, as on the host.
    pub path: String,
    /// Read-only for the guest.
    pub read_only: bool,
}

/// A request's result.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ControlResponse {
    /// To `Ping`.
    Pong,
    /// Done; nothing to add.
    Done,
    /// To `Info`.
    Info(GuestInfo),
}

/// Why a request was not fulfilled.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum ControlError {
    /// The guest did not finish it in time.
    #[error("the guest did not finish in time")]
    Deadline,
    /// The host cancelled it.
    #[error("cancelled")]
    Cancelled,
    /// It failed; the sentence is for a person. Quote control characters before showing it.
    #[error("{0}")]
    Failed(String),
}

/// What the guest is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GuestInfo {
    /// Version of the agent.
    pub agent: String,
    /// Kernel release.
    pub kernel: String,
    /// Milliseconds since the guest's boot.
    pub uptime_ms: u64,
    /// Daemons and their states.
    pub daemons: Vec<DaemonStatus>,
    /// Paths of the mounted shares.
    pub mounts: Vec<String>,
    /// Bytes of memory: total and available.
    pub memory: (u64, u64),
    /// Bytes of the data disk: total and available.
    pub disk: (u64, u64),
}

/// A daemon of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DaemonStatus {
    /// Its name in `bundle.toml`.
    pub name: String,
    /// What it is doing.
    pub state: DaemonState,
    /// How often it was restarted after it had ended by itself.
    pub restarts: u32,
}

/// What a daemon is doing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum DaemonState {
    /// Started, not yet answering.
    Starting,
    /// Answering.
    Ready,
    /// Ended; started again soon.
    BackingOff,
    /// Not running, and not to be.
    Stopped,
    /// Given up after too many restarts; the reason is for a person.
    Failed(String),
}

/// What the guest tells unasked.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Event {
    /// A daemon changed its state.
    Daemon(DaemonStatus),
    /// Something that the host should log at warning level; quote control characters.
    Warning(String),
}
