//! `trace.json`: what each rank did when, for Perfetto and `chrome://tracing`.
//!
//! The file is in the Trace Event Format's JSON object form (Google, "Trace Event Format"): a process per rank, a thread
//! per lane, complete events. Perfetto wants the events of one thread nested or apart, and collectives in flight
//! together are neither, so a lane gets as many threads as it has spans at one time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::ReportError;
use crate::files::AtomicFile;

/// What a span of time was spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// Arithmetic, and waiting for its inputs.
    Compute,
    /// An all-to-all micro-op on the wire.
    AllToAll,
    /// An allreduce micro-op on the wire.
    AllReduce,
    /// A copy between the device's memory and its host's.
    Copy,
}

impl Lane {
    /// All lanes, in the order in which they are shown.
    pub const ALL: [Lane; 4] = [Lane::Compute, Lane::AllToAll, Lane::AllReduce, Lane::Copy];

    /// The lane's name as people read it.
    pub fn name(self) -> &'static str {
        match self {
            Lane::Compute => "compute",
            Lane::AllToAll => "all-to-all",
            Lane::AllReduce => "allreduce",
            Lane::Copy => "copy",
        }
    }

    /// Whether a span may lie within another, as a kernel in a layer. On the wire, one transfer is never part of
    /// another.
    pub(crate) fn nests(self) -> bool {
        self == Lane::Compute
    }
}

/// A stretch of a rank's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceSpan {
    /// The rank.
    pub rank: u32,
    /// What kind of work it was.
    pub lane: Lane,
    /// Which work, for instance `expert FFN forward` or `dispatch 2/4`.
    pub name: Cow<'static, str>,
    /// The training step.
    pub step: u32,
    /// The decoder layer, if it belongs to one.
    pub layer: Option<u32>,
    /// When it began, since the run's start.
    pub start_ns: u64,
    /// When it ended, since the run's start; not before `start_ns`.
    pub end_ns: u64,
    /// Bytes moved, 0 for compute.
    pub bytes: u64,
}

/// What a trace is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceFacts {
    /// The run's name, shown in the file's metadata.
    pub title: String,
    /// Whether times are virtual.
    pub emulated: bool,
}

/// Writes a trace a batch of spans at a time. The file appears when [`TraceWriter::finish`] returns; before that it has
/// a temporary name, and a writer that is dropped leaves nothing.
pub struct TraceWriter {
    file: AtomicFile,
    emulated: bool,
    rows: BTreeMap<(u32, Lane), RowPacker>,
}

impl TraceWriter {
    /// Begins a trace at `place`.
    ///
    /// # Errors
    /// [`ReportError::File`].
    pub fn create(place: impl AsRef<Path>, facts: &TraceFacts) -> Result<Self, ReportError> {
        let mut file = AtomicFile::create(place.as_ref())?;
        let clock = if facts.emulated { "virtual time of an emulated cluster" } else { "wall-clock time" };
        let metadata = serde_json::json!({
            "title": facts.title, "time": clock, "emulated": facts.emulated, "writer": "lina",
        });
        file.write(|out| {
            // The first event carries no comma, so that every later one can begin with it.
            write!(
                out,
                "{{\"displayTimeUnit\":\"ms\",\"otherData\":{metadata},\"traceEvents\":[\n\
                 {{\"name\":\"trace_start\",\"ph\":\"M\",\"pid\":0,\"tid\":0,\"args\":{{}}}}"
            )
        })?;
        Ok(Self { file, emulated: facts.emulated, rows: BTreeMap::new() })
    }

    /// Adds spans, of any ranks and lanes and in any order; those of a later call should not begin before those of an
    /// earlier one. A step's spans are a good batch.
    ///
    /// # Errors
    /// [`ReportError::File`].
    pub fn write(&mut self, spans: &[TraceSpan]) -> Result<(), ReportError> {
        let Self { file, emulated, rows } = self;
        for span in in_lane_order(spans) {
            let first_of_rank = rows.range((span.rank, Lane::Compute)..=(span.rank, Lane::Copy)).next().is_none();
            let packer = rows.entry((span.rank, span.lane)).or_insert_with(|| RowPacker::new(span.lane.nests()));
            let known_rows = packer.rows();
            let row = packer.place(span.start_ns, span.end_ns);
            file.write(|out| {
                if first_of_rank {
                    write_process(out, span.rank, *emulated)?;
                }
                if row == known_rows {
                    write_thread(out, span.rank, span.lane, row)?;
                }
                write_span(out, span, row)
            })?;
        }
        Ok(())
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    /// [`ReportError::File`].
    pub fn finish(mut self) -> Result<(), ReportError> {
        self.file.write(|out| out.write_all(b"\n]}\n"))?;
        self.file.commit()
    }
}

/// Spans sorted by rank, lane and start, enclosing spans before enclosed ones: the order that [`RowPacker`] needs.
pub(crate) fn in_lane_order(spans: &[TraceSpan]) -> Vec<&TraceSpan> {
    let mut sorted: Vec<&TraceSpan> = spans.iter().collect();
    sorted.sort_by_key(|span| (span.rank, span.lane, span.start_ns, u64::MAX - span.end_ns));
    sorted
}

/// Distributes the spans of a lane over rows so that spans of a row lie apart, or, with nesting, within each other.
pub(crate) struct RowPacker {
    nesting: bool,
    rows: Vec<Row>,
}

#[derive(Default)]
struct Row {
    /// Ends of the spans that are open at the last start, the innermost last.
    open_ends: Vec<u64>,
    /// The latest end of those that are closed.
    closed_until: u64,
}

impl RowPacker {
    pub(crate) fn new(nesting: bool) -> Self {
        Self { nesting, rows: Vec::new() }
    }

