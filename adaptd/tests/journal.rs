//! What the journal's records add up to, read again from bytes.

use adaptd::io::journal::{DECISIONS, Journal};
use adaptd::plan::{Origin, Plan, PlannedMove, planned};
use adaptd::policy::Move;
use adaptd::records::{KEPT, KeptMode, Keys, Life, Record, RecordV1, State, StoredEnvironment, mode_at_start};
use std::collections::BTreeMap;
use violin_common::api::adapt::{DecisionSeen, Migration, MigrationSeen, Mode, Outcome};
use violin_common::config::environment::EnvironmentSpec;
use violin_common::control::monitor::MigrationMode;
use violin_common::{Epoch, Instant, VmId};

fn environment() -> StoredEnvironment {
    let spec = EnvironmentSpec::parse(include_str!("../../configs/environments/alpha.toml")).unwrap();
    let placement = spec.nodes().unwrap().into_iter().map(|node| (node.vm, "h1".parse().unwrap())).collect();
    let keys = Keys { public: "ssh-ed25519 AAAA violin-alpha".into(), private: "secret".into() };
    StoredEnvironment { spec, home: "d1".parse().unwrap(), image: None, placement, keys }
}

fn decided(number: u64) -> RecordV1 {
    let decision = DecisionSeen {
        number,
        at: Instant(1),
        mode: Mode::Act,
        policy: "violin".into(),
        moves: Vec::new(),
        reason: String::new(),
        terms: Vec::new(),
        refusals: Vec::new(),
    };
    RecordV1::Decided { decision: Box::new(decision), snapshot: String::new() }
}

fn migration(number: u64, outcome: Outcome, ended: Option<Instant>) -> Migration {
    Migration {
        number,
        vm: "alpha-c1".parse().unwrap(),
        from: "h1".parse().unwrap(),
        to: "h2".parse().unwrap(),
        from_domain: "d1".parse().unwrap(),
        to_domain: "d1".parse().unwrap(),
        gang: None,
        decision: Some(1),
        reason: "because".into(),
        terms: Vec::new(),
        driver: "sandbox".into(),
        announced: Instant(5),
        began: None,
        ended,
        outcome,
        demand_before: 0.9,
        source: None,
        destination: None,
    }
}

fn plan() -> Plan {
    let moved = Move { vm: "alpha-c1".parse().unwrap(), from: "h1".parse().unwrap(), to: "h2".parse().unwrap() };
    let moves = vec![planned(&moved, 1, MigrationMode::PreCopy)];
    Plan { generation: 1, number: 1, origin: Origin::Policy, gang: None, parallel: 1, moves }
}

/// What a reader makes of the records after each of them went through bytes.
fn replayed(records: &[RecordV1]) -> State {
    let mut state = State::default();
    for record in records {
        let bytes = postcard::to_stdvec(&Record::V1(record.clone())).unwrap();
        state.apply(&postcard::from_bytes(&bytes).unwrap());
    }
    state
}

fn story() -> Vec<RecordV1> {
    let vm: VmId = "alpha-c1".parse().unwrap();
    vec![
        RecordV1::Generation { generation: 1, at: Instant(1) },
        RecordV1::EnvironmentBegins(Box::new(environment())),
        RecordV1::VmStarts { vm, epoch: Epoch::FIRST },
        RecordV1::EnvironmentReady("alpha".parse().unwrap()),
        RecordV1::PlanBegins { plan: Box::new(plan()), migrations: vec![migration(1, Outcome::Running, None)] },
        RecordV1::StepBegins { migration: 1, step: 0, at: Instant(6) },
        RecordV1::MoveEnded(Box::new(migration(1, Outcome::Done, Some(Instant(9))))),
        RecordV1::PlanEnded { plan: 1 },
    ]
}

/// What a manager holds that wrote these records, and what the next one reads: the same but for its generation.
#[test]
fn every_prefix_reads_the_same_again() {
    let mut story = story().split_off(1);
    let name: violin_common::EnvironmentId = "alpha".parse().unwrap();
    story.extend([RecordV1::EnvironmentEnds(name.clone()), RecordV1::EnvironmentGone(name)]);
    story.push(RecordV1::VmStopped { vm: "alpha-c1".parse().unwrap(), host: "h2".parse().unwrap() });
    for end in 0..=story.len() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal.redb");
        let (mut journal, mut live) = Journal::open(&path, Instant(10)).unwrap();
        for record in story[..end].iter().cloned().map(Record::V1) {
            journal.append(&record).unwrap();
            live.apply(&record);
        }
        drop(journal);

        let (_, read) = Journal::open(&path, Instant(11)).unwrap();

        live.generation += 1;
        assert_eq!(read, live, "after {end} records");
    }
}

