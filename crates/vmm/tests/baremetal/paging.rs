//! Paging (SDM vol. 3, chapter 4): permissions and error codes, accessed and dirty bits, large and global pages.

use iced_x86::code_asm::*;
use platform::x86::{VcpuState, cr0, cr4, efer, gpr, rflags};
use vmm::{EngineKind, VcpuExit};

use crate::harness::{Machine, Paging, at, pte};

crate::stamp! {
    everywhere: some_permissions, accessed_and_dirty_bits, permissions_of_upper_levels, reserved_bits,
        large_pages_of_pae_and_long, write_protection_follows_cr0, two_address_spaces, invlpg_refreshes_one_page,
        global_pages_go_with_pge, addresses_must_be_canonical, page_tables_at_the_top_of_the_space,
        changed_permissions_need_no_reset;
    software: all_permissions, huge_pages, large_pages_of_32_bit_paging, pdptes_are_checked_on_load
}

const MODES: [Paging; 3] = [Paging::Bits32, Paging::Pae, Paging::Long];

/// The paging modes to try: KVM in its form for hosts without hardware virtualisation has 4-level paging alone.
fn modes(engine: EngineKind) -> &'static [Paging] {
    match engine {
        EngineKind::Soft => &MODES,
        EngineKind::Kvm => &MODES[2..],
    }
}

const BP: u8 = 3;
const PF: u8 = 14;
/// The page in question.
const TARGET: u64 = at::FREE + 0x5000;

/// Page-fault error code (SDM vol. 3, figure 4-12).
mod code {
    pub(super) const P: u64 = 1;
    pub(super) const W: u64 = 2;
    pub(super) const U: u64 = 4;
    pub(super) const RSVD: u64 = 8;
    pub(super) const I: u64 = 16;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// One combination.
#[derive(Clone, Copy, Debug)]
struct Case {
    paging: Paging,
    access: Access,
    user: bool,
    flags: u64,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
    nxe: bool,
}

impl Case {
    /// All combinations, numbered.
    fn numbered(paging: Paging, number: u32) -> Self {
        let bit = |n: u32| number >> n & 1 != 0;
        let flag = |n: u32, flag: u64| if bit(n) { flag } else { 0 };
        let access = [Access::Read, Access::Write, Access::Fetch][(number >> 10) as usize % 3];
        let nx = if paging == Paging::Bits32 { 0 } else { flag(3, pte::NX) };
        Self {
            paging,
            access,
            user: bit(4),
            flags: flag(0, pte::P) | flag(1, pte::W) | flag(2, pte::U) | nx,
            wp: bit(5),
            smep: bit(6),
            smap: bit(7),
            ac: bit(8),
            nxe: paging != Paging::Bits32 && bit(9),
        }
    }

    const COUNT: u32 = 3 << 10;

    /// What the manual says: `None` if the access succeeds, else the error code (SDM vol. 3, 4.6 and 4.7).
    fn expected(&self) -> Option<u64> {
        let has = |flag| self.flags & flag != 0;
        let mut error = if self.access == Access::Write { code::W } else { 0 };
        error |= if self.user { code::U } else { 0 };
        error |= if self.access == Access::Fetch && (self.nxe || self.smep) { code::I } else { 0 };
        if !has(pte::P) {
            return Some(error);
        }
        if has(pte::NX) && !self.nxe {
            return Some(error | code::P | code::RSVD);
        }
        let smap = self.smap && !self.ac;
        let allowed = match (self.user, self.access) {
            (true, Access::Read) => has(pte::U),
            (true, Access::Write) => has(pte::U) && has(pte::W),
            (true, Access::Fetch) => has(pte::U) && !has(pte::NX),
            (false, Access::Read) => !(has(pte::U) && smap),
            (false, Access::Write) => (has(pte::W) || !self.wp) && !(has(pte::U) && smap),
            (false, Access::Fetch) => !(has(pte::NX) || has(pte::U) && self.smep),
        };
        if allowed { None } else { Some(error | code::P) }
    }

