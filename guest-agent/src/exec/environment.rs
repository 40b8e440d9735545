//! A command's environment: what login would set, then the guest's, then the host's.

use super::user::User;
use super::{Refused, malformed};

const ROOT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Later ones replace earlier ones of the same name.
pub(super) fn build(
    user: &User,
    guest: &[(String, String)],
    host: &[(String, String)],
) -> Result<Vec<(String, String)>, Refused> {
    let login = [
        ("PATH", ROOT_PATH.to_owned()),
        ("HOME", user.home.to_string_lossy().into_owned()),
        ("USER", user.name.clone()),
        ("LOGNAME", user.name.clone()),
        ("SHELL", user.shell.to_string_lossy().into_owned()),
        ("LANG", "C.UTF-8".to_owned()),
    ];
    let mut env: Vec<(String, String)> =
        login.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    for (name, value) in guest.iter().chain(host) {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(malformed(format!("\"{name}\" cannot be set in an environment")));
        }
        match env.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => known.clone_from(value),
            None => env.push((name.clone(), value.clone())),
        }
    }
    Ok(env)
}