#[test]
fn a_moved_vm_is_at_its_destination_and_rests() {
    let state = replayed(&story());

    let vm = &state.vms[&"alpha-c1".parse().unwrap()];
    assert_eq!((vm.host.as_str(), vm.moved), ("h2", Some(Instant(9))));
    assert!(state.unfinished.is_empty());
    assert_eq!(state.moving_to(&"alpha-c1".parse().unwrap()), None);
}

#[test]
fn a_plan_without_an_end_is_unfinished_with_its_last_step() {
    let state = replayed(&story()[..6]);

    assert_eq!(state.unfinished[&1].steps, BTreeMap::from([(1, 0)]));
    assert_eq!(state.moving_to(&"alpha-c1".parse().unwrap()), Some(&"h2".parse().unwrap()));
    assert_eq!(state.vms[&"alpha-c1".parse().unwrap()].host.as_str(), "h1");
}

#[test]
fn an_undone_move_leaves_the_vm_at_its_source_and_lets_it_rest() {
    let mut story = story();
    story[6] = RecordV1::MoveEnded(Box::new(migration(1, Outcome::Undone("no".into()), Some(Instant(9)))));

    let state = replayed(&story);

    let vm = &state.vms[&"alpha-c1".parse().unwrap()];
    assert_eq!((vm.host.as_str(), vm.moved), ("h1", Some(Instant(9))));
}

#[test]
fn moves_undone_in_a_row_are_counted_until_one_is_done() {
    let missed = |ends: &[Outcome]| {
        let mut story = story()[..4].to_vec();
        for outcome in ends {
            let begins = RecordV1::PlanBegins { plan: Box::new(plan()), migrations: vec![migration(1, Outcome::Running, None)] };
            let ended = RecordV1::MoveEnded(Box::new(migration(1, outcome.clone(), Some(Instant(9)))));
            story.extend([begins, ended, RecordV1::PlanEnded { plan: 1 }]);
        }
        replayed(&story).missed.into_values().collect::<Vec<_>>()
    };
    let undone = || Outcome::Undone("no".into());

    assert_eq!(missed(&[undone(), undone()]), [(2, Instant(9))]);
    assert_eq!(missed(&[undone(), undone(), Outcome::Done]), []);
    assert_eq!(missed(&[undone(), Outcome::Done, undone()]), [(1, Instant(9))]);
}

#[test]
fn a_vm_started_again_has_a_higher_incarnation() {
    let mut story = story();
    let name: violin_common::EnvironmentId = "alpha".parse().unwrap();
    story.extend([RecordV1::EnvironmentEnds(name.clone()), RecordV1::EnvironmentGone(name.clone())]);
    let gone = replayed(&story);
    assert!(gone.vms.is_empty() && gone.ended.contains_key(&"alpha-c1".parse().unwrap()));
    assert!(gone.is_owed(&"alpha-c1".parse().unwrap(), &"h2".parse().unwrap()));
    story.push(RecordV1::VmStopped { vm: "alpha-c1".parse().unwrap(), host: "h2".parse().unwrap() });
    assert!(!replayed(&story).to_stop.contains_key(&"alpha-c1".parse().unwrap()));

    story.push(RecordV1::EnvironmentBegins(Box::new(environment())));
    let state = replayed(&story);

    let spec = &state.vms[&"alpha-c1".parse().unwrap()].spec;
    assert_eq!(state.next_epoch(spec), Epoch { incarnation: 2, moves: 1 });
    assert_eq!(state.next_epoch(&state.vms[&"alpha-c2".parse().unwrap()].spec), Epoch::FIRST);
    assert!(!state.ended.contains_key(&"alpha-c1".parse().unwrap()));
    assert_eq!(state.environments[&name].life, Life::Starting);
}

#[test]
fn times_of_before_a_restart_of_the_machine_do_not_count() {
    let mut story = story();
    story.push(RecordV1::Generation { generation: 2, at: Instant(3) });

    assert_eq!(replayed(&story).vms[&"alpha-c1".parse().unwrap()].moved, None);
}

