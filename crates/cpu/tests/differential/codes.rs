//! Which encodings are tested: everything in `iced-x86`'s tables that a program may use at privilege level 3 and
//! whose result is a function of registers and memory. What is left out is listed here, with the reason.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeInfo, OpCodeOperandKind};

use crate::layout::Mode;

/// What a test covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Family {
    /// Everything on general-purpose registers, flags, the stack and control flow.
    Integer,
    /// MMX, SSE, AVX, AVX-512 and the cryptographic extensions.
    Simd,
    /// The floating-point stack.
    X87,
    /// Opcodes that mean nothing.
    Undefined,
}

/// The encodings of a test.
pub(crate) struct Codes {
    /// Those that can complete.
    pub(crate) complete: Vec<Code>,
    /// Those that always end in an exception at privilege level 3.
    pub(crate) fault: Vec<Code>,
}

/// What the host can do.
pub(crate) struct Cpuid {
    leaf1: [u32; 4],
    leaf7: [u32; 4],
    leaf7_1: [u32; 4],
    extended1: [u32; 4],
    extended8: [u32; 4],
    leaf_d_1: [u32; 4],
    /// AMD or Hygon.
    pub(crate) amd: bool,
    /// XCR0.
    xcr0: u64,
}

impl Cpuid {
    pub(crate) fn new(xcr0: u64) -> Self {
        let leaf = |function, index| {
            let r = std::arch::x86_64::__cpuid_count(function, index);
            [r.eax, r.ebx, r.ecx, r.edx]
        };
        let max = leaf(0, 0)[0];
        let extended_max = leaf(0x8000_0000, 0)[0];
        let checked = |function: u32, index| {
            let top = if function >= 0x8000_0000 { extended_max } else { max };
            if function <= top { leaf(function, index) } else { [0; 4] }
        };
        let leaf7 = checked(7, 0);
        Self {
            leaf1: checked(1, 0),
            leaf7,
            leaf7_1: if leaf7[0] >= 1 { checked(7, 1) } else { [0; 4] },
            extended1: checked(0x8000_0001, 0),
            extended8: checked(0x8000_0008, 0),
            leaf_d_1: checked(0xd, 1),
            amd: leaf(0, 0)[1] != u32::from_le_bytes(*b"Genu"),
            xcr0,
        }
    }

    /// Whether the host has a feature and this CPU offers it to guests.
    fn has(&self, feature: CpuidFeature, fsgsbase: bool) -> bool {
        use CpuidFeature as F;
        let bit = |word: u32, n: u32| word >> n & 1 != 0;
        let [_, _, c1, d1] = self.leaf1;
        let [_, b7, c7, _] = self.leaf7;
        let c_ext = self.extended1[2];
        let avx = self.xcr0 & 6 == 6 && bit(c1, 28);
        let avx512 = avx && self.xcr0 & 0xe0 == 0xe0 && bit(b7, 16);
        match feature {
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 => true,
            F::CMOV | F::MULTIBYTENOP | F::PAUSE | F::FPU | F::FPU287 | F::FPU387 | F::CET_IBT => true,
            F::CX8 => bit(d1, 8),
            F::MMX => bit(d1, 23),
            F::FXSR => bit(d1, 24),
            F::SSE => bit(d1, 25),
            F::SSE2 => bit(d1, 26),
            F::CLFSH => bit(d1, 19),
            F::SSE3 => bit(c1, 0),
            F::PCLMULQDQ => bit(c1, 1),
            F::SSSE3 => bit(c1, 9),
            F::FMA => avx && bit(c1, 12),
            F::CMPXCHG16B => bit(c1, 13),
            F::SSE4_1 => bit(c1, 19),
            F::SSE4_2 => bit(c1, 20),
            F::MOVBE => bit(c1, 22),
            F::POPCNT => bit(c1, 23),
            F::AES => bit(c1, 25),
            F::XSAVE => bit(c1, 27),
            F::AVX => avx,
            F::F16C => avx && bit(c1, 29),
            F::FSGSBASE => fsgsbase && bit(b7, 0),
            F::BMI1 => bit(b7, 3),
            F::AVX2 => avx && bit(b7, 5),
            F::BMI2 => bit(b7, 8),
            F::AVX512F => avx512,
            F::AVX512DQ => avx512 && bit(b7, 17),
            F::ADX => bit(b7, 19),
            F::AVX512_IFMA => avx512 && bit(b7, 21),
            F::CLFLUSHOPT => bit(b7, 23),
            F::CLWB => bit(b7, 24),
            F::AVX512CD => avx512 && bit(b7, 28),
            F::SHA => bit(b7, 29),
            F::AVX512BW => avx512 && bit(b7, 30),
            F::AVX512VL => avx512 && bit(b7, 31),
            F::AVX512_VBMI => avx512 && bit(c7, 1),
            F::AVX512_VBMI2 => avx512 && bit(c7, 6),
            F::GFNI => bit(c7, 8),
            F::VAES => avx && bit(c7, 9),
            F::VPCLMULQDQ => avx && bit(c7, 10),
            F::AVX512_VNNI => avx512 && bit(c7, 11),
            F::AVX512_BITALG => avx512 && bit(c7, 12),
            F::AVX512_VPOPCNTDQ => avx512 && bit(c7, 14),
            F::AVX_VNNI => avx && bit(self.leaf7_1[0], 4),
            F::AVX512_BF16 => avx512 && bit(self.leaf7_1[0], 5),
            F::LZCNT => bit(c_ext, 5),
            F::SSE4A => bit(c_ext, 6),
            F::PREFETCHW => bit(c_ext, 8),
            F::XSAVEOPT => bit(self.leaf_d_1[0], 0),
            F::XSAVEC => bit(self.leaf_d_1[0], 1),
            F::WBNOINVD => bit(self.extended8[1], 9),
            // Privileged instructions of extensions that every 64-bit processor of the last decade has.
            F::MSR | F::SMAP | F::INVPCID => true,
            _ => false,
        }
    }
}

