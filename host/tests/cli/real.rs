//! A real keeper and supervisor, which get as far as a QEMU that the test plays.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::bench::{Bench, processes_of, wait_until};

/// A PATH with nothing but this.
pub fn only(bench: &Bench, qemu: Option<&str>) -> std::path::PathBuf {
    let folder = bench.home().join("bin");
    std::fs::create_dir(&folder).unwrap();
    if let Some(script) = qemu {
        let program = folder.join("qemu-system-x86_64");
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    folder
}

/// An image that is whole, by its sizes.
pub fn image(bench: &Bench) -> String {
    let folder = bench.home().join("image");
    std::fs::create_dir(&folder).unwrap();
    let mut manifest = "format = 1\nkernel = '6.12'\ndocker = '28'\n".to_owned();
    for name in ["vmlinuz", "initramfs.cpio.zst", "base.erofs", "docker.erofs"] {
        std::fs::write(folder.join(name), "abc").unwrap();
        manifest.push_str(&format!("[files.'{name}']\nsize = 3\nsha256 = '{}'\n", "0".repeat(64)));
    }
    std::fs::write(folder.join("manifest.toml"), manifest).unwrap();
    folder.to_str().unwrap().to_owned()
}

/// A real keeper and supervisor, with no share: that keeps file servers out.
pub fn start(bench: &Bench, image: &str, path: &std::path::Path) -> Command {
    let mut command =
        bench.command(&["start", "--no-mounts", "--no-activate", "--accel", "tcg", "--image", image]);
    command.env("PATH", path);
    command
}

pub fn nothing_is_left(bench: &Bench) {
    wait_until("the keeper has ended", || processes_of(&bench.dhow_home()).is_empty().then_some(()));
    assert!(!bench.api_socket().exists());
}

/// A QEMU that does not even say its version while there is a file `hold`.
pub const SLOW: &str = "#!/bin/sh\nwhile [ -e \"$HOME/hold\" ]; do /bin/sleep 0.05; done\nexit 1\n";

/// Keeps [`SLOW`] waiting.
pub fn hold(bench: &Bench) {
    std::fs::write(bench.home().join("hold"), "").unwrap();
}

/// Lets [`SLOW`] go on.
pub fn release(bench: &Bench) {
    std::fs::remove_file(bench.home().join("hold")).unwrap();
}
