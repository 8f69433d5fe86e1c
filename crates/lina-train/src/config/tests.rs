//! What loads, what does not, and what is said then.

use super::*;
use lina_plan::{Policy, Schedule};

const MINIMAL: &str = r#"
[model]
kind = "mixtral"
hidden = 32
layers = 2
heads = 4
experts = 4
expert_hidden = 16

[data]
files = ["a.txt"]
"#;

/// The minimal configuration, more text after it, and assignments as `--set` takes them.
fn load(more: &str, assignments: &[&str]) -> Result<RunConfig, String> {
    let overrides: Result<Vec<_>, _> = assignments.iter().map(|assignment| Override::set(assignment)).collect();
    overrides
        .and_then(|overrides| RunConfig::parse(Path::new("run.toml"), &format!("{MINIMAL}{more}"), &overrides))
        .map_err(|error| error.to_string())
}

#[track_caller]
fn check_file(more: &str, expected: &str) {
    assert_eq!(load(more, &[]).expect_err(more), expected);
}

#[track_caller]
fn check_set(assignment: &str, expected: &str) {
    assert_eq!(load("", &[assignment]).expect_err(assignment), format!("--set {assignment}: {expected}"));
}

#[test]
fn defaults_fill_what_is_not_written() {
    let config = load("", &[]).unwrap();
    assert_eq!(config.train, TrainConfig::default());
    assert_eq!(config.policy.settings(), lina_plan::PolicySettings::default());
    assert_eq!(config.cluster, ClusterConfig::default());
    assert_eq!(config.data.files, ["a.txt"]);
    assert_eq!((config.tokenizer_file.as_ref(), config.bench.as_ref()), (None, None));
    assert!(!config.is_emulated() && config.cluster.emulation().unwrap().is_none());
    let policies = [Policy::Fair, Policy::Priority, Policy::Fixed, Policy::Lina];
    assert_eq!(config.bench_or_default().policies, policies.map(Schedule::from));
    assert!(!config.policy.packing);
    assert_eq!(config.model.experts, 4);
}

#[test]
fn a_resolved_configuration_loads_to_the_same() {
    let everything = r#"
eval_files = ["b*.txt"]
tokenizer = "some/tokenizer.json"
[train]
learning_rate = 3e-4
clip_norm = 0.3
seed = 9223372036854775807
[cluster]
ranks = 4
experts_per_rank = 2
memory_limit_gib = 1.5
link = { gbps = 25, latency_us = 5.5, launch_us = 10, nodes = 2, inner_gbps = 300 }
device = { gflops = 1000, memory_gib = 0.25, copy_gbps = 64 }
[policy]
name = "fixed"
bucket_bytes = 1_000_000
packing = true
max_experts_per_rank = 3
[bench]
policies = ["fair", "lina", "lina+packing"]
"#;
    for text in ["", everything] {
        let config = load(text, &["model.jitter=0.1"]).unwrap();
        let again = RunConfig::parse(Path::new("again.toml"), &config.to_toml().unwrap(), &[]).unwrap();
        assert_eq!(again, config);
    }
    let (topology, gflops) = load(everything, &[]).unwrap().cluster.emulation().unwrap().unwrap();
    assert_eq!((topology.ranks(), topology.node_of(3), gflops), (4, 1, 1000.0));
}

#[test]
fn links_default_to_one_rank_a_node_and_one_rate() {
    let more = "[cluster]\nlink = { gbps = 25, latency_us = 5, launch_us = 10 }\ndevice = { gflops = 1000 }";
    let config = load(more, &["cluster.ranks=3"]).unwrap();
    let link = config.cluster.link.unwrap().resolve(3);
    assert_eq!((link.nodes, link.inner_gbps), (3, 25.0));
    // An emulated cluster becomes a real one.
    let config = load(more, &["cluster.link=", "cluster.device="]).unwrap();
    assert!(!config.is_emulated());
}

#[test]
fn overrides_take_toml_and_bare_words() {
    let config = load(
        "[train]\nsteps = 5",
        &["train.steps = 7", "policy.name=fair", "train.document_masking=true", "train.learning_rate=1"],
    )
    .unwrap();
    assert_eq!((config.train.steps, config.policy.name), (7, Policy::Fair));
    assert!(config.train.document_masking);
    assert_eq!(config.train.learning_rate, 1.0);
    for assignment in ["data=x/*.txt", "data=[\"x/*.txt\"]", "data.files=x/*.txt", "data.files=[\"x/*.txt\"]"] {
        assert_eq!(load("", &[assignment]).unwrap().data.files, ["x/*.txt"], "{assignment}");
    }
    assert_eq!(load("", &["data=[ab].txt"]).unwrap().data.files, ["[ab].txt"]);

    let words = ["lina".to_owned(), "fair".to_owned()];
    let overrides = [
        Override::option("--ranks", "cluster.ranks", "2").unwrap(),
        Override::words("--policies", "bench.policies", &words),
    ];
    let config = RunConfig::parse(Path::new("run.toml"), MINIMAL, &overrides).unwrap();
    assert_eq!(config.cluster.ranks, 2);
    assert_eq!(config.bench_or_default().policies, [Policy::Lina, Policy::Fair].map(Schedule::from));
}

