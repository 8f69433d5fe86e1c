//! How far a run is, on stderr: a bar on a terminal, now and then a plain line elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::format::{significant, thousands, wait};

/// Seconds between plain lines: a log of a night's run stays readable.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// What there is to say of a finished step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepProgress {
    /// Steps done, this one included.
    pub steps_done: u64,
    /// The step's training loss.
    pub loss: f64,
    /// Tokens of the global batch over the step's time.
    pub tokens_per_s: f64,
    /// Time with an all-to-all on the wire.
    pub a2a_ms: f64,
    /// Whether the times are virtual.
    pub emulated: bool,
}

/// Shows a run's progress on stderr; stdout stays free for results.
#[derive(Debug)]
pub struct Progress {
    output: Output,
    first_step: u64,
    total_steps: u64,
    started: Instant,
}

#[derive(Debug)]
enum Output {
    Bar(ProgressBar),
    Plain { last_line: Option<Instant> },
    Silent,
}

impl Progress {
    /// For a run of `total_steps` of which `first_step` are done already (0, or more on resume). A bar if stderr is a
    /// terminal, else a line for the first step, the last one, and every 10 seconds between.
    pub fn new(first_step: u64, total_steps: u64) -> Self {
        let output = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total_steps), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}") {
                bar.set_style(style.progress_chars("━━─"));
            }
            bar.set_position(first_step);
            Output::Bar(bar)
        } else {
            Output::Plain { last_line: None }
        };
        Self { output, first_step, total_steps, started: Instant::now() }
    }

    /// Shows nothing: for ranks other than the first, and for tests.
    pub fn silent() -> Self {
        Self { output: Output::Silent, first_step: 0, total_steps: 0, started: Instant::now() }
    }

    /// Reports a finished step.
    pub fn step(&mut self, step: &StepProgress) {
        self.show("step", step.steps_done, &describe(step));
    }

    /// Reports that `done` parts of something else than steps are done; `what` they are, in a word or two.
    pub fn reached(&mut self, what: &str, done: u64) {
        self.show(what, done, "");
    }

    fn show(&mut self, what: &str, done: u64, details: &str) {
        let left = self.remaining(done, self.started.elapsed());
        let left = left.map_or_else(String::new, |seconds| format!("  left {}", wait(seconds)));
        match &mut self.output {
            Output::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(if details.is_empty() { format!("{what}{left}") } else { format!("{details}{left}") });
            }
            Output::Plain { last_line } => {
                let due = last_line.is_none_or(|at| at.elapsed() >= PLAIN_INTERVAL);
                if due || done >= self.total_steps {
                    *last_line = Some(Instant::now());
                    let details = if details.is_empty() { String::new() } else { format!("  {details}") };
                    say(&format!("{what} {done}/{}{details}{left}", self.total_steps));
                }
            }
            Output::Silent => {}
        }
    }

    /// Says a sentence above the bar, or as a line of its own.
    pub fn note(&self, sentence: &str) {
        match &self.output {
            Output::Bar(bar) => bar.suspend(|| say(sentence)),
            Output::Plain { .. } => say(sentence),
            Output::Silent => {}
        }
    }

    /// Leaves the last state of the bar on the terminal.
    pub fn finish(self) {
        if let Output::Bar(bar) = self.output {
            bar.abandon();
        }
    }

    /// Wall-clock time until the last step, at the mean rate of this run's steps.
    fn remaining(&self, steps_done: u64, elapsed: Duration) -> Option<f64> {
        let done = steps_done.checked_sub(self.first_step).filter(|&done| done > 0)?;
        let left = self.total_steps.saturating_sub(steps_done);
        Some(elapsed.as_secs_f64() / done as f64 * left as f64)
    }
}

fn describe(step: &StepProgress) -> String {
    let clock = if step.emulated { " (emulated)" } else { "" };
    format!(
        "loss {:.4}  {} tokens/s  all-to-all {} ms{clock}",
        step.loss,
        thousands(step.tokens_per_s.round() as u64),
        significant(step.a2a_ms),
    )
}

/// A line on stderr. A closed stderr is no reason to end a run, as `eprintln!` would.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_matters() {
        let step = StepProgress { steps_done: 3, loss: 4.56789, tokens_per_s: 12_345.6, a2a_ms: 3.456, emulated: true };
        assert_eq!(describe(&step), "loss 4.5679  12,346 tokens/s  all-to-all 3.46 ms (emulated)");
        assert_eq!(
            describe(&StepProgress { emulated: false, ..step }),
            "loss 4.5679  12,346 tokens/s  all-to-all 3.46 ms"
        );
    }

    #[test]
    fn the_time_left_counts_this_runs_steps_only() {
        let progress = Progress { first_step: 10, total_steps: 20, ..Progress::silent() };
        assert_eq!(progress.remaining(12, Duration::from_secs(4)), Some(16.0));
        assert_eq!(progress.remaining(10, Duration::from_secs(4)), None);
        assert_eq!(progress.remaining(20, Duration::from_secs(4)), Some(0.0));
    }
}
