//! What dies around a move of a real VM: the manager, a switch or a monitor in the middle of it, the destination's libvirtd
//! before it. VMs are counted by QEMU processes, not by our own journal.

use nix::sys::signal::{Signal, kill as kill_with};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use violin_lab::{HostState, LabState, ProcessId};
use violin_tests::eventually;
use violin_tests::guests::{Lab, Restarted, kill, qemu_on};
use violin_tests::netns::must;

const VM: &str = "three-c1";

/// Two domains whose WAN is slow enough that a move takes several seconds: time to kill something in its middle.
const SLOW: &str = "
name = \"slow\"
guests = \"qemu\"
scale = 0.25
[[domain]]
name = \"d1\"
[[domain]]
name = \"d2\"
[[host]]
name = \"h1\"
domain = \"d1\"
cores = 2
memory-mib = 2048
[[host]]
name = \"h2\"
domain = \"d2\"
cores = 2
memory-mib = 2048
[wan]
delay = \"2ms\"
rate = \"100mbit\"
[manager]
mode = \"observe\"
";

struct Site {
    restarted: Restarted,
    _folder: tempfile::TempDir,
    state: LabState,
    lab: Lab,
}

impl Site {
    /// The slow lab with environment `three` on h1.
    fn up(name: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let config = folder.path().join("lab.toml");
        std::fs::write(&config, SLOW).expect("written");
        let lab = Lab::up_from(name, config.to_str().expect("UTF-8"));
        lab.must(&["env", "up", &Lab::environment("three.toml"), "--place", "head=h1", "--place", "c1=h1", "--place", "c2=h1"]);
        Self { restarted: Restarted::default(), _folder: folder, state: lab.state(), lab }
    }

    fn host(&self, name: &str) -> &HostState {
        self.state.hosts.iter().find(|host| host.host.as_str() == name).expect("a host of the lab")
    }

    /// Begins a move; returns when memory is about to be copied: its switch has granted, the destination's QEMU is there.
    fn begin(&self, to: &str) -> Child {
        let (moving, held) = self.begin_held(to);
        drop(held);
        moving
    }

    /// Likewise, and holds it there until the second value is dropped.
    fn begin_held(&self, to: &str) -> (Child, Held) {
        let (from, there) = (self.lab.host_of(VM), self.host(to));
        let held = Held::copying_to(there);
        let mut command = self.lab.command(&["vm", "migrate", VM, "--to", to]);
        let moving = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("violin runs");
        eventually("the move is under way", violin_tests::PATIENCE, || {
            qemu_on(there, VM).is_some() && self.port_state(&from).as_deref() == Some("granted")
        });
        (moving, held)
    }

    /// Begins a move and holds it where the VM's MAC is in `state` at the source (`"source"`) or the destination.
    fn begin_until(&self, to: &str, end: &str, state: &str) -> (Child, Held) {
        let from = self.lab.host_of(VM);
        let (moving, copying) = self.begin_held(to);
        let (held, copying) = match (end, state) {
            // Its port waits as long as the VM has not come.
            ("destination", "prepared") => (copying, None),
            // The source's port is fenced until the destination's switch says that the VM runs there.
            ("source", "fenced") => (Held::process(running(self.host(to), "switchd")), Some(copying)),
            // What the source's monitor would clear away, and the move's end, wait for that one.
            ("source", "gone") | ("destination", "owned") => {
                (Held::process(running(self.host(&from), "monitord")), Some(copying))
            }
            other => panic!("got {other:?}, want a state that can be held"),
        };
        drop(copying);
        let at = if end == "source" { from.as_str() } else { to };
        eventually(&format!("{VM} is {state} at the {end}"), violin_tests::PATIENCE, || {
            self.port_state(at).as_deref() == Some(state)
        });
        (moving, held)
    }

