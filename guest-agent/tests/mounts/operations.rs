//! Each operation once, and what must come of it on both sides.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use crate::harness::World;

#[test]
fn files_are_made_read_and_removed() {
    let world = World::new();
    fs::write(world.in_guest("new"), "from the guest").unwrap();
    assert_eq!(fs::read_to_string(world.on_host("new")).unwrap(), "from the guest");
    fs::write(world.on_host("old"), "from the host").unwrap();
    assert_eq!(fs::read_to_string(world.in_guest("old")).unwrap(), "from the host");
    fs::remove_file(world.in_guest("new")).unwrap();
    assert!(!world.on_host("new").exists());
    assert_eq!(fs::read(world.in_guest("new")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(world.guest.mounts(), [world.mount_path().to_str().unwrap()]);
}
