//! Configuration space as a guest sees it: both ways in, identities, BARs, interrupts, the two bridges.

use std::sync::{Arc, Mutex};

use platform::AccessSize::{self, Byte, Dword, Qword, Word};
use platform::{MsiMessage, Persist, StateError};
use testkit::conformance;
use testkit::pci::{GuestBar, GuestFunction};

use super::*;
use crate::testboard::TestBoard;

/// A device that remembers accesses to its BARs.
#[derive(Default)]
struct Probe {
    seen: Mutex<Vec<(usize, u64, u64)>>,
    endpoint: Option<Arc<PciEndpoint>>,
}

impl PciDevice for Probe {
    fn bar_read(&self, bar: usize, offset: u64, _: AccessSize) -> u64 {
        (bar as u64) << 16 | offset
    }
    fn bar_write(&self, bar: usize, offset: u64, _: AccessSize, value: u64) {
        self.seen.lock().unwrap().push((bar, offset, value));
    }
}

impl Persist for Probe {
    fn kind(&self) -> &'static str {
        "probe"
    }
    fn version(&self) -> u32 {
        1
    }
    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }
    fn restore(&self, _: u32, _: &[u8]) -> Result<(), StateError> {
        Ok(())
    }
    fn reset(&self) {
        if let Some(endpoint) = &self.endpoint {
            endpoint.set_intx(false);
        }
    }
}

/// BAR0 ports, BAR1 MSI-X, BAR2 64-bit memory; MSI-X and MSI.
fn probe_spec() -> FunctionSpec {
    FunctionSpec::new(Identity { vendor: 0x1234, device: 0x5678, class: (0x01, 0x02, 0x03), ..Identity::default() })
        .with_bar(0, Bar::new(BarKind::Io, 32))
        .with_bar(2, Bar::new(BarKind::Memory64, 0x1000))
        .with_capability(Capability::Msix { vectors: 3, bar: 1 })
        .with_capability(Capability::Msi(1))
        .with_intx()
}

fn board_with_probes(slots: &[(u8, u8)]) -> (TestBoard, Vec<Arc<PciEndpoint>>) {
    let board = TestBoard::bare();
    let endpoints = slots
        .iter()
        .map(|(slot, func)| {
            let endpoint = board.pci.endpoint(PciAddress::new(0, *slot, *func).unwrap(), probe_spec());
            let probe = Probe { endpoint: Some(endpoint.clone()), ..Probe::default() };
            board.pci.add(PciFunction::new(endpoint.clone(), Arc::new(probe))).unwrap();
            endpoint
        })
        .collect();
    board.pci.finish().unwrap();
    (board, endpoints)
}

#[test]
fn absent_functions_read_ones_and_swallow_writes() {
    let (board, _) = board_with_probes(&[(3, 0)]);
    assert_eq!(board.guest(3, 0).config32(0), 0x5678_1234);
    for (slot, func) in [(3, 1), (4, 0), (31, 7)] {
        let absent = board.guest(slot, func);
        absent.set_config(4, Word, 7);
        assert_eq!(absent.config32(0), u32::MAX);
        assert_eq!(absent.config(0xe, Byte), 0xff);
    }
}

#[test]
fn the_address_port_wants_dwords_and_its_enable_bit() {
    let (board, _) = board_with_probes(&[(3, 0)]);
    let read = |port, size| board.ports.read(port, size).unwrap();
    board.ports.write(0xcf8, Dword, 0xffff_ffff);
    assert_eq!(read(0xcf8, Dword), 0x80ff_fffc);
    board.ports.write(0xcf8, Dword, 0x8000_1802);
    assert_eq!(read(0xcf8, Dword), 0x8000_1800);
    board.ports.write(0xcf8, Word, 0);
    board.ports.write(0xcf8, Byte, 0);
    assert_eq!(read(0xcfc, Dword), 0x5678_1234, "narrow writes do not reach it");
    assert_eq!((read(0xcf8, Word), read(0xcfa, Byte)), (0xffff, 0xff));
    assert_eq!((read(0xcfe, Word), read(0xcfd, Byte)), (0x5678, 0x12));
    assert_eq!(read(0xcfd, Word), 0xffff, "unaligned");
    board.ports.write(0xcf8, Dword, 0x1800);
    assert_eq!(read(0xcfc, Dword), 0xffff_ffff, "not enabled");
}

