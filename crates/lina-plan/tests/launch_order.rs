//! What each policy launches when, in a step of a model of two MoE layers: one rank, whose all-to-alls take 100 ns a
//! layer and exchange and whose allreduces take 1 ns an element, each class on a channel of its own. Plans are those
//! that the policies have learnt from the steps before.

use std::collections::VecDeque;

use lina_plan::{
    AllToAllKind, Direction, GapPlan, GapTimings, GroupId, Launch, Leg, Policy, PolicyRules, PolicySettings, Sequencer,
    WeightGradients,
};

const EXCHANGE_NS: u64 = 100;

/// One rank on a clock of its own.
struct Rank {
    rules: PolicyRules,
    sequencer: Sequencer,
    now: u64,
    kinds: Vec<AllToAllKind>,
    /// When the operations in flight complete, oldest first.
    all_to_alls: VecDeque<u64>,
    all_reduces: VecDeque<u64>,
    all_reduces_done: u32,
    launches: Vec<String>,
}

impl Rank {
    /// A step under `plan` from time 0, run to its end.
    fn step(rules: PolicyRules, plan: GapPlan) -> Self {
        let mut rank = Rank {
            rules,
            sequencer: Sequencer::default(),
            now: 0,
            kinds: Vec::new(),
            all_to_alls: VecDeque::new(),
            all_reduces: VecDeque::new(),
            all_reduces_done: 0,
            launches: Vec::new(),
        };
        rank.sequencer.begin_step(0, rules, plan);
        rank.sequencer.begin_micro_batch(true);
        for layer in 0..2 {
            rank.compute(50);
            rank.moe(Direction::Forward, layer);
        }
        for layer in [1, 0] {
            rank.moe(Direction::Backward, layer);
            rank.compute(20);
            rank.gradient(100);
            rank.compute(100);
            rank.gradient(350);
            rank.compute(280);
        }
        rank.sequencer.flush(rank.now);
        rank.launch();
        while !rank.sequencer.gradients_finished() {
            let last = *rank.all_reduces.back().expect("what is not finished is in flight");
            rank.compute(last - rank.now);
        }
        rank
    }

    fn moe(&mut self, direction: Direction, layer: u32) {
        let chunks = self.rules.moe.chunks as u32;
        let (first, second) = match direction {
            Direction::Forward => (Leg::Dispatch, Leg::Combine),
            Direction::Backward => (Leg::Combine, Leg::Dispatch),
        };
        let arrivals: Vec<u64> = (0..chunks)
            .map(|chunk| self.all_to_all(AllToAllKind { direction, leg: first, layer, chunk, chunks }))
            .collect();
        let mut last = 0;
        for (chunk, arrival) in (0..chunks).zip(arrivals) {
            self.compute(arrival.saturating_sub(self.now));
            self.compute(40 / u64::from(chunks));
            last = self.all_to_all(AllToAllKind { direction, leg: second, layer, chunk, chunks });
        }
        if direction == Direction::Backward && self.rules.moe.weight_gradients == WeightGradients::AfterSend {
            self.compute(40);
        }
        self.compute(last.saturating_sub(self.now));
    }

    /// Submits an all-to-all and returns when it will be complete.
    fn all_to_all(&mut self, kind: AllToAllKind) -> u64 {
        self.kinds.push(kind);
        self.sequencer.all_to_all_submitted(self.now, &kind);
        self.launch();
        *self.all_to_alls.back().expect("it launched at once")
    }

    fn gradient(&mut self, elements: usize) {
        self.sequencer.gradient_ready(self.now, GroupId::WORLD, elements);
        self.launch();
    }

    /// Lets `duration` pass, in which operations complete.
    fn compute(&mut self, duration: u64) {
        let end = self.now + duration;
        let due = |queue: &VecDeque<u64>| queue.front().copied().filter(|&at| at <= end);
        loop {
            match (due(&self.all_to_alls), due(&self.all_reduces)) {
                (Some(at), other) if other.is_none_or(|other| at <= other) => {
                    self.now = at;
                    self.all_to_alls.pop_front();
                    self.sequencer.all_to_all_done(at);
                }
                (_, Some(at)) => {
                    self.now = at;
                    self.all_reduces.pop_front();
                    self.sequencer.all_reduce_done(at, self.all_reduces_done, true);
                    self.all_reduces_done += 1;
                }
                _ => break,
            }
            self.launch();
        }
        self.now = end;
    }

