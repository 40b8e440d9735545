//! Logs of the guest as raw bytes on a stream: from the end or all, then as lines are added.

use std::collections::VecDeque;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dhow_protocol::stream::LogSource;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Where the agent and the daemons log.
const LOG_FOLDER: &str = "/data/log";
const KERNEL_LOG: &str = "/dev/kmsg";
/// Between looks for new lines while somebody follows.
const LOOK: Duration = Duration::from_millis(200);
const CHUNK: usize = 64 << 10;

/// Writes the log to `stream`; with `follow` until the peer leaves.
pub async fn serve<S>(mut stream: S, source: LogSource, tail: Option<u32>, follow: bool)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let ended = match path_of(&source) {
        Some(path) => serve_stream(stream, &path, tail, follow).await,
        None => match stream.write_all(b"there is no log of such a name\n").await {
            Ok(()) => stream.shutdown().await,
            Err(error) => Err(error),
        },
    };
    if let Err(error) = ended {
        // Most often the peer has left.
        tracing::debug!(%error, ?source, "the log's stream ended");
    }
}

/// The log's file; none for a name that is no file name.
fn path_of(source: &LogSource) -> Option<PathBuf> {
    let name = match source {
        LogSource::Kernel => return Some(KERNEL_LOG.into()),
        LogSource::Agent => "agent",
        LogSource::Daemon(name) => name,
    };
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let valid = (1..=32).contains(&name.len()) && name.bytes().all(plain);
    valid.then(|| Path::new(LOG_FOLDER).join(format!("{name}.log")))
}

async fn serve_stream<S>(stream: S, path: &Path, tail: Option<u32>, follow: bool) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut byte = [0];
    tokio::select! {
        ended = write_log(&mut writer, path, tail, follow) => ended?,
        // The peer never writes here: whatever comes is its end.
        _ = reader.read(&mut byte) => return Ok(()),
    }
    writer.shutdown().await
}

async fn write_log<W>(writer: &mut W, path: &Path, tail: Option<u32>, follow: bool) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    let mut log: Box<dyn Log> = if path == Path::new(KERNEL_LOG) {
        Box::new(KernelLog::open(path, tail)?)
    } else {
        Box::new(FileLog::open(path, tail)?)
    };
    let mut more = Vec::with_capacity(CHUNK);
    loop {
        more.clear();
        log.read(&mut more)?;
        if !more.is_empty() {
            writer.write_all(&more).await?;
        } else if follow {
            tokio::time::sleep(LOOK).await;
        } else {
            return Ok(());
        }
    }
}

/// A source of bytes that gives none for now rather than waiting.
trait Log: Send {
    /// Appends at most about [`CHUNK`] bytes to `more`; none when there are none for now.
    fn read(&mut self, more: &mut Vec<u8>) -> io::Result<()>;
}

/// A log file, which may be truncated or replaced under its reader.
struct FileLog {
    path: PathBuf,
    file: Option<std::fs::File>,
    position: u64,
}

impl FileLog {
    /// A log that is not there yet is an empty one.
    fn open(path: &Path, tail: Option<u32>) -> io::Result<Self> {
        let mut log = Self { path: path.to_owned(), file: None, position: 0 };
        log.file = log.open_path()?;
        if let (Some(file), Some(lines)) = (&mut log.file, tail) {
            log.position = start_of_last_lines(file, lines)?;
        }
        Ok(log)
    }

    fn open_path(&self) -> io::Result<Option<std::fs::File>> {
        match std::fs::File::open(&self.path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Log for FileLog {
    fn read(&mut self, more: &mut Vec<u8>) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            if file.metadata()?.len() < self.position {
                // Rotated by truncation.
                self.position = 0;
            }
            file.seek(SeekFrom::Start(self.position))?;
            self.position += file.take(CHUNK as u64).read_to_end(more)? as u64;
            if !more.is_empty() {
                return Ok(());
            }
        }
        // At the end: has another file taken its name?
        let id = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let named = std::fs::metadata(&self.path).ok().map(id);
        let open = self.file.as_ref().and_then(|file| file.metadata().ok()).map(id);
        if named.is_some() && named != open {
            self.file = self.open_path()?;
            self.position = 0;
        }
        Ok(())
    }
}

/// Where the last `lines` lines begin, read backwards.
fn start_of_last_lines(file: &mut std::fs::File, lines: u32) -> io::Result<u64> {
    let end = file.metadata()?.len();
    if lines == 0 {
        return Ok(end);
    }
    let (mut begin, mut found) = (end, 0);
    let mut chunk = vec![0; CHUNK];
    while begin > 0 {
        let length = begin.min(CHUNK as u64);
        begin -= length;
        let part = &mut chunk[..usize::try_from(length).unwrap_or(CHUNK)];
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(part)?;
        for (at, _) in part.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            let after = begin + at as u64 + 1;
            // A newline at the very end ends the last line, it begins none.
            if after < end {
                found += 1;
                if found == lines {
                    return Ok(after);
                }
            }
        }
    }
    Ok(0)
}

/// The kernel's ring buffer: one record a read.
struct KernelLog {
    file: std::fs::File,
    /// Read already for the tail.
    ready: VecDeque<Vec<u8>>,
}

