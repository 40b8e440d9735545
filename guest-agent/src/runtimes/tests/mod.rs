//! Runtimes with real processes, and mounts that are plain copies.

mod daemon;
mod engine;
mod install;
mod mount;

use std::collections::HashSet;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dhow_parent::{Exit, ParentError, Spawn, SpawnedChild};
use dhow_protocol::bundle::{BundleAnswer, BundleOffer, BundleResult};
use dhow_protocol::codec::{self, CONTROL_LIMIT};
use dhow_protocol::control::{DaemonState, Event};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::{broadcast, mpsc};

use super::Runtimes;
use super::engine::Engine;
use super::install::Library;
use super::launch::{Launch, Spawning};
use super::mount::Mount;
use super::store::{Digest, Store};

/// For anything that happens at all; a busy machine may need much of it.
const DEADLINE: Duration = Duration::from_secs(120);

/// `bundle.toml` is what the image has before its first NUL.
#[derive(Default)]
struct CopyMount {
    mounted: Mutex<HashSet<PathBuf>>,
}

impl Mount for Arc<CopyMount> {
    fn mount(&self, image: &Path, target: &Path) -> io::Result<()> {
        let image = std::fs::read(image)?;
        let text = image.split(|byte| *byte == 0).next().unwrap_or_default();
        if text.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        std::fs::write(target.join("bundle.toml"), text)?;
        self.mounted.lock().unwrap().insert(target.to_owned());
        Ok(())
    }

    fn is_mounted(&self, target: &Path) -> io::Result<bool> {
        Ok(self.mounted.lock().unwrap().contains(target))
    }

    fn detach(&self, target: &Path) -> io::Result<()> {
        std::fs::remove_file(target.join("bundle.toml"))?;
        self.mounted.lock().unwrap().remove(target);
        Ok(())
    }
}

/// Starts children of this process, which die with the test's thread.
struct HereLaunch {
    exits: mpsc::UnboundedSender<Exit>,
    /// Name and pidfd of each child ever started.
    started: Mutex<Vec<SpawnedChild>>,
}

impl HereLaunch {
    /// What PID 1 would tell a new worker: children that live.
    fn children(&self) -> Vec<SpawnedChild> {
        let started = self.started.lock().unwrap();
        let lives = |child: &&SpawnedChild| {
            let mut fds = [rustix::event::PollFd::new(&child.pidfd, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap()
                == 0
        };
        started.iter().filter(lives).map(duplicate).collect()
    }

    fn count(&self) -> usize {
        self.started.lock().unwrap().len()
    }
}

fn duplicate(child: &SpawnedChild) -> SpawnedChild {
    SpawnedChild { name: child.name.clone(), pid: child.pid, pidfd: child.pidfd.try_clone().unwrap() }
}

impl Launch for HereLaunch {
    fn spawn(&self, spawn: Spawn) -> Spawning<'_> {
        let mut command = Command::new(&spawn.argv[0]);
        command.args(&spawn.argv[1..]).env_clear().envs(spawn.env).stdin(Stdio::null());
        command.stdout(spawn.stdout.unwrap()).stderr(spawn.stderr.unwrap());
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?));
        }
        let started = command.spawn().map_err(|error| ParentError::Refused {
            what: format!("start {}", spawn.argv[0]),
            reason: error.to_string(),
        });
        let started = started.map(|mut child| {
            let pid = child.id() as i32;
            let pidfd = rustix::process::pidfd_open(
                rustix::process::Pid::from_child(&child),
                rustix::process::PidfdFlags::empty(),
            )
            .unwrap();
            let (name, exits) = (spawn.name.clone(), self.exits.clone());
            std::thread::spawn(move || {
                use std::os::unix::process::ExitStatusExt;
                let status = child.wait().unwrap().into_raw();
                // The test may be over.
                let _ = exits.send(Exit { name, pid, status });
            });
            let child = SpawnedChild { name: spawn.name, pid, pidfd };
            self.started.lock().unwrap().push(duplicate(&child));
            child
        });
        Box::pin(std::future::ready(started))
    }
}

/// A guest: its disk, its PID 1 and its worker.
struct Guest {
    root: tempfile::TempDir,
    store: Store,
    mount: Arc<CopyMount>,
    launch: Arc<HereLaunch>,
    runtimes: Arc<Runtimes>,
    events: broadcast::Receiver<Event>,
    /// Hands the ends of children to the worker, as `serve` does.
    _exits: ExitsTask,
}

struct ExitsTask(tokio::task::JoinHandle<()>);

