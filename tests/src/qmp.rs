//! QEMU's monitor, asked between what Dhow asks of it: one connection a command.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use super::vm::Vm;

const DEADLINE: Duration = Duration::from_secs(30);

/// What a command of QMP returns.
///
/// # Panics
/// When QEMU does not answer, or refuses.
pub fn execute(vm: &Vm, command: &str, arguments: &Value) -> Value {
    let mut socket = UnixStream::connect(vm.run("qmp.sock")).expect("QEMU's monitor");
    socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    let mut lines = BufReader::new(socket.try_clone().expect("a second handle")).lines();
    let mut answer = |socket: &mut UnixStream, request: Option<Value>| -> Value {
        if let Some(request) = request {
            writeln!(socket, "{request}").expect("a request to QEMU");
        }
        loop {
            let line = lines.next().expect("an answer of QEMU").expect("an answer of QEMU");
            let answer: Value = serde_json::from_str(&line).expect("JSON");
            if answer.get("event").is_none() {
                return answer;
            }
        }
    };
    answer(&mut socket, None);
    answer(&mut socket, Some(json!({ "execute": "qmp_capabilities" })));
    let answer = answer(&mut socket, Some(json!({ "execute": command, "arguments": arguments })));
    assert!(answer.get("error").is_none(), "{command}: {answer}");
    answer["return"].clone()
}

/// Runs a command of the human monitor, which says nothing when it succeeds.
///
/// # Panics
/// When it does say something.
pub fn monitor(vm: &Vm, line: &str) {
    let said = execute(vm, "human-monitor-command", &json!({ "command-line": line }));
    assert_eq!(said, json!(""), "{line}");
}
