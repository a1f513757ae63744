//! The journal's file: records in an embedded database, on disk before [`Journal::append`] returns.
//!
//! Of decisions, each of which holds the snapshot it was taken on, the last [`DECISIONS`] are kept: guests whose load
//! wavers cause one every few seconds. Nothing else grows without an operator or a move.

use crate::records::{KEPT, Record, RecordV1, State};
use anyhow::{Context, bail};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use std::collections::VecDeque;
use std::path::Path;
use violin_common::Instant;

const RECORDS: TableDefinition<u64, &[u8]> = TableDefinition::new("records");
const FENCE: TableDefinition<&str, u64> = TableDefinition::new("fence");

/// Most decisions on disk; more than [`KEPT`], so that a restart reads the same state.
pub const DECISIONS: usize = 10 * KEPT;

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
    pub fn open(path: &Path, now: Instant) -> anyhow::Result<(Self, State)> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        {
            use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
            // It holds the environments' private keys: whoever opened it a moment before it was closed could read on.
            let open = || std::fs::OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path);
            let file = open().with_context(|| format!("making the journal {}", path.display()))?;
            file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        }
        let database = Database::create(path).with_context(|| {
            format!("opening the journal {} (does another adaptd use it, or is it no journal?)", path.display())
        })?;
        let write = database.begin_write()?;
        write.open_table(RECORDS)?;
        write.open_table(FENCE)?;
        write.commit()?;
        let (state, next, decisions) = Self::read(&database)?;
        let mut journal = Self { database, next, generation: state.generation, decisions };
        let mut state = state;
        let generation = state.generation + 1;
        let record = Record::V1(RecordV1::Generation { generation, at: now });
        journal.generation = generation;
        journal.write(&record, true)?;
        state.apply(&record);
        Ok((journal, state))
    }

    fn read(database: &Database) -> anyhow::Result<(State, u64, VecDeque<u64>)> {
        let read = database.begin_read()?;
        let table = read.open_table(RECORDS)?;
        let mut state = State::default();
        let mut next = 0;
        let mut decisions = VecDeque::new();
        for row in table.iter()? {
            let (key, value) = row?;
            let record: Record = postcard::from_bytes(value.value()).with_context(|| {
                format!(
                    "record {} of the journal is of no version this program knows; use the program that wrote it",
                    key.value()
                )
            })?;
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
