//! Entering emitted code, and what it calls.
#![allow(unsafe_code)]

use platform::x86::{cr0, cr4, gpr, rflags, seg};

use super::arena::Arena;
use super::blocks::{self, Block, Key, ONE_PAGE};
use super::context::{Context, MODES};
use super::legacy::closed;
use super::table::Tables;
use super::trampoline::{self, Targets};
use super::{Fallbacks, Jit, STALE, TranslatorCounters, TranslatorOptions};
use crate::mmu::Access;
use crate::mmu::walk::is_canonical;
use crate::state::{RIP, Shadow};
use crate::translate::asm::Asm;
use crate::translate::block::{Request, Translation, translate};
use crate::translate::vector::level;
use crate::translate::{Site, SiteKind};
use crate::{Step, Trap, Vcpu};

/// Why the translator cannot be switched on.
#[derive(thiserror::Error, Debug)]
pub enum TranslatorError {
    /// No mapping for code or tables.
    #[error(
        "memory for translated code cannot be had: {0} (a policy may forbid executable mappings; switch the translator off)"
    )]
    Memory(#[from] rustix::io::Errno),
    /// Another architecture, or an x86 without BMI2.
    #[error("this host's CPU cannot run translated code (it takes an x86-64 with BMI2); switch the translator off")]
    Host,
}

/// Code is emitted only while this much room is left, so that a block always fits.
const ROOM: usize = 256 << 10;
/// Sites are bounded too.
const MAX_SITES: usize = 1 << 21;

impl Jit {
    fn new(options: TranslatorOptions) -> Result<Self, TranslatorError> {
        let fast_pext = host::pext().ok_or(TranslatorError::Host)?;
        let mut arena = Arena::new(options.cache_bytes)?;
        let mut asm = Asm::new(arena.next());
        let targets = Targets {
            op: host::address(on_op),
            link: host::address(on_link),
            branch: host::address(on_branch),
            event: host::address(on_event),
        };
        let trampolines = trampoline::emit(&mut asm, &targets);
        arena.append(&asm.bytes);
        arena.keep();
        Ok(Self {
            options,
            arena,
            trampolines,
            blocks: blocks::Blocks::default(),
            sites: vec![STALE],
            outcome: Ok(()),
            fast_pext,
            counters: TranslatorCounters::default(),
            fallbacks: Fallbacks::default(),
            checks: 0,
            decoding: 0,
            vectors: level::NONE,
            loaded: false,
        })
    }

    fn clear(&mut self) {
        self.arena.clear();
        self.blocks.clear();
        self.sites.truncate(1);
    }

    fn is_full(&self) -> bool {
        !self.arena.has_room(ROOM) || self.sites.len() > MAX_SITES
    }
}

impl Vcpu {
    /// Switches the translator on or off.
    ///
    /// # Errors
    /// [`TranslatorError`]; the translator is off then.
    pub fn set_translator(&mut self, options: Option<TranslatorOptions>) -> Result<(), TranslatorError> {
        self.jit = None;
        self.tlb.set_tables(None);
        let Some(options) = options else { return Ok(()) };
        let jit = Jit::new(options)?;
        let tables = Tables::new(self.events.quiet()?)?;
        // SAFETY: the tables were just made, and their context block is zeroed memory of the right size and alignment.
        let context = unsafe { &mut *tables.context() };
        context.page_mask = !0xfff;
        (context.page_mask16, context.page_mask32, context.page_mask64) = (!0xff0, !0xfe0, !0xfc0);
        context.unloaded = 1;
        context.host_mxcsr = 0x1f80;
        (context.calls.no_call, context.calls.no_return) = (1, 1);
        if let Some(counter) = self.env.host_counter() {
            // It stays there as long as the environment, which is the vCPU's for life.
            context.tsc_base = counter.base.wrapping_neg();
            context.tsc_highest = counter.highest.as_ptr() as u64;
        }
        self.tlb.set_tables(Some(tables));
        self.jit = Some(Box::new(jit));
        Ok(())
    }

    /// Writes the names of translated code to `map` from now on.
    pub fn set_perf_map(&mut self, map: Option<std::sync::Arc<crate::PerfMap>>) {
        self.perf_map = map;
    }

    /// What the translator has done, if it is on.
    pub fn translator_counters(&self) -> Option<TranslatorCounters> {
        self.jit.as_ref().map(|jit| jit.counters)
    }

