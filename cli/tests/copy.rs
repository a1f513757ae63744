//! What `violin cp` leaves where a file was; the node is this machine.

mod fake;

use fake::{Manager, said};
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

/// There on every machine.
const NETNS: &str = "/proc/self/ns/net";

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// A folder for the node's files and one for ours.
fn folders(manager: &Manager) -> (std::path::PathBuf, std::path::PathBuf) {
    let folders = (manager.path("node"), manager.path("here"));
    fs::create_dir(&folders.0).unwrap();
    fs::create_dir(&folders.1).unwrap();
    folders
}

#[test]
fn a_file_comes_whole_and_the_mode_of_the_old_one_stays() {
    let manager = Manager::of_alpha(NETNS);
    let (node, here) = folders(&manager);
    // A name that a shell would take apart.
    let (there, local) = (node.join("it's $HOME; new"), here.join("local"));
    let remote = format!("alpha:c1:{}", there.display());
    let copy = |from: &str, to: &str| {
        let output = manager.violin(&["cp", from, to]).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    };

    fs::write(&local, "first").unwrap();
    fs::write(manager.path("usual"), "").unwrap();
    copy(local.to_str().unwrap(), &remote);
    assert_eq!((fs::read_to_string(&there).unwrap(), mode(&there)), ("first".into(), mode(&local)));

    fs::set_permissions(&there, fs::Permissions::from_mode(0o750)).unwrap();
    fs::write(&local, "second").unwrap();
    copy(local.to_str().unwrap(), &remote);
    assert_eq!((fs::read_to_string(&there).unwrap(), mode(&there)), ("second".into(), 0o750));

    fs::write(&there, "third").unwrap();
    fs::set_permissions(&local, fs::Permissions::from_mode(0o700)).unwrap();
    symlink("local", here.join("link")).unwrap();
    copy(&remote, here.join("link").to_str().unwrap());
    assert_eq!((fs::read_to_string(&local).unwrap(), mode(&local)), ("third".into(), 0o700));
    copy(&remote, here.join("new").to_str().unwrap());
    let usual = mode(&manager.path("usual"));
    assert_eq!((fs::read_to_string(here.join("new")).unwrap(), mode(&here.join("new"))), ("third".into(), usual));

    assert_eq!(names(&node), ["it's $HOME; new"]);
    assert_eq!(names(&here), ["link", "local", "new"]);
}

#[test]
fn a_copy_cut_short_leaves_what_was_there() {
    let manager = Manager::of_alpha(NETNS);
    let (node, here) = folders(&manager);
    let (there, local) = (node.join("file"), here.join("file"));
    fs::write(&there, "the node's own").unwrap();
    fs::write(&local, "ours").unwrap();
    // Somebody's own, of a name that a copy might take for its parts.
    fs::write(here.join("file.part"), "kept").unwrap();
    let remote = format!("alpha:c1:{}", there.display());

    for words in [["cp", local.to_str().unwrap(), &remote], ["cp", &remote, local.to_str().unwrap()]] {
        let output = manager.violin(&words).env("CUT", "3").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}: {}", said(&output));
    }
    let mut piped = manager.violin(&["cp", "/dev/stdin", &remote]).env("CUT", "3").stdin(Stdio::piped()).spawn().unwrap();
    piped.stdin.take().unwrap().write_all(b"out of a pipe").unwrap();
    assert_eq!(piped.wait().unwrap().code(), Some(1));

    assert_eq!(fs::read_to_string(&there).unwrap(), "the node's own");
    assert_eq!(fs::read_to_string(&local).unwrap(), "ours");
    assert_eq!(fs::read_to_string(here.join("file.part")).unwrap(), "kept");
    assert_eq!(names(&node), ["file"]);
    assert_eq!(names(&here), ["file", "file.part"]);
}

#[test]
fn a_pipe_is_written_as_it_comes() {
    let manager = Manager::of_alpha(NETNS);
    let (node, here) = folders(&manager);
    fs::write(node.join("file"), "content").unwrap();
    fs::write(here.join("file"), "content").unwrap();

    let output = manager.violin(&["cp", &format!("alpha:c1:{}", node.join("file").display()), "/dev/stdout"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "content", "{}", said(&output));

    let pipe = node.join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || fs::read_to_string(pipe).unwrap()
    });
    let remote = format!("alpha:c1:{}", pipe.display());
    let output = manager.violin(&["cp", here.join("file").to_str().unwrap(), &remote]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
    assert_eq!(reader.join().unwrap(), "content");
}
