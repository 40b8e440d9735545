//! Tells that some socket may have begun or ceased to listen: a thread on what the kernel says.
//!
//! tracefs is asked in an instance of its own, so that whoever traces in the guest is not disturbed.
//! Its events carry no network namespace, so what they say is not looked at.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::watch;

use super::diag::Gone;

const TRACEFS: &str = "/sys/kernel/tracing";
const INSTANCE: &str = "dhow";
/// A socket begins to listen (`TCP_LISTEN`, 10), or ceases to (`TCP_CLOSE`, 7). Each accepted
/// connection goes from LISTEN to SYN_RECV, as a copy of its listener: not of interest.
const FILTER: &str = "newstate==10 || (oldstate==10 && newstate==7)";
/// UDP sockets are there when bind(2) has returned: a probe of our own, since an event of `syscalls` would have
/// every system call of every process take the slow way through the kernel.
const PROBE: &str = "r:dhow/bind __sys_bind ret=$retval:s32\n";
/// The probe's event, the kernel's own where there can be no probe, and of either what counts.
const PROBED: &str = "dhow/bind";
const TRACED: &str = "syscalls/sys_exit_bind";
const BOUND: &str = "ret==0";

/// Starts the thread that counts triggers up in `count`.
///
/// # Errors
/// There is no tracefs, or it has no such event. Closes alone would be heard of without it, so the
/// caller has to poll anyway.
pub(super) fn start(count: watch::Sender<u64>) -> io::Result<()> {
    let trace = instance(Path::new(TRACEFS), INSTANCE)?;
    let gone = Gone::open()?;
    std::thread::Builder::new().name("ports".into()).spawn(move || {
        if let Err(error) = run(&trace, gone, &count) {
            tracing::warn!(%error, "the trigger for listening sockets is gone");
        }
    })?;
    Ok(())
}

/// `poll`, and not a reactor: the ring buffer arms its wake-up when it is polled, each time anew.
fn run(mut trace: &File, mut gone: Gone, count: &watch::Sender<u64>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let ready = {
            let mut fds =
                [PollFd::new(trace.as_fd(), PollFlags::POLLIN), PollFd::new(gone.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            fds.map(|fd| fd.any().unwrap_or(true))
        };
        let mut triggered = ready[1] && gone.drain();
        if ready[0] {
            // What it says does not matter, only that it says something.
            loop {
                match trace.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(_) => triggered = true,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if triggered {
            count.send_modify(|count| *count = count.wrapping_add(1));
        }
    }
}

/// The trace of an instance that is set up, which it may be already: an earlier worker's.
fn instance(tracefs: &Path, name: &str) -> io::Result<File> {
    let instance = tracefs.join("instances").join(name);
    match fs::create_dir(&instance) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(named(&instance, error)),
    }
    // Toggling patches the kernel's text, so only what differs is written.
    set(instance.join("buffer_percent"), "0")?;
    set(instance.join("buffer_size_kb"), "64")?;
    let bind = if probe(tracefs, &instance) { PROBED } else { TRACED };
    for (event, filter) in [("sock/inet_sock_set_state", FILTER), (bind, BOUND)] {
        let event = instance.join("events").join(event);
        if !fs::read_to_string(event.join("filter")).is_ok_and(|now| now.trim() == filter) {
            set(event.join("filter"), filter)?;
        }
        set(event.join("enable"), "1")?;
    }
    set(instance.join("tracing_on"), "1")?;
    let pipe = instance.join("trace_pipe");
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&pipe)
        .map_err(|error| named(&pipe, error))
}

/// Whether the kernel has the probe, now or since an earlier worker.
fn probe(tracefs: &Path, instance: &Path) -> bool {
    let event = instance.join("events").join(PROBED);
    if !event.exists()
        && let Err(error) = append(&tracefs.join("kprobe_events"), PROBE)
    {
        tracing::info!(%error, "no probe of bind(2): its system call is traced");
    }
    event.exists()
}

fn append(path: &Path, line: &str) -> io::Result<()> {
    OpenOptions::new().append(true).open(path)?.write_all(line.as_bytes())
}

fn set(path: PathBuf, value: &str) -> io::Result<()> {
    if fs::read_to_string(&path).is_ok_and(|now| now.split_whitespace().next() == Some(value)) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|error| named(&path, error))
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
