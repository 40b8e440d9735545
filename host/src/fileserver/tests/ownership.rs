//! Owners and modes: what the guest sees and what the host gets.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use dhow_protocol::files::{Creation, FileOp, NodeId, SetAttributes};

use super::guest::{guest_of, name};

fn mode(mode: u32) -> SetAttributes {
    SetAttributes { mode: Some(mode), ..SetAttributes::default() }
}

fn owner(uid: u32, gid: u32) -> SetAttributes {
    SetAttributes { uid: Some(uid), gid: Some(gid), ..SetAttributes::default() }
}

fn by(uid: u32, gid: u32, mode: u32) -> Creation {
    Creation { mode, uid, gid }
}

#[test]
fn a_file_of_another_user_of_the_guest_is_the_servers_on_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let me = fs::metadata(folder.path()).unwrap();
    let mut guest = guest_of(folder.path());
    let made = guest.entry(FileOp::CreateFile(NodeId::ROOT, name("f"), by(999, 998, 0o640))).unwrap();
    assert_eq!((made.uid, made.gid, made.mode), (999, 998, 0o640));
    let made = guest.entry(FileOp::CreateFolder(NodeId::ROOT, name("d"), by(999, 998, 0o750))).unwrap();
    assert_eq!((made.uid, made.gid, made.mode), (999, 998, 0o750));
    assert_eq!(guest.look(NodeId::ROOT, "d").unwrap(), guest.attributes(made.node).unwrap());
    for text in ["f", "d"] {
        assert_eq!(fs::metadata(folder.path().join(text)).unwrap().uid(), me.uid());
    }
    // A new server sees the same.
    let again = guest_of(folder.path()).look(NodeId::ROOT, "f").unwrap();
    assert_eq!((again.uid, again.gid, again.mode), (999, 998, 0o640));
}

#[test]
fn no_set_id_bit_reaches_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let made = guest.entry(FileOp::CreateFile(NodeId::ROOT, name("f"), by(0, 0, 0o6755))).unwrap();
    assert_eq!(made.mode, 0o6755);
    let on_host = |text: &str| fs::metadata(folder.path().join(text)).unwrap().mode() & 0o7777;
    assert_eq!(on_host("f"), 0o755);
    assert_eq!(guest.set(made.node, mode(0o4711)).unwrap().mode, 0o4711);
    assert_eq!(on_host("f"), 0o711);
    let made = guest.entry(FileOp::CreateFolder(NodeId::ROOT, name("d"), by(0, 0, 0o2775))).unwrap();
    assert_eq!(made.mode, 0o2775);
    assert_eq!(on_host("d"), 0o775);
    let fifo = guest.entry(FileOp::CreateFifo(NodeId::ROOT, name("p"), by(0, 0, 0o4644))).unwrap();
    assert_eq!((fifo.mode, on_host("p")), (0o644, 0o644));
}

#[test]
fn a_chown_strips_what_runs_a_program_as_somebody_else() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.create(NodeId::ROOT, "f").unwrap().node;
    for (before, after) in
        [(0o6755, 0o755), (0o4755, 0o755), (0o2755, 0o755), (0o2644, 0o2644), (0o644, 0o644)]
    {
        guest.set(file, mode(before)).unwrap();
        assert_eq!(guest.set(file, owner(5, 6)).unwrap().mode, after, "{before:o}");
    }
    // With a mode, the mode says it (the guest kernel sends both).
    let both = SetAttributes { mode: Some(0o4755), ..owner(7, 8) };
    let set = guest.set(file, both).unwrap();
    assert_eq!((set.uid, set.gid, set.mode), (7, 8, 0o4755));
    let folder_node = guest.folder(NodeId::ROOT, "d").unwrap().node;
    guest.set(folder_node, mode(0o2755)).unwrap();
    assert_eq!(guest.set(folder_node, owner(5, 6)).unwrap().mode, 0o2755);
    assert_eq!(guest.set(file, owner(u32::MAX, 0)), Err(libc::EINVAL));
    assert_eq!(guest.set(file, owner(0, u32::MAX)), Err(libc::EINVAL));
    let op = FileOp::CreateFile(NodeId::ROOT, name("bad"), by(u32::MAX, 0, 0o644));
    assert_eq!(guest.entry(op), Err(libc::EINVAL));
    assert!(!folder.path().join("bad").exists());
}

#[test]
fn a_write_or_truncation_strips_the_hosts_set_id_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    fs::write(&path, b"program").unwrap();
    let mut guest = guest_of(folder.path());
    let file = guest.walk("f").unwrap();
    let arm = || fs::set_permissions(&path, Permissions::from_mode(0o6755)).unwrap();
    let on_host = || fs::metadata(&path).unwrap().mode() & 0o7777;
    arm();
    assert_eq!(guest.attributes(file).unwrap().mode, 0o6755);
    guest.write(file, 0, b"x").unwrap();
    assert_eq!(on_host(), 0o755);
    arm();
    guest.set(file, SetAttributes { size: Some(0), ..SetAttributes::default() }).unwrap();
    assert_eq!(on_host(), 0o755);
    arm();
    guest.set(file, owner(1, 1)).unwrap();
    assert_eq!(on_host(), 0o755);
    arm();
    guest.set(file, mode(0o6755)).unwrap();
    assert_eq!(on_host(), 0o755);
    assert_eq!(guest.attributes(file).unwrap().mode, 0o6755);
}

#[test]
fn what_the_host_says_later_counts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let mut guest = guest_of(folder.path());
    let file = guest.entry(FileOp::CreateFile(NodeId::ROOT, name("f"), by(999, 999, 0o644))).unwrap().node;
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    let now = guest.attributes(file).unwrap();
    assert_eq!((now.uid, now.mode), (999, 0o755));
    // Given back to the real owner with a mode that the host can say, nothing is noted any more.
    let real = fs::metadata(&path).unwrap();
    let set = SetAttributes { mode: Some(0o700), ..owner(real.uid(), real.gid()) };
    guest.set(file, set).unwrap();
    let mut text = [0; 64];
    let noted = rustix::fs::getxattr(&path, "user.dhow.owner", &mut text[..]);
    assert_eq!(noted, Err(rustix::io::Errno::NODATA));
    assert_eq!(guest.attributes(file).unwrap().mode, 0o700);
}

#[test]
fn a_set_group_id_folder_hands_its_group_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest_of(folder.path());
    let above = guest.entry(FileOp::CreateFolder(NodeId::ROOT, name("d"), by(1, 50, 0o2775))).unwrap().node;
    let file = guest.entry(FileOp::CreateFile(above, name("f"), by(2, 2, 0o644))).unwrap();
    assert_eq!((file.uid, file.gid, file.mode), (2, 50, 0o644));
    let below = guest.entry(FileOp::CreateFolder(above, name("d"), by(2, 2, 0o755))).unwrap();
    assert_eq!((below.uid, below.gid, below.mode), (2, 50, 0o2755));
}

#[test]
fn a_folder_of_the_host_keeps_its_set_group_id_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("team");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o2775)).unwrap();
    let mut guest = guest_of(folder.path());
    let team = guest.walk("team").unwrap();
    assert_eq!(guest.set(team, mode(0o2770)).unwrap().mode, 0o2770);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o2770);
    assert_eq!(guest.set(team, mode(0o770)).unwrap().mode, 0o770);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o770);
}
