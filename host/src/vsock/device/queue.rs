//! Descriptor chains as byte strings: packets out of the guest's TX queue, permits for its RX queue.
//!
//! A chain may be cut into descriptors in any way (virtio v1.2, 2.7.4 "Message Framing": "The framing of messages
//! with descriptors is independent of the contents of the buffers"). Linux 6.12 sends payloads above 32 KiB as a
//! header and several payload descriptors, so nothing here looks at where one descriptor ends.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::packet::{HEADER_LEN, Header, MAX_PAYLOAD};

/// The guest's memory as the device sees it.
pub type Memory = GuestMemoryMmap<()>;

/// More pieces than this in one chain are refused: Linux uses at most 46 (`MAX_SKB_FRAGS` and the header).
const MAX_SEGMENTS: usize = 256;

/// What may be wrong with a chain.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// Too short for a header.
    #[error("chain of {have} bytes is too short for a header of {HEADER_LEN}")]
    NoHeader {
        /// Bytes in the chain.
        have: usize,
    },
    /// Shorter than its header says.
    #[error("chain holds {have} payload bytes, its header says {}", header.len)]
    Truncated {
        /// The packet's header.
        header: Header,
        /// Payload bytes in the chain.
        have: usize,
    },
    /// The header asks for more than a packet may carry.
    #[error("payload of {} bytes is above the limit of {MAX_PAYLOAD}", header.len)]
    TooLong {
        /// The packet's header.
        header: Header,
    },
    /// More pieces than the device follows.
    #[error("chain has more than {MAX_SEGMENTS} pieces")]
    TooManySegments,
    /// A descriptor points outside the guest's memory.
    #[error("descriptor outside the guest's memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Pieces of guest memory that are one byte string.
#[derive(Debug, Default)]
pub struct Segments<'m> {
    pieces: Vec<VolatileSlice<'m>>,
}

impl<'m> Segments<'m> {
    fn collect(
        memory: &'m Memory,
        descriptors: impl Iterator<Item = Descriptor>,
        access: Permissions,
        most: usize,
    ) -> Result<Self, ChainError> {
        let mut pieces = Vec::with_capacity(4);
        let mut room = most;
        for (count, descriptor) in descriptors.enumerate() {
            if room == 0 {
                break;
            }
            if count >= MAX_SEGMENTS {
                return Err(ChainError::TooManySegments);
            }
            // Only as much as can be wanted: a descriptor's own length is the guest's word.
            let len = (descriptor.len() as usize).min(room);
            if len == 0 {
                continue;
            }
            room -= len;
            let slices = GuestMemory::get_slices(memory, descriptor.addr(), len, access)
                .map_err(ChainError::Memory)?;
            for slice in slices {
                pieces.push(slice.map_err(ChainError::Memory)?);
            }
        }
        Ok(Self { pieces })
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(VolatileSlice::len).sum()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.pieces.iter().all(VolatileSlice::is_empty)
    }

    /// The pieces in order.
    pub fn pieces(&self) -> &[VolatileSlice<'m>] {
        &self.pieces
    }

    /// The bytes from `from` on, at most `len` of them.
    pub fn range(&self, from: usize, len: usize) -> Self {
        let (mut skip, mut left) = (from, len);
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            if left == 0 {
                break;
            }
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            let take = (piece.len() - skip).min(left);
            if let Ok(part) = piece.subslice(skip, take) {
                pieces.push(part);
            }
            skip = 0;
            left -= take;
        }
        Self { pieces }
    }

    /// Copies out of guest memory until `into` is full or the segments end; returns the number of bytes.
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            if done == into.len() {
                break;
            }
            done += piece.copy_to(&mut into[done..]);
        }
        done
    }

    /// Copies into guest memory until `from` or the segments end; returns the number of bytes.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            let take = piece.len().min(from.len() - done);
            if take == 0 {
                continue;
            }
            piece.copy_from(&from[done..done + take]);
            done += take;
        }
        done
    }
}

/// A packet in the guest's TX queue: the header copied out once (the guest may change it under our eyes), the
/// payload still in guest memory and exactly as long as the header says.
#[derive(Debug)]
pub struct TxPacket<'m> {
    /// The header, host byte order.
    pub header: Header,
    /// `header.len` bytes.
    pub payload: Segments<'m>,
}