    /// State of the VM's MAC at its port on a host, if it has one there. Asks the switch itself: some states are short.
    fn port_state(&self, host: &str) -> Option<String> {
        let socket = self.host(host).dir.join("switchd.sock");
        let output = self.lab.command(&["--json", "--switch-socket", &socket.to_string_lossy(), "port"]).output();
        let output = output.expect("violin runs");
        let ports: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let port = ports.as_array()?.iter().find(|port| port["spec"]["owned"]["vm"] == VM)?.clone();
        port["state"].as_str().map(str::to_owned)
    }

    /// Asks the VM until it answers or the move, counted from 0, has ended; says which. Traffic while memory is copied.
    fn talk_in_its_move(&self, number: usize) -> bool {
        let (mut answered, mut ended) = (false, false);
        eventually(&format!("{VM} answers or has moved"), violin_tests::PATIENCE, || {
            answered =
                self.lab.command(&["ssh", "three", "c1", "--", "true"]).output().is_ok_and(|output| output.status.success());
            ended = self.lab.migrations().get(number).is_some_and(|migration| !migration["ended-at"].is_null());
            answered || ended
        });
        answered && !ended
    }

    /// Nothing of the VM on a host: no process, no port, no interface.
    fn nothing_left(&self, host: &str) {
        let there = self.host(host);
        eventually(&format!("nothing of {VM} is left on {host}"), violin_tests::PATIENCE, || {
            let links = std::process::Command::new("ip").args(["-n", &there.netns, "-o", "link"]).output().expect("ip runs");
            qemu_on(there, VM).is_none()
                && !self.lab.must(&["--json", "port", "--host", host]).contains(VM)
                && !String::from_utf8_lossy(&links.stdout).contains(VM)
        });
    }

    fn logs(&self) -> String {
        let daemons = self.state.hosts.iter().flat_map(|host| ["monitord", "switchd"].map(|daemon| self.lab.log(host, daemon)));
        daemons.collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}

/// Something that holds a move at a point; dropped, it lets it go.
#[derive(Debug)]
enum Held {
    /// Memory is not copied: a host takes no connection for it. Its network namespace.
    Copying(String),
    /// A process is stopped.
    Process(nix::unistd::Pid),
}

impl Held {
    fn copying_to(host: &HostState) -> Self {
        let netns = host.netns_path();
        let rules = "table inet held { chain in { type filter hook input priority 0; tcp dport 49152-49215 drop; }; }";
        must(Command::new("nsenter").arg(format!("--net={netns}")).args(["nft", rules]));
        Self::Copying(netns)
    }

