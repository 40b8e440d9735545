//! A server of the host's that greets.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::command::Cmd;
use super::net::try_connect;
use super::vm::Vm;

/// A server on the host that answers every connection with one word, until dropped.
#[derive(Debug)]
pub struct Greeter {
    /// Where it listens.
    pub address: SocketAddr,
    end: Arc<AtomicBool>,
}

impl Greeter {
    /// At a free port of `address`.
    ///
    /// # Panics
    /// When it cannot listen there.
    pub fn at(address: Ipv4Addr, word: &'static str) -> Self {
        let listener = TcpListener::bind((address, 0)).expect("a server");
        let address = listener.local_addr().expect("a server");
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                // The client may be gone already.
                let _ = stream.write_all(word.as_bytes());
            }
        });
        Self { address, end }
    }

    /// What the guest itself hears of it at `address`; not yet run. The client does not end its own half first: after that
    /// Debian 12's passt (2023-03) loses the end of the server's.
    pub fn heard_in(&self, vm: &Vm, address: IpAddr) -> Cmd {
        let port = self.address.port();
        vm.sh(&format!(
            "rm -f /tmp/never && mkfifo /tmp/never && busybox nc -w 5 {address} {port} <>/tmp/never"
        ))
    }
}

impl Drop for Greeter {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        // Wakes it.
        let _ = try_connect(self.address);
    }
}