impl<'m> TxPacket<'m> {
    /// Reads a chain of the TX queue.
    pub fn parse(memory: &'m Memory, chain: DescriptorChain<&'m Memory>) -> Result<Self, ChainError> {
        let all = Segments::collect(memory, chain.readable(), Permissions::Read, HEADER_LEN + MAX_PAYLOAD)?;
        let mut bytes = [0; HEADER_LEN];
        let have = all.copy_to(&mut bytes);
        if have < HEADER_LEN {
            return Err(ChainError::NoHeader { have });
        }
        let header = Header::decode(&bytes);
        let len = header.len as usize;
        if len > MAX_PAYLOAD {
            return Err(ChainError::TooLong { header });
        }
        // Capped by the header's length, not by the descriptors': a chain may be longer than its packet.
        let payload = all.range(HEADER_LEN, len);
        let have = payload.len();
        if have < len {
            return Err(ChainError::Truncated { header, have });
        }
        Ok(Self { header, payload })
    }
}

/// The guest's RX queue for one pass.
pub struct RxQueue<'q, 'm> {
    queue: &'q mut Queue,
    memory: &'m Memory,
    used: bool,
}

impl<'q, 'm> RxQueue<'q, 'm> {
    /// Works on `queue` in `memory`.
    pub fn new(queue: &'q mut Queue, memory: &'m Memory) -> Self {
        Self { queue, memory, used: false }
    }

    /// Whether any chain was given back to the guest.
    pub fn used(&self) -> bool {
        self.used
    }

    /// Asks the guest to kick when it posts chains; whether it has posted some already.
    pub fn ask_for_kicks(&mut self) -> bool {
        self.queue.enable_notification(self.memory).unwrap_or(false)
    }

    /// Takes the next chain that can hold a header, if the guest has posted one. Chains that cannot are given back
    /// empty.
    pub fn permit(&mut self) -> Option<RxPermit<'_, 'q, 'm>> {
        loop {
            let chain = self.queue.pop_descriptor_chain(self.memory)?;
            let head = chain.head_index();
            let room = Segments::collect(
                self.memory,
                chain.writable(),
                Permissions::Write,
                HEADER_LEN + MAX_PAYLOAD,
            );
            match room {
                Ok(room) if room.len() >= HEADER_LEN => {
                    return Some(RxPermit { rx: self, head, room, spent: false });
                }
                _ => self.give_back(head, 0),
            }
        }
    }

    /// Takes up to `most` chains with room for payload, and of it as many bytes as `allowed` says, given the bytes
    /// that the chains before have room for. Chains that it leaves are the next ones again.
    pub fn permits(&mut self, most: usize, allowed: impl Fn(usize) -> usize) -> RxBatch<'_, 'q, 'm> {
        let mut batch = RxBatch { rx: self, chains: Vec::with_capacity(most), pieces: Vec::new(), spent: 0 };
        let mut before = 0;
        while batch.chains.len() < most {
            let most = allowed(before);
            if most == 0 {
                break;
            }
            let Some(mut permit) = batch.rx.permit() else { break };
            let payload = permit.payload(most);
            if payload.is_empty() {
                break;
            }
            permit.spent = true;
            let (head, header) = (permit.head, permit.room.range(0, HEADER_LEN));
            drop(permit);
            before += payload.len();
            batch.chains.push(RxChain { head, header, room: payload.len() });
            batch.pieces.extend(payload.pieces);
        }
        batch
    }

    fn give_back(&mut self, head: u16, len: u32) {
        self.used = true;
        if let Err(error) = self.queue.add_used(self.memory, head, len) {
            // A head beyond the table or a used ring outside memory: the guest harms itself only.
            tracing::debug!(%error, "a chain could not be returned to the guest");
        }
    }
}

/// The proof that the guest can take one packet now. Host data may be read only by who holds one; dropped unspent,
/// the chain is the next one again.
pub struct RxPermit<'r, 'q, 'm> {
    rx: &'r mut RxQueue<'q, 'm>,
    head: u16,
    room: Segments<'m>,
    spent: bool,
}

