//! The device's own wall: a list of the system calls that it needs once it serves. Any other ends the process.
//!
//! The device parses what a guest writes, so a mistake in it must not be worth much: it cannot open a file, make a
//! socket, connect, start a program or a thread, or map code. What it has are the fds that it was given.
//!
//! What makes calls behind the code's back, and how that is met:
//! - The allocator maps and unmaps memory in any thread, and glibc's opens files where it has several arenas:
//!   [`settle_allocator`] keeps it to one.
//! - The vhost-user library maps guest memory whenever QEMU changes its layout.
//! - A panic with a backtrace opens the program's file; from [`enter`] on there is none, and a panic in any thread
//!   aborts: half a device would leave the guest's connections hanging.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Allowed with any arguments.
const ALLOWED: &[libc::c_long] = &[
    // Events.
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_timerfd_settime,
    // Bytes and fds, on what is open already.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_close,
    // Memory; mmap and mprotect are below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // The first steps of a thread that was started just before, as the vhost-user library's is.
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sched_getaffinity,
    // Threads that exist, and their end.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Where the vDSO does not serve it; and the keys of hash maps.
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
];

/// The ioctl requests: to make an fd non-blocking, and to ask a socket for its unsent bytes.
const IOCTLS: [libc::Ioctl; 2] = [libc::FIONBIO, libc::TIOCOUTQ];

/// The fcntl commands: to duplicate an fd, and to see and set its flags.
const FCNTLS: [libc::c_int; 5] =
    [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];

/// Confines all threads of the process for good. No thread can be started afterwards, and
/// [`settle_allocator`] was called before the first one.
///
/// # Errors
/// When the kernel refuses, in words.
pub fn enter() -> Result<(), String> {
    abort_on_panic();
    let filter = filter().map_err(|error| error.to_string())?;
    seccompiler::apply_filter_all_threads(&filter).map_err(|error| error.to_string())
}

/// Keeps glibc's allocator to one arena; for a process that has one thread yet, as a thread keeps the arena that
/// it has. With several, glibc opens files at times of its own: to count the CPUs (`arena_get2`, malloc/arena.c),
/// and to learn how memory is overcommitted before an arena shrinks (`check_may_shrink_heap`, malloc-sysdep.h).
///
/// # Errors
/// When glibc does not take the setting.
pub fn settle_allocator() -> Result<(), String> {
    // SAFETY: mallopt(3) takes two numbers and changes a setting of the allocator under its lock.
    match unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } {
        1 => Ok(()),
        _ => Err("the allocator does not keep to one arena".to_owned()),
    }
}

fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("the vsock device {panic}");
        std::process::abort();
    }));
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![argument(2, SeccompCmpOp::MaskedEq(executable), 0)?]);
    }
    let requests = IOCTLS.map(|request| argument(1, SeccompCmpOp::Eq, u64::from(request as u32)));
    rules.insert(libc::SYS_ioctl, requests.into_iter().collect::<Result<_, _>>()?);
    let commands = FCNTLS.map(|command| argument(1, SeccompCmpOp::Eq, u64::from(command.unsigned_abs())));
    rules.insert(libc::SYS_fcntl, commands.into_iter().collect::<Result<_, _>>()?);
    let name = argument(0, SeccompCmpOp::Eq, u64::from(libc::PR_SET_NAME.unsigned_abs()))?;
    rules.insert(libc::SYS_prctl, vec![name]);
    // Of abort(3).
    let own_process = argument(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?;
    rules.insert(libc::SYS_tgkill, vec![own_process]);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?.try_into()
}

fn argument(index: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value)?])
}
