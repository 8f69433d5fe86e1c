//! An answer as text: what may be shown when, and where a stop string ends it.

use lina_data::Tokenizer;

use crate::{InferError, TextDecoder};

/// Finds the first of several strings in a text that comes in pieces.
///
/// Text that may be the beginning of a stop string is held back until it is certain. Of several strings, the one that is
/// complete first counts, so that the result does not depend on the pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher for these strings; empty ones are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        StopMatcher { stops, held: String::new(), stopped: false }
    }

    /// The text that is certain with another piece, which ends before a stop string; nothing after one.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        let ends = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|begin| (begin + stop.len(), begin)));
        if let Some((_, begin)) = ends.min() {
            self.stopped = true;
            self.held.truncate(begin);
            return std::mem::take(&mut self.held);
        }
        let held = self.stops.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - held);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back, when nothing follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest end of `text` with which `stop` begins.
fn begun(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).skip(1);
    lengths.filter(|&at| text.ends_with(&stop[..at])).last().unwrap_or(0)
}

/// The text of an answer as its tokens come.
#[derive(Clone, Debug)]
pub struct Completion {
    decoder: TextDecoder,
    matcher: StopMatcher,
}

impl Completion {
    /// An answer to `prompt` that ends before the first of `stops`.
    pub fn new(tokenizer: Tokenizer, prompt: &[u32], stops: impl IntoIterator<Item = String>) -> Self {
        Completion { decoder: TextDecoder::new(tokenizer, prompt), matcher: StopMatcher::new(stops) }
    }

    /// The text that is certain with another token.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn push(&mut self, token: u32) -> Result<String, InferError> {
        Ok(self.matcher.push(&self.decoder.push(token)?))
    }

    /// Whether a stop string has come: the answer ends here.
    pub fn stopped(&self) -> bool {
        self.matcher.stopped()
    }

    /// As [`TextDecoder::piece`]; to be asked before the token is pushed.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn piece(&self, token: u32) -> Result<String, InferError> {
        self.decoder.piece(token)
    }

    /// What is left when no token follows. A stop string may still come: [`Completion::stopped`] says so.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn finish(&mut self) -> Result<String, InferError> {
        let text = self.matcher.push(&self.decoder.finish()?);
        Ok(text + &self.matcher.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|&stop| stop.to_owned()))
    }

    #[test]
    fn what_may_begin_a_stop_string_waits() {
        let mut it = matcher(&["END", "\n\n"]);
        let shown: Vec<String> = ["the ", "E", "N", "T\n", "x", "EEN", "D."].map(|piece| it.push(piece)).into();
        assert_eq!(shown, ["the ", "", "", "ENT", "\nx", "E", ""]);
        assert!(it.stopped());
        assert_eq!(it.push("more") + &it.finish(), "");

        let mut it = matcher(&["END"]);
        assert_eq!(it.push("the E") + &it.finish(), "the E");
        assert!(!it.stopped());
    }

    #[test]
    fn characters_are_never_cut() {
        let mut it = matcher(&["漢字"]);
        assert_eq!(it.push("a漢"), "a");
        assert_eq!(it.push("é"), "漢é");
        assert_eq!(it.push("漢字"), "");
        assert!(it.stopped());
    }

    #[test]
    fn an_answer_ends_before_its_stop_string() {
        let tokenizer = Tokenizer::bytes();
        let mut completion = Completion::new(tokenizer.clone(), &[], ["cats".to_owned(), String::new()]);
        let mut text = String::new();
        for token in tokenizer.encode("the café's cat and cats").unwrap() {
            assert!(!completion.stopped());
            text += &completion.push(token).unwrap();
        }
        assert!(completion.stopped());
        assert_eq!(text + &completion.finish().unwrap(), "the café's cat and ");

        let mut cut = Completion::new(tokenizer.clone(), &[], ["\u{fffd}".to_owned()]);
        assert_eq!(cut.push(b'a'.into()).unwrap() + &cut.push(0xc3).unwrap(), "a");
        assert_eq!(cut.finish().unwrap(), "");
        assert!(cut.stopped());
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            text in "[ab]{0,20}", stops in prop::collection::vec("[ab]{1,4}", 0..4), cuts in prop::collection::vec(1usize..5, 20),
        ) {
            // The stop string that is complete first, and of those the longest.
            let ends = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|begin| (begin + stop.len(), begin)));
            let expected = ends.min().map_or(text.as_str(), |(_, begin)| &text[..begin]);
            let mut it = StopMatcher::new(stops.clone());
            let (mut shown, mut rest) = (String::new(), text.as_str());
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                shown += &it.push(piece);
                prop_assert!(expected.starts_with(&shown), "nothing is taken back");
                rest = after;
            }
            shown += &it.finish();
            prop_assert_eq!(shown.as_str(), expected);
            prop_assert_eq!(it.stopped(), stops.iter().any(|stop| text.contains(stop.as_str())));
        }
    }
}
