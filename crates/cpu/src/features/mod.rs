//! What the guest's CPUID says, and what follows from it inside the CPU.
//!
//! The guest sees the host's processor, less what this CPU does not have: virtualisation, power and
//! thermal management, performance monitoring, machine-check details. Data instructions run on the
//! host, so their feature bits pass through.

//!
//! | file          | what it has                                                        |
//! |---------------|----------------------------------------------------------------------|
//! | `bits`        | the features by name                                                |
//! | `instruction` | which feature an instruction belongs to                             |
//! | [`model`]     | the processor that the configuration asks for                       |
//! | `timing`      | leaves that tell frequencies                                        |

pub(crate) mod bits;
#[cfg(test)]
mod hidden;
pub(crate) mod instruction;
pub mod model;
mod timing;

use platform::x86::cr4;

pub use model::{CpuModel, ModelError};
pub use timing::Timing;

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

/// Where a vCPU sits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placement {
    /// APIC id of this vCPU.
    pub apic_id: u32,
    /// Sockets of the machine.
    pub sockets: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
    /// Whether x2APIC mode is offered (`-x`).
    pub x2apic: bool,
}

impl Placement {
    /// The only vCPU of a machine.
    pub fn single() -> Self {
        Self { apic_id: 0, sockets: 1, cores: 1, threads: 1, x2apic: false }
    }
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

/// Signature of the hypervisor leaf.
const HYPERVISOR: &[u8; 12] = b"bhyve bhyve ";
/// Highest hypervisor leaf, where no frequencies are known.
const HYPERVISOR_MAX: u32 = 0x4000_0001;

mod mask {
    //! Feature bits that pass through from the host, by leaf and register.
    pub(super) const fn bits(list: &[u32]) -> u32 {
        let mut mask = 0;
        let mut i = 0;
        while i < list.len() {
            mask |= 1 << list[i];
            i += 1;
        }
        mask
    }
    /// SSE3, PCLMULQDQ, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, TSC deadline, AES, XSAVE, AVX, F16C, RDRAND.
    pub(super) const LEAF1_ECX: u32 = bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 24, 25, 26, 28, 29, 30]);
    /// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE, SSE2, SS.
    pub(super) const LEAF1_EDX: u32 =
        bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
    /// FSGSBASE, TSC_ADJUST, BMI1, AVX2, FDP, SMEP, BMI2, ERMS, INVPCID, AVX512F, DQ, RDSEED, ADX, SMAP, IFMA, CLFLUSHOPT, CLWB, CD, SHA, BW, VL.
    pub(super) const LEAF7_EBX: u32 =
        bits(&[0, 1, 3, 5, 6, 7, 8, 9, 10, 16, 17, 18, 19, 20, 21, 23, 24, 28, 29, 30, 31]);
    /// VBMI, UMIP, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ, RDPID.
    pub(super) const LEAF7_ECX: u32 = bits(&[1, 2, 6, 8, 9, 10, 11, 12, 14, 22]);
    /// Fast short REP MOV, VP2INTERSECT, AVX512-FP16.
    pub(super) const LEAF7_EDX: u32 = bits(&[4, 8, 23]);
    /// SHA512, SM3, SM4, AVX-VNNI, AVX512-BF16, fast zero-length REP MOVSB, fast short REP STOSB, fast short REP CMPSB/SCASB,
    /// AVX-IFMA.
    pub(super) const LEAF7_1_EAX: u32 = bits(&[0, 1, 2, 4, 5, 10, 11, 12, 23]);
    /// AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16.
    pub(super) const LEAF7_1_EDX: u32 = bits(&[4, 5, 10]);
    /// LAHF in long mode, CMP legacy, CR8 legacy, ABM, SSE4A, misaligned SSE, PREFETCHW, XOP, FMA4,
    /// topology extensions.
    pub(super) const EXT1_ECX: u32 = bits(&[0, 1, 4, 5, 6, 7, 8, 11, 16, 22]);
    /// SYSCALL, NX, MMXEXT, 1 GB pages, RDTSCP, long mode, and AMD's copies of leaf 1.
    pub(super) const EXT1_EDX: u32 =
        bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 22, 23, 24, 26, 27, 29]);
    /// LFENCE always serialises; indirect branches need no care in software (automatic IBRS); no speculative return stack overflow.
    pub(super) const EXT21_EAX: u32 = bits(&[2, 8, 29]);
    /// No transient scheduler attacks by store queue or L1.
    pub(super) const EXT21_ECX: u32 = bits(&[1, 2]);
    /// XSAVEOPT, XSAVEC, XGETBV with ECX 1, XSAVES.
    pub(super) const LEAFD_1_EAX: u32 = bits(&[0, 1, 2, 3]);
}

