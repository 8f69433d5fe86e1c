//! `report.html`: one self-contained page about a run, readable without a network, in light and in dark.
//!
//! Charts are SVG drawn here, so the page needs no script to show them; the little script only adds quick tooltips, the
//! timeline's zoom and the switch between light and dark.

mod expert_load;
mod inference;
mod loss;
mod policies;
mod step_time;
mod studies;
mod svg;
mod timeline;

pub use expert_load::{ExpertLoad, LayerLoad};
pub use inference::{InferenceComparison, LayerAccuracyNumbers, SchedulerResult};
pub use loss::LossCurve;
pub use policies::PolicyComparison;
pub use step_time::StepTime;
pub use studies::BenchTables;
pub use timeline::Timeline;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use crate::ReportError;
use crate::files::AtomicFile;
use crate::format::{count, percent, significant, thousands};
use svg::escape;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// What a report is about. Unknown facts stay out of the page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunFacts {
    /// The model's name or family.
    pub model: Option<String>,
    /// Parameters of the model, all experts included.
    pub parameters: Option<u64>,
    /// Parameters that one token uses.
    pub active_parameters: Option<u64>,
    /// Ranks of the job.
    pub ranks: Option<u32>,
    /// Engine: `local`, `mpi` or `nccl`.
    pub engine: Option<String>,
    /// Communication policy.
    pub policy: Option<String>,
    /// Whether times are virtual.
    pub emulated: bool,
    /// Median over the run's steps.
    pub tokens_per_s: Option<f64>,
    /// Anything else worth knowing, as name and value, shown in this order.
    pub more: Vec<(String, String)>,
}

/// The content of a report. Every section is optional: what is empty or `None` is left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The page's title, for instance the run directory's name.
    pub title: String,
    /// What was run.
    pub facts: RunFacts,
    /// Loss over the steps.
    pub loss: Option<LossCurve>,
    /// Where each step's time went, in order of steps.
    pub step_times: Vec<StepTime>,
    /// How tokens spread over experts.
    pub expert_load: Option<ExpertLoad>,
    /// One step in detail.
    pub timeline: Option<Timeline>,
    /// Policies side by side.
    pub policies: Option<PolicyComparison>,
    /// What was measured beside that.
    pub tables: BenchTables,
    /// Schedulers of experts side by side.
    pub inference: Option<InferenceComparison>,
}

impl Report {
    /// The page as HTML.
    pub fn render(&self) -> String {
        let mut page = String::with_capacity(64 << 10);
        let title = escape(&self.title);
        // Writing to a string cannot fail.
        let _ = write!(
            page,
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{title} – Lina report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        );
        self.header(&mut page, &title);
        self.figures(&mut page);
        let [paper, partition_sweep, pipelining] = self.tables.sections();
        let inference = self.inference.as_ref().map(InferenceComparison::sections).into_iter().flatten();
        let sections = [
            self.policies.as_ref().and_then(PolicyComparison::section),
            paper,
            partition_sweep,
            pipelining,
            self.loss.as_ref().and_then(LossCurve::section),
            step_time::section(&self.step_times),
            self.timeline.as_ref().and_then(Timeline::section),
            self.expert_load.as_ref().and_then(ExpertLoad::section),
        ];
        for section in inference.chain(sections).flatten() {
            section.render(&mut page, self.facts.emulated);
        }
        let _ = write!(page, "</main>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n");
        page
    }

    /// Writes the page to a file, which appears whole or not at all.
    ///
    /// # Errors
    /// [`ReportError::File`].
    pub fn write(&self, place: impl AsRef<Path>) -> Result<(), ReportError> {
        let page = self.render();
        let mut file = AtomicFile::create(place.as_ref())?;
        file.write(|out| out.write_all(page.as_bytes()))?;
        file.commit()
    }

