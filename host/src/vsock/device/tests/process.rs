//! The device as it really runs: a process of its own, confined, with a vhost-user frontend before it.
//!
//! The process is this test binary, started again to run [`device_process`] alone; its settings are environment
//! variables.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

use super::super::control::{FromDevice, ToDevice};
use super::super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::super::queue::Memory;
use super::super::{DeviceArgs, confine, control_socket, run};
use super::guest::{CID, Driver, MEMORY, RING, RX_RING, RxLayout, Stream, TX_RING, pattern};

const FOLDER: &str = "DHOW_TEST_FOLDER";
const DEED: &str = "DHOW_TEST_DEED";
const DEADLINE: Duration = Duration::from_secs(120);

fn seqpacket() -> OwnedFd {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

/// This test binary, to run one test that is a process for others.
pub fn again(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--ignored", "--exact", "--nocapture", &format!("vsock::device::tests::{test}")])
        .stdin(Stdio::null());
    command
}

#[test]
#[ignore = "the process that the other tests start"]
fn device_process() {
    let folder = PathBuf::from(std::env::var(FOLDER).unwrap());
    let control_listener = seqpacket();
    let address = SocketAddrUnix::new(folder.join("control")).unwrap();
    rustix::net::bind(&control_listener, &address).unwrap();
    rustix::net::listen(&control_listener, 8).unwrap();
    let vhost_listener = UnixListener::bind(folder.join("vhost")).unwrap().into();
    run(DeviceArgs { vhost_listener, control_listener, guest_cid: CID }).unwrap();
    println!("served");
}

/// Does one thing after the wall is up.
#[test]
#[ignore = "the process that the other tests start"]
fn confined_process() {
    let deed = std::env::var(DEED).unwrap();
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (answer, answered) = std::sync::mpsc::channel();
    let (trim, told_to_trim) = std::sync::mpsc::channel::<()>();
    // It has an arena of its own.
    let early = std::thread::spawn(move || {
        drop(std::hint::black_box(vec![1_u8; 100]));
        told_to_trim.recv().unwrap();
        confine::free_a_heap();
    });
    confine::prepare().unwrap();
    let other = std::thread::spawn(move || {
        asked.recv().unwrap();
        let opened = std::fs::File::open("/dev/null").is_ok();
        answer.send(opened).unwrap();
    });
    let parent = rustix::process::getppid().unwrap();
    confine::enter().unwrap();
    match deed.as_str() {
        "what it needs" => {
            let large = vec![1_u8; 64 << 20];
            let map: HashMap<u32, u32> = (0..1000).map(|number| (number, number)).collect();
            let now = Instant::now();
            eprintln!("{} {} {:?}", large.len(), map.len(), now.elapsed());
            confine::free_a_heap();
            trim.send(()).unwrap();
            early.join().unwrap();
        }
        "openat" => drop(std::fs::File::open("/dev/null")),
        "openat in another thread" => {
            ask.send(()).unwrap();
            let _ = answered.recv();
        }
        "socket" => drop(UnixStream::pair()),
        "execve" => drop(Command::new("/bin/true").status()),
        "thread" => drop(std::thread::spawn(|| {}).join()),
        "kill" => drop(rustix::process::kill_process(parent, rustix::process::Signal::WINCH)),
        "code" => {
            use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
            let executable = ProtFlags::READ | ProtFlags::EXEC;
            // SAFETY: a new mapping that nobody uses.
            let _ = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, executable, MapFlags::PRIVATE) };
        }
        "ioctl" => drop(rustix::termios::tcgetwinsize(std::io::stdin())),
        "panic" => panic!("on purpose"),
        other => panic!("no such deed: {other}"),
    }
    println!("done");
    drop((other, trim));
}

fn confined(deed: &str) -> Output {
    again("process::confined_process").env(DEED, deed).env("RUST_BACKTRACE", "1").output().unwrap()
}

#[test]
fn a_confined_device_can_do_what_it_needs() {
    let output = confined("what it needs");
    assert!(String::from_utf8_lossy(&output.stdout).contains("done"), "{output:?}");
}

