//! Credit in both directions: how much may be under way, counted in wrapping 32-bit totals.
//!
//! > `peer_free = peer_buf_alloc - (tx_cnt - peer_fwd_cnt)` (virtio v1.2, 5.10.6.3 "Buffer Space Management")
//!
//! The guest's numbers are its word and no more: they can starve its own connection and nothing else.

use std::collections::VecDeque;

use super::packet::HEADER_LEN;

/// The receive buffer that the device keeps for each connection, and so the window that the guest is granted.
pub const WINDOW: u32 = 256 * 1024;

/// Payload of a full packet to a Linux guest, whose receive buffers are 4 KiB
/// (`VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE`, `linux/virtio_vsock.h`).
const FULL_PACKET: u32 = 4096 - HEADER_LEN as u32;

/// Receive buffer that a guest is taken to spend on one packet beside its bytes. Linux since 6.12 resets a
/// connection with ENOBUFS when `(packets + 1) * SKB_TRUESIZE(0)` is above `buf_alloc`, whatever the credit; that
/// size is 576 to 832 bytes by kernel configuration.
const PACKET_OVERHEAD: u32 = 1024;

/// Never more packets under way than this, whatever window the guest claims.
const MOST_PACKETS: usize = 4096;

/// What the device may send.
#[derive(Debug, Default)]
pub struct Outgoing {
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
    /// `sent` after each packet that the guest has not wholly taken.
    under_way: VecDeque<u32>,
    asked: bool,
}

impl Outgoing {
    /// Takes the credit fields of a packet from the guest.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        let advance = fwd_cnt.wrapping_sub(self.peer_forwarded);
        // A guest's two CPUs may send a newer count before an older one; a hostile guest may send anything. Neither
        // may go back, nor past what was sent.
        if advance > self.in_flight() {
            return;
        }
        while let Some(&end) = self.under_way.front() {
            if end.wrapping_sub(self.peer_forwarded) > advance {
                break;
            }
            self.under_way.pop_front();
        }
        self.peer_forwarded = fwd_cnt;
    }

    /// Packets that may be sent now, within what [`Self::allowance`] says of their bytes.
    pub fn packets(&self) -> usize {
        let most = ((self.peer_alloc / PACKET_OVERHEAD) as usize).saturating_sub(1).clamp(1, MOST_PACKETS);
        most.saturating_sub(self.under_way.len())
    }

    /// Bytes that may be sent now. 0 also where only a sliver would fit, or too many packets are under way: both
    /// would cost the guest more buffer than the credit says.
    pub fn allowance(&self) -> usize {
        self.allowance_after(0)
    }

    /// As [`Self::allowance`], were `planned` bytes more under way. The packets are counted by who plans.
    pub fn allowance_after(&self, planned: usize) -> usize {
        let in_flight = (self.in_flight() as usize).saturating_add(planned);
        let free = (self.peer_alloc as usize).saturating_sub(in_flight);
        if self.packets() == 0 || (in_flight > 0 && free < FULL_PACKET as usize) {
            return 0;
        }
        free
    }

    /// Counts a packet of `len` bytes as sent.
    pub fn sent(&mut self, len: usize) {
        self.sent = self.sent.wrapping_add(len as u32);
        self.under_way.push_back(self.sent);
        self.asked = false;
    }

    /// Whether a CREDIT_REQUEST is worth sending for who is held up: once in each stall, or the answers and requests
    /// would chase each other.
    pub fn should_ask(&self) -> bool {
        !self.asked && self.allowance() == 0
    }

    /// Counts the request as sent.
    pub fn asked(&mut self) {
        self.asked = true;
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_forwarded)
    }
}

/// What the guest may send.
#[derive(Debug, Default)]
pub struct Incoming {
    received: u32,
    forwarded: u32,
    announced: u32,
}

/// The guest sent more than it was granted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest sent {sent} bytes with credit for {credit}")]
pub struct Overrun {
    /// Bytes in the packet.
    pub sent: usize,
    /// Bytes it had credit for.
    pub credit: u32,
}

impl Incoming {
    /// Counts `len` bytes as taken into the buffer.
    pub fn receive(&mut self, len: usize) -> Result<(), Overrun> {
        let credit = WINDOW - self.received.wrapping_sub(self.forwarded);
        if len > credit as usize {
            return Err(Overrun { sent: len, credit });
        }
        self.received = self.received.wrapping_add(len as u32);
        Ok(())
    }

    /// Counts `len` bytes as out of the buffer.
    pub fn forward(&mut self, len: usize) {
        self.forwarded = self.forwarded.wrapping_add(len as u32);
    }

