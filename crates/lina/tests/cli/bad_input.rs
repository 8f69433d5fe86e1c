//! What is refused: one sentence on stderr, nothing on stdout, exit code 2, and no file that was not there before.

use std::fs;
use std::path::Path;

use crate::common::{check, check_in, folder, json, lina, names};

#[test]
fn a_configuration_that_is_not_there() {
    check(
        &["train", "no/such.toml"],
        2,
        "cannot read the configuration `no/such.toml`: No such file or directory (os error 2)",
    );
}

#[test]
fn assignments_that_make_no_sense() {
    for (assignment, sentence) in [
        ("train.learnin_rate=1", "unknown key `train.learnin_rate`, did you mean `learning_rate`?"),
        (
            "policy.zzz=1",
            "unknown key `policy.zzz`, expected one of name, bucket_bytes, partition_bytes, pipeline_chunks, \
             defer_attention_gradients, hierarchical_all_to_all, packing, max_experts_per_rank",
        ),
        ("train.steps=ten", "`train.steps` is \"ten\", expected a whole number of at least 0"),
        ("train.steps", "expected a key and a value, such as train.steps=10"),
        (
            "policy.name=linna",
            "`policy.name` is \"linna\", expected one of fair, priority, fixed, partition, lina, \
         lina-auto",
        ),
    ] {
        let sentence = format!("--set {assignment}: {sentence}");
        check(&["train", "run.toml", "--set", assignment], 2, &sentence);
        check(&["bench", "train", "run.toml", "--set", assignment], 2, &sentence);
    }
    // Without its device, the line that the file has becomes the culprit.
    check(
        &["train", "run.toml", "--set", "cluster.device="],
        2,
        "run.toml line 22: `cluster.link` is set and `cluster.device` is not, but an emulated cluster needs both",
    );
}

#[test]
fn short_options_are_checked_as_keys_are() {
    check(
        &["train", "run.toml", "--policy", "linna"],
        2,
        "--policy linna: `policy.name` is \"linna\", expected one of fair, priority, fixed, partition, lina, \
         lina-auto",
    );
    let built = if cfg!(feature = "cuda") { "`local` and `nccl`" } else { "`local`" };
    check(
        &["train", "run.toml", "--engine", "mpi"],
        2,
        &format!("--engine mpi: this build has no engine `mpi`, it has {built}; `lina doctor` says more"),
    );
    check(
        &["train", "run.toml", "--engine", "tcp"],
        2,
        "--engine tcp: `cluster.engine` is \"tcp\", expected one of local, mpi, nccl",
    );
    check(
        &["train", "run.toml", "--ranks", "-1"],
        2,
        "--ranks -1: `cluster.ranks` is -1, expected a whole number of at least 0",
    );
    check(
        &["train", "run.toml", "--steps", "0"],
        2,
        "--steps 0: `train.steps` is 0, expected a number from 1 to 1099511627776",
    );
    check(
        &["bench", "train", "run.toml", "--policies", "fair,linna"],
        2,
        "--policies fair,linna: `bench.policies[1]` is \"linna\", expected one of fair, priority, fixed, partition, lina, \
         lina-auto, fair+packing, priority+packing, fixed+packing, partition+packing, lina+packing, lina-auto+packing",
    );
}

#[test]
fn arguments_that_do_not_parse() {
    for (arguments, sentence) in [
        (&[][..], "a command is missing, expected one that `--help` lists"),
        (&["bench"], "a command is missing, expected one that `--help` lists"),
        (
            &["trian"],
            "unrecognized subcommand 'trian'; tip: a similar subcommand exists: 'train'; `--help` says what is expected",
        ),
        (
            &["train", "run.toml", "--polcy", "fair"],
            "unexpected argument '--polcy' found; tip: a similar argument exists: '--policy'; `--help` says what is \
             expected",
        ),
        (
            &["train"],
            "the following required arguments were not provided: <CONFIG.toml>; `--help` says what is expected",
        ),
        (
            &["eval", "run", "--data", "text.txt", "--seq-tokens", "x"],
            "invalid value 'x' for '--seq-tokens <T>': invalid digit found in string; `--help` says what is expected",
        ),
        (
            &["eval", "run", "--data", "text.txt", "--dtype", "bf16"],
            "invalid value 'bf16' for '--dtype <TYPE>' [possible values: float32, bfloat16]; `--help` says what is expected",
        ),
    ] {
        check(arguments, 2, sentence);
    }
}