    /// Tries it on a machine of this case's paging mode, from the state in which it starts.
    fn check(&self, machine: &mut Machine, fresh: &VcpuState) {
        machine.state = fresh.clone();
        machine.map_page(self.paging, TARGET, self.flags);
        let set = |on: bool, bits: u64, value: u64| if on { value | bits } else { value & !bits };
        let state = &mut machine.state;
        state.cr0 = set(self.wp, cr0::WP, state.cr0);
        state.cr4 = set(self.smap, cr4::SMAP, set(self.smep, cr4::SMEP, state.cr4));
        state.efer = set(self.nxe, efer::NXE, state.efer);
        if self.user {
            machine.enter_user();
        }
        machine.set_flags(if self.ac { rflags::AC } else { 0 }, 0);
        machine.open_gate(BP);
        let access = self.access;
        machine.code(|a| {
            match access {
                Access::Read => a.mov(eax, dword_ptr(TARGET))?,
                Access::Write => a.mov(dword_ptr(TARGET), eax)?,
                Access::Fetch => a.jmp(TARGET)?,
            }
            a.int3()
        });
        machine.put8(TARGET, 0xcc);
        let start = machine.state.rip;
        assert_eq!(machine.run(), VcpuExit::Stopped, "{self:x?}");
        let entry = machine.entry(self.paging, machine.entry_at(self.paging, TARGET));
        match self.expected() {
            None => {
                assert_eq!(machine.vector(), Some(BP), "{self:x?} {:x?}", machine.state);
                let dirty = if self.access == Access::Write { pte::D } else { 0 };
                assert_eq!(entry & (pte::A | pte::D), pte::A | dirty, "{self:x?}");
            }
            Some(error) => {
                assert_eq!(machine.vector(), Some(PF), "{self:x?}");
                let frame = machine.frame(true);
                let rip = if self.access == Access::Fetch { TARGET } else { start };
                assert_eq!((frame.error, machine.state.cr2, frame.rip), (error, TARGET, rip), "{self:x?}");
                assert_eq!(entry & pte::D, 0, "{self:x?}");
            }
        }
    }
}

/// The whole table, on one machine: the software CPU takes a new state as a reset.
fn all_permissions(engine: EngineKind) {
    for paging in MODES {
        let mut machine = Machine::paged(engine, paging);
        let fresh = machine.state.clone();
        for number in 0..Case::COUNT {
            Case::numbered(paging, number).check(&mut machine, &fresh);
        }
    }
}

/// A part of the table, with a machine for each.
fn some_permissions(engine: EngineKind) {
    for &paging in modes(engine) {
        for number in (0..Case::COUNT).step_by(67) {
            let mut machine = Machine::paged(engine, paging);
            let fresh = machine.state.clone();
            let mut case = Case::numbered(paging, number);
            // KVM without hardware paging does not have these two.
            (case.smep, case.smap) = (false, false);
            case.check(&mut machine, &fresh);
        }
    }
}

/// A read sets A in every entry of the walk; D comes with the first write, in the last one only.
fn accessed_and_dirty_bits(engine: EngineKind) {
    for &paging in modes(engine) {
        let mut machine = Machine::paged(engine, paging);
        let (entry, table) = (machine.entry_at(paging, TARGET), machine.table_entry_at(paging));
        let bits = |machine: &Machine, entry| machine.entry(paging, entry) & (pte::A | pte::D);
        machine.code(|a| a.mov(eax, dword_ptr(TARGET)));
        machine.run_to_end();
        assert_eq!((bits(&machine, entry), bits(&machine, table)), (pte::A, pte::A), "{paging:?}");
        machine.state.rip = at::CODE;
        machine.code(|a| a.add(dword_ptr(TARGET), 1));
        machine.run_to_end();
        assert_eq!((bits(&machine, entry), bits(&machine, table) & pte::A), (pte::A | pte::D, pte::A), "{paging:?}");
        if paging == Paging::Long {
            assert_eq!(machine.get64(at::PAGES) & pte::A, pte::A);
        }
        // A page that is never touched stays as it is.
        let other = machine.entry_at(paging, TARGET + 0x1000);
        assert_eq!(bits(&machine, other), 0);
    }
}

/// Every level must allow the access.
fn permissions_of_upper_levels(engine: EngineKind) {
    for &paging in modes(engine) {
        for (clear, user, write, error) in [
            (pte::U, true, false, code::P | code::U),
            (pte::W, true, true, code::P | code::U | code::W),
            (pte::W, false, true, code::P | code::W),
            (pte::P, false, false, 0),
        ] {
            let mut machine = Machine::paged(engine, paging);
            // A second table of small pages for 4–6 MiB (or 4–8 MiB) that allows all.
            let (linear, table) = (0x40_0000u64 + (TARGET & 0xf_ffff), at::PAGES + 0xa000);
            let (slot, size) = if paging == Paging::Bits32 { (1, 4) } else { (2, 8) };
            for page in 0..4096 / size {
                machine.set_entry(paging, table + size * page, (at::FREE + (page << 12 & 0xf_ffff)) | pte::ALL);
            }
            machine.set_entry(paging, machine.table_entry_at(paging) + size * slot, (table | pte::ALL) & !clear);
            if user {
                machine.enter_user();
            }
            machine.code(|a| if write { a.mov(dword_ptr(linear), eax) } else { a.mov(eax, dword_ptr(linear)) });
            machine.run_to_handler(PF);
            assert_eq!((machine.frame(true).error, machine.state.cr2), (error, linear), "{paging:?} {clear}");
        }
    }
}

/// Reserved bits fault whatever the rights are.
fn reserved_bits(engine: EngineKind) {
    for (paging, bit, nxe) in [
        (Paging::Long, 1 << 51, true),
        (Paging::Long, pte::NX, false),
        (Paging::Pae, pte::NX, false),
        (Paging::Pae, 1 << 52, true),
        (Paging::Pae, 1 << 62, true),
    ] {
        if !modes(engine).contains(&paging) {
            continue;
        }
        let mut machine = Machine::paged(engine, paging);
        if !nxe {
            machine.state.efer &= !efer::NXE;
        }
        machine.map_page(paging, TARGET, pte::ALL | bit);
        machine.code(|a| a.mov(dword_ptr(TARGET), eax));
        machine.run_to_handler(PF);
        assert_eq!(machine.frame(true).error, code::P | code::W | code::RSVD, "{paging:?} {bit:#x}");
    }
    // A large page's address must be aligned to its size; PS in the top level means nothing but trouble.
    let mut machine = Machine::paged(engine, Paging::Long);
    machine.put64(machine.table_entry_at(Paging::Long) + 16, 0x40_2000 | pte::ALL | pte::PS);
    machine.code(|a| a.mov(eax, dword_ptr(0x40_0000)));
    machine.run_to_handler(PF);
    assert_eq!(machine.frame(true).error, code::P | code::RSVD);
    let mut machine = Machine::paged(engine, Paging::Long);
    machine.put64(at::PAGES + 8, (at::PAGES + 0x1000) | pte::ALL | pte::PS);
    machine.code(|a| {
        a.mov(rdi, 0x80_0000_0000u64)?;
        a.mov(eax, dword_ptr(rdi))
    });
    machine.run_to_handler(PF);
    assert_eq!((machine.frame(true).error, machine.state.cr2), (code::P | code::RSVD, 0x80_0000_0000));
}

fn large_pages_of_32_bit_paging(engine: EngineKind) {
    // 4 MiB at 8 MiB; the entry beside it is never used.
    let entry = at::PAGES + 8;
    let mut machine = Machine::paged(engine, Paging::Bits32);
    machine.put32(entry, 0x40_0000 | (pte::ALL | pte::PS) as u32);
    machine.put32(0x7f_fffc, 0x1234_5678);
    machine.code(|a| {
        a.mov(eax, dword_ptr(0xbf_fffcu32))?;
        a.mov(dword_ptr(0x80_0000u32), eax)
    });
    machine.run_to_end();
    assert_eq!((machine.reg(gpr::RAX), machine.get32(0x40_0000)), (0x1234_5678, 0x1234_5678));
    assert_eq!(u64::from(machine.get32(entry)) & (pte::A | pte::D), pte::A | pte::D);
    // Without CR4.PSE the bit is ignored, and the entry is a table's.
    let mut machine = Machine::paged(engine, Paging::Bits32);
    machine.state.cr4 &= !cr4::PSE;
    let table = at::PAGES + 0xa000;
    machine.put32(entry, (table | pte::ALL | pte::PS) as u32);
    machine.put32(table, (TARGET | pte::ALL) as u32);
    // Everything else that the run needs is in small pages.
    machine.put32(TARGET + 4, 99);
    machine.code(|a| a.mov(eax, dword_ptr(0x80_0004u32)));
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX), 99);
    // Bit 21 of a large page's entry is reserved.
    let mut machine = Machine::paged(engine, Paging::Bits32);
    machine.put32(entry, 0x60_0000 | (pte::ALL | pte::PS) as u32);
    machine.code(|a| a.mov(eax, dword_ptr(0x80_0000u32)));
    machine.run_to_handler(PF);
    assert_eq!(machine.frame(true).error, code::P | code::RSVD);
}

