//! The part of a PCI function that all devices share: configuration space, BARs, interrupts.
//!
//! Lock order: endpoint → BAR mapper → bus, and endpoint → interrupt router → interrupt chips. A device may call into
//! its endpoint while holding its own locks; the endpoint never calls the device.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use config::pci::PciAddress;
use platform::{AccessSize, BusDevice, MsiSink};
use serde::{Deserialize, Serialize};

use super::bar::{BARS, Bar, BarKind};
use super::config_space::ConfigSpace;
use super::function::{BarWindow, PciFunction};
use super::intx::{IntxRouter, PinUser};
use super::mapper::BarMapper;
use super::msi::Msi;
use super::msix::{self, Msix, MsixTable};
use super::regs;
use super::spec::{Capability, FunctionSpec, pcie_body};

/// What endpoints need of the host they sit on.
#[derive(Clone)]
pub(crate) struct Attachment {
    pub(crate) msi: Arc<dyn MsiSink>,
    pub(crate) router: Arc<IntxRouter>,
    pub(crate) mapper: Arc<BarMapper>,
}

/// A function's configuration space and interrupts, as the device behind it sees them.
pub struct PciEndpoint {
    address: PciAddress,
    bars: [Option<Bar>; BARS],
    capabilities: Vec<u16>,
    pin: Option<PinUser>,
    host: Attachment,
    function: OnceLock<Weak<PciFunction>>,
    state: Mutex<State>,
}

struct State {
    space: ConfigSpace,
    /// Configuration space as it is after power-on, BARs assigned.
    power_on: Vec<u8>,
    msi: Option<Msi>,
    msix: Option<Msix>,
    /// What the device wants of its interrupt pin.
    intx: bool,
}

/// The endpoint's share of a saved function.
#[derive(Serialize, Deserialize)]
pub(crate) struct EndpointState {
    config: Vec<u8>,
    msix: Option<MsixTable>,
    intx: bool,
}

