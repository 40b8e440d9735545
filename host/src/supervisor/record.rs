//! What a successor must know of a VM that runs: written when something of it changes, read by a
//! supervisor that finds it.
//!
//! The file lies in the run folder and holds for one boot of the host; a process in it is named by its
//! pid and start time, so that a reused pid is not mistaken for it. To change the format, add a variant
//! at the end of [`Versioned`]: an older supervisor then sees that the record is not for it.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use bincode::{Decode, Encode};
use dhow_parent::SpawnedChild;
use dhow_protocol::codec;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::processes::{QEMU_NAME, has_ended};
use crate::config::{MountSpec, Paths};
use crate::forward::rules::Passages;
use dhow_parent::procfs::{Stat, is_dying};

/// Largest record in bytes; a share takes about 100, a rule 20.
const LIMIT: u64 = 1 << 20;

/// How far a VM has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Phase {
    /// Docker has not answered yet.
    Starting,
    /// Docker has answered once.
    Started,
    /// Somebody has asked for its end.
    Stopping,
}

/// How the guest reaches the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum NetworkKind {
    /// Over passt, a process of its own.
    Passt {
        /// Whether QEMU connects to a new passt when the old one has died.
        reconnects: bool,
    },
    /// In QEMU itself.
    Slirp,
}

/// A process of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProcessRecord {
    /// The name that it was spawned under.
    pub name: String,
    /// Its pid.
    pub pid: i32,
    /// Clock ticks from the host's boot to its start: proc_pid_stat(5), field 22.
    pub started: u64,
}

/// A share of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ShareRecord {
    /// Its number in this boot of the guest.
    pub number: u32,
    /// Its path on host and guest.
    pub path: PathBuf,
    /// Read-only for the guest.
    pub read_only: bool,
    /// Names its file sessions, whichever stream carries them.
    pub session: [u8; 16],
}

impl ShareRecord {
    /// As the settings have it.
    pub fn spec(&self) -> MountSpec {
        MountSpec { path: self.path.clone(), read_only: self.read_only }
    }
}

/// A VM that runs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Record {
    /// The host's boot, `/proc/sys/kernel/random/boot_id`.
    pub host_boot: String,
    /// How far it has come.
    pub phase: Phase,
    /// "kvm" or "tcg".
    pub acceleration: String,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Size of the data disk in GiB.
    pub disk_gib: u64,
    /// The image's folder.
    pub image: PathBuf,
    /// Make the docker context current once docker answers.
    pub activate: bool,
    /// How the guest reaches the network.
    pub network: NetworkKind,
    /// The shares, a folder before what lies in it.
    pub shares: Vec<ShareRecord>,
    /// Ports and sockets between host and guest.
    pub passages: Passages,
    /// The VM's own network, and its bits.
    pub subnet: (Ipv4Addr, u8),
    /// The processes, at most one of a name.
    pub processes: Vec<ProcessRecord>,
}

#[derive(Debug, Encode, Decode)]
enum Versioned {
    /// Of a version that knew no rules for ports: such a VM is not taken over.
    V1,
    V2(Box<Record>),
}

/// Where the record lies.
fn file(paths: &Paths) -> PathBuf {
    paths.run_dir().join("vm.record")
}

/// This boot of the host.
pub fn host_boot() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Whether a VM was left without its record being removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// No record.
    None,
    /// One of this boot of the host.
    ThisBoot,
    /// One of an earlier boot.
    EarlierBoot,
}

impl Record {
    /// The record of a VM of this boot of the host; `None` where there is none. One that cannot be read
    /// is none either: whatever it was of then shows by the disk's lock.
    pub fn read(paths: &Paths) -> Option<Self> {
        let path = file(paths);
        let record = match Self::parse(&path) {
            Ok(record) => record,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the record of a VM cannot be read");
                return None;
            }
        };
        record.is_of_this_boot().then_some(record)
    }

    /// What kind of record is there, read or not.
    pub fn last(paths: &Paths) -> Last {
        match Self::parse(&file(paths)) {
            Ok(record) if record.is_of_this_boot() => Last::ThisBoot,
            Ok(_) => Last::EarlierBoot,
            Err(_) => Last::None,
        }
    }

    fn is_of_this_boot(&self) -> bool {
        host_boot().ok().as_ref() == Some(&self.host_boot)
    }

    fn parse(path: &Path) -> io::Result<Self> {
        use std::io::Read;
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(LIMIT).read_to_end(&mut bytes)?;
        match codec::from_bytes(&bytes).map_err(io::Error::other)? {
            Versioned::V2(record) => Ok(*record),
            Versioned::V1 => Err(io::Error::other("it is of an older version")),
        }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// When the run folder takes no file.
    pub fn write(&self, paths: &Paths) -> io::Result<()> {
        let bytes = codec::to_bytes(&Versioned::V2(Box::new(self.clone()))).map_err(io::Error::other)?;
        crate::files::replace(&file(paths), &bytes)
    }

    /// Removes it: nothing of the VM is left.
    pub fn remove(paths: &Paths) {
        match std::fs::remove_file(file(paths)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                // Its processes have ended, so that it is of no consequence.
                tracing::warn!(%error, "the record of a VM that has ended cannot be removed");
            }
            _ => {}
        }
    }

    /// Whether its QEMU lives.
    pub fn runs(&self) -> bool {
        let mut qemu = self.processes.iter().filter(|process| process.name == QEMU_NAME);
        qemu.any(|process| process.find().is_some_and(|qemu| !is_dying(qemu.pid)))
    }

    /// Pids of its processes that live.
    pub fn pids(&self) -> Vec<i32> {
        self.processes.iter().filter_map(|process| Some(process.find()?.pid)).collect()
    }

    /// Notes a process in the place of an earlier one of its name.
    pub fn note(&mut self, child: &SpawnedChild) {
        self.processes.retain(|process| process.name != child.name);
        if let Some(started) = start_time(child.pid) {
            self.processes.push(ProcessRecord { name: child.name.clone(), pid: child.pid, started });
        }
    }
}

