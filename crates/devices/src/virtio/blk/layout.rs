//! The configuration structure of a disk (virtio 1.2, 5.2.4).

use backend::block::Geometry;

/// Bytes of the structure, up to and including what belongs to write-zeroes.
pub(super) const SIZE: usize = 60;

/// Size of the unit in which requests and this structure count, whatever the disk's own sector size.
pub(super) const SECTOR: u64 = 512;

/// Segments of one request, at most: a ring of 128 without header and status.
const SEGMENTS: u32 = 126;
/// Sectors of one discard or write-zeroes request, at most: 1 GiB.
pub(super) const MAX_CLEAR_SECTORS: u32 = 1 << 21;

mod offset {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// The structure of a disk.
pub(super) fn structure(geometry: &Geometry, queues: u16) -> [u8; SIZE] {
    let sectors = geometry.sector_size;
    let exponent = (sectors.physical / sectors.logical).trailing_zeros() as u8;
    let mut bytes = [0; SIZE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(offset::CAPACITY, &(geometry.size / SECTOR).to_le_bytes());
    put(offset::SEG_MAX, &SEGMENTS.to_le_bytes());
    put(offset::BLK_SIZE, &sectors.logical.to_le_bytes());
    put(offset::PHYSICAL_BLOCK_EXP, &[exponent]);
    put(offset::NUM_QUEUES, &queues.to_le_bytes());
    if geometry.discard {
        put(offset::MAX_DISCARD_SECTORS, &MAX_CLEAR_SECTORS.to_le_bytes());
        put(offset::MAX_DISCARD_SEG, &1u32.to_le_bytes());
        put(offset::DISCARD_ALIGNMENT, &(u64::from(sectors.physical) / SECTOR).to_le_bytes()[..4]);
    }
    if !geometry.read_only {
        put(offset::MAX_WRITE_ZEROES_SECTORS, &MAX_CLEAR_SECTORS.to_le_bytes());
        put(offset::MAX_WRITE_ZEROES_SEG, &1u32.to_le_bytes());
        put(offset::WRITE_ZEROES_MAY_UNMAP, &[u8::from(geometry.discard)]);
    }
    bytes
}
