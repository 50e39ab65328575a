//! `-f [name=]NAME,(string=TEXT|file=PATH)`: files for the guest's fw_cfg device.

use std::fs;
use std::io;
use std::path::Path;

use super::{CommandLine, invalid};
use crate::exit::Exit;
use crate::store::FwcfgItem;

/// Room for a name in a directory entry of fw_cfg, with its closing NUL.
const NAME_SIZE: usize = 56;

/// A file is read whole; one larger than this is a mistake.
const MAX_FILE: u64 = 256 << 20;

pub(super) fn item(line: &mut CommandLine<'_>, argument: &str) -> Result<(), Exit> {
    match parse(argument) {
        Ok(item) => {
            line.config.add_fwcfg_item(item);
            Ok(())
        }
        Err(reason) => Err(invalid("fwcfg item", argument).preceded_by(format!("{}: {reason}", crate::exit::PROGRAM))),
    }
}

fn parse(argument: &str) -> Result<FwcfgItem, String> {
    let form = || format!("Invalid fw_cfg option \"{argument}\": write [name=]<name>,(string|file)=<value>");
    let (name, content) = argument.strip_prefix("name=").unwrap_or(argument).split_once(',').ok_or_else(form)?;
    if name.is_empty() {
        return Err(form());
    }
    if name.len() >= NAME_SIZE {
        return Err(format!("fw_cfg name too long: \"{name}\": it may have at most {} bytes", NAME_SIZE - 1));
    }
    let data = if let Some(text) = content.strip_prefix("string=") {
        // The closing NUL is part of the item.
        text.bytes().chain([0]).collect()
    } else if let Some(path) = content.strip_prefix("file=") {
        read(Path::new(path)).map_err(|error| format!("could not read fw_cfg file \"{path}\": {error}"))?
    } else {
        return Err(form());
    };
    Ok(FwcfgItem { name: name.into(), data })
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.len() > MAX_FILE {
        return Err(io::Error::other(format!("larger than {} MB", MAX_FILE >> 20)));
    }
    fs::read(path)
}
