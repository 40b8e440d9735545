//! Users of the guest: /etc/passwd and /etc/group.

use std::ffi::CString;
use std::path::PathBuf;

use dhow_protocol::hello::Status;
use nix::unistd::{Gid, Uid, getgrouplist};

use super::{Refused, malformed};

/// Who runs a command where the host names nobody.
const DEFAULT: &str = "root";
/// The shell of a user without one (passwd(5)).
const DEFAULT_SHELL: &str = "/bin/sh";

/// A user as login would find it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub name: String,
    pub uid: Uid,
    pub gid: Gid,
    /// All groups, with `gid`.
    pub groups: Vec<Gid>,
    pub home: PathBuf,
    pub shell: PathBuf,
}

/// Looks a user up by name, root where there is none.
pub(super) fn lookup(name: Option<&str>) -> Result<User, Refused> {
    let name = name.unwrap_or(DEFAULT);
    let failed = |error: nix::Error| Refused {
        status: Status::Failed,
        detail: format!("the guest's users cannot be read: {}", error.desc()),
    };
    let c_name = CString::new(name).map_err(|_| malformed("the user's name contains a zero byte"))?;
    let user = nix::unistd::User::from_name(name).map_err(failed)?.ok_or_else(|| Refused {
        status: Status::NotFound,
        detail: format!("there is no user \"{name}\" in the guest"),
    })?;
    let groups = getgrouplist(&c_name, user.gid).map_err(failed)?;
    let shell = match user.shell.as_os_str().is_empty() {
        true => DEFAULT_SHELL.into(),
        false => user.shell,
    };
    Ok(User { name: user.name, uid: user.uid, gid: user.gid, groups, home: user.dir, shell })
}

impl User {
    /// The shell's name without its folder.
    pub(super) fn shell_name(&self) -> String {
        self.shell.file_name().unwrap_or(self.shell.as_os_str()).to_string_lossy().into_owned()
    }

    /// The home folder, or `/` where that is missing, as login does.
    pub(super) async fn home_or_root(&self) -> PathBuf {
        match tokio::fs::metadata(&self.home).await {
            Ok(meta) if meta.is_dir() && self.home.is_absolute() => self.home.clone(),
            _ => PathBuf::from("/"),
        }
    }
}
