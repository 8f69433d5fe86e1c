//! Windows over the tokens, apart for training and held out, and the batches made of them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::sources::DEFAULT_TEXT_KEY;
use crate::{DataError, EpochOrder, Sources, TokenStream, Tokenizer};

/// At most this many stretches of text are held out: enough to be of the text's kind, and long enough each to be
/// independent of the training text around it.
const HELD_OUT_STRETCHES: usize = 16;

/// Which text to train on: the keys of a configuration's `[data]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Paths or globs of text and `.jsonl` files.
    pub files: Vec<String>,
    /// Paths or globs of held-out files; when empty, a part of `files` is held out instead.
    pub eval_files: Vec<String>,
    /// Share of the sequences that is held out, at least 0 and below 1; not used with `eval_files`.
    pub eval_fraction: f64,
    /// The key of a JSONL object that holds its text.
    pub text_key: String,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self { files: Vec::new(), eval_files: Vec::new(), eval_fraction: 0.05, text_key: DEFAULT_TEXT_KEY.into() }
    }
}

/// What a training run reads.
#[derive(Clone, Debug)]
pub struct TrainingData {
    /// Sequences to train on.
    pub train: Dataset,
    /// Sequences to measure the loss on; `None` if nothing is held out.
    pub held_out: Option<Dataset>,
}

impl TrainingData {
    /// Reads the files of `config`, tokenizes them and cuts sequences of `sequence_tokens` inputs.
    ///
    /// # Errors
    /// Any [`DataError`]: files, text, tokenizer, or too few tokens.
    pub fn load(
        config: &DataConfig,
        tokenizer: &Tokenizer,
        sequence_tokens: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        check_fraction(config.eval_fraction)?;
        let sources = Sources::from_globs(&config.files)?.with_text_key(&config.text_key);
        if config.eval_files.is_empty() {
            let stream = Arc::new(TokenStream::read(&sources, tokenizer)?);
            return Dataset::split(stream, sequence_tokens, config.eval_fraction, seed);
        }
        let eval_sources = Sources::from_globs(&config.eval_files)?.with_text_key(&config.text_key);
        sources.check_disjoint(&eval_sources)?;
        let train = Dataset::whole(TokenStream::read(&sources, tokenizer)?.into(), sequence_tokens, seed, "training")?;
        let held_out =
            Dataset::whole(TokenStream::read(&eval_sources, tokenizer)?.into(), sequence_tokens, seed, "held-out")?;
        Ok(Self { train, held_out: Some(held_out) })
    }
}

/// Sequences of equal length and their order.
///
/// Window `w` of the text holds tokens `w·T` to `w·T + T` (both included): `T` inputs, and as targets the same tokens
/// one later. Neighbours share one token, the last target of one and the first input of the next, so that every token
/// but the first is predicted exactly once.
///
/// A dataset has no state. The only thing that a run keeps is its step number.
#[derive(Clone, Debug)]
pub struct Dataset {
    stream: Arc<TokenStream>,
    sequence_tokens: usize,
    windows: Vec<u32>,
    order: EpochOrder,
}

