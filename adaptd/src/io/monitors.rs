//! The monitors' connections: reports in, commands out.

use crate::act::AskError;
use crate::clocks::Reading;
use crate::io::world::{KnownHost, Shared};
use crate::io::{clock, reconcile, strays};
use anyhow::{Context, bail};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use violin_channel::quic::{self, Endpoint};
use violin_channel::seldom::Seldom;
use violin_channel::{frame, tls};
use violin_common::HostId;
use violin_common::api::adapt::Event;
use violin_common::control::monitor::{Answer, Command, Hello, PROTOCOL, Report, VmState};

/// Longest wait for a monitor's first message.
const HELLO: Duration = Duration::from_secs(10);
/// When a monitor is asked whether it lives, after what it said before has come; and how long that may take.
const POKE: Duration = Duration::from_millis(150);
const ANSWER: Duration = Duration::from_secs(2);
/// How often a host's clock is read at its HELLO, of which the quickest answer counts, and how long after that again.
const READINGS: u32 = 4;
const READ_CLOCK: Duration = Duration::from_secs(60);

/// Takes callers for ever.
pub async fn serve(shared: Arc<Shared>, endpoint: Endpoint) {
    let seldom = Arc::new(Seldom::default());
    let admitted = move |connection: quinn::Connection, identity| {
        let (shared, seldom) = (Arc::clone(&shared), Arc::clone(&seldom));
        async move {
            let address = connection.remote_address();
            if let Err(error) = listen_to(&shared, connection.clone(), identity).await {
                let words = format!("{error:#}");
                // It calls again and again.
                if let Some(before) = seldom.due(std::time::Instant::now(), &format!("{} {words}", address.ip())) {
                    tracing::warn!(%address, unsaid_before = before, "monitor refused: {words}");
                }
                quic::refuse(&connection, &words);
            }
        }
    };
    endpoint.serve(|| (), admitted).await;
}

