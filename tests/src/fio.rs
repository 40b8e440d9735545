//! fio in a container, told from the host what to write, and asked later whether all of it is there.
//!
//! Its server runs in the guest and its client here: `fio --client` is given the server's list of finished writes when a
//! trigger fires ("Verification and triggers" of fio(1)), so that a power cut can follow at once.

use std::path::Path;
use std::time::Duration;

use super::command::Cmd;
use super::container::Container;
use super::settings::Settings;
use super::vm::{Vm, run_folder};
use super::wait::{SOON, wait_until};

const IMAGE: &str = "e2e/fio";
/// Where fio's server listens, in the container.
const PORT: u16 = 8765;
/// Reports of writes until the power cut; there is about one a second.
const REPORTS: usize = 5;
/// A write is finished when it is on the disk: fio notes the write itself as finished, and not the fsync(2) after it.
const JOB: &str = "[writes]
size=256m
rw=randwrite
bs=4k
ioengine=psync
sync=dsync
fsync=1
verify=crc32c
verify_fatal=1
";

/// A fio server in a container, with a volume of its own.
#[derive(Debug)]
pub struct Fio<'a> {
    port: u16,
    /// What it writes to; one that is new has nothing of an earlier round in it, whose blocks would be the same.
    file: String,
    /// Lives as long as this.
    _server: Container<'a>,
}

/// Makes the image, once for a VM's data.
///
/// # Panics
/// When docker does not take it.
pub fn import(vm: &Vm) {
    let tar = run_folder().join("fio.tar");
    let path = std::env::var_os("PATH").unwrap_or_default();
    Cmd::new("tar").env("PATH", path).arg("-C").arg(&Settings::get().fio).arg("-cf").arg(&tar).arg(".").ok();
    vm.docker(&["import", "-", IMAGE]).stdin_file(&tar).ok();
}

impl<'a> Fio<'a> {
    /// Starts the server, for the file `name` in its volume; it is reached through `port` of the host.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(vm: &'a Vm, port: u16, name: &str) -> Self {
        let publish = format!("127.0.0.1:{port}:{PORT}");
        // On a terminal it says at once that it listens.
        let options = ["-t", "-p", &publish, "-v", "fio:/data", "--tmpfs", "/tmp"];
        let server = vm.container_of(IMAGE, &options, &["/usr/bin/fio", "--server"]);
        wait_until("fio's server", SOON, || server.logs().contains("listening"));
        Self { port, file: format!("/data/{name}"), _server: server }
    }

    /// Writes until the machine is killed, whose process `machine` is. `folder` gets fio's list of what it had written.
    ///
    /// # Panics
    /// When that list does not come.
    pub fn write_until_power_cut(self, machine: i32, folder: &Path) {
        let client = self.client(folder, "do_verify=0\n");
        let trigger = folder.join("trigger");
        let client = client.arg("--eta=always").arg(format!("--trigger=kill -9 {machine}"));
        let client = client.arg(format!("--trigger-file={}", trigger.display())).spawn();
        wait_until("fio's writes", SOON, || client.stdout().matches(" IOPS]").count() >= REPORTS);
        std::fs::write(trigger, "").expect("the trigger");
        // The server is gone then, which the client may call an error.
        let ended = client.wait();
        assert!(
            folder.read_dir().is_ok_and(|mut files| {
                files
                    .any(|file| file.is_ok_and(|file| file.file_name().to_string_lossy().ends_with(".state")))
            }),
            "fio has told of no writes: {ended}"
        );
    }

    /// Reads what it had written by that list; returns how many writes that were.
    ///
    /// # Panics
    /// When one is missing or differs.
    pub fn verify(self, folder: &Path) -> u64 {
        let text = self.client(folder, "verify_only=1\nverify_state_load=1\n").ok();
        let reads = text.split_once("issued rwts: total=").and_then(|(_, rest)| rest.split_once(','));
        reads
            .and_then(|(reads, _)| reads.parse().ok())
            .unwrap_or_else(|| panic!("no number of reads: {text}"))
    }

    fn client(&self, folder: &Path, further: &str) -> Cmd {
        let job = folder.join("job");
        std::fs::write(&job, format!("{JOB}filename={}\n{further}", self.file)).expect("fio's job");
        let root = &Settings::get().fio;
        let path = std::env::var_os("PATH").unwrap_or_default();
        Cmd::new(root.join("lib64/ld-linux-x86-64.so.2"))
            .env("PATH", path)
            .arg("--library-path")
            .arg(root.join("lib"))
            .arg(root.join("usr/bin/fio"))
            .arg(format!("--client=ip:127.0.0.1,{}", self.port))
            .arg(job)
            .cwd(folder)
            .deadline(Duration::from_secs(300))
    }
}
