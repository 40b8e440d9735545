//! The unmodified docker CLI against the VM's docker.

use std::fs::File;
use std::time::Duration;

use dhow_guest_tool::{Pattern, Summary};

use dhow_tests::command::Cmd;
use dhow_tests::vm::run_folder;
use dhow_tests::{IMAGE, Pty, SOON, Settings, Vm, cases, wait_for};

cases![Shared: version_and_context, run_has_status_and_streams, run_on_a_terminal, exec_on_a_terminal, build_both_ways,
    logs_follow, copy_both_ways, events_come, attach_with_half_close, attach_in_turns, load_200_mb, many_short_containers];

fn version_and_context(vm: &Vm) {
    let version = vm.docker(&["version", "--format", "{{.Server.Version}} {{.Server.Os}}"]).ok();
    assert!(version.ends_with(" linux"), "{version}");
    assert_eq!(vm.docker(&["context", "show"]).ok(), "dhow");
}

fn run_has_status_and_streams(vm: &Vm) {
    let output = vm.docker_run(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]).run().exits(7);
    assert_eq!((output.text().as_str(), output.stderr.as_str()), ("out\n", "err\n"));
}

/// Asks the shell on `pty` for its terminal's size until it is `size`: docker tells the container a
/// moment after it has begun.
fn wait_for_size(pty: &mut Pty, rows: u16, columns: u16) {
    let size = format!("{rows} {columns}");
    let mut count = 0;
    wait_for(&format!("a terminal of {size}"), SOON, || {
        count += 1;
        // The CLI may not yet listen to its terminal's changes when the container runs.
        pty.resize(rows, columns + 1);
        pty.resize(rows, columns);
        // The shell's echo of this line does not hold what it prints.
        pty.send(&format!("stty size; echo mark$(({count}+0)):\r"));
        let seen = pty.expect(&format!("mark{count}:"));
        if seen.contains(&size) { Ok(()) } else { Err(seen) }
    });
}

fn run_on_a_terminal(vm: &Vm) {
    let mut pty = Pty::spawn(vm.docker(&["run", "--rm", "-it", IMAGE, "sh"]), 33, 77);
    wait_for_size(&mut pty, 33, 77);
    wait_for_size(&mut pty, 44, 88);
    pty.send("tty; exit 6\r");
    pty.expect("/dev/pts/");
    assert_eq!(pty.wait().0, Some(6));
}

fn exec_on_a_terminal(vm: &Vm) {
    let container = vm.container(&[], &["sleep", "1000"]);
    let mut pty = Pty::spawn(vm.docker(&["exec", "-it", &container.name, "sh"]), 21, 91);
    wait_for_size(&mut pty, 21, 91);
    // Ctrl-C ends what runs in the terminal, not the terminal.
    pty.send("sh -c \"echo be''gun; exec sleep 1000\"\r");
    pty.expect("begun");
    pty.send("\u{3}");
    pty.send("echo al''ive; exit 5\r");
    pty.expect("alive");
    assert_eq!(pty.wait().0, Some(5));
    container.sh("exit 9").run().exits(9);
}

fn build_both_ways(vm: &Vm) {
    let context = vm.home().join("build");
    std::fs::create_dir_all(&context).unwrap();
    let dockerfile = format!(
        "FROM {IMAGE}\nARG WORD\nCOPY blob /blob\nRUN echo \"$WORD\" >/word && sha256sum /blob >/sum\nCMD cat /word /sum\n"
    );
    std::fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    let bytes = Pattern::bytes(1, 3_000_000);
    std::fs::write(context.join("blob"), &bytes).unwrap();
    let digest = Summary::of(&bytes).split(' ').nth(1).unwrap().to_owned();
    // BuildKit has a session over the hijacked connection; the plain builder a chunked upload.
    let mut ways = vec!["0"];
    if Settings::get().buildx.is_some() {
        ways.push("1");
    }
    for buildkit in ways {
        let tag = format!("e2e/built{buildkit}");
        let word = format!("WORD=way-{buildkit}");
        let build = vm.docker(&["build", "--build-arg", &word, "-t", &tag, "."]);
        build.cwd(&context).env("DOCKER_BUILDKIT", buildkit).ok();
        let output = vm.docker(&["run", "--rm", &tag]).ok();
        assert_eq!(output, format!("way-{buildkit}\n{digest}  /blob"));
    }
}

fn logs_follow(vm: &Vm) {
    let script = "echo first; until [ -e /go ]; do sleep 0.1; done; echo second; exec sleep 1000";
    let container = vm.container(&[], &["sh", "-c", script]);
    let logs = vm.docker(&["logs", "-f", &container.name]).spawn();
    logs.expect("first");
    assert!(!logs.stdout().contains("second"));
    container.sh("touch /go").ok();
    logs.expect("second");
    vm.docker(&["kill", &container.name]).ok();
    logs.wait().exits(0);
}

