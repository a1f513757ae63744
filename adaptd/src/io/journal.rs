//! The journal's file: records in an embedded database, on disk before [`Journal::append`] returns.
//!
//! Of decisions, each of which holds the snapshot it was taken on, the last [`DECISIONS`] are kept: guests whose load
//! wavers cause one every few seconds. Nothing else grows without an operator or a move.
//!
//! Private keys are not in it but beside it, see [`Secrets`]. A file that may hold some, as earlier versions wrote it, is written
//! anew without them when it is opened.

use crate::io::secrets::{self, Secrets};
use crate::records::{KEPT, Record, RecordV1, State};
use anyhow::{Context, anyhow, bail};
use redb::{Database, DatabaseError, Durability, ReadOnlyDatabase, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use std::borrow::Cow;
use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::path::Path;
use violin_channel::start::folder_of_can_be;
use violin_common::{EnvironmentId, Instant};

const RECORDS: TableDefinition<u64, &[u8]> = TableDefinition::new("records");
const FENCE: TableDefinition<&str, u64> = TableDefinition::new("fence");
/// What the file is like; earlier versions neither read nor write it.
const FORM: TableDefinition<&str, u64> = TableDefinition::new("form");
/// In it: whether no private key was ever written to this file.
const KEYS_APART: &str = "keys-apart";

/// Most decisions on disk; more than [`KEPT`], so that a restart reads the same state.
pub const DECISIONS: usize = 10 * KEPT;

/// A record that is whole, but of another form.
#[derive(Debug, thiserror::Error)]
#[error("record {0} is of no version this program knows; use the program that wrote it")]
struct UnknownRecord(u64);

/// What can be done about a journal that says nothing.
fn unreadable(path: &Path) -> String {
    let path = path.display();
    format!(
        "the journal {path} is damaged, or is none. Restore it from a copy; or move it away and start adaptd anew: the VMs it knew \
         run on meanwhile, `violin vm list` shows them as strays, and `violin env adopt ENVIRONMENT` takes them up again"
    )
}

/// Makes a journal where there is none, whole or not at all: an empty file is what a full disk or a crash has left.
fn make(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let folder = secrets::above(path);
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    match std::fs::metadata(path) {
        Ok(found) if found.len() == 0 => bail!("got an empty file (0 bytes): {}", unreadable(path)),
        // One of an earlier version holds the environments' private keys.
        Ok(_) => return Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?),
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("looking at the journal {}", path.display()));
        }
        Err(_) => {}
    }
    let making = || format!("making the journal {}", path.display());
    // Of this process: two may start at once.
    let new = path.with_added_extension(format!("new-{}", std::process::id()));
    let _ = std::fs::remove_file(&new);
    let made = (|| {
        let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
        let database = Database::builder().create_file(file)?;
        let write = database.begin_write()?;
        write.open_table(RECORDS)?;
        write.open_table(FENCE)?;
        write.open_table(FORM)?.insert(KEYS_APART, 1)?;
        write.commit()?;
        drop(database);
        match std::fs::hard_link(&new, path) {
            // Another one's is there now; whether it is in use is found out by opening it.
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error.into()),
            _ => anyhow::Ok(secrets::sync_folder(&folder)?),
        }
    })();
    let removed = std::fs::remove_file(&new);
    made.with_context(making)?;
    removed.with_context(making)
}

/// Writes a journal anew, without the private keys that may be in its records or in pages that are free now; those of environments
/// that are there are put beside it first. At any kill the old file is in its place, or the new one is.
///
/// Returns it and the old file, which has no name any more.
fn written_anew(path: &Path, old: &Database, state: &State, secrets: &Secrets) -> anyhow::Result<(Database, File)> {
    use std::os::unix::fs::OpenOptionsExt;
    for (name, known) in state.environments.iter().filter(|(_, known)| !known.stored.keys.private.is_empty()) {
        secrets.prepare(name, &known.stored.keys)?;
        secrets.settle(name)?;
    }
    let new = path.with_added_extension("new");
    // Left by a kill; this process alone has the journal open.
    secrets::destroy(&new).with_context(|| format!("removing {}", new.display()))?;
    let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
    let database = Database::builder().create_file(file)?;
    let (read, mut write) = (old.begin_read()?, database.begin_write()?);
    write.set_durability(Durability::Immediate)?;
    {
        let (mut records, mut fence) = (write.open_table(RECORDS)?, write.open_table(FENCE)?);
        for row in read.open_table(RECORDS)?.iter()? {
            let (key, value) = row?;
            let mut record: Record = postcard::from_bytes(value.value()).map_err(|_| UnknownRecord(key.value()))?;
            match record.keys_mut() {
                Some((_, keys)) => {
                    keys.private.clear();
                    records.insert(key.value(), postcard::to_stdvec(&record)?.as_slice())?;
                }
                None => drop(records.insert(key.value(), value.value())?),
            }
        }
        for row in read.open_table(FENCE)?.iter()? {
            let (key, value) = row?;
            fence.insert(key.value(), value.value())?;
        }
        write.open_table(FORM)?.insert(KEYS_APART, 1)?;
    }
    write.commit()?;
    let was = std::fs::OpenOptions::new().write(true).open(path)?;
    std::fs::rename(&new, path)?;
    // From here on it is the journal, whatever fails.
    if let Err(error) = secrets::sync_folder(&secrets::above(path)) {
        tracing::warn!(journal = %path.display(), "that it was written anew may not be on disk yet: {error}");
    }
    Ok((database, was))
}

