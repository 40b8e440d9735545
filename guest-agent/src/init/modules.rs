//! Kernel modules of the early boot, from the initramfs. Later ones are modprobe's, in the base.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};

use super::error::InitError;

/// Paths of the modules, one a line, in the order of insertion. Written by the kernel's recipe.
const LOAD_LIST: &str = "/lib/modules/dhow-load";

/// Inserts what the initramfs lists, and returns what could not be. That ends nothing: ENODEV is a
/// module for a device or a processor that this machine does not have, and what is really missed
/// shows where it is used.
///
/// # Errors
/// When there is no list: then the initramfs is not one of Dhow's.
pub(crate) fn insert_all() -> Result<Vec<(PathBuf, Errno)>, InitError> {
    let list = std::fs::read_to_string(LOAD_LIST).map_err(InitError::at("read", LOAD_LIST))?;
    let mut left_out = Vec::new();
    for path in paths(&list) {
        match insert(&path) {
            // Built in, or there already.
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => left_out.push((path, error)),
        }
    }
    Ok(left_out)
}

/// Removes a module that nothing uses.
pub(crate) fn remove(name: &std::ffi::CStr) -> nix::Result<()> {
    delete_module(name, DeleteModuleFlags::O_NONBLOCK)
}

fn insert(path: &Path) -> nix::Result<()> {
    let file = File::open(path).map_err(|error| Errno::try_from(error).unwrap_or(Errno::EIO))?;
    finit_module(&file, c"", ModuleInitFlags::empty())
}

fn paths(list: &str) -> Vec<PathBuf> {
    list.lines().map(str::trim).filter(|line| line.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_path_a_line_in_order() {
        let list = "/lib/b.ko\n\n  /lib/a.ko \nrelative.ko\n";
        assert_eq!(paths(list), [Path::new("/lib/b.ko"), Path::new("/lib/a.ko")]);
    }
}
