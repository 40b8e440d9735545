//! Why the VM ended by itself or did not start, noted for a later `dhow status`.

use std::path::PathBuf;

use super::record::{Last, Record};
use crate::config::Paths;

/// Where the reason is noted; absent where a person has stopped the VM.
fn file(paths: &Paths) -> PathBuf {
    paths.state_dir().join("ended")
}

/// Notes the reason, or with `None` that there is none.
pub fn note(paths: &Paths, reason: Option<&str>) {
    let file = file(paths);
    let noted = match reason {
        Some(reason) => crate::files::replace(&file, reason.as_bytes()),
        None => std::fs::remove_file(&file),
    };
    match noted {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            // The log has the reason, too; the next start must not fail for this.
            tracing::warn!(%error, ?reason, "cannot note how the VM ended");
        }
        _ => {}
    }
}

/// Why the VM that ran last has ended, unless a person stopped it. Only where no VM runs.
pub fn last_end(paths: &Paths) -> Option<String> {
    // A record that is left means that nobody was left to note anything.
    match Record::last(paths) {
        Last::ThisBoot => {
            return Some(
                "QEMU, the supervisor and the keeper ended without a word: they were killed".to_owned(),
            );
        }
        Last::EarlierBoot => return Some("this host was restarted while the VM ran".to_owned()),
        Last::None => {}
    }
    let text = std::fs::read_to_string(file(paths)).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_noted_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::at(dir.path(), &"default".parse().unwrap()).unwrap();
        paths.create().unwrap();
        note(&paths, None);
        assert_eq!(last_end(&paths), None);
        note(&paths, Some("QEMU was killed\n"));
        assert_eq!(last_end(&paths).unwrap(), "QEMU was killed");
        note(&paths, None);
        assert_eq!(last_end(&paths), None);
    }
}
