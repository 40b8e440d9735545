//! The control socket's messages: what the supervisor may ask the device, and what it answers.
//!
//! One message a SOCK_SEQPACKET record, little-endian: `kind u8`, three zero bytes, `id u32`, then what the kind
//! says. A record of any other length is an error. Both ends are the same binary, so there is no version in it:
//! a supervisor that adopts a device of another build finds that out from the build id it keeps of its children.
//!
//! | kind | message | after the id |
//! |---|---|---|
//! | 1 | Open | `guest_port u32, reply_len u32, deadline_ms u32`, preamble |
//! | 2 | Attach | `group u32`; the fd comes by SCM_RIGHTS |
//! | 3 | Cancel | nothing |
//! | 4 | Stats | nothing |
//! | 5 | Exchange | `reply_len u32, deadline_ms u32`, preamble |
//! | 0x81 | Opened | the reply |
//! | 0x82 | Failed | `reason u32` |
//! | 0x83 | Attached | nothing |
//! | 0x84 | AttachFailed | `reason u32` |
//! | 0x85 | Stats | eight `u64` |

/// Longest preamble.
pub const MAX_PREAMBLE: usize = 60 * 1024;
/// Longest reply.
pub const MAX_REPLY: usize = 4096;
/// Longest message in either direction.
pub const MAX_MESSAGE: usize = HEAD + 12 + MAX_PREAMBLE;

const HEAD: usize = 8;

/// What is wrong with a control message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Too short or too long for its kind.
    #[error("control message of kind {kind} has {have} bytes")]
    Length {
        /// Its kind; 0 where there is none.
        kind: u8,
        /// Its length.
        have: usize,
    },
    /// No such kind in this direction.
    #[error("unknown control message of kind {kind}")]
    Kind {
        /// Its kind.
        kind: u8,
    },
    /// A field is out of range.
    #[error("control message of kind {kind} has {field} {value}, the limit is {limit}")]
    Range {
        /// Its kind.
        kind: u8,
        /// The field.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What is allowed.
        limit: usize,
    },
    /// Bytes that must be zero are not.
    #[error("control message of kind {kind} has reserved bytes set")]
    Reserved {
        /// Its kind.
        kind: u8,
    },
}

/// Why a stream could not be opened or attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// Nobody listens on the guest's port.
    Refused = 1,
    /// The deadline passed.
    Deadline = 2,
    /// As many connections as there may be, or as the group may have.
    TooMany = 3,
    /// The guest reset the connection.
    GuestReset = 4,
    /// The guest closed it before its reply was complete.
    GuestClosed = 5,
    /// The guest broke the protocol.
    Protocol = 6,
    /// The device was stopped or the guest rebooted.
    DeviceReset = 7,
    /// The host's end broke.
    HostClosed = 8,
    /// No such stream, or it has its fd already.
    Unknown = 9,
    /// The fd is no stream socket, or came not at all.
    BadFd = 10,
    /// Cancelled by the opener.
    Cancelled = 11,
}

impl Reason {
    fn from_wire(number: u32) -> Option<Self> {
        use Reason::*;
        [
            Refused,
            Deadline,
            TooMany,
            GuestReset,
            GuestClosed,
            Protocol,
            DeviceReset,
            HostClosed,
            Unknown,
            BadFd,
            Cancelled,
        ]
        .into_iter()
        .find(|reason| *reason as u32 == number)
    }
}

/// What a supervisor asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToDevice {
    /// Open a stream.
    Open {
        /// Chosen by the supervisor, unique among its streams without an fd.
        id: u32,
        /// Where the guest listens.
        guest_port: u32,
        /// Length of the guest's reply, at most [`MAX_REPLY`].
        reply_len: u32,
        /// Milliseconds until it must be open.
        deadline_ms: u32,
        /// What to send first, at most [`MAX_PREAMBLE`].
        preamble: Vec<u8>,
    },
    /// Give an opened stream the fd that comes along.
    Attach {
        /// Of the Open.
        id: u32,
        /// Streams of one group have no more room than they leave to others: as many may have an fd as there could be
        /// further streams. 0 is no group.
        group: u32,
    },
    /// Give an Open up, or reset an opened stream.
    Cancel {
        /// Of the Open.
        id: u32,
    },
    /// Ask for the numbers.
    Stats {
        /// Returned in the answer.
        id: u32,
    },
    /// Have an opened stream that has no fd yet say something and wait for a reply, which is answered as an Open is.
    /// So a stream can be opened before it is known what for.
    Exchange {
        /// Of the Open.
        id: u32,
        /// Length of the guest's reply, at most [`MAX_REPLY`].
        reply_len: u32,
        /// Milliseconds until the reply must be there.
        deadline_ms: u32,
        /// What to send, at most [`MAX_PREAMBLE`].
        preamble: Vec<u8>,
    },
}

