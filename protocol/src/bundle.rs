//! Installing a runtime: the host offers a bundle, the guest takes what it lacks.
//!
//! ```text
//! host ──► Bundle(BundleOffer)          in the stream header
//! host ◄── BundleAnswer                 Have: nothing more to send; Send: from that offset
//! host ──► raw bytes, size - offset of them
//! host ◄── BundleResult                 verified, installed (fsync, rename), mounted
//! ```
//! Starting its daemons is a control request of its own.

use bincode::{Decode, Encode};

/// A bundle on the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct BundleOffer {
    /// Name, a folder's name in the guest: `[a-z0-9-]{1,32}`.
    pub name: String,
    /// Version for people.
    pub version: String,
    /// SHA-256 of the erofs image; it names the bundle in the guest.
    pub sha256: [u8; 32],
    /// Its size in bytes.
    pub size: u64,
}

/// The guest's answer to an offer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum BundleAnswer {
    /// Installed and mounted already.
    Have,
    /// Wanted from this offset on.
    Send {
        /// Bytes to leave out at the start.
        offset: u64,
    },
}

/// How the installation ended; the reason is for a person.
pub type BundleResult = Result<(), String>;
