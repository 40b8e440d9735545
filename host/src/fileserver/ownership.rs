//! Owner and mode as the guest sees them.
//!
//! On the host every file belongs to the user who runs Dhow, and no file gets set-user-id or
//! set-group-id bits by the guest's doing. What the guest is to see instead stands in the extended
//! attribute `user.dhow.owner` of the host file: `uid:gid:mode:host-mode`, the modes in octal.
//! - A host file without it shows its real owner and mode, so `docker run -u $(id -u)` works as
//!   without a VM.
//! - It is written when the guest creates a file as somebody else, or changes owner or mode, and the
//!   real ones cannot say it; it is removed when they can.
//! - When the host has changed the mode since (`host-mode` differs), the host's mode shows.
//! - The owner of a server that is not root keeps read and write permission (and search, for
//!   folders) on the host, whatever mode the guest asked for: the guest's kernel checks permissions,
//!   and the server must be able to do what it allows (git writes its 0444 objects).
//! - Symlinks cannot have it (Linux): their owner is the host's, and a chown of one does nothing.
//! - Where a file system has no such attributes (and for fifos and sockets), mode bits are real
//!   ones, and a chown is tried for real: EPERM unless the server is root.

use dhow_protocol::files::FileKind;
use rustix::fs::{self, Gid, Mode, Uid, XattrFlags};
use rustix::io::{Errno, Result};

use super::host_fs::{Spot, Status};

const ATTRIBUTE: &str = "user.dhow.owner";
/// Set-group-id; of a folder: files made in it take its group.
pub const SET_GID: u32 = 0o2000;
/// Set-user-id and set-group-id.
pub const SET_ID: u32 = 0o6000;

/// What the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Lower twelve bits.
    pub mode: u32,
}

/// As the guest is to see it.
pub fn of(spot: &Spot, status: &Status) -> Owner {
    let real = Owner { uid: status.uid, gid: status.gid, mode: status.mode };
    if !can_have(status.kind) {
        return real;
    }
    let mut text = [0; 64];
    let got = match spot {
        Spot::Fd(_) => fs::getxattr(spot.proc_path(), ATTRIBUTE, &mut text[..]),
        Spot::Named(..) => fs::lgetxattr(spot.proc_path(), ATTRIBUTE, &mut text[..]),
    };
    let Ok(length) = got else { return real };
    match text.get(..length).and_then(parse) {
        Some((owner, host_mode)) if host_mode == status.mode => owner,
        Some((owner, _)) => Owner { mode: status.mode, ..owner },
        None => real,
    }
}

/// Makes the guest see `wanted`. `spot` is an `O_PATH` fd, so that it is this file and no other.
pub fn set(spot: &Spot, status: &Status, wanted: Owner) -> Result<()> {
    if status.kind == FileKind::Symlink {
        return Ok(());
    }
    let path = spot.proc_path();
    let mut host_mode = mode_on_host(status.kind, wanted.mode);
    if status.kind == FileKind::Folder {
        // A folder that hands its group on does so because the host's user wants it.
        host_mode |= status.mode & wanted.mode & SET_GID;
    }
    if host_mode != status.mode {
        fs::chmod(&path, Mode::from_raw_mode(host_mode))?;
    }
    let real = Owner { uid: status.uid, gid: status.gid, mode: host_mode };
    if !can_have(status.kind) {
        return set_for_real(&path, &real, &wanted);
    }
    if wanted == real {
        return match fs::removexattr(&path, ATTRIBUTE) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error),
        };
    }
    let text = format!("{}:{}:{:o}:{:o}", wanted.uid, wanted.gid, wanted.mode, host_mode);
    match fs::setxattr(&path, ATTRIBUTE, text.as_bytes(), XattrFlags::empty()) {
        Err(Errno::OPNOTSUPP) => set_for_real(&path, &real, &wanted),
        other => other,
    }
}

/// The mode that a file gets on the host.
pub fn mode_on_host(kind: FileKind, wanted: u32) -> u32 {
    let own = match kind {
        _ if rustix::process::geteuid().is_root() => 0,
        FileKind::Folder => 0o700,
        FileKind::Regular => 0o600,
        _ => 0,
    };
    (wanted & !SET_ID) | own
}

/// The mode without what runs a program as somebody else.
pub fn without_privilege(mode: u32) -> u32 {
    // Without the group's execute permission, set-group-id means mandatory locking, not a group.
    let group = if mode & 0o010 == 0 { 0 } else { SET_GID };
    mode & !(0o4000 | group)
}

fn set_for_real(path: &[u8], real: &Owner, wanted: &Owner) -> Result<()> {
    let uid = (wanted.uid != real.uid).then(|| Uid::from_raw(wanted.uid));
    let gid = (wanted.gid != real.gid).then(|| Gid::from_raw(wanted.gid));
    if uid.is_some() || gid.is_some() {
        fs::chown(path, uid, gid)?;
    }
    Ok(())
}

fn can_have(kind: FileKind) -> bool {
    matches!(kind, FileKind::Regular | FileKind::Folder)
}

fn parse(text: &[u8]) -> Option<(Owner, u32)> {
    let mut parts = std::str::from_utf8(text).ok()?.split(':');
    let uid = parts.next()?.parse().ok()?;
    let gid = parts.next()?.parse().ok()?;
    let mode = u32::from_str_radix(parts.next()?, 8).ok()? & 0o7777;
    let host_mode = u32::from_str_radix(parts.next()?, 8).ok()?;
    parts.next().is_none().then_some((Owner { uid, gid, mode }, host_mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attribute_is_four_numbers() {
        let owner = Owner { uid: 999, gid: 0, mode: 0o4755 };
        assert_eq!(parse(b"999:0:4755:755"), Some((owner, 0o755)));
        for bad in [&b""[..], b"1:2:3", b"1:2:3:4:5", b"-1:0:644:644", b"1:2:9:4", b"\xff:0:0:0"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn set_id_bits_never_reach_the_host() {
        assert_eq!(mode_on_host(FileKind::Regular, 0o6755) & SET_ID, 0);
        assert_eq!(mode_on_host(FileKind::Folder, 0o3777), 0o1777);
    }
}
