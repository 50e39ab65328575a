//! Runs programs on both sides, counts what was executed, and shrinks what differs.

use std::fmt::Write;

use iced_x86::{Code, Encoder};

use crate::codes::{Codes, Cpuid, Family};
use crate::compare::differences;
use crate::coverage::Coverage;
use crate::generate::{self, Limits, Plan};
use crate::guest::Guest;
use crate::kernel::Host;
use crate::layout::*;
use crate::native::{BATCH, Sandbox};
use crate::program::{Program, Target};
use crate::random::Random;
use crate::vector::Places;

/// A difference, shrunk.
pub(crate) struct Mismatch {
    pub(crate) seed: u64,
    pub(crate) code: Option<Code>,
    pub(crate) report: String,
}

/// How the vCPU runs a program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// In the interpreter, by blocks.
    Blocks,
    /// As translated code.
    Translated,
    /// In the interpreter, instruction by instruction.
    Single,
}

pub(crate) struct Runner {
    sandbox: Sandbox,
    /// In the order of [`Kernel`]: interpreters, and translators.
    guests: [Guest; 2],
    translators: [Guest; 2],
    images: Box<[[u8; MEMORY_LEN]; IMAGES + 1]>,
    constants: [u8; PAGE as usize],
    places: Places,
    pub(crate) limits: Limits,
    pub(crate) cpuid: Cpuid,
    encoder: Encoder,
    ours: Box<Outcome>,
    trace: Vec<u64>,
}

/// One side failed to give an outcome, or the outcomes differ.
struct Difference {
    lines: Vec<String>,
    native: Option<Box<Outcome>>,
}

impl Runner {
    /// Starts both sides.
    pub(crate) fn new(mode: Mode) -> std::io::Result<Self> {
        let (images, constants) = memory_images();
        let sandbox = Sandbox::start(&images, &constants)?;
        let (_, xfeatures) = sandbox.xsave();
        let cpuid = Cpuid::new(xfeatures);
        let limits = Limits { ldt: sandbox.has_ldt(), fsgsbase: sandbox.has_fsgsbase(), amd: cpuid.amd };
        let host = Host { ldt: limits.ldt, fsgsbase: limits.fsgsbase, xfeatures };
        let new = |kernel| Guest::new(kernel, &images, &constants, host);
        let guests = [Kernel::Long, Kernel::Protected].map(new);
        let translators = [Kernel::Long, Kernel::Protected].map(|kernel| new(kernel).translating());
        let encoder = Encoder::new(mode.bits());
        let ours = Outcome::new();
        let places = Places::new(xfeatures);
        Ok(Self {
            sandbox,
            guests,
            translators,
            images,
            constants,
            places,
            limits,
            cpuid,
            encoder,
            ours,
            trace: Vec::new(),
        })
    }

    /// Runs programs of consecutive seeds until `instructions` were executed in all or `most` differences found.
    pub(crate) fn run(
        &mut self,
        plan: &Plan<'_>,
        seeds: &mut impl Iterator<Item = u64>,
        instructions: u64,
        most: usize,
        coverage: &mut Coverage,
    ) -> Vec<Mismatch> {
        /// More differences that do not repeat than this count like others.
        const MOST_PASSING: u32 = 1;
        let mut mismatches: Vec<Mismatch> = Vec::new();
        let mut passing = 0;
        let mut batch = self.generate(plan, seeds);
        while !batch.is_empty() {
            self.sandbox.submit(batch.iter().map(|(_, program)| &*program.input));
            let next = self.generate(plan, seeds);
            let outcomes = match self.sandbox.wait() {
                Ok(outcomes) => outcomes.to_vec(),
                Err(died) => {
                    let (seed, program) = &batch[died.position.min(batch.len() - 1)];
                    let report = format!("{died} in\n{}", program.listing());
                    mismatches.push(Mismatch { seed: *seed, code: None, report });
                    self.restart();
                    Vec::new()
                }
            };
            for ((seed, program), native) in batch.iter().zip(&outcomes) {
                let lines = self.check(program, native);
                coverage.note(program, native, &self.trace);
                if plan.family == Family::X87 && !lines.is_empty() && !self.repeats(program) {
                    // Where the host's kernel switches tasks, x87 pointers can get lost: AMD's processors save them only
                    // with an exception pending.
                    passing += 1;
                    println!("seed {seed:#x}: a difference that does not repeat: {lines:#?}");
                    if passing <= MOST_PASSING {
                        continue;
                    }
                }
                if !lines.is_empty() {
                    let mismatch = self.shrink(*seed, program);
                    if mismatches.iter().all(|known| known.code != mismatch.code) {
                        mismatches.push(mismatch);
                    }
                }
            }
            if coverage.instructions >= instructions || mismatches.len() >= most {
                break;
            }
            batch = next;
        }
        mismatches
    }

