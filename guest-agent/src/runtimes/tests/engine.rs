//! Daemons: started, restarted, replaced, taken back, adopted, stopped.

use super::daemon::{crash, daemon, diary};
use super::*;
use crate::runtimes::store::Role;

fn is_ready(event: &Event, daemon: &str) -> bool {
    matches!(event, Event::Daemon(status) if status.name == daemon && status.state == DaemonState::Ready)
}

fn all(guest: &Guest, state: &DaemonState) -> bool {
    guest.states().iter().all(|(_, now)| now == state)
}

async fn start(guest: &Guest) -> Result<(), String> {
    tokio::time::timeout(DEADLINE, guest.runtimes.start_runtime("test"))
        .await
        .expect("the start does not end")
}

#[tokio::test]
async fn daemons_start_once_and_stop_in_reverse() {
    let guest = Guest::new().await;
    assert!(start(&guest).await.unwrap_err().contains("no runtime test"));
    assert!(guest.runtimes.stop_runtime("test").await.unwrap_err().contains("no runtime test"));
    assert!(guest.runtimes.start_runtime("../x").await.is_err());
    let config = guest.root.path().join("normal");
    std::fs::write(&config, "normal").unwrap();
    std::fs::write(guest.root.path().join("end"), "everything").unwrap();
    let keys = format!(
        "config = {config:?}\nend_config = {:?}\nend_path = \"/\"\nend_text = \"everything\"\n",
        guest.root.path().join("end")
    );
    let daemons = daemon(&guest, "first", "") + &daemon(&guest, "second", &keys);
    let image = image("1", &daemons);
    guest.installed(&image).await;
    assert_eq!(start(&guest).await, Ok(()));
    let ready = DaemonState::Ready;
    assert_eq!(guest.states(), [("first".to_owned(), ready.clone()), ("second".to_owned(), ready)]);
    assert_eq!(guest.store.digest("test", Role::Good), Some(digest_of(&image)));
    assert!(guest.store.seen("test").join("bundle.toml").exists());
    assert_eq!(start(&guest).await, Ok(()));
    assert_eq!(guest.launch.count(), 2);

    assert_eq!(guest.runtimes.stop_runtime("test").await, Ok(()));
    assert!(all(&guest, &DaemonState::Stopped));
    assert_eq!(diary(&guest), "second ended with everything\nfirst ended with \n");
    assert_eq!(guest.runtimes.stop_runtime("test").await, Ok(()));
    assert_eq!(start(&guest).await, Ok(()));
    assert_eq!(guest.launch.count(), 4);
    guest.runtimes.stop_all().await;
    assert!(all(&guest, &DaemonState::Stopped));
    assert!(guest.store.mount_folders("test").is_empty());
}

#[tokio::test]
async fn one_that_ends_is_started_again() {
    let mut guest = Guest::new().await;
    guest.installed(&image("1", &daemon(&guest, "first", ""))).await;
    assert_eq!(start(&guest).await, Ok(()));
    guest.event(|event| is_ready(event, "first")).await;
    crash(&guest, "first").await;
    let warning = guest.event(|event| matches!(event, Event::Warning(_))).await;
    let Event::Warning(warning) = warning else { panic!() };
    assert!(warning.contains("first ended with exit status 3"), "{warning}");
    assert!(warning.contains("asked to exit"), "{warning}");
    guest
        .event(|event| matches!(event, Event::Daemon(status) if status.state == DaemonState::BackingOff))
        .await;
    guest.event(|event| is_ready(event, "first")).await;
    let status = guest.runtimes.statuses().remove(0);
    assert_eq!((status.state, status.restarts), (DaemonState::Ready, 1));
    guest.runtimes.stop_all().await;
}

#[tokio::test]
async fn one_that_cannot_start_is_reported_with_its_log() {
    let guest = Guest::new().await;
    let broken = "[[daemon]]\nname = \"broken\"\nargv = [\"/bin/sh\", \"-c\", \"echo '\\u001b[31mno such key'; exit 7\"]\nready_socket = \"/no/such/socket\"\n";
    guest.installed(&image("1", &(daemon(&guest, "first", "") + broken))).await;
    let reason = start(&guest).await.unwrap_err();
    assert!(reason.contains("broken ended with exit status 7 before it answered"), "{reason}");
    assert!(reason.contains("\\u{1b}[31mno such key"), "{reason}");
    assert!(guest.states().contains(&("broken".to_owned(), DaemonState::Failed(reason))));
    assert_eq!(guest.store.digest("test", Role::Good), None);
    let missing = broken.replace("/bin/sh", "/no/such/program");
    guest.installed(&image("2", &missing)).await;
    let reason = start(&guest).await.unwrap_err();
    assert!(reason.contains("broken cannot be started") && reason.contains("/no/such/program"), "{reason}");
    assert_eq!(guest.runtimes.stop_runtime("test").await, Ok(()));
    assert!(all(&guest, &DaemonState::Stopped));
}

