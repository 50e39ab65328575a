use iced_x86::code_asm::*;
use platform::x86::{SEGMENT_UNUSABLE, cr4, gpr, rflags};

use crate::testing::{Machine, at, descriptor, gate, sel};

const FREE: u16 = sel::FREE;

#[test]
fn gdtr_and_idtr_with_each_base_size() {
    let mut m = Machine::long();
    m.put(0x5000, 0x1234u16);
    m.put(0x5002, 0xffff_8000_1122_3344u64);
    m.code(|a| {
        a.lgdt(ptr(0x5000))?;
        a.lidt(ptr(0x5000))?;
        a.sgdt(ptr(0x5010))?;
        a.sidt(ptr(0x5020))
    });
    m.step(4);
    for address in [0x5010, 0x5020] {
        assert_eq!((m.get::<u16>(address), m.get::<u64>(address + 2)), (0x1234, 0xffff_8000_1122_3344));
    }
    // 16-bit operand size: 24 bits are loaded, 32 stored.
    let mut m = Machine::real();
    m.put(0x5000, 0x1234u16);
    m.put(0x5002, 0x5566_7788u32);
    m.bytes(&[0x0f, 0x01, 0x16, 0, 0x50, 0x0f, 0x01, 0x06, 0x10, 0x50, 0x66, 0x0f, 0x01, 0x1e, 0, 0x50]);
    m.put(0x5016, 0xaa55u16);
    m.step(3);
    assert_eq!((m.vcpu.gdtr.base, m.vcpu.gdtr.limit, m.vcpu.idtr.base), (0x66_7788, 0x1234, 0x5566_7788));
    assert_eq!((m.get::<u32>(0x5012), m.get::<u16>(0x5016)), (0x66_7788, 0xaa55));
}

#[test]
fn table_registers_are_ring_0s() {
    let mut m = Machine::long().into_user();
    m.code(|a| a.lgdt(ptr(0x5000)));
    m.step(1);
    m.assert_in_handler(13);
    let mut m = Machine::long();
    m.put(0x5002, 1u64 << 63);
    m.code(|a| a.lidt(ptr(0x5000)));
    m.step(1);
    m.assert_in_handler(13);
    for umip in [false, true] {
        for bytes in [&[0x0f, 0x01, 0x04, 0x25, 0, 0x50, 0, 0][..], &[0x0f, 0x00, 0xc8], &[0x0f, 0x00, 0xc0]] {
            let mut m = Machine::long().into_user();
            if umip {
                m.vcpu.cr4 |= cr4::UMIP;
            }
            m.bytes(bytes);
            m.step(1);
            if umip {
                m.assert_in_handler(13);
            } else {
                assert_eq!(m.vcpu.rip(), at::CODE + bytes.len() as u64);
            }
        }
    }
}

#[test]
fn ltr_marks_the_segment_busy() {
    let mut m = Machine::long();
    m.set_descriptor(FREE, descriptor(0x1122_3344, 0x67, 0x89, 0));
    m.set_descriptor(FREE + 8, 0xffff_8000);
    m.set_reg(gpr::RAX, u64::from(FREE));
    m.code(|a| {
        a.ltr(ax)?;
        a.str(ebx)?;
        a.ltr(ax)
    });
    m.step(2);
    assert_eq!(m.vcpu.tr.base, 0xffff_8000_1122_3344);
    assert_eq!((m.vcpu.tr.limit, m.vcpu.tr.access, m.reg(gpr::RBX)), (0x67, 0x8b, u64::from(FREE)));
    assert_eq!(m.get::<u8>(at::GDT + u64::from(FREE) + 5), 0x8b);
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u64>(0), u64::from(FREE), "busy");
}

