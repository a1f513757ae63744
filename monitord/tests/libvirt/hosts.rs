//! Two hosts for a test: a network namespace each with a libvirtd of its own, joined by a veth pair.

use nix::fcntl::{Flock, FlockArg};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use monitord::hypervisor::{Hypervisor, HypervisorEvent};
use monitord::io::cgroup::{Hierarchies, HostGroup};
use monitord::io::libvirt::{Libvirt, Settings};
use std::sync::Mutex;
use std::sync::mpsc::Receiver;
use violin_common::HostId;
use violin_common::config::monitor::Accel;

/// Polls until `found` gives something.
pub(crate) fn wait<T>(what: &str, longest: Duration, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + longest;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {longest:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Does something in a network namespace, in a thread of its own; threads it starts stay there.
pub(crate) fn inside<T: Send>(namespace: &str, what: impl FnOnce() -> T + Send) -> T {
    let path = format!("/run/netns/{namespace}");
    thread::scope(|scope| {
        let work = scope.spawn(move || {
            let file = fs::File::open(path).unwrap();
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            what()
        });
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// PIDs of the QEMU processes of a VM, on whatever host.
pub(crate) fn qemus(vm: &str) -> Vec<i32> {
    let mark = format!("guest={vm},");
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        command.contains("qemu-system") && command.contains(&mark)
    })
    .collect()
}

pub(crate) struct Host {
    pub(crate) name: HostId,
    pub(crate) address: String,
    pub(crate) dir: PathBuf,
    pub(crate) driver: Libvirt,
    pub(crate) events: Mutex<Receiver<HypervisorEvent>>,
    daemon: Child,
}

impl Host {
    fn start(name: &str, number: u8, dir: &Path) -> Self {
        let address = format!("10.99.77.{number}");
        let dir = dir.join(name);
        configure(&dir, name, number, &address);
        sh(&format!(
            "ip netns exec {name} ip addr add {address}/24 dev {name}-u; ip -n {name} link set {name}-u up; ip -n {name} link set lo up"
        ));
        HostGroup::create(&Hierarchies::detect().unwrap(), name).unwrap();
        let daemon = libvirtd(name, &dir);
        let settings = Settings {
            uri: format!("qemu+unix:///system?socket={}/sock/libvirt-sock", dir.display()),
            incoming_uri: format!("qemu+tcp://{address}/system"),
            migrate_address: address.parse().unwrap(),
            accel: Accel::Tcg,
            cpu_group: Some(name.to_owned()),
            run: dir.join("violin"),
        };
        let driver = inside(name, || Libvirt::start(settings).unwrap());
        let events = Mutex::new(driver.events().unwrap());
        let host = Self { name: name.parse().unwrap(), address, dir, driver, events, daemon };
        wait("libvirtd answers", super::LIMIT, || host.driver.list().ok());
        host
    }

    /// Calls the driver as the monitor does: in the host's namespace.
    pub(crate) fn run<T: Send>(&self, what: impl FnOnce(&Libvirt) -> T + Send) -> T {
        inside(self.name.as_str(), || what(&self.driver))
    }

    pub(crate) fn virsh(&self, command: &str) -> String {
        sh(&format!("virsh -q -c 'qemu+unix:///system?socket={}/sock/libvirt-sock' {command}", self.dir.display()))
    }

    pub(crate) fn daemon_pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.daemon.id().cast_signed())
    }

    /// SIGKILL to libvirtd; its VMs go on.
    pub(crate) fn kill(&mut self) {
        self.daemon.kill().unwrap();
        self.daemon.wait().unwrap();
    }

    pub(crate) fn restart(&mut self) {
        self.daemon = libvirtd(self.name.as_str(), &self.dir);
    }
}

fn configure(dir: &Path, name: &str, number: u8, address: &str) {
    for folder in ["etc", "lib", "log", "cache", "sock", "violin"] {
        fs::create_dir_all(dir.join(folder)).unwrap();
    }
    sh(&format!("cp -r /etc/libvirt/. {0}/etc/; rm -rf {0}/etc/qemu/networks/autostart", dir.display()));
    let daemon = format!(
        "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nauth_unix_rw = \"none\"\nunix_sock_dir = \"{}/sock\"\n\
         host_uuid = \"6b1e5c2a-0000-4000-8000-0000000000{number:02x}\"\nlisten_addr = \"{address}\"\n",
        dir.display()
    );
    fs::write(dir.join("etc/libvirtd.conf"), daemon).unwrap();
    let qemu = format!(
        "user = \"root\"\ngroup = \"root\"\nsecurity_driver = \"none\"\nnamespaces = []\nstdio_handler = \"file\"\n\
         remember_owner = 0\nmigration_host = \"{address}\"\n"
    );
    fs::write(dir.join("etc/qemu.conf"), qemu).unwrap();
    fs::write(dir.join("hostname"), name).unwrap();
}

fn libvirtd(name: &str, dir: &Path) -> Child {
    let dir = dir.display();
    let log = fs::File::create(format!("{dir}/libvirtd.log")).unwrap();
    let script = format!(
        "mkdir -p {dir}/run; mount --bind {dir}/run /run; \
         for f in lib log cache; do mount --bind {dir}/$f /var/$f/libvirt; done; mount --bind {dir}/etc /etc/libvirt; \
         hostname {name}; exec libvirtd -l"
    );
    let net = format!("--net=/run/netns/{name}");
    Command::new("nsenter")
        .args([&net, "unshare", "--mount", "--uts", "sh", "-ec", &script])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// Both hosts; all of it goes when this goes.
pub(crate) struct Hosts {
    pub(crate) a: Host,
    pub(crate) b: Host,
    _cleanup: Cleanup,
    _dir: tempfile::TempDir,
    /// Names and addresses are the same in each run: one at a time.
    _turn: Flock<fs::File>,
}

impl Hosts {
    pub(crate) fn start() -> Self {
        let lock = fs::File::create(std::env::temp_dir().join("violin-test-libvirt.lock")).unwrap();
        let turn = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error).unwrap();
        Cleanup::now();
        let cleanup = Cleanup;
        let dir = tempfile::Builder::new().prefix("vlt-").tempdir().unwrap();
        sh("ip netns add vlt-a; ip netns add vlt-b; ip link add vlt-a-u netns vlt-a type veth peer name vlt-b-u netns vlt-b");
        let (a, b) = (Host::start("vlt-a", 1, dir.path()), Host::start("vlt-b", 2, dir.path()));
        Self { a, b, _cleanup: cleanup, _dir: dir, _turn: turn }
    }
}

/// Removes what a run leaves, an earlier killed one included: everything in namespaces and CPU groups `vlt-a`, `vlt-b`.
struct Cleanup;

impl Cleanup {
    fn now() {
        wait("processes and groups of the test are gone", super::LIMIT, || {
            sh("for h in vlt-a vlt-b; do for p in $(ip netns pids $h 2>/dev/null); do kill -9 $p 2>/dev/null || true; done; \
                find /sys/fs/cgroup/$h.partition /sys/fs/cgroup/*/$h.partition -depth -type d -exec rmdir {} \\; 2>/dev/null || true; done");
            // Of v2 the group lies in the root itself, of v1 in that of each hierarchy.
            let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
            roots.extend(fs::read_dir(&roots[0]).unwrap().map(|entry| entry.unwrap().path()));
            let left = |root: &PathBuf| ["vlt-a", "vlt-b"].iter().any(|host| root.join(format!("{host}.partition")).exists());
            (!roots.iter().any(left)).then_some(())
        });
        sh("for h in vlt-a vlt-b; do ip netns del $h 2>/dev/null || true; done");
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        Self::now();
    }
}
