//! The system resource affinity table (ACPI 6.5, section 5.2.16): which memory and which processors belong together.

use memory::HIGH_MEMORY_BASE;

use super::super::Bytes;
use super::table;
use crate::board::Board;

/// "This entry is in use", in all kinds of entries.
const ENABLED: u32 = 1;

/// The SRAT of a board with memory domains. Domains take RAM in their order, from address 0 upwards.
pub(super) fn srat(board: &Board) -> Vec<u8> {
    let mut srat = Bytes::default();
    srat.u32(1).zeros(8);
    for (domain, start, size) in ranges(board) {
        srat.u8(1).u8(40).u32(domain).u16(0).u64(start).u64(size).u32(0).u32(ENABLED).zeros(8);
    }
    for (domain, numa) in (0..).zip(&board.numa) {
        let ids = numa.cpus.iter().filter_map(|cpu| board.apic_ids.get(*cpu as usize));
        for id in ids {
            processor(&mut srat, domain, *id, board.x2apic);
        }
    }
    table(b"SRAT", 3, b"BVSRAT  ", &srat.0)
}

/// The domains' pieces of RAM: domain, first address, bytes. One that reaches over the hole below 4 GiB has two.
fn ranges(board: &Board) -> Vec<(u32, u64, u64)> {
    let mut pieces = Vec::new();
    let mut holes = [(0, board.low_memory), (HIGH_MEMORY_BASE, board.high_memory)].into_iter();
    let mut free = holes.next();
    for (domain, numa) in (0..).zip(&board.numa) {
        let mut wanted = numa.size;
        while let Some((start, size)) = free.filter(|_| wanted > 0) {
            let piece = wanted.min(size);
            if piece > 0 {
                pieces.push((domain, start, piece));
            }
            wanted -= piece;
            free = if size > piece { Some((start + piece, size - piece)) } else { holes.next() };
        }
    }
    pieces
}

fn processor(srat: &mut Bytes, domain: u32, id: u32, x2apic: bool) {
    match u8::try_from(id) {
        Ok(id) if !x2apic && id != 0xff => {
            let [low, high @ ..] = domain.to_le_bytes();
            srat.u8(0).u8(16).u8(low).u8(id).u32(ENABLED).u8(0).raw(&high).u32(0);
        }
        _ => {
            srat.u8(2).u8(24).u16(0).u32(domain).u32(id).u32(ENABLED).u32(0).zeros(4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NumaDomain;
    use crate::fixture::{board, number};

    const GIB: u64 = 1 << 30;

    fn entries(board: &Board) -> Vec<Vec<u8>> {
        let srat = srat(board);
        assert_eq!((number(&srat, 36, 4), number(&srat, 40, 8)), (1, 0));
        let mut rest = &srat[48..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (entry, tail) = rest.split_at(rest[1].into());
            found.push(entry.to_vec());
            rest = tail;
        }
        found
    }

    fn numa_board(sizes: &[u64]) -> Board {
        let cpus = |index: usize| vec![index as u32];
        let numa =
            sizes.iter().enumerate().map(|(index, size)| NumaDomain { size: *size, cpus: cpus(index) }).collect();
        Board { numa, low_memory: 3 * GIB, high_memory: 2 * GIB, apic_ids: vec![0, 4], ..board() }
    }

    #[test]
    fn domains_take_ram_in_their_order_around_the_hole() {
        let found = entries(&numa_board(&[2 * GIB, 3 * GIB]));
        let memory: Vec<_> = found
            .iter()
            .filter(|entry| entry[0] == 1)
            .map(|entry| (number(entry, 2, 4), number(entry, 8, 8), number(entry, 16, 8), number(entry, 28, 4)))
            .collect();
        assert_eq!(memory, [(0, 0, 2 * GIB, 1), (1, 2 * GIB, GIB, 1), (1, 4 * GIB, 2 * GIB, 1)]);
        let processors: Vec<_> = found.iter().filter(|entry| entry[0] == 0).map(|entry| (entry[2], entry[3])).collect();
        assert_eq!(processors, [(0, 0), (1, 4)]);
    }

    #[test]
    fn wide_ids_use_the_wide_form_and_unknown_processors_none() {
        let mut board = Board { x2apic: true, ..numa_board(&[GIB, GIB]) };
        board.numa[1].cpus = vec![1, 77];
        let found = entries(&board);
        let wide: Vec<_> = found
            .iter()
            .filter(|entry| entry[0] == 2)
            .map(|entry| (number(entry, 4, 4), number(entry, 8, 4)))
            .collect();
        assert_eq!(wide, [(0, 0), (1, 4)]);
        assert!(found.iter().all(|entry| entry[0] != 0));
    }
}
