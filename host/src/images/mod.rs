//! Image store: find, verify, compose the initramfs.
