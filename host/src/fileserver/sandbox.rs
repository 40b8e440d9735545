//! The file server's own walls: Landlock for files, seccomp for system calls.
//!
//! Both hold for the calling thread and all that it starts, for good.
//!
//! Landlock: what may be done beneath the granted folder, and nothing anywhere else. It does not
//! know chmod, chown, xattrs and stat, so the checks of `share.rs` stand for those.
//!
//! seccomp: a list of what is refused with EPERM, in four groups: reaching another endpoint
//! (sockets are given, never made), becoming or driving another program, changing what the process
//! sees (mounts, namespaces, identity), and kernel interfaces with a history of their own. A list of
//! what is allowed would be tighter, and is brittle against libc and allocator; with Landlock and
//! no capability to gain (no_new_privs), what is left over works on the process's own fds.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::FileServerError;

const REFUSED: &[libc::c_long] = &[
    // Other endpoints.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_pidfd_getfd,
    // Other programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kill,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    // What the process sees and is.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_personality,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_acct,
    // Kernel interfaces that a file server has no use for.
    libc::SYS_open_by_handle_at,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
];

/// Confines the calling thread and all threads that it starts.
///
/// # Errors
/// When the kernel refuses. A kernel without Landlock (before 5.13) is logged, not refused.
pub fn enter(root: BorrowedFd<'_>, read_only: bool) -> Result<(), FileServerError> {
    let status = restrict_files(root, read_only)
        .map_err(|error| FileServerError::Sandbox(format!("Landlock: {error}")))?;
    if status == RulesetStatus::NotEnforced {
        tracing::warn!("this kernel has no Landlock: the file server is confined by its own checks alone");
    }
    let filter = filter().map_err(|error| FileServerError::Sandbox(format!("seccomp filter: {error}")))?;
    seccompiler::apply_filter(&filter).map_err(|error| FileServerError::Sandbox(format!("seccomp: {error}")))
}

fn restrict_files(root: BorrowedFd<'_>, read_only: bool) -> Result<RulesetStatus, landlock::RulesetError> {
    let abi = ABI::V6;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    // Not among them: execute, and making devices and sockets.
    let write = AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSym
        | AccessFs::MakeFifo
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer;
    let granted: BitFlags<AccessFs> = if read_only { read } else { read | write };
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rule(PathBeneath::new(root, granted))?
        .restrict_self()?;
    Ok(status.ruleset)
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules: BTreeMap<i64, _> =
        REFUSED.iter().copied().chain(x32_calls()).map(|call| (call, Vec::new())).collect();
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let eperm = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, eperm, arch)?.try_into()
}

/// The same calls by the x32 interface, which x86-64 kernels can have: its numbers have a bit more, and
/// some calls (execve, ptrace, kexec_load …) have numbers of their own from 512 on.
#[cfg(target_arch = "x86_64")]
fn x32_calls() -> impl Iterator<Item = libc::c_long> {
    const BIT: libc::c_long = 0x4000_0000;
    REFUSED.iter().copied().chain(512..=547).map(|call| call | BIT)
}

#[cfg(not(target_arch = "x86_64"))]
fn x32_calls() -> impl Iterator<Item = libc::c_long> {
    std::iter::empty()
}
