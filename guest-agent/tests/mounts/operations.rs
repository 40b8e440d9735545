//! Each operation, and what must come of it on both sides.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::process::Command;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, RenameFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::harness::{World, wait_for};

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
    assert!(fs::metadata(world.in_guest("old")).unwrap().is_file());
    assert_eq!(fs::read(world.in_guest("old/below")).unwrap_err().kind(), ErrorKind::NotADirectory);
}

#[test]
fn opening_obeys_its_flags() {
    let world = World::new();
    let path = world.in_guest("file");
    let new = || OpenOptions::new();
    assert_eq!(new().write(true).open(&path).unwrap_err().kind(), ErrorKind::NotFound);
    new().write(true).create_new(true).mode(0o640).open(&path).unwrap().write_all(b"0123456789").unwrap();
    assert_eq!(fs::metadata(world.on_host("file")).unwrap().mode() & 0o7777, 0o640);
    let again = new().write(true).create_new(true).open(&path).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
    // One that the host has just made is not made once more either.
    fs::write(world.on_host("theirs"), "x").unwrap();
    let theirs = new().write(true).create_new(true).open(world.in_guest("theirs")).unwrap_err();
    assert_eq!(theirs.kind(), ErrorKind::AlreadyExists);

    let mut appending = new().append(true).open(&path).unwrap();
    appending.write_all(b"ab").unwrap();
    appending.seek(SeekFrom::Start(0)).unwrap();
    appending.write_all(b"cd").unwrap();
    assert_eq!(fs::read(world.on_host("file")).unwrap(), b"0123456789abcd");
    // O_CREAT of one that is there keeps it; O_TRUNC empties it.
    drop(new().write(true).create(true).truncate(false).open(&path).unwrap());
    assert_eq!(fs::metadata(world.on_host("file")).unwrap().len(), 14);
    let mut short = new().write(true).read(true).create(true).truncate(true).open(&path).unwrap();
    assert_eq!(fs::metadata(world.on_host("file")).unwrap().len(), 0);
    short.write_all(b"new").unwrap();
    short.set_len(2).unwrap();
    short.rewind().unwrap();
    let mut text = String::new();
    short.read_to_string(&mut text).unwrap();
    assert_eq!(text, "ne");
    fs::write(&path, "through a path").unwrap();
    rustix::fs::ftruncate(&short, 7).unwrap();
    assert_eq!(fs::read(world.on_host("file")).unwrap(), b"through");

    let directory = new().read(true).custom_flags(libc::O_DIRECTORY).open(&path).unwrap_err();
    assert_eq!(directory.kind(), ErrorKind::NotADirectory);
    assert_eq!(new().write(true).open(&world.mounted).unwrap_err().kind(), ErrorKind::IsADirectory);
    let nameless = new().write(true).custom_flags(libc::O_TMPFILE).open(&world.mounted).unwrap_err();
    assert_eq!(nameless.raw_os_error(), Some(libc::EOPNOTSUPP));
}

#[test]
fn the_umask_is_the_guests() {
    let world = World::new();
    let script = "umask 027 && : > file && mkdir folder && mkfifo fifo";
    let status = Command::new("sh").args(["-c", script]).current_dir(&world.mounted).status().unwrap();
    assert!(status.success());
    let mode = |name| fs::metadata(world.on_host(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("file"), mode("folder"), mode("fifo")), (0o640, 0o750, 0o640));
}

