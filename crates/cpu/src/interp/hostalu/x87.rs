//! Guest x87 state in the host's x87 registers.
//!
//! Saving and restoring around every instruction would cost twenty times the instruction, and Rust code has no use for
//! these registers. So the first x87 or MMX instruction moves the guest's state in, and it stays there until somebody wants
//! to see it as an image, or code outside this crate is called, which may use x87 instructions.
#![allow(unsafe_code)]

use std::arch::asm;

use super::super::fpu::FpuState;

/// Moves the image into the host's registers.
pub(in super::super) fn load(image: &[u8; 512]) {
    // SAFETY: the image is 16-byte aligned inside `FpuState` and was written by FXSAVE64, or holds zeros and a default
    // MXCSR where the CPU checks. FXRSTOR64 also loads XMM registers, which are declared clobbered, and MXCSR, whose
    // control bits in the image are the host's.
    unsafe { asm!("fxrstor64 [{image}]", image = in(reg) image, clobber_abi("sysv64"), options(nostack)) }
}

/// Moves the host's registers into the image, and leaves the host with an empty x87 stack.
pub(in super::super) fn save(image: &mut [u8; 512]) {
    // SAFETY: the image is 16-byte aligned inside `FpuState`; neither instruction looks at pending exceptions.
    unsafe { asm!("fxsave64 [{image}]", "fninit", image = in(reg) image, options(nostack)) }
}

/// Loads the control word of live registers.
pub(in super::super) fn load_control(fpu: &FpuState) {
    let control = fpu.fcw();
    // SAFETY: FLDCW of a mapped word. The caller has checked that no exception is pending, so that the instruction cannot trap.
    unsafe { asm!("fldcw word ptr [{control}]", control = in(reg) &control, options(nostack, readonly)) }
}

/// The control word of live registers.
#[inline]
pub(in super::super) fn control() -> u16 {
    let mut value = 0u16;
    // SAFETY: FNSTCW stores two bytes, and has no other effect.
    unsafe { asm!("fnstcw word ptr [{value}]", value = in(reg) &raw mut value, options(nostack, preserves_flags)) }
    value
}

/// Their status word.
#[inline]
pub(in super::super) fn status() -> u16 {
    let value: u16;
    // SAFETY: FNSTSW has no effect but its result.
    unsafe { asm!("fnstsw ax", out("ax") value, options(nostack, nomem, preserves_flags)) }
    value
}