#[test]
fn port_cf9_is_the_reset_control() {
    let (board, _) = board_with_probes(&[]);
    assert_eq!(board.ports.read(0xcf9, Byte), Some(6));
    board.ports.write(0xcf9, Byte, 0x0e);
    board.ports.write(0xcf9, Word, 0x0606);
    assert_eq!(*board.reset_control.0.lock().unwrap(), [0x0e], "bytes only");
}

#[test]
fn memory_mapped_configuration_reaches_the_same_registers() {
    let (board, _) = board_with_probes(&[(3, 0)]);
    let at = |offset: u64| 0xe000_0000 + (3 << 15) + offset;
    let read = |address, size| board.memory.read(address, size).unwrap();
    assert_eq!(read(at(0), Dword), 0x5678_1234);
    assert_eq!(read(at(0), Qword) as u32, 0x5678_1234);
    assert_eq!(read(at(2), Word), 0x5678);
    board.memory.write(at(0x3c), Byte, 0x5a);
    assert_eq!(board.guest(3, 0).config(0x3c, Byte), 0x5a);
    board.memory.write(at(0x38), Qword, 0x77 << 32);
    assert_eq!(board.guest(3, 0).config(0x3c, Byte), 0x77);
    assert_eq!(read(at(0x100), Dword), 0, "no extended capabilities");
    assert_eq!(read(at(0x104), Dword), 0xffff_ffff);
    assert_eq!(read(at(0x1000), Dword), 0xffff_ffff, "function 1 is absent");
    assert_eq!(read(0xefff_fffc, Dword), 0xffff_ffff, "bus 255, the last register");
}

#[test]
fn read_only_registers_stay() {
    let (board, _) = board_with_probes(&[(3, 0)]);
    let guest = board.guest(3, 0);
    let before = guest.config_bytes();
    for offset in 0..64 {
        guest.set_config(offset * 4, Dword, 0);
    }
    for range in [0..4, 6..0xc, 0x2c..0x30, 0x34..0x35] {
        assert_eq!(guest.config_bytes()[range.clone()], before[range.clone()], "{range:x?}");
    }
    assert_eq!(before[8..12], [0, 3, 2, 1], "revision and class");
}

#[test]
fn multi_function_is_set_where_a_slot_has_more_than_function_0() {
    let (board, _) = board_with_probes(&[(3, 0), (4, 0), (4, 5)]);
    assert_eq!(board.guest(3, 0).config(0xe, Byte), 0);
    assert_eq!(board.guest(4, 0).config(0xe, Byte), 0x80);
    assert_eq!(board.guest(4, 5).config(0xe, Byte), 0x80);
    let pins = [(3, 0), (4, 0), (4, 5)].map(|(slot, func)| board.guest(slot, func).config(0x3d, Byte));
    assert_eq!(pins, [1, 1, 2]);
}

#[test]
fn bars_move_and_follow_the_command_register() {
    let (board, _) = board_with_probes(&[(3, 0)]);
    let guest = board.guest(3, 0);
    let (io, msix, mem) = (guest.bar(0), guest.bar(1), guest.bar(2));
    assert_eq!(io, GuestBar { io: true, start: 0x2000 });
    assert_eq!((msix.start, mem.start), (0xc000_0000, 0xc000_2000));
    assert_eq!(guest.read(mem, 0x10, Dword), 0x2_0010);

    guest.set_command(0);
    assert_eq!(guest.read(mem, 0x10, Dword), 0xffff_ffff, "decoding is off");
    guest.set_config(0x18, Dword, 0xd000_1234);
    guest.set_config(0x1c, Dword, 0x1);
    guest.set_config(0x10, Dword, 0x3000);
    guest.set_command(2);
    let moved = guest.bar(2);
    assert_eq!(moved, GuestBar { io: false, start: 0x1_d000_1000 });
    assert_eq!(guest.read(moved, 0x10, Dword), 0x2_0010);
    assert_eq!(guest.read(guest.bar(0), 4, Dword), 0xffff_ffff, "ports are still off");
    guest.set_command(3);
    assert_eq!(guest.read(guest.bar(0), 4, Dword), 4);
    guest.set_config(0x10, Dword, 0x4000);
    assert_eq!(board.ports.read(0x3004, Dword), None, "moved while decoding");
    assert_eq!(board.ports.read(0x4004, Dword), Some(4));
}

