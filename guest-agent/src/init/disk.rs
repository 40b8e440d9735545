//! Finds a disk by its serial, and tells what is on it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::InitError;

const BLOCK_DEVICES: &str = "/sys/block";
/// How long a disk may take to show after its driver is inserted. It is there at once, as a rule.
const APPEARS_WITHIN: Duration = Duration::from_secs(10);

/// Waits for the disk with the serial and returns its device node.
///
/// # Errors
/// When it does not appear.
pub(crate) fn find(serial: &'static str) -> Result<PathBuf, InitError> {
    let deadline = Instant::now() + APPEARS_WITHIN;
    loop {
        if let Some(name) = with_serial(Path::new(BLOCK_DEVICES), serial) {
            return Ok(Path::new("/dev").join(name));
        }
        if Instant::now() >= deadline {
            return Err(InitError::NoDisk(serial));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Name of the block device below `folder` whose `serial` is that.
fn with_serial(folder: &Path, serial: &str) -> Option<std::ffi::OsString> {
    let devices = std::fs::read_dir(folder).ok()?.flatten();
    devices.map(|device| device.file_name()).find(|name| {
        std::fs::read_to_string(folder.join(name).join("serial")).is_ok_and(|found| found.trim() == serial)
    })
}

/// What a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing yet.
    Blank,
    /// An ext4 filesystem.
    Ext4(Superblock),
    /// Its first block is zeros, but there is a backup superblock.
    LostSuperblock,
    /// Something else.
    Foreign,
}

/// What matters of an ext4 superblock (Documentation/filesystems/ext4/super.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// Size of the filesystem in bytes.
    pub size: u64,
    /// It is marked as erroneous, or was never unmounted and has no journal to make up for it.
    pub needs_check: bool,
    /// It was not unmounted: mounting replays the journal.
    pub needs_replay: bool,
}

/// Offset of the superblock in bytes, and how much of it is looked at.
const SUPERBLOCK_AT: usize = 1024;
const SUPERBLOCK_LEN: usize = 1024;
/// The first block of what mke2fs makes; while it is at work, and until its end, it is zeros.
const FIRST_BLOCK: usize = 4096;
/// mke2fs's first backup superblock: block 32768 of 4096 bytes.
const BACKUP_AT: u64 = 32768 * 4096;
const EXT4_MAGIC: u16 = 0xEF53;
const STATE_VALID: u16 = 1;
const STATE_ERROR: u16 = 2;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_64BIT: u32 = 0x80;

/// Reads a disk's size in bytes and what it holds.
///
/// # Errors
/// As reading does.
pub(crate) fn inspect(disk: &mut File) -> io::Result<(u64, Content)> {
    let size = disk.seek(SeekFrom::End(0))?;
    let mut first = [0; FIRST_BLOCK];
    disk.seek(SeekFrom::Start(0))?;
    disk.read_exact(&mut first)?;
    if first.iter().any(|byte| *byte != 0) {
        let found = Superblock::parse(&first[SUPERBLOCK_AT..]);
        return Ok((size, found.map_or(Content::Foreign, Content::Ext4)));
    }
    if size >= BACKUP_AT + FIRST_BLOCK as u64 {
        disk.seek(SeekFrom::Start(BACKUP_AT))?;
        disk.read_exact(&mut first)?;
        if Superblock::parse(&first).is_some() {
            return Ok((size, Content::LostSuperblock));
        }
    }
    Ok((size, Content::Blank))
}

impl Superblock {
    /// Parses the superblock's bytes; `None` without its magic or with impossible fields.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..SUPERBLOCK_LEN)?;
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if u16_at(0x38) != EXT4_MAGIC {
            return None;
        }
        let (state, incompat) = (u16_at(0x3A), u32_at(0x60));
        let high = if incompat & INCOMPAT_64BIT != 0 { u32_at(0x150) } else { 0 };
        let blocks = u64::from(high) << 32 | u64::from(u32_at(0x4));
        // s_log_block_size: 1024 << n, at most 64 KiB.
        let block_size = 1024_u64 << Some(u32_at(0x18)).filter(|log| *log <= 6)?;
        Some(Self {
            size: blocks.checked_mul(block_size)?,
            needs_check: state & STATE_VALID == 0 || state & STATE_ERROR != 0,
            needs_replay: incompat & INCOMPAT_RECOVER != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn superblock(state: u16, incompat: u32) -> [u8; SUPERBLOCK_LEN] {
        let mut bytes = [0; SUPERBLOCK_LEN];
        bytes[0x4..0x8].copy_from_slice(&3u32.to_le_bytes());
        bytes[0x18..0x1C].copy_from_slice(&2u32.to_le_bytes());
        bytes[0x38..0x3A].copy_from_slice(&EXT4_MAGIC.to_le_bytes());
        bytes[0x3A..0x3C].copy_from_slice(&state.to_le_bytes());
        bytes[0x60..0x64].copy_from_slice(&incompat.to_le_bytes());
        bytes[0x150..0x154].copy_from_slice(&1u32.to_le_bytes());
        bytes
    }

    fn disk(size: u64, parts: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (at, bytes) in parts {
            file.write_all_at(bytes, *at).unwrap();
        }
        file
    }

    fn content(size: u64, parts: &[(u64, &[u8])]) -> Content {
        inspect(&mut disk(size, parts)).unwrap().1
    }

    #[test]
    fn a_new_disk_is_blank_and_anything_else_is_not() {
        assert_eq!(content(1 << 30, &[]), Content::Blank);
        assert_eq!(content(FIRST_BLOCK as u64, &[]), Content::Blank);
        assert_eq!(content(1 << 30, &[(0, b"x")]), Content::Foreign);
        // An interrupted mke2fs: it has written behind the first block.
        assert_eq!(content(1 << 30, &[(4096, b"group descriptors")]), Content::Blank);
        let backup = superblock(STATE_VALID, 0);
        assert_eq!(content(1 << 30, &[(BACKUP_AT, &backup)]), Content::LostSuperblock);
        assert!(inspect(&mut disk(512, &[])).is_err());
    }

    #[test]
    fn a_superblock_tells_its_size_and_state() {
        let at = SUPERBLOCK_AT as u64;
        let of = |state, incompat| content(1 << 20, &[(at, &superblock(state, incompat))]);
        let size = 3 * 4096;
        let clean = Superblock { size, needs_check: false, needs_replay: false };
        assert_eq!(of(STATE_VALID, 0), Content::Ext4(clean));
        let large = Superblock { size: size + (4096 << 32), ..clean };
        assert_eq!(of(STATE_VALID, INCOMPAT_64BIT), Content::Ext4(large));
        let killed = Superblock { needs_replay: true, ..clean };
        assert_eq!(of(STATE_VALID, INCOMPAT_RECOVER), Content::Ext4(killed));
        for state in [0, STATE_ERROR, STATE_VALID | STATE_ERROR] {
            assert_eq!(of(state, 0), Content::Ext4(Superblock { needs_check: true, ..clean }), "{state}");
        }
        let mut absurd = superblock(STATE_VALID, 0);
        absurd[0x18] = 200;
        assert_eq!(content(1 << 20, &[(at, &absurd)]), Content::Foreign);
    }

    #[test]
    fn the_serial_finds_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial) in [("loop0", None), ("vda", Some("dhow-base\n")), ("vdb", Some("dhow-data"))] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            if let Some(serial) = serial {
                std::fs::write(dir.path().join(name).join("serial"), serial).unwrap();
            }
        }
        assert_eq!(with_serial(dir.path(), "dhow-data").unwrap(), "vdb");
        assert_eq!(with_serial(dir.path(), "dhow-base").unwrap(), "vda");
        assert!(with_serial(dir.path(), "dhow").is_none());
    }
}
