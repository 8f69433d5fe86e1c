//! Text to training batches: which files, which tokenizer, which order.
//!
//! Everything here is a pure function of the files' bytes, a seed and a step number, so that every rank of a job, on
//! any number of ranks and on any machine, agrees on what sequence `i` of step `s` is without a message, and a resumed
//! run reads on exactly where it stopped with no state but the step.
//!
//! ```
//! use lina_data::{Dataset, TokenStream, Tokenizer};
//!
//! let tokenizer = Tokenizer::bytes();
//! let stream = TokenStream::from_text("To be, or not to be: that is the question.", &tokenizer)?;
//! let data = Dataset::split(stream.into(), 8, 0.2, 42)?;
//! let train = &data.train;
//! for sequence in train.batch(0, 2) {
//!     let (input, target) = train.sequence(sequence);
//!     assert_eq!(input[1..], target[..7]);
//! }
//! # Ok::<(), lina_data::DataError>(())
//! ```

mod dataset;
mod error;
mod eval;
mod order;
mod sources;
mod stream;
mod tokenizer;

pub use dataset::{DataConfig, Dataset, TrainingData};
pub use error::DataError;
pub use eval::EvalWindows;
pub use order::{EpochOrder, Permutation};
pub use sources::{Document, Sources};
pub use stream::TokenStream;
pub use tokenizer::Tokenizer;
