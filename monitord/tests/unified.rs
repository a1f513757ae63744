//! Demand of real processes behind the quota of a cgroup v2 tree, as `demand.rs` has it for the host's own. The kernel that runs
//! this has v1 trees, most often, so it is a guest under QEMU: its clock counts instructions, and no load of the machine moves it.
//! That leaves it one core, on which the kernel is fair; so one loop has next to no weight and starves beside the others.
//! Needs root, QEMU and the guest image's kernel; `make test` runs it.
#![cfg(feature = "io")]
#![allow(unsafe_code)]

use monitord::demand::{Recent, demands};
use monitord::hypervisor::{Scheduled, Usage};
use monitord::io::cgroup::{GuestGroup, Hierarchies, HostGroup};
use monitord::io::{clock, proc};
use monitord::sample::{At, load};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Set in the guest.
const INSIDE: &str = "VIOLIN_TEST_INSIDE";
/// Longest time the guest may take; it takes 20 s, and a machine with other work is several times slower.
const LIMIT: Duration = Duration::from_secs(900);

const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t cgroup2 cgroup /sys/fs/cgroup
VIOLIN_TEST_INSIDE=1 /test --exact --include-ignored --nocapture --test-threads=1 in_the_guest
/bin/busybox echo \"ENDED $?\"
/bin/busybox poweroff -f
";

/// One guest: a process in groups of its own.
struct Guest {
    pid: Pid,
    groups: GuestGroup,
}

impl Guest {
    /// An endless loop, or a process that wakes 500 times a second.
    fn start(trees: &Hierarchies, host: &HostGroup, number: usize, wakes: bool) -> Self {
        let name = format!("g{number}");
        let groups = GuestGroup::new(trees, Some(host.path()), &name, &PathBuf::from("sandbox").join(&name));
        let joins = groups.create().unwrap();
        // SAFETY: the child touches no lock that another thread may hold: it writes to files by paths made before, and loops.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => Self { pid: child, groups },
            ForkResult::Child => {
                joins.iter().for_each(|file| fs::write(file, "0").unwrap());
                loop {
                    if wakes {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
            }
        }
    }

    /// As the sandbox driver finds it.
    fn read(&self) -> At<Usage> {
        let mut total = proc::TaskTime::default();
        proc::tasks(self.pid.as_raw()).into_iter().for_each(|(_, task)| total.add(task));
        let scheduled = Some(Scheduled { slices: total.slices, sleeps: total.sleeps, ready: total.ready });
        let run_ns = self.groups.cpu_ns().expect("the group counts");
        At { at: clock::now(), value: Usage { run_ns, wait_ns: total.wait_ns, scheduled, memory_bytes: 0 } }
    }

    fn at_work(&self) -> bool {
        let usage = self.read().value;
        usage.run_ns > 20_000_000 || usage.scheduled.is_some_and(|by| by.sleeps > 100)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
        self.groups.remove().unwrap();
    }
}

#[test]
#[ignore = "for the guest of the other test"]
fn in_the_guest() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let trees = Hierarchies::detect().unwrap();
    assert!(trees.v1.is_empty() && trees.unified.is_some(), "{trees:?}");
    let ms = Duration::from_millis;
    let (mut cases, mut wrong) = (0, Vec::new());
    for (cores, burners) in [(1u32, 1), (1, 2), (3, 3), (3, 6)] {
        for (scale, quota_period) in [(0.1, 20), (0.15, 20), (0.1, 100), (0.3, 100)] {
            let cores = f64::from(cores);
            let host = HostGroup::create(&trees, "h1").unwrap().with_period(ms(quota_period));
            host.set_quota(None).unwrap();
            let guests: Vec<_> = (0..=burners).map(|number| Guest::start(&trees, &host, number, number == burners)).collect();
            if burners > 1 {
                // Less than anybody can ask for.
                guests[0].groups.set_cpu(4, None).unwrap();
            }
            while !guests.iter().all(Guest::at_work) {
                std::thread::sleep(ms(50));
            }
            let mut recent = vec![Recent::default(); guests.len()];
            let mut before: Vec<_> = guests.iter().map(Guest::read).collect();
            for period in 0..12 {
                std::thread::sleep(ms(250));
                let after: Vec<_> = guests.iter().map(Guest::read).collect();
                let loads = before.iter().zip(&after).map(|(before, after)| load(1, scale, *before, *after).unwrap());
                let judged: Vec<_> = loads.zip(&mut recent).map(|(load, past)| past.judge(load)).collect();
                before = after;
                for (guest, demand) in demands(cores, &judged).into_iter().enumerate() {
                    let right = if guest == burners { demand.demand < 0.25 } else { demand.demand > 0.75 };
                    // Judged by the last few periods, of which two lay before the quota.
                    if period >= 6 && !right {
                        wrong.push(format!(
                            "{cores} cores, scale {scale}, quota period {quota_period} ms, {burners} loops, guest {guest}: {demand:?} of {:?}",
                            judged[guest].load
                        ));
                    }
                }
                if period == 1 {
                    host.set_quota(Some(cores * scale)).unwrap();
                }
            }
            drop(guests);
            cases += 1;
        }
    }
    println!("JUDGED {cases} cases, {} wrong", wrong.len());
    wrong.iter().take(20).for_each(|words| println!("WRONG {words}"));
}

