//! What a new worker must know of a mount, kept beside its fd by PID 1: a memfd.
//!
//! Nothing of the node table is kept: it would have to be written with each lookup. A new worker
//! starts with an empty one, which costs something only where the file server dies as well.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dhow_protocol::codec;
use dhow_protocol::control::MountRequest;
use rustix::fs::MemfdFlags;

/// Version of the layout. Another one is not read: that mount is given up.
const VERSION: u16 = 1;
/// Longest state in bytes: a path and a few numbers.
const LIMIT: usize = 16 << 10;

/// What was agreed with the kernel in INIT.
pub type Negotiated = (u32, u64);

/// A mount's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// What was asked for.
    pub request: MountRequest,
    /// The mount's id for the file server.
    pub mount: [u8; 16],
    /// The kernel's minor protocol version and its flags, once INIT was answered.
    pub negotiated: Option<Negotiated>,
}

/// The memfd of a state.
#[derive(Debug)]
pub struct StateFile(OwnedFd);

impl StateFile {
    /// A new one.
    ///
    /// # Errors
    /// memfd_create(2)'s and write(2)'s.
    pub fn create(state: &State) -> io::Result<Self> {
        let file = Self(rustix::fs::memfd_create("fuse-state", MemfdFlags::CLOEXEC)?);
        file.write(state)?;
        Ok(file)
    }

    /// Writes the state anew. Longer states never become shorter ones: only `negotiated` changes.
    ///
    /// # Errors
    /// write(2)'s.
    pub fn write(&self, state: &State) -> io::Result<()> {
        let value = (VERSION, &state.request, state.mount, state.negotiated);
        let bytes = codec::to_bytes(&value).map_err(io::Error::other)?;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let bytes = [&length.to_le_bytes()[..], &bytes].concat();
        match rustix::io::pwrite(&self.0, &bytes, 0)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// The state in a held memfd.
    ///
    /// # Errors
    /// When it is none, or of another version.
    pub fn read(fd: OwnedFd) -> io::Result<(Self, State)> {
        let mut bytes = vec![0; LIMIT];
        let got = rustix::io::pread(&fd, &mut bytes, 0)?;
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "it holds no state of a mount");
        let (length, rest) = bytes[..got].split_first_chunk::<4>().ok_or_else(bad)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(io::Error::other)?;
        let body = rest.get(..length).ok_or_else(bad)?;
        let (version, request, mount, negotiated) =
            codec::from_bytes::<(u16, MountRequest, [u8; 16], Option<Negotiated>)>(body)
                .map_err(io::Error::other)?;
        if version != VERSION {
            return Err(io::Error::other(format!(
                "state of version {version}, and this agent knows {VERSION}"
            )));
        }
        Ok((Self(fd), State { request, mount, negotiated }))
    }
}

impl AsFd for StateFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_read_as_it_was_written() {
        let request = MountRequest { share: 3, path: "/home/u".to_owned(), read_only: true };
        let mut state = State { request, mount: [7; 16], negotiated: None };
        let file = StateFile::create(&state).unwrap();
        state.negotiated = Some((40, 1 << 39));
        file.write(&state).unwrap();
        let (_, read) = StateFile::read(file.0.try_clone().unwrap()).unwrap();
        assert_eq!(read, state);
    }

    #[test]
    fn another_version_and_garbage_are_refused() {
        let request = MountRequest { share: 3, path: "/x".to_owned(), read_only: false };
        let file = StateFile::create(&State { request, mount: [0; 16], negotiated: None }).unwrap();
        rustix::io::pwrite(&file.0, &[2], 4).unwrap();
        assert!(StateFile::read(file.0.try_clone().unwrap()).unwrap_err().to_string().contains("version 2"));
        for garbage in [&[][..], &[1, 2], &[0xff; 100]] {
            let fd = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
            rustix::io::pwrite(&fd, garbage, 0).unwrap();
            assert!(StateFile::read(fd).is_err());
        }
    }
}
