//! `lina generate`: what it says on which stream, the same answer however it is asked for, and what it refuses.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::{check_fields, check_in, folder, json, lina};

/// A folder with a small trained model in `run/checkpoint-3`.
fn model() -> tempfile::TempDir {
    let folder = folder();
    json(folder.path(), &["train", "run.toml", "--out", "run", "--json", "--quiet"]);
    folder
}

const GENERATE: [&str; 4] = ["generate", "run/checkpoint-3", "--prompt", "line 7"];

fn generated(folder: &Path, options: &[&str]) -> Value {
    json(folder, &[&GENERATE, options, &["--json"]].concat())
}

#[test]
fn one_answer_however_it_is_asked_for() {
    let folder = model();
    let path = folder.path();
    let value = generated(path, &["--max-new-tokens", "40"]);
    check_fields(&value, &["prompt_tokens", "token_ids", "logprobs", "text", "finish_reason", "seed", "ranks"]);
    assert_eq!(
        (&value["prompt_tokens"], &value["finish_reason"], &value["seed"]),
        (&6.into(), &"length".into(), &Value::Null)
    );
    assert_eq!(value["token_ids"].as_array().unwrap().len(), 40);
    for options in [&["--ranks", "3"][..], &["--temperature", "0"], &["--top-k", "1"], &["--greedy", "--threads", "1"]]
    {
        let again = generated(path, &[&["--max-new-tokens", "40"], options].concat());
        assert_eq!(again["token_ids"], value["token_ids"], "{options:?}");
    }
    // As it comes, on stdout alone; what it took, on stderr.
    let output = lina(path, &[&GENERATE[..], &["--max-new-tokens", "40"]].concat());
    let text = value["text"].as_str().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim_end_matches('\n'), text.trim_end_matches('\n'));
    assert!(
        String::from_utf8(output.stderr).unwrap().starts_with("[40 tokens after a prompt of 6, as long as it may be;")
    );

    fs::write(path.join("prompt.txt"), "line 7").unwrap();
    let from_file = ["generate", "run/checkpoint-3", "--prompt-file", "prompt.txt", "--max-new-tokens", "40", "--json"];
    assert_eq!(json(path, &from_file)["text"], value["text"]);
    // A text may begin like an option.
    let dashed =
        ["generate", "run/checkpoint-3", "--prompt", "- line", "--stop", "--", "--max-new-tokens", "3", "--json"];
    assert_eq!(json(path, &dashed)["prompt_tokens"], 6);
    let quiet = lina(path, &[&GENERATE[..], &["--max-new-tokens", "3", "--quiet"]].concat());
    assert!(quiet.status.success() && quiet.stderr.is_empty());
}

#[test]
fn draws_repeat_and_answers_stop() {
    let folder = model();
    let path = folder.path();
    let drawn = generated(path, &["--max-new-tokens", "30", "--temperature", "1.5", "--top-p", "0.9", "--seed", "5"]);
    let again = generated(
        path,
        &["--max-new-tokens", "30", "--temperature", "1.5", "--top-p", "0.9", "--seed", "5", "--ranks", "2"],
    );
    assert_eq!((&drawn["token_ids"], &drawn["seed"]), (&again["token_ids"], &5.into()));
    let other = generated(path, &["--max-new-tokens", "30", "--temperature", "1.5"]);
    assert_ne!(other["token_ids"], drawn["token_ids"]);
    assert!(other["seed"].is_u64());

    let text = other["text"].as_str().unwrap();
    // Any bytes may have been drawn, but an argument holds no zero.
    let characters: Vec<char> = text.chars().collect();
    let stop = characters.windows(3).skip(8).find(|stop| !stop.contains(&'\0')).unwrap().iter().collect::<String>();
    let seed = other["seed"].to_string();
    let options = ["--max-new-tokens", "30", "--temperature", "1.5", "--seed", &seed, "--stop", &stop];
    let stopped = generated(path, &options);
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);

    // The same token ends the answer where the folder says that it is the end.
    let token = other["token_ids"][4].as_u64().unwrap();
    fs::write(path.join("run/checkpoint-3/generation_config.json"), format!("{{\"eos_token_id\": [{token}]}}"))
        .unwrap();
    let ended = generated(path, &["--max-new-tokens", "30", "--temperature", "1.5", "--seed", &seed]);
    let tokens = other["token_ids"].as_array().unwrap();
    let end = tokens.iter().position(|it| it == token).unwrap();
    assert_eq!(
        (ended["token_ids"].as_array().unwrap().as_slice(), &ended["finish_reason"]),
        (&tokens[..end], &"stop".into())
    );
}

