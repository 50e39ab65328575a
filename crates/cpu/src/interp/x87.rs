//! x87 control instructions: initialisation, control and status words, environment and state images, FWAIT.

use iced_x86::Mnemonic;
use platform::x86::{cr0, gpr};

use super::gate::{Gate, X87, X87NoWait, pending};
use super::operand::stack_error;
use crate::decode::{Choice, Decoding, Handler, Op, Slot, next};
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};

/// Exception masks of the control word.
const MASKS: u16 = 0x3f;

/// Checks, and moves the registers to where they can be looked at.
fn enter<G: Gate>(vcpu: &mut Vcpu) -> Step {
    G::check(vcpu)?;
    vcpu.fpu.park();
    Ok(())
}

fn fninit(vcpu: &mut Vcpu, _: &Op) -> Step {
    enter::<X87NoWait>(vcpu)?;
    vcpu.fpu.finit();
    Ok(())
}

fn fnclex(vcpu: &mut Vcpu, _: &Op) -> Step {
    enter::<X87NoWait>(vcpu)?;
    // Exception flags, stack fault, ES, B.
    let status = vcpu.fpu.fsw() & 0x7f00;
    vcpu.fpu.set_fsw(status);
    Ok(())
}

fn fnstcw(vcpu: &mut Vcpu, op: &Op) -> Step {
    X87NoWait::check(vcpu)?;
    let value = vcpu.fpu.fcw();
    vcpu.store_op(op, value)
}

fn fldcw(vcpu: &mut Vcpu, op: &Op) -> Step {
    X87::check(vcpu)?;
    let value = vcpu.load_op::<u16>(op)?;
    vcpu.fpu.set_fcw(value);
    Ok(())
}

fn fnstsw(vcpu: &mut Vcpu, op: &Op) -> Step {
    X87NoWait::check(vcpu)?;
    let value = vcpu.fpu.fsw();
    vcpu.store_op(op, value)
}

fn fnstsw_ax(vcpu: &mut Vcpu, _: &Op) -> Step {
    X87NoWait::check(vcpu)?;
    vcpu.fpu.fsw().set(&mut vcpu.regs, gpr::RAX as u8);
    Ok(())
}

/// FNENI, FNDISI, FNSETPM: of the 8087 and 80287; nothing since.
fn ignored(vcpu: &mut Vcpu, _: &Op) -> Step {
    X87NoWait::check(vcpu)
}

fn fwait(vcpu: &mut Vcpu, _: &Op) -> Step {
    if vcpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(Trap::nm());
    }
    pending(vcpu)
}

/// Whether images have the real-mode form, in which pointers are linear addresses.
fn real_format(vcpu: &Vcpu) -> bool {
    !vcpu.protected() || vcpu.v8086()
}

/// The environment as seven words of the operand size (SDM vol. 1, figures 8-9 to 8-12).
fn environment(vcpu: &Vcpu, wide: bool) -> [u32; 7] {
    let fpu = &vcpu.fpu;
    let (fip, fdp) = (fpu.fip as u32, fpu.fdp as u32);
    let words = [fpu.fcw(), fpu.fsw(), fpu.full_tags()].map(|word| 0xffff_0000 | u32::from(word));
    let fop = u32::from(fpu.fop & 0x7ff);
    let pointers = if real_format(vcpu) {
        let fip = fip.wrapping_add(u32::from(fpu.fcs) << 4);
        let fdp = fdp.wrapping_add(u32::from(fpu.fds) << 4);
        let high = if wide { 0xffff } else { 0xf };
        let low = if wide { 0xffff_0000 } else { 0 };
        [fip & 0xffff | low, (fip >> 16 & high) << 12 | fop, fdp & 0xffff | low, (fdp >> 16 & high) << 12]
    } else {
        let (fcs, fds) = vcpu.x87_selectors();
        [fip, u32::from(fcs) | if wide { fop << 16 } else { 0 }, fdp, 0xffff_0000 | u32::from(fds)]
    };
    [words[0], words[1], words[2], pointers[0], pointers[1], pointers[2], pointers[3]]
}

/// Takes an environment over.
fn load_environment(vcpu: &mut Vcpu, words: [u32; 7], wide: bool) {
    let real = real_format(vcpu);
    let fpu = &mut vcpu.fpu;
    fpu.set_fcw(words[0] as u16);
    fpu.load_fsw(words[1] as u16);
    fpu.set_ftw(crate::interp::fpu::FpuState::abridged_tags(words[2] as u16));
    if real {
        let high = if wide { 0x0fff_f000 } else { 0xf000 };
        fpu.fip = u64::from(words[3] & 0xffff | (words[4] & high) << 4);
        fpu.fdp = u64::from(words[5] & 0xffff | (words[6] & high) << 4);
        (fpu.fcs, fpu.fds) = (0, 0);
        fpu.fop = words[4] as u16 & 0x7ff;
    } else {
        fpu.fip = u64::from(words[3]);
        fpu.fdp = u64::from(words[5]);
        (fpu.fcs, fpu.fds) = (words[4] as u16, words[6] as u16);
        // The 16-bit form has no room for it.
        fpu.fop = if wide { (words[4] >> 16) as u16 & 0x7ff } else { 0 };
    }
}

