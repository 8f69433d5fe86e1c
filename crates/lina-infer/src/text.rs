//! Tokens to text while they come.
//!
//! A token may be a part of a character, and what it looks like may depend on the token before it. As in Hugging Face's
//! text-generation-inference and vLLM, a short window of tokens is decoded with and without the new ones, and the
//! difference is the new text.

use lina_data::Tokenizer;

use crate::InferError;

/// Tokens of a prompt that the first token of an answer is decoded after.
const CONTEXT_TOKENS: usize = 5;
/// Tokens that may wait for the end of a character. It has at most four, but bytes that are no text may precede it.
const HELD_TOKENS: usize = 16;
/// What decoders put where bytes form no character.
const REPLACEMENT: char = '\u{fffd}';

/// Text of one answer, as its tokens come.
#[derive(Clone, Debug)]
pub struct TextDecoder {
    tokenizer: Tokenizer,
    /// The last tokens.
    window: Vec<u32>,
    /// How many of them have become text.
    shown_tokens: usize,
}

impl TextDecoder {
    /// A decoder for what follows `prompt`, which may be empty.
    pub fn new(tokenizer: Tokenizer, prompt: &[u32]) -> Self {
        let vocab = tokenizer.vocab_size();
        let context = &prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..];
        let window: Vec<u32> = context.iter().copied().filter(|&token| (token as usize) < vocab).collect();
        TextDecoder { tokenizer, shown_tokens: window.len(), window }
    }

    /// The text that is certain with another token: none while it ends in the middle of a character. Special tokens and
    /// ids that the tokenizer does not have, for which models often have room, are no text.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn push(&mut self, token: u32) -> Result<String, InferError> {
        if token as usize >= self.tokenizer.vocab_size() {
            return Ok(String::new());
        }
        self.window.push(token);
        let (text, ends_within) = self.new_text(&self.window)?;
        if ends_within && self.window.len() - self.shown_tokens < HELD_TOKENS {
            return Ok(String::new());
        }
        if text.is_empty() {
            // A token without text is no context either: a word after it begins with its space all the same.
            self.window.truncate(self.shown_tokens);
            return Ok(text);
        }
        self.window.drain(..self.shown_tokens);
        self.shown_tokens = self.window.len();
        Ok(text)
    }

    /// What `token` would add if it came next, half characters included: as which it is shown in lists of likely tokens.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn piece(&self, token: u32) -> Result<String, InferError> {
        if token as usize >= self.tokenizer.vocab_size() {
            return Ok(String::new());
        }
        let held = self.new_text(&self.window)?.0;
        let with = [self.window.as_slice(), &[token]].concat();
        let text = self.new_text(&with)?.0;
        Ok(after_common(&held, &text).to_owned())
    }

    /// What is left when no token follows: a character that is not complete.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn finish(&mut self) -> Result<String, InferError> {
        let (text, _) = self.new_text(&self.window)?;
        self.shown_tokens = self.window.len();
        Ok(text)
    }

    /// Text of `tokens`, which begin with the shown ones, after the text of those; and whether it may end in the middle
    /// of a character.
    fn new_text(&self, tokens: &[u32]) -> Result<(String, bool), InferError> {
        let shown = self.tokenizer.decode(&tokens[..self.shown_tokens]).map_err(InferError::input)?;
        let all = self.tokenizer.decode(tokens).map_err(InferError::input)?;
        let text = after_common(&shown, &all).to_owned();
        let ends_within = text.ends_with(REPLACEMENT);
        Ok((text, ends_within))
    }
}

