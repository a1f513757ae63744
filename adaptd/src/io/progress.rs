//! How far environments that come or go are: told in words to the log and to whoever asked, and kept for whoever asks later.

use crate::io::world::{Shared, World};
use crate::io::{clock, ending};
use crate::records::{KnownEnvironment, Life};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::UnboundedSender;
use violin_common::api::adapt::{EnvironmentLife, EnvironmentSeen};
use violin_common::control::monitor::VmState;
use violin_common::{EnvironmentId, Instant};

/// What was said of environments that come or go. Its lock is never held while the world is being asked for.
#[derive(Debug, Default)]
pub struct Progress(Mutex<BTreeMap<EnvironmentId, Underway>>);

#[derive(Debug, Clone)]
struct Underway {
    /// Which call this is about: a later one of the same name has another.
    number: u64,
    since: Instant,
    last: String,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<EnvironmentId, Underway>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when an environment comes or goes, and what was last said of that.
    pub fn of(&self, environment: &EnvironmentId) -> Option<(Instant, String)> {
        self.lock().get(environment).map(|underway| (underway.since, underway.last.clone()))
    }
}

/// Where progress in words goes: to the log, and to whoever asked.
#[derive(Debug, Default)]
pub struct Words {
    asker: Option<UnboundedSender<String>>,
    about: Option<About>,
}

#[derive(Debug)]
struct About {
    shared: Arc<Shared>,
    environment: EnvironmentId,
    number: u64,
}

impl Drop for About {
    fn drop(&mut self) {
        let mut known = self.shared.progress.lock();
        if known.get(&self.environment).is_some_and(|underway| underway.number == self.number) {
            known.remove(&self.environment);
        }
    }
}

impl Words {
    /// To somebody who asked, too.
    pub const fn to(asker: UnboundedSender<String>) -> Self {
        Self { asker: Some(asker), about: None }
    }

    /// The same, and as long as these are kept whoever asks how far this environment is hears the last of them. Whoever came
    /// before is no longer heard.
    pub fn about(&self, shared: &Arc<Shared>, environment: &EnvironmentId, first: String) -> Self {
        let number = {
            let mut known = shared.progress.lock();
            let number = known.values().map(|underway| underway.number).max().unwrap_or(0) + 1;
            known.insert(environment.clone(), Underway { number, since: clock::now(), last: first });
            number
        };
        let about = About { shared: Arc::clone(shared), environment: environment.clone(), number };
        Self { asker: self.asker.clone(), about: Some(about) }
    }

    /// Says it.
    pub fn say(&self, words: String) {
        tracing::info!("{words}");
        if let Some(About { shared, environment, number }) = &self.about
            && let Some(underway) = shared.progress.lock().get_mut(environment).filter(|known| known.number == *number)
        {
            underway.last.clone_from(&words);
        }
        if let Some(asker) = &self.asker {
            let _ = asker.send(words);
        }
    }
}

/// Environments as listed.
pub fn list(shared: &Shared, world: &World, now: Instant) -> Vec<EnvironmentSeen> {
    let list = world.state.environments.iter().map(|(name, known)| EnvironmentSeen {
        spec: known.stored.spec.clone(),
        home: known.stored.home.clone(),
        life: match known.life {
            Life::Starting => EnvironmentLife::Starting,
            Life::Up => EnvironmentLife::Ready,
            Life::Ending => EnvironmentLife::Ending,
        },
        progress: of(shared, world, name),
        progress_s: shared.progress.of(name).map(|(since, _)| now.since(since).as_secs_f64()),
        vms: world.list_vms(now, &shared.config, Some(name)),
    });
    list.collect()
}

/// How far an environment is that comes or goes; none: nothing is under way.
pub fn of(shared: &Shared, world: &World, name: &EnvironmentId) -> Option<String> {
    let count = world.state.environments.get(name).and_then(|known| counted(world, name, known));
    match (count, shared.progress.of(name)) {
        (Some(count), Some((_, last))) => Some(format!("{count}; {last}")),
        (count, said) => count.or_else(|| said.map(|(_, last)| last)),
    }
}

/// How many of its VMs are where they are to be, and where those may be that do not go; none: nothing is under way.
fn counted(world: &World, name: &EnvironmentId, known: &KnownEnvironment) -> Option<String> {
    let here = world.state.vms_of(name).count();
    match known.life {
        Life::Up => None,
        Life::Starting => {
            let running = |vm: &&_| world.seen.get(*vm).is_some_and(|(_, state)| *state == VmState::Running);
            Some(format!("{} of {here} VMs run", world.state.vms_of(name).filter(running).count()))
        }
        // Those that are stopped are off the record.
        Life::Ending => {
            let all = known.stored.placement.len();
            let left = ending::left(world, name).filter(|_| !world.being_ended.contains(name));
            let left = left.map_or_else(String::new, |left| format!(": {left}"));
            Some(format!("{} of {all} VMs are stopped{left}", all.saturating_sub(here)))
        }
    }
}
