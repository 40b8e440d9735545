//! All shares of a worker: mounted, served, taken over from an earlier worker, unmounted.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dhow_parent::ParentLink;
use dhow_protocol::control::MountRequest;
use dhow_protocol::errors::chain;
use tokio::runtime::Handle;

use super::device::{self, Device};
use super::mount_point::{self, MountError};
use super::pump::Ended;
use super::share::Share;
use super::state::{State, StateFile};
use super::thread::Thread;

/// How long a mount waits for the share's stream: the host starts the file server just before, and may
/// be busy.
const STREAM_DEADLINE: Duration = Duration::from_secs(15);
/// How long the kernel may take to begin, and an unmount to write back before it is forced.
const KERNEL_DEADLINE: Duration = Duration::from_secs(10);
/// Names of what PID 1 holds.
const HELD: &str = "fuse-";
/// The end of a state's name.
const HELD_STATE: &str = "-state";

/// All shares of a worker.
pub struct Registry {
    link: ParentLink,
    /// `None` where there could be no thread: the worker's own runtime serves then.
    thread: Option<Thread>,
    shares: Mutex<HashMap<u32, Arc<Share>>>,
}

impl Registry {
    /// See [`super::Mounts::start`].
    pub async fn start(link: ParentLink, held: &mut HashMap<String, OwnedFd>) -> Self {
        let thread = Thread::start()
            .inspect_err(|error| tracing::error!(%error, "no thread for the shares: one for all"))
            .ok();
        let registry = Self { link, thread, shares: Mutex::default() };
        let states: Vec<_> = held
            .keys()
            .filter_map(|name| name.strip_prefix(HELD)?.strip_suffix(HELD_STATE).map(str::to_owned))
            .collect();
        for number in states {
            let file = held.remove(&state_name(&number));
            let device = held.remove(&device_name(&number));
            registry.adopt(&number, file, device).await;
        }
        registry
    }

    async fn adopt(&self, number: &str, file: Option<OwnedFd>, device: Option<OwnedFd>) {
        let state = file.map(StateFile::read);
        let (path, problem) = match (state, device) {
            (Some(Ok((file, state))), Some(fd)) if state.negotiated.is_some() => {
                let path = state.request.path.clone();
                let number = state.request.share;
                match self.device(fd) {
                    Ok(device) if !device.is_gone() => {
                        tracing::info!(number, path, "share taken over");
                        self.shares().insert(number, Arc::new(Share::adopted(device, file, state)));
                        return;
                    }
                    Ok(_) => (Some(path), "its mount is gone".to_owned()),
                    Err(error) => (Some(path), error.to_string()),
                }
            }
            (Some(Ok((_, state))), _) => (Some(state.request.path), "it had not begun".to_owned()),
            (Some(Err(error)), _) => (None, error.to_string()),
            (None, _) => (None, "it has no state".to_owned()),
        };
        tracing::warn!(number, path, problem, "share not taken over");
        if let Some(path) = path {
            take_away(path).await;
        }
        self.release(number).await;
    }

    /// See [`super::Mounts::serve_files`].
    pub async fn serve_files(&self, share: u32, session: [u8; 16], stream: OwnedFd) {
        let share = match self.living(share).await {
            Ok(share) => share,
            Err(problem) => {
                tracing::error!(problem, "a stream of a share cannot be served");
                return;
            }
        };
        tracing::debug!(share = share.number, ?session, "stream of a share");
        let served = Arc::clone(&share);
        let ended = self.handle().spawn(async move { served.serve(stream).await }).await;
        match ended {
            Ok(Ended::Stream) => {}
            Ok(Ended::Mount) => self.forget(&share).await,
            Err(error) => tracing::error!(%error, share = share.number, "serving a share failed"),
        }
    }

    /// See [`super::Mounts::mount`]. To be awaited to its end.
    ///
    /// # Errors
    /// For a person.
    pub async fn mount(&self, request: MountRequest) -> Result<(), String> {
        mount_point::check(&request.path).map_err(|error| chain(&error))?;
        let (share, _changing) = loop {
            let share = self.living(request.share).await?;
            let changing = Arc::clone(&share.changing).lock_owned().await;
            // It may have been unmounted while this waited.
            if !share.is_over() {
                break (share, changing);
            }
        };
        match share.request() {
            Some(mounted) if mounted == request => return Ok(()),
            Some(mounted) => {
                return Err(format!("share {} is mounted already, at {:?}", request.share, mounted.path));
            }
            None => {}
        }
        tokio::time::timeout(STREAM_DEADLINE, share.until_attached()).await.map_err(|_| {
            format!(
                "no file server was there for {:?} within {} s: is it running on the host?",
                request.path,
                STREAM_DEADLINE.as_secs()
            )
        })?;
        let result = self.mount_attached(&share, &request).await;
        if result.is_err() {
            take_away(request.path).await;
            self.end(&share).await;
        }
        result
    }

