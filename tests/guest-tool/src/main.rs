//! What end-to-end tests run in the guest where busybox does not suffice: parses arguments, prints errors.

mod ask;
mod datagrams;
mod everywhere;
mod knock;
mod listeners;
mod names;
mod poll;
mod records;
mod rename;
mod serve;
mod vsock;

use std::io;
use std::path::Path;

use dhow_guest_tool::ping;

const USAGE: &str = "usage: guest-tool serve ADDRESS:PORT|vsock:PORT
       guest-tool serve-one ADDRESS:PORT one connection, and listens no longer meanwhile
       guest-tool datagrams ADDRESS:PORT echoes UDP
       guest-tool names ADDRESS:PORT     a name server: every name is 10.9.8.7
       guest-tool listeners ADDRESS:PORT listens at the word of a client
       guest-tool everywhere FIRST COUNT listens on all of them, and flaps others without end
       guest-tool poll MILLISECONDS      prints the listening ports that come (+) and go (-)
       guest-tool ask HOST:PORT|SOCKET TEXT
       guest-tool records write|check FILE
       guest-tool rename exchange|noreplace FROM TO
       guest-tool pattern SEED SIZE
       guest-tool ping SOCKET            milliseconds on a kept and on a new connection
       guest-tool knock THREADS          asks the host for vsock connections without end, all refused";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["serve", address] => serve::serve(address),
        ["datagrams", address] => datagrams::serve(address),
        ["listeners", address] => listeners::serve(address),
        ["everywhere", first, count] => everywhere::listen(first, count),
        ["poll", milliseconds] => poll::poll(milliseconds),
        ["names", address] => names::serve(address),
        ["ask", target, text] => ask::ask(target, text),
        ["serve-one", address] => serve::serve_one(address),
        ["records", "write", file] => records::write(file.as_ref()),
        ["records", "check", file] => records::check(file.as_ref()),
        ["rename", "exchange", from, to] => rename::rename(from, to, libc::RENAME_EXCHANGE),
        ["rename", "noreplace", from, to] => rename::rename(from, to, libc::RENAME_NOREPLACE),
        ["pattern", seed, size] => pattern(seed, size),
        ["knock", threads] => knock::knock(threads),
        ["ping", socket] => ping(socket.as_ref()),
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

/// Prints how long docker takes here.
fn ping(socket: &Path) -> io::Result<()> {
    println!("{} {}", ping::kept(socket)?, ping::new(socket)?);
    Ok(())
}

/// Writes `size` bytes of the pattern `seed` to standard output.
fn pattern(seed: &str, size: &str) -> io::Result<()> {
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    serve::send(&mut io::stdout().lock(), seed.parse().map_err(wrong)?, size.parse().map_err(wrong)?)
}
