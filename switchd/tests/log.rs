//! A switch whose log goes nowhere: it works on, and says what of its log was lost. Needs root.

mod support;

use nix::sys::signal::Signal;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc;
use std::time::Duration;
use support::site::Site;
use support::{run, try_run, until};
use violin_channel::local::blocking;
use violin_common::api::switch::{SwitchReply, SwitchRequest};

const NETWORK: &str = "[[network]]\nvni = 5\n";
const LOST: &str = "log.lines-lost";

/// Whether the switch answers in good time: one that hangs would hold up the test for ever.
fn answers(site: &Site, number: usize) -> bool {
    let (socket, (tell, told)) = (site.socket(number), mpsc::channel());
    std::thread::spawn(move || tell.send(blocking::ask::<_, SwitchReply>(&socket, &SwitchRequest::Status).is_ok()));
    told.recv_timeout(Duration::from_secs(120)) == Ok(true)
}

/// How many lines the log says were lost.
fn said_lost(line: &str) -> u64 {
    let Some((before, _)) = line.split_once(" log lines were lost") else { return 0 };
    before.rsplit(' ').next().and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Sends what the switch has something to say about at level `trace`.
fn flood(site: &Site, from: usize, to: usize) {
    site.hosts[&from].enter(|| {
        let socket = std::net::UdpSocket::bind(format!("10.71.0.{from}:0")).unwrap();
        for number in 0..2000_u32 {
            let mut datagram = [0x40_u8; 100];
            datagram[1..5].copy_from_slice(&number.to_be_bytes());
            socket.send_to(&datagram, format!("10.71.0.{to}:7471")).unwrap();
        }
    });
}

#[test]
#[ignore = "needs root"]
fn a_log_nobody_reads_holds_up_no_switch_and_its_loss_is_said() {
    let mut site = Site::new(2);
    let (reader, writer) = std::io::pipe().unwrap();
    site.launch(1, "pki", NETWORK, "trace", writer.into());
    until("the first switch answers", || site.socket(1).exists() && answers(&site, 1));
    site.start(2);
    until("they are connected", || site.connected(2) == 1);

    for _ in 0..50 {
        flood(&site, 2, 1);
        assert!(answers(&site, 1), "the log's reader hangs, and so does the switch");
    }
    until("lines are lost, and counted", || site.counter(1, LOST) > 0);

    // Longer than peers wait for each other's signs of life.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!((site.connected(1), site.connected(2)), (1, 1));

    // The reader is back: what was lost is said, as much as was counted.
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        BufReader::new(reader).lines().map_while(Result::ok).map(|line| said_lost(&line)).try_for_each(|lost| tell.send(lost))
    });
    let mut said = 0;
    until("all that was lost is said", || {
        said += told.try_iter().sum::<u64>();
        said > 0 && said == site.counter(1, LOST)
    });
}

#[test]
#[ignore = "needs root"]
fn a_log_on_a_full_disk_or_without_a_reader_ends_no_switch() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    for log in [File::options().write(true).open("/dev/full").unwrap().into(), writer.into()] {
        let mut site = Site::new(2);
        site.launch(1, "pki", NETWORK, "info", log);
        until("the switch answers", || site.socket(1).exists() && answers(&site, 1));

        site.daemons[&1].signal(Signal::SIGHUP);
        site.start(2);
        until("they are connected", || site.connected(1) == 1);
        until("its lines are counted as lost", || site.counter(1, LOST) >= 2);

        site.daemons[&1].signal(Signal::SIGTERM);
        until("it ends", || site.daemons.get_mut(&1).unwrap().0.try_wait().unwrap().is_some());
        assert!(site.daemons.get_mut(&1).unwrap().0.wait().unwrap().success(), "its end is a clean one");
    }
}

#[test]
#[ignore = "needs root"]
fn a_disk_that_has_room_again_gets_the_log_and_the_count_of_what_it_misses() {
    let mut site = Site::new(1);
    let disk = site.directory.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let _mounted = Mounted::tmpfs(&disk);
    let log = File::options().create(true).append(true).open(disk.join("log")).unwrap();
    assert!(std::fs::write(disk.join("fill"), vec![0; 1 << 20]).is_err(), "the disk is full");
    site.launch(1, "pki", NETWORK, "info", log.into());
    until("the switch answers", || site.socket(1).exists() && answers(&site, 1));
    until("its lines are counted as lost", || site.counter(1, LOST) > 0);

    std::fs::remove_file(disk.join("fill")).unwrap();

    let text = || {
        let mut text = String::new();
        File::open(disk.join("log")).unwrap().read_to_string(&mut text).unwrap();
        text
    };
    until("the loss is said", || text().lines().map(said_lost).sum::<u64>() == site.counter(1, LOST));
    site.daemons[&1].signal(Signal::SIGTERM);
    until("its last words are there", || text().contains("draining"));
}

/// A file system of 64 KiB, unmounted with the value.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(path: &std::path::Path) -> Self {
        run(&format!("mount -t tmpfs -o size=64k none {}", path.display()));
        Self(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = try_run(&format!("umount --lazy {}", self.0.display()));
    }
}

/// The switch cannot start: why is said, also where the log's reader hangs the end is not held up.
#[test]
#[ignore = "needs root"]
fn the_reason_of_a_failing_end_is_written_and_a_stuck_log_does_not_hold_up_the_end() {
    let mut site = Site::new(1);
    let broken = "[[network]]\nvni = 0\n";

    let (mut reader, writer) = std::io::pipe().unwrap();
    site.launch(1, "pki", broken, "info", writer.into());
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    let status = site.daemons.get_mut(&1).unwrap().0.wait().unwrap();
    assert!(status.code() == Some(1) && said.contains("switchd: ") && said.contains("vni"), "{status}: {said}");

    let (_reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, &[b'\n'; 1 << 16]).unwrap(); // as much as a pipe takes
    site.launch(1, "pki", broken, "info", writer.into());
    until("it ends all the same", || site.daemons.get_mut(&1).unwrap().0.try_wait().unwrap().is_some());
    assert_eq!(site.daemons.get_mut(&1).unwrap().0.wait().unwrap().code(), Some(1));
}