#[test]
fn a_gang_interrupted_by_a_restart_of_the_machine_rests_no_longer_than_any() {
    let gang = Plan { gang: Some("alpha".parse().unwrap()), ..plan() };
    let mut story = story()[..4].to_vec();
    story.extend([
        RecordV1::PlanBegins { plan: Box::new(gang), migrations: vec![migration(1, Outcome::Running, None)] },
        RecordV1::MoveEnded(Box::new(migration(1, Outcome::Done, Some(Instant(900))))),
        RecordV1::Generation { generation: 2, at: Instant(3) },
        RecordV1::PlanEnded { plan: 1 },
    ]);

    assert_eq!(replayed(&story).environments[&"alpha".parse().unwrap()].moved, Some(Instant(3)));
}

#[test]
fn the_state_does_not_grow_with_every_move_and_decision() {
    let mut state = replayed(&story()[..4]);
    for number in 1..=2500 {
        let plan = Plan { number, moves: vec![PlannedMove { migration: number, ..plan().moves[0].clone() }], ..plan() };
        for record in [
            decided(number),
            RecordV1::PlanBegins { plan: Box::new(plan), migrations: vec![migration(number, Outcome::Running, None)] },
            RecordV1::MoveEnded(Box::new(migration(number, Outcome::Done, Some(Instant(9))))),
        ] {
            state.apply(&Record::V1(record));
        }
        // The first plan is still under way.
        if number > 1 {
            state.apply(&Record::V1(RecordV1::PlanEnded { plan: number }));
        }
    }

    assert_eq!((state.decisions.len(), state.migrations.len()), (KEPT, KEPT));
    assert!(state.migrations.contains_key(&1) && !state.migrations.contains_key(&2));
    assert_eq!((state.next_decision(), state.next_migration()), (2501, 2501));
}

#[test]
fn the_mode_an_operator_set_holds_until_the_configuration_or_the_command_line_says_otherwise() {
    let set = |set| RecordV1::ModeSet(KeptMode { set, configured: Mode::Act });
    let kept = replayed(&[set(Mode::Observe), set(Mode::DryRun), RecordV1::Generation { generation: 2, at: Instant(1) }]).mode;
    let mode = |dry_run, kept, configured| mode_at_start(dry_run, kept, configured).0;

    assert_eq!(mode(false, kept, Mode::Act), Mode::DryRun);
    assert_eq!(mode(false, kept, Mode::Observe), Mode::Observe);
    assert_eq!(mode(true, kept, Mode::Observe), Mode::DryRun);
    assert_eq!(mode(false, None, Mode::Act), Mode::Act);
}

#[test]
fn the_file_forgets_the_oldest_decisions_and_reads_the_same_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.redb");
    let many = DECISIONS as u64 + 3;
    // As a manager without this limit left it: one transaction is quicker than many.
    drop(Journal::open(&path, Instant(1)).unwrap());
    let records = redb::TableDefinition::<u64, &[u8]>::new("records");
    let write = redb::Database::open(&path).unwrap().begin_write().unwrap();
    for number in 1..=many {
        let bytes = postcard::to_stdvec(&Record::V1(decided(number))).unwrap();
        write.open_table(records).unwrap().insert(number, bytes.as_slice()).unwrap();
    }
    write.commit().unwrap();

    let (mut journal, mut live) = Journal::open(&path, Instant(2)).unwrap();
    for number in [many + 1, many + 2] {
        let record = Record::V1(decided(number));
        journal.append(&record).unwrap();
        live.apply(&record);
    }
    drop(journal);

    let (journal, read) = Journal::open(&path, Instant(3)).unwrap();
    live.generation += 1;
    assert_eq!(read, live);
    drop(journal);
    let stored = redb::ReadableDatabase::begin_read(&redb::Database::open(&path).unwrap()).unwrap().open_table(records).unwrap();
    // And three generations.
    assert_eq!(redb::ReadableTableMetadata::len(&stored).unwrap(), DECISIONS as u64 + 3);
}

#[test]
fn a_private_key_is_not_printed() {
    assert!(!format!("{:?}", environment()).contains("secret"));
}

