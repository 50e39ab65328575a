//! The software CPU's keys, with Debian's kernel.

use e2e::Linux;
use e2e::linux::{Guest, PROMPT};

/// A guest of the software engine.
fn soft(keys: &[&str]) -> Linux {
    keys.iter().fold(Linux::amd64().key("cpu.engine=soft"), |linux, key| linux.key(key))
}

fn flags(guest: &mut Guest) -> Vec<String> {
    let line = guest.shell("grep -m1 ^flags /proc/cpuinfo");
    line.split_whitespace().skip(2).map(str::to_owned).collect()
}

/// Every translated block of a kernel's life, from its start to power-off, is compared with the interpreter; the program ends by
/// abort(3) at a difference. Without the kernel's tests of its ciphers, which take as long as the rest.
#[test]
fn a_kernel_in_lock_step() {
    let mut guest = soft(&["cpu.jit.check=1"]).words("cryptomgr.notests nowatchdog").start();
    for stage in ["Memory: ", "AppArmor: ", "PnP ACPI: ", "Freeing initrd", "Run /init"] {
        guest.wait_for(stage);
    }
    guest.wait_for(PROMPT);
    guest.send("poweroff\n");
    guest.expect_exit(1);
}

/// The switch of the translator goes with its other keys.
#[test]
fn without_the_translator() {
    let mut guest = soft(&["cpu.jit=false", "cpu.jit.check=1", "cpu.jit.cache=8M", "cpu.stats=true"]).start();
    guest.wait_for("Linux version");
    guest.signal(rustix::process::Signal::KILL);
    guest.wait();
    let keys = ["-o", "cpu.jit.check=1", "-o", "cpu.jit=false", "-o", "config.dump=1", "vm"];
    let dump = e2e::Bhyve::new(keys).run().stdout;
    assert!(dump.contains("cpu.jit.check=1\ncpu.jit.enabled=false\n"), "{dump}");
}

/// What is hidden is hidden from the guest's kernel and from what it enables.
#[test]
fn hidden_features_are_not_in_cpuinfo() {
    let mut guest = soft(&["cpu.features=-avx,-rdrand,-erms,-sse4.2"]).boot();
    let flags = flags(&mut guest);
    let has = |name: &str| flags.iter().any(|flag| flag == name);
    for name in ["avx", "avx2", "fma", "f16c", "avx512f", "vaes", "rdrand", "erms", "sse4_2"] {
        guest.check(!has(name), &format!("{name} is shown: {flags:?}"));
    }
    for name in ["sse2", "ssse3", "hypervisor", "lm"] {
        guest.check(has(name), &format!("no {name}: {flags:?}"));
    }
    let states = guest.shell("dmesg | grep 'x86/fpu'");
    guest.check(!states.contains("'AVX registers'"), &states);
    guest.send("poweroff\n");
    guest.expect_exit(1);
}

/// A named model is the same everywhere.
#[test]
fn a_named_model() {
    let mut guest = soft(&["cpu.model=x86-64-v2", "cpu.features=+rdrand"]).boot();
    let model = guest.shell("grep -m1 'model name' /proc/cpuinfo");
    guest.check(model.contains("bhyve x86-64-v2"), &model);
    let flags = flags(&mut guest);
    let has = |name: &str| flags.iter().any(|flag| flag == name);
    for name in ["pni", "ssse3", "sse4_1", "sse4_2", "popcnt", "cx16", "lahf_lm", "rdrand"] {
        guest.check(has(name), &format!("no {name}: {flags:?}"));
    }
    for name in ["xsave", "avx", "bmi1", "movbe", "aes", "rdseed", "smap", "pcid"] {
        guest.check(!has(name), &format!("{name} is shown: {flags:?}"));
    }
    guest.send("poweroff\n");
    guest.expect_exit(1);
}
