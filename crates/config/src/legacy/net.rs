//! Network adapters: the backend comes first, `virtio-net,BACKEND[,options]`.

use super::{SyntaxError, begins_with_option, leading, options};
use crate::tree::Node;

/// `BACKEND[,options]`, or options alone for an adapter without a link.
///
/// The backend's kind is not stored: whoever opens it sees it from the name or from an explicit `type`.
pub(super) fn backend_first(node: &mut Node, conf: Option<&str>) -> Result<(), SyntaxError> {
    if begins_with_option(conf) { options(node, conf) } else { leading(node, "backend", conf) }
}
