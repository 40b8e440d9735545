//! The two large messages with their bytes borrowed, so that a megabyte is not copied on its way. On the
//! wire they are the same as their owned forms, which the tests hold them to.

use bincode::Encode;

use super::NodeId;
use crate::codec;

/// Number of [`super::FileOp::Write`] on the wire.
const WRITE: u32 = 6;
/// Number of [`super::FileAnswer::Data`] on the wire.
const DATA: u32 = 5;
/// Number of `Ok` on the wire.
const OK: u32 = 0;

/// A [`super::FileRequest`] with [`super::FileOp::Write`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode)]
pub struct WriteRequest<'a> {
    unique: u64,
    op: u32,
    node: NodeId,
    offset: u64,
    data: &'a [u8],
}

impl<'a> WriteRequest<'a> {
    /// As the fields of the owned forms.
    #[must_use]
    pub fn new(unique: u64, node: NodeId, offset: u64, data: &'a [u8]) -> Self {
        Self { unique, op: WRITE, node, offset, data }
    }
}

/// A [`super::FileReply`] with [`super::FileAnswer::Data`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataReply<'a> {
    /// The request's.
    pub unique: u64,
    /// Bytes of a file.
    pub data: &'a [u8],
}

impl<'a> DataReply<'a> {
    /// Reads a frame's body; `None` for any other reply, and for what is none.
    #[must_use]
    pub fn parse(body: &'a [u8]) -> Option<Self> {
        match codec::borrow_from_bytes(body) {
            Ok((unique, OK, DATA, data)) => Some(Self { unique, data }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Errno, FileAnswer, FileOp, FileReply, FileRequest};
    use super::*;
    use crate::codec::{from_bytes, to_bytes};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_write_has_the_same_bytes(
            unique: u64,
            node: u64,
            offset: u64,
            data in proptest::collection::vec(any::<u8>(), 0..600),
        ) {
            let borrowed = to_bytes(&WriteRequest::new(unique, NodeId(node), offset, &data)).unwrap();
            let op = FileOp::Write { node: NodeId(node), offset, data };
            prop_assert_eq!(borrowed, to_bytes(&FileRequest { unique, op }).unwrap());
        }

        #[test]
        fn data_are_read_from_the_same_bytes(
            unique: u64,
            data in proptest::collection::vec(any::<u8>(), 0..600),
        ) {
            let result = Ok(FileAnswer::Data(data.clone()));
            let body = to_bytes(&FileReply { unique, result }).unwrap();
            prop_assert_eq!(DataReply::parse(&body), Some(DataReply { unique, data: &data }));
            prop_assert_eq!(DataReply::parse(&body[..body.len() - 1]), None);
        }

        #[test]
        fn nothing_else_is_taken_for_data(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(read) = DataReply::parse(&bytes) {
                let reply = FileReply { unique: read.unique, result: Ok(FileAnswer::Data(read.data.to_vec())) };
                prop_assert_eq!(from_bytes::<FileReply>(&bytes).unwrap(), reply);
            }
        }
    }

    #[test]
    fn other_replies_are_none() {
        for result in [Ok(FileAnswer::Done), Ok(FileAnswer::Written(7)), Err(Errno(5))] {
            assert_eq!(DataReply::parse(&to_bytes(&FileReply { unique: 9, result }).unwrap()), None);
        }
    }
}