    /// Number of rows used so far.
    pub(crate) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The first row with room for a span, a new one if need be. Spans come in order of their start.
    pub(crate) fn place(&mut self, start: u64, end: u64) -> usize {
        let nesting = self.nesting;
        let free = self.rows.iter_mut().position(|row| row.has_room(start, end, nesting));
        let index = free.unwrap_or_else(|| {
            self.rows.push(Row::default());
            self.rows.len() - 1
        });
        self.rows[index].open_ends.push(end);
        index
    }
}

impl Row {
    fn has_room(&mut self, start: u64, end: u64, nesting: bool) -> bool {
        while let Some(closed) = self.open_ends.pop_if(|open| *open <= start) {
            self.closed_until = self.closed_until.max(closed);
        }
        let enclosed = match self.open_ends.last() {
            None => true,
            Some(&open) => nesting && end <= open,
        };
        enclosed && self.closed_until <= start
    }
}

/// Rank 0 would be process 0, which trace viewers take for the idle process.
fn process_id(rank: u32) -> u64 {
    u64::from(rank) + 1
}

/// Thread ids are unique in the file, since some viewers merge equal ones of different processes.
fn thread_id(rank: u32, lane: Lane, row: usize) -> u64 {
    process_id(rank) * 10_000 + sort_index(lane, row)
}

fn sort_index(lane: Lane, row: usize) -> u64 {
    lane as u64 * 1_000 + row as u64
}

fn write_process(out: &mut impl Write, rank: u32, emulated: bool) -> io::Result<()> {
    let pid = process_id(rank);
    let labels = if emulated { "emulated" } else { "" };
    for (name, args) in [
        ("process_name", format!("\"name\":\"rank {rank}\"")),
        ("process_labels", format!("\"labels\":\"{labels}\"")),
        ("process_sort_index", format!("\"sort_index\":{rank}")),
    ] {
        write!(out, ",\n{{\"name\":\"{name}\",\"ph\":\"M\",\"pid\":{pid},\"args\":{{{args}}}}}")?;
    }
    Ok(())
}

fn write_thread(out: &mut impl Write, rank: u32, lane: Lane, row: usize) -> io::Result<()> {
    let (pid, tid) = (process_id(rank), thread_id(rank, lane, row));
    let suffix = if row == 0 { String::new() } else { format!(" {}", row + 1) };
    for (name, args) in [
        ("thread_name", format!("\"name\":\"{}{suffix}\"", lane.name())),
        ("thread_sort_index", format!("\"sort_index\":{}", sort_index(lane, row))),
    ] {
        write!(out, ",\n{{\"name\":\"{name}\",\"ph\":\"M\",\"pid\":{pid},\"tid\":{tid},\"args\":{{{args}}}}}")?;
    }
    Ok(())
}

fn write_span(out: &mut impl Write, span: &TraceSpan, row: usize) -> io::Result<()> {
    let duration_ns = span.end_ns.saturating_sub(span.start_ns);
    write!(
        out,
        ",\n{{\"name\":{},\"cat\":\"{}\",\"ph\":\"X\",\"ts\":{},\"dur\":{},\"pid\":{},\"tid\":{},\"args\":{{\"step\":{}",
        serde_json::Value::from(span.name.as_ref()),
        span.lane.name(),
        Microseconds(span.start_ns),
        Microseconds(duration_ns),
        process_id(span.rank),
        thread_id(span.rank, span.lane, row),
        span.step,
    )?;
    if let Some(layer) = span.layer {
        write!(out, ",\"layer\":{layer}")?;
    }
    if span.bytes > 0 {
        write!(out, ",\"bytes\":{}", span.bytes)?;
    }
    out.write_all(b"}}")
}

/// Nanoseconds as decimal microseconds, the format's unit, without the rounding of a float.
struct Microseconds(u64);

impl std::fmt::Display for Microseconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn span(rank: u32, lane: Lane, name: &'static str, start_ns: u64, end_ns: u64) -> TraceSpan {
        TraceSpan { rank, lane, name: name.into(), step: 4, layer: Some(2), start_ns, end_ns, bytes: 64 }
    }

