//! The host bridge.

use super::{SyntaxError, options};
use crate::tree::Node;

/// `amd_hostbridge`: a host bridge with AMD's vendor id and a device id that guests take for one of AMD's bridges.
pub(super) fn amd(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    node.set("pcireg.vendor", "0x1022")?;
    node.set("pcireg.device", "0x7432")?;
    options(node, conf)
}
