//! An installed Debian with systemd.

use e2e::{Debian, debian, files};

/// What the guest writes is on its disk when it is started again, and the file system is sound.
#[test]
fn systemd_boots_works_and_keeps_its_files() {
    let machine = Debian::amd64().cpus(2).build();
    let mut guest = machine.boot();
    assert_eq!(guest.shell("nproc").trim(), "2");
    let (failed, _) = guest.shell_status("systemctl --failed --no-legend --plain");
    guest.check(failed.trim().is_empty(), "units have failed");
    guest.shell(
        "dd if=/dev/urandom of=/var/tmp/noise bs=1M count=64 status=none && md5sum /var/tmp/noise >/var/tmp/sum",
    );
    debian::power_off(&mut guest);
    drop(guest);

    let mut guest = machine.boot();
    guest.shell("md5sum --check --quiet /var/tmp/sum");
    assert_eq!(guest.shell_status("exit_status() { return 7; }; exit_status").1, 7);
    debian::power_off(&mut guest);
    files::check_root_file_system(machine.disk());
}
