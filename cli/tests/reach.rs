//! What `violin ssh` and `violin run` make of their words; the node is this machine.

mod fake;

use fake::{Manager, said};
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// There on every machine.
const NETNS: &str = "/proc/self/ns/net";

fn out(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn each_argument_reaches_the_program_as_it_is_and_one_word_alone_is_a_line() {
    let manager = Manager::of_alpha(NETNS);
    let odd = ["a b", "it's", "$HOME", "; echo second", "`id`", "", "*", "-n"];

    let output = manager.violin(&["ssh", "alpha", "c1", "--", "printf", "<%s>"]).args(odd).output().unwrap();
    assert_eq!(out(&output), odd.map(|word| format!("<{word}>")).concat(), "{}", said(&output));

    let output = manager.violin(&["ssh", "alpha", "c1", "--", "echo one; echo two | tr o 0"]).output().unwrap();
    assert_eq!(out(&output), "one\ntw0\n", "{}", said(&output));

    // No option of ssh's or of a shell's.
    let output = manager.violin(&["ssh", "alpha", "c1", "--", "-c"]).output().unwrap();
    assert_eq!(output.status.code(), Some(127), "{}", said(&output));
}

#[test]
fn the_status_and_the_standard_input_of_a_command_are_its_own() {
    let manager = Manager::of_alpha(NETNS);
    fs::write(manager.path("input"), "some words").unwrap();

    for (words, status) in [
        (&["exit 7"][..], 7),
        (&["sh", "-c", "exit 255"], 255),
        (&["true"], 0),
        (&["/nowhere/program", "x"], 127),
        (&["kill -KILL $$"], 137),
    ] {
        let output = manager.violin(&["ssh", "alpha", "--"]).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{words:?}: {}", said(&output));
    }
    let input = fs::File::open(manager.path("input")).unwrap();
    let output = manager.violin(&["ssh", "alpha", "--", "tr", "a-z", "A-Z"]).stdin(input).output().unwrap();
    assert_eq!(out(&output), "SOME WORDS", "{}", said(&output));
}

/// An mpirun that says how it was called, beside the fake `nsenter`.
fn mpirun(manager: &Manager) {
    let program = manager.path("mpirun");
    fs::write(&program, "#!/bin/sh\npwd\nfor word; do echo \"<$word>\"; done\n[ -s \"$3\" ] && cat \"$3\"\nexit 3\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn run_takes_any_directory_and_arguments_and_leaves_no_file() {
    let manager = Manager::of_alpha(NETNS);
    mpirun(&manager);
    let directory = manager.path("it's; a $(folder)");
    fs::create_dir(&directory).unwrap();
    let temporary = manager.path("tmp");
    fs::create_dir(&temporary).unwrap();

    let mut command = manager.violin(&["run", "alpha", "-n", "2", "--directory"]);
    command.arg(&directory).args(["--", "./program", "it's", "a b;c"]).env("TMPDIR", &temporary);
    let output = command.output().unwrap();

    let said_so = out(&output);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said_so.starts_with(&format!("{}\n", directory.display())), "{said_so}");
    for wanted in
        ["<-np>\n<2>\n", &format!("<--wdir>\n<{}>\n", directory.display()), "<./program>\n<it's>\n<a b;c>\n", "c1 slots=1\n"]
    {
        assert!(said_so.contains(wanted), "{wanted:?}: {said_so}");
    }
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);

    // One within the folder that a node's shell begins in.
    let relative = manager.path("-relative");
    fs::create_dir(&relative).unwrap();
    let mut command = manager.violin(&["run", "alpha", "--directory=-relative", "--", "true"]);
    let output = command.current_dir(manager.dir.path()).output().unwrap();
    assert!(out(&output).contains(&format!("<--wdir>\n<{}>\n", relative.display())), "{}{}", out(&output), said(&output));
}

#[test]
fn a_number_of_ranks_that_cannot_be_is_refused_in_words() {
    let manager = Manager::of_alpha(NETNS);
    mpirun(&manager);

    for (ranks, status, wanted) in [
        ("0", 2, "0 is not in 1.."),
        ("-1", 2, "-1 is not in 1.."),
        ("many", 2, "invalid digit"),
        ("5", 1, "got 5 ranks, want 1 to 4"),
    ] {
        let output = manager.violin(&["run", "alpha", "-n", ranks, "--", "true"]).output().unwrap();

        assert_eq!(output.status.code(), Some(status), "{ranks}: {}", said(&output));
        assert!(said(&output).contains(wanted) && output.stdout.is_empty(), "{ranks}: {}", said(&output));
    }
}

#[test]
#[ignore = "needs busybox-static"]
fn a_node_of_the_guest_image_does_the_same() {
    fake::again_on_busybox();
}
