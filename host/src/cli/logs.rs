//! `dhow logs`: what the guest's daemons and the host's processes say.

use std::io::{self, IsTerminal, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dhow_protocol::stream::LogSource;
use tokio::io::AsyncReadExt;

use super::client::{self, OPEN_DEADLINE};
use super::errors::CommandError;
use super::output::{bytes, print, table, write_all};
use crate::api::{ApiReply, ApiRequest};
use crate::config::Paths;

/// Between looks for new lines while a host's file is followed.
const LOOK: Duration = Duration::from_millis(200);
const CHUNK: usize = 64 << 10;
/// Daemons that every VM has.
const DAEMONS: [&str; 2] = ["dockerd", "containerd"];

const HELP: &str = "\
Sources in the VM, while it runs: agent, kernel, dockerd, containerd. Sources on the host, also of a VM
that has ended: console (the guest's serial console), keeper (and supervisor, which is the same), qemu,
passt, vsock-device, file-server-N. Without a source the ones that are there are listed.

On a terminal control characters are written out; into a file or a pipe goes what was logged.

Examples:
  dhow logs
  dhow logs dockerd -n 50 -f
  dhow logs console | less";

/// Show logs of the VM and of Dhow's own processes.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Which log [default: list what there is]
    #[arg(value_name = "SOURCE")]
    source: Option<String>,
    /// Go on as lines are added [default: end at the end]
    #[arg(short, long, requires = "source")]
    follow: bool,
    /// Begin that many lines from the end [default: at the beginning]
    #[arg(short = 'n', long, visible_alias = "tail", value_name = "N", requires = "source")]
    lines: Option<u32>,
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    let Some(name) = args.source else {
        return list(paths).await;
    };
    let mut out = Out::new();
    if let Some(source) = guest_source(&name) {
        guest(paths, source, args.lines, args.follow, &mut out).await?;
        return Ok(0);
    }
    // Both write to what the keeper was started with.
    let file_name = if name == "supervisor" { "keeper" } else { &name };
    let file = host_files(paths)?.into_iter().find(|(known, _)| known == file_name);
    match file {
        Some((_, path)) => host(&path, args.lines, args.follow, &mut out).await?,
        None => return Err(unknown(&name, paths)?),
    }
    Ok(0)
}

/// The guest's log of that name.
fn guest_source(name: &str) -> Option<LogSource> {
    match name {
        "agent" => Some(LogSource::Agent),
        "kernel" => Some(LogSource::Kernel),
        daemon if DAEMONS.contains(&daemon) => Some(LogSource::Daemon(daemon.to_owned())),
        _ => None,
    }
}

/// Names and paths of the host's log files.
fn host_files(paths: &Paths) -> Result<Vec<(String, PathBuf)>, CommandError> {
    let folder = paths.log_dir();
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(CommandError::system(format!("list {}", folder.display()), source)),
    };
    let mut files: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_str()?.strip_suffix(".log")?.to_owned();
            entry.path().is_file().then(|| (name, entry.path()))
        })
        .collect();
    files.sort();
    Ok(files)
}

async fn list(paths: &Paths) -> Result<u8, CommandError> {
    let running = client::connect(paths).await?.is_some();
    let mut rows = Vec::new();
    if running {
        for name in ["agent", "kernel"].into_iter().chain(DAEMONS) {
            rows.push(vec![name.to_owned(), "VM".to_owned(), "-".to_owned()]);
        }
    }
    for (name, path) in host_files(paths)? {
        let size = path.metadata().map_or(0, |meta| meta.len());
        rows.push(vec![name, "host".to_owned(), bytes(size)]);
    }
    if rows.is_empty() {
        super::output::say("there are no logs yet; `dhow start` makes some");
        return Ok(0);
    }
    print(&table(&["SOURCE", "WHERE", "SIZE"], &rows))?;
    Ok(0)
}

fn unknown(name: &str, paths: &Paths) -> Result<CommandError, CommandError> {
    let files: Vec<String> = host_files(paths)?.into_iter().map(|(name, _)| name).collect();
    let there = if files.is_empty() { "nothing yet".to_owned() } else { files.join(", ") };
    Ok(CommandError::other(
        format!("there is no log named {:?} of profile {}", name, paths.profile()),
        format!("in the VM: agent, kernel, {}; on the host: {there}", DAEMONS.join(", ")),
    ))
}

async fn guest(
    paths: &Paths,
    source: LogSource,
    tail: Option<u32>,
    follow: bool,
    out: &mut Out,
) -> Result<(), CommandError> {
    let request = ApiRequest::Logs { source, tail, follow };
    let connection = match client::open(paths, &request, OPEN_DEADLINE).await {
        Ok((ApiReply::Opened, connection)) => connection,
        Ok(_) => return Err(CommandError::Kind),
        Err(error @ CommandError::NotRunning(_)) => {
            let problem = error.to_string();
            let start = super::errors::invocation(paths.profile());
            let hint = format!("`{start} start` starts it; `{start} logs console` has its last words");
            return Err(CommandError::other(problem, hint));
        }
        Err(error) => return Err(error),
    };
    let mut stream = connection.into_stream();
    let mut chunk = vec![0; CHUNK];
    loop {
        match stream.read(&mut chunk).await {
            Ok(0) => return out.end(),
            Ok(length) => out.write(&chunk[..length])?,
            // The VM was stopped.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return out.end(),
            Err(source) => return Err(CommandError::system("read the log", source)),
        }
    }
}

