//! Between the kernel's register structures and [`VcpuState`].

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_SHADOW, Msrs, kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;
use platform::x86::{Activity, DescriptorTable, SEGMENT_UNUSABLE, Segment, VcpuState, seg};

use super::refused;
use crate::engine::EngineError;

const TSC: u32 = 0x10;

/// MSRs that belong to a vCPU's state, as far as this host has them; the software CPU's list.
fn candidates() -> impl Iterator<Item = u32> {
    const SINGLE: [u32; 15] = [
        0x3b, // IA32_TSC_ADJUST
        0x174,
        0x175,
        0x176, // IA32_SYSENTER_CS, ESP, EIP
        0x1a0, // IA32_MISC_ENABLE
        0x1d9, // IA32_DEBUGCTL
        0x277, // IA32_PAT
        0x2ff, // IA32_MTRR_DEF_TYPE
        0xda0, // IA32_XSS
        0xc000_0081,
        0xc000_0082,
        0xc000_0083,
        0xc000_0084, // STAR, LSTAR, CSTAR, FMASK
        0xc000_0102, // KERNEL_GS_BASE
        0xc000_0103, // TSC_AUX
    ];
    const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
    const MTRR_VARIABLE: std::ops::Range<u32> = 0x200..0x210;
    // The counter last: setting it right after it was saved loses the least time.
    SINGLE.into_iter().chain(MTRR_FIXED).chain(MTRR_VARIABLE).chain([TSC])
}

/// Which MSRs a vCPU of this host has, of those that belong to its state.
pub(super) struct MsrList(Vec<u32>);

impl MsrList {
    pub(super) fn probe(fd: &VcpuFd) -> Self {
        Self(candidates().filter(|index| read_msrs(fd, &[*index]).is_ok_and(|msrs| msrs.len() == 1)).collect())
    }
}

/// Reads MSRs up to the first that the kernel refuses.
fn read_msrs(fd: &VcpuFd, list: &[u32]) -> Result<Vec<(u32, u64)>, EngineError> {
    let entries: Vec<_> = list.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|_| EngineError::Unsupported("KVM: too many MSRs".into()))?;
    let read = fd.get_msrs(&mut msrs).map_err(refused("read the MSRs of a vCPU"))?;
    Ok(msrs.as_slice().iter().take(read).map(|entry| (entry.index, entry.data)).collect())
}

/// Writes MSRs; those that the kernel refuses are ignored, as a guest could not have written them.
pub(super) fn write_msrs(fd: &VcpuFd, list: &[(u32, u64)]) -> Result<(), EngineError> {
    let mut rest = list;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| EngineError::Unsupported("KVM: too many MSRs".into()))?;
        let written = fd.set_msrs(&msrs).map_err(refused("write the MSRs of a vCPU"))?;
        rest = rest.get(written + 1..).unwrap_or(&[]);
    }
    Ok(())
}

fn segment(from: &kvm_segment) -> Segment {
    let bit = |value: u8, shift: u32| u32::from(value & 1) << shift;
    let access = u32::from(from.type_ & 15)
        | bit(from.s, 4)
        | u32::from(from.dpl & 3) << 5
        | bit(from.present, 7)
        | bit(from.avl, 12)
        | bit(from.l, 13)
        | bit(from.db, 14)
        | bit(from.g, 15)
        | if from.unusable != 0 { SEGMENT_UNUSABLE } else { 0 };
    Segment { selector: from.selector, base: from.base, limit: from.limit, access }
}

fn kvm_segment(from: &Segment) -> kvm_segment {
    let bit = |shift: u32| (from.access >> shift) as u8 & 1;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.access as u8 & 15,
        s: bit(4),
        dpl: (from.access >> 5) as u8 & 3,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(SEGMENT_UNUSABLE.trailing_zeros()),
        padding: 0,
    }
}

fn table(from: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: from.base, limit: from.limit }
}

fn kvm_table(from: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: from.base, limit: from.limit, ..Default::default() }
}

fn gpr(r: &kvm_regs) -> [u64; 16] {
    [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]
}

