//! Commands in the guest.
