//! A writer for AML (ACPI 6.5, chapter 20) that reads like ASL: terms are made by functions, and blocks take the terms
//! in them.

/// One segment of a name. Shorter names are filled up with `_`.
pub(super) type Seg = [u8; 4];

/// An encoded term: a name, a value, an operation or a whole block.
#[derive(Clone)]
pub(super) struct Term(Vec<u8>);

const EXTENDED: u8 = 0x5b;
const NULL_NAME: u8 = 0x00;

/// An argument of a method, counted from 0.
pub(super) fn arg(index: u8) -> Term {
    Term(vec![0x68 + index.min(6)])
}

/// The first argument of a method.
pub(super) fn arg0() -> Term {
    arg(0)
}

/// The first local variable of a method.
pub(super) fn local0() -> Term {
    Term(vec![0x60])
}

/// The terms one after the other.
pub(super) fn concat(terms: impl IntoIterator<Item = Term>) -> Vec<u8> {
    terms.into_iter().flat_map(|term| term.0).collect()
}

/// An integer, in its shortest form.
pub(super) fn int(value: impl Into<u64>) -> Term {
    let value = value.into();
    let bytes = value.to_le_bytes();
    let (prefix, len) = match value {
        0 => return Term(vec![0x00]),
        1 => return Term(vec![0x01]),
        2..=0xff => (0x0a, 1),
        0x100..=0xffff => (0x0b, 2),
        0x1_0000..=0xffff_ffff => (0x0c, 4),
        _ => (0x0e, 8),
    };
    let mut term = vec![prefix];
    term.extend(&bytes[..len]);
    Term(term)
}

/// A string of ASCII characters, none of them NUL.
pub(super) fn string(text: &str) -> Term {
    let mut term = vec![0x0d];
    term.extend(text.bytes().filter(|byte| byte.is_ascii() && *byte != 0));
    term.push(0);
    Term(term)
}

/// `Buffer () { … }`
pub(super) fn buffer(bytes: &[u8]) -> Term {
    block(&[0x11], &int(bytes.len() as u64).0, [Term(bytes.to_vec())])
}

/// `ToUUID (…)` of a UUID in the order in which it is printed (section 19.6.142).
pub(super) fn uuid(bytes: [u8; 16]) -> Term {
    let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
    buffer(&[&[d, c, b, a, f, e, h, g], &rest[..]].concat())
}

/// `a == b`
pub(super) fn equal(a: Term, b: Term) -> Term {
    operation(&[0x93], [a, b])
}

/// `a > b`
pub(super) fn greater(a: Term, b: Term) -> Term {
    operation(&[0x94], [a, b])
}

/// `target = a + b`
pub(super) fn add(a: Term, b: Term, target: Term) -> Term {
    operation(&[0x72], [a, b, target])
}

/// `package [index]`, a place to store to.
pub(super) fn index(package: Term, index: u64) -> Term {
    operation(&[0x88], [package, int(index), nowhere()])
}

/// `DerefOf (package [index])`
pub(super) fn element(package: Term, at: u64) -> Term {
    operation(&[0x83], [index(package, at)])
}

/// `Notify (object, value)`
pub(super) fn notify(object: Term, value: u8) -> Term {
    operation(&[0x86], [object, int(value)])
}

/// A compressed EISA id: three capital letters and four hexadecimal digits (section 19.6.37).
pub(super) fn eisa_id(id: &[u8; 7]) -> Term {
    let letter = |byte: u8| u32::from(byte & 0x1f);
    let digit = |byte: u8| char::from(byte).to_digit(16).unwrap_or(0);
    let [a, b, c, digits @ ..] = id;
    let number = digits.iter().fold(0, |number, byte| number << 4 | digit(*byte));
    let id = letter(*a) << 26 | letter(*b) << 21 | letter(*c) << 16 | number;
    int(id.swap_bytes())
}

/// A name looked up from the current scope.
pub(super) fn name_of(name: Seg) -> Term {
    Term(name.to_vec())
}

/// A name from the root.
pub(super) fn absolute(segments: &[Seg]) -> Term {
    let mut bytes = vec![b'\\'];
    match segments.len() {
        0 => bytes.push(NULL_NAME),
        1 => {}
        2 => bytes.push(0x2e),
        count => bytes.extend([0x2f, count as u8]),
    }
    bytes.extend(segments.concat());
    Term(bytes)
}