fn large_pages_of_pae_and_long(engine: EngineKind) {
    for &paging in modes(engine).iter().filter(|paging| **paging != Paging::Bits32) {
        let mut machine = Machine::paged(engine, paging);
        let entry = machine.table_entry_at(paging) + 8 * 4;
        machine.put64(entry, 0x60_0000 | pte::ALL | pte::PS);
        machine.code(|a| a.mov(dword_ptr(0x9f_fffcu32), esp));
        machine.run_to_end();
        assert_eq!(u64::from(machine.get32(0x7f_fffc)), at::STACK, "{paging:?}");
        assert_eq!(machine.get64(entry) & (pte::A | pte::D), pte::A | pte::D, "{paging:?}");
    }
}

/// A page of 1 GiB at 0x40000000 maps to 0.
fn huge_pages(engine: EngineKind) {
    let mut machine = Machine::paged(engine, Paging::Long);
    let entry = at::PAGES + 0x1000 + 8;
    machine.put64(entry, pte::ALL | pte::PS);
    machine.code(|a| {
        a.mov(edi, 0x4000_0000 + at::DATA as u32)?;
        a.mov(dword_ptr(rdi), 7)
    });
    machine.run_to_end();
    assert_eq!(machine.get32(at::DATA), 7);
    assert_eq!(machine.get64(entry) & (pte::A | pte::D), pte::A | pte::D);
}

