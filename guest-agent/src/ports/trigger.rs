//! Tells that some socket may have begun or ceased to listen: a thread on what the kernel says.
//!
//! tracefs is asked in an instance of its own, so that whoever traces in the guest is not disturbed.
//! Its events carry no network namespace, and may come before the socket can be listed: they are hints at where to
//! look, and no more.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dhow_protocol::allowance::Allowance;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::broadcast;

use super::diag::Gone;
use super::scope::Hint;

const TRACEFS: &str = "/sys/kernel/tracing";
const INSTANCE: &str = "dhow";
/// A socket begins to listen (`TCP_LISTEN`, 10), or ceases to (`TCP_CLOSE`, 7). Each accepted
/// connection goes from LISTEN to SYN_RECV, as a copy of its listener: not of interest.
const FILTER: &str = "newstate==10 || (oldstate==10 && newstate==7)";
/// A UDP socket gets the port that its program has asked for: probes of our own, since an event of `syscalls` would
/// have every system call of every process take the slow way through the kernel. What the kernel chooses itself is a
/// client's.
const PROBES: [&str; 2] =
    ["p:dhow/bind4 udp_v4_get_port port=$arg2:u16\n", "p:dhow/bind6 udp_v6_get_port port=$arg2:u16\n"];
/// The probes' events, and of them what counts.
const PROBED: [(&str, &str); 2] = [("dhow/bind4", "port!=0"), ("dhow/bind6", "port!=0")];
/// The kernel's own event where there can be no probe: it tells of all bind(2)s, once they have succeeded.
const TRACED: [(&str, &str); 1] = [("syscalls/sys_exit_bind", "ret==0")];
/// What counts of the event for TCP.
const LISTENS: (&str, &str) = ("sock/inet_sock_set_state", FILTER);
/// Reads in one go: a storm writes as fast as it is read.
const READS: usize = 16;
/// A storm of events takes one part in so many of one CPU here …
const ONE_IN: u32 = 10;
/// … and may run so far ahead of that.
const BURST: Duration = Duration::from_secs(1);
/// How the trace names them.
const SET_STATE: &str = "inet_sock_set_state:";
const BINDS: [&str; 3] = [" bind4: ", " bind6: ", " sys_bind -> "];

/// Starts the thread that says into `hints` what may have changed.
///
/// # Errors
/// There is no tracefs, or it has no such event. Closes alone would be heard of without it, so the
/// caller has to poll anyway.
pub(super) fn start(hints: broadcast::Sender<Hint>) -> io::Result<()> {
    let trace = instance(Path::new(TRACEFS), INSTANCE)?;
    let gone = Gone::open()?;
    std::thread::Builder::new().name("ports".into()).spawn(move || {
        if let Err(error) = run(&trace, gone, &hints) {
            tracing::warn!(%error, "the trigger for listening sockets is gone");
        }
    })?;
    Ok(())
}

