//! What people see of a run: the trace, the report, tables, progress and metrics.
//!
//! This crate only presents. Its inputs are plain structs that a caller fills, so it knows nothing of models, policies
//! or engines, and can be tested without them. Whatever was timed on a virtual clock is called emulated wherever it is
//! shown.

mod error;
mod files;
mod format;
mod html;
mod metrics;
mod paper;
mod policy;
mod progress;
mod studies;
mod table;
mod trace;

pub use error::ReportError;
pub use html::{
    BenchTables, ExpertLoad, InferenceComparison, LayerAccuracyNumbers, LayerLoad, LossCurve, PolicyComparison, Report,
    RunFacts, SchedulerResult, StepTime, Timeline,
};
pub use metrics::MetricsWriter;
pub use paper::PaperRow;
pub use policy::{PolicyRow, policy_table};
pub use progress::{Progress, StepProgress};
pub use studies::{paper_table, partition_table, pipelining_table};
pub use table::{Align, Table};
pub use trace::{Lane, TraceFacts, TraceSpan, TraceWriter};