#[test]
fn folders_are_made_listed_and_removed() {
    let world = World::new();
    fs::create_dir_all(world.in_guest("a/b/c")).unwrap();
    assert!(world.on_host("a/b/c").is_dir());
    assert_eq!(fs::create_dir(world.in_guest("a")).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::remove_dir(world.in_guest("a")).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    assert_eq!(fs::remove_file(world.in_guest("a")).unwrap_err().kind(), ErrorKind::IsADirectory);
    fs::remove_dir(world.in_guest("a/b/c")).unwrap();
    fs::remove_dir_all(world.in_guest("a")).unwrap();
    assert!(!world.on_host("a").exists());

    let wanted: BTreeSet<_> = (0..5000).map(|n| OsString::from(format!("entry-{n}"))).collect();
    fs::create_dir(world.on_host("many")).unwrap();
    wanted.iter().for_each(|name| drop(File::create(world.on_host("many").join(name)).unwrap()));
    for _ in 0..2 {
        let listed: Vec<_> =
            fs::read_dir(world.in_guest("many")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(listed.len(), 5000);
        assert_eq!(listed.into_iter().collect::<BTreeSet<_>>(), wanted);
    }
    // Removing while listing misses nothing, as `rm -r` needs it.
    for entry in fs::read_dir(world.in_guest("many")).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    fs::remove_dir(world.in_guest("many")).unwrap();
    assert!(!world.on_host("many").exists());
}

#[test]
fn a_listing_goes_on_where_it_was() {
    let world = World::new();
    (0..300).for_each(|n| drop(File::create(world.on_host(format!("name-{n}"))).unwrap()));
    let folder = File::open(&world.mounted).unwrap();
    // A buffer for one or two names, and each time anew from the position of the last one.
    let mut seen = Vec::new();
    let mut position = 0;
    loop {
        rustix::fs::seek(&folder, rustix::fs::SeekFrom::Start(position)).unwrap();
        let mut buffer = [std::mem::MaybeUninit::uninit(); 64];
        let mut names = rustix::fs::RawDir::new(&folder, &mut buffer);
        let Some(entry) = names.next() else { break };
        let entry = entry.unwrap();
        let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        position = entry.next_entry_cookie();
        if name != "." && name != ".." {
            assert_eq!(entry.file_type(), FileType::RegularFile);
            assert_eq!(entry.ino(), fs::metadata(world.in_guest(&name)).unwrap().ino());
        }
        seen.push(name);
    }
    let unique: BTreeSet<_> = seen.iter().cloned().collect();
    assert_eq!((seen.len(), unique.len()), (302, 302));
    assert!(unique.contains(OsStr::new(".")) && unique.contains(OsStr::new("..")));
}

#[test]
fn renames_obey_their_flags() {
    let world = World::new();
    let (a, b) = (world.in_guest("a"), world.in_guest("b"));
    let rename = |flags| rustix::fs::renameat_with(CWD, &a, CWD, &b, flags);
    let read = |name: &str| fs::read_to_string(world.on_host(name)).ok();
    fs::write(&a, "a").unwrap();
    fs::write(&b, "b").unwrap();
    assert_eq!(rename(RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename(RenameFlags::EXCHANGE).unwrap();
    assert_eq!((read("a").as_deref(), read("b").as_deref()), (Some("b"), Some("a")));
    assert_eq!(fs::read_to_string(&a).unwrap(), "b");
    rename(RenameFlags::empty()).unwrap();
    assert_eq!((read("a"), read("b").as_deref()), (None, Some("b")));
    assert_eq!(rename(RenameFlags::empty()), Err(Errno::NOENT));
    assert_eq!(rename(RenameFlags::EXCHANGE), Err(Errno::NOENT));
    fs::write(&a, "new").unwrap();
    assert_eq!(rename(RenameFlags::WHITEOUT), Err(Errno::INVAL));
    fs::remove_file(&b).unwrap();
    rename(RenameFlags::NOREPLACE).unwrap();
    assert_eq!(fs::read_to_string(&b).unwrap(), "new");

    // What lies in a folder goes with it, also what is open.
    fs::create_dir(world.in_guest("from")).unwrap();
    fs::create_dir(world.in_guest("to")).unwrap();
    let mut file = File::create(world.in_guest("from/file")).unwrap();
    fs::rename(world.in_guest("from"), world.in_guest("to/moved")).unwrap();
    file.write_all(b"after").unwrap();
    assert_eq!(read("to/moved/file").as_deref(), Some("after"));
    assert_eq!(fs::read_to_string(world.in_guest("to/moved/file")).unwrap(), "after");
    let into_itself = fs::rename(world.in_guest("to"), world.in_guest("to/moved/to")).unwrap_err();
    assert_eq!(into_itself.raw_os_error(), Some(libc::EINVAL));
    let onto_file = fs::rename(world.in_guest("to"), &b).unwrap_err();
    assert_eq!(onto_file.kind(), ErrorKind::NotADirectory);
}

#[test]
fn names_are_bytes() {
    let world = World::new();
    let longest = "x".repeat(255);
    for name in
        [longest.as_bytes(), b"\xff\xfe", "ä\u{301}".as_bytes(), b" leading", b"a\nb\x1b[2J", b"...", b"-f"]
    {
        let name = OsStr::from_bytes(name);
        fs::write(world.in_guest(name), name.as_bytes()).unwrap();
        assert_eq!(fs::read(world.on_host(name)).unwrap(), name.as_bytes());
        let listed: Vec<_> =
            fs::read_dir(&world.mounted).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(listed, [name]);
        fs::remove_file(world.in_guest(name)).unwrap();
    }
    let too_long = fs::write(world.in_guest("x".repeat(256)), "").unwrap_err();
    assert_eq!(too_long.raw_os_error(), Some(libc::ENAMETOOLONG));
}

#[test]
fn symlinks_say_what_they_say() {
    let world = World::new();
    fs::write(world.in_guest("file"), "text").unwrap();
    let long = "x/".repeat(2000);
    for (name, target) in [("rel", "file"), ("abs", "/etc/hostname"), ("up", "../../.."), ("long", &long)] {
        symlink(target, world.in_guest(name)).unwrap();
        assert_eq!(fs::read_link(world.in_guest(name)).unwrap().as_os_str(), target);
        assert_eq!(fs::read_link(world.on_host(name)).unwrap().as_os_str(), target);
        assert!(fs::symlink_metadata(world.in_guest(name)).unwrap().is_symlink());
    }
    // The guest's kernel follows them, in the guest.
    assert_eq!(fs::read_to_string(world.in_guest("rel")).unwrap(), "text");
    assert_eq!(symlink("x", world.in_guest("rel")).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read_link(world.in_guest("file")).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    fs::remove_file(world.in_guest("rel")).unwrap();
    assert!(world.on_host("file").exists());
}

#[test]
fn hard_links_are_one_file() {
    let world = World::new();
    fs::write(world.in_guest("one"), "1").unwrap();
    fs::hard_link(world.in_guest("one"), world.in_guest("two")).unwrap();
    let (one, two) =
        (fs::metadata(world.in_guest("one")).unwrap(), fs::metadata(world.in_guest("two")).unwrap());
    assert_eq!((one.ino(), one.nlink(), two.nlink()), (two.ino(), 2, 2));
    fs::write(world.in_guest("two"), "changed").unwrap();
    assert_eq!(fs::read_to_string(world.in_guest("one")).unwrap(), "changed");
    let taken = fs::hard_link(world.in_guest("one"), world.in_guest("two")).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
    fs::remove_file(world.in_guest("one")).unwrap();
    fs::rename(world.in_guest("two"), world.in_guest("three")).unwrap();
    assert_eq!(fs::metadata(world.in_guest("three")).unwrap().nlink(), 1);
    assert_eq!(fs::read_to_string(world.on_host("three")).unwrap(), "changed");
    fs::create_dir(world.in_guest("folder")).unwrap();
    let folder = fs::hard_link(world.in_guest("folder"), world.in_guest("link")).unwrap_err();
    assert_eq!(folder.raw_os_error(), Some(libc::EPERM));
}

#[test]
fn attributes_are_set_and_seen() {
    let world = World::new();
    let path = world.in_guest("file");
    fs::write(&path, "x").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o4711)).unwrap();
    let seen = fs::metadata(&path).unwrap();
    assert_eq!(seen.mode(), libc::S_IFREG | 0o4711);
    // Set-id bits are the guest's alone.
    assert_eq!(fs::metadata(world.on_host("file")).unwrap().mode() & 0o7777, 0o711);
    rustix::fs::chown(&path, Some(Uid::from_raw(1234)), Some(Gid::from_raw(4321))).unwrap();
    let seen = fs::metadata(&path).unwrap();
    assert_eq!((seen.uid(), seen.gid()), (1234, 4321));
    for (seconds, nanos) in [(1_000_000_000, 123_456_789), (-86_400, 5)] {
        let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty()).unwrap();
        for path in [path.clone(), world.on_host("file")] {
            let seen = fs::metadata(path).unwrap();
            assert_eq!((seen.mtime(), seen.mtime_nsec()), (seconds, nanos));
            assert_eq!((seen.atime(), seen.atime_nsec()), (seconds, nanos));
        }
    }
    File::options().write(true).open(&path).unwrap().set_modified(SystemTime::now()).unwrap();
    let age = SystemTime::now().duration_since(fs::metadata(&path).unwrap().modified().unwrap());
    assert!(age.unwrap_or_default() < Duration::from_secs(3600));
    fs::write(&path, vec![0; 5000]).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 5000);
    let (guest, host) = (fs::metadata(&path).unwrap(), fs::metadata(world.on_host("file")).unwrap());
    assert_eq!(guest.blocks(), host.blocks());
    // A node's number is the same each time, and apart from others'.
    assert_eq!(guest.ino(), fs::metadata(&path).unwrap().ino());
    assert_ne!(guest.ino(), fs::metadata(&world.mounted).unwrap().ino());
}

#[test]
fn a_write_takes_set_id_bits_away() {
    let world = World::new();
    let path = world.in_guest("program");
    fs::write(&path, "x").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o6777)).unwrap();
    // By somebody without privileges, as the kernel wants it.
    let status = world.run_as(1000, "echo y >> program").status().unwrap();
    assert!(status.success());
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o777);
    assert_eq!(fs::read_to_string(world.on_host("program")).unwrap(), "xy\n");
}

