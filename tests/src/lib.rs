//! Dhow's end-to-end tests are the target `e2e`; there is nothing else in this crate.
