//! The manager's end of a monitor's connection, and the daemons under test.

use super::{World, ip};
use monitord::io::netlink::inside;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use violin_channel::frame;
use violin_channel::quic::{Endpoint, admit, alpn, listen};
use violin_channel::tls::{Credentials, Timing};
use violin_common::control::monitor::{Answer, Command, Hello, Report};

/// Where monitors call.
#[derive(Debug)]
pub struct Manager {
    pub runtime: Runtime,
    endpoint: Endpoint,
}

/// One monitor's connection.
#[derive(Debug)]
pub struct Line {
    pub connection: quinn::Connection,
    reports: quinn::RecvStream,
    pub hello: Hello,
}

impl Manager {
    /// Listens in the hub, and gives the hosts addresses beside it.
    pub fn new(world: &World) -> Self {
        for (host, number) in [("h1", 11), ("h2", 12)] {
            ip(&format!("-n {} address add 10.91.0.{number}/24 dev br0", world.netns(host)));
        }
        let pki = world.dir.path().join("pki");
        let names = ["adaptd", "h1", "h2"].map(|host| (host.parse().unwrap(), "d1".parse().unwrap()));
        violin_channel::pki::write_pki(&pki, "test", &names).unwrap();
        let files = violin_channel::pki::paths(&pki, &"adaptd".parse().unwrap());
        let credentials = Arc::new(Credentials::load(&files).unwrap());
        let runtime = Runtime::new().unwrap();
        let netns = File::open(world.netns_path("hub")).unwrap();
        let endpoint = inside(netns, || {
            let _inside = runtime.enter();
            let address = "10.91.0.254:7472".parse().unwrap();
            listen(address, credentials, alpn::MONITOR, Timing::BRISK).map_err(std::io::Error::other)
        });
        Self { endpoint: endpoint.unwrap(), runtime }
    }

    /// Waits for a monitor's call and its HELLO.
    pub fn line(&self) -> Line {
        let line = async {
            let incoming = self.endpoint.accept().await.unwrap();
            let (connection, identity) = admit(incoming).await.unwrap();
            let mut reports = connection.accept_uni().await.unwrap();
            let Some(Report::Hello(hello)) = frame::recv(&mut reports).await.unwrap() else { panic!("no HELLO") };
            assert_eq!(identity.host, hello.host);
            Line { connection, reports, hello }
        };
        self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(180), line).await.expect("a monitor calls") })
    }

    /// The next report.
    pub fn report(&self, line: &mut Line) -> Report {
        let report = frame::recv(&mut line.reports);
        self.runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(180), report).await.expect("a report comes") })
            .unwrap()
            .unwrap()
    }

    /// Gives a command and waits for its end.
    pub fn ask(&self, line: &Line, command: &Command) -> Answer {
        self.runtime.block_on(ask(&line.connection, command))
    }
}

/// Gives a command and waits for its end.
pub async fn ask(connection: &quinn::Connection, command: &Command) -> Answer {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    frame::send(&mut send, command).await.unwrap();
    loop {
        match frame::recv(&mut recv).await.unwrap().expect("an answer") {
            Answer::Progress { .. } => {}
            answer => return answer,
        }
    }
}

/// A daemon that is killed with the value.
#[derive(Debug)]
pub struct Daemon(pub Child);

impl Daemon {
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

fn number(host: &str) -> u8 {
    if host == "h1" { 11 } else { 12 }
}

fn tls(world: &World, host: &str) -> String {
    let pki = world.dir.path().join("pki").display().to_string();
    format!(r#"tls = {{ ca = "{pki}/ca.pem", cert = "{pki}/{host}.pem", key = "{pki}/{host}.key" }}"#)
}

fn spawn(world: &World, host: &str, program: PathBuf, config: &str, log: Stdio) -> Daemon {
    let name = program.file_stem().unwrap().to_string_lossy().into_owned();
    let file = world.dir.path().join(format!("{host}-{name}.toml"));
    std::fs::write(&file, config).unwrap();
    let netns = format!("--net={}", world.netns_path(host).display());
    let daemon = Process::new("nsenter").arg(netns).arg(program).arg("--config").arg(file).stderr(log).spawn();
    // nsenter becomes the daemon: it forks only for PID namespaces.
    Daemon(daemon.unwrap())
}

/// A monitor with the sandbox driver.
pub fn monitord(world: &World, host: &str, pause: &str) -> Daemon {
    monitord_logging(world, host, pause, Stdio::inherit())
}

/// The same with another standard error.
pub fn monitord_logging(world: &World, host: &str, pause: &str, log: Stdio) -> Daemon {
    let dir = world.dir.path().display();
    let (tls, tag, number) = (tls(world, host), &world.tag, number(host));
    let config = format!(
        r#"
        host = "{host}"
        domain = "d1"
        manager = "10.91.0.254:7472"
        listen = "10.91.0.{number}:7473"
        switch-socket = "{dir}/{host}.sock"
        period = "200ms"
        images = "{dir}/{host}/images"
        run = "{dir}/{host}/run"
        {tls}
        capacity = {{ cores = 2.0, memory-mib = 1024, cpu-group = "{tag}{host}" }}
        driver = {{ kind = "sandbox", shared = "{dir}/shared", guest-program = "{dir}/guest.sh", pause = "{pause}" }}
        "#
    );
    spawn(world, host, env!("CARGO_BIN_EXE_monitord").into(), &config, log)
}

/// The switch of a host: `target/…/switchd` beside the monitor, or what VIOLIN_SWITCHD names.
pub fn switchd(world: &World, host: &str) -> Daemon {
    let beside = || PathBuf::from(env!("CARGO_BIN_EXE_monitord")).with_file_name("switchd");
    let program = std::env::var_os("VIOLIN_SWITCHD").map_or_else(beside, PathBuf::from);
    assert!(program.exists(), "{} is not there: cargo build -p switchd", program.display());
    let dir = world.dir.path().display();
    let (tls, number) = (tls(world, host), number(host));
    let join = if host == "h1" { "" } else { "\"10.91.0.11:7471\"" };
    let config = format!(
        r#"
        host = "{host}"
        domain = "d1"
        listen = "10.91.0.{number}:7471"
        join = [{join}]
        socket = "{dir}/{host}.sock"
        {tls}
        "#
    );
    spawn(world, host, program, &config, Stdio::inherit())
}