fn copy_both_ways(vm: &Vm) {
    let folder = vm.home().join("copy");
    std::fs::create_dir_all(folder.join("in/deep")).unwrap();
    let bytes = Pattern::bytes(2, 1_000_000);
    std::fs::write(folder.join("in/deep/blob"), &bytes).unwrap();
    let container = vm.container(&[], &["sleep", "1000"]);
    let at = |path: &str| format!("{}:{path}", container.name);
    vm.docker(&["cp", "in", &at("/data/")]).cwd(&folder).ok();
    let digest = container.exec(&["sha256sum", "/data/in/deep/blob"]).ok();
    assert_eq!(digest.split(' ').next(), Summary::of(&bytes).split(' ').nth(1));
    vm.docker(&["cp", &at("/data/in"), "out"]).cwd(&folder).ok();
    assert!(std::fs::read(folder.join("out/deep/blob")).unwrap() == bytes);
}

fn events_come(vm: &Vm) {
    let name = "e2e-events";
    let events = vm
        .docker(&["events", "--since", "0", "--filter", "container=e2e-events", "--format", "{{.Action}}."])
        .spawn();
    vm.docker_run(&["--name", name], &["true"]).ok();
    for action in ["create.", "start.", "die.", "destroy."] {
        events.expect(action);
    }
}

fn attach_with_half_close(vm: &Vm) {
    assert_eq!(vm.docker_run(&["-i"], &["cat"]).stdin("x\n").ok(), "x");
    let bytes = Pattern::bytes(3, 3_000_000);
    let output = vm.docker_run(&["-i"], &["cat"]).stdin(bytes.clone()).run().exits(0);
    assert!(output.stdout == bytes, "{} bytes came back of {}", output.stdout.len(), bytes.len());
    // The input ends before the output begins.
    let sum = vm.docker_run(&["-i"], &["sh", "-c", "sha256sum; echo end"]).stdin(bytes.clone()).ok();
    assert_eq!(sum, format!("{}  -\nend", Summary::of(&bytes).split(' ').nth(1).unwrap()));
}

fn attach_in_turns(vm: &Vm) {
    let script = "while read line; do echo \"heard $line\"; done; echo end";
    let mut attached = vm.docker_run(&["-i"], &["sh", "-c", script]).stdin_pipe().spawn();
    for word in ["one", "two"] {
        attached.send(format!("{word}\n").as_bytes());
        attached.expect(&format!("heard {word}"));
    }
    attached.end_stdin();
    attached.wait().exits(0).says("end");
}

/// An archive as `docker save` writes it, with one layer that holds one file of 200 MB.
fn archive_of_200_mb() -> (std::path::PathBuf, String) {
    let folder = run_folder().join("archive");
    let root = folder.join("root");
    std::fs::create_dir_all(&root).unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let sha256 = |file: &std::path::Path| {
        let line = Cmd::new("sha256sum").env("PATH", &path).arg(file).ok();
        line.split(' ').next().unwrap().to_owned()
    };
    let tar = |from: &std::path::Path, to: &str, names: &[&str]| {
        Cmd::new("tar").env("PATH", &path).cwd(from).args(["-cf", to]).args(names).ok();
    };
    std::fs::copy(&Settings::get().busybox, root.join("busybox")).unwrap();
    // The tool is optimized; this suite is not.
    let mut tool = std::process::Command::new(&Settings::get().guest_tool);
    tool.args(["pattern", "4", "200000000"]).stdout(File::create(root.join("blob")).unwrap());
    assert!(tool.status().unwrap().success());
    let blob = sha256(&root.join("blob"));
    tar(&root, "../layer.tar", &["blob", "busybox"]);
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", sha256(&folder.join("layer.tar")))] },
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": ["e2e/large:latest"], "Layers": ["layer.tar"] }]);
    std::fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
    tar(&folder, "archive.tar", &["manifest.json", "config.json", "layer.tar"]);
    std::fs::remove_dir_all(&root).unwrap();
    std::fs::remove_file(folder.join("layer.tar")).unwrap();
    (folder, blob)
}

fn load_200_mb(vm: &Vm) {
    let (folder, digest) = archive_of_200_mb();
    // From a pipe, as `docker save | docker load` does.
    let load = vm.docker(&["load"]).stdin_file(folder.join("archive.tar"));
    load.deadline(Duration::from_secs(400)).run().exits(0).says("e2e/large");
    std::fs::remove_dir_all(folder).unwrap();
    let sum = vm.docker(&["run", "--rm", "e2e/large", "/busybox", "sha256sum", "/blob"]).ok();
    assert_eq!(sum, format!("{digest}  /blob"));
    vm.docker(&["rmi", "e2e/large"]).ok();
}

fn many_short_containers(vm: &Vm) {
    let running: Vec<_> =
        (0..6).map(|number| vm.docker_run(&[], &["echo", &format!("number {number}")]).spawn()).collect();
    for (number, running) in running.into_iter().enumerate() {
        assert_eq!(running.wait().ok(), format!("number {number}"));
    }
}
