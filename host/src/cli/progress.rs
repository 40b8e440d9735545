//! Steps of a start or a stop while they happen: a spinner on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{escape_lines, say, span};
use crate::api::Progress;

/// Between two turns of the spinner.
const TICK: Duration = Duration::from_millis(100);

/// Shows progress on standard error.
#[derive(Debug)]
pub struct Display {
    terminal: bool,
    /// Of the step that runs.
    spinner: Option<ProgressBar>,
}

impl Display {
    /// A spinner for each step where standard error is a terminal.
    #[must_use]
    pub fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), spinner: None }
    }

    /// Shows one step or notice.
    pub fn show(&mut self, progress: &Progress) {
        match progress {
            Progress::Begin { step } => {
                self.clear();
                self.spinner = self.terminal.then(|| spin(&escape_lines(step)));
            }
            Progress::End { step, milliseconds } => {
                self.clear();
                say(&format!("{} … {}", escape_lines(step), span(*milliseconds)));
            }
            Progress::Notice(text) => self.notice(text),
        }
    }

    /// Something that a person should know.
    pub fn notice(&self, text: &str) {
        let line = format!("notice: {}", escape_lines(text));
        match &self.spinner {
            Some(spinner) => spinner.suspend(|| say(&line)),
            None => say(&line),
        }
    }

    /// Takes the spinner off the terminal.
    fn clear(&mut self) {
        if let Some(spinner) = self.spinner.take() {
            spinner.finish_and_clear();
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.clear();
    }
}

fn spin(step: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(format!("{step} …"));
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(TICK);
    spinner
}