#[tokio::test]
async fn another_version_takes_over_and_a_broken_one_is_taken_back() {
    let mut guest = Guest::new().await;
    let config = guest.root.path().join("normal");
    std::fs::write(&config, "normal").unwrap();
    std::fs::write(guest.root.path().join("end"), "everything").unwrap();
    let keys = format!(
        "config = {config:?}\nend_config = {:?}\nend_path = \"/\"\nend_text = \"everything\"\n",
        guest.root.path().join("end")
    );
    let sound = daemon(&guest, "first", &keys);
    let (one, two) = (image("1", &sound), image("2", &sound));
    guest.installed(&one).await;
    assert_eq!(start(&guest).await, Ok(()));
    guest.installed(&two).await;
    // Until its start the one before runs on and is seen.
    let seen = |guest: &Guest| std::fs::read_to_string(guest.store.seen("test").join("bundle.toml")).unwrap();
    assert!(seen(&guest).contains("version = \"1\""));
    assert_eq!(start(&guest).await, Ok(()));
    assert!(seen(&guest).contains("version = \"2\""));
    // What it serves was left running.
    assert_eq!(diary(&guest), "first ended with normal\n");
    assert_eq!(guest.store.mount_folders("test"), [guest.store.mount_folder("test", digest_of(&two))]);

    let broken = "[[daemon]]\nname = \"first\"\nargv = [\"/bin/sh\", \"-c\", \"echo flawed; exit 1\"]\nready_socket = \"/no/such/socket\"\n";
    guest.installed(&image("3", broken)).await;
    assert_eq!(start(&guest).await, Ok(()));
    assert!(seen(&guest).contains("version = \"2\""));
    assert!(all(&guest, &DaemonState::Ready));
    let is_told = |event: &Event| matches!(event, Event::Warning(text) if text.contains("runs again"));
    let Event::Warning(warning) = guest.event(is_told).await else { panic!() };
    assert!(warning.contains("flawed"), "{warning}");
    let roles = [Role::Installed, Role::Good].map(|role| guest.store.digest("test", role));
    assert_eq!(roles, [Some(digest_of(&two)); 2]);
    guest.runtimes.stop_all().await;
}

#[tokio::test]
async fn a_stop_interrupts_a_start_that_waits() {
    let guest = Guest::new().await;
    let mute = "[[daemon]]\nname = \"mute\"\nargv = [\"/bin/sleep\", \"1000\"]\nready_socket = \"/no/such/socket\"\n";
    guest.installed(&image("1", mute)).await;
    let runtimes = Arc::clone(&guest.runtimes);
    let starting = tokio::spawn(async move { runtimes.start_runtime("test").await });
    while guest.launch.count() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(guest.states(), [("mute".to_owned(), DaemonState::Starting)]);
    assert_eq!(guest.runtimes.stop_runtime("test").await, Ok(()));
    assert!(starting.await.unwrap().unwrap_err().contains("being stopped"));
    assert!(all(&guest, &DaemonState::Stopped));
}

#[tokio::test]
async fn a_new_worker_adopts_what_runs_and_starts_what_does_not() {
    let mut guest = Guest::new().await;
    guest.installed(&image("1", &(daemon(&guest, "first", "") + &daemon(&guest, "second", "")))).await;
    assert_eq!(start(&guest).await, Ok(()));
    guest.restart_worker().await;
    assert_eq!(start(&guest).await, Ok(()));
    assert_eq!(guest.launch.count(), 2);
    // Nobody tells this worker of the end but the pidfd.
    crash(&guest, "second").await;
    guest
        .event(|event| matches!(event, Event::Daemon(status) if status.state == DaemonState::BackingOff))
        .await;
    guest.event(|event| is_ready(event, "second")).await;
    assert_eq!(guest.launch.count(), 3);
    // One ends while no worker runs.
    crash(&guest, "first").await;
    while guest.launch.children().len() == 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    guest.restart_worker().await;
    assert_eq!(start(&guest).await, Ok(()));
    assert!(all(&guest, &DaemonState::Ready));
    guest.runtimes.stop_all().await;
}

#[tokio::test]
async fn a_stop_in_which_the_worker_died_is_gone_on_with() {
    let mut guest = Guest::new().await;
    guest.installed(&image("1", &daemon(&guest, "first", ""))).await;
    assert_eq!(start(&guest).await, Ok(()));
    guest.store.forget("test").unwrap();
    guest.restart_worker().await;
    while !guest.launch.children().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(diary(&guest), "first ended with \n");
    assert_eq!(guest.states(), []);
    assert_eq!(start(&guest).await, Ok(()));
    guest.runtimes.stop_all().await;
}
