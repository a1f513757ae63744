//! Figures the kernel tells in /proc.

use std::fs;
use std::io;
use std::path::Path;

/// One task's CPU account. Source: Documentation/scheduler/sched-stats.rst, `/proc/PID/schedstat`; proc_pid_status(5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TaskTime {
    /// Nanoseconds run.
    pub run_ns: u64,
    /// Nanoseconds ready to run and waiting; time throttled by a quota counts.
    pub wait_ns: u64,
    /// Times it was put onto a core.
    pub slices: u64,
    /// Times it left one of itself, to sleep.
    pub sleeps: u64,
    /// Tasks that run or are ready to, throttled ones included, at the moment of the reading.
    pub ready: u64,
}

impl TaskTime {
    /// What was added since an earlier reading; none if any figure fell.
    pub fn since(self, before: Self) -> Option<Self> {
        Some(Self {
            run_ns: self.run_ns.checked_sub(before.run_ns)?,
            wait_ns: self.wait_ns.checked_sub(before.wait_ns)?,
            slices: self.slices.checked_sub(before.slices)?,
            sleeps: self.sleeps.checked_sub(before.sleeps)?,
            ready: self.ready,
        })
    }

    /// Adds another's figures.
    pub const fn add(&mut self, more: Self) {
        self.run_ns += more.run_ns;
        self.wait_ns += more.wait_ns;
        self.slices += more.slices;
        self.sleeps += more.sleeps;
        self.ready += more.ready;
    }
}

/// CPU accounts of all threads of a process, by thread. Empty if it has ended.
pub fn tasks(pid: i32) -> Vec<(i32, TaskTime)> {
    task_ids(pid).into_iter().filter_map(|tid| Some((tid, task(pid, tid)?))).collect()
}

fn task_ids(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn task(pid: i32, tid: i32) -> Option<TaskTime> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
    let mut words = text.split_ascii_whitespace().map(str::parse);
    let (run_ns, wait_ns, slices) = (words.next()?.ok()?, words.next()?.ok()?, words.next()?.ok()?);
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let value = |key| text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim_start);
    let sleeps = value("voluntary_ctxt_switches:")?.parse().ok()?;
    let ready = value("State:").is_some_and(|state| state.starts_with('R')).into();
    Some(TaskTime { run_ns, wait_ns, slices, sleeps, ready })
}

/// A network namespace, as the kernel tells namespaces apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Netns(u64, u64);

impl Netns {
    fn of(process: &str) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(format!("/proc/{process}/ns/net")).ok().map(|seen| Self(seen.dev(), seen.ino()))
    }

    /// The calling thread's; none without /proc.
    pub fn here() -> Option<Self> {
        Self::of("thread-self")
    }
}

/// The QEMU of a network namespace whose guest has this name: others of that name may run on this machine, as in a lab.
/// Cost: a look at every process.
pub fn emulator(guest: &str, netns: Netns) -> Option<i32> {
    let names = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut pids = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let command = |pid: &str| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pids.find(|pid| is_emulator_of(&command(pid), guest) && Netns::of(pid) == Some(netns))?.parse().ok()
}

/// Whether a command line is that of the QEMU which libvirt started for this guest: it names it after `-name`.
fn is_emulator_of(command: &[u8], guest: &str) -> bool {
    let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
    let wanted = format!("guest={guest}");
    words.windows(2).any(|pair| pair[0] == b"-name" && pair[1].split(|byte| *byte == b',').next() == Some(wanted.as_bytes()))
}

/// CPU account of the threads that run a QEMU's vCPUs, together: those it calls `CPU 0/KVM`, `CPU 0/TCG`. `None`: it has none.
pub fn vcpus(pid: i32) -> Option<TaskTime> {
    let is_vcpu = |tid: &i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
        name.starts_with("CPU ") && name.contains('/')
    };
    let mut all = None;
    for tid in task_ids(pid).into_iter().filter(is_vcpu) {
        all.get_or_insert_with(TaskTime::default).add(task(pid, tid)?);
    }
    all
}

/// Memory of a process resident on the host, in bytes; 0 if it has ended.
pub fn resident_bytes(pid: i32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm"))
        .ok()
        .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// When a live process started, in clock ticks since boot: with the number it names one process for ever.
/// `None`: there is none, or it is a zombie.
pub fn start_time(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may hold anything; fields are counted after its end.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

/// Processes in the PID namespace of this one: all of a sandbox guest, in whatever control group they are.
pub fn beside(pid: i32) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt;
    let namespace = |pid: i32| fs::metadata(format!("/proc/{pid}/ns/pid")).ok().map(|seen| (seen.dev(), seen.ino()));
    let (Some(own), Ok(entries)) = (namespace(pid), fs::read_dir("/proc")) else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| namespace(*pid) == Some(own)).collect()
}

