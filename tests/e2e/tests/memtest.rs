//! memtest86+, which uses little of what Linux uses, draws its screen on the serial port.

use e2e::linux::Guest;
use e2e::{Bhyve, files};

#[test]
fn memtest_draws_its_screen_and_completes_tests() {
    let image = format!("kernel.image={}", files::guest_file("memtest/memtest86+x64.bin").display());
    let cmdline = "kernel.cmdline=console=ttyS0,115200";
    let args = ["-AHP", "-m", "32M", "-s", "31,lpc", "-l", "com1,stdio", "-o", &image, "-o", cmdline, "memtest"];
    let mut guest = Guest::start(&Bhyve::new(args), 1);
    guest.wait_for("Memtest86+ v");
    guest.wait_for("Memory  :   32MB");
    // It draws every other second, so that quick tests may pass unseen. When a later one than the first runs, that is complete.
    loop {
        guest.wait_for("\x1b[4;35H #");
        let test = guest.wait_for(" ");
        if test.trim().parse::<u32>().is_ok_and(|number| number > 0) {
            break;
        }
    }
    let screens = guest.wait_for("Errors: ");
    let errors = guest.wait_for(" ");
    guest.check(errors == "0 ", "memtest86+ found errors");
    guest.check(screens.contains("Pass:"), "the screen has no status");
}
