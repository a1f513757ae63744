//! A guest small enough for a test: Debian's cloud kernel and an initial RAM disk of busybox.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use monitord::hypervisor::ImageFiles;

/// Modules in the order in which they must be loaded.
const MODULES: [&str; 13] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/virtio/virtio_balloon",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/block/virtio_blk",
    "drivers/firmware/qemu_fw_cfg",
    "drivers/char/hw_random/rng-core",
    "drivers/char/hw_random/virtio-rng",
];

/// Shows its configuration and root image, says that it is ready, then counts for ever; `DIRTY` rewrites memory meanwhile.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mkdir -p /tmp; mount -t tmpfs tmp /tmp
for module in MODULES; do [ -e /m/$module.ko ] && insmod /m/$module.ko; done
ip link set eth0 up; ip addr add ADDRESS/24 dev eth0
sed 's/^/config: /' /sys/firmware/qemu_fw_cfg/by_name/opt/org.violin/guest/raw
echo "root: $(head -c 10 /dev/vda)"
echo "mtu: $(cat /sys/class/net/eth0/mtu)"
echo "ufo: $(cut -c15 /sys/class/net/eth0/device/features)"
(while :; do dd if=/dev/zero of=/tmp/dirt bs=64k count=256 2>/dev/null; sleep 0.05; done) &
echo violin-guest: ready
count=0; while :; do count=$((count+1)); echo "tick $count"; sleep 0.1; done
"#;

/// Fetches the kernel package into `cache` once and unpacks it there; returns where.
pub(crate) fn kernel(cache: &Path) -> PathBuf {
    let unpacked = cache.join("kernel");
    if unpacked.join("boot").is_dir() {
        return unpacked;
    }
    fs::create_dir_all(cache).unwrap();
    let script = "set -e; package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/{print $2}'); \
                  apt-get -q download $package; rm -rf new; dpkg-deb -x linux-image-*.deb new; rm linux-image-*.deb; mv new kernel";
    let done = Command::new("sh").args(["-c", script]).current_dir(cache).output().unwrap();
    assert!(done.status.success(), "fetching the kernel package: {}", String::from_utf8_lossy(&done.stderr));
    unpacked
}

/// Writes kernel, initial RAM disk and root image for one host.
pub(crate) fn image(kernel: &Path, into: &Path, address: &str) -> ImageFiles {
    fs::create_dir_all(into).unwrap();
    let only = |folder: PathBuf, prefix: &str| {
        let mut entries = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        entries.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix)).unwrap()
    };
    let files = ImageFiles { kernel: into.join("vmlinuz"), initrd: into.join("initrd"), root: into.join("root.img") };
    fs::copy(only(kernel.join("boot"), "vmlinuz"), &files.kernel).unwrap();
    let modules = only(kernel.join("lib/modules"), "").join("kernel");
    let names: Vec<&str> = MODULES.iter().map(|module| module.rsplit('/').next().unwrap()).collect();
    let mut archive = Archive::default();
    for folder in ["bin", "proc", "sys", "dev", "m"] {
        archive.add(folder, 0o040_755, b"");
    }
    archive.add("bin/busybox", 0o100_755, &fs::read("/bin/busybox").unwrap());
    archive.add("init", 0o100_755, INIT.replace("MODULES", &names.join(" ")).replace("ADDRESS", address).as_bytes());
    for (module, name) in MODULES.iter().zip(names) {
        if let Ok(bytes) = fs::read(modules.join(format!("{module}.ko"))) {
            archive.add(&format!("m/{name}.ko"), 0o100_644, &bytes); // the others are built into this kernel
        }
    }
    fs::write(&files.initrd, archive.end()).unwrap();
    let mut root = b"root-image".to_vec();
    root.resize(1 << 20, 0);
    fs::write(&files.root, root).unwrap();
    files
}

/// A cpio archive in the "newc" format the kernel reads. Source: Documentation/driver-api/early-userspace/buffer-format.rst.
#[derive(Default)]
struct Archive(Vec<u8>, u32);

impl Archive {
    fn add(&mut self, name: &str, mode: u32, bytes: &[u8]) {
        self.1 += 1;
        let links = if mode & 0o040_000 != 0 { 2 } else { 1 };
        let fields = [self.1, mode, 0, 0, links, 0, bytes.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.0.extend(b"070701");
        for field in fields {
            self.0.extend(format!("{field:08x}").bytes());
        }
        self.0.extend(name.bytes());
        self.0.push(0);
        self.pad();
        self.0.extend(bytes);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, b"");
        self.0
    }
}
