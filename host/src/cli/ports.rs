//! `dhow ports`: listening sockets of the guest and where they are on the host.

use std::net::SocketAddr;

use dhow_protocol::ports::{Listener, Protocol};
use serde::Serialize;

use super::Format;
use super::client::{self, ANSWER_DEADLINE};
use super::errors::CommandError;
use super::output::{escape, print, print_json, table};
use crate::api::{ApiReply, ApiRequest, ForwardReport};
use crate::config::Paths;

const HELP: &str = "\
JSON: one array of objects: `protocol` (tcp, udp), `guest` (\"ADDRESS:PORT\"), `host` (\"ADDRESS:PORT\",
null where it is not forwarded), `reason` (why not). With --watch one array a line at each change.

Examples:
  dhow ports
  dhow ports --watch
  dhow ports --json | jq -r '.[].host'";

/// List the VM's listening ports and where they are on the host.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Go on with what comes (+) and goes (-) [default: list once]
    #[arg(short = 'f', long)]
    watch: bool,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, Serialize)]
struct Entry {
    protocol: &'static str,
    guest: SocketAddr,
    host: Option<SocketAddr>,
    reason: Option<String>,
}

impl From<&ForwardReport> for Entry {
    fn from(report: &ForwardReport) -> Self {
        let Listener { protocol, address, port } = report.guest;
        let protocol = match protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        let reason = report.reason.clone();
        Self { protocol, guest: SocketAddr::new(address, port), host: report.host, reason }
    }
}

impl Entry {
    fn host(&self) -> String {
        self.host.map_or_else(|| "-".to_owned(), |host| host.to_string())
    }

    fn row(&self) -> Vec<String> {
        let reason = self.reason.clone().unwrap_or_default();
        vec![self.protocol.to_owned(), self.guest.to_string(), self.host(), reason]
    }

    fn line(&self, sign: char) -> String {
        let reason =
            self.reason.as_deref().map(|reason| format!(" ({})", escape(reason))).unwrap_or_default();
        format!("{sign} {} {} -> {}{reason}\n", self.protocol, self.guest, self.host())
    }
}

/// Runs the command.
///
/// # Errors
/// As [`CommandError`] says.
pub async fn run(args: Args, paths: &Paths) -> Result<u8, CommandError> {
    let request = ApiRequest::Ports { watch: args.watch };
    let (mut reply, mut connection) = client::open(paths, &request, ANSWER_DEADLINE).await?;
    let mut before = Vec::new();
    loop {
        let ApiReply::Ports(mut reports) = reply else {
            return Err(CommandError::Kind);
        };
        // One listener may be at several places of the host.
        reports.sort_by_key(|report| (report.guest, report.host));
        if args.format.json {
            print_json(&reports.iter().map(Entry::from).collect::<Vec<_>>())?;
        } else if args.watch {
            print(&changes(&before, &reports))?;
            before = reports;
        } else {
            let rows: Vec<_> = reports.iter().map(|report| Entry::from(report).row()).collect();
            print(&table(&["PROTOCOL", "GUEST", "HOST", "WHY NOT"], &rows))?;
        }
        if !args.watch {
            return Ok(0);
        }
        reply = match connection.next(paths).await {
            // The VM was stopped: there are no more changes.
            Err(CommandError::Gone) => return Ok(0),
            reply => reply?,
        };
    }
}

/// One line for each that went or came; one that changed does both.
fn changes(before: &[ForwardReport], now: &[ForwardReport]) -> String {
    let lines = |sign, of: &[ForwardReport], other: &[ForwardReport]| {
        let changed = of.iter().filter(|report| !other.contains(report));
        changed.map(|report| Entry::from(report).line(sign)).collect::<String>()
    };
    lines('-', before, now) + &lines('+', now, before)
}