    /// Whether a program whose outcomes differed once does so again.
    fn repeats(&mut self, program: &Program) -> bool {
        (0..8).any(|_| !self.difference(program).lines.is_empty())
    }

    fn generate(&mut self, plan: &Plan<'_>, seeds: &mut impl Iterator<Item = u64>) -> Vec<(u64, Program)> {
        let make = if plan.family == Family::Undefined { generate::undefined } else { generate::program };
        seeds.take(BATCH).map(|seed| (seed, make(plan, seed, &mut self.encoder))).collect()
    }

    fn restart(&mut self) {
        self.sandbox = Sandbox::start(&self.images, &self.constants).expect("it started before");
    }

    /// Runs a program on the vCPU and compares: whole blocks, as translated code, and, if it has branches, single instructions.
    fn check(&mut self, program: &Program, native: &Outcome) -> Vec<String> {
        self.trace.clear();
        let mut lines = self.check_run(program, native, Way::Blocks);
        lines.extend(self.check_run(program, native, Way::Translated));
        if program.branches {
            lines.extend(self.check_run(program, native, Way::Single));
        }
        lines
    }

    fn check_run(&mut self, program: &Program, native: &Outcome, way: Way) -> Vec<String> {
        let trace = (way == Way::Single).then_some(&mut self.trace);
        let guests = if way == Way::Translated { &mut self.translators } else { &mut self.guests };
        let lines = match guests[program.kernel as usize].run(&program.input, trace, &mut self.ours) {
            Ok(()) => differences(program, native, &self.ours, &self.places),
            Err(failure) => {
                vec![format!("host ended in vector {} at {:#x}, ours failed: {failure:?}", native.vector, native.rip)]
            }
        };
        lines.into_iter().map(|line| format!("{way:?}: {line}")).collect()
    }

    /// Runs one program on both sides.
    fn difference(&mut self, program: &Program) -> Difference {
        self.sandbox.submit(std::iter::once(&*program.input));
        match self.sandbox.wait() {
            Ok(outcomes) => {
                let native = Box::new(outcomes[0].clone());
                Difference { lines: self.check(program, &native), native: Some(native) }
            }
            Err(died) => {
                self.restart();
                Difference { lines: vec![died.to_string()], native: None }
            }
        }
    }

    /// Reduces a program whose outcomes differ to as little as still differs.
    fn shrink(&mut self, seed: u64, program: &Program) -> Mismatch {
        let mut shortest = program.clone();
        let mut before = None;
        for len in 1..=program.items.len() {
            let prefix = self.cut(program, 0..len);
            let difference = self.difference(&prefix);
            if !difference.lines.is_empty() {
                shortest = prefix;
                break;
            }
            before = difference.native;
        }
        let last = shortest.items.len() - 1;
        // What the return from a signal does not restore.
        const NT_ID: u64 = 1 << 14 | 1 << 21;
        if let Some(state) = before.filter(|state| state.vector == BP && state.rflags & NT_ID == 0) {
            let single = self.single(&shortest, last, &state);
            if !self.difference(&single).lines.is_empty() {
                return self.report(seed, &single);
            }
        }
        // It takes several instructions: drop those that do not matter.
        let mut i = shortest.items.len();
        while i > 0 && shortest.items.len() > 1 {
            i -= 1;
            if let Some(fewer) = self.without(&shortest, i)
                && !self.difference(&fewer).lines.is_empty()
            {
                shortest = fewer;
            }
        }
        self.report(seed, &shortest)
    }

    /// Some of the items of a program; branches that leave them go to their end.
    fn cut(&mut self, program: &Program, range: std::ops::Range<usize>) -> Program {
        let mut cut = program.clone();
        cut.items = cut.items[range.clone()].to_vec();
        for item in &mut cut.items {
            retarget(&mut item.target, |n| n.clamp(range.start, range.end) - range.start);
        }
        // Sizes do not change, so this cannot fail.
        let _ = cut.assemble(&mut self.encoder);
        cut
    }