    /// How often emitted code called the interpreter for which instruction, most frequent first.
    pub fn translator_fallbacks(&self) -> Vec<(String, u64)> {
        self.jit.as_ref().map_or_else(Vec::new, |jit| jit.fallbacks.list())
    }

    /// Whether code of the current mode is translated at all: 64-bit, or 32-bit in flat segments; without alignment checks, and
    /// not in rings 1 and 2, so that emitted code knows its privilege level from the access mode.
    #[inline]
    pub(crate) fn translatable(&self) -> bool {
        let decodable = self.mode.is_64() || self.is_translatable_legacy();
        decodable && matches!(self.cpl, 0 | 3) && (self.tlb.mode() as usize) < MODES
    }

    /// The jump cache that serves the current mode.
    #[inline]
    fn jump_cache(&self) -> usize {
        self.tlb.mode() as usize + if self.mode.is_64() { 0 } else { MODES }
    }

    /// Runs translated code from RIP on; `None` if there is none.
    #[inline]
    pub(crate) fn run_translated(&mut self) -> Option<Step> {
        if !self.translatable() {
            return None;
        }
        self.drop_stale_code();
        self.follow_vector_level();
        self.clear_upper_halves();
        let code = self.translated_code()?;
        if self.checking() {
            return self.enter_checked(code);
        }
        Some(self.enter(code))
    }

    /// Runs one block, every n-th time after the interpreter has run it. `None` if the interpreter is to run alone.
    fn enter_checked(&mut self, code: u64) -> Option<Step> {
        let jit = self.jit.as_mut()?;
        jit.checks += 1;
        if jit.checks < jit.options.check {
            return Some(self.enter(code));
        }
        jit.checks = 0;
        let offset = (code as usize).wrapping_sub(jit.arena.address(0) as usize);
        let block = jit.blocks.at_entry(offset as u32)?;
        let course = block.course.clone();
        let expected = self.rehearse(&course)?;
        let outcome = self.enter(code);
        self.jit.as_mut()?.counters.checked += 1;
        self.compare(expected, &course, outcome);
        Some(outcome)
    }

    fn enter(&mut self, code: u64) -> Step {
        let vcpu: *mut Self = self;
        let (Some(tables), Some(jit)) = (self.tlb.tables(), self.jit.as_mut()) else { return Ok(()) };
        jit.counters.entries += 1;
        jit.outcome = Ok(());
        let context = tables.context();
        let enter = jit.arena.address(jit.trampolines.enter);
        // SAFETY: the context block is ours, and nothing refers to it across these statements.
        unsafe {
            (*context).vcpu = vcpu;
            (*context).regs = (*vcpu).regs.as_mut_ptr() as u64;
            (*context).linear = (*vcpu).regs[RIP];
            (*context).fpu = std::ptr::from_mut(&mut *(*vcpu).fpu) as u64;
        }
        self.store_context();
        // SAFETY: `enter` is the trampoline; `code` is the entry of a block whose page has not been written since it was
        // made. The code keeps the calling convention, touches guest RAM through checked TLB entries, the context block,
        // and the vCPU's register file, and calls the functions below with the context it was given. `self` is not used
        // until it returns.
        unsafe { host::call(enter, context, code) };
        self.jit.as_mut().map_or(Ok(()), |jit| std::mem::replace(&mut jit.outcome, Ok(())))
    }

    pub(super) fn context(&mut self) -> &mut Context {
        let context = self.tlb.tables().map_or(std::ptr::null_mut(), Tables::context);
        assert!(!context.is_null(), "emitted code runs only with tables");
        // SAFETY: the block lives as long as the tables, which `self` owns; emitted code does not run while Rust does.
        unsafe { &mut *context }
    }

    /// Puts into the context block what may have changed while Rust ran.
    #[inline]
    fn store_context(&mut self) {
        let value = self.flags.value();
        let (fs, gs) = (self.seg_base[seg::FS], self.seg_base[seg::GS]);
        let mxcsr = u64::from(self.fpu.mxcsr());
        let backward = self.flags.sys & rflags::DF;
        let legacy = !self.mode.is_64();
        let ends = [seg::FS, seg::GS].map(|index| if legacy { closed(&self.segments[index]) } else { 0 });
        let context = self.context();
        [context.fs_closed, context.gs_closed] = ends;
        context.flags = (value & 0xff) << 8 | u64::from(value & rflags::OF != 0);
        (context.fs_base, context.gs_base) = (fs, gs);
        context.mxcsr = mxcsr;
        context.backward = backward;
    }

