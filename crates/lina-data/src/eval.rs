//! Windows for measuring a loss that other tools can reproduce: in the text's order, without overlap.

use crate::{DataError, TokenStream};

/// Consecutive windows of `T` tokens, `T − 1` predictions each; a last partial window is dropped.
///
/// Unlike training sequences, windows share no token, so the first token of each is never predicted: this is how
/// a script with `transformers` scores `input_ids[i·T..(i+1)·T]` with `labels = input_ids`.
#[derive(Clone, Copy, Debug)]
pub struct EvalWindows<'a> {
    tokens: &'a [u32],
    window_tokens: usize,
}

impl<'a> EvalWindows<'a> {
    /// The windows of a stream.
    ///
    /// # Errors
    /// [`DataError::Setting`] for windows of less than 2 tokens, [`DataError::TooShort`] if there is no whole window.
    pub fn new(stream: &'a TokenStream, window_tokens: usize) -> Result<Self, DataError> {
        if window_tokens < 2 {
            let found = window_tokens.to_string();
            return Err(DataError::Setting { key: "seq-tokens", found, expected: "a number of at least 2" });
        }
        if stream.len() < window_tokens {
            return Err(DataError::TooShort {
                part: "evaluation",
                found_tokens: stream.len(),
                sequence_tokens: window_tokens,
                needed_tokens: window_tokens,
                reason: "one whole window",
            });
        }
        Ok(Self { tokens: stream.tokens(), window_tokens })
    }

    /// Number of windows, at least 1.
    pub fn windows(&self) -> usize {
        self.tokens.len() / self.window_tokens
    }

    /// Tokens predicted in all windows.
    pub fn predicted_tokens(&self) -> usize {
        self.windows() * (self.window_tokens - 1)
    }

    /// Inputs and targets of a window, `T − 1` each.
    ///
    /// # Panics
    /// If `index` is not below [`EvalWindows::windows`].
    pub fn window(&self, index: usize) -> (&'a [u32], &'a [u32]) {
        let window = &self.tokens[index * self.window_tokens..(index + 1) * self.window_tokens];
        (&window[..self.window_tokens - 1], &window[1..])
    }

    /// All windows in order, as [`EvalWindows::window`] gives them.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&'a [u32], &'a [u32])> + use<'a> {
        let windows = *self;
        (0..self.windows()).map(move |index| windows.window(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;

    #[test]
    fn windows_are_consecutive_and_whole() {
        let stream = TokenStream::from_text("abcdefgh", &Tokenizer::bytes()).unwrap();
        let windows = EvalWindows::new(&stream, 3).unwrap();
        let pairs: Vec<_> = windows.iter().collect();
        assert_eq!(pairs, [(&[97, 98][..], &[98, 99][..]), (&[100, 101][..], &[101, 102][..])]);
        assert_eq!((windows.windows(), windows.predicted_tokens()), (2, 4));
    }

    #[test]
    fn one_window_is_needed() {
        let stream = TokenStream::from_text("abc", &Tokenizer::bytes()).unwrap();
        assert_eq!(
            EvalWindows::new(&stream, 4).unwrap_err().to_string(),
            "the evaluation data has 3 tokens; sequences of 4 tokens need at least 4 (one whole window)"
        );
        assert!(EvalWindows::new(&stream, 1).unwrap_err().to_string().contains("`seq-tokens` is 1"));
        assert_eq!(EvalWindows::new(&stream, 3).unwrap().windows(), 1);
    }
}