/// What `text` has after the characters with which both begin.
fn after_common<'a>(other: &str, text: &'a str) -> &'a str {
    let common: usize = text.chars().zip(other.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    &text[common..]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A tokenizer of byte-level pieces in which some characters are two tokens or more; id 259 is special.
    pub(crate) fn byte_level() -> (tempfile::TempDir, Tokenizer) {
        // GPT-2's names of bytes: printable ones are themselves, the others follow from U+0100 on.
        let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut next = 0x100;
        let mut names = Vec::new();
        for byte in 0..256_u32 {
            let code = if printable(byte) { byte } else { next };
            next += u32::from(!printable(byte));
            names.push(char::from_u32(code).unwrap());
        }
        let name = |text: &str| text.bytes().map(|byte| names[usize::from(byte)]).collect::<String>();
        let mut vocabulary: serde_json::Map<String, serde_json::Value> =
            (0..256).map(|byte| (names[byte].to_string(), byte.into())).collect();
        vocabulary.insert(name("th"), 256.into());
        vocabulary.insert(name("the"), 257.into());
        vocabulary.insert(name(" c"), 258.into());
        let space = name(" ");
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [{"id": 259, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary,
                "merges": ["t h", "th e", format!("{space} c")]},
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        let tokenizer = Tokenizer::for_model_folder(folder.path()).unwrap();
        (folder, tokenizer)
    }

    /// A tokenizer whose words begin with a mark for the space before them, as Llama's and Mixtral's do.
    fn words() -> (tempfile::TempDir, Tokenizer) {
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true,
                "vocab": {"<s>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<0xE6>": 4, "<0xBC>": 5, "<0xA2>": 6}, "merges": []}}"#;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        let tokenizer = Tokenizer::for_model_folder(folder.path()).unwrap();
        (folder, tokenizer)
    }

    /// The pieces in which the text of `tokens` comes.
    fn pieces(decoder: &mut TextDecoder, tokens: &[u32]) -> Vec<String> {
        let mut pieces: Vec<String> = tokens.iter().map(|&token| decoder.push(token).unwrap()).collect();
        pieces.push(decoder.finish().unwrap());
        pieces
    }

    #[test]
    fn half_characters_wait() {
        let tokens = Tokenizer::bytes().encode("a漢é").unwrap();
        let (_folder, byte_level) = byte_level();
        for tokenizer in [Tokenizer::bytes(), byte_level] {
            let mut decoder = TextDecoder::new(tokenizer, &[]);
            assert_eq!(pieces(&mut decoder, &tokens), ["a", "", "", "漢", "", "é", ""]);
            assert_eq!(pieces(&mut decoder, &tokens[..2]), ["a", "", "\u{fffd}"]);
        }
    }

    #[test]
    fn words_keep_their_spaces() {
        let (_folder, tokenizer) = words();
        let mut decoder = TextDecoder::new(tokenizer.clone(), &[]);
        assert_eq!(
            pieces(&mut decoder, &[1, 2, 3, 0, 1, 4, 5, 6, 2, 99]),
            ["the", " cat", "s", "", " the", "", "", "漢", " cat", "", ""]
        );
        let mut decoder = TextDecoder::new(tokenizer.clone(), &[0, 1]);
        assert_eq!(decoder.piece(2).unwrap(), " cat");
        assert_eq!(pieces(&mut decoder, &[2]), [" cat", ""]);
        let mut decoder = TextDecoder::new(tokenizer, &[0]);
        assert_eq!(pieces(&mut decoder, &[2]), ["cat", ""]);
    }

    #[test]
    fn a_token_is_shown_as_what_it_adds() {
        let (_folder, tokenizer) = byte_level();
        let mut decoder = TextDecoder::new(tokenizer, &[]);
        assert_eq!(decoder.push(257).unwrap(), "the");
        for (token, piece) in [(258, " c"), (259, ""), (0xc3, "\u{fffd}"), (300, "")] {
            assert_eq!(decoder.piece(token).unwrap(), piece);
        }
        decoder.push(0xc3).unwrap();
        assert_eq!(decoder.piece(0xa9).unwrap(), "é");
        assert_eq!(decoder.push(0xa9).unwrap(), "é");
    }

    #[test]
    fn what_is_no_text_comes_too() {
        let mut decoder = TextDecoder::new(Tokenizer::bytes(), &[]);
        let pieces = pieces(&mut decoder, &[0xff; 100]);
        assert_eq!(pieces.concat(), "\u{fffd}".repeat(100));
        assert!(decoder.window.len() <= 2 * HELD_TOKENS, "what has been shown is forgotten");
    }

    proptest! {
        #[test]
        fn pieces_make_the_text(text in "(the |cat|[a-zé漢🦀]|\\PC){0,40}", prompt in "\\PC{0,8}") {
            let (_folder, byte_level) = byte_level();
            for tokenizer in [Tokenizer::bytes(), byte_level] {
                let prompt = tokenizer.encode(&prompt).unwrap();
                let tokens = tokenizer.encode(&text).unwrap();
                let mut decoder = TextDecoder::new(tokenizer, &prompt);
                let pieces = pieces(&mut decoder, &tokens);
                prop_assert_eq!(pieces.concat(), text.clone());
                if !text.contains(REPLACEMENT) {
                    prop_assert!(pieces.iter().all(|piece| !piece.contains(REPLACEMENT)));
                }
            }
        }
    }
}
