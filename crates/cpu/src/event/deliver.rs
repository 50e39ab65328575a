//! Which exception or interrupt is delivered: classes, double and triple faults (SDM vol. 3, 6.5 and 6.15).

use platform::x86::rflags;

use crate::event::enter::Event;
use crate::trap::vector;
use crate::{Exception, Step, Trap, Vcpu};

/// How exceptions combine (SDM vol. 3, table 6-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(exception: &Exception) -> Class {
    match exception.vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What is delivered when `second` occurs during the delivery of something of class `first` (SDM vol. 3, table 6-5).
fn combine(first: Class, second: Exception) -> Step<Exception> {
    match (first, class(&second)) {
        (Class::Contributory, Class::Contributory) | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Ok(Exception { vector: vector::DF, has_error: true, error: 0 })
        }
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => Err(Trap::Shutdown),
        _ => Ok(second),
    }
}

impl Vcpu {
    /// Delivers an exception, with double- and triple-fault rules.
    pub(crate) fn deliver_exception(&mut self, exception: Exception) -> Step {
        let mut current = exception;
        self.note_page_fault(&current);
        loop {
            if current.vector == vector::DB {
                self.report_debug();
            } else {
                self.forget_debug_trap();
            }
            // The saved RF lets the instruction be tried again without its breakpoint. A double fault is an abort.
            let resumes = !matches!(current.vector, vector::DF | vector::MC);
            let error = current.has_error.then_some(current.error);
            match self.enter_handler(&Event::exception(current.vector, error, resumes)) {
                Err(Trap::Fault(second)) => {
                    self.note_page_fault(&second);
                    current = combine(class(&current), second)?;
                }
                other => return other,
            }
        }
    }

    /// CR2 takes the address of every page fault, even of one that ends in a double or triple fault.
    fn note_page_fault(&mut self, exception: &Exception) {
        if exception.vector == vector::PF {
            self.cr2 = self.fault_address;
        }
    }

    /// Delivers an event that combines with nothing: an interrupt, an NMI, a debug trap.
    pub(crate) fn deliver_external(&mut self, event: Event) -> Step {
        match self.enter_handler(&event) {
            Err(Trap::Fault(second)) => self.deliver_exception(second),
            other => other,
        }
    }

    /// Delivers an NMI; more are held off until IRET.
    pub(crate) fn deliver_nmi(&mut self) -> Step {
        self.nmi_blocked = true;
        self.deliver_external(Event::exception(vector::NMI, None, false))
    }

    /// Delivers an external interrupt.
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) -> Step {
        self.deliver_external(Event::exception(vector, None, false))
    }

    /// NMIs are no longer held off: IRET.
    #[inline]
    pub(crate) fn unblock_nmi(&mut self) {
        self.nmi_blocked = false;
        if self.nmi_waiting {
            self.attention |= crate::state::attention::INTERRUPT;
            self.block_end = 0;
        }
    }

    /// RFLAGS as an event saves it.
    #[inline]
    pub(crate) fn saved_flags(&self, resumes: bool) -> u64 {
        self.rflags() | if resumes { rflags::RF } else { 0 }
    }
}
