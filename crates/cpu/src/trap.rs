//! Why an instruction did not complete.

/// Exception vectors (SDM vol. 3, table 6-1).
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// An exception to be delivered to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// Vector, 0–31.
    pub vector: u8,
    /// Whether an error code is pushed.
    pub has_error: bool,
    /// The error code.
    pub error: u16,
}

/// Why an instruction did not complete. Small, so that results travel in registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trap {
    /// A fault: the instruction has not happened; RIP stays at it. For a page fault the address is in
    /// [`crate::Vcpu::fault_address`] and becomes CR2 at delivery.
    Fault(Exception),
    /// The instruction is complete or paused at a restartable point, with RIP where execution goes on; the block that
    /// contains it must be left. RIP has been set by the handler.
    Leave,
    /// HLT was executed; RIP is behind it.
    Halt,
    /// Triple fault.
    Shutdown,
}

/// What a handler returns.
pub type Step<T = ()> = Result<T, Trap>;

impl Trap {
    /// A fault without an error code.
    #[cold]
    pub const fn fault(vector: u8) -> Self {
        Self::Fault(Exception { vector, has_error: false, error: 0 })
    }
    /// A fault with an error code.
    #[cold]
    pub const fn fault_code(vector: u8, error: u16) -> Self {
        Self::Fault(Exception { vector, has_error: true, error })
    }
    /// #UD.
    pub const fn ud() -> Self {
        Self::fault(vector::UD)
    }
    /// #GP with an error code (0, or a selector with its low bits).
    pub const fn gp(error: u16) -> Self {
        Self::fault_code(vector::GP, error)
    }
    /// #SS with an error code.
    pub const fn ss(error: u16) -> Self {
        Self::fault_code(vector::SS, error)
    }
    /// #TS with an error code.
    pub const fn ts(error: u16) -> Self {
        Self::fault_code(vector::TS, error)
    }
    /// #NP with an error code.
    pub const fn np(error: u16) -> Self {
        Self::fault_code(vector::NP, error)
    }
    /// #NM.
    pub const fn nm() -> Self {
        Self::fault(vector::NM)
    }
}
