//! The dumb parent of the host side.
