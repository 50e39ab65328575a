//! Shared folders in a guest: real work on a folder of the host.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use e2e::linux::Guest;
use e2e::{Linux, debian, files};
use rustix::process::geteuid;
use tempfile::TempDir;

const MOUNT: &str = "mkdir -p /share && mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144";

/// A folder to share inside a folder that is not.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(files::scratch());
        fs::create_dir(folder.path("")).unwrap();
        folder
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join("share").join(name)
    }

    fn guest(&self, options: &str) -> Guest {
        let device = format!("6,virtio-9p,tag={}{options}", self.path("").display());
        let mut guest = Linux::generic().cpus(2).device(&device).boot();
        guest.shell(&format!("{MOUNT} tag /share"));
        guest
    }
}

/// What a folder holds: names, kinds, modes and contents.
fn summary(folder: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for name in files::names_in(folder) {
        let path = folder.join(&name);
        let mode = fs::symlink_metadata(&path).unwrap().mode();
        if path.is_symlink() {
            all.insert(name, (mode, fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()));
        } else if path.is_dir() {
            all.extend(summary(&path).into_iter().map(|(inner, what)| (format!("{name}/{inner}"), what)));
            all.insert(name, (mode, Vec::new()));
        } else {
            all.insert(name, (mode, fs::read(&path).unwrap()));
        }
    }
    all
}

/// A tree like that of a program's source.
fn plant(tree: &Path) {
    for folder in 0..40 {
        let folder = tree.join(format!("part{}/section{folder}", folder % 6));
        fs::create_dir_all(&folder).unwrap();
        for file in 0..40 {
            let path = folder.join(format!("file{file}.c"));
            fs::write(&path, format!("line {file}\n").repeat(file * file)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(if file % 7 == 0 { 0o755 } else { 0o640 })).unwrap();
        }
        symlink("../../part0", folder.join("link")).unwrap();
    }
}

#[test]
fn a_tree_is_copied_and_ten_thousand_files_are_removed() {
    let folder = Folder::new();
    plant(&folder.path("tree"));
    let planted = summary(&folder.path("tree"));
    let mut guest = folder.guest("");
    guest.shell("cp -a /share/tree /share/copy");
    assert!(summary(&folder.path("copy")) == planted, "the copy differs");
    // What the host changes is seen in the guest.
    fs::write(folder.path("copy/part0/section0/file1.c"), "from the host\n").unwrap();
    guest.shell("grep -x 'from the host' /share/copy/part0/section0/file1.c");
    guest.shell("mv /share/copy/part1 /share/moved && rm -r /share/copy /share/moved");
    assert!(summary(&folder.path("tree")) == planted);

    // Many files: some made by the guest, most by the host, all listed and removed by the guest.
    guest.shell("mkdir /share/many0 && for f in $(seq 1000); do echo $f >/share/many0/file$f; done");
    assert_eq!(files::names_in(&folder.path("many0")).len(), 1000);
    assert_eq!(fs::read_to_string(folder.path("many0/file777")).unwrap(), "777\n");
    for thousand in 1..10 {
        let many = folder.path(&format!("many{thousand}"));
        fs::create_dir(&many).unwrap();
        (1..=1000).for_each(|file| fs::write(many.join(format!("file{file}")), b"x").unwrap());
    }
    guest.shell("ls /share/many* | grep -c '^file' | grep -x 10000");
    guest.shell("[ $(cat /share/many5/* | wc -c) = 1000 ] && rm -r /share/many*");
    assert_eq!(files::names_in(&folder.path("")), ["tree"]);
    guest.send("poweroff\n");
    guest.expect_exit(1);
}

