//! One file a command: arguments → call → what a person or `--json` sees.
