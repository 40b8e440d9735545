//! Mounting an image: a loop device and a read-only erofs, both gone with their last user.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};

/// Makes an image's files seen. A trait, so that installing can be tested without a mount.
pub trait Mount: Send + Sync {
    /// Mounts `image` read-only at the folder `target`.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn mount(&self, image: &Path, target: &Path) -> io::Result<()>;

    /// Whether something is mounted at `target`.
    ///
    /// # Errors
    /// When it cannot be known; a missing `target` has no mount.
    fn is_mounted(&self, target: &Path) -> io::Result<bool>;

    /// Takes the mount out of sight; it ends with the last process that uses it.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn detach(&self, target: &Path) -> io::Result<()>;
}

/// Loop devices and erofs.
pub struct LoopMount;

impl Mount for LoopMount {
    fn mount(&self, image: &Path, target: &Path) -> io::Result<()> {
        let image = File::open(image)?;
        let device = LoopDevice::attach(&image)?;
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOATIME;
        nix::mount::mount(Some(&device.path), target, Some("erofs"), flags, None::<&str>)?;
        // The device's fd goes: from here on the mount alone keeps it.
        Ok(())
    }

    fn is_mounted(&self, target: &Path) -> io::Result<bool> {
        use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
        match statx(CWD, target, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
            Ok(stat) => Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn detach(&self, target: &Path) -> io::Result<()> {
        nix::mount::umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
        Ok(())
    }
}

/// An attached loop device; it is detached when nothing has it open any more.
struct LoopDevice {
    path: PathBuf,
    /// Keeps the device until it is mounted.
    _file: File,
}

/// How often another free device is asked for when somebody else took the one.
const ATTEMPTS: u32 = 32;
/// Logical block size: that of the images, so that direct I/O is possible.
const BLOCK_SIZE: u32 = 4096;

// linux/loop.h
const LOOP_CONFIGURE: rustix::ioctl::Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// The kernel goes on without it where the filesystem below has none.
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);

impl LoopConfig {
    fn new(image: &File) -> Self {
        Self {
            fd: image.as_raw_fd().unsigned_abs(),
            block_size: BLOCK_SIZE,
            info: LoopInfo {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                size_limit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
                file_name: [0; 64],
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        }
    }
}

impl LoopDevice {
    fn attach(image: &File) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open("/dev/loop-control")?;
        for _ in 0..ATTEMPTS {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a number or an error.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let file = File::options().read(true).custom_flags(libc::O_CLOEXEC).open(&path)?;
            // SAFETY: the opcode and the struct are those of linux/loop.h, whose sizes are checked
            // above; the kernel reads the struct during the call and keeps its own reference to the image.
            let configured = unsafe {
                rustix::ioctl::ioctl(
                    &file,
                    rustix::ioctl::Setter::<LOOP_CONFIGURE, LoopConfig>::new(LoopConfig::new(image)),
                )
            };
            match configured {
                Ok(()) => return Ok(Self { path, _file: file }),
                // Somebody else was faster.
                Err(rustix::io::Errno::BUSY) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "no loop device stayed free"))
    }
}
