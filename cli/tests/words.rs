//! What the command says and how it ends when it cannot do what it is asked.

use std::process::{Command, Output, Stdio};

fn violin(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_violin"));
    command.args(words).env_remove("VIOLIN_LAB").env_remove("VIOLIN_SOCKET");
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_is_asked_for_in_vain_is_told_in_words() {
    for (words, wanted) in [
        (&["--socket", "/nowhere/adaptd.sock", "host"][..], "cannot reach adaptd at /nowhere/adaptd.sock: is it running?"),
        (&["--lab", "nowhere", "host"], "got lab nowhere, but there is none of that name; `violin lab list` lists labs"),
        (&["--switch-socket", "/nowhere", "vm", "list"], "got --switch-socket, but this command asks the manager"),
        (&["--switch-socket", "/nowhere", "port"], "the switch: cannot reach nowhere at /nowhere: is it running?"),
        (&["--switch-socket", "/nowhere", "port", "--host", "h1"], "got --host h1 and --switch-socket, want one of them"),
        (&["env", "up", "/nowhere.toml"], "cannot read /nowhere.toml"),
        (&["cp", "here", "there"], "want paths here and ENV:NODE:PATH"),
    ] {
        let output = violin(words).output().unwrap();

        assert_eq!(output.status.code(), Some(1), "{words:?}: {}", said(&output));
        assert!(said(&output).contains(wanted), "{words:?}: {}", said(&output));
    }
}

#[test]
fn a_command_line_that_is_not_understood_ends_with_2() {
    let output = violin(&["mode", "sometimes"]).output().unwrap();

    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("act, dry-run, observe"), "{}", said(&output));
}

#[test]
fn nobody_reading_is_no_panic() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);

    let output = violin(&["lab", "list"]).stdout(writer).stderr(Stdio::piped()).output().unwrap();

    assert_eq!(output.status.code(), Some(141), "{}", said(&output));
    assert_eq!(said(&output), "");
}