/// What the device answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromDevice {
    /// The stream is open and waits for its fd, or for an exchange.
    Opened {
        /// Of the Open.
        id: u32,
        /// Exactly as long as asked for.
        reply: Vec<u8>,
    },
    /// The stream is not open, or no longer.
    Failed {
        /// Of the Open.
        id: u32,
        /// Why.
        reason: Reason,
    },
    /// The fd is in use.
    Attached {
        /// Of the Open.
        id: u32,
    },
    /// The fd is closed.
    AttachFailed {
        /// Of the Open.
        id: u32,
        /// Why.
        reason: Reason,
    },
    /// The numbers.
    Stats {
        /// Of the question.
        id: u32,
        /// They.
        stats: Stats,
    },
}

/// What the device counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections that exist.
    pub connections: u64,
    /// Of them, those with an fd.
    pub attached: u64,
    /// Opens so far.
    pub opened: u64,
    /// Opens that failed so far.
    pub failed: u64,
    /// Payload bytes to the guest so far.
    pub bytes_to_guest: u64,
    /// Payload bytes from the guest so far.
    pub bytes_from_guest: u64,
    /// RST packets sent so far.
    pub resets_sent: u64,
    /// Packets from the guest that were malformed or belonged to no connection.
    pub stray_packets: u64,
}

impl Stats {
    fn to_array(self) -> [u64; 8] {
        [
            self.connections,
            self.attached,
            self.opened,
            self.failed,
            self.bytes_to_guest,
            self.bytes_from_guest,
            self.resets_sent,
            self.stray_packets,
        ]
    }

    fn from_array(n: [u64; 8]) -> Self {
        let [
            connections,
            attached,
            opened,
            failed,
            bytes_to_guest,
            bytes_from_guest,
            resets_sent,
            stray_packets,
        ] = n;
        Self {
            connections,
            attached,
            opened,
            failed,
            bytes_to_guest,
            bytes_from_guest,
            resets_sent,
            stray_packets,
        }
    }
}

fn head(kind: u8, id: u32) -> Vec<u8> {
    let mut out = vec![kind, 0, 0, 0];
    out.extend_from_slice(&id.to_le_bytes());
    out
}

