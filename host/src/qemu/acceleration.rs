//! Which acceleration works here, found by behaviour: `/dev/kvm` may be there and not boot a kernel.
//!
//! The probe boots the image's own kernel under KVM without a root: a working KVM brings it to its
//! panic about the missing root within a second or two. The answer is remembered for this boot of
//! the host.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use super::command::Accelerator;

/// The name under which QEMU is looked up in PATH.
pub const QEMU: &str = "qemu-system-x86_64";
/// How long a kernel may take under KVM to its end: a tenth of that is usual.
const PROBE_DEADLINE: Duration = Duration::from_secs(6);
/// What a kernel that gets through its own start says at the end of the probe.
const PROBE_END: &str = "Kernel panic - not syncing";

/// Why there is no QEMU to use.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// Not in PATH, or it does not run.
    #[error("QEMU ({QEMU}) cannot be run")]
    Missing(#[source] std::io::Error),
    /// Its version could not be read or is too old.
    #[error("QEMU is too old or unknown: {0:?} (Dhow needs 7.2 or newer)")]
    Version(String),
}

/// Major version of the installed QEMU.
///
/// # Errors
/// When QEMU is missing or older than 7.2.
pub async fn qemu_version() -> Result<(u32, u32), QemuError> {
    let output = Command::new(QEMU)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(QemuError::Missing)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match parse_version(&text) {
        Some(version) if version >= (7, 2) => Ok(version),
        _ => Err(QemuError::Version(text.lines().next().unwrap_or_default().to_owned())),
    }
}

/// "QEMU emulator version 10.0.2 (Debian …)" → (10, 0).
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split("version ").nth(1)?.split(['.', ' ', '\n']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// KVM where it boots `kernel`, else emulation and the reason, for a notice.
///
/// `cache` is a file that remembers the answer for this boot of the host.
///
/// # Errors
/// When there is no usable QEMU.
pub async fn choose(kernel: &Path, cache: &Path) -> Result<(Accelerator, Option<String>), QemuError> {
    let emulation = emulation().await?;
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        return Ok((emulation, Some(format!("/dev/kvm cannot be opened ({error})"))));
    }
    let works = match remembered(cache) {
        Some(works) => works,
        None => {
            let works = probe(kernel).await;
            remember(cache, works);
            works
        }
    };
    Ok(if works {
        (Accelerator::Kvm, None)
    } else {
        (emulation, Some("/dev/kvm is there, but a kernel does not boot with it".to_owned()))
    })
}

/// Emulation as the installed QEMU does it safely.
///
/// # Errors
/// When there is no usable QEMU.
pub async fn emulation() -> Result<Accelerator, QemuError> {
    Ok(Accelerator::Tcg { single_thread: qemu_version().await?.0 < 8 })
}

/// Whether `kernel` gets through its start under KVM.
async fn probe(kernel: &Path) -> bool {
    let child = Command::new(QEMU)
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-machine", "q35,accel=kvm", "-cpu", "host", "-m", "256M", "-serial", "stdio"])
        .args(["-append", "console=ttyS0 panic=-1 root=/dev/none"])
        .arg("-kernel")
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let Ok(mut child) = child else {
        return false;
    };
    let Some(stdout) = child.stdout.take() else {
        return false;
    };
    let reached = tokio::time::timeout(PROBE_DEADLINE, async {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if line.contains(PROBE_END) {
                return true;
            }
        }
        false
    })
    .await
    .unwrap_or(false);
    // It may have ended already.
    let _ = child.kill().await;
    reached
}

fn boot_id() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

fn remembered(cache: &Path) -> Option<bool> {
    let text = std::fs::read_to_string(cache).ok()?;
    let (boot, answer) = text.trim().split_once(' ')?;
    (boot == boot_id()?).then_some(answer == "kvm")
}

fn remember(cache: &Path, works: bool) {
    let answer = if works { "kvm" } else { "tcg" };
    let written = boot_id().map(|boot| std::fs::write(cache, format!("{boot} {answer}\n")));
    if let Some(Err(error)) = written {
        tracing::warn!(%error, path = %cache.display(), "the acceleration probe's answer is not remembered");
    }
}

/// Path of QEMU in PATH, for a parent that starts it by its absolute path.
#[must_use]
pub fn find_in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(extra).map(|dir| dir.join(program)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(parse_version(debian), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(parse_version("nonsense"), None);
    }

    #[test]
    fn an_answer_of_another_boot_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("acceleration");
        assert_eq!(remembered(&cache), None);
        remember(&cache, true);
        assert_eq!(remembered(&cache), Some(true));
        std::fs::write(&cache, "another-boot kvm\n").unwrap();
        assert_eq!(remembered(&cache), None);
    }
}