impl<'m> RxPermit<'_, '_, 'm> {
    /// Where at most `most` payload bytes go.
    pub fn payload(&self, most: usize) -> Segments<'m> {
        self.room.range(HEADER_LEN, most.min(MAX_PAYLOAD))
    }

    /// Hands the packet to the guest; its `header.len` payload bytes are in place already.
    pub fn send(mut self, header: &Header) {
        self.spent = true;
        self.room.copy_from(&header.encode());
        self.rx.give_back(self.head, HEADER_LEN as u32 + header.len);
    }
}

impl Drop for RxPermit<'_, '_, '_> {
    fn drop(&mut self) {
        if !self.spent {
            self.rx.queue.go_to_previous_position();
        }
    }
}

#[derive(Debug)]
struct RxChain<'m> {
    head: u16,
    header: Segments<'m>,
    /// Payload bytes.
    room: usize,
}

/// Permits for several packets of one connection, so that one read fills them all. Dropped, those that were not
/// spent are the next chains again.
pub struct RxBatch<'r, 'q, 'm> {
    rx: &'r mut RxQueue<'q, 'm>,
    chains: Vec<RxChain<'m>>,
    pieces: Vec<VolatileSlice<'m>>,
    spent: usize,
}

impl<'m> RxBatch<'_, '_, 'm> {
    /// Whether the guest has posted no chain to begin with.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Where the payload goes, across all packets.
    pub fn payload(&mut self) -> Segments<'m> {
        Segments { pieces: std::mem::take(&mut self.pieces) }
    }

    /// Hands over as many packets as `len` payload bytes fill, which are in place already; `header` gives each one
    /// its header, told its length. Returns how many they were.
    pub fn send(mut self, len: usize, mut header: impl FnMut(usize) -> Header) -> usize {
        let mut left = len;
        while left > 0
            && let Some(chain) = self.chains.get(self.spent)
        {
            let part = chain.room.min(left);
            chain.header.copy_from(&header(part).encode());
            self.rx.give_back(chain.head, (HEADER_LEN + part) as u32);
            self.spent += 1;
            left -= part;
        }
        self.spent
    }
}