#[test]
fn system_segments_are_checked() {
    // (LTR rather than LLDT, long mode, selector, its two descriptors, vector and error code or none)
    let cases = [
        (true, false, 0, 0, 0, Some((13, 0))),
        (true, false, FREE | 4, 0, 0, Some((13, FREE | 4))),
        (true, false, FREE, descriptor(0, 0x2b, 0x81, 0), 0, None),
        (true, true, FREE, descriptor(0, 0x2b, 0x81, 0), 0, Some((13, FREE))),
        (true, false, FREE, descriptor(0, 0x67, 0x09, 0), 0, Some((11, FREE))),
        (true, true, FREE, descriptor(0, 0x67, 0x89, 0), 1 << 40, Some((13, FREE))),
        (true, true, FREE, descriptor(0, 0x67, 0x89, 0), 0x8000, Some((13, FREE))),
        (true, true, 0x1f8, 0, 0, Some((13, 0x1f8))),
        (false, false, 0, 0, 0, None),
        (false, false, FREE, descriptor(0, 0xff, 0x82, 0), 0, None),
        (false, false, FREE, descriptor(0, 0xff, 0x02, 0), 0, Some((11, FREE))),
        (false, false, FREE, descriptor(0, 0xff, 0x89, 0), 0, Some((13, FREE))),
        (false, true, FREE, descriptor(0, 0xff, 0x82, 0), 0x7fff, None),
    ];
    for (is_ltr, long, selector, low, high, expected) in cases {
        let mut m = if long { Machine::long() } else { Machine::protected() };
        m.set_descriptor(FREE, low);
        m.set_descriptor(FREE + 8, high);
        m.set_reg(gpr::RAX, u64::from(selector));
        m.bytes(&[0x0f, 0x00, if is_ltr { 0xd8 } else { 0xd0 }]);
        m.step(1);
        match expected {
            None => {
                let register = if is_ltr { m.vcpu.tr } else { m.vcpu.ldtr };
                assert_eq!((m.vcpu.rip(), register.selector), (at::CODE + 3, selector));
                assert_eq!(register.access & SEGMENT_UNUSABLE != 0, selector == 0);
            }
            Some((vector, error)) => {
                m.assert_in_handler(vector);
                assert_eq!(m.get::<u16>(m.vcpu.sp()), error, "{selector:#x} {low:#x} {high:#x}");
            }
        }
    }
}

#[test]
fn a_local_table_serves_selectors() {
    let mut m = Machine::protected();
    m.set_descriptor(FREE, descriptor(0x5000, 0xf, 0x82, 0));
    m.put(0x5008, descriptor(0x7000, 0xff, 0x93, 0));
    m.set_reg(gpr::RAX, u64::from(FREE));
    m.set_reg(gpr::RBX, 0x0c);
    m.code(|a| {
        a.lldt(ax)?;
        a.mov(fs, ebx)?;
        a.add(ebx, 8)?;
        a.mov(fs, ebx)
    });
    m.step(2);
    assert_eq!(m.vcpu.seg_base[platform::x86::seg::FS], 0x7000);
    m.step(2);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u32>(0), 0x14);
}

/// Runs one instruction with `selector` in AX; RBX and ZF afterwards.
fn look(mut m: Machine, selector: u16, bytes: &[u8]) -> (u64, bool) {
    m.set_reg(gpr::RAX, u64::from(selector));
    m.set_reg(gpr::RBX, u64::MAX);
    m.bytes(bytes);
    m.step(1);
    assert_eq!(m.vcpu.rip(), at::CODE + bytes.len() as u64);
    (m.reg(gpr::RBX), m.vcpu.rflags() & rflags::ZF != 0)
}

const LAR: [u8; 3] = [0x0f, 0x02, 0xd8];
const LSL: [u8; 3] = [0x0f, 0x03, 0xd8];
const VERR: [u8; 3] = [0x0f, 0x00, 0xe0];
const VERW: [u8; 3] = [0x0f, 0x00, 0xe8];