impl KernelLog {
    fn open(path: &Path, tail: Option<u32>) -> io::Result<Self> {
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let mut log = Self { file, ready: VecDeque::new() };
        if let Some(lines) = tail {
            while let Some(line) = log.record()? {
                log.ready.push_back(line);
                if log.ready.len() > lines as usize {
                    log.ready.pop_front();
                }
            }
        }
        Ok(log)
    }

    fn record(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut record = [0; 8192];
        loop {
            match self.file.read(&mut record) {
                Ok(0) => return Ok(None),
                Ok(length) => return Ok(Some(kernel_line(&record[..length]))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // EPIPE: records were overwritten before they were read; the next read goes on after.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Log for KernelLog {
    fn read(&mut self, more: &mut Vec<u8>) -> io::Result<()> {
        while more.len() < CHUNK {
            let next = match self.ready.pop_front() {
                Some(line) => Some(line),
                None => self.record()?,
            };
            match next {
                Some(line) => more.extend_from_slice(&line),
                None => break,
            }
        }
        Ok(())
    }
}

/// A record as dmesg shows it. Its form (Documentation/ABI/testing/dev-kmsg):
/// `level,sequence,microseconds,flags[,…];message`, then ` KEY=value` lines that are left out.
fn kernel_line(record: &[u8]) -> Vec<u8> {
    let mut parts = record.splitn(2, |byte| *byte == b';');
    let (head, message) = match (parts.next(), parts.next()) {
        (Some(head), Some(message)) => (head, message),
        _ => (&[][..], record),
    };
    let message = message.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let micros: u64 = String::from_utf8_lossy(head)
        .split(',')
        .nth(2)
        .and_then(|micros| micros.parse().ok())
        .unwrap_or_default();
    let mut line = format!("[{:5}.{:06}] ", micros / 1_000_000, micros % 1_000_000).into_bytes();
    line.extend_from_slice(message);
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::DuplexStream;

    async fn whole(path: &Path, tail: Option<u32>) -> String {
        let (mut ours, theirs) = tokio::io::duplex(1 << 20);
        let path = path.to_owned();
        tokio::spawn(async move { serve_stream(theirs, &path, tail, false).await });
        let mut text = String::new();
        ours.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn all_or_the_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.log");
        assert_eq!(whole(&path, None).await, "");
        let lines: Vec<String> = (0..20_000).map(|line| format!("line {line}\n")).collect();
        std::fs::write(&path, lines.concat()).unwrap();
        assert_eq!(whole(&path, None).await, lines.concat());
        for tail in [0, 1, 2, 10_000, 20_000, 30_000] {
            let expected = lines[lines.len().saturating_sub(tail as usize)..].concat();
            assert_eq!(whole(&path, Some(tail)).await, expected, "{tail}");
        }
        std::fs::write(&path, "first\nunended").unwrap();
        assert_eq!(whole(&path, Some(1)).await, "unended");
    }

    async fn expect(stream: &mut DuplexStream, text: &str) {
        let mut got = vec![0; text.len()];
        let read = stream.read_exact(&mut got);
        tokio::time::timeout(Duration::from_secs(5), read).await.unwrap().unwrap();
        assert_eq!(String::from_utf8_lossy(&got), text);
    }

    #[tokio::test]
    async fn a_follower_survives_rotation_and_leaves_with_its_peer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.log");
        let (mut ours, theirs) = tokio::io::duplex(1 << 20);
        let serving = {
            let path = path.clone();
            tokio::spawn(async move { serve_stream(theirs, &path, Some(1), true).await })
        };
        tokio::time::sleep(Duration::from_millis(50)).await;
        std::fs::write(&path, "created later\n").unwrap();
        expect(&mut ours, "created later\n").await;
        std::fs::write(&path, "cut\n").unwrap();
        expect(&mut ours, "cut\n").await;
        std::fs::rename(&path, folder.path().join("x.log.1")).unwrap();
        std::fs::write(&path, "another file\n").unwrap();
        expect(&mut ours, "another file\n").await;
        drop(ours);
        tokio::time::timeout(Duration::from_secs(5), serving).await.unwrap().unwrap().unwrap();
    }

    #[test]
    fn only_plain_names_are_files() {
        let daemon = |name: &str| path_of(&LogSource::Daemon(name.into()));
        assert_eq!(daemon("dockerd").unwrap(), Path::new("/data/log/dockerd.log"));
        for bad in ["", "../agent", "a/b", "A", "a.b", "a\0b", &"x".repeat(33)] {
            assert!(daemon(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_kernel_record_becomes_a_line() {
        let record = b"6,339,5140900,-;NET: Registered protocol family 10\n SUBSYSTEM=net\n";
        assert_eq!(kernel_line(record), b"[    5.140900] NET: Registered protocol family 10\n");
        assert_eq!(kernel_line(b"garbage"), b"[    0.000000] garbage\n");
    }

    #[tokio::test]
    async fn the_kernels_log_has_a_tail() {
        if std::fs::File::open(KERNEL_LOG).is_err() {
            eprintln!("skipped: no access to {KERNEL_LOG}");
            return;
        }
        assert!(whole(Path::new(KERNEL_LOG), Some(3)).await.lines().count() <= 3);
    }
}
