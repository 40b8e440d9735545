//! QEMU's command line for a profile. Builds arguments, starts nothing.

use std::path::{Path, PathBuf};

use dhow_protocol::boot::{BASE_DISK_SERIAL, BOOT_CONFIG_FILE, DATA_DISK_SERIAL, SECRET_FILE};

/// How the guest's instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's processor.
    Kvm,
    /// Emulation. QEMU below 8 emulates with one thread: with more, its guests sometimes panic with
    /// `Oops: int3` when the kernel patches its own text.
    Tcg {
        /// One host thread for all virtual CPUs.
        single_thread: bool,
    },
}

impl Accelerator {
    /// Name for people and for `dhow status`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg { .. } => "tcg",
        }
    }
}

/// What QEMU does when the process behind its network card has died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reconnect {
    /// Nothing: the network is gone until the next start.
    Never,
    /// It connects again: `reconnect`, in seconds.
    Seconds,
    /// Likewise: `reconnect-ms`.
    Milliseconds,
}

impl Reconnect {
    /// What a QEMU of this version can do: `reconnect` since 8.0, `reconnect-ms` in its place since 9.2
    /// (QEMU's "About removed features" and qemu-options.hx).
    #[must_use]
    pub fn of_version(version: (u32, u32)) -> Self {
        match version {
            (0..8, _) => Self::Never,
            (8, _) | (9, 0 | 1) => Self::Seconds,
            _ => Self::Milliseconds,
        }
    }

    /// As an option, with its comma.
    fn option(self) -> &'static str {
        match self {
            Self::Never => "",
            Self::Seconds => ",reconnect=1",
            Self::Milliseconds => ",reconnect-ms=200",
        }
    }
}

/// How the network card reaches the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Frames over a unix socket to passt.
    Passt {
        /// Its listening socket.
        socket: PathBuf,
        /// What QEMU does when it has died.
        reconnect: Reconnect,
    },
    /// QEMU's own user network: weaker, since the guest reaches the host's loopback through it.
    Slirp {
        /// The VM's network, "192.168.127.0/24".
        network: String,
        /// The gateway's address.
        gateway: String,
        /// An address that QEMU's own name server takes; the guest uses Dhow's.
        dns: String,
    },
}

/// All that the command line needs. Paths must be free of control characters; commas are escaped.
#[derive(Debug, Clone)]
pub struct Vm {
    /// The profile's name.
    pub name: String,
    /// How instructions are run.
    pub accelerator: Accelerator,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initramfs with the agent in it.
    pub initramfs: PathBuf,
    /// erofs base, read-only.
    pub base: PathBuf,
    /// Data disk, raw.
    pub disk: PathBuf,
    /// File with the boot configuration.
    pub boot_config: PathBuf,
    /// File with the boot secret.
    pub secret: PathBuf,
    /// The vsock device's listening socket.
    pub device_socket: PathBuf,
    /// Where QEMU listens for QMP.
    pub qmp_socket: PathBuf,
    /// File that the guest's console is appended to.
    pub console: PathBuf,
    /// The network card, where there is one.
    pub network: Option<Network>,
}

/// Id of the vsock device in QEMU, of its chardev and of the root port that it sits on.
pub(super) const VSOCK_ID: &str = "vsock";
pub(super) const VSOCK_CHARDEV: &str = "vsock0";
pub(super) const VSOCK_PORT: &str = "vsock-port";
/// The vsock device's driver in QEMU.
pub(super) const VSOCK_DRIVER: &str = "vhost-user-vsock-pci";

/// Kernel command line: a panic ends QEMU (`-no-reboot`), and the console speaks of errors only.
///
/// Under emulation half of the kernel's start is cryptography that this guest has no use for. So there
/// are no self-tests of algorithms; no jitter generator, a source of randomness for FIPS alone (the
/// processor and virtio-rng seed the kernel's); and no keys for signatures of modules, which have none. And
/// a loaded host lets the clock's watchdog take QEMU's steady TSC for an unsteady one ("skewed … over
/// watchdog"): the clock would be the ACPI timer then, which leaves the emulation at each look at the time.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=auto \
     random.trust_cpu=on cryptomgr.notests tsc=reliable \
     initcall_blacklist=jent_mod_init,load_system_certificate_list,crypto_kdf108_init rdinit=/init";