#[test]
fn permissions_are_checked_by_the_guest() {
    let world = World::new();
    fs::write(world.in_guest("secret"), "x").unwrap();
    fs::set_permissions(world.in_guest("secret"), Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(&world.mounted, Permissions::from_mode(0o755)).unwrap();
    let run = |command| world.run_as(1000, command).output().unwrap();
    let refused = |command| {
        let output = run(command);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("Permission denied"), "{command}: {text}");
    };
    refused("cat secret");
    refused("touch new");
    rustix::fs::chown(world.in_guest("secret"), Some(Uid::from_raw(1000)), None).unwrap();
    let allowed = run("cat secret");
    assert!(allowed.status.success(), "{}", String::from_utf8_lossy(&allowed.stderr));
    // What somebody makes is theirs.
    fs::set_permissions(&world.mounted, Permissions::from_mode(0o777)).unwrap();
    assert!(run("mkdir theirs").status.success());
    assert_eq!(fs::metadata(world.in_guest("theirs")).unwrap().uid(), 1000);
}

#[test]
fn a_fifo_works_within_the_guest_and_devices_are_refused() {
    let world = World::new();
    let path = world.in_guest("fifo");
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    assert!(fs::metadata(world.on_host("fifo")).unwrap().file_type().is_fifo());
    let writer = std::thread::spawn({
        let path = path.clone();
        move || fs::write(path, "through it").unwrap()
    });
    assert_eq!(fs::read_to_string(&path).unwrap(), "through it");
    writer.join().unwrap();
    for kind in [FileType::CharacterDevice, FileType::BlockDevice, FileType::Socket] {
        let made = rustix::fs::mknodat(CWD, world.in_guest("node"), kind, Mode::from_raw_mode(0o600), 0x0103);
        assert_eq!(made, Err(Errno::PERM), "{kind:?}");
    }
    rustix::fs::mknodat(CWD, world.in_guest("plain"), FileType::RegularFile, Mode::from_raw_mode(0o600), 0)
        .unwrap();
    assert!(world.on_host("plain").is_file());
}

