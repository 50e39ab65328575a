//! Which processor a guest sees: `cpu.model` and `cpu.features`.
//!
//! A model is a filter between the host's CPUID and [`Features::from_host`](super::Features::from_host): that function sees the
//! filtered leaves only, so that everything that follows from a feature (XCR0, CR4, sizes of XSAVE areas) agrees with it.

use super::bits::{EAX, EBX, ECX, EDX, FEATURES, lookup, position};

/// A processor to start from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Base {
    /// All that the host has.
    #[default]
    Host,
    /// A level of the x86-64 psABI with the same identity on every host, by number (2–4).
    Level(u8),
}

/// The names of the models.
pub const MODELS: [&str; 4] = ["host", "x86-64-v2", "x86-64-v3", "x86-64-v4"];

/// psABI level 2, and what every processor of that level has beside it.
const V2: &str = "pni ssse3 sse4_1 sse4_2 cx16 popcnt lahf_lm rdtscp tsc_deadline_timer tsc_adjust invtsc";
const V3: &str = "xsave xsaveopt avx avx2 fma f16c bmi1 bmi2 movbe abm aes pclmulqdq rdrand fsgsbase smep";
const V4: &str = "avx512f avx512cd avx512bw avx512dq avx512vl xsavec xgetbv1 smap adx rdseed clflushopt clwb erms pcid \
                  invpcid pdpe1gb 3dnowprefetch";
/// What a level may lack on a host: this CPU has it anyway, or it is a property of the host's clock.
const OPTIONAL: [&str; 3] = ["tsc_deadline_timer", "tsc_adjust", "invtsc"];

/// A model and the changes to it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuModel {
    base: Base,
    /// Whether to show or to hide, and what: a position in the table of features.
    changes: Vec<(bool, usize)>,
    /// Most bits of physical addresses, if not the host's.
    physical_bits: Option<u8>,
}

/// Why a model cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No such model.
    #[error("cpu.model={name}: there is no such model; give one of: {}", MODELS.join(", "))]
    UnknownModel {
        /// The name given.
        name: String,
    },
    /// No such feature.
    #[error("cpu.features: there is no feature \"{name}\"; there are: avx512 (all of it), {}", names())]
    UnknownFeature {
        /// The name given.
        name: String,
    },
    /// The host does not have what was asked for.
    #[error("{key}: this host's processor does not have {names}; leave it out, or choose a smaller cpu.model")]
    Missing {
        /// The key and value that ask for it.
        key: String,
        /// The features, separated by commas.
        names: String,
    },
}

fn names() -> String {
    FEATURES.iter().map(|feature| feature.name).collect::<Vec<_>>().join(" ")
}

/// A filter over a host's CPUID, made by [`CpuModel::over`].
pub struct Filter<H> {
    host: H,
    base: Base,
    /// Whether each feature is shown.
    shown: Vec<bool>,
    /// Most bits of physical addresses.
    physical_bits: Option<u8>,
}

impl CpuModel {
    /// Parses the two keys: a model's name ("" is `host`), and features separated by commas or spaces, each with `+` (or nothing)
    /// to show it or with `-` to hide it. Later ones win.
    ///
    /// # Errors
    /// A name is unknown.
    pub fn parse(model: &str, features: &str) -> Result<Self, ModelError> {
        let base = match model {
            "" | "host" => Base::Host,
            _ => match model.strip_prefix("x86-64-v").and_then(|level| level.parse().ok()) {
                Some(level @ 2..=4) => Base::Level(level),
                _ => return Err(ModelError::UnknownModel { name: model.into() }),
            },
        };
        let mut changes = Vec::new();
        for word in features.split([',', ' ']).filter(|word| !word.is_empty()) {
            let (show, name) = match word.strip_prefix('-') {
                Some(name) => (false, name),
                None => (true, word.strip_prefix('+').unwrap_or(word)),
            };
            let found = lookup(name).ok_or_else(|| ModelError::UnknownFeature { name: name.into() })?;
            changes.extend(found.into_iter().map(|feature| (show, feature)));
        }
        Ok(Self { base, changes, physical_bits: None })
    }

    /// The same model with physical addresses of `most` bits, where the host has more (CPUID.80000008H:EAX[7:0]).
    #[must_use]
    pub fn with_physical_bits(mut self, most: u8) -> Self {
        self.physical_bits = Some(most);
        self
    }

