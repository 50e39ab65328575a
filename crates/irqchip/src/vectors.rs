//! Sets of interrupt vectors, laid out as the local APIC's 256-bit registers (SDM vol. 3, 11.8.4).

use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

/// A set of vectors: eight words, vector `v` is bit `v % 32` of word `v / 32`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VectorSet(pub [u32; 8]);

const fn place(vector: u8) -> (usize, u32) {
    ((vector >> 5) as usize, 1 << (vector & 31))
}

const fn highest_in(word: usize, bits: u32) -> u8 {
    (word as u8) * 32 + (31 - bits.leading_zeros()) as u8
}

impl VectorSet {
    /// Adds a vector.
    pub fn insert(&mut self, vector: u8) {
        let (word, bit) = place(vector);
        self.0[word] |= bit;
    }

    /// Takes a vector away.
    pub fn remove(&mut self, vector: u8) {
        let (word, bit) = place(vector);
        self.0[word] &= !bit;
    }

    /// Whether a vector is in the set.
    pub fn contains(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        self.0[word] & bit != 0
    }

    /// The highest vector in the set: the one of highest priority.
    pub fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&bits| bits != 0)?;
        Some(highest_in(word, self.0[word]))
    }
}

/// A [`VectorSet`] that any thread may change.
#[derive(Default)]
pub(crate) struct AtomicVectorSet([AtomicU32; 8]);

impl AtomicVectorSet {
    /// Adds a vector; returns whether it was there already.
    pub(crate) fn insert(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        self.0[word].fetch_or(bit, Ordering::AcqRel) & bit != 0
    }

    /// Takes a vector away; returns whether it was there.
    pub(crate) fn remove(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        self.0[word].fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    pub(crate) fn contains(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        self.0[word].load(Ordering::Acquire) & bit != 0
    }

    pub(crate) fn highest(&self) -> Option<u8> {
        (0..self.0.len()).rev().find_map(|word| match self.0[word].load(Ordering::Acquire) {
            0 => None,
            bits => Some(highest_in(word, bits)),
        })
    }

    /// Word `index`, or 0 past the end.
    pub(crate) fn word(&self, index: u8) -> u32 {
        self.0.get(usize::from(index)).map_or(0, |word| word.load(Ordering::Acquire))
    }

    pub(crate) fn load(&self) -> VectorSet {
        VectorSet(std::array::from_fn(|word| self.0[word].load(Ordering::Acquire)))
    }

    pub(crate) fn store(&self, set: &VectorSet) {
        for (word, bits) in self.0.iter().zip(set.0) {
            word.store(bits, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_agree_on_every_vector() {
        let (mut plain, atomic) = (VectorSet::default(), AtomicVectorSet::default());
        assert_eq!((plain.highest(), atomic.highest()), (None, None));
        for vector in 0..=u8::MAX {
            plain.insert(vector);
            assert!(!atomic.insert(vector));
            assert!(atomic.insert(vector));
            assert_eq!(plain.highest(), Some(vector));
            assert_eq!(atomic.highest(), Some(vector));
            assert!(plain.contains(vector) && atomic.contains(vector));
        }
        assert_eq!(atomic.load(), plain);
        for vector in (1..=u8::MAX).rev() {
            plain.remove(vector);
            assert!(atomic.remove(vector));
            assert!(!atomic.remove(vector));
            assert_eq!(plain.highest(), Some(vector - 1));
            assert_eq!(atomic.highest(), Some(vector - 1));
            assert!(!plain.contains(vector));
        }
        assert_eq!((atomic.word(0), atomic.word(8)), (1, 0));
    }
}