impl Dataset {
    /// Cuts a stream into training and held-out sequences. About `eval_fraction` of all windows is held out, at least
    /// one if the fraction is above 0, in up to 16 contiguous stretches, one in the middle of each equal section of the
    /// text: whole stretches, so that training on a neighbour tells nothing about them, and spread out, so that both
    /// parts are of one kind even where the text changes along the way.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if there is no window for each part, [`DataError::Setting`] for a length of 0 or a
    /// fraction outside `0..1`, [`DataError::TooManyWindows`].
    pub fn split(
        stream: Arc<TokenStream>,
        sequence_tokens: usize,
        eval_fraction: f64,
        seed: u64,
    ) -> Result<TrainingData, DataError> {
        check_fraction(eval_fraction)?;
        let windows = count_windows(&stream, sequence_tokens, "training")?;
        let (train, held_out) = hold_out(windows, eval_fraction);
        if train.is_empty() && windows > 1 {
            return Err(DataError::Setting {
                key: "eval_fraction",
                found: format!("{eval_fraction} of {windows} sequences, all of them"),
                expected: "a fraction that leaves some to train on",
            });
        }
        if train.is_empty() {
            return Err(DataError::TooShort {
                part: "training",
                found_tokens: stream.len(),
                sequence_tokens,
                needed_tokens: 2 * sequence_tokens + 1,
                reason: "one sequence to train on and one held out, and the last token's target",
            });
        }
        let held_out =
            (!held_out.is_empty()).then(|| Self::of_windows(stream.clone(), sequence_tokens, held_out, seed));
        Ok(TrainingData { train: Self::of_windows(stream, sequence_tokens, train, seed), held_out })
    }

    /// Cuts a whole stream into sequences. `part` names the data in errors.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if there is no window, [`DataError::Setting`] for a length of 0,
    /// [`DataError::TooManyWindows`].
    pub fn whole(
        stream: Arc<TokenStream>,
        sequence_tokens: usize,
        seed: u64,
        part: &'static str,
    ) -> Result<Self, DataError> {
        let windows = count_windows(&stream, sequence_tokens, part)?;
        Ok(Self::of_windows(stream, sequence_tokens, (0..windows).collect(), seed))
    }

    fn of_windows(stream: Arc<TokenStream>, sequence_tokens: usize, windows: Vec<u32>, seed: u64) -> Self {
        let order = EpochOrder::new(windows.len() as u64, seed);
        Self { stream, sequence_tokens, windows, order }
    }

    /// Number of sequences, at least 1.
    pub fn sequences(&self) -> usize {
        self.windows.len()
    }

    /// Inputs (and targets) of a sequence.
    pub fn sequence_tokens(&self) -> usize {
        self.sequence_tokens
    }

    /// The text that the windows lie in, shared by the training and the held-out part.
    pub fn stream(&self) -> &TokenStream {
        &self.stream
    }

    /// The sequences of a global batch, in order: `batch_sequences` indices below [`Dataset::sequences`], for
    /// [`Dataset::sequence`]. Each epoch has every sequence once, in a permutation that depends on the seed and the
    /// epoch only; a batch at the end of an epoch goes on in the next. A rank takes its part of the iterator.
    pub fn batch(&self, step: u64, batch_sequences: usize) -> impl ExactSizeIterator<Item = usize> + Clone + use<> {
        self.order.range(step * batch_sequences as u64, batch_sequences).map(|index| index as usize)
    }

    /// Epochs that are over once `steps` batches have been trained on.
    pub fn epochs_after(&self, steps: u64, batch_sequences: usize) -> f64 {
        steps as f64 * batch_sequences as f64 / self.sequences() as f64
    }

    /// Inputs and targets of sequence `index`, `sequence_tokens` each. Sequences are numbered along the text.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::sequences`].
    pub fn sequence(&self, index: usize) -> (&[u32], &[u32]) {
        let start = self.start(index);
        let window = &self.stream.tokens()[start..=start + self.sequence_tokens];
        (&window[..self.sequence_tokens], &window[1..])
    }

    /// Positions within the inputs of sequence `index` at which a document begins, ascending: where attention is to be
    /// cut, if documents shall not see each other.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::sequences`].
    pub fn document_starts(&self, index: usize) -> impl Iterator<Item = usize> + '_ {
        let start = self.start(index);
        self.stream.document_starts_in(start..start + self.sequence_tokens).iter().map(move |position| position - start)
    }

    fn start(&self, index: usize) -> usize {
        self.windows[index] as usize * self.sequence_tokens
    }
}

fn check_fraction(eval_fraction: f64) -> Result<(), DataError> {
    if (0.0..1.0).contains(&eval_fraction) {
        return Ok(());
    }
    Err(DataError::Setting {
        key: "eval_fraction",
        found: eval_fraction.to_string(),
        expected: "a number of at least 0 and below 1",
    })
}

