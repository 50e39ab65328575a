//! `-l NAME[,conf]`: LPC devices, the boot ROM and the TPM.

use super::{CommandLine, asks_for_help, invalid};
use crate::error::ConfigError;
use crate::exit::{self, Exit};
use crate::legacy;
use crate::lpc::COM_PORTS;

pub(super) fn device(line: &mut CommandLine<'_>, argument: &str) -> Result<(), Exit> {
    if asks_for_help(argument) {
        return Err(Exit::with_stdout(exit::OK, help()));
    }
    let (name, conf) = match argument.split_once(',') {
        Some((name, conf)) => (name, Some(conf)),
        None => (argument, None),
    };
    let name = name.to_ascii_lowercase();
    match (name.as_str(), conf) {
        ("bootrom", _) => bootrom(line, argument, conf),
        ("tpm", _) => tpm(line, argument, conf),
        ("pc-testdev", _) => line.set("lpc.pc-testdev", "true"),
        (com, Some(backend)) if COM_PORTS.contains(&com) && !backend.is_empty() => {
            line.set(&format!("lpc.{com}.path"), backend)
        }
        _ => Err(invalid("lpc device configuration", argument)),
    }
}

fn help() -> String {
    ["bootrom"].iter().chain(&COM_PORTS).chain(&["tpm", "pc-testdev"]).map(|name| format!("{name}\n")).collect()
}

/// `bootrom,ROM[,VARS][,options]`; the options are keys of the LPC bridge. `bootrom` alone is the firmware that is installed.
fn bootrom(line: &mut CommandLine<'_>, argument: &str, conf: Option<&str>) -> Result<(), Exit> {
    let conf = conf.or(Some("auto"));
    let (rom, rest) = first(conf);
    if rom.is_empty() {
        return Err(Exit::message(exit::ERROR, format!("invalid bootrom option \"{argument}\"")));
    }
    line.set("bootrom", rom)?;
    let (vars, after_vars) = first(rest);
    if vars.is_empty() || vars.contains('=') {
        return options(line, "lpc", rest);
    }
    line.set("bootvars", vars)?;
    options(line, "lpc", after_vars)
}

/// `tpm,TYPE,PATH[,options]`.
fn tpm(line: &mut CommandLine<'_>, argument: &str, conf: Option<&str>) -> Result<(), Exit> {
    let (kind, rest) = first(conf);
    let (path, rest) = first(rest);
    for (what, value) in [("type", kind), ("path", path)] {
        if value.is_empty() {
            return Err(Exit::message(exit::ERROR, format!("invalid tpm {what} \"{argument}\"")));
        }
        line.set(&format!("tpm.{what}"), value)?;
    }
    options(line, "tpm", rest)?;
    line.config.root_mut().set_default("tpm.version", "2.0").map_err(|error| ConfigError::from(error).into())
}

/// The first word of a comma-separated list, and the rest.
fn first(list: Option<&str>) -> (&str, Option<&str>) {
    match list.unwrap_or_default().split_once(',') {
        Some((word, rest)) => (word, Some(rest)),
        None => (list.unwrap_or_default(), None),
    }
}

fn options(line: &mut CommandLine<'_>, path: &str, conf: Option<&str>) -> Result<(), Exit> {
    let node = line.config.root_mut().create(path).map_err(ConfigError::from)?;
    legacy::options(node, conf).map_err(|error| error.into_exit(path))
}
