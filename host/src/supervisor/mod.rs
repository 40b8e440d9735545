//! The only place with policy.