    /// A program less one item, if it makes sense without.
    fn without(&mut self, program: &Program, i: usize) -> Option<Program> {
        let mut fewer = program.clone();
        fewer.items.remove(i);
        for item in &mut fewer.items {
            retarget(&mut item.target, |n| if n > i { n - 1 } else { n });
        }
        fewer.assemble(&mut self.encoder)?;
        Some(fewer)
    }

    /// Item `i` alone, in the state that the items before it left.
    fn single(&mut self, program: &Program, i: usize, state: &Outcome) -> Program {
        let mut single = program.clone();
        single.code_at += program.starts[i];
        single.input.gpr = state.gpr;
        single.input.rflags = state.rflags;
        single.input.selectors = state.selectors;
        (single.input.fs_base, single.input.gs_base) = (state.fs_base, state.gs_base);
        if state.has_xsave != 0 {
            single.input.xsave = state.xsave;
        }
        single.input.image = OWN_IMAGE as u16;
        self.sandbox.set_own_image(&state.memory);
        let guests = self.guests.iter_mut().chain(&mut self.translators);
        guests.for_each(|guest| guest.set_own_image(&state.memory));
        self.cut(&single, i..i + 1)
    }

    fn report(&mut self, seed: u64, program: &Program) -> Mismatch {
        let Difference { lines, native } = self.difference(program);
        let mut report = format!("seed {seed:#x}, {:?} on {:?}:\n{}", program.mode, program.kernel, program.listing());
        let input = &program.input;
        let _ = writeln!(report, "before: rflags {:#x} selectors {:x?}", input.rflags, input.selectors);
        for (i, value) in input.gpr.iter().enumerate() {
            let _ = write!(report, "  r{i:<2} {value:#018x}{}", if i % 4 == 3 { "\n" } else { "" });
        }
        if input.use_xsave != 0 {
            report += &self.places.show(&input.xsave);
        }
        if let Some(native) = native {
            let _ = writeln!(
                report,
                "host ended: vector {} error {:#x} cr2 {:#x} rip {:#x} rflags {:#x}",
                native.vector, native.error, native.cr2, native.rip, native.rflags
            );
        }
        for line in &lines {
            let _ = writeln!(report, "  {line}");
        }
        Mismatch { seed, code: program.items.last().map(|item| item.code()), report }
    }
}

fn retarget(target: &mut Target, change: impl Fn(usize) -> usize) {
    if let Some(n) = target.item() {
        *n = change(*n);
    }
}

/// Memory contents: random bytes, runs of equal ones, small numbers, addresses.
fn memory_images() -> (Box<[[u8; MEMORY_LEN]; IMAGES + 1]>, [u8; PAGE as usize]) {
    let mut rng = Random::new(0x696d_6167_6573);
    let mut fill = |bytes: &mut [u8]| {
        let mut at = 0;
        while at < bytes.len() {
            let len = (8 + rng.below(120) as usize).min(bytes.len() - at);
            let piece = &mut bytes[at..at + len];
            match rng.below(6) {
                0 => piece.fill(rng.next() as u8),
                1 => piece.fill(0),
                2 => piece.chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.value().to_le_bytes()[..c.len()])),
                3 => piece.chunks_mut(4).for_each(|c| {
                    let value = (DATA + rng.below(2 * PAGE)) as u32;
                    c.copy_from_slice(&value.to_le_bytes()[..c.len()]);
                }),
                _ => rng.fill(piece),
            }
            at += len;
        }
    };
    let mut images: Box<[[u8; MEMORY_LEN]; IMAGES + 1]> =
        vec![[0; MEMORY_LEN]; IMAGES + 1].try_into().unwrap_or_else(|_| unreachable!("the length is right"));
    images.iter_mut().for_each(|image| fill(image));
    let mut constants = [0; PAGE as usize];
    fill(&mut constants);
    (images, constants)
}

/// Where seeds begin unless something else is asked for: a change is judged by the same programs each time.
const SEED: u64 = 0x5eed_0000_0001;

/// What environment variables ask for.
struct Settings {
    seed: Option<u64>,
    /// `DIFFERENTIAL_EXPLORE=1`: programs that nobody has run yet.
    explore: bool,
    programs: Option<u64>,
    instructions: Option<u64>,
    code: Option<Code>,
    reports: Option<u64>,
}

