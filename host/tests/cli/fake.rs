//! A supervisor that the test plays: it listens on the API's socket and speaks `api.rs`.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use bincode::{Decode, Encode};
use dhow::api::{API_LIMIT, ApiReply, ApiRequest, MountReport, StatusReport, VmState};
use dhow_protocol::codec::{self, DATA_LIMIT};
use dhow_protocol::control::{DaemonState, DaemonStatus, GuestInfo};
use dhow_protocol::exec::{ExecInput, ExecOutput, ExecStart};

use crate::bench::Bench;

/// A thread that accepts, and one for each connection.
pub struct Fake {
    socket: PathBuf,
    accepting: Option<JoinHandle<()>>,
    requests: Arc<Mutex<Vec<ApiRequest>>>,
    ending: Arc<Mutex<bool>>,
}

impl Fake {
    /// Each connection's request goes to `answer`, with the connection.
    pub fn new(bench: &Bench, answer: impl Fn(&ApiRequest, &mut Peer) + Send + Sync + 'static) -> Self {
        let socket = bench.api_socket();
        let listener = UnixListener::bind(&socket).unwrap();
        let (requests, ending) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(false)));
        let (known, over) = (Arc::clone(&requests), Arc::clone(&ending));
        let answer = Arc::new(answer);
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut peer = Peer(stream.unwrap());
                if *over.lock().unwrap() {
                    return;
                }
                let (known, answer) = (Arc::clone(&known), Arc::clone(&answer));
                std::thread::spawn(move || {
                    // `stop` only looks whether somebody listens.
                    if let Some(request) = peer.read::<ApiRequest>(API_LIMIT) {
                        known.lock().unwrap().push(request.clone());
                        answer(&request, &mut peer);
                    }
                });
            }
        });
        Self { socket, accepting: Some(accepting), requests, ending }
    }

    /// One that runs and answers everything that can be answered at once.
    pub fn running(bench: &Bench) -> Self {
        Self::new(bench, answer_running)
    }

    /// One that runs and plays the commands that it is asked for.
    pub fn exec(bench: &Bench, play: impl Fn(&ExecStart, &mut Peer) + Send + Sync + 'static) -> Self {
        Self::new(bench, move |request, peer| match request {
            ApiRequest::Exec(start) => {
                peer.reply(&ApiReply::Opened);
                play(start, peer);
            }
            request => answer_running(request, peer),
        })
    }

    /// What was asked so far.
    pub fn requests(&self) -> Vec<ApiRequest> {
        self.requests.lock().unwrap().clone()
    }

    /// The keeper ends: nobody listens any more.
    pub fn end(&mut self) {
        let Some(accepting) = self.accepting.take() else { return };
        *self.ending.lock().unwrap() = true;
        // Wakes the thread, which then drops the listener.
        let woken = UnixStream::connect(&self.socket);
        let _ = std::fs::remove_file(&self.socket);
        if woken.is_ok() {
            accepting.join().unwrap();
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.end();
    }
}

/// As a VM that runs does.
pub fn answer_running(request: &ApiRequest, peer: &mut Peer) {
    match request {
        ApiRequest::Status => peer.reply(&ApiReply::Status(Box::new(report(VmState::Running)))),
        ApiRequest::WatchStart => peer.reply(&ApiReply::Started),
        ApiRequest::Mounts => peer.reply(&ApiReply::Mounts(Vec::new())),
        ApiRequest::Ports { .. } => peer.reply(&ApiReply::Ports(Vec::new())),
        ApiRequest::Stop { .. } => peer.reply(&ApiReply::Stopped),
        ApiRequest::Exec(_) | ApiRequest::Logs { .. } => peer.refuse("not played here", None),
    }
}

/// What the fake says of itself; the guest's words try to steer the terminal.
pub fn report(state: VmState) -> StatusReport {
    let daemon = DaemonStatus { name: "dockerd".into(), state: DaemonState::Ready, restarts: 2 };
    StatusReport {
        state,
        problem: None,
        acceleration: "tcg".into(),
        cpus: 3,
        memory_mib: 1536,
        disk_gib: 40,
        docker_socket: "/fake/docker.sock".into(),
        image: "/fake/image".into(),
        processes: vec![("qemu".into(), 4711)],
        daemons: Vec::new(),
        guest: Some(GuestInfo {
            agent: "9.9.9\u{1b}[31m".into(),
            kernel: "6.12.0".into(),
            uptime_ms: 61_000,
            daemons: vec![daemon],
            mounts: vec!["/home/me".into()],
            memory: (1536 << 20, 1024 << 20),
            disk: (40 << 30, 30 << 30),
        }),
    }
}

/// A mounted share.
pub fn mount(path: impl Into<PathBuf>) -> MountReport {
    MountReport { path: path.into(), read_only: false, mounted: true, problem: None }
}

/// The supervisor's end of a connection, and after `Opened` the guest's.
pub struct Peer(pub UnixStream);

impl Peer {
    fn read<T: Decode<()>>(&mut self, limit: usize) -> Option<T> {
        let mut header = [0; 4];
        self.0.read_exact(&mut header).ok()?;
        let mut body = vec![0; codec::body_length(header, limit).unwrap()];
        self.0.read_exact(&mut body).ok()?;
        Some(codec::from_bytes(&body).unwrap())
    }

    fn write<T: Encode>(&mut self, value: &T, limit: usize) -> bool {
        self.0.write_all(&codec::to_frame(value, limit).unwrap()).is_ok()
    }

    pub fn reply(&mut self, reply: &ApiReply) {
        // A command that has left is the test's business.
        self.write(reply, API_LIMIT);
    }

    pub fn refuse(&mut self, message: &str, hint: Option<&str>) {
        self.reply(&ApiReply::Error { message: message.into(), hint: hint.map(str::to_owned) });
    }

    /// The command's next word; `None` when it has left.
    pub fn input(&mut self) -> Option<ExecInput> {
        self.read(DATA_LIMIT)
    }

    /// Whether the command still takes it.
    pub fn output(&mut self, output: ExecOutput) -> bool {
        self.write(&output, DATA_LIMIT)
    }

    /// Waits until the command leaves.
    pub fn wait_for_end(&mut self) {
        while let Ok(1..) = self.0.read(&mut [0; 4096]) {}
    }
}
