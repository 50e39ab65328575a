//! INQUIRY: standard data and vital product data (SPC-4, 6.6 and 7.8; SBC-3, 6.6).

use super::cdb::Cdb;
use super::sense::Sense;

const VENDOR: &[u8; 8] = b"BHYVE   ";
const PRODUCT: &[u8; 16] = b"SCSI DISK       ";
const REVISION: &[u8; 4] = b"001 ";

/// Blocks of one WRITE SAME, at most.
pub const MAX_WRITE_SAME: u64 = 1 << 16;
/// Blocks of one UNMAP descriptor, and descriptors of one UNMAP, at most.
pub const MAX_UNMAP: u32 = 1 << 22;
/// Descriptors of one UNMAP, at most.
pub const MAX_UNMAP_DESCRIPTORS: u32 = 64;

/// What INQUIRY tells of a disk.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Unit serial number.
    pub serial: String,
    /// Something unique, for the identifier by which systems find the disk again.
    pub unique: u64,
}

/// What INQUIRY needs to know besides.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Unmapping gives space back.
    pub discard: bool,
    /// Granularity of that, in blocks.
    pub granularity: u32,
}

/// The answer of a logical unit.
///
/// # Errors
/// A page that it does not have.
pub fn answer(cdb: Cdb<'_>, identity: &Identity, traits: Traits) -> Result<Vec<u8>, Sense> {
    let (vital, page) = (cdb.byte(1) & 1 != 0, cdb.byte(2));
    if !vital {
        return if page == 0 { Ok(standard(0)) } else { Err(Sense::INVALID_FIELD) };
    }
    let body = match page {
        0x00 => vec![0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2],
        0x80 => identity.serial.as_bytes().to_vec(),
        0x83 => identifiers(identity),
        0xb0 => limits(traits),
        // Not rotating; everything else is not reported.
        0xb1 => [&[0, 1][..], &[0; 58]].concat(),
        // UNMAP, WRITE SAME(16) and (10) with UNMAP; thin provisioning.
        0xb2 if traits.discard => vec![0, 0xe0, 2, 0],
        0xb2 => vec![0, 0, 0, 0],
        _ => return Err(Sense::INVALID_FIELD),
    };
    Ok([&[0, page][..], &(body.len() as u16).to_be_bytes(), &body].concat())
}

/// The answer where there is no logical unit.
pub fn absent() -> Vec<u8> {
    // Qualifier: not capable of having one here; type: unknown.
    standard(0x7f)
}

fn standard(qualifier_and_type: u8) -> Vec<u8> {
    // SPC-4; hierarchical addressing, format 2; 31 bytes follow byte 4; commands are queued.
    let head = [qualifier_and_type, 0, 6, 0x12, 31, 0, 0, 2];
    [&head[..], VENDOR, PRODUCT, REVISION].concat()
}

/// A T10 vendor identification and a locally assigned NAA one.
fn identifiers(identity: &Identity) -> Vec<u8> {
    let name = [&VENDOR[..], identity.serial.as_bytes()].concat();
    // ASCII and binary, both of the logical unit.
    let mut all = vec![2, 1, 0, name.len() as u8];
    all.extend(name);
    all.extend([1, 3, 0, 8]);
    all.extend((3 << 60 | identity.unique >> 4).to_be_bytes());
    all
}

fn limits(traits: Traits) -> Vec<u8> {
    let mut page = [0; 60];
    let mut put = |at: usize, value: &[u8]| page[at - 4..at - 4 + value.len()].copy_from_slice(value);
    if traits.discard {
        put(20, &MAX_UNMAP.to_be_bytes());
        put(24, &MAX_UNMAP_DESCRIPTORS.to_be_bytes());
        put(28, &traits.granularity.to_be_bytes());
    }
    put(36, &MAX_WRITE_SAME.to_be_bytes());
    page.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u8) -> Result<Vec<u8>, Sense> {
        let identity = Identity { serial: "BHYVE-1234".into(), unique: 0xfedc_ba98_7654_3210 };
        answer(Cdb(&[0x12, 1, number, 0, 255, 0]), &identity, Traits { discard: true, granularity: 8 })
    }

    #[test]
    fn pages_have_the_length_they_say() {
        for number in page(0).unwrap().split_off(4) {
            let bytes = page(number).unwrap();
            assert_eq!(bytes[1], number);
            assert_eq!(usize::from(u16::from_be_bytes([bytes[2], bytes[3]])), bytes.len() - 4);
        }
        assert_eq!(page(0xb0).unwrap().len(), 64);
        assert_eq!(page(0xb0).unwrap()[36..44], (1u64 << 16).to_be_bytes());
        assert_eq!(page(0x80).unwrap()[4..], *b"BHYVE-1234");
        let ids = page(0x83).unwrap();
        assert_eq!(ids[ids.len() - 8..], 0x3fed_cba9_8765_4321_u64.to_be_bytes());
        assert_eq!(page(0x42), Err(Sense::INVALID_FIELD));
    }

    #[test]
    fn standard_data() {
        let bytes = standard(0);
        assert_eq!((bytes.len(), bytes[4]), (36, 31));
        assert_eq!(bytes[8..16], *b"BHYVE   ");
        assert_eq!(absent()[0], 0x7f);
    }
}
