//! The power button: QEMU's `system_powerdown` presses it. It becomes a SIGTERM to PID 1.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const INPUTS: &str = "/sys/class/input";
/// `<linux/input-event-codes.h>`
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// `struct input_event` on 64 bit: seconds, microseconds, type, code, value.
const EVENT_LEN: usize = 24;

/// Starts a thread that waits for the button. Call it when SIGTERM is blocked already: the thread
/// inherits that. Without a button the host has only its other ways to end the VM.
pub(crate) fn watch() {
    let buttons: Vec<File> =
        buttons(Path::new(INPUTS)).iter().filter_map(|path| File::open(path).ok()).collect();
    if buttons.is_empty() {
        tracing::warn!("there is no power button");
        return;
    }
    let started = std::thread::Builder::new().name("button".into()).stack_size(64 << 10).spawn(move || {
        if wait(buttons) {
            tracing::info!("the power button was pressed");
            // To itself: it cannot fail.
            let _ = kill(Pid::this(), Signal::SIGTERM);
        }
    });
    if let Err(error) = started {
        tracing::warn!(%error, "nobody waits for the power button");
    }
}

/// True when a button was pressed, false when none is left.
fn wait(mut buttons: Vec<File>) -> bool {
    while !buttons.is_empty() {
        let mut fds: Vec<_> =
            buttons.iter().map(|button| PollFd::new(button.as_fd(), PollFlags::POLLIN)).collect();
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let mut index = 0;
        let mut pressed = false;
        buttons.retain_mut(|button| {
            index += 1;
            if !ready[index - 1] {
                return true;
            }
            let mut events = [0; EVENT_LEN * 16];
            match button.read(&mut events) {
                Ok(length) if length > 0 => {
                    pressed |= events[..length].chunks_exact(EVENT_LEN).any(is_press);
                    true
                }
                // Unplugged.
                _ => false,
            }
        });
        if pressed {
            return true;
        }
    }
    false
}

fn is_press(event: &[u8]) -> bool {
    let u16_at = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    u16_at(16) == EV_KEY && u16_at(18) == KEY_POWER && value == 1
}

/// Device nodes of the inputs that have that key.
fn buttons(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"event"))
        .filter(|entry| {
            let keys = entry.path().join("device/capabilities/key");
            std::fs::read_to_string(keys).is_ok_and(|keys| has_key(&keys, KEY_POWER))
        })
        .map(|entry| Path::new("/dev/input").join(entry.file_name()))
        .collect()
}

/// Whether a bitmap of sysfs has the bit: words of 64 bits in hexadecimal, the highest first.
fn has_key(bitmap: &str, key: u16) -> bool {
    let word = bitmap.split_whitespace().rev().nth(usize::from(key / 64));
    word.and_then(|word| u64::from_str_radix(word, 16).ok()).is_some_and(|word| word >> (key % 64) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bitmap_tells_a_power_button_from_a_mouse() {
        // Of ACPI's button, a keyboard and a mouse.
        assert!(has_key("10000000000000 0\n", KEY_POWER));
        assert!(has_key("402000000 3803078f800d001 feffffdfffefffff fffffffffffffffe\n", 1));
        assert!(!has_key("70000 0 0 0 0\n", KEY_POWER));
        assert!(!has_key("0\n", KEY_POWER) && !has_key("", KEY_POWER) && !has_key("zz zz\n", KEY_POWER));
    }

    #[test]
    fn only_the_press_counts() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut bytes = vec![0; 16];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
            bytes
        };
        assert!(is_press(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_press(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_press(&event(EV_KEY, 115, 1)));
        assert!(!is_press(&event(0, 0, 0)));
    }
}
