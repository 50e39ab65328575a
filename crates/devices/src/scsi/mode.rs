//! MODE SENSE and MODE SELECT (SPC-4, 6.11 to 6.14 and 7.5; SBC-3, 6.5).

use super::cdb::{Cdb, opcode};
use super::sense::Sense;

const ALL_PAGES: u8 = 0x3f;

/// What the mode pages tell of.
#[derive(Clone, Copy, Debug)]
pub struct Medium {
    /// Writes are refused.
    pub read_only: bool,
    /// Writes are done before they are on stable storage.
    pub write_cache: bool,
    /// Number of blocks.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_size: u32,
}

/// The pages there are: error recovery, caching, control.
fn pages(medium: Medium) -> [Vec<u8>; 3] {
    let mut recovery = vec![0; 12];
    (recovery[0], recovery[1]) = (0x01, 10);
    let mut caching = vec![0; 20];
    (caching[0], caching[1]) = (0x08, 18);
    caching[2] = u8::from(medium.write_cache) << 2;
    let mut control = vec![0; 12];
    (control[0], control[1]) = (0x0a, 10);
    // Unrestricted reordering: initiators flush where order matters.
    control[3] = 0x10;
    [recovery, caching, control]
}

/// The answer to MODE SENSE (6) or (10).
///
/// # Errors
/// A page or subpage that is not there, or saved values, which there are none of.
pub fn sense(cdb: Cdb<'_>, medium: Medium) -> Result<Vec<u8>, Sense> {
    let long = cdb.opcode() == opcode::MODE_SENSE_10;
    let (control, page, subpage) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3f, cdb.byte(3));
    if control == 3 {
        return Err(Sense::new(5, 0x39, 0));
    }
    if subpage != 0 && !(page == ALL_PAGES && subpage == 0xff) {
        return Err(Sense::INVALID_FIELD);
    }
    let mut chosen: Vec<_> = pages(medium).into_iter().filter(|bytes| page == ALL_PAGES || bytes[0] == page).collect();
    if chosen.is_empty() {
        return Err(Sense::INVALID_FIELD);
    }
    if control == 1 {
        // Nothing can be changed.
        chosen.iter_mut().for_each(|page| page[2..].fill(0));
    }
    let descriptor =
        if cdb.byte(1) & 8 == 0 { descriptor(medium, long && cdb.byte(1) & 0x10 != 0) } else { Vec::new() };
    // Write protected; FUA is honoured.
    let specific = u8::from(medium.read_only) << 7 | 0x10;
    let body = [descriptor.as_slice(), &chosen.concat()].concat();
    Ok(if long {
        let len = (body.len() + 6) as u16;
        let long_lba = u8::from(descriptor.len() == 16);
        let head = [&len.to_be_bytes()[..], &[0, specific, long_lba, 0], &(descriptor.len() as u16).to_be_bytes()];
        [&head.concat()[..], &body].concat()
    } else {
        [&[(body.len() + 3) as u8, 0, specific, descriptor.len() as u8][..], &body].concat()
    })
}

fn descriptor(medium: Medium, long: bool) -> Vec<u8> {
    if long {
        return [&medium.blocks.to_be_bytes()[..], &[0; 4], &medium.block_size.to_be_bytes()].concat();
    }
    let blocks = u32::try_from(medium.blocks).unwrap_or(u32::MAX);
    // The second number has 24 bits; larger sectors than that are none.
    [blocks.to_be_bytes(), medium.block_size.to_be_bytes()].concat()
}

/// Checks the parameter list of MODE SELECT, which may set things to what they are.
///
/// # Errors
/// It is cut short, or would change something.
pub fn select(cdb: Cdb<'_>, list: &[u8], medium: Medium) -> Result<(), Sense> {
    // Pages in the standard's format; not saved.
    if cdb.byte(1) & 0x11 != 0x10 {
        return Err(Sense::INVALID_FIELD);
    }
    if list.is_empty() {
        return Ok(());
    }
    let (header, descriptors) = if cdb.opcode() == opcode::MODE_SELECT_10 {
        (8, list.get(6..8).map(|len| usize::from(u16::from_be_bytes([len[0], len[1]]))))
    } else {
        (4, list.get(3).map(|len| usize::from(*len)))
    };
    let descriptors = descriptors.ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    let mut rest = list.get(header + descriptors..).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    let own = pages(medium);
    while let [page, len, ..] = *rest {
        let known = own.iter().find(|own| own[0] == page & 0x7f).ok_or(Sense::INVALID_PARAMETER)?;
        let given = rest.get(..usize::from(len) + 2).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
        if given.len() != known.len() || given[2..] != known[2..] {
            return Err(Sense::INVALID_PARAMETER);
        }
        rest = &rest[given.len()..];
    }
    if rest.is_empty() { Ok(()) } else { Err(Sense::PARAMETER_LIST_LENGTH) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEDIUM: Medium = Medium { read_only: true, write_cache: true, blocks: 2048, block_size: 512 };

    #[test]
    fn sense_and_select() {
        let short = sense(Cdb(&[0x1a, 0, 0x3f, 0, 255, 0]), MEDIUM).unwrap();
        assert_eq!(usize::from(short[0]), short.len() - 1);
        assert_eq!((short[2], short[3]), (0x90, 8));
        assert_eq!(short[4..12], [0, 0, 8, 0, 0, 0, 2, 0]);
        let long = sense(Cdb(&[0x5a, 0x18, 8, 0, 0, 0, 0, 0, 255, 0]), MEDIUM).unwrap();
        assert_eq!(usize::from(u16::from_be_bytes([long[0], long[1]])), long.len() - 2);
        assert_eq!(long[8..11], [8, 18, 4], "no descriptor; the cache is on");
        let wide = sense(Cdb(&[0x5a, 0x10, 8]), MEDIUM).unwrap();
        assert_eq!((wide[4], wide[7], wide[8 + 14]), (1, 16, 2));
        let changeable = sense(Cdb(&[0x1a, 8, 0x48]), MEDIUM).unwrap();
        assert!(changeable[6..].iter().all(|byte| *byte == 0));
        assert!(sense(Cdb(&[0x1a, 0, 0x2a]), MEDIUM).is_err());
        assert!(sense(Cdb(&[0x1a, 0, 0xff]), MEDIUM).is_err(), "saved values");

        let cdb = Cdb(&[0x15, 0x10]);
        let mut list = sense(Cdb(&[0x1a, 0, 0x08]), MEDIUM).unwrap();
        assert_eq!(select(cdb, &list, MEDIUM), Ok(()));
        assert_eq!(select(cdb, &[], MEDIUM), Ok(()));
        assert_eq!(select(cdb, &list[..20], MEDIUM), Err(Sense::PARAMETER_LIST_LENGTH));
        assert_eq!(select(cdb, &list[..3], MEDIUM), Err(Sense::PARAMETER_LIST_LENGTH));
        list[14] ^= 4;
        assert_eq!(select(cdb, &list, MEDIUM), Err(Sense::INVALID_PARAMETER));
        assert_eq!(select(Cdb(&[0x15, 0]), &list, MEDIUM), Err(Sense::INVALID_FIELD));
    }
}
