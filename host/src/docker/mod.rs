//! The docker context that points at a profile.
