//! Any bytes as every type that crosses the wire: the first byte chooses the type. What decodes must encode again, to
//! something that decodes to the same.
#![no_main]

use std::fmt::Debug;

use dhow::vsock::device::control::{FromDevice, ToDevice};
use dhow_protocol::codec::{from_bytes, to_bytes};
use dhow_protocol::hello::{HELLO_LEN, Hello, HelloReply, Secret};
use dhow_protocol::{boot, bundle, control, exec, files, host_services, ports, stream};

fn decode<T: bincode::Decode<()> + bincode::Encode + Debug>(bytes: &[u8]) {
    if let Ok(value) = from_bytes::<T>(bytes) {
        let again = to_bytes(&value).expect("what was decoded can be encoded");
        let twice: T = from_bytes(&again).expect("what was encoded can be decoded");
        // Compared in words: not every type is comparable.
        assert_eq!(format!("{value:?}"), format!("{twice:?}"));
    }
}

fn hello(bytes: &[u8]) {
    let secret = Secret([7; 32]);
    if let Some((head, rest)) = bytes.split_first_chunk::<HELLO_LEN>()
        && let Ok(hello) = Hello::parse(*head)
    {
        let _ = hello.accept(&secret, &rest[..rest.len().min(hello.header_len())]);
    }
    let _ = HelloReply::parse(bytes, &secret, &[1; 32]);
}

fn device(bytes: &[u8]) {
    if let Ok(message) = ToDevice::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
    if let Ok(message) = FromDevice::decode(bytes) {
        assert_eq!(message.encode(), bytes);
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    match choice % 19 {
        0 => decode::<files::FileRequest>(bytes),
        1 => decode::<files::FileReply>(bytes),
        2 => decode::<control::ToAgent>(bytes),
        3 => decode::<control::FromAgent>(bytes),
        4 => decode::<stream::StreamHeader>(bytes),
        5 => decode::<stream::DnsMessage>(bytes),
        6 => decode::<exec::ExecStart>(bytes),
        7 => decode::<exec::ExecInput>(bytes),
        8 => decode::<exec::ExecOutput>(bytes),
        9 => decode::<ports::PortsEvent>(bytes),
        10 => decode::<bundle::BundleOffer>(bytes),
        11 => decode::<bundle::BundleAnswer>(bytes),
        12 => decode::<boot::BootConfig>(bytes),
        13 => decode::<ports::Listener>(bytes),
        14 => hello(bytes),
        15 => device(bytes),
        16 => decode::<host_services::Offer>(bytes),
        17 => decode::<host_services::Dial>(bytes),
        _ => decode::<host_services::Refusal>(bytes),
    }
});