    /// The model's name.
    fn name(&self) -> &'static str {
        match self.base {
            Base::Host => MODELS[0],
            Base::Level(level) => MODELS[usize::from(level).saturating_sub(1).min(MODELS.len() - 1)],
        }
    }

    /// The CPUID of a host with this model, read through `host(function, index)`.
    ///
    /// # Errors
    /// The host does not have a feature that was asked for.
    pub fn over<H: Fn(u32, u32) -> [u32; 4]>(&self, host: H) -> Result<Filter<H>, ModelError> {
        let has: Vec<bool> = FEATURES
            .iter()
            .map(|feature| {
                let bit = feature.bit;
                host(bit.leaf & 0x8000_0000, 0)[EAX] >= bit.leaf
                    && host(bit.leaf, bit.index)[bit.register] >> bit.bit & 1 != 0
            })
            .collect();
        let mut shown = match self.base {
            Base::Host => has.clone(),
            Base::Level(level) => level_features(level, &has),
        };
        for &(show, feature) in &self.changes {
            if show { add(&mut shown, feature) } else { remove(&mut shown, feature) }
        }
        let missing: Vec<&str> = (0..shown.len()).filter(|&i| shown[i] && !has[i]).map(|i| FEATURES[i].name).collect();
        if !missing.is_empty() {
            let asked = |i: &usize| self.changes.contains(&(true, *i));
            let by_feature = missing.iter().any(|name| position(name).as_ref().is_some_and(asked));
            let key = if by_feature { "cpu.features".into() } else { format!("cpu.model={}", self.name()) };
            return Err(ModelError::Missing { key, names: missing.join(", ") });
        }
        Ok(Filter { host, base: self.base, shown, physical_bits: self.physical_bits })
    }
}

/// Which features a level has on a host.
fn level_features(level: u8, has: &[bool]) -> Vec<bool> {
    let lists = [V2, V3, V4].into_iter().take(usize::from(level).saturating_sub(1));
    let mut shown = vec![false; FEATURES.len()];
    for name in lists.flat_map(str::split_whitespace) {
        if let Some(at) = position(name) {
            shown[at] = has[at] || !OPTIONAL.contains(&name);
        }
    }
    shown
}

/// Shows a feature and what it needs.
fn add(shown: &mut [bool], feature: usize) {
    shown[feature] = true;
    for need in FEATURES[feature].needs.iter().filter_map(|name| position(name)) {
        add(shown, need);
    }
}

/// Hides a feature and what needs it.
fn remove(shown: &mut [bool], feature: usize) {
    shown[feature] = false;
    for (i, other) in FEATURES.iter().enumerate() {
        if shown[i] && other.needs.contains(&FEATURES[feature].name) {
            remove(shown, i);
        }
    }
}

impl<H: Fn(u32, u32) -> [u32; 4]> Filter<H> {
    /// A leaf, with what the model hides taken out.
    pub fn leaf(&self, function: u32, index: u32) -> [u32; 4] {
        let mut regs = match self.base {
            Base::Host => self.host_leaf(function, index),
            Base::Level(level) => self.level_leaf(level, function, index),
        };
        if let (0x8000_0008, Some(most)) = (function, self.physical_bits) {
            regs[EAX] = regs[EAX] & !0xff | (regs[EAX] & 0xff).min(most.into());
        }
        regs
    }

    fn host_leaf(&self, function: u32, index: u32) -> [u32; 4] {
        let mut regs = (self.host)(function, index);
        for (feature, shown) in FEATURES.iter().zip(&self.shown) {
            if !shown && (feature.bit.leaf, feature.bit.index) == (function, index) {
                regs[feature.bit.register] &= !(1 << feature.bit.bit);
            }
        }
        regs
    }

    /// The features shown in a leaf.
    fn bits(&self, function: u32, index: u32) -> [u32; 4] {
        let mut regs = [0; 4];
        for (feature, shown) in FEATURES.iter().zip(&self.shown) {
            if *shown && (feature.bit.leaf, feature.bit.index) == (function, index) {
                regs[feature.bit.register] |= 1 << feature.bit.bit;
            }
        }
        regs
    }

    /// A leaf of a processor that is the same on every host of a vendor, but for the XSAVE layout that the vendor uses.
    fn level_leaf(&self, level: u8, function: u32, index: u32) -> [u32; 4] {
        let vendor = (self.host)(0, 0);
        let intel = vendor[EBX] == u32::from_le_bytes(*b"Genu");
        let bits = self.bits(function, index);
        match function {
            0 => [0xd, vendor[EBX], vendor[ECX], vendor[EDX]],
            1 => [signature(intel), 8 << 8, bits[ECX], identity::LEAF1_EDX],
            // Descriptor FF: leaf 4 tells about caches.
            2 if intel => [0xff01, 0, 0, 0],
            4 if intel => identity::INTEL_CACHES.get(index as usize).copied().unwrap_or_default(),
            7 if index == 0 => [u32::from(self.bits(7, 1) != [0; 4]), bits[EBX], bits[ECX], bits[EDX]],
            0xd if index != 1 => (self.host)(0xd, index),
            0x8000_0000 => [0x8000_0008, vendor[EBX], vendor[ECX], vendor[EDX]],
            0x8000_0001 if intel => [0, 0, bits[ECX], bits[EDX] | identity::EXTENDED_EDX],
            0x8000_0001 => {
                let copies = identity::LEAF1_EDX & identity::AMD_COPIES;
                [signature(intel), 0, bits[ECX] | identity::AMD_ECX, bits[EDX] | identity::EXTENDED_EDX | copies]
            }
            0x8000_0002..=0x8000_0004 => brand(level, function - 0x8000_0002),
            0x8000_0005 if !intel => identity::AMD_L1,
            0x8000_0006 if !intel => identity::AMD_L2,
            0x8000_0006 => [0, 0, identity::AMD_L2[ECX], 0],
            0x8000_0008 => [((self.host)(function, 0)[EAX] & 0xff).min(40) | 48 << 8, 0, 0, 0],
            _ => bits,
        }
    }
}

