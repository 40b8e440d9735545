//! The dumb parent of each side: the keeper on the host, PID 1 in the guest.