    /// Whether the guest should be told: half the window has come free since it last was.
    pub fn update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= WINDOW / 2
    }

    /// The `fwd_cnt` for a packet about to be sent.
    pub fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn window_is_respected_across_the_wrap() {
        let mut credit =
            Outgoing { sent: u32::MAX - 10, peer_forwarded: u32::MAX - 10, ..Outgoing::default() };
        credit.update(65536, u32::MAX - 10);
        assert_eq!(credit.allowance(), 65536);
        credit.sent(60_000);
        assert_eq!(credit.allowance(), 5536);
        credit.sent(4000);
        assert_eq!(credit.allowance(), 0, "1,536 left would be a sliver");
        credit.update(65536, 59_989);
        assert_eq!(credit.allowance(), 65536 - 4000);
    }

    #[test]
    fn a_smaller_window_than_what_is_under_way_does_not_underflow() {
        let mut credit = Outgoing::default();
        credit.update(100_000, 0);
        credit.sent(50_000);
        credit.update(10, 0);
        assert_eq!(credit.allowance(), 0);
        credit.update(10, 50_000);
        assert_eq!(credit.allowance(), 10, "all of a small window may be used when nothing is under way");
    }

    #[test]
    fn stale_and_hostile_counts_are_ignored() {
        let mut credit = Outgoing::default();
        credit.update(10_000, 0);
        credit.sent(5000);
        credit.update(10_000, 4000);
        credit.update(10_000, 3000);
        assert_eq!(credit.in_flight(), 1000, "an older count changes nothing");
        credit.update(10_000, 6000);
        assert_eq!(credit.in_flight(), 1000, "nor does one of bytes never sent");
    }

    #[test]
    fn many_small_packets_wait_for_the_guest() {
        let mut credit = Outgoing::default();
        credit.update(WINDOW, 0);
        let mut packets = 0;
        while credit.allowance() > 0 {
            credit.sent(1);
            packets += 1;
        }
        // (packets + 1) * SKB_TRUESIZE(0) must stay within buf_alloc.
        assert!((packets + 1) * 832 <= WINDOW, "{packets} packets");
        assert!(credit.should_ask());
        credit.asked();
        assert!(!credit.should_ask());
        credit.update(WINDOW, packets / 2);
        assert!(credit.allowance() > 0);
    }

    #[test]
    fn incoming_overrun_is_seen() {
        let mut credit = Incoming::default();
        credit.receive(WINDOW as usize).expect("within the window");
        assert_eq!(credit.receive(1), Err(Overrun { sent: 1, credit: 0 }));
        assert!(!credit.update_due());
        credit.forward(WINDOW as usize / 2);
        assert!(credit.update_due());
        assert_eq!(credit.announce(), WINDOW / 2);
        assert!(!credit.update_due());
        credit.receive(WINDOW as usize / 2).expect("half is free");
    }

    proptest! {
        /// However the guest's numbers come, what is under way never exceeds the largest window it ever claimed.
        #[test]
        fn never_more_under_way_than_granted(start: u32, steps in prop::collection::vec((any::<u32>(), any::<u32>(), 0usize..70_000), 1..200)) {
            let mut credit = Outgoing { sent: start, peer_forwarded: start, ..Outgoing::default() };
            let mut widest = 0;
            for (alloc, forwarded, len) in steps {
                credit.update(alloc, forwarded);
                widest = widest.max(alloc);
                let len = len.min(credit.allowance());
                if len > 0 {
                    credit.sent(len);
                }
                prop_assert!(credit.in_flight() <= widest);
                prop_assert!(credit.under_way.len() <= MOST_PACKETS);
            }
        }

        /// Packets that are planned together are all within what the guest granted.
        #[test]
        fn a_plan_of_packets_stays_within_the_credit(
            start: u32,
            alloc in 0u32..2_000_000,
            before in prop::collection::vec(1usize..5000, 0..50),
            rooms in prop::collection::vec(1usize..9000, 1..40),
        ) {
            let mut credit = Outgoing { sent: start, peer_forwarded: start, ..Outgoing::default() };
            credit.update(alloc, start);
            for len in before {
                let len = len.min(credit.allowance());
                if len > 0 {
                    credit.sent(len);
                }
            }
            prop_assert_eq!(credit.allowance_after(0), credit.allowance());
            let mut plan: Vec<usize> = Vec::new();
            for room in rooms.into_iter().take(credit.packets()) {
                let planned = plan.iter().sum();
                let allowed = credit.allowance_after(planned);
                prop_assert!(allowed + planned <= credit.allowance());
                if allowed == 0 {
                    break;
                }
                plan.push(room.min(allowed));
            }
            for len in plan {
                prop_assert!(credit.allowance() >= len, "sent one by one it is within the credit too");
                credit.sent(len);
            }
            prop_assert!(credit.in_flight() <= alloc);
            prop_assert!(credit.under_way.len() <= MOST_PACKETS);
        }

        /// With an honest guest every byte gets through, whatever its window and however it reads.
        #[test]
        fn an_honest_guest_is_never_starved(window in 128u32..1_000_000, total in 1usize..3_000_000, start: u32) {
            let mut credit = Outgoing { sent: start, peer_forwarded: start, ..Outgoing::default() };
            credit.update(window, start);
            let (mut sent, mut taken) = (0usize, 0usize);
            while sent < total {
                let len = credit.allowance().min(4052).min(total - sent);
                if len == 0 {
                    prop_assert!(taken < sent, "stalled with nothing under way");
                    taken = sent;
                    credit.update(window, start.wrapping_add(taken as u32));
                    continue;
                }
                credit.sent(len);
                sent += len;
            }
        }

        #[test]
        fn incoming_never_holds_more_than_the_window(start: u32, steps in prop::collection::vec((0usize..100_000, 0usize..100_000), 1..100)) {
            let mut credit = Incoming { received: start, forwarded: start, announced: start };
            let mut held = 0usize;
            for (receive, forward) in steps {
                if credit.receive(receive).is_ok() {
                    held += receive;
                }
                prop_assert!(held <= WINDOW as usize);
                let forward = forward.min(held);
                credit.forward(forward);
                held -= forward;
            }
        }
    }
}
