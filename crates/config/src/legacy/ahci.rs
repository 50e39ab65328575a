//! AHCI: a controller with a list of drives, `ahci,hd:PATH[,options],cd:PATH…`, and two short forms for one drive.

use super::{SyntaxError, block};
use crate::tree::Node;

/// Ports of a controller.
const MAX_PORTS: usize = 32;

/// `hd:PATH[,options][,cd:PATH[,options]…]`: drives on the ports from 0.
pub(super) fn ports(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    let Some(conf) = conf else { return Ok(()) };
    node.create("port")?;
    let mut rest = Some(conf);
    let mut port = 0;
    while let Some(text) = rest {
        let (drive, next) = split_drive(text);
        rest = next;
        if port >= MAX_PORTS {
            return Err(SyntaxError::text(format!("ahci: more than {MAX_PORTS} drives")));
        }
        let (kind, drive) = match (drive.strip_prefix("hd:"), drive.strip_prefix("cd:")) {
            (Some(drive), _) => ("hd", drive),
            (_, Some(drive)) => ("cd", drive),
            _ if drive.is_empty() => ("", ""),
            _ => {
                return Err(SyntaxError::text(format!(
                    "Missing or invalid type for port {port}: \"{drive}\": put hd: or cd: before the path"
                )));
            }
        };
        // A drive without a path leaves its port empty.
        if !drive.is_empty() {
            drive_at(node, port, kind, drive)?;
        }
        port += 1;
    }
    Ok(())
}

/// `ahci-cd,PATH[,options]`.
pub(super) fn single_cd(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    single(node, "cd", conf)
}

/// `ahci-hd,PATH[,options]`.
pub(super) fn single_hd(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    single(node, "hd", conf)
}

fn single(node: &mut Node, kind: &str, conf: Option<&str>) -> Result<(), SyntaxError> {
    match conf {
        Some(conf) => drive_at(node, 0, kind, conf),
        None => Ok(()),
    }
}

fn drive_at(node: &mut Node, port: usize, kind: &str, drive: &str) -> Result<(), SyntaxError> {
    let path = format!("port.{port}");
    let node = node.create(&path)?;
    node.set("type", kind)?;
    block::path_first(node, Some(drive)).map_err(|error| error.below(&path))
}

/// Cuts before the next `hd:` or `cd:` that follows a comma.
fn split_drive(text: &str) -> (&str, Option<&str>) {
    let next = [",hd:", ",cd:"].iter().filter_map(|mark| text.find(mark)).min();
    match next {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    }
}
