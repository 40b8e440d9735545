//! Why the VM ended by itself or did not start, noted for a later `dhow status`.

use std::path::PathBuf;

use crate::config::Paths;

/// Where the reason is noted; absent or empty where a person has stopped the VM.
pub fn end_file(paths: &Paths) -> PathBuf {
    paths.state_dir().join("ended")
}

/// Notes the reason, or with `None` that there is none.
pub fn note(paths: &Paths, reason: Option<&str>) {
    let file = end_file(paths);
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
