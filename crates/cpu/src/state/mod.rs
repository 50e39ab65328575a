//! The state of one vCPU.

pub mod flags;
pub mod int;

use std::sync::Arc;

use memory::GuestMemory;
use platform::x86::{DescriptorTable, Segment, VcpuState, cr0, cr4, efer, gpr, rflags, seg};

use crate::cache::BlockCache;
use crate::decode::Mode;
use crate::event::request::{Events, SharedCpus};
use crate::mmu::tlb::Tlb;
use crate::{Environment, Features};
use flags::Flags;

/// Pseudo register: always zero, so that an address without base or index needs no branch.
pub(crate) const ZERO: usize = 16;
/// Pseudo register: RIP. While a handler runs it points behind its instruction.
pub(crate) const RIP: usize = 17;
/// Pseudo segment: base 0, for segments whose base 64-bit mode ignores.
pub(crate) const NULL_SEG: usize = 6;

/// Reasons to leave the fast path before the next instruction; see [`Vcpu::attention`].
pub(crate) mod attention {
    /// RFLAGS.TF is set: one instruction at a time, then #DB.
    pub(crate) const SINGLE_STEP: u32 = 1 << 0;
    /// The previous instruction holds off interrupts and (for MOV SS) debug exceptions for one instruction.
    pub(crate) const SHADOW: u32 = 1 << 1;
    /// DR7 enables an instruction breakpoint.
    pub(crate) const BREAKPOINT: u32 = 1 << 2;
    /// A data or I/O breakpoint was hit: #DB after the instruction.
    pub(crate) const DEBUG_TRAP: u32 = 1 << 3;
    /// The debugger of the host wants one instruction at a time.
    pub(crate) const HOST_STEP: u32 = 1 << 4;
    /// An interrupt that waited for RFLAGS.IF, or an NMI that waited for IRET, can be delivered now.
    pub(crate) const INTERRUPT: u32 = 1 << 5;
    /// RFLAGS.RF is set: for one instruction.
    pub(crate) const RESUME: u32 = 1 << 6;
}

/// Interrupt shadow (SDM vol. 3, 6.8.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Shadow {
    #[default]
    None,
    /// After STI that set IF.
    Sti,
    /// After a load of SS; holds off debug exceptions and NMI too.
    MovSs,
}

/// Model-specific registers that the CPU core owns.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    /// Added to [`Environment::tsc`] to give the guest's TSC.
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    pub misc_enable: u64,
    pub debugctl: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_var: [(u64, u64); 8],
    pub xss: u64,
    pub spec_ctrl: u64,
}

impl Msrs {
    /// The state after power-up or RESET (SDM vol. 3, table 10-1 and 12.12.4; volume 4 for IA32_MISC_ENABLE).
    fn power_up() -> Self {
        /// Write-back, write-through, uncached minus, uncached; twice.
        const PAT: u64 = 0x0007_0406_0007_0406;
        /// Fast strings; neither branch trace store nor event-based sampling.
        const MISC_ENABLE: u64 = 1 << 0 | 1 << 11 | 1 << 12;
        Self { pat: PAT, misc_enable: MISC_ENABLE, ..Self::default() }
    }
}

/// One virtual CPU. Owned by the thread that runs it; other threads reach it through its [`Events`].
pub struct Vcpu {
    /// 0–15 general-purpose registers, [`ZERO`], [`RIP`]; 32 entries so that a masked index needs no bounds check.
    pub(crate) regs: [u64; 32],
    pub(crate) flags: Flags,
    /// Bases of ES, CS, SS, DS, FS, GS and [`NULL_SEG`]: a copy of `segments[i].base` beside the registers.
    pub(crate) seg_base: [u64; 8],
    /// The index after the last operation to run of the current block; 0 makes the run loop leave the block after
    /// the current instruction.
    pub(crate) block_end: usize,
    /// Reasons to leave the fast path; see [`attention`].
    pub(crate) attention: u32,
    /// Current privilege level, 0–3.
    pub(crate) cpl: u8,
    /// Decoding mode that follows from CR0, EFER, CS, SS.
    pub(crate) mode: Mode,
    pub(crate) shadow: Shadow,
    /// The instruction being executed is followed by a single-step trap. It began with RFLAGS.TF set; those whose own
    /// rules differ (INT n, SYSCALL) change it.
    pub(crate) stepping: bool,
    pub(crate) tlb: Tlb,
    /// [`GuestMemory::rom_epoch`] that the TLB belongs to.
    pub(crate) rom_epoch: u32,