/// The length of a block (section 20.2.4), which counts its own bytes too.
fn block_length(content: usize) -> Vec<u8> {
    let size = match content {
        0..=0x3e => return vec![content as u8 + 1],
        0x3f..=0xffd => 2,
        0xffe..=0xf_fffc => 3,
        _ => 4,
    };
    let total = content + size;
    let mut bytes = vec![((size - 1) << 6 | total & 0xf) as u8];
    bytes.extend((1..size).map(|index| (total >> (8 * index - 4)) as u8));
    bytes
}

fn block(opcode: &[u8], head: &[u8], terms: impl IntoIterator<Item = Term>) -> Term {
    let mut content = head.to_vec();
    content.extend(concat(terms));
    let mut bytes = opcode.to_vec();
    bytes.extend(block_length(content.len()));
    bytes.extend(content);
    Term(bytes)
}

fn operation(opcode: &[u8], operands: impl IntoIterator<Item = Term>) -> Term {
    let mut bytes = opcode.to_vec();
    bytes.extend(concat(operands));
    Term(bytes)
}

/// `Name (name, value)`
pub(super) fn name(name: Seg, value: Term) -> Term {
    operation(&[0x08], [name_of(name), value])
}

/// `Scope (path) { … }`
pub(super) fn scope(path: Term, terms: impl IntoIterator<Item = Term>) -> Term {
    block(&[0x10], &path.0, terms)
}

/// `Device (name) { … }`
pub(super) fn device(name: Seg, terms: impl IntoIterator<Item = Term>) -> Term {
    block(&[EXTENDED, 0x82], &name, terms)
}

/// `Method (name, arguments, NotSerialized) { … }`
pub(super) fn method(name: Seg, arguments: u8, terms: impl IntoIterator<Item = Term>) -> Term {
    let [a, b, c, d] = name;
    block(&[0x14], &[a, b, c, d, arguments & 7], terms)
}

/// `Method (name, arguments, Serialized) { … }`, for one that makes names of its own.
pub(super) fn serialized_method(name: Seg, arguments: u8, terms: impl IntoIterator<Item = Term>) -> Term {
    let [a, b, c, d] = name;
    block(&[0x14], &[a, b, c, d, arguments & 7 | 8], terms)
}

/// `Package () { … }`
pub(super) fn package(elements: Vec<Term>) -> Term {
    match u8::try_from(elements.len()) {
        Ok(count) => block(&[0x12], &[count], elements),
        Err(_) => block(&[0x13], &int(elements.len() as u64).0, elements),
    }
}

/// `OperationRegion (name, PCI_Config, offset, length)`
pub(super) fn pci_config_region(name: Seg, offset: u64, length: u64) -> Term {
    const PCI_CONFIG: u8 = 2;
    region(name, PCI_CONFIG, int(offset), length)
}

/// `OperationRegion (name, SystemMemory, address, length)`
pub(super) fn memory_region(name: Seg, address: Term, length: u64) -> Term {
    const SYSTEM_MEMORY: u8 = 0;
    region(name, SYSTEM_MEMORY, address, length)
}

fn region(name: Seg, space: u8, offset: Term, length: u64) -> Term {
    let mut bytes = vec![EXTENDED, 0x80];
    bytes.extend(name);
    bytes.push(space);
    bytes.extend(concat([offset, int(length)]));
    Term(bytes)
}

/// `Field (region, ByteAcc, NoLock, Preserve) { … }` of 8-bit fields, each with its byte offset, in rising order.
pub(super) fn byte_fields(region: Seg, list: &[(u8, Seg)]) -> Term {
    let list: Vec<_> = list.iter().map(|(offset, field)| (usize::from(*offset), 1, *field)).collect();
    fields(region, &list)
}

