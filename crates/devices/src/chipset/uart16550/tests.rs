use super::regs::*;
use super::*;
use crate::chipset::fixture::{Bytewise, Garbage, Lines, check_state};

/// A host that takes as much output as it has room for.
#[derive(Default)]
struct Host {
    output: Mutex<Vec<u8>>,
    room: Mutex<usize>,
    resumed: Mutex<usize>,
}

impl Host {
    fn new(room: usize) -> Arc<Self> {
        Arc::new(Self { room: Mutex::new(room), ..Default::default() })
    }
    fn output(&self) -> Vec<u8> {
        std::mem::take(&mut self.output.lock().unwrap())
    }
    fn resumed(&self) -> usize {
        std::mem::take(&mut self.resumed.lock().unwrap())
    }
}

impl SerialBackend for Host {
    fn send(&self, bytes: &[u8]) -> usize {
        let mut room = self.room.lock().unwrap();
        let taken = bytes.len().min(*room);
        *room -= taken;
        self.output.lock().unwrap().extend(&bytes[..taken]);
        taken
    }
    fn attach(&self, device: Weak<dyn SerialDevice>) {
        assert!(device.upgrade().is_some());
    }
    fn resume_input(&self) {
        *self.resumed.lock().unwrap() += 1;
    }
}

struct Bench {
    uart: Arc<Uart16550>,
    host: Arc<Host>,
    lines: Arc<Lines>,
}

fn bench(room: usize) -> Bench {
    let (host, lines) = (Host::new(room), Lines::new());
    let uart = Uart16550::new(lines.line(4), Some(host.clone()));
    Bench { uart, host, lines }
}

impl Bench {
    fn fifos(self) -> Self {
        self.uart.outb(offset::FCR, fcr::ENABLE | fcr::RESET_RX | fcr::RESET_TX);
        self
    }
    fn iir(&self) -> u8 {
        self.uart.inb(offset::IIR) & !iir::FIFO_ENABLED
    }
    fn lsr(&self) -> u8 {
        self.uart.inb(offset::LSR)
    }
    fn read_all(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.lsr() & lsr::DATA_READY != 0 {
            bytes.push(self.uart.inb(offset::DATA));
        }
        bytes
    }
}

#[test]
fn power_on_registers() {
    let Bench { uart, .. } = bench(100);
    let registers: Vec<u8> = (0..8).map(|register| uart.inb(register)).collect();
    assert_eq!(registers, [0, 0, 0x01, 0, 0, 0x60, 0xb0, 0]);
    uart.outb(offset::LCR, lcr::DLAB | 3);
    assert_eq!(uart.read(0, AccessSize::Word), 12, "9600 baud");
    uart.write(0, AccessSize::Word, 0x1234);
    assert_eq!((uart.inb(0), uart.inb(1)), (0x34, 0x12));
    uart.outb(offset::LCR, 3);
    assert_eq!(uart.inb(offset::IER), 0, "the divisor latch is elsewhere");
    for register in [offset::IER, offset::MCR, offset::SCR] {
        uart.outb(register, 0xff);
    }
    assert_eq!((uart.inb(offset::IER), uart.inb(offset::MCR), uart.inb(offset::SCR)), (0x0f, 0x1f, 0xff));
}

#[test]
fn drivers_recognise_a_16550a() {
    let Bench { uart, .. } = bench(0);
    uart.outb(offset::FCR, fcr::ENABLE);
    assert_eq!(uart.inb(offset::IIR) >> 6, 3);
    uart.outb(offset::FCR, !fcr::ENABLE);
    assert_eq!(uart.inb(offset::IIR) >> 6, 0);
}

#[test]
fn output_leaves_at_once_and_interrupts() {
    let b = bench(100).fifos();
    b.uart.outb(offset::IER, ier::THR_EMPTY);
    assert_eq!(b.lines.take(), [(4, true)], "enabling it with an empty transmitter raises it");
    assert_eq!(b.iir(), iir::THR_EMPTY);
    assert_eq!(b.lines.take(), [(4, false)], "reading IIR acknowledges it");
    assert_eq!(b.iir(), iir::NONE);
    b.uart.outb(offset::DATA, b'a');
    assert_eq!(b.lines.take(), [(4, true)]);
    b.uart.outb(offset::DATA, b'b');
    assert_eq!(b.lines.take(), [(4, false), (4, true)], "an edge for each byte that has left");
    assert_eq!(b.host.output(), b"ab");
    assert_eq!(b.lsr(), lsr::THR_EMPTY | lsr::TRANSMITTER_EMPTY);
    b.uart.outb(offset::IER, 0);
    assert_eq!(b.lines.take(), [(4, false)]);
}