#[test]
fn space_and_syncing_are_the_hosts() {
    let world = World::new();
    let (guest, host) =
        (rustix::fs::statvfs(&world.mounted).unwrap(), rustix::fs::statvfs(&world.host).unwrap());
    assert_eq!((guest.f_blocks, guest.f_frsize), (host.f_blocks, host.f_frsize));
    assert_eq!(guest.f_namemax, 255);
    let mut file = File::create(world.in_guest("file")).unwrap();
    file.write_all(b"kept").unwrap();
    file.sync_data().unwrap();
    file.sync_all().unwrap();
    File::open(&world.mounted).unwrap().sync_all().unwrap();
}

#[test]
fn what_is_not_there_says_so() {
    let world = World::new();
    let path = world.in_guest("file");
    fs::write(&path, "x").unwrap();
    let mut value = [0; 16];
    let got = rustix::fs::getxattr(&path, "user.x", &mut value[..]);
    assert_eq!(got, Err(Errno::OPNOTSUPP));
    let set = rustix::fs::setxattr(&path, "user.x", b"1", rustix::fs::XattrFlags::empty());
    assert_eq!(set, Err(Errno::OPNOTSUPP));
    let file = File::options().write(true).read(true).open(&path).unwrap();
    let allocated = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 100);
    assert_eq!(allocated, Err(Errno::OPNOTSUPP));
    assert_eq!(rustix::io::ioctl_fionread(&file).unwrap(), 1);
    // What the kernel can do without us.
    fs::copy(&path, world.in_guest("copy")).unwrap();
    assert_eq!(fs::read_to_string(world.on_host("copy")).unwrap(), "x");
    let at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap();
    assert_eq!(at, 1);
    // Locks are the guest's own.
    let other = File::open(&path).unwrap();
    file.lock().unwrap();
    assert!(other.try_lock().is_err());
    file.unlock().unwrap();
    other.try_lock().unwrap();
}

