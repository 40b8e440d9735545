//! Failures speak: a sentence, a hint, exit status 1, nothing lost, nothing left running.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use dhow_tests::command::{Cmd, Output};
use dhow_tests::settings::in_path;
use dhow_tests::vm::START;
use dhow_tests::{SOON, Settings, Vm, cases, process, wait_for};

cases![Own: no_qemu, no_image, a_damaged_image, mount_paths_that_do_not_work, bad_sizes, an_unknown_key,
    a_kernel_that_is_none, a_guest_that_panics, a_guest_that_never_answers, no_room_for_the_start,
    no_room_for_docker, a_host_disk_that_fills_up];

/// Asserts a failure that speaks of every part, has a hint, and leaves nothing running.
fn assert_fails(vm: &Vm, command: Cmd, parts: &[&str]) -> Output {
    let mut output = command.run();
    assert!(matches!(output.status.code(), Some(1 | 2)), "a failure was expected:\n{output}");
    for part in parts {
        output = output.says(part);
    }
    assert!(output.stderr.contains("hint"), "without a hint:\n{output}");
    assert!(!output.stderr.contains("panicked"), "{output}");
    vm.assert_nothing_left();
    output
}

fn no_qemu() {
    let vm = Vm::new();
    let empty = vm.beside("path");
    fs::create_dir_all(&empty).unwrap();
    let vm = vm.env("PATH", &empty);
    assert_fails(&vm, vm.start_command(&[]), &["qemu", "install"]);
}

fn no_image() {
    let vm = Vm::new();
    assert_fails(&vm, vm.dhow(&["start", "--accel", "tcg"]), &["no system image", "make image"]);
    let command = vm.dhow(&["start", "--accel", "tcg", "--image", "/nowhere"]);
    assert_fails(&vm, command, &["/nowhere"]);
}

/// A copy of the image, of links, in which `change` has one file replaced.
fn image_with(vm: &Vm, name: &str, change: impl FnOnce(&Path)) -> PathBuf {
    let folder = vm.beside("image");
    fs::create_dir_all(&folder).unwrap();
    for file in ["vmlinuz", "initramfs.cpio.zst", "base.erofs", "docker.erofs", "manifest.toml"] {
        symlink(Settings::get().image.join(file), folder.join(file)).unwrap();
    }
    fs::remove_file(folder.join(name)).unwrap();
    change(&folder.join(name));
    folder
}

fn start_with_image(vm: &Vm, image: &Path) -> Cmd {
    vm.dhow(&["start", "--accel", "tcg", "--image", image.to_str().unwrap()]).deadline(START)
}

fn a_damaged_image() {
    let vm = Vm::new();
    let image = image_with(&vm, "base.erofs", |path| fs::write(path, "cut").unwrap());
    assert_fails(&vm, start_with_image(&vm, &image), &["base.erofs"]);
}

fn mount_paths_that_do_not_work() {
    let vm = Vm::new();
    assert_fails(&vm, vm.start_command(&["--mount", "/nowhere"]), &["/nowhere", "does not exist"]);
    let file = vm.home().join("file");
    fs::write(&file, "").unwrap();
    assert_fails(&vm, vm.start_command(&["--mount", file.to_str().unwrap()]), &["is no folder"]);
    assert_fails(&vm, vm.start_command(&["--mount", "/usr"]), &["/usr"]);
    assert!(!vm.data("disk.raw").exists(), "something was made for a start that could not be");
}

fn bad_sizes() {
    let vm = Vm::new();
    let image = Settings::get().image.to_str().unwrap();
    for (flag, value, part) in [
        ("--memory", "lots", "lots"),
        ("--memory", "1MiB", "512MiB"),
        ("--memory", "100TiB", "memory"),
        ("--cpus", "0", "cpus"),
        ("--cpus", "10000", "cpus"),
        ("--disk", "0", "disk"),
        ("--disk", "5 bananas", "bananas"),
    ] {
        assert_fails(&vm, vm.dhow(&["start", "--image", image, flag, value]), &[part]);
    }
    assert!(!vm.data("disk.raw").exists());
}

