//! Datagrams on a stream: a little-endian `u16` length and so many bytes, again and again, both ways.
//!
//! What a `Udp` stream carries. A datagram of UDP over IPv4 has at most 65,507 bytes (RFC 768, RFC 791), so
//! every length is one. An empty datagram is one, too.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most bytes of a datagram.
pub const MAX_DATAGRAM: usize = u16::MAX as usize;

/// Reads the next datagram into `datagram`, in the place of what was there; false at the end of the stream.
/// Not to be cancelled in its middle.
///
/// # Errors
/// The stream failed, or ended within a datagram (`UnexpectedEof`).
pub async fn read<R: AsyncRead + Unpin>(stream: &mut R, datagram: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut length = [0; 2];
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(false);
    }
    stream.read_exact(&mut length[1..]).await?;
    datagram.resize(usize::from(u16::from_le_bytes(length)), 0);
    stream.read_exact(datagram).await?;
    Ok(true)
}

/// Writes a datagram whole. Not to be cancelled in its middle.
///
/// # Errors
/// The stream failed, or the datagram is above [`MAX_DATAGRAM`] (`InvalidInput`).
pub async fn write<W: AsyncWrite + Unpin>(stream: &mut W, datagram: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(datagram.len()).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    let mut bytes = Vec::with_capacity(2 + datagram.len());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(datagram);
    stream.write_all(&bytes).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_keep_their_borders() {
        let (mut one, mut other) = tokio::io::duplex(1 << 20);
        let sent: Vec<Vec<u8>> = [0, 1, 65_535, 0, 300].map(|length| vec![7; length]).to_vec();
        for datagram in &sent {
            write(&mut one, datagram).await.unwrap();
        }
        drop(one);
        let (mut got, mut datagram) = (Vec::new(), Vec::new());
        while read(&mut other, &mut datagram).await.unwrap() {
            got.push(datagram.clone());
        }
        assert_eq!(got, sent);
    }

    #[tokio::test]
    async fn what_is_cut_off_is_an_error() {
        for bytes in [&[5][..], &[5, 0], &[5, 0, 1, 2]] {
            let error = read(&mut &bytes[..], &mut Vec::new()).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
        }
        assert!(write(&mut Vec::new(), &[0; MAX_DATAGRAM + 1]).await.is_err());
    }
}