    fn launch(&mut self) {
        while let Some(launch) = self.sequencer.next_launch() {
            let (queue, duration, name) = match launch {
                Launch::AllToAll { index } => {
                    let kind = self.kinds[index as usize];
                    (&mut self.all_to_alls, EXCHANGE_NS / u64::from(kind.chunks), kind.to_string())
                }
                Launch::AllReduce { index, op } => {
                    let name = format!("allreduce {index} of {} elements", op.elements);
                    (&mut self.all_reduces, op.elements as u64, name)
                }
            };
            let begin = queue.back().copied().unwrap_or(0).max(self.now);
            queue.push_back(begin + duration);
            self.launches.push(format!("{:>4} {name}", self.now));
        }
    }
}

/// Compares the launches of `policy` in the third step with `expected`, line by line.
fn check(policy: Policy, expected: &str) {
    let settings =
        PolicySettings { bucket_bytes: 1200, partition_bytes: 600, pipeline_chunks: 2, ..PolicySettings::default() };
    let rules = PolicyRules::new(policy, &settings);
    let mut timings = GapTimings::default();
    let mut plan = GapPlan::default();
    for _ in 0..2 {
        timings.update(&Rank::step(rules, plan).sequencer.timings());
        plan = GapPlan::new(&rules, &timings, &[vec![0]]);
    }
    let launches = Rank::step(rules, plan).launches;
    let expected: Vec<&str> = expected.trim_matches('\n').lines().collect();
    assert_eq!(launches, expected, "\n{policy} launches:\n{}\n", launches.join("\n"));
}

/// Buckets of at least 300 elements, launched when they are full, all-to-all or not.
#[test]
fn fair() {
    let expected = r"
  50 dispatch layer 0 chunk 1/1
 190 combine layer 0 chunk 1/1
 340 dispatch layer 1 chunk 1/1
 480 combine layer 1 chunk 1/1
 580 combine backward layer 1 chunk 1/1
 720 dispatch backward layer 1 chunk 1/1
 940 allreduce 0 of 450 elements
1220 combine backward layer 0 chunk 1/1
1360 dispatch backward layer 0 chunk 1/1
1580 allreduce 1 of 450 elements
";
    check(Policy::Fair, expected);
}

/// Whole gradients, launched while no all-to-all runs or waits, even if one is about to come: the second one is still
/// on the wire when layer 0 sends.
#[test]
fn priority() {
    let expected = r"
  50 dispatch layer 0 chunk 1/1
 190 combine layer 0 chunk 1/1
 340 dispatch layer 1 chunk 1/1
 480 combine layer 1 chunk 1/1
 580 combine backward layer 1 chunk 1/1
 720 dispatch backward layer 1 chunk 1/1
 840 allreduce 0 of 100 elements
 940 allreduce 1 of 350 elements
1220 combine backward layer 0 chunk 1/1
1360 dispatch backward layer 0 chunk 1/1
1480 allreduce 2 of 100 elements
1580 allreduce 3 of 350 elements
";
    check(Policy::Priority, expected);
}

/// A bucket that is full when a pair of all-to-alls ends launches after the pair, though it was full long before.
#[test]
fn fixed() {
    let expected = r"
  50 dispatch layer 0 chunk 1/1
 190 combine layer 0 chunk 1/1
 340 dispatch layer 1 chunk 1/1
 480 combine layer 1 chunk 1/1
 580 combine backward layer 1 chunk 1/1
 720 dispatch backward layer 1 chunk 1/1
1220 combine backward layer 0 chunk 1/1
1360 dispatch backward layer 0 chunk 1/1
1460 allreduce 0 of 450 elements
1860 allreduce 1 of 450 elements
";
    check(Policy::Fixed, expected);
}

/// Parts of at most 150 elements, launched between pairs one after another, as many as end before the next
/// all-to-all; the fourth would not.
#[test]
fn lina() {
    let expected = r"
  50 dispatch layer 0 chunk 1/2
  50 dispatch layer 0 chunk 2/2
 120 combine layer 0 chunk 1/2
 170 combine layer 0 chunk 2/2
 300 dispatch layer 1 chunk 1/2
 300 dispatch layer 1 chunk 2/2
 370 combine layer 1 chunk 1/2
 420 combine layer 1 chunk 2/2
 500 combine backward layer 1 chunk 1/2
 500 combine backward layer 1 chunk 2/2
 570 dispatch backward layer 1 chunk 1/2
 620 dispatch backward layer 1 chunk 2/2
 720 allreduce 0 of 100 elements
 820 allreduce 1 of 116 elements
 936 allreduce 2 of 117 elements
1100 combine backward layer 0 chunk 1/2
1100 combine backward layer 0 chunk 2/2
1170 dispatch backward layer 0 chunk 1/2
1220 dispatch backward layer 0 chunk 2/2
1300 allreduce 3 of 117 elements
1417 allreduce 4 of 100 elements
1517 allreduce 5 of 116 elements
1633 allreduce 6 of 117 elements
1700 allreduce 7 of 117 elements
";
    check(Policy::Lina, expected);
}
