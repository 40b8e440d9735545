//! Dhow's own folders are not in a share, whatever the guest does around them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use dhow_protocol::files::{FileOp, NodeId, RenameMode};

use super::guest::{Guest, Host, ROOT_FILE, name, target};
use crate::fileserver::share::Share;

/// `home/.local/share/dhow` with a secret is masked in `home`.
fn home() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join(".local/share/dhow");
    fs::create_dir_all(&own).unwrap();
    fs::write(own.join("secret"), b"secret").unwrap();
    fs::write(folder.path().join(".local/share/other"), b"other").unwrap();
    (folder, own)
}

fn guest(root: &Path, masked: &[PathBuf]) -> Guest {
    Host::with(root, false, masked).guest()
}

fn rename(from: (NodeId, &str), to: (NodeId, &str), mode: RenameMode) -> FileOp {
    FileOp::Rename { from: (from.0, name(from.1)), to: (to.0, name(to.1)), mode }
}

#[test]
fn a_masked_folder_is_not_there() {
    let (folder, own) = home();
    let mut guest = guest(folder.path(), &[own]);
    let above = guest.walk(".local/share").unwrap();
    assert_eq!(guest.look(above, "dhow"), Err(libc::ENOENT));
    assert_eq!(guest.names(above), ["other"]);
    assert_eq!(guest.done(FileOp::RemoveFolder(above, name("dhow"))), Err(libc::ENOENT));
    assert_eq!(guest.done(FileOp::RemoveFile(above, name("dhow"))), Err(libc::ENOENT));
}

#[test]
fn nothing_can_be_put_in_its_place() {
    let (folder, own) = home();
    let mut guest = guest(folder.path(), std::slice::from_ref(&own));
    let root = NodeId::ROOT;
    let above = guest.walk(".local/share").unwrap();
    let mine = guest.folder(root, "mine").unwrap().node;
    let file = guest.create(root, "file").unwrap().node;
    assert_eq!(guest.create(above, "dhow"), Err(libc::EPERM));
    assert_eq!(guest.folder(above, "dhow"), Err(libc::EPERM));
    let op = FileOp::CreateSymlink(above, name("dhow"), target("/tmp"), ROOT_FILE);
    assert_eq!(guest.entry(op), Err(libc::EPERM));
    assert_eq!(guest.entry(FileOp::Link { node: file, folder: above, name: name("dhow") }), Err(libc::EPERM));
    for mode in [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange] {
        assert_eq!(guest.done(rename((root, "mine"), (above, "dhow"), mode)), Err(libc::EPERM));
        assert_eq!(guest.done(rename((above, "dhow"), (mine, "dhow"), mode)), Err(libc::ENOENT));
        // Nor in the place of a folder above it.
        for (parent, text) in [(root, ".local"), (guest.walk(".local").unwrap(), "share")] {
            assert_eq!(guest.done(rename((parent, text), (mine, "x"), mode)), Err(libc::EPERM));
            assert_eq!(guest.done(rename((root, "mine"), (parent, text), mode)), Err(libc::EPERM));
        }
    }
    assert_eq!(fs::read(own.join("secret")).unwrap(), b"secret");
}

#[test]
fn a_masked_folder_stays_masked_where_the_host_moves_it() {
    let (folder, own) = home();
    let mut guest = guest(folder.path(), std::slice::from_ref(&own));
    fs::rename(&own, folder.path().join("moved")).unwrap();
    assert_eq!(guest.look(NodeId::ROOT, "moved"), Err(libc::ENOENT));
    assert_eq!(guest.names(NodeId::ROOT), [".local"]);
    // And what the host makes in its place is masked, too.
    fs::create_dir(&own).unwrap();
    let above = guest.walk(".local/share").unwrap();
    assert_eq!(guest.look(above, "dhow"), Err(libc::ENOENT));
}

#[test]
fn of_a_folder_that_is_not_there_the_first_missing_name_is_masked() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("a")).unwrap();
    let mut guest = guest(folder.path(), &[folder.path().join("a/b/c")]);
    let above = guest.walk("a").unwrap();
    assert_eq!(guest.folder(above, "b"), Err(libc::EPERM));
    assert_eq!(guest.folder(above, "c").map(|_| ()), Ok(()));
    let op = rename((NodeId::ROOT, "a"), (NodeId::ROOT, "z"), RenameMode::Replace);
    assert_eq!(guest.done(op), Err(libc::EPERM));
}

#[test]
fn a_symlink_to_a_masked_folder_is_masked_at_both_ends() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("real/dhow")).unwrap();
    symlink("real", folder.path().join("link")).unwrap();
    let mut guest = guest(folder.path(), &[folder.path().join("link/dhow")]);
    let real = guest.walk("real").unwrap();
    assert_eq!(guest.look(real, "dhow"), Err(libc::ENOENT));
    // Neither can be led elsewhere.
    for text in ["real", "link"] {
        let op = rename((NodeId::ROOT, text), (NodeId::ROOT, "z"), RenameMode::Replace);
        assert_eq!(guest.done(op), Err(libc::EPERM), "{text}");
    }
    assert_eq!(guest.done(FileOp::RemoveFile(NodeId::ROOT, name("link"))), Err(libc::EPERM));
}

#[test]
fn a_share_in_a_masked_folder_is_refused() {
    let (folder, own) = home();
    fs::create_dir(own.join("profile")).unwrap();
    symlink(&own, folder.path().join("alias")).unwrap();
    for root in [own.clone(), own.join("profile"), folder.path().join("alias/profile")] {
        let refused = Share::open(&root, false, std::slice::from_ref(&own));
        assert!(matches!(refused, Err(rustix::io::Errno::PERM)), "{}", root.display());
    }
    assert!(Share::open(folder.path(), false, &[own]).is_ok());
}

#[test]
fn a_masked_node_cannot_be_restored() {
    use dhow_protocol::files::RestoredNode;
    use std::os::unix::fs::MetadataExt;
    let (folder, own) = home();
    let mut guest = guest(folder.path(), std::slice::from_ref(&own));
    let above = guest.walk(".local/share").unwrap();
    let node = NodeId(fs::metadata(&own).unwrap().ino());
    let restored = RestoredNode { folder: above, name: name("dhow"), node, references: 1 };
    guest.done(FileOp::Restore(vec![restored])).unwrap();
    assert_eq!(guest.look(node, "secret"), Err(libc::ESTALE));
}
