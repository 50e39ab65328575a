//! A kernel of a few hundred bytes that ends the VM in any way it is told to.
//!
//! It is a multiboot kernel. It prints [`READY`], then acts on what it reads from the first serial port:
//!
//! | byte | act |
//! |---|---|
//! | `a` | enables ACPI, so that there is a power button; prints `A` |
//! | `h` | halts with interrupts off |
//! | `p` | powers off by ACPI |
//! | `r` | resets by port 0xCF9 |
//! | `t` | triple-faults |
//! | `u` | reads a byte from port 0x99, which nobody has; prints `U` |
//! | other | prints it |
//!
//! When the power button is pressed it prints `B`.

use std::path::{Path, PathBuf};

use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, CodeLabel, al, ax, bl, byte_ptr, dx, ecx, esi, esp};

/// What the kernel prints first.
pub const READY: &str = "READY";

const LOAD_ADDRESS: u32 = 0x10_0000;
const HEADER_BYTES: u32 = 32;
const STACK: u32 = 0x9_0000;

const UART_DATA: u32 = 0x3f8;
const UART_LINE_STATUS: u32 = 0x3fd;
const DATA_READY: u32 = 1 << 0;
const TRANSMITTER_EMPTY: u32 = 1 << 5;
const PM1_STATUS: u32 = 0x400;
const PM1_CONTROL: u32 = 0x404;
const POWER_BUTTON: u32 = 1 << 8;
/// SLP_TYP 5 and SLP_EN (ACPI 6.5, 4.8.3.2.1).
const SOFT_OFF: u32 = 5 << 10 | 1 << 13;

/// Writes the kernel into `folder` and returns its path.
///
/// # Panics
/// The file cannot be written.
pub fn write_to(folder: &Path) -> PathBuf {
    let path = folder.join("kernel");
    std::fs::write(&path, image().expect("the kernel is fixed")).expect("cannot write the kernel");
    path
}

fn image() -> Result<Vec<u8>, IcedError> {
    let code = code()?;
    let end = LOAD_ADDRESS + HEADER_BYTES + code.len() as u32;
    let (magic, flags) = (0x1bad_b002_u32, 1 << 16);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let header = [magic, flags, checksum, LOAD_ADDRESS, LOAD_ADDRESS, end, end, LOAD_ADDRESS + HEADER_BYTES]
        .map(u32::to_le_bytes);
    Ok([header.as_flattened(), &code].concat())
}

fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let mut put = a.create_label();
    let mut next = a.create_label();
    a.mov(esp, STACK)?;
    for byte in format!("{READY}\r\n").bytes() {
        print(&mut a, byte, put)?;
    }
    a.set_label(&mut next)?;
    look_at_button(&mut a, put)?;
    a.mov(dx, UART_LINE_STATUS)?;
    a.in_(al, dx)?;
    a.test(al, DATA_READY)?;
    a.je(next)?;
    a.mov(dx, UART_DATA)?;
    a.in_(al, dx)?;
    a.mov(bl, al)?;
    act(&mut a, put, next)?;
    a.call(put)?;
    a.jmp(next)?;
    put_byte(&mut a, &mut put)?;
    a.assemble(u64::from(LOAD_ADDRESS + HEADER_BYTES))
}

fn print(a: &mut CodeAssembler, byte: u8, put: CodeLabel) -> Result<(), IcedError> {
    a.mov(bl, u32::from(byte))?;
    a.call(put)
}

/// Prints BL.
fn put_byte(a: &mut CodeAssembler, put: &mut CodeLabel) -> Result<(), IcedError> {
    a.set_label(put)?;
    let mut wait = a.create_label();
    a.mov(dx, UART_LINE_STATUS)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, TRANSMITTER_EMPTY)?;
    a.je(wait)?;
    a.mov(dx, UART_DATA)?;
    a.mov(al, bl)?;
    a.out(dx, al)?;
    a.ret()
}

fn look_at_button(a: &mut CodeAssembler, put: CodeLabel) -> Result<(), IcedError> {
    let mut untouched = a.create_label();
    a.mov(dx, PM1_STATUS)?;
    a.in_(ax, dx)?;
    a.test(ax, POWER_BUTTON)?;
    a.je(untouched)?;
    a.mov(ax, POWER_BUTTON)?;
    a.out(dx, ax)?;
    print(a, b'B', put)?;
    a.set_label(&mut untouched)
}

/// Does what the byte in BL says, if it says anything; bytes to be printed fall through.
fn act(a: &mut CodeAssembler, put: CodeLabel, next: CodeLabel) -> Result<(), IcedError> {
    type Act = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let acts: [(u8, Act); 6] = [
        (b'a', |a| {
            a.mov(al, 0xa0)?;
            a.out(0xb2, al)
        }),
        (b'h', |a| {
            a.cli()?;
            a.hlt()
        }),
        (b'p', |a| {
            a.mov(dx, PM1_CONTROL)?;
            a.mov(ax, SOFT_OFF)?;
            a.out(dx, ax)
        }),
        (b'r', |a| {
            a.mov(dx, 0xcf9)?;
            a.mov(al, 6)?;
            a.out(dx, al)
        }),
        (b't', |a| {
            // An empty interrupt table: limit 0.
            a.push(0)?;
            a.push(0)?;
            a.mov(esi, esp)?;
            a.lidt(byte_ptr(esi))?;
            a.xor(ecx, ecx)?;
            a.int3()
        }),
        (b'u', |a| a.in_(al, 0x99)),
    ];
    for (byte, body) in acts {
        let mut other = a.create_label();
        a.cmp(bl, u32::from(byte))?;
        a.jne(other)?;
        body(a)?;
        print(a, byte.to_ascii_uppercase(), put)?;
        a.jmp(next)?;
        a.set_label(&mut other)?;
    }
    Ok(())
}