    async fn mount_attached(&self, share: &Arc<Share>, request: &MountRequest) -> Result<(), String> {
        let fail = |error: std::io::Error| format!("{:?} cannot be mounted: {error}", request.path);
        let fd = device::open().map_err(|error| format!("/dev/fuse cannot be opened: {error}"))?;
        let state = State { request: request.clone(), mount: share.mount, negotiated: None };
        let file = StateFile::create(&state).map_err(fail)?;
        // Before the mount, so that there is never one that nobody holds; the state first, by which a new
        // worker finds the rest.
        let number = request.share.to_string();
        let hold = |error: dhow_parent::ParentError| chain(&error);
        self.link.hold(&state_name(&number), file.as_fd()).await.map_err(hold)?;
        self.link.hold(&device_name(&number), fd.as_fd()).await.map_err(hold)?;
        let (path, read_only) = (request.path.clone(), request.read_only);
        let mount = move || mount_point::mount(fd.as_fd(), &path, read_only).map(|()| fd);
        let mounted = tokio::task::spawn_blocking(mount);
        let fd = match tokio::time::timeout(KERNEL_DEADLINE, mounted).await {
            Ok(Ok(mounted)) => mounted.map_err(|error: MountError| chain(&error))?,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(format!("the way to {:?} is blocked in the guest", request.path)),
        };
        let device = self.device(fd).map_err(fail)?;
        share.begin(device, file, state);
        match tokio::time::timeout(KERNEL_DEADLINE, share.until_begun()).await {
            Ok(result) => result,
            Err(_) => Err(format!("{:?} was mounted, but the guest's kernel did not begin", request.path)),
        }
    }

    /// See [`super::Mounts::unmount`]. To be awaited to its end.
    ///
    /// # Errors
    /// For a person.
    pub async fn unmount(&self, share: u32) -> Result<(), String> {
        let share = self.shares().get(&share).cloned();
        let Some(share) = share else { return Err("this share is not mounted".to_owned()) };
        let _changing = share.changing.lock().await;
        if let Some(request) = share.request() {
            let path = request.path.clone();
            let unmounted = tokio::task::spawn_blocking(move || mount_point::unmount(&path));
            match tokio::time::timeout(KERNEL_DEADLINE, unmounted).await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(error))) => tracing::warn!(%error, request.path, "unmount"),
                // Writing back takes too long, or nobody is there to take it.
                _ => take_away(request.path).await,
            }
        }
        self.end(&share).await;
        Ok(())
    }

    /// Numbers of the mounted shares, what lies in another share before that one.
    pub fn deepest_first(&self) -> Vec<u32> {
        let mut shares: Vec<_> = self.shares().values().cloned().collect();
        let depth = |share: &Arc<Share>| share.request().map_or(0, |request| request.path.len());
        shares.sort_by_key(|share| std::cmp::Reverse(depth(share)));
        shares.into_iter().map(|share| share.number).collect()
    }

    /// Paths of the mounted shares.
    pub fn paths(&self) -> Vec<String> {
        let mut paths: Vec<_> =
            self.shares().values().filter_map(|share| share.request()).map(|request| request.path).collect();
        paths.sort();
        paths
    }

    /// The share of this number; a new one where there is none, or its mount is gone.
    async fn living(&self, number: u32) -> Result<Arc<Share>, String> {
        loop {
            let share = self.share(number)?;
            if !share.is_over() {
                return Ok(share);
            }
            self.forget(&share).await;
        }
    }

    /// After somebody else unmounted it.
    async fn forget(&self, share: &Arc<Share>) {
        let _changing = share.changing.lock().await;
        if share.is_over() {
            self.end(share).await;
        }
    }

    /// Drops a share that is not mounted any more, and what PID 1 holds of it. Its lock is held, and it
    /// stays in its place until all is released, so that a new share of its number comes after it.
    async fn end(&self, share: &Arc<Share>) {
        // With its last fd closed the kernel ends whatever still waits.
        share.end();
        let here = |shares: &HashMap<u32, Arc<Share>>| {
            shares.get(&share.number).is_some_and(|here| Arc::ptr_eq(here, share))
        };
        if here(&self.shares()) {
            self.release(&share.number.to_string()).await;
            self.shares().remove(&share.number);
            tracing::info!(share = share.number, "share is not mounted any more");
        }
    }

    async fn release(&self, number: &str) {
        for name in [device_name(number), state_name(number)] {
            if let Err(error) = self.link.release(&name).await {
                tracing::warn!(error = &error as &dyn std::error::Error, name, "not released");
            }
        }
    }

    /// The share of this number as it is; a new one, not mounted, where there is none.
    fn share(&self, number: u32) -> Result<Arc<Share>, String> {
        let mut shares = self.shares();
        if let Some(share) = shares.get(&number) {
            return Ok(Arc::clone(share));
        }
        let mut mount = [0; 16];
        getrandom::fill(&mut mount).map_err(|error| format!("no random numbers: {error}"))?;
        let share = Arc::new(Share::new(number, mount));
        shares.insert(number, Arc::clone(&share));
        Ok(share)
    }

    fn device(&self, fd: OwnedFd) -> std::io::Result<Device> {
        let _within = self.handle().enter();
        Device::new(fd)
    }

    fn handle(&self) -> Handle {
        self.thread.as_ref().map_or_else(Handle::current, |thread| thread.handle().clone())
    }

    fn shares(&self) -> MutexGuard<'_, HashMap<u32, Arc<Share>>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a mount away, where there is one.
async fn take_away(path: String) {
    let taken = tokio::task::spawn_blocking(move || (mount_point::unmount_by_force(&path), path));
    match tokio::time::timeout(KERNEL_DEADLINE, taken).await {
        Ok(Ok((Err(error), path))) => tracing::debug!(%error, path, "nothing to take away"),
        Ok(_) => {}
        Err(_) => tracing::error!("the way to a mount is blocked, so it is not taken away"),
    }
}

fn device_name(number: &str) -> String {
    format!("{HELD}{number}")
}

fn state_name(number: &str) -> String {
    format!("{HELD}{number}{HELD_STATE}")
}