#[test]
fn output_waits_for_a_slow_host() {
    let b = bench(2).fifos();
    b.uart.outb(offset::IER, ier::THR_EMPTY);
    b.iir();
    b.lines.take();
    let text: Vec<u8> = (0..20).collect();
    for &byte in &text {
        b.uart.outb(offset::DATA, byte);
    }
    assert_eq!(b.host.output(), text[..2]);
    assert_eq!(b.lsr(), 0, "the transmitter is busy");
    b.iir();
    b.lines.take();
    *b.host.room.lock().unwrap() = 10;
    b.uart.output_ready();
    assert_eq!((b.lsr(), b.lines.take()), (0, vec![]));
    *b.host.room.lock().unwrap() = 100;
    b.uart.output_ready();
    assert_eq!(b.lines.take(), [(4, true)]);
    assert_eq!(b.host.output(), text[2..18], "16 bytes waited; what came on top is lost");
    assert_eq!(b.lsr(), 0x60);
}

#[test]
fn a_port_without_backend_swallows_output() {
    let uart = Uart16550::new(Lines::new().line(3), None);
    for _ in 0..100 {
        uart.outb(offset::DATA, b'x');
        assert_eq!(uart.inb(offset::LSR), 0x60);
    }
}

#[test]
fn input_interrupts_by_trigger_level_or_timeout() {
    for (setting, level) in [(0x00, 1), (0x40, 4), (0x80, 8), (0xc0, 14)] {
        let b = bench(0).fifos();
        b.uart.outb(offset::FCR, fcr::ENABLE | setting);
        b.uart.outb(offset::IER, ier::RECEIVED);
        for count in 1..=16 {
            assert_eq!(b.uart.receive(&[count]), 1);
            let expected = if usize::from(count) < level { iir::TIMEOUT } else { iir::RECEIVED };
            assert_eq!(b.iir(), expected, "{count} bytes, trigger level {level}");
        }
        assert_eq!(b.lines.take(), [(4, true)]);
        assert_eq!(b.uart.receive(&[17]), 0, "full");
        assert_eq!(b.read_all(), (1..=16).collect::<Vec<u8>>());
        assert_eq!(b.lines.take(), [(4, false)]);
        assert_eq!(b.iir(), iir::NONE);
    }
}

#[test]
fn input_is_asked_for_when_there_is_room() {
    let b = bench(0).fifos();
    assert_eq!(b.uart.receive(&[0; 20]), 16);
    for _ in 0..7 {
        b.uart.inb(offset::DATA);
    }
    assert_eq!(b.host.resumed(), 0);
    b.uart.inb(offset::DATA);
    assert_eq!(b.host.resumed(), 1);
    b.read_all();
    assert_eq!(b.host.resumed(), 0, "nothing waits any more");

    let b = bench(0);
    assert_eq!(b.uart.receive(b"xy"), 1, "without FIFOs there is one buffer");
    b.uart.outb(offset::MCR, mcr::LOOPBACK);
    b.uart.inb(offset::DATA);
    assert_eq!((b.uart.receive(b"y"), b.host.resumed()), (0, 0), "loopback disconnects the receiver");
    b.uart.outb(offset::MCR, 0);
    assert_eq!(b.host.resumed(), 1);
    b.uart.receive(b"yz");
    b.uart.outb(offset::FCR, fcr::ENABLE);
    assert_eq!(b.host.resumed(), 1, "switching FIFOs empties them");
}

#[test]
fn loopback_of_data_and_overrun() {
    let b = bench(100);
    b.uart.outb(offset::MCR, mcr::LOOPBACK);
    b.uart.outb(offset::IER, ier::LINE_STATUS | ier::RECEIVED);
    b.uart.outb(offset::DATA, 1);
    assert_eq!(b.iir(), iir::RECEIVED);
    b.uart.outb(offset::DATA, 2);
    assert_eq!(b.iir(), iir::LINE_STATUS);
    assert_eq!(b.lsr(), 0x60 | lsr::DATA_READY | lsr::OVERRUN);
    assert_eq!(b.lsr(), 0x60 | lsr::DATA_READY, "reading clears the error");
    assert_eq!(b.uart.inb(offset::DATA), 2, "the buffer was overwritten");

    let b = b.fifos();
    for byte in 0..17 {
        b.uart.outb(offset::DATA, byte);
    }
    assert_eq!(b.lsr() & lsr::OVERRUN, lsr::OVERRUN);
    assert_eq!(b.read_all(), (0..16).collect::<Vec<u8>>(), "the FIFO keeps what it has");
    assert_eq!(b.host.output(), [], "nothing leaves");
}

