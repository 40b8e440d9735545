//! The docker API: a small request on a kept and on a new connection, and a large load.

use std::path::{Path, PathBuf};
use std::time::Instant;

use dhow_guest_tool::{Pattern, ping};
use dhow_tests::command::Cmd;
use dhow_tests::{TOOL, Vm};

/// docker's socket in the guest.
const GUEST_SOCKET: &str = "/run/docker.sock";
/// Bytes of the layer that is loaded.
const LOAD: usize = 200_000_000;

/// Milliseconds of a `/_ping` on a kept and on a new connection through `socket`; without one, asked inside the
/// guest: what docker needs by itself.
///
/// # Panics
/// When one fails.
pub fn pings(vm: &Vm, socket: Option<&Path>) -> [f64; 2] {
    if let Some(socket) = socket {
        return [ping::kept(socket), ping::new(socket)].map(|took| took.expect("a ping"));
    }
    let printed = vm.exec(&[TOOL, "ping", GUEST_SOCKET]).ok();
    let numbers: Vec<f64> = printed.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("no two numbers: {printed}"))
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
