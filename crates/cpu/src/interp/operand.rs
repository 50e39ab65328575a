//! How handlers reach their operands.

use platform::x86::{SEGMENT_UNUSABLE, Segment, seg};

use crate::decode::{Ea, Op, op_flag};
use crate::state::int::Int;
use crate::{Step, Trap, Vcpu};

impl Vcpu {
    /// The offset of the memory operand, cut to the address size.
    #[inline(always)]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        let index = self.regs[usize::from(op.index & 31)] << (op.scale & 3);
        let offset = self.regs[usize::from(op.base & 31)].wrapping_add(index).wrapping_add(op.disp);
        let shift = op.ashift & 63;
        offset << shift >> shift
    }

    /// The linear address of the memory operand, checked against its segment for an access of `size` bytes.
    #[inline(always)]
    pub(crate) fn linear(&mut self, op: &Op, size: u64, write: bool) -> Step<u64> {
        let offset = self.offset(op);
        match op.ea {
            Ea::Long => Ok(offset.wrapping_add(self.seg_base[usize::from(op.seg & 7)])),
            Ea::Flat => Ok(offset),
            Ea::Checked => self.linear_checked(usize::from(op.seg), offset, size, write),
        }
    }

    /// Linear address of `offset` in a segment outside 64-bit mode, after the checks of SDM vol. 3, 5.3–5.5.
    ///
    /// # Errors
    /// #GP(0), or #SS(0) for the stack segment: limit, type, null selector.
    #[cold]
    pub(crate) fn linear_checked(&self, index: usize, offset: u64, size: u64, write: bool) -> Step<u64> {
        let refuse = if index == seg::SS { Trap::ss(0) } else { Trap::gp(0) };
        self.linear_in(&self.segments[index.min(5)], offset, size, write).ok_or(refuse)
    }

    /// Linear address of `offset` in `segment` outside 64-bit mode; `None` if the access is not allowed.
    pub(crate) fn linear_in(&self, segment: &Segment, offset: u64, size: u64, write: bool) -> Option<u64> {
        const CODE: u32 = 1 << 3;
        const EXPAND_DOWN: u32 = 1 << 2;
        const RW: u32 = 1 << 1;
        const BIG: u32 = 1 << 14;
        let access = segment.access;
        let protected = self.protected() && !self.v8086();
        if protected {
            let readable = access & CODE == 0 || access & RW != 0;
            let writable = access & CODE == 0 && access & RW != 0;
            if access & SEGMENT_UNUSABLE != 0 || (write && !writable) || (!write && !readable) {
                return None;
            }
        }
        let last = offset.wrapping_add(size - 1);
        let limit = u64::from(segment.limit);
        let inside = if access & (CODE | EXPAND_DOWN) == EXPAND_DOWN {
            let top = if access & BIG != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top && last >= offset
        } else {
            last <= limit && last >= offset
        };
        inside.then(|| segment.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Linear address of `offset` in segment `index` in any mode, for implicit operands (stack, strings).
    #[inline]
    pub(crate) fn segment_linear(&mut self, index: usize, offset: u64, size: u64, write: bool) -> Step<u64> {
        if self.mode.is_64() {
            let base = if index == seg::FS || index == seg::GS { self.seg_base[index] } else { 0 };
            return Ok(base.wrapping_add(offset));
        }
        if self.mode.is_flat() && index != seg::FS && index != seg::GS {
            return Ok(offset);
        }
        self.linear_checked(index, offset, size, write)
    }

    /// Loads the memory operand.
    #[inline(always)]
    pub(crate) fn load_op<T: Int>(&mut self, op: &Op) -> Step<T> {
        let linear = self.linear(op, T::BYTES, false)?;
        self.load(linear).map_err(|trap| stack_error(op, trap))
    }

    /// Loads a far pointer: an offset of `T`, and the selector behind it. These are two accesses, each checked by itself.
    pub(crate) fn load_far_pointer<T: Int>(&mut self, op: &Op) -> Step<(u64, u16)> {
        let offset: T = self.load_op(op)?;
        let behind = Op { disp: op.disp.wrapping_add(T::BYTES), ..*op };
        Ok((offset.to_u64(), self.load_op(&behind)?))
    }

    /// Stores the memory operand.
    #[inline(always)]
    pub(crate) fn store_op<T: Int>(&mut self, op: &Op, value: T) -> Step {
        let linear = self.linear(op, T::BYTES, true)?;
        self.store(linear, value).map_err(|trap| stack_error(op, trap))
    }

    /// Runs `access` with the permissions of the CPU itself (descriptor tables, TSS), whatever the privilege level.
    #[inline(always)]
    pub(crate) fn as_system<R>(&mut self, access: impl FnOnce(&mut Self) -> R) -> R {
        use crate::mmu::tlb::AccessMode;
        let smap = self.cr4 & platform::x86::cr4::SMAP != 0;
        let saved = self.tlb.force_mode(if smap { AccessMode::Supervisor } else { AccessMode::SupervisorAc });
        let result = access(self);
        self.tlb.force_mode(saved);
        result
    }
}

/// A non-canonical address relative to SS is a stack fault.
#[cold]
pub(crate) fn stack_error(op: &Op, trap: Trap) -> Trap {
    if op.flags & op_flag::STACK != 0 && trap == Trap::gp(0) { Trap::ss(0) } else { trap }
}

/// Where a source operand is.
pub(crate) trait Source {
    fn get<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<T>;
}

/// Where a destination operand is. `location` carries what `get_for_put` found to `put` (the linear address).
pub(crate) trait Place: Source {
    fn get_for_put<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<(T, u64)>;
    fn put<T: Int>(vcpu: &mut Vcpu, op: &Op, location: u64, value: T) -> Step;
}

/// First register operand.
pub(crate) struct R1;
/// Second register operand.
pub(crate) struct R2;
/// Memory operand.
pub(crate) struct M;
/// Immediate operand.
pub(crate) struct I;

macro_rules! register_place {
    ($place:ident, $field:ident) => {
        impl Source for $place {
            #[inline(always)]
            fn get<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<T> {
                Ok(T::get(&vcpu.regs, op.$field))
            }
        }
        impl Place for $place {
            #[inline(always)]
            fn get_for_put<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<(T, u64)> {
                Ok((T::get(&vcpu.regs, op.$field), 0))
            }
            #[inline(always)]
            fn put<T: Int>(vcpu: &mut Vcpu, op: &Op, _: u64, value: T) -> Step {
                value.set(&mut vcpu.regs, op.$field);
                Ok(())
            }
        }
    };
}
register_place!(R1, r1);
register_place!(R2, r2);

impl Source for M {
    #[inline(always)]
    fn get<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<T> {
        vcpu.load_op(op)
    }
}
impl Place for M {
    #[inline(always)]
    fn get_for_put<T: Int>(vcpu: &mut Vcpu, op: &Op) -> Step<(T, u64)> {
        let linear = vcpu.linear(op, T::BYTES, true)?;
        let value = vcpu.load_for_store(linear).map_err(|trap| stack_error(op, trap))?;
        Ok((value, linear))
    }
    #[inline(always)]
    fn put<T: Int>(vcpu: &mut Vcpu, op: &Op, location: u64, value: T) -> Step {
        vcpu.store(location, value).map_err(|trap| stack_error(op, trap))
    }
}
impl Source for I {
    #[inline(always)]
    fn get<T: Int>(_: &mut Vcpu, op: &Op) -> Step<T> {
        Ok(T::from_u64(op.imm))
    }
}

/// A generic handler at the operand size `$size` (1, 2, 4, 8 bytes): `sized!(op.osize, handler::<_, Add, R1, M>)` picks
/// the instance whose first type parameter is the operand type.
macro_rules! sized {
    ($size:expr, $($handler:ident)::+ $(, $param:ty)*) => {
        match $size {
            1 => $($handler)::+::<u8 $(, $param)*> as $crate::decode::Handler,
            2 => $($handler)::+::<u16 $(, $param)*>,
            4 => $($handler)::+::<u32 $(, $param)*>,
            _ => $($handler)::+::<u64 $(, $param)*>,
        }
    };
}
pub(crate) use sized;
