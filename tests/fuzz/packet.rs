//! Guest memory and rings of any shape before the vsock device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dhow::vsock::device::fuzzing::packet(data));
