//! `lina profile`, `lina bench infer` and `lina bench decode`: what tokens choose, what placements of experts come to, and
//! how far a token is from what bounds it.

use lina_infer::{
    DecodeOptions, InferBenchOptions, ProfileOptions, Scheduler, bench_decode, bench_infer, model_folder, profile,
};
use lina_train::{Engine, Override};

use crate::arguments::{BenchDecodeArguments, BenchInferArguments, OutputArguments, ProfileArguments};
use crate::commands::{Failure, arithmetic};
use crate::output;

pub(crate) fn run_profile(arguments: ProfileArguments) -> Result<(), Failure> {
    let OutputArguments { json, quiet } = arguments.output;
    let summary = profile(&ProfileOptions {
        model: model_folder(&arguments.model)?,
        data: arguments.data,
        out: arguments.out,
        length: arguments.path_length,
        held_out: arguments.held_out,
        sequence_tokens: arguments.seq_tokens,
        batch_tokens: arguments.batch_tokens,
        threads: arguments.threads,
        quiet,
    })?;
    Ok(output::table_or_json(json, quiet, &summary.table(), &summary)?)
}

pub(crate) fn run_bench(arguments: BenchInferArguments) -> Result<(), Failure> {
    let OutputArguments { json, quiet } = arguments.output;
    let overrides = arguments.set.iter().map(|assignment| Override::set(assignment)).collect::<Result<_, _>>()?;
    let schedulers = if arguments.schedulers.is_empty() {
        Scheduler::defaults()
    } else {
        let named = arguments.schedulers.iter().map(|name| name.trim().parse());
        named.collect::<Result<_, String>>().map_err(|error| Failure::new(format!("--schedulers: {error}"), 2))?
    };
    let options = InferBenchOptions {
        model: model_folder(&arguments.model)?,
        data: arguments.data,
        config: arguments.config,
        overrides,
        schedulers,
        profile: arguments.profile,
        synthetic_skew: arguments.synthetic_skew,
        out: arguments.out,
        quiet,
    };
    let Some(summary) = bench_infer(&options)? else { return Ok(()) };
    Ok(output::table_or_json(json, quiet, &summary.table(), &summary)?)
}

pub(crate) fn run_bench_decode(arguments: BenchDecodeArguments) -> Result<(), Failure> {
    let OutputArguments { json, quiet } = arguments.output;
    let summary = bench_decode(&DecodeOptions {
        model: arguments.model,
        arithmetic: arithmetic(&arguments.device, Engine::Local),
        threads: arguments.threads,
        tokens: arguments.tokens,
        prompt_tokens: arguments.prompt_tokens,
        rounds: arguments.rounds,
        quiet,
    })?;
    Ok(output::table_or_json(json, quiet, &summary.table(), &summary)?)
}