    pub(crate) segments: [Segment; 6],
    pub(crate) ldtr: Segment,
    pub(crate) tr: Segment,
    pub(crate) gdtr: DescriptorTable,
    pub(crate) idtr: DescriptorTable,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    pub(crate) xcr0: u64,
    /// DR0–DR3.
    pub(crate) dr: [u64; 4],
    pub(crate) dr6: u64,
    pub(crate) dr7: u64,
    /// PDPTEs of PAE paging, loaded with CR3 (SDM vol. 3, 4.4.1).
    pub(crate) pdptes: [u64; 4],
    /// Linear address of the page fault being raised.
    pub(crate) fault_address: u64,
    /// An interrupt was announced while it could not be delivered; see [`Vcpu::interrupts_enabled`].
    pub(crate) interrupt_waiting: bool,
    /// An NMI was announced while NMIs were blocked.
    pub(crate) nmi_waiting: bool,
    /// NMIs are blocked until IRET.
    pub(crate) nmi_blocked: bool,
    /// PAUSEs since the host CPU was last offered to others.
    pub(crate) pauses: u8,
    /// Bits for DR6 of a pending debug trap.
    pub(crate) pending_dr6: u64,
    pub(crate) activity: platform::x86::Activity,
    pub(crate) msrs: Msrs,
    pub(crate) fpu: Box<crate::interp::fpu::FpuState>,

    /// The translator, if it is on.
    pub(crate) jit: Option<Box<crate::jit::Jit>>,
    /// Set while the interpreter runs for comparison with translated code.
    pub(crate) check: Option<Box<crate::check::Log>>,
    pub(crate) rehearsal: Option<Box<crate::check::Expected>>,
    pub(crate) cache: BlockCache,
    pub(crate) memory: GuestMemory,
    pub(crate) env: Arc<dyn Environment>,
    pub(crate) events: Arc<Events>,
    pub(crate) shared: Arc<SharedCpus>,
    pub(crate) features: Arc<Features>,
    pub(crate) counters: crate::Counters,
    /// Names for translated code, if somebody profiles.
    pub(crate) perf_map: Option<Arc<crate::PerfMap>>,
    /// Host addresses of stubs that run one data instruction on the host CPU.
    pub(crate) host_alu: crate::interp::hostalu::HostAlu,
}

impl Vcpu {
    /// Whether paging is on.
    #[inline]
    pub(crate) fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// Whether the CPU is in protected mode (including virtual-8086 and long mode).
    #[inline]
    pub(crate) fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Whether long mode is active (64-bit or compatibility).
    #[inline]
    pub(crate) fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether the current code segment is 64-bit.
    #[inline]
    pub(crate) fn in_64bit(&self) -> bool {
        self.mode.is_64()
    }

    /// Whether the CPU is in virtual-8086 mode.
    #[inline]
    pub(crate) fn v8086(&self) -> bool {
        self.flags.sys & rflags::VM != 0
    }

    /// I/O privilege level.
    #[inline]
    pub(crate) fn iopl(&self) -> u8 {
        (self.flags.sys >> 12) as u8 & 3
    }

    /// RIP; while a handler runs, of the next instruction.
    #[inline]
    pub(crate) fn rip(&self) -> u64 {
        self.regs[RIP]
    }

    /// Sets RIP.
    #[inline]
    pub(crate) fn set_rip(&mut self, rip: u64) {
        self.regs[RIP] = rip;
    }

    /// Stack pointer masked to the stack's address size.
    #[inline]
    pub(crate) fn sp(&self) -> u64 {
        self.regs[gpr::RSP] & self.mode.stack_mask()
    }

    /// Sets the stack pointer, leaving the bits above the stack's address size as they are.
    #[inline]
    pub(crate) fn set_sp(&mut self, sp: u64) {
        let mask = self.mode.stack_mask();
        // A 32-bit stack in compatibility mode clears the upper half like any 32-bit register write.
        let keep = if mask == 0xffff { !mask } else { 0 };
        self.regs[gpr::RSP] = (self.regs[gpr::RSP] & keep) | (sp & mask);
    }

