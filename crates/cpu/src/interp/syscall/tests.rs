use platform::x86::gpr::{RCX, RDX, RSP};
use platform::x86::{rflags, seg};

use super::R11;
use crate::testing::{Machine, at, sel};

const TARGET: u64 = 0x9000;

/// STAR as the machine's GDT has it: kernel 0x28/0x30, user 0x23+8, +16.
fn set_star(m: &mut Machine) {
    m.vcpu.msrs.star = 0x33 << 48 | u64::from(sel::CODE64) << 32;
    m.vcpu.msrs.lstar = TARGET;
    m.vcpu.msrs.cstar = TARGET + 0x100;
    m.vcpu.msrs.fmask = rflags::IF | rflags::TF | rflags::CF;
}

#[test]
fn syscall_and_sysret_in_64_bit_mode() {
    let mut m = Machine::long().into_user();
    set_star(&mut m);
    m.set_flags(rflags::IF | rflags::CF | rflags::ZF, 0);
    m.code(|a| a.syscall());
    m.code_at(TARGET, |a| a.sysretq());
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl), (TARGET, 0));
    assert_eq!(m.reg(RCX), at::CODE + 2);
    assert_eq!(m.reg(R11), rflags::IF | rflags::CF | rflags::ZF | rflags::FIXED);
    assert_eq!(m.vcpu.rflags(), rflags::ZF | rflags::FIXED);
    assert_eq!(m.vcpu.segments[seg::CS], m.segment(sel::CODE64));
    assert_eq!((m.vcpu.segments[seg::SS].selector, m.vcpu.segments[seg::SS].access), (sel::CODE64 + 8, 0xc093));
    assert_eq!(m.reg(RSP), at::USER_STACK);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl), (at::CODE + 2, 3));
    assert_eq!(m.vcpu.rflags(), rflags::IF | rflags::CF | rflags::ZF | rflags::FIXED);
    assert_eq!((m.vcpu.segments[seg::CS].selector, m.vcpu.segments[seg::CS].access), (0x43, 0xa0fb));
    assert_eq!((m.vcpu.segments[seg::SS].selector, m.vcpu.segments[seg::SS].access), (0x3b, 0xc0f3));
}

#[test]
fn sysret_to_32_bits() {
    let mut m = Machine::long();
    set_star(&mut m);
    m.set_reg(RCX, 0xffff_ffff_0000_5000);
    m.set_reg(R11, !rflags::TF);
    m.code(|a| a.sysret());
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.vcpu.in_64bit()), (0x5000, 3, false));
    assert_eq!((m.vcpu.segments[seg::CS].selector, m.vcpu.segments[seg::CS].access), (0x33, 0xc0fb));
    assert_eq!(m.vcpu.rflags(), 0x3c_7fd7 & !rflags::TF);
}

#[test]
fn sysret_to_a_non_canonical_address() {
    for amd in [false, true] {
        let mut m = Machine::with_vendor(amd).into_long();
        set_star(&mut m);
        m.set_reg(RCX, 1 << 47);
        m.code(|a| a.sysretq());
        m.step(1);
        if amd {
            assert_eq!((m.vcpu.rip(), m.vcpu.cpl), (1 << 47, 3), "the fetch faults");
            m.step(1);
        }
        m.assert_in_handler(13);
        assert_eq!(m.stack::<u64>(1), if amd { 1 << 47 } else { at::CODE });
        assert_eq!(m.stack::<u64>(2) & 3, if amd { 3 } else { 0 });
    }
}

#[test]
fn system_calls_that_are_switched_off() {
    let mut m = Machine::long().into_user();
    m.vcpu.efer &= !1;
    m.code(|a| a.syscall());
    m.step(1);
    m.assert_in_handler(6);
    let mut m = Machine::long().into_user();
    m.code(|a| a.sysretq());
    m.step(1);
    m.assert_in_handler(13);
}

#[test]
fn syscall_in_compatibility_mode_is_amds() {
    for amd in [false, true] {
        let mut m = Machine::with_vendor(amd).into_long();
        set_star(&mut m);
        m.set_data(sel::USER_DATA);
        m.set_cs(sel::USER_CODE32);
        m.bytes(&[0x0f, 0x05]);
        m.step(1);
        if amd {
            assert_eq!((m.vcpu.rip(), m.vcpu.in_64bit()), (TARGET + 0x100, true));
        } else {
            m.assert_in_handler(6);
        }
    }
}

