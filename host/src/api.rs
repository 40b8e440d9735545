//! What a `dhow` command and the supervisor say to each other on the profile's API socket.
//!
//! A unix stream socket, 0600 in a 0700 folder. The command sends one [`ApiRequest`] frame and reads
//! [`ApiReply`] frames until the last one. After `Opened` the connection itself becomes the stream:
//! the supervisor hands it to the vsock device, and the command speaks with the guest's agent
//! directly (exec frames or a log's raw bytes). The command therefore sends nothing before it has
//! read `Opened`. Both ends are always the same binary, unless a newer `dhow` finds an older
//! supervisor: every reply to a request that it cannot decode is `Error`.

use std::net::SocketAddr;
use std::path::PathBuf;

use bincode::{Decode, Encode};
use dhow_protocol::control::{DaemonStatus, GuestInfo};
use dhow_protocol::exec::ExecStart;
use dhow_protocol::ports::Listener;
use dhow_protocol::stream::LogSource;
use serde::Serialize;

/// Limit of a frame in either direction, in bytes.
pub const API_LIMIT: usize = dhow_protocol::codec::CONTROL_LIMIT;

/// Command → supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ApiRequest {
    /// Answered by `Status` at once, in any state.
    Status,
    /// Answered by `Progress` for each step, also the past ones, then `Started` or `Error`.
    WatchStart,
    /// Answered by `Opened` or `Error`.
    Exec(ExecStart),
    /// Answered by `Opened` or `Error`.
    Logs {
        /// Which log.
        source: LogSource,
        /// Start that many lines from the end.
        tail: Option<u32>,
        /// Go on as lines are added.
        follow: bool,
    },
    /// Answered by `Ports`; with `watch` by another one at each change, until the command leaves.
    Ports {
        /// Go on with each change.
        watch: bool,
    },
    /// Answered by `Mounts`.
    Mounts,
    /// Answered by `Progress` for each step, then `Stopped` when nothing is left running.
    Stop {
        /// Without waiting for the guest: its disk is as after a power cut.
        force: bool,
    },
}

/// Supervisor → command.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ApiReply {
    /// To `Status`.
    Status(Box<StatusReport>),
    /// A step of a start or a stop that has ended, or a notice.
    Progress(Progress),
    /// The last reply of `WatchStart`: docker answers.
    Started,
    /// The connection is the stream from here on.
    Opened,
    /// To `Ports`.
    Ports(Vec<ForwardReport>),
    /// To `Mounts`.
    Mounts(Vec<MountReport>),
    /// The last reply of `Stop`.
    Stopped,
    /// The last reply where something failed.
    Error {
        /// What happened, to what, with its causes.
        message: String,
        /// What to do next, where there is something.
        hint: Option<String>,
    },
}

/// A step of a start or a stop.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Progress {
    /// A step has begun.
    Begin {
        /// What is being done ("booting the VM").
        step: String,
    },
    /// The step that began last has ended.
    End {
        /// What was done.
        step: String,
        /// How long it took.
        milliseconds: u64,
    },
    /// Something a person should know ("no KVM, using emulation").
    Notice(String),
}

/// Where a profile's VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Nothing runs.
    Stopped,
    /// On its way up.
    Starting,
    /// Docker answers.
    Running,
    /// The VM runs, but something is wrong; `StatusReport::problem` says what.
    Degraded,
    /// On its way down.
    Stopping,
}

/// What `dhow status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StatusReport {
    /// Where the VM is in its life.
    pub state: VmState,
    /// What is wrong, where something is.
    pub problem: Option<String>,
    /// "kvm" or "tcg".
    pub acceleration: String,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Size of the data disk in GiB.
    pub disk_gib: u64,
    /// The docker socket on the host.
    pub docker_socket: PathBuf,
    /// The image's folder.
    pub image: PathBuf,
    /// Host processes: role and pid.
    pub processes: Vec<(String, i32)>,
    /// States of the guest's daemons.
    pub daemons: Vec<DaemonStatus>,
    /// What the guest says of itself, where it answers within its deadline.
    pub guest: Option<GuestInfo>,
}

/// A listening socket of the guest and what became of it on the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ForwardReport {
    /// The guest's endpoint.
    pub guest: Listener,
    /// The host's endpoint, where there is one.
    pub host: Option<SocketAddr>,
    /// Why there is none.
    pub reason: Option<String>,
}

/// A share and its state.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MountReport {
    /// Path on host and guest.
    pub path: PathBuf,
    /// Read-only for the guest.
    pub read_only: bool,
    /// Mounted and served.
    pub mounted: bool,
    /// What is wrong, where something is.
    pub problem: Option<String>,
}
