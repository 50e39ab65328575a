use platform::x86::{gpr, rflags, seg};

use crate::testing::{Machine, at, descriptor, sel};

const TARGET: u64 = 0x9000;

/// Puts an IRETQ frame at 0x6800 and executes IRETQ there.
fn iretq(mut m: Machine, frame: [u64; 5]) -> Machine {
    for (i, value) in frame.into_iter().enumerate() {
        m.put(0x6800 + 8 * i as u64, value);
    }
    m.set_reg(gpr::RSP, 0x6800);
    m.bytes(&[0x48, 0xcf]);
    m.step(1);
    m
}

fn frame(cs: u16, flags: u64, ss: u16) -> [u64; 5] {
    [TARGET, u64::from(cs), flags, 0x5000, u64::from(ss)]
}

#[test]
fn iretq_at_the_same_level_restores_the_stack_too() {
    let m = iretq(Machine::long(), frame(sel::CODE64, rflags::IF, sel::DATA));
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RSP), m.vcpu.rflags()), (TARGET, 0x5000, rflags::IF | rflags::FIXED));
    let m = iretq(Machine::long(), frame(sel::CODE64, 0, 0));
    assert_eq!((m.vcpu.rip(), m.vcpu.segments[seg::SS].selector, m.vcpu.cpl), (TARGET, 0, 0));
}

#[test]
fn iretq_frames_are_checked() {
    // (CS, SS, error code of the #GP)
    let cases = [
        (0, sel::DATA, 0),
        (sel::DATA, sel::DATA, sel::DATA),
        (sel::USER_CODE64, 0, 0),
        (sel::USER_CODE64, 3, 0),
        (sel::USER_CODE64, sel::DATA, sel::DATA),
        (sel::CODE64, sel::USER_DATA, sel::USER_DATA & !3),
        (sel::CODE64, 1, 0),
        (sel::CODE32, 0, 0),
        (sel::FREE, sel::DATA, sel::FREE),
    ];
    for (cs, ss, error) in cases {
        let mut m = Machine::long();
        // L and D.
        m.set_descriptor(sel::FREE, descriptor(0, 0xfffff, 0x9b, 0xe));
        let m = iretq(m, frame(cs, 0, ss));
        m.assert_in_handler(13);
        assert_eq!((m.stack::<u64>(0), m.stack::<u64>(1)), (u64::from(error), at::CODE), "{cs:#x} {ss:#x}");
        assert_eq!(m.stack::<u64>(4), 0x6800);
    }
    let mut bad = frame(sel::CODE64, 0, sel::DATA);
    bad[0] = 1 << 47;
    iretq(Machine::long(), bad).assert_in_handler(13);
}

#[test]
fn a_return_to_a_16_bit_stack_keeps_the_upper_half_of_esp() {
    let mut m = Machine::long();
    m.set_descriptor(sel::FREE, descriptor(0, 0xffff, 0xf3, 0));
    let mut image = frame(sel::USER_CODE32, 0, sel::FREE | 3);
    image[3] = 0xdddd_1234;
    let m = iretq(m, image);
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RSP)), (TARGET, 0x1234));
}

#[test]
fn flags_follow_the_privileges_of_before() {
    const ALL: u64 = 0xffff_ffff;
    // Ring 0: everything but VM.
    let m = iretq(Machine::long(), frame(sel::USER_CODE64, ALL, sel::USER_DATA));
    let known = 0x3f_7fd7;
    assert_eq!(m.vcpu.rflags(), known & !rflags::VM);
    // Ring 3, IOPL 0: neither IF nor IOPL, VIF, VIP.
    let user = |flags, set| {
        let mut m = Machine::long().into_user();
        m.set_flags(set, 0);
        iretq(m, frame(sel::USER_CODE64, flags, sel::USER_DATA)).vcpu.rflags()
    };
    let kept = rflags::VM | rflags::IF | rflags::IOPL | rflags::VIF | rflags::VIP;
    assert_eq!(user(ALL, 0), known & !kept);
    assert_eq!(user(0, rflags::IF | 1 << 12), rflags::IF | 1 << 12 | rflags::FIXED);
    assert_eq!(user(0, rflags::IF | 3 << 12), 3 << 12 | rflags::FIXED);
}

#[test]
fn a_16_bit_iret_leaves_the_upper_flags() {
    let mut m = Machine::protected();
    m.set_flags(rflags::AC | rflags::ID, 0);
    for (i, value) in [TARGET as u16, sel::CODE32, 0xffff].into_iter().enumerate() {
        m.put(0x6800 + 2 * i as u64, value);
    }
    m.set_reg(gpr::RSP, 0x6800);
    m.bytes(&[0x66, 0xcf]);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.reg(gpr::RSP)), (TARGET, 0x6806));
    assert_eq!(m.vcpu.rflags(), rflags::AC | rflags::ID | 0x7fd7);
}

#[test]
fn iret_opens_the_window_for_a_waiting_interrupt() {
    let m = Machine::long();
    m.world.interrupts.lock().unwrap().push_back(0x40);
    m.vcpu.events().raise(crate::event::request::bit::INTERRUPT);
    let mut m = iretq(m, frame(sel::CODE64, rflags::IF, sel::DATA));
    m.step(1);
    m.assert_in_handler(0x40);
    assert_eq!(m.stack::<u64>(0), TARGET);
}
