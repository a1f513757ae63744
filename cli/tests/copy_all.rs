//! `violin cp` with what folders and names may hold, and what it leaves when it is ended; the node is this machine.

mod fake;

use fake::guest::until;
use fake::places::{NETNS, both, copy, folders, in_shell, mode, names};
use fake::{Manager, said};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// All files below, with what is in them.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for path in fs::read_dir(next).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                open.push(path);
            } else {
                all.insert(path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    all
}

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn any_name_and_any_length_arrive_as_they_are() {
    let manager = Manager::of_alpha(NETNS);
    let long = "l".repeat(255);
    for (from, from_words, to, to_words) in both(&manager) {
        let odd = ["a b", "new\nline", "newline at its end\n", "-rf", "-", "*", "it's", "$(id)", ".hidden", "..two", &long];
        for name in odd {
            fs::write(from.join(name), name).unwrap();
        }
        fs::write(from.join("empty"), "").unwrap();
        let mut sparse = File::create(from.join("sparse")).unwrap();
        sparse.seek(SeekFrom::Start(3 << 20)).unwrap();
        sparse.write_all(b"end").unwrap();
        drop(sparse);

        for name in odd.into_iter().chain(["empty", "sparse"]) {
            let output = copy(&manager, "022", &[&format!("{from_words}/{name}"), &to_words]);
            assert!(output.status.success(), "{name:?}: {}", said(&output));
        }
        assert!(content(&from) == content(&to), "{:?}", names(&to));

        // In folders those that no command line can name, too.
        let deep = from.join("d".repeat(200)).join("e".repeat(200));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join(OsStr::from_bytes(b"\xff")), "no UTF-8").unwrap();
        fs::create_dir(from.join("empty folder")).unwrap();
        let output = copy(&manager, "022", &["-r", &format!("{from_words}/."), &format!("{to_words}/all/")]);
        assert!(output.status.success(), "{}", said(&output));
        assert!(content(&from) == content(&to.join("all")) && to.join("all/empty folder").is_dir(), "{:?}", names(&to));

        for folder in [from, to] {
            fs::remove_dir_all(&folder).unwrap();
            fs::create_dir(folder).unwrap();
        }
    }
}

#[test]
fn a_folder_joins_one_that_is_there_and_what_it_replaces_keeps_its_mode() {
    let manager = Manager::of_alpha(NETNS);
    for (from, from_words, to, to_words) in both(&manager) {
        for (folder, text) in [(&from, "new"), (&to, "old")] {
            fs::create_dir_all(folder.join("job/in")).unwrap();
            fs::write(folder.join("job/in/both"), text).unwrap();
            fs::write(folder.join("job/in").join(text), text).unwrap();
        }
        fs::set_permissions(to.join("job/in/both"), Permissions::from_mode(0o750)).unwrap();
        fs::set_permissions(from.join("job/in"), Permissions::from_mode(0o750)).unwrap();
        let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        File::open(from.join("job/in")).unwrap().set_modified(time).unwrap();
        // Neither takes the place of the other.
        fs::write(from.join("job/kind"), "a file").unwrap();
        fs::create_dir(to.join("job/kind")).unwrap();

        let joined = copy(&manager, "022", &["-r", &format!("{from_words}/job"), &to_words]);
        let kept = [(); 2].map(|()| copy(&manager, "022", &["-rp", &format!("{from_words}/job/in"), &to_words]));

        assert!(joined.status.code() == Some(1) && said(&joined).contains("kind"), "{}", said(&joined));
        // The first makes it, the second finds it there.
        assert!(kept.iter().all(|kept| kept.status.success()), "{}{}", said(&kept[0]), said(&kept[1]));
        let both = to.join("job/in/both");
        assert_eq!((fs::read_to_string(&both).unwrap(), mode(&both)), ("new".into(), 0o750));
        assert_eq!(
            (names(&to.join("job/in")), names(&to.join("job"))),
            (vec!["both".into(), "new".into(), "old".into()], vec!["in".into(), "kind".into()])
        );
        assert!(to.join("job/kind").is_dir());
        let modified = fs::metadata(to.join("in")).unwrap().modified().unwrap();
        assert_eq!((mode(&to.join("in")), modified), (0o750, time));

        for folder in [from, to] {
            fs::remove_dir_all(&folder).unwrap();
            fs::create_dir(folder).unwrap();
        }
    }
}

#[test]
fn what_of_a_folder_cannot_be_copied_is_named_and_the_status_is_1() {
    let manager = Manager::of_alpha(NETNS);
    for (from, from_words, to, to_words) in both(&manager) {
        let job = from.join("job");
        fs::create_dir(&job).unwrap();
        fs::write(job.join("file"), "f").unwrap();
        symlink("file", job.join("link")).unwrap();
        symlink("nowhere", job.join("broken")).unwrap();
        fifo(&job.join("pipe"));

        let output = copy(&manager, "022", &["-r", &format!("{from_words}/job"), &to_words]);

        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        for wanted in ["broken is left out", "pipe is left out", "2 of the folder left out"] {
            assert!(said(&output).contains(wanted), "{wanted}: {}", said(&output));
        }
        assert_eq!(names(&to.join("job")), ["file", "link"]);
        fs::remove_dir_all(to.join("job")).unwrap();
        fs::remove_dir_all(job).unwrap();
    }
}

