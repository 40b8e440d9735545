//! The guest: a parent and its worker in a mount namespace, and how a test speaks with the worker.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dhow_agent::mounts::Mounts;
use dhow_parent::{Limits, Parent, ParentLink, WorkerCommand, inherited_fds};
use dhow_protocol::codec::{self, CONTROL_LIMIT};
use dhow_protocol::control::{ControlError, ControlRequest, ControlResponse, GuestInfo, MountRequest};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{role_apart, role_arguments, wait_for};

const FOLDER: &str = "DHOW_TEST_FOLDER";
/// No test takes longer: one that hangs in a mount fails then.
const LIFETIME: Duration = Duration::from_secs(900);
/// First byte of a connection to the worker: one control request.
const CONTROL: u8 = b'c';
/// First byte: a `Files` stream, followed by the share's number.
const FILES: u8 = b'f';

/// A parent with its worker.
pub struct Guest {
    parent: Child,
    folder: PathBuf,
}

impl Guest {
    /// Starts one; its files are in `folder`.
    pub fn start(folder: &Path) -> Self {
        let parent = role_apart("role_parent", "").env(FOLDER, folder).spawn().unwrap();
        let guest = Self { parent, folder: folder.to_owned() };
        guest.worker();
        guest
    }

    /// A path of the guest's mount namespace as others reach it.
    pub fn path(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.parent.id(), path.display()))
    }

    /// A program in the guest's mount namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.parent.id())).arg(program).stdin(Stdio::null());
        command
    }

    /// The worker's pid, once it serves.
    pub fn worker(&self) -> i32 {
        wait_for("a worker", || std::fs::read_to_string(self.folder.join("worker")).ok()?.parse().ok())
    }

    /// Kills the worker; the parent starts a new one.
    pub fn kill_worker(&self) -> i32 {
        let old = self.worker();
        kill_process(Pid::from_raw(old).unwrap(), Signal::KILL).unwrap();
        wait_for("a new worker", || Some(self.worker()).filter(|new| *new != old))
    }

    /// Mounts a share.
    pub fn mount(&self, share: u32, path: &Path, read_only: bool) -> Result<(), String> {
        let path = path.to_str().unwrap().to_owned();
        self.ask(ControlRequest::Mount(MountRequest { share, path, read_only }))
    }

    /// Unmounts a share.
    pub fn unmount(&self, share: u32) -> Result<(), String> {
        self.ask(ControlRequest::Unmount { share })
    }

    /// Unmounts all.
    pub fn unmount_all(&self) {
        self.ask(ControlRequest::PowerOff).unwrap();
    }

    /// Paths of the mounted shares.
    pub fn mounts(&self) -> Vec<String> {
        match self.request(ControlRequest::Info) {
            Ok(ControlResponse::Info(info)) => info.mounts,
            other => panic!("{other:?}"),
        }
    }

    /// A stream of a share, as if the host had opened it.
    pub fn open_files(&self, share: u32) -> UnixStream {
        let mut stream = self.connect(FILES);
        stream.write_all(&share.to_le_bytes()).unwrap();
        stream
    }

    fn ask(&self, request: ControlRequest) -> Result<(), String> {
        match self.request(request) {
            Ok(_) => Ok(()),
            Err(ControlError::Failed(reason)) => Err(reason),
            Err(other) => panic!("{other:?}"),
        }
    }

    fn request(&self, request: ControlRequest) -> Result<ControlResponse, ControlError> {
        let mut stream = self.connect(CONTROL);
        stream.write_all(&codec::to_frame(&request, CONTROL_LIMIT).unwrap()).unwrap();
        let mut header = [0; 4];
        stream.read_exact(&mut header).unwrap();
        let mut body = vec![0; codec::body_length(header, CONTROL_LIMIT).unwrap()];
        stream.read_exact(&mut body).unwrap();
        codec::from_bytes(&body).unwrap()
    }

    fn connect(&self, kind: u8) -> UnixStream {
        let socket = self.folder.join("socket");
        let mut stream = wait_for("the worker's socket", || UnixStream::connect(&socket).ok());
        stream.write_all(&[kind]).unwrap();
        stream
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The worker goes with its parent, and the mounts with both.
        self.parent.kill().unwrap();
        self.parent.wait().unwrap();
        let worker = std::fs::read_to_string(self.folder.join("worker")).unwrap_or_default();
        if let Ok(pid) = worker.parse::<i32>() {
            wait_for("the worker's end", || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
        }
    }
}

