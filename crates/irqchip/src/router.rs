//! Which inputs of the chips an interrupt line reaches.
//!
//! Lines are numbered as global system interrupts. Lines 0 to 15 are ISA's: they reach the 8259 pair's input of the same
//! number and the I/O APIC's pin of the same number, except that line 0 (the timer) is wired to pin 2. Lines from 16 on
//! reach only the I/O APIC. Every input of a chip is wired-OR, so sources never take each other's level away.
//!
//! A PCI interrupt router (PIRQ) needs another pairing: an 8259 input that software chooses, together with a pin from
//! 16 on. It builds it from [`IrqRouter::pic_source`] and [`IrqRouter::ioapic_source`].

use std::sync::Arc;

use platform::state::{StateError, decode, encode};
use platform::{IrqLine, IrqSink, Persist};

use crate::ioapic::IoApic;
use crate::lines::SharedLine;
use crate::pic::{PIC_INPUTS, Pic};

const KIND: &str = "irq-router";
const VERSION: u32 = 1;

/// The 8259 pair's cascade, which no line reaches.
const CASCADE: u32 = 2;
/// The I/O APIC's pin for ISA line 0.
const TIMER_PIN: u32 = 2;

/// Routes lines to the 8259 pair and the I/O APIC.
pub struct IrqRouter {
    pic: Vec<Arc<SharedLine>>,
    pins: Vec<Arc<SharedLine>>,
    lines: Vec<Line>,
}

/// One global system interrupt: its line, and the router's own source on it.
struct Line {
    shared: Arc<SharedLine>,
    own: IrqLine,
}

impl IrqRouter {
    /// A router in front of the two chips.
    pub fn new(pic: &Arc<Pic>, ioapic: &Arc<IoApic>) -> Self {
        Self::over(pic.clone(), ioapic.clone(), ioapic.pins())
    }

    /// A router in front of chips that live elsewhere: the 16 inputs of an 8259 pair, and an I/O APIC with `pins` pins.
    pub fn over(pic: Arc<dyn IrqSink>, ioapic: Arc<dyn IrqSink>, pins: u32) -> Self {
        let inputs = |sink: Arc<dyn IrqSink>, count| -> Vec<_> {
            (0..count).map(|input| SharedLine::new(vec![IrqLine::new(sink.clone(), input)])).collect()
        };
        let lines = pins.max(PIC_INPUTS);
        let pic_inputs = inputs(pic, PIC_INPUTS);
        let pins = inputs(ioapic, pins);
        let lines = (0..lines).map(|line| {
            let pic_input = pic_inputs.get(line as usize).filter(|_| line != CASCADE);
            let pin = if line == 0 { TIMER_PIN } else { line };
            let pin = pins.get(pin as usize);
            let shared = SharedLine::new(pic_input.into_iter().chain(pin).map(SharedLine::source).collect());
            Line { own: shared.source(), shared }
        });
        Self { lines: lines.collect(), pic: pic_inputs, pins }
    }

    /// Number of lines.
    pub fn lines(&self) -> u32 {
        self.lines.len() as u32
    }

    /// A new source on line `line`; `None` if there is no such line.
    ///
    /// [`IrqSink::set_level`] of the router itself is one more source of every line. Devices that share a line each
    /// need a source of their own.
    pub fn source(&self, line: u32) -> Option<IrqLine> {
        Some(self.lines.get(line as usize)?.shared.source())
    }

    /// A new source on input `input` of the 8259 pair alone; `None` for the cascade and beyond 15.
    pub fn pic_source(&self, input: u32) -> Option<IrqLine> {
        Some(self.pic.get(input as usize).filter(|_| input != CASCADE)?.source())
    }

    /// A new source on pin `pin` of the I/O APIC alone; `None` beyond its last pin.
    pub fn ioapic_source(&self, pin: u32) -> Option<IrqLine> {
        Some(self.pins.get(pin as usize)?.source())
    }

    fn shared(&self) -> impl Iterator<Item = &Arc<SharedLine>> {
        self.pic.iter().chain(&self.pins).chain(self.lines.iter().map(|line| &line.shared))
    }
}

