//! The first bytes of every stream: who speaks, which versions, and the proof of the boot secret.
//!
//! Both layouts are fixed for ever, so that any two versions can at least refuse each other in
//! words. Integers are little-endian.
//!
//! ```text
//! Hello, 96 bytes, followed by `header_len` bytes of StreamHeader
//!   0 magic[8]  8 version_min u16  10 version_max u16  12 header_len u32  16 features u64
//!  24 nonce[32] 56 reserved[8]     64 proof[32]
//! HelloReply, 256 bytes
//!   0 magic[8]  8 version u16  10 status u16  12 detail_len u16  14 reserved u16
//!  16 features u64  24 proof[32]  56 detail[200], UTF-8, zero-padded
//! ```
//!
//! `proof` is HMAC-SHA-256 under the 32-byte secret of this boot: of the host over a label, its
//! hello and the stream header; of the guest over a label, the host's nonce and its own reply. The
//! host's nonce makes the reply fresh. The guest sends no nonce of its own, since that would cost a
//! round trip a stream: it takes connections of CID 2 alone, which nothing in the guest can be.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::codec::{self, CodecError};
use crate::stream::StreamHeader;

/// First bytes of both hellos. As PNG's, they do not survive a text-mode transport.
pub const MAGIC: [u8; 8] = *b"DHOW\r\n\x1a\n";
/// Oldest protocol version that this build speaks.
pub const VERSION_MIN: u16 = 1;
/// Newest protocol version that this build speaks.
///
/// To add a version: raise this, add the variants at the *end* of their enums (bincode numbers them
/// in order), extend the golden bytes, and keep what `VERSION_MIN` still needs.
pub const VERSION_MAX: u16 = 1;
/// Size of a hello, without the stream header that follows it.
pub const HELLO_LEN: usize = 96;
/// Size of a reply.
pub const REPLY_LEN: usize = 256;
/// Limit of the stream header that follows a hello. With the hello it fits one open request.
pub const HEADER_LIMIT: usize = 48 << 10;
/// Feature bits that this build has. None yet; unknown bits of a peer are ignored.
pub const FEATURES: u64 = 0;
const DETAIL_LEN: usize = 200;
const HOST_LABEL: &[u8] = b"dhow host hello 1";
const GUEST_LABEL: &[u8] = b"dhow guest reply 1";

/// The secret of one boot. Its bytes never show in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        for part in parts {
            mac.update(part);
        }
        mac
    }
}

/// What a guest answers to a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// The stream is open.
    Ok = 0,
    /// No version in common; `version` of the reply is the newest the guest speaks.
    Version = 1,
    /// The proof did not match: not the host that booted this guest.
    Proof = 2,
    /// The hello or the stream header is malformed.
    Malformed = 3,
    /// The target of a forward refused, or there is none.
    Refused = 4,
    /// What was named does not exist.
    NotFound = 5,
    /// The guest is at a limit, or not ready for this yet.
    Busy = 6,
    /// It failed in the guest; the detail says how.
    Failed = 7,
}

impl Status {
    fn from_u16(value: u16) -> Option<Self> {
        [
            Self::Ok,
            Self::Version,
            Self::Proof,
            Self::Malformed,
            Self::Refused,
            Self::NotFound,
            Self::Busy,
            Self::Failed,
        ]
        .into_iter()
        .find(|status| *status as u16 == value)
    }
}

