//! Training: optimizer, loop, checkpoints, evaluation, and the comparison of policies.
//!
//! | question | answered by |
//! |---|---|
//! | what is a run told? | [`RunConfig`] (`config`) |
//! | what does a step do on a rank? | `worker`, `optimizer` |
//! | how do ranks start, and what if one fails? | `job` |
//! | what is left of a run? | `checkpoint`, `observer`, `outputs` |
//! | how do policies compare? | [`bench_train`] (`bench`) |
//! | how does a step compare with its matrix products? | [`bench_compute`] (`compute`) |
//! | does it fit? | [`MemoryPlan`] (`memory`) |

mod bench;
mod checkpoint;
mod compute;
mod config;
mod data;
mod error;
mod eval;
mod job;
mod memory;
mod observer;
mod optimizer;
mod outputs;
mod stop;
mod train;
mod worker;

pub use bench::{BenchOptions, BenchSummary, bench_train};
pub use compute::{ComputeSummary, bench_compute};
pub use config::{
    BenchConfig, ClusterConfig, ConfigError, DeviceConfig, Engine, LinkConfig, Override, PolicyConfig, RunConfig,
    TrainConfig,
};
pub use error::TrainError;
pub use eval::{EvalOptions, EvalSummary, eval};
pub use memory::MemoryPlan;
pub use optimizer::learning_rate;
pub use stop::StopFlag;
pub use train::{TrainOptions, TrainSummary, train};
