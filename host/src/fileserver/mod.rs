//! The process that serves one granted host folder.

/// Hands a file server the stream of a session.
///
/// # Errors
/// When the server is gone.
pub fn hand_session(
    _control: std::os::fd::BorrowedFd<'_>,
    _stream: std::os::fd::OwnedFd,
) -> std::io::Result<()> {
    Err(std::io::Error::other("the file server is not there yet"))
}
