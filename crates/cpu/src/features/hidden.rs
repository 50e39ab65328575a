//! A hidden instruction does not run, in either tier.

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{cr4, gpr};

use super::bits::{FEATURES, position};
use super::{CpuModel, Features, Placement};
use crate::testing::{Machine, at};
use crate::{Exit, TranslatorOptions};

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A feature and an instruction of it; RDI points to zeroed, aligned memory.
const INSTRUCTIONS: &[(&str, Write)] = &[
    ("pni", |a| a.haddps(xmm1, xmm2)),
    ("ssse3", |a| a.pshufb(xmm1, xmm2)),
    ("sse4_1", |a| a.pmulld(xmm1, xmm2)),
    ("sse4_2", |a| a.pcmpgtq(xmm1, xmm2)),
    ("sse4_2", |a| a.crc32(eax, edx)),
    ("pclmulqdq", |a| a.pclmulqdq(xmm1, xmm2, 0)),
    ("aes", |a| a.aesenc(xmm1, xmm2)),
    ("sha_ni", |a| a.sha1nexte(xmm1, xmm2)),
    ("gfni", |a| a.gf2p8mulb(xmm1, xmm2)),
    ("avx", |a| a.vaddps(ymm1, ymm2, ymm3)),
    ("avx", |a| a.vmovaps(ymm1, ymmword_ptr(rdi))),
    ("avx", |a| a.vzeroupper()),
    ("avx2", |a| a.vpaddd(ymm1, ymm2, ymm3)),
    ("fma", |a| a.vfmadd132pd(ymm1, ymm2, ymm3)),
    ("f16c", |a| a.vcvtph2ps(ymm1, xmm2)),
    ("vaes", |a| a.vaesenc(ymm1, ymm2, ymm3)),
    ("avx512f", |a| a.vpaddd(zmm1, zmm2, zmm3)),
    ("avx512f", |a| a.kandw(k1, k2, k3)),
    ("avx512bw", |a| a.vpaddb(zmm1, zmm2, zmm3)),
    ("avx512vl", |a| a.vpabsq(xmm1, xmm2)),
    ("avx512_vpopcntdq", |a| a.vpopcntq(zmm1, zmm2)),
    ("cx16", |a| a.cmpxchg16b(xmmword_ptr(rdi))),
    ("movbe", |a| a.movbe(eax, dword_ptr(rdi))),
    ("popcnt", |a| a.popcnt(eax, edx)),
    ("rdrand", |a| a.rdrand(eax)),
    ("rdseed", |a| a.rdseed(eax)),
    ("bmi1", |a| a.andn(eax, edx, esi)),
    ("bmi2", |a| a.pdep(eax, edx, esi)),
    ("bmi2", |a| a.shlx(eax, edx, esi)),
    ("adx", |a| a.adcx(eax, edx)),
    ("smap", |a| a.clac()),
    ("clflushopt", |a| a.clflushopt(byte_ptr(rdi))),
    ("clwb", |a| a.clwb(byte_ptr(rdi))),
    ("rdpid", |a| a.rdpid(rax)),
    ("fsgsbase", |a| a.rdfsbase(rax)),
    ("lahf_lm", |a| a.lahf()),
    ("xsaveopt", |a| a.xsaveopt(ptr(rdi))),
    ("xsavec", |a| a.xsavec(ptr(rdi))),
];

const ROUNDS: u32 = 40;

fn features(changes: &str) -> Features {
    let model = CpuModel::parse("host", changes).expect("known features");
    Features::modelled(Placement::single(), &model).expect("the host has it")
}

fn shows(features: &Features, name: &str) -> bool {
    features.has(FEATURES[position(name).expect("a feature")].bit)
}

