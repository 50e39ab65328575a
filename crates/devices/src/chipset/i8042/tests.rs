use super::regs::{command, mode, status};
use super::*;
use crate::chipset::fixture::{Bytewise, Garbage, Lines, Power, check_state};

struct Bench {
    i8042: Arc<I8042>,
    data: Arc<dyn BusDevice>,
    command: Arc<dyn BusDevice>,
    lines: Arc<Lines>,
    power: Arc<Power>,
}

fn bench() -> Bench {
    let (lines, power) = (Lines::new(), Arc::new(Power::default()));
    let i8042 = I8042::new(lines.line(1), lines.line(12), power.clone());
    Bench { data: i8042.data_port(), command: i8042.command_port(), i8042, lines, power }
}

impl Bench {
    fn command(&self, command: u8) {
        self.command.outb(0, command);
    }
    fn status(&self) -> u8 {
        self.command.inb(0)
    }
    /// Everything that is there to be read, keyboard's and mouse's.
    fn read(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.status() & status::OUTPUT_FULL != 0 {
            bytes.push(self.data.inb(0));
        }
        bytes
    }
    fn controller(&self, command: u8) -> Vec<u8> {
        self.command(command);
        self.read()
    }
    fn keyboard(&self, byte: u8) -> Vec<u8> {
        self.data.outb(0, byte);
        self.read()
    }
    fn mouse(&self, byte: u8) -> Vec<u8> {
        self.command(command::WRITE_AUX);
        self.data.outb(0, byte);
        self.read()
    }
    fn set_mode(&self, mode: u8) {
        self.command(command::WRITE_RAM);
        self.data.outb(0, mode);
    }
}

fn buttons(left: bool, middle: bool, right: bool) -> MouseButtons {
    MouseButtons { left, middle, right }
}

#[test]
fn controller_commands() {
    let b = bench();
    assert_eq!(b.status(), status::UNLOCKED | status::SYSTEM);
    assert_eq!(b.controller(command::TEST_CONTROLLER), [0x55]);
    assert_eq!(b.status(), status::UNLOCKED | status::SYSTEM | status::COMMAND);
    assert_eq!(b.controller(command::TEST_KEYBOARD), [0]);
    assert_eq!(b.controller(command::TEST_AUX), [0]);
    assert_eq!(b.controller(command::TEST_PASSWORD), [0xf1]);
    assert_eq!(b.controller(command::READ_INPUT_PORT), [0x80]);
    assert_eq!(b.controller(command::READ_OUTPUT_PORT), [0x03]);
    assert_eq!(b.controller(command::READ_RAM), [mode::DEFAULT]);
    for (command, bit, set) in [
        (command::ENABLE_AUX, mode::AUX_DISABLED, false),
        (command::DISABLE_AUX, mode::AUX_DISABLED, true),
        (command::DISABLE_KEYBOARD, mode::KEYBOARD_DISABLED, true),
        (command::ENABLE_KEYBOARD, mode::KEYBOARD_DISABLED, false),
    ] {
        b.command(command);
        assert_eq!(b.controller(command::READ_RAM)[0] & bit != 0, set);
    }
    for cell in 0..32 {
        b.command(command::WRITE_RAM + cell);
        b.data.outb(0, cell | 0x40);
    }
    for cell in 0..32 {
        assert_eq!(b.controller(command::READ_RAM + cell), [cell | 0x40]);
    }
    assert_eq!(b.controller(0x00), []);
}

#[test]
fn buffers_can_be_written() {
    let b = bench();
    b.set_mode(mode::KEYBOARD_INTERRUPT | mode::AUX_INTERRUPT);
    b.command(command::WRITE_KEYBOARD_BUFFER);
    b.data.outb(0, 0xaa);
    assert_eq!(b.status() & (status::OUTPUT_FULL | status::FROM_AUX), status::OUTPUT_FULL);
    b.command(command::READ_OUTPUT_PORT);
    assert_eq!(b.lines.take(), [(1, true)]);
    b.command(command::WRITE_AUX_BUFFER);
    b.data.outb(0, 0x5a);
    assert_eq!(b.data.inb(0), 0xaa);
    assert_eq!(b.data.inb(0), 0x13, "the output port tells of the full buffer");
    assert_eq!(b.status() & status::FROM_AUX, status::FROM_AUX);
    assert_eq!(b.lines.take(), [(1, false), (1, true), (1, false), (12, true)]);
    assert_eq!(b.data.inb(0), 0x5a);
    assert_eq!(b.lines.take(), [(12, false)]);
    assert_eq!(b.data.inb(0), 0, "empty");
}

