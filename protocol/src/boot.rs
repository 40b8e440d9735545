//! What a guest learns at boot, through QEMU's fw_cfg device and not the kernel command line.

use bincode::{Decode, Encode};
use std::net::Ipv4Addr;

/// Name of the fw_cfg file with a [`BootConfig`] in bincode.
pub const BOOT_CONFIG_FILE: &str = "opt/dhow/boot";
/// Name of the fw_cfg file with the 32 bytes of the boot secret. PID 1 alone reads it.
pub const SECRET_FILE: &str = "opt/dhow/secret";
/// Serial (virtio-blk) of the disk with the erofs base.
pub const BASE_DISK_SERIAL: &str = "dhow-base";
/// Serial (virtio-blk) of the data disk.
pub const DATA_DISK_SERIAL: &str = "dhow-data";

/// How PID 1 begins to say on the console that the agent's worker has died too often and rests: the host looks for it.
pub const WORKER_GAVE_UP: &str = "the agent's worker ended too often";

/// What the guest's first process needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct BootConfig {
    /// The guest's hostname.
    pub hostname: String,
    /// The network card's settings; none without a network.
    pub network: Option<NetworkConfig>,
    /// Environment of the daemons and of exec: proxy variables of the host.
    pub environment: Vec<(String, String)>,
    /// The host's clock, nanoseconds since 1970, when it wrote this.
    pub unix_nanos: u64,
    /// `tracing` filter of the agent ("info").
    pub log_filter: String,
}

/// Static settings of the guest's network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct NetworkConfig {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Bits of the network's prefix.
    pub prefix: u8,
    /// Default gateway.
    pub gateway: Ipv4Addr,
    /// Address that the agent's DNS forwarder takes, on `lo`: one that containers reach too.
    pub dns: Ipv4Addr,
    /// Address that `host.docker.internal` is, on `lo`: there the agent listens for the host's services.
    pub host: Ipv4Addr,
    /// docker's bridge: its own address, and the bits of its network.
    pub bridge: (Ipv4Addr, u8),
    /// What docker cuts its other networks from, and the bits of each of them.
    pub pool: (Ipv4Addr, u8, u8),
    /// Largest packet, in bytes.
    pub mtu: u16,
}