/// State components that this CPU keeps: x87, SSE, AVX, and the three of AVX-512.
const XCR0_KNOWN: u64 = 0xe7;

impl Features {
    /// The model of the host, cut to what this CPU does, for a vCPU at `place`.
    pub fn host(place: Placement) -> Self {
        Self::from_host(place, host::cpuid)
    }

    /// The host's processor as `model` has it, for a vCPU at `place`.
    ///
    /// # Errors
    /// The host does not have what the model asks for.
    pub fn modelled(place: Placement, model: &CpuModel) -> Result<Self, ModelError> {
        let filter = model.over(host::cpuid)?;
        Ok(Self::from_host(place, |function, index| filter.leaf(function, index)))
    }

    /// As [`Features::host`], reading the host's leaves through `cpuid(function, index)`.
    pub fn from_host(place: Placement, cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let vendor = cpuid(0, 0);
        let amd = vendor[1] != u32::from_le_bytes(*b"Genu");
        let max = vendor[0].min(0x16);
        let mut model = Self { leaves: Vec::new(), physical_bits: 36, xcr0_mask: 1, cr4_mask: 0, amd };
        model.add(0, None, [max, vendor[1], vendor[2], vendor[3]]);
        model.add_leaf_1(place, cpuid(1, 0));
        if !amd {
            model.add(2, None, cpuid(2, 0));
            model.add_cache_leaf_4(place, &cpuid);
        }
        // ARAT: the local APIC's timer never stops.
        model.add(6, None, [4, 0, 0, 0]);
        let seven = cpuid(7, 0);
        let sub = seven[0].min(1);
        model.add(
            7,
            Some(0),
            [sub, seven[1] & mask::LEAF7_EBX, seven[2] & mask::LEAF7_ECX, seven[3] & mask::LEAF7_EDX],
        );
        if sub >= 1 {
            let one = cpuid(7, 1);
            model.add(7, Some(1), [one[0] & mask::LEAF7_1_EAX, 0, 0, one[3] & mask::LEAF7_1_EDX]);
        }
        model.add_topology_leaf_b(place);
        model.add_xsave(&cpuid);
        model.add_hypervisor();
        model.add_extended(place, &cpuid);
        model.cr4_mask = model.cr4_bits();
        model
    }

    fn add(&mut self, function: u32, index: Option<u32>, regs: [u32; 4]) {
        self.leaves.push(Leaf { function, index, regs });
    }

    /// The registers of a leaf; unknown ones are zero, except that functions beyond the maximum read as Intel documents
    /// would have the highest basic leaf: here, as on AMD, zero.
    pub fn leaf(&self, function: u32, index: u32) -> [u32; 4] {
        let found = self.leaves.iter().find(|leaf| leaf.function == function && leaf.index.is_none_or(|i| i == index));
        found.map_or([0; 4], |leaf| leaf.regs)
    }

    /// Whether a CPUID bit is set.
    pub(crate) fn has(&self, bit: bits::Bit) -> bool {
        let leaf = self.leaves.iter().find(|l| l.function == bit.leaf && l.index.unwrap_or(0) == bit.index);
        leaf.is_some_and(|leaf| leaf.regs[bit.register & 3] >> bit.bit & 1 != 0)
    }

    fn add_leaf_1(&mut self, place: Placement, host: [u32; 4]) {
        let per_socket = place.cores * place.threads;
        let logical = per_socket.next_power_of_two().min(255);
        let ebx = place.apic_id.min(255) << 24 | logical << 16 | host[1] & 0xffff;
        let x2apic = if place.x2apic { 1 << 21 } else { 0 };
        let hypervisor = 1 << 31;
        let htt = if per_socket > 1 { 1 << 28 } else { 0 };
        let ecx = host[2] & mask::LEAF1_ECX | x2apic | hypervisor;
        self.add(1, None, [host[0], ebx, ecx, host[3] & mask::LEAF1_EDX | htt]);
    }

