//! What both ends of a test use: bytes made from a seed and their digests, and pings of docker.

pub mod ping;

use sha2::{Digest, Sha256};

/// Pseudo-random bytes that a seed alone decides (xorshift64*), however they are cut into pieces.
#[derive(Debug, Clone)]
pub struct Pattern {
    state: u64,
    word: [u8; 8],
    used: usize,
}

impl Pattern {
    /// The bytes of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // The generator stands still at zero; an odd constant keeps neighbours apart.
        let state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { state, word: [0; 8], used: 8 }
    }

    /// The next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            if self.used == self.word.len() {
                self.state ^= self.state >> 12;
                self.state ^= self.state << 25;
                self.state ^= self.state >> 27;
                self.word = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
                self.used = 0;
            }
            *byte = self.word[self.used];
            self.used += 1;
        }
    }

    /// The first `size` bytes of `seed`.
    #[must_use]
    pub fn bytes(seed: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        Self::new(seed).fill(&mut bytes);
        bytes
    }
}

/// SHA-256 in hexadecimal digits, and the number of bytes.
#[derive(Debug, Default)]
pub struct Summary {
    digest: Sha256,
    size: u64,
}

impl Summary {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.size += bytes.len() as u64;
    }

    /// "SIZE DIGEST".
    #[must_use]
    pub fn finish(self) -> String {
        let digest: String = self.digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{} {digest}", self.size)
    }

    /// "SIZE DIGEST" of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> String {
        let mut summary = Self::default();
        summary.update(bytes);
        summary.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_matter_and_seeds_do() {
        let whole = Pattern::bytes(7, 1000);
        let mut pieces = vec![0; 1000];
        let mut pattern = Pattern::new(7);
        for piece in pieces.chunks_mut(13) {
            pattern.fill(piece);
        }
        assert_eq!(whole, pieces);
        assert_ne!(whole, Pattern::bytes(8, 1000));
        assert_ne!(Pattern::bytes(0, 8), [0; 8]);
    }

    #[test]
    fn a_summary_is_size_and_sha256() {
        let expected = "3 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Summary::of(b"abc"), expected);
    }
}