async fn listen_to(shared: &Arc<Shared>, connection: quinn::Connection, identity: tls::Identity) -> anyhow::Result<()> {
    let reports = async {
        // A stream that only the monitor writes to, of either kind.
        tokio::select! {
            stream = connection.accept_uni() => Ok::<_, anyhow::Error>((None, stream?)),
            stream = connection.accept_bi() => stream.map(|(send, recv)| (Some(send), recv)).map_err(Into::into),
        }
    };
    let (_unused, mut reports) = tokio::time::timeout(HELLO, reports).await.context("no stream of reports within 10 s")??;
    let first = tokio::time::timeout(HELLO, frame::recv::<Report>(&mut reports)).await.context("no HELLO within 10 s")??;
    let Some(Report::Hello(hello)) = first else { bail!("got {first:?}, want HELLO first") };
    check(&hello, &identity)?;
    first_of_its_name(shared, &hello.host, connection.remote_address()).await?;
    let host = hello.host.clone();
    let id = connection.stable_id();
    greet(shared, hello, connection.clone());
    tokio::spawn(reconcile::host(Arc::clone(shared), host.clone()));
    let keeping = tokio::spawn(keep_clock(Arc::clone(shared), host.clone()));
    let ended = loop {
        match frame::recv::<Report>(&mut reports).await {
            Ok(Some(report)) => take(shared, &host, report),
            Ok(None) => break "it ended its reports".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    keeping.abort();
    let mut world = shared.world();
    // A monitor that came back over a new connection is not gone because its old one is.
    if let Some(known) = world.hosts.get_mut(&host)
        && known.connection.as_ref().is_some_and(|current| current.stable_id() == id)
    {
        known.connection = None;
        drop(world);
        tracing::warn!(%host, "monitor gone: {ended}");
        shared.tell(Event::Host { host, connected: false });
        shared.changed();
    }
    connection.close(quinn::VarInt::from_u32(0), b"no more reports");
    Ok(())
}

/// Refuses a second monitor of a host whose first one answers. A monitor that started anew finds that its former connection is
/// dead, whether or not that has been noticed yet.
async fn first_of_its_name(shared: &Shared, host: &HostId, address: SocketAddr) -> anyhow::Result<()> {
    let Some(standing) = shared.world().connection(host) else { return Ok(()) };
    let poke = async {
        tokio::time::sleep(POKE).await;
        // A question without words: no monitor answers it, each one's QUIC acknowledges it.
        if let Ok((mut question, _)) = standing.open_bi().await {
            let _ = question.finish();
            let _ = question.stopped().await;
        }
        std::future::pending::<bool>().await
    };
    let answers = tokio::select! {
        answers = quic::answers(&standing) => answers,
        never = poke => never,
        () = tokio::time::sleep(ANSWER) => false,
    };
    if !answers {
        return Ok(());
    }
    let stays = standing.remote_address();
    shared.world().second_monitor(clock::now(), host, address);
    bail!(
        "two monitors use the certificate of {host}: the one at {} stays, the one at {} is refused; want a certificate of its own on \
         each host (`violin pki host`)",
        stays.ip(),
        address.ip()
    )
}

fn check(hello: &Hello, identity: &tls::Identity) -> anyhow::Result<()> {
    if hello.protocol != PROTOCOL {
        bail!("got protocol {} of {}, want {PROTOCOL}; run the same version on both", hello.protocol, hello.host);
    }
    if hello.host != identity.host || hello.domain != identity.domain {
        bail!("got HELLO of {} in {}, want {identity} as its certificate says", hello.host, hello.domain);
    }
    if !(hello.cores > 0.0 && hello.cores <= 4096.0) {
        bail!("got {} cores of {}, want more than 0, at most 4096", hello.cores, hello.host);
    }
    Ok(())
}

fn greet(shared: &Shared, hello: Hello, connection: quinn::Connection) {
    let host = hello.host.clone();
    tracing::info!(%host, domain = %hello.domain, driver = %hello.driver, cores = hello.cores, "monitor connected");
    let mut world = shared.world();
    let before = world.hosts.insert(
        host.clone(),
        KnownHost { hello, connection: Some(connection), compared: clock::now(), listed: false, unlisted: false },
    );
    drop(world);
    if let Some(old) = before.and_then(|before| before.connection) {
        old.close(quinn::VarInt::from_u32(0), b"replaced by a newer connection");
    }
    shared.tell(Event::Host { host, connected: true });
    shared.changed();
}

/// Takes in one report.
fn take(shared: &Arc<Shared>, host: &HostId, report: Report) {
    let mut world = shared.world();
    let mut news = false;
    let mut see = |world: &mut crate::io::world::World, vm: &violin_common::VmId, state: VmState| {
        // Of a VM in motion both ends tell; the one it runs at is believed, and an end it has left says nothing of it.
        let here = world.state.vms.get(vm).is_some_and(|known| known.host == *host);
        let comes = world.state.moving_to(vm) == Some(host) && state == VmState::Running;
        if (here || comes) && !world.starting.contains(vm) && world.seen.get(vm) != Some(&(host.clone(), state)) {
            world.seen.insert(vm.clone(), (host.clone(), state));
            news = true;
        }
    };
    match report {
        Report::Hello(_) => tracing::warn!(%host, "a second HELLO: ignored"),
        Report::Vm(seen) => see(&mut world, &seen.vm, seen.state),
        Report::Observation(mut observation) => {
            for sample in &observation.vms {
                see(&mut world, &sample.vm, sample.state);
            }
            let stray = observation.vms.iter().any(|sample| reconcile::is_stray(&world, host, &sample.vm, sample.state));
            let unknown = strays::differ(&world, host, observation.vms.iter().map(|sample| &sample.vm));
            let unlisted = world.hosts.get(host).is_some_and(|known| !known.listed);
            if (stray || unknown || unlisted || reconcile::is_owed(&world, host))
                && reconcile::is_due(&mut world, host, clock::now())
            {
                tokio::spawn(reconcile::host(Arc::clone(shared), host.clone()));
            }
            for missing in &observation.missing {
                tracing::debug!(%host, "not observed: {missing}");
            }
            world.twice.retain(|vm, second| second != host || observation.vms.iter().any(|sample| sample.vm == *vm));
            let observed = observation.vms.iter().map(|sample| sample.vm.clone()).collect();
            let held = world.held(host);
            world.observer.note_room(clock::now(), host, &observed, observation.host.memory_free_mib, &held);
            // What runs where it should not says nothing of the VM that is meant.
            let state = &world.state;
            observation.vms.retain(|sample| {
                state.vms.get(&sample.vm).is_some_and(|known| known.host == *host) || state.moving_to(&sample.vm) == Some(host)
            });
            world.observer.take(clock::now(), host, observation, &shared.config.policy);
        }
    }
    drop(world);
    if news {
        shared.changed();
    }
}

/// Asks a host for its clock as long as its monitor is connected, or says that it does not know how to tell.
async fn keep_clock(shared: Arc<Shared>, host: HostId) {
    let mut times = READINGS;
    while read_clock(&shared, &host, times).await.is_ok() {
        tokio::time::sleep(READ_CLOCK).await;
        times = 1;
    }
}

/// Asks a host what its clock shows, so many times.
pub async fn read_clock(shared: &Shared, host: &HostId, times: u32) -> Result<(), AskError> {
    for _ in 0..times {
        let asked = clock::now();
        match ask(shared, host, &Command::Clock, ANSWER, |_, _| {}).await? {
            Answer::Clock { at, name } => {
                shared.world().clocks.read(host, &name, Reading { asked, at, answered: clock::now() });
            }
            other => return Err(AskError::Refused(format!("got the answer {other:?} of {host}, want its clock"))),
        }
    }
    Ok(())
}

/// Asks a host's monitor and waits for its answer; `progress` hears what it says meanwhile. `limit`: longest silence; what
/// is told as progress starts it anew.
pub async fn ask(
    shared: &Shared,
    host: &HostId,
    command: &Command,
    limit: Duration,
    mut progress: impl FnMut(Option<f64>, &str),
) -> Result<Answer, AskError> {
    let Some(connection) = shared.world().connection(host) else {
        return Err(AskError::Lost(format!("the monitor of {host} is not connected")));
    };
    let lost = |error: &dyn std::fmt::Display| AskError::Lost(format!("the monitor of {host} was lost: {error}"));
    let silent = |_| AskError::Lost(format!("the monitor of {host} said nothing for {limit:?}"));
    let asking = async {
        let (mut send, recv) = connection.open_bi().await.map_err(|error| lost(&error))?;
        frame::send(&mut send, command).await.map_err(|error| lost(&error))?;
        let _ = send.finish();
        Ok::<_, AskError>(recv)
    };
    let mut recv = tokio::time::timeout(limit, asking).await.map_err(silent)??;
    loop {
        match tokio::time::timeout(limit, frame::recv::<Answer>(&mut recv)).await.map_err(silent)? {
            Ok(Some(Answer::Progress { part, doing })) => progress(part, &doing),
            Ok(Some(Answer::Failed(words))) => return Err(AskError::Refused(words)),
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => return Err(lost(&"it ended the stream without an answer")),
            Err(error) => return Err(lost(&error)),
        }
    }
}