impl Drop for RxBatch<'_, '_, '_> {
    fn drop(&mut self) {
        for _ in self.spent..self.chains.len() {
            self.rx.queue.go_to_previous_position();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use virtio_queue::Queue;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::packet::{Header, Op};
    use super::*;

    const SIZE: u16 = 16;
    const TABLE: u64 = 0;
    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const BUFFERS: u64 = 0x1_0000;
    const MEMORY: usize = 4 << 20;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
    }

    fn queue() -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        queue
    }

    fn describe(memory: &Memory, index: u16, addr: u64, len: u32, flags: u16) {
        let at = TABLE + 16 * u64::from(index);
        memory.write_obj(addr, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(index + 1, GuestAddress(at + 14)).unwrap();
    }

    fn publish(memory: &Memory, heads: &[u16]) {
        for (slot, head) in heads.iter().enumerate() {
            memory.write_obj(*head, GuestAddress(AVAIL + 4 + 2 * slot as u64)).unwrap();
        }
        memory.write_obj(heads.len() as u16, GuestAddress(AVAIL + 2)).unwrap();
    }

    fn used(memory: &Memory) -> Vec<(u32, u32)> {
        let count: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
        (0..u64::from(count))
            .map(|slot| {
                let at = USED + 4 + 8 * slot;
                let id = memory.read_obj(GuestAddress(at)).unwrap();
                (id, memory.read_obj(GuestAddress(at + 4)).unwrap())
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// A packet is what its header says, however its chain is cut; never more, and nothing when there is less.
        #[test]
        fn a_packet_is_its_header_and_its_length(
            len in 0usize..70_000,
            claimed in prop_oneof![0u32..70_000, any::<u32>()],
            cuts in prop::collection::vec(prop_oneof![0usize..100, 0usize..40_000], 0..15),
        ) {
            let memory = memory();
            let header = Header { len: claimed, ..Header::to_guest(3, 1, 2, Op::Rw) };
            let payload: Vec<u8> = (0..len).map(|index| (index % 251) as u8).collect();
            let bytes = [header.encode().as_slice(), &payload].concat();
            let (mut at, mut index) = (0, 0);
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let part = cut.min(bytes.len() - at);
                let addr = BUFFERS + u64::from(index) * 0x2_0000;
                memory.write_slice(&bytes[at..at + part], GuestAddress(addr)).unwrap();
                at += part;
                let more = at < bytes.len() && cut != usize::MAX;
                describe(&memory, index, addr, part as u32, u16::from(more));
                index += 1;
                if !more {
                    break;
                }
            }
            publish(&memory, &[0]);
            let mut queue = queue();
            let chain = queue.pop_descriptor_chain(&memory).unwrap();
            match TxPacket::parse(&memory, chain) {
                Ok(packet) => {
                    prop_assert_eq!(packet.header, header);
                    prop_assert!(claimed as usize <= len.min(MAX_PAYLOAD));
                    let mut got = vec![0; claimed as usize];
                    prop_assert_eq!(packet.payload.copy_to(&mut got), got.len());
                    prop_assert_eq!(packet.payload.len(), got.len());
                    prop_assert_eq!(got.as_slice(), &payload[..claimed as usize]);
                }
                Err(ChainError::TooLong { header }) => prop_assert!(header.len as usize > MAX_PAYLOAD),
                Err(ChainError::Truncated { have, .. }) => {
                    prop_assert_eq!(have, len.min(MAX_PAYLOAD));
                    prop_assert!(claimed as usize > have);
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
        }

        /// A batch takes the chains in order, fills them one after the other, and leaves the rest for the next one.
        #[test]
        fn a_batch_fills_buffers_in_order(
            rooms in prop::collection::vec(prop_oneof![Just(44u32), 45u32..200, 4000u32..9000], 1..16),
            most in 1usize..20,
            allowed in 0usize..60_000,
            filled in 0usize..60_000,
        ) {
            let memory = memory();
            for (index, room) in (0..).zip(&rooms) {
                // VIRTQ_DESC_F_WRITE
                describe(&memory, index, BUFFERS + u64::from(index) * 0x1_0000, *room, 2);
            }
            let heads: Vec<u16> = (0..rooms.len() as u16).collect();
            publish(&memory, &heads);
            let mut queue = queue();
            let mut rx = RxQueue::new(&mut queue, &memory);
            let mut batch = rx.permits(most, |planned| allowed.saturating_sub(planned));
            let room = batch.payload();
            prop_assert!(room.len() <= allowed);
            prop_assert!(batch.chains.len() <= most.min(rooms.len()));
            let bytes: Vec<u8> = (0..filled.min(room.len())).map(|index| (index % 253) as u8).collect();
            room.copy_from(&bytes);
            let mut told = Vec::new();
            let packets = batch.send(bytes.len(), |len| {
                told.push(len);
                Header { len: len as u32, ..Header::to_guest(3, 1, 2, Op::Rw) }
            });
            prop_assert_eq!(packets, told.len());
            prop_assert_eq!(told.iter().sum::<usize>(), bytes.len());
            let used = used(&memory);
            prop_assert_eq!(used.len(), packets);
            let mut got = Vec::new();
            for ((index, (id, len)), told) in (0..).zip(used).zip(told) {
                prop_assert_eq!(id, index);
                prop_assert!(told > 0 && told <= rooms[index as usize] as usize - HEADER_LEN);
                let mut packet = vec![0; len as usize];
                memory.read_slice(&mut packet, GuestAddress(BUFFERS + u64::from(index) * 0x1_0000)).unwrap();
                let header = Header::decode(packet[..HEADER_LEN].try_into().unwrap());
                prop_assert_eq!(header.len as usize, told);
                prop_assert_eq!(packet.len(), HEADER_LEN + told);
                got.extend_from_slice(&packet[HEADER_LEN..]);
            }
            prop_assert_eq!(got, bytes);
            // The next chain is the first that was not spent.
            let next = queue.pop_descriptor_chain(&memory).map(|chain| usize::from(chain.head_index()));
            prop_assert_eq!(next, (packets < rooms.len()).then_some(packets));
        }
    }
}
