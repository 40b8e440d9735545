//! The vsock transport.
