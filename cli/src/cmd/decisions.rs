//! `decisions`, `migrations`, `why`, `mode`, `watch`: what the manager thinks and does.

use super::times::without_raw;
use crate::table::{Output, or_dash, say};
use crate::target::Target;
use anyhow::{Result, bail};
use std::ops::ControlFlow;
use violin_common::api::adapt::{AdaptReply, AdaptRequest, DecisionTold, Event, MigrationSeen, Mode, Outcome};
use violin_common::{Utc, VmId};

/// What the manager does with its decisions.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum ModeWord {
    /// Decide and act.
    Act,
    /// Decide, write down, begin no move.
    DryRun,
    /// Observe only.
    Observe,
}

/// A mode as operators write it.
const fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Act => "act",
        Mode::DryRun => "dry-run",
        Mode::Observe => "observe",
    }
}

/// Shows or sets the mode.
pub(crate) fn mode(target: &Target, output: Output, new: Option<ModeWord>) -> Result<()> {
    if let Some(new) = new {
        let mode = match new {
            ModeWord::Act => Mode::Act,
            ModeWord::DryRun => Mode::DryRun,
            ModeWord::Observe => Mode::Observe,
        };
        target.ask(&AdaptRequest::SetMode(mode))?;
    }
    let AdaptReply::Status(status) = target.ask(&AdaptRequest::Status)? else { bail!("the manager answered another question") };
    if output.json {
        return output.value(&status);
    }
    say!(
        "policy {}, mode {}, generation {}, {} hosts, {} VMs, {} moving (adaptd {})",
        status.policy,
        word(status.mode),
        status.generation,
        status.hosts,
        status.vms,
        status.moving,
        status.version
    );
    if status.log_lines_lost > 0 {
        say!("{} lines of the manager's log were lost: its standard error did not take them", status.log_lines_lost);
    }
    Ok(())
}

/// Lists decisions.
pub(crate) fn decisions(target: &Target, output: Output, last: u32) -> Result<()> {
    let AdaptReply::Decisions(decisions) = target.ask(&AdaptRequest::DecisionList { last })? else {
        bail!("the manager answered another question")
    };
    if output.json {
        return output.value(&without_raw(&decisions)?);
    }
    for decision in &decisions {
        print_decision(decision);
    }
    if decisions.is_empty() {
        say!("no decisions yet");
    }
    Ok(())
}

fn print_decision(decision: &DecisionTold) {
    let (number, at) = (decision.number, or_dash(decision.decided_at));
    say!("decision {number} of {at} ({}, {}): {}", decision.policy, word(decision.mode), decision.reason);
    for line in &decision.moves {
        say!("  move    {line}");
    }
    for term in &decision.terms {
        say!("  score   {} {:.3} -> {:.3} {}", term.name, term.before, term.after, term.unit);
    }
    for line in &decision.refusals {
        say!("  refused {line}");
    }
}

/// Lists moves.
pub(crate) fn migrations(target: &Target, output: Output) -> Result<()> {
    let AdaptReply::Migrations(migrations) = target.ask(&AdaptRequest::MigrationList)? else {
        bail!("the manager answered another question")
    };
    super::vm::print_migrations(output, &migrations)
}

/// Tells why a VM is where it is.
pub(crate) fn why(target: &Target, output: Output, vm: VmId) -> Result<()> {
    let AdaptReply::Words(words) = target.ask(&AdaptRequest::Why { vm })? else { bail!("the manager answered another question") };
    if output.json {
        return output.value(&words);
    }
    say!("{words}");
    Ok(())
}

/// Prints events as they happen.
pub(crate) fn watch(target: &Target, output: Output) -> Result<()> {
    let print = |reply| {
        let AdaptReply::Event(event) = reply else { return ControlFlow::Continue(()) };
        if output.json {
            match without_raw(&event) {
                Ok(line) => say!("{line}"),
                Err(error) => eprintln!("event not printable: {error}"),
            }
            return ControlFlow::Continue(());
        }
        let told = |what: &str, at: Option<Utc>, migration: &MigrationSeen| {
            say!(
                "{} {what} move {}: {} {} -> {} ({})",
                or_dash(at),
                migration.number,
                migration.vm,
                migration.from,
                migration.to,
                migration.reason
            );
        };
        match &event {
            Event::Decided(decision) => print_decision(decision),
            Event::Announced(migration) => told("announced", migration.announced_at, migration),
            Event::Began(migration) => told("began", migration.began_at, migration),
            Event::Ended(migration) => {
                told("ended", migration.ended_at, migration);
                if let Outcome::Undone(why) = &migration.outcome {
                    say!("  undone  {why}");
                }
            }
            Event::Host { host, connected } => say!("host {host} {}", if *connected { "connected" } else { "lost" }),
        }
        ControlFlow::Continue(())
    };
    target.stream(&AdaptRequest::Watch, print)?;
    bail!("the manager ended the connection; its log says more")
}
