//! The data disk: formats it when it is new, checks, mounts and grows it, and puts its folders where
//! programs look for them.
//!
//! A disk is formatted only when its first block is all zeros. One with errors that e2fsck does not
//! mend by itself is mounted read-only: docker will not start, but nothing is lost, and `dhow shell`
//! can look. One that cannot be mounted at all ends the boot.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use dhow_protocol::boot::DATA_DISK_SERIAL;
use dhow_protocol::errors::chain;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::console;
use super::disk::{self, Content, Superblock};
use super::error::InitError;
use super::program;

const DATA: &str = "/data";
const MKFS: &str = "/sbin/mkfs.ext4";
const FSCK: &str = "/sbin/e2fsck";
const RESIZE: &str = "/sbin/resize2fs";
/// From this size on the journal is limited: mke2fs would take up to 1 GiB, and a sparse disk never
/// gives that back.
const LIMIT_JOURNAL_FROM: u64 = 16 << 30;
/// A filesystem that is smaller than its disk by less than this is as large as it gets: the last
/// block group must have room for its own metadata.
const GROW_FROM: u64 = 16 << 20;
const FLAGS: MsFlags = MsFlags::MS_NOATIME;
/// `discard` gives deleted files' room back to the host; errors stop all writing at once.
const OPTIONS: &str = "errors=remount-ro,discard";

/// Folders of the disk, their modes, and where they are bound to.
const FOLDERS: [(&str, u32, Option<&str>); 6] = [
    ("log", 0o755, None),
    ("bundles", 0o755, None),
    ("docker", 0o710, Some("/var/lib/docker")),
    ("containerd", 0o711, Some("/var/lib/containerd")),
    ("home", 0o755, Some("/home")),
    ("root", 0o700, Some("/root")),
];

/// Mounts the data disk at `/data` and binds its folders.
///
/// # Errors
/// When it holds something else, or cannot be mounted.
pub(crate) fn mount_disk() -> Result<(), InitError> {
    let path = disk::find(DATA_DISK_SERIAL)?;
    let mut device = File::open(&path).map_err(InitError::at("open the data disk", &path))?;
    let (size, content) = disk::inspect(&mut device).map_err(InitError::at("read the data disk", &path))?;
    drop(device);
    let mut writable = true;
    match content {
        Content::Blank => {
            format(&path, size)?;
            mount_at(&path, FLAGS, OPTIONS)?;
        }
        Content::Ext4(superblock) => {
            writable = check_and_mount(&path, superblock)?;
            if writable && superblock.size.saturating_add(GROW_FROM) <= size {
                grow(&path);
            }
        }
        Content::Foreign => return Err(InitError::Foreign(path)),
        Content::LostSuperblock => return Err(InitError::LostSuperblock(path)),
    }
    bind_folders(writable)
}

fn format(disk: &Path, size: u64) -> Result<(), InitError> {
    tracing::info!(disk = %disk.display(), size, "formatting the new data disk");
    let disk = disk.to_string_lossy();
    let mut arguments = vec!["-q", "-F", "-m", "0", "-L", DATA_DISK_SERIAL];
    // The disk reads as zeros where nothing was written: no discards, no zeroing of inode tables,
    // neither now nor by a kernel thread later.
    // The block size as `disk` assumes it, for small disks too.
    arguments.extend(["-b", "4096"]);
    arguments.extend(["-E", "nodiscard,assume_storage_prezeroed=1"]);
    if size >= LIMIT_JOURNAL_FROM {
        arguments.extend(["-J", "size=128"]);
    }
    arguments.push(&disk);
    program::run(MKFS, &arguments)?.expect(&[0]).map(drop)
}

/// Mounts an existing filesystem, mending it first where it is marked as broken or does not mount.
/// False when it could only be mounted read-only.
fn check_and_mount(disk: &Path, superblock: Superblock) -> Result<bool, InitError> {
    if superblock.needs_replay {
        tracing::warn!("the VM ended without unmounting its data disk; its journal is replayed");
    }
    if !superblock.needs_check {
        // What e2fsck would do to a filesystem without errors, mounting does: it replays the journal.
        match mount_at(disk, FLAGS, OPTIONS) {
            Ok(()) => return Ok(true),
            Err(error) => tracing::error!(error = chain(&error), "the data disk is checked"),
        }
    }
    let mended = check(disk).and_then(|()| mount_at(disk, FLAGS, OPTIONS));
    let Err(problem) = mended else { return Ok(true) };
    tracing::error!(
        error = chain(&problem),
        "the data disk is mounted read-only, docker will not start; stop the VM and repair the profile's \
         disk file on the host with `e2fsck -f`"
    );
    let read_only = FLAGS | MsFlags::MS_RDONLY;
    mount_at(disk, read_only, "errors=remount-ro")
        // Without its journal: what was written last is missing, but the rest can be read.
        .or_else(|_| mount_at(disk, read_only, "noload"))
        .map_err(|source| InitError::Data { disk: disk.to_owned(), source: Box::new(source) })?;
    Ok(false)
}

/// e2fsck(8): mends what is safe to mend; 0 nothing to do, 1 mended, 2 mended and a reboot is wanted
/// (for a mounted root, which this is not).
fn check(disk: &Path) -> Result<(), InitError> {
    // This may take minutes: whoever waits for the boot should know why.
    console::error("checking the data disk, which has errors");
    let said = program::run(FSCK, &["-p", &disk.to_string_lossy()])?.expect(&[0, 1, 2])?;
    tracing::warn!(said, "the data disk was checked");
    Ok(())
}

fn mount_at(disk: &Path, flags: MsFlags, options: &str) -> Result<(), InitError> {
    mount(Some(disk), DATA, Some("ext4"), flags, Some(options))
        .map_err(|error| match error {
            // musl has no words for it.
            Errno::EUCLEAN => io::Error::other("its structure is damaged (EUCLEAN)"),
            other => other.into(),
        })
        .map_err(InitError::at("mount the data disk", disk))
}

/// Makes the filesystem as large as its disk. What does not work leaves it as it was.
fn grow(disk: &Path) {
    let grown = program::run(RESIZE, &[&disk.to_string_lossy()]).and_then(|ended| ended.expect(&[0]));
    match grown {
        Ok(said) => tracing::info!(said, "the data disk has grown"),
        Err(error) => tracing::error!(error = chain(&error), "the data disk could not be grown"),
    }
}

/// Makes the folders that are missing and binds those that have a place.
fn bind_folders(writable: bool) -> Result<(), InitError> {
    for (name, mode, place) in FOLDERS {
        let folder = Path::new(DATA).join(name);
        match DirBuilder::new().mode(mode).create(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(_) if !writable => continue,
            made => made.map_err(InitError::at("make the folder", &folder))?,
        }
        if let Some(place) = place {
            mount(Some(&folder), place, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(InitError::at("bind a folder of the data disk to", place))?;
        }
    }
    Ok(())
}
