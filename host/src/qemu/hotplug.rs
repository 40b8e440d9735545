//! Replaces the vsock device of a running QEMU: the dead one is unplugged, a new one plugged in.
//!
//! Only for a device whose process has *ended*. One that is merely stopped would still write into the
//! guest's memory when it goes on, and `device_del` waits for it for ever.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::command::{VSOCK_CHARDEV, VSOCK_DRIVER, VSOCK_ID, VSOCK_PORT};
use super::qmp::{Qmp, QmpError};

/// How long the guest may take to let go of the device; under emulation a busy one takes seconds.
const UNPLUG_DEADLINE: Duration = Duration::from_secs(30);
/// After that long the guest is asked again: one that is booting may have missed it.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Between two looks at whether QEMU has let go of the chardev.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Why the device was not replaced.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// QEMU did not do it.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest did not let go.
    #[error("the guest did not let go of the dead vsock device within {} s", UNPLUG_DEADLINE.as_secs())]
    Unplug,
}

/// Takes the dead device out, as far as it is in. May be repeated after a failure.
///
/// # Errors
/// As [`HotplugError`] says.
pub async fn unplug_vsock(qmp: &mut Qmp) -> Result<(), HotplugError> {
    let end = Instant::now() + UNPLUG_DEADLINE;
    while is_plugged(qmp).await? {
        match qmp.execute("device_del", json!({ "id": VSOCK_ID })).await {
            // Refused also where an earlier request is still under way.
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let ours = |data: &Value| data["device"] == VSOCK_ID;
        if qmp.event("DEVICE_DELETED", ours, ASK_AGAIN).await?.is_none() && Instant::now() >= end {
            return Err(HotplugError::Unplug);
        }
    }
    // The device lets go of its chardev a moment after the event.
    while has_chardev(qmp).await? {
        match qmp.execute("chardev-remove", json!({ "id": VSOCK_CHARDEV })).await {
            Ok(_) => return Ok(()),
            Err(QmpError::Refused { .. }) if Instant::now() < end => tokio::time::sleep(LOOK_AGAIN).await,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Plugs in the device whose process listens on `socket`. Nothing of it is left in QEMU after a failure
/// that QEMU could answer to; [`unplug_vsock`] cleans up after the others.
///
/// # Errors
/// As [`HotplugError`] says.
pub async fn plug_vsock(qmp: &mut Qmp, socket: &Path) -> Result<(), HotplugError> {
    let address = json!({ "type": "unix", "data": { "path": socket } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    qmp.execute("chardev-add", json!({ "id": VSOCK_CHARDEV, "backend": backend })).await?;
    let device =
        json!({ "driver": VSOCK_DRIVER, "id": VSOCK_ID, "bus": VSOCK_PORT, "chardev": VSOCK_CHARDEV });
    let Err(error) = qmp.execute("device_add", device).await else { return Ok(()) };
    if matches!(error, QmpError::Refused { .. }) {
        let removed = qmp.execute("chardev-remove", json!({ "id": VSOCK_CHARDEV })).await;
        tracing::debug!(?removed, "chardev of a device that was refused");
    }
    Err(error.into())
}

/// Whether there is a vsock device, dead or alive.
///
/// # Errors
/// As [`QmpError`] says.
pub async fn is_plugged(qmp: &mut Qmp) -> Result<bool, QmpError> {
    let devices = qmp.execute("qom-list", json!({ "path": "/machine/peripheral" })).await?;
    Ok(names(&devices, "name", VSOCK_ID))
}

async fn has_chardev(qmp: &mut Qmp) -> Result<bool, QmpError> {
    let chardevs = qmp.execute("query-chardev", json!({})).await?;
    Ok(names(&chardevs, "label", VSOCK_CHARDEV))
}

fn names(list: &Value, member: &str, wanted: &str) -> bool {
    list.as_array().is_some_and(|list| list.iter().any(|entry| entry[member] == wanted))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    /// As much of QEMU as these commands see of it.
    #[derive(Debug, Default)]
    struct Machine {
        device: bool,
        chardev: bool,
        /// So many more `chardev-remove` are refused: the device still holds it.
        busy: u32,
        /// `device_add` is refused.
        refuses: bool,
        log: Vec<String>,
    }

    impl Machine {
        /// What QEMU says to a command: lines, the event before or after the answer.
        fn answer(&mut self, command: &Value) -> Vec<Value> {
            let name = command["execute"].as_str().unwrap().to_owned();
            let refuse = |desc: &str| vec![json!({"error": {"class": "GenericError", "desc": desc}})];
            let done = json!({"return": {}});
            self.log.push(name.clone());
            match name.as_str() {
                "qom-list" if self.device => vec![json!({"return": [{"name": "vsock", "type": "child<x>"}]})],
                "query-chardev" if self.chardev => vec![json!({"return": [{"label": "vsock0"}]})],
                "qom-list" | "query-chardev" => vec![json!({"return": [{"name": "x", "label": "qmp"}]})],
                "device_del" => {
                    self.device = false;
                    let event = json!({"event": "DEVICE_DELETED", "data": {"device": "vsock", "path": "/x"}});
                    let other = json!({"event": "DEVICE_DELETED", "data": {"path": "/x/bus"}});
                    vec![other, event, done]
                }
                "chardev-remove" if self.busy > 0 => {
                    self.busy -= 1;
                    refuse("Chardev 'vsock0' is busy")
                }
                "chardev-remove" => {
                    self.chardev = false;
                    vec![done]
                }
                "chardev-add" if self.chardev => refuse("Chardev with id 'vsock0' already exists"),
                "chardev-add" => {
                    self.chardev = true;
                    vec![done]
                }
                "device_add" if self.refuses => refuse("Failed to connect"),
                "device_add" => {
                    self.device = true;
                    vec![done]
                }
                _ => vec![done],
            }
        }
    }

    async fn serve(stream: UnixStream, machine: Arc<Mutex<Machine>>) {
        let (reader, mut writer) = stream.into_split();
        writer.write_all(b"{\"QMP\":{}}\n").await.unwrap();
        let mut lines = BufReader::new(reader).lines();
        while let Some(line) = lines.next_line().await.unwrap() {
            let answers = machine.lock().unwrap().answer(&serde_json::from_str(&line).unwrap());
            for answer in answers {
                writer.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
            }
        }
    }

    async fn qemu(machine: Machine) -> (Qmp, Arc<Mutex<Machine>>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let machine = Arc::new(Mutex::new(machine));
        let served = Arc::clone(&machine);
        tokio::spawn(async move { serve(listener.accept().await.unwrap().0, served).await });
        (Qmp::connect(&socket, Duration::from_secs(30)).await.unwrap(), machine)
    }

    #[tokio::test]
    async fn a_dead_device_is_replaced() {
        let (mut qmp, machine) =
            qemu(Machine { device: true, chardev: true, busy: 2, ..Machine::default() }).await;
        unplug_vsock(&mut qmp).await.unwrap();
        plug_vsock(&mut qmp, Path::new("/run/device.sock")).await.unwrap();
        let machine = machine.lock().unwrap();
        assert!(machine.device && machine.chardev);
        let commands: Vec<_> = machine
            .log
            .iter()
            .filter(|name| name.starts_with("device") || name.starts_with("chardev"))
            .collect();
        let remove = "chardev-remove";
        assert_eq!(commands, ["device_del", remove, remove, remove, "chardev-add", "device_add"]);
    }

    #[tokio::test]
    async fn what_an_earlier_attempt_left_is_taken_up() {
        for (device, chardev) in [(false, true), (false, false)] {
            let (mut qmp, machine) = qemu(Machine { device, chardev, ..Machine::default() }).await;
            unplug_vsock(&mut qmp).await.unwrap();
            let machine = machine.lock().unwrap();
            assert!(!machine.chardev);
            assert!(!machine.log.contains(&"device_del".to_owned()));
        }
    }

    #[tokio::test]
    async fn a_refused_device_leaves_no_chardev() {
        let (mut qmp, machine) = qemu(Machine { refuses: true, ..Machine::default() }).await;
        let error = plug_vsock(&mut qmp, Path::new("/run/device.sock")).await.unwrap_err();
        assert!(error.to_string().contains("Failed to connect"), "{error}");
        assert!(!machine.lock().unwrap().chardev);
    }
}
