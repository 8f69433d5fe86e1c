//! `lina serve`: from arguments to a server, and its figures when it has ended.

use std::path::Path;
use std::time::Duration;

use lina_infer::{EngineOptions, ModelOptions, model_folder, with_engine};
use lina_serve::{Listener, ServeError, ServeOptions, ServeSummary, ServedModel, Shutdown, Timeouts, serve};
use lina_train::ClusterConfig;

use crate::arguments::{OutputArguments, ServeArguments};
use crate::commands::{Failure, arithmetic, job_cluster, outlive_launcher};
use crate::{output, signals};

/// Where the key is taken from if no argument gives it: arguments can be seen by everybody on the machine.
const KEY_VARIABLE: &str = "LINA_API_KEY";
/// Longest time that can be asked for, in seconds: a day.
const LONGEST_TIMEOUT_S: f64 = 86_400.0;

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        Failure::new(&error, error.exit_code())
    }
}

/// Carries the command out.
pub(crate) fn run(mut arguments: ServeArguments) -> Result<(), Failure> {
    // Clients call a model of the hub by the name that it was asked for by.
    if arguments.served_model_name.is_empty() && !arguments.model.is_dir() {
        arguments.served_model_name.extend(arguments.model.to_str().map(str::to_owned));
    }
    arguments.model = model_folder(&arguments.model)?;
    let cluster = job_cluster(&arguments.job);
    let model_options = model_options(&arguments, &cluster)?;
    let engine_options = EngineOptions {
        max_queue: arguments.max_queue,
        max_running: arguments.max_running,
        ..EngineOptions::default()
    };
    if !cluster.leads() {
        outlive_launcher(&cluster)?;
        with_engine(&model_options, engine_options, |_| ())?;
        return Ok(());
    }
    let options = serve_options(&arguments)?;
    let model = ServedModel::for_model_folder(&arguments.model, names(&arguments))?;
    let listener = Listener::bind(&options)?;
    let OutputArguments { json, quiet } = arguments.output;
    let shutdown = Shutdown::new();
    let drain = shutdown.clone();
    signals::drain_on_signals(quiet, move || drain.request())
        .map_err(|error| Failure::new(format_args!("ctrl-C cannot be listened for: {error}"), 1))?;
    let served = with_engine(&model_options, engine_options, move |engine| {
        if !quiet {
            announce(&listener, &options, &model.names);
        }
        serve(listener, engine, model, options, &shutdown)
    })?;
    let Some(summary) = served.transpose()? else { return Ok(()) };
    if json {
        return Ok(output::json(&summary)?);
    }
    Ok(output::text(&summary_text(&summary))?)
}

fn model_options(arguments: &ServeArguments, cluster: &ClusterConfig) -> Result<ModelOptions, Failure> {
    let bad = |option: &str, reason: String| Failure::new(format_args!("{option}: {reason}"), 2);
    Ok(ModelOptions {
        model: arguments.model.clone(),
        ranks: cluster.ranks,
        engine: cluster.engine,
        arithmetic: arithmetic(&arguments.device, cluster.engine),
        threads: cluster.threads,
        max_sequence_tokens: arguments.max_sequence_tokens,
        step_tokens: arguments.step_tokens,
        cache_gib: arguments.cache_gib,
        placement: arguments.placement.parse().map_err(|reason| bad("--placement", reason))?,
        estimator: arguments.estimator.parse().map_err(|reason| bad("--estimator", reason))?,
        profile: arguments.profile.clone(),
        slots: arguments.slots,
        verify_every: arguments.verify_every,
    })
}

fn serve_options(arguments: &ServeArguments) -> Result<ServeOptions, Failure> {
    let timeout_s = arguments.client_timeout_s;
    if !(timeout_s > 0.0 && timeout_s <= LONGEST_TIMEOUT_S) {
        let message =
            format!("--client-timeout-s is {timeout_s}, expected a number above 0, at most {LONGEST_TIMEOUT_S}");
        return Err(Failure::new(message, 2));
    }
    let timeout = Duration::from_secs_f64(timeout_s);
    Ok(ServeOptions {
        host: arguments.host.clone(),
        port: arguments.port,
        api_key: api_key(arguments.api_key.clone())?,
        max_body_bytes: arguments.max_body_bytes,
        max_prompt_tokens: arguments.max_prompt_tokens,
        max_connections: arguments.max_connections,
        timeouts: Timeouts { head: timeout, body: timeout, write: timeout },
    })
}

/// The key that requests must bring: one that a header can carry.
fn api_key(argument: Option<String>) -> Result<Option<String>, Failure> {
    let (source, key) = match (argument, std::env::var_os(KEY_VARIABLE)) {
        (Some(key), _) => ("--api-key", key),
        // What is not UTF-8 is refused below.
        (None, Some(key)) => (KEY_VARIABLE, key.to_string_lossy().into_owned()),
        (None, None) => return Ok(None),
    };
    if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        let found = if key.is_empty() { "is empty" } else { "has other characters" };
        let message = format!("{source} {found}, expected ASCII letters, digits and signs without spaces");
        return Err(Failure::new(message, 2));
    }
    Ok(Some(key))
}

/// The model's names: those given, or its folder's.
fn names(arguments: &ServeArguments) -> Vec<String> {
    if !arguments.served_model_name.is_empty() {
        return arguments.served_model_name.clone();
    }
    let folder = &arguments.model;
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    // `.` and the like have a name only in full.
    let in_full = || folder.canonicalize().ok().and_then(|path| name(&path));
    vec![name(folder).or_else(in_full).unwrap_or_else(|| folder.display().to_string())]
}

/// Says where the server is, and what a stranger could do with it.
fn announce(listener: &Listener, options: &ServeOptions, names: &[String]) {
    let address = listener.address();
    let key = if options.api_key.is_some() { ", with an API key" } else { "" };
    output::say(&format!("serving {} at http://{address}{key}", names.join(" and ")));
    if !address.ip().is_loopback() && options.api_key.is_none() {
        output::say(&format!("note: whoever reaches {address} can use the model, as there is no --api-key"));
    }
}

fn summary_text(summary: &ServeSummary) -> String {
    format!(
        "served         {} answers, {} given up by their clients\ntokens         {} of prompts, {} generated\n\
         steps          {}\nwall clock     {:.1} s",
        summary.finished_requests,
        summary.cancelled_requests,
        summary.prompt_tokens,
        summary.generated_tokens,
        summary.steps,
        summary.wall_s,
    )
}
