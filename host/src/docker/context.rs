//! Makes the profile's docker context, makes it current, and restores the one before.
//!
//! Docker is somebody else's: whatever goes wrong here is a notice, never a failed start. The
//! previous context is written down before the switch, so that a crash in between loses nothing.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::cli::{CliError, DockerCli};

/// The profile that is there unless another one is named.
const DEFAULT_PROFILE: &str = "default";
/// Docker's own context, which always exists.
const DOCKER_DEFAULT: &str = "default";

/// A profile's docker context: `dhow`, or `dhow-PROFILE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextName(String);

impl ContextName {
    /// The context of the profile named `profile`.
    #[must_use]
    pub fn of_profile(profile: &str) -> Self {
        Self(if profile == DEFAULT_PROFILE { "dhow".into() } else { format!("dhow-{profile}") })
    }

    /// As docker writes it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContextName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What became of the context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Activation {
    /// Its name.
    pub context: ContextName,
    /// It is there and points at the socket.
    pub exists: bool,
    /// `docker` without further ado uses it (unless a notice says otherwise).
    pub current: bool,
    /// What a person should know, with a hint.
    pub notices: Vec<String>,
}

/// Creates or updates the context so that it points at `socket`; with `make_current` switches to
/// it, after the context before was noted in `state_file`.
pub async fn activate(profile: &str, socket: &Path, state_file: &Path, make_current: bool) -> Activation {
    let overriding = ["DOCKER_HOST", "DOCKER_CONTEXT"]
        .into_iter()
        .filter(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    let overriding: Vec<_> = overriding.collect();
    activate_with(&DockerCli::of_user(), profile, socket, state_file, make_current, &overriding).await
}

/// Switches back to the context that [`activate`] noted, if ours is still the current one. Returns
/// what a person should know.
pub async fn deactivate(profile: &str, state_file: &Path) -> Vec<String> {
    notices(deactivate_with(&DockerCli::of_user(), profile, state_file).await)
}

/// Removes the profile's context: the profile is deleted. Returns what a person should know.
pub async fn remove(profile: &str, state_file: &Path) -> Vec<String> {
    notices(remove_with(&DockerCli::of_user(), profile, state_file).await)
}

fn notices(result: Result<(), ContextError>) -> Vec<String> {
    match result {
        // Without docker there is no context to restore.
        Ok(()) | Err(ContextError::Cli(CliError::Missing)) => Vec::new(),
        Err(error) => vec![error.to_notice()],
    }
}

#[derive(Debug, thiserror::Error)]
enum ContextError {
    #[error(transparent)]
    Cli(#[from] CliError),
    #[error("the previous docker context cannot be noted in {path}: {source}")]
    State { path: String, source: io::Error },
    #[error("the socket's path is not UTF-8, which docker needs: {0}")]
    Path(String),
}

impl ContextError {
    fn to_notice(&self) -> String {
        match self {
            Self::Cli(CliError::Run(source)) => format!("{self}: {source}"),
            _ => self.to_string(),
        }
    }
}

async fn activate_with(
    cli: &DockerCli,
    profile: &str,
    socket: &Path,
    state_file: &Path,
    make_current: bool,
    overriding: &[&str],
) -> Activation {
    let context = ContextName::of_profile(profile);
    let mut activation = Activation { context, exists: false, current: false, notices: Vec::new() };
    match switch(cli, &mut activation, socket, state_file, make_current).await {
        Ok(()) => {}
        Err(ContextError::Cli(CliError::Missing)) => activation.notices.push(format!(
            "there is no `docker` command on this host: install the docker CLI, or point other clients at \
             unix://{}",
            socket.display()
        )),
        Err(error) => activation.notices.push(format!(
            "{}: use DOCKER_HOST=unix://{} instead of the docker context",
            error.to_notice(),
            socket.display()
        )),
    }
    if make_current && activation.current {
        for name in overriding {
            activation.notices.push(format!(
                "{name} is set and overrides the docker context `{}`: `unset {name}` to use it",
                activation.context
            ));
        }
    }
    activation
}

async fn switch(
    cli: &DockerCli,
    activation: &mut Activation,
    socket: &Path,
    state_file: &Path,
    make_current: bool,
) -> Result<(), ContextError> {
    let context = activation.context.as_str().to_owned();
    let socket = socket.to_str().ok_or_else(|| ContextError::Path(socket.display().to_string()))?;
    let endpoint = format!("host=unix://{socket}");
    let known = exists(cli, &context).await?;
    let verb = if known { "update" } else { "create" };
    cli.run(&["context", verb, "--description", "Dhow", "--docker", &endpoint, &context]).await?;
    activation.exists = true;
    if make_current {
        let before = cli.run(&["context", "show"]).await?;
        if before != context {
            write_state(state_file, &before)?;
            cli.run(&["context", "use", &context]).await?;
        }
        activation.current = true;
    }
    Ok(())
}

async fn deactivate_with(cli: &DockerCli, profile: &str, state_file: &Path) -> Result<(), ContextError> {
    let context = ContextName::of_profile(profile);
    let Ok(before) = fs::read_to_string(state_file) else {
        // Never switched, or switched back already.
        return Ok(());
    };
    let before = before.trim();
    // Somebody who has chosen another context since keeps it.
    if cli.run(&["context", "show"]).await? == context.as_str() {
        let still_there = !before.is_empty() && exists(cli, before).await?;
        cli.run(&["context", "use", if still_there { before } else { DOCKER_DEFAULT }]).await?;
    }
    match fs::remove_file(state_file) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ContextError::State { path: state_file.display().to_string(), source })
        }
        _ => Ok(()),
    }
}