#[test]
fn the_guest_is_told_all_it_needs() {
    let state = replayed(&story());

    let config = &state.vms[&"alpha-c1".parse().unwrap()].spec.guest_config;

    for line in [
        "VIOLIN_NAME=c1",
        "VIOLIN_VM=alpha-c1",
        "VIOLIN_ENVIRONMENT=alpha",
        "VIOLIN_ADDRESS=10.77.0.2/24",
        "VIOLIN_MAC=52:54:00:77:00:02",
        "VIOLIN_MTU=1400",
        "VIOLIN_HOSTS=10.77.0.1 head;10.77.0.2 c1;10.77.0.3 c2;10.77.0.4 c3;10.77.0.5 c4",
        "VIOLIN_CANARY=7001",
        "VIOLIN_SSH_PUBLIC=ssh-ed25519 AAAA violin-alpha",
        "VIOLIN_SSH_PRIVATE=c2VjcmV0",
    ] {
        assert!(config.lines().any(|got| got == line), "{line} is not in\n{config}");
    }
}

fn opened(path: &std::path::Path) -> Result<State, String> {
    Journal::open(path, Instant(9)).map(|(_, state)| state).map_err(|error| format!("{error:#}"))
}

#[test]
fn an_empty_file_is_not_taken_for_a_new_journal() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.redb");
    std::fs::write(&path, "").unwrap();

    let words = opened(&path).unwrap_err();

    assert!(words.contains("journal.redb is damaged") && words.contains("0 bytes") && words.contains("env adopt"), "{words}");
    assert_eq!(std::fs::read(&path).unwrap(), b"", "it is left as it was found");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// Every one of these is read as it was, or refused with what to do; none ends the process or begins anew.
#[test]
fn a_damaged_journal_says_how_to_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.redb");
    let (mut journal, _) = Journal::open(&path, Instant(1)).unwrap();
    for record in &story()[1..] {
        journal.append(&Record::V1(record.clone())).unwrap();
    }
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    let mut cases: Vec<(String, Vec<u8>)> = [1, 100, 4096, whole.len() / 2, whole.len() - 4096, whole.len() - 1]
        .into_iter()
        .map(|len| (format!("cut to {len} bytes"), whole[..len].to_vec()))
        .collect();
    cases.push(("text".into(), b"[journal]\n".repeat(1000)));
    cases.push(("zeros".into(), vec![0; whole.len()]));
    let used: Vec<usize> =
        (0..whole.len()).step_by(512).filter(|at| whole[*at..].iter().take(512).any(|byte| *byte != 0)).collect();
    for at in used {
        let mut damaged = whole.clone();
        damaged[at..(at + 512).min(whole.len())].iter_mut().for_each(|byte| *byte ^= 0xa5);
        cases.push((format!("bytes from {at} changed"), damaged));
    }

    let mut refused = 0;
    for (what, bytes) in &cases {
        std::fs::write(&path, bytes).unwrap();
        match opened(&path) {
            Ok(state) => assert!(state.environments.contains_key(&"alpha".parse().unwrap()), "{what}: it began anew"),
            Err(words) => {
                assert!(words.contains("move it away and start adaptd anew"), "{what}: {words}");
                refused += 1;
            }
        }
    }

    assert!(refused >= 8, "{refused} of {} cases were refused", cases.len());
}

/// Files below a folder in which these bytes are, by the names they have there.
fn holding(folder: &std::path::Path, bytes: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
        if path.is_dir() {
            found.extend(holding(&path, bytes).into_iter().map(|below| format!("{name}/{below}")));
        } else if std::fs::read(&path).unwrap().windows(bytes.len()).any(|window| window == bytes) {
            found.push(name);
        }
    }
    found.sort();
    found
}

const SECRET: &[u8] = b"b3BlbnNzaC1rZXktdjEAAAAA";

/// An environment whose private key is that secret, and the number of its pair.
fn keyed(name: &str, number: u32) -> StoredEnvironment {
    let text = include_str!("../../configs/environments/alpha.toml").replace("name = \"alpha\"", &format!("name = {name:?}"));
    let spec = EnvironmentSpec::parse(&text).unwrap();
    let placement = spec.nodes().unwrap().into_iter().map(|node| (node.vm, "h1".parse().unwrap())).collect();
    let private = format!("-----BEGIN-----\n{}{number}\n-----END-----\n", String::from_utf8_lossy(SECRET));
    let keys = Keys { public: format!("ssh-ed25519 AAAA{number} violin-{name}\n"), private };
    StoredEnvironment { spec, home: "d1".parse().unwrap(), image: None, placement, keys }
}