#[test]
fn links_permissions_and_renames() {
    let folder = Folder::new();
    fs::write(folder.0.path().join("secret"), "secret").unwrap();
    symlink("../secret", folder.path("out")).unwrap();
    let mut guest = folder.guest("");
    // The prompt tells where the shell is, so it stays where it was.
    let inside = |command: &str| format!("(cd /share && {command})");
    // A link that leads out of the share on the host leads nowhere in the guest.
    let (_, status) = guest.shell_status("cat /share/out");
    guest.check(status != 0, "the guest read a file outside the share");
    guest.shell(&inside(
        "echo text >f && chmod 4751 f && ln f hard && ln -s f soft && mkfifo fifo && mkdir -m 1777 sticky",
    ));
    guest.shell(&inside(
        "cat soft | grep -x text && [ $(stat -c %h f) = 2 ] && [ $(readlink soft) = f ] && [ -p fifo ]",
    ));
    assert_eq!(fs::metadata(folder.path("f")).unwrap().permissions().mode(), 0o104_751);
    assert_eq!(fs::metadata(folder.path("sticky")).unwrap().permissions().mode(), 0o041_777);
    assert_eq!(fs::read_link(folder.path("soft")).unwrap(), Path::new("f"));
    guest.shell(&inside("(echo through >fifo &) && grep -x through fifo"));
    guest.shell(&inside("touch -d '2001-02-03 04:05:06' f && [ \"$(stat -c %Y f)\" = 981173106 ]"));
    assert_eq!(fs::metadata(folder.path("f")).unwrap().mtime(), 981_173_106);
    if geteuid().is_root() {
        guest.shell(&inside("chown 1234:5678 f"));
        let meta = fs::metadata(folder.path("f")).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 5678));
    }
    // Open files survive being renamed and removed.
    guest.shell(&inside(
        "exec 5>open && echo one >&5 && mv open sticky/other && echo two >&5 && grep -x two sticky/other && \
         rm sticky/other && echo three >&5 && exec 5>&-",
    ));
    guest.shell(&inside("echo new >n && mv n f && grep -x new f && grep -x text hard"));
    guest.shell(&inside(
        "dd if=/dev/zero of=sparse bs=1M count=1 seek=99 2>/dev/null && truncate -s 10M sparse && \
         [ $(stat -c %s sparse) = 10485760 ] && dd if=f of=synced conv=fsync 2>/dev/null && df . | grep -q share",
    ));
    guest.shell("cd /share && rm -r f hard soft fifo sticky sparse synced; cd / && umount /share");
    assert_eq!(files::names_in(&folder.path("")), ["out"]);
    guest.send("poweroff\n");
    guest.expect_exit(1);
}

#[test]
fn a_read_only_share() {
    let folder = Folder::new();
    fs::write(folder.path("f"), "text\n").unwrap();
    let mut guest = folder.guest(",ro");
    guest.shell("grep -x text /share/f");
    for command in ["echo x >/share/f", "touch /share/g", "rm /share/f", "mkdir /share/d", "chmod 600 /share/f"] {
        let (output, status) = guest.shell_status(&format!("{{ {command}; }} 2>&1"));
        guest.check(status != 0 && output.contains("Read-only file system"), &format!("{command}: {output}"));
    }
    guest.send("poweroff\n");
    guest.expect_exit(1);
    assert_eq!(fs::read_to_string(folder.path("f")).unwrap(), "text\n");
}

