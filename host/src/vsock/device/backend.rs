//! The vhost-user side: features, configuration space and the virtqueues' turns.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::muxer::Pumped;
use super::queue::{Memory, RxQueue, TxPacket};
use super::reactor::Reactor;

/// Host to guest (virtio v1.2, 5.10.2 "Virtqueues").
const RX: usize = 0;
/// Guest to host.
const TX: usize = 1;
/// RX, TX and the event queue, which QEMU serves itself.
const QUEUES: usize = 3;
const QUEUE_SIZE: usize = 1024;

/// The event number of the reactor's epoll set; numbers up to [`QUEUES`] are the library's.
pub const REACTOR_EVENT: u64 = QUEUES as u64 + 1;

/// Packets to the guest in one turn.
const RX_BUDGET: usize = 256;
/// Packets from the guest in one turn; each may carry 64 KiB.
const TX_BUDGET: usize = 128;

/// The device as the vhost-user library calls it.
pub struct Backend {
    guest_cid: u64,
    memory: GuestMemoryAtomic<Memory>,
    reactor: Reactor,
    /// Where the guest's two rings were left, as numbers of their next chains.
    left_at: [u16; 2],
    /// Rings were stopped since, and by whom will be seen when they go on.
    stopped: bool,
}

impl Backend {
    /// A device for the guest with that CID.
    pub fn new(guest_cid: u64, memory: GuestMemoryAtomic<Memory>, reactor: Reactor) -> Self {
        Self { guest_cid, memory, reactor, left_at: [0; 2], stopped: false }
    }

    /// The reactor's epoll set.
    pub fn poll_set(&self) -> BorrowedFd<'_> {
        self.reactor.poll_set()
    }

    /// Connections that exist.
    #[cfg(fuzzing)]
    pub fn connections(&self) -> u64 {
        self.reactor.muxer.stats().connections
    }

    fn running(vring: &VringMutex) -> bool {
        let state = vring.get_ref();
        state.is_enabled() && state.get_queue().ready()
    }

    /// Both directions once. Neither waits for the other: a TX queue held up by a full RX queue, or the reverse,
    /// would let the guest and the device wait for each other for ever.
    fn work(&mut self, vrings: &[VringMutex]) {
        let (Some(rx), Some(tx)) = (vrings.get(RX), vrings.get(TX)) else {
            return;
        };
        let now = Instant::now();
        let mut more = false;
        if Self::running(rx) && Self::running(tx) {
            if std::mem::take(&mut self.stopped) && self.left_at != next_chains(rx, tx) {
                self.reactor.muxer.guest_stopped();
            }
            more |= self.drain(&mut tx.get_mut());
            more |= self.pump(&mut rx.get_mut(), now);
            self.left_at = next_chains(rx, tx);
        }
        self.reactor.finish(now);
        if more {
            self.reactor.wake();
        }
    }

    /// Guest to host; whether there is more.
    fn drain(&mut self, state: &mut VringState<GuestMemoryAtomic<Memory>>) -> bool {
        let guard = self.memory.memory();
        let memory: &Memory = &guard;
        let queue = state.get_queue_mut();
        let mut budget = TX_BUDGET;
        let (mut used, mut idle_rounds) = (false, 0);
        let more = loop {
            let before = budget;
            let _ = queue.disable_notification(memory);
            while budget > 0
                && let Some(chain) = queue.pop_descriptor_chain(memory)
            {
                budget -= 1;
                let head = chain.head_index();
                self.reactor.muxer.on_guest_packet(TxPacket::parse(memory, chain));
                // Whatever it was, it is consumed: a packet may kill its connection, never the queue.
                if let Err(error) = queue.add_used(memory, head, 0) {
                    tracing::debug!(%error, "a chain could not be returned to the guest");
                }
                used = true;
            }
            if budget == 0 {
                break true;
            }
            if !queue.enable_notification(memory).unwrap_or(false) {
                break false;
            }
            if budget == before {
                idle_rounds += 1;
            }
            if idle_rounds == 2 {
                // The index has moved but nothing can be popped: an index that makes no sense.
                break false;
            }
        };
        signal(state, memory, used);
        more
    }

    /// Host to guest; whether there is more that the guest could take.
    fn pump(&mut self, state: &mut VringState<GuestMemoryAtomic<Memory>>, now: Instant) -> bool {
        let guard = self.memory.memory();
        let memory: &Memory = &guard;
        let queue = state.get_queue_mut();
        let _ = queue.disable_notification(memory);
        let mut rx = RxQueue::new(queue, memory);
        let pumped = self.reactor.muxer.pump(&mut rx, RX_BUDGET, now);
        let more = match pumped {
            Pumped::Idle => false,
            Pumped::More => true,
            // The guest kicks when it posts buffers, unless it did so between our last look and this.
            Pumped::Starved => rx.ask_for_kicks() && rx.permit().is_some(),
        };
        let used = rx.used();
        signal(state, memory, used);
        more
    }
}

fn next_chains(rx: &VringMutex, tx: &VringMutex) -> [u16; 2] {
    [rx, tx].map(|vring| vring.get_ref().get_queue().next_avail())
}

fn signal(state: &mut VringState<GuestMemoryAtomic<Memory>>, memory: &Memory, used: bool) {
    // On an error the guest is told: an interrupt too many does no harm.
    if used
        && state.get_queue_mut().needs_notification(memory).unwrap_or(true)
        && let Err(error) = state.signal_used_queue()
    {
        tracing::warn!(%error, "the guest could not be notified");
    }
}

impl VhostUserBackendMut for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    /// `struct virtio_vsock_config { le64 guest_cid; }` (virtio v1.2, 5.10.4).
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.guest_cid.to_le_bytes();
        let (from, len) = (offset as usize, size as usize);
        from.checked_add(len).and_then(|to| config.get(from..to)).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![(1 << QUEUES) - 1]
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// GET_VRING_BASE: the VM is paused, or the driver is reset. The message does not say which. A VM that goes on
    /// does so where its rings were left, and knows its connections; a driver that starts anew begins at 0, and knows
    /// none. At an unplug the process ends.
    fn stop_vring(&mut self, queue: u32) -> io::Result<()> {
        self.stopped |= queue as usize == RX || queue as usize == TX;
        Ok(())
    }

    fn reset_device(&mut self) {
        self.reactor.muxer.guest_stopped();
        self.reactor.finish(Instant::now());
    }

    fn handle_event(
        &mut self,
        event: u16,
        _events: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == REACTOR_EVENT {
            self.reactor.turn();
        }
        self.work(vrings);
        Ok(())
    }
}

/// The backend as the library shares it between its two threads.
pub type SharedBackend = Arc<Mutex<Backend>>;
