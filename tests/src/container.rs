//! Containers of a test image that is made on the spot: no registry is asked.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::command::Cmd;
use super::settings::Settings;
use super::vm::{Vm, run_folder};

/// The test image: busybox with its applets, and the guest tool.
pub const IMAGE: &str = "e2e/busybox";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A tar of the test image's root.
///
/// # Panics
/// When it cannot be made.
pub fn root_tar() -> PathBuf {
    static TAR: OnceLock<PathBuf> = OnceLock::new();
    TAR.get_or_init(|| {
        let settings = Settings::get();
        let root = run_folder().join("root");
        for folder in ["bin", "etc", "tmp", "root", "data"] {
            std::fs::create_dir_all(root.join(folder)).expect("a folder of the test image");
        }
        std::fs::copy(&settings.busybox, root.join("bin/busybox")).expect("busybox");
        std::fs::copy(&settings.guest_tool, root.join("bin/guest-tool")).expect("the guest tool");
        let applets = Cmd::new(&settings.busybox).arg("--list").ok();
        for applet in applets.lines().filter(|applet| *applet != "busybox") {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).expect("an applet");
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n";
        std::fs::write(root.join("etc/passwd"), passwd).expect("its users");
        let tar = run_folder().join("root.tar");
        let path = std::env::var_os("PATH").unwrap_or_default();
        Cmd::new("tar").env("PATH", path).arg("-C").arg(&root).arg("-cf").arg(&tar).arg(".").ok();
        tar
    })
    .clone()
}

impl Vm {
    /// Makes the test image, tagged [`IMAGE`].
    ///
    /// # Panics
    /// When docker does not take it.
    pub fn import_image(&self) {
        let import = ["import", "--change", r#"CMD ["sh"]"#, "-", IMAGE];
        self.docker(&import).stdin_file(root_tar()).ok();
    }

    /// `docker run --rm` of `argv` in the test image, with `options`.
    pub fn docker_run(&self, options: &[&str], argv: &[&str]) -> Cmd {
        self.docker(&["run", "--rm"]).args(options).arg(IMAGE).args(argv)
    }

    /// A container in the background.
    ///
    /// # Panics
    /// When docker does not start it.
    pub fn container(&self, options: &[&str], argv: &[&str]) -> Container<'_> {
        self.container_of(IMAGE, options, argv)
    }

    /// A container of another image in the background.
    ///
    /// # Panics
    /// When docker does not start it.
    pub fn container_of(&self, image: &str, options: &[&str], argv: &[&str]) -> Container<'_> {
        let name = format!("e2e-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let container = Container { vm: self, name };
        self.docker(&["run", "-d", "--name", &container.name]).args(options).arg(image).args(argv).ok();
        container
    }
}

/// A container; dropping it removes it.
#[derive(Debug)]
pub struct Container<'a> {
    vm: &'a Vm,
    /// Its name.
    pub name: String,
}

impl Container<'_> {
    /// `docker exec` in it.
    pub fn exec(&self, argv: &[&str]) -> Cmd {
        self.vm.docker(&["exec", &self.name]).args(argv)
    }

    /// A shell's script in it.
    pub fn sh(&self, script: &str) -> Cmd {
        self.exec(&["sh", "-c", script])
    }

    /// What it has written so far.
    ///
    /// # Panics
    /// When docker does not tell.
    pub fn logs(&self) -> String {
        self.vm.docker(&["logs", &self.name]).run().exits(0).all()
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.vm.docker(&["rm", "-f", &self.name]).spawn().try_wait();
    }
}
