//! The kernel's FUSE messages as bytes (uapi/linux/fuse.h, protocol 7.40): what is read from
//! /dev/fuse and what is written to it. Numbers are in the machine's own order.
//!
//! No `repr(C)`: fields are read and written one by one, in the header's order, so that padding is
//! always there and always zero. The sizes are tested against those of the header.

use std::fmt;

/// `FUSE_KERNEL_VERSION`.
pub const MAJOR: u32 = 7;
/// The newest minor version that this file knows.
pub const MINOR: u32 = 40;

/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;
/// Bytes of `struct fuse_entry_out`.
pub const ENTRY: usize = 128;
/// Bytes of `struct fuse_dirent` without the name.
pub const DIRENT: usize = 24;

/// > Request ID flags … FUSE_UNIQUE_RESEND: the request is resent
pub const UNIQUE_RESEND: u64 = 1 << 63;

/// `code` of a notification that asks for the unanswered requests again (kernel 6.9).
pub const NOTIFY_RESEND: i32 = 7;

/// Operation codes (`enum fuse_opcode`), those that are told apart here.
#[allow(missing_docs, reason = "the header's own names")]
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const COPY_FILE_RANGE: u32 = 47;
}

/// Flags of INIT, `flags` and `flags2` as one number.
#[allow(missing_docs, reason = "the header's own names")]
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const HAS_RESEND: u64 = 1 << 39;
}

/// `valid` of SETATTR (`FATTR_…`).
#[allow(missing_docs, reason = "the header's own names")]
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// `fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;

/// A message that ends too early. The kernel never sends one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short;

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message of the kernel's FUSE ended too early")
    }
}

/// Reads fields in order.
#[derive(Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The fields of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Short)?;
        self.0 = rest;
        Ok(*head)
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Result<u32, Short> {
        self.take().map(u32::from_ne_bytes)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Result<u64, Short> {
        self.take().map(u64::from_ne_bytes)
    }

    /// Leaves bytes out.
    pub fn skip(&mut self, bytes: usize) -> Result<(), Short> {
        self.0 = self.0.get(bytes..).ok_or(Short)?;
        Ok(())
    }

    /// A name: the bytes before the next NUL.
    pub fn name(&mut self) -> Result<&'a [u8], Short> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Short)?;
        let name = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Ok(name)
    }

    /// The next `length` bytes.
    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8], Short> {
        let bytes = self.0.get(..length).ok_or(Short)?;
        self.0 = &self.0[length..];
        Ok(bytes)
    }
}

/// `struct fuse_in_header`: begins every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InHeader {
    /// Bytes of the request with this header.
    pub length: u32,
    /// What is asked.
    pub opcode: u32,
    /// The request's number.
    pub unique: u64,
    /// The node that it is about.
    pub node: u64,
    /// Who asks.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

impl InHeader {
    /// Splits a request into header and body.
    pub fn split(request: &[u8]) -> Result<(Self, &[u8]), Short> {
        let mut fields = Fields::new(request);
        let header = Self {
            length: fields.u32()?,
            opcode: fields.u32()?,
            unique: fields.u64()?,
            node: fields.u64()?,
            uid: fields.u32()?,
            gid: fields.u32()?,
        };
        // pid, total_extlen, padding.
        fields.skip(8)?;
        Ok((header, fields.0))
    }
}

/// `struct fuse_init_in`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitIn {
    /// The kernel's protocol.
    pub major: u32,
    /// Its minor version.
    pub minor: u32,
    /// Bytes that it would read ahead.
    pub max_readahead: u32,
    /// What it can do ([`init`]).
    pub flags: u64,
}

impl InitIn {
    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, Short> {
        let mut fields = Fields::new(body);
        let (major, minor, max_readahead) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let low = u64::from(fields.u32()?);
        let high = if low & init::INIT_EXT != 0 { u64::from(fields.u32()?) } else { 0 };
        Ok(Self { major, minor, max_readahead, flags: low | high << 32 })
    }
}

