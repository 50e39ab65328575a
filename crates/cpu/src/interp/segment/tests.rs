use iced_x86::code_asm::*;
use platform::x86::{SEGMENT_UNUSABLE, gpr, seg};

use crate::testing::{Machine, at, descriptor, sel};

const FREE: u16 = sel::FREE;

#[test]
fn stores_are_zero_extended_in_registers_and_words_in_memory() {
    let mut m = Machine::long();
    m.code(|a| {
        a.mov(eax, ds)?;
        a.mov(bx, ds)?;
        a.mov(rcx, ds)?;
        a.mov(word_ptr(0x5000), ds)
    });
    for r in 0..4 {
        m.set_reg(r, u64::MAX);
    }
    m.put(0x5000, u64::MAX);
    m.step(4);
    let data = u64::from(sel::DATA);
    assert_eq!((m.reg(gpr::RAX), m.reg(gpr::RBX), m.reg(gpr::RCX)), (data, 0xffff_ffff_ffff_0000 | data, data));
    assert_eq!(m.get::<u64>(0x5000), 0xffff_ffff_ffff_0000 | data);
}

#[test]
fn data_segments_are_checked() {
    // (level 3?, selector, descriptor at FREE, vector and error code or none)
    let cases = [
        (false, FREE, descriptor(0, 0xfffff, 0x92, 0xc), None),
        (false, FREE | 3, descriptor(0, 0xfffff, 0x92, 0xc), Some((13, FREE))),
        (true, FREE | 3, descriptor(0, 0xfffff, 0xb2, 0xc), Some((13, FREE))),
        (true, FREE, descriptor(0, 0xfffff, 0xf2, 0xc), None),
        (true, FREE | 3, descriptor(0, 0xfffff, 0x9e, 0xc), None),
        (true, FREE | 3, descriptor(0, 0xfffff, 0x9c, 0xc), Some((13, FREE))),
        (false, FREE, descriptor(0, 0xfffff, 0x98, 0xc), Some((13, FREE))),
        (false, FREE, descriptor(0, 0xfffff, 0x9a, 0xc), None),
        (false, FREE, descriptor(0, 0xfffff, 0x12, 0xc), Some((11, FREE))),
        (false, FREE, descriptor(0, 0xfffff, 0x82, 0xc), Some((13, FREE))),
        (false, 0x1f8 | 4, 0, Some((13, 0x1fc))),
        (false, 0x200, 0, Some((13, 0x200))),
        (true, 3, 0, None),
    ];
    for (user, selector, raw, expected) in cases {
        let mut m = Machine::protected();
        m.set_descriptor(FREE, raw);
        let mut m = if user { m.into_user() } else { m };
        m.set_reg(gpr::RAX, u64::from(selector));
        m.code(|a| a.mov(fs, eax));
        m.step(1);
        match expected {
            None => {
                assert_eq!(m.vcpu.rip(), at::CODE + 2, "{selector:#x} {raw:#x}");
                assert_eq!(m.vcpu.segments[seg::FS].selector, selector);
                if selector > 3 {
                    assert_eq!(m.get::<u8>(at::GDT + u64::from(FREE) + 5), (raw >> 40) as u8 | 1, "accessed");
                    assert_eq!(m.vcpu.segments[seg::FS], m.segment(selector));
                } else {
                    assert_ne!(m.vcpu.segments[seg::FS].access & SEGMENT_UNUSABLE, 0);
                }
            }
            Some((vector, error)) => {
                m.assert_in_handler(vector);
                assert_eq!(m.stack::<u32>(0), u32::from(error), "{selector:#x} {raw:#x}");
            }
        }
    }
}

#[test]
fn stack_segments_are_checked() {
    let cases = [
        (false, 0, 0, Some((13, 0))),
        (false, sel::USER_DATA, 0, Some((13, sel::USER_DATA & !3))),
        (false, FREE, descriptor(0, 0xfffff, 0x90, 0xc), Some((13, FREE))),
        (false, FREE, descriptor(0, 0xfffff, 0x12, 0xc), Some((12, FREE))),
        (false, FREE, descriptor(0, 0xfffff, 0x92, 0xc), None),
        (true, sel::DATA | 3, 0, Some((13, sel::DATA))),
    ];
    for (user, selector, raw, expected) in cases {
        let mut m = Machine::protected();
        m.set_descriptor(FREE, raw);
        let mut m = if user { m.into_user() } else { m };
        m.set_reg(gpr::RAX, u64::from(selector));
        m.code(|a| a.mov(ss, eax));
        m.step(1);
        match expected {
            None => assert_eq!(m.vcpu.segments[seg::SS], m.segment(selector)),
            Some((vector, error)) => {
                m.assert_in_handler(vector);
                assert_eq!(m.stack::<u32>(0), u32::from(error), "{selector:#x} {raw:#x}");
            }
        }
    }
}

