//! What the tests of real labs share. All of them need root.
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeSet;
use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use violin_lab::{HostState, LabConfig, LabState, Layers, ProcessId, Result, UpOptions, down, netns, up};

/// Two domains, three hosts, 5 ms each way.
pub(crate) const THREE: &str = r#"
guests = "qemu"
scale = 0.15
[[domain]]
name = "d1"
[[domain]]
name = "d2"
[[host]]
name = "h1"
domain = "d1"
cores = 3
memory-mib = 1024
[[host]]
name = "h2"
domain = "d1"
cores = 3
memory-mib = 1024
[[host]]
name = "h3"
domain = "d2"
cores = 4
memory-mib = 1024
"#;

/// A lab's name that no other run of the tests has.
pub(crate) fn name(what: &str) -> String {
    format!("t-{what}-{}", std::process::id())
}

/// A lab's file with a name of its own for this test.
pub(crate) fn config(name: &str, text: &str) -> LabConfig {
    let mut config = LabConfig::parse(text).unwrap();
    config.name = name.parse().unwrap();
    config
}

/// The lab's helper is this very test program, run with the one test [`relay_entry`] picks out.
pub(crate) fn options(layers: Layers) -> UpOptions {
    let program = std::env::current_exe().unwrap().into_os_string();
    UpOptions {
        binaries: PathBuf::from("/nonexistent"),
        image: None,
        layers,
        helper: vec![program, "relay_entry".into(), "--exact".into(), "--ignored".into(), "--nocapture".into()],
        owner: ProcessId::own(),
        cancelled: None,
    }
}

/// Body of every test program's ignored test `relay_entry`.
pub(crate) fn relay_entry() {
    let plan = std::env::args().next_back().unwrap_or_default();
    if plan.ends_with("relay.json") {
        violin_lab::relay::run(Path::new(&plan)).unwrap();
    }
    if plan.ends_with("keep.json") {
        violin_lab::keep::run(Path::new(&plan)).unwrap();
    }
}

/// Builds a lab and interrupts that as soon as `half_way` holds; how `up` ended.
pub(crate) fn interrupted(config: &LabConfig, mut options: UpOptions, half_way: impl Fn() -> bool + Sync) -> Result<LabState> {
    let cancelled: &'static AtomicBool = Box::leak(Box::default());
    options.cancelled = Some(cancelled);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) && !half_way() {
                std::thread::sleep(Duration::from_millis(1));
            }
            cancelled.store(true, Ordering::Relaxed);
        });
        let result = up(config, &options, &mut |_| ());
        ended.store(true, Ordering::Relaxed);
        result
    })
}

/// A lab that goes away with the test, however that ends.
pub(crate) struct Standing(pub(crate) LabState);

impl Standing {
    pub(crate) fn up(config: &LabConfig, options: &UpOptions) -> Self {
        let began = Instant::now();
        let state = up(config, options, &mut |words| eprintln!("[{:5.1} s] {words}", began.elapsed().as_secs_f64())).unwrap();
        eprintln!("[{:5.1} s] up", began.elapsed().as_secs_f64());
        Self(state)
    }

    pub(crate) fn down(self) {
        down(&self.0.name, &mut |words| eprintln!("{words}")).unwrap();
        std::mem::forget(self);
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        if let Err(error) = down(&self.0.name, &mut |_| ()) {
            eprintln!("{error}");
        }
    }
}

/// Sends `count` datagrams of `length` bytes of UDP payload, one every `gap`, from one host to another that echoes them.
///
/// Returns the round-trip times in milliseconds, and the part lost in percent.
pub(crate) fn echoes(from: &HostState, to: &HostState, count: u32, gap: Duration, length: usize) -> (Vec<f64>, f64) {
    let bind = |host: &HostState| {
        let address = host.address;
        netns::inside(&host.netns, || UdpSocket::bind((address, 0))).unwrap()
    };
    let (near, far) = (bind(from), bind(to));
    near.connect(far.local_addr().unwrap()).unwrap();
    let done = AtomicBool::new(false);
    let mut times = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            far.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            let mut buffer = [0; 2048];
            while !done.load(Ordering::Relaxed) {
                if let Ok((length, sender)) = far.recv_from(&mut buffer) {
                    far.send_to(&buffer[..length], sender).unwrap();
                }
            }
        });
        near.set_nonblocking(true).unwrap();
        let mut sent: Vec<Instant> = Vec::new();
        let mut buffer = vec![0; length];
        let began = Instant::now();
        loop {
            let number = u32::try_from(sent.len()).unwrap();
            if number < count && began.elapsed() >= gap * number {
                buffer[..4].copy_from_slice(&number.to_be_bytes());
                sent.push(Instant::now());
                near.send(&buffer).unwrap();
            }
            let mut reply = [0; 2048];
            if near.recv(&mut reply).is_ok() {
                let number = u32::from_be_bytes(*reply.first_chunk().unwrap());
                times.push(sent[number as usize].elapsed().as_secs_f64() * 1e3);
            }
            let over = number == count && sent.last().unwrap().elapsed() > Duration::from_millis(500);
            if over || times.len() == count as usize {
                break;
            }
            std::thread::yield_now();
        }
        done.store(true, Ordering::Relaxed);
    });
    let lost = 100.0 * (1.0 - times.len() as f64 / f64::from(count));
    (times, lost)
}

/// Everything on this machine that bears the lab's name.
pub(crate) fn remains(name: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let marks = [format!("vl-{name}-"), format!("va-{name}."), format!("violin-{name}-"), format!("violin-{name}.")];
    // Control groups lie in the one hierarchy of v2 itself or in those of v1 below it.
    let mut dirs = ["/run/netns", "/run/violin-lab", "/sys/fs/cgroup"].map(PathBuf::from).to_vec();
    dirs.extend(fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path()));
    for entry in dirs.into_iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten() {
        let file = entry.file_name().into_string().unwrap();
        if file == name || marks.iter().any(|mark| file.starts_with(mark)) {
            found.insert(entry.path().display().to_string());
        }
    }
    let folder = format!("/run/violin-lab/{name}/");
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(&folder) {
            found.insert(entry.path().display().to_string());
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    found.extend(
        mounts.lines().filter(|line| line.contains(&folder) || marks.iter().any(|m| line.contains(m))).map(str::to_owned),
    );
    found
}