/// The guest itself switches CR0.WP, and the next write obeys.
fn write_protection_follows_cr0(engine: EngineKind) {
    for &paging in modes(engine) {
        let mut machine = Machine::paged(engine, paging);
        machine.map_page(paging, TARGET, pte::P);
        let wp = cr0::WP as i32;
        let end = machine.code(|a| {
            if paging == Paging::Long {
                a.mov(rax, cr0)?;
                a.and(eax, !wp)?;
                a.mov(cr0, rax)?;
                a.mov(dword_ptr(TARGET), 1)?;
                a.or(eax, wp)?;
                a.mov(cr0, rax)?;
            } else {
                a.mov(eax, cr0)?;
                a.and(eax, !wp)?;
                a.mov(cr0, eax)?;
                a.mov(dword_ptr(TARGET), 1)?;
                a.or(eax, wp)?;
                a.mov(cr0, eax)?;
            }
            a.mov(byte_ptr(TARGET), 2)
        });
        machine.run_to_handler(PF);
        assert_eq!(machine.get32(TARGET), 1, "{paging:?}");
        assert_eq!(machine.frame(true).error, code::P | code::W);
        assert!(machine.frame(true).rip < end);
    }
}

/// Two page tables that differ in one page; the guest goes to and fro.
fn two_address_spaces(engine: EngineKind) {
    for &paging in modes(engine) {
        let mut machine = Machine::paged(engine, paging);
        // A copy of all tables at +0x8_0000, with links moved to the copy.
        let delta = 0x8_0000u64;
        let mut tables = vec![0; 0x1_0000];
        machine.memory.read(at::PAGES, &mut tables).unwrap();
        machine.memory.write(at::PAGES + delta, &tables).unwrap();
        match paging {
            Paging::Bits32 => machine.put32(at::PAGES + delta, machine.get32(at::PAGES) + delta as u32),
            _ => {
                machine.put64(at::PAGES + delta, machine.get64(at::PAGES) + delta);
                machine.put64(at::PAGES + delta + 0x1000, machine.get64(at::PAGES + 0x1000) + delta);
                machine.put64(at::PAGES + delta + 0x2000, machine.get64(at::PAGES + 0x2000) + delta);
            }
        }
        let entry = machine.entry_at(paging, TARGET);
        machine.set_entry(paging, entry + delta, (TARGET + 0x1000) | pte::ALL);
        machine.put32(TARGET, 1);
        machine.put32(TARGET + 0x1000, 2);
        let (one, two) = (machine.state.cr3 as u32, (machine.state.cr3 + delta) as u32);
        machine.code(|a| {
            let to = |a: &mut CodeAssembler, table: u32, shift: i32| {
                a.mov(eax, table)?;
                if paging == Paging::Long { a.mov(cr3, rax) } else { a.mov(cr3, eax) }?;
                a.shl(ebx, shift as u32)?;
                a.or(ebx, dword_ptr(TARGET))
            };
            a.mov(ebx, dword_ptr(TARGET))?;
            to(a, two, 4)?;
            to(a, one, 4)?;
            to(a, two, 4)
        });
        machine.run_to_end();
        assert_eq!(machine.reg(gpr::RBX), 0x1212, "{paging:?}");
    }
}

