//! Two endpoints on loopback with certificates made here.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use violin_channel::tls::{Credentials, Timing};
use violin_channel::{frame, local, quic};
use violin_common::HostId;
use violin_common::api::Response;
use violin_common::config::Tls;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "authority of a test");
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn credentials(directory: &Path, authority: &Authority, host: &str, unit: &str, dns: &str) -> Tls {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![dns.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, host);
    params.distinguished_name.push(DnType::OrganizationalUnitName, unit);
    let certificate = params.signed_by(&key, authority).unwrap();
    let tls = Tls {
        ca: directory.join(format!("{host}-ca.pem")),
        cert: directory.join(format!("{host}.pem")),
        key: directory.join(format!("{host}.key")),
    };
    std::fs::write(&tls.ca, authority.pem()).unwrap();
    std::fs::write(&tls.cert, certificate.pem()).unwrap();
    std::fs::write(&tls.key, key.serialize_pem()).unwrap();
    tls
}

fn load(tls: &Tls) -> Arc<Credentials> {
    Arc::new(Credentials::load(tls).unwrap())
}

fn listen(credentials: Arc<Credentials>) -> quic::Endpoint {
    quic::listen("127.0.0.1:0".parse().unwrap(), credentials, quic::alpn::MESH, Timing::BRISK).unwrap()
}

#[tokio::test]
async fn both_ends_know_each_other_and_messages_arrive_whole() {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority();
    let server = listen(load(&credentials(directory.path(), &authority, "h1", "d1", "h1")));
    let client = listen(load(&credentials(directory.path(), &authority, "h2", "d2", "h2")));
    let address = server.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (connection, who) = quic::admit(server.accept().await.unwrap()).await.unwrap();
        let (mut out, mut inn) = connection.accept_bi().await.unwrap();
        while let Some(text) = frame::recv::<String>(&mut inn).await.unwrap() {
            frame::send(&mut out, &text).await.unwrap();
        }
        out.finish().unwrap();
        let _ = out.stopped().await;
        who
    });

    let (connection, who) = client.connect(address, Some(&"h1".parse().unwrap())).await.unwrap();
    let (mut out, mut inn) = connection.open_bi().await.unwrap();
    for text in ["", "x", &"long".repeat(100_000)] {
        frame::send(&mut out, text).await.unwrap();
        assert_eq!(frame::recv::<String>(&mut inn).await.unwrap().as_deref(), Some(text));
    }
    out.finish().unwrap();
    assert!(frame::recv::<String>(&mut inn).await.unwrap().is_none());

    assert_eq!((who.host.as_str(), who.domain.as_str()), ("h1", "d1"));
    let who = serving.await.unwrap();
    assert_eq!((who.host.as_str(), who.domain.as_str()), ("h2", "d2"));
}

#[tokio::test]
async fn a_port_on_all_addresses_answers_from_the_one_it_was_called_at() {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority();
    let [server, client] = ["h1", "h2"].map(|host| load(&credentials(directory.path(), &authority, host, "d1", host)));
    for (any, called) in [("0.0.0.0:0", "127.0.0.2"), ("[::]:0", "127.0.0.2"), ("[::]:0", "::1")] {
        let listening = quic::listen(any.parse().unwrap(), Arc::clone(&server), quic::alpn::MESH, Timing::BRISK).unwrap();
        let called: std::net::IpAddr = called.parse().unwrap();
        let address = (called, listening.local_addr().unwrap().port()).into();
        let serving = tokio::spawn(async move { quic::admit(listening.accept().await.unwrap()).await });
        let calling = quic::dialler(address, Arc::clone(&client), quic::alpn::MESH, Timing::BRISK).unwrap();

        let connected = calling.connect(address, None).await;

        assert!(connected.is_ok(), "{any} called at {called}: {connected:?}");
        let (connection, _) = serving.await.unwrap().unwrap();
        assert_eq!(connection.local_ip().map(|ip| ip.to_canonical()), Some(called));
    }
}

