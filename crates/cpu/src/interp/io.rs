//! Port I/O: IN, OUT, and the permission checks of INS and OUTS.

use iced_x86::Mnemonic;
use platform::x86::gpr::{RAX, RDX};

use crate::decode::{Choice, Decoding, Handler, Op, Slot, end};
use crate::state::attention;
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};

impl Vcpu {
    /// Checks the I/O privilege level and the TSS's permission bitmap (SDM vol. 1, 19.5).
    ///
    /// # Errors
    /// #GP(0).
    pub(crate) fn check_io(&mut self, port: u16, size: u8) -> Step {
        if !self.protected() || (self.cpl <= self.iopl() && !self.v8086()) {
            return Ok(());
        }
        const BUSY_TSS32: u32 = 11;
        let tr = self.tr;
        if tr.access & 15 != BUSY_TSS32 || tr.limit < 0x67 {
            return Err(Trap::gp(0));
        }
        let map: u16 = self.as_system(|vcpu| vcpu.load(tr.base.wrapping_add(0x66)))?;
        let at = u64::from(map) + u64::from(port / 8);
        // Two bytes are always read, so that an access that crosses a byte sees all its bits.
        if at + 1 > u64::from(tr.limit) {
            return Err(Trap::gp(0));
        }
        let bits: u16 = self.as_system(|vcpu| vcpu.load(tr.base.wrapping_add(at)))?;
        let mask = (1u16 << size) - 1;
        if bits >> (port & 7) & mask != 0 { Err(Trap::gp(0)) } else { Ok(()) }
    }

    /// Reads a port.
    pub(crate) fn port_in(&mut self, op: &Op, port: u16, size: u8) -> u32 {
        self.note_io_breakpoint(port, size);
        self.fpu.park();
        self.env.io_read(port, size, self.rip().wrapping_sub(u64::from(op.len)))
    }

    /// Writes a port.
    pub(crate) fn port_out(&mut self, op: &Op, port: u16, size: u8, value: u32) {
        self.note_io_breakpoint(port, size);
        self.fpu.park();
        self.env.io_write(port, size, value, self.rip().wrapping_sub(u64::from(op.len)));
    }

    /// I/O breakpoints (CR4.DE set, R/W field 2).
    fn note_io_breakpoint(&mut self, port: u16, size: u8) {
        if self.dr7 & 0xff == 0 || self.cr4 & platform::x86::cr4::DE == 0 {
            return;
        }
        for i in 0..4 {
            let len = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * i) & 3) as usize];
            let base = self.dr[i] & !(len - 1);
            let hit = u64::from(port) < base.wrapping_add(len) && base < u64::from(port) + u64::from(size);
            if self.dr7 >> (2 * i) & 3 != 0 && self.dr7 >> (16 + 4 * i) & 3 == 2 && hit {
                self.pending_dr6 |= 1 << i;
                self.attention |= attention::DEBUG_TRAP;
            }
        }
    }
}

fn port(vcpu: &Vcpu, op: &Op, immediate: bool) -> u16 {
    if immediate { op.imm as u8 as u16 } else { vcpu.regs[RDX] as u16 }
}

fn input<T: Int, const IMM: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let port = port(vcpu, op, IMM);
    vcpu.check_io(port, T::BYTES as u8)?;
    let value = vcpu.port_in(op, port, T::BYTES as u8);
    T::from_u64(u64::from(value)).set(&mut vcpu.regs, RAX as u8);
    Ok(())
}

fn output<T: Int, const IMM: bool>(vcpu: &mut Vcpu, op: &Op) -> Step {
    let port = port(vcpu, op, IMM);
    vcpu.check_io(port, T::BYTES as u8)?;
    let value = T::get(&vcpu.regs, RAX as u8).to_u64() as u32;
    vcpu.port_out(op, port, T::BYTES as u8, value);
    Ok(())
}

/// Chooses the handler.
pub(crate) fn select(d: &mut Decoding<'_>) -> Option<Choice> {
    let (is_in, data) = match d.instruction.mnemonic() {
        Mnemonic::In => (true, d.instruction.op0_register()),
        Mnemonic::Out => (false, d.instruction.op1_register()),
        _ => return None,
    };
    let immediate = d.shape.contains(&Slot::Imm);
    let run: Handler = match (is_in, data.size(), immediate) {
        (true, 1, false) => input::<u8, false>,
        (true, 1, true) => input::<u8, true>,
        (true, 2, false) => input::<u16, false>,
        (true, 2, true) => input::<u16, true>,
        (true, _, false) => input::<u32, false>,
        (true, _, true) => input::<u32, true>,
        (false, 1, false) => output::<u8, false>,
        (false, 1, true) => output::<u8, true>,
        (false, 2, false) => output::<u16, false>,
        (false, 2, true) => output::<u16, true>,
        (false, _, false) => output::<u32, false>,
        (false, _, true) => output::<u32, true>,
    };
    // A device may have raised an interrupt, which must be seen before the next instruction.
    end(run)
}