fn begins(name: &str, number: u32) -> Record {
    Record::V1(RecordV1::EnvironmentBegins(Box::new(keyed(name, number))))
}

fn gone(name: &str) -> Record {
    Record::V1(RecordV1::EnvironmentGone(name.parse().unwrap()))
}

fn private(state: &State, name: &str) -> Option<String> {
    Some(state.environments.get(&name.parse().unwrap())?.stored.keys.private.clone())
}

#[test]
fn no_private_key_is_ever_in_the_journals_file_and_none_of_an_ended_environment_anywhere() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.redb");
    let (mut journal, _) = Journal::open(&path, Instant(1)).unwrap();
    journal.append(&begins("alpha", 1)).unwrap();
    journal.append(&begins("beta", 2)).unwrap();

    assert_eq!(holding(directory.path(), SECRET), ["journal.redb.keys/alpha", "journal.redb.keys/beta"]);
    let keys = directory.path().join("journal.redb.keys");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&keys), mode(&keys.join("alpha")), mode(&path)), (0o700, 0o600, 0o600));
    journal.append(&gone("alpha")).unwrap();
    assert_eq!(holding(directory.path(), SECRET), ["journal.redb.keys/beta"]);
    journal.append(&begins("alpha", 3)).unwrap();
    drop(journal);
    let (mut journal, state) = Journal::open(&path, Instant(2)).unwrap();
    assert_eq!(private(&state, "alpha").as_deref(), Some(keyed("alpha", 3).keys.private.as_str()));
    assert_eq!(private(&state, "beta").as_deref(), Some(keyed("beta", 2).keys.private.as_str()));
    journal.append(&gone("alpha")).unwrap();
    journal.append(&gone("beta")).unwrap();
    drop(journal);
    assert_eq!(holding(directory.path(), SECRET), [""; 0]);
    drop(Journal::open(&path, Instant(3)).unwrap());
    assert_eq!(holding(directory.path(), SECRET), [""; 0]);
}

/// A journal as versions before this one wrote it: one of its environments has ended, one is there.
fn of_an_earlier_version(path: &std::path::Path) -> State {
    let database = redb::Database::create(path).unwrap();
    let decisions = (0..300).map(|number| Record::V1(decided(number)));
    let begin = [Record::V1(RecordV1::Generation { generation: 1, at: Instant(1) }), begins("alpha", 1), begins("beta", 2)];
    let mut state = State::default();
    for (number, record) in begin.into_iter().chain(decisions).chain([gone("alpha")]).enumerate() {
        state.apply(&record);
        let write = database.begin_write().unwrap();
        let records = redb::TableDefinition::<u64, &[u8]>::new("records");
        let bytes = postcard::to_stdvec(&record).unwrap();
        write.open_table(records).unwrap().insert(number as u64, bytes.as_slice()).unwrap();
        let fence = redb::TableDefinition::<&str, u64>::new("fence");
        write.open_table(fence).unwrap().insert("generation", 1).unwrap();
        write.commit().unwrap();
    }
    state
}

#[test]
fn a_journal_of_an_earlier_version_is_written_anew_without_its_private_keys() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.redb");
    let mut was = of_an_earlier_version(&path);
    assert_eq!(holding(directory.path(), SECRET), ["journal.redb"]);

    let (mut journal, state) = Journal::open(&path, Instant(2)).unwrap();

    was.generation = 2;
    assert_eq!(state, was);
    assert_eq!(holding(directory.path(), SECRET), ["journal.redb.keys/beta"]);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "nothing else is left there");
    // It is locked, fenced and goes on like any other.
    assert!(Journal::open(&path, Instant(3)).is_err());
    journal.append(&gone("beta")).unwrap();
    drop(journal);
    let (_, state) = Journal::open(&path, Instant(3)).unwrap();
    assert_eq!((state.generation, state.environments.len(), state.decisions.len()), (3, 0, 300));
    assert_eq!(holding(directory.path(), SECRET), [""; 0]);
}