    /// Stores a segment register and what is derived from it. The caller has done all checks.
    pub(crate) fn set_segment(&mut self, index: usize, value: Segment) {
        self.segments[index] = value;
        self.seg_base[index] = value.base;
        if index == seg::CS || index == seg::SS || !self.in_64bit() {
            self.update_mode();
        }
    }

    /// Recomputes everything that is derived from CR0, CR4, EFER, RFLAGS.VM/AC, CS, SS and CPL. To be called after any of
    /// them changes; the handler must then end its block ([`crate::Trap::Leave`] or `block_end = 0`).
    pub(crate) fn update_mode(&mut self) {
        let cs = self.segments[seg::CS];
        self.mode = if self.long_mode() && cs.access & (1 << 13) != 0 {
            Mode::long64()
        } else {
            let flat =
                [seg::ES, seg::CS, seg::SS, seg::DS].into_iter().all(|i| is_flat(&self.segments[i], i == seg::CS));
            Mode::legacy(cs.access & (1 << 14) != 0, self.segments[seg::SS].access & (1 << 14) != 0, flat)
        };
        self.update_access_mode();
    }

    /// Recomputes which permissions data accesses have: after changes of CPL, RFLAGS.AC or CR4.SMAP.
    #[inline]
    pub(crate) fn update_access_mode(&mut self) {
        self.tlb.set_mode(self.cpl == 3, self.smap_off());
        if self.cpl == 3 && self.flags.sys & rflags::AC != 0 && self.cr0 & cr0::AM != 0 {
            self.tlb.force_mode(crate::mmu::tlb::AccessMode::UserAligned);
        }
    }

    /// Whether supervisor accesses to user pages are allowed.
    #[inline]
    pub(crate) fn smap_off(&self) -> bool {
        self.cr4 & cr4::SMAP == 0 || self.flags.sys & rflags::AC != 0
    }

    /// Recomputes the single-step and breakpoint reasons of [`Vcpu::attention`].
    pub(crate) fn update_debug_attention(&mut self) {
        let mut bits = self.attention & !(attention::SINGLE_STEP | attention::BREAKPOINT | attention::RESUME);
        if self.flags.sys & rflags::TF != 0 {
            bits |= attention::SINGLE_STEP;
        }
        if self.flags.sys & rflags::RF != 0 {
            bits |= attention::RESUME;
        }
        let instruction_breakpoint = (0..4).any(|i| self.dr7 >> (2 * i) & 3 != 0 && self.dr7 >> (16 + 4 * i) & 3 == 0);
        if instruction_breakpoint {
            bits |= attention::BREAKPOINT;
        }
        self.attention = bits;
    }

    /// The whole of RFLAGS.
    #[inline]
    pub(crate) fn rflags(&self) -> u64 {
        self.flags.value()
    }

    /// Sets the whole of RFLAGS (reserved bits fixed) and what is derived from it.
    pub(crate) fn set_rflags(&mut self, value: u64) {
        self.flags.set_value(value);
        self.update_access_mode();
        self.update_debug_attention();
        self.interrupts_enabled();
    }

    /// To be called after RFLAGS.IF may have become 1: looks again at an interrupt that had to wait.
    #[inline]
    pub(crate) fn interrupts_enabled(&mut self) {
        if self.interrupt_waiting && self.flags.sys & rflags::IF != 0 {
            self.attention |= attention::INTERRUPT;
            self.block_end = 0;
        }
    }
}