fn an_unknown_key() {
    let vm = Vm::new();
    let file = vm.dhow_home().join("config/profiles/default.toml");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let mode =
        |path: &Path| fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    [vm.dhow_home(), vm.dhow_home().join("config"), file.parent().unwrap().to_owned()]
        .iter()
        .for_each(|path| mode(path));
    let text = "# mine\ncpus = 1\nmemroy = \"2GiB\"\n";
    fs::write(&file, text).unwrap();
    assert_fails(&vm, vm.start_command(&[]), &["line 3", "memroy", "did you mean `memory`"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
}

fn a_kernel_that_is_none() {
    let vm = Vm::new();
    let size = fs::metadata(Settings::get().image.join("vmlinuz")).unwrap().len();
    let image = image_with(&vm, "vmlinuz", |path| {
        fs::write(path, vec![0x90; usize::try_from(size).unwrap()]).unwrap();
    });
    assert_fails(&vm, start_with_image(&vm, &image), &["logs"]);
}

/// A folder with the dhow under test and something else as its agent.
fn with_agent(vm: &Vm, agent: &Path) -> Cmd {
    let programs = vm.beside("programs");
    fs::create_dir_all(&programs).unwrap();
    fs::copy(&Settings::get().dhow, programs.join("dhow")).unwrap();
    fs::copy(agent, programs.join("dhow-agent")).unwrap();
    let image = Settings::get().image.to_str().unwrap();
    vm.command(&programs.join("dhow")).args(["start", "--accel", "tcg", "--image", image]).deadline(START)
}

fn a_guest_that_panics() {
    let vm = Vm::new();
    // It ends at once, which no first process may.
    let command = with_agent(&vm, &Settings::get().guest_tool);
    assert_fails(&vm, command, &["Kernel panic", "Attempted to kill init"]);
}

fn a_guest_that_never_answers() {
    let vm = Vm::new();
    // As /init busybox is a first process that waits for ever and knows nothing of vsock.
    let command = with_agent(&vm, &Settings::get().busybox).env("DHOW_BOOT_DEADLINE", "45");
    assert_fails(&vm, command, &["did not come up within 45 s", "console"]);
}

/// A filesystem in memory of so many MiB at Dhow's folder, until dropped.
struct Small {
    folder: PathBuf,
}

impl Small {
    fn at(folder: PathBuf, mib: u32) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this case needs root, to mount a small filesystem: use `sudo`"
        );
        fs::create_dir_all(&folder).unwrap();
        let options = format!("size={mib}m,mode=700");
        Cmd::new(in_path("mount").unwrap()).args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&folder).ok();
        Self { folder }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Detached: a process that ends has files in it.
        let _ = Cmd::new(in_path("umount").unwrap()).arg("-l").arg(&self.folder).spawn().try_wait();
    }
}

fn no_room_for_the_start() {
    let vm = Vm::new();
    let small = Small::at(vm.dhow_home(), 1);
    assert_fails(&vm, vm.start_command(&[]), &["No space left", "room"]);
    drop(small);
}

fn no_room_for_docker() {
    let vm = Vm::new();
    // Enough for the boot; the bundle alone has more.
    let small = Small::at(vm.dhow_home(), 80);
    assert_fails(&vm, vm.start_command(&[]), &["space"]);
    drop(small);
}

/// Where there is no room for new settings the old ones stay whole, and so does what a new supervisor must know.
fn settings_outlive_a_full_disk(vm: &Vm) {
    let profile = vm.dhow_home().join("config/profiles/default.toml");
    let record = vm.run("vm.record");
    let [before, known] = [&profile, &record].map(|path| fs::read(path).unwrap());
    // Longer than what is there, wherever a few bytes are free.
    let mounts: Vec<String> = (0..200).map(|number| format!("{}/{number}:ro", vm.home().display())).collect();
    for mount in &mounts {
        fs::create_dir_all(mount.trim_end_matches(":ro")).unwrap();
    }
    let arguments: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount]).collect();
    let output = vm.start_command(&arguments).run();
    assert_eq!(output.status.code(), Some(1), "{output}");
    output.says("No space left").says("hint");
    assert_eq!(fs::read_to_string(&profile).unwrap().as_bytes(), before, "the profile has changed");
    let supervisor = vm.pid_of(" supervisor ");
    process::kill(supervisor);
    wait_for("another supervisor, which finds the VM and its full disk", SOON, || {
        let other = vm
            .processes()
            .iter()
            .any(|process| process.line.contains(" supervisor ") && process.pid != supervisor);
        let status = vm.status();
        let told = status["problem"].as_str().is_some_and(|problem| problem.contains("disk is full"));
        if other && told { Ok(()) } else { Err(status.to_string()) }
    });
    assert!(fs::read(&record).unwrap() == known, "the VM's record has changed");
    assert_eq!(fs::read(&profile).unwrap(), before);
}

/// The host's disk is full while the guest writes: the VM pauses, and goes on when there is room.
fn a_host_disk_that_fills_up() {
    let vm = Vm::new();
    let small = Small::at(vm.dhow_home(), 1000);
    vm.start(&[]);
    vm.import_image();
    let script = "until [ -e /data/go ]; do sleep 0.2; done
        guest-tool pattern 9 100000000 >/data/blob && sync && sha256sum </data/blob";
    let container = vm.container(&["-v", "full:/data"], &["sh", "-c", script]);
    let ballast = vm.dhow_home().join("ballast");
    let mut file = fs::File::create(&ballast).unwrap();
    let full = std::iter::repeat_with(|| file.write_all(&[1; 1 << 16])).find_map(Result::err).unwrap();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    // Its own answer may be on the disk that is full.
    let go = container.sh("touch /data/go").spawn();
    wait_for("a word about the full disk", SOON, || {
        let status = vm.status();
        let problem = status["problem"].as_str().unwrap_or_default();
        if problem.contains("disk is full") { Ok(()) } else { Err(status.to_string()) }
    });
    settings_outlive_a_full_disk(&vm);
    drop(file);
    fs::remove_file(&ballast).unwrap();
    wait_for("the VM that goes on", SOON, || {
        let status = vm.status();
        if status["state"] == "running" { Ok(()) } else { Err(status.to_string()) }
    });
    drop(go);
    // Where the pause came before it was heard; a container that has heard it may have ended.
    let _ = container.sh("touch /data/go").run();
    assert_eq!(vm.docker(&["wait", &container.name]).ok(), "0");
    let expected = Cmd::new("/bin/sh")
        .env("PATH", std::env::var_os("PATH").unwrap())
        .args(["-c", "\"$0\" pattern 9 100000000 | sha256sum"])
        .arg(&Settings::get().guest_tool)
        .ok();
    assert_eq!(container.logs().trim_end(), expected);
    drop(container);
    vm.stop();
    drop(small);
}