impl ProcessRecord {
    /// The process, where it is there: it may be dying.
    pub fn find(&self) -> Option<SpawnedChild> {
        let pid = Pid::from_raw(self.pid)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The pidfd is of whoever has the pid now. If it lives after the comparison, it was compared.
        let same = start_time(self.pid) == Some(self.started);
        (same && !has_ended(&pidfd)).then(|| SpawnedChild { name: self.name.clone(), pid: self.pid, pidfd })
    }
}

/// When a process started, in clock ticks since the host's boot.
fn start_time(pid: i32) -> Option<u64> {
    Stat::read(pid)?.start_time()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn record() -> Record {
        Record {
            host_boot: host_boot().unwrap(),
            phase: Phase::Started,
            acceleration: "tcg".to_owned(),
            cpus: 2,
            memory_mib: 2048,
            disk_gib: 100,
            image: "/images/1".into(),
            activate: true,
            network: NetworkKind::Passt { reconnects: true },
            shares: vec![ShareRecord {
                number: 1,
                path: "/home/user".into(),
                read_only: false,
                session: [7; 16],
            }],
            passages: Passages::default(),
            subnet: ([10, 0, 0, 0].into(), 24),
            processes: vec![ProcessRecord { name: "qemu".to_owned(), pid: 4, started: 5 }],
        }
    }

    fn paths(dir: &Path) -> Paths {
        let paths = Paths::at(dir, &"default".parse().unwrap()).unwrap();
        paths.create().unwrap();
        paths
    }

    #[test]
    fn a_record_round_trips_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        assert_eq!(Record::read(&paths), None);
        record().write(&paths).unwrap();
        assert_eq!(Record::read(&paths), Some(record()));
        assert_eq!(Record::last(&paths), Last::ThisBoot);
        Record::remove(&paths);
        Record::remove(&paths);
        assert_eq!(Record::read(&paths), None);
    }

    #[test]
    fn garbage_another_version_and_another_boot_are_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        for bytes in [&b""[..], b"\x00", b"\x01\x00", &[0xff; 64]] {
            std::fs::write(file(&paths), bytes).unwrap();
            assert_eq!(Record::read(&paths), None, "{bytes:?}");
            assert_eq!(Record::last(&paths), Last::None);
        }
        Record { host_boot: "another".to_owned(), ..record() }.write(&paths).unwrap();
        assert_eq!((Record::read(&paths), Record::last(&paths)), (None, Last::EarlierBoot));
    }

    #[test]
    fn golden_bytes() {
        let record = Record { host_boot: "b".to_owned(), shares: Vec::new(), ..record() };
        let bytes = codec::to_bytes(&Versioned::V2(Box::new(record))).unwrap();
        let want =
            b"\x01\x01b\x01\x03tcg\x02\xfb\x00\x08\x64\x09/images/1\x01\x00\x01\x00\x00\x00\x00\x0a\x00\x00\x00\x18\x01\x04qemu\x08\x05";
        assert_eq!(bytes, want);
    }

    #[test]
    fn a_process_is_found_and_its_successor_at_the_same_pid_is_not() {
        let mut sleeper = Command::new("/bin/sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(sleeper.id()).unwrap();
        let process = ProcessRecord { name: "sleeper".to_owned(), pid, started: start_time(pid).unwrap() };
        assert_eq!(process.find().unwrap().pid, pid);
        assert!(ProcessRecord { started: process.started + 1, ..process.clone() }.find().is_none());
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert!(process.find().is_none());
    }
}