    /// The vector level that code is looked up by.
    fn vectors(&self) -> u8 {
        self.jit.as_ref().map_or(level::NONE, |jit| jit.vectors)
    }

    /// Which vector instructions may run natively now: exceptions must be masked, so that none can be raised.
    #[inline]
    fn vector_level(&self) -> u8 {
        /// All exceptions masked, no tolerance for misaligned operands.
        const MASKS: u32 = 0x1f80;
        const MISALIGNED: u32 = 1 << 17;
        let off = self.cr0 & (cr0::EM | cr0::TS) | !self.cr4 & cr4::OSFXSR;
        if off != 0 || self.fpu.mxcsr() & (MASKS | MISALIGNED) != MASKS || vector_width() < 32 {
            return level::NONE;
        }
        let avx = self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & 6 == 6;
        match (avx, self.xcr0 & 0xe0 == 0xe0) {
            (false, _) => level::SSE,
            (true, false) => level::AVX,
            (true, true) if vector_width() < 64 => level::AVX,
            (true, true) => level::AVX512,
        }
    }

    /// Makes `vector_level` the one that code is looked up by.
    #[inline]
    fn follow_vector_level(&mut self) {
        let level = self.vector_level();
        if self.vectors() != level {
            self.change_vector_level(level);
        }
    }

    #[cold]
    fn change_vector_level(&mut self, new: u8) {
        let Some(jit) = self.jit.as_mut() else { return };
        jit.vectors = new;
        let (load, save) = jit.trampolines.vectors[usize::from(new == level::AVX512)];
        let (load, save) = (jit.arena.address(load) as u64, jit.arena.address(save) as u64);
        let context = self.context();
        (context.load, context.save) = (load, save);
        self.tlb.forget_jumps();
    }

    /// Takes the flags out of the context block.
    #[inline]
    fn load_flags(&mut self) {
        let flags = self.context().flags;
        let value = flags >> 8 & 0xd5 | if flags & 1 != 0 { rflags::OF } else { 0 };
        self.flags.set_arithmetic(value);
    }

    /// Drops code whose bytes were written, by anybody.
    #[inline]
    fn drop_stale_code(&mut self) {
        let behind = self.jit.as_ref().is_some_and(|jit| jit.blocks.is_behind(self.memory.pages()));
        if behind {
            self.drop_stale_code_slow();
        }
    }

    #[cold]
    fn drop_stale_code_slow(&mut self) {
        let Some(jit) = self.jit.as_mut() else { return };
        for entry in jit.blocks.stale(self.memory.pages()) {
            jit.counters.dropped += 1;
            // Looked-up branches still lead here: look up again. Direct branches come from the same page only.
            let mut asm = Asm::new(entry);
            trampoline::leave(&mut asm, jit.trampolines.branch, 0);
            jit.arena.patch(entry, &asm.bytes);
        }
    }

    /// Drops all translated code.
    pub(crate) fn drop_translations(&mut self) {
        if let Some(jit) = self.jit.as_mut().filter(|jit| jit.sites.len() > 1) {
            jit.clear();
            jit.counters.flushes += 1;
        }
        self.tlb.forget_jumps();
    }

    fn key(&self, phys: u64, second: u64) -> Key {
        Key { phys, second, mode: (self.mode.key(), self.tlb.mode() as u8, self.vectors()) }
    }

    /// Address of the code for RIP, or `None`.
    #[inline]
    fn translated_code(&mut self) -> Option<u64> {
        let rip = self.regs[RIP];
        self.follow_decoding();
        match self.tlb.tables()?.find_jump(self.jump_cache(), rip) {
            0 => self.find_translated(rip),
            code => Some(code),
        }
    }

    fn find_translated(&mut self, rip: u64) -> Option<u64> {
        if !is_canonical(rip) {
            return None;
        }
        let phys = self.resolve(rip, Access::Execute).ok()?;
        let mut key = self.key(phys, ONE_PAGE);
        let mut global = self.tlb.slot(rip).global;
        if self.jit.as_ref()?.blocks.find(&key).is_none() {
            if phys & 0xfff <= 0x1000 - 15 {
                return None;
            }
            key.second = self.resolve((rip & !0xfff).wrapping_add(0x1000), Access::Execute).ok()? & !0xfff;
            global = false;
        }
        let jit = self.jit.as_ref()?;
        let block = jit.blocks.find(&key)?.1;
        let entry = if self.checking() { block.entry } else { jit.blocks.entry(&key)? };
        let code = jit.arena.address(entry) as u64;
        if !self.checking() {
            self.tlb.remember_jump(self.jump_cache(), rip, code, global, key.second != ONE_PAGE);
        }
        Some(code)
    }