#[test]
fn files_that_are_no_configuration() {
    let folder = folder();
    for (content, sentence) in [
        (&b""[..], "bad.toml: [model]: says no model, expected exactly one of `kind`, `preset` and `path`"),
        (b"[model\n", "bad.toml line 1: unclosed table, expected `]`"),
        (b"\xff", "cannot read the configuration `bad.toml`: stream did not contain valid UTF-8"),
        (b"[model]\nhiden = 1", "bad.toml line 2: unknown key `model.hiden`, did you mean `hidden`?"),
        (b"[modle]", "bad.toml line 1: unknown key `modle`, did you mean `model`?"),
    ] {
        fs::write(folder.path().join("bad.toml"), content).unwrap();
        check_in(folder.path(), &["train", "bad.toml"], 2, sentence);
    }
}

#[test]
fn sizes_that_cannot_be() {
    for (assignments, sentence) in [
        ("model.hidden=0", "[model] `hidden` is 0, expected a number from 1 to 268435456"),
        ("model.hidden=15", "[model] `hidden` is 15, expected a multiple of heads = 2"),
        ("model.heads=0", "[model] `heads` is 0, expected at least 1"),
        ("model.top_k=5", "[model] `top_k` is 5, expected at most experts = 4"),
        ("model.experts=268435456", "[model] `experts` is 268435456, expected at most 524288 in each of 2 layers"),
        ("train.batch_sequences=0", "`train.batch_sequences` is 0, expected a number from 1 to 1048576"),
        (
            "train.sequence_tokens=4096",
            "`train.sequence_tokens` is 4096, expected at most the model's max_positions = 2048",
        ),
        ("cluster.ranks=0", "`cluster.ranks` is 0, expected a number from 1 to 1024"),
        ("cluster.link.gbps=0", "cluster.link.gbps is 0, expected a positive number of Gbit/s"),
        ("cluster.link.nodes=3", "cluster.link.nodes is 3, expected 1 to 2, the number of ranks"),
        ("train.learning_rate=nan", "`train.learning_rate` is NaN, expected a number above 0"),
    ] {
        check(&["train", "run.toml", "--set", assignments], 2, &format!("--set {assignments}: {sentence}"));
    }
    for (assignments, sentence) in [
        (&["model.hidden=100000000"][..], "run.toml: [model]: the sizes make 1.2e17 parameters, expected at most 1e13"),
        (
            &["model.expert_hidden=268435456"],
            "run.toml: [model]: the sizes make 3.2e9 activations of each token, expected at most 1e8",
        ),
        (
            &["cluster.ranks=1000", "cluster.threads=1000"],
            "--set cluster.threads=1000: `cluster.threads` is 1000, expected at most 4096 threads on all 1000 ranks \
             together",
        ),
    ] {
        check(&[&["train", "run.toml", "--set"], assignments].concat(), 2, sentence);
    }
}

#[test]
fn a_model_that_does_not_fit_in_memory() {
    let folder = folder();
    let sizes = ["model.hidden=8192", "model.experts=64", "model.expert_hidden=16384"];
    let output = lina(folder.path(), &[&["train", "run.toml", "--set"], sizes.as_slice()].concat());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), message.lines().count()), (Some(2), 1), "{message}");
    assert!(message.starts_with("error: the run needs ") && message.contains("what this machine has available"));
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn data_that_is_not_there() {
    check(
        &["train", "run.toml", "--set", "data=none/*.txt"],
        2,
        "the data glob `none/*.txt` matches no file; each glob must match at least one (`dir/**/*.txt` looks into folders \
         below `dir`)",
    );
}