#[tokio::test]
async fn a_peer_that_nobody_reads_can_leave_only_so_much_here() {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority();
    let server = listen(load(&credentials(directory.path(), &authority, "h1", "d1", "h1")));
    let client = listen(load(&credentials(directory.path(), &authority, "h2", "d1", "h2")));
    let address = server.local_addr().unwrap();
    let serving = tokio::spawn(async move { quic::admit(server.accept().await.unwrap()).await.unwrap() });
    let (connection, _) = client.connect(address, None).await.unwrap();
    let _unread = serving.await.unwrap();
    let patience = Duration::from_millis(500);

    let (mut streams, mut sent) = (Vec::new(), 0);
    while let Ok(stream) = tokio::time::timeout(patience, connection.open_bi()).await {
        let (mut out, inn) = stream.unwrap();
        while let Ok(written) = tokio::time::timeout(patience, out.write(&[7; 65_536])).await {
            sent += written.unwrap();
            assert!(sent < 64 << 20, "no bound");
        }
        streams.push((out, inn));
    }

    assert!(streams.len() <= 4 && sent <= (4 << 20), "{} streams, {sent} bytes", streams.len());
}

#[tokio::test]
async fn another_host_than_the_expected_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority();
    let server = listen(load(&credentials(directory.path(), &authority, "h1", "d1", "h1")));
    let client = listen(load(&credentials(directory.path(), &authority, "h2", "d1", "h2")));
    let address = server.local_addr().unwrap();
    tokio::spawn(async move { quic::admit(server.accept().await.unwrap()).await });

    let wanted: HostId = "h3".parse().unwrap();
    let error = client.connect(address, Some(&wanted)).await.unwrap_err().to_string();

    assert!(error.contains("got host h1, want h3"), "{error}");
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_by_both_ends() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = (authority(), authority());
    let trusted = load(&credentials(directory.path(), &ours, "h1", "d1", "h1"));
    let mut foreign = credentials(directory.path(), &theirs, "h2", "d1", "h2");
    let caller_refused = {
        let server = listen(Arc::clone(&trusted));
        // It trusts the right authority, too, and is signed by the wrong one: only the server can refuse it.
        foreign.ca = directory.path().join("both.pem");
        std::fs::write(&foreign.ca, [ours.pem(), theirs.pem()].concat()).unwrap();
        let client = listen(load(&foreign));
        let address = server.local_addr().unwrap();
        let serving = tokio::spawn(async move { quic::admit(server.accept().await.unwrap()).await.map(drop) });
        let connected = client.connect(address, None).await;
        let refused = serving.await.unwrap();
        drop(connected);
        refused
    };
    assert!(caller_refused.is_err());

    let server = listen(load(&foreign));
    let client = listen(trusted);
    let address = server.local_addr().unwrap();
    tokio::spawn(async move { quic::admit(server.accept().await.unwrap()).await });
    assert!(client.connect(address, None).await.is_err());
}

