//! Shared folders: the same files at the same path, both ways, and nothing beyond them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use dhow_guest_tool::{Pattern, Summary};

use dhow_tests::command::Cmd;
use dhow_tests::vm::{READ_ONLY, run_folder};
use dhow_tests::{SOON, Settings, TOOL, Vm, cases, wait_for, wait_until};

cases![Shared: the_same_files_at_the_same_path, a_container_sees_edits_of_the_host, operations_of_the_guest,
    rename_with_flags, large_files_both_ways, many_files_both_ways, odd_names, an_open_file_that_is_removed,
    owners_are_virtual, git_works, a_read_only_share_refuses, own_folders_are_hidden, links_do_not_lead_out,
    a_share_may_hold_the_mount_of_a_container, mounts_are_listed];

/// A new folder in the shared home.
fn folder(vm: &Vm, name: &str) -> PathBuf {
    let folder = vm.home().join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// A shell's script in the guest, in `folder`.
fn sh(vm: &Vm, folder: &std::path::Path, script: &str) -> Cmd {
    vm.sh(&format!("set -e; cd '{}'; {script}", folder.display()))
}

fn digest(bytes: &[u8]) -> String {
    Summary::of(bytes).split(' ').nth(1).unwrap().to_owned()
}

fn the_same_files_at_the_same_path(vm: &Vm) {
    let folder = folder(vm, "same");
    fs::write(folder.join("from-host"), "of the host").unwrap();
    let path = folder.join("from-host");
    assert_eq!(vm.exec(&["cat", path.to_str().unwrap()]).ok(), "of the host");
    sh(vm, &folder, "printf 'of the guest' >from-guest").ok();
    assert_eq!(fs::read_to_string(folder.join("from-guest")).unwrap(), "of the guest");
    // As everybody writes it.
    let volume = format!("{}:/x", folder.display());
    let output =
        vm.docker_run(&["-v", &volume], &["sh", "-c", "cat /x/from-host; echo c >/x/from-container"]);
    assert_eq!(output.ok(), "of the host");
    assert_eq!(fs::read_to_string(folder.join("from-container")).unwrap(), "c\n");
}

fn a_container_sees_edits_of_the_host(vm: &Vm) {
    let folder = folder(vm, "edits");
    let file = folder.join("page");
    fs::write(&file, "one").unwrap();
    let container = vm.container(&["-v", &format!("{}:/www", folder.display())], &["sleep", "1000"]);
    let sees = |what: &str, script: &str, expected: &str| {
        wait_for(what, SOON, || {
            let seen = container.sh(script).run().text();
            if seen.trim_end() == expected { Ok(()) } else { Err(seen) }
        });
    };
    sees("the file", "cat /www/page", "one");
    // In place and of the same length; then as editors do, by a new file in its place.
    fs::write(&file, "two").unwrap();
    sees("an edit in place", "cat /www/page", "two");
    fs::write(folder.join("new"), "three").unwrap();
    fs::rename(folder.join("new"), &file).unwrap();
    sees("a replaced file", "cat /www/page", "three");
    fs::create_dir(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/inner"), "four").unwrap();
    sees("a new folder", "cat /www/sub/inner", "four");
    fs::set_permissions(&file, PermissionsExt::from_mode(0o640)).unwrap();
    sees("a new mode", "stat -c %a /www/page", "640");
    fs::remove_file(&file).unwrap();
    sees("a removal", "ls /www", "sub");
}

fn operations_of_the_guest(vm: &Vm) {
    let folder = folder(vm, "operations");
    let script = "
        printf 12345 >f; mkdir d; mv f d/g; chmod 751 d; chmod 604 d/g
        ln -s d/g link; [ \"$(readlink link)\" = d/g ]; [ \"$(cat link)\" = 12345 ]
        ln d/g hard; [ \"$(stat -c %h hard)\" = 2 ]; [ \"$(stat -c %i hard)\" = \"$(stat -c %i d/g)\" ]
        printf 67 >>hard; truncate -s 6 d/g; [ \"$(cat hard)\" = 123456 ]
        truncate -s 100 hard; [ \"$(stat -c %s d/g)\" = 100 ]; truncate -s 3 hard
        touch -d '2020-02-03 04:05:06 UTC' hard; [ \"$(stat -c %Y d/g)\" = 1580702706 ]
        mkdir gone; rmdir gone; [ ! -e gone ]; printf x >x; rm x; [ ! -e x ]
        if rmdir d 2>/dev/null; then exit 11; fi
        if mkdir d 2>/dev/null; then exit 12; fi
        if cat absent 2>/dev/null; then exit 13; fi
        printf old >a; printf new >b; mv b a; [ \"$(cat a)\" = new ]; [ ! -e b ]
        dd if=/dev/zero of=s bs=1 count=1 seek=1000000 conv=fsync 2>/dev/null; sync
        [ \"$(ls -a | tr '\\n' ' ')\" = '. .. a d hard link s ' ]
        [ \"$(stat -f -c %T . )\" != '' ]";
    sh(vm, &folder, script).ok();
    let at = |name: &str| folder.join(name);
    assert_eq!(fs::read_to_string(at("hard")).unwrap(), "123");
    let (hard, inner) = (fs::metadata(at("hard")).unwrap(), fs::metadata(at("d/g")).unwrap());
    assert_eq!((hard.ino(), hard.nlink(), hard.mtime()), (inner.ino(), 2, 1_580_702_706));
    assert_eq!(fs::read_link(at("link")).unwrap(), PathBuf::from("d/g"));
    assert_eq!(fs::read_to_string(at("a")).unwrap(), "new");
    assert_eq!(fs::metadata(at("s")).unwrap().len(), 1_000_001);
}

fn rename_with_flags(vm: &Vm) {
    let folder = folder(vm, "flags");
    fs::write(folder.join("a"), "1").unwrap();
    fs::write(folder.join("b"), "2").unwrap();
    sh(vm, &folder, &format!("{TOOL} rename exchange a b; [ \"$(cat a b)\" = 21 ]")).ok();
    assert_eq!(fs::read_to_string(folder.join("a")).unwrap(), "2");
    sh(vm, &folder, &format!("{TOOL} rename noreplace a b")).run().exits(1).says("File exists");
    sh(vm, &folder, &format!("{TOOL} rename noreplace a c; [ ! -e a ]")).ok();
    assert_eq!(fs::read_to_string(folder.join("c")).unwrap(), "2");
}

fn large_files_both_ways(vm: &Vm) {
    let folder = folder(vm, "large");
    let size = 40_000_000;
    let pattern = |seed: &str| {
        Cmd::new(&Settings::get().guest_tool).args(["pattern", seed, &size.to_string()]).run().exits(0).stdout
    };
    let (down, up) = (pattern("1"), pattern("2"));
    fs::write(folder.join("down"), &down).unwrap();
    let sum = |name: &str| sh(vm, &folder, &format!("sha256sum <{name}")).ok();
    // Twice: the second time some of it comes from the guest's cache.
    let expected =
        Cmd::new("sha256sum").env("PATH", std::env::var_os("PATH").unwrap()).stdin(down.clone()).ok();
    assert_eq!(sum("down"), expected);
    assert_eq!(sum("down"), expected);
    sh(vm, &folder, &format!("{TOOL} pattern 2 {size} >up; sync up")).ok();
    assert!(fs::read(folder.join("up")).unwrap() == up, "what the guest wrote differs");
    // A piece in the middle, by both.
    sh(vm, &folder, "printf middle | dd of=up bs=1 seek=12345678 conv=notrunc 2>/dev/null").ok();
    assert_eq!(&fs::read(folder.join("up")).unwrap()[12_345_678..12_345_684], b"middle");
}

fn many_files_both_ways(vm: &Vm) {
    let folder = folder(vm, "many");
    fs::create_dir(folder.join("host")).unwrap();
    for number in 0..600 {
        fs::write(folder.join(format!("host/{number}")), number.to_string()).unwrap();
    }
    assert_eq!(
        sh(vm, &folder, "ls host | wc -l; cat host/599; find host -type f | wc -l").ok(),
        "600\n599600"
    );
    sh(vm, &folder, "mkdir guest; i=0; while [ $i -lt 300 ]; do echo $i >guest/$i; i=$((i+1)); done").ok();
    assert_eq!(fs::read_dir(folder.join("guest")).unwrap().count(), 300);
    assert_eq!(fs::read_to_string(folder.join("guest/299")).unwrap(), "299\n");
    sh(vm, &folder, "rm -r host guest; [ -z \"$(ls)\" ]").ok();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

fn odd_names(vm: &Vm) {
    let folder = folder(vm, "odd names ü");
    let long = "l".repeat(255);
    for name in ["with space", "ünï – ☃", "-dash", "new\nline", "quo'te\"s", ".hidden", "a:b,c", &long]
    {
        fs::write(folder.join(name), name).unwrap();
        let path = folder.join(name);
        assert_eq!(vm.exec(&["cat", path.to_str().unwrap()]).ok(), name);
    }
    let too_long = folder.join("l".repeat(256));
    vm.exec(&["touch", too_long.to_str().unwrap()]).run().exits(1).says("File name too long");
    assert_eq!(sh(vm, &folder, "ls -A | wc -l").ok(), "9", "one of them has two lines");
}

fn an_open_file_that_is_removed(vm: &Vm) {
    let folder = folder(vm, "unlinked");
    let script = "echo before >f; exec 3<>f; rm f; cat <&3; echo after >&3; [ ! -e f ]";
    assert_eq!(sh(vm, &folder, script).ok(), "before");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

fn owners_are_virtual(vm: &Vm) {
    let folder = folder(vm, "owners");
    fs::write(folder.join("f"), "").unwrap();
    let own = fs::metadata(folder.join("f")).unwrap().uid();
    // As the entry points of databases do.
    let volume = format!("{}:/x", folder.display());
    let script = "chown 999:998 /x/f && chmod 600 /x/f && stat -c '%u %g %a' /x/f";
    assert_eq!(vm.docker_run(&["-v", &volume], &["sh", "-c", script]).ok(), "999 998 600");
    assert_eq!(sh(vm, &folder, "stat -c '%u %g' f").ok(), "999 998");
    assert_eq!(fs::metadata(folder.join("f")).unwrap().uid(), own);
}

fn git_works(vm: &Vm) {
    let folder = folder(vm, "repository");
    for number in 0..40 {
        fs::write(folder.join(format!("file{number}")), Pattern::bytes(number, 2000)).unwrap();
    }
    let script = "
        export GIT_CONFIG_GLOBAL=/root/.gitconfig-e2e
        git config --global user.name e2e; git config --global user.email e2e@example.org
        git config --global --add safe.directory '*'; git config --global advice.detachedHead false
        git init -q .; git add .; git commit -qm first; echo more >>file1
        [ \"$(git status --porcelain)\" = ' M file1' ]; git commit -qam second
        git gc -q; git fsck --no-progress; git checkout -q HEAD~1; git clone -q . ../repository-clone
        cd ../repository-clone; git log --oneline | wc -l";
    assert_eq!(sh(vm, &folder, script).ok(), "1");
    let bytes = fs::read(vm.home().join("repository-clone/file1")).unwrap();
    assert_eq!(digest(&bytes), digest(&Pattern::bytes(1, 2000)));
}

fn a_read_only_share_refuses(vm: &Vm) {
    let folder = vm.beside(READ_ONLY);
    fs::write(folder.join("f"), "kept").unwrap();
    assert_eq!(sh(vm, &folder, "cat f").ok(), "kept");
    for attempt in
        ["echo x >f", "echo x >new", "rm f", "mv f g", "mkdir d", "chmod 777 f", "ln f g", "touch f"]
    {
        let output = sh(vm, &folder, attempt).run();
        assert!(!output.status.success(), "{output}");
        assert!(output.stderr.contains("Read-only file system"), "{output}");
    }
    let volume = format!("{}:/x", folder.display());
    vm.docker_run(&["-v", &volume], &["sh", "-c", "echo x >/x/f"])
        .run()
        .exits(1)
        .says("Read-only file system");
    // Also for root with the right to mount.
    let remount = sh(vm, &folder, "mount -o remount,rw . 2>/dev/null || true; echo x >f").run();
    assert!(!remount.status.success(), "{remount}");
    assert_eq!(fs::read_to_string(folder.join("f")).unwrap(), "kept");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
}

fn own_folders_are_hidden(vm: &Vm) {
    let own = vm.dhow_home();
    assert!(vm.data("disk.raw").exists() && vm.run("secret").exists());
    // Whether the four folders look empty or absent is not what matters.
    let script = format!("find '{}' ! -type d 2>/dev/null || true", own.display());
    assert_eq!(vm.sh(&script).ok(), "");
    for path in [vm.data("disk.raw"), vm.run("secret"), vm.run("api.sock"), vm.run("docker.sock")] {
        let path = path.to_str().unwrap();
        assert_eq!(vm.sh(&format!("[ -e '{path}' ] && echo seen || true")).ok(), "");
        vm.sh(&format!("mkdir -p \"$(dirname '{path}')\" 2>/dev/null; echo x >'{path}'")).run();
    }
    let secret = fs::read(vm.run("secret")).unwrap();
    assert_eq!(secret.len(), 32, "the guest has written to the host's own files");
    vm.sh(&format!("mv '{}' '{}-away'", own.display(), own.display())).run();
    assert!(
        vm.data("disk.raw").exists() && vm.run("api.sock").exists(),
        "the guest has moved Dhow's own folder"
    );
}

fn links_do_not_lead_out(vm: &Vm) {
    let folder = folder(vm, "links");
    let outside = run_folder().join("outside");
    fs::write(&outside, "of the host alone").unwrap();
    symlink(&outside, folder.join("absolute")).unwrap();
    symlink("../../../outside", folder.join("relative")).unwrap();
    symlink("/etc", folder.join("etc")).unwrap();
    for link in ["absolute", "relative"] {
        // A link is text: it leads where it leads in the guest.
        let output = sh(vm, &folder, &format!("cat {link}")).run();
        assert!(!output.all().contains("of the host alone"), "{output}");
        sh(vm, &folder, &format!("echo written >{link}")).run();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "of the host alone", "{link}");
    }
    let guest = vm.exec(&["cat", "/etc/shadow"]).ok();
    assert_eq!(sh(vm, &folder, "cat etc/shadow").ok(), guest);
    assert_ne!(fs::read_to_string("/etc/shadow").unwrap_or_default().trim_end(), guest);
    // A folder that the guest knows becomes a link, on the host.
    fs::create_dir(folder.join("turned")).unwrap();
    fs::write(folder.join("turned/hosts"), "mine").unwrap();
    assert_eq!(sh(vm, &folder, "cat turned/hosts").ok(), "mine");
    let swap = format!(
        "cd turned; mv ../turned ../was; ln -s {} ../turned; cat hosts ../turned/outside || true",
        run_folder().display()
    );
    let output = sh(vm, &folder, &swap).ok();
    assert!(!output.contains("of the host alone"), "{output}");
    let output =
        sh(vm, &folder, "cat turned/../../../../outside ../../../outside turned/outside 2>&1 || true").ok();
    assert!(!output.contains("of the host alone"), "{output}");
}

fn a_share_may_hold_the_mount_of_a_container(vm: &Vm) {
    let folder = folder(vm, "app");
    fs::write(folder.join("main"), "1").unwrap();
    let volume = format!("{}:/app", folder.display());
    let options = ["-v", &volume, "-v", "/app/node_modules"];
    let container = vm.container(&options, &["sleep", "1000"]);
    container.sh("echo inner >/app/node_modules/f").ok();
    fs::write(folder.join("main"), "2").unwrap();
    wait_until("the host's edit", SOON, || container.sh("cat /app/main").ok() == "2");
    assert_eq!(container.sh("cat /app/node_modules/f").ok(), "inner");
    assert!(!folder.join("node_modules/f").exists());
}

fn mounts_are_listed(vm: &Vm) {
    let listed = vm.json(&["mounts", "--json"]);
    let text = listed.to_string();
    for path in [vm.home(), vm.beside(READ_ONLY)] {
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
    let read_only: Vec<_> =
        listed.as_array().unwrap().iter().map(|mount| mount["read_only"].as_bool()).collect();
    assert!(read_only.contains(&Some(true)) && read_only.contains(&Some(false)), "{text}");
    assert!(vm.dhow(&["mounts"]).ok().contains(vm.home().to_str().unwrap()));
}