    /// Intel's cache leaf, with the sharing rewritten to the guest's topology.
    fn add_cache_leaf_4(&mut self, place: Placement, cpuid: &impl Fn(u32, u32) -> [u32; 4]) {
        for index in 0..8 {
            let mut regs = cpuid(4, index);
            if regs[0] & 31 == 0 {
                break;
            }
            let sharing = cache_sharing(place, regs[0]).next_power_of_two() - 1;
            regs[0] = regs[0] & 0x3fff | sharing << 14 | (place.cores.next_power_of_two() - 1) << 26;
            self.add(4, Some(index), regs);
        }
    }

    /// AMD's leaves of the topology extensions (APM vol. 3, Fn8000_001D and Fn8000_001E): caches and ids.
    fn add_topology_extensions(&mut self, place: Placement, cpuid: &impl Fn(u32, u32) -> [u32; 4]) {
        if self.leaf(0x8000_0001, 0)[2] >> 22 & 1 == 0 {
            return;
        }
        for index in 0..8 {
            let mut regs = cpuid(0x8000_001d, index);
            if regs[0] & 31 == 0 {
                break;
            }
            regs[0] = regs[0] & 0x3fff | (cache_sharing(place, regs[0]) - 1).min(0xfff) << 14;
            self.add(0x8000_001d, Some(index), regs);
        }
        let thread_bits = place.threads.next_power_of_two().trailing_zeros();
        let core_bits = place.cores.next_power_of_two().trailing_zeros();
        let core = place.apic_id >> thread_bits & ((1 << core_bits) - 1);
        let socket = place.apic_id >> (thread_bits + core_bits);
        let threads = (place.threads - 1).min(0xff);
        self.add(0x8000_001e, None, [place.apic_id, threads << 8 | core & 0xff, socket & 0xff, 0]);
    }

    fn add_topology_leaf_b(&mut self, place: Placement) {
        let thread_bits = place.threads.next_power_of_two().trailing_zeros();
        let core_bits = thread_bits + place.cores.next_power_of_two().trailing_zeros();
        self.add(0xb, Some(0), [thread_bits, place.threads, 1 << 8, place.apic_id]);
        self.add(0xb, Some(1), [core_bits, place.threads * place.cores, 2 << 8 | 1, place.apic_id]);
        self.add(0xb, Some(2), [0, 0, 2, place.apic_id]);
    }

    fn add_xsave(&mut self, cpuid: &impl Fn(u32, u32) -> [u32; 4]) {
        let has_xsave = self.leaf(1, 0)[2] & (1 << 26) != 0;
        if !has_xsave {
            return;
        }
        let top = cpuid(0xd, 0);
        self.xcr0_mask = (u64::from(top[3]) << 32 | u64::from(top[0])) & XCR0_KNOWN & self.announced_components();
        let components: Vec<_> = (2..8).filter(|i| self.xcr0_mask >> i & 1 != 0).collect();
        for &i in &components {
            self.add(0xd, Some(i), cpuid(0xd, i));
        }
        let size = self.xsave_size(self.xcr0_mask, false);
        self.add(0xd, Some(0), [self.xcr0_mask as u32, size, size, 0]);
        self.add(0xd, Some(1), [cpuid(0xd, 1)[0] & mask::LEAFD_1_EAX, size, 0, 0]);
    }

    /// The state components whose registers some feature announces (SDM vol. 1, 13.1).
    fn announced_components(&self) -> u64 {
        let avx = self.leaf(1, 0)[2] >> 28 & 1 != 0;
        let avx512 = self.leaf(7, 0)[1] >> 16 & 1 != 0;
        3 | if avx { 4 } else { 0 } | if avx && avx512 { 0xe0 } else { 0 }
    }

    /// Size in bytes of an XSAVE area for the components in `xcr0`, in standard or compacted format (SDM vol. 1, 13.4).
    pub fn xsave_size(&self, xcr0: u64, compacted: bool) -> u32 {
        let mut end = 576u32;
        for i in (2..63).filter(|i| xcr0 >> i & 1 != 0) {
            let [size, offset, flags, _] = self.leaf(0xd, i);
            if compacted {
                let start = if flags & 2 != 0 { end.checked_next_multiple_of(64).unwrap_or(end) } else { end };
                end = start.saturating_add(size);
            } else {
                end = end.max(offset.saturating_add(size));
            }
        }
        end
    }

