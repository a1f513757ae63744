//! Puts the monitor together and runs it until it is told to end.

use super::cgroup::{Hierarchies, HostGroup};
use super::images::Images;
use super::link;
use super::monitor::{Monitor, Parts};
use super::proc;
use super::sandbox::{Sandbox, SandboxConfig};
use crate::hypervisor::Hypervisor;
use anyhow::Context;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::signal::unix::{SignalKind, signal};
use violin_channel::quic::{alpn, dialler, listen_patiently};
use violin_channel::start::folder_can_be;
use violin_channel::tls::{Credentials, Timing};
use violin_common::config::monitor::{Driver, MonitorConfig};

/// How long the end waits for moves away to be over: their VMs would be fenced until the next start.
const MOVE_LIMIT: Duration = Duration::from_secs(30);

/// Makes the driver the configuration names.
fn driver(config: &MonitorConfig, trees: &Hierarchies, group: Option<&HostGroup>) -> anyhow::Result<Arc<dyn Hypervisor>> {
    match &config.driver {
        Driver::Sandbox { pause, shared, guest_program } => {
            let sandbox = SandboxConfig {
                host: config.host.clone(),
                netns: proc::own_netns_path().into(),
                shared: shared.clone(),
                mark: config.mark.clone(),
                pause: pause.0,
                guest_program: guest_program.clone(),
                partition: group.map(|group| group.path().to_owned()),
                scale: config.capacity.scale,
                trees: trees.clone(),
            };
            Ok(Arc::new(Sandbox::open(sandbox)?))
        }
        Driver::Libvirt { .. } => libvirt(config),
    }
}

#[cfg(feature = "libvirt")]
fn libvirt(config: &MonitorConfig) -> anyhow::Result<Arc<dyn Hypervisor>> {
    use super::libvirt::{Libvirt, Settings};
    let settings = Settings::from_config(config).context("the configuration names another driver than libvirt")?;
    Ok(Arc::new(Libvirt::start(settings)?))
}

#[cfg(not(feature = "libvirt"))]
fn libvirt(_config: &MonitorConfig) -> anyhow::Result<Arc<dyn Hypervisor>> {
    anyhow::bail!("this monitord was built without the libvirt driver: build it with the feature `libvirt`")
}

/// Whether a start would work, as far as can be told without starting: another monitor may run.
pub fn check(config: &MonitorConfig) -> anyhow::Result<()> {
    let credentials = Credentials::load(&config.tls)?;
    credentials.must_name(&config.host, &config.domain)?;
    credentials.must_be_valid(SystemTime::now())?;
    Hierarchies::detect()?;
    folder_can_be(&config.run).context("key `run`")?;
    folder_can_be(&config.images).context("key `images`")?;
    match &config.driver {
        Driver::Sandbox { shared, guest_program, .. } => {
            folder_can_be(shared).context("key `driver.shared`")?;
            let program = std::fs::metadata(guest_program).with_context(|| format!("looking at {}", guest_program.display()));
            if !program.context("key `driver.guest-program`")?.is_file() {
                anyhow::bail!("key `driver.guest-program`: got {}, want a program", guest_program.display());
            }
            Ok(())
        }
        Driver::Libvirt { .. } => check_libvirt(config),
    }
}

#[cfg(feature = "libvirt")]
fn check_libvirt(config: &MonitorConfig) -> anyhow::Result<()> {
    super::libvirt::Settings::from_config(config).context("the configuration names another driver than libvirt").map(|_| ())
}

#[cfg(not(feature = "libvirt"))]
fn check_libvirt(config: &MonitorConfig) -> anyhow::Result<()> {
    libvirt(config).map(|_| ())
}

/// Runs the monitor until SIGTERM or SIGINT. Guests run on after its end.
pub async fn run(config: MonitorConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let credentials = Arc::new(Credentials::load(&config.tls)?);
    credentials.must_name(&config.host, &config.domain)?;
    if let Err(error) = credentials.must_be_valid(SystemTime::now()) {
        tracing::error!("the certificate will be refused by everybody: {error}");
    }
    let trees = Hierarchies::detect()?;
    let group = config.capacity.cpu_group.as_deref().map(|name| HostGroup::create(&trees, name)).transpose()?;
    let group = group.map(|group| group.with_period(config.capacity.quota_period.0));
    std::fs::create_dir_all(&config.run).with_context(|| format!("making {}", config.run.display()))?;

    let image_port = tokio::select! {
        opened = listen_patiently(config.listen, Arc::clone(&credentials), alpn::IMAGE, Timing::CALM) => opened?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let images = Images::open(&config.images, Some((image_port.clone(), tokio::runtime::Handle::current())))
        .with_context(|| format!("opening the image store {}", config.images.display()))?;
    let images = Arc::new(images);
    let caller = dialler(config.manager, credentials, alpn::MONITOR, Timing::CALM)?;

    let (manager, host) = (config.manager, config.host.clone());
    let serving = Arc::clone(&images);
    // The driver's recovery blocks.
    let monitor = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        let hypervisor = driver(&config, &trees, group.as_ref())?;
        Ok(Monitor::open(Parts { config, hypervisor, images, group })?)
    })
    .await??;
    tracing::info!(%host, driver = monitor.hello().driver, "monitor runs");
    let image_server = tokio::spawn(serving.serve(image_port.clone()));
    let link = tokio::spawn(link::keep(Arc::clone(&monitor), caller.clone(), manager));

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending; guests run on");
    // No new command, but a move under way comes to its end.
    link.abort();
    image_server.abort();
    caller.close("the monitor ends").await;
    image_port.close("the monitor ends").await;
    let deadline = tokio::time::Instant::now() + MOVE_LIMIT;
    while monitor.is_moving() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
