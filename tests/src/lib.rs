//! What tests and benches of a real VM are made of: commands, VMs, containers, connections, and the run of a case.

pub mod command;
pub mod container;
pub mod datagrams;
pub mod fio;
pub mod greeter;
pub mod net;
pub mod ports;
pub mod process;
pub mod pty;
pub mod qmp;
pub mod report;
pub mod settings;
pub mod shared;
pub mod sockets;
pub mod table;
pub mod vm;
pub mod wait;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use libtest_mimic::Failed;

pub use container::IMAGE;
pub use pty::Pty;
pub use settings::Settings;
pub use vm::{TOOL, Vm};
pub use wait::{SOON, wait_for, wait_until};

/// What a case needs.
#[derive(Debug, Clone, Copy)]
pub enum Body {
    /// The VM that most cases share.
    Shared(fn(&Vm)),
    /// None, or one of its own; the shared one is stopped before, so that it does not slow it down.
    Own(fn()),
}

/// A test case.
#[derive(Debug, Clone)]
pub struct Case {
    /// "module::name".
    pub name: String,
    /// What it does.
    pub body: Body,
}

/// The cases of a module: `cases![Shared: a, b; Own: c]`.
#[macro_export]
macro_rules! cases {
    ($($kind:ident: $($name:ident),+ $(,)?);+ $(;)?) => {
        pub fn cases() -> Vec<$crate::Case> {
            let module = module_path!().rsplit("::").next().unwrap_or_default();
            vec![$($($crate::Case {
                name: format!("{module}::{}", stringify!($name)),
                body: $crate::Body::$kind($name),
            }),+),+]
        }
    };
}
impl Case {
    /// Runs it, and a second time where it failed: a VM under emulation on a machine with other work may miss
    /// any deadline. Each failure is told whole at once, with the logs of the VMs that lived then, so that
    /// the first one is not overlooked.
    ///
    /// # Errors
    /// When it failed twice; with the words of the second failure.
    pub fn run(&self, loud: bool) -> Result<(), Failed> {
        let first = self.attempt(loud);
        // A soak looks for the failure that comes once in a while.
        if first.is_ok() || std::env::var_os("DHOW_SOAK").is_some() {
            return first;
        }
        eprintln!("---- {} failed, and is run once more ----", self.name);
        self.attempt(loud).inspect(|()| report::second_time(&self.name))
    }

    fn attempt(&self, loud: bool) -> Result<(), Failed> {
        let begin = Instant::now();
        if loud {
            eprintln!("{} …", self.name);
        }
        drop(report::failure());
        let result = catch_unwind(AssertUnwindSafe(|| match self.body {
            Body::Shared(run) => run(&shared::get()),
            Body::Own(run) => {
                shared::stop();
                run();
            }
        }));
        if loud {
            let outcome = if result.is_ok() { "ok" } else { "FAILED" };
            eprintln!("{} {outcome}, {:.1} s", self.name, begin.elapsed().as_secs_f64());
        }
        result.map_err(|_| {
            let failure = report::failure();
            eprintln!("\n---- {} ----\n{}{}", self.name, failure.words, failure.logs);
            if matches!(self.body, Body::Shared(_)) {
                shared::mend();
            }
            Failed::from(failure.words)
        })
    }
}