#[test]
fn data_that_is_no_text() {
    let folder = folder();
    let file = |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).unwrap();
    file("empty.txt", b"");
    file("short.txt", b"short");
    file("latin.txt", b"caf\xe9 noir");
    file("number.jsonl", b"{\"text\": \"fine\"}\n{\"text\": 3}\n");
    for (assignment, sentence) in [
        ("data=empty.txt", "the data is empty: 1 file(s) were read, the first `empty.txt`, and none holds any text"),
        (
            "data=short.txt",
            "the training data has 5 tokens; sequences of 16 tokens need at least 17 (one sequence and the last token's \
             target)",
        ),
        ("data=latin.txt", "`latin.txt` is not UTF-8 text: the byte at offset 3 starts no valid character"),
        (
            "data=number.jsonl",
            "`number.jsonl` line 2: its key `text` holds a number; expected a JSON object whose key `text` is a string",
        ),
        (
            "data.eval_fraction=0.9999",
            "`eval_fraction` is 0.9999 of 968 sequences, all of them; expected a fraction that leaves some to train on",
        ),
        (
            "data.eval_files=text.txt",
            "`text.txt` is in both the training and the held-out files; each file must be in one of them",
        ),
        (
            "data.tokenizer=text.txt",
            "cannot load the tokenizer `text.txt`: expected value at line 1 column 1; expected a Hugging Face \
             tokenizer.json",
        ),
        (
            "model.vocab=99",
            "the data holds token id 120 (tokenizer `bytes`), and the model's vocab_size is 99; every id must be below it",
        ),
    ] {
        check_in(folder.path(), &["train", "run.toml", "--set", assignment], 2, sentence);
        check_in(folder.path(), &["bench", "train", "run.toml", "--set", assignment], 2, sentence);
    }
}

