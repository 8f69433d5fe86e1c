//! Tests that need a process of their own: what they look at (allocations, stderr, the panic hook) is the process's.

use std::process::{Command, Output};

/// Says to a test that it is alone.
const ALONE: &str = "LINA_TEST_ALONE";

/// Whether this is the process of the test named `test`, with its path.
pub(crate) fn is_alone(test: &str) -> bool {
    std::env::var(ALONE).is_ok_and(|name| name == test)
}

/// Runs the test named `test` again, in a process of its own.
pub(crate) fn run_alone(test: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(ALONE, test)
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap()
}