/// `Field (region, ByteAcc, NoLock, Preserve) { … }` of fields of whole bytes: byte offset, bytes, name, in rising order.
pub(super) fn fields(region: Seg, fields: &[(usize, usize, Seg)]) -> Term {
    const BYTE_ACCESS: u8 = 1;
    let [a, b, c, d] = region;
    let mut at = 0;
    let mut list = Vec::new();
    for (offset, size, field) in fields {
        let gap = offset.saturating_sub(at);
        if gap > 0 {
            list.push(0);
            list.extend(field_length(gap * 8));
        }
        list.extend(field);
        list.extend(field_length(size * 8));
        at = offset + size;
    }
    block(&[EXTENDED, 0x81], &[a, b, c, d, BYTE_ACCESS], [Term(list)])
}

/// A length in bits: coded as that of a block, but without its own bytes. For up to 4095 bits.
fn field_length(bits: usize) -> Vec<u8> {
    if bits <= 0x3f { vec![bits as u8] } else { vec![(1 << 6 | bits & 0xf) as u8, (bits >> 4) as u8] }
}

/// `If (condition) { … }`
pub(super) fn if_(condition: Term, terms: impl IntoIterator<Item = Term>) -> Term {
    block(&[0xa0], &condition.0, terms)
}

/// `Else { … }`, right behind an `If`.
pub(super) fn else_(terms: impl IntoIterator<Item = Term>) -> Term {
    block(&[0xa1], &[], terms)
}

/// `Return (value)`
pub(super) fn return_(value: Term) -> Term {
    operation(&[0xa4], [value])
}

/// `target = value`
pub(super) fn store(value: Term, target: Term) -> Term {
    operation(&[0x70], [value, target])
}

/// The target of an operation whose result only goes on as a value.
pub(super) fn nowhere() -> Term {
    Term(vec![NULL_NAME])
}

/// `target = a & b`
pub(super) fn and(a: Term, b: Term, target: Term) -> Term {
    operation(&[0x7b], [a, b, target])
}

/// `target = value << count`
pub(super) fn shift_left(value: Term, count: Term, target: Term) -> Term {
    operation(&[0x79], [value, count, target])
}

/// `target = value >> count`
pub(super) fn shift_right(value: Term, count: Term, target: Term) -> Term {
    operation(&[0x7a], [value, count, target])
}

/// `target = a - b`
pub(super) fn subtract(a: Term, b: Term, target: Term) -> Term {
    operation(&[0x74], [a, b, target])
}

/// `FindSetRightBit (value, target)`: the number of the lowest set bit, counted from 1, or 0.
pub(super) fn find_set_right_bit(value: Term, target: Term) -> Term {
    operation(&[0x82], [value, target])
}

/// `CreateWordField (buffer, offset, name)`
pub(super) fn create_word_field(buffer: Term, offset: u64, name: Seg) -> Term {
    operation(&[0x8b], [buffer, int(offset), name_of(name)])
}

/// A call of the method `name`.
pub(super) fn call(name: Seg, arguments: impl IntoIterator<Item = Term>) -> Term {
    operation(&name, arguments)
}

/// A resource descriptor (section 6.4).
pub(super) struct Resource(Vec<u8>);

/// `ResourceTemplate () { … }`
pub(super) fn resources(list: impl IntoIterator<Item = Resource>) -> Term {
    const END_TAG: [u8; 2] = [0x79, 0]; // a checksum of 0 means that there is none
    let mut bytes: Vec<u8> = list.into_iter().flat_map(|resource| resource.0).collect();
    bytes.extend(END_TAG);
    block(&[0x11], &int(bytes.len() as u64).0, [Term(bytes)])
}

impl Resource {
    /// `IO (Decode16, first, first, 1, count)`: fixed ports.
    pub(super) fn ports(first: u16, count: u8) -> Self {
        let [low, high] = first.to_le_bytes();
        Self(vec![0x47, 1, low, high, low, high, 1, count])
    }

    /// `IRQNoFlags () {irq}`: an edge-triggered ISA interrupt.
    pub(super) fn isa_irq(irq: u8) -> Self {
        let [low, high] = 1u16.checked_shl(irq.into()).unwrap_or(0).to_le_bytes();
        Self(vec![0x22, low, high])
    }