#[test]
fn lar_and_lsl() {
    let with = |raw| {
        let mut m = Machine::protected();
        m.set_descriptor(FREE, raw);
        m
    };
    let hidden = (u64::MAX, false);
    let page = descriptor(0, 0x12345, 0x93, 0xc);
    assert_eq!(look(with(page), FREE, &LAR), (0xc1_9300, true));
    assert_eq!(look(with(page), FREE, &LSL), (0x1234_5fff, true));
    assert_eq!(look(with(page), FREE, &[0x66, 0x0f, 0x03, 0xd8]), (0xffff_ffff_ffff_5fff, true));
    assert_eq!(look(with(page).into_user(), FREE | 3, &LAR), hidden);
    assert_eq!(look(with(page), FREE | 3, &LAR), hidden);
    assert_eq!(look(with(descriptor(0, 5, 0x9f, 0x4)).into_user(), FREE | 3, &LSL), (5, true), "conforming");
    assert_eq!(look(with(page), 0, &LAR), hidden);
    assert_eq!(look(with(page), 0x208, &LSL), hidden);
    let call = gate(sel::CODE32, 0, 0x8c, 0);
    assert_eq!(look(with(call), FREE, &LAR), (0x8c00, true));
    assert_eq!(look(with(call), FREE, &LSL), hidden);
    let interrupt = gate(sel::CODE32, 0, 0x8e, 0);
    assert_eq!(look(with(interrupt), FREE, &LAR), hidden);
    let task = descriptor(0, 0x2b, 0x81, 0);
    assert_eq!(look(with(task), FREE, &LSL), (0x2b, true));
    let mut m = Machine::long();
    m.set_descriptor(FREE, task);
    assert_eq!(look(m, FREE, &LSL), hidden, "no 16-bit task in long mode");
    let mut m = Machine::long();
    m.set_descriptor(FREE, descriptor(0, 0x67, 0x89, 0));
    m.set_descriptor(FREE + 8, 1 << 40);
    assert_eq!(look(m, FREE, &LSL), hidden, "malformed");
    assert_eq!(look(Machine::long(), sel::TSS, &LSL), (0x2fff, true));
}

#[test]
fn verr_and_verw() {
    for (access, readable, writable) in [
        (0x93, true, true),
        (0x91, true, false),
        (0x9b, true, false),
        (0x99, false, false),
        (0x9f, true, false),
        (0x89, false, false),
    ] {
        let make = || {
            let mut m = Machine::protected();
            m.set_descriptor(FREE, descriptor(0, 0xfffff, access, 0xc));
            m
        };
        assert_eq!(look(make(), FREE, &VERR).1, readable, "{access:#x}");
        assert_eq!(look(make(), FREE, &VERW).1, writable, "{access:#x}");
        assert_eq!(look(make().into_user(), FREE, &VERR).1, access == 0x9f);
    }
}

#[test]
fn arpl_raises_the_requested_level() {
    let mut m = Machine::protected();
    m.set_reg(gpr::RAX, 0xdead_0011);
    m.set_reg(gpr::RBX, 0x3);
    m.put(0x5000, 0xffff_0013u32);
    // ARPL AX, BX; ARPL [5000], BX
    m.bytes(&[0x63, 0xd8, 0x63, 0x1d, 0, 0x50, 0, 0]);
    m.step(1);
    assert_eq!(m.reg(gpr::RAX), 0xdead_0013);
    assert_ne!(m.vcpu.rflags() & rflags::ZF, 0);
    m.step(1);
    assert_eq!((m.get::<u32>(0x5000), m.vcpu.rflags() & rflags::ZF), (0xffff_0013, 0));
}

#[test]
fn selectors_do_not_exist_in_real_mode() {
    for bytes in [&LAR[..], &VERR, &[0x0f, 0x00, 0xc8], &[0x0f, 0x00, 0xd8], &[0x63, 0xd8]] {
        let mut m = Machine::real();
        m.bytes(bytes);
        m.step(1);
        m.assert_in_handler(6);
    }
}
