//! Writing to people and to scripts, neither of whom must stay until the end: a reader that went away is no error.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;

/// A line on stderr, if anybody listens.
pub(crate) fn say(text: &str) {
    // There is nowhere left to report a broken stderr to.
    let _ = writeln!(io::stderr().lock(), "{}", text.trim_end());
}

/// Lines on stdout.
///
/// # Errors
/// If stdout takes no more for another reason than that its reader is gone.
pub(crate) fn text(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{}", text.trim_end()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// The one JSON object of a command, on stdout.
///
/// # Errors
/// As [`text`].
pub(crate) fn json(summary: &impl Serialize) -> io::Result<()> {
    text(&serde_json::to_string(summary).map_err(io::Error::from)?)
}

/// A result that is a table: on stdout for people; with `as_json`, on stderr beside the object on stdout.
///
/// # Errors
/// As [`text`].
pub(crate) fn table_or_json(as_json: bool, quiet: bool, table: &str, summary: &impl Serialize) -> io::Result<()> {
    if !as_json {
        return text(table);
    }
    if !quiet {
        say(table);
    }
    json(summary)
}
