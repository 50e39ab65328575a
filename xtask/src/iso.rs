//! An installation medium: an ISO 9660 image that firmware starts by its El Torito boot catalogue.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::deb::remove_folder;
use crate::guests::{Guest, copy, write};
use crate::process::{need_tool, output, say};

/// Size of the FAT file system that the boot catalogue names, in sectors of 512 bytes: 8 MiB, room for both boot loaders.
const EFI_SECTORS: &str = "16384";

/// The file on the medium by which GRUB's variant for CDs finds the medium that it came from.
const MARK: &str = ".disk/info";

/// Where that variant then looks for its menu.
const MENU_FILE: &str = "boot/grub/grub.cfg";

const MENU: &str = "\
set timeout=2
menuentry installer --id installer {
  linux /install/linux console=ttyS0 TERM=dumb DEBIAN_FRONTEND=text
  initrd /install/initrd.gz
}
";

/// What goes onto the medium.
pub(crate) struct Medium<'a> {
    /// Debian's signed boot loaders; GRUB's is the variant for CDs.
    pub(crate) shim: &'a Path,
    pub(crate) grub: &'a Path,
    /// Debian's installer.
    pub(crate) installer: &'a Guest,
}

/// Makes the medium unless it is there. It has no partition table: firmware that does not know El Torito cannot start it.
pub(crate) fn make(image: &Path, medium: &Medium<'_>) -> Result<()> {
    if image.exists() {
        return Ok(());
    }
    say(&format!("making the medium {}", image.display()));
    let (content, partial) = (image.with_extension("content"), image.with_extension("partial"));
    remove_folder(&content)?;
    copy(&medium.installer.kernel, &content.join("install/linux"))?;
    copy(&medium.installer.initramfs, &content.join("install/initrd.gz"))?;
    for (name, text) in [(MARK, "Debian's installer\n"), (MENU_FILE, MENU)] {
        let file = content.join(name);
        fs::create_dir_all(file.parent().unwrap_or(&content))
            .with_context(|| format!("cannot make the folder of {}", file.display()))?;
        write(&file, text)?;
    }
    efi_image(&content.join("boot/grub/efi.img"), medium)?;
    output(
        Command::new(need_tool("xorriso", "xorriso")?)
            .args(["-as", "mkisofs", "-quiet", "-rational-rock", "-joliet", "-volid", "INSTALLER"])
            .args(["-e", "boot/grub/efi.img", "-no-emul-boot", "-output"])
            .args([&partial, &content]),
    )?;
    remove_folder(&content)?;
    fs::rename(&partial, image).with_context(|| format!("cannot make {}", image.display()))
}

/// The FAT file system with the boot loaders where firmware looks for them.
fn efi_image(image: &Path, medium: &Medium<'_>) -> Result<()> {
    let mtool = |name| -> Result<Command> {
        let mut command = Command::new(need_tool(name, "mtools")?);
        command.arg("-i").arg(image);
        Ok(command)
    };
    output(mtool("mformat")?.args(["-C", "-T", EFI_SECTORS, "-h", "16", "-s", "63", "::"]))?;
    output(mtool("mmd")?.args(["::/EFI", "::/EFI/BOOT"]))?;
    output(mtool("mcopy")?.arg(medium.shim).arg("::/EFI/BOOT/BOOTX64.EFI"))?;
    output(mtool("mcopy")?.arg(medium.grub).arg("::/EFI/BOOT/grubx64.efi")).map(drop)
}