/// Family, model and stepping: the latest of each vendor that needs no errata worked around (SDM vol. 2, CPUID leaf 1).
fn signature(intel: bool) -> u32 {
    if intel { 0x0006_06a6 } else { 0x00a0_0f11 }
}

/// A third of the brand string.
fn brand(level: u8, part: u32) -> [u32; 4] {
    let text = format!("bhyve x86-64-v{level}");
    let byte = |i: usize| text.as_bytes().get(part as usize * 16 + i).copied().unwrap_or(0);
    std::array::from_fn(|word| u32::from_le_bytes(std::array::from_fn(|i| byte(word * 4 + i))))
}

mod identity {
    //! What the levels have whatever the host is.

    /// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE, SSE2.
    pub(super) const LEAF1_EDX: u32 = 0x078b_fbff;
    /// SYSCALL, NX, long mode.
    pub(super) const EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 29;
    /// Bits of leaf 1 that AMD has in 80000001H too (not SEP, SSE, SSE2, CLFSH).
    pub(super) const AMD_COPIES: u32 = 0x0183_f3ff;
    /// CMP legacy, CR8 legacy.
    pub(super) const AMD_ECX: u32 = 1 << 1 | 1 << 4;
    /// Two first-level caches of 32 KiB, 8 ways.
    pub(super) const AMD_L1: [u32; 4] = [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140];
    /// Second level of 512 KiB, third of 16 MiB.
    pub(super) const AMD_L2: [u32; 4] = [0x4800_6400, 0x6800_4200, 0x0200_6140, 0x0080_8140];
    /// Data, instructions, second and third level, of the same sizes.
    pub(super) const INTEL_CACHES: [[u32; 4]; 4] = [
        [0x121, 7 << 22 | 63, 63, 0],
        [0x122, 7 << 22 | 63, 63, 0],
        [0x143, 7 << 22 | 63, 1023, 0],
        [0x163, 15 << 22 | 63, 16383, 0],
    ];
}

#[cfg(test)]
mod tests {
    use super::super::{Features, Placement};
    use super::*;

    /// A host with all features, of one of the vendors.
    fn host(vendor: &[u8; 4]) -> impl Fn(u32, u32) -> [u32; 4] {
        let vendor = u32::from_le_bytes(*vendor);
        move |function, index| match (function, index) {
            (0, _) => [0x16, vendor, 1, 2],
            (0x8000_0000, _) => [0x8000_0021, vendor, 1, 2],
            (0xd, 0) => [0xe7, 2696, 2696, 0],
            (0xd, 2) => [256, 576, 0, 0],
            (0xd, 5..=7) => [64, 1088, 0, 0],
            (4, _) => [0; 4],
            _ => [u32::MAX; 4],
        }
    }

    fn features(model: &str, changes: &str) -> Features {
        let model = CpuModel::parse(model, changes).unwrap();
        let filter = model.over(host(b"Auth")).unwrap();
        Features::from_host(Placement::single(), |function, index| filter.leaf(function, index))
    }

    fn shows(features: &Features, name: &str) -> bool {
        let bit = FEATURES[position(name).unwrap()].bit;
        features.leaf(bit.leaf, bit.index)[bit.register] >> bit.bit & 1 != 0
    }

    #[test]
    fn the_host_is_the_default_and_hides_nothing() {
        let host_model = features("", "");
        assert!(FEATURES.iter().all(|feature| shows(&host_model, feature.name)));
        assert_eq!(CpuModel::parse("host", "").unwrap(), CpuModel::default());
    }