#[test]
fn resets() {
    let b = bench();
    b.command(0xfe);
    b.command(0xf0);
    assert_eq!(b.power.take(), [PowerEvent::Reset, PowerEvent::Reset]);
    b.command(0xff);
    b.command(command::WRITE_OUTPUT_PORT);
    b.data.outb(0, 0xdf);
    assert_eq!(b.power.take(), []);
    b.command(command::WRITE_OUTPUT_PORT);
    b.data.outb(0, 0xde);
    assert_eq!(b.power.take(), [PowerEvent::Reset]);
    b.command(command::WRITE_OUTPUT_PORT);
    b.command(command::ENABLE_KEYBOARD);
    b.data.outb(0, 0x00);
    assert_eq!((b.power.take(), b.read()), (vec![], vec![0xfa]), "a command takes the place of one half given");
}

#[test]
fn keyboard_commands() {
    let b = bench();
    b.set_mode(mode::KEYBOARD_INTERRUPT);
    assert_eq!(b.keyboard(0xff), [0xfa, 0xaa]);
    assert_eq!(b.keyboard(0xf2), [0xfa, 0xab, 0x83]);
    assert_eq!(b.keyboard(0xee), [0xee]);
    assert_eq!(b.keyboard(0x00), [0xfa]);
    assert_eq!((b.keyboard(0xed), b.keyboard(0x04)), (vec![0xfa], vec![0xfa]));
    assert_eq!(b.i8042.leds(), 4);
    assert_eq!((b.keyboard(0xf3), b.keyboard(0x20)), (vec![0xfa], vec![0xfa]));
    assert_eq!((b.keyboard(0xf0), b.keyboard(0)), (vec![0xfa], vec![0xfa, 2]));
    assert_eq!((b.keyboard(0xf0), b.keyboard(3)), (vec![0xfa], vec![0xfa]));
    assert_eq!((b.keyboard(0xf0), b.keyboard(0)), (vec![0xfa], vec![0xfa, 2]), "there is no set 3");
    assert_eq!(b.keyboard(0xfe), [2], "the last byte again");
    assert_eq!(b.keyboard(0x12), [0xfe]);
    assert_eq!((b.keyboard(0xf5), b.i8042.key_scancode(&[0x1c]), b.read()), (vec![0xfa], false, vec![]));
    assert_eq!((b.keyboard(0xf4), b.i8042.key_scancode(&[0x1c]), b.read()), (vec![0xfa], true, vec![0x1c]));
    assert_eq!((b.keyboard(0xf0), b.keyboard(1)), (vec![0xfa], vec![0xfa]));
    assert!(b.i8042.key_scancode(&[0xe0, 0xf0, 0x75]));
    assert_eq!(b.read(), [0xe0, 0xc8], "set 1 without translation");
    assert_eq!(b.keyboard(0xf6), [0xfa]);
    assert!(b.i8042.key_scancode(&[0xf0, 0x1c]));
    assert_eq!(b.read(), [0xf0, 0x1c]);
}

#[test]
fn keys_are_translated_and_interrupt_byte_by_byte() {
    let b = bench();
    assert!(b.i8042.key_scancode(&[0xe0, 0x75]));
    assert!(b.i8042.key_scancode(&[0xe0, 0xf0, 0x75]));
    let mut codes = Vec::new();
    while b.lines.take().ends_with(&[(1, true)]) {
        codes.push(b.data.inb(0));
    }
    assert_eq!(codes, [0xe0, 0x48, 0xe0, 0xc8]);
    assert_eq!(b.keyboard(0xf2), [0xfa, 0xab, 0x41], "so is the identity, and drivers know it");
}

#[test]
fn keys_wait_while_the_keyboard_is_disabled_and_overflow_whole() {
    let b = bench();
    b.command(command::DISABLE_KEYBOARD);
    for _ in 0..5 {
        assert!(b.i8042.key_scancode(&[0xe0, 0xf0, 0x75]));
    }
    assert!(!b.i8042.key_scancode(&[0xe0, 0x75]), "15 of 16 bytes are taken");
    assert_eq!(b.controller(command::READ_RAM), [mode::DEFAULT | mode::KEYBOARD_DISABLED], "nothing gets in between");
    assert_eq!(b.controller(command::ENABLE_KEYBOARD), [0xe0, 0xc8].repeat(5));
}