impl PciEndpoint {
    pub(crate) fn new(address: PciAddress, spec: FunctionSpec, host: Attachment) -> Self {
        let FunctionSpec { identity, mut bars, capabilities, intx } = spec;
        let mut space = ConfigSpace::new();
        identity.install(&mut space);
        let (mut msi, mut msix) = (None, None);
        let mut offsets = Vec::new();
        for capability in capabilities {
            let at = match capability {
                Capability::Pcie(kind) => space.add_capability(regs::capability::PCIE, &pcie_body(kind), &[]),
                Capability::Msi(messages) => msi.insert(Msi::add(&mut space, messages)).offset(),
                Capability::Msix { vectors, bar } => {
                    bars[bar] = Some(Bar::new(BarKind::Memory32, msix::bar_size(vectors)));
                    msix.insert(Msix::add(&mut space, vectors, bar)).offset()
                }
                Capability::Own { id, body, writable } => space.add_capability(id, &body, &writable),
            };
            offsets.push(at);
        }
        for (index, bar) in (0..).zip(&bars) {
            if let Some(bar) = bar {
                bar.install(&mut space, index);
            }
        }
        let pin = intx.then(|| host.router.connect(address));
        space.set(regs::INTERRUPT_PIN, &[pin.map_or(0, |pin| pin.pin)]);
        let state = State { power_on: space.bytes().to_vec(), space, msi, msix, intx: false };
        Self { address, bars, capabilities: offsets, pin, host, function: OnceLock::new(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the function sits.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Offset in configuration space of the capability that was `index`-th in the specification.
    pub fn capability(&self, index: usize) -> Option<u16> {
        self.capabilities.get(index).copied()
    }

    /// A 32-bit register of configuration space, without the device's own hooks.
    pub fn config(&self, offset: u16) -> u32 {
        self.state().space.u32(offset)
    }

    /// Asserts or de-asserts the function's interrupt pin. What reaches the chips also depends on the guest: not while
    /// INTx is disabled or MSI or MSI-X is enabled.
    pub fn set_intx(&self, asserted: bool) {
        let mut state = self.state();
        if state.intx != asserted {
            state.intx = asserted;
            self.push_intx(&state);
        }
    }

    /// Sends MSI `vector`, if the guest enabled MSI.
    pub fn send_msi(&self, vector: u16) {
        let state = self.state();
        if let Some(message) = state.msi.and_then(|msi| msi.message(&state.space, vector)) {
            self.host.msi.send(message);
        }
    }

    /// Sends MSI-X `vector`, if the guest enabled MSI-X; a masked vector becomes pending.
    pub fn send_msix(&self, vector: u16) {
        let mut state = self.state();
        let State { space, msix, .. } = &mut *state;
        if let Some(msix) = msix {
            msix.send(space, vector, &*self.host.msi);
        }
    }

    /// Whether the guest enabled MSI-X.
    pub fn msix_enabled(&self) -> bool {
        let state = self.state();
        state.msix.as_ref().is_some_and(|msix| msix.enabled(&state.space))
    }

    /// Size of the MSI-X table; 0 without MSI-X.
    pub fn msix_vectors(&self) -> u16 {
        self.state().msix.as_ref().map_or(0, Msix::vectors)
    }

    /// BARs with their register numbers.
    pub(crate) fn bars(&self) -> impl Iterator<Item = (usize, Bar)> {
        self.bars.into_iter().enumerate().filter_map(|(index, bar)| Some((index, bar?)))
    }

    /// Ties the endpoint to the function that owns it.
    pub(crate) fn attach(&self, function: Weak<PciFunction>) {
        // A second function for one endpoint cannot be made: PciFunction::new takes a fresh one.
        let _ = self.function.set(function);
    }

    /// Writes the address of a BAR, as the start value for the guest.
    pub(crate) fn assign_bar(&self, index: usize, address: u64) {
        if let Some(Some(bar)) = self.bars.get(index) {
            bar.assign(&mut self.state().space, index, address);
        }
    }

    /// Completes the power-on state and puts the BARs on the buses if `decode`.
    pub(crate) fn power_on(&self, decode: bool, multi_function: bool) {
        let mut state = self.state();
        let mut command = regs::command::BUS_MASTER;
        if decode {
            command |= self.bars().fold(0, |bits, (_, bar)| bits | bar.enable_bit());
        }
        state.space.set(regs::COMMAND, &command.to_le_bytes());
        if multi_function {
            let header = state.space.u8(regs::HEADER_TYPE) | regs::header::MULTI_FUNCTION;
            state.space.set(regs::HEADER_TYPE, &[header]);
        }
        if let Some(pin) = self.pin {
            state.space.set(regs::INTERRUPT_LINE, &[self.host.router.initial_irq(pin)]);
        }
        state.power_on = state.space.bytes().to_vec();
        self.place_bars(&state);
    }

    /// Reads a register of the first 256 bytes.
    pub(crate) fn read_config(&self, offset: u16, size: AccessSize) -> u32 {
        let state = self.state();
        let value = state.space.read(offset, size);
        // The interrupt status bit is a view of the pin, not a stored bit.
        match (regs::STATUS).checked_sub(offset) {
            Some(distance) if u64::from(distance) < size.bytes() && state.intx => {
                value | u32::from(regs::status::INTERRUPT) << (8 * distance)
            }
            _ => value,
        }
    }

    /// Writes a register of the first 256 bytes and does what follows from it.
    pub(crate) fn write_config(&self, offset: u16, size: AccessSize, value: u32) {
        let mut state = self.state();
        state.space.write(offset, size, value);
        if offset < regs::BAR_END {
            self.place_bars(&state);
        }
        let State { space, msix, .. } = &mut *state;
        if let Some(msix) = msix {
            msix.send_pending(space, &*self.host.msi);
        }
        self.push_intx(&state);
    }

    /// Reads the MSI-X table, if it is what lies in `bar`.
    pub(crate) fn read_msix(&self, bar: usize, offset: u64, size: AccessSize) -> Option<u64> {
        let state = self.state();
        state.msix.as_ref().filter(|msix| msix.bar() == bar).map(|msix| msix.read(offset, size))
    }

    /// Writes the MSI-X table, if it is what lies in `bar`.
    pub(crate) fn write_msix(&self, bar: usize, offset: u64, size: AccessSize, value: u64) -> bool {
        let mut state = self.state();
        let State { space, msix, .. } = &mut *state;
        let Some(msix) = msix.as_mut().filter(|msix| msix.bar() == bar) else { return false };
        msix.write(offset, size, value);
        msix.send_pending(space, &*self.host.msi);
        true
    }

    /// Back to the state after power-on.
    pub(crate) fn reset(&self) {
        let mut state = self.state();
        let power_on = state.power_on.clone();
        state.space.set(0, &power_on);
        if let Some(msix) = &mut state.msix {
            msix.reset();
        }
        state.intx = false;
        self.push_intx(&state);
        self.place_bars(&state);
    }

    pub(crate) fn save(&self) -> EndpointState {
        let state = self.state();
        EndpointState {
            config: state.space.bytes().to_vec(),
            msix: state.msix.as_ref().map(|msix| msix.table().clone()),
            intx: state.intx,
        }
    }

    /// Takes over a saved state; the interrupt pin's level goes to the router without making an edge.
    pub(crate) fn restore(&self, saved: EndpointState) -> Result<(), String> {
        let mut state = self.state();
        match (&mut state.msix, saved.msix) {
            (Some(msix), Some(table)) => msix.restore(table)?,
            (None, None) => {}
            (have, _) => return Err(format!("saved {} MSI-X", if have.is_some() { "without" } else { "with" })),
        }
        state.space.restore(&saved.config)?;
        state.intx = saved.intx;
        if let Some(pin) = self.pin {
            self.host.router.restore_level(pin, state.line());
        }
        self.place_bars(&state);
        Ok(())
    }

    fn push_intx(&self, state: &State) {
        if let Some(pin) = self.pin {
            self.host.router.set(pin, state.line());
        }
    }

    fn place_bars(&self, state: &State) {
        let Some(function) = self.function.get() else { return };
        for (index, bar) in self.bars() {
            self.host.mapper.place((self.address, index), bar.decode(&state.space, index), || {
                Arc::new(BarWindow::new(function.clone(), index)) as Arc<dyn BusDevice>
            });
        }
    }

    /// Takes the BARs off the buses.
    pub(crate) fn detach(&self) {
        for (index, _) in self.bars() {
            self.host.mapper.remove((self.address, index));
        }
    }
}

impl State {
    /// The level the function contributes to its pin.
    fn line(&self) -> bool {
        let masked = self.space.u16(regs::COMMAND) & regs::command::INTX_DISABLE != 0
            || self.msi.is_some_and(|msi| msi.enabled(&self.space))
            || self.msix.as_ref().is_some_and(|msix| msix.enabled(&self.space));
        self.intx && !masked
    }
}
