//! Profile file, defaults, validation (raw → resolved), and where everything lies.
//!
//! ```text
//! profiles/NAME.toml ─► RawProfile (as written, lines known) ─┐
//! flags of `dhow start` ─► Overrides (as typed) ──────────────┴─► Profile (checked, absolute)
//! ```

mod error;
mod file;
mod merge;
mod mounts;
mod name;
mod passages;
mod paths;
mod profile;
mod size;
mod subnets;

pub use error::ConfigError;
pub use merge::{Overrides, save};
pub use mounts::MountSpec;
pub use name::ProfileName;
pub use paths::{Paths, list_profiles};
pub use profile::{Acceleration, Profile};
pub use subnets::Subnets;