    /// Counts a run of a block of the interpreter; translates what is at RIP when it is hot.
    #[inline]
    pub(crate) fn heat(&mut self, block: u32) -> bool {
        let Some(jit) = self.jit.as_ref() else { return false };
        self.cache.heat(block, jit.options.threshold) && self.translatable() && self.translate_here(0).is_some()
    }

    /// Translates what is at RIP; `alone`: see [`SiteKind::Link`].
    #[cold]
    fn translate_here(&mut self, alone: u8) -> Option<()> {
        let rip = self.regs[RIP];
        let phys = self.resolve(rip, Access::Execute).ok()?;
        let page = phys & !0xfff;
        if !self.memory.is_readable(page, 0x1000) || !self.jit.as_ref()?.blocks.is_stable(page) {
            return None;
        }
        if self.host_alu.make_room() {
            self.cache = crate::cache::BlockCache::new();
            self.drop_translations();
        }
        if self.jit.as_ref()?.is_full() {
            self.drop_translations();
        }
        let tag = self.claim_code_page(phys);
        let mut bytes = [0; 0x1000];
        self.memory.read(page, &mut bytes).ok()?;
        let start = (phys & 0xfff) as usize;
        if let Some(translation) = self.translate_bytes(None, &bytes, phys, alone) {
            return self.keep(self.key(phys, Key::one_page(alone)), translation, &[(page, tag)]);
        }
        if 0x1000 - start >= 15 || alone != 0 {
            return None;
        }
        let second = self.resolve((rip & !0xfff).wrapping_add(0x1000), Access::Execute).ok()? & !0xfff;
        let second_tag = self.claim_code_page(second);
        let mut joined = [0; 15];
        let in_page = 0x1000 - start;
        joined[..in_page].copy_from_slice(&bytes[start..]);
        self.memory.read(second, &mut joined[in_page..]).ok()?;
        let translation = self.translate_bytes(Some(&joined), &bytes, phys, 0)?;
        self.keep(self.key(phys, second), translation, &[(page, tag), (second, second_tag)])
    }

    fn translate_bytes(&mut self, joined: Option<&[u8]>, page: &[u8], phys: u64, alone: u8) -> Option<Translation> {
        let jit = self.jit.as_ref()?;
        let request = Request {
            joined,
            page,
            start: (phys & 0xfff) as u32,
            alone,
            mode: self.mode,
            access: self.tlb.mode() as usize,
            features: &self.features,
            arena: jit.arena.next(),
            trampolines: jit.trampolines,
            first_site: jit.sites.len() as u32,
            block: jit.blocks.next(),
            fast_pext: jit.fast_pext,
            vectors: jit.vectors,
            checking: jit.options.check != 0,
            cr4: self.cr4,
            host_counter: self.env.host_counter().is_some(),
            notes_operands: self.features.leaf(7, 0)[1] >> 6 & 1 == 0,
        };
        translate(&request, &mut self.host_alu)
    }

    fn keep(&mut self, key: Key, translation: Translation, pages: &[(u64, memory::CodeTag)]) -> Option<()> {
        // Claiming the page may have raced with a write: then the next look finds the block stale.
        let jit = self.jit.as_mut()?;
        jit.counters.blocks += 1;
        jit.counters.instructions += u64::from(translation.course.count);
        let entry = jit.arena.next();
        jit.arena.append(&translation.code);
        if let Some(map) = &self.perf_map {
            map.add(jit.arena.address(entry) as usize, translation.code.len(), self.regs[RIP], self.cpl == 3);
        }
        jit.sites.extend(translation.sites);
        let Translation { direct, course, landing, .. } = translation;
        let block = Block { key, entry, direct, course, landing };
        jit.blocks.insert(block, pages);
        if let Some(landing) = landing.filter(|_| key.second == ONE_PAGE) {
            // Returns that go elsewhere are predicted wrongly.
            let rip = self.regs[RIP] & !0xfff | u64::from(landing.offset);
            self.tlb.forget_jump(landing.access.into(), rip);
        }
        Some(())
    }

    fn leave_with(&mut self, outcome: Step) -> *const u8 {
        if let Some(jit) = self.jit.as_mut() {
            jit.outcome = outcome;
        }
        std::ptr::null()
    }