#[test]
fn a_certificate_that_is_valid_at_another_time_is_told_from_a_good_one() {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority();
    let tls = credentials(directory.path(), &authority, "h1", "d1", "h1");
    let key = KeyPair::from_pem(&std::fs::read_to_string(&tls.key).unwrap()).unwrap();
    let mut params = CertificateParams::new(vec!["h1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "h1");
    params.distinguished_name.push(DnType::OrganizationalUnitName, "d1");
    (params.not_before, params.not_after) = (rcgen::date_time_ymd(2001, 1, 1), rcgen::date_time_ymd(2001, 1, 31));
    std::fs::write(&tls.cert, params.signed_by(&key, &authority).unwrap().pem()).unwrap();

    let credentials = Credentials::load(&tls).unwrap();

    let error = credentials.must_be_valid(std::time::SystemTime::now()).unwrap_err().to_string();
    assert!(error.contains("valid from Jan  1 00:00:00 2001") && error.contains("to Jan 31"), "{error}");
    let then = std::time::UNIX_EPOCH + Duration::from_secs(979_000_000);
    assert!(credentials.must_be_valid(then).is_ok());
}

#[test]
fn a_certificate_without_the_hosts_dns_name_is_no_identity() {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority();

    let error = Credentials::load(&credentials(directory.path(), &authority, "h1", "d1", "h2")).unwrap_err();

    assert!(error.to_string().contains("without DNS name \"h1\""), "{error}");
}

#[derive(Debug, Serialize, Deserialize)]
enum Question {
    Double(u32),
    Count(u32),
    Forever,
}

async fn answer(question: Question, sink: local::Sink<u32>, gone: tokio::sync::mpsc::Sender<()>) {
    match question {
        Question::Double(number) => drop(sink.finish(Ok(number * 2)).await),
        Question::Count(to) => {
            for number in 0..to {
                if sink.send(Response::Ok(number)).await.is_err() {
                    return;
                }
            }
            let _ = sink.finish(Err("that is all".into())).await;
        }
        Question::Forever => {
            let _ = sink.send(Response::Ok(0)).await;
            sink.closed().await;
            let _ = gone.send(()).await;
        }
    }
}

#[tokio::test]
async fn a_local_socket_answers_once_or_many_times_and_notices_who_hangs_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made").join("switchd.sock");
    let (gone, mut hung_up) = tokio::sync::mpsc::channel(1);
    let listener = local::bind(&path).unwrap();
    assert!(local::bind(&path).is_err(), "a second daemon took the socket over");
    let serving = tokio::spawn(local::serve(listener, move |question, sink| answer(question, sink, gone.clone())));

    assert_eq!(local::ask::<_, u32>(&path, &Question::Double(21)).await, Ok(42));
    let (again, from) = (path.clone(), path.clone());
    let blocking = move || local::blocking::ask::<_, u32>(&again, &Question::Double(4));
    assert_eq!(tokio::task::spawn_blocking(blocking).await.unwrap(), Ok(8));
    let blocking = move || local::blocking::stream::<_, u32>(&from, &Question::Count(3)).unwrap().take(4).collect::<Vec<_>>();
    let counted = tokio::task::spawn_blocking(blocking).await.unwrap();
    assert_eq!(counted, [Ok(0), Ok(1), Ok(2), Err("that is all".into())]);
    let unreadable = local::ask::<_, u32>(&path, &"nonsense").await.unwrap_err();
    assert!(unreadable.contains("could not read the request"), "{unreadable}");
    let mut watch = local::watch::<_, u32>(&path, &Question::Forever).await.unwrap();
    assert_eq!(watch.next().await, Some(Ok(0)));
    drop(watch);
    tokio::time::timeout(Duration::from_secs(120), hung_up.recv()).await.expect("the handler never learned of it");

    serving.abort();
    let _ = serving.await;
    let error = local::ask::<_, u32>(&path, &Question::Double(1)).await.unwrap_err();
    assert!(error.contains("cannot reach switchd at") && error.contains("is it running?"), "{error}");
    // As a killed daemon leaves it.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(local::bind(&path).is_ok(), "a stale socket was in the way");

    // What is no socket is somebody's.
    for name in ["file", "folder", "link"] {
        let path = directory.path().join(name);
        match name {
            "file" => std::fs::write(&path, "precious").unwrap(),
            "folder" => std::fs::create_dir(&path).unwrap(),
            _ => std::os::unix::fs::symlink(directory.path().join("file"), &path).unwrap(),
        }
        let error = local::bind(&path).unwrap_err().to_string();
        assert!(error.contains("is there and is no socket"), "{name}: {error}");
    }
    assert_eq!(std::fs::read_to_string(directory.path().join("file")).unwrap(), "precious");
}

#[tokio::test]
async fn an_idle_asker_gives_way_to_another_and_is_told_so_while_those_at_work_stay() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("switchd.sock");
    let (gone, _hung_up) = tokio::sync::mpsc::channel(1);
    let listener = local::bind(&path).unwrap();
    tokio::spawn(local::serve(listener, move |question, sink| answer(question, sink, gone.clone())));
    let mut watch = local::watch::<_, u32>(&path, &Question::Forever).await.unwrap();
    assert_eq!(watch.next().await, Some(Ok(0)));
    let mut idle = Vec::new();
    for _ in 0..local::ASKERS {
        idle.push(tokio::net::UnixStream::connect(&path).await.unwrap());
    }

    assert_eq!(local::ask::<_, u32>(&path, &Question::Double(21)).await, Ok(42));

    let mut told = String::new();
    BufReader::new(&mut idle[0]).read_line(&mut told).await.unwrap();
    assert!(told.contains("closed to make room for others"), "{told}");
    assert!(tokio::time::timeout(Duration::from_millis(100), watch.next()).await.is_err(), "who was at work was closed");

    // All at work: one more is told so at once.
    drop(idle);
    let mut watches = Vec::new();
    while watches.len() < local::ASKERS - 1 {
        let mut watch = local::watch::<_, u32>(&path, &Question::Forever).await.unwrap();
        // Places of those that have hung up come back one by one.
        match watch.next().await {
            Some(Ok(0)) => watches.push(watch),
            other => assert!(matches!(&other, Some(Err(words)) if words.contains("one more asker")), "{other:?}"),
        }
    }
    let full = local::ask::<_, u32>(&path, &Question::Double(21)).await.unwrap_err();
    assert!(full.contains("got one more asker than 256"), "{full}");
}