/// Bytes of the environment for the operand size (2 or 4).
fn environment_bytes(words: [u32; 7], wide: bool, bytes: &mut Vec<u8>) {
    for word in words {
        bytes.extend_from_slice(&word.to_le_bytes()[..if wide { 4 } else { 2 }]);
    }
}

fn environment_words(bytes: &[u8], wide: bool) -> [u32; 7] {
    let word = |i: usize| {
        let at = |n: usize| u32::from(bytes.get(n).copied().unwrap_or(0));
        if wide {
            at(4 * i) | at(4 * i + 1) << 8 | at(4 * i + 2) << 16 | at(4 * i + 3) << 24
        } else {
            at(2 * i) | at(2 * i + 1) << 8
        }
    };
    std::array::from_fn(word)
}

fn environment_size(wide: bool) -> usize {
    if wide { 28 } else { 14 }
}

fn store_image(vcpu: &mut Vcpu, op: &Op, bytes: &[u8]) -> Step {
    let linear = vcpu.linear(op, bytes.len() as u64, true)?;
    vcpu.write_bytes(linear, bytes).map_err(|trap| stack_error(op, trap))
}

fn load_image(vcpu: &mut Vcpu, op: &Op, bytes: &mut [u8]) -> Step {
    let linear = vcpu.linear(op, bytes.len() as u64, false)?;
    vcpu.read_bytes(linear, bytes).map_err(|trap| stack_error(op, trap))
}

fn fnstenv<const WIDE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    enter::<X87NoWait>(vcpu)?;
    let mut bytes = Vec::with_capacity(28);
    environment_bytes(environment(vcpu, WIDE), WIDE, &mut bytes);
    store_image(vcpu, op, &bytes)?;
    let control = vcpu.fpu.fcw() | MASKS;
    vcpu.fpu.set_fcw(control);
    Ok(())
}

fn fldenv<const WIDE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    enter::<X87>(vcpu)?;
    let mut bytes = [0; 28];
    let bytes = &mut bytes[..environment_size(WIDE)];
    load_image(vcpu, op, bytes)?;
    load_environment(vcpu, environment_words(bytes, WIDE), WIDE);
    Ok(())
}

fn fnsave<const WIDE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    enter::<X87NoWait>(vcpu)?;
    let mut bytes = Vec::with_capacity(108);
    environment_bytes(environment(vcpu, WIDE), WIDE, &mut bytes);
    (0..8).for_each(|i| bytes.extend_from_slice(&vcpu.fpu.st(i)));
    store_image(vcpu, op, &bytes)?;
    vcpu.fpu.finit();
    Ok(())
}

fn frstor<const WIDE: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    enter::<X87>(vcpu)?;
    let size = environment_size(WIDE);
    let mut bytes = [0; 108];
    load_image(vcpu, op, &mut bytes[..size + 80])?;
    load_environment(vcpu, environment_words(&bytes, WIDE), WIDE);
    for i in 0..8 {
        let st = std::array::from_fn(|n| bytes[size + 10 * i + n]);
        vcpu.fpu.set_st(i, &st);
    }
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    use Mnemonic as N;
    let wide = d.instruction.op_count() > 0 && matches!(d.instruction.memory_size().size(), 28 | 108);
    macro_rules! image {
        ($handler:ident) => {
            if wide { $handler::<true> as Handler } else { $handler::<false> }
        };
    }
    let run: Handler = match d.instruction.mnemonic() {
        N::Fninit => fninit,
        N::Fnclex => fnclex,
        N::Fnstcw => fnstcw,
        N::Fldcw => fldcw,
        N::Fnstsw if d.shape[0] == Slot::Mem => fnstsw,
        N::Fnstsw => fnstsw_ax,
        N::Fneni | N::Fndisi | N::Fnsetpm => ignored,
        N::Wait => fwait,
        N::Fnstenv => image!(fnstenv),
        N::Fldenv => image!(fldenv),
        N::Fnsave => image!(fnsave),
        N::Frstor => image!(frstor),
        _ => return None,
    };
    // FWAIT is there on every CPU.
    (d.instruction.mnemonic() == N::Wait || super::hostalu::available(d)).then_some(())?;
    next(run)
}
