//! Help, wrong usage, settings that make no sense, and profiles that are not there.

use crate::bench::Bench;

const COMMANDS: [&str; 12] = [
    "start", "stop", "restart", "delete", "status", "list", "exec", "shell", "logs", "ports", "mounts",
    "version",
];

#[test]
fn help_names_every_command_and_none_of_dhows_own() {
    let bench = Bench::new();
    let help = bench.run(&["--help"]);
    help.expect(0);
    for command in COMMANDS {
        assert!(help.stdout.contains(&format!("\n  {command} ")), "{command}: {help:#?}");
        let own = bench.run(&[command, "--help"]);
        own.expect(0);
        assert!(own.stdout.contains("Examples:"), "{command}: {own:#?}");
        assert!(own.stdout.contains("--profile"), "{command}: {own:#?}");
    }
    for hidden in ["keeper", "supervisor", "vsock-device", "file-server"] {
        assert!(!help.stdout.contains(&format!("\n  {hidden} ")), "{hidden}: {help:#?}");
    }
    assert!(bench.run(&["--version"]).expect(0).stdout.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_2_and_touches_nothing() {
    let bench = Bench::new();
    let cases: [&[&str]; 13] = [
        &[],
        &["strat"],
        &["-p", "Not A Name", "status"],
        &["-p", "", "status"],
        &["start", "--cpus", "two"],
        &["start", "--accel", "hvf"],
        &["start", "--activate", "--no-activate"],
        &["start", "surplus"],
        &["exec"],
        &["exec", "-e", "=x", "true"],
        &["logs", "-f"],
        &["logs", "console", "-n", "many"],
        &["delete", "--all"],
    ];
    for case in cases {
        bench.run(case).expect(2);
    }
    let mut command = bench.command(&["status"]);
    command.env("DHOW_PROFILE", "../x");
    let outcome = crate::bench::Running::spawn(&mut command).finish();
    assert!(outcome.expect(2).stderr.contains("DHOW_PROFILE"), "{outcome:#?}");
    assert!(!bench.dhow_home().exists());
}

#[test]
fn the_profile_comes_from_the_option_then_from_the_environment() {
    let bench = Bench::new();
    let profile = |args: &[&str], variable: &str| {
        let mut command = bench.command(args);
        command.env("DHOW_PROFILE", variable);
        let outcome = crate::bench::Running::spawn(&mut command).finish();
        let document: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        document["profile"].as_str().unwrap().to_owned()
    };
    assert_eq!(profile(&["status", "--json"], ""), "default");
    assert_eq!(profile(&["status", "--json"], "web"), "web");
    assert_eq!(profile(&["-p", "work", "status", "--json"], "web"), "work");
    assert_eq!(profile(&["status", "--json", "--profile", "work"], "web"), "work");
}

#[test]
fn settings_that_make_no_sense_are_said_and_nothing_is_saved() {
    let bench = Bench::new();
    std::fs::write(bench.home().join("file"), "").unwrap();
    let cases: [(&[&str], &str, &str); 9] = [
        (&["--memory", "5bananas"], "memory: \"bananas\" in \"5bananas\" is not a unit", "4GiB"),
        (&["--memory", "16MiB"], "memory: 16MiB is below the 512MiB", "at least 512MiB"),
        (&["--disk", "1.5GiB"], "disk: \"1.5GiB\" is not a whole number", "4GiB"),
        (&["--cpus", "0"], "cpus: 0 CPUs were asked for", "choose 1 to"),
        (&["--cpus", "-1"], "cpus: -1 CPUs were asked for", "choose 1 to"),
        (&["--mount", "absent"], "cannot share", "make the folder first"),
        (&["--mount", "file"], "it is no folder", "share the folder that it is in"),
        (&["--image", "absent"], "absent is no system image", "make image"),
        (&["--image", "."], "is no system image: its manifest.toml cannot be read", "make image"),
    ];
    for (options, message, hint) in cases {
        let args: Vec<&str> = std::iter::once("start").chain(options.iter().copied()).collect();
        bench.run(&args).expect_error(message, hint);
        assert!(!bench.settings().exists(), "{options:?} were saved");
    }
    bench.run(&["start"]).expect_error("no system image in", "make image");
    assert!(bench.settings().exists());
    assert_eq!(crate::bench::processes_of(&bench.dhow_home()), []);
}

#[test]
fn an_unknown_key_in_the_file_is_named_with_its_line() {
    let bench = Bench::new();
    let text = "# mine\ncpus = 1\nmemroy = '2GiB'\n";
    std::fs::write(bench.settings(), text).unwrap();
    for command in ["start", "restart"] {
        bench
            .run(&[command])
            .expect_error("default.toml, line 3: unknown key `memroy`", "did you mean `memory`?");
    }
    let status = bench.run(&["status"]);
    assert!(status.expect(1).stdout.contains("unknown key `memroy`"), "{status:#?}");
    let list = bench.run(&["list"]);
    assert!(list.expect(0).stdout.contains("unknown key `memroy`"), "{list:#?}");
    assert_eq!(std::fs::read_to_string(bench.settings()).unwrap(), text);
}

#[test]
fn of_nothing_there_is_nothing_to_show() {
    let bench = Bench::new();
    let status = bench.run(&["status"]);
    assert!(status.expect(1).stdout.contains("state      stopped"), "{status:#?}");
    let document = bench.run(&["status", "--json"]);
    let document: serde_json::Value = serde_json::from_str(&document.expect(1).stdout).unwrap();
    assert_eq!(document["state"], "stopped");
    assert!(document["guest"].is_null() && document["processes"].as_array().unwrap().is_empty());

    let list = bench.run(&["list"]);
    assert_eq!((list.expect(0).stdout.as_str(), list.stderr.contains("no profiles yet")), ("", true));
    assert_eq!(bench.run(&["list", "--json"]).expect(0).stdout, "[]\n");
    let logs = bench.run(&["logs"]);
    assert_eq!((logs.expect(0).stdout.as_str(), logs.stderr.contains("no logs yet")), ("", true));
    bench.run(&["logs", "qemu"]).expect_error("there is no log named \"qemu\"", "agent, kernel, dockerd");
    bench.run(&["logs", "../x"]).expect_error("there is no log named \"../x\"", "agent, kernel, dockerd");
    bench.run(&["logs", "dockerd"]).expect_error("is not running", "logs console");

    let stop = bench.run(&["stop"]);
    assert!(stop.expect(0).stdout.contains("is not running"), "{stop:#?}");
    for command in [&["ports"][..], &["mounts"], &["exec", "true"], &["shell"]] {
        bench.run(command).expect_error("the VM of profile default is not running", "`dhow start`");
    }
    bench.run(&["-p", "web", "ports"]).expect_error("profile web", "`dhow -p web start`");
    bench.run(&["delete"]).expect_error("there is no profile default", "dhow list");
    bench.run(&["delete", "--force"]).expect(0);
    let version = bench.run(&["version"]);
    assert_eq!(version.expect(0).stdout, format!("dhow  {}\n", env!("CARGO_PKG_VERSION")));
    assert!(!bench.dhow_home().exists());
}

#[test]
fn a_run_folder_that_others_may_enter_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let bench = Bench::new();
    let run = bench.api_socket().parent().unwrap().parent().unwrap().to_owned();
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o755)).unwrap();
    bench.run(&["status"]).expect_error("is not safe to use: its mode 755 lets others in", "chmod 700");
}

#[test]
fn dhows_own_processes_need_what_the_keeper_hands_over_and_outlive_a_full_log() {
    let bench = Bench::new();
    let device = bench.run(&["vsock-device", "default"]);
    assert!(device.expect(1).stderr.contains("no fd named vhost was handed over"), "{device:#?}");
    // The error cannot be written: that must not end as a panic (101) or an abort.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = bench.command(&["file-server", "/"]);
    command.stderr(full);
    crate::bench::Running::spawn(&mut command).finish().expect(1);
}
