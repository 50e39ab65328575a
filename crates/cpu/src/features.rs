//! What the guest's CPUID says, and what follows from it inside the CPU.

/// One CPUID leaf as the guest sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Leaf {
    /// Leaf (EAX).
    pub function: u32,
    /// Sub-leaf (ECX); `None` where the leaf ignores ECX.
    pub index: Option<u32>,
    /// EAX, EBX, ECX, EDX.
    pub regs: [u32; 4],
}

/// The CPU model: CPUID leaves of one vCPU, and derived limits.
#[derive(Clone, Debug)]
pub struct Features {
    /// All leaves.
    pub leaves: Vec<Leaf>,
    /// Physical-address width in bits (CPUID.80000008H:EAX[7:0]).
    pub physical_bits: u8,
    /// Bits of XCR0 that may be set (CPUID.0DH.0:EDX:EAX).
    pub xcr0_mask: u64,
    /// Bits of CR4 that may be set.
    pub cr4_mask: u64,
    /// Whether the vendor is AMD (or Hygon): SYSCALL/SYSENTER, error codes and a few corners differ.
    pub amd: bool,
}