    fn add_hypervisor(&mut self) {
        let word =
            |i: usize| u32::from_le_bytes([HYPERVISOR[i], HYPERVISOR[i + 1], HYPERVISOR[i + 2], HYPERVISOR[i + 3]]);
        self.add(0x4000_0000, None, [HYPERVISOR_MAX, word(0), word(4), word(8)]);
        // Bit 0: MSIs and I/O APIC entries carry 15-bit destination ids.
        self.add(0x4000_0001, None, [1, 0, 0, 0]);
    }

    fn add_extended(&mut self, place: Placement, cpuid: &impl Fn(u32, u32) -> [u32; 4]) {
        let least = if self.amd { 0x8000_0021 } else { 0x8000_0008 };
        let max = cpuid(0x8000_0000, 0)[0].clamp(least, 0x8000_0021);
        let vendor = if self.amd { cpuid(0x8000_0000, 0) } else { [0; 4] };
        self.add(0x8000_0000, None, [max, vendor[1], vendor[2], vendor[3]]);
        let one = cpuid(0x8000_0001, 0);
        self.add(0x8000_0001, None, [one[0], one[1], one[2] & mask::EXT1_ECX, one[3] & mask::EXT1_EDX]);
        for function in 0x8000_0002..=0x8000_0006 {
            self.add(function, None, cpuid(function, 0));
        }
        // Invariant TSC.
        self.add(0x8000_0007, None, [0, 0, 0, cpuid(0x8000_0007, 0)[3] & 1 << 8]);
        let eight = cpuid(0x8000_0008, 0);
        self.physical_bits = (eight[0] as u8).clamp(36, 52);
        let per_socket = place.cores * place.threads;
        let id_bits = per_socket.next_power_of_two().trailing_zeros();
        let ecx = if self.amd { id_bits << 12 | (per_socket - 1).min(255) } else { 0 };
        self.add(0x8000_0008, None, [eight[0] & 0xff | 48 << 8, 0, ecx, 0]);
        if self.amd {
            for function in [0x8000_0019, 0x8000_001a] {
                self.add(function, None, cpuid(function, 0));
            }
            self.add_topology_extensions(place, cpuid);
            // This CPU does not speculate, so a guest need not look for the microcode that mends the host's.
            self.add(0x8000_0021, None, [mask::EXT21_EAX, 0, mask::EXT21_ECX, 0]);
        }
    }

    fn cr4_bits(&self) -> u64 {
        let [_, _, one_ecx, _] = self.leaf(1, 0);
        let [_, seven_ebx, seven_ecx, _] = self.leaf(7, 0);
        let has = |word: u32, bit: u32, mask: u64| if word >> bit & 1 != 0 { mask } else { 0 };
        cr4::VME
            | cr4::PVI
            | cr4::TSD
            | cr4::DE
            | cr4::PSE
            | cr4::PAE
            | cr4::MCE
            | cr4::PGE
            | cr4::PCE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | has(one_ecx, 17, cr4::PCIDE)
            | has(one_ecx, 26, cr4::OSXSAVE)
            | has(seven_ebx, 0, cr4::FSGSBASE)
            | has(seven_ebx, 7, cr4::SMEP)
            | has(seven_ebx, 20, cr4::SMAP)
            | has(seven_ecx, 2, cr4::UMIP)
    }
}

/// How many of the guest's threads share a cache, of which `eax` of the cache leaf is given: those of a core, or of the socket
/// from level 3.
fn cache_sharing(place: Placement, eax: u32) -> u32 {
    if eax >> 5 & 7 >= 3 { place.cores * place.threads } else { place.threads }
}

