//! Files here and on a node, which is this machine, too.

use super::Manager;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// There on every machine.
pub const NETNS: &str = "/proc/self/ns/net";

pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// A folder for the node's files and one for ours.
pub fn folders(manager: &Manager) -> (PathBuf, PathBuf) {
    let folders = (manager.path("node"), manager.path("here"));
    fs::create_dir(&folders.0).unwrap();
    fs::create_dir(&folders.1).unwrap();
    folders
}

/// One of each place, with the node's as `violin cp` wants it.
pub fn both(manager: &Manager) -> [(PathBuf, String, PathBuf, String); 2] {
    let (node, here) = folders(manager);
    let (on_node, local) = (format!("alpha:c1:{}", node.display()), here.display().to_string());
    [(here.clone(), local.clone(), node.clone(), on_node.clone()), (node, on_node, here, local)]
}

pub fn copy(manager: &Manager, umask: &str, words: &[&str]) -> Output {
    in_shell(&format!("umask {umask}; exec \"$@\""), manager.violin(&["cp"]).args(words)).output().unwrap()
}

/// The same command, as the words of a shell's script.
pub fn in_shell(script: &str, violin: &Command) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(violin.get_program()).args(violin.get_args());
    for (name, value) in violin.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}