/// Why a hello or its reply was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// Not one of ours at all.
    #[error("the peer does not speak Dhow's protocol")]
    Magic,
    /// No version in common.
    #[error(
        "the peer speaks protocol versions {theirs_min} to {theirs_max}, this build {VERSION_MIN} to {VERSION_MAX}"
    )]
    Version {
        /// The peer's oldest.
        theirs_min: u16,
        /// The peer's newest.
        theirs_max: u16,
    },
    /// The proof does not match the secret of this boot.
    #[error("the peer could not prove that it knows this boot's secret")]
    Proof,
    /// A length or a status out of its range.
    #[error("malformed hello: {0}")]
    Malformed(&'static str),
    /// The stream header is malformed or too long.
    #[error("malformed stream header")]
    Header(#[source] CodecError),
    /// The guest refused the stream.
    #[error("the guest refused the stream ({status:?}): {detail}")]
    Refused {
        /// Its reason as a code.
        status: Status,
        /// Its reason in words; quote control characters before showing it.
        detail: String,
    },
}

/// The fixed part of a hello, parsed but not yet proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    bytes: [u8; HELLO_LEN],
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

impl Hello {
    /// The bytes that open a stream: hello and header.
    ///
    /// # Errors
    /// [`HelloError::Header`] when the header is above [`HEADER_LIMIT`].
    pub fn preamble(secret: &Secret, nonce: [u8; 32], header: &StreamHeader) -> Result<Vec<u8>, HelloError> {
        let header = codec::to_bytes(header).map_err(HelloError::Header)?;
        if header.len() > HEADER_LIMIT {
            let error = CodecError::TooLong { got: header.len(), limit: HEADER_LIMIT };
            return Err(HelloError::Header(error));
        }
        let mut bytes = Vec::with_capacity(HELLO_LEN + header.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION_MIN.to_le_bytes());
        bytes.extend_from_slice(&VERSION_MAX.to_le_bytes());
        bytes.extend_from_slice(&(header.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&FEATURES.to_le_bytes());
        bytes.extend_from_slice(&nonce);
        bytes.extend_from_slice(&[0; 8]);
        let proof = secret.mac(&[HOST_LABEL, &bytes, &header]).finalize().into_bytes();
        bytes.extend_from_slice(&proof);
        bytes.extend_from_slice(&header);
        Ok(bytes)
    }

    /// Checks magic and header length; the versions and the proof are for [`Hello::accept`].
    ///
    /// # Errors
    /// [`HelloError::Magic`] and [`HelloError::Malformed`].
    pub fn parse(bytes: [u8; HELLO_LEN]) -> Result<Self, HelloError> {
        if bytes[..8] != MAGIC {
            return Err(HelloError::Magic);
        }
        let hello = Self { bytes };
        if hello.header_len() > HEADER_LIMIT {
            return Err(HelloError::Malformed("stream header above its limit"));
        }
        Ok(hello)
    }

    /// Number of header bytes that follow.
    #[must_use]
    pub fn header_len(&self) -> usize {
        u32::from_le_bytes([self.bytes[12], self.bytes[13], self.bytes[14], self.bytes[15]]) as usize
    }

    /// The host's nonce, which the reply must cover.
    #[must_use]
    pub fn nonce(&self) -> [u8; 32] {
        let mut nonce = [0; 32];
        nonce.copy_from_slice(&self.bytes[24..56]);
        nonce
    }

    /// Checks the proof, then the versions, then decodes the header.
    ///
    /// # Errors
    /// Each in that order: an unproven peer learns nothing else.
    pub fn accept(&self, secret: &Secret, header: &[u8]) -> Result<StreamHeader, HelloError> {
        secret
            .mac(&[HOST_LABEL, &self.bytes[..64], header])
            .verify_slice(&self.bytes[64..])
            .map_err(|_| HelloError::Proof)?;
        let (theirs_min, theirs_max) = (u16_at(&self.bytes, 8), u16_at(&self.bytes, 10));
        if theirs_min > VERSION_MAX || theirs_max < VERSION_MIN {
            return Err(HelloError::Version { theirs_min, theirs_max });
        }
        codec::from_bytes(header).map_err(HelloError::Header)
    }
}

/// The guest's answer to a hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloReply {
    /// Chosen protocol version, or the newest one the guest speaks where there is none in common.
    pub version: u16,
    /// Whether the stream is open.
    pub status: Status,
    /// Words for a refusal, cut at 200 bytes.
    pub detail: String,
}

impl HelloReply {
    /// The stream is open.
    #[must_use]
    pub fn ok() -> Self {
        Self { version: VERSION_MAX, status: Status::Ok, detail: String::new() }
    }

    /// The stream is refused.
    #[must_use]
    pub fn refused(status: Status, detail: impl Into<String>) -> Self {
        Self { version: VERSION_MAX, status, detail: detail.into() }
    }

    /// The reply's bytes, proven over the host's `nonce`.
    #[must_use]
    pub fn to_bytes(&self, secret: &Secret, nonce: &[u8; 32]) -> [u8; REPLY_LEN] {
        let mut bytes = [0; REPLY_LEN];
        let mut cut = self.detail.len().min(DETAIL_LEN);
        while !self.detail.is_char_boundary(cut) {
            cut -= 1;
        }
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10..12].copy_from_slice(&(self.status as u16).to_le_bytes());
        bytes[12..14].copy_from_slice(&(cut as u16).to_le_bytes());
        bytes[16..24].copy_from_slice(&FEATURES.to_le_bytes());
        bytes[56..56 + cut].copy_from_slice(&self.detail.as_bytes()[..cut]);
        let proof = secret.mac(&[GUEST_LABEL, nonce, &bytes[..24], &bytes[56..]]).finalize();
        bytes[24..56].copy_from_slice(&proof.into_bytes());
        bytes
    }

    /// Checks magic and proof and parses the reply. A refusal is an `Err`.
    ///
    /// # Errors
    /// As [`HelloError`] says.
    pub fn parse(bytes: &[u8], secret: &Secret, nonce: &[u8; 32]) -> Result<Self, HelloError> {
        if bytes.len() != REPLY_LEN {
            return Err(HelloError::Malformed("reply of a wrong length"));
        }
        if bytes[..8] != MAGIC {
            return Err(HelloError::Magic);
        }
        secret
            .mac(&[GUEST_LABEL, nonce, &bytes[..24], &bytes[56..]])
            .verify_slice(&bytes[24..56])
            .map_err(|_| HelloError::Proof)?;
        let version = u16_at(bytes, 8);
        let status = Status::from_u16(u16_at(bytes, 10)).ok_or(HelloError::Malformed("unknown status"))?;
        let detail_len = u16_at(bytes, 12) as usize;
        if detail_len > DETAIL_LEN {
            return Err(HelloError::Malformed("detail above its limit"));
        }
        let detail = String::from_utf8_lossy(&bytes[56..56 + detail_len]).into_owned();
        match status {
            Status::Ok => Ok(Self { version, status, detail }),
            _ => Err(HelloError::Refused { status, detail }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: Secret = Secret([7; 32]);

    fn split(preamble: &[u8]) -> (Hello, &[u8]) {
        let (fixed, header) = preamble.split_at(HELLO_LEN);
        (Hello::parse(fixed.try_into().unwrap()).unwrap(), header)
    }

    #[test]
    fn golden_hello() {
        let preamble = Hello::preamble(&SECRET, [9; 32], &StreamHeader::Control).unwrap();
        assert_eq!(preamble.len(), HELLO_LEN + 1);
        assert_eq!(&preamble[..8], b"DHOW\r\n\x1a\n");
        assert_eq!(&preamble[8..24], &[1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&preamble[24..56], &[9; 32]);
        // HMAC-SHA-256 of label, first 64 bytes and header under 32 × 0x07: computed with Python's hmac.
        let proof: String = preamble[64..96].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(proof, "d45f89e5354bc59bc3522b87e79bd03d6f9fc6acec609d19fb13182a79bd1f8b");
    }

    #[test]
    fn each_flipped_bit_of_the_preamble_is_refused() {
        let preamble = Hello::preamble(&SECRET, [9; 32], &StreamHeader::Control).unwrap();
        for at in 0..preamble.len() {
            let mut bad = preamble.clone();
            bad[at] ^= 1;
            let (fixed, header) = bad.split_at(HELLO_LEN);
            let accepted =
                Hello::parse(fixed.try_into().unwrap()).and_then(|hello| hello.accept(&SECRET, header));
            assert!(accepted.is_err(), "byte {at}");
        }
    }

    #[test]
    fn another_secret_or_another_nonce_is_refused() {
        let preamble = Hello::preamble(&SECRET, [9; 32], &StreamHeader::Control).unwrap();
        let (hello, header) = split(&preamble);
        assert!(matches!(hello.accept(&Secret([8; 32]), header), Err(HelloError::Proof)));
        let reply = HelloReply::ok().to_bytes(&SECRET, &hello.nonce());
        assert!(HelloReply::parse(&reply, &SECRET, &[9; 32]).is_ok());
        assert!(matches!(HelloReply::parse(&reply, &SECRET, &[1; 32]), Err(HelloError::Proof)));
    }

    #[test]
    fn a_refusal_speaks() {
        let reply = HelloReply::refused(Status::Refused, "é".repeat(300)).to_bytes(&SECRET, &[0; 32]);
        let error = HelloReply::parse(&reply, &SECRET, &[0; 32]).unwrap_err();
        assert!(
            matches!(error, HelloError::Refused { status: Status::Refused, detail } if detail.len() == 200)
        );
    }

    proptest! {
        #[test]
        fn any_reply_parses_or_fails(bytes in proptest::collection::vec(any::<u8>(), REPLY_LEN)) {
            prop_assert!(HelloReply::parse(&bytes, &SECRET, &[0; 32]).is_err());
        }

        #[test]
        fn any_detail_travels(detail in ".{0,60}") {
            let reply = HelloReply::refused(Status::Failed, detail.clone()).to_bytes(&SECRET, &[3; 32]);
            match HelloReply::parse(&reply, &SECRET, &[3; 32]) {
                Err(HelloError::Refused { detail: got, .. }) => prop_assert!(detail.starts_with(&got)),
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
