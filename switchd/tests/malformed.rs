//! Members and local askers that speak nonsense: it costs them their connection, and nobody else anything. Needs root.

mod support;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::site::{Site, VNI, host, mac};
use support::{until, vni};
use violin_channel::tls::{Credentials, Timing};
use violin_channel::{frame, local, pki, quic};
use violin_common::Epoch;
use violin_common::api::switch::{SwitchReply, SwitchRequest};
use violin_common::control::mesh::{Aead, Cipher, Hello, Member, Message, OLDEST, Offer, OwnedAt, PROTOCOL, Step};

const H1: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 71, 0, 1)), 7471);

fn hello() -> Message {
    Message::Hello(Hello {
        oldest: OLDEST,
        newest: PROTOCOL,
        features: 0,
        host: host(2),
        domain: "d1".parse().unwrap(),
        boot: 7,
        receiver: 9,
        reserved: 0,
        offer: Some(Offer {
            ciphers: Aead::ALL.map(|aead| Cipher { code: aead.code(), ns: 400 }).into(),
            queues: 1,
            plain: None,
        }),
        max_datagram: 1472,
        networks: vec![vni(VNI)],
    })
}

/// Every message there is, each with something in every field.
fn messages() -> Vec<Message> {
    let owned = OwnedAt { vni: vni(VNI), mac: mac(77), epoch: Epoch::FIRST };
    let why = || "no".to_owned();
    let steps = [
        Step::Grant { vm: "alpha-c1".parse().unwrap() },
        Step::Granted,
        Step::Release,
        Step::Released { why: why() },
        Step::Fence,
        Step::Fenced,
        Step::Claim,
        Step::Hold { lease_ms: 500 },
        Step::Unready { why: why() },
    ];
    let mut messages = vec![
        hello(),
        Message::Members(vec![Member { host: host(2), address: "10.71.0.2:7471".parse().unwrap() }]),
        Message::Networks(vec![vni(VNI)]),
        Message::Owned { all: true, macs: vec![owned] },
        Message::Disowned(owned),
        Message::Moved { owned, host: host(2) },
        Message::Learned { vni: vni(VNI), vid: 0, mac: mac(77) },
        Message::Ready,
        Message::Opened { receiver: 9, queue: 0, epoch: 3 },
        Message::Leave,
    ];
    messages.extend(steps.map(|step| Message::Move { owned, step }));
    messages
}

fn framed(body: &[u8]) -> Vec<u8> {
    [&u32::try_from(body.len()).unwrap().to_be_bytes(), body].concat()
}

/// Bytes that no message begins with.
fn junk(len: usize) -> Vec<u8> {
    (0..len).map(|i| 0xf0 | (i % 16) as u8).collect()
}

/// A member with a certificate of its own, h2, that says what it likes to h1.
struct Rogue {
    endpoint: quic::Endpoint,
}

impl Rogue {
    /// Says `bytes`, then waits until its connection is closed.
    async fn say(&self, bytes: &[u8]) {
        let (connection, _) = self.endpoint.connect(H1, None).await.expect("a member is admitted");
        let (mut out, _inn) = connection.open_bi().await.unwrap();
        // The other end may have heard enough before the end.
        let _ = out.write_all(bytes).await;
        let _ = out.finish();
        tokio::time::timeout(Duration::from_secs(60), connection.closed()).await.expect("it is closed");
    }
}

