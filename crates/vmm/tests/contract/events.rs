//! Interrupts on their way from lines, messages and timers to handlers of the guest.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use platform::x86::{gpr, rflags};
use platform::{IrqLine, MsiMessage};
use vmm::EngineKind;

use crate::harness::{Access, FINISH, Machine, PORT, at, handler};

crate::stamp! {
    everywhere: a_line_reaches_the_pic, a_line_reaches_the_ioapic, pic_and_ioapic_inputs_are_separate,
        sources_of_a_line_are_ored, a_message_reaches_its_handler, the_interval_timer_ticks, the_local_timer_fires,
        interrupts_wait_for_the_flag, an_interrupt_wakes_a_halted_vcpu;
    software:
}

const IOAPIC: u32 = 0xfec0_0000;
const SPURIOUS: u32 = 0xfee0_00f0;
const EOI: u32 = 0xfee0_00b0;
/// Vectors that the machine's PICs are set to by [`init_pics`].
const PIC_VECTOR: u8 = 0x30;

/// Initialises the 8259 pair: vectors from 0x30, and which inputs are masked.
fn init_pics(a: &mut CodeAssembler, masks: u16) -> Result<(), IcedError> {
    let writes = [
        (0x20, 0x11),
        (0x21, PIC_VECTOR),
        (0x21, 4),
        (0x21, 1),
        (0xa0, 0x11),
        (0xa1, PIC_VECTOR + 8),
        (0xa1, 2),
        (0xa1, 1),
        (0x21, masks as u8),
        (0xa1, (masks >> 8) as u8),
    ];
    for (port, value) in writes {
        a.mov(al, u32::from(value))?;
        a.out(port, al)?;
    }
    Ok(())
}

/// Enables the local APIC and points a pin of the I/O APIC at `vector`, edge-triggered. The 8259 pair is left as it is.
fn init_ioapic(a: &mut CodeAssembler, pin: u32, vector: u8) -> Result<(), IcedError> {
    a.mov(edi, SPURIOUS)?;
    a.mov(dword_ptr(rdi), 0x1ff)?;
    a.mov(edi, IOAPIC)?;
    for (register, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, u32::from(vector))] {
        a.mov(dword_ptr(rdi), register as i32)?;
        a.mov(dword_ptr(rdi + 0x10), value as i32)?;
    }
    Ok(())
}

/// Says `value` on the port.
fn say(a: &mut CodeAssembler, value: u8) -> Result<(), IcedError> {
    a.mov(dx, u32::from(PORT))?;
    a.mov(al, u32::from(value))?;
    a.out(dx, al)
}

/// Says that all is set up, then waits for an interrupt.
fn ready(a: &mut CodeAssembler) -> Result<(), IcedError> {
    say(a, 1)?;
    a.sti()?;
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.hlt()?;
    a.jmp(wait)
}

#[track_caller]
fn expect_vector(machine: &mut Machine, vector: u8, act: impl FnOnce()) {
    machine.run_with(|world| {
        world.await_output(1);
        act();
    });
    assert_eq!(machine.vector(), Some(vector), "{:x?}", machine.state);
}

fn a_line_reaches_the_pic(engine: EngineKind) {
    let mut machine = Machine::real(engine);
    machine.code(|a| {
        init_pics(a, !(1 << 2 | 1 << 12))?;
        ready(a)
    });
    let line = machine.chips.line(12).unwrap();
    expect_vector(&mut machine, PIC_VECTOR + 12, || line.set(true));
    assert_eq!(machine.reg(gpr::RSP), at::STACK - 6, "flags, CS and IP are on the stack");
    assert_eq!(machine.stack(2, 2) & rflags::IF, rflags::IF);
    assert_eq!(machine.state.rflags & rflags::IF, 0);
}

fn a_line_reaches_the_ioapic(engine: EngineKind) {
    for (gsi, pin) in [(5, 5), (0, 2), (16, 16), (23, 23)] {
        let mut machine = Machine::long(engine);
        machine.code(|a| {
            init_pics(a, 0xffff)?;
            init_ioapic(a, pin, 0x51)?;
            ready(a)
        });
        let line = machine.chips.line(gsi).unwrap();
        expect_vector(&mut machine, 0x51, || line.pulse());
        assert_eq!(machine.frame(false).flags & rflags::IF, rflags::IF);
    }
    let machine = Machine::real(engine);
    let pins = machine.chips.pins();
    assert!(pins >= 24 && machine.chips.line(pins).is_none());
}

/// Input 10 of the 8259 pair and pin 10 of the I/O APIC, as a PIRQ router drives them.
fn pic_and_ioapic_inputs_are_separate(engine: EngineKind) {
    for through_pic in [true, false] {
        let mut machine = Machine::long(engine);
        machine.code(|a| {
            init_pics(a, !(1 << 2 | 1 << 10))?;
            init_ioapic(a, 10, 0x61)?;
            ready(a)
        });
        let sink = if through_pic { machine.chips.pic() } else { machine.chips.ioapic() };
        let vector = if through_pic { PIC_VECTOR + 10 } else { 0x61 };
        expect_vector(&mut machine, vector, || sink.set_level(10, true));
    }
}

