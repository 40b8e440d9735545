//! Steps of a start or a stop while they happen: a spinner on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{escape_lines, say, span};
use crate::api::Progress;

/// Shows progress on standard error.
#[derive(Debug)]
pub struct Display {
    spinner: Option<ProgressBar>,
}

impl Display {
    /// A spinner where standard error is a terminal.
    #[must_use]
    pub fn new() -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let spinner = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
                spinner.set_style(style);
            }
            spinner
        });
        Self { spinner }
    }

    /// Shows one step or notice.
    pub fn show(&self, progress: &Progress) {
        match progress {
            Progress::Begin { step } => {
                if let Some(spinner) = &self.spinner {
                    spinner.reset_elapsed();
                    spinner.set_message(format!("{} …", escape_lines(step)));
                    spinner.enable_steady_tick(Duration::from_millis(100));
                }
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
    pub fn clear(&self) {
        if let Some(spinner) = &self.spinner {
            spinner.disable_steady_tick();
            spinner.set_message(String::new());
            // Removes the line; the next step draws it anew.
            spinner.suspend(|| {});
        }
    }
}

impl Default for Display {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}