async fn remove_with(cli: &DockerCli, profile: &str, state_file: &Path) -> Result<(), ContextError> {
    deactivate_with(cli, profile, state_file).await?;
    let context = ContextName::of_profile(profile);
    if exists(cli, context.as_str()).await? {
        if cli.run(&["context", "show"]).await? == context.as_str() {
            cli.run(&["context", "use", DOCKER_DEFAULT]).await?;
        }
        cli.run(&["context", "rm", context.as_str()]).await?;
    }
    Ok(())
}

async fn exists(cli: &DockerCli, context: &str) -> Result<bool, CliError> {
    let names = cli.run(&["context", "ls", "--format", "{{.Name}}"]).await?;
    Ok(names.lines().any(|name| name.trim() == context))
}

/// Writes the state whole or not at all.
fn write_state(path: &Path, context: &str) -> Result<(), ContextError> {
    let write = || {
        let new = path.with_extension("new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(context.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(|source| ContextError::State { path: path.display().to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    struct Bench {
        folder: tempfile::TempDir,
        cli: DockerCli,
    }

    impl Bench {
        /// With the real docker CLI and a configuration of its own; none where there is no CLI.
        async fn new() -> Option<Self> {
            let folder = tempfile::tempdir().unwrap();
            let cli = DockerCli::for_test("docker", folder.path());
            if let Err(error) = cli.run(&["context", "ls"]).await {
                eprintln!("skipped: {error}");
                return None;
            }
            Some(Self { folder, cli })
        }

        fn state(&self) -> PathBuf {
            self.folder.path().join("previous-context")
        }

        async fn activate(&self, profile: &str, socket: &str, make_current: bool) -> Activation {
            activate_with(&self.cli, profile, Path::new(socket), &self.state(), make_current, &[]).await
        }

        async fn current(&self) -> String {
            self.cli.run(&["context", "show"]).await.unwrap()
        }
    }

    #[tokio::test]
    async fn a_context_is_made_updated_used_and_left() {
        let Some(bench) = Bench::new().await else { return };
        bench.cli.run(&["context", "create", "mine", "--docker", "host=unix:///x"]).await.unwrap();
        bench.cli.run(&["context", "use", "mine"]).await.unwrap();
        let first = bench.activate("default", "/one.sock", false).await;
        assert_eq!((first.exists, first.current, first.notices.len()), (true, false, 0));
        assert_eq!(bench.current().await, "mine");

        // Twice, as two starts without a stop: what was before must not be forgotten.
        for socket in ["/two.sock", "/three.sock"] {
            let used = bench.activate("default", socket, true).await;
            assert_eq!((used.current, used.notices), (true, vec![]));
        }
        assert_eq!(bench.current().await, "dhow");
        let endpoint = "{{.Endpoints.docker.Host}}";
        let host = bench.cli.run(&["context", "inspect", "dhow", "--format", endpoint]).await.unwrap();
        assert_eq!(host, "unix:///three.sock");

        deactivate_with(&bench.cli, "default", &bench.state()).await.unwrap();
        assert_eq!(bench.current().await, "mine");
        assert!(!bench.state().exists());
        deactivate_with(&bench.cli, "default", &bench.state()).await.unwrap();
    }

    #[tokio::test]
    async fn another_choice_is_kept_and_a_lost_one_becomes_the_default() {
        let Some(bench) = Bench::new().await else { return };
        bench.activate("web", "/x.sock", true).await;
        assert_eq!(bench.current().await, "dhow-web");
        bench.cli.run(&["context", "create", "other", "--docker", "host=unix:///x"]).await.unwrap();
        bench.cli.run(&["context", "use", "other"]).await.unwrap();
        deactivate_with(&bench.cli, "web", &bench.state()).await.unwrap();
        assert_eq!(bench.current().await, "other");

        bench.activate("web", "/x.sock", true).await;
        bench.cli.run(&["context", "rm", "other"]).await.unwrap();
        remove_with(&bench.cli, "web", &bench.state()).await.unwrap();
        assert_eq!(bench.current().await, "default");
        assert!(!exists(&bench.cli, "dhow-web").await.unwrap());
    }

    #[tokio::test]
    async fn what_is_in_the_way_is_a_notice() {
        let folder = tempfile::tempdir().unwrap();
        let none = DockerCli::for_test("dhow-no-such-docker", folder.path());
        let state = folder.path().join("state");
        let missing = activate_with(&none, "default", Path::new("/x.sock"), &state, true, &[]).await;
        assert!(!missing.exists && missing.notices[0].contains("install the docker CLI"));
        assert!(notices(deactivate_with(&none, "default", &state).await).is_empty());

        let failing = DockerCli::for_test("false", folder.path());
        let failed = activate_with(&failing, "default", Path::new("/x.sock"), &state, true, &[]).await;
        assert!(failed.notices[0].contains("DOCKER_HOST=unix:///x.sock"), "{:?}", failed.notices);

        if let Some(bench) = Bench::new().await {
            let socket = Path::new("/x.sock");
            let shadowed =
                activate_with(&bench.cli, "default", socket, &bench.state(), true, &["DOCKER_HOST"]).await;
            assert!(shadowed.notices[0].contains("`unset DOCKER_HOST`"));
        }
    }
}