impl Settings {
    fn new() -> Self {
        let number = |name: &str| {
            let text = std::env::var(name).ok()?;
            let digits = text.trim_start_matches("0x");
            let radix = if digits.len() < text.len() { 16 } else { 10 };
            Some(u64::from_str_radix(digits, radix).unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
        };
        let code = std::env::var("DIFFERENTIAL_CODE").ok().map(|name| {
            Code::values()
                .find(|code| format!("{code:?}") == name)
                .unwrap_or_else(|| panic!("DIFFERENTIAL_CODE is not a name of iced_x86::Code: {name}"))
        });
        Self {
            seed: number("DIFFERENTIAL_SEED"),
            explore: number("DIFFERENTIAL_EXPLORE").is_some_and(|value| value != 0),
            programs: number("DIFFERENTIAL_PROGRAMS"),
            instructions: number("DIFFERENTIAL_INSTRUCTIONS"),
            code,
            reports: number("DIFFERENTIAL_REPORTS"),
        }
    }

    /// Only a part of what there is to test is asked for.
    fn is_partial(&self) -> bool {
        self.programs.is_some() || self.code.is_some()
    }
}

/// Runs a family of encodings and says what came of it.
///
/// # Panics
/// A difference, or something that was never executed.
pub(crate) fn family(which: Family, mode: Mode, instructions: u64) {
    let mut runner = match Runner::new(mode) {
        Ok(runner) => runner,
        Err(error) => {
            println!("skipped: no sandbox process on this host: {error}");
            return;
        }
    };
    if mode == Mode::Segmented16 && !runner.limits.ldt {
        println!("skipped: this host lets no program use a local descriptor table");
        return;
    }
    let settings = Settings::new();
    let codes = Codes::new(which, mode, &runner.cpuid, runner.limits.fsgsbase);
    let plan =
        Plan { mode, family: which, codes: &codes, limits: runner.limits, places: runner.places, only: settings.code };
    let began = std::time::Instant::now();
    let mut coverage = Coverage::default();
    let mismatches = rounds(&mut runner, &plan, &settings, instructions, &mut coverage);
    println!(
        "{which:?} {mode:?}: {} instructions of {} encodings in {} programs, {:.1?}; ended by vector {:?}",
        coverage.instructions,
        coverage.encodings(),
        coverage.programs,
        began.elapsed(),
        coverage.vectors
    );
    for mismatch in &mismatches {
        println!("{}", mismatch.report);
        println!("again with: DIFFERENTIAL_SEED={:#x} DIFFERENTIAL_PROGRAMS=1\n", mismatch.seed);
    }
    assert!(mismatches.is_empty(), "the CPU and the host differ in {} cases", mismatches.len());
    if !settings.is_partial() {
        let blocks: u64 = runner.translators.iter().map(Guest::translated_blocks).sum();
        // What is in segments with a base is not translated.
        assert!(blocks > coverage.programs || mode == Mode::Segmented16, "only {blocks} blocks were translated");
        let gaps = coverage.gaps(&codes, which, mode);
        assert!(gaps.is_empty(), "not everything was executed:\n{}", gaps.join("\n"));
    }
}

/// Runs programs until enough instructions, and everything that is to be covered, were executed.
fn rounds(
    runner: &mut Runner,
    plan: &Plan<'_>,
    settings: &Settings,
    instructions: u64,
    coverage: &mut Coverage,
) -> Vec<Mismatch> {
    let start = if settings.explore { random_seed() } else { settings.seed.unwrap_or(SEED) };
    println!("{:?} {:?}: seeds from {start:#x}", plan.family, plan.mode);
    // The upper byte is for programs that turn out not to be possible.
    let mut seeds = (0..settings.programs.unwrap_or(u64::MAX)).map(|i| start.wrapping_add(i) & !(0xff << 56));
    let most = settings.reports.unwrap_or(1) as usize;
    let round = settings.instructions.unwrap_or(instructions);
    const MOST_ROUNDS: u64 = 8;
    let mut mismatches = Vec::new();
    for n in 1..=MOST_ROUNDS {
        mismatches = runner.run(plan, &mut seeds, n * round, most, coverage);
        let complete = coverage.gaps(plan.codes, plan.family, plan.mode).is_empty();
        if complete || settings.is_partial() || !mismatches.is_empty() {
            break;
        }
    }
    mismatches
}

fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish() >> 8
}
