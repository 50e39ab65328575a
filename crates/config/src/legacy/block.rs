//! Disks: the path comes first, `virtio-blk,PATH[,options]`.

use super::{SyntaxError, leading, options};
use crate::tree::Node;

/// `PATH[,options]`.
pub(super) fn path_first(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    leading(node, "path", conf)
}

/// As [`path_first`], but `ram=MiB` may stand in place of the path.
pub(super) fn nvme(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    if conf.is_some_and(|conf| conf.starts_with("ram=")) { options(node, conf) } else { path_first(node, conf) }
}