fn invlpg_refreshes_one_page(engine: EngineKind) {
    for &paging in modes(engine) {
        for global in [false, true] {
            let mut machine = Machine::paged(engine, paging);
            machine.state.cr4 |= cr4::PGE;
            let flags = pte::ALL | if global { pte::G } else { 0 };
            machine.map_page(paging, TARGET, flags);
            machine.put32(TARGET, 1);
            machine.put32(TARGET + 0x1000, 2);
            let entry = machine.entry_at(paging, TARGET);
            let new = ((TARGET + 0x1000) | flags) as u32;
            machine.code(|a| {
                a.mov(ecx, dword_ptr(TARGET))?;
                a.mov(dword_ptr(entry), new as i32)?;
                a.invlpg(byte_ptr(TARGET + 0x123))?;
                a.mov(edx, dword_ptr(TARGET))
            });
            machine.run_to_end();
            assert_eq!((machine.reg(gpr::RCX), machine.reg(gpr::RDX)), (1, 2), "{paging:?} {global}");
        }
    }
}

/// Changing CR4.PGE flushes global pages too; reloading CR3 flushes all others.
fn global_pages_go_with_pge(engine: EngineKind) {
    for by_pge in [false, true] {
        let mut machine = Machine::paged(engine, Paging::Long);
        machine.state.cr4 |= cr4::PGE;
        let flags = pte::ALL | if by_pge { pte::G } else { 0 };
        machine.map_page(Paging::Long, TARGET, flags);
        machine.put32(TARGET, 1);
        machine.put32(TARGET + 0x1000, 2);
        let entry = machine.entry_at(Paging::Long, TARGET);
        let new = ((TARGET + 0x1000) | flags) as i32;
        machine.code(|a| {
            a.mov(ecx, dword_ptr(TARGET))?;
            a.mov(dword_ptr(entry), new)?;
            if by_pge {
                a.mov(rax, cr4)?;
                a.xor(eax, cr4::PGE as i32)?;
                a.mov(cr4, rax)?;
            } else {
                a.mov(rax, cr3)?;
                a.mov(cr3, rax)?;
            }
            a.mov(edx, dword_ptr(TARGET))
        });
        machine.run_to_end();
        assert_eq!((machine.reg(gpr::RCX), machine.reg(gpr::RDX)), (1, 2), "{by_pge}");
    }
}