impl Vcpu {
    /// A vCPU in its state after RESET, joined to the others of its VM.
    pub fn new(
        memory: GuestMemory,
        env: Arc<dyn Environment>,
        events: Arc<Events>,
        shared: Arc<SharedCpus>,
        features: Arc<Features>,
    ) -> Self {
        shared.join(events.clone());
        let mut vcpu = Self {
            regs: [0; 32],
            flags: Flags::new(0),
            seg_base: [0; 8],
            block_end: 0,
            attention: 0,
            cpl: 0,
            mode: Mode::legacy(false, false, false),
            shadow: Shadow::None,
            stepping: false,
            tlb: Tlb::new(),
            rom_epoch: memory.rom_epoch(),
            segments: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            pdptes: [0; 4],
            fault_address: 0,
            interrupt_waiting: false,
            nmi_waiting: false,
            nmi_blocked: false,
            pauses: 0,
            pending_dr6: 0,
            activity: platform::x86::Activity::Running,
            msrs: Msrs::power_up(),
            fpu: Box::default(),
            jit: None,
            check: None,
            rehearsal: None,
            cache: BlockCache::new(),
            memory,
            env,
            events,
            shared,
            features,
            counters: crate::Counters::default(),
            perf_map: None,
            host_alu: crate::interp::hostalu::HostAlu::default(),
        };
        vcpu.set_state(&VcpuState::reset());
        vcpu
    }

    /// The architectural state.
    pub fn state(&self) -> VcpuState {
        VcpuState {
            gpr: std::array::from_fn(|i| self.regs[i]),
            rip: self.rip(),
            rflags: self.rflags(),
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: u64::from(self.env.read_cr8()),
            efer: self.efer,
            dr: [self.dr[0], self.dr[1], self.dr[2], self.dr[3], self.dr6, self.dr7],
            xcr0: self.xcr0,
            activity: self.activity,
            msrs: self.save_msrs(),
        }
    }

    /// Takes over an architectural state. The state is trusted to be consistent (it comes from a loader, a debugger or a checked
    /// snapshot); nonsense in it makes the guest misbehave, not the host.
    pub fn set_state(&mut self, state: &VcpuState) {
        self.regs[..16].copy_from_slice(&state.gpr);
        self.set_rip(state.rip);
        self.segments = state.segments;
        for (base, segment) in self.seg_base.iter_mut().zip(&state.segments) {
            *base = segment.base;
        }
        (self.ldtr, self.tr, self.gdtr, self.idtr) = (state.ldtr, state.tr, state.gdtr, state.idtr);
        let old_cr4 = self.cr4;
        (self.cr0, self.cr2, self.cr3, self.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
        self.cr4_changed(old_cr4);
        self.forget_calls();
        (self.efer, self.xcr0) = (state.efer, state.xcr0);
        self.env.write_cr8(state.cr8 as u8 & 15);
        self.dr.copy_from_slice(&state.dr[..4]);
        (self.dr6, self.dr7) = (state.dr[4], state.dr[5]);
        self.activity = state.activity;
        self.load_msrs(&state.msrs);
        self.shadow = Shadow::None;
        (self.interrupt_waiting, self.nmi_waiting, self.nmi_blocked) = (false, false, false);
        self.attention &= attention::HOST_STEP;
        self.pending_dr6 = 0;
        self.cpl = match (self.protected(), state.rflags & rflags::VM != 0) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => (self.segments[seg::SS].access >> 5) as u8 & 3,
        };
        self.tlb.flush_all();
        self.load_pdptes_quietly();
        self.set_rflags(state.rflags);
        self.update_mode();
    }

    /// Reads the four PDPTEs that CR3 points to, if PAE paging is in force.
    pub(crate) fn load_pdptes_quietly(&mut self) {
        if self.paging() && self.cr4 & cr4::PAE != 0 && !self.long_mode() {
            let table = self.cr3 & 0xffff_ffe0;
            self.pdptes = std::array::from_fn(|i| self.memory.read_u64(table + 8 * i as u64).unwrap_or(0));
        }
    }

    /// What other threads raise to reach this vCPU.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }
}

/// Present read/write expand-up data or, for CS, readable code, base 0, limit 4 GiB: segmentation can be skipped.
fn is_flat(segment: &Segment, cs: bool) -> bool {
    const TYPE_CODE: u32 = 1 << 3;
    const RW: u32 = 1 << 1;
    const EXPAND_DOWN: u32 = 1 << 2;
    let access = segment.access;
    let usable = access & platform::x86::SEGMENT_UNUSABLE == 0 && access & 0x80 != 0 && access & RW != 0;
    let kind = if access & TYPE_CODE != 0 { cs } else { access & EXPAND_DOWN == 0 };
    usable && kind && segment.base == 0 && segment.limit == u32::MAX
}