    fn write(batches: &[Vec<TraceSpan>], emulated: bool) -> Value {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("trace.json");
        let facts = TraceFacts { title: "a \"run\"".into(), emulated };
        let mut trace = TraceWriter::create(&file, &facts).unwrap();
        for batch in batches {
            trace.write(batch).unwrap();
        }
        assert!(!file.exists());
        trace.finish().unwrap();
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap()
    }

    /// Complete events as (thread, start, end) in nanoseconds.
    fn events(trace: &Value) -> Vec<(u64, u64, u64)> {
        let ns = |value: &Value| (value.as_f64().unwrap() * 1000.0).round() as u64;
        let complete = trace["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X");
        complete.map(|e| (e["tid"].as_u64().unwrap(), ns(&e["ts"]), ns(&e["ts"]) + ns(&e["dur"]))).collect()
    }

    fn metadata<'a>(trace: &'a Value, name: &str) -> Vec<(&'a Value, &'a Value)> {
        let all = trace["traceEvents"].as_array().unwrap().iter();
        all.filter(|e| e["name"] == name)
            .map(|e| (&e["pid"], e["args"].as_object().unwrap().values().next().unwrap()))
            .collect()
    }

    #[test]
    fn ranks_are_processes_and_lanes_threads() {
        let trace = write(
            &[vec![
                span(1, Lane::AllToAll, "dispatch \"1\"", 1_500, 2_750),
                span(0, Lane::Compute, "gate", 0, 1_000_000_007),
            ]],
            true,
        );
        assert_eq!(trace["otherData"]["time"], "virtual time of an emulated cluster");
        assert_eq!(trace["otherData"]["title"], "a \"run\"");
        assert_eq!(
            metadata(&trace, "process_name"),
            [(&Value::from(1), &Value::from("rank 0")), (&Value::from(2), &Value::from("rank 1"))]
        );
        assert_eq!(
            metadata(&trace, "thread_name"),
            [(&Value::from(1), &Value::from("compute")), (&Value::from(2), &Value::from("all-to-all"))]
        );
        assert_eq!(metadata(&trace, "thread_sort_index").len(), 2);
        assert_eq!(metadata(&trace, "process_sort_index").len(), 2);
        let dispatch = trace["traceEvents"].as_array().unwrap().last().unwrap();
        assert_eq!(dispatch["name"], "dispatch \"1\"");
        assert_eq!(dispatch["cat"], "all-to-all");
        assert_eq!((dispatch["ts"].as_f64(), dispatch["dur"].as_f64()), (Some(1.5), Some(1.25)));
        assert_eq!(dispatch["args"], serde_json::json!({"step": 4, "layer": 2, "bytes": 64}));
    }

    #[test]
    fn real_time_is_called_so() {
        let trace = write(&[], false);
        assert_eq!(trace["otherData"]["time"], "wall-clock time");
        assert_eq!(trace["otherData"]["emulated"], false);
    }

    #[test]
    fn spans_of_a_thread_are_nested_or_apart() {
        // A small generator is enough to make every kind of overlap.
        let mut state = 7u64;
        let mut next = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        let batches: Vec<Vec<TraceSpan>> = (0..4)
            .map(|batch| {
                (0..200)
                    .map(|_| {
                        let start = batch * 1000 + next(1000);
                        span(next(2) as u32, Lane::ALL[next(4) as usize], "x", start, start + next(90))
                    })
                    .collect()
            })
            .collect();
        let events = events(&write(&batches, false));
        assert_eq!(events.len(), 800);
        for (i, &(thread, start, end)) in events.iter().enumerate() {
            for &(other, from, to) in &events[i + 1..] {
                let apart = end <= from || to <= start;
                let compute = thread / 1000 % 10 == 0;
                let nested = (start <= from && to <= end) || (from <= start && end <= to);
                assert!(thread != other || apart || (compute && nested), "{start}..{end} {from}..{to}");
            }
        }
    }

    #[test]
    fn a_lane_has_one_thread_unless_spans_overlap() {
        let mut packer = RowPacker::new(false);
        assert_eq!([(0, 10), (10, 20), (15, 18), (18, 30), (20, 25)].map(|(s, e)| packer.place(s, e)), [0, 0, 1, 1, 0]);
        let mut nesting = RowPacker::new(true);
        assert_eq!([(0, 10), (2, 8), (7, 9), (8, 10)].map(|(s, e)| nesting.place(s, e)), [0, 0, 1, 0]);
    }
}
