//! The docker API: a small request on a kept and on a new connection, and a large load.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dhow_guest_tool::Pattern;
use dhow_tests::Vm;
use dhow_tests::command::Cmd;

/// Requests of one sample.
const PINGS: u32 = 30;
const DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of the layer that is loaded.
const LOAD: usize = 200_000_000;

/// Milliseconds of a `/_ping` on a connection that is there.
///
/// # Panics
/// When one fails.
pub fn ping_kept(socket: &Path) -> f64 {
    let mut stream = connect(socket);
    ping(&mut stream);
    let begin = Instant::now();
    for _ in 0..PINGS {
        ping(&mut stream);
    }
    begin.elapsed().as_secs_f64() * 1000.0 / f64::from(PINGS)
}

/// Milliseconds of connecting, a `/_ping`, and closing.
///
/// # Panics
/// When one fails.
pub fn ping_new(socket: &Path) -> f64 {
    let begin = Instant::now();
    for _ in 0..PINGS {
        ping(&mut connect(socket));
    }
    begin.elapsed().as_secs_f64() * 1000.0 / f64::from(PINGS)
}

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    stream
}

fn ping(stream: &mut UnixStream) {
    stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n").expect("a request");
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    // The body is "OK", after the empty line.
    while !answer.ends_with(b"\r\n\r\nOK") {
        let got = stream.read(&mut chunk).expect("an answer");
        assert!(got > 0, "docker closed: {}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&chunk[..got]);
    }
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
}

/// An archive as `docker save` makes it, of one layer that does not compress.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    tag: &'static str,
}

impl Archive {
    /// Makes it, with the docker of `vm`.
    ///
    /// # Panics
    /// When that fails.
    pub fn make(vm: &Vm) -> Self {
        let folder = vm.beside("load");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("blob"), Pattern::bytes(1, LOAD)).expect("the layer");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let [layer, archive] = ["layer.tar", "image.tar"].map(|name| vm.beside(name));
        Cmd::new("tar").env("PATH", path).arg("-C").arg(&folder).arg("-cf").arg(&layer).arg("blob").ok();
        let tag = "bench/load";
        vm.docker(&["import", "-", tag]).stdin_file(&layer).ok();
        vm.docker(&["save", "-o"]).arg(&archive).arg(tag).ok();
        vm.docker(&["rmi", tag]).ok();
        for path in [folder.join("blob"), layer] {
            std::fs::remove_file(path).expect("a file less");
        }
        Self { path: archive, tag }
    }

    /// Seconds of a `docker load` through `socket`; docker forgets it again afterwards.
    ///
    /// # Panics
    /// When it fails.
    pub fn load(&self, vm: &Vm, socket: &Path) -> f64 {
        let host = format!("unix://{}", socket.display());
        let begin = Instant::now();
        vm.docker(&["--host", &host, "load", "-i"]).arg(&self.path).ok();
        let took = begin.elapsed().as_secs_f64();
        vm.docker(&["rmi", self.tag]).ok();
        took
    }
}