/// Ends a process that the test has started.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// virtio-fs by the virtiofsd of Debian's qemu-system-common, which only root can run.
#[test]
fn a_folder_of_virtiofsd() {
    let program = Path::new("/usr/lib/qemu/virtiofsd");
    if !geteuid().is_root() {
        println!("left out: only root can run {}", program.display());
        return;
    }
    let folder = Folder::new();
    plant(&folder.path("tree"));
    let socket = folder.0.path().join("fs.sock");
    let daemon = std::process::Command::new(program)
        .arg(format!("--socket-path={}", socket.display()))
        .arg("-o")
        .arg(format!("source={}", folder.path("").display()))
        .stderr(std::process::Stdio::null())
        .spawn();
    let _daemon = Daemon(daemon.expect("cannot run virtiofsd: install qemu-system-common"));
    let start = std::time::Instant::now();
    while !socket.exists() {
        assert!(start.elapsed() < e2e::PATIENCE, "virtiofsd does not listen");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // The same again by a virtiofsd that bhyve starts.
    let own = Folder::new();
    fs::write(own.path("text"), "of its own\n").unwrap();
    let device = format!("6,virtio-fs,tag,socket={}", socket.display());
    let own_device = format!("7,virtio-fs,own,path={}", own.path("").display());
    let mut guest = Linux::generic().device(&device).device(&own_device).boot();
    guest.shell("mkdir /own && mount -t virtiofs own /own && grep -x 'of its own' /own/text && cp /own/text /own/copy");
    assert_eq!(fs::read_to_string(own.path("copy")).unwrap(), "of its own\n");
    guest.shell("umount /own");
    guest.shell("mkdir /share && mount -t virtiofs tag /share && cp -a /share/tree /share/copy");
    assert!(summary(&folder.path("copy")) == summary(&folder.path("tree")), "the copy differs");
    guest.shell("cp -a /share/copy /tmp/ && rm -r /share/copy && umount /share");
    guest.shell("mount -t virtiofs tag /share && cp -a /tmp/copy /share/back");
    assert!(summary(&folder.path("back")) == summary(&folder.path("tree")), "what was read differs");
    guest.shell("rm -r /share/back && umount /share");
    assert_eq!(files::names_in(&folder.path("")), ["tree"]);
    // Programs run from it: what the other process writes is code.
    guest.shell("mount -t virtiofs tag /share && cp /bin/busybox /share/ && umount /share");
    guest.shell("mount -t virtiofs tag /share && /share/busybox uname -m | grep -x x86_64 && umount /share");
    guest.send("poweroff\n");
    guest.expect_exit(1);
}

/// A folder with the files of an installed Debian: its disk, mounted.
struct Root(TempDir);

impl Root {
    /// `None` if the host does not let us mount it.
    fn mount() -> Option<Self> {
        if !geteuid().is_root() {
            println!("left out: only root can mount the disk of the installed Debian and own its files");
            return None;
        }
        let root = Self(files::scratch());
        let disk = root.0.path().join("disk.img");
        files::copy_sparse(&files::guest_file("debian-amd64/disk.img"), &disk);
        fs::create_dir(root.folder()).unwrap();
        // Where the recipe puts it: behind 1 MB for the partition table and the EFI system partition of 64 MB.
        let options = format!("loop,offset={}", 65 << 20);
        let output = Command::new("mount").args(["-t", "ext4", "-o", &options]).arg(&disk).arg(root.folder()).output();
        let output = output.expect("cannot run mount");
        if !output.status.success() {
            println!("left out: no disk can be mounted here: {}", String::from_utf8_lossy(&output.stderr).trim());
            return None;
        }
        Some(root)
    }

    fn folder(&self) -> std::path::PathBuf {
        self.0.path().join("root")
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // Not mounted, if that has failed; busy, if a process is left behind.
        let _ = Command::new("umount").arg("--lazy").arg(self.folder()).output();
    }
}

/// Debian with its root file system on 9p, and hard work on that. What the program finds goes by its exit status.
#[test]
fn debian_with_its_root_over_9p() {
    let Some(root) = Root::mount() else { return };
    fs::write(root.folder().join("root/stress.py"), include_str!("../src/stress.py")).unwrap();
    // The disk's file systems are not there, and a name server is none of this test's business.
    fs::write(root.folder().join("etc/fstab"), "").unwrap();
    let words = "console=ttyS0 quiet root=rootfs rootfstype=9p \
                 rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=mmap";
    let linux = Linux::generic().cpus(2).memory("1G").words(words);
    let linux = linux.device(&format!("6,virtio-9p,rootfs={}", root.folder().display()));
    let mut guest = linux.start();
    debian::log_in(&mut guest);
    println!("Debian over 9p: shell after {:.1} s", guest.age().as_secs_f64());
    guest.shell("grep -q '^rootfs / 9p ' /proc/mounts && systemctl is-active systemd-journald dbus.socket");
    guest.shell("dpkg --audit && dpkg --verify coreutils && python3 /root/stress.py /root/work 4 1500 >/tmp/log 2>&1");
    println!("{}", guest.shell("tail -n 5 /tmp/log").trim());
    // A lock of the guest's holds on the host, and the other way round.
    let file = root.folder().join("root/locked");
    fs::write(&file, "").unwrap();
    let host = fs::File::options().read(true).write(true).open(&file).unwrap();
    guest.shell("python3 /root/stress.py --lock /root/locked free");
    guest.send("python3 /root/stress.py --lock /root/locked hold\n");
    guest.wait_for("HOLDING");
    let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    assert!(rustix::fs::fcntl_lock(&host, exclusive).is_err(), "the guest's lock does not hold on the host");
    guest.send("\n");
    guest.wait_for("RELEASED");
    guest.wait_for(e2e::linux::PROMPT);
    rustix::fs::fcntl_lock(&host, exclusive).unwrap();
    guest.shell("python3 /root/stress.py --lock /root/locked taken");
    debian::power_off(&mut guest);
}