#[test]
fn a_chat_is_what_the_template_makes_of_it() {
    let folder = model();
    let path = folder.path();
    check_in(
        path,
        &[&GENERATE[..], &["--chat"]].concat(),
        2,
        "--chat: `run/checkpoint-3` has no chat template, expected chat_template.jinja or chat_template in \
         tokenizer_config.json",
    );
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ raise_exception('no') if messages[0].content == 'x' }}>";
    fs::write(path.join("run/checkpoint-3/chat_template.jinja"), template).unwrap();
    let chat = generated(path, &["--chat", "--max-new-tokens", "5"]);
    assert_eq!(chat["prompt_tokens"], "user: line 7\n>".len());
    let plain = ["generate", "run/checkpoint-3", "--prompt", "user: line 7\n>", "--max-new-tokens", "5", "--json"];
    assert_eq!(json(path, &plain)["token_ids"], chat["token_ids"]);
    let refused = ["generate", "run/checkpoint-3", "--prompt", "x", "--chat"];
    check_in(path, &refused, 2, "the model's chat template refuses the messages: no");
}

#[test]
fn what_cannot_be_generated() {
    let folder = model();
    let path = folder.path();
    for (options, sentence) in [
        (&["--ranks", "0"][..], "--ranks is 0, expected a number from 1 to 1024"),
        (&["--dtype", "bfloat16"], "--dtype is bfloat16, expected float32: processors compute in nothing else"),
        (&["--temperature", "-1"], "--temperature is -1, expected a finite number that is not negative"),
        (&["--top-p", "1.5"], "--top-p is 1.5, expected a number from 0 to 1"),
        (&["--stop", ""], "--stop is empty, expected a text before which the answer ends"),
    ] {
        check_in(path, &[&GENERATE, options].concat(), 2, sentence);
    }
    let empty = ["generate", "run/checkpoint-3", "--prompt", ""];
    check_in(path, &empty, 2, "the prompt is empty, expected some text");
    let long = "x".repeat(5000);
    let sentence = "the prompt has 5000 tokens, expected at most 2047: the model has 2048 positions";
    check_in(path, &["generate", "run/checkpoint-3", "--prompt", &long], 2, sentence);
    let none = ["generate", "none", "--prompt", "x"];
    check_in(path, &none, 2, "none/config.json: cannot be read: No such file or directory (os error 2)");
    let file = ["generate", "run/checkpoint-3", "--prompt-file", "none.txt"];
    check_in(path, &file, 2, "--prompt-file: cannot read `none.txt`: No such file or directory (os error 2)");
    fs::write(path.join("binary"), [b'a', 0xff]).unwrap();
    let file = ["generate", "run/checkpoint-3", "--prompt-file", "binary"];
    let sentence = "--prompt-file: `binary` is not UTF-8 text: the byte at offset 1 starts no valid character";
    check_in(path, &file, 2, sentence);
}

#[test]
fn a_reader_may_leave_in_the_middle() {
    let folder = model();
    let arguments = [&GENERATE[..], &["--max-new-tokens", "2000", "--quiet"]].concat();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lina"));
    let mut child = command.args(arguments).current_dir(folder.path()).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