#[test]
fn a_folder_within_itself_is_no_endless_one() {
    let manager = Manager::of_alpha(NETNS);
    let (node, here) = folders(&manager);
    fs::write(here.join("file"), "f").unwrap();
    symlink(".", here.join("loop")).unwrap();

    let output = copy(&manager, "022", &["-r", here.to_str().unwrap(), &format!("alpha:c1:{}", node.display())]);

    assert!(output.status.code() == Some(1) && said(&output).contains("loop is left out"), "{}", said(&output));
    assert_eq!(names(&node.join("here")), ["file"]);
}

#[test]
fn a_folder_cut_short_leaves_no_half_of_a_file() {
    let manager = Manager::of_alpha(NETNS);
    for (from, from_words, to, to_words) in both(&manager) {
        let job = from.join("job");
        fs::create_dir(&job).unwrap();
        for name in ["one", "two", "three"] {
            fs::write(job.join(name), "x".repeat(600)).unwrap();
        }
        let into_node = to_words.starts_with("alpha:");
        // Each cut leaves something out; between two files of an archive, too.
        for cut in [3, 40, 512, 700, 1024, 2048, 1536 + 512] {
            let mut command = manager.violin(&["cp", "-r", &format!("{from_words}/job"), &to_words]);
            let output = command.env("CUT", cut.to_string()).output().unwrap();

            assert_eq!(output.status.code(), Some(1), "{cut}: {}", said(&output));
            let whole = content(&to);
            assert!(whole.values().all(|file| file.len() == 600), "{cut}: {:?}", whole.keys());
            assert!(!into_node || names(&to).is_empty(), "{cut}: {:?}", names(&to));
        }
        let _ = fs::remove_dir_all(to.join("job"));
        fs::remove_dir_all(job).unwrap();
    }
}

#[test]
fn a_copy_ended_by_a_signal_leaves_no_part_and_says_which() {
    let manager = Manager::of_alpha(NETNS);
    let (node, here) = folders(&manager);
    fifo(&node.join("endless"));
    let source = format!("alpha:c1:{}", node.join("endless").display());

    for (name, shell, status) in [
        ("-INT", "exec \"$@\"", 130),
        ("-TERM", "exec \"$@\"", 143),
        ("-HUP", "exec \"$@\"", 129),
        // As under nohup.
        ("-HUP", "trap '' HUP; exec \"$@\"", 0),
    ] {
        let mut child =
            in_shell(shell, &manager.violin(&["cp", &source, here.join("endless").to_str().unwrap()])).spawn().unwrap();
        // Opened as soon as it is read, open until it is let go.
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let pipe = node.join("endless");
        std::thread::spawn(move || {
            let writer = File::options().write(true).open(pipe).unwrap();
            let _ = held.recv();
            drop(writer);
        });
        until("a part is there", || !names(&here).is_empty());

        assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
        if status == 0 {
            drop(hold);
        }

        assert_eq!(child.wait().unwrap().code(), Some(status), "{name}");
        assert_eq!(names(&here), if status == 0 { vec!["endless"] } else { Vec::new() }, "{name}");
    }
}

#[test]
fn a_copy_into_a_node_that_is_ended_leaves_what_was_there() {
    let manager = Manager::of_alpha(NETNS);
    let (node, here) = folders(&manager);
    fs::write(here.join("file"), vec![b'n'; 1 << 20]).unwrap();
    fs::write(node.join("file"), "old").unwrap();
    // A connection that holds up all but the first bytes until it is let go.
    let held = "#!/bin/sh
while [ \"${1#root@}\" = \"$1\" ]; do shift; done
shift
cd \"${0%/*}\"
{ head -c 3; echo > started; read -r go < gate; cat; } | sh -c \"$*\"
echo > finished
";
    fs::write(manager.path("nsenter"), held).unwrap();
    fifo(&manager.path("gate"));
    let to = format!("alpha:c1:{}", node.join("file").display());
    let mut command = manager.violin(&["cp", here.join("file").to_str().unwrap(), &to]);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    until("the copy is under way", || manager.path("started").exists());

    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(143));
    fs::write(manager.path("gate"), "go\n").unwrap();

    until("the node has done with it", || manager.path("finished").exists());
    assert_eq!((names(&node), fs::read_to_string(node.join("file")).unwrap()), (vec!["file".into()], "old".into()));
}

#[test]
#[ignore = "needs root"]
fn what_is_replaced_keeps_its_owner() {
    let manager = Manager::of_alpha(NETNS);
    for (from, from_words, to, to_words) in both(&manager) {
        fs::write(from.join("file"), "new").unwrap();
        fs::write(to.join("file"), "old").unwrap();
        chown(to.join("file"), Some(12345), Some(54321)).unwrap();

        let output = copy(&manager, "022", &[&format!("{from_words}/file"), &to_words]);

        assert!(output.status.success(), "{}", said(&output));
        let meta = fs::metadata(to.join("file")).unwrap();
        assert_eq!((fs::read_to_string(to.join("file")).unwrap(), meta.uid(), meta.gid()), ("new".into(), 12345, 54321));
        fs::remove_file(from.join("file")).unwrap();
        fs::remove_file(to.join("file")).unwrap();
    }
}

#[test]
#[ignore = "needs busybox-static"]
fn a_node_of_the_guest_image_does_the_same() {
    fake::again_on_busybox();
}
