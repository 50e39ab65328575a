//! Disks of all kinds under an installed Debian: nothing that the guest flushed is lost, whoever dies.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::Instant;

use e2e::linux::Guest;
use e2e::{Debian, Linux, PATIENCE, debian, files};
use rustix::process::Signal;

/// Size of each disk: `BHYVE_STORAGE_MB` (64) in MB. 1024 makes a more thorough test by hand.
fn size() -> u64 {
    let megabytes = std::env::var("BHYVE_STORAGE_MB").ok().and_then(|text| text.parse::<u64>().ok());
    megabytes.unwrap_or(64) << 20
}

/// The disks that are written to, by the names under which the guest finds them.
const DISKS: [&str; 4] = ["virtio-raw", "virtio-qcow2", "virtio-nbd", "scsi-SBHYVE_SCSI_DISK"];

fn program(name: &str) -> Command {
    Command::new(name)
}

fn run(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap_or_else(|why| panic!("cannot run {command:?} ({why}): install qemu-utils"));
    (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// A new image; qcow2 by its name.
fn image(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    if name.ends_with(".qcow2") {
        let (code, text) =
            run(program("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(size().to_string()));
        assert_eq!(code, Some(0), "{text}");
    } else {
        File::create(&path).and_then(|file| file.set_len(size())).expect("an image can be made");
    }
    path
}

/// The file of this test's guest program as a disk: newlines up to whole sectors.
fn script(folder: &Path) -> PathBuf {
    let mut text = include_bytes!("storage-guest.py").to_vec();
    text.resize(text.len().next_multiple_of(4096), b'\n');
    let path = folder.join("script.img");
    fs::write(&path, text).expect("the script can be written");
    path
}

/// A qemu-nbd that serves an image on a socket, and ends with this.
struct Server(Child);

impl Server {
    fn start(folder: &Path, image: &Path) -> Self {
        let socket = folder.join("nbd.sock");
        // One that was killed leaves it behind.
        let _ = fs::remove_file(&socket);
        let mut command = program("qemu-nbd");
        command.args(["--persistent", "--shared=4", "--format=qcow2", "--export-name=disk", "--discard=unmap"]);
        let child = command.arg("--socket").arg(&socket).arg(image).spawn();
        let server = Self(child.expect("qemu-nbd can be started; it is in qemu-utils"));
        let start = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(start.elapsed() < PATIENCE, "qemu-nbd does not listen");
            thread::yield_now();
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last batch of a disk that the guest reported as flushed.
fn synced(transcript: &str, disk: &str) -> u64 {
    let word = format!("SYNCED {disk} ");
    let numbers = transcript.split(&word).skip(1);
    numbers.filter_map(|text| text.split_once('.')?.0.parse().ok()).max().unwrap_or(0)
}

/// Copies the guest's program and finds the SCSI disk by a name like the others'.
fn prepare(guest: &mut Guest) {
    guest.shell("udevadm settle; cat /dev/disk/by-id/virtio-script >/run/s.py");
    guest.shell("ln -sf /dev/sda /dev/disk/by-id/scsi-SBHYVE_SCSI_DISK; test -b /dev/sda");
}

fn verify(guest: &mut Guest, disk: &str, seed: usize, batches: u64) {
    let said = guest.shell(&format!("python3 /run/s.py verify {disk} {seed} {batches}"));
    guest.check(said.contains(&format!("VERIFIED {disk} ")), "the disk was not verified");
}

/// The guest writes to a raw, a qcow2, an NBD and a SCSI disk at once and flushes after every batch. First the NBD server
/// is killed and comes back; then the VM is killed. What was reported as flushed is there afterwards.
#[test]
fn what_was_flushed_survives_the_death_of_server_and_vm() {
    let folder = files::scratch();
    let (folder, path) = (folder.path(), |name: &str| folder.path().join(name));
    let [raw, qcow2, served, scsi] = ["raw.img", "q.qcow2", "served.qcow2", "scsi.img"].map(|name| image(folder, name));
    let server = Server::start(folder, &served);
    let slots = [
        format!("6,virtio-blk,{},ser=raw", raw.display()),
        format!("7,virtio-blk,{},ser=qcow2", qcow2.display()),
        format!("8,virtio-blk,nbd+unix:///disk?socket={},ser=nbd", path("nbd.sock").display()),
        format!("9,virtio-scsi,{}", scsi.display()),
        format!("10,virtio-blk,{},ro,ser=script", script(folder).display()),
    ];
    let args: Vec<_> = slots.iter().flat_map(|slot| ["-s", slot.as_str()]).collect();
    let machine = Debian::amd64().cpus(2).args(&args).build();

    let mut guest = machine.boot();
    prepare(&mut guest);
    for (seed, disk) in DISKS.iter().enumerate() {
        guest.shell(&format!("(python3 /run/s.py write {disk} {seed} &)"));
    }
    let reach = |guest: &mut Guest, batches: u64| {
        for disk in DISKS {
            while synced(&guest.transcript(), disk) < batches {
                guest.wait_for("SYNCED ");
            }
        }
    };
    reach(&mut guest, 3);
    drop(server);
    let before = synced(&guest.transcript(), "virtio-nbd");
    let server = Server::start(folder, &served);
    reach(&mut guest, before + 3);
    guest.signal(Signal::KILL);
    guest.wait();
    let batches = DISKS.map(|disk| synced(&guest.transcript(), disk));
    println!("flushed batches: {batches:?}");
    drop(guest);
    let (code, report) = run(program("qemu-img").args(["check", "-f", "qcow2"]).arg(&qcow2));
    assert!(matches!(code, Some(0 | 3)), "leaks at most, no errors: {report}");

    let mut guest = machine.boot();
    prepare(&mut guest);
    for (seed, disk) in DISKS.iter().enumerate() {
        verify(&mut guest, disk, seed, batches[seed]);
    }
    // Now they are used as disks are.
    for disk in DISKS {
        let device = format!("/dev/disk/by-id/{disk}");
        guest.shell(&format!(
            "fio --name=v --filename={device} --rw=randwrite --bsrange=4k-1m --ioengine=libaio --iodepth=32 --direct=1 \
             --size={}m --verify=crc32c --verify_fatal=1 --minimal >/dev/null",
            size() >> 20
        ));
        guest.shell(&format!("mkfs.ext4 -qF {device} && mount {device} /mnt && cp -a /usr/lib/python3* /mnt/"));
        guest.shell("(cd /usr/lib && find python3* -type f | head -300 | xargs md5sum) >/mnt/sums; fstrim /mnt");
        guest.shell("umount /mnt");
        guest.shell(&format!("mount {device} /mnt && cd /mnt && md5sum --check --quiet sums; cd / && umount /mnt"));
    }
    debian::power_off(&mut guest);
    drop(server);
    for qcow2 in [&qcow2, &served] {
        let raw = qcow2.with_extension("raw");
        let (code, report) = run(program("qemu-img").args(["check", "-f", "qcow2"]).arg(qcow2));
        assert_eq!(code, Some(0), "{report}");
        let (code, report) = run(program("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).args([qcow2, &raw]));
        assert_eq!(code, Some(0), "{report}");
        files::check_file_system(&raw);
    }
    files::check_file_system(&raw);
    files::check_file_system(&scsi);
}

/// The guest sees that its disks have grown, and uses the new room.
#[test]
fn disks_grow_under_a_running_guest() {
    let folder = files::scratch();
    let (raw, scsi) = (image(folder.path(), "raw.img"), image(folder.path(), "scsi.img"));
    let slots = [format!("6,virtio-blk,{},ser=raw", raw.display()), format!("9,virtio-scsi,{}", scsi.display())];
    let machine = Debian::amd64().args(&["-s", &slots[0], "-s", &slots[1]]).build();
    let mut guest = machine.boot();
    guest.shell("udevadm settle; ln -s /dev/disk/by-id/virtio-raw /run/raw; ln -s /dev/sda /run/scsi");
    for (name, image) in [("raw", &raw), ("scsi", &scsi)] {
        guest.shell(&format!("mkfs.ext4 -qF /run/{name}; mkdir /run/{name}.d; mount /run/{name} /run/{name}.d"));
        let larger = 2 * size();
        File::options().write(true).open(image).and_then(|file| file.set_len(larger)).expect("it can grow");
        let sees = format!("blockdev --getsize64 /run/{name}");
        let start = Instant::now();
        while guest.shell(&sees).trim() != larger.to_string() {
            guest.check(start.elapsed() < PATIENCE, "the guest does not see that its disk grew");
        }
        guest.shell(&format!("resize2fs /run/{name} 2>/dev/null"));
        guest.shell(&format!("head -c {} /dev/zero | tr '\\0' x >/run/{name}.d/big", size()));
        guest.shell(&format!("umount /run/{name}.d"));
    }
    debian::power_off(&mut guest);
    files::check_file_system(&raw);
    files::check_file_system(&scsi);
}

/// The virtio interfaces and interrupts besides the usual ones. Linux takes INTx where there is no MSI-X.
#[test]
fn disks_work_through_the_legacy_interface_and_without_msix() {
    for (keys, modern, interrupt) in [
        (&["virtio_msix=false"][..], "1", "IO-APIC"),
        (&["virtio.modern=false"], "0", "PCI-MSI"),
        (&["virtio.modern=false", "virtio_msix=false"], "0", "IO-APIC"),
    ] {
        let folder = files::scratch();
        let disk = files::copy_disk(folder.path());
        let guest = keys.iter().fold(Linux::amd64(), |guest, key| guest.key(key));
        let mut guest = guest.disk(&disk, "").boot();
        // Feature bit 32 is the modern interface.
        let bit = guest.shell("cut -c33 /sys/bus/virtio/devices/virtio0/features");
        guest.check(bit.trim() == modern, &format!("{keys:?}: not the interface that was to be tested"));
        guest.shell("head -c 4000000 /dev/urandom >/mnt/noise; sync; md5sum </mnt/noise >/tmp/sum");
        guest.shell("echo 3 >/proc/sys/vm/drop_caches; md5sum </mnt/noise | cmp - /tmp/sum");
        let interrupts = guest.shell("grep virtio0 /proc/interrupts");
        let count = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        let used = interrupts.lines().any(|line| line.contains(interrupt) && count(line) > Some(0));
        guest.check(used, &format!("{keys:?}: no interrupt by {interrupt}"));
        guest.send("poweroff\n");
        guest.expect_exit(1);
        files::check_file_system(&disk);
    }
}
