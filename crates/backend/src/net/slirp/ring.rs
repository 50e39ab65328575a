//! A byte queue that is filled by reads and emptied by acknowledgements.

use std::io::{IoSlice, IoSliceMut};

/// First size; doubled as long as it is needed.
const INITIAL: usize = 16 << 10;

/// Bytes in the order they came. It takes memory only as it grows, and gives it back when it is empty.
#[derive(Default)]
pub(super) struct Ring {
    /// A power of two, or nothing.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Ring {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The two pieces that hold `len` bytes from `offset` on, or as many as there are.
    pub(super) fn slices(&self, offset: usize, len: usize) -> [&[u8]; 2] {
        let offset = offset.min(self.len);
        let len = len.min(self.len - offset);
        if len == 0 {
            return [&[], &[]];
        }
        let from = (self.start + offset) & (self.bytes.len() - 1);
        let first = len.min(self.bytes.len() - from);
        [&self.bytes[from..from + first], &self.bytes[..len - first]]
    }

    /// The same for system calls.
    pub(super) fn io_slices(&self) -> [IoSlice<'_>; 2] {
        self.slices(0, self.len).map(IoSlice::new)
    }

    /// Lets `fill` write into free space, up to `limit` bytes in the queue; what it returns is how many bytes it wrote.
    pub(super) fn fill<E>(
        &mut self,
        limit: usize,
        fill: impl FnOnce(&mut [IoSliceMut<'_>]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        if self.len == self.bytes.len() && self.len < limit {
            self.grow();
        }
        let size = self.bytes.len();
        let room = size.min(limit).saturating_sub(self.len);
        let from = if size == 0 { 0 } else { (self.start + self.len) & (size - 1) };
        let first = room.min(size - from);
        let (low, high) = self.bytes.split_at_mut(from);
        let mut pieces = [IoSliceMut::new(&mut high[..first]), IoSliceMut::new(&mut low[..room - first])];
        let count = fill(&mut pieces)?.min(room);
        self.len += count;
        Ok(count)
    }

    /// Appends bytes.
    pub(super) fn extend(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let all = self.len + bytes.len();
            let done = self.fill(all, |pieces| {
                let mut done = 0;
                for piece in pieces {
                    let count = piece.len().min(bytes.len() - done);
                    piece[..count].copy_from_slice(&bytes[done..done + count]);
                    done += count;
                }
                Ok::<_, std::convert::Infallible>(done)
            });
            let Ok(done) = done;
            bytes = &bytes[done..];
        }
    }

    /// Drops bytes from the front.
    pub(super) fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        if self.len == 0 {
            self.start = 0;
            if self.bytes.len() > 4 * INITIAL {
                self.bytes = Vec::new();
            }
        } else {
            self.start = (self.start + count) & (self.bytes.len() - 1);
        }
    }

    fn grow(&mut self) {
        let mut larger = vec![0; (self.bytes.len() * 2).max(INITIAL)];
        let [first, second] = self.slices(0, self.len);
        larger[..first.len()].copy_from_slice(first);
        larger[first.len()..self.len].copy_from_slice(second);
        (self.bytes, self.start) = (larger, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn it_is_a_queue() {
        let (mut ring, mut model) = (Ring::default(), VecDeque::new());
        let mut seed = 1u32;
        for step in 0..20_000u32 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let count = (seed >> 16) as usize % 3000;
            if seed & 0x100 != 0 && ring.len() < 100_000 {
                let bytes: Vec<u8> = (0..count).map(|at| (at as u32 ^ step) as u8).collect();
                ring.extend(&bytes);
                model.extend(&bytes);
            } else {
                ring.consume(count);
                model.drain(..count.min(model.len()));
            }
            assert_eq!(ring.len(), model.len());
            let [first, second] = ring.slices(count / 2, count);
            let same: Vec<u8> = model.iter().skip(count / 2).take(count).copied().collect();
            assert_eq!([first, second].concat(), same);
        }
    }

    #[test]
    fn filling_keeps_to_the_limit() {
        let mut ring = Ring::default();
        let all = |pieces: &mut [IoSliceMut<'_>]| Ok::<_, ()>(pieces.iter().map(|piece| piece.len()).sum());
        let mut total = 0;
        while ring.fill(100_000, all).unwrap() > 0 {
            total = ring.len();
        }
        assert_eq!(total, 100_000);
        ring.consume(40_000);
        assert_eq!(ring.fill(100_000, all), Ok(40_000));
        assert_eq!(ring.fill(100_000, |_| Err(1)), Err(1));
    }
}
