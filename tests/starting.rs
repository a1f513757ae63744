//! What a daemon needs to start: `--check` finds what would keep it from that, what comes late is waited for, and askers that do
//! nothing keep nobody out.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use violin_channel::local::blocking::ask;
use violin_common::api::switch::{PortCondition, PortConditionSeen, SwitchReply, SwitchRequest};
use violin_tests::netns::Netns;
use violin_tests::{eventually, program};

const DAEMONS: [&str; 3] = ["switchd", "monitord", "adaptd"];
const SOON: Duration = violin_tests::PATIENCE;

/// A folder with certificates, and the configurations of one host's daemons in it.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        place.authority("pki");
        std::fs::write(place.path("program"), "#!/bin/sh\n").expect("a file is written");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An authority with certificates of h1 and adaptd, in a folder of this name.
    fn authority(&self, folder: &str) {
        let members = ["h1", "adaptd"].map(|name| (name.parse().expect("a legal name"), "d1".parse().expect("a legal name")));
        violin_channel::pki::write_pki(&self.path(folder), folder, &members).expect("certificates are made");
    }

    /// A daemon's configuration; it listens at 10.91.7.1.
    fn text(&self, daemon: &str) -> String {
        let at = self.folder.path().display();
        let name = if daemon == "adaptd" { "adaptd" } else { "h1" };
        let tls = format!("[tls]\nca = \"{at}/pki/ca.pem\"\ncert = \"{at}/pki/{name}.pem\"\nkey = \"{at}/pki/{name}.key\"\n");
        match daemon {
            "switchd" => {
                format!("host = \"h1\"\ndomain = \"d1\"\nlisten = \"10.91.7.1:7471\"\nsocket = \"{at}/switchd.sock\"\n{tls}")
            }
            "adaptd" => {
                format!("listen = \"10.91.7.1:7472\"\nsocket = \"{at}/adaptd.sock\"\njournal = \"{at}/adaptd.redb\"\n{tls}")
            }
            _ => format!(
                "host = \"h1\"\ndomain = \"d1\"\nmanager = \"10.91.7.1:7472\"\nlisten = \"10.91.7.1:7473\"\n\
                 switch-socket = \"{at}/switchd.sock\"\nimages = \"{at}/images\"\nrun = \"{at}/run\"\n{tls}\
                 [capacity]\ncores = 1.0\nmemory-mib = 100\n\
                 [driver]\nkind = \"sandbox\"\nshared = \"{at}/shared\"\nguest-program = \"{at}/program\"\n"
            ),
        }
    }

    fn write(&self, daemon: &str, text: &str) -> PathBuf {
        let path = self.path(&format!("{daemon}.toml"));
        std::fs::write(&path, text).expect("a file is written");
        path
    }

    fn check(&self, daemon: &str, text: &str) -> Output {
        let file = self.write(daemon, text);
        Command::new(program(daemon)).args(["--check", "--config"]).arg(file).output().expect("the program runs")
    }

    /// Starts a daemon inside a namespace, with its log in a file.
    fn start(&self, daemon: &str, netns: &Netns, through: &[&str], text: &str) -> Running {
        let file = self.write(daemon, text);
        let log = self.path(&format!("{daemon}.log"));
        let out = std::fs::File::create(&log).expect("a log");
        let mut command = match through.split_first() {
            Some((first, rest)) => {
                let mut command = netns.command(first);
                command.args(rest).arg(program(daemon));
                command
            }
            None => netns.command(program(daemon)),
        };
        command.arg("--config").arg(file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(out);
        Running { child: command.spawn().expect("the daemon starts"), log }
    }
}

