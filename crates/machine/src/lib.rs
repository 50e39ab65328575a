//! Reads the configuration tree, builds the board it describes, runs it, and ends with bhyve's exit code.
//!
//! | module      | what it does                                                                 |
//! |-------------|------------------------------------------------------------------------------|
//! | [`run_vm`]  | the whole life of a VM, top to bottom                                         |
//! | `board`     | memory, engine, chipset and PCI devices from the tree; the same for every boot |
//! | `firmware`  | boot ROM, variable store, and what firmware asks for                          |
//! | `start`     | firmware tables and kernel, or what else makes the boot vCPU begin            |
//! | `run`       | vCPU threads                                                                  |
//! | `power`     | the event that ends the VM, and its exit code                                 |
//! | `process`   | title, signals, terminal                                                      |

mod board;
mod error;
mod firmware;
mod nodes;
mod power;
mod process;
mod run;
mod start;

use std::sync::Arc;

use config::{Config, Exit};
use platform::PowerEvent;

pub use error::MachineError;
pub use firmware::RomError;
use power::PowerLatch;

/// How a VM ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// The process exits, with a message or not.
    Exit(Exit),
    /// The process aborts; the report has been printed.
    Abort,
}

/// Builds and runs the VM that `config` describes; returns when it has ended.
pub fn run_vm(config: &Config) -> Ending {
    process::guard_terminal();
    process::log_to_stderr();
    match try_run(config) {
        Ok(event) => match power::exit_code(event) {
            Some(code) => Ending::Exit(Exit::with_stderr(code, "")),
            None => Ending::Abort,
        },
        Err(error) => Ending::Exit(error.into_exit()),
    }
}

/// Makes the terminal as it was at the start. To be called before the process ends.
pub fn restore_terminal() {
    backend::tty::restore_terminals();
}

fn try_run(config: &Config) -> Result<PowerEvent, MachineError> {
    let signals = process::handle_signals().map_err(|source| MachineError::Host { what: "handle signals", source })?;
    let power = Arc::new(PowerLatch::default());
    let plan = start::Plan::from_config(config)?;
    let mut board = board::Board::build(config, &power)?;
    start::prepare(&plan, config, &mut board, &power)?;
    process::set_title(&board.name);
    signals.connect(board.power_button());
    // Not before everything is known to be in order, so that an error is the only line.
    if let Some(engine) = &board.engine {
        eprintln!("bhyve: engine: {engine}");
    }
    board.notes.iter().for_each(|note| eprintln!("bhyve: {note}"));
    let event = run::run(std::mem::take(&mut board.vcpus), &power, config)?;
    board.finish();
    Ok(event)
}
