//! The command line: it turns arguments into options, calls `lina-train`, and prints what comes back.
//!
//! Results go to stdout, everything else to stderr. With `--json`, stdout holds exactly one JSON object. A command that
//! fails says one sentence, whatever the reason.

mod arguments;
#[cfg(feature = "cuda")]
mod bench_kernels;
mod commands;
mod doctor;
mod generate;
mod inference;
mod output;
mod serve;
mod signals;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use commands::Failure;

fn main() -> ExitCode {
    lina_train::keep_panics_quiet();
    lina_train::set_last_words(last_words);
    let run = || arguments::parse().and_then(|arguments| arguments.map_or(Ok(()), commands::run));
    // Nothing of what a panic left half done is looked at again.
    let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let reason = lina_train::panic_reason(&*panic);
        Err(Failure::new(format_args!("a bug in lina: {reason}; RUST_BACKTRACE=1 says more"), 1))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(message) = failure.message_of_this_rank() {
                say_once(&message);
            }
            linger();
            ExitCode::from(failure.exit_code)
        }
    }
}

/// Says why the process ends, unless that has been said.
fn say_once(message: &str) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        output::say(&format!("error: {message}"));
    }
}

/// A rank that is still computing when its job is lost says why, before the launcher kills it.
fn last_words(error: &lina_train::CommError) {
    say_once(&error.to_string());
    linger();
    std::process::exit(1);
}

/// A launcher that ends a job forwards what a rank has said only while the rank lives, and it ends the job when the
/// first rank exits: by then even a rank in the middle of its computation has spoken.
fn linger() {
    if lina_train::launched_ranks().is_some() {
        std::thread::sleep(std::time::Duration::from_millis(600));
    }
}
