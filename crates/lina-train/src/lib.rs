//! Training: optimizer, loop, checkpoints, evaluation, and the comparison of policies.
//!
//! | question | answered by |
//! |---|---|
//! | what is a run told? | [`RunConfig`] (`config`) |
//! | what does a step do on a rank? | `worker`, `optimizer` |
//! | how do ranks start, and what if one fails? | `job`, `mpi_job`, `nccl_job`, [`keep_panics_quiet`] (`panics`) |
//! | what of a rank is on its GPU? | `replica` |
//! | what is left of a run? | [`default_run_folder`] (`run_folder`), `checkpoint`, `observer`, `outputs` |
//! | which rank holds which experts as the run goes on? | `packing` |
//! | how do policies compare? | [`bench_train`] (`bench`) |
//! | how does a step compare with its matrix products? | [`bench_compute`] (`compute`), [`ProductReplay`] (`products`) |
//! | where does a step's time go on a GPU? | [`bench_compute`] (`device_step`), `bench_layer` (`layer`) |
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
#[cfg(feature = "cuda")]
mod device_step;
mod diagnose;
mod error;
mod eval;
mod gather;
mod job;
#[cfg(feature = "cuda")]
mod layer;
mod memory;
#[cfg(feature = "mpi")]
mod mpi_job;
#[cfg(feature = "cuda")]
mod nccl_job;
mod observer;
mod optimizer;
mod outputs;
mod packing;
mod panics;
mod products;
#[cfg_attr(not(feature = "cuda"), path = "no_replica.rs")]
mod replica;
mod residency;
mod run_folder;
mod stop;
mod train;
mod worker;

pub use bench::{BenchOptions, BenchSummary, Studies, bench_train, median};
pub use compute::{ComputeSummary, StepSummary, bench_compute};
pub use config::{
    BenchConfig, ClusterConfig, ClusterSections, ConfigError, DeviceConfig, Engine, LinkConfig, Override, PolicyConfig,
    RunConfig, Scalar, TrainConfig, load_sections,
};
#[cfg(feature = "cuda")]
pub use device_step::{DeviceStepSummary, KernelTime};
pub use diagnose::{PairMeasured, RankDiagnosis, RankMeasured, diagnose_ranks};
pub use error::TrainError;
pub use eval::{EvalOptions, EvalSummary, eval};
pub use job::{JobOutcome, run_job, set_last_words};
#[cfg(feature = "cuda")]
pub use layer::{LayerRow, LayerShape, LayerSummary, bench_layer};
pub use lina_comm::{CommError, launched_rank, launched_ranks, launched_ranks_here};
pub use memory::MemoryPlan;
pub use optimizer::learning_rate;
pub use panics::{keep_panics_quiet, panic_reason};
pub use products::ProductReplay;
pub use run_folder::{default_run_folder, write_whole};
pub use stop::StopFlag;
pub use train::{TrainOptions, TrainSummary, train};