    fn site(&self, number: u32) -> Site {
        self.jit.as_ref().and_then(|jit| jit.sites.get(number as usize)).copied().unwrap_or(STALE)
    }

    /// Goes on at RIP without leaving, if there is code for it and nothing else to do.
    fn next_code(&mut self) -> *const u8 {
        let behind = self.jit.as_ref().is_none_or(|jit| jit.blocks.is_behind(self.memory.pages()));
        let busy = self.events.pending() | self.attention != 0 || self.shadow != Shadow::None;
        if behind || busy || !self.translatable() || self.checking() || self.vector_level() != self.vectors() {
            return self.leave_with(Ok(()));
        }
        self.clear_upper_halves();
        match self.translated_code() {
            Some(code) => {
                self.context().linear = self.regs[RIP];
                self.store_context();
                code as *const u8
            }
            None => self.leave_with(Ok(())),
        }
    }

    fn checking(&self) -> bool {
        self.jit.as_ref().is_some_and(|jit| jit.options.check != 0)
    }

    /// Notes that the vector registers are with Rust now.
    #[inline]
    fn take_vectors(&mut self) {
        let context = self.context();
        let loaded = context.unloaded == 0;
        context.unloaded = 1;
        let mxcsr = context.mxcsr as u32;
        if loaded {
            self.fpu.set_mxcsr(mxcsr);
        }
        if let Some(jit) = self.jit.as_mut() {
            jit.loaded = loaded;
        }
    }

    fn serve_op(&mut self, site: Site) -> *const u8 {
        let SiteKind::Op { op, start, resume, ends, memory, vectors, code } = site.kind else {
            return self.leave_with(Ok(()));
        };
        self.load_flags();
        let (page, linear) = (self.context().page, self.context().linear);
        self.regs[RIP] = page.wrapping_add(u64::from(start));
        if let Some(jit) = self.jit.as_mut() {
            if memory {
                jit.counters.misses += 1;
            } else {
                jit.counters.interpreted += 1;
                jit.fallbacks.count(code);
            }
        }
        self.block_end = usize::MAX;
        let mode = self.mode;
        let result = self.run_op(&op);
        if memory {
            self.tlb.mirror(linear);
        }
        if result.is_err() {
            return self.leave_with(result);
        }
        if ends {
            self.prepare_calls(code.mnemonic());
            return self.next_code();
        }
        let Some(jit) = self.jit.as_ref() else { return std::ptr::null() };
        let disturbed = self.block_end == 0
            || self.attention != 0
            || self.shadow != Shadow::None
            || self.tlb.mode() as u8 != site.access
            || self.mode != mode
            || self.vector_level() != jit.vectors
            || jit.blocks.is_behind(self.memory.pages());
        if disturbed || site.x87 && !self.fpu.lend() {
            return self.leave_with(Ok(()));
        }
        let Some(jit) = self.jit.as_ref() else { return std::ptr::null() };
        // Else they wait for a block that wants them.
        let (resume, loaded) = (jit.arena.address(resume), jit.loaded && vectors);
        self.store_context();
        self.context().unloaded = u64::from(!loaded);
        resume
    }

    fn serve_link(&mut self, site: Site) -> *const u8 {
        let SiteKind::Link { patch, target, alone } = site.kind else { return self.leave_with(Ok(())) };
        self.load_flags();
        self.regs[RIP] = self.context().page.wrapping_add(u64::from(target));
        if self.checking() && alone == 0 {
            return self.leave_with(Ok(()));
        }
        let Some(jit) = self.jit.as_ref() else { return std::ptr::null() };
        let key = jit.blocks.get(site.block).map(|block| Key {
            phys: block.key.phys & !0xfff | u64::from(target),
            second: Key::one_page(alone),
            mode: (block.key.mode.0, site.access, block.key.mode.2),
        });
        let Some(key) = key else { return self.leave_with(Ok(())) };
        let flushes = jit.counters.flushes;
        if alone != 0 && jit.blocks.find(&key).is_none() && self.translate_here(alone).is_none() {
            // The page is written too often.
            let outcome = self.interpret(true);
            return self.leave_with(outcome);
        }
        let Some(jit) = self.jit.as_mut() else { return std::ptr::null() };
        match jit.blocks.find(&key).map(|(_, block)| block.direct) {
            Some(direct) if !jit.blocks.is_behind(self.memory.pages()) => {
                if jit.counters.flushes == flushes {
                    jit.counters.links += 1;
                    jit.arena.patch(patch, &direct.wrapping_sub(patch + 4).to_le_bytes());
                }
                let code = jit.arena.address(direct);
                self.store_context();
                code
            }
            _ => self.next_code(),
        }
    }