/// What a journal adds up to.
struct Read {
    state: State,
    next: u64,
    decisions: VecDeque<u64>,
    /// Environments that were and are no longer.
    gone: BTreeSet<EnvironmentId>,
    /// Whether the file may hold private keys.
    exposed: bool,
}

/// An open journal. The database file is locked: a second manager on the same journal cannot start.
#[derive(Debug)]
pub struct Journal {
    database: Database,
    secrets: Secrets,
    gone: BTreeSet<EnvironmentId>,
    next: u64,
    generation: u64,
    /// Keys of the decisions on disk, oldest first.
    decisions: VecDeque<u64>,
}

impl Journal {
    /// Opens or makes the file, reads all records, and begins a new generation.
    ///
    /// Errors: it cannot be read, and what to do. An empty or damaged one is never taken for a new one: VMs it knew may run.
    pub fn open(path: &Path, now: Instant) -> anyhow::Result<(Self, State)> {
        make(path)?;
        // What is not as it should be is an error of the library, or trips one of its assertions.
        let opened = std::panic::catch_unwind(|| Self::load(path)).unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            Err(anyhow!("its pages do not fit together: {}", said.unwrap_or("an assertion failed")))
        });
        let (mut database, read) = opened.map_err(|error| match error.downcast_ref() {
            Some(DatabaseError::DatabaseAlreadyOpen) => {
                error.context(format!("the journal {} is in use: another adaptd runs with it", path.display()))
            }
            _ if error.is::<UnknownRecord>() => error.context(format!("the journal {} cannot be read", path.display())),
            _ => error.context(unreadable(path)),
        })?;
        let Read { mut state, next, decisions, gone, exposed } = read;
        let secrets = Secrets::beside(path);
        let there = |name: &EnvironmentId| state.environments.get(name).map(|known| &known.stored.keys);
        secrets.settle_all(there, &gone).context("settling the private keys beside the journal")?;
        if exposed {
            let journal = path.display();
            match written_anew(path, &database, &state, &secrets) {
                Ok((new, was)) => {
                    drop(std::mem::replace(&mut database, new));
                    if let Err(error) = secrets::overwrite(&was) {
                        tracing::warn!(%journal, "its old form is removed, but was not overwritten: {error}");
                    }
                    tracing::info!(%journal, "written anew without the private keys that an earlier version kept in it");
                }
                // It is as good as it was; guests are not left alone for that.
                Err(error) => tracing::error!(
                    %journal,
                    "it holds private keys, also of ended environments, and could not be written anew without them, which needs as \
                     much room again; tried again at the next start: {error:#}"
                ),
            }
        }
        let generation = state.generation + 1;
        let mut journal = Self { database, secrets, gone, next, generation, decisions };
        let record = Record::V1(RecordV1::Generation { generation, at: now });
        journal.write(&record, true)?;
        state.apply(&record);
        Ok((journal, state))
    }

    /// Whether it could be opened, or made where there is none. Changes nothing; one that is in use is not looked at.
    pub fn check(path: &Path) -> anyhow::Result<()> {
        folder_of_can_be(path)?;
        match std::fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("looking at the journal {}", path.display())),
            Ok(found) if found.len() == 0 => bail!("got an empty file (0 bytes): {}", unreadable(path)),
            Ok(_) => {}
        }
        let reading = || match ReadOnlyDatabase::open(path) {
            Ok(database) => Self::read(&database, &Secrets::beside(path)).map(|_| ()),
            // In use; or left by a kill, which the next start mends.
            Err(DatabaseError::DatabaseAlreadyOpen | DatabaseError::RepairAborted) => Ok(()),
            Err(error) => Err(error.into()),
        };
        let read = std::panic::catch_unwind(reading).unwrap_or_else(|_| Err(anyhow!("its pages do not fit together")));
        read.map_err(|error| match error.is::<UnknownRecord>() {
            true => error.context(format!("the journal {} cannot be read", path.display())),
            false => error.context(unreadable(path)),
        })
    }

    fn load(path: &Path) -> anyhow::Result<(Database, Read)> {
        let database = Database::open(path)?;
        let read = Self::read(&database, &Secrets::beside(path))?;
        Ok((database, read))
    }

    fn read(database: &impl ReadableDatabase, secrets: &Secrets) -> anyhow::Result<Read> {
        let read = database.begin_read()?;
        let table = read.open_table(RECORDS)?;
        let (mut state, mut next, mut decisions, mut gone) = (State::default(), 0, VecDeque::new(), BTreeSet::new());
        let mut exposed = match read.open_table(FORM) {
            Ok(form) => form.get(KEYS_APART)?.is_none(),
            Err(TableError::TableDoesNotExist(_)) => true,
            Err(error) => return Err(error.into()),
        };
        for row in table.iter()? {
            let (key, value) = row?;
            let mut record: Record = postcard::from_bytes(value.value()).map_err(|_| UnknownRecord(key.value()))?;
            match record.keys_mut() {
                Some((name, keys)) if keys.private.is_empty() => secrets.fill(name, keys),
                // An earlier version has written to it again.
                Some(_) => exposed = true,
                None => {}
            }
            match &record {
                Record::V1(RecordV1::EnvironmentGone(name)) => drop(gone.insert(name.clone())),
                Record::V1(RecordV1::EnvironmentBegins(stored)) => drop(gone.remove(&stored.spec.name)),
                Record::V1(RecordV1::Decided { .. }) => decisions.push_back(key.value()),
                Record::V1(_) => {}
            }
            state.apply(&record);
            next = key.value() + 1;
        }
        Ok(Read { state, next, decisions, gone, exposed })
    }

    /// Environments that were there before it was opened and are gone.
    pub const fn gone(&self) -> &BTreeSet<EnvironmentId> {
        &self.gone
    }

    /// Writes one record; it is on disk when this returns. Errors: also if another generation has begun meanwhile.
    pub fn append(&mut self, record: &Record) -> anyhow::Result<()> {
        let mut apart = Cow::Borrowed(record);
        if matches!(record, Record::V1(RecordV1::EnvironmentBegins(_)))
            && let Some((name, keys)) = apart.to_mut().keys_mut()
        {
            self.secrets.prepare(name, keys).context("writing a private key beside it")?;
            keys.private.clear();
        }
        self.write(&apart, false)?;
        match record {
            Record::V1(RecordV1::EnvironmentBegins(stored)) => {
                self.secrets.settle(&stored.spec.name).context("writing a private key beside it")
            }
            Record::V1(RecordV1::EnvironmentGone(name)) => self.secrets.forget(name).context("removing a private key beside it"),
            Record::V1(_) => Ok(()),
        }
    }

    fn write(&mut self, record: &Record, begins: bool) -> anyhow::Result<()> {
        let decided = matches!(record, Record::V1(RecordV1::Decided { .. }));
        let excess = (self.decisions.len() + usize::from(decided)).saturating_sub(DECISIONS);
        let bytes = postcard::to_stdvec(record)?;
        let mut write = self.database.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        {
            let mut fence = write.open_table(FENCE)?;
            let current = fence.get("generation")?.map_or(0, |value| value.value());
            if begins {
                fence.insert("generation", self.generation)?;
            } else if current != self.generation {
                bail!("the journal is at generation {current}, this manager is {}: another one took over", self.generation);
            }
            let mut records = write.open_table(RECORDS)?;
            records.insert(self.next, bytes.as_slice())?;
            for key in self.decisions.iter().take(excess) {
                records.remove(*key)?;
            }
        }
        write.commit()?;
        self.decisions.drain(..excess);
        if decided {
            self.decisions.push_back(self.next);
        }
        if excess > 0 {
            tracing::debug!(decisions_forgotten = excess, kept = DECISIONS, "the journal forgets its oldest decisions");
        }
        self.next += 1;
        Ok(())
    }

    /// Generation of this manager.
    pub const fn generation(&self) -> u64 {
        self.generation
    }
}