#[test]
fn a_journal_that_an_earlier_version_went_on_with_is_written_anew_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.redb");
    let (mut journal, _) = Journal::open(&path, Instant(1)).unwrap();
    journal.append(&begins("alpha", 1)).unwrap();
    drop(journal);
    let write = redb::Database::open(&path).unwrap().begin_write().unwrap();
    let bytes = postcard::to_stdvec(&begins("beta", 2)).unwrap();
    let records = redb::TableDefinition::<u64, &[u8]>::new("records");
    write.open_table(records).unwrap().insert(9, bytes.as_slice()).unwrap();
    write.commit().unwrap();
    assert!(holding(directory.path(), SECRET).contains(&"journal.redb".to_owned()));

    let (_, state) = Journal::open(&path, Instant(2)).unwrap();

    assert_eq!(holding(directory.path(), SECRET), ["journal.redb.keys/alpha", "journal.redb.keys/beta"]);
    assert_eq!(private(&state, "alpha").as_deref(), Some(keyed("alpha", 1).keys.private.as_str()));
}

/// What a manager leaves that is killed while it writes the journal anew, or before or after it records an environment's begin or end.
#[test]
fn a_kill_at_any_place_leaves_neither_a_lost_key_nor_one_too_many() {
    let directory = tempfile::tempdir().unwrap();
    let (path, keys) = (directory.path().join("journal.redb"), directory.path().join("journal.redb.keys"));
    let was = of_an_earlier_version(&path);
    std::fs::write(directory.path().join("journal.redb.new"), [b"half of ", SECRET].concat()).unwrap();
    std::fs::create_dir(&keys).unwrap();
    let file = |number, name: &str| {
        let Keys { public, private } = keyed(name, number).keys;
        format!("{public}{private}")
    };
    std::fs::write(keys.join("beta.new"), file(2, "beta")).unwrap();

    let (journal, state) = Journal::open(&path, Instant(2)).unwrap();
    assert_eq!(
        (holding(directory.path(), SECRET), private(&state, "beta")),
        (vec!["journal.redb.keys/beta".into()], private(&was, "beta"))
    );
    drop(journal);

    // The end of alpha was recorded, its key not yet removed; beta was recorded, its key not yet named; gamma was not recorded; delta
    // is of another journal that was here.
    std::fs::write(keys.join("alpha"), file(1, "alpha")).unwrap();
    std::fs::rename(keys.join("beta"), keys.join("beta.new")).unwrap();
    std::fs::write(keys.join("gamma.new"), file(4, "gamma")).unwrap();
    std::fs::write(keys.join("delta"), file(5, "delta")).unwrap();

    let (journal, state) = Journal::open(&path, Instant(3)).unwrap();
    assert_eq!(holding(directory.path(), SECRET), ["journal.redb.keys/beta", "journal.redb.keys/delta"]);
    assert_eq!(private(&state, "beta"), private(&was, "beta"));
    drop(journal);

    // Lost: the environment is there all the same.
    std::fs::remove_dir_all(&keys).unwrap();
    let (_, state) = Journal::open(&path, Instant(4)).unwrap();
    assert_eq!(private(&state, "beta").as_deref(), Some(""));
}

#[test]
fn a_journal_that_cannot_be_written_anew_is_used_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal.redb");
    let mut was = of_an_earlier_version(&path);
    let in_the_way = directory.path().join("journal.redb.new");
    std::fs::create_dir(&in_the_way).unwrap();

    let (mut journal, state) = Journal::open(&path, Instant(2)).unwrap();

    was.generation = 2;
    assert_eq!(state, was);
    journal.append(&gone("beta")).unwrap();
    drop(journal);
    std::fs::remove_dir(&in_the_way).unwrap();
    assert_eq!(holding(directory.path(), SECRET), ["journal.redb"]);
    drop(Journal::open(&path, Instant(3)).unwrap());
    assert_eq!(holding(directory.path(), SECRET), [""; 0]);
}

/// Nanoseconds since 1970 at which the clock of a test showed 0.
const ZERO: u64 = 1_795_745_000_000_000_000;

fn clock(name: &str, at: u64, utc_ns: u64) -> Record {
    Record::V1(RecordV1::Clock { name: name.into(), at: Instant(at), utc_ns })
}