#[test]
fn syscall_with_tf_traps_only_if_tf_survives() {
    for masked in [true, false] {
        let mut m = Machine::long().into_user();
        set_star(&mut m);
        if !masked {
            m.vcpu.msrs.fmask = 0;
        }
        m.set_flags(rflags::TF, 0);
        m.code(|a| a.syscall());
        m.code_at(TARGET, |a| a.nop());
        m.step(2);
        if masked {
            assert_eq!(m.vcpu.rip(), TARGET + 1);
        } else {
            m.assert_in_handler(1);
            assert_eq!(m.stack::<u64>(0), TARGET);
        }
    }
}

#[test]
fn sysret_with_tf_traps_before_the_program_goes_on() {
    let mut m = Machine::long();
    set_star(&mut m);
    m.set_reg(RCX, 0x5000);
    m.set_reg(R11, rflags::TF);
    m.code(|a| a.sysretq());
    m.step(2);
    m.assert_in_handler(1);
    assert_eq!(m.stack::<u64>(0), 0x5000);
}

#[test]
fn sysenter_and_sysexit() {
    let set = |m: &mut Machine| {
        m.vcpu.msrs.sysenter_cs = u64::from(sel::CODE32);
        m.vcpu.msrs.sysenter_esp = 0x5800;
        m.vcpu.msrs.sysenter_eip = TARGET;
        m.set_flags(rflags::IF, 0);
    };
    let mut m = Machine::protected().into_user();
    set(&mut m);
    m.code(|a| a.sysenter());
    m.code_at(TARGET, |a| a.sysexit());
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.reg(RSP), m.vcpu.cpl), (TARGET, 0x5800, 0));
    assert_eq!(m.vcpu.rflags() & rflags::IF, 0);
    assert_eq!((m.vcpu.segments[seg::CS].selector, m.vcpu.segments[seg::SS].selector), (sel::CODE32, sel::DATA));
    m.set_reg(RCX, at::USER_STACK);
    m.set_reg(RDX, at::CODE + 2);
    m.step(1);
    assert_eq!((m.vcpu.rip(), m.reg(RSP), m.vcpu.cpl), (at::CODE + 2, at::USER_STACK, 3));
    assert_eq!((m.vcpu.segments[seg::CS].selector, m.vcpu.segments[seg::SS].selector), (0x1b, 0x23));

    for amd in [false, true] {
        let mut m = Machine::with_vendor(amd).into_long().into_user();
        set(&mut m);
        m.code(|a| a.sysenter());
        m.step(1);
        if amd {
            m.assert_in_handler(6);
            continue;
        }
        assert_eq!((m.vcpu.rip(), m.vcpu.in_64bit()), (TARGET, true));
        m.set_reg(RCX, at::USER_STACK);
        m.set_reg(RDX, at::CODE);
        m.code(|a| a.sysexitq());
        m.step(1);
        assert_eq!((m.vcpu.rip(), m.vcpu.cpl, m.vcpu.in_64bit()), (at::CODE, 3, true));
        assert_eq!((m.vcpu.segments[seg::CS].selector, m.vcpu.segments[seg::SS].selector), (0x2b, 0x33));
    }
}

#[test]
fn sysenter_needs_a_selector() {
    let mut m = Machine::protected().into_user();
    m.vcpu.msrs.sysenter_cs = 3;
    m.code(|a| a.sysenter());
    m.step(1);
    m.assert_in_handler(13);
    assert_eq!(m.stack::<u32>(0), 0);
}

#[test]
fn swapgs_is_ring_0s() {
    let mut m = Machine::long();
    m.vcpu.msrs.kernel_gs_base = 0x1234;
    m.code(|a| a.swapgs());
    m.step(1);
    assert_eq!(
        (m.vcpu.seg_base[seg::GS], m.vcpu.segments[seg::GS].base, m.vcpu.msrs.kernel_gs_base),
        (0x1234, 0x1234, 0)
    );
    let mut m = Machine::long().into_user();
    m.code(|a| a.swapgs());
    m.step(1);
    m.assert_in_handler(13);
}
