//! Ctrl-C and its relatives: the first asks the run to stop in order, the second ends the process.

use std::sync::atomic::{AtomicBool, Ordering};

use lina_train::StopFlag;

use crate::output;

/// What shells report for a process that ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// Whether a signal has come that was not allowed to end the process.
static ASKED_TO_END: AtomicBool = AtomicBool::new(false);

/// Whether a signal has asked this process to end.
pub(crate) fn asked_to_end() -> bool {
    ASKED_TO_END.load(Ordering::Relaxed)
}

/// The flag that an interruption, a termination or a hang-up requests from now on.
///
/// # Errors
/// If the operating system refuses to deliver them.
pub(crate) fn stop_on_signals(quiet: bool) -> Result<StopFlag, ctrlc::Error> {
    let stop = StopFlag::new();
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.requested() {
            std::process::exit(INTERRUPTED);
        }
        flag.request();
        ASKED_TO_END.store(true, Ordering::Relaxed);
        if !quiet {
            output::say("stopping after this step; ctrl-C again stops at once");
        }
    })?;
    Ok(stop)
}

/// From now on, the first signal of the kind calls `drain`, and a second one ends the process.
///
/// # Errors
/// If the operating system refuses to deliver them.
pub(crate) fn drain_on_signals(quiet: bool, drain: impl Fn() + Send + 'static) -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(move || {
        if ASKED_TO_END.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED);
        }
        drain();
        if !quiet {
            output::say("taking no more requests, answering those that run or wait; ctrl-C again stops at once");
        }
    })
}

/// Makes a write beyond the process's file size limit (`ulimit -f`) an error like that of a full disk, where the
/// system would otherwise kill the process.
///
/// # Errors
/// If the operating system refuses.
#[cfg(unix)]
pub(crate) fn report_file_size_limit() -> std::io::Result<()> {
    // The write itself fails; nobody needs to know that the signal came.
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Default::default()).map(drop)
}

/// Other systems have no such limit.
#[cfg(not(unix))]
pub(crate) fn report_file_size_limit() -> std::io::Result<()> {
    Ok(())
}

/// From now on, the first termination signal changes nothing, and a second one ends the process.
///
/// # Errors
/// If the operating system refuses.
pub(crate) fn ignore_termination() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        if ASKED_TO_END.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED);
        }
    })
}
