//! What people start first: Debian's installer.

use e2e::linux::Guest;
use e2e::{Bhyve, files};

/// Started directly, it comes to its first question on the serial line.
#[test]
fn debians_installer_shows_its_first_menu() {
    let file = |name| files::guest_file(&format!("netboot/{name}")).display().to_string();
    let keys = [
        format!("kernel.image={}", file("linux")),
        format!("kernel.initrd={}", file("initrd.gz")),
        "kernel.cmdline=console=ttyS0 TERM=dumb DEBIAN_FRONTEND=text".to_owned(),
    ];
    let mut args = vec!["-A", "-H", "-P", "-m", "1G", "-s", "0,hostbridge", "-s", "31,lpc", "-l", "com1,stdio"];
    for key in &keys {
        args.extend(["-o", key]);
    }
    let mut guest = Guest::start(&Bhyve::new(args).arg("installer"), 1);
    guest.wait_for("Select a language");
}
