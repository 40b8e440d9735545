//! The record of the VM that this supervisor runs: in memory, and at each change on disk.

use std::io;
use std::sync::{Mutex, PoisonError};

use super::record::Record;
use crate::config::Paths;

/// See the module's description.
pub struct Ledger {
    paths: Paths,
    record: Mutex<Record>,
}

impl Ledger {
    /// Writes the first record of a VM.
    ///
    /// # Errors
    /// When the run folder takes no file.
    pub fn begin(paths: &Paths, record: Record) -> io::Result<Self> {
        record.write(paths)?;
        Ok(Self::of(paths, record))
    }

    /// Goes on with a record that is on disk already.
    pub fn of(paths: &Paths, record: Record) -> Self {
        Self { paths: paths.clone(), record: Mutex::new(record) }
    }

    /// The record as it is.
    pub fn record(&self) -> Record {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes it, here and on disk. A disk that takes nothing does not end the VM; a successor would
    /// find the last record that could be written.
    pub fn change(&self, change: impl FnOnce(&mut Record)) {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let before = record.clone();
        change(&mut record);
        if *record != before
            && let Err(error) = record.write(&self.paths)
        {
            tracing::error!(%error, "the VM's record cannot be written");
        }
    }
}
