//! Domain descriptions: text in, text out. Knows libvirt's XML, calls nothing.
//!
//! A VM's paths, its interface and its CPU group differ from host to host; they are its [`Places`]. The destination says
//! what its own are, and the source puts them into the running domain's description before it sends it there.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use violin_common::VmId;
use violin_common::config::monitor::Accel;
use violin_common::control::monitor::VmSpec;

/// Name under which the guest finds its configuration in QEMU's firmware configuration device.
const GUEST_CONFIG: &str = "opt/org.violin/guest";

/// Boots a kernel directly, and of all machines fastest under translation.
pub(super) const MACHINE: &str = "pc";

/// libvirt's word for how guest code is run.
pub(super) fn kind(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "qemu",
    }
}

/// What the guest's kernel is told.
///
/// Without `no_timer_check` a guest that boots under a tight CPU quota may panic ("8254 timer not connected to IO-APIC").
/// Under translation QEMU keeps translated code by its virtual address, so with address randomisation every new process is
/// translated anew, and page-table isolation empties the soft TLB at every system call; neither protects a guest there.
/// docs/decisions/0007 has the figures.
const fn command_line(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "console=ttyS0 quiet no_timer_check",
        Accel::Tcg => "console=ttyS0 quiet no_timer_check norandmaps",
    }
}

/// Where a VM's things are on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Places {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) root: PathBuf,
    pub(super) console: PathBuf,
    pub(super) guest_config: PathBuf,
    pub(super) interface: String,
    pub(super) cpu_group: Option<String>,
}

/// A VM's UUID at the hypervisor, derived from its name: by it our domains are told from others, on every host alike.
///
/// Shape: a version 8 UUID (RFC 9562 §5.8).
pub(super) fn uuid(vm: &VmId) -> [u8; 16] {
    let digest = Sha256::digest(format!("violin vm {vm}"));
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest[..16]);
    uuid[6] = 0x80 | (uuid[6] & 0x0f);
    uuid[8] = 0x80 | (uuid[8] & 0x3f);
    uuid
}

/// Writes the description a VM is started with.
///
/// The guest's driver is told the network's MTU (`host_mtu` of virtio-net): an image that knows nothing of us gets it right.
/// UDP it does not hand over to be cut into fragments, as kernels before 4.14 would: no packet socket can read that.
/// The CPU under translation is `qemu64`, which every
/// QEMU can run, so a VM can move to any host; with hardware it is the host's own model. Reset ends in a reboot of the
/// same QEMU, everything else ends the domain: it is transient, so nothing is left behind. The guest's configuration goes
/// by a file, for libvirt 9.0 hands an inline entry to QEMU with its XML escapes and commas as they are.
pub(super) fn describe(spec: &VmSpec, places: &Places, accel: Accel) -> String {
    let cpu = match accel {
        Accel::Kvm => "<cpu mode='host-model'/>",
        Accel::Tcg => "<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>",
    };
    let kind = kind(accel);
    let command_line = command_line(accel);
    let uneven_memory = match accel {
        Accel::Kvm => String::new(),
        Accel::Tcg => uneven_memory(spec.memory_mib),
    };
    let group = places
        .cpu_group
        .as_ref()
        .map_or_else(String::new, |name| format!("<resource><partition>/{}</partition></resource>", escape(name)));
    let uuid = hex(&uuid(&spec.vm));
    format!(
        "<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory}</memory>
  <vcpu placement='static'>{vcpus}</vcpu>
  {group}
  <sysinfo type='fwcfg'><entry name='{GUEST_CONFIG}' file='{guest_config}'/></sysinfo>
  <os>
    <type arch='x86_64' machine='{MACHINE}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{root}'/>
      <target dev='vda' bus='virtio'/>
      <readonly/>
      <shareable/>
    </disk>
    <interface type='ethernet'>
      <mac address='{mac}'/>
      <target dev='{interface}' managed='no'/>
      <model type='virtio'/>
      <driver><host ufo='off'/></driver>
      <mtu size='{mtu}'/>
    </interface>
    <serial type='file'><source path='{console}' append='on'/><target port='0'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='virtio'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
  <seclabel type='none'/>
  {uneven_memory}
</domain>",
        name = spec.vm,
        memory = spec.memory_mib,
        vcpus = spec.vcpus,
        kernel = path(&places.kernel),
        initrd = path(&places.initrd),
        root = path(&places.root),
        console = path(&places.console),
        guest_config = path(&places.guest_config),
        mac = spec.mac,
        mtu = spec.network.mtu,
        interface = escape(&places.interface),
    )
}

