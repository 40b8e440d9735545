//! Images: find one, read its manifest, compose the initramfs.

pub mod initramfs;
pub mod store;
