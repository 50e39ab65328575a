//! The USB controller.

use super::{SyntaxError, options};
use crate::tree::Node;

/// `xhci,DEVICE[=OPTION][,DEVICE…]`: USB devices on the slots from 1.
pub(super) fn xhci(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    let devices = conf.unwrap_or_default().split(',').filter(|token| !token.is_empty());
    for (number, token) in (1..).zip(devices) {
        let (device, option) = match token.split_once('=') {
            Some((device, option)) => (device, Some(option)),
            None => (token, None),
        };
        let path = format!("slot.{number}");
        let slot = node.create(&path)?;
        slot.set("device", device)?;
        options(slot, option).map_err(|error| error.below(&path))?;
    }
    Ok(())
}
