//! The interpreter and the translator against the host's own CPU: random user-mode programs must end in the same state on all.
//!
//! * [`generate`] makes programs that cover every encoding of the instruction set's user-mode part;
//! * [`native`] runs them on the host in a sandbox process, [`guest`] on a vCPU;
//! * [`run`] drives both, compares, shrinks what differs to one instruction where possible, and fails if an encoding
//!   was never executed.
//!
//! Every run takes the same programs, unless told otherwise. A report says how to see its case again. Environment variables:
//! `DIFFERENTIAL_SEED` (first seed), `DIFFERENTIAL_EXPLORE=1` (a random one instead),
//! `DIFFERENTIAL_PROGRAMS` (how many), `DIFFERENTIAL_INSTRUCTIONS` (how many to
//! execute), `DIFFERENTIAL_CODE` (one encoding by its name in `iced_x86::Code`), `DIFFERENTIAL_REPORTS` (go on until so
//! many differences).
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod codes;
mod compare;
mod coverage;
mod flags;
mod generate;
mod guest;
mod kernel;
mod layout;
mod native;
mod program;
mod random;
mod run;
mod vector;

use codes::Family;
use layout::Mode;

#[test]
fn integer_instructions_in_64_bit_mode() {
    run::family(Family::Integer, Mode::Long, 700_000);
}

#[test]
fn integer_instructions_in_32_bit_mode() {
    run::family(Family::Integer, Mode::Flat32, 300_000);
}

#[test]
fn integer_instructions_in_16_bit_mode() {
    run::family(Family::Integer, Mode::Segmented16, 200_000);
}

#[test]
fn vector_instructions_in_64_bit_mode() {
    run::family(Family::Simd, Mode::Long, 200_000);
}

#[test]
fn vector_instructions_in_32_bit_mode() {
    run::family(Family::Simd, Mode::Flat32, 100_000);
}

#[test]
fn x87_instructions_in_64_bit_mode() {
    run::family(Family::X87, Mode::Long, 100_000);
}

#[test]
fn x87_instructions_in_32_bit_mode() {
    run::family(Family::X87, Mode::Flat32, 50_000);
}

#[test]
fn opcodes_that_mean_nothing() {
    for mode in [Mode::Long, Mode::Flat32, Mode::Segmented16] {
        run::family(Family::Undefined, mode, 15_000);
    }
}