    fn header(&self, page: &mut String, title: &str) {
        let facts = &self.facts;
        let badge = if facts.emulated {
            "<span class=\"badge\" title=\"Times are virtual time of an emulated cluster\">EMULATED</span>"
        } else {
            ""
        };
        let _ = write!(
            page,
            "<header>\n<div class=\"bar\"><span class=\"brand\">Lina</span>\
             <button id=\"theme\" type=\"button\" title=\"Switch between light and dark\">◐</button></div>\n\
             <h1>{title}{badge}</h1>\n<dl class=\"facts\">"
        );
        let parameters = facts.parameters.map(|all| match facts.active_parameters {
            Some(active) => format!("{} ({} active)", count(all), count(active)),
            None => count(all),
        });
        let known = [
            ("Model", facts.model.clone()),
            ("Parameters", parameters),
            ("Ranks", facts.ranks.map(|ranks| ranks.to_string())),
            ("Engine", facts.engine.clone()),
            ("Policy", facts.policy.clone()),
        ];
        let known = known.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?)));
        for (name, value) in known.chain(facts.more.iter().cloned()) {
            let (name, value) = (escape(&name), escape(&value));
            let _ = write!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>");
        }
        page.push_str("</dl>\n</header>\n");
    }

    /// The few numbers that are looked for first.
    fn figures(&self, page: &mut String) {
        let clock = if self.facts.emulated { "virtual time" } else { "" };
        let mut figures: Vec<(&str, String, String)> = Vec::new();
        let last = |points: &[(u64, f64)]| points.iter().rev().map(|&(_, loss)| loss).find(|loss| loss.is_finite());
        if let Some(loss) = &self.loss {
            if let Some(value) = last(&loss.train) {
                figures.push(("Training loss, at the end", format!("{value:.3}"), String::new()));
            }
            if let Some(value) = last(&loss.held_out) {
                let perplexity = format!("perplexity {}", significant(value.exp()));
                figures.push(("Held-out loss", format!("{value:.3}"), perplexity));
            }
        }
        if let Some(summary) = step_time::summary(&self.step_times) {
            let step = format!("{} ms", significant(summary.step_ms_median));
            figures.push(("Step, median", step, clock.into()));
            let share = percent(summary.a2a_blocked_share);
            figures.push(("Blocked on all-to-all", share, "of all steps' time".into()));
        }
        if let Some(rate) = self.facts.tokens_per_s.filter(|rate| rate.is_finite()) {
            figures.push(("Tokens a second", thousands(rate.round() as u64), clock.into()));
        }
        figures.extend(self.inference.iter().flat_map(InferenceComparison::figures));
        if figures.is_empty() {
            return;
        }
        page.push_str("<div class=\"figures\">");
        for (name, value, note) in figures {
            let _ = write!(
                page,
                "<div class=\"figure\"><div class=\"name\">{name}</div><div class=\"value\">{value}</div>\
                 <div class=\"note\">{note}</div></div>"
            );
        }
        page.push_str("</div>\n");
    }
}

/// A chart or table with its heading.
struct Section {
    id: &'static str,
    heading: &'static str,
    /// HTML of one or two sentences on what there is to see.
    caption: String,
    /// HTML of the chart.
    body: String,
    /// Whether it shows times, which are virtual on an emulated cluster.
    shows_time: bool,
}

