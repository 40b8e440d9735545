//! The process that serves one granted host folder.