/// The host's CPUID.
mod host {
    /// Reads a leaf of the host.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn cpuid(function: u32, index: u32) -> [u32; 4] {
        /// Leaf 1, ECX: the local APIC's timer has a TSC-deadline mode. Ours has, whatever the host's.
        const TSC_DEADLINE: u32 = 1 << 24;
        let r = std::arch::x86_64::__cpuid_count(function, index);
        [r.eax, r.ebx, r.ecx | if function == 1 { TSC_DEADLINE } else { 0 }, r.edx]
    }

    /// On other hosts: a plain 64-bit processor without SIMD beyond SSE2.
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn cpuid(function: u32, _: u32) -> [u32; 4] {
        let vendor = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"cAMD"), u32::from_le_bytes(*b"enti")];
        match function {
            0 => [7, vendor[0], vendor[1], vendor[2]],
            1 => [0x0080_0f00, 8 << 8, 1 << 13 | 1 << 23, 0x078b_fbff],
            0x8000_0000 => [0x8000_0008, vendor[0], vendor[1], vendor[2]],
            0x8000_0001 => [0, 0, 1, 0x2c10_0800],
            0x8000_0007 => [0, 0, 0, 1 << 8],
            0x8000_0008 => [40 | 48 << 8, 0, 0, 0],
            _ => [0; 4],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Placement = Placement { apic_id: 5, sockets: 1, cores: 4, threads: 2, x2apic: false };

    #[test]
    fn hides_what_this_cpu_does_not_have() {
        let model = Features::from_host(PLACE, |_, _| [u32::MAX; 4]);
        let one = model.leaf(1, 0);
        assert_eq!(one[2] >> 5 & 1, 0, "VMX");
        assert_eq!(one[2] >> 21 & 1, 0, "x2APIC");
        assert_eq!(one[2] >> 31, 1, "hypervisor");
        assert_eq!(one[1] >> 24, 5, "APIC id");
        assert_eq!(model.leaf(0x8000_0001, 0)[2] >> 2 & 1, 0, "SVM");
        assert_eq!(model.xcr0_mask, XCR0_KNOWN);
    }

    #[test]
    fn says_that_it_does_not_speculate() {
        let amd = |function, _| if function & 0xffff == 0 { [0x8000_0008, 0x6874_7541, 0, 0] } else { [0; 4] };
        let model = Features::from_host(PLACE, amd);
        assert_eq!(model.leaf(0x8000_0000, 0)[0], 0x8000_0021);
        assert_eq!(model.leaf(0x8000_0021, 0), [1 << 29 | 1 << 8 | 1 << 2, 0, 1 << 2 | 1 << 1, 0]);
        let intel = |function, _| if function & 0xffff == 0 { [0x16, 0x756e_6547, 0, 0] } else { [0; 4] };
        assert_eq!(Features::from_host(PLACE, intel).leaf(0x8000_0000, 0)[0], 0x8000_0008);
    }

    #[test]
    fn says_it_is_bhyve() {
        let [max, b, c, d] = Features::host(PLACE).leaf(0x4000_0000, 0);
        assert_eq!(max, 0x4000_0001);
        let text: Vec<u8> = [b, c, d].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(text, b"bhyve bhyve ");
    }

    #[test]
    fn topology_has_a_bit_field_for_each_level() {
        let model = Features::host(PLACE);
        assert_eq!(model.leaf(0xb, 0)[..2], [1, 2]);
        assert_eq!(model.leaf(0xb, 1)[..2], [3, 8]);
        assert_eq!(model.leaf(0xb, 1)[3], 5);
    }

    #[test]
    fn amd_has_its_own_topology_leaves() {
        let l3 = 3 | 3 << 5 | 7 << 14;
        let host = |function, index| match (function, index) {
            (0 | 0x8000_0000, _) => [0x8000_0021, 0x6874_7541, 0, 0],
            (0x8000_0001, _) => [0, 0, 1 << 22, 0],
            (0x8000_001d, 0) => [1 | 1 << 5, 7 << 22 | 63, 63, 0],
            (0x8000_001d, 1) => [l3, 0, 0, 0],
            _ => [0; 4],
        };
        let model = Features::from_host(PLACE, host);
        let sharing = |index| (model.leaf(0x8000_001d, index)[0] >> 14 & 0xfff) + 1;
        assert_eq!((sharing(0), sharing(1)), (2, 8));
        // Thread 1 of core 2 of socket 0.
        assert_eq!(model.leaf(0x8000_001e, 0), [5, 1 << 8 | 2, 0, 0]);
    }
}
