//! The file server as a guest meets it: over a stream, with everything that a hostile one would try.

mod attributes;
mod confinement;
mod contents;
mod folders;
mod guest;
mod masks;
mod names;
mod nodes;
mod ownership;
mod process;
mod races;
mod restore;
mod sessions;