#[test]
fn a_null_stack_segment_in_64_bit_mode() {
    let load = |mut m: Machine, selector: u64| {
        m.set_reg(gpr::RAX, selector);
        m.code(|a| a.mov(ss, eax));
        m.step(1);
        m
    };
    let m = load(Machine::long(), 0);
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::SS].selector), (at::CODE + 2, 0));
    load(Machine::long(), 3).assert_in_handler(13);
    load(Machine::long().into_user(), 3).assert_in_handler(13);
}

#[test]
fn cs_cannot_be_loaded() {
    let mut m = Machine::protected();
    m.bytes(&[0x8e, 0xc8]);
    m.step(1);
    m.assert_in_handler(6);
}

#[test]
fn push_and_pop() {
    let mut m = Machine::long();
    m.set_descriptor(FREE, descriptor(0x1234_5678, 0xfff, 0x93, 0));
    m.code(|a| {
        a.push(i32::from(FREE))?;
        a.pop(fs)?;
        a.push(fs)
    });
    m.step(3);
    assert_eq!((m.reg(gpr::RSP), m.stack::<u64>(0)), (at::STACK - 8, u64::from(FREE)));
    assert_eq!((m.vcpu.seg_base[seg::FS], m.vcpu.segments[seg::FS].limit), (0x1234_5678, 0xfff));
    // A fault leaves the stack pointer.
    let mut m = Machine::protected();
    m.code(|a| {
        a.push(0x208)?;
        a.pop(ds)
    });
    m.step(2);
    m.assert_in_handler(13);
    assert_eq!(m.reg(gpr::RSP), at::STACK - 4 - 16);
}

#[test]
fn pop_ss_moves_the_old_stack_pointer_and_holds_off_traps() {
    let mut m = Machine::protected();
    m.set_reg(gpr::RSP, 0x6_8000);
    m.code(|a| {
        a.push(i32::from(sel::DATA16))?;
        a.pop(ss)?;
        a.nop()
    });
    m.step(2);
    assert_eq!((m.reg(gpr::RSP), m.vcpu.mode.stack_mask()), (0x6_8000, 0xffff));
    assert_eq!(m.vcpu.shadow, crate::state::Shadow::MovSs);
    m.step(1);
    assert_eq!(m.vcpu.shadow, crate::state::Shadow::None);
}

#[test]
fn pointers_load_both_parts_or_none() {
    let mut m = Machine::protected();
    m.put(0x5000, 0xcafe_babeu32);
    m.put(0x5004, sel::DATA16);
    m.bytes(&[0xc5, 0x1d, 0, 0x50, 0, 0]);
    m.step(1);
    assert_eq!((m.reg(gpr::RBX), m.vcpu.segments[seg::DS].selector), (0xcafe_babe, sel::DATA16));

    let mut m = Machine::protected();
    m.put(0x5004, 0x208u16);
    m.set_reg(gpr::RBX, 7);
    m.bytes(&[0x0f, 0xb2, 0x1d, 0, 0x50, 0, 0]);
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!((m.reg(gpr::RBX), m.vcpu.segments[seg::SS].selector), (7, sel::DATA));

    let mut m = Machine::long();
    m.put(0x5000, 0x1122_3344_5566_7788u64);
    m.put(0x5008, sel::USER_DATA);
    m.bytes(&[0x48, 0x0f, 0xb5, 0x1c, 0x25, 0, 0x50, 0, 0]);
    m.step(1);
    assert_eq!((m.reg(gpr::RBX), m.vcpu.segments[seg::GS].selector), (0x1122_3344_5566_7788, sel::USER_DATA));
}

#[test]
fn a_segment_that_is_no_longer_flat_counts_at_once() {
    let mut m = Machine::protected();
    m.set_descriptor(FREE, descriptor(0x1000, 0xfffff, 0x93, 0xc));
    m.put(0x6000, 0x11u8);
    m.put(0x5000, 0x22u8);
    m.set_reg(gpr::RAX, u64::from(FREE));
    m.set_reg(gpr::RBX, 0x5000);
    m.code(|a| {
        a.mov(ds, eax)?;
        a.mov(cl, byte_ptr(ebx))?;
        a.hlt()
    });
    // As one block, not one instruction at a time.
    assert_eq!(m.vcpu.run(), crate::Exit::Halt { interruptible: false });
    assert_eq!(m.reg(gpr::RCX), 0x11);
}
