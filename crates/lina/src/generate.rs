//! `lina generate`: an answer on stdout while it is made, or one object when it is complete.

use std::io::{self, ErrorKind, Write};
use std::ops::ControlFlow;
use std::path::Path;

use lina_infer::{FinishReason, GenerateOptions, GenerateSummary, ModelOptions, SamplingOptions, generate};

use crate::arguments::{GenerateArguments, OutputArguments};
use crate::commands::{Failure, arithmetic, job_cluster, outlive_launcher};
use crate::output;

/// Carries the command out.
pub(crate) fn run(arguments: GenerateArguments) -> Result<(), Failure> {
    let cluster = job_cluster(&arguments.job);
    outlive_launcher(&cluster)?;
    let prompt = match (arguments.prompt, arguments.prompt_file) {
        (Some(prompt), _) => prompt,
        (None, Some(file)) => read_prompt(&file)?,
        (None, None) => return Err(Failure::new("a prompt is missing, expected --prompt or --prompt-file", 2)),
    };
    let model = ModelOptions {
        model: arguments.model,
        ranks: cluster.ranks,
        engine: cluster.engine,
        arithmetic: arithmetic(&arguments.device, cluster.engine),
        threads: cluster.threads,
        ..Default::default()
    };
    let sampling = SamplingOptions {
        greedy: arguments.greedy,
        temperature: arguments.temperature,
        top_p: arguments.top_p,
        top_k: arguments.top_k,
        seed: arguments.seed,
        repetition_penalty: arguments.repetition_penalty,
    };
    let OutputArguments { json, quiet } = arguments.output;
    let options = GenerateOptions {
        model,
        prompt,
        chat: arguments.chat,
        max_new_tokens: arguments.max_new_tokens,
        sampling,
        stop: arguments.stop,
    };
    let mut written = Ok(());
    let show = |text: &str| {
        if json {
            return ControlFlow::Continue(());
        }
        written = write_now(text);
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let Some(summary) = generate(&options, show)? else { return Ok(()) };
    if json {
        return Ok(output::json(&summary)?);
    }
    if written.is_ok() && !summary.text.ends_with('\n') {
        written = write_now("\n");
    }
    if !quiet {
        output::say(&summary_text(&summary));
    }
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn read_prompt(file: &Path) -> Result<String, Failure> {
    let fail = |reason: String| Failure::new(format_args!("--prompt-file: {reason}"), 2);
    let bytes = std::fs::read(file).map_err(|error| fail(format!("cannot read `{}`: {error}", file.display())))?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        fail(format!("`{}` is not UTF-8 text: the byte at offset {offset} starts no valid character", file.display()))
    })
}

/// A piece of text that is to be seen at once.
fn write_now(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

fn summary_text(summary: &GenerateSummary) -> String {
    let reason = match summary.finish_reason {
        Some(FinishReason::Stop) => ", ended by the model or a stop text",
        Some(FinishReason::Length) => ", as long as it may be",
        None => "",
    };
    let tokens = summary.token_ids.len();
    let pace = match tokens {
        0 => String::new(),
        1 => format!("; after {:.0} ms", summary.first_token_ms),
        _ => format!("; the first after {:.0} ms, then {:.1} tokens/s", summary.first_token_ms, summary.tokens_per_s),
    };
    let seed = summary.seed.map_or_else(String::new, |seed| format!("; seed {seed}"));
    format!("[{tokens} tokens after a prompt of {}{reason}{pace}{seed}]", summary.prompt_tokens)
}