    fn process(pid: u32) -> Self {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a process id"));
        kill_with(pid, Signal::SIGSTOP).expect("the lab's own process can be stopped");
        Self::Process(pid)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        match self {
            Self::Copying(netns) => {
                let words = ["nft", "delete", "table", "inet", "held"];
                let _ = Command::new("nsenter").arg(format!("--net={netns}")).args(words).output();
            }
            Self::Process(pid) => drop(kill_with(*pid, Signal::SIGCONT)),
        }
    }
}

fn pid(process: Option<&ProcessId>) -> u32 {
    process.expect("the lab runs it").pid
}

#[test]
#[ignore = "needs root"]
fn a_manager_killed_in_a_move_and_a_dead_destination_leave_the_vm_running_once() {
    let mut site = Site::up("test-manager");
    let moving = site.begin("h2");
    kill(pid(site.state.adaptd.process.as_ref()));
    drop(moving.wait_with_output());
    site.restarted.start(&site.state.adaptd.netns_path(), "adaptd", &site.state.adaptd.dir);
    let began = Instant::now();
    eventually("the manager answers again", violin_tests::PATIENCE, || !site.lab.migrations().is_empty());
    let said = site.lab.outcome(1);
    println!("adaptd killed while memory was copied: {said}, {:.1} s after its restart", began.elapsed().as_secs_f64());
    site.lab.runs_once("three", "c1");
    let here = site.lab.host_of(VM);
    let there = if here == "h1" { "h2" } else { "h1" };
    site.nothing_left(there);

    eventually("the restarted manager has heard of all hosts", violin_tests::PATIENCE, || {
        let hosts: serde_json::Value = serde_json::from_str(&site.lab.must(&["--json", "host"])).expect("JSON");
        hosts.as_array().is_some_and(|hosts| hosts.iter().all(|host| host["connected"] == true && !host["age-s"].is_null()))
    });
    // The destination's libvirtd is dead: nothing moves, and the decision says why.
    kill(pid(site.host(there).libvirtd.as_ref()));
    let output = site.lab.command(&["vm", "migrate", VM, "--to", there]).output().expect("violin runs");
    assert!(!output.status.success(), "a move to a host without hypervisor was called done");
    assert!(site.lab.migrations().len() > 1, "the move was refused: {}", String::from_utf8_lossy(&output.stderr));
    let said = site.lab.outcome(2);
    println!("destination's libvirtd dead: {said}");
    assert!(said.contains("undone") && (said.contains("hypervisor") || said.contains("libvirt")), "{said}");
    assert_eq!(site.lab.host_of(VM), here);
    site.lab.runs_once("three", "c1");
    site.nothing_left(there);
}

#[test]
#[ignore = "needs root"]
fn a_switch_or_monitor_killed_in_a_move_leaves_the_vm_running_once() {
    let mut site = Site::up("test-kills");
    for (number, (end, daemon)) in
        [("source", "switchd"), ("destination", "switchd"), ("source", "monitord"), ("destination", "monitord")]
            .into_iter()
            .enumerate()
    {
        let from = site.lab.host_of(VM);
        let to = if from == "h1" { "h2" } else { "h1" };
        let victim = site.host(if end == "source" { &from } else { to }).clone();
        let mut moving = site.begin(to);
        // The one that runs now: it may have been started again before.
        kill(running(&victim, daemon));
        site.restarted.start(&victim.netns_path(), daemon, &victim.dir);
        let began = Instant::now();
        if (end, daemon) == ("source", "switchd") {
            let answered = site.talk_in_its_move(number);
            println!("{:.1} s after: it answered while its memory was copied: {answered}", began.elapsed().as_secs_f64());
        }
        let said = site.lab.outcome(number + 1);
        println!("{end}'s {daemon} killed while memory was copied: {said}, {:.1} s after", began.elapsed().as_secs_f64());
        site.lab.runs_once("three", "c1");
        println!("it answers {:.1} s after", began.elapsed().as_secs_f64());
        drop(moving.wait());
        let here = site.lab.host_of(VM);
        assert_eq!(here, if said.contains("done") && !said.contains("undone") { to } else { from.as_str() }, "{said}");
        assert_eq!(site.port_state(&here).as_deref(), Some("owned"));
        site.nothing_left(if here == "h1" { "h2" } else { "h1" });
    }
}

#[test]
#[ignore = "needs root"]
fn a_switch_killed_in_any_state_of_a_move_leaves_the_vm_running_once() {
    let mut site = Site::up("test-states");
    for (end, state) in [("destination", "prepared"), ("source", "fenced"), ("source", "gone"), ("destination", "owned")] {
        let from = site.lab.host_of(VM);
        let to = if from == "h1" { "h2" } else { "h1" };
        let (mut moving, held) = site.begin_until(to, end, state);
        let victim = site.host(if end == "source" { &from } else { to }).clone();
        kill(running(&victim, "switchd"));
        drop(held);
        site.restarted.start(&victim.netns_path(), "switchd", &victim.dir);
        let began = Instant::now();
        let number = site.lab.migrations().len();
        site.lab.runs_once("three", "c1");
        let answers = began.elapsed().as_secs_f64();
        let said = site.lab.outcome(number);
        let ended = began.elapsed().as_secs_f64();
        println!("{end}'s switchd killed when {state}: it answers {answers:.1} s after; {said} {ended:.1} s after");
        drop(moving.wait());
        let here = site.lab.host_of(VM);
        assert_eq!(here, if said.contains("done") && !said.contains("undone") { to } else { from.as_str() }, "{said}");
        eventually("its port owns its MAC", violin_tests::PATIENCE, || site.port_state(&here).as_deref() == Some("owned"));
        site.nothing_left(if here == "h1" { "h2" } else { "h1" });
    }
}

/// The process that runs a host's daemon, found by its configuration file.
fn running(host: &HostState, daemon: &str) -> u32 {
    let config = host.dir.join(format!("{daemon}.toml")).to_string_lossy().into_owned();
    let pids = std::fs::read_dir("/proc").expect("/proc is there").flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        words.iter().any(|word| *word == config) && words[0].ends_with(daemon)
    })
    .expect("the daemon runs")
}