#[test]
fn a_file_is_refused_with_its_line() {
    check_file(
        "[train]\nlearnin_rate = 1",
        "run.toml line 13: unknown key `train.learnin_rate`, did you mean `learning_rate`?",
    );
    check_file("[trian]\nsteps = 1", "run.toml line 12: unknown key `trian`, did you mean `train`?");
    check_file(
        "[cluster.device]\ngflops = 1\nzzz = 1",
        "run.toml line 14: unknown key `cluster.device.zzz`, expected one of gflops, memory_gib, copy_gbps",
    );
    check_file(
        "[policy]\nzzz = 1",
        "run.toml line 13: unknown key `policy.zzz`, expected one of name, bucket_bytes, partition_bytes, pipeline_chunks, \
         defer_attention_gradients, hierarchical_all_to_all, packing, \
         max_experts_per_rank",
    );
    check_file(
        "[train]\nsteps = \"ten\"",
        "run.toml line 13: `train.steps` is \"ten\", expected a whole number of at least 0",
    );
    check_file("[train]\nsteps = 1.5", "run.toml line 13: `train.steps` is 1.5, expected a whole number of at least 0");
    check_file("[train]\nsteps = -1", "run.toml line 13: `train.steps` is -1, expected a whole number of at least 0");
    check_file("[train]\nlearning_rate = []", "run.toml line 13: `train.learning_rate` is a list, expected a number");
    check_file(
        "[train]\ndocument_masking = 1",
        "run.toml line 13: `train.document_masking` is 1, expected true or false",
    );
    check_file("[cluster]\nlink = [1]", "run.toml line 13: `cluster.link` is a list, expected a table");
    check_file(
        "[cluster]\nlink = { gbps = 1, launch_us = 1 }",
        "run.toml line 13: `cluster.link` has no `latency_us`, which it needs",
    );
    check_file("eval_files = \"x\"", "run.toml line 12: `data.eval_files` is \"x\", expected a list");
    check_file("eval_files = [\n\"x\",\n1]", "run.toml line 14: `data.eval_files[1]` is 1, expected a string");
    check_file(
        "[policy]\nname = \"linna\"",
        "run.toml line 13: `policy.name` is \"linna\", expected one of fair, priority, fixed, partition, lina, \
         lina-auto",
    );
    check_file("[policy]\nname = 1", "run.toml line 13: `policy.name` is 1, expected a string");
    check_file(
        "[bench]\npolicies = [\"fair\", \"nope\"]",
        "run.toml line 13: `bench.policies[1]` is \"nope\", expected one of fair, priority, fixed, partition, lina, \
         lina-auto, fair+packing, priority+packing, fixed+packing, partition+packing, lina+packing, lina-auto+packing",
    );
    check_file("[bench]\npolicies = []", "run.toml line 13: `bench.policies` is empty, expected at least one policy");
    check_file(
        "[bench]\npolicies = [\"fair\", \"fair\"]",
        "run.toml line 13: `bench.policies` has `fair` twice, expected each policy once",
    );
    check_file(
        "[cluster]\nengine = \"tcp\"",
        "run.toml line 13: `cluster.engine` is \"tcp\", expected one of local, mpi, nccl",
    );
    check_file(
        "[cluster]\nengine = \"mpi\"",
        "run.toml line 13: this build has no engine `mpi`, it has `local`; `lina doctor` says more",
    );
    check_file(
        "[train]\nsteps = 99999999999999999999",
        "run.toml line 13: 99999999999999999999 is too large, expected at most 9223372036854775807",
    );
    let error = load("[train\n", &[]).unwrap_err();
    assert!(error.starts_with("run.toml line 12: ") && !error.contains('\n'), "{error}");
}

