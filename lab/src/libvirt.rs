//! One libvirtd a host: in the host's network namespace, with folders, configuration and host name of its own.
//!
//! Only what two libvirtds would fight over is private (`/run`, `/etc/{libvirt,hosts}`, `/var/{lib,log,cache}/libvirt`); QEMU sees
//! the machine's programs and devices, and of the lab its own host's folder alone, so no other host's images.

use crate::error::{Doing, LabError, Result};
use crate::keep::KeepPlan;
use crate::netns;
use crate::process::{ProcessId, wait_for};
use crate::state::{HostState, LabState};
use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// libvirt's port without TLS.
const PORT: u16 = 16509;
/// It asks QEMU for its abilities first, which takes seconds on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Run by `sh -e` in new mount and UTS namespaces. `$1`: the host's folder, below /run; `$2`: its name.
///
/// The host's folder is put into the new /run before that hides the old one. `--rbind`, since the folder is a mount of its
/// own by then.
const ENTER: &str = r#"
private=$1/libvirt
mount -t tmpfs -o mode=755 tmpfs "$private/run"
mkdir -p "$private/run/${1#/run/}"
mount --bind "$1" "$private/run/${1#/run/}"
mount --rbind "$private/run" /run
for folder in lib log cache; do mount --bind "$private/$folder" "/var/$folder/libvirt"; done
mount --bind "$private/etc" /etc/libvirt
mount --bind "$private/hosts" /etc/hosts
hostname "$2"
exec libvirtd --listen --config /etc/libvirt/libvirtd.conf
"#;

/// How its own monitor reaches it.
pub(crate) fn local_uri() -> String {
    format!("qemu+tcp://{}/system", Ipv4Addr::LOCALHOST)
}

/// How others on the underlay reach it.
pub(crate) fn incoming_uri(host: &HostState) -> String {
    format!("qemu+tcp://{}/system", host.address)
}

fn log(host: &HostState) -> PathBuf {
    host.dir.join("libvirtd.log")
}

/// Starts it. Whether it answers is for [`wait_ready`] to say.
pub(crate) fn start(lab: &LabState, host: &HostState, helper: &[OsString]) -> Result<ProcessId> {
    let private = host.dir.join("libvirt");
    for folder in ["run", "lib", "log", "cache", "etc/qemu"] {
        let folder = private.join(folder);
        fs::create_dir_all(&folder).doing(|| format!("making {}", folder.display()))?;
    }
    // Targets of the bind mounts, which a machine that never ran libvirt may lack.
    for folder in ["/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt", "/etc/libvirt"] {
        fs::create_dir_all(folder).doing(|| format!("making {folder}"))?;
    }
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").doing(|| "drawing a UUID".to_owned())?;
    let daemon = format!(
        "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n\
         host_uuid = \"{}\"\nlog_outputs = \"2:stderr\"\nmax_clients = 200\nmax_workers = 40\nprio_workers = 10\n",
        uuid.trim()
    );
    let qemu = format!(
        "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nnamespaces = []\nstdio_handler = \"file\"\n\
         remember_owner = 0\ndynamic_ownership = 0\nmigration_host = \"{0}\"\nmigration_address = \"{0}\"\n",
        host.address
    );
    // libvirt looks up its own host's name at every turn, and without an answer waits for a name server that is not there.
    let names: String = lab.hosts.iter().map(|host| format!("{} {}\n", host.address, host.host)).collect();
    let hosts = format!("127.0.0.1 localhost\n{names}");
    for (name, text) in [("etc/libvirtd.conf", daemon), ("etc/qemu.conf", qemu), ("hosts", hosts)] {
        let file = private.join(name);
        fs::write(&file, text).doing(|| format!("writing {}", file.display()))?;
    }
    let folder = host.dir.to_str().ok_or_else(|| LabError::Name(format!("{} is not UTF-8", host.dir.display())))?;
    let words = ["unshare", "--mount", "--uts", "sh", "-e", "-c", ENTER, "sh", folder, host.host.as_str()];
    let keep = KeepPlan { command: words.map(str::to_owned).into(), pid: host.dir.join("libvirtd.pid") };
    let plan = host.dir.join("keep.json");
    let text = serde_json::to_string_pretty(&keep).map_err(std::io::Error::from).doing(|| "writing keep.json".to_owned())?;
    fs::write(&plan, text).doing(|| format!("writing {}", plan.display()))?;
    let [program, words @ ..] = helper else { return Err(LabError::no_helper()) };
    let mut command = netns::spawn_in(&host.netns, program)?;
    command.args(words).arg("keep").arg(&plan).env_remove("LIBVIRT_DEFAULT_URI");
    let keeper = crate::daemons::spawn(command, "libvirtd's keeper", &log(host))?;
    let mut process = None;
    wait_for("libvirtd to start", LIMIT, Some(&log(host)), || {
        let pid = fs::read_to_string(&keep.pid).ok().and_then(|text| text.parse().ok());
        process = pid.and_then(ProcessId::of);
        if process.is_none() {
            crate::daemons::check_alive("libvirtd's keeper", keeper, &log(host))?;
        }
        Ok(process.is_some())
    })?;
    process.ok_or_else(LabError::no_helper)
}

/// Waits until it answers a question, not only accepts a connection.
pub(crate) fn wait_ready(host: &HostState, process: ProcessId, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
    let log = log(host);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    wait_for(&format!("libvirtd of {} to accept connections", host.host), LIMIT, Some(&log), || {
        go_on()?;
        crate::daemons::check_alive(&format!("libvirtd of {}", host.host), process, &log)?;
        match netns::inside(&host.netns, || TcpStream::connect_timeout(&address, Duration::from_secs(1))) {
            Ok(_) => Ok(true),
            Err(LabError::Io { .. }) => Ok(false),
            Err(other) => Err(other),
        }
    })?;
    let mut virsh = Command::new("virsh");
    netns::enter(&mut virsh, &host.netns)?.args(["--connect", &local_uri(), "list", "--all"]);
    netns::run(&mut virsh).map(|_| ())
}

/// Makes the first host's libvirtd ask QEMU what it can do, and gives the answer to the others.
///
/// It takes 4 s of CPU and would otherwise be asked by every libvirtd when its first VM starts or arrives: in the middle of
/// a move. libvirt itself checks that an answer in its cache belongs to this QEMU and this kernel.
pub(crate) fn learn_abilities(hosts: &[HostState]) -> Result<()> {
    let Some((first, others)) = hosts.split_first() else { return Ok(()) };
    let mut virsh = Command::new("virsh");
    netns::enter(&mut virsh, &first.netns)?.args(["--connect", &local_uri(), "domcapabilities", "--virttype", "qemu"]);
    netns::run(&mut virsh)?;
    let folder = |host: &HostState| host.dir.join("libvirt/cache/qemu/capabilities");
    let from = folder(first);
    let answers = fs::read_dir(&from).doing(|| format!("reading {}", from.display()))?;
    let answers: Vec<PathBuf> = answers.flatten().map(|entry| entry.path()).collect();
    for host in others {
        let to = folder(host);
        fs::create_dir_all(&to).doing(|| format!("making {}", to.display()))?;
        for answer in &answers {
            let to = to.join(answer.file_name().unwrap_or_default());
            fs::copy(answer, &to).doing(|| format!("writing {}", to.display()))?;
        }
    }
    Ok(())
}
