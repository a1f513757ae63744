//! `violin pki`: what is signed in a folder is accepted under that folder's authority, or not signed.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use violin_channel::pki::{paths, write_pki};
use violin_channel::quic;
use violin_channel::tls::{Credentials, Timing};

fn host(dir: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_violin"));
    command.args(["pki", "host"]).arg(dir).args(["h1", "--domain", "d1"]).output().unwrap()
}

#[tokio::test]
async fn a_host_is_signed_in_the_name_of_the_folders_authority() {
    let dir = tempfile::tempdir().unwrap();
    write_pki(dir.path(), "somebody else", &[]).unwrap();

    let output = host(dir.path());

    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let files = paths(dir.path(), &"h1".parse().unwrap());
    let credentials = Arc::new(Credentials::load(&files).unwrap());
    let any = "127.0.0.1:0".parse().unwrap();
    let listening = quic::listen(any, Arc::clone(&credentials), quic::alpn::MONITOR, Timing::CALM).unwrap();
    let address = listening.local_addr().unwrap();
    let admitting = tokio::spawn(async move { quic::admit(listening.accept().await.unwrap()).await });
    let calling = quic::dialler(address, credentials, quic::alpn::MONITOR, Timing::CALM).unwrap();
    let (_connection, identity) = calling.connect(address, None).await.unwrap();
    assert_eq!(identity.host.as_str(), "h1");
    assert!(admitting.await.unwrap().is_ok());
}

#[test]
fn nothing_is_signed_with_the_key_of_another_authority() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_pki(dir.path(), "violin", &[]).unwrap();
    write_pki(other.path(), "violin", &[]).unwrap();
    std::fs::copy(other.path().join("ca.key"), dir.path().join("ca.key")).unwrap();

    let output = host(dir.path());

    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("ca.key") && said.contains("the certificate of one and the key of another"), "{said}");
    assert!(!paths(dir.path(), &"h1".parse().unwrap()).cert.exists());
}

/// As on a full disk: no file takes a byte.
#[test]
fn what_cannot_be_written_leaves_nothing_in_the_way_of_the_next_call() {
    let dir = tempfile::tempdir().unwrap();
    write_pki(dir.path(), "violin", &[]).unwrap();
    let script = format!(
        "trap '' XFSZ; ulimit -f 0; exec {} pki host {} h1 --domain d1",
        env!("CARGO_BIN_EXE_violin"),
        dir.path().display()
    );

    let output = Command::new("sh").args(["-c", &script]).output().unwrap();

    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("cannot make"), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "the authority alone");
    assert!(host(dir.path()).status.success());
    let again = host(dir.path());
    assert!(String::from_utf8_lossy(&again.stderr).contains("an existing file is not replaced"));
    // One of the two is enough to refuse, and the other is not made.
    let files = paths(dir.path(), &"h1".parse().unwrap());
    std::fs::remove_file(&files.cert).unwrap();
    assert!(!host(dir.path()).status.success() && !files.cert.exists());
}