/// Pressure stall information: share of the last ten seconds in which some task waited, 0 to 1.
/// `None`: the kernel does not tell. `what` is `cpu` or `memory`.
pub fn pressure(what: &str) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/pressure/{what}")).ok()?;
    parse_pressure(&text)
}

fn parse_pressure(text: &str) -> Option<f64> {
    let some = text.lines().find(|line| line.starts_with("some"))?;
    let value = some.split_ascii_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    Some(value.parse::<f64>().ok()? / 100.0)
}

/// Memory the machine can still give without swapping, in MiB.
pub fn memory_available_mib() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or_else(|| io::Error::other("no MemAvailable line in /proc/meminfo"))
}

/// Packets an interface of this process's network namespace has transmitted; `None`: there is none of that name.
///
/// Read from /proc and not by rtnetlink, which would wait while any interface changes its namespace.
pub fn transmitted(interface: &str) -> Option<u64> {
    parse_transmitted(&fs::read_to_string("/proc/self/net/dev").ok()?, interface)
}

fn parse_transmitted(text: &str, interface: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().nth(9)?.parse().ok()
}

/// Path by which others can open this process's network namespace: a name under `/run/netns` if it has one, for such a path
/// outlives this process.
pub fn own_netns_path() -> String {
    use std::os::unix::fs::MetadataExt;
    let fallback = format!("/proc/{}/ns/net", std::process::id());
    let Ok(own) = fs::metadata("/proc/self/ns/net") else { return fallback };
    let Ok(entries) = fs::read_dir(Path::new("/run/netns")) else { return fallback };
    let named = entries
        .filter_map(Result::ok)
        .find(|entry| fs::metadata(entry.path()).is_ok_and(|named| named.ino() == own.ino() && named.dev() == own.dev()));
    named.map_or(fallback, |entry| entry.path().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_beside_itself_and_its_children() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();

        let seen = beside(i32::try_from(child.id()).unwrap());

        child.kill().unwrap();
        child.wait().unwrap();
        assert!(seen.contains(&own) && seen.contains(&i32::try_from(child.id()).unwrap()), "{seen:?}");
        assert!(beside(i32::MAX).is_empty());
    }

    #[test]
    fn an_emulator_is_known_by_its_guests_whole_name() {
        let of = |words: &[&str]| words.join("\0").into_bytes();

        assert!(is_emulator_of(&of(&["/usr/bin/qemu-system-x86_64", "-name", "guest=a-c1,debug-threads=on", "-S"]), "a-c1"));
        assert!(!is_emulator_of(&of(&["qemu", "-name", "guest=a-c10,debug-threads=on"]), "a-c1"));
        assert!(!is_emulator_of(&of(&["grep", "guest=a-c1"]), "a-c1"));
    }

    #[test]
    fn one_that_sleeps_is_told_from_one_that_computes() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let ran = |pid| tasks(pid).first().map_or(0, |(_, seen)| seen.run_ns);
        while ran(pid) < 50_000_000 && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }

        let computing = tasks(pid)[0].1;
        let own = i32::try_from(std::process::id()).unwrap();
        let sleeping = tasks(own).into_iter().map(|(_, seen)| seen.sleeps).max().unwrap();
        let mut idle = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        // Not before it has begun to: on its way there it sleeps and wakes some times.
        let mut asleep = false;
        while !asleep && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
            asleep = tasks(i32::try_from(idle.id()).unwrap()).first().is_some_and(|(_, seen)| seen.ready == 0);
        }
        idle.kill().unwrap();
        idle.wait().unwrap();

        child.kill().unwrap();
        child.wait().unwrap();
        assert!(computing.slices > 0 && computing.run_ns / computing.sleeps.max(1) > 1_000_000, "{computing:?}");
        assert!(sleeping > 0 && asleep && computing.ready == 1, "{computing:?}");
    }

    #[test]
    fn pressure_is_a_fraction() {
        let text = "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(parse_pressure(text), Some(0.125));
        assert_eq!(parse_pressure(""), None);
    }

    #[test]
    fn transmitted_packets_are_the_tenth_figure_of_the_right_line() {
        let text = "Inter-|   Receive ... |  Transmit\n face |bytes ...\n    vg-a1: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n  vg-a: 5 6 0 0 0 0 0 0 7 8 0 0 0 0 0 0\n";
        assert_eq!(parse_transmitted(text, "vg-a"), Some(8));
        assert_eq!(parse_transmitted(text, "vg-b"), None);
    }

    #[test]
    fn this_process_has_a_start_time_and_threads() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(start_time(pid).is_some());
        assert!(!tasks(pid).is_empty());
        assert_eq!(start_time(i32::MAX), None);
    }
}
