//! What a vCPU has done so far, in numbers.

use crate::Vcpu;

/// Counters of the interpreter and of address translation. One thread counts, the vCPU's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Blocks that the interpreter ran because they had not run often enough yet to be translated.
    pub cold_blocks: u64,
    /// Blocks that it ran because code of their mode is not translated, or because there is no translator.
    pub untranslated_blocks: u64,
    /// Instructions that it ran alone: while stepping, in an interrupt shadow, under breakpoints.
    pub single_steps: u64,
    /// Page walks.
    pub page_walks: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Times that HLT found nothing to do.
    pub halts: u64,
}

/// Instructions listed by name.
const MOST_FREQUENT: usize = 16;

impl Vcpu {
    /// All counters by name. The names are for people and may change.
    pub fn statistics(&self) -> Vec<(String, u64)> {
        let Counters { cold_blocks, untranslated_blocks, single_steps, page_walks, exceptions, interrupts, halts } =
            self.counters;
        let [tlb_flushes, tlb_space_flushes, tlb_page_flushes] = self.tlb.flushes;
        let mut list = vec![
            ("exceptions delivered", exceptions),
            ("interrupts delivered", interrupts),
            ("halts", halts),
            ("page walks", page_walks),
            ("TLB flushes", tlb_flushes),
            ("TLB flushes but global pages", tlb_space_flushes),
            ("TLB flushes of a page", tlb_page_flushes),
            ("interpreter: cold blocks", cold_blocks),
            ("interpreter: blocks of modes without translation", untranslated_blocks),
            ("interpreter: single steps", single_steps),
        ];
        if let Some(jit) = self.translator_counters() {
            list.extend([
                ("translator: blocks", jit.blocks),
                ("translator: instructions", jit.instructions),
                ("translator: cache flushes", jit.flushes),
                ("translator: blocks overwritten", jit.dropped),
                ("translator: entries from the run loop", jit.entries),
                ("translator: instructions interpreted", jit.interpreted),
                ("translator: TLB misses", jit.misses),
                ("translator: branches linked", jit.links),
                ("translator: branches looked up", jit.branches),
                ("translator: blocks checked", jit.checked),
            ]);
        }
        let fallbacks = self.translator_fallbacks().into_iter().take(MOST_FREQUENT);
        let fallbacks = fallbacks.map(|(name, count)| (format!("translator: interpreted: {name}"), count));
        list.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(fallbacks).collect()
    }
}