#[test]
fn a_read_only_share_is_read_only() {
    let world = World::read_only();
    fs::write(world.on_host("file"), "text").unwrap();
    assert_eq!(fs::read_to_string(world.in_guest("file")).unwrap(), "text");
    let refused = [
        fs::write(world.in_guest("new"), "").unwrap_err(),
        fs::write(world.in_guest("file"), "").unwrap_err(),
        fs::remove_file(world.in_guest("file")).unwrap_err(),
        fs::create_dir(world.in_guest("folder")).unwrap_err(),
        fs::rename(world.in_guest("file"), world.in_guest("x")).unwrap_err(),
        fs::set_permissions(world.in_guest("file"), Permissions::from_mode(0o777)).unwrap_err(),
        symlink("x", world.in_guest("link")).unwrap_err(),
    ];
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    }
}

#[test]
fn a_deleted_file_lives_while_it_is_open() {
    let world = World::new();
    let path = world.in_guest("file");
    fs::write(&path, "before").unwrap();
    let mut file = File::options().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(!world.on_host("file").exists());
    // Another one takes the name.
    fs::write(&path, "another").unwrap();
    file.write_all(b"after ").unwrap();
    file.set_len(5).unwrap();
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "after");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(fs::read_to_string(&path).unwrap(), "another");
    // The same for one that is renamed over.
    let mut over = File::open(&path).unwrap();
    fs::write(world.in_guest("new"), "new").unwrap();
    fs::rename(world.in_guest("new"), &path).unwrap();
    text.clear();
    over.read_to_string(&mut text).unwrap();
    assert_eq!(text, "another");
}

#[test]
fn what_the_host_does_is_seen() {
    let world = World::new();
    fs::write(world.on_host("file"), "old").unwrap();
    assert_eq!(fs::read_to_string(world.in_guest("file")).unwrap(), "old");
    assert_eq!(fs::read(world.in_guest("new")).unwrap_err().kind(), ErrorKind::NotFound);
    // A name that was not there is looked up each time.
    fs::write(world.on_host("new"), "new").unwrap();
    assert_eq!(fs::read_to_string(world.in_guest("new")).unwrap(), "new");
    fs::write(world.on_host("file"), "longer").unwrap();
    let text = || fs::read_to_string(world.in_guest("file")).ok();
    wait_for("the host's text", || text().filter(|text| text == "longer"));
    fs::rename(world.on_host("new"), world.on_host("file")).unwrap();
    wait_for("the host's rename", || text().filter(|text| text == "new"));
    fs::remove_file(world.on_host("file")).unwrap();
    wait_for("the host's removal", || (!world.in_guest("file").exists()).then_some(()));
    let listed = || fs::read_dir(&world.mounted).unwrap().count();
    wait_for("an empty listing", || (listed() == 0).then_some(()));
    fs::create_dir(world.on_host("folder")).unwrap();
    wait_for("a listing with it", || (listed() == 1).then_some(()));
}

#[test]
fn a_full_disk_says_so() {
    let world = World::on_small_disk();
    let mut file = File::create(world.in_guest("file")).unwrap();
    let piece = vec![7; 256 << 10];
    let error = (0..100).find_map(|_| file.write_all(&piece).err()).unwrap();
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    // What was written before is there, and room can be made.
    assert!(file.metadata().unwrap().len() >= 512 << 10);
    file.set_len(0).unwrap();
    file.rewind().unwrap();
    file.write_all(b"fits").unwrap();
    assert_eq!(fs::read(world.on_host("file")).unwrap(), b"fits");
}
