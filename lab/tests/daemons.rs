//! A whole lab: switches, monitors, the manager, guests in it. The programs are those in the folder `VIOLIN_BIN`.

mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::{Standing, THREE, config, interrupted, name, options, relay_entry as relay, remains};
use violin_lab::{Guests, LabError, LabState, Layers, netns, status};

#[test]
#[ignore = "not a test: the relay of the lab below"]
fn relay_entry() {
    relay();
}

fn programs() -> PathBuf {
    let folder = std::env::var_os("VIOLIN_BIN");
    folder.expect("got no VIOLIN_BIN, want the folder of the programs built (`make test` sets it)").into()
}

fn accesses(environment: &str) -> usize {
    let names = std::fs::read_dir(netns::NAMESPACES).unwrap().flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|netns| netns.starts_with("va-") && netns.contains(&format!(".{environment}-"))).count()
}

/// Control groups of an environment's guests, in all hierarchies.
fn groups(environment: &str) -> usize {
    let found =
        Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &format!("{environment}-*")]).output().unwrap();
    String::from_utf8_lossy(&found.stdout).lines().count()
}

#[test]
#[ignore = "needs root"]
fn nothing_is_left_of_a_lab_with_guests_and_a_killed_monitor() {
    let binaries = programs();
    let mut config = config(&name("all"), THREE);
    config.guests = Guests::Sandbox;
    let mut options = options(Layers::All);
    options.binaries.clone_from(&binaries);
    let lab = Standing::up(&config, &options);
    let name = lab.0.name.clone();
    assert!(status(&name).unwrap().whole());
    let environment = format!("t{}", std::process::id());
    let file = lab.0.dir.join("environment.toml");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/environments/alpha.toml");
    let text = std::fs::read_to_string(example).unwrap().replace("name = \"alpha\"", &format!("name = \"{environment}\""));
    std::fs::write(&file, text).unwrap();
    let violin = |words: &[&str]| {
        netns::run(Command::new(binaries.join("violin")).args(["--lab", &name]).args(words).stderr(Stdio::inherit())).unwrap()
    };
    violin(&["env", "up", &file.to_string_lossy()]);
    assert_eq!(violin(&["ssh", &environment, "--", "hostname"]).trim(), "head");
    assert_eq!(accesses(&environment), 1);
    assert!(groups(&environment) >= 5, "a group for each guest");

    let monitord = lab.0.hosts[0].monitord.unwrap();
    Command::new("kill").args(["-9", &monitord.pid.to_string()]).status().unwrap();
    lab.down();

    assert_eq!(remains(&name), BTreeSet::new());
    assert_eq!(accesses(&environment), 0);
    assert_eq!(groups(&environment), 0);
}

#[test]
#[ignore = "needs root"]
fn nothing_is_left_of_a_lab_interrupted_between_its_daemons() {
    let mut config = config(&name("cut"), THREE);
    config.guests = Guests::Sandbox;
    let mut options = options(Layers::All);
    options.binaries = programs();
    let name = config.name.to_string();
    let switch = |index: usize| move |state: LabState| state.hosts.get(index).is_some_and(|host| host.switchd.is_some());

    for index in [0, 2] {
        let error = interrupted(&config, options.clone(), || LabState::load(&name).is_ok_and(switch(index))).unwrap_err();

        assert!(matches!(error, LabError::Cancelled), "{error}");
        assert_eq!(remains(&name), BTreeSet::new(), "interrupted at host {index}");
    }
}

/// By Ctrl-C, a killer, the end of its terminal; `nohup` is heeded.
#[test]
#[ignore = "needs root"]
fn a_command_interrupted_while_it_builds_says_so_by_its_status_and_leaves_nothing() {
    for (signal, status) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let config = config(&name("sig"), THREE);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), THREE).unwrap();
        let mut command = Command::new(programs().join("violin"));
        command.args(["lab", "up", "--guests", "sandbox", "--name", config.name.as_str(), "--config"]).arg(file.path());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut told = std::io::BufReader::new(child.stderr.take().unwrap());
        let mut first = String::new();
        std::io::BufRead::read_line(&mut told, &mut first).unwrap();

        assert!(Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success());

        let mut rest = String::new();
        std::io::Read::read_to_string(&mut told, &mut rest).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(status), "{signal}: {first}{rest}");
        assert!(rest.contains("interrupted"), "{signal}: {rest}");
        assert_eq!(remains(config.name.as_str()), BTreeSet::new(), "{signal}");
    }
}