#[test]
fn anything_else_ends_it() {
    let deeds = ["openat", "openat in another thread", "socket", "execve", "thread", "kill", "code", "ioctl"];
    for deed in deeds {
        let output = confined(deed);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{deed}: {output:?}");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("done"), "{deed}: {output:?}");
    }
}

#[test]
fn a_panic_aborts_a_confined_device() {
    let output = confined("panic");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
}

/// A device process with a frontend, a driver and a supervisor.
struct Machine {
    process: Process,
    frontend: Frontend,
    driver: Driver,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    control: OwnedFd,
}

impl Machine {
    fn start(folder: &Path) -> Self {
        let child =
            again("process::device_process").env(FOLDER, folder).stdout(Stdio::piped()).spawn().unwrap();
        let process = Process(child);
        let socket = retry(|| UnixStream::connect(folder.join("vhost")));
        let memfd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, MEMORY as u64).unwrap();
        let file = FileOffset::new(memfd.into(), 0);
        let memory = Memory::from_ranges_with_files([(GuestAddress(0), MEMORY, Some(file))]).unwrap();
        let driver = Driver::new(GuestMemoryAtomic::new(memory), RxLayout::One);
        let eventfds = || [0; 2].map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let control = seqpacket();
        let address = SocketAddrUnix::new(folder.join("control")).unwrap();
        rustix::net::connect(&control, &address).unwrap();
        rustix::io::ioctl_fionbio(&control, true).unwrap();
        let frontend = Frontend::from_stream(socket, 3);
        let mut machine = Self { process, frontend, driver, kicks: eventfds(), calls: eventfds(), control };
        machine.set_up();
        machine
    }

    fn set_up(&mut self) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_features(features).unwrap();
        let (_, cid) = frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
        assert_eq!(cid, CID.to_le_bytes());
        self.set_memory();
        for (index, at) in [RX_RING, TX_RING].into_iter().enumerate() {
            let memory = self.driver.memory.memory();
            let host = |address| memory.get_host_address(GuestAddress(address)).unwrap() as u64;
            let config = VringConfigData {
                queue_max_size: RING,
                queue_size: RING,
                flags: 0,
                desc_table_addr: host(at),
                avail_ring_addr: host(at + 0x4000),
                used_ring_addr: host(at + 0x8000),
                log_addr: None,
            };
            let frontend = &mut self.frontend;
            frontend.set_vring_num(index, RING).unwrap();
            frontend.set_vring_base(index, 0).unwrap();
            frontend.set_vring_addr(index, &config).unwrap();
            frontend.set_vring_call(index, &self.calls[index]).unwrap();
            frontend.set_vring_kick(index, &self.kicks[index]).unwrap();
            frontend.set_vring_enable(index, true).unwrap();
        }
        self.driver.post_all();
    }

    fn set_memory(&mut self) {
        let memory = self.driver.memory.memory();
        let regions: Vec<_> = memory
            .iter()
            .map(|region| {
                let file = region.file_offset().unwrap();
                VhostUserMemoryRegionInfo {
                    guest_phys_addr: region.start_addr().raw_value(),
                    memory_size: region.len(),
                    userspace_addr: memory.get_host_address(region.start_addr()).unwrap() as u64,
                    mmap_offset: file.start(),
                    mmap_handle: file.file().as_raw_fd(),
                }
            })
            .collect();
        self.frontend.set_mem_table(&regions).unwrap();
    }

    fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.driver.collect();
            if let Some(got) = done(self) {
                return got;
            }
            assert!(start.elapsed() < DEADLINE, "no {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..header };
        self.driver.send_raw(&[&header.encode(), payload].concat(), &[44]);
        self.kicks[1].write(1).unwrap();
        self.until("TX chain back", |machine| machine.driver.all_used().then_some(()));
    }

    fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, payload) = self.until("packet", |machine| machine.driver.inbox.pop_front());
        assert_eq!(Op::from_wire(header.op), Some(op));
        (header, payload)
    }

    fn ask(&mut self, message: ToDevice, fd: Option<OwnedFd>) {
        control_socket::send(&self.control, &message.encode(), fd.as_ref().map(AsFd::as_fd)).unwrap();
    }

    fn answer(&mut self) -> FromDevice {
        self.until("answer", |machine| match control_socket::receive(&machine.control) {
            Ok(record) => Some(FromDevice::decode(&record.expect("the device hung up").bytes).unwrap()),
            Err(_) => None,
        })
    }

    fn open(&mut self, id: u32, fd: OwnedFd) -> Stream {
        self.ask(
            ToDevice::Open { id, guest_port: 1000, reply_len: 0, deadline_ms: 600_000, preamble: vec![] },
            None,
        );
        let (request, _) = self.expect(Op::Request);
        let stream = Stream {
            host_port: request.src_port,
            guest_port: 1000,
            buf_alloc: super::guest::BUF_ALLOC,
            fwd_cnt: 0,
        };
        self.send(stream.header(Op::Response), &[]);
        assert!(matches!(self.answer(), FromDevice::Opened { .. }));
        self.ask(ToDevice::Attach { id, group: 0 }, Some(fd));
        assert_eq!(self.answer(), FromDevice::Attached { id });
        stream
    }

    /// Voluntary context switches of all threads: how often the device has gone to sleep.
    fn wakes(&self) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.process.0.id())).unwrap();
        let count = |task: PathBuf| {
            let status = std::fs::read_to_string(task.join("status")).unwrap();
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
            line.split_whitespace().last().unwrap().parse::<u64>().unwrap()
        };
        tasks.map(|task| count(task.unwrap().path())).sum()
    }

    /// Hangs up, waits for the device's end, and returns what it said.
    fn end(self) -> String {
        let Self { mut process, frontend, control, .. } = self;
        drop((frontend, control));
        let mut text = String::new();
        process.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let status = process.0.wait().unwrap();
        assert!(status.success(), "{status:?}");
        text
    }
}

/// Ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Mostly it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn retry<T>(mut what: impl FnMut() -> std::io::Result<T>) -> T {
    let start = Instant::now();
    loop {
        match what() {
            Ok(got) => return got,
            Err(error) => assert!(start.elapsed() < DEADLINE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_confined_device_serves_a_frontend() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(folder.path());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut stream = machine.open(1, theirs.into());
    for round in 0..20_u32 {
        machine.send(stream.header(Op::Rw), &pattern(3000));
        let mut got = vec![0; 3000];
        ours.read_exact(&mut got).unwrap();
        assert_eq!(got, pattern(3000));
        ours.write_all(&pattern(5000)).unwrap();
        let mut got = Vec::new();
        while got.len() < 5000 {
            got.extend(machine.expect(Op::Rw).1);
        }
        assert_eq!(got, pattern(5000));
        stream.fwd_cnt += 5000;
        machine.send(stream.header(Op::CreditUpdate), &[]);
        if round % 5 == 0 {
            // QEMU does so whenever the guest's memory layout changes.
            machine.set_memory();
        }
    }
    // A TCP client, for what is asked of TCP sockets only; it ends first.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = machine.open(2, listener.accept().unwrap().0.into());
    drop(client);
    assert_eq!(machine.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    machine.send(other.shutdown(SHUTDOWN_SEND), &[]);
    assert_eq!(machine.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
    machine.send(other.header(Op::Rst), &[]);
    machine.send(stream.shutdown(SHUTDOWN_BOTH), &[]);
    machine.expect(Op::Rst);
    assert_eq!(ours.read(&mut [0; 10]).unwrap(), 0);
    machine.ask(ToDevice::Stats { id: 9 }, None);
    assert!(matches!(machine.answer(), FromDevice::Stats { stats, .. } if stats.connections == 0));
    assert!(machine.end().contains("served"));
}

/// Nothing to do means no wake-up at all, however many connections there are.
#[test]
fn an_idle_device_sleeps() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(folder.path());
    let mut ends = Vec::new();
    for id in 0..20 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ends.push((machine.open(id, theirs.into()), ours));
    }
    // Whatever is under way comes to its end: then two looks show the same.
    let mut last = machine.wakes();
    let mut quiet = 0;
    machine.until("rest", |machine| {
        std::thread::sleep(Duration::from_millis(50));
        let now = machine.wakes();
        quiet = if now == last { quiet + 1 } else { 0 };
        last = now;
        (quiet == 20).then_some(())
    });
    assert!(machine.driver.inbox.is_empty());
    drop(ends);
    machine.end();
}
