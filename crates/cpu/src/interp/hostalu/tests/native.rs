//! Runs one instruction on the host with all registers under control. Independent of the stubs: state goes in by XRSTOR64
//! and out by XSAVE64, and the instruction's bytes are used as they are.
#![allow(unsafe_code)]

use std::mem::offset_of;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::super::arena::Arena;

/// Registers in and out. RSP is not among those that the instruction may use.
#[repr(C, align(64))]
pub(super) struct Machine {
    pub(super) xsave: [u8; 4096],
    pub(super) gpr: [u64; 16],
    pub(super) rflags: u64,
}

impl Machine {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self { xsave: [0; 4096], gpr: [0; 16], rflags: 2 })
    }
}

const LOADED: [(AsmRegister64, usize); 14] = [
    (rax, 0),
    (rcx, 1),
    (rdx, 2),
    (rbx, 3),
    (rbp, 5),
    (rsi, 6),
    (r8, 8),
    (r9, 9),
    (r10, 10),
    (r11, 11),
    (r12, 12),
    (r13, 13),
    (r14, 14),
    (r15, 15),
];

fn assemble(instruction: &[u8]) -> Result<Vec<u8>, IcedError> {
    let gpr = |n: usize| offset_of!(Machine, gpr) + 8 * n;
    let mut a = CodeAssembler::new(64)?;
    for register in [rbx, rbp, r12, r13, r14, r15] {
        a.push(register)?;
    }
    a.push(rdi)?;
    a.mov(eax, -1)?;
    a.mov(edx, -1)?;
    a.xrstor64(ptr(rdi))?;
    a.push(qword_ptr(rdi + offset_of!(Machine, rflags)))?;
    a.popfq()?;
    for (register, n) in LOADED {
        a.mov(register, qword_ptr(rdi + gpr(n)))?;
    }
    a.mov(rdi, qword_ptr(rdi + gpr(7)))?;
    a.db(instruction)?;
    a.pushfq()?;
    a.push(rdi)?;
    a.mov(rdi, qword_ptr(rsp + 16))?;
    for (register, n) in LOADED {
        a.mov(qword_ptr(rdi + gpr(n)), register)?;
    }
    a.pop(qword_ptr(rdi + gpr(7)))?;
    a.pop(qword_ptr(rdi + offset_of!(Machine, rflags)))?;
    a.mov(eax, -1)?;
    a.mov(edx, -1)?;
    a.xsave64(ptr(rdi))?;
    a.fninit()?;
    a.push(0x1f80)?;
    a.ldmxcsr(dword_ptr(rsp))?;
    a.pop(rax)?;
    a.vzeroupper()?;
    a.cld()?;
    a.pop(rdi)?;
    for register in [r15, r14, r13, r12, rbp, rbx] {
        a.pop(register)?;
    }
    a.ret()?;
    a.assemble(0)
}

/// Runs instructions natively.
pub(super) struct Runner {
    arena: Arena,
}

impl Runner {
    pub(super) fn new() -> Self {
        Self { arena: Arena::new().expect("an arena for generated code") }
    }

    /// Runs `instruction`, which must neither fault nor branch, nor touch memory that the registers in `machine` do not
    /// point to.
    pub(super) fn run(&mut self, instruction: &[u8], machine: &mut Machine) {
        let code = assemble(instruction).expect("the frame assembles");
        if self.arena.room() < code.len() + 64 {
            self.arena.reset();
        }
        let address = self.arena.add(&code).expect("room for a frame");
        // SAFETY: the frame keeps the System V callee-saved registers, and the caller vouches for the instruction.
        unsafe { std::mem::transmute::<u64, extern "sysv64" fn(&mut Machine)>(address)(machine) }
    }
}

/// The first `length` bytes of `words`.
pub(super) fn as_bytes(words: &mut [u64], length: usize) -> &mut [u8] {
    assert!(length <= words.len() * 8);
    // SAFETY: any byte is a valid u8, the length was checked, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), length) }
}
