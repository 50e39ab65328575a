//! Whether two outcomes agree.

use iced_x86::Code;

use crate::layout::*;
use crate::program::{Item, Program};
use crate::vector::Places;

/// The guard page at the end of the addresses that programs may use.
const LAST_USER_PAGE: u64 = 0x7fff_ffff_f000;

/// Flags undefined where a run stopped.
fn undefined_flags(program: &Program, outcome: &Outcome) -> u32 {
    let end = program.items.len();
    let at_end = |rip| program.item_at(rip) == Some(end);
    if at_end(outcome.rip) || outcome.vector == BP && at_end(outcome.rip.wrapping_sub(1)) {
        return program.undefined[end];
    }
    match program.item_at(outcome.rip) {
        Some(item) => program.undefined[item],
        // Somewhere else: whatever may have been undefined on the way.
        None => program.undefined.iter().fold(0, |all, undefined| all | undefined),
    }
}

/// Lines that say where the outcomes differ: the host's value, then ours.
pub(crate) fn differences(program: &Program, native: &Outcome, ours: &Outcome, places: &Places) -> Vec<String> {
    let mut lines = Vec::new();
    let mut check = |name: &str, native: u64, ours: u64| {
        if native != ours {
            lines.push(format!("{name:8} host {native:#x}, ours {ours:#x}"));
        }
    };
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    // CMPS may fault on either side first; even one processor does not always take the same.
    // Of a masked operand that crosses both a page and the end of its segment, either may be noticed first.
    // Of a call, AMD's processors notice first that the stack is full, Intel's that the target is out of reach.
    let several = compares_strings(program, native.rip)
        || item_at(program, native.rip).is_some_and(|item| item.instruction.mnemonic() == iced_x86::Mnemonic::Call)
        || program.mode != Mode::Long && is_masked(program, native.rip);
    // What is no instruction may also be too long for one.
    let data = program.items.first().is_some_and(|item| item.code() == Code::DeclareByte);
    let undefined = |vector| data && matches!(vector, UD | GP);
    let either = several && is_data_fault(native.vector) && is_data_fault(ours.vector)
        || undefined(native.vector) && undefined(ours.vector);
    if !either {
        check("vector", native.vector, ours.vector);
    }
    check("rip", native.rip, ours.rip);
    for (i, name) in NAMES.iter().enumerate() {
        // A return from the host's kernel to a 16-bit stack leaves something in the upper half of RSP.
        let mask = if program.mode == Mode::Segmented16 && i == 4 { 0xffff_ffff } else { u64::MAX };
        check(name, native.gpr[i] & mask, ours.gpr[i] & mask);
    }
    let mask = !u64::from(undefined_flags(program, native));
    check("rflags", native.rflags & mask, ours.rflags & mask);
    let mut error_mask = u64::MAX;
    if native.vector == PF && !either {
        // Of masked operands some processors report the element, some the operand or its second page; of large ones some
        // the first byte, some the last.
        const LARGEST: u64 = 512;
        let near = native.cr2.wrapping_sub(ours.cr2).wrapping_add(LARGEST) <= 2 * LARGEST;
        if near && native.cr2 != ours.cr2 && is_masked(program, native.rip) {
            // The other page need not be mapped in the same way.
            error_mask &= !1;
        } else {
            check("cr2", native.cr2, ours.cr2);
        }
    }
    let in_kernel =
        native.cr2 >= LAST_USER_PAGE || program.mode != Mode::Long && native.cr2.wrapping_sub(KERNEL_32) < 1 << 20;
    if native.vector == PF && in_kernel {
        // Linux does not tell which addresses of its own, from the guard page below them on, are mapped, and our
        // kernel's are not the host's.
        error_mask &= !1;
    }
    if !either {
        check("error", native.error & error_mask, ours.error & error_mask);
    }
    const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
    for (i, name) in SEGMENTS.iter().enumerate() {
        // The return from the host's kernel sets all null selectors to 0.
        let visible = |selector: u16| u64::from(if selector < 4 { 0 } else { selector });
        check(name, visible(native.selectors[i]), visible(ours.selectors[i]));
    }
    if program.mode == Mode::Long {
        check("fs base", native.fs_base, ours.fs_base);
        check("gs base", native.gs_base, ours.gs_base);
    }
    if native.has_xsave != 0 && !(native.vector == XM && is_dot_product(program, native.rip)) {
        lines.extend(places.differences(native, ours));
    }
    if native.memory != ours.memory {
        memory_differences(native, ours, &mut lines);
    }
    lines
}

/// The item at an instruction pointer. A waiting x87 instruction is two: FWAIT and the rest.
fn item_at(program: &Program, rip: u64) -> Option<&Item> {
    let i = program.item_at(rip).or_else(|| program.item_at(rip.wrapping_sub(1)))?;
    program.items.get(i)
}

/// #SS, #GP, #PF, #AC.
fn is_data_fault(vector: u64) -> bool {
    matches!(vector, SS | GP | PF | AC)
}

fn compares_strings(program: &Program, rip: u64) -> bool {
    use iced_x86::Mnemonic as M;
    let item = item_at(program, rip);
    item.is_some_and(|item| matches!(item.instruction.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq))
}

/// DPPS and DPPD find their exceptions in several steps.
fn is_dot_product(program: &Program, rip: u64) -> bool {
    use iced_x86::Mnemonic as M;
    let item = item_at(program, rip);
    item.is_some_and(|item| matches!(item.instruction.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd))
}

/// An opmask, or the sign bits of a vector, say which elements of the memory operand are touched.
fn is_masked(program: &Program, rip: u64) -> bool {
    use iced_x86::Mnemonic as M;
    let item = item_at(program, rip);
    item.is_some_and(|item| {
        let mnemonic = item.instruction.mnemonic();
        let masked_move = matches!(mnemonic, M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq);
        let bytewise = matches!(mnemonic, M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu);
        let dense = format!("{mnemonic:?}").contains("compress");
        // Some processors take these in two halves, or from the end.
        let wide = matches!(item.instruction.memory_size().size(), 10 | 14 | 28 | 64 | 94 | 108 | 512);
        masked_move || bytewise || dense || wide || item.instruction.has_op_mask() || item.instruction.is_vsib()
    })
}

fn memory_differences(native: &Outcome, ours: &Outcome, lines: &mut Vec<String>) {
    const SHOWN: usize = 32;
    let different = native.memory.iter().zip(&ours.memory).enumerate().filter(|(_, (a, b))| a != b);
    for (i, (a, b)) in different.take(SHOWN) {
        let address = if i < DATA_LEN { DATA + i as u64 } else { STACK + (i - DATA_LEN) as u64 };
        lines.push(format!("[{address:#x}] host {a:#04x}, ours {b:#04x}"));
    }
}