#[test]
fn bars_over_each_other_or_over_anything_do_no_harm() {
    let (board, _) = board_with_probes(&[(3, 0), (4, 0)]);
    let (one, two) = (board.guest(3, 0), board.guest(4, 0));
    let (first, second) = (one.bar(0), two.bar(0));
    // Swapped while both decode, which makes them meet on the way.
    one.set_config(0x10, Dword, second.start as u32);
    two.set_config(0x10, Dword, first.start as u32);
    assert_eq!(two.read(first, 8, Byte), 8);
    assert_eq!(one.read(second, 8, Byte), 8, "both decode in the end");
    for address in [0xcf8, 0xfffc, 0, 0xffff_fffc] {
        one.set_config(0x10, Dword, address);
    }
    for address in [0xe000_0000u32, 0xffff_f000, 0, 0xfff0_0000] {
        one.set_config(0x18, Dword, address);
        one.set_config(0x1c, Dword, u32::MAX);
        one.set_config(0x1c, Dword, 0);
    }
    assert_eq!(board.guest(4, 0).config32(0), 0x5678_1234, "configuration still answers");
}

#[test]
fn without_firmware_to_enable_them_bars_decode_from_the_start_else_not() {
    let (board, _) = board_with_probes(&[(3, 0)]);
    assert_eq!(board.guest(3, 0).config(4, Word), 7);
    let quiet = TestBoard::bare();
    let host = PciHost::new(PciHostOptions {
        ports: quiet.ports.clone(),
        memory: quiet.memory.clone(),
        msi: quiet.msi.clone(),
        router: quiet.pci.router().clone(),
        reset_control: quiet.reset_control.clone(),
        ram: quiet.ram.clone(),
        enable_bars: false,
    });
    let endpoint = host.endpoint(PciAddress::new(0, 3, 0).unwrap(), probe_spec());
    host.add(PciFunction::new(endpoint, Arc::new(Probe::default()))).unwrap();
    host.finish().unwrap();
    let guest = quiet.guest(3, 0);
    assert_eq!(guest.config(4, Word), 4);
    assert_eq!(guest.bar(0).start, 0x2000, "assigned all the same");
    assert_eq!(quiet.ports.read(0x2000, Dword), None);
}

#[test]
fn the_interrupt_pin_obeys_disable_msi_and_msix() {
    let (board, endpoints) = board_with_probes(&[(3, 0)]);
    let guest = board.guest(3, 0);
    let irq = guest.config(0x3c, Byte);
    endpoints[0].set_intx(true);
    assert!(board.ioapic.level(16) && board.pic.level(irq));
    assert_eq!(guest.config(6, Word) & 8, 8, "interrupt status");
    assert_eq!(guest.config32(4) & 8 << 16, 8 << 16);
    assert_eq!(guest.config(6, Byte) & 8, 8);
    guest.set_command(0x407);
    assert!(!board.ioapic.any() && !board.pic.any(), "INTx disable");
    assert_eq!(guest.config(6, Word) & 8, 8, "the status does not depend on it");
    guest.set_command(7);
    assert!(board.ioapic.level(16));
    guest.enable_msix(0);
    assert!(!board.ioapic.any(), "MSI-X is on");
    guest.set_config(guest.capabilities(0x11)[0] + 2, Word, 0);
    assert!(board.ioapic.level(16));
    guest.set_config(guest.capabilities(5)[0] + 2, Word, 1);
    assert!(!board.ioapic.any(), "MSI is on");
    endpoints[0].set_intx(false);
    guest.set_config(guest.capabilities(5)[0] + 2, Word, 0);
    assert!(!board.ioapic.any());
    assert_eq!(guest.config(6, Word) & 8, 0);
}

