//! Training: optimizer, loop, checkpoints, evaluation, and the comparison of policies.
//!
//! | question | answered by |
//! |---|---|
//! | what is a run told? | [`RunConfig`] (`config`) |
//! | what does a step do on a rank? | `worker`, `optimizer` |
//! | how do ranks start, and what if one fails? | `job`, `mpi_job`, `launcher`, [`keep_panics_quiet`] (`panics`) |
//! | what is left of a run? | [`default_run_folder`] (`run_folder`), `checkpoint`, `observer`, `outputs` |
//! | which rank holds which experts as the run goes on? | `packing` |
//! | how do policies compare? | [`bench_train`] (`bench`) |
//! | how does a step compare with its matrix products? | [`bench_compute`] (`compute`), [`ProductReplay`] (`products`) |
//! | which rank, host or link is slow? | [`diagnose_ranks`] (`diagnose`) |
//! | does it fit? | [`MemoryPlan`] (`memory`) |

mod adaptation;
#[cfg(test)]
mod alone;
mod bench;
mod checkpoint;
mod compute;
mod config;
mod data;
mod diagnose;
mod error;
mod eval;
mod gather;
mod job;
mod launcher;
mod memory;
#[cfg(feature = "mpi")]
mod mpi_job;
mod observer;
mod optimizer;
mod outputs;
mod packing;
mod panics;
mod products;
mod residency;
mod run_folder;
mod stop;
mod train;
mod worker;

pub use bench::{BenchOptions, BenchSummary, Studies, bench_train, median};
pub use compute::{ComputeSummary, bench_compute};
pub use config::{
    BenchConfig, ClusterConfig, ClusterSections, ConfigError, DeviceConfig, Engine, LinkConfig, Override, PolicyConfig,
    RunConfig, TrainConfig, load_sections,
};
pub use diagnose::{PairMeasured, RankDiagnosis, RankMeasured, diagnose_ranks};
pub use error::TrainError;
pub use eval::{EvalOptions, EvalSummary, eval};
pub use job::{JobOutcome, run_job};
pub use launcher::{launched_rank, launched_ranks};
#[cfg(feature = "mpi")]
pub use lina_comm::CommError;
pub use memory::MemoryPlan;
#[cfg(feature = "mpi")]
pub use mpi_job::set_last_words;
pub use optimizer::learning_rate;
pub use panics::{keep_panics_quiet, panic_reason};
pub use products::ProductReplay;
pub use run_folder::{default_run_folder, write_whole};
pub use stop::StopFlag;
pub use train::{TrainOptions, TrainSummary, train};