impl Drop for ExitsTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Guest {
    async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = Store {
            bundles: root.path().join("bundles"),
            logs: root.path().join("log"),
            view: root.path().join("view"),
            run: root.path().join("run"),
        };
        Self::with(root, store).await
    }

    async fn with(root: tempfile::TempDir, store: Store) -> Self {
        let mount = Arc::new(CopyMount::default());
        let (exits, mut ends) = mpsc::unbounded_channel();
        let launch = Arc::new(HereLaunch { exits, started: Mutex::default() });
        let (runtimes, events) = worker(&store, &mount, &launch).await;
        let told = Arc::downgrade(&runtimes);
        let exits = tokio::spawn(async move {
            while let Some(exit) = ends.recv().await {
                if let Some(runtimes) = told.upgrade() {
                    runtimes.exited(&exit);
                }
            }
        });
        Self { root, store, mount, launch, runtimes, events, _exits: ExitsTask(exits) }
    }

    /// The worker dies and PID 1 starts another; ends of children are then known by pidfds alone.
    async fn restart_worker(&mut self) {
        let (runtimes, events) = worker(&self.store, &self.mount, &self.launch).await;
        self.runtimes = runtimes;
        self.events = events;
    }

    /// Installs an image as the host does.
    async fn install(&self, image: &[u8]) -> (BundleAnswer, BundleResult) {
        self.offer(offer_of(image), |stream, offset| {
            let rest = image[usize::try_from(offset).unwrap()..].to_vec();
            tokio::spawn(async move {
                let mut stream = stream;
                stream.write_all(&rest).await.unwrap();
                stream
            })
        })
        .await
    }

    /// Offers an image; `send` is given the stream and the offset where the guest wants bytes.
    async fn offer(
        &self,
        offer: BundleOffer,
        send: impl FnOnce(DuplexStream, u64) -> tokio::task::JoinHandle<DuplexStream>,
    ) -> (BundleAnswer, BundleResult) {
        let (mut host, guest) = tokio::io::duplex(64 << 10);
        let runtimes = Arc::clone(&self.runtimes);
        let serving = tokio::spawn(async move { runtimes.receive(offer, guest).await });
        let answer = codec::read_frame::<BundleAnswer, _>(&mut host, CONTROL_LIMIT).await.unwrap().unwrap();
        if let BundleAnswer::Send { offset } = answer {
            host = send(host, offset).await.unwrap();
        }
        let read = codec::read_frame(&mut host, CONTROL_LIMIT);
        let result = tokio::time::timeout(DEADLINE, read).await.unwrap().unwrap().unwrap();
        serving.await.unwrap();
        (answer, result)
    }

    async fn installed(&self, image: &[u8]) {
        assert_eq!(self.install(image).await.1, Ok(()));
    }

    /// Waits for an event.
    async fn event(&mut self, is: impl Fn(&Event) -> bool) -> Event {
        let found = async {
            loop {
                let event = self.events.recv().await.unwrap();
                if is(&event) {
                    return event;
                }
            }
        };
        tokio::time::timeout(DEADLINE, found).await.expect("the event did not come")
    }

    fn states(&self) -> Vec<(String, DaemonState)> {
        self.runtimes.statuses().into_iter().map(|status| (status.name, status.state)).collect()
    }
}

async fn worker(
    store: &Store,
    mount: &Arc<CopyMount>,
    launch: &Arc<HereLaunch>,
) -> (Arc<Runtimes>, broadcast::Receiver<Event>) {
    let (sender, events) = broadcast::channel(1024);
    let library = Library {
        store: store.clone(),
        mount: Box::new(Arc::clone(mount)),
        base: Some("trixie".to_owned()),
        variables: Vec::new(),
    };
    let launch_here: Arc<dyn Launch> = Arc::<HereLaunch>::clone(launch);
    let engine = Engine::new(library, launch_here, Vec::new(), sender);
    (Runtimes::with(engine, launch.children()).await, events)
}

/// An image of a bundle named "test".
fn image(version: &str, daemons: &str) -> Vec<u8> {
    let text = format!("name = \"test\"\nversion = \"{version}\"\nbase = \"trixie\"\n{daemons}\0");
    let mut image = text.into_bytes();
    // So that a transfer has many steps, and versions differ in more than their head.
    image.extend((0..300_000_u32).flat_map(u32::to_le_bytes));
    image
}

fn digest_of(image: &[u8]) -> Digest {
    Digest(Sha256::digest(image).into())
}

fn offer_of(image: &[u8]) -> BundleOffer {
    let version = "1.0".to_owned();
    BundleOffer { name: "test".to_owned(), version, sha256: digest_of(image).0, size: image.len() as u64 }
}
