//! The virtio devices with forms of their own.

use super::{SyntaxError, begins_with_option, leading, options};
use crate::tree::Node;

/// Ports of a virtio-console device.
const MAX_CONSOLE_PORTS: usize = 16;

/// virtio-9p: `NAME=PATH[,ro]`, one share.
pub(super) fn share(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    let mut named = false;
    for token in conf.unwrap_or_default().split(',').filter(|token| !token.is_empty()) {
        match token.split_once('=') {
            Some(_) if named => return Err(SyntaxError::text("virtio-9p: more than one share name given")),
            Some((name, path)) => {
                named = true;
                node.set("sharename", name)?;
                node.set("path", path)?;
            }
            None => node.set(token, "true")?,
        }
    }
    Ok(())
}

/// virtio-console: `NAME=SOCKET[,NAME=SOCKET…]`, ports numbered from 0.
pub(super) fn console_ports(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    let Some(conf) = conf else { return Ok(()) };
    let ports = node.create("port")?;
    for (number, token) in conf.split(',').enumerate() {
        let Some((name, path)) = token.split_once('=') else {
            return Err(SyntaxError::text(format!("vtcon: port {token} requires a path")));
        };
        if number >= MAX_CONSOLE_PORTS {
            return Err(SyntaxError::text("vtcon: too many ports"));
        }
        let port = ports.create(&number.to_string())?;
        port.set("name", name)?;
        port.set("path", path)?;
    }
    Ok(())
}

/// virtio-fs (ours): `TAG[,options]`.
pub(super) fn tag_first(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    if begins_with_option(conf) { options(node, conf) } else { leading(node, "tag", conf) }
}

/// virtio-vsock (ours): `PATH[,options]`.
pub(super) fn path_first(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    if begins_with_option(conf) { options(node, conf) } else { leading(node, "path", conf) }
}

/// virtio-input: `PATH[,options]` or `path=PATH`.
pub(super) fn input(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    match conf {
        None | Some("") => {
            Err(SyntaxError::text("virtio-input: name the event device, as in virtio-input,/dev/input/event0"))
        }
        _ if begins_with_option(conf) => options(node, conf),
        _ => leading(node, "path", conf),
    }
}

/// virtio-scsi: `[DEV][,PATH...][,options]`. Words with a slash behind the first are paths of further disks, which become
/// `lun.1.path` and so on.
pub(super) fn scsi(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    let is_path = |word: &&str| word.contains('/') && !word.split('/').next().is_some_and(|head| head.contains('='));
    let mut words: Vec<&str> = conf.unwrap_or_default().split(',').collect();
    let mut number = 0;
    let mut paths = Vec::new();
    words.retain(|word| {
        let further = number > 0 && is_path(word);
        number += 1;
        if further {
            paths.push(*word);
        }
        !further
    });
    let rest = words.join(",");
    let rest = (!rest.is_empty()).then_some(rest.as_str());
    if begins_with_option(rest) { options(node, rest) } else { leading(node, "dev", rest) }?;
    for (lun, path) in (1..).zip(paths) {
        node.set(&format!("lun.{lun}.path"), path)?;
    }
    Ok(())
}