fn addresses_must_be_canonical(engine: EngineKind) {
    let expect = |vector: u8, write: &dyn Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
        let mut machine = Machine::paged(engine, Paging::Long);
        machine.state.gpr[gpr::RDI] = 0x0000_8000_0000_0000;
        machine.state.gpr[gpr::RBP] = 0xffff_7fff_ffff_fff0;
        machine.code(|a| write(a));
        machine.run_to_handler(vector);
        assert_eq!((machine.frame(true).error, machine.frame(true).rip), (0, at::CODE));
    };
    expect(13, &|a| a.mov(rax, qword_ptr(rdi)));
    expect(13, &|a| a.mov(qword_ptr(rdi + 64), rax));
    expect(12, &|a| a.mov(rax, qword_ptr(rbp)));
    expect(13, &|a| a.jmp(rdi));
}

/// PAE paging loads the four upper entries with CR3, and refuses reserved bits then.
fn pdptes_are_checked_on_load(engine: EngineKind) {
    let mut machine = Machine::paged(engine, Paging::Pae);
    let other = at::PAGES + 0xb000;
    for i in 0..4 {
        machine.put64(other + 8 * i, machine.get64(at::PAGES + 0x1000 + 8 * i));
    }
    machine.put64(other + 16, machine.get64(other + 16) | pte::W);
    machine.code(|a| {
        a.mov(eax, other as u32)?;
        a.mov(cr3, eax)
    });
    machine.run_to_handler(13);
    assert_eq!(machine.frame(true).error, 0);
    assert_eq!(machine.state.cr3, at::PAGES + 0x1000, "CR3 stays");
    // An absent one is no error until it is used.
    let mut machine = Machine::paged(engine, Paging::Pae);
    for i in 0..4 {
        machine.put64(other + 8 * i, if i == 1 { 0 } else { machine.get64(at::PAGES + 0x1000 + 8 * i) });
    }
    machine.code(|a| {
        a.mov(eax, other as u32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, dword_ptr(0x4000_0010u32))
    });
    machine.run_to_handler(PF);
    assert_eq!((machine.frame(true).error, machine.state.cr2), (0, 0x4000_0010));
}

/// The highest half of the 64-bit space goes through the last entries of the tables.
fn page_tables_at_the_top_of_the_space(engine: EngineKind) {
    let mut machine = Machine::paged(engine, Paging::Long);
    let tables = at::PAGES + 0xb000;
    machine.put64(at::PAGES + 8 * 511, tables | pte::ALL);
    machine.put64(tables + 8 * 511, (tables + 0x1000) | pte::ALL);
    machine.put64(tables + 0x1000 + 8 * 511, (tables + 0x2000) | pte::ALL);
    machine.put64(tables + 0x2000 + 8 * 511, TARGET | pte::ALL);
    machine.put64(TARGET + 0xff8, 0x1122_3344_5566_7788);
    machine.code(|a| a.mov(rax, qword_ptr(-8i64)));
    machine.run_to_end();
    assert_eq!(machine.reg(gpr::RAX), 0x1122_3344_5566_7788);
}

/// More permissions need no flush: a page fault's retry, or the next access, sees the new entry.
fn changed_permissions_need_no_reset(engine: EngineKind) {
    for &paging in modes(engine) {
        let mut machine = Machine::paged(engine, paging);
        machine.map_page(paging, TARGET, pte::P);
        let entry = machine.entry_at(paging, TARGET);
        let repair = at::CODE + 0x400;
        match paging {
            Paging::Long => machine.set_gate64(PF, repair, 0x8e, 0),
            _ => machine.set_gate(PF, crate::harness::gate(crate::harness::sel::CODE32, repair as u32, 0x8e, 0)),
        }
        machine.code_at(repair, |a| {
            a.or(dword_ptr(entry), pte::W as i32)?;
            a.inc(ebx)?;
            if paging == Paging::Long {
                a.add(rsp, 8)?;
                a.iretq()
            } else {
                a.add(esp, 4)?;
                a.iretd()
            }
        });
        machine.code(|a| {
            a.mov(eax, dword_ptr(TARGET))?;
            a.inc(dword_ptr(TARGET))?;
            a.inc(dword_ptr(TARGET))
        });
        machine.run_to_end();
        assert_eq!((machine.get32(TARGET), machine.reg(gpr::RBX)), (2, 1), "{paging:?}");
    }
}