#[test]
fn break_in_loopback() {
    let b = bench(0).fifos();
    b.uart.outb(offset::MCR, mcr::LOOPBACK);
    b.uart.outb(offset::DATA, b'a');
    b.uart.outb(offset::LCR, lcr::BREAK | 3);
    b.uart.outb(offset::LCR, 3);
    assert_eq!(b.lsr(), 0x60 | lsr::DATA_READY | lsr::FIFO_ERROR, "the error is behind a good character");
    assert_eq!(b.uart.inb(offset::DATA), b'a');
    b.uart.outb(offset::IER, ier::LINE_STATUS);
    assert_eq!(b.iir(), iir::LINE_STATUS);
    assert_eq!(b.lsr(), 0x60 | lsr::DATA_READY | lsr::FIFO_ERROR | lsr::BREAK | lsr::FRAMING);
    assert_eq!(b.iir(), iir::NONE);
    assert_eq!(b.uart.inb(offset::DATA), 0);
}

#[test]
fn modem_status() {
    let b = bench(0);
    b.uart.outb(offset::IER, ier::MODEM_STATUS);
    b.uart.outb(offset::MCR, mcr::LOOPBACK);
    assert_eq!(b.iir(), iir::MODEM_STATUS);
    assert_eq!(b.uart.inb(offset::MSR), msr::DELTA_CTS | msr::DELTA_DSR | msr::DELTA_DCD, "our outputs are off");
    assert_eq!((b.iir(), b.lines.take()), (iir::NONE, vec![(4, true), (4, false)]));
    for (output, line, delta) in [
        (mcr::RTS, msr::CTS, msr::DELTA_CTS),
        (mcr::DTR, msr::DSR, msr::DELTA_DSR),
        (mcr::OUT1, msr::RI, 0),
        (mcr::OUT2, msr::DCD, msr::DELTA_DCD),
    ] {
        b.uart.outb(offset::MCR, mcr::LOOPBACK | output);
        assert_eq!(b.uart.inb(offset::MSR), line | delta);
        b.uart.outb(offset::MCR, mcr::LOOPBACK);
        assert_eq!(b.uart.inb(offset::MSR), if delta == 0 { msr::TERI } else { delta });
    }
    b.uart.outb(offset::MCR, 0);
    assert_eq!(b.uart.inb(offset::MSR) & !msr::DELTAS, msr::CTS | msr::DSR | msr::DCD);
}

#[test]
fn state_survives() {
    let b = bench(0).fifos();
    b.uart.outb(offset::IER, ier::RECEIVED | ier::THR_EMPTY);
    b.uart.outb(offset::SCR, 0x5a);
    b.uart.receive(b"input");
    b.uart.outb(offset::DATA, b'o');
    let other = bench(100);
    other.uart.restore(VERSION, &b.uart.save().unwrap()).unwrap();
    assert_eq!(other.lines.take(), []);
    assert_eq!(other.host.output(), b"o", "output that waited finds its way");
    assert_eq!(other.read_all(), b"input");
    assert_eq!(other.uart.inb(offset::SCR), 0x5a);
    other.uart.reset();
    assert_eq!(other.uart.inb(offset::SCR), 0);
    assert!(other.lines.take().ends_with(&[(4, false)]));
}

#[test]
fn garbage() {
    let mut garbage = Garbage(1);
    let b = bench(0);
    for round in 0..20_000u64 {
        garbage.access(&*b.uart, LENGTH);
        if round % 3 == 0 {
            let bytes = garbage.next().to_le_bytes();
            assert!(b.uart.receive(&bytes) <= 8);
            *b.host.room.lock().unwrap() = (garbage.next() % 4) as usize;
            b.uart.output_ready();
        }
        if round % 1000 == 0 {
            *b.host.room.lock().unwrap() = 0;
            check_state(&*b.uart, &b.lines, &mut garbage);
        }
    }
}

#[test]
fn a_line_to_a_real_host_loses_nothing() {
    use std::io::{Read, Write};
    let tty = backend::tty::TtySpec::parse("tcp=0").unwrap().open().unwrap();
    let mut client = std::net::TcpStream::connect(tty.local_address().unwrap()).unwrap();
    let uart = Uart16550::new(Lines::new().line(4), Some(Arc::new(tty)));
    uart.outb(offset::FCR, fcr::ENABLE);
    let text: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    std::thread::scope(|scope| {
        // The guest echoes what it hears.
        scope.spawn(|| {
            let mut left = text.len();
            while left > 0 {
                if uart.inb(offset::LSR) & lsr::DATA_READY == 0 {
                    std::thread::yield_now();
                    continue;
                }
                let byte = uart.inb(offset::DATA);
                uart.outb(offset::DATA, byte);
                left -= 1;
            }
        });
        client.write_all(&text).unwrap();
        let mut echo = vec![0; text.len()];
        client.read_exact(&mut echo).unwrap();
        assert!(echo == text);
    });
}
