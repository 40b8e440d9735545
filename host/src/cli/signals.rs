//! Signals as numbers on a channel. Those that were ignored when the command began stay ignored.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::errors::CommandError;

/// Signals that came.
#[derive(Debug)]
pub struct Signals {
    receiver: mpsc::Receiver<i32>,
}

impl Signals {
    /// Listens for each of `numbers` that is not ignored, as `nohup` and shells do for background
    /// commands. From here on they no longer end this process.
    ///
    /// # Errors
    /// When the system refuses a handler.
    pub fn listen(numbers: &[i32]) -> Result<Self, CommandError> {
        let ignored = ignored();
        let (sender, receiver) = mpsc::channel(16);
        for &number in numbers.iter().filter(|number| !is_set(ignored, **number)) {
            let mut stream = signal(SignalKind::from_raw(number))
                .map_err(|source| CommandError::system("listen for signals", source))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() && sender.send(number).await.is_ok() {}
            });
        }
        Ok(Self { receiver })
    }

    /// The next one. Never, where none is listened for.
    pub async fn next(&mut self) -> i32 {
        match self.receiver.recv().await {
            Some(number) => number,
            None => std::future::pending().await,
        }
    }
}

/// The set of ignored signals; none where /proc does not tell.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn is_set(mask: u64, number: i32) -> bool {
    u32::try_from(number - 1).is_ok_and(|bit| bit < 64 && mask >> bit & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_counts_from_one() {
        // What Rust's runtime does to SIGPIPE (13).
        assert!(is_set(ignored(), libc::SIGPIPE));
        assert!(!is_set(0x1000, 12) && is_set(0x1000, 13) && !is_set(0x1000, 14) && !is_set(u64::MAX, 0));
    }
}
