//! Host-side port numbers for new connections, in rotation: a number comes back only after two thousand million
//! others, so that a late packet of a dead connection meets none of a living one.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Below are the numbers that mean something to people.
const FIRST: u32 = 1 << 30;
/// Above lies `VMADDR_PORT_ANY` (`linux/vm_sockets.h`).
const LAST: u32 = u32::MAX - 1;

/// See the module's description.
#[derive(Debug)]
pub struct PortRotation {
    next: u32,
}

impl PortRotation {
    /// Starts anywhere, so that a device that replaces another one does not repeat its numbers.
    pub fn new() -> Self {
        // A run of a fuzzer must be the same again.
        let any = if cfg!(fuzzing) { 0 } else { RandomState::new().build_hasher().finish() as u32 };
        Self { next: FIRST + any % (LAST - FIRST + 1) }
    }

    /// The next number that `taken` does not claim.
    pub fn allocate(&mut self, taken: impl Fn(u32) -> bool) -> u32 {
        loop {
            let port = self.next;
            self.next = if port == LAST { FIRST } else { port + 1 };
            if !taken(port) {
                return port;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_port_does_not_come_back_soon() {
        let mut ports = PortRotation { next: LAST - 1 };
        let got: Vec<u32> = (0..4).map(|_| ports.allocate(|port| port == FIRST)).collect();
        assert_eq!(got, [LAST - 1, LAST, FIRST + 1, FIRST + 2]);
    }
}
