//! Ctrl-C and its relatives: the first asks the run to stop in order, the second ends the process.

use lina_train::StopFlag;

use crate::output;

/// What shells report for a process that ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// The flag that an interruption, a termination or a hang-up requests from now on.
///
/// # Errors
/// If the operating system refuses to deliver them.
pub(crate) fn stop_on_signals() -> Result<StopFlag, ctrlc::Error> {
    let stop = StopFlag::new();
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.requested() {
            std::process::exit(INTERRUPTED);
        }
        flag.request();
        output::say("stopping after this step; ctrl-C again stops at once");
    })?;
    Ok(stop)
}
