//! The system's root: the read-only base below a tmpfs, in place of the initramfs.
//!
//! ```text
//! /newroot  overlay: lower = /lower (erofs base), upper = /upper (tmpfs)
//! then      /proc /sys /dev /run move there, the initramfs is emptied, /newroot becomes /
//! ```
//! Lower and upper stay below the initramfs' root, where no path leads to any more.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use dhow_protocol::boot::BASE_DISK_SERIAL;
use nix::mount::{MsFlags, mount};

use super::disk;
use super::error::InitError;
use super::filesystems::{make_folder, trees};

/// The agent's program, once the initramfs is gone. The worker is started from here.
pub const AGENT_PATH: &str = "/run/dhow/dhow-agent";
/// The agent's own folder for what lasts until power-off.
pub(crate) const RUN_FOLDER: &str = "/run/dhow";
const INIT: &str = "/init";
const NEW_ROOT: &str = "/newroot";
const LOWER: &str = "/lower";
const UPPER: &str = "/upper";

/// Finds and mounts the base, and makes it the root of this process and of the kernel's helpers
/// (which share this process's root, so that `/sbin/modprobe` is found).
///
/// # Errors
/// As mount(2), or when there is no base.
pub(crate) fn switch() -> Result<(), InitError> {
    let base = disk::find(BASE_DISK_SERIAL)?;
    for folder in [NEW_ROOT, LOWER, UPPER] {
        make_folder(Path::new(folder))?;
    }
    mount(Some(&base), LOWER, Some("erofs"), MsFlags::MS_RDONLY | MsFlags::MS_NOATIME, None::<&str>)
        .map_err(InitError::at("mount the base", &base))?;
    let tmpfs = Some("tmpfs");
    mount(tmpfs, UPPER, tmpfs, MsFlags::empty(), Some("mode=0755,size=50%"))
        .map_err(InitError::at("mount", UPPER))?;
    let (upper, work) = (format!("{UPPER}/upper"), format!("{UPPER}/work"));
    make_folder(Path::new(&upper))?;
    make_folder(Path::new(&work))?;
    let overlay = Some("overlay");
    let layers = format!("lowerdir={LOWER},upperdir={upper},workdir={work}");
    mount(overlay, NEW_ROOT, overlay, MsFlags::empty(), Some(layers.as_str()))
        .map_err(InitError::at("mount", NEW_ROOT))?;
    keep_agent()?;
    for target in trees() {
        let new = format!("{NEW_ROOT}{target}");
        mount(Some(target), new.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(InitError::at("move a mount to", &new))?;
    }
    free_initramfs();
    std::env::set_current_dir(NEW_ROOT).map_err(InitError::at("enter", NEW_ROOT))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(InitError::at("make the root of", NEW_ROOT))?;
    nix::unistd::chroot(".").map_err(InitError::at("change the root to", NEW_ROOT))?;
    std::env::set_current_dir("/").map_err(InitError::at("enter", "/"))
}

/// Binds this program, which runs from the initramfs, to [`AGENT_PATH`]: memory has it once.
fn keep_agent() -> Result<(), InitError> {
    make_folder(Path::new(RUN_FOLDER))?;
    File::create(AGENT_PATH).map_err(InitError::at("make", AGENT_PATH))?;
    mount(Some(INIT), AGENT_PATH, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(InitError::at("bind the agent to", AGENT_PATH))
}

/// Gives the initramfs' memory back. Only what lies on it goes, and not the agent; a failure costs
/// memory and nothing else.
fn free_initramfs() {
    let Ok(root) = std::fs::metadata("/") else { return };
    for entry in std::fs::read_dir("/").into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.dev() != root.dev() || path == Path::new(INIT) {
            continue;
        }
        let removed =
            if metadata.is_dir() { remove_folder(&path, root.dev()) } else { std::fs::remove_file(&path) };
        if let Err(error) = removed {
            tracing::debug!(%error, path = %path.display(), "not freed");
        }
    }
}

/// As `remove_dir_all`, but never into another filesystem.
fn remove_folder(folder: &Path, device: u64) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            remove_folder(&entry.path(), device)?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    std::fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_removed_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        std::fs::write(&kept, "").unwrap();
        let gone = dir.path().join("gone");
        std::fs::create_dir_all(gone.join("a/b")).unwrap();
        std::fs::write(gone.join("a/file"), "").unwrap();
        std::os::unix::fs::symlink(dir.path(), gone.join("a/link")).unwrap();
        remove_folder(&gone, std::fs::metadata(&gone).unwrap().dev()).unwrap();
        assert!(!gone.exists() && kept.exists());
        let other = dir.path().join("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("file"), "").unwrap();
        assert!(remove_folder(&other, u64::MAX).is_err());
        assert!(other.join("file").exists());
    }
}
