//! One VM that is reached in four ways, each of them an address on the host's loopback:
//!
//! ```text
//! dhow     client ─► Dhow's forward ─► vsock device ─► relay in the guest ─► TCP server
//! ssh -L   client ─► ssh ─► QEMU's hostfwd ─► sshd in the guest ─► TCP server       (as Colima and Lima do)
//! hostfwd  client ─► QEMU's own TCP/IP ─► guest's network card ─► TCP server
//! vsock    client ─► vsock device ─► vsock server: no relay in the guest, the limit
//! ```
//! The network card is QEMU's own (slirp) for all of them, since passt has no `hostfwd`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use dhow_tests::command::{Cmd, Running};
use dhow_tests::net::{ask_at, free_port, local};
use dhow_tests::qmp;
use dhow_tests::settings::in_path;
use dhow_tests::{SOON, TOOL, Vm, wait_for, wait_until};
use serde_json::{Value, json};

use crate::bare::Bare;

/// The ways, in the order of the table's columns.
pub const WAYS: [&str; 4] = ["dhow", "ssh -L", "hostfwd", "vsock"];
/// The one of them that Dhow cannot beat: its device without a relay, and docker asked inside the guest.
pub const LIMIT: &str = "vsock";

/// The guest's address, as Dhow gives it.
const GUEST: &str = "192.168.127.2";
/// Where things listen in the guest; Dhow's forward of a listener has the listener's own port.
const SSHD_PORT: u16 = 2222;
const VSOCK_PORT: u32 = 7000;
/// Container image with sshd and iperf3.
const IMAGE: &str = "bench/tools";
/// As Lima asks for: ciphers that processors have instructions for.
const CIPHERS: &str = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com";

/// The VM and what was set up for it. Dropping it ends all.
#[derive(Debug)]
pub struct Ways {
    /// The guest tool's server, in the order of [`WAYS`].
    pub servers: [SocketAddr; 4],
    /// iperf3's server; not by bare vsock, which iperf3 does not speak.
    pub iperf: [Option<SocketAddr>; 4],
    /// docker's API: Dhow's socket, and the one that ssh forwards.
    pub docker: [Option<PathBuf>; 4],
    running: Vec<Running>,
    bare: Option<Bare>,
    /// The VM.
    pub vm: Vm,
}

impl Ways {
    /// Boots the VM and sets all of them up.
    ///
    /// # Panics
    /// When anything of that fails.
    pub fn set_up() -> Self {
        Self::with_profile("")
    }

    /// Likewise, with a profile's file.
    ///
    /// # Panics
    /// Likewise.
    pub fn with_profile(profile: &str) -> Self {
        use std::os::unix::fs::DirBuilderExt;
        let vm = Vm::new();
        let folder = vm.dhow_home().join("config/profiles");
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.and_then(|()| std::fs::write(folder.join("default.toml"), profile)).expect("a profile's file");
        start_without_passt(&vm);
        vm.install_tool();
        let image = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("build/bench/tools.tar");
        vm.docker(&["import", "-", IMAGE]).stdin_file(image).ok();
        let ports: [u16; 6] = std::array::from_fn(|_| free_port());
        let [server, iperf_by_dhow, sshd, by_ssh, iperf_by_ssh, by_hostfwd] = ports;
        let iperf_by_hostfwd = free_port();

        let mut running =
            vec![serve(&vm, &format!("0.0.0.0:{server}")), serve(&vm, &format!("vsock:{VSOCK_PORT}"))];
        run_tools(&vm, iperf_by_dhow);
        for (host, guest) in [(sshd, SSHD_PORT), (by_hostfwd, server), (iperf_by_hostfwd, iperf_by_dhow)] {
            qmp::monitor(&vm, &format!("hostfwd_add net0 tcp:127.0.0.1:{host}-{GUEST}:{guest}"));
        }
        let socket = vm.beside("docker.sock");
        running.push(ssh(&vm, sshd, &[(by_ssh, server), (iperf_by_ssh, iperf_by_dhow)], &socket));
        let bare = Bare::listen(&vm.run("device-control.sock"), VSOCK_PORT);

        let servers = [local(server), local(by_ssh), local(by_hostfwd), bare.address];
        for (way, address) in WAYS.iter().zip(servers) {
            eprintln!("{way}: {address}");
            wait_for(&format!("{way}, to answer"), SOON, || answers(address));
        }
        let iperf = [iperf_by_dhow, iperf_by_ssh, iperf_by_hostfwd];
        eprintln!("iperf3 by dhow, ssh -L and hostfwd: ports {iperf:?}");
        wait_until("docker by ssh", SOON, || socket.exists());
        Self {
            servers,
            iperf: [
                Some(local(iperf_by_dhow)),
                Some(local(iperf_by_ssh)),
                Some(local(iperf_by_hostfwd)),
                None,
            ],
            docker: [Some(vm.run("docker.sock")), Some(socket), None, None],
            running,
            bare: Some(bare),
            vm,
        }
    }

