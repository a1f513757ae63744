//! The journal's file: records in an embedded database, on disk before [`Journal::append`] returns.
//!
//! Of decisions, each of which holds the snapshot it was taken on, the last [`DECISIONS`] are kept: guests whose load
//! wavers cause one every few seconds. Nothing else grows without an operator or a move.

use crate::records::{KEPT, Record, RecordV1, State};
use anyhow::{Context, anyhow, bail};
use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use std::collections::VecDeque;
use std::path::Path;
use violin_common::Instant;

const RECORDS: TableDefinition<u64, &[u8]> = TableDefinition::new("records");
const FENCE: TableDefinition<&str, u64> = TableDefinition::new("fence");

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
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    match std::fs::metadata(path) {
        Ok(found) if found.len() == 0 => bail!("got an empty file (0 bytes): {}", unreadable(path)),
        // It holds the environments' private keys.
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
        write.commit()?;
        drop(database);
        match std::fs::hard_link(&new, path) {
            // Another one's is there now; whether it is in use is found out by opening it.
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error.into()),
            _ => anyhow::Ok(std::fs::File::open(folder)?.sync_all()?),
        }
    })();
    let removed = std::fs::remove_file(&new);
    made.with_context(making)?;
    removed.with_context(making)
}

/// An open journal. The database file is locked: a second manager on the same journal cannot start.
#[derive(Debug)]
pub struct Journal {
    database: Database,
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
        let (database, mut state, next, decisions) = opened.map_err(|error| match error.downcast_ref() {
            Some(DatabaseError::DatabaseAlreadyOpen) => {
                error.context(format!("the journal {} is in use: another adaptd runs with it", path.display()))
            }
            _ if error.is::<UnknownRecord>() => error.context(format!("the journal {} cannot be read", path.display())),
            _ => error.context(unreadable(path)),
        })?;
        let generation = state.generation + 1;
        let mut journal = Self { database, next, generation, decisions };
        let record = Record::V1(RecordV1::Generation { generation, at: now });
        journal.write(&record, true)?;
        state.apply(&record);
        Ok((journal, state))
    }

    fn load(path: &Path) -> anyhow::Result<(Database, State, u64, VecDeque<u64>)> {
        let database = Database::open(path)?;
        let (state, next, decisions) = Self::read(&database)?;
        Ok((database, state, next, decisions))
    }

    fn read(database: &Database) -> anyhow::Result<(State, u64, VecDeque<u64>)> {
        let read = database.begin_read()?;
        let table = read.open_table(RECORDS)?;
        let mut state = State::default();
        let mut next = 0;
        let mut decisions = VecDeque::new();
        for row in table.iter()? {
            let (key, value) = row?;
            let record: Record = postcard::from_bytes(value.value()).map_err(|_| UnknownRecord(key.value()))?;
            state.apply(&record);
            next = key.value() + 1;
            if matches!(record, Record::V1(RecordV1::Decided { .. })) {
                decisions.push_back(key.value());
            }
        }
        Ok((state, next, decisions))
    }

    /// Writes one record; it is on disk when this returns. Errors: also if another generation has begun meanwhile.
    pub fn append(&mut self, record: &Record) -> anyhow::Result<()> {
        self.write(record, false)
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