/// Copies a folder of files.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// What happens to a file of a checkpoint.
enum Damage {
    None,
    /// It keeps only so many bytes.
    Cut(usize),
    Replace(&'static str),
    Remove,
}

#[test]
fn checkpoints_that_are_damaged_or_of_another_run() {
    let folder = folder();
    let path = folder.path();
    json(path, &["train", "run.toml", "--out", "run", "--json"]);
    let weights = "model.safetensors";
    for (file, damage, assignment, message) in [
        (weights, Damage::Cut(3000), "", "is cut off: it has 3000 bytes, its header alone 4488"),
        (weights, Damage::Cut(4), "", "has 4 bytes, expected a safetensors file, of at least 8"),
        (
            weights,
            Damage::Replace("hello, no weights here"),
            "",
            "is no safetensors file: it claims a header of 7935391400498849128 bytes",
        ),
        ("exp_avg.safetensors", Damage::Cut(3000), "", "is cut off: it has 3000 bytes, its header alone 4488"),
        ("exp_avg_sq.safetensors", Damage::Remove, "", "cannot be read: No such file or directory (os error 2)"),
        (
            "trainer_state.json",
            Damage::Replace("{\"step\": 1}"),
            "",
            "is no trainer state: missing field `seed` at line 1 column 11",
        ),
        ("config.json", Damage::Replace("{"), "", "is not valid JSON: EOF while parsing an object at line 1 column 1"),
        (
            "",
            Damage::None,
            "model.hidden=32",
            "is a checkpoint of another model than [model] describes: `hidden_size` is 16, expected 32",
        ),
        (
            "trainer_state.json",
            Damage::None,
            "train.seed=9",
            "train.seed was 1 and is 9 now, expected the same for the run to go on",
        ),
        ("trainer_state.json", Damage::None, "train.steps=3", "3 steps are done, expected fewer than train.steps = 3"),
    ] {
        copy(&path.join("run/checkpoint-3"), &path.join("bad"));
        let damaged = path.join("bad").join(file);
        match damage {
            Damage::None => {}
            Damage::Cut(bytes) => fs::write(&damaged, &fs::read(&damaged).unwrap()[..bytes]).unwrap(),
            Damage::Replace(content) => fs::write(&damaged, content).unwrap(),
            Damage::Remove => fs::remove_file(&damaged).unwrap(),
        }
        let place = if file.is_empty() { "bad".to_owned() } else { format!("bad/{file}") };
        let sentence = format!("{place}: {message}");
        let mut train = vec!["train", "run.toml", "--resume", "bad", "--out", "new", "--set", "train.steps=5"];
        train.extend(Some(assignment).filter(|assignment| !assignment.is_empty()));
        check_in(path, &train, 2, &sentence);
        if file == weights || file == "config.json" {
            check_in(path, &["eval", "bad", "--data", "text.txt"], 2, &sentence);
        }
    }
    for (resume, found) in [("none", "is no folder"), (".", "has neither")] {
        let sentence = format!(
            "--resume {resume}: {found}, expected a checkpoint with its trainer_state.json or the folder of a run with \
             checkpoints"
        );
        check_in(path, &["train", "run.toml", "--resume", resume], 2, &sentence);
    }
}

#[test]
fn weights_that_are_not_those_of_the_configuration() {
    let folder = folder();
    let path = folder.path();
    json(path, &["train", "run.toml", "--out", "run", "--json"]);
    let config = path.join("run/checkpoint-3/config.json");
    let text = fs::read_to_string(&config).unwrap();
    let with_weights = path.join("weights.toml");
    let run = fs::read_to_string(path.join("run.toml")).unwrap();
    let rest = &run[run.find("[data]").unwrap()..];
    fs::write(&with_weights, format!("[model]\npath = \"run/checkpoint-3\"\n{rest}")).unwrap();
    for (from, to, sentence) in [
        (
            "\"hidden_size\": 16",
            "\"hidden_size\": 32",
            "run/checkpoint-3/model.safetensors: tensor `lm_head.weight` has shape [256, 16], config.json says [256, 32]",
        ),
        (
            "\"mixtral\"",
            "\"llama\"",
            "run/checkpoint-3/config.json: `model_type` is \"llama\", expected mixtral, qwen3_moe, olmoe or lina_moe",
        ),
    ] {
        assert!(text.contains(from), "{text}");
        fs::write(&config, text.replace(from, to)).unwrap();
        check_in(path, &["eval", "run/checkpoint-3", "--data", "text.txt"], 2, sentence);
        check_in(path, &["train", "weights.toml"], 2, sentence);
    }
}

#[test]
fn evaluations_that_cannot_be() {
    let folder = folder();
    let path = folder.path();
    json(path, &["train", "run.toml", "--out", "run", "--json"]);
    for (options, sentence) in [
        (&["--ranks", "0"][..], "--ranks is 0, expected a number from 1 to 1024"),
        (&["--threads", "100000"], "--threads is 100000, expected a number from 0 to 1024"),
        (&["--seq-tokens", "1"], "--seq-tokens is 1, expected 2 to 2048, the model's positions"),
        (&["--seq-tokens", "2049"], "--seq-tokens is 2049, expected 2 to 2048, the model's positions"),
    ] {
        let eval = ["eval", "run/checkpoint-3", "--data", "text.txt"];
        check_in(path, &[&eval, options].concat(), 2, sentence);
    }
    check_in(
        path,
        &["eval", "none", "--data", "text.txt"],
        2,
        "none/config.json: cannot be read: No such file or directory (os error 2)",
    );
}

#[test]
fn a_step_on_several_ranks_is_not_compared_with_its_products() {
    check(
        &["bench", "compute", "run.toml"],
        2,
        "cluster.ranks is 2 and the cluster is emulated, expected one rank that is not emulated",
    );
}

#[test]
fn a_learning_rate_that_diverges() {
    let folder = folder();
    let train = ["train", "run.toml", "--quiet", "--set", "train.learning_rate=1e9"];
    let output = lina(folder.path(), &train);
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "error: step 1: the gradient's norm is NaN, expected a finite number; lower train.learning_rate = 1000000000 or \
         train.clip_norm = 1\n"
    );
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(names(&folder.path().join("runs/run")), ["config.toml", "metrics.jsonl"]);
}
