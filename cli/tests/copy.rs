//! What `violin cp` leaves where a file was; the node is this machine.

mod fake;

use fake::places::{NETNS, both, copy, folders, mode, names};
use fake::{Manager, said};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};

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
    assert_eq!((fs::read_to_string(here.join("new")).unwrap(), mode(&here.join("new"))), ("third".into(), 0o750));

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
        // In the middle of what is said before the file, and of the file.
        for cut in ["3", "26"] {
            let cut = if words[1] == remote { cut } else { "3" };
            let output = manager.violin(&words).env("CUT", cut).output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{words:?}: {}", said(&output));
        }
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

#[test]
fn a_copy_into_a_folder_takes_the_names_of_its_files_and_leaves_nothing_else() {
    let manager = Manager::of_alpha(NETNS);
    for (number, (from, from_words, to, to_words)) in both(&manager).into_iter().enumerate() {
        let (one, two) = (format!("one{number}"), format!("two{number}"));
        fs::write(from.join(&one), "1").unwrap();
        fs::write(from.join(&two), "2").unwrap();
        let sources = [format!("{from_words}/{one}"), format!("{from_words}/{two}")];

        let alone = copy(&manager, "022", &[&sources[0], &to_words]);
        let several = copy(&manager, "022", &[&sources[0], &sources[1], &format!("{to_words}/")]);

        assert!(alone.status.success() && several.status.success(), "{}{}", said(&alone), said(&several));
        assert_eq!(
            (fs::read_to_string(to.join(&one)).unwrap(), fs::read_to_string(to.join(&two)).unwrap()),
            ("1".into(), "2".into())
        );
        let mut all = names(&manager.path("node"));
        all.extend(names(&manager.path("here")));
        assert!(all.iter().all(|name| name.starts_with("one") || name.starts_with("two")), "{all:?}");
        assert!(names(manager.dir.path()).iter().all(|name| !name.contains("part")), "{:?}", names(manager.dir.path()));

        // Not into a folder that is not there, and several not into a file.
        for to in [format!("{to_words}/none/"), format!("{to_words}/{one}")] {
            let refused = copy(&manager, "022", &[&sources[0], &sources[1], &to]);
            assert!(
                refused.status.code() == Some(1) && said(&refused).contains("want a folder that is there"),
                "{}",
                said(&refused)
            );
        }
        fs::remove_file(from.join(&one)).unwrap();
        fs::remove_file(from.join(&two)).unwrap();
        fs::remove_file(to.join(&one)).unwrap();
        fs::remove_file(to.join(&two)).unwrap();
    }
}

#[test]
fn a_new_file_has_the_mode_of_its_source_less_the_umask_and_with_p_mode_and_time() {
    let manager = Manager::of_alpha(NETNS);
    for (from, from_words, to, to_words) in both(&manager) {
        let file = from.join("program");
        fs::write(&file, "#!/bin/sh").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o775)).unwrap();
        let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();

        let source = format!("{from_words}/program");
        let usual = copy(&manager, "027", &[&source, &format!("{to_words}/usual")]);
        let kept = copy(&manager, "027", &["-p", &source, &format!("{to_words}/kept")]);

        assert!(usual.status.success() && kept.status.success(), "{}{}", said(&usual), said(&kept));
        assert_eq!((mode(&to.join("usual")), mode(&to.join("kept"))), (0o750, 0o775));
        let modified = |name: &str| fs::metadata(to.join(name)).unwrap().modified().unwrap();
        assert!(modified("usual") > time && modified("kept") == time);
        fs::remove_dir_all(&from).unwrap();
        fs::remove_dir_all(&to).unwrap();
        fs::create_dir(from).unwrap();
        fs::create_dir(to).unwrap();
    }
}

#[test]
fn a_folder_is_refused_without_r_and_copied_whole_with_it() {
    let manager = Manager::of_alpha(NETNS);
    for (from, from_words, to, to_words) in both(&manager) {
        fs::create_dir_all(from.join("job/in it")).unwrap();
        fs::write(from.join("job/in it/data"), "d").unwrap();
        fs::write(from.join("job/run"), "r").unwrap();
        fs::set_permissions(from.join("job/run"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(from.join("file"), "f").unwrap();
        let (job, file) = (format!("{from_words}/job"), format!("{from_words}/file"));

        let refused = copy(&manager, "022", &[&job, &file, &to_words]);
        assert!(refused.status.code() == Some(1) && said(&refused).contains("-r"), "{}", said(&refused));
        assert_eq!(names(&to), ["file"], "what can be copied is");

        for copied in ["job", "new"] {
            let target = if copied == "new" { format!("{to_words}/new") } else { to_words.clone() };
            let output = copy(&manager, "022", &["-r", &job, &target]);
            assert!(output.status.success(), "{}", said(&output));
            assert_eq!(fs::read_to_string(to.join(copied).join("in it/data")).unwrap(), "d");
            assert_eq!(
                (names(&to.join(copied)), mode(&to.join(copied).join("run"))),
                (vec!["in it".into(), "run".into()], 0o755)
            );
        }
        fs::remove_dir_all(&from).unwrap();
        fs::remove_dir_all(&to).unwrap();
        fs::create_dir(from).unwrap();
        fs::create_dir(to).unwrap();
    }
}

#[test]
#[ignore = "needs busybox-static"]
fn a_node_of_the_guest_image_does_the_same() {
    fake::again_on_busybox();
}