/// `poll`, and not a reactor: the ring buffer arms its wake-up when it is polled, each time anew.
fn run(mut trace: &File, mut gone: Gone, hints: &broadcast::Sender<Hint>) -> io::Result<()> {
    // Nobody may be listening just now: a new listener begins with a look at everything.
    let tell = |hint| _ = hints.send(hint);
    let mut buffer = [0; 4096];
    let mut lines = Lines::default();
    let mut allowance = Allowance::new(ONE_IN, BURST);
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
        let began = Instant::now();
        if ready[1] && gone.drain() {
            tell(Hint::Udp);
        }
        if ready[0] {
            for _ in 0..READS {
                match trace.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => lines.take(&buffer[..length], |line| tell(hint_of(line))),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        // Meanwhile events gather, and are read at once; what the ring has no room for is a line that says so.
        let ended = Instant::now();
        std::thread::sleep(allowance.spend(began, ended) - ended);
    }
}

/// What a line of the trace is a hint at. Such as
/// `… inet_sock_set_state: family=AF_INET protocol=IPPROTO_TCP sport=80 dport=0 … newstate=TCP_LISTEN` and
/// `… bind4: (udp_v4_get_port+0x4/0xd0) port=53`; a line about lost events, or of a kernel that writes them otherwise,
/// may mean everything.
fn hint_of(line: &[u8]) -> Hint {
    let Ok(line) = std::str::from_utf8(line) else { return Hint::Any };
    // This one first: it is longer than a task's name, which is in the line as well and may be anything.
    let mut words = line.split_ascii_whitespace().skip_while(|word| *word != SET_STATE).peekable();
    if words.peek().is_none() {
        return if BINDS.iter().any(|event| line.contains(event)) { Hint::Udp } else { Hint::Any };
    }
    let port = words.find_map(|word| word.strip_prefix("sport=")).and_then(|port| port.parse().ok());
    match (port, words.find_map(|word| word.strip_prefix("newstate="))) {
        // Not bound yet: it gets its port a moment later.
        (Some(0), _) => Hint::Any,
        (Some(port), Some("TCP_LISTEN")) => Hint::Listens(port),
        (Some(port), Some(_)) => Hint::Gone(port),
        _ => Hint::Any,
    }
}

/// Cuts what is read into lines.
#[derive(Debug, Default)]
struct Lines {
    begun: Vec<u8>,
}

/// No line is longer; what has none is told in pieces.
const LONGEST_LINE: usize = 4096;

impl Lines {
    fn take(&mut self, bytes: &[u8], mut line: impl FnMut(&[u8])) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.begun.extend_from_slice(part);
            if part.ends_with(b"\n") || self.begun.len() >= LONGEST_LINE {
                line(&self.begun);
                self.begun.clear();
            }
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
    let binds = if probe(tracefs, &instance) { &PROBED[..] } else { &TRACED[..] };
    for (event, filter) in binds.iter().chain([&LISTENS]) {
        let event = instance.join("events").join(event);
        if !fs::read_to_string(event.join("filter")).is_ok_and(|now| now.trim() == *filter) {
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

/// Whether the kernel has the probes, now or since an earlier worker.
fn probe(tracefs: &Path, instance: &Path) -> bool {
    PROBED.iter().zip(PROBES).all(|((event, _), probe)| {
        let event = instance.join("events").join(event);
        if !event.exists()
            && let Err(error) = append(&tracefs.join("kprobe_events"), probe)
        {
            tracing::info!(%error, probe, "no such probe: the system call bind(2) is traced");
        }
        event.exists()
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_hints() {
        let state = "inet_sock_set_state: family=AF_INET6 protocol=IPPROTO_TCP";
        let text = format!(
            "nginx-7 [001] ...1. 9.5: {state} sport=8080 dport=0 saddr=0.0.0.0 oldstate=TCP_CLOSE newstate=TCP_LISTEN\n\
             nginx-7 [001] ...1. 9.5: {state} sport=8080 dport=0 saddr=0.0.0.0 oldstate=TCP_LISTEN newstate=TCP_CLOSE\n\
             x-7 [001] ...1. 9.5: {state} sport=0 dport=0 saddr=0.0.0.0 oldstate=TCP_CLOSE newstate=TCP_LISTEN\n\
             x-7 [001] ...1. 9.5: {state} spt=8080\n\
             dig-8 [000] ..... 9.6: bind4: (udp_v4_get_port+0x4/0xd0) port=5353\n\
             dig-8 [000] ..... 9.6: bind6: (udp_v6_get_port+0x4/0x170) port=5354\n\
             dig-8 [000] ..... 9.6: sys_bind -> 0x0\n\
             a bind4: b-9 [000] 9.7: {state} sport=81 dport=0 oldstate=TCP_CLOSE newstate=TCP_LISTEN\n\
             CPU:1 [LOST 12 EVENTS]\n"
        );
        let wanted = [
            Hint::Listens(8080),
            Hint::Gone(8080),
            Hint::Any,
            Hint::Any,
            Hint::Udp,
            Hint::Udp,
            Hint::Udp,
            Hint::Listens(81),
            Hint::Any,
        ];
        // However the reads cut it.
        for piece in [1, 7, text.len()] {
            let (mut lines, mut hints) = (Lines::default(), Vec::new());
            for part in text.as_bytes().chunks(piece) {
                lines.take(part, |line| hints.push(hint_of(line)));
            }
            assert_eq!(hints, wanted, "{piece} bytes at once");
        }
    }

    #[test]
    fn a_line_without_end_takes_no_memory_without_end() {
        let (mut lines, mut hints) = (Lines::default(), 0);
        for _ in 0..100 {
            lines.take(&[b'x'; 1000], |_| hints += 1);
            assert!(lines.begun.len() < LONGEST_LINE);
        }
        assert_eq!(hints, 20);
    }
}