/// Writes fields in order.
#[derive(Debug, Default)]
pub struct Message(pub Vec<u8>);

impl Message {
    /// 16 bits more.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// 32 bits more.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// 64 bits more.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// That many zero bytes more.
    pub fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
}

/// `struct fuse_out_header`: begins every answer, with `error` 0 or a negative errno; and every
/// notification, with `unique` 0 and its code in `error`.
pub fn out_header(length: usize, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let mut header = [0; OUT_HEADER];
    // An answer is at the most 1 MiB of data and a header.
    let length = u32::try_from(OUT_HEADER + length).unwrap_or(u32::MAX);
    header[..4].copy_from_slice(&length.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// `struct fuse_attr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Seconds and nanoseconds of last access, change of data, change.
    pub times: [(u64, u32); 3],
    /// Type and mode.
    pub mode: u32,
    /// Hard links.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Preferred size of a read or write.
    pub block_size: u32,
}

impl Attr {
    fn put(&self, to: &mut Message) {
        to.u64(self.ino).u64(self.size).u64(self.blocks);
        let [access, data, change] = self.times;
        to.u64(access.0).u64(data.0).u64(change.0).u32(access.1).u32(data.1).u32(change.1);
        to.u32(self.mode).u32(self.links).u32(self.uid).u32(self.gid);
        // rdev: devices are seen, never opened.
        to.u32(0).u32(self.block_size).u32(0);
    }
}

/// How long the kernel may believe something, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Valid(pub u64);

impl Valid {
    fn seconds(self) -> u64 {
        self.0 / 1_000_000_000
    }

    fn nanos(self) -> u32 {
        // Below 10^9.
        (self.0 % 1_000_000_000) as u32
    }
}

/// Adds a `struct fuse_entry_out`: a node with one reference.
pub fn put_entry(to: &mut Message, attr: &Attr, valid: Valid) {
    // The generation: node ids are not reused for another file.
    to.u64(attr.ino).u64(0);
    to.u64(valid.seconds()).u64(valid.seconds()).u32(valid.nanos()).u32(valid.nanos());
    attr.put(to);
}

/// Adds a `struct fuse_attr_out`.
pub fn put_attr(to: &mut Message, attr: &Attr, valid: Valid) {
    to.u64(valid.seconds()).u32(valid.nanos()).u32(0);
    attr.put(to);
}

/// Bytes of a `struct fuse_dirent` with its name, padded (`FUSE_DIRENT_SIZE`).
pub fn dirent_size(name: usize) -> usize {
    (DIRENT + name).next_multiple_of(8)
}

/// Adds a `struct fuse_dirent`. `offset` is where the next one is.
pub fn put_dirent(to: &mut Message, ino: u64, offset: u64, mode: u32, name: &[u8]) {
    // Names are at the most 255 bytes.
    to.u64(ino).u64(offset).u32(name.len() as u32).u32(mode >> 12);
    to.0.extend_from_slice(name);
    to.zeros(dirent_size(name.len()) - DIRENT - name.len());
}

/// `struct fuse_init_out`.
#[derive(Debug, Clone, Copy)]
pub struct InitOut {
    /// Bytes to read ahead.
    pub max_readahead: u32,
    /// What is wanted of what the kernel can do.
    pub flags: u64,
    /// Asynchronous requests at once.
    pub max_background: u16,
    /// From so many on the kernel holds back.
    pub congestion_threshold: u16,
    /// Bytes of a write.
    pub max_write: u32,
    /// Pages of a request.
    pub max_pages: u16,
}

impl InitOut {
    /// Its bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut to = Message::default();
        to.u32(MAJOR).u32(MINOR).u32(self.max_readahead).u32(self.flags as u32);
        to.u16(self.max_background).u16(self.congestion_threshold);
        // Times have nanoseconds; no DAX mapping; flags2; no stacking; unused.
        to.u32(self.max_write).u32(1).u16(self.max_pages).u16(0).u32((self.flags >> 32) as u32);
        to.u32(0).zeros(24);
        to.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_headers() {
        let valid = Valid(0);
        let mut to = Message::default();
        Attr::default().put(&mut to);
        assert_eq!(to.0.len(), 88);
        let mut to = Message::default();
        put_entry(&mut to, &Attr::default(), valid);
        assert_eq!(to.0.len(), ENTRY);
        let mut to = Message::default();
        put_attr(&mut to, &Attr::default(), valid);
        assert_eq!(to.0.len(), 104);
        let out = InitOut {
            max_readahead: 0,
            flags: 0,
            max_background: 0,
            congestion_threshold: 0,
            max_write: 0,
            max_pages: 0,
        };
        assert_eq!(out.to_bytes().len(), 64);
        for length in 1..=255 {
            let mut to = Message::default();
            put_dirent(&mut to, 1, 2, 0o100644, &vec![b'x'; length]);
            assert_eq!(to.0.len(), dirent_size(length));
            assert_eq!(to.0.len() % 8, 0);
        }
    }

    #[test]
    fn fields_are_where_the_header_has_them() {
        let attr = Attr {
            ino: 1,
            size: 2,
            blocks: 3,
            times: [(4, 7), (5, 8), (6, 9)],
            mode: 10,
            links: 11,
            uid: 12,
            gid: 13,
            block_size: 15,
        };
        let mut to = Message::default();
        put_entry(&mut to, &attr, Valid(1_500_000_000));
        let mut fields = Fields::new(&to.0);
        assert_eq!((fields.u64(), fields.u64()), (Ok(1), Ok(0)));
        assert_eq!((fields.u64(), fields.u64()), (Ok(1), Ok(1)));
        assert_eq!((fields.u32(), fields.u32()), (Ok(500_000_000), Ok(500_000_000)));
        (1..=6).for_each(|number| assert_eq!(fields.u64(), Ok(number)));
        (7..=13).for_each(|number| assert_eq!(fields.u32(), Ok(number)));
        assert_eq!((fields.u32(), fields.u32(), fields.u32()), (Ok(0), Ok(15), Ok(0)));
        assert_eq!(fields.u32(), Err(Short));
    }

    #[test]
    fn a_header_is_split_from_its_body() {
        let mut to = Message::default();
        to.u32(44).u32(opcode::LOOKUP).u64(6).u64(1).u32(1000).u32(100).u32(77).u16(0).u16(0);
        assert_eq!(to.0.len(), 40);
        to.0.extend_from_slice(b"abc\0");
        let (header, body) = InHeader::split(&to.0).unwrap();
        assert_eq!(header, InHeader { length: 44, opcode: 1, unique: 6, node: 1, uid: 1000, gid: 100 });
        assert_eq!(Fields::new(body).name(), Ok(&b"abc"[..]));
        for cut in 0..40 {
            assert_eq!(InHeader::split(&to.0[..cut]), Err(Short));
        }
        assert_eq!(Fields::new(b"abc").name(), Err(Short));
    }

    #[test]
    fn later_flags_count_only_where_they_are_announced() {
        let mut to = Message::default();
        to.u32(7).u32(40).u32(131_072).u32(init::INIT_EXT as u32).u32(1 << 7).zeros(44);
        assert_eq!(to.0.len(), 64);
        assert_eq!(InitIn::parse(&to.0).unwrap().flags, init::INIT_EXT | init::HAS_RESEND);
        to.0[12..16].copy_from_slice(&1u32.to_ne_bytes());
        assert_eq!(InitIn::parse(&to.0).unwrap().flags, init::ASYNC_READ);
        assert_eq!(out_header(4, -2, 9).len(), OUT_HEADER);
    }
}