async fn host(path: &Path, tail: Option<u32>, follow: bool, out: &mut Out) -> Result<(), CommandError> {
    let fail = |source| CommandError::system(format!("read {}", path.display()), source);
    let mut file = std::fs::File::open(path).map_err(fail)?;
    if let Some(lines) = tail {
        let start = start_of_last_lines(&mut file, lines).map_err(fail)?;
        file.seek(SeekFrom::Start(start)).map_err(fail)?;
    }
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk).map_err(fail)? {
            0 if !follow => return out.end(),
            0 => {
                out.pause()?;
                tokio::time::sleep(LOOK).await;
                if let Some(newer) = replaced(path, &mut file).map_err(fail)? {
                    file = newer;
                }
            }
            length => out.write(&chunk[..length])?,
        }
    }
}

/// The file that has taken the name; a file that was cut is begun anew.
fn replaced(path: &Path, file: &mut std::fs::File) -> io::Result<Option<std::fs::File>> {
    let open = file.metadata()?;
    if open.len() < file.stream_position()? {
        file.rewind()?;
    }
    match path.metadata() {
        Ok(named) if (named.dev(), named.ino()) != (open.dev(), open.ino()) => {
            std::fs::File::open(path).map(Some)
        }
        // Between a rename and the new file there is none.
        _ => Ok(None),
    }
}

/// Where the last `lines` lines begin, read backwards.
fn start_of_last_lines(file: &mut std::fs::File, lines: u32) -> io::Result<u64> {
    let end = file.metadata()?.len();
    let (mut begin, mut found) = (end, 0);
    let mut chunk = vec![0; CHUNK];
    while begin > 0 && lines > 0 {
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
    Ok(if lines == 0 { end } else { 0 })
}

/// Standard output for bytes that somebody else has written.
struct Out {
    /// Write control characters out.
    escape: bool,
    /// The beginning of a character or a line's end, to be judged with what follows.
    kept: Vec<u8>,
}

impl Out {
    fn new() -> Self {
        Self { escape: io::stdout().is_terminal(), kept: Vec::new() }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), CommandError> {
        if !self.escape {
            return write_all(io::stdout().as_fd(), bytes).map_err(CommandError::Output);
        }
        self.kept.extend_from_slice(bytes);
        let whole = self.kept.len() - unfinished(&self.kept);
        let rest = self.kept.split_off(whole);
        let text = std::mem::replace(&mut self.kept, rest);
        print(&escape(&text))
    }

    /// Nothing more for now: what is kept is shown.
    fn pause(&mut self) -> Result<(), CommandError> {
        let kept = std::mem::take(&mut self.kept);
        print(&escape(&kept))
    }

    fn end(&mut self) -> Result<(), CommandError> {
        self.pause()
    }
}

fn escape(bytes: &[u8]) -> String {
    // A serial console ends its lines with both.
    super::output::escape_lines(&String::from_utf8_lossy(bytes).replace("\r\n", "\n"))
}

/// How many bytes at the end are the beginning of something: a character of UTF-8, or `\r\n`.
fn unfinished(bytes: &[u8]) -> usize {
    if bytes.last() == Some(&b'\r') {
        return 1;
    }
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => bytes.len() - error.valid_up_to(),
        Err(_) => {
            // Malformed before: only the end matters.
            let tail = &bytes[bytes.len().saturating_sub(3)..];
            (1..=tail.len()).rev().find(|&length| begins_character(&tail[tail.len() - length..])).unwrap_or(0)
        }
        Ok(_) => 0,
    }
}

/// Whether these bytes are a character that has not ended.
fn begins_character(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_waits_for_its_rest() {
        assert_eq!(unfinished(b"plain"), 0);
        assert_eq!(unfinished("é".as_bytes()), 0);
        assert_eq!(unfinished(&"é".as_bytes()[..1]), 1);
        assert_eq!(unfinished(&"x\u{1f600}".as_bytes()[..4]), 3);
        assert_eq!(unfinished(b"\xffabc"), 0);
        assert_eq!(unfinished(b"\xffabc\xf0\x9f"), 2);
        assert_eq!(unfinished(b"line\r"), 1);
        assert_eq!(escape(b"a\r\n\x1b[0m\xff"), "a\n\\u{1b}[0m\u{fffd}");
    }

    #[test]
    fn the_last_lines_of_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.log");
        let lines: Vec<String> = (0..20_000).map(|line| format!("line {line}\n")).collect();
        std::fs::write(&path, lines.concat()).unwrap();
        for tail in [0, 1, 2, 10_000, 20_000, 30_000] {
            let mut file = std::fs::File::open(&path).unwrap();
            let start = start_of_last_lines(&mut file, tail).unwrap();
            let expected = lines[lines.len().saturating_sub(tail as usize)..].concat();
            assert_eq!(lines.concat().len() as u64 - start, expected.len() as u64, "{tail}");
        }
    }
}
