//! Tables for people, JSON for programs.

use anyhow::Result;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use std::io::Write as _;

/// `println!` that ends the program, as SIGPIPE would, when nobody reads any more: `violin watch | head -1` is no panic.
macro_rules! say {
    ($($words:tt)*) => { $crate::table::line(format_args!($($words)*)) };
}
pub(crate) use say;

/// Status of a program whose reader has gone: 128 + SIGPIPE.
const NO_READER: i32 = 141;

/// Prints a line; see [`say`].
pub(crate) fn line(words: std::fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = writeln!(out, "{words}").and_then(|()| out.flush()) {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            std::process::exit(NO_READER);
        }
        eprintln!("violin: cannot write to the standard output: {error}");
        std::process::exit(1);
    }
}

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// As JSON.
    pub(crate) json: bool,
}

impl Output {
    /// Prints `values` as JSON, or as a table of `head` with a row for each.
    pub(crate) fn list<T: Serialize, const N: usize>(
        self,
        values: &[T],
        head: [&str; N],
        row: impl Fn(&T) -> [String; N],
    ) -> Result<()> {
        if self.json {
            return self.value(&values);
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled).set_header(head);
        for value in values {
            table.add_row(row(value));
        }
        say!("{table}");
        Ok(())
    }

    /// Prints one value as JSON.
    pub(crate) fn value<T: Serialize>(self, value: &T) -> Result<()> {
        say!("{}", serde_json::to_string_pretty(value)?);
        Ok(())
    }

    /// Prints words; nothing as JSON.
    pub(crate) fn words(self, words: &str) {
        if !self.json {
            say!("{words}");
        }
    }
}

/// `0.973` as `97 %`.
pub(crate) fn percent(fraction: f64) -> String {
    format!("{:.0} %", fraction * 100.0)
}

/// `-` for nothing.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Items joined by commas, `-` for none.
pub(crate) fn joined<T: ToString>(items: &[T]) -> String {
    if items.is_empty() { "-".to_owned() } else { items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",") }
}
