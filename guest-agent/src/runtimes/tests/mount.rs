//! A real mount of a real image, in a mount namespace of its own.
//!
//! `tiny.erofs` was made with `mkfs.erofs -T0 -U clear --all-root` of a folder with one `bundle.toml`.

use super::*;
use crate::runtimes::mount::LoopMount;

/// Whether the kernel lets this process try; a reason where it does not.
fn namespace() -> Result<(), String> {
    use nix::mount::MsFlags;
    let told = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(|error| told("no namespace", &error))?;
    nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .map_err(|error| told("mounts are not ours", &error))?;
    std::fs::File::options()
        .write(true)
        .open("/dev/loop-control")
        .map_err(|error| told("no loop", &error))?;
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim() == "erofs") { Ok(()) } else { Err("no erofs".to_owned()) }
}

#[test]
fn an_image_is_mounted_by_a_loop_device_and_both_go() {
    if let Err(reason) = namespace() {
        eprintln!("skipped: {reason}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (image, target) = (folder.path().join("tiny.erofs"), folder.path().join("mount"));
    std::fs::write(&image, include_bytes!("tiny.erofs")).unwrap();
    assert!(!LoopMount.is_mounted(&target).unwrap());
    std::fs::create_dir(&target).unwrap();
    assert!(!LoopMount.is_mounted(&target).unwrap());
    LoopMount.mount(&image, &target).unwrap();
    assert!(LoopMount.is_mounted(&target).unwrap());
    let text = std::fs::read_to_string(target.join("bundle.toml")).unwrap();
    assert!(text.starts_with("name = \"tiny\""), "{text}");
    assert_eq!(std::fs::write(target.join("x"), "").unwrap_err().raw_os_error(), Some(libc::EROFS));
    // In use while it is detached.
    let open = std::fs::File::open(target.join("bundle.toml")).unwrap();
    let attached = || {
        let devices = std::fs::read_dir("/sys/block").unwrap().flatten();
        let backing =
            |device: std::fs::DirEntry| std::fs::read_to_string(device.path().join("loop/backing_file")).ok();
        devices.filter_map(backing).any(|path| path.trim() == image.to_str().unwrap())
    };
    assert!(attached());
    LoopMount.detach(&target).unwrap();
    assert!(!LoopMount.is_mounted(&target).unwrap());
    assert!(attached());
    drop(open);
    let waited = std::time::Instant::now();
    while attached() {
        assert!(waited.elapsed() < DEADLINE, "the loop device stays");
        std::thread::sleep(Duration::from_millis(5));
    }
    // What is no image leaves no device.
    std::fs::write(&image, vec![1; 8192]).unwrap();
    assert!(LoopMount.mount(&image, &target).is_err());
    assert!(!LoopMount.is_mounted(&target).unwrap());
    let waited = std::time::Instant::now();
    while attached() {
        assert!(waited.elapsed() < DEADLINE, "the loop device stays");
        std::thread::sleep(Duration::from_millis(5));
    }
}
