//! The home of emitted code: its memory, its tables, and the two-way traffic between it and the interpreter.
//!
//! | file           | what it holds                                                        |
//! |----------------|-----------------------------------------------------------------------|
//! | [`arena`]      | memory for code, writable in one mapping and executable in another     |
//! | [`context`]    | layout of the block that emitted code reaches from RSP                 |
//! | [`perf_map`]   | names for translated code in profiles                                  |
//! | [`table`]      | TLB and jump cache for emitted code                                    |
//! | [`calls`]      | what SYSCALL and SYSRET of emitted code need                         |
//! | [`legacy`]     | which code outside 64-bit mode is translated                           |
//! | [`trampoline`] | the way in and the way out                                             |
//! | [`blocks`]     | which code was made from what, and how long it stays valid             |
//! | [`quiet`]      | the word that says that events are pending                             |
//! | [`run`]        | entering code, and what it calls                                       |

pub(crate) mod arena;
pub(crate) mod blocks;
pub(crate) mod calls;
pub(crate) mod context;
mod legacy;
pub(crate) mod perf_map;
pub(crate) mod quiet;
pub(crate) mod run;
pub(crate) mod table;
#[cfg(test)]
mod tests;
pub(crate) mod trampoline;

use iced_x86::Code;

use crate::Step;
use crate::translate::{Site, SiteKind};
use arena::Arena;
use trampoline::Trampolines;

/// How the translator works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TranslatorOptions {
    /// Bound of the memory for emitted code, in bytes.
    pub cache_bytes: usize,
    /// A block is translated after it was interpreted this many times.
    pub threshold: u16,
    /// Every n-th translated block that runs is run by the interpreter too, and the outcomes are compared; 0 = never.
    pub check: u32,
}

impl Default for TranslatorOptions {
    fn default() -> Self {
        Self { cache_bytes: 128 << 20, threshold: 8, check: 0 }
    }
}

/// What the translator has done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TranslatorCounters {
    /// Blocks translated, and guest instructions in them.
    pub blocks: u64,
    /// Guest instructions translated.
    pub instructions: u64,
    /// Times that all code was dropped because memory was full.
    pub flushes: u64,
    /// Blocks dropped because their bytes were written.
    pub dropped: u64,
    /// Entries from the run loop.
    pub entries: u64,
    /// Instructions run by the interpreter from emitted code.
    pub interpreted: u64,
    /// Memory accesses that missed the TLB of emitted code.
    pub misses: u64,
    /// Direct branches bound.
    pub links: u64,
    /// Indirect branches that missed the jump cache.
    pub branches: u64,
    /// Blocks compared with the interpreter.
    pub checked: u64,
}

/// How often emitted code called the interpreter, by instruction.
#[derive(Default)]
struct Fallbacks(Vec<u64>);

impl Fallbacks {
    #[inline]
    fn count(&mut self, code: Code) {
        let index = code as usize;
        if index >= self.0.len() {
            self.0.resize(index + 1, 0);
        }
        self.0[index] += 1;
    }

    /// Names and counts, most frequent first.
    fn list(&self) -> Vec<(String, u64)> {
        let mut list: Vec<_> = Code::values()
            .zip(&self.0)
            .filter(|(_, count)| **count != 0)
            .map(|(code, count)| (format!("{code:?}").to_lowercase(), *count))
            .collect();
        list.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        list
    }
}

/// The translator of one vCPU.
pub(crate) struct Jit {
    options: TranslatorOptions,
    arena: Arena,
    trampolines: Trampolines,
    blocks: blocks::Blocks,
    sites: Vec<Site>,
    /// What the run loop is to be told when emitted code has left.
    outcome: Step,
    fast_pext: bool,
    pub(crate) counters: TranslatorCounters,
    fallbacks: Fallbacks,
    checks: u32,
    /// Decoding mode of what is in the jump caches of other than 64-bit code.
    decoding: u8,
    /// Vector level that code is made for and looked up by.
    vectors: u8,
    /// The vector registers were loaded when emitted code was left.
    loaded: bool,
}

/// Site that every trampoline may be called with: a block that was dropped.
const STALE: Site = Site { kind: SiteKind::Branch { start: 0, undo: 0 }, access: 0, block: u32::MAX, x87: false };