fn kvm_regs(from: &VcpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = from.gpr;
    let (rip, rflags) = (from.rip, from.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn segments(from: &kvm_sregs) -> [Segment; 6] {
    let mut all = [Segment::default(); 6];
    for (index, from) in [
        (seg::ES, &from.es),
        (seg::CS, &from.cs),
        (seg::SS, &from.ss),
        (seg::DS, &from.ds),
        (seg::FS, &from.fs),
        (seg::GS, &from.gs),
    ] {
        all[index] = segment(from);
    }
    all
}

/// Puts the state into the kernel's structure, which also holds what the state does not: the local APIC's base.
fn fill_sregs(sregs: &mut kvm_sregs, state: &VcpuState) {
    let of = |index: usize| kvm_segment(&state.segments[index]);
    (sregs.es, sregs.cs, sregs.ss) = (of(seg::ES), of(seg::CS), of(seg::SS));
    (sregs.ds, sregs.fs, sregs.gs) = (of(seg::DS), of(seg::FS), of(seg::GS));
    (sregs.ldt, sregs.tr) = (kvm_segment(&state.ldtr), kvm_segment(&state.tr));
    (sregs.gdt, sregs.idt) = (kvm_table(&state.gdtr), kvm_table(&state.idtr));
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    (sregs.cr8, sregs.efer) = (state.cr8, state.efer);
    sregs.interrupt_bitmap = [0; 4];
}

fn activity(mp: &kvm_mp_state) -> Activity {
    match mp.mp_state {
        KVM_MP_STATE_HALTED => Activity::Halted,
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
        _ => Activity::Running,
    }
}

fn mp_state(activity: Activity) -> kvm_mp_state {
    let mp_state = match activity {
        // The kernel has no state for a shut-down vCPU; the engine does not run it.
        Activity::Running | Activity::Shutdown => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    kvm_mp_state { mp_state }
}

/// The state of a vCPU that does not run.
pub(super) fn get(fd: &VcpuFd, msrs: &MsrList) -> Result<VcpuState, EngineError> {
    let regs = fd.get_regs().map_err(refused("read the registers of a vCPU"))?;
    let sregs = fd.get_sregs().map_err(refused("read the system registers of a vCPU"))?;
    let debug = fd.get_debug_regs().map_err(refused("read the debug registers of a vCPU"))?;
    let xcrs = fd.get_xcrs().map_err(refused("read the extended control registers of a vCPU"))?;
    let mp = fd.get_mp_state().map_err(refused("read the activity of a vCPU"))?;
    let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|entry| entry.xcr == 0);
    Ok(VcpuState {
        gpr: gpr(&regs),
        rip: regs.rip,
        rflags: regs.rflags,
        segments: segments(&sregs),
        ldtr: segment(&sregs.ldt),
        tr: segment(&sregs.tr),
        gdtr: table(&sregs.gdt),
        idtr: table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        dr: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7],
        xcr0: xcr0.map_or(1, |entry| entry.value),
        activity: activity(&mp),
        msrs: read_msrs(fd, &msrs.0)?,
    })
}

/// Replaces the state of a vCPU that does not run, and drops events that were on their way.
pub(super) fn set(fd: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    set_core(fd, state)?;
    write_msrs(fd, &state.msrs)?;
    // The flags say that of the fields beyond exceptions and interrupts, only the shadow counts.
    let events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    fd.set_vcpu_events(&events).map_err(refused("clear the events of a vCPU"))
}

/// Replaces the state but for MSRs and events.
pub(super) fn set_core(fd: &VcpuFd, state: &VcpuState) -> Result<(), EngineError> {
    let mut sregs = fd.get_sregs().map_err(refused("read the system registers of a vCPU"))?;
    fill_sregs(&mut sregs, state);
    fd.set_sregs(&sregs).map_err(refused("write the system registers of a vCPU"))?;
    fd.set_regs(&kvm_regs(state)).map_err(refused("write the registers of a vCPU"))?;
    let [d0, d1, d2, d3, dr6, dr7] = state.dr;
    let debug = kvm_debugregs { db: [d0, d1, d2, d3], dr6, dr7, ..Default::default() };
    fd.set_debug_regs(&debug).map_err(refused("write the debug registers of a vCPU"))?;
    let mut xcrs = fd.get_xcrs().map_err(refused("read the extended control registers of a vCPU"))?;
    if let Some(xcr0) = xcrs.xcrs.iter_mut().take(xcrs.nr_xcrs as usize).find(|entry| entry.xcr == 0)
        && xcr0.value != state.xcr0
    {
        xcr0.value = state.xcr0;
        fd.set_xcrs(&xcrs).map_err(refused("write the extended control registers of a vCPU"))?;
    }
    fd.set_mp_state(mp_state(state.activity)).map_err(refused("write the activity of a vCPU"))
}

/// MSRs in which two lists differ, as `new` has them. The time-stamp counter is never among them: it runs on.
pub(super) fn changed_msrs(old: &[(u32, u64)], new: &[(u32, u64)]) -> Vec<(u32, u64)> {
    new.iter().filter(|msr| msr.0 != TSC && !old.contains(msr)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_both_ways() {
        for access in [0x93, 0xa09b, 0xc0f3, 0x8b, 0x82, 0x1_0000, 0xd0fb] {
            let one = Segment { selector: 0x33, base: 0xffff_8000_1234_5678, limit: 0xfffff, access };
            assert_eq!(segment(&kvm_segment(&one)), one, "{access:#x}");
        }
    }

    #[test]
    fn registers_survive_both_ways() {
        let mut state = VcpuState::reset();
        state.gpr = std::array::from_fn(|i| 0x1111 * i as u64);
        let regs = kvm_regs(&state);
        assert_eq!(gpr(&regs), state.gpr);
        assert_eq!((regs.rsp, regs.rbx, regs.rip), (0x4444, 0x3333, 0xfff0));
        let mut sregs = kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() };
        fill_sregs(&mut sregs, &state);
        assert_eq!(segments(&sregs), state.segments);
        assert_eq!((sregs.cr0, sregs.apic_base), (state.cr0, 0xfee0_0900));
        for activity in [Activity::Running, Activity::Halted, Activity::WaitForSipi] {
            assert_eq!(super::activity(&mp_state(activity)), activity);
        }
    }

    #[test]
    fn only_real_changes_are_written_back() {
        let old = [(TSC, 5), (0x277, 1), (0x174, 2)];
        assert_eq!(changed_msrs(&old, &[(TSC, 9), (0x277, 3), (0x174, 2), (0x175, 1)]), [(0x277, 3), (0x175, 1)]);
    }
}
