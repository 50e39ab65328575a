//! Descriptor tables (SDM vol. 3, chapters 3, 6, 7).

use platform::x86::Segment;

use super::{Machine, at};

/// Selectors of the machine's GDT.
pub mod sel {
    pub const CODE32: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE16: u16 = 0x18;
    pub const DATA16: u16 = 0x20;
    pub const CODE64: u16 = 0x28;
    pub const USER_CODE32: u16 = 0x33;
    pub const USER_DATA: u16 = 0x3b;
    pub const USER_CODE64: u16 = 0x43;
    /// Two entries in long mode.
    pub const TSS: u16 = 0x48;
    pub const TSS2: u16 = 0x58;
    pub const LDT: u16 = 0x60;
    /// Entries for a test to fill: this one and all up to 0xf8.
    pub const FREE: u16 = 0x70;
}

/// Limit of the GDT.
pub const GDT_LIMIT: u16 = 0xff;

/// A segment descriptor: base, limit in bytes, access byte, flags (bit 3 G, 2 D/B, 1 L). With G the limit is in pages.
pub fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | (limit >> 16 & 15) << 48
        | u64::from(flags) << 52
        | (base >> 24) << 56
}

/// A gate's lower eight bytes: selector, offset, access byte (0x8E: present, DPL 0, 32/64-bit interrupt gate), count
/// (parameter count of a call gate, IST of a 64-bit interrupt gate).
pub fn gate(selector: u16, offset: u32, access: u8, count: u8) -> u64 {
    let offset = u64::from(offset);
    (offset & 0xffff)
        | u64::from(selector) << 16
        | u64::from(count) << 32
        | u64::from(access) << 40
        | (offset >> 16) << 48
}

pub(super) fn write_gdt(machine: &mut Machine, long: bool) {
    let entries = [
        (0, 0),
        (sel::CODE32, descriptor(0, 0xfffff, 0x9b, 0xc)),
        (sel::DATA, descriptor(0, 0xfffff, 0x93, 0xc)),
        (sel::CODE16, descriptor(0, 0xffff, 0x9b, 0)),
        (sel::DATA16, descriptor(0, 0xffff, 0x93, 0)),
        (sel::CODE64, descriptor(0, 0xfffff, 0x9b, 0xa)),
        (sel::USER_CODE32, descriptor(0, 0xfffff, 0xfb, 0xc)),
        (sel::USER_DATA, descriptor(0, 0xfffff, 0xf3, 0xc)),
        (sel::USER_CODE64, descriptor(0, 0xfffff, 0xfb, 0xa)),
        (sel::TSS, descriptor(at::TSS as u32, at::TSS_LIMIT, 0x8b, 0)),
        (sel::TSS2, if long { 0 } else { descriptor(at::TSS2 as u32, 0x67, 0x89, 0) }),
        (sel::LDT, descriptor(at::LDT as u32, 0xff, 0x82, 0)),
    ];
    for (selector, entry) in entries {
        machine.set_descriptor(selector, entry);
    }
}

impl Machine {
    /// Writes an entry of the GDT.
    pub fn set_descriptor(&self, selector: u16, value: u64) {
        self.put64(at::GDT + u64::from(selector & !7), value);
    }

    /// Writes an entry of the IDT outside long mode.
    pub fn set_gate(&self, vector: u8, value: u64) {
        self.put64(at::IDT + 8 * u64::from(vector), value);
    }

    /// Writes an entry of the IDT of long mode.
    pub fn set_gate64(&self, vector: u8, offset: u64, access: u8, ist: u8) {
        self.put64(at::IDT + 16 * u64::from(vector), gate(sel::CODE64, offset as u32, access, ist));
        self.put64(at::IDT + 16 * u64::from(vector) + 8, offset >> 32);
    }

    /// What loading a selector of the GDT gives.
    pub fn segment(&self, selector: u16) -> Segment {
        let raw = self.get64(at::GDT + u64::from(selector & !7));
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        Segment {
            selector,
            base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
            limit: if raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit },
            access: (raw >> 40 & 0xf0ff) as u32,
        }
    }

    /// Lets ring 3 reach a vector's handler by INT n.
    pub fn open_gate(&self, vector: u8) {
        let size = if self.bits() == 64 { 16 } else { 8 };
        let access = at::IDT + size * u64::from(vector) + 5;
        self.put8(access, self.get8(access) | 0x60);
    }
}
