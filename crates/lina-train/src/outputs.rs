//! What a run leaves in its directory for people: the trace and the report.

use std::path::Path;

use lina_comm::{Lane, Span};
use lina_model::ParameterLayout;
use lina_plan::ExpertLayout;
use lina_report::{ExpertLoad, LossCurve, Report, RunFacts, Timeline, TraceFacts, TraceSpan, TraceWriter};

use crate::TrainError;
use crate::bench::BenchSummary;
use crate::config::RunConfig;
use crate::observer::RunRecord;

/// Writes `trace.json` and `report.html`.
pub(crate) fn write_outputs(
    out: &Path,
    config: &RunConfig,
    experts: &ExpertLayout,
    record: &RunRecord,
    spans: &[Span],
    bench: Option<&BenchSummary>,
    network: Option<&str>,
) -> Result<(), TrainError> {
    let emulated = config.is_emulated();
    let spans: Vec<TraceSpan> = spans.iter().map(trace_span).collect();
    let title = format!("{} on {} ranks, policy {}", config.model.kind, experts.ranks(), config.policy.name);
    let mut trace = TraceWriter::create(out.join("trace.json"), &TraceFacts { title, emulated })?;
    trace.write(&spans)?;
    trace.finish()?;

    let last_step = spans.iter().map(|span| span.step).max();
    let timeline = last_step.map(|step| Timeline {
        step: u64::from(step),
        spans: spans.iter().filter(|span| span.step == step).cloned().collect(),
    });
    let (parameters, active) = parameter_counts(config);
    let cluster = &config.cluster;
    let mut more = vec![
        ("experts".to_owned(), format!("{}, top-{}", config.model.experts, config.model.top_k)),
        ("global batch".to_owned(), {
            format!("{} sequences of {} tokens", config.train.batch_sequences, config.train.sequence_tokens)
        }),
    ];
    if let (Some(link), Some(device)) = (&cluster.link, &cluster.device) {
        more.push(("emulated link".to_owned(), format!("{} Gbit/s, {} us", link.gbps, link.latency_us)));
        more.push(("emulated device".to_owned(), format!("{} GFLOP/s", device.gflops)));
    }
    more.extend(config.cluster.emulated_device_sentence().map(|sentence| ("devices".to_owned(), sentence)));
    more.extend(network.map(|sentence| ("network".to_owned(), sentence.to_owned())));
    let report = Report {
        title: format!("{} training", config.model.kind),
        facts: RunFacts {
            model: Some(format!("{}, {} layers of {}", config.model.kind, config.model.layers, config.model.hidden)),
            parameters: Some(parameters),
            active_parameters: Some(active),
            ranks: Some(experts.ranks() as u32),
            engine: Some(cluster.engine.name().to_owned()),
            policy: Some(config.policy.name.to_string()),
            emulated,
            tokens_per_s: Some(record.tokens_per_s()),
            more,
        },
        loss: Some(LossCurve { train: record.losses.clone(), held_out: record.held_out.clone() }),
        step_times: record.step_times.clone(),
        expert_load: (!record.expert_load.is_empty()).then(|| ExpertLoad {
            steps: format!("steps {} to {}", record.load_steps.0, record.load_steps.1),
            layers: record.expert_load.clone(),
        }),
        timeline,
        policies: bench.map(BenchSummary::comparison),
        tables: bench.map(BenchSummary::tables).unwrap_or_default(),
        ..Report::default()
    };
    report.write(out.join("report.html"))?;
    Ok(())
}

fn trace_span(span: &Span) -> TraceSpan {
    let (part, parts) = span.part;
    let name = match span.lane {
        Lane::AllToAll if parts > 1 => format!("{} {}/{parts}", span.name, part + 1).into(),
        Lane::AllReduce if span.bytes > 0 => format!("{} {part}", span.name).into(),
        _ => span.name.into(),
    };
    TraceSpan {
        rank: span.rank,
        lane: match span.lane {
            Lane::Compute => lina_report::Lane::Compute,
            Lane::AllToAll => lina_report::Lane::AllToAll,
            Lane::AllReduce => lina_report::Lane::AllReduce,
            Lane::Copy => lina_report::Lane::Copy,
        },
        name,
        step: span.step as u32,
        layer: span.layer,
        start_ns: span.start,
        end_ns: span.end,
        bytes: span.bytes,
    }
}

/// All parameters, and those that one token uses.
pub(crate) fn parameter_counts(config: &RunConfig) -> (u64, u64) {
    let model = &config.model;
    let layout = ParameterLayout::new(model, &[]);
    let experts = |of_each_layer: usize| (model.moe_layers() * of_each_layer * layout.expert_elements()) as u64;
    let dense = layout.dense_len() as u64;
    (dense + experts(model.experts), dense + experts(model.top_k))
}
