//! One component of a path, and a symlink's target: checked where they are decoded.

use bincode::de::Decoder;
use bincode::error::DecodeError;
use bincode::{Decode, Encode};

/// Most bytes of a name (Linux, `NAME_MAX`).
const MAX_NAME: usize = 255;
/// Most bytes of a symlink's target (Linux, `PATH_MAX` without its NUL).
const MAX_TARGET: usize = 4095;

/// Why bytes are no [`Name`] or [`LinkTarget`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty, `.` or `..`.
    #[error("a name is empty, `.` or `..`")]
    Reserved,
    /// It holds `/` or NUL.
    #[error("a name holds a slash or a NUL")]
    Separator,
    /// It is too long.
    #[error("a name of {got} bytes is above the limit of {limit}")]
    TooLong {
        /// Its length.
        got: usize,
        /// The limit.
        limit: usize,
    },
}

/// Exactly one component of a path: not empty, not `.` or `..`, no `/`, no NUL, at most 255 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Encode)]
pub struct Name(Vec<u8>);

impl Name {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// As [`NameError`] says.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, NameError> {
        let bytes = bytes.into();
        match bytes.as_slice() {
            b"" | b"." | b".." => Err(NameError::Reserved),
            long if long.len() > MAX_NAME => Err(NameError::TooLong { got: long.len(), limit: MAX_NAME }),
            name if name.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(NameError::Separator),
            _ => Ok(Self(bytes)),
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

bincode::impl_borrow_decode!(Name);

impl<Context> Decode<Context> for Name {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let bytes = Vec::<u8>::decode(decoder)?;
        Self::new(bytes).map_err(|error| DecodeError::OtherString(error.to_string()))
    }
}

/// What a symlink says: any bytes but NUL, not empty, at most 4,095. Nobody on the host follows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode)]
pub struct LinkTarget(Vec<u8>);

impl LinkTarget {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// As [`NameError`] says.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, NameError> {
        let bytes = bytes.into();
        match bytes.as_slice() {
            b"" => Err(NameError::Reserved),
            long if long.len() > MAX_TARGET => Err(NameError::TooLong { got: long.len(), limit: MAX_TARGET }),
            target if target.contains(&0) => Err(NameError::Separator),
            _ => Ok(Self(bytes)),
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

bincode::impl_borrow_decode!(LinkTarget);

impl<Context> Decode<Context> for LinkTarget {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Self, DecodeError> {
        let bytes = Vec::<u8>::decode(decoder)?;
        Self::new(bytes).map_err(|error| DecodeError::OtherString(error.to_string()))
    }
}
