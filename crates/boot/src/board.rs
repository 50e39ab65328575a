//! [`Board`]: what the tables describe.

/// The machine as firmware would know it. Made by the host alone; nothing in it comes from the guest.
#[derive(Clone, Debug)]
pub struct Board {
    /// Local APIC id of each vCPU; the boot vCPU first.
    pub apic_ids: Vec<u32>,
    /// The APICs start in x2APIC mode (`-x`).
    pub x2apic: bool,
    /// How the vCPUs are arranged (`-c`).
    pub topology: Topology,
    /// Bytes of RAM from address 0.
    pub low_memory: u64,
    /// Bytes of RAM from 4 GiB.
    pub high_memory: u64,
    /// PCI root buses that hold a device; bus 0 first.
    pub buses: Vec<PciBus>,
    /// The ISA bridge and what stands behind it, if the machine has one.
    pub lpc: Option<Lpc>,
    /// The HPET, by the low half of its capabilities register.
    pub hpet: Option<u32>,
    /// There is a QEMU-style fw_cfg device.
    pub fw_cfg: bool,
    /// There is a TPM 2.0 with a CRB.
    pub tpm: bool,
    /// There is a VM generation counter: this value, at [`GENERATION_ID_BASE`](crate::GENERATION_ID_BASE).
    pub generation_id: Option<[u8; 16]>,
    /// Memory domains (`-n`), in the order of the addresses that they get; empty if there is but one.
    pub numa: Vec<NumaDomain>,
    /// What each core or socket has as caches.
    pub caches: Vec<Cache>,
    /// Write ACPI tables.
    pub acpi: bool,
    /// Write an MP table (not with `-Y`).
    pub mptable: bool,
    /// UUID of the machine, in the order in which it is printed.
    pub uuid: [u8; 16],
    /// Names that SMBIOS shows.
    pub smbios: SmbiosStrings,
}

/// The arrangement of vCPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Cores in a socket.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

/// A memory domain of the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NumaDomain {
    /// Bytes of RAM.
    pub size: u64,
    /// Indices of its vCPUs.
    pub cpus: Vec<u32>,
}

/// A processor cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cache {
    /// 1–3.
    pub level: u8,
    /// What it holds.
    pub kind: CacheKind,
    /// Bytes.
    pub size: u64,
    /// Ways; 0 if it is fully associative.
    pub ways: u32,
}

/// What a cache holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheKind {
    /// Data alone.
    Data,
    /// Instructions alone.
    Instruction,
    /// Both.
    Unified,
}

/// A PCI root bus.
#[derive(Clone, Debug, Default)]
pub struct PciBus {
    /// Bus number.
    pub number: u8,
    /// I/O ports that its BARs may use.
    pub io: Option<Window>,
    /// Addresses below 4 GiB that its BARs may use.
    pub mem32: Option<Window>,
    /// Addresses above 4 GiB that its BARs may use.
    pub mem64: Option<Window>,
    /// Where its legacy interrupts go.
    pub routes: Vec<InterruptRoute>,
}

/// A range of ports or addresses that a bus decodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// First port or address.
    pub base: u64,
    /// How many.
    pub size: u64,
}

impl Window {
    /// The last port or address; the base if the window is empty.
    pub fn last(&self) -> u64 {
        self.base.saturating_add(self.size.saturating_sub(1))
    }
}

/// Where one INTx pin of a slot goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InterruptRoute {
    /// Device number on the bus, 0–31.
    pub slot: u8,
    /// 1 for INTA# to 4 for INTD#.
    pub pin: u8,
    /// Global system interrupt: the I/O APIC pin.
    pub gsi: u32,
    /// PIRQ link: 0 for LNKA to 7 for LNKH.
    pub link: u8,
}

/// The ISA bridge, on bus 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lpc {
    /// Device number.
    pub slot: u8,
    /// Function number.
    pub function: u8,
    /// Which of COM1–COM4 exist.
    pub uarts: [bool; 4],
}

macro_rules! smbios_strings {
    ($($field:ident $key:literal $default:literal;)*) => {
        /// The strings of the SMBIOS tables; each is named by its configuration key.
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub struct SmbiosStrings {
            $(#[doc = concat!("`", $key, "`, by default `", $default, "`.")] pub $field: String,)*
        }

        impl SmbiosStrings {
            /// Takes each string from `get`, which is asked by configuration key (`system.serial_number`), or its default.
            pub fn from_keys(mut get: impl FnMut(&str) -> Option<String>) -> Self {
                Self { $($field: get($key).unwrap_or_else(|| $default.to_owned()),)* }
            }
        }
    };
}

smbios_strings! {
    bios_vendor "bios.vendor" "BHYVE";
    bios_version "bios.version" "14.0";
    bios_release_date "bios.release_date" "10/17/2021";
    system_manufacturer "system.manufacturer" "FreeBSD";
    system_product_name "system.product_name" "BHYVE";
    system_version "system.version" "1.0";
    system_serial_number "system.serial_number" "None";
    system_sku "system.sku" "None";
    system_family_name "system.family_name" "Virtual Machine";
    board_manufacturer "board.manufacturer" "FreeBSD";
    board_product_name "board.product_name" "BHYVE";
    board_version "board.version" "1.0";
    board_serial_number "board.serial_number" "None";
    board_asset_tag "board.asset_tag" "None";
    board_location "board.location" "None";
    chassis_manufacturer "chassis.manufacturer" "FreeBSD";
    chassis_version "chassis.version" "1.0";
    chassis_serial_number "chassis.serial_number" "None";
    chassis_asset_tag "chassis.asset_tag" "None";
    chassis_sku "chassis.sku" "None";
}

impl Default for SmbiosStrings {
    fn default() -> Self {
        Self::from_keys(|_| None)
    }
}