/// Where the kernel keeps the memory limit of a host's guests.
fn memory_limit(host: &HostState) -> (PathBuf, &'static str) {
    let group = format!("{}.partition", host.cpu_group);
    let v1 = PathBuf::from("/sys/fs/cgroup/memory").join(&group).join("memory.limit_in_bytes");
    if v1.exists() { (v1, "-1") } else { (PathBuf::from("/sys/fs/cgroup").join(&group).join("memory.max"), "max") }
}

#[test]
#[ignore = "needs root"]
fn every_undo_step_takes_back_what_it_is_for() {
    let site = Site::up("test-undo");
    let h2 = site.host("h2");

    // CancelIncoming: the destination runs out of memory while it takes the VM.
    let (limit, unlimited) = memory_limit(h2);
    std::fs::write(&limit, (80u64 << 20).to_string()).expect("the lab's own group has a limit");
    let output = site.lab.command(&["vm", "migrate", VM, "--to", "h2"]).output().expect("violin runs");
    std::fs::write(&limit, unlimited).expect("lifted");
    assert!(!output.status.success(), "a VM went where there is no memory for it");
    let said = site.lab.outcome(1);
    println!("destination out of memory: {said}");
    assert!(said.contains("undone") && said.contains("the VM runs on here"), "{said}");
    let why = site.lab.must(&["why", VM]);
    assert!(why.contains("undone"), "{why}");
    assert_eq!(site.lab.host_of(VM), "h1");
    site.lab.runs_once("three", "c1");
    site.nothing_left("h2");

    // AbortMigration: an operator changes his mind.
    let mut moving = site.begin("h2");
    let asked = Instant::now();
    println!("{}", site.lab.must(&["vm", "abort", VM]));
    assert!(!moving.wait().expect("violin ends").success(), "an aborted move was called done");
    println!("aborted {:.1} s after it was asked for: {}", asked.elapsed().as_secs_f64(), site.lab.outcome(2));
    assert!(site.lab.outcome(2).contains("given up"), "{}", site.lab.outcome(2));
    assert_eq!(site.lab.host_of(VM), "h1");
    site.lab.runs_once("three", "c1");
    site.nothing_left("h2");
    let late = site.lab.command(&["vm", "abort", VM]).output().expect("violin runs");
    assert!(String::from_utf8_lossy(&late.stderr).contains("want a VM that is being moved"), "{late:?}");

    // MoveBack: the second VM of a gang does not arrive, so the first returns.
    let mut gang = site.lab.command(&["env", "move", "three", "--to", "d2"]);
    let mut gang = gang.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("violin runs");
    let mut arriving = None;
    eventually("the second VM of the gang is on its way", violin_tests::PATIENCE, || {
        arriving = qemu_on(h2, "three-c2");
        let first = site.lab.migrations().get(2).is_some_and(|first| !first["ended-at"].is_null());
        first && arriving.is_some()
    });
    assert_eq!(site.lab.host_of(VM), "h2", "the first has arrived");
    kill(arriving.expect("found above"));
    assert!(!gang.wait().expect("violin ends").success(), "a gang that returned was called moved");
    let outcomes: Vec<_> = (3..=5).map(|number| site.lab.outcome(number)).collect();
    println!("a gang whose second VM could not arrive: {outcomes:?}");
    assert!(outcomes[0].contains("done") && outcomes[1].contains("undone") && outcomes[2].contains("done"), "{outcomes:?}");
    for node in ["c1", "c2"] {
        assert_eq!(site.lab.host_of(&format!("three-{node}")), "h1");
        site.lab.runs_once("three", node);
    }
    site.nothing_left("h2");
}
