//! 8042 keyboard controller at ports 60 and 64, with a PS/2 keyboard (IRQ 1) and a PS/2 mouse (IRQ 12).
//!
//! The host's side feeds it with [`I8042::key_scancode`] and [`I8042::mouse_event`]. Bytes wait in the devices, at most
//! 16 each, until the guest takes them. Command FE, like clearing bit 0 of the output port, resets the machine.

mod controller;
mod keyboard;
mod mouse;
mod regs;
mod scancode;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use platform::{AccessSize, BusDevice, IrqLine, Persist, PowerEvent, PowerSink, StateError, state};

pub use self::mouse::MouseButtons;

use self::controller::Controller;

/// Port of the data register.
pub const DATA_PORT: u64 = 0x60;
/// Port of the command and status register.
pub const COMMAND_PORT: u64 = 0x64;

const KIND: &str = "i8042";
const VERSION: u32 = 1;

struct Inner {
    controller: Controller,
    /// The levels last given to IRQ 1 and IRQ 12.
    asserted: [bool; 2],
}

/// The keyboard controller with what is plugged into it.
pub struct I8042 {
    inner: Mutex<Inner>,
    /// IRQ 1 and IRQ 12.
    irqs: [IrqLine; 2],
    power: Arc<dyn PowerSink>,
}

impl I8042 {
    /// A controller as a BIOS leaves it: keyboard on, mouse off, translation on.
    pub fn new(keyboard_irq: IrqLine, mouse_irq: IrqLine, power: Arc<dyn PowerSink>) -> Arc<Self> {
        let inner = Inner { controller: Controller::new(), asserted: [false; 2] };
        Arc::new(Self { inner: Mutex::new(inner), irqs: [keyboard_irq, mouse_irq], power })
    }

    /// The data register, to be mapped at [`DATA_PORT`], 1 byte long.
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(DataPort(self.clone()))
    }

    /// The command and status register, to be mapped at [`COMMAND_PORT`], 1 byte long.
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(CommandPort(self.clone()))
    }

    /// Presses or releases keys: scan codes of set 2, with their E0 and F0 prefixes. All of `codes` are taken, or none
    /// (`false`): the guest has turned the keyboard off, or does not read it.
    pub fn key_scancode(&self, codes: &[u8]) -> bool {
        self.change(|controller| controller.keyboard.keys(codes))
    }

    /// Moves the mouse by pixels, to the right and down, and sets its buttons.
    pub fn mouse_event(&self, right: i32, down: i32, buttons: MouseButtons) {
        self.change(|controller| controller.mouse.moved(right, down.saturating_neg(), buttons));
    }

    /// Whether the guest listens to the mouse.
    pub fn mouse_listens(&self) -> bool {
        self.lock().controller.mouse.reporting()
    }

    /// The keyboard's LEDs: bit 0 scroll lock, bit 1 num lock, bit 2 caps lock.
    pub fn leds(&self) -> u8 {
        self.lock().controller.keyboard.leds()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Controller) -> T) -> T {
        let mut inner = self.lock();
        let result = change(&mut inner.controller);
        // Lines fall when the output buffer is emptied and rise when it is filled again: an edge for every byte.
        self.sync(&mut inner);
        inner.controller.fetch();
        self.sync(&mut inner);
        result
    }

    /// Makes the lines what the controller's state says.
    fn sync(&self, inner: &mut Inner) {
        let levels = [inner.controller.keyboard_interrupt(), inner.controller.aux_interrupt()];
        for ((line, level), asserted) in self.irqs.iter().zip(levels).zip(&mut inner.asserted) {
            if level != *asserted {
                *asserted = level;
                line.set(level);
            }
        }
    }

    fn write(&self, write: impl FnOnce(&mut Controller) -> bool) {
        if self.change(write) {
            self.power.request(PowerEvent::Reset);
        }
    }
}

struct DataPort(Arc<I8042>);

impl BusDevice for DataPort {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        self.0.change(Controller::take).into()
    }
    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        self.0.write(|controller| controller.write_data(value as u8));
    }
}

struct CommandPort(Arc<I8042>);

impl BusDevice for CommandPort {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        self.0.lock().controller.status().into()
    }
    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        self.0.write(|controller| controller.write_command(value as u8));
    }
}

impl Persist for I8042 {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::encode(KIND, &self.lock().controller)
    }

    fn restore(&self, version: u32, bytes: &[u8]) -> Result<(), StateError> {
        let controller: Controller = state::decode(KIND, VERSION, version, bytes)?;
        controller.check().map_err(|why| StateError::Invalid { kind: KIND, why })?;
        let mut inner = self.lock();
        inner.asserted = [controller.keyboard_interrupt(), controller.aux_interrupt()];
        inner.controller = controller;
        Ok(())
    }

    fn reset(&self) {
        self.change(|controller| *controller = Controller::new());
    }
}
