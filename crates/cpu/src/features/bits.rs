//! The names of features, where CPUID announces them, and which features rest on which.

/// A bit of a CPUID leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Bit {
    pub(crate) leaf: u32,
    pub(crate) index: u32,
    /// 0–3: EAX, EBX, ECX, EDX.
    pub(crate) register: usize,
    pub(crate) bit: u32,
}

/// A feature that can be shown to a guest or hidden from it.
pub(super) struct Named {
    /// As Linux calls it in /proc/cpuinfo (`invtsc` is `constant_tsc` and `nonstop_tsc` there).
    pub(super) name: &'static str,
    pub(super) bit: Bit,
    /// What must be there too.
    pub(super) needs: &'static [&'static str],
}

pub(super) const EAX: usize = 0;
pub(super) const EBX: usize = 1;
pub(super) const ECX: usize = 2;
pub(super) const EDX: usize = 3;

const fn named(
    name: &'static str,
    leaf: u32,
    index: u32,
    register: usize,
    bit: u32,
    needs: &'static [&'static str],
) -> Named {
    Named { name, bit: Bit { leaf, index, register, bit }, needs }
}

const EXTENDED: u32 = 0x8000_0001;
const NOTHING: &[&str] = &[];
const AVX: &[&str] = &["avx"];
const AVX2: &[&str] = &["avx2"];
const AVX512F: &[&str] = &["avx512f"];
const AVX512BW: &[&str] = &["avx512bw"];
const XSAVE: &[&str] = &["xsave"];

/// SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.
pub(super) const FEATURES: &[Named] = &[
    named("pni", 1, 0, ECX, 0, NOTHING),
    named("pclmulqdq", 1, 0, ECX, 1, NOTHING),
    named("ssse3", 1, 0, ECX, 9, &["pni"]),
    named("fma", 1, 0, ECX, 12, AVX),
    named("cx16", 1, 0, ECX, 13, NOTHING),
    named("pcid", 1, 0, ECX, 17, NOTHING),
    named("sse4_1", 1, 0, ECX, 19, &["ssse3"]),
    named("sse4_2", 1, 0, ECX, 20, &["sse4_1"]),
    named("movbe", 1, 0, ECX, 22, NOTHING),
    named("popcnt", 1, 0, ECX, 23, NOTHING),
    named("tsc_deadline_timer", 1, 0, ECX, 24, NOTHING),
    named("aes", 1, 0, ECX, 25, NOTHING),
    named("xsave", 1, 0, ECX, 26, NOTHING),
    named("avx", 1, 0, ECX, 28, &["xsave", "sse4_2"]),
    named("f16c", 1, 0, ECX, 29, AVX),
    named("rdrand", 1, 0, ECX, 30, NOTHING),
    named("fsgsbase", 7, 0, EBX, 0, NOTHING),
    named("tsc_adjust", 7, 0, EBX, 1, NOTHING),
    named("bmi1", 7, 0, EBX, 3, NOTHING),
    named("avx2", 7, 0, EBX, 5, AVX),
    named("smep", 7, 0, EBX, 7, NOTHING),
    named("bmi2", 7, 0, EBX, 8, NOTHING),
    named("erms", 7, 0, EBX, 9, NOTHING),
    named("invpcid", 7, 0, EBX, 10, NOTHING),
    named("avx512f", 7, 0, EBX, 16, &["avx2", "fma"]),
    named("avx512dq", 7, 0, EBX, 17, AVX512F),
    named("rdseed", 7, 0, EBX, 18, NOTHING),
    named("adx", 7, 0, EBX, 19, NOTHING),
    named("smap", 7, 0, EBX, 20, NOTHING),
    named("avx512ifma", 7, 0, EBX, 21, AVX512F),
    named("clflushopt", 7, 0, EBX, 23, NOTHING),
    named("clwb", 7, 0, EBX, 24, NOTHING),
    named("avx512cd", 7, 0, EBX, 28, AVX512F),
    named("sha_ni", 7, 0, EBX, 29, NOTHING),
    named("avx512bw", 7, 0, EBX, 30, AVX512F),
    named("avx512vl", 7, 0, EBX, 31, AVX512F),
    named("avx512vbmi", 7, 0, ECX, 1, AVX512BW),
    named("umip", 7, 0, ECX, 2, NOTHING),
    named("avx512_vbmi2", 7, 0, ECX, 6, AVX512BW),
    named("gfni", 7, 0, ECX, 8, NOTHING),
    named("vaes", 7, 0, ECX, 9, &["avx", "aes"]),
    named("vpclmulqdq", 7, 0, ECX, 10, &["avx", "pclmulqdq"]),
    named("avx512_vnni", 7, 0, ECX, 11, AVX512F),
    named("avx512_bitalg", 7, 0, ECX, 12, AVX512BW),
    named("avx512_vpopcntdq", 7, 0, ECX, 14, AVX512F),
    named("rdpid", 7, 0, ECX, 22, NOTHING),
    // Linux before 6.4 copies wrongly where it sees this without ERMS.
    named("fsrm", 7, 0, EDX, 4, &["erms"]),
    named("avx512_vp2intersect", 7, 0, EDX, 8, AVX512F),
    named("avx512_fp16", 7, 0, EDX, 23, AVX512BW),
    named("sha512", 7, 1, EAX, 0, AVX2),
    named("sm3", 7, 1, EAX, 1, AVX),
    named("sm4", 7, 1, EAX, 2, AVX),
    named("avx_vnni", 7, 1, EAX, 4, AVX2),
    named("avx512_bf16", 7, 1, EAX, 5, AVX512BW),
    named("fzrm", 7, 1, EAX, 10, &["erms"]),
    named("fsrs", 7, 1, EAX, 11, &["erms"]),
    named("fsrc", 7, 1, EAX, 12, &["erms"]),
    named("avx_ifma", 7, 1, EAX, 23, AVX2),
    named("avx_vnni_int8", 7, 1, EDX, 4, AVX2),
    named("avx_ne_convert", 7, 1, EDX, 5, AVX2),
    named("avx_vnni_int16", 7, 1, EDX, 10, AVX2),
    named("xsaveopt", 0xd, 1, EAX, 0, XSAVE),
    named("xsavec", 0xd, 1, EAX, 1, XSAVE),
    named("xgetbv1", 0xd, 1, EAX, 2, XSAVE),
    named("xsaves", 0xd, 1, EAX, 3, &["xsavec"]),
    named("lahf_lm", EXTENDED, 0, ECX, 0, NOTHING),
    named("abm", EXTENDED, 0, ECX, 5, NOTHING),
    named("sse4a", EXTENDED, 0, ECX, 6, NOTHING),
    named("misalignsse", EXTENDED, 0, ECX, 7, NOTHING),
    named("3dnowprefetch", EXTENDED, 0, ECX, 8, NOTHING),
    named("xop", EXTENDED, 0, ECX, 11, AVX),
    named("fma4", EXTENDED, 0, ECX, 16, AVX),
    named("pdpe1gb", EXTENDED, 0, EDX, 26, NOTHING),
    named("rdtscp", EXTENDED, 0, EDX, 27, NOTHING),
    named("invtsc", 0x8000_0007, 0, EDX, 8, NOTHING),
];

