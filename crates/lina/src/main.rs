//! The command line: it turns arguments into options, calls `lina-train`, and prints what comes back.
//!
//! Results go to stdout, everything else to stderr. With `--json`, stdout holds exactly one JSON object.

mod arguments;
mod commands;
mod doctor;
mod output;
mod signals;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match commands::run(arguments::Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::say(&format!("error: {}", failure.message));
            ExitCode::from(failure.exit_code)
        }
    }
}