/// Cuts a message into kind, id and the rest.
fn split(bytes: &[u8]) -> Result<(u8, u32, &[u8]), ControlError> {
    let kind = bytes.first().copied().unwrap_or(0);
    if bytes.len() < HEAD || bytes.len() > MAX_MESSAGE {
        return Err(ControlError::Length { kind, have: bytes.len() });
    }
    if bytes[1..4] != [0; 3] {
        return Err(ControlError::Reserved { kind });
    }
    Ok((kind, u32_at(bytes, 4), &bytes[HEAD..]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn exactly(kind: u8, rest: &[u8], len: usize) -> Result<(), ControlError> {
    if rest.len() == len { Ok(()) } else { Err(ControlError::Length { kind, have: HEAD + rest.len() }) }
}

fn reply_len(kind: u8, len: u32) -> Result<u32, ControlError> {
    let value = len as usize;
    if value > MAX_REPLY {
        return Err(ControlError::Range { kind, field: "reply length", value, limit: MAX_REPLY });
    }
    Ok(len)
}

fn reason(kind: u8, rest: &[u8]) -> Result<Reason, ControlError> {
    exactly(kind, rest, 4)?;
    let number = u32_at(rest, 0);
    Reason::from_wire(number).ok_or(ControlError::Range {
        kind,
        field: "reason",
        value: number as usize,
        limit: Reason::Cancelled as usize,
    })
}

impl ToDevice {
    /// As one record.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Open { id, guest_port, reply_len, deadline_ms, preamble } => {
                let mut out = head(1, *id);
                for field in [guest_port, reply_len, deadline_ms] {
                    out.extend_from_slice(&field.to_le_bytes());
                }
                out.extend_from_slice(preamble);
                out
            }
            Self::Attach { id, group } => {
                let mut out = head(2, *id);
                out.extend_from_slice(&group.to_le_bytes());
                out
            }
            Self::Cancel { id } => head(3, *id),
            Self::Stats { id } => head(4, *id),
            Self::Exchange { id, reply_len, deadline_ms, preamble } => {
                let mut out = head(5, *id);
                for field in [reply_len, deadline_ms] {
                    out.extend_from_slice(&field.to_le_bytes());
                }
                out.extend_from_slice(preamble);
                out
            }
        }
    }

    /// From one record.
    pub fn decode(bytes: &[u8]) -> Result<Self, ControlError> {
        let (kind, id, rest) = split(bytes)?;
        match kind {
            1 => {
                if rest.len() < 12 {
                    return Err(ControlError::Length { kind, have: bytes.len() });
                }
                Ok(Self::Open {
                    id,
                    guest_port: u32_at(rest, 0),
                    reply_len: reply_len(kind, u32_at(rest, 4))?,
                    deadline_ms: u32_at(rest, 8),
                    preamble: rest[12..].to_vec(),
                })
            }
            2 => exactly(kind, rest, 4).map(|()| Self::Attach { id, group: u32_at(rest, 0) }),
            3 => exactly(kind, rest, 0).map(|()| Self::Cancel { id }),
            4 => exactly(kind, rest, 0).map(|()| Self::Stats { id }),
            5 => {
                if rest.len() < 8 || rest.len() - 8 > MAX_PREAMBLE {
                    return Err(ControlError::Length { kind, have: bytes.len() });
                }
                Ok(Self::Exchange {
                    id,
                    reply_len: reply_len(kind, u32_at(rest, 0))?,
                    deadline_ms: u32_at(rest, 4),
                    preamble: rest[8..].to_vec(),
                })
            }
            _ => Err(ControlError::Kind { kind }),
        }
    }
}

impl FromDevice {
    /// As one record.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Opened { id, reply } => {
                let mut out = head(0x81, *id);
                out.extend_from_slice(reply);
                out
            }
            Self::Failed { id, reason } => with_reason(0x82, *id, *reason),
            Self::Attached { id } => head(0x83, *id),
            Self::AttachFailed { id, reason } => with_reason(0x84, *id, *reason),
            Self::Stats { id, stats } => {
                let mut out = head(0x85, *id);
                for number in stats.to_array() {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                out
            }
        }
    }

    /// From one record.
    pub fn decode(bytes: &[u8]) -> Result<Self, ControlError> {
        let (kind, id, rest) = split(bytes)?;
        match kind {
            0x81 if rest.len() <= MAX_REPLY => Ok(Self::Opened { id, reply: rest.to_vec() }),
            0x81 => {
                Err(ControlError::Range { kind, field: "reply length", value: rest.len(), limit: MAX_REPLY })
            }
            0x82 => Ok(Self::Failed { id, reason: reason(kind, rest)? }),
            0x83 => exactly(kind, rest, 0).map(|()| Self::Attached { id }),
            0x84 => Ok(Self::AttachFailed { id, reason: reason(kind, rest)? }),
            0x85 => {
                exactly(kind, rest, 64)?;
                let number = |i: usize| u64::from_le_bytes(std::array::from_fn(|b| rest[i * 8 + b]));
                Ok(Self::Stats { id, stats: Stats::from_array(std::array::from_fn(number)) })
            }
            _ => Err(ControlError::Kind { kind }),
        }
    }
}

