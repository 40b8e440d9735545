//! QEMU: its command line, which acceleration works here, and QMP.

pub mod acceleration;
pub mod command;
pub mod hotplug;
pub mod qmp;