impl Section {
    fn render(&self, page: &mut String, emulated: bool) {
        let Self { id, heading, caption, body, .. } = self;
        let badge = if emulated && self.shows_time { "<span class=\"badge small\">virtual time</span>" } else { "" };
        let _ = write!(
            page,
            "<section id=\"{id}\">\n<h2>{heading}{badge}</h2>\n<p class=\"caption\">{caption}</p>\n{body}\n</section>\n"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::row;
    use crate::{Lane, PaperRow, TraceSpan};

    fn full() -> Report {
        let span = |rank, lane, start_ns, end_ns| TraceSpan {
            rank,
            lane,
            name: "dispatch <1>".into(),
            step: 7,
            layer: Some(0),
            start_ns,
            end_ns,
            bytes: 4096,
        };
        Report {
            title: "a <b> & \"c\"".into(),
            facts: RunFacts {
                model: Some("</style><script>alert(1)</script>".into()),
                parameters: Some(46_700_000_000),
                active_parameters: Some(12_900_000_000),
                ranks: Some(2),
                emulated: true,
                more: vec![("it's".into(), "<i>".into())],
                ..RunFacts::default()
            },
            loss: Some(LossCurve {
                train: vec![(0, 5.0), (1, 4.5), (2, f64::NAN), (3, 4.0)],
                held_out: vec![(3, 4.25)],
            }),
            step_times: vec![StepTime { step: 0, compute_ms: 5.0, a2a_blocked_ms: 3.0, other_blocked_ms: 2.0 }],
            expert_load: Some(ExpertLoad {
                steps: "step 3".into(),
                layers: vec![LayerLoad { layer: 0, tokens: vec![10, 30, 0] }],
            }),
            timeline: Some(Timeline {
                step: 7,
                spans: vec![
                    span(0, Lane::Compute, 0, 1000),
                    span(0, Lane::AllToAll, 500, 2000),
                    span(1, Lane::AllReduce, 0, 2000),
                ],
            }),
            policies: Some(PolicyComparison {
                rows: vec![row("fair", 29.0), row("li<na", 18.0)],
                emulated: true,
                link_bound_ms: Some(12.0),
            }),
            tables: BenchTables {
                paper: PaperRow::beside(&[row("fair", 29.0), row("li<na", 18.0)], 8),
                partition_sweep: vec![row("lina-auto<", 18.0)],
                pipelining: vec![row("li<na", 18.0)],
            },
            inference: Some(inference::tests::comparison()),
        }
    }

    #[test]
    fn every_section_is_there_and_all_text_is_escaped() {
        let page = full().render();
        for id in [
            "policies",
            "paper",
            "partition-sweep",
            "pipelining",
            "loss",
            "step-time",
            "timeline",
            "experts",
            "schedulers",
            "inference-paper",
            "estimates",
            "balance",
        ] {
            assert_eq!(page.matches(&format!("<section id=\"{id}\">")).count(), 1, "{id}");
        }
        assert!(page.contains("<h1>a &lt;b&gt; &amp; &quot;c&quot;<span class=\"badge\""));
        assert!(page.contains("&lt;script&gt;alert(1)"));
        assert_eq!(page.matches("<script>").count(), 1, "our own script only");
        assert!(page.contains("it&#39;s") && page.contains("&lt;i&gt;"));
        assert!(page.contains("dispatch &lt;1&gt;") && page.contains("li&lt;na"));
        assert!(page.contains("li&lt;na@oracle") && page.contains("ora&lt;cle") && !page.contains("ora<cle"));
        assert!(!page.contains("NaN") && !page.contains(">inf"));
    }

    #[test]
    fn the_page_is_self_contained_and_its_tags_are_balanced() {
        let page = full().render();
        for outside in ["http://", "https://", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        for tag in ["section", "svg", "g", "text", "title", "table", "tr", "td", "th", "div", "p", "span"] {
            let opened = page.matches(&format!("<{tag} ")).count() + page.matches(&format!("<{tag}>")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "<{tag}>");
        }
    }

    #[test]
    fn what_is_emulated_is_called_emulated() {
        assert!(full().render().contains(">EMULATED</span>"));
        let mut real = full();
        real.facts.emulated = false;
        if let Some(policies) = &mut real.policies {
            policies.emulated = false;
        }
        if let Some(inference) = &mut real.inference {
            inference.emulated = false;
        }
        let page = real.render();
        let (_, body) = page.split_once("<body>").unwrap();
        assert!(!body.contains("EMULATED") && !body.contains("emulated") && !body.contains("virtual"));
    }

    #[test]
    fn an_empty_report_is_a_page_without_sections() {
        let page = Report { title: "empty".into(), ..Report::default() }.render();
        assert!(page.contains("<h1>empty</h1>") && !page.contains("<section"));
        let nothing = Report {
            loss: Some(LossCurve { train: vec![(0, f64::NAN)], held_out: vec![] }),
            expert_load: Some(ExpertLoad { steps: String::new(), layers: vec![] }),
            timeline: Some(Timeline { step: 0, spans: vec![] }),
            policies: Some(PolicyComparison { rows: vec![], emulated: false, link_bound_ms: None }),
            ..Report::default()
        };
        assert!(!nothing.render().contains("<section"));
    }

    #[test]
    fn the_file_is_the_page() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("report.html");
        full().write(&place).unwrap();
        assert_eq!(std::fs::read_to_string(&place).unwrap(), full().render());
    }
}
