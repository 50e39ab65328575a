//! The bhyve(8) program.

use std::process::ExitCode;

use config::{Exit, PrintWarnings, legacy, parse_command_line};
use machine::Ending;

fn main() -> ExitCode {
    let config = match parse_command_line(std::env::args_os().skip(1), legacy::DEVICES, PrintWarnings) {
        Ok(config) => config,
        Err(exit) => return leave(&exit),
    };
    let ending = machine::run_vm(&config);
    machine::restore_terminal();
    match ending {
        Ending::Exit(exit) => leave(&exit),
        Ending::Abort => std::process::abort(),
    }
}

fn leave(exit: &Exit) -> ExitCode {
    // A closed stream is no reason for another exit code.
    let _ = exit.write_to(&mut std::io::stdout(), &mut std::io::stderr());
    ExitCode::from(exit.code)
}