/// Why an encoding is not tested, if it is not.
fn left_out(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    let info = code.op_code();
    let mnemonic = code.mnemonic();
    Some(match mnemonic {
        M::Syscall | M::Sysenter => "enters the host's kernel",
        M::Int1 => "hypervisors under the host disturb it",
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => "shows the host's tables, or is emulated by its kernel",
        M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Cpuid | M::Rdpmc => "differs from run to run",
        M::Ud0 | M::Ud1 => "processors disagree on its length, which matters at the end of mapped memory",
        M::Xgetbv => "its result belongs to the host's kernel",
        M::Vmcall | M::Vmmcall | M::Vmfunc | M::Rsm => "belongs to a hypervisor",
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 | M::Xrstor | M::Xrstor64 => {
            "depends on which components the processor takes for unused"
        }
        M::Xsetbv | M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64 => "privileged; tested by system tests",
        _ if info.op_kinds().iter().any(|&kind| {
            matches!(kind, OpCodeOperandKind::tr_reg | OpCodeOperandKind::sibmem | OpCodeOperandKind::mem_mpx)
        }) =>
        {
            "operand kinds of extensions that no host has"
        }
        _ if matches!(info.encoding(), EncodingKind::XOP | EncodingKind::D3NOW | EncodingKind::MVEX) => {
            "encodings of extensions that no current host has"
        }
        _ => return None,
    })
}

/// Whether the instruction always raises an exception at privilege level 3.
fn always_faults(info: &OpCodeInfo, mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    info.is_privileged()
        || info.is_input_output()
        || matches!(mnemonic, M::Ud2 | M::Clac | M::Stac | M::Cli | M::Sti | M::Int | M::Int3)
}

fn family(code: Code) -> Family {
    let info = code.op_code();
    let features = code.cpuid_features();
    if features.iter().any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)) {
        return Family::X87;
    }
    if matches!(code.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64) {
        return Family::X87;
    }
    let simd = features.iter().any(|f| {
        use CpuidFeature as F;
        !matches!(
            f,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CMOV
                | F::CX8
                | F::CMPXCHG16B
                | F::MOVBE
                | F::POPCNT
                | F::LZCNT
                | F::BMI1
                | F::BMI2
                | F::ADX
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::PREFETCHW
                | F::FSGSBASE
                | F::CLFSH
                | F::CLFLUSHOPT
                | F::CLWB
                | F::CET_IBT
                | F::MSR
                | F::SMAP
                | F::INVPCID
                | F::WBNOINVD
        )
    });
    let general = matches!(
        code.mnemonic(),
        Mnemonic::Crc32
            | Mnemonic::Movnti
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Sfence
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
    );
    let _ = info;
    if simd && !general { Family::Simd } else { Family::Integer }
}

impl Codes {
    /// The encodings of `which` in `mode`.
    pub(crate) fn new(which: Family, mode: Mode, host: &Cpuid, fsgsbase: bool) -> Self {
        let mut codes = Self { complete: Vec::new(), fault: Vec::new() };
        for code in Code::values() {
            let info = code.op_code();
            let decoded = match (host.amd, mode) {
                (true, Mode::Long) => info.amd_decoder64(),
                (true, Mode::Flat32) => info.amd_decoder32(),
                (true, Mode::Segmented16) => info.amd_decoder16(),
                (false, Mode::Long) => info.intel_decoder64(),
                (false, Mode::Flat32) => info.intel_decoder32(),
                (false, Mode::Segmented16) => info.intel_decoder16(),
            };
            let usable = info.is_instruction() && info.is_available_in_mode(mode.bits()) && decoded;
            let offered = code.cpuid_features().iter().all(|&feature| host.has(feature, fsgsbase));
            if !usable || !offered || family(code) != which || left_out(code).is_some() {
                continue;
            }
            if always_faults(info, code.mnemonic()) {
                codes.fault.push(code);
            } else {
                codes.complete.push(code);
            }
        }
        codes
    }
}
