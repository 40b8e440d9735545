//! What end-to-end tests run in the guest where busybox does not suffice: parses arguments, prints errors.

mod records;
mod rename;
mod serve;

use std::io;

const USAGE: &str = "usage: guest-tool serve ADDRESS:PORT|vsock:PORT
       guest-tool records write|check FILE
       guest-tool rename exchange|noreplace FROM TO
       guest-tool pattern SEED SIZE";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["serve", address] => serve::serve(address),
        ["records", "write", file] => records::write(file.as_ref()),
        ["records", "check", file] => records::check(file.as_ref()),
        ["rename", "exchange", from, to] => rename::rename(from, to, libc::RENAME_EXCHANGE),
        ["rename", "noreplace", from, to] => rename::rename(from, to, libc::RENAME_NOREPLACE),
        ["pattern", seed, size] => pattern(seed, size),
        _ => {
            eprintln!("{USAGE}");
            std::process::exit(2);
        }
    };
    if let Err(error) = result {
        eprintln!("guest-tool: {error}");
        std::process::exit(1);
    }
}

/// Writes `size` bytes of the pattern `seed` to standard output.
fn pattern(seed: &str, size: &str) -> io::Result<()> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    serve::send(&mut io::stdout().lock(), seed.parse().map_err(wrong)?, size.parse().map_err(wrong)?)
}
