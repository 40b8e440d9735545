//! Any sequence of packets, client events and supervisor requests before the vsock device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dhow::vsock::device::fuzzing::connection(data));