/// `path` as a value of a QEMU option, where a comma ends the value unless it is doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Vm {
    /// The arguments, without the program's name.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = Arguments::default();
        arguments.flag("-nodefaults").flag("-no-user-config").flag("-no-reboot");
        arguments.option("-name", format!("dhow-{}", self.name));
        arguments
            .option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        self.machine(&mut arguments);
        self.boot(&mut arguments);
        self.disks(&mut arguments);
        self.devices(&mut arguments);
        self.network(&mut arguments);
        arguments.0
    }

    fn machine(&self, arguments: &mut Arguments) {
        let (accelerator, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            Accelerator::Tcg { single_thread: true } => ("tcg,thread=single", "max"),
            Accelerator::Tcg { single_thread: false } => ("tcg,thread=multi", "max"),
        };
        // The vsock device maps the guest's memory: it must be shared.
        let memory = format!("memory-backend-memfd,id=memory,size={}M,share=on", self.memory_mib);
        arguments.option("-object", memory);
        arguments.option("-machine", "q35,memory-backend=memory,vmport=off,hpet=off");
        arguments.option("-accel", accelerator).option("-cpu", cpu);
        arguments.option("-smp", self.cpus.to_string());
        arguments.option("-m", format!("{}M", self.memory_mib));
        arguments.option("-display", "none").option("-vga", "none");
    }

    fn boot(&self, arguments: &mut Arguments) {
        arguments.option("-kernel", self.kernel.display().to_string());
        arguments.option("-initrd", self.initramfs.display().to_string());
        arguments.option("-append", KERNEL_COMMAND_LINE);
        for (name, file) in [(BOOT_CONFIG_FILE, &self.boot_config), (SECRET_FILE, &self.secret)] {
            arguments.option("-fw_cfg", format!("name={name},file={}", escaped(file)));
        }
    }

    fn disks(&self, arguments: &mut Arguments) {
        let base = format!(
            "driver=raw,node-name=base,read-only=on,file.driver=file,file.filename={}",
            escaped(&self.base)
        );
        // cache.direct=off with flushes obeyed is `cache=writeback`: what the guest fsyncs is on the
        // host's disk. QEMU's own lock stays on, beside the flock of the keeper.
        let data = format!(
            "driver=raw,node-name=data,discard=unmap,detect-zeroes=unmap,cache.direct=off,cache.no-flush=off,\
             file.driver=file,file.discard=unmap,file.filename={}",
            escaped(&self.disk)
        );
        arguments.option("-blockdev", base).option("-blockdev", data);
        arguments.option("-device", format!("virtio-blk-pci,drive=base,serial={BASE_DISK_SERIAL}"));
        // Where the host's disk is full the VM pauses, and the supervisor lets it go on when there is
        // room: reported, the error would be an I/O error to the guest's ext4, which then refuses all
        // writes until it is mounted anew. Other errors are the guest's to know.
        let on_error = "werror=enospc,rerror=report";
        let data = format!("virtio-blk-pci,drive=data,serial={DATA_DISK_SERIAL},{on_error}");
        arguments.option("-device", data);
    }

    fn devices(&self, arguments: &mut Arguments) {
        arguments.option("-chardev", format!("file,id=console,append=on,path={}", escaped(&self.console)));
        arguments.option("-serial", "chardev:console");
        let qmp = format!("socket,id=qmp,server=on,wait=off,path={}", escaped(&self.qmp_socket));
        arguments.option("-chardev", qmp).option("-mon", "chardev=qmp,mode=control");
        // On a root port of its own, so that a new device can be hot-plugged in the place of a dead one.
        arguments.option("-device", format!("pcie-root-port,id={VSOCK_PORT},chassis=1,slot=1"));
        let socket = escaped(&self.device_socket);
        arguments.option("-chardev", format!("socket,id={VSOCK_CHARDEV},path={socket}"));
        let device = format!("{VSOCK_DRIVER},id={VSOCK_ID},bus={VSOCK_PORT},chardev={VSOCK_CHARDEV}");
        arguments.option("-device", device);
        arguments.option("-device", "virtio-rng-pci");
        arguments.option("-device", "virtio-balloon-pci,free-page-reporting=on");
    }

    fn network(&self, arguments: &mut Arguments) {
        let netdev = match &self.network {
            None => return,
            Some(Network::Passt { socket, reconnect }) => {
                let (path, reconnect) = (escaped(socket), reconnect.option());
                format!("stream,id=net0,server=off,addr.type=unix,addr.path={path}{reconnect}")
            }
            Some(Network::Slirp { network, gateway, dns }) => {
                format!("user,id=net0,net={network},host={gateway},dns={dns},ipv6=off")
            }
        };
        arguments.option("-netdev", netdev).option("-device", "virtio-net-pci,netdev=net0,romfile=");
    }
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.to_owned());
        self
    }

    fn option(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.0.push(name.to_owned());
        self.0.push(value.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> Vm {
        Vm {
            name: "default".to_owned(),
            accelerator: Accelerator::Tcg { single_thread: true },
            cpus: 2,
            memory_mib: 1024,
            kernel: "/i/vmlinuz".into(),
            initramfs: "/r/initramfs".into(),
            base: "/i/base.erofs".into(),
            disk: "/d/a,b/disk.raw".into(),
            boot_config: "/r/boot".into(),
            secret: "/r/secret".into(),
            device_socket: "/r/device.sock".into(),
            qmp_socket: "/r/qmp.sock".into(),
            console: "/d/log/console.log".into(),
            network: Some(Network::Passt { socket: "/r/passt.sock".into(), reconnect: Reconnect::Seconds }),
        }
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        let arguments = vm().arguments().join(" ");
        assert!(arguments.contains("file.filename=/d/a,,b/disk.raw"), "{arguments}");
    }

    #[test]
    fn a_lost_passt_is_connected_to_again_as_each_version_can() {
        for (version, option) in [
            ((7, 2), "passt.sock"),
            ((8, 0), "passt.sock,reconnect=1"),
            ((9, 1), "passt.sock,reconnect=1"),
            ((9, 2), "passt.sock,reconnect-ms=200"),
            ((10, 0), "passt.sock,reconnect-ms=200"),
        ] {
            let reconnect = Reconnect::of_version(version);
            let network = Some(Network::Passt { socket: "/r/passt.sock".into(), reconnect });
            let arguments = Vm { network, ..vm() }.arguments();
            let netdev = arguments.iter().find(|argument| argument.starts_with("stream,")).unwrap();
            assert!(netdev.ends_with(option), "{netdev}");
        }
    }

    #[test]
    fn the_sandbox_is_on_and_nothing_comes_by_default() {
        let arguments = vm().arguments();
        for flag in ["-nodefaults", "-no-user-config", "-sandbox"] {
            assert!(arguments.iter().any(|argument| argument == flag), "{flag}");
        }
        assert!(!arguments.iter().any(|argument| argument.contains("secret=")));
    }
}
