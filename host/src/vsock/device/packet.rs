//! The 44-byte header that starts every vsock packet, and nothing of what follows it.
//!
//! Layout: virtio v1.2, section 5.10.6 "Device Operation", `struct virtio_vsock_hdr`; all fields little-endian.

/// Length of the header on the queues.
pub const HEADER_LEN: usize = 44;

/// The host's well-known CID (virtio v1.2, 5.10.4 "Device configuration layout").
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type served (virtio v1.2, 5.10.6).
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will receive no more (virtio v1.2, 5.10.6.5).
pub const SHUTDOWN_RCV: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will send no more (virtio v1.2, 5.10.6.5).
pub const SHUTDOWN_SEND: u32 = 2;
/// Both halves.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// The largest payload taken from the guest: Linux's `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` (`linux/virtio_vsock.h`).
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// What a packet asks for (`enum virtio_vsock_op`, virtio v1.2, 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a new connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one at once.
    Rst = 3,
    /// Says that one or both halves are finished.
    Shutdown = 4,
    /// Carries bytes of the stream.
    Rw = 5,
    /// Carries nothing but the credit fields that every packet has.
    CreditUpdate = 6,
    /// Asks for a `CreditUpdate`.
    CreditRequest = 7,
}

impl Op {
    /// The operation of that number, if there is one.
    pub fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet's header in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's CID.
    pub src_cid: u64,
    /// Receiver's CID.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Payload bytes that follow.
    pub len: u32,
    /// Socket type, as sent.
    pub socket_type: u16,
    /// Operation, as sent; see [`Op::from_wire`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer since the start, wrapping.
    pub fwd_cnt: u32,
}

impl Header {
    /// A host-to-guest stream packet without payload.
    pub fn to_guest(guest_cid: u64, host_port: u32, guest_port: u32, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            socket_type: TYPE_STREAM,
            op: op as u16,
            ..Self::default()
        }
    }

    /// The RST that answers `self`, which came from the guest and belongs to no connection.
    ///
    /// `None` when `self` is an RST: an unmatched RST is never answered, or two ends could kill a port pair that
    /// is in use again.
    pub fn reset_for(&self) -> Option<Self> {
        (self.op != Op::Rst as u16).then(|| Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: Op::Rst as u16,
            ..Self::default()
        })
    }

    /// As it goes on a queue.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        out[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        out[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        out[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        out[24..28].copy_from_slice(&self.len.to_le_bytes());
        out[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        out[30..32].copy_from_slice(&self.op.to_le_bytes());
        out[32..36].copy_from_slice(&self.flags.to_le_bytes());
        out[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        out[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        out
    }

    /// From the bytes of a queue. Every bit pattern is a header; what it says is checked by those who act on it.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64_at(bytes, 0),
            dst_cid: u64_at(bytes, 8),
            src_port: u32_at(bytes, 16),
            dst_port: u32_at(bytes, 20),
            len: u32_at(bytes, 24),
            socket_type: u16_at(bytes, 28),
            op: u16_at(bytes, 30),
            flags: u32_at(bytes, 32),
            buf_alloc: u32_at(bytes, 36),
            fwd_cnt: u32_at(bytes, 40),
        }
    }
}

fn array<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u16_at(bytes: &[u8; HEADER_LEN], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let header = Header {
            src_cid: 2,
            dst_cid: 3,
            src_port: 0x0102_0304,
            dst_port: 1023,
            len: 5,
            socket_type: 1,
            op: Op::Rw as u16,
            flags: 6,
            buf_alloc: 0x0004_0000,
            fwd_cnt: 0xffff_ffff,
        };
        let mut want = Vec::new();
        want.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        want.extend_from_slice(&[4, 3, 2, 1, 0xff, 3, 0, 0, 5, 0, 0, 0, 1, 0, 5, 0]);
        want.extend_from_slice(&[6, 0, 0, 0, 0, 0, 4, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(header.encode().as_slice(), want);
    }

    #[test]
    fn an_rst_is_not_answered() {
        let rst = Header::to_guest(3, 1, 2, Op::Rst);
        assert_eq!(rst.reset_for(), None);
        let rw = Header::to_guest(3, 1, 2, Op::Rw);
        let answer = rw.reset_for().expect("an answer");
        assert_eq!((answer.src_port, answer.dst_port, answer.dst_cid), (2, 1, HOST_CID));
    }

    proptest! {
        #[test]
        fn any_bytes_round_trip(bytes in proptest::array::uniform32(any::<u8>()), tail in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_LEN];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::decode(&all).encode(), all);
        }

        #[test]
        fn op_numbers_round_trip(number: u16) {
            if let Some(op) = Op::from_wire(number) {
                prop_assert_eq!(op as u16, number);
            } else {
                prop_assert!(number == 0 || number > 7);
            }
        }
    }
}