impl IrqSink for IrqRouter {
    fn set_level(&self, line: u32, asserted: bool) {
        if let Some(line) = self.lines.get(line as usize) {
            line.own.set(asserted);
        }
    }
}

/// The state is the level of every source, in the order in which the sources were made: it fits a board that was built
/// the same way.
impl Persist for IrqRouter {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let levels: Vec<_> = self.shared().map(|line| line.levels()).collect();
        encode(KIND, &levels)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let levels: Vec<Vec<bool>> = decode(KIND, VERSION, version, bytes)?;
        let same = levels.len() == self.shared().count()
            && levels.iter().zip(self.shared()).all(|(levels, line)| levels.len() == line.levels().len());
        if !same {
            return Err(StateError::Invalid { kind: KIND, why: "the lines have other sources".into() });
        }
        for (levels, line) in levels.into_iter().zip(self.shared()) {
            line.restore(levels);
        }
        Ok(())
    }

    /// Nothing: levels belong to the devices that drive them.
    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use platform::{AccessSize, BusDevice};

    use super::*;
    use crate::message::{Message, MessageSink};

    #[derive(Default)]
    struct Vectors(Mutex<Vec<u8>>);
    impl MessageSink for Vectors {
        fn deliver(&self, message: &Message) -> bool {
            self.0.lock().unwrap().push(message.vector);
            true
        }
    }

    struct Board {
        router: IrqRouter,
        pic: Arc<Pic>,
        sent: Arc<Vectors>,
    }

    /// An I/O APIC whose pin `n` sends vector 0x40 + n, and a PIC whose requests can be read.
    fn board() -> Board {
        let (pic, sent) = (Arc::new(Pic::new()), Arc::new(Vectors::default()));
        let ioapic = Arc::new(IoApic::new(24, false, sent.clone()));
        for pin in 0..24 {
            ioapic.write(0, AccessSize::Dword, 0x10 + 2 * pin);
            ioapic.write(0x10, AccessSize::Dword, 0x40 + pin);
        }
        Board { router: IrqRouter::new(&pic, &ioapic), pic, sent }
    }

    fn requests(pic: &Arc<Pic>) -> u64 {
        let ports = platform::Bus::new("port");
        pic.map(&ports).unwrap();
        ports.read(0x20, AccessSize::Byte).unwrap() | ports.read(0xa0, AccessSize::Byte).unwrap() << 8
    }

    #[test]
    fn isa_lines_reach_both_chips() {
        let board = board();
        for line in [0, 1, 2, 9, 15, 16, 23, 24, 99] {
            board.router.set_level(line, true);
        }
        assert_eq!(*board.sent.0.lock().unwrap(), [0x42, 0x41, 0x49, 0x4f, 0x50, 0x57], "2 shares its pin with 0");
        assert_eq!(requests(&board.pic), 1 << 0 | 1 << 1 | 1 << 9 | 1 << 15);
    }

    #[test]
    fn sources_are_wired_or_and_separable() {
        let board = board();
        let router = &board.router;
        let (a, b) = (router.source(10).unwrap(), router.pic_source(10).unwrap());
        let pin = router.ioapic_source(17).unwrap();
        a.set(true);
        b.set(true);
        pin.pulse();
        a.pulse();
        a.set(true);
        assert_eq!(*board.sent.0.lock().unwrap(), [0x4a, 0x51, 0x4a]);
        assert_eq!(requests(&board.pic), 1 << 10);
        assert!(router.pic_source(2).is_none() && router.pic_source(16).is_none());
        assert!(router.ioapic_source(24).is_none() && router.source(24).is_none());
    }

    #[test]
    fn state_fits_only_the_same_wiring() {
        let (one, two) = (board(), board());
        let source = one.router.source(5).unwrap();
        source.set(true);
        let bytes = one.router.save().unwrap();
        assert!(matches!(two.router.restore(1, &bytes), Err(StateError::Invalid { .. })));
        let twin = two.router.source(5).unwrap();
        two.router.restore(1, &bytes).unwrap();
        twin.set(true);
        assert!(two.sent.0.lock().unwrap().is_empty(), "the level was there already");
    }
}
