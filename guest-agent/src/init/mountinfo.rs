//! `/proc/self/mountinfo`: what is mounted, in the order of mounting.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Where.
    pub target: PathBuf,
    /// Type of the filesystem.
    pub kind: String,
    /// A device, or a name that means nothing.
    pub source: String,
}

/// Types that have nothing to write back.
const KERNELS: [&str; 9] =
    ["proc", "sysfs", "devtmpfs", "devpts", "cgroup2", "tracefs", "bpf", "mqueue", "rootfs"];
/// Still in use by PID 1 itself.
const NEEDED: [&str; 2] = ["/", "/run"];

impl Mount {
    /// Whether power-off has to unmount it.
    pub(crate) fn is_ours(&self) -> bool {
        !KERNELS.contains(&self.kind.as_str()) && !NEEDED.iter().any(|path| Path::new(path) == self.target)
    }

    /// Whether it is on a disk, and not in memory.
    pub(crate) fn has_disk(&self) -> bool {
        self.source.starts_with("/dev/")
    }

    /// Whether a process serves it.
    pub(crate) fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }

    /// Parses a line (proc_pid_mountinfo(5)):
    /// `36 35 98:0 /root /target rw,noatime master:1 - ext4 /dev/vdb rw`.
    fn parse(line: &str) -> Option<Self> {
        let (first, second) = line.split_once(" - ")?;
        let mut second = second.split(' ');
        Some(Self {
            target: OsString::from_vec(unescape(first.split(' ').nth(4)?)).into(),
            kind: second.next()?.to_owned(),
            source: second.next()?.to_owned(),
        })
    }
}

/// This namespace's mounts; later ones lie above earlier ones.
pub(crate) fn read() -> Vec<Mount> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    parse(&String::from_utf8_lossy(&table))
}

fn parse(table: &str) -> Vec<Mount> {
    table.lines().filter_map(Mount::parse).collect()
}

/// Space, tab, newline and backslash are three octal digits behind a backslash.
fn unescape(field: &str) -> Vec<u8> {
    let bytes = field.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if bytes[at] == b'\\' => {
                plain.push(byte);
                at += 4;
            }
            _ => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_kinds_and_sources() {
        let table = "\
21 1 0:5 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/lower
22 21 254:16 / /data rw,noatime shared:2 master:3 - ext4 /dev/vdb rw,discard
23 21 0:40 / /home/a\\040b\\134 rw - fuse.dhow dhow rw
24 21 0:4 / /proc rw - proc proc rw
garbage
25 21 0:5 /x /run rw - tmpfs tmpfs rw
";
        let mounts = parse(table);
        let targets: Vec<_> = mounts.iter().map(|mount| mount.target.to_str().unwrap()).collect();
        assert_eq!(targets, ["/", "/data", "/home/a b\\", "/proc", "/run"]);
        let ours: Vec<_> = mounts.iter().map(Mount::is_ours).collect();
        assert_eq!(ours, [false, true, true, false, false]);
        assert!(mounts[1].has_disk() && !mounts[2].has_disk());
        assert!(mounts[2].is_fuse() && !mounts[1].is_fuse());
    }

    #[test]
    fn malformed_escapes_stay() {
        assert_eq!(unescape("a\\04"), b"a\\04");
        assert_eq!(unescape("\\999\\"), b"\\999\\");
    }
}