/// h1 and h3 with a guest each and a rogue at h2; afterwards h1 and h3 are as well as before and h2 is welcome again.
fn with_rogue(work: impl AsyncFnOnce(&Site, &Rogue)) {
    let mut site = Site::new(3);
    for number in [1, 3] {
        site.guest(number);
        site.start(number);
    }
    until("a datagram passes", || site.reaches(1, 3));
    let credentials = Arc::new(Credentials::load(&pki::paths(&site.directory.path().join("pki"), &host(2))).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let endpoint = site.hosts[&2].enter(|| {
        let _inside = runtime.enter();
        quic::dialler(H1, credentials, quic::alpn::MESH, Timing::BRISK).unwrap()
    });
    let rogue = Rogue { endpoint };

    runtime.block_on(work(&site, &rogue));

    assert!(site.reaches(1, 3), "frames pass no more");
    assert!(site.daemons.get_mut(&1).unwrap().0.try_wait().unwrap().is_none(), "the switch has ended");
    site.start(2);
    until("h2 is welcome when it speaks properly", || (1..=3).all(|number| site.connected(number) == 2));
}

#[test]
#[ignore = "needs root"]
fn junk_of_every_length_costs_a_member_its_connection_only() {
    with_rogue(async |site, rogue| {
        let began = Instant::now();
        let lengths: Vec<usize> = (0..=300).chain([1000, 4095, 4096, 65_535, 65_536, frame::MAX]).collect();
        for &len in &lengths {
            rogue.say(&framed(&junk(len))).await;
            assert!(site.ask(1, SwitchRequest::Status).is_ok(), "no answer after {len} bytes");
        }
        for len in [frame::MAX + 1, u32::MAX as usize] {
            rogue.say(&u32::try_from(len).unwrap().to_be_bytes()).await;
        }
        println!("{} connections in {:?}", lengths.len() + 2, began.elapsed());
        assert_eq!(site.counter(1, "control.malformed"), lengths.len() as u64 + 2);
    });
}

#[test]
#[ignore = "needs root"]
fn messages_cut_at_every_length_cost_a_member_its_connection_only() {
    with_rogue(async |site, rogue| {
        let began = Instant::now();
        let greeting = frame::encode(&hello()).unwrap();
        let (mut said, mut contradicts) = (0, 0);
        // A HELLO that ends before its offer is one of version 1, and here a second HELLO.
        let Message::Hello(first) = hello() else { unreachable!() };
        let version_1 = frame::encode(&Message::Hello(Hello { offer: None, ..first })).unwrap().len() - 1;
        for message in messages() {
            let whole = frame::encode(&message).unwrap();
            for len in 4..whole.len() {
                // As if it were all, behind a greeting; and with the stream's end in its midst.
                rogue.say(&[&greeting[..], &framed(&whole[4..len])].concat()).await;
                let is_second = matches!(message, Message::Hello(_)) && len >= version_1;
                *if is_second { &mut contradicts } else { &mut said } += 1;
                if len % 8 == 0 {
                    rogue.say(&whole[..len]).await;
                    said += 1;
                }
            }
            assert!(site.ask(1, SwitchRequest::Status).is_ok(), "no answer after parts of {message:?}");
        }
        for len in 1..4 {
            rogue.say(&greeting[..len]).await;
            said += 1;
        }
        println!("{said} connections in {:?}", began.elapsed());
        assert_eq!(site.counter(1, "control.malformed"), said);
        assert_eq!(site.counter(1, "control.protocol-errors"), contradicts);
    });
}

#[test]
#[ignore = "needs root"]
fn bytes_behind_a_message_are_a_newer_versions_and_bytes_behind_its_frame_cost_the_connection() {
    with_rogue(async |site, rogue| {
        let mut longer = postcard::to_stdvec(&hello()).unwrap();
        longer.extend(junk(200));
        for len in [1, 3, 4, 5, 300] {
            rogue.say(&[framed(&longer), junk(len)].concat()).await;
        }
        assert_eq!(site.counter(1, "control.malformed"), 5, "what follows the frame is not a length that can be");
        until("the greeting with an appendix was taken", || site.peers(1).iter().any(|peer| peer.host == Some(host(2))));

        let messages = messages();
        for message in &messages[1..] {
            rogue.say(&frame::encode(message).unwrap()).await;
        }
        // The connection may be closed for its stream's end before the message is looked at.
        let refused = |count: usize| site.counter(1, "control.protocol-errors") == count as u64;
        until("nothing is heard before a greeting", || refused(messages.len() - 1));
        rogue.say(&frame::encode(&hello()).unwrap().repeat(2)).await;
        until("nor two greetings", || refused(messages.len()));
    });
}

/// Says `bytes` to the local socket and no more; what came back until it was closed.
fn say(site: &Site, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(site.socket(1)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The other end may have heard enough before the end.
    let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => answer,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => answer,
        Err(error) => panic!("{error} after {} bytes", bytes.len()),
    }
}

#[test]
#[ignore = "needs root"]
fn lines_that_are_no_request_are_answered_in_words_or_hung_up_on() {
    let mut site = Site::new(1);
    site.start(1);
    let request = serde_json::to_vec(&SwitchRequest::NetworkRemove { vni: vni(9) }).unwrap();
    let refused = |line: &[u8]| {
        let answer = String::from_utf8(say(&site, line)).unwrap();
        let shown = String::from_utf8_lossy(&line[..line.len().min(60)]);
        assert!(answer.contains("could not read the request"), "{shown:?}, {} bytes: answered {answer:?}", line.len());
        assert_eq!(answer.lines().count(), 1);
    };

    for len in 1..request.len() {
        // Unfinished, and finished too early.
        refused(&request[..len]);
        refused(&[&request[..len], b"\n"].concat());
    }
    for byte in (0..=u8::MAX).filter(|byte| !byte.is_ascii_whitespace()) {
        refused(&[byte]);
        refused(&[byte, 0xff, byte, b'\n']);
    }
    for len in [300, 1000, 4095, 4096, 65_535, 65_536, local::MAX_LINE as usize - 1] {
        refused(&[&vec![b'x'; len][..], b"\n"].concat());
    }
    let deep = |open: &str| open.repeat(10_000).into_bytes();
    refused(&deep("["));
    refused(&deep("{\"port-add\":"));
    refused(&[b"{\"port-add\":{\"vni\":5,\"kind\":".to_vec(), deep("["), deep("]"), b"}}\n".to_vec()].concat());
    let appendix =
        [b"{\"network-remove\":{\"vni\":9,\"newer\":".to_vec(), deep("{\"a\":"), b"1".to_vec(), deep("}"), b"}}\n".to_vec()];
    assert_eq!(say(&site, &appendix.concat()), b"{\"ok\":\"done\"}\n", "keys of a newer version are passed over, however deep");
    for line in
        ["{}", "[]", "null", "1e999", "\"no-such-request\"", "{\"network-remove\":{\"vni\":16777216}}", "{\"network-remove\":{}}"]
    {
        refused(line.as_bytes());
    }
    assert_eq!(say(&site, &vec![b'x'; local::MAX_LINE as usize + 100_000]), b"", "a line without end is not waited for");
    assert_eq!(say(&site, b" \n\r\n\t\n"), b"", "blank lines ask nothing");

    assert!(site.ask(1, SwitchRequest::Status).is_ok());
    assert!(site.daemons.get_mut(&1).unwrap().0.try_wait().unwrap().is_none(), "the switch has ended");
}

#[test]
#[ignore = "needs root"]
fn an_asker_may_go_on_after_nonsense_and_an_unfinished_line_holds_up_nobody() {
    let mut site = Site::new(1);
    site.start(1);
    let mut unfinished = UnixStream::connect(site.socket(1)).unwrap();
    unfinished.write_all(b"{\"network-rem").unwrap();

    let stream = UnixStream::connect(site.socket(1)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let (mut asking, mut answers) = (stream.try_clone().unwrap(), BufReader::new(stream));
    let mut ask = |line: &[u8]| {
        asking.write_all(line).unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        answer
    };
    for _ in 0..100 {
        assert!(ask(b"nonsense\n").contains("could not read the request"));
        assert!(ask(b"\"status\"\n").contains("uptime"));
    }

    unfinished.write_all(b"ove\":{\"vni\":9}}\n").unwrap();
    let mut answer = String::new();
    BufReader::new(unfinished).read_line(&mut answer).unwrap();
    assert!(answer.contains("ok"), "{answer}");
    assert!(matches!(site.ask(1, SwitchRequest::Status), Ok(SwitchReply::Status(_))));
}
