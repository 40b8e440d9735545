//! QEMU: command line, QMP.