/// Other spellings of one feature, and families of features: what `-NAME` hides, and what `+NAME` shows.
pub(super) const ALIASES: &[(&str, &[&str])] = &[
    ("sse3", &["pni"]),
    ("sse4.1", &["sse4_1"]),
    ("sse4.2", &["sse4_2"]),
    ("lzcnt", &["abm"]),
    ("sha", &["sha_ni"]),
    ("avx512", &["avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"]),
];

/// Position of a feature in [`FEATURES`].
pub(super) fn position(name: &str) -> Option<usize> {
    FEATURES.iter().position(|feature| feature.name == name)
}

/// The features that a name stands for, by position; `None` for an unknown name.
pub(super) fn lookup(name: &str) -> Option<Vec<usize>> {
    let name = name.to_ascii_lowercase();
    match ALIASES.iter().find(|(alias, _)| *alias == name) {
        Some((_, features)) => features.iter().map(|feature| position(feature)).collect(),
        None => position(&name).map(|at| vec![at]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_what_they_need_comes_from_the_table() {
        for (i, feature) in FEATURES.iter().enumerate() {
            assert_eq!(position(feature.name), Some(i), "{}", feature.name);
            assert!(feature.needs.iter().all(|need| position(need).is_some()), "{}", feature.name);
            assert_eq!(FEATURES.iter().filter(|other| other.bit == feature.bit).count(), 1, "{}", feature.name);
        }
        for (alias, features) in ALIASES {
            assert_eq!(lookup(alias).map(|found| found.len()), Some(features.len()), "{alias}");
        }
        assert!(lookup("avx3").is_none());
    }
}
