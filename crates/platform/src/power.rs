//! Why a VM ends.

/// What the guest (or its operator) wants to happen to the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PowerEvent {
    /// Reset: 0xCF9, 8042 pulse, ACPI reset register.
    Reset,
    /// ACPI S5 soft-off.
    PowerOff,
    /// Every vCPU halted with interrupts disabled.
    Halt,
    /// A vCPU shut down after a triple fault.
    TripleFault,
    /// The debug-exit port: the process ends with this status.
    Exit(u8),
    /// The machine cannot go on; the process aborts after saying why.
    Abort,
}

/// Whoever ends the VM. The first event wins.
pub trait PowerSink: Send + Sync {
    /// Asks for `event`; returns at once, the vCPUs stop soon afterwards.
    fn request(&self, event: PowerEvent);
}
