//! A process whose standard error is stuck: nobody in it is held up, whatever way they write.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const NAME: &str = "panics_and_what_libraries_say_hold_up_nobody_and_are_written_where_that_can_be";

/// What the process does that has the log: panics, and writes to descriptor 2 as C libraries do.
fn daemon() {
    let log = violin_channel::log::start("NO_SUCH_VARIABLE", "info").unwrap();
    // Past the usual capture of tests.
    let panicked = std::thread::Builder::new().name("worker".into()).spawn(|| panic!("a worker's words"));
    assert!(panicked.unwrap().join().is_err());
    for _ in 0..300 {
        std::io::stderr().write_all(b"a library's words\n").unwrap();
        std::io::stderr().write_all(&[b'x'; 10_000]).unwrap();
    }
    log.say("last words");
}

fn start(stderr: impl Into<Stdio>) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", NAME, "--nocapture"]).env("VIOLIN_TEST_DAEMON", "1");
    child.stdout(Stdio::null()).stderr(stderr).spawn().unwrap()
}

#[test]
fn panics_and_what_libraries_say_hold_up_nobody_and_are_written_where_that_can_be() {
    if std::env::var_os("VIOLIN_TEST_DAEMON").is_some() {
        return daemon();
    }
    let (_stuck, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&[b'\n'; 1 << 16]).unwrap(); // as much as a pipe takes

    let mut child = start(writer);
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it is held up by its standard error");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(child.wait().unwrap().success());

    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut child = start(writer);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success());
    for words in ["thread 'worker' panicked at", "a worker's words\n", "a library's words\n", "last words\n"] {
        assert!(said.contains(words), "{words:?} is missing");
    }
}