    fn serve_branch(&mut self, site: Site) -> *const u8 {
        self.load_flags();
        self.events.settle();
        let rip = self.context().linear;
        self.regs[RIP] = rip;
        if let Some(jit) = self.jit.as_mut() {
            jit.counters.branches += 1;
        }
        if site.block == STALE.block {
            self.tlb.forget_jump(self.jump_cache(), rip);
            return self.next_code();
        }
        if !is_canonical(rip)
            && let SiteKind::Branch { start, undo } = site.kind
        {
            self.regs[gpr::RSP] = self.regs[gpr::RSP].wrapping_add(undo as i64 as u64);
            self.regs[RIP] = self.context().page.wrapping_add(u64::from(start));
            return self.leave_with(Err(Trap::gp(0)));
        }
        self.next_code()
    }

    fn serve_event(&mut self, site: Site) -> *const u8 {
        self.load_flags();
        self.events.settle();
        if let SiteKind::Event { target } = site.kind {
            self.regs[RIP] = self.context().page.wrapping_add(u64::from(target));
        }
        self.leave_with(Ok(()))
    }
}

/// The ABI of everything that trampolines call.
type Served = fn(&mut Vcpu, Site) -> *const u8;

/// What the trampolines call: finds the vCPU and the site, and serves it.
///
/// # Safety
/// `context` is the context block of the vCPU that entered the code.
unsafe fn serve(context: *mut Context, number: u32, served: Served) -> *const u8 {
    // SAFETY: by the caller's promise; `enter` put the vCPU there and does not touch it until the code returns.
    let vcpu = unsafe { &mut *(*context).vcpu };
    let site = vcpu.site(number);
    vcpu.take_vectors();
    served(vcpu, site)
}

macro_rules! gate {
    ($name:ident => $served:ident) => {
        unsafe extern "C" fn $name(context: *mut Context, number: u32) -> *const u8 {
            // SAFETY: only emitted code calls this, by a trampoline.
            unsafe { serve(context, number, Vcpu::$served) }
        }
    };
}
gate!(on_op => serve_op);
gate!(on_link => serve_link);
gate!(on_branch => serve_branch);
gate!(on_event => serve_event);

/// Bytes of the vector registers that emitted code may use; 0 if none.
pub(crate) fn vector_width() -> usize {
    static WIDTH: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *WIDTH.get_or_init(host::vector_width)
}

/// What depends on the host's architecture.
mod host {
    use super::Context;

    pub(super) type Gate = unsafe extern "C" fn(*mut Context, u32) -> *const u8;

    pub(super) fn address(gate: Gate) -> usize {
        gate as usize
    }

    /// Whether PEXT is fast; `None` if this host cannot run emitted code.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn pext() -> Option<bool> {
        if !std::arch::is_x86_feature_detected!("bmi2") {
            return None;
        }
        // AMD before Zen 3 (family 19h) runs PEXT in microcode.
        let vendor = std::arch::x86_64::__cpuid(0);
        let amd = vendor.ebx == u32::from_le_bytes(*b"Auth") || vendor.ebx == u32::from_le_bytes(*b"Hygo");
        let version = std::arch::x86_64::__cpuid(1).eax;
        let family = (version >> 8 & 15) + if version >> 8 & 15 == 15 { version >> 20 & 255 } else { 0 };
        Some(!amd || family >= 0x19)
    }
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn pext() -> Option<bool> {
        None
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn vector_width() -> usize {
        use std::arch::is_x86_feature_detected as has;
        match (has!("avx"), has!("avx512f") && has!("avx512bw") && has!("avx512vl")) {
            (_, true) => 64,
            (true, false) => 32,
            (false, false) => 0,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn vector_width() -> usize {
        0
    }

    /// Enters emitted code.
    ///
    /// # Safety
    /// `enter` is the trampoline of that name; `context` and `code` are what it expects.
    #[cfg(target_arch = "x86_64")]
    pub(super) unsafe fn call(enter: *const u8, context: *mut Context, code: u64) {
        // SAFETY: by the caller's promise, this is a function of this type.
        unsafe {
            let enter = std::mem::transmute::<*const u8, unsafe extern "C" fn(*mut Context, u64)>(enter);
            enter(context, code);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) unsafe fn call(_: *const u8, _: *mut Context, _: u64) {}
}