/// Runs an instruction [`ROUNDS`] times and returns how often it raised #UD.
fn undefined(features: Features, translated: bool, write: Write) -> u64 {
    let mut machine = Machine::long();
    machine.vcpu.features = Arc::new(features);
    let allowed = machine.vcpu.features.cr4_mask;
    let mut state = machine.vcpu.state();
    state.cr4 |= (cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE) & allowed;
    state.xcr0 = machine.vcpu.features.xcr0_mask;
    machine.vcpu.set_state(&state);
    if translated {
        let options = TranslatorOptions { cache_bytes: 4 << 20, threshold: 1, check: 0 };
        machine.vcpu.set_translator(Some(options)).expect("this host runs translated code");
    }
    let mut length = 0;
    machine.code(|a| {
        let mut again = a.create_label();
        a.mov(rdi, 0x20_0000u64)?;
        a.xor(ebx, ebx)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut again)?;
        a.nop()?;
        let mut alone = CodeAssembler::new(64)?;
        write(&mut alone)?;
        length = alone.assemble(at::CODE)?.len();
        write(a)?;
        a.sub(ecx, 1)?;
        a.jne(again)?;
        a.hlt()
    });
    machine.code_at(Machine::handler(6), |a| {
        a.inc(rbx)?;
        a.jmp(0x30_0000u64)
    });
    machine.code_at(0x30_0000, |a| {
        a.add(qword_ptr(rsp), length as i32)?;
        a.iretq()
    });
    assert!(matches!(machine.vcpu.run(), Exit::Halt { .. }), "stopped at {:#x}", machine.vcpu.rip());
    assert_eq!(machine.reg(gpr::RCX) as u32, 0);
    machine.reg(gpr::RBX)
}

#[test]
fn hidden_instructions_are_undefined_in_both_tiers() {
    for &(name, write) in INSTRUCTIONS {
        for translated in [false, true] {
            let hidden = features(&format!("-{name}"));
            assert!(!shows(&hidden, name));
            assert_eq!(undefined(hidden, translated, write), u64::from(ROUNDS), "{name}, translated: {translated}");
            if shows(&features(""), name) {
                assert_eq!(undefined(features(""), translated, write), 0, "{name} shown, translated: {translated}");
            }
        }
    }
}

/// RDTSCP, which needs the register that counts rounds.
#[test]
fn rdtscp_can_be_hidden() {
    for (changes, vector) in [("", None), ("-rdtscp", Some(6))] {
        let mut machine = Machine::long();
        machine.vcpu.features = Arc::new(features(changes));
        machine.code(|a| a.rdtscp());
        machine.step(1);
        match vector {
            Some(vector) => machine.assert_in_handler(vector),
            None => assert_eq!(machine.vcpu.rip(), at::CODE + 3),
        }
    }
}

/// Without their features, TZCNT is BSF and LZCNT is BSR.
#[test]
fn older_forms_take_the_place_of_bit_counts() {
    for (changes, zeroes) in [("", [4, 27]), ("-bmi1,-abm", [4, 4])] {
        let features = features(changes);
        if changes.is_empty() && !(shows(&features, "bmi1") && shows(&features, "abm")) {
            continue;
        }
        let mut machine = Machine::long();
        machine.vcpu.features = Arc::new(features);
        machine.set_reg(gpr::RDX, 0x10);
        machine.code(|a| {
            a.tzcnt(eax, edx)?;
            a.lzcnt(ecx, edx)
        });
        machine.step(2);
        assert_eq!([machine.reg(gpr::RAX), machine.reg(gpr::RCX)], zeroes, "{changes}");
    }
}

/// A named model hides what is beyond its level.
#[test]
fn a_level_hides_what_is_above_it() {
    let model = CpuModel::parse("x86-64-v2", "").expect("a model");
    let Ok(level) = Features::modelled(Placement::single(), &model) else { return };
    let (_, avx) = INSTRUCTIONS.iter().find(|(name, _)| *name == "avx").expect("listed");
    let (_, popcnt) = INSTRUCTIONS.iter().find(|(name, _)| *name == "popcnt").expect("listed");
    assert_eq!(undefined(level.clone(), true, *avx), u64::from(ROUNDS));
    assert_eq!(undefined(level, true, *popcnt), 0);
}