/// A level-triggered line stays asserted until the last of its sources lets go.
fn sources_of_a_line_are_ored(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    // Level-triggered, so that each end of interrupt asks the line again. The handler says 2; after the third time it ends.
    machine.set_gate64(0x52, at::CODE + 0x400, 0x8e, 0);
    machine.code_at(at::CODE + 0x400, |a| {
        say(a, 2)?;
        a.inc(ebx)?;
        a.cmp(ebx, 3)?;
        let mut more = a.create_label();
        a.jne(more)?;
        a.out(u32::from(FINISH), al)?;
        a.set_label(&mut more)?;
        a.in_(al, dx)?;
        a.mov(edi, EOI)?;
        a.mov(dword_ptr(rdi), 0)?;
        a.iretq()
    });
    machine.code(|a| {
        init_ioapic(a, 20, 0x52)?;
        a.mov(edi, IOAPIC)?;
        a.mov(dword_ptr(rdi), 0x10 + 2 * 20)?;
        a.mov(dword_ptr(rdi + 0x10), 0x8052)?;
        ready(a)
    });
    let lines: Vec<IrqLine> = (0..2).map(|_| machine.chips.line(20).unwrap()).collect();
    let third = machine.chips.ioapic();
    lines[0].set(true);
    lines[1].set(true);
    third.set_level(20, true);
    lines[0].set(false);
    lines[1].set(false);
    machine.run();
    assert_eq!(machine.world.outputs(), [1, 2, 2, 2]);
    third.set_level(20, false);
}

fn a_message_reaches_its_handler(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        a.mov(edi, SPURIOUS)?;
        a.mov(dword_ptr(rdi), 0x1ff)?;
        ready(a)
    });
    let msi = machine.chips.msi();
    expect_vector(&mut machine, 0x71, || {
        msi.send(MsiMessage { address: 0x1000_0000, data: 0x73 });
        msi.send(MsiMessage { address: 0xfee0_f000, data: 0x74 });
        msi.send(MsiMessage { address: 0xfee0_0000, data: 0x71 });
    });
}

fn the_interval_timer_ticks(engine: EngineKind) {
    let mut machine = Machine::real(engine);
    let tick = at::CODE + 0x400;
    machine.put32(at::IVT + 4 * u64::from(PIC_VECTOR), tick as u32);
    machine.code_at(tick, |a| {
        say(a, 2)?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.inc(bx)?;
        a.cmp(bx, 3)?;
        let mut more = a.create_label();
        a.jne(more)?;
        a.out(u32::from(FINISH), al)?;
        a.set_label(&mut more)?;
        a.iret()
    });
    machine.code(|a| {
        init_pics(a, !1)?;
        // Counter 0, both bytes, mode 2, 1193 ticks: 1 kHz.
        for (port, value) in [(0x43, 0x34), (0x40, 1193 & 0xff), (0x40, 1193 >> 8)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        ready(a)
    });
    machine.run();
    assert_eq!(machine.world.outputs(), [1, 2, 2, 2]);
}

fn the_local_timer_fires(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        a.mov(edi, SPURIOUS)?;
        a.mov(dword_ptr(rdi), 0x1ff)?;
        // One-shot, vector 0x55, divide by 16, and an initial count.
        for (register, value) in [(0xfee0_0320u32, 0x55), (0xfee0_03e0, 3), (0xfee0_0380, 1000)] {
            a.mov(edi, register)?;
            a.mov(dword_ptr(rdi), value)?;
        }
        ready(a)
    });
    expect_vector(&mut machine, 0x55, || ());
    assert_eq!(machine.frame(false).flags & rflags::IF, rflags::IF);
}

fn interrupts_wait_for_the_flag(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    machine.code(|a| {
        init_pics(a, 0xffff)?;
        init_ioapic(a, 4, 0x53)?;
        say(a, 1)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.in_(al, dx)?;
        a.cmp(al, 0xab)?;
        a.jne(wait)?;
        say(a, 2)?;
        a.sti()?;
        // Still in the shadow of STI.
        a.mov(ebx, 5)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.inc(ebx)?;
        a.cmp(ebx, 10_000_000)?;
        a.jne(wait)
    });
    let line = machine.chips.line(4).unwrap();
    machine.run_with(|world| {
        world.await_output(1);
        line.set(true);
        world.supply(&[0xab]);
    });
    assert_eq!(machine.vector(), Some(0x53));
    assert_eq!(machine.world.outputs(), [1, 2]);
    // KVM may look for interrupts only now and then where it emulates all instructions.
    let exact = engine == EngineKind::Soft;
    assert!(if exact { machine.reg(gpr::RBX) == 5 } else { machine.reg(gpr::RBX) >= 5 });
}

fn an_interrupt_wakes_a_halted_vcpu(engine: EngineKind) {
    let mut machine = Machine::long(engine);
    let wake = at::CODE + 0x400;
    machine.set_gate64(0x54, wake, 0x8e, 0);
    machine.code_at(wake, |a| {
        a.mov(edi, EOI)?;
        a.mov(dword_ptr(rdi), 0)?;
        a.iretq()
    });
    machine.code(|a| {
        init_pics(a, 0xffff)?;
        init_ioapic(a, 4, 0x54)?;
        say(a, 1)?;
        a.sti()?;
        a.hlt()?;
        say(a, 2)
    });
    let line = machine.chips.line(4).unwrap();
    machine.run_with(|world| {
        world.await_output(1);
        line.set(true);
    });
    assert_eq!(machine.vector(), None, "the code went on after its halt");
    assert_eq!(machine.world.log(), [Access::Out(0, 1, 1), Access::Out(0, 1, 2)]);
    assert_ne!(machine.state.rip, handler(0x54));
}
