//! What cases are made of: commands, VMs, containers, connections, and the run of a case.

pub mod command;
pub mod container;
pub mod net;
pub mod process;
pub mod pty;
pub mod report;
pub mod settings;
pub mod shared;
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
macro_rules! cases {
    ($($kind:ident: $($name:ident),+ $(,)?);+ $(;)?) => {
        pub fn cases() -> Vec<$crate::harness::Case> {
            let module = module_path!().rsplit("::").next().unwrap_or_default();
            vec![$($($crate::harness::Case {
                name: format!("{module}::{}", stringify!($name)),
                body: $crate::harness::Body::$kind($name),
            }),+),+]
        }
    };
}
pub(crate) use cases;

impl Case {
    /// Runs it, and a second time where it failed: a VM under emulation on a machine with other work may miss
    /// any deadline. The first failure is told whole, and that there was one, so that it is not overlooked.
    ///
    /// # Errors
    /// When it failed twice; with the words of the second failure and the logs of the VMs that lived then.
    pub fn run(&self, loud: bool) -> Result<(), Failed> {
        let Err(first) = self.attempt(loud) else { return Ok(()) };
        eprintln!(
            "\n---- {} failed, and is run once more ----\n{}",
            self.name,
            first.message().unwrap_or_default()
        );
        self.attempt(loud).inspect(|()| eprintln!("---- {} passed the second time ----", self.name))
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
            if matches!(self.body, Body::Shared(_)) {
                shared::mend();
            }
            Failed::from(failure)
        })
    }
}
