//! `dhow version`: of this command, of the agent that runs, and of its docker.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::errors::CommandError;
use super::output::{pairs, print, print_json};
use super::{Format, client};
use crate::config::Paths;

/// How long docker may take to say its version.
const DOCKER_DEADLINE: Duration = Duration::from_secs(4);
/// Most bytes of its answer.
const DOCKER_LIMIT: u64 = 256 << 10;

const HELP: &str = "\
JSON: one object: `dhow`, and `agent`, `kernel`, `docker`, which are null unless the VM runs.

Examples:
  dhow version
  dhow version --json | jq -r .docker";

/// Show the versions of dhow and, where the VM runs, of its agent, kernel and docker.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Serialize)]
struct Document {
    dhow: &'static str,
    agent: Option<String>,
    kernel: Option<String>,
    docker: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    // This command's own version is known, whatever is wrong with the VM.
    let guest = client::status(paths).await.ok().flatten().and_then(|report| report.guest);
    let docker = match &guest {
        Some(_) => {
            tokio::time::timeout(DOCKER_DEADLINE, docker_version(&paths.docker_socket())).await.ok().flatten()
        }
        None => None,
    };
    let (agent, kernel) = guest.map(|guest| (guest.agent, guest.kernel)).unzip();
    let document = Document { dhow: env!("CARGO_PKG_VERSION"), agent, kernel, docker };
    if args.format.json {
        print_json(&document)?;
        return Ok(0);
    }
    let mut lines = vec![("dhow", document.dhow.to_owned())];
    for (name, version) in
        [("agent", document.agent), ("kernel", document.kernel), ("docker", document.docker)]
    {
        lines.extend(version.map(|version| (name, version)));
    }
    print(&pairs(&lines))?;
    Ok(0)
}

/// `GET /version` of docker's API. HTTP/1.0, so that the answer is whole when the connection ends.
async fn docker_version(socket: &Path) -> Option<String> {
    let mut stream = tokio::net::UnixStream::connect(socket).await.ok()?;
    stream.write_all(b"GET /version HTTP/1.0\r\nHost: docker\r\n\r\n").await.ok()?;
    let mut answer = Vec::new();
    stream.take(DOCKER_LIMIT).read_to_end(&mut answer).await.ok()?;
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let value: serde_json::Value = serde_json::from_slice(&answer[body..]).ok()?;
    Some(value.get("Version")?.as_str()?.to_owned())
}