#[test]
fn times_are_told_as_utc_also_after_a_restart_a_reboot_and_a_clock_that_was_set() {
    const S: u64 = 1_000_000_000;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adaptd.redb");
    let at = |number: u64| Instant(number * S);
    let begins = |number: u64, announced: Instant| {
        let mut seen = migration(number, Outcome::Running, None);
        seen.announced = announced;
        Record::V1(RecordV1::PlanBegins { plan: Box::new(Plan { number, ..plan() }), migrations: vec![seen] })
    };
    let ended = |number: u64, began: Instant, ended: Instant| {
        let seen = Migration { began: Some(began), ..migration(number, Outcome::Done, Some(ended)) };
        Record::V1(RecordV1::MoveEnded(Box::new(seen)))
    };
    let step = |migration: u64, at: Instant| Record::V1(RecordV1::StepBegins { migration, step: 0, at });
    let mut live = State::default();
    {
        let (mut journal, mut state) = Journal::open(&path, at(100)).unwrap();
        let decision = DecisionSeen {
            at: at(105),
            ..match decided(1) {
                RecordV1::Decided { decision, .. } => *decision,
                _ => panic!(),
            }
        };
        for record in [
            clock("boot 1", 100 * S, ZERO),
            Record::V1(RecordV1::Decided { decision: Box::new(decision), snapshot: String::new() }),
            begins(1, at(110)),
            step(1, at(112)),
            Record::V1(RecordV1::Measured { migration: 1, pause: Some((250.0, 1.5)), gap: None }),
            ended(1, at(111), at(115)),
            // The host's time is set, an hour on.
            clock("boot 1", 116 * S, ZERO + 3616 * S),
            begins(2, at(120)),
            step(2, at(121)),
        ] {
            journal.append(&record).unwrap();
            state.apply(&record);
            live = state.clone();
        }
    }
    // Raw times of a former boot are cut to the present one's.
    let seen = |state: &State, number: u64| {
        let told = state.told(&state.migrations[&number]);
        MigrationSeen { migration: migration(number, Outcome::Done, None), ..told }
    };
    let utc = |seconds: u64| Some(violin_common::Utc(ZERO + seconds * S));
    // The machine is booted anew: its clock begins at 0, and what was under way ends then.
    let (mut journal, read) = Journal::open(&path, at(7)).unwrap();
    assert_eq!(seen(&read, 1), seen(&live, 1));
    let mut state = read;
    for record in [clock("boot 2", 7 * S, ZERO + 4000 * S), ended(2, at(121), at(9))] {
        journal.append(&record).unwrap();
        state.apply(&record);
    }

    let first = seen(&state, 1);
    assert_eq!((first.announced_at, first.began_at, first.ended_at), (utc(10), utc(11), utc(15)));
    assert_eq!(first.total_ms, Some(4000.0));
    assert_eq!(first.pause.map(|pause| (pause.ms, pause.error_ms)), Some((250.0, 1.5)));
    assert_eq!(state.told_decision(&state.decisions[0]).decided_at, utc(5));
    let second = seen(&state, 2);
    assert_eq!((second.announced_at, second.began_at, second.ended_at), (utc(3620), utc(3621), utc(4002)));
    assert_eq!(second.total_ms, Some(381_000.0), "a time of one boot was taken from another's");
    drop(journal);
    let (_, again) = Journal::open(&path, at(20)).unwrap();
    assert_eq!((seen(&again, 1), seen(&again, 2)), (first, second));
}

#[test]
fn of_what_an_earlier_version_recorded_no_time_is_made_up() {
    let mut state = State::default();
    let seen = Migration { began: Some(Instant(7_000_000)), ..migration(1, Outcome::Done, Some(Instant(9_000_000))) };
    for record in [
        RecordV1::Generation { generation: 1, at: Instant(1) },
        decided(1),
        RecordV1::PlanBegins { plan: Box::new(plan()), migrations: vec![migration(1, Outcome::Running, None)] },
        RecordV1::MoveEnded(Box::new(seen)),
    ] {
        state.apply(&Record::V1(record));
    }
    state.apply(&clock("boot 1", 100, ZERO));

    let told = state.told(&state.migrations[&1]);

    assert_eq!((told.announced_at, told.began_at, told.ended_at, told.pause), (None, None, None, None));
    assert_eq!(told.total_ms, Some(2.0));
    assert_eq!(state.told_decision(&state.decisions[0]).decided_at, None);
}