/// Whole windows in a stream, at least one.
fn count_windows(stream: &TokenStream, sequence_tokens: usize, part: &'static str) -> Result<u32, DataError> {
    if sequence_tokens == 0 {
        return Err(DataError::Setting {
            key: "sequence_tokens",
            found: "0".into(),
            expected: "a number of at least 1",
        });
    }
    let windows = stream.len().saturating_sub(1) / sequence_tokens;
    if windows == 0 {
        return Err(DataError::TooShort {
            part,
            found_tokens: stream.len(),
            sequence_tokens,
            needed_tokens: sequence_tokens.saturating_add(1),
            reason: "one sequence and the last token's target",
        });
    }
    u32::try_from(windows).map_err(|_| DataError::TooManyWindows { windows })
}

/// The training and the held-out windows of `0..windows`, both ascending.
fn hold_out(windows: u32, fraction: f64) -> (Vec<u32>, Vec<u32>) {
    let total = windows as usize;
    let wanted = if fraction > 0.0 { ((total as f64 * fraction).round() as usize).max(1) } else { 0 };
    let stretches = wanted.min(HELD_OUT_STRETCHES);
    let mut is_held_out = vec![false; total];
    for stretch in 0..stretches {
        // Integer shares of equal sections: exact, and never two stretches at one place.
        let section = total * stretch / stretches..total * (stretch + 1) / stretches;
        let length = wanted * (stretch + 1) / stretches - wanted * stretch / stretches;
        let from = section.start + section.len().saturating_sub(length) / 2;
        is_held_out[from..(from + length).min(section.end)].fill(true);
    }
    (0..windows).partition(|&window| !is_held_out[window as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream whose token at position `i` is byte `i % 256`.
    fn counting(tokens: usize) -> Arc<TokenStream> {
        let text: String = (0..tokens).map(|position| (position % 128) as u8 as char).collect();
        Arc::new(TokenStream::from_text(&text, &Tokenizer::bytes()).unwrap())
    }

    #[test]
    fn targets_are_the_next_inputs() {
        let data = Dataset::whole(counting(26), 8, 0, "training").unwrap();
        assert_eq!(data.sequences(), 3);
        let (input, target) = data.sequence(1);
        assert_eq!(input, [8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(target, [9, 10, 11, 12, 13, 14, 15, 16]);
        assert_eq!(Dataset::whole(counting(25), 8, 0, "training").unwrap().sequences(), 3);
        assert_eq!(Dataset::whole(counting(24), 8, 0, "training").unwrap().sequences(), 2);
    }

    #[test]
    fn an_epoch_has_every_sequence_once_whatever_the_batch() {
        let data = Dataset::whole(counting(8 * 30 + 1), 8, 5, "training").unwrap();
        for batch_sequences in [1, 4, 7, 30, 45] {
            let steps = 90u64.div_ceil(batch_sequences as u64);
            let order: Vec<usize> = (0..steps).flat_map(|step| data.batch(step, batch_sequences)).collect();
            for epoch in order.chunks_exact(30) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                assert!(epoch.into_iter().eq(0..30), "batches of {batch_sequences}");
            }
        }
        assert_eq!(data.batch(3, 8).len(), 8);
        assert_eq!(data.epochs_after(3, 15), 1.5);
    }

    #[test]
    fn held_out_stretches_are_spread_and_complete() {
        for windows in [2, 3, 10, 19, 100, 4096] {
            for fraction in [0.001, 0.05, 0.3, 0.5] {
                let (train, held_out) = hold_out(windows, fraction);
                let expected = ((windows as f64 * fraction).round() as usize).max(1);
                assert_eq!(held_out.len(), expected, "{windows} windows, {fraction}");
                assert_eq!(train.len() + held_out.len(), windows as usize);
            }
        }
        let (_, held_out) = hold_out(4096, 0.05);
        assert_eq!(held_out.chunk_by(|a, b| a + 1 == *b).count(), 16);
        assert_eq!(hold_out(10, 0.2).1, [2, 7]);
        assert!(hold_out(10, 0.0).1.is_empty());
    }

    #[test]
    fn no_held_out_token_is_ever_a_training_target() {
        let data = Dataset::split(counting(8 * 40 + 1), 8, 0.2, 1).unwrap();
        let held_out = data.held_out.unwrap();
        let targets = |part: &Dataset| -> Vec<usize> {
            (0..part.sequences()).flat_map(|index| part.start(index) + 1..=part.start(index) + 8).collect()
        };
        let mut all = [targets(&data.train), targets(&held_out)].concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(1..=320));
    }

    #[test]
    fn document_starts_are_relative_to_the_sequence() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.jsonl");
        std::fs::write(&file, "{\"text\": \"abc\"}\n{\"text\": \"de\"}\n{\"text\": \"fgh\"}").unwrap();
        let sources = Sources::from_globs(&[file.to_str().unwrap()]).unwrap();
        let stream = TokenStream::read(&sources, &Tokenizer::bytes()).unwrap();
        let data = Dataset::whole(stream.into(), 3, 0, "training").unwrap();
        assert_eq!(data.document_starts(0).collect::<Vec<_>>(), [0]);
        assert_eq!(data.document_starts(1).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn short_data_says_how_short() {
        let message = |result: Result<TrainingData, DataError>| result.unwrap_err().to_string();
        assert_eq!(
            message(Dataset::split(counting(8), 8, 0.0, 0)),
            "the training data has 8 tokens; sequences of 8 tokens need at least 9 (one sequence and the last token's target)"
        );
        assert_eq!(
            message(Dataset::split(counting(16), 8, 0.1, 0)),
            "the training data has 16 tokens; sequences of 8 tokens need at least 17 (one sequence to train on and one held out, and the last token's target)"
        );
        assert!(Dataset::split(counting(17), 8, 0.1, 0).is_ok());
        assert!(Dataset::split(counting(9), 8, 0.0, 0).unwrap().held_out.is_none());
    }

    #[test]
    fn settings_have_ranges() {
        for fraction in [-0.1, 1.0, f64::NAN] {
            let message = Dataset::split(counting(100), 8, fraction, 0).unwrap_err().to_string();
            assert!(message.starts_with("`eval_fraction` is "), "{message}");
        }
        assert_eq!(
            Dataset::split(counting(100), 0, 0.1, 0).unwrap_err().to_string(),
            "`sequence_tokens` is 0; expected a number of at least 1"
        );
    }

    #[test]
    fn held_out_files_can_be_given() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = folder.path().join(name);
            std::fs::write(&file, text).unwrap();
            file.to_str().unwrap().to_string()
        };
        let (train, eval) = (write("train.txt", &"ab".repeat(40)), write("eval.txt", "0123456789"));
        let config = |eval_files| DataConfig { files: vec![train.clone()], eval_files, ..DataConfig::default() };
        let load = |config: &DataConfig, tokens| TrainingData::load(config, &Tokenizer::bytes(), tokens, 0);

        let data = load(&config(vec![eval.clone()]), 4).unwrap();
        assert_eq!(data.train.sequences(), 19);
        assert_eq!(data.held_out.unwrap().sequence(0).0, [48, 49, 50, 51]);
        let message = load(&config(vec![eval]), 12).unwrap_err().to_string();
        assert!(message.starts_with("the held-out data has 10 tokens"), "{message}");
        assert!(matches!(load(&config(vec![train.clone()]), 4), Err(DataError::InBothParts { .. })));
        assert_eq!(load(&config(vec![]), 4).unwrap().held_out.unwrap().sequences(), 1);
    }
}