#[test]
fn impossible_values_are_refused() {
    check_set("train.steps=0", "`train.steps` is 0, expected a number from 1 to 1099511627776");
    check_set(
        "train.sequence_tokens=4096",
        "`train.sequence_tokens` is 4096, expected at most the model's max_positions = 2048",
    );
    check_set("train.batch_sequences=0", "`train.batch_sequences` is 0, expected a number from 1 to 1048576");
    check_set(
        "train.micro_batches=17",
        "`train.micro_batches` is 17, expected a number from 1 to batch_sequences = 16",
    );
    check_set("train.learning_rate=0", "`train.learning_rate` is 0, expected a number above 0");
    check_set("train.learning_rate=nan", "`train.learning_rate` is NaN, expected a number above 0");
    check_set("train.min_learning_rate_ratio=2", "`train.min_learning_rate_ratio` is 2, expected a number from 0 to 1");
    check_set("train.clip_norm=-1", "`train.clip_norm` is -1, expected a number of at least 0");
    check_set("train.beta2=1", "`train.beta2` is 1, expected a number of at least 0 and below 1");
    check_set("data.files=[]", "`data.files` is empty, expected at least one path or glob");
    check_set("data.eval_fraction=1.0", "`data.eval_fraction` is 1, expected a number of at least 0 and below 1");
    check_set("cluster.ranks=0", "`cluster.ranks` is 0, expected a number from 1 to 1024");
    check_set("cluster.nodes=9", "`cluster.nodes` is 9, expected a number from 1 to 1");
    check_set("cluster.timeout_s=0", "`cluster.timeout_s` is 0, expected a number of seconds above 0 and up to 86400");
    check_set("cluster.memory_limit_gib=0", "`cluster.memory_limit_gib` is 0, expected a number of GiB above 0");
    check_set("cluster.experts_per_rank=5", "`cluster.experts_per_rank` is 5, expected a number from 1 to 4");
    check_set(
        "cluster.experts_per_rank=3",
        "`cluster.experts_per_rank`: 3 experts a rank on 1 ranks hold 3 experts, but a layer has 4",
    );
    check_set(
        "cluster.device={gflops=1}",
        "`cluster.device` is set and `cluster.link` is not, but an emulated cluster needs both",
    );
    check_set("policy.max_experts_per_rank=5", "`policy.max_experts_per_rank` is 5, expected a number from 1 to 4");
    check_set("policy.packing=1", "`policy.packing` is 1, expected true or false");
    check_set("policy.pipeline_chunks=0", "`policy.pipeline_chunks` is 0, expected a number from 1 to 1024");
    let cluster = "[cluster]\ndevice = { gflops = 1 }\nlink = { gbps = 0, latency_us = 1, launch_us = 1, nodes = 1 }";
    check_file(cluster, "run.toml line 14: cluster.link.gbps is 0, expected a positive number of Gbit/s");
    assert_eq!(
        load(cluster, &["cluster.link.gbps=1", "cluster.device.gflops=0"]).unwrap_err(),
        "--set cluster.device.gflops=0: `cluster.device.gflops` is 0, expected a number above 0"
    );
    assert_eq!(
        load(cluster, &["cluster.link.gbps=1", "cluster.device.memory_gib=0"]).unwrap_err(),
        "--set cluster.device.memory_gib=0: `cluster.device.memory_gib` is 0, expected a number of GiB above 0"
    );
    assert_eq!(
        load(cluster, &["cluster.link.gbps=1", "cluster.device.copy_gbps=-1"]).unwrap_err(),
        "--set cluster.device.copy_gbps=-1: `cluster.device.copy_gbps` is -1, expected a number of Gbit/s above 0"
    );
    check_set("model.top_k=9", "[model] `top_k` is 9, expected at most experts = 4");
    assert_eq!(
        load(cluster, &["cluster.link.gbps=1", "cluster.link.nodes=2"]).unwrap_err(),
        "--set cluster.link.nodes=2: cluster.link.nodes is 2, expected 1 to 1, the number of ranks"
    );
    assert_eq!(
        load("", &["train.sequence_tokens=2048", "train.batch_sequences=1048576"]).unwrap_err(),
        "--set train.batch_sequences=1048576: `train.batch_sequences` is 1048576, expected micro-batches of at most \
         1073741824 tokens, found 2147483648"
    );
    assert_eq!(
        load("", &["cluster.ranks=1000", "cluster.threads=5"]).unwrap_err(),
        "--set cluster.threads=5: `cluster.threads` is 5, expected at most 4096 threads on all 1000 ranks together"
    );
    assert_eq!(
        RunConfig::parse(Path::new("run.toml"), "", &[]).unwrap_err().to_string(),
        "run.toml: [model]: says no model, expected exactly one of `kind`, `preset` and `path`"
    );
}

#[test]
fn assignments_are_refused_as_files_are() {
    check_set("train.stepz=1", "unknown key `train.stepz`, did you mean `steps`?");
    check_set("train.steps=ten", "`train.steps` is \"ten\", expected a whole number of at least 0");
    check_set(
        "policy.name=linna",
        "`policy.name` is \"linna\", expected one of fair, priority, fixed, partition, lina, \
         lina-auto",
    );
    check_set("cluster.engine=nccl", "this build has no engine `nccl`, it has `local`; `lina doctor` says more");
    check_set("train.steps.x=1", "`train.steps` is a table, expected a whole number of at least 0");
    check_set("train.steps", "expected a key and a value, such as train.steps=10");
    check_set(".steps=1", "`.steps` is not a key, expected names with dots between, such as train.steps");
    let error = load("", &["data=[x.txt]"]).unwrap_err();
    assert!(error.starts_with("--set data=[x.txt]: `[x.txt]` is not a TOML value ("), "{error}");
}

#[test]
fn a_changed_configuration_can_be_checked_again() {
    let mut config = load("", &[]).unwrap();
    config.validate().unwrap();
    config.train.batch_sequences = 0;
    assert_eq!(
        config.validate().unwrap_err().to_string(),
        "the configuration: `train.batch_sequences` is 0, expected a number from 1 to 1048576"
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = RunConfig::load(Path::new("no/such.toml"), &[]).unwrap_err().to_string();
    assert!(error.starts_with("cannot read the configuration `no/such.toml`: "), "{error}");
}