fn with_reason(kind: u8, id: u32, reason: Reason) -> Vec<u8> {
    let mut out = head(kind, id);
    out.extend_from_slice(&(reason as u32).to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let open =
            ToDevice::Open { id: 7, guest_port: 1000, reply_len: 2, deadline_ms: 500, preamble: vec![9, 8] };
        let want = [1, 0, 0, 0, 7, 0, 0, 0, 0xe8, 3, 0, 0, 2, 0, 0, 0, 0xf4, 1, 0, 0, 9, 8];
        assert_eq!(open.encode(), want);
        let failed = FromDevice::Failed { id: 7, reason: Reason::Deadline };
        assert_eq!(failed.encode(), [0x82, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn limits_are_checked() {
        let open = |preamble: usize, reply_len| ToDevice::Open {
            id: 1,
            guest_port: 1,
            reply_len,
            deadline_ms: 1,
            preamble: vec![0; preamble],
        };
        assert!(ToDevice::decode(&open(MAX_PREAMBLE, 4096).encode()).is_ok());
        assert!(ToDevice::decode(&open(MAX_PREAMBLE + 1, 4096).encode()).is_err());
        assert!(ToDevice::decode(&open(0, 4097).encode()).is_err());
        let exchange = |preamble: usize, reply_len| ToDevice::Exchange {
            id: 1,
            reply_len,
            deadline_ms: 1,
            preamble: vec![0; preamble],
        };
        assert!(ToDevice::decode(&exchange(MAX_PREAMBLE, 4096).encode()).is_ok());
        assert!(ToDevice::decode(&exchange(MAX_PREAMBLE + 1, 4096).encode()).is_err());
        assert!(ToDevice::decode(&exchange(0, 4097).encode()).is_err());
        assert!(ToDevice::decode(&[3, 0, 0, 0, 0, 0, 0, 0, 0]).is_err(), "trailing byte");
        assert!(ToDevice::decode(&[2, 0, 1, 0, 0, 0, 0, 0]).is_err(), "reserved byte");
        assert!(ToDevice::decode(&[]).is_err());
        assert!(FromDevice::decode(&[0x82, 0, 0, 0, 0, 0, 0, 0, 99, 0, 0, 0]).is_err(), "no such reason");
    }

    fn to_device() -> impl Strategy<Value = ToDevice> {
        prop_oneof![
            (
                any::<u32>(),
                any::<u32>(),
                0..=MAX_REPLY as u32,
                any::<u32>(),
                prop::collection::vec(any::<u8>(), 0..300)
            )
                .prop_map(|(id, guest_port, reply_len, deadline_ms, preamble)| {
                    ToDevice::Open { id, guest_port, reply_len, deadline_ms, preamble }
                }),
            (any::<u32>(), any::<u32>()).prop_map(|(id, group)| ToDevice::Attach { id, group }),
            any::<u32>().prop_map(|id| ToDevice::Cancel { id }),
            any::<u32>().prop_map(|id| ToDevice::Stats { id }),
            (any::<u32>(), 0..=MAX_REPLY as u32, any::<u32>(), prop::collection::vec(any::<u8>(), 0..300))
                .prop_map(|(id, reply_len, deadline_ms, preamble)| ToDevice::Exchange {
                    id,
                    reply_len,
                    deadline_ms,
                    preamble
                }),
        ]
    }

    fn from_device() -> impl Strategy<Value = FromDevice> {
        let reason = || (1u32..=11).prop_map(|n| Reason::from_wire(n).expect("a reason"));
        prop_oneof![
            (any::<u32>(), prop::collection::vec(any::<u8>(), 0..300))
                .prop_map(|(id, reply)| FromDevice::Opened { id, reply }),
            (any::<u32>(), reason()).prop_map(|(id, reason)| FromDevice::Failed { id, reason }),
            any::<u32>().prop_map(|id| FromDevice::Attached { id }),
            (any::<u32>(), reason()).prop_map(|(id, reason)| FromDevice::AttachFailed { id, reason }),
            (any::<u32>(), any::<[u64; 8]>())
                .prop_map(|(id, n)| FromDevice::Stats { id, stats: Stats::from_array(n) }),
        ]
    }

    proptest! {
        #[test]
        fn to_device_round_trips(message in to_device()) {
            prop_assert_eq!(ToDevice::decode(&message.encode()), Ok(message));
        }

        #[test]
        fn from_device_round_trips(message in from_device()) {
            prop_assert_eq!(FromDevice::decode(&message.encode()), Ok(message));
        }

        #[test]
        fn any_bytes_are_refused_or_canonical(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = ToDevice::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes.clone());
            }
            if let Ok(message) = FromDevice::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }
    }
}
