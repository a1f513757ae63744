//! A manager that answers as a test wants, and an `nsenter` that runs a node's commands here.
#![allow(dead_code)] // Each test program uses its part.
#![allow(unreachable_pub)] // A test program has no outside.

pub mod guest;
pub mod places;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output};
use violin_common::api::Response;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, Condition, EnvironmentLife, EnvironmentSeen, VmListed};
use violin_common::config::environment::{EnvironmentSpec, Node};

/// Runs what comes behind the address, as a node's shell would. With CUT its input and output end after so many bytes, as
/// when the connection breaks. NODE_TOOLS is the folder of the node's programs, if they are not this machine's.
const NSENTER: &str = r#"#!/bin/sh
while [ "${1#root@}" = "$1" ]; do shift; done
shift
[ -z "$NODE_TOOLS" ] || PATH=$NODE_TOOLS:${0%/*}
[ -n "$CUT" ] || exec sh -c "$*"
head -c "$CUT" | sh -c "$*" | head -c "$CUT"
exit 255
"#;

pub const ALPHA: &str = include_str!("../../../configs/environments/alpha.toml");

#[derive(Debug)]
pub struct Manager {
    pub dir: tempfile::TempDir,
}

impl Manager {
    /// Answers each request with what `answer` says, until the test ends.
    pub fn new(mut answer: impl FnMut(AdaptRequest) -> Response<AdaptReply> + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let nsenter = dir.path().join("nsenter");
        std::fs::write(&nsenter, NSENTER).unwrap();
        std::fs::set_permissions(&nsenter, std::fs::Permissions::from_mode(0o755)).unwrap();
        let listener = UnixListener::bind(dir.path().join("adaptd.sock")).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                let reply = answer(serde_json::from_str(&line).unwrap());
                let _ = writeln!(stream, "{}", serde_json::to_string(&reply).unwrap());
            }
        });
        Self { dir }
    }

    /// One with the environment alpha, whose access namespace it says to be there.
    pub fn of_alpha(netns: &str) -> Self {
        Self::of(ALPHA, netns)
    }

    /// The same with an environment of another shape.
    pub fn of(alpha: &str, netns: &str) -> Self {
        let (spec, netns) = (EnvironmentSpec::parse(alpha).unwrap(), netns.to_owned());
        Self::new(move |request| match request {
            AdaptRequest::EnvList => Response::Ok(AdaptReply::Environments(vec![seen(&spec)])),
            AdaptRequest::Access { .. } => Response::Ok(AdaptReply::Access { host: "h2".parse().unwrap(), netns: netns.clone() }),
            other => Response::Error(format!("got {other:?}")),
        })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn violin(&self, words: &[&str]) -> Command {
        let path = format!("{}:{}", self.dir.path().display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_violin"));
        command.arg("--socket").arg(self.path("adaptd.sock")).args(words);
        command.env_remove("VIOLIN_LAB").env_remove("VIOLIN_SOCKET").env_remove("CUT").env("PATH", path);
        command
    }
}

/// Runs all tests of this program again, on nodes whose tools are busybox's, as those of the guest image are.
pub fn again_on_busybox() {
    let tools = tempfile::tempdir().unwrap();
    let installed = Command::new("busybox").args(["--install", "-s"]).arg(tools.path()).status();
    assert!(installed.expect("busybox (Debian package busybox-static)").success());

    let output = Command::new(std::env::current_exe().unwrap()).env("NODE_TOOLS", tools.path()).output().unwrap();

    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !told.contains("running 0 tests"), "{told}{}", said(&output));
}

pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn alpha() -> EnvironmentSeen {
    seen(&EnvironmentSpec::parse(ALPHA).unwrap())
}

fn seen(spec: &EnvironmentSpec) -> EnvironmentSeen {
    let listed = |node: &Node| VmListed {
        vm: node.vm.clone(),
        environment: spec.name.clone(),
        role: node.role,
        address: node.address,
        host: None,
        state: Condition::Running,
        last_state: Some(Condition::Running),
        seen_s: Some(0.5),
        run: Some(0.0),
        wait: Some(0.0),
        demand: Some(0.0),
        smoothed_demand: Some(0.0),
        moving_to: None,
        giving_up: false,
    };
    EnvironmentSeen {
        vms: spec.nodes().unwrap().iter().map(listed).collect(),
        home: spec.home.clone().unwrap(),
        life: EnvironmentLife::Ready,
        progress: None,
        progress_s: None,
        spec: spec.clone(),
    }
}
