//! Local APIC, I/O APIC, 8259 pair and 8254 as pure chips with neutral state.
