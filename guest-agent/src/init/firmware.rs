//! What the host says at boot, through QEMU's fw_cfg device: the boot configuration and the secret.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use dhow_protocol::boot::{BOOT_CONFIG_FILE, BootConfig, SECRET_FILE};
use dhow_protocol::codec;
use rustix::fs::{MemfdFlags, SealFlags};

use super::error::InitError;
use super::modules;

const FW_CFG: &str = "/sys/firmware/qemu_fw_cfg/by_name";
/// Largest boot configuration in bytes.
const CONFIG_LIMIT: u64 = 256 << 10;
const SECRET_LEN: usize = 32;

/// The host's words.
pub(crate) struct Firmware {
    /// Parsed, for PID 1.
    pub config: BootConfig,
    /// Sealed memfd with the configuration as it came, for the worker.
    pub config_fd: OwnedFd,
    /// Sealed memfd with the secret, for the worker.
    pub secret_fd: OwnedFd,
}

/// Reads both; [`close`] is for afterwards.
///
/// # Errors
/// When one of them is missing or malformed.
pub(crate) fn read() -> Result<Firmware, InitError> {
    let bytes = read_file(BOOT_CONFIG_FILE)?;
    let config = codec::from_bytes(&bytes).map_err(InitError::Config)?;
    let mut secret = read_file(SECRET_FILE)?;
    if secret.len() != SECRET_LEN {
        return Err(InitError::Secret(secret.len()));
    }
    let firmware = Firmware {
        config,
        config_fd: sealed_memfd("dhow-boot", &bytes)?,
        secret_fd: sealed_memfd("dhow-secret", &secret)?,
    };
    secret.fill(0);
    std::hint::black_box(&secret);
    Ok(firmware)
}

/// Lets go of the device, so that `/sys` no longer shows the secret to whoever can read there.
pub(crate) fn close() {
    if let Err(error) = modules::remove(c"qemu_fw_cfg") {
        tracing::error!(%error, "the boot secret can still be read in the guest: the fw_cfg device is in use");
    }
}

fn read_file(name: &str) -> Result<Vec<u8>, InitError> {
    let path: PathBuf = Path::new(FW_CFG).join(name).join("raw");
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(CONFIG_LIMIT).read_to_end(&mut bytes))
        .map_err(InitError::at("read", &path))?;
    Ok(bytes)
}

/// A memfd with `bytes` that nobody can change any more. Its offset is shared by all who hold it:
/// read it at positions.
fn sealed_memfd(name: &'static str, bytes: &[u8]) -> Result<OwnedFd, InitError> {
    let make = || -> std::io::Result<OwnedFd> {
        let mut file = File::from(rustix::fs::memfd_create(
            name,
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL,
        )?);
        file.write_all(bytes)?;
        rustix::fs::fcntl_add_seals(
            &file,
            SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
        )?;
        Ok(file.into())
    };
    make().map_err(|error| InitError::System("make a sealed memfd", error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_sealed_memfd_can_be_read_and_not_changed() {
        let file = File::from(sealed_memfd("test", b"secret").unwrap());
        let mut bytes = [0; 6];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"secret");
        assert!(file.write_at(b"x", 0).is_err());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(100).is_err());
    }
}
