//! The worker: serves the streams that the host opens, until PID 1 ends it.
//!
//! ```text
//! vsock listener ──► accept.rs ──► hello.rs ──► dispatch.rs ──► control.rs ──► requests.rs
//!  (PID 1 holds it)   CID, limits   proof          │            relay.rs (TCP, unix; connect.rs), udp.rs
//!                                                  │            exec, ports, dns, logs, host_services
//!                                                  └──────────► mounts (Files), runtimes (Bundle)
//! ```

mod accept;
mod bulk_lane;
mod clock;
mod connect;
mod control;
mod direction;
mod dispatch;
mod hello;
mod info;
mod lane;
mod opening;
mod pipe;
pub mod relay;
mod requests;
pub mod stream;
#[cfg(test)]
pub(crate) mod testing;
mod udp;

use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use dhow_parent::{ParentError, ParentLink, Restored};
use dhow_protocol::boot::{BootConfig, NetworkConfig};
use dhow_protocol::codec::{self, CodecError};
use dhow_protocol::control::Event;
use dhow_protocol::errors::chain;
use dhow_protocol::hello::Secret;
use tokio::sync::broadcast;

use crate::dns::Dns;
use crate::host_services::HostServices;
use crate::init::{self, held};
use crate::mounts::Mounts;
use crate::ports::Ports;
use crate::runtimes::{self, Runtimes};

/// Largest boot configuration in bytes.
const BOOT_LIMIT: u64 = 1 << 20;
/// The daemon whose ports linger while it is restarted.
const PUBLISHER: &str = "dockerd";
/// Events that a slow host may be behind.
const EVENTS: usize = 256;

/// Why the worker cannot serve.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    /// The runtime or an fd failed.
    #[error("the worker cannot be set up")]
    Io(#[from] io::Error),
    /// Without PID 1 there is nothing to serve.
    #[error("PID 1 does not answer")]
    Parent(#[from] ParentError),
    /// PID 1 did not hand over what it should.
    #[error("PID 1 holds no \"{0}\" for the worker")]
    Missing(&'static str),
    /// The boot configuration is not one.
    #[error("the boot configuration cannot be read")]
    Boot(#[source] CodecError),
    /// PID 1 has ended, or does not want this worker any more.
    #[error("PID 1 has closed its socket")]
    Gone,
}

/// Serves the host's streams until PID 1 ends it.
pub fn main() -> ExitCode {
    init::exempt_from_oom();
    let served = dhow_parent::inherited_fds().map_err(ServeError::from).and_then(|inherited| {
        // One thread but for opening and for bulk data: more would only contend with dockerd.
        lane::runtime()?.block_on(serve(inherited))
    });
    match served {
        Ok(never) => match never {},
        Err(error) => {
            if tracing::dispatcher::has_been_set() {
                tracing::error!(error = chain(&error), "the worker ends");
            } else {
                // It did not come as far as its log: PID 1's console, or whoever started it by hand.
                eprintln!("dhow-agent: {}", chain(&error));
            }
            ExitCode::FAILURE
        }
    }
}

async fn serve(mut inherited: HashMap<String, OwnedFd>) -> Result<std::convert::Infallible, ServeError> {
    let (link, Restored { mut fds, children, mut exits, first: _ }) = ParentLink::connect(&mut inherited)?;
    let mut take = |name| fds.remove(name).ok_or(ServeError::Missing(name));
    let (listener, boot, secret) = (take(held::LISTENER)?, take(held::BOOT)?, take(held::SECRET)?);
    let boot = read_boot(&boot)?;
    init::log::to_file(&boot.log_filter);
    let secret = read_secret(&secret)?;
    let (events, _) = broadcast::channel(EVENTS);

    let mounts = Mounts::start(link.clone(), &mut fds).await;
    let runtimes = Runtimes::start(runtimes::Setup {
        link: link.clone(),
        children,
        environment: boot.environment.clone(),
        dns: boot.network.map(|network| network.dns),
        variables: variables(boot.network.as_ref()),
        events: events.clone(),
    })
    .await;
    let dns = match boot.network {
        Some(network) => start_dns(network.dns, network.host, &events).await,
        None => None,
    };
    let host_services = HostServices::new(boot.network.map(|network| network.host));
    let own = boot.network.map(|network| [network.dns.into(), network.host.into()]);
    let publisher = Arc::clone(&runtimes);
    let away = move || publisher.is_away(PUBLISHER);
    let ports = match Ports::start(own.into_iter().flatten().collect(), Box::new(away)) {
        Ok(ports) => Some(ports),
        Err(error) => {
            warn(&events, format!("published ports cannot be found: {error}"));
            None
        }
    };
    let requests = requests::Requests {
        link,
        runtimes: Arc::clone(&runtimes),
        mounts: Arc::clone(&mounts),
        clock: clock::Clock::default(),
        name_server: boot.network.map(|network| network.dns),
        powering_off: AtomicBool::new(false),
    };
    let services = Arc::new(dispatch::Services {
        control: control::Control::new(Arc::new(requests), events),
        runtimes: Arc::clone(&runtimes),
        mounts,
        dns,
        host_services,
        ports,
        environment: boot.environment,
    });

    opening::start(listener, secret, services);
    tracing::info!("serving");
    while let Some(exit) = exits.recv().await {
        runtimes.exited(&exit);
    }
    Err(ServeError::Gone)
}

/// What a bundle may name of the VM's network. Without one docker has its own defaults' addresses.
fn variables(network: Option<&NetworkConfig>) -> Vec<(&'static str, String)> {
    let (host, bridge, pool) = network.map_or(
        (Ipv4Addr::LOCALHOST, ([172, 17, 0, 1].into(), 16), ([172, 24, 0, 0].into(), 13, 20)),
        |network| (network.host, network.bridge, network.pool),
    );
    vec![
        ("host", host.to_string()),
        ("bridge", format!("{}/{}", bridge.0, bridge.1)),
        ("pool", format!("base={}/{},size={}", pool.0, pool.1, pool.2)),
    ]
}

async fn start_dns(address: Ipv4Addr, host: Ipv4Addr, events: &broadcast::Sender<Event>) -> Option<Arc<Dns>> {
    match Dns::start(address, host).await {
        Ok(dns) => Some(dns),
        Err(error) => {
            warn(events, format!("names cannot be resolved: port 53 of {address} cannot be bound: {error}"));
            None
        }
    }
}

/// Tells the log and the host, if it is there.
fn warn(events: &broadcast::Sender<Event>, text: String) {
    tracing::warn!("{text}");
    // Nobody listens before the first control stream.
    let _ = events.send(Event::Warning(text));
}

/// An earlier worker has read it, too: its offset is not to be relied on.
fn read_boot(fd: &OwnedFd) -> Result<BootConfig, ServeError> {
    let length = rustix::fs::fstat(fd).map_err(io::Error::from)?.st_size;
    let length = u64::try_from(length).unwrap_or_default().min(BOOT_LIMIT);
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    read_at_start(fd, &mut bytes)?;
    codec::from_bytes(&bytes).map_err(ServeError::Boot)
}

fn read_secret(fd: &OwnedFd) -> Result<Secret, ServeError> {
    let mut secret = [0; 32];
    read_at_start(fd, &mut secret)?;
    Ok(Secret(secret))
}

fn read_at_start(fd: &OwnedFd, bytes: &mut [u8]) -> io::Result<()> {
    let mut have = 0;
    while have < bytes.len() {
        match rustix::io::pread(fd, &mut bytes[have..], have as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => have += length,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
