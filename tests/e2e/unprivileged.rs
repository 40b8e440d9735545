//! The whole way as an ordinary user.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;

use dhow_tests::net::free_port;
use dhow_tests::{SOON, Vm, cases, wait_for};

cases![Own: an_ordinary_user];

/// A user that owns nothing else on any machine.
const USER: u32 = 64_321;

fn an_ordinary_user() {
    let mut vm = Vm::new();
    if nix::unistd::geteuid().is_root() {
        vm.become_user(USER);
    }
    vm.start(&[]);
    assert!(vm.processes().len() >= 5, "{:?}", vm.processes());
    // A process that may not be looked into has files of root's in /proc; its status tells.
    for process in vm.processes() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:\t")).unwrap_or_default();
        assert!(!uid.starts_with("0\t"), "{} runs as root", process.line);
    }
    vm.import_image();
    let volume = format!("{}:/home", vm.home().display());
    let script = "echo written >/home/file && chown 5:5 /home/file && id -u";
    assert_eq!(vm.docker_run(&["-v", &volume], &["sh", "-c", script]).ok(), "0");
    let file = vm.home().join("file");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "written\n");
    assert_eq!(file.metadata().unwrap().uid(), vm.home().metadata().unwrap().uid());

    let port = free_port();
    let publish = [format!("{port}:80"), "80:80".to_owned()];
    let script = "mkdir /www && echo served >/www/index.html && exec httpd -f -h /www";
    let container = vm.container(&["-p", &publish[0], "-p", &publish[1]], &["sh", "-c", script]);
    wait_for("the page", SOON, || page(port));
    // Where ordinary users may bind it, it is forwarded; else the reason is told.
    let start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    if start.trim().parse::<u32>().unwrap() > 80 {
        let listed = vm.dhow(&["ports"]).ok();
        assert!(listed.contains("privilege"), "{listed}");
        let log = std::fs::read_to_string(vm.data("log/keeper.log")).unwrap();
        let told = |line: &str| line.contains("not forwarded") && line.contains("127.0.0.1:80 ");
        assert!(log.lines().any(told), "nothing about port 80 in the log:\n{log}");
    } else {
        wait_for("the page at port 80", SOON, || page(80));
    }
    drop(container);
    vm.stop();
}

/// The page that the container serves at `port` of the host.
fn page(port: u16) -> Result<(), String> {
    let mut stream = dhow_tests::net::connect(dhow_tests::net::local(port));
    let mut page = String::new();
    let got = stream.write_all(b"GET / HTTP/1.0\r\n\r\n").and_then(|()| stream.read_to_string(&mut page));
    if page.ends_with("served\n") { Ok(()) } else { Err(format!("{got:?} {page:?}")) }
}
