//! A file of checked records: each is acknowledged on standard output after its fsync, so that a reader
//! knows which ones a power cut must not take.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Bytes of a record: number, filling, SHA-256 of both.
const RECORD: usize = 512;
const BODY: usize = RECORD - 32;

fn record(number: u64) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    dhow_guest_tool::Pattern::new(number).fill(&mut bytes[8..BODY]);
    let digest = Sha256::digest(&bytes[..BODY]);
    bytes[BODY..].copy_from_slice(&digest);
    bytes
}

/// Whole records at the beginning of `file`.
fn count(file: &mut File) -> io::Result<u64> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    let whole = (0..).zip(bytes.chunks(RECORD)).take_while(|(number, bytes)| *bytes == record(*number));
    Ok(whole.count() as u64)
}

/// Appends records for ever; prints the count after each fsync.
pub fn write(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let begin = count(&mut file)?;
    file.set_len(begin * RECORD as u64)?;
    file.seek(SeekFrom::End(0))?;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        File::open(folder)?.sync_all()?;
    }
    let mut stdout = io::stdout().lock();
    for number in begin.. {
        file.write_all(&record(number))?;
        file.sync_all()?;
        writeln!(stdout, "{}", number + 1)?;
        stdout.flush()?;
    }
    Ok(())
}

/// Prints how many whole records `path` begins with.
pub fn check(path: &Path) -> io::Result<()> {
    println!("{}", count(&mut File::open(path)?)?);
    Ok(())
}