/// Two pages more than asked for, so that no store of a translated guest is lost while its memory is copied.
///
/// Where a memory block is a multiple of 64 pages, QEMU before 9.0 collects the pages to copy again by whole words and
/// forgets to tell the translator's soft TLB, which goes on writing to them unrecorded; any other size takes the page by
/// page way, which does tell it. libvirt rounds `<memory>` to whole MiB, so the block is given beside it.
/// docs/decisions/0009 has the evidence.
fn uneven_memory(mib: u64) -> String {
    let bytes = (mib << 20) + 2 * 4096;
    format!(
        "<qemu:commandline>
    <qemu:arg value='-object'/><qemu:arg value='memory-backend-ram,id=violin.ram,size={bytes}'/>
    <qemu:arg value='-machine'/><qemu:arg value='memory-backend=violin.ram'/>
    <qemu:arg value='-m'/><qemu:arg value='size={bytes}B'/>
  </qemu:commandline>"
    )
}

/// Puts another host's places into a running domain's description, and nothing else: devices must stay where they are.
///
/// `None` if the description lacks a place, so it is not one of ours.
pub(super) fn retarget(xml: &str, places: &Places) -> Option<String> {
    let xml = replace(xml, &["<kernel>"], "</kernel>", &path(&places.kernel))?;
    let xml = replace(&xml, &["<initrd>"], "</initrd>", &path(&places.initrd))?;
    let xml = replace(&xml, &["<sysinfo type='fwcfg'>", "<entry ", "file='"], "'", &path(&places.guest_config))?;
    let xml = replace(&xml, &["<disk ", "<source ", "file='"], "'", &path(&places.root))?;
    let xml = replace(&xml, &["<interface ", "<target ", "dev='"], "'", &escape(&places.interface))?;
    let console = path(&places.console);
    let xml = replace(&xml, &["<serial ", "<source ", "path='"], "'", &console)?;
    // libvirt shows the first serial port a second time as the console; one that it left out is no fault.
    let xml = replace(&xml, &["<console ", "<source ", "path='"], "'", &console).unwrap_or(xml);
    match &places.cpu_group {
        Some(group) => replace(&xml, &["<partition>"], "</partition>", &format!("/{}", escape(group))),
        None => match (xml.find("<resource>"), xml.find("</resource>")) {
            (Some(from), Some(to)) if from < to => Some(format!("{}{}", &xml[..from], &xml[to + "</resource>".len()..])),
            _ => Some(xml),
        },
    }
}

/// Replaces what stands between the last of `marks`, each searched after the one before, and the next `end`.
fn replace(xml: &str, marks: &[&str], end: &str, with: &str) -> Option<String> {
    let mut from = 0;
    for mark in marks {
        from += xml[from..].find(mark)? + mark.len();
    }
    let to = from + xml[from..].find(end)?;
    Some(format!("{}{with}{}", &xml[..from], &xml[to..]))
}

fn path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

/// Text as XML content or attribute; what XML 1.0 cannot carry at all becomes a replacement character.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            '\r' => out.push_str("&#13;"),
            '\n' | '\t' => out.push(char),
            _ if char < ' ' || char == '\u{fffe}' || char == '\u{ffff}' => out.push('\u{fffd}'),
            _ => out.push(char),
        }
    }
    out
}

fn hex(uuid: &[u8; 16]) -> String {
    let digits: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..])
}

#[cfg(test)]
mod tests;
