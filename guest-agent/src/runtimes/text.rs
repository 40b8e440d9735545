//! Sentences for people: what comes from daemons is made harmless.

/// `text` with its control characters as escapes, at most about `limit` bytes of it.
#[must_use]
pub fn escape(text: &str, limit: usize) -> String {
    let mut safe = String::new();
    for character in text.chars() {
        if safe.len() >= limit {
            safe.push('…');
            break;
        }
        if character.is_control() {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
    }
    safe
}

/// Bytes for a person, in MiB, rounded up.
#[must_use]
pub fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// How a process ended; `status` is as wait(2) gives it.
#[must_use]
pub fn exit(status: i32) -> String {
    if libc::WIFSIGNALED(status) {
        let number = libc::WTERMSIG(status);
        match nix::sys::signal::Signal::try_from(number) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {number}"),
        }
    } else {
        format!("ended with exit status {}", libc::WEXITSTATUS(status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_and_length_are_bounded() {
        assert_eq!(escape("a\u{1b}[31m\nb\u{9b}", 100), "a\\u{1b}[31m\\nb\\u{9b}");
        assert_eq!(escape(&"ä".repeat(100), 10), format!("{}…", "ä".repeat(5)));
    }

    #[test]
    fn an_exit_is_told_by_its_kind() {
        assert_eq!(exit(0x0100), "ended with exit status 1");
        assert_eq!(exit(9), "was killed by SIGKILL");
        assert_eq!(exit(40), "was killed by signal 40");
    }
}
