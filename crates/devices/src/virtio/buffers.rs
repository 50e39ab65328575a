//! Scatter lists of guest memory.

use memory::{GuestMemory, MemoryError};
use platform::GuestRange;

/// Ranges of guest RAM, one after the other.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Buffers {
    ranges: Vec<GuestRange>,
    len: u64,
}

impl Buffers {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a range; an empty one adds nothing.
    pub fn push(&mut self, range: GuestRange) {
        if range.size > 0 {
            self.len = self.len.saturating_add(range.size);
            self.ranges.push(range);
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The ranges.
    pub fn ranges(&self) -> &[GuestRange] {
        &self.ranges
    }

    /// The ranges, taken out.
    pub fn into_ranges(self) -> Vec<GuestRange> {
        self.ranges
    }

    /// Splits off the first `count` bytes: (those, the rest). With fewer bytes than that, the second is empty.
    pub fn split(self, count: u64) -> (Self, Self) {
        let (mut first, mut rest) = (Self::new(), Self::new());
        let mut wanted = count;
        for range in self.ranges {
            let here = range.size.min(wanted);
            wanted -= here;
            first.push(GuestRange { start: range.start, size: here });
            // `here` is at most the size of a range that is inside guest memory, so the sum cannot wrap.
            rest.push(GuestRange::new(range.start.0.wrapping_add(here), range.size - here));
        }
        (first, rest)
    }

    /// Splits off the last byte: (the rest, that byte). `None` if there is no byte.
    pub fn split_last(self) -> Option<(Self, GuestRange)> {
        let before = self.len.checked_sub(1)?;
        let (rest, last) = self.split(before);
        last.ranges.first().map(|last| (rest, *last))
    }

    /// Copies from the start of the buffers; returns how many bytes there were, at most `bytes.len()`.
    ///
    /// # Errors
    /// A range is outside RAM.
    pub fn read(&self, memory: &GuestMemory, bytes: &mut [u8]) -> Result<usize, MemoryError> {
        let mut done = 0;
        for range in &self.ranges {
            let here = clamp(range.size, bytes.len() - done);
            memory.read(range.start.0, &mut bytes[done..done + here])?;
            done += here;
        }
        Ok(done)
    }

    /// Copies to the start of the buffers; returns how many bytes fitted, at most `bytes.len()`.
    ///
    /// # Errors
    /// A range is outside RAM.
    pub fn write(&self, memory: &GuestMemory, bytes: &[u8]) -> Result<usize, MemoryError> {
        let mut done = 0;
        for range in &self.ranges {
            let here = clamp(range.size, bytes.len() - done);
            memory.write(range.start.0, &bytes[done..done + here])?;
            done += here;
        }
        Ok(done)
    }
}

fn clamp(size: u64, limit: usize) -> usize {
    usize::try_from(size).map_or(limit, |size| size.min(limit))
}

#[cfg(test)]
mod tests {
    use memory::MemoryOptions;

    use super::*;

    fn buffers(ranges: &[(u64, u64)]) -> Buffers {
        let mut buffers = Buffers::new();
        for (start, size) in ranges {
            buffers.push(GuestRange::new(*start, *size));
        }
        buffers
    }

    #[test]
    fn splits_anywhere() {
        let all = buffers(&[(0x100, 4), (0x200, 0), (0x300, 8)]);
        assert_eq!(all.ranges().len(), 2, "an empty range is none");
        assert_eq!(all.clone().split(0), (Buffers::new(), all.clone()));
        assert_eq!(all.clone().split(6), (buffers(&[(0x100, 4), (0x300, 2)]), buffers(&[(0x302, 6)])));
        assert_eq!(all.clone().split(4), (buffers(&[(0x100, 4)]), buffers(&[(0x300, 8)])));
        assert_eq!(all.clone().split_last(), Some((buffers(&[(0x100, 4), (0x300, 7)]), GuestRange::new(0x307, 1))));
        assert_eq!(Buffers::new().split_last(), None);
        assert_eq!(all.clone().split(99), (all, Buffers::new()));
    }

    #[test]
    fn copies_across_ranges() {
        let memory = GuestMemory::new(MemoryOptions { size: 0x1000, ..Default::default() }).unwrap();
        let list = buffers(&[(0x10, 3), (0x20, 2)]);
        assert_eq!(list.write(&memory, b"abcdefg").unwrap(), 5);
        let mut back = [0; 8];
        assert_eq!(list.read(&memory, &mut back).unwrap(), 5);
        assert_eq!(&back, b"abcde\0\0\0");
        assert_eq!(list.read(&memory, &mut back[..1]).unwrap(), 1);
        assert!(buffers(&[(0xfff, 2)]).read(&memory, &mut back).is_err());
    }
}
