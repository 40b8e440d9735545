//! Dhow's own folders, which no share shows.
//!
//! A mask is an inode (whatever its name is later) and a name in a folder (whatever is made there
//! later). The folders above it keep their place: a guest that could rename `~/.local` and put its
//! own in its stead would write the settings that the host reads next.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use dhow_protocol::files::Name;

use super::host_fs::{self, Identity};

type Inode = (u64, u64);

/// What is masked in a share.
#[derive(Debug, Default)]
pub struct Masks {
    hidden: HashSet<Inode>,
    hidden_names: HashSet<(Inode, Name)>,
    kept: HashSet<Inode>,
}

impl Masks {
    /// Of those `paths` that lie below `root`. Called before the guest can reach anything, so paths
    /// may be used as they are.
    pub fn new(root: &Path, paths: &[PathBuf]) -> Self {
        let mut masks = Self::default();
        let real_root = root.canonicalize().unwrap_or_else(|_| root.to_owned());
        for path in paths {
            // As it is written, and where it really is: symlinks on the way are kept in place too.
            masks.add(root, path);
            masks.add(&real_root, &path.canonicalize().unwrap_or_else(|_| path.clone()));
        }
        masks
    }

    /// Whether `root` is one of these folders or lies in one.
    pub fn cover(root: &Path, paths: &[PathBuf]) -> bool {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let root = real(root);
        paths.iter().any(|path| root.starts_with(real(path)))
    }

    fn add(&mut self, root: &Path, path: &Path) {
        let Ok(below) = path.strip_prefix(root) else { return };
        let names: Vec<_> = below
            .components()
            .filter_map(|component| match component {
                Component::Normal(name) => Name::new(name.as_bytes()).ok(),
                _ => None,
            })
            .collect();
        let mut folder = root.to_owned();
        for (index, name) in names.iter().enumerate() {
            let Some(above) = inode_of(&folder, true) else { return };
            folder.push(std::ffi::OsStr::from_bytes(name.as_bytes()));
            let here = inode_of(&folder, false);
            let last = index + 1 == names.len();
            match here {
                Some(inode) if !last => drop(self.kept.insert(inode)),
                Some(inode) => {
                    self.hidden.insert(inode);
                    self.hidden_names.insert((above, name.clone()));
                }
                None => {
                    self.hidden_names.insert((above, name.clone()));
                    return;
                }
            }
        }
    }

    /// Whether this name, or the file that was found under it, is not there for the guest.
    pub fn hide(&self, folder: &Identity, name: &Name, found: Option<&Identity>) -> bool {
        if self.hidden.is_empty() && self.hidden_names.is_empty() {
            return false;
        }
        found.is_some_and(|found| self.hidden.contains(&(found.device, found.inode)))
            || self.hidden_names.contains(&((folder.device, folder.inode), name.clone()))
    }

    /// Whether this folder must stay where it is and what it is called.
    pub fn keep(&self, found: &Identity) -> bool {
        self.kept.contains(&(found.device, found.inode))
    }
}

fn inode_of(path: &Path, follow: bool) -> Option<Inode> {
    let path = if follow { path.canonicalize().ok()? } else { path.to_owned() };
    let status = host_fs::status_at(rustix::fs::CWD, path.as_os_str().as_bytes()).ok()?;
    Some((status.identity.device, status.identity.inode))
}