#[test]
fn msix_masks_hold_messages_back_and_unmasking_sends_them() {
    let (board, endpoints) = board_with_probes(&[(3, 0)]);
    let guest = board.guest(3, 0);
    let message = |data| MsiMessage { address: 0xfee0_0000, data };
    endpoints[0].send_msix(0);
    assert_eq!(guest.enable_msix(0x40), 3);
    assert!(board.msi.take().is_empty(), "nothing is kept while MSI-X is off");
    let (control, table) = (guest.capabilities(0x11)[0] + 2, guest.bar(1));
    endpoints[0].send_msix(2);
    assert_eq!(board.msi.take(), [message(0x42)]);

    guest.write(table, 16 + 12, Dword, 1);
    endpoints[0].send_msix(1);
    endpoints[0].send_msix(1);
    let pending = |_: ()| guest.read(table, 0x1000, Qword);
    assert_eq!((board.msi.take().len(), pending(())), (0, 0b10));
    guest.write(table, 16 + 8, Dword, 0x99);
    guest.write(table, 16 + 12, Dword, 0);
    assert_eq!(board.msi.take(), [message(0x99)], "once, with what the entry says now");
    assert_eq!(pending(()), 0);

    guest.set_config(control, Word, 0xc000);
    endpoints[0].send_msix(0);
    assert_eq!((board.msi.take().len(), pending(())), (0, 1), "function mask");
    guest.set_config(control, Word, 0x8000);
    assert_eq!(board.msi.take(), [message(0x40)]);
    endpoints[0].send_msix(3);
    assert!(board.msi.take().is_empty(), "no such vector");
    guest.write(table, 0x1000, Qword, u64::MAX);
    assert_eq!(pending(()), 0, "pending bits are read-only");
    assert_eq!(guest.read(table, 12, Byte), 0, "dwords and qwords only");
    assert_eq!(guest.read(table, 8, Qword), 0x40);
}

#[test]
fn msi_sends_its_message() {
    let (board, endpoints) = board_with_probes(&[(3, 0)]);
    let guest = board.guest(3, 0);
    let at = guest.capabilities(5)[0];
    guest.set_config(at + 4, Dword, 0xfee0_1000);
    guest.set_config(at + 12, Word, 0x31);
    endpoints[0].send_msi(0);
    assert!(board.msi.take().is_empty());
    guest.set_config(at + 2, Word, 1);
    endpoints[0].send_msi(0);
    assert_eq!(board.msi.take(), [MsiMessage { address: 0xfee0_1000, data: 0x31 }]);
}

#[test]
fn a_restored_interrupt_pin_makes_no_edge() {
    let (board, endpoints) = board_with_probes(&[(3, 0)]);
    endpoints[0].set_intx(true);
    let function = |board: &TestBoard| board.pci.function(PciAddress::new(0, 3, 0).unwrap()).unwrap();
    let saved = function(&board).save().unwrap();
    let (other, endpoints) = board_with_probes(&[(3, 0)]);
    function(&other).restore(1, &saved).unwrap();
    assert!(other.ioapic.take().is_empty());
    assert_eq!(other.guest(3, 0).config(6, Word) & 8, 8);
    endpoints[0].set_intx(false);
    assert_eq!(other.ioapic.take(), [(16, false)]);
}

#[test]
fn one_function_per_address() {
    let (board, _) = board_with_probes(&[(3, 0)]);
    let endpoint = board.pci.endpoint(PciAddress::new(0, 3, 0).unwrap(), probe_spec());
    let error = board.pci.add(PciFunction::new(endpoint, Arc::new(Probe::default()))).unwrap_err();
    assert_eq!(error.to_string(), "pci slot 0:3:0 already occupied!");
}

