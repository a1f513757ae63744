//! A manager that answers as a test wants, and an `nsenter` that runs a node's commands here.
#![allow(dead_code)] // Each test program uses its part.
#![allow(unreachable_pub)] // A test program has no outside.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output};
use violin_common::api::Response;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, Condition, EnvironmentLife, EnvironmentSeen, VmListed};
use violin_common::config::environment::{EnvironmentSpec, Node};

/// Runs what comes behind the address, as a node's shell would. With CUT its input or output ends after so many bytes, as
/// when the connection breaks.
const NSENTER: &str = r#"#!/bin/sh
while [ "${1#root@}" = "$1" ]; do shift; done
shift
[ -n "$CUT" ] || exec sh -c "$*"
case "$*" in
"cat -- "*) sh -c "$*" | head -c "$CUT"; exit 255 ;;
*) head -c "$CUT" | sh -c "$*"; exit 255 ;;
esac
"#;

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
        let netns = netns.to_owned();
        Self::new(move |request| match request {
            AdaptRequest::EnvList => Response::Ok(AdaptReply::Environments(vec![alpha()])),
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

pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn alpha() -> EnvironmentSeen {
    let spec = EnvironmentSpec::parse(include_str!("../../../configs/environments/alpha.toml")).unwrap();
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
        spec,
    }
}
