//! What becomes of a job in a node when `violin ssh` or `violin run` is ended here. Needs root, dropbear and Open MPI.

mod fake;

use fake::guest::{Guest, until};
use fake::said;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// A number of seconds to sleep that no other process on this machine has.
fn mark(number: u32) -> String {
    format!("{}.{number}", 100_000 + std::process::id())
}

#[test]
#[ignore = "needs root, dropbear-bin and openmpi-bin"]
fn a_job_ends_with_its_ssh_or_run_however_that_ends() {
    let guest = Guest::head();
    let (sleep, line) = (mark(1), mark(2));
    let stubborn = format!("trap '' TERM; sleep {line}; sleep {line}");

    for (words, wanted, name) in [
        (&["ssh", "alpha", "--", "sleep", &sleep][..], &sleep, "-INT"),
        (&["ssh", "alpha", "--", "sleep", &sleep], &sleep, "-TERM"),
        (&["ssh", "alpha", "--", "sleep", &sleep], &sleep, "-KILL"),
        // One that the first signal does not end.
        (&["ssh", "alpha", "--", &stubborn], &line, "-INT"),
        (&["run", "alpha", "-n", "2", "--", "sleep", &sleep], &sleep, "-INT"),
    ] {
        let mut child = guest.manager.violin(words).stdin(Stdio::null()).spawn().unwrap();
        // The program itself, not those that were told to start it.
        until("the job runs", || !Guest::running(wanted).is_empty());

        signal(&child, name);
        child.wait().unwrap();

        until("the job is gone", || Guest::running(wanted).is_empty());
    }
}

/// The command in a terminal of its own, whose keys are the standard input.
fn in_terminal(violin: &Command) -> Command {
    let words = std::iter::once(violin.get_program()).chain(violin.get_args());
    let quoted = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ");
    let mut command = Command::new("script");
    command.args(["-qec", &quoted, "/dev/null"]).env_remove("VIOLIN_LAB").env_remove("VIOLIN_SOCKET");
    command
}

#[test]
#[ignore = "needs root and dropbear-bin"]
fn a_command_has_a_terminal_there_when_there_is_one_here_and_none_without() {
    let guest = Guest::head();
    let mut violin = guest.manager.violin(&["ssh", "alpha", "--", "[ -t 0 ] && [ -t 1 ] && echo a terminal || echo no terminal"]);

    let with = in_terminal(&violin).stdin(Stdio::null()).output().unwrap();
    let without = violin.stdin(Stdio::null()).output().unwrap();

    // `script` shows, too, what it types at the end of its own input.
    let with_said = String::from_utf8_lossy(&with.stdout);
    assert!(with_said.contains("a terminal") && !with_said.contains("no terminal"), "{with_said}{}", said(&with));
    assert_eq!(String::from_utf8_lossy(&without.stdout), "no terminal\n", "{}", said(&without));
}

#[test]
#[ignore = "needs root, dropbear-bin and openmpi-bin"]
fn ctrl_c_in_a_terminal_ends_the_job_there_with_130_and_so_does_the_terminals_end() {
    let guest = Guest::head();
    let sleep = mark(3);

    for (words, key) in [
        (&["ssh", "alpha", "--", "sleep", &sleep][..], Some(b"\x03")),
        (&["run", "alpha", "-n", "2", "--", "sleep", &sleep], Some(b"\x03")),
        (&["ssh", "alpha", "--", "sleep", &sleep], None),
    ] {
        let mut terminal = in_terminal(&guest.manager.violin(words));
        let mut terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut keys = terminal.stdin.take().unwrap();
        until("the job runs", || !Guest::running(&sleep).is_empty());

        match key {
            Some(key) => keys.write_all(key).unwrap(),
            None => signal(&terminal, "-KILL"),
        }
        let status = terminal.wait().unwrap();

        assert_eq!(status.code(), key.map(|_| 130), "{words:?}: {status}");
        until("the job is gone", || Guest::running(&sleep).is_empty());
    }
}

#[test]
#[ignore = "needs root and dropbear-bin"]
fn words_and_statuses_pass_through_a_real_ssh() {
    let guest = Guest::head();
    let on = |words: &[&str]| guest.manager.violin(words).stdin(Stdio::null()).output().unwrap();

    let printed = on(&["ssh", "alpha", "--", "printf", "<%s>", "a b", "it's", "; id"]);
    assert_eq!(String::from_utf8_lossy(&printed.stdout), "<a b><it's><; id>", "{}", said(&printed));
    for (line, status) in [("exit 7", 7), ("kill -KILL $$", 137)] {
        assert_eq!(on(&["ssh", "alpha", "--", line]).status.code(), Some(status), "{line}");
    }
}

#[test]
#[ignore = "needs root, dropbear-bin and openmpi-bin"]
fn a_folder_goes_there_runs_and_comes_back_through_a_real_ssh() {
    let guest = Guest::head();
    let on = |words: &[&str]| guest.manager.violin(words).stdin(Stdio::null()).output().unwrap();

    std::fs::create_dir(guest.manager.path("job")).unwrap();
    std::fs::write(guest.manager.path("job/program"), "#!/bin/sh\necho ran\n").unwrap();
    std::fs::set_permissions(guest.manager.path("job/program"), std::fs::Permissions::from_mode(0o755)).unwrap();
    // More than connections and pipes hold.
    std::fs::write(guest.manager.path("job/big"), vec![7; 8 << 20]).unwrap();
    let job = guest.manager.path("job").display().to_string();
    let copied = on(&["cp", "-r", &job, "alpha:head:/root"]);
    assert!(copied.status.success(), "{}", said(&copied));
    let ran = on(&["run", "alpha", "-n", "2", "--directory", "/root/job", "--", "./program"]);
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "ran\nran\n", "{}", said(&ran));
    let back = guest.manager.path("back").display().to_string();
    let copied = on(&["cp", "-r", "alpha:head:job", &back]);
    assert!(copied.status.success(), "{}", said(&copied));
    assert_eq!(std::fs::metadata(guest.manager.path("back/program")).unwrap().permissions().mode() & 0o777, 0o755);
    assert!(std::fs::read(guest.manager.path("back/big")).unwrap() == vec![7; 8 << 20]);
}
