//! A daemon for tests: this test binary, started again. Its settings come by `env`.

use std::io::Write;
use std::path::PathBuf;

use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

use super::*;

/// Its socket. Unset: this is not the daemon.
const SOCKET: &str = "DHOW_TEST_SOCKET";
/// Its settings file.
const CONFIG: &str = "DHOW_TEST_CONFIG";
/// Where it adds a line about its end.
const DIARY: &str = "DHOW_TEST_DIARY";

/// `[[daemon]]` of a daemon with this name. It answers any GET with its settings, and exits at
/// `/exit` with status 3. `rest` is further keys, or another command.
pub fn daemon(guest: &Guest, name: &str, rest: &str) -> String {
    let root = guest.root.path();
    let socket = root.join(format!("{name}.sock"));
    let settings = [
        format!("{SOCKET}={}", socket.display()),
        format!("{CONFIG}={}", guest.store.run.join(format!("{name}.conf")).display()),
        format!("{DIARY}={}", root.join("diary").display()),
    ];
    let program = std::env::current_exe().unwrap();
    let mut argv = vec!["/usr/bin/env".to_owned()];
    argv.extend(settings);
    argv.push(program.display().to_string());
    argv.extend(
        ["runtimes::tests::daemon::answers", "--exact", "--ignored", "--nocapture"].map(str::to_owned),
    );
    format!(
        "[[daemon]]\nname = \"{name}\"\nargv = {argv:?}\nready_socket = \"{}\"\nready_path = \"/_ping\"\n{rest}",
        socket.display()
    )
}

/// What daemons wrote of their ends.
pub fn diary(guest: &Guest) -> String {
    std::fs::read_to_string(guest.root.path().join("diary")).unwrap_or_default()
}

/// Makes the daemon exit with status 3.
pub async fn crash(guest: &Guest, name: &str) {
    let socket = guest.root.path().join(format!("{name}.sock"));
    let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    stream.write_all(b"GET /exit HTTP/1.0\r\n\r\n").await.unwrap();
}

#[tokio::test]
#[ignore = "the daemon of other tests, not a test"]
async fn answers() {
    use tokio::signal::unix::{SignalKind, signal};
    let Some(socket) = std::env::var_os(SOCKET).map(PathBuf::from) else { return };
    let config = || std::fs::read_to_string(std::env::var_os(CONFIG).unwrap()).unwrap_or_default();
    let mut settings = config();
    let mut end = signal(SignalKind::terminate()).unwrap();
    let mut reload = signal(SignalKind::hangup()).unwrap();
    let name = socket.file_stem().unwrap().to_string_lossy().into_owned();
    // One that was killed has left it.
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let mut stream = accepted.unwrap().0;
                let mut request = [0; 256];
                let length = stream.read(&mut request).await.unwrap_or(0);
                if request[..length].starts_with(b"GET /exit") {
                    println!("asked to exit");
                    std::process::exit(3);
                }
                // The asker may have gone.
                let _ = stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{settings}").as_bytes()).await;
            }
            _ = reload.recv() => settings = config(),
            _ = end.recv() => break,
        }
    }
    let diary = std::env::var_os(DIARY).unwrap();
    let mut diary = std::fs::File::options().append(true).create(true).open(diary).unwrap();
    writeln!(diary, "{name} ended with {settings}").unwrap();
    std::process::exit(0);
}
