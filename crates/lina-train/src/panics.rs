//! Panics as values: where a rank's panic came from, without the default message on stderr.
//!
//! A panic that is caught has lost its place in the code by then, so a hook notes it on the panicking thread.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{PanicHookInfo, set_hook, take_hook};

thread_local! {
    /// The last panic of this thread, with its place.
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Name of a rank's thread, before its number.
pub(crate) const RANK_THREAD: &str = "lina-rank-";

/// From now on, panics of ranks and of the main thread print nothing: whoever catches them has [`panic_reason`] to say
/// it in one sentence. Panics of other threads print as ever, and so do all where `RUST_BACKTRACE` asks for more.
pub fn keep_panics_quiet() {
    let print = take_hook();
    set_hook(Box::new(move |panic| {
        LAST.set(Some(describe(panic)));
        let wanted = std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0");
        let caught = std::thread::current().name().is_some_and(|name| name == "main" || name.starts_with(RANK_THREAD));
        if wanted || !caught {
            print(panic);
        }
    }));
}

/// What a panic caught on this thread said, and, after [`keep_panics_quiet`], where it happened. One line.
pub fn panic_reason(panic: &(dyn Any + Send)) -> String {
    let reason = LAST.take().unwrap_or_else(|| message(panic).to_owned());
    reason.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn describe(panic: &PanicHookInfo<'_>) -> String {
    let message = message(panic.payload());
    panic
        .location()
        .map_or_else(|| message.to_owned(), |place| format!("{message} (at {}:{})", place.file(), place.line()))
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    message.unwrap_or("without a message")
}