    /// Has the guest ask for vsock connections without end, until this is dropped.
    ///
    /// # Panics
    /// When it does not.
    pub fn knock(&self) -> Running {
        let knocking = self.vm.exec(&["nice", "-n", "19", TOOL, "knock", "4"]).deadline(FOREVER).spawn();
        knocking.expect("knocking");
        knocking
    }

    /// Ends all of them and the VM, and checks that nothing is left.
    ///
    /// # Panics
    /// When something is.
    pub fn stop(mut self) {
        self.bare = None;
        self.running.clear();
        self.vm.stop();
    }
}

/// With all of PATH that a start needs, but passt.
fn start_without_passt(vm: &Vm) {
    let programs = vm.beside("path");
    std::fs::create_dir_all(&programs).expect("a folder for PATH");
    for program in ["qemu-system-x86_64", "docker"] {
        if let Some(path) = in_path(program) {
            std::os::unix::fs::symlink(path, programs.join(program)).expect("a program in PATH");
        }
    }
    vm.start_command(&[]).env("PATH", &programs).run().exits(0);
}

fn serve(vm: &Vm, address: &str) -> Running {
    let running = vm.exec(&[TOOL, "serve", address]).deadline(FOREVER).spawn();
    running.expect("listening");
    running
}

/// Longer than any bench.
const FOREVER: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// sshd and iperf3 in the guest's root namespaces, by a container of the host's network.
fn run_tools(vm: &Vm, iperf: u16) {
    let key = vm.beside("key");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let keygen = Cmd::new("ssh-keygen").env("PATH", path);
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).ok();
    let public = std::fs::read_to_string(key.with_extension("pub")).expect("the public key");
    let script = format!(
        "mkdir -p /root/.ssh /run/sshd && echo '{}' >/root/.ssh/authorized_keys && ssh-keygen -A &&
         iperf3 --server --daemon --port {iperf} && exec /usr/sbin/sshd -D -e -p {SSHD_PORT}",
        public.trim()
    );
    let options = ["run", "-d", "--network", "host", "-v", "/run/docker.sock:/run/docker.sock", IMAGE];
    vm.docker(&options).args(["sh", "-c", &script]).ok();
}

fn ssh(vm: &Vm, port: u16, forwards: &[(u16, u16)], docker: &Path) -> Running {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let key = vm.beside("key");
    // sshd may take a moment to listen; hostfwd accepts before that.
    let mut ssh =
        Cmd::new("ssh").env("PATH", &path).args(["-N", "-F", "none", "-p", &port.to_string(), "-i"]);
    ssh = ssh.arg(&key).args(["-o", &format!("Ciphers={CIPHERS}"), "-o", "Compression=no"]);
    for option in ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ExitOnForwardFailure=yes"] {
        ssh = ssh.args(["-o", option]);
    }
    for (host, guest) in forwards {
        ssh = ssh.args(["-L", &format!("127.0.0.1:{host}:127.0.0.1:{guest}")]);
    }
    ssh = ssh.args(["-L", &format!("{}:/run/docker.sock", docker.display())]);
    wait_for("sshd's greeting", SOON, || greets(local(port)));
    ssh.arg("root@127.0.0.1").deadline(FOREVER).spawn()
}

/// Whether a server speaks first, as sshd does.
fn greets(address: SocketAddr) -> Result<(), String> {
    use std::io::Read;
    let mut stream = dhow_tests::net::try_connect(address).map_err(|error| error.to_string())?;
    stream.read_exact(&mut [0; 4]).map_err(|error| error.to_string())
}

/// Whether the guest tool answers there.
fn answers(address: SocketAddr) -> Result<(), String> {
    use std::io::{Read, Write};
    // A refused connection of the way behind is an end or a reset of this one.
    let mut stream = dhow_tests::net::try_connect(address).map_err(|error| error.to_string())?;
    let mut back = [0; 4];
    stream
        .write_all(b"echo\nping")
        .and_then(|()| stream.read_exact(&mut back))
        .map_err(|error| error.to_string())?;
    if &back == b"ping" { Ok(()) } else { Err(format!("{back:?}")) }
}

/// A connection to the guest tool, whose first line is sent; small writes are not held back.
pub fn ask(address: SocketAddr, line: &str) -> std::net::TcpStream {
    let stream = ask_at(address, line);
    stream.set_nodelay(true).expect("TCP_NODELAY");
    stream
}

/// The answer of QEMU to a status question, for the notes below the table.
pub fn qemu_version(vm: &Vm) -> String {
    let version: Value = qmp::execute(vm, "query-version", &json!({}));
    format!("{}.{}", version["qemu"]["major"], version["qemu"]["minor"])
}
