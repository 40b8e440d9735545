//! Bytes for values, and length-checked frames. The only file that knows bincode.
//!
//! A frame is a little-endian `u32` body length and the body: one value in bincode 2 (standard
//! configuration: varint integers, little-endian). A length above the stream's limit is an error
//! before anything is allocated; bytes after the value are an error; end of file inside a frame is
//! an error, between frames it is the end.

use bincode::{BorrowDecode, Decode, Encode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Limit of a control frame's body, in bytes.
pub const CONTROL_LIMIT: usize = 1 << 20;
/// Limit of a data frame's body (exec, DNS): 64 KiB of payload and room for the tag.
pub const DATA_LIMIT: usize = (64 << 10) + 64;
/// Limit of a file frame's body: 1 MiB of payload and room for names and attributes.
pub const FILE_LIMIT: usize = (1 << 20) + (64 << 10);
/// Bytes of payload that a sender puts into one data frame at the most.
pub const DATA_CHUNK: usize = 64 << 10;

/// The decoder's own limit. bincode needs it at compile time: the largest frame there is.
const DECODE_LIMIT: usize = FILE_LIMIT;

/// Why bytes were not a value, or a stream not a sequence of frames.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The peer announced more than this stream's frames may hold.
    #[error("frame of {got} bytes is above this stream's limit of {limit}")]
    TooLong {
        /// Announced body length.
        got: usize,
        /// The stream's limit.
        limit: usize,
    },
    /// The body is not a value of the expected type.
    #[error("malformed value")]
    Decode(#[source] bincode::error::DecodeError),
    /// A value that cannot be written (it can only be one that is too large).
    #[error("value cannot be encoded")]
    Encode(#[source] bincode::error::EncodeError),
    /// The value ended before its frame did.
    #[error("{0} bytes follow the value in its frame")]
    Trailing(usize),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The stream failed.
    #[error("the stream failed")]
    Io(#[source] std::io::Error),
}

/// `value` as bytes, without a length.
///
/// # Errors
/// [`CodecError::Encode`] when a type refuses to be encoded.
pub fn to_bytes<T: Encode>(value: &T) -> Result<Vec<u8>, CodecError> {
    bincode::encode_to_vec(value, bincode::config::standard()).map_err(CodecError::Encode)
}

/// The value that `bytes` hold, all of them.
///
/// # Errors
/// Malformed, truncated or too large values, and bytes that follow the value.
pub fn from_bytes<T: Decode<()>>(bytes: &[u8]) -> Result<T, CodecError> {
    let config = bincode::config::standard().with_limit::<DECODE_LIMIT>();
    let (value, used) = bincode::decode_from_slice(bytes, config).map_err(CodecError::Decode)?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(CodecError::Trailing(left)),
    }
}

/// The value that `bytes` hold, all of them, which may borrow from them.
///
/// # Errors
/// As [`from_bytes`].
pub fn borrow_from_bytes<'a, T: BorrowDecode<'a, ()>>(bytes: &'a [u8]) -> Result<T, CodecError> {
    let config = bincode::config::standard().with_limit::<DECODE_LIMIT>();
    let (value, used) = bincode::borrow_decode_from_slice(bytes, config).map_err(CodecError::Decode)?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(CodecError::Trailing(left)),
    }
}

/// `value` as a frame: length and body.
///
/// # Errors
/// [`CodecError::TooLong`] when the body is above `limit`: the peer would refuse it.
pub fn to_frame<T: Encode>(value: &T, limit: usize) -> Result<Vec<u8>, CodecError> {
    let mut frame = Vec::new();
    append_frame(&mut frame, value, limit)?;
    Ok(frame)
}

/// Appends `value` as a frame to `frames`, which stay as they were when there is an error.
///
/// # Errors
/// As [`to_frame`].
pub fn append_frame<T: Encode>(frames: &mut Vec<u8>, value: &T, limit: usize) -> Result<(), CodecError> {
    let begin = frames.len();
    frames.extend_from_slice(&[0; 4]);
    let encoded = bincode::encode_into_std_write(value, frames, bincode::config::standard());
    let body = frames.len() - begin - 4;
    let length = match (encoded, u32::try_from(body)) {
        (Err(error), _) => Err(CodecError::Encode(error)),
        (Ok(_), Ok(length)) if body <= limit => Ok(length),
        _ => Err(CodecError::TooLong { got: body, limit }),
    };
    match length {
        Ok(length) => frames[begin..begin + 4].copy_from_slice(&length.to_le_bytes()),
        Err(_) => frames.truncate(begin),
    }
    length.map(drop)
}

/// The body length that a frame's first four bytes announce.
///
/// # Errors
/// [`CodecError::TooLong`] when it is above `limit`.
pub fn body_length(header: [u8; 4], limit: usize) -> Result<usize, CodecError> {
    let got = u32::from_le_bytes(header) as usize;
    if got > limit {
        return Err(CodecError::TooLong { got, limit });
    }
    Ok(got)
}

/// Reads one frame; `None` when the stream ended between frames.
///
/// Not cancellation safe: a caller that gives up in the middle must drop the stream.
///
/// # Errors
/// As [`CodecError`] says.
pub async fn read_frame<T, R>(reader: &mut R, limit: usize) -> Result<Option<T>, CodecError>
where
    T: Decode<()>,
    R: AsyncRead + Unpin,
{
    let mut header = [0; 4];
    let mut have = 0;
    while have < header.len() {
        match reader.read(&mut header[have..]).await.map_err(CodecError::Io)? {
            0 if have == 0 => return Ok(None),
            0 => return Err(CodecError::Truncated),
            n => have += n,
        }
    }
    let mut body = vec![0; body_length(header, limit)?];
    reader.read_exact(&mut body).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => CodecError::Truncated,
        _ => CodecError::Io(error),
    })?;
    from_bytes(&body).map(Some)
}