/// This program, what it needs to run, and what runs it, as an initial RAM disk.
fn initrd(folder: &Path) -> PathBuf {
    let root = folder.join("root");
    for directory in ["bin", "lib", "lib64"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let own = std::env::current_exe().unwrap();
    let run = |command: &mut Command| {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    run(Command::new("strip").arg("-o").args([root.join("test"), own.clone()]));
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    // Each line: name => path (address), or path (address).
    for word in run(Command::new("ldd").arg(&own)).split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(&word[1..]);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(word, to).unwrap();
    }
    if !root.join("lib64").join("ld-linux-x86-64.so.2").exists() {
        symlink("/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", root.join("lib64/ld-linux-x86-64.so.2")).unwrap();
    }
    fs::write(root.join("init"), INIT).unwrap();
    run(Command::new("chmod").arg("755").arg(root.join("init")));
    run(Command::new("sh").args(["-ec", "find . | cpio --quiet -o -H newc -R 0:0 > ../initrd"]).current_dir(&root));
    folder.join("initrd")
}

#[test]
#[ignore = "needs root and QEMU"]
fn on_cgroup_v2_too_starved_loops_want_all_and_one_that_merely_wakes_little() {
    let image = std::env::var_os("VIOLIN_IMAGE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/image"), PathBuf::from);
    let kernel = image.join("vmlinuz");
    assert!(kernel.exists(), "got no {}, want the guest image built: run `make image`", kernel.display());
    let folder = tempfile::tempdir().unwrap();
    let console = folder.path().join("console");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-accel",
        "tcg",
        "-icount",
        "shift=3,sleep=off",
        "-smp",
        "1",
        "-m",
        "512",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
    ])
    .arg("-kernel")
    .arg(&kernel)
    .arg("-initrd")
    .arg(initrd(folder.path()))
    .args(["-append", "console=ttyS0 quiet panic=-1 rdinit=/init"])
    .arg("-serial")
    .arg(format!("file:{}", console.display()))
    .stdin(Stdio::null());
    // SAFETY: between fork and exec only prctl is called, which is async-signal-safe. A killed test leaves no QEMU.
    unsafe {
        qemu.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(Into::into));
    }
    let (mut qemu, began) = (qemu.spawn().expect("qemu-system-x86 is installed"), Instant::now());
    let ended = loop {
        if qemu.try_wait().unwrap().is_some() {
            break true;
        }
        if began.elapsed() > LIMIT {
            let _ = qemu.kill();
            let _ = qemu.wait();
            break false;
        }
        std::thread::sleep(Duration::from_millis(50));
    };

    let said = String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
    println!("the guest ran for {:.0} s", began.elapsed().as_secs_f64());
    assert!(ended, "the guest did not end within {LIMIT:?}; its console:\n{said}");
    assert!(said.contains("JUDGED 16 cases, 0 wrong"), "the guest's console:\n{said}");
}