/// The parent's process: PID 1 in a guest.
pub fn role_parent() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let test = rustix::process::getppid().unwrap();
    std::thread::spawn(move || end_with(test));
    let argv = role_arguments("role_worker").into();
    let env = vec![(FOLDER.to_owned(), folder.to_str().unwrap().to_owned())];
    let limits = Limits { restarts: 1000, ..Limits::default() };
    Parent::new(WorkerCommand { argv, env }, limits, false).unwrap().run();
}

/// Ends this process when the test has ended or hangs; its worker and its mounts go with it. The death
/// signal does not do: a thread of the test that waits for a mount stays, and cannot be killed.
fn end_with(test: Pid) {
    let begin = Instant::now();
    let stat = format!("/proc/{}/stat", test.as_raw_nonzero());
    while begin.elapsed() < LIFETIME {
        let state = std::fs::read_to_string(&stat).unwrap_or_default();
        if !state.rsplit(')').next().is_some_and(|rest| rest.starts_with([' ']) && !rest.starts_with(" Z")) {
            break;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    std::process::exit(1);
}

/// The worker's process.
pub fn role_worker() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    // As the real one: one thread for all but the mounts.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (link, mut restored) = ParentLink::connect(&mut inherited_fds().unwrap()).unwrap();
        let mounts = Mounts::start(link, &mut restored.fds).await;
        assert!(restored.fds.is_empty(), "nobody took over {:?}", restored.fds.keys());
        let socket = folder.join("socket");
        let _ = std::fs::remove_file(&socket);
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let new = folder.join("worker.new");
        std::fs::write(&new, std::process::id().to_string()).unwrap();
        std::fs::rename(&new, folder.join("worker")).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(Arc::clone(&mounts), stream));
        }
    });
}

async fn serve(mounts: Arc<Mounts>, mut stream: tokio::net::UnixStream) {
    // A test that has enough of it closes its end.
    let Ok(kind) = stream.read_u8().await else { return };
    if kind == FILES {
        let Ok(share) = stream.read_u32_le().await else { return };
        let stream = stream.into_std().unwrap();
        mounts.serve_files(share, [0; 16], stream.into()).await;
        return;
    }
    let Ok(Some(request)) = codec::read_frame::<ControlRequest, _>(&mut stream, CONTROL_LIMIT).await else {
        return;
    };
    let done = |result: Result<(), String>| match result {
        Ok(()) => Ok(ControlResponse::Done),
        Err(reason) => Err(ControlError::Failed(reason)),
    };
    let result: Result<ControlResponse, ControlError> = match request {
        ControlRequest::Mount(request) => done(mounts.mount(request).await),
        ControlRequest::Unmount { share } => done(mounts.unmount(share).await),
        ControlRequest::PowerOff => {
            mounts.unmount_all().await;
            Ok(ControlResponse::Done)
        }
        ControlRequest::Info => Ok(ControlResponse::Info(info(&mounts))),
        other => done(Err(format!("{other:?}"))),
    };
    let _ = stream.write_all(&codec::to_frame(&result, CONTROL_LIMIT).unwrap()).await;
}

fn info(mounts: &Mounts) -> GuestInfo {
    GuestInfo {
        agent: String::new(),
        kernel: String::new(),
        uptime_ms: 0,
        daemons: Vec::new(),
        mounts: mounts.paths(),
        memory: (0, 0),
        disk: (0, 0),
    }
}