/// Writes one frame.
///
/// # Errors
/// As [`CodecError`] says.
pub async fn write_frame<T, W>(writer: &mut W, value: &T, limit: usize) -> Result<(), CodecError>
where
    T: Encode,
    W: AsyncWrite + Unpin,
{
    writer.write_all(&to_frame(value, limit)?).await.map_err(CodecError::Io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_huge_length_is_refused_and_not_allocated() {
        // 0xfd announces an eight-byte length: 2^44 bytes. Without the limit this aborts.
        let bytes = [0xfd, 0, 0, 0, 0, 0, 0x10, 0, 0];
        assert!(matches!(from_bytes::<Vec<u8>>(&bytes), Err(CodecError::Decode(_))));
        assert!(matches!(from_bytes::<String>(&bytes), Err(CodecError::Decode(_))));
    }

    #[test]
    fn trailing_bytes_are_an_error() {
        assert!(matches!(from_bytes::<u8>(&[1, 2]), Err(CodecError::Trailing(1))));
    }

    #[tokio::test]
    async fn end_of_file_between_frames_is_the_end_and_inside_an_error() {
        let frame = to_frame(&"hello".to_owned(), DATA_LIMIT).unwrap();
        let mut whole = &frame[..];
        assert_eq!(read_frame::<String, _>(&mut whole, DATA_LIMIT).await.unwrap().unwrap(), "hello");
        assert!(read_frame::<String, _>(&mut whole, DATA_LIMIT).await.unwrap().is_none());
        for cut in 1..frame.len() {
            let mut part = &frame[..cut];
            let result = read_frame::<String, _>(&mut part, DATA_LIMIT).await;
            assert!(matches!(result, Err(CodecError::Truncated)), "cut at {cut}");
        }
    }

    #[tokio::test]
    async fn a_frame_above_the_limit_is_refused_on_both_sides() {
        let value = vec![0u8; 100];
        assert!(matches!(to_frame(&value, 50), Err(CodecError::TooLong { limit: 50, .. })));
        let mut frame = vec![7];
        assert!(append_frame(&mut frame, &value, 50).is_err());
        assert_eq!(frame, [7]);
        frame.clear();
        append_frame(&mut frame, &value, 200).unwrap();
        let mut reader = &frame[..];
        let result = read_frame::<Vec<u8>, _>(&mut reader, 50).await;
        assert!(matches!(result, Err(CodecError::TooLong { got: 101, limit: 50 })));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_but_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = from_bytes::<crate::control::ToAgent>(&bytes);
            let _ = from_bytes::<crate::stream::StreamHeader>(&bytes);
        }
    }
}