#[test]
fn the_host_leaves_nothing_on_the_buses() {
    let (board, endpoints) = board_with_probes(&[(3, 0)]);
    let (ports, memory) = (board.ports.clone(), board.memory.clone());
    drop((board, endpoints));
    assert_eq!(ports.read(0xcf8, Dword), None);
    assert_eq!(ports.read(0x2000, Dword), None);
    assert_eq!(memory.read(0xe000_0000, Dword), None);
}

fn bridges(more: &[(&'static str, &'static str)]) -> TestBoard {
    let keys = [("pci.0.0.0.device", "hostbridge"), ("pci.0.31.0.device", "lpc"), ("pci.0.3.0.device", "virtio-rnd")];
    TestBoard::new(&[&keys, more].concat())
}

#[test]
fn the_host_bridge_has_its_ids_and_a_root_port_capability() {
    let board = bridges(&[]);
    assert_eq!(board.guest(0, 0).config32(0), 0x1275_1275);
    let board = bridges(&[("pci.0.0.0.pcireg.vendor", "0x1022"), ("pci.0.0.0.devid", "0x7432")]);
    let guest = board.guest(0, 0);
    assert_eq!(guest.config32(0), 0x7432_1022);
    assert_eq!(guest.config32(8), 0x0600_0000);
    assert_eq!(guest.config(0xe, Byte), 0, "header type 0");
    assert_eq!(guest.capabilities(0x10), [0x40]);
    assert_eq!(guest.config(0x42, Word), 0x42, "version 2, root port");
    assert_eq!(guest.config(0x3d, Byte), 0, "no interrupt pin");
}

#[test]
fn the_lpc_bridge_routes_pirqs() {
    let board = bridges(&[]);
    let guest = board.guest(31, 0);
    assert_eq!(guest.config32(0), 0x7000_8086);
    assert_eq!(guest.config32(8), 0x0601_0000);
    // Slot 3 uses link A, which got the first free IRQ; the other links are not routed.
    let irq = board.guest(3, 0).config(0x3c, Byte);
    assert_eq!(guest.config32(0x60), 0x8080_8000 | irq);
    assert_eq!(guest.config32(0x68), 0x8080_8080);
    guest.set_config(0x60, Byte, 0x0b);
    guest.set_config(0x6a, Word, 0xff0a);
    assert_eq!(guest.config(0x60, Byte), 0x0b);
    assert_eq!(guest.config32(0x68), 0x8f0a_8080);
    assert_eq!(guest.config32(0x64), 0, "no registers in between");
}

#[test]
fn only_one_lpc_bridge_on_bus_0() {
    let two = TestBoard::try_new(&[("pci.0.1.0.device", "lpc"), ("pci.0.2.0.device", "lpc")]);
    assert_eq!(two.err().unwrap().to_string(), "Only one LPC bridge is allowed.");
    let elsewhere = TestBoard::try_new(&[("pci.1.1.0.device", "lpc")]);
    assert_eq!(elsewhere.err().unwrap().to_string(), "LPC bridge can be present only on bus 0.");
}

#[test]
fn bridges_conform() {
    conformance::check(|| bridges(&[]).subject(0), |subject| subject.function().set_command(0x107));
    conformance::check(
        || bridges(&[]).subject(31),
        |subject| {
            let function = subject.function();
            function.set_config(0x60, Byte, 0x0e);
            assert_eq!(function.config(0x60, Byte), 0x0e);
        },
    );
}

#[test]
fn a_plain_function_conforms() {
    let work = |subject: &conformance::Subject| {
        let function: GuestFunction = subject.function();
        function.set_command(7);
        assert_eq!(function.enable_msix(0x30), 3);
        assert_eq!(function.read(function.bar(2), 0x20, Dword), 0x2_0020);
    };
    conformance::check(|| board_with_probes(&[(3, 0)]).0.subject(3), work);
}