    /// `IRQ (Level, ActiveLow, Shared) {…}`: a PCI interrupt on one of the ISA interrupts in `mask`. The mask is at
    /// [`Resource::PCI_IRQ_MASK`] of the descriptor.
    pub(super) fn pci_irq(mask: u16) -> Self {
        const LEVEL_LOW_SHARED: u8 = 1 << 4 | 1 << 3;
        let [low, high] = mask.to_le_bytes();
        Self(vec![0x23, low, high, LEVEL_LOW_SHARED])
    }

    /// Offset of the mask in [`Resource::pci_irq`].
    pub(super) const PCI_IRQ_MASK: u64 = 1;

    /// `Memory32Fixed (ReadWrite, base, size)`
    pub(super) fn memory32(base: u32, size: u32) -> Self {
        let mut bytes = vec![0x86, 9, 0, 1];
        bytes.extend(base.to_le_bytes());
        bytes.extend(size.to_le_bytes());
        Self(bytes)
    }

    /// `WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, …)` of one bus.
    pub(super) fn bus(number: u8) -> Self {
        Self::window::<2>(0x88, 2, 0, number.into(), 1)
    }

    /// `DWordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, …)`
    pub(super) fn io_window(first: u32, size: u32) -> Self {
        Self::window::<4>(0x87, 1, 3, first.into(), size.into())
    }

    /// `DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, …)`
    pub(super) fn mem32_window(base: u32, size: u32) -> Self {
        Self::window::<4>(0x87, 0, 1, base.into(), size.into())
    }

    /// `QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite, …)`
    pub(super) fn mem64_window(base: u64, size: u64) -> Self {
        Self::window::<8>(0x8a, 0, 1, base, size)
    }

    /// An address space descriptor with numbers of `N` bytes.
    fn window<const N: usize>(tag: u8, kind: u8, flags: u8, first: u64, size: u64) -> Self {
        const FIXED: u8 = 1 << 3 | 1 << 2;
        let mut bytes = vec![tag, 3 + 5 * N as u8, 0, kind, FIXED, flags];
        let last = first.saturating_add(size.saturating_sub(1));
        for number in [0, first, last, 0, size] {
            bytes.extend(&number.to_le_bytes()[..N]);
        }
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a block length back, as an interpreter does: (its value, its bytes).
    fn read_length(bytes: &[u8]) -> (usize, usize) {
        let more = usize::from(bytes[0] >> 6);
        if more == 0 {
            return (usize::from(bytes[0] & 0x3f), 1);
        }
        let rest = (0..more).map(|index| usize::from(bytes[1 + index]) << (4 + 8 * index)).sum::<usize>();
        (usize::from(bytes[0] & 0xf) + rest, 1 + more)
    }

    #[test]
    fn block_lengths_count_themselves() {
        for content in [0, 1, 0x3e, 0x3f, 0x40, 0xffd, 0xffe, 0xfff, 0x1000, 0xf_fffc, 0xf_fffd, 0x12_3456] {
            let bytes = block_length(content);
            assert_eq!(read_length(&bytes), (content + bytes.len(), bytes.len()), "{content:#x}");
        }
    }

    #[test]
    fn integers_take_their_shortest_form() {
        let bytes = |value: u64| int(value).0;
        assert_eq!(bytes(0), [0]);
        assert_eq!(bytes(1), [1]);
        assert_eq!(bytes(2), [0x0a, 2]);
        assert_eq!(bytes(0x100), [0x0b, 0, 1]);
        assert_eq!(bytes(0x1_0000), [0x0c, 0, 0, 1, 0]);
        assert_eq!(bytes(1 << 32), [0x0e, 0, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn eisa_ids_are_compressed() {
        // The well-known encodings of PNP0A03 and PNP0C0F.
        assert_eq!(eisa_id(b"PNP0A03").0, [0x0c, 0x41, 0xd0, 0x0a, 0x03]);
        assert_eq!(eisa_id(b"PNP0C0F").0, [0x0c, 0x41, 0xd0, 0x0c, 0x0f]);
    }

    #[test]
    fn large_packages_have_a_variable_count() {
        let small = package(vec![int(0u8); 255]).0;
        assert_eq!((small[0], small[3]), (0x12, 255));
        let large = package(vec![int(0u8); 256]).0;
        assert_eq!((large[0], &large[3..6]), (0x13, &[0x0b, 0, 1][..]));
    }
}