    #[test]
    fn what_is_hidden_takes_along_what_needs_it() {
        let model = features("host", "-avx512");
        assert!(FEATURES.iter().filter(|f| f.name.starts_with("avx512")).all(|f| !shows(&model, f.name)));
        assert!(shows(&model, "avx2") && shows(&model, "vaes"));
        assert_eq!(model.xcr0_mask, 7, "the state of AVX-512 goes too");
        let model = features("host", "-xsave");
        assert!(!shows(&model, "avx") && !shows(&model, "fma") && !shows(&model, "xsaves"));
        assert_eq!(model.xcr0_mask, 1);
        let model = features("host", "-avx, -fsgsbase");
        assert_eq!((model.xcr0_mask, model.cr4_mask & platform::x86::cr4::FSGSBASE), (3, 0));
    }

    #[test]
    fn levels_are_the_same_on_every_host() {
        for level in ["x86-64-v2", "x86-64-v3", "x86-64-v4"] {
            let model = CpuModel::parse(level, "").unwrap();
            let leaves = |physical_bits: u32, newer: bool| {
                let host = host(b"Auth");
                let filter = model
                    .over(move |function, index| match function {
                        0x8000_0008 => [physical_bits | 48 << 8, 0, 0, 0],
                        1 if newer => [0xdead_beef, 0, u32::MAX, u32::MAX],
                        _ => host(function, index),
                    })
                    .unwrap();
                Features::from_host(Placement::single(), |function, index| filter.leaf(function, index)).leaves
            };
            assert_eq!(leaves(48, false), leaves(52, true), "{level}");
        }
        let v2 = features("x86-64-v2", "");
        assert!(shows(&v2, "sse4_2") && !shows(&v2, "avx") && !shows(&v2, "aes") && !shows(&v2, "erms"));
        assert_eq!(v2.xcr0_mask, 1);
        let v3 = features("x86-64-v3", "-fma,+sha");
        assert!(shows(&v3, "avx2") && shows(&v3, "sha_ni") && !shows(&v3, "fma") && !shows(&v3, "avx512f"));
        assert_eq!(v3.xcr0_mask, 7);
        let v4 = features("x86-64-v4", "");
        assert!(shows(&v4, "avx512vl") && !shows(&v4, "avx512vbmi"));
        assert_eq!(v4.xcr0_mask, 0xe7);
        let added = features("x86-64-v2", "avx512");
        assert!(shows(&added, "avx") && shows(&added, "xsave") && shows(&added, "avx512f"));
    }

    #[test]
    fn physical_addresses_can_be_narrower_than_the_hosts() {
        for (model, most, expected) in
            [("host", 38, 38), ("host", 52, 52), ("x86-64-v2", 36, 36), ("x86-64-v3", 48, 40)]
        {
            let model = CpuModel::parse(model, "").unwrap().with_physical_bits(most);
            let filter = model.over(host(b"Auth")).unwrap();
            let features = Features::from_host(Placement::single(), |function, index| filter.leaf(function, index));
            assert_eq!(features.physical_bits, expected, "{most}");
            assert_eq!(features.leaf(0x8000_0008, 0)[EAX], u32::from(expected) | 48 << 8, "{most}");
        }
    }

    #[test]
    fn brand_and_caches_are_there() {
        let v3 = features("x86-64-v3", "");
        let text: Vec<u8> =
            (2..5).flat_map(|i| v3.leaf(0x8000_0000 + i, 0)).flat_map(|word| word.to_le_bytes()).collect();
        assert!(text.starts_with(b"bhyve x86-64-v3\0"));
        assert_eq!(v3.leaf(0x8000_0006, 0)[2] >> 16, 512);
        let filter = CpuModel::parse("x86-64-v3", "").unwrap().over(host(b"Genu")).unwrap();
        let intel = Features::from_host(Placement::single(), |function, index| filter.leaf(function, index));
        assert_eq!(intel.leaf(4, 2)[2], 1023);
        assert_eq!(intel.leaf(4, 4), [0; 4]);
    }

    #[test]
    fn mistakes_are_told() {
        let error = CpuModel::parse("", "-avx1024").unwrap_err().to_string();
        assert!(error.starts_with("cpu.features: there is no feature \"avx1024\"; there are: avx512"), "{error}");
        assert!(error.contains(" sha_ni "), "{error}");
        let error = CpuModel::parse("x86-64-v5", "").unwrap_err().to_string();
        let want = "cpu.model=x86-64-v5: there is no such model; give one of: host, x86-64-v2, x86-64-v3, x86-64-v4";
        assert_eq!(error, want);
        let plain = |function: u32, _| if function & 0xffff == 0 { [0x8000_0008; 4] } else { [0; 4] };
        let error = CpuModel::parse("", "+aes").unwrap().over(plain).err().unwrap().to_string();
        assert!(error.starts_with("cpu.features: this host's processor does not have aes;"), "{error}");
        let error = CpuModel::parse("x86-64-v3", "").unwrap().over(plain).err().unwrap().to_string();
        assert!(error.starts_with("cpu.model=x86-64-v3: this host's processor does not have pni,"), "{error}");
    }
}