/// A daemon, killed with the value.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn says(&self, what: &str) {
        eventually(&format!("{what:?} is said in {}", self.log.display()), SOON, || self.log().contains(what));
    }

    fn terminate(mut self) -> bool {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().expect("a process id"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
        self.child.wait().expect("it ends").success()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn said(output: &Output) -> String {
    assert!(!output.status.success(), "accepted: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
#[ignore = "needs root"]
fn check_finds_what_would_keep_a_daemon_from_starting() {
    let place = Place::new();
    place.authority("other");
    let at = place.folder.path().to_str().expect("a temporary folder's name is text").to_owned();
    std::fs::write(place.path("file"), "").expect("a file is written");
    std::fs::write(place.path("noise"), [7; 9000]).expect("a file is written");
    for daemon in DAEMONS {
        let good = place.text(daemon);
        let output = place.check(daemon, &good);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // Nothing was made.
        for name in ["switchd.sock", "adaptd.sock", "adaptd.redb", "run", "images", "shared"] {
            assert!(!place.path(name).exists(), "{daemon} --check made {name}");
        }
        let name = if daemon == "adaptd" { "adaptd" } else { "h1" };
        let socket = if daemon == "monitord" { "switch-socket" } else { "socket" };
        let long = "x".repeat(120);
        let old = format!("{socket} = \"{at}/{}.sock\"", if daemon == "adaptd" { "adaptd" } else { "switchd" });
        let mut cases = vec![
            (good.replace("pki/ca.pem", "other/ca.pem"), vec!["other/ca.pem", "want one made by that authority"]),
            (good.replace(&format!("pki/{name}.key"), &format!("other/{name}.key")), vec!["is not the key of", "made together"]),
            (good.replace(&old, &format!("{socket} = \"\"")), vec![socket, "got \"\"", "want the path"]),
            (good.replace(&old, &format!("{socket} = \"/run/{long}\"")), vec![socket, "got a path of 125 bytes", "at most 107"]),
        ];
        let folders: &[(&str, &str)] = match daemon {
            "switchd" => &[("switchd.sock", "socket")],
            "adaptd" => &[("adaptd.sock", "socket"), ("adaptd.redb", "journal")],
            _ => &[("run\"", "run"), ("images\"", "images"), ("shared\"", "driver.shared")],
        };
        for (path, key) in folders {
            cases.push((good.replace(&format!("{at}/{path}"), &format!("{at}/file/{path}")), vec![key, "file is no folder"]));
        }
        if daemon != "monitord" {
            cases.push((good.replace(&format!("{daemon}.sock"), "file"), vec!["socket", "is there and is no socket"]));
        }
        match daemon {
            "adaptd" => cases.extend([
                (good.replace("adaptd.redb", "file"), vec!["journal", "got an empty file (0 bytes)"]),
                (good.replace("adaptd.redb", "noise"), vec!["journal", "is damaged, or is none"]),
            ]),
            "monitord" => cases.push((good.replace("/program\"", "/gone\""), vec!["driver.guest-program", "gone"])),
            _ => {}
        }
        for (text, wanted) in cases {
            assert_ne!(text, good);
            let said = said(&place.check(daemon, &text));
            assert!(wanted.iter().all(|word| said.contains(word)), "{daemon}: got {said:?}, want {wanted:?}");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_listen_address_that_comes_late_is_waited_for_and_a_port_that_is_taken_is_said() {
    let place = Place::new();
    for (daemon, up) in DAEMONS.into_iter().zip(["switch is up", "monitor runs", "adaptd runs"]) {
        let netns = Netns::new("late");
        netns.ip("link add d0 type bridge");
        netns.ip("link set d0 up");
        let text = place.text(daemon);
        let waiting = "no interface of this host has the `listen` address (yet)";

        let ended = place.start(daemon, &netns, &[], &text);
        ended.says(waiting);
        assert!(ended.terminate(), "{daemon}: told to end while it waited");

        let late = place.start(daemon, &netns, &[], &text);
        late.says(waiting);
        netns.ip("addr add 10.91.7.1/24 dev d0");
        late.says("the `listen` address is there");
        late.says(up);
        assert_eq!(late.log().matches(waiting).count(), 1, "{}", late.log());

        // What it has for itself is its own: the port alone is in its way.
        let second = place.write("second", &text.replace("adaptd.redb", "second.redb").replace("/run\"", "/second-run\""));
        let output = netns.command(program(daemon)).arg("--config").arg(second).output();
        let said = said(&output.expect("it runs"));
        let wanted = if daemon == "switchd" { "is another switchd running?" } else { "Address already in use" };
        assert!(said.contains("10.91.7.1:747") && said.contains(wanted), "{said}");
        assert!(late.terminate());
    }
}

/// Lines of a log that tell of failed accepts.
fn complaints(running: &Running) -> usize {
    running.log().matches("could not accept").count()
}

#[test]
#[ignore = "needs root"]
fn askers_that_do_nothing_keep_nobody_out_and_fill_no_log() {
    let place = Place::new();
    for (daemon, limit) in [("switchd", "60"), ("adaptd", "60"), ("switchd", "1024")] {
        let netns = Netns::new("idle");
        netns.ip("link add d0 type bridge");
        netns.ip("addr add 10.91.7.1/24 dev d0");
        let nofile = format!("--nofile={limit}:{limit}");
        let running = place.start(daemon, &netns, &["prlimit", &nofile, "--"], &place.text(daemon));
        let socket = place.path(&format!("{daemon}.sock"));
        eventually("it listens", SOON, || UnixStream::connect(&socket).is_ok());

        let mut idle = Vec::new();
        for round in 0..10 {
            // More at once than it may have descriptors, or askers.
            idle.extend((0..60).map(|_| UnixStream::connect(&socket).expect("the socket is there")));
            assert!(answers(daemon, &socket), "round {round}");
        }

        assert!(complaints(&running) <= 1, "{}", running.log());
        assert_eq!(complaints(&running) == 1, limit == "60", "{}", running.log());
        drop(idle);
        assert!(running.terminate());
    }
}

fn answers(daemon: &str, socket: &Path) -> bool {
    match daemon {
        "switchd" => ask::<_, SwitchReply>(socket, &SwitchRequest::Status).is_ok(),
        _ => {
            let answer: Result<serde_json::Value, String> = ask(socket, &violin_common::api::adapt::AdaptRequest::Status);
            answer.is_ok()
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_packet_port_needs_no_writable_proc_sys_where_ipv6_is_off_already() {
    let place = Place::new();
    let netns = Netns::new("sys");
    for interface in ["off", "on"] {
        netns.ip(&format!("link add {interface} type veth peer name far-{interface}"));
    }
    let off = netns.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/off/disable_ipv6", "1"));
    off.expect("the kernel has IPv6");
    netns.ip("link add d0 type bridge");
    netns.ip("addr add 10.91.7.1/24 dev d0");
    let port = |interface: &str| format!("[[port]]\nkind = \"packet\"\nvni = 5\ninterface = \"{interface}\"\n");
    let text = format!("{}[[network]]\nvni = 5\n{}{}", place.text("switchd"), port("off"), port("on"));
    let read_only = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec \"$@\"";

    let running = place.start("switchd", &netns, &["unshare", "--mount", "sh", "-c", read_only, "sh"], &text);

    let socket = place.path("switchd.sock");
    let seen = || match ask(&socket, &SwitchRequest::PortConditions) {
        Ok(SwitchReply::PortConditions(seen)) => seen,
        _ => Vec::<PortConditionSeen>::new(),
    };
    eventually("both ports were tried", SOON, || seen().len() == 2 && seen().iter().any(|port| port.what.is_some()));
    let seen = seen();
    assert_eq!(seen[0].condition, PortCondition::Attached, "{seen:?}");
    let why = seen[1].what.as_deref().unwrap_or_default();
    assert!(why.contains("conf/on/disable_ipv6 is 0 and cannot be written") && why.contains("want it set to 1"), "{seen:?}");
    assert!(running.terminate());
}
