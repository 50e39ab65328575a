//! ELF executables of 32 and 64 bits: what a loader needs of them.

use super::error::BootError;
use super::image::{Image, field};
use super::space::Space;

/// The magic number at the start of the file.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

const LITTLE_ENDIAN: u64 = 1;
const I386: u64 = 3;
const X86_64: u64 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// More program headers than any kernel has.
const MAX_HEADERS: u64 = 1024;
/// More than the notes of any kernel.
const MAX_NOTES: u64 = 1 << 20;

/// An ELF executable.
pub(super) struct Elf<'a> {
    image: &'a Image,
    /// The entry point, as the file has it.
    entry: u64,
    segments: Vec<Segment>,
}

struct Segment {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
}

impl<'a> Elf<'a> {
    pub(super) fn read(image: &'a Image) -> Result<Self, BootError> {
        let header = image.read(0, 52, "ELF header")?;
        let wide = match field::<1>(&header, 4) {
            1 => false,
            2 => true,
            _ => return Err(image.invalid("its ELF class is neither 32 nor 64 bits")),
        };
        if field::<1>(&header, 5) != LITTLE_ENDIAN || !matches!(field::<2>(&header, 18), I386 | X86_64) {
            return Err(image.invalid("it is an ELF file for another kind of machine than x86"));
        }
        let header = image.read(0, if wide { 64 } else { 52 }, "ELF header")?;
        let (entry, table, size, count, least) = if wide {
            (field::<8>(&header, 24), field::<8>(&header, 32), field::<2>(&header, 54), field::<2>(&header, 56), 56)
        } else {
            (field::<4>(&header, 24), field::<4>(&header, 28), field::<2>(&header, 42), field::<2>(&header, 44), 32)
        };
        if count == 0 {
            return Err(image.invalid("it is an ELF file without program headers, not an executable"));
        }
        if size < least || count > MAX_HEADERS {
            return Err(image.invalid("its ELF program headers make no sense"));
        }
        let headers = image.read(table, size * count, "ELF program header table")?;
        let segments = headers.chunks_exact(size as usize).map(|bytes| Segment::read(bytes, wide)).collect();
        Ok(Self { image, entry, segments })
    }

    fn of_kind(&self, kind: u32) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(move |segment| segment.kind == kind)
    }

    /// The physical address of the entry point. Kernels that are linked to run elsewhere than they are loaded have
    /// either that or the linked address in their header.
    pub(super) fn physical_entry(&self) -> u64 {
        let holds = |segment: &&Segment| {
            self.entry.checked_sub(segment.virtual_address).is_some_and(|offset| offset < segment.memory_size)
        };
        self.of_kind(PT_LOAD)
            .find(holds)
            .map_or(self.entry, |segment| segment.physical_address.wrapping_add(self.entry - segment.virtual_address))
    }

    /// The contents of the first note with this owner and type.
    pub(super) fn note(&self, owner: &[u8], kind: u64) -> Result<Option<Vec<u8>>, BootError> {
        for segment in self.of_kind(PT_NOTE) {
            let len = segment.file_size.min(MAX_NOTES);
            let notes = self.image.read(segment.offset, len, "ELF note segment")?;
            if let Some(contents) = find_note(&notes, owner, kind) {
                return Ok(Some(contents.to_vec()));
            }
        }
        Ok(None)
    }

    /// Puts the segments at their physical addresses.
    pub(super) fn load(&self, space: &mut Space<'_>) -> Result<(), BootError> {
        const WHAT: &str = "kernel segment";
        let mut loaded = false;
        for segment in self.of_kind(PT_LOAD).filter(|segment| segment.memory_size > 0) {
            let Segment { offset, physical_address, file_size, memory_size, .. } = *segment;
            let Some(rest) = memory_size.checked_sub(file_size) else {
                return Err(self.image.invalid("an ELF segment is larger in the file than in memory"));
            };
            space.claim(physical_address, memory_size, WHAT)?;
            self.image.copy(offset, file_size, space.memory(), physical_address, WHAT)?;
            space
                .memory()
                .fill(physical_address + file_size, rest, 0)
                .map_err(|source| BootError::Memory { what: WHAT, source })?;
            loaded = true;
        }
        if loaded { Ok(()) } else { Err(self.image.invalid("it is an ELF file with nothing to load")) }
    }
}

impl Segment {
    fn read(bytes: &[u8], wide: bool) -> Self {
        let kind = field::<4>(bytes, 0) as u32;
        let [offset, virtual_address, physical_address, file_size, memory_size] = if wide {
            [8, 16, 24, 32, 40].map(|at| field::<8>(bytes, at))
        } else {
            [4, 8, 12, 16, 20].map(|at| field::<4>(bytes, at))
        };
        Self { kind, offset, virtual_address, physical_address, file_size, memory_size }
    }
}

fn find_note<'a>(mut notes: &'a [u8], owner: &[u8], kind: u64) -> Option<&'a [u8]> {
    const HEADER: usize = 12;
    loop {
        let header = notes.get(..HEADER)?;
        let [owner_size, size] = [0, 4].map(|at| field::<4>(header, at) as usize);
        let contents_at = HEADER.checked_add(owner_size.checked_next_multiple_of(4)?)?;
        let end = contents_at.checked_add(size)?;
        let found = (notes.get(HEADER..HEADER.checked_add(owner_size)?)?, field::<4>(header, 8));
        if found == (owner, kind) {
            return notes.get(contents_at..end);
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..)?;
    }
}