#[test]
fn mouse_commands() {
    let b = bench();
    b.set_mode(mode::DEFAULT | mode::AUX_INTERRUPT);
    assert_eq!(b.mouse(0xff), [0xfa, 0xaa, 0x00]);
    assert_eq!(b.lines.take().iter().filter(|&&event| event == (12, true)).count(), 3);
    assert_eq!(b.mouse(0xf2), [0xfa, 0x00]);
    assert_eq!(b.mouse(0xe9), [0xfa, 0x00, 2, 100]);
    for (command, value) in [(0xf3, 40), (0xe8, 3)] {
        assert_eq!((b.mouse(command), b.mouse(value)), (vec![0xfa], vec![0xfa]));
    }
    for command in [0xe7, 0xf4, 0xf0] {
        assert_eq!(b.mouse(command), [0xfa]);
    }
    assert!(b.i8042.mouse_listens());
    b.i8042.mouse_event(3, 4, buttons(true, false, false));
    assert_eq!(b.mouse(0xe9), [0xfa, 0x74, 3, 40]);
    assert_eq!(b.mouse(0xeb), [0xfa, 0x29, 3, 0xfc], "in remote mode movement waits to be asked for");
    assert_eq!((b.mouse(0xee), b.mouse(0xe9), b.mouse(0xec)), (vec![0xfa], vec![0xe9], vec![0xfa]));
    assert_eq!((b.mouse(0xe6), b.mouse(0xea), b.mouse(0xe9)), (vec![0xfa], vec![0xfa], vec![0xfa, 0x24, 3, 40]));
    assert_eq!((b.mouse(0xf6), b.mouse(0xe9)), (vec![0xfa], vec![0xfa, 0x04, 2, 100]));
    assert_eq!(b.mouse(0xfe), [100]);
    assert_eq!(b.mouse(0x55), [0xfe]);
    assert_eq!((b.mouse(0xf5), b.i8042.mouse_listens()), (vec![0xfa], false));
}

#[test]
fn mouse_packets() {
    let b = bench();
    b.i8042.mouse_event(7, 7, buttons(false, false, false));
    assert_eq!(b.mouse(0xf4), [0xfa]);
    assert_eq!(b.read(), [], "movement before does not count");
    b.i8042.mouse_event(1, -2, buttons(false, false, true));
    b.i8042.mouse_event(-1, 2, buttons(false, true, false));
    b.i8042.mouse_event(0, 0, buttons(false, true, false));
    assert_eq!(b.read(), [0x0a, 1, 2, 0x3c, 0xff, 0xfe]);
    b.i8042.mouse_event(-2000, i32::MIN, buttons(false, false, false));
    b.i8042.mouse_event(0, i32::MAX, buttons(false, false, false));
    let packets = b.read();
    let right: i32 = packets.chunks(3).map(|p| i32::from(p[1]) - if p[0] & 0x10 != 0 { 256 } else { 0 }).sum();
    assert_eq!((right, packets[0]), (-2000, 0x18), "a far jump arrives in whole");
    b.i8042.mouse_event(5, 0, buttons(false, false, false));
    b.command(command::DISABLE_AUX);
    assert_eq!(b.read(), [0x08, 5, 0][..1], "one byte was in the output buffer");
    b.i8042.mouse_event(6, 0, buttons(false, false, false));
    assert_eq!(b.controller(command::ENABLE_AUX), [5, 0, 0x08, 6, 0]);
}

#[test]
fn keyboard_goes_before_mouse() {
    let b = bench();
    b.mouse(0xf4);
    b.set_mode(mode::DEFAULT & !mode::AUX_DISABLED | mode::KEYBOARD_DISABLED | mode::AUX_DISABLED);
    b.i8042.mouse_event(1, 0, buttons(false, false, false));
    b.i8042.key_scancode(&[0x1c]);
    b.set_mode(mode::DEFAULT & !mode::AUX_DISABLED);
    assert_eq!(b.read(), [0x1e, 0x08, 1, 0]);
}

#[test]
fn state_survives() {
    let b = bench();
    b.mouse(0xf4);
    b.i8042.key_scancode(&[0x1c, 0xf0, 0x1c]);
    b.i8042.mouse_event(1, 1, buttons(true, true, true));
    let other = bench();
    other.i8042.restore(VERSION, &b.i8042.save().unwrap()).unwrap();
    assert_eq!(other.lines.take(), []);
    assert_eq!(other.read(), [0x1e, 0x9e, 0x2f, 1, 0xff]);
    other.i8042.reset();
    assert!(!other.i8042.mouse_listens());
}

#[test]
fn garbage() {
    let mut garbage = Garbage(7);
    let b = bench();
    for round in 0..50_000 {
        garbage.access(&*b.data, 1);
        garbage.access(&*b.command, 1);
        let [x, y] = [garbage.next() as i32, garbage.next() as i32];
        b.i8042.mouse_event(x >> (x & 31), y >> (y & 31), buttons(x & 1 != 0, x & 2 != 0, x & 4 != 0));
        b.i8042.key_scancode(&garbage.next().to_le_bytes()[..(y & 7) as usize]);
        if round % 1000 == 0 {
            check_state(&*b.i8042, &b.lines, &mut garbage);
        }
    }
}
