//! A guest's driver in front, a TPM that says what it was told behind.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::chipset::fixture::Garbage;

/// Answers when the test lets it, with what the test says.
struct Scripted {
    commands: Sender<Vec<u8>>,
    responses: Receiver<io::Result<Vec<u8>>>,
}

impl Tpm for Scripted {
    fn execute(&mut self, command: &[u8]) -> io::Result<Vec<u8>> {
        let _ = self.commands.send(command.to_vec());
        self.responses.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
    }
}

struct Bench {
    tpm: Arc<TpmCrb>,
    commands: Receiver<Vec<u8>>,
    responses: Sender<io::Result<Vec<u8>>>,
}

fn bench() -> Bench {
    let ((commands, taken), (responses, given)) = (channel(), channel());
    let tpm = TpmCrb::new(Box::new(Scripted { commands, responses: given })).unwrap();
    Bench { tpm, commands: taken, responses }
}

impl Bench {
    fn read(&self, offset: u64) -> u32 {
        self.tpm.read(offset, AccessSize::Dword) as u32
    }

    fn write(&self, offset: u64, value: u32) {
        self.tpm.write(offset, AccessSize::Dword, value.into());
    }

    fn put(&self, bytes: &[u8]) {
        (0x80..).zip(bytes).for_each(|(at, byte)| self.tpm.write(at, AccessSize::Byte, (*byte).into()));
    }

    fn get(&self, len: u64) -> Vec<u8> {
        (0..len).map(|at| self.tpm.read(0x80 + at, AccessSize::Byte) as u8).collect()
    }

    /// Waits until the start bit is clear.
    fn wait(&self) {
        while self.read(0x4c) != 0 {
            std::thread::yield_now();
        }
    }
}

const COMMAND: [u8; 12] = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8];

#[test]
fn says_what_it_is_and_where_its_buffer_is() {
    let b = bench();
    assert_eq!(b.read(0x30) & 0xf, 1, "CRB");
    assert_eq!((b.read(0x58), b.read(0x64)), (0xf80, 0xf80));
    assert_eq!((b.tpm.read(0x5c, AccessSize::Qword), b.tpm.read(0x68, AccessSize::Qword)), (0xfed4_0080, 0xfed4_0080));
    b.write(0x08, 1);
    assert_eq!((b.read(0) & 0x82, b.read(0x0c)), (0x82, 1));
    b.write(0x08, 2);
    assert_eq!((b.read(0) & 0x82, b.read(0x0c)), (0x80, 0));
}

#[test]
fn a_command_goes_out_and_its_response_comes_back() {
    let b = bench();
    assert_eq!(b.read(0x44), 2, "idle");
    b.put(&COMMAND);
    b.write(0x4c, 1);
    assert_eq!(b.read(0x4c), 0, "not while idle");
    b.write(0x40, 1);
    assert_eq!((b.read(0x40), b.read(0x44)), (0, 0));
    b.write(0x4c, 1);
    assert_eq!(b.commands.recv().unwrap(), COMMAND);
    assert_eq!(b.read(0x4c), 1);
    b.put(&[0; 12]);
    b.write(0x4c, 1);
    b.write(0x40, 2);
    assert_eq!((b.get(12), b.read(0x44)), (COMMAND.to_vec(), 0), "nothing changes while it is executed");
    let response = [0x80, 1, 0, 0, 0, 14, 0, 0, 0, 0, 0, 2, 0xaa, 0xbb];
    b.responses.send(Ok(response.to_vec())).unwrap();
    b.wait();
    assert_eq!(b.get(14), response);
    assert!(b.commands.try_recv().is_err(), "once");
    b.write(0x40, 2);
    assert_eq!(b.read(0x44), 2);
}

#[test]
fn a_size_that_cannot_be_is_an_error_of_the_command() {
    let b = bench();
    b.write(0x40, 1);
    for size in [0u32, 9, 0xf81, u32::MAX] {
        let mut command = COMMAND;
        command[2..6].copy_from_slice(&size.to_be_bytes());
        b.put(&command);
        b.write(0x4c, 1);
        b.wait();
        assert_eq!(b.get(10), [0x80, 1, 0, 0, 0, 10, 0, 0, 1, 0x42], "{size}");
    }
    assert!(b.commands.try_recv().is_err());
}

#[test]
fn a_tpm_that_fails_stays_failed() {
    for bad in [Err(io::ErrorKind::BrokenPipe.into()), Ok(vec![0; 0xf81])] {
        let b = bench();
        b.write(0x40, 1);
        b.responses.send(bad).unwrap();
        b.put(&COMMAND);
        b.write(0x4c, 1);
        b.wait();
        assert_eq!(b.get(10), [0x80, 1, 0, 0, 0, 10, 0, 0, 1, 1]);
        assert_eq!(b.read(0x44) & 1, 1);
    }
}

#[test]
fn presence_is_memory() {
    let memory = Presence::new();
    memory.write(0x105, AccessSize::Dword, 0x1234_5678);
    memory.write(0x15a, AccessSize::Byte, 1);
    assert_eq!(memory.read(0x104, AccessSize::Qword), 0x12_3456_7800);
    assert_eq!(memory.read(0x15a, AccessSize::Byte), 1);
    memory.write(PRESENCE_SIZE - 1, AccessSize::Qword, u64::MAX);
    assert_eq!(memory.read(PRESENCE_SIZE - 1, AccessSize::Qword), 0xff);
    assert_eq!(firmware_config(), [0, 0x50, 0xd4, 0xfe, 2, 1]);
}

#[test]
fn garbage_does_no_harm() {
    let mut garbage = Garbage(11);
    let b = bench();
    let presence = Presence::new();
    // Whatever is started is answered with something else.
    let responses = b.responses.clone();
    for _ in 0..200_000 {
        garbage.access(&*b.tpm, 0x80);
        garbage.access(&*b.tpm, SIZE);
        garbage.access(&*presence, PRESENCE_SIZE);
        if b.commands.try_recv().is_ok() {
            let len = garbage.next() as usize % 0x1100;
            let _ = responses.send(Ok((0..len).map(|at| at as u8).collect()));
        }
    }
}
