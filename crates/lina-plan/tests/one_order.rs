//! One launch order, whatever the program and whatever the delays: several ranks run the same random program while
//! completions reach each of them late and in an order of its own.

use std::collections::VecDeque;

use lina_plan::{
    AllToAllKind, Direction, GapPlan, GapRule, GapTimings, GroupId, Launch, Leg, Policy, PolicyRules, PolicySettings,
    Sequencer,
};
use proptest::prelude::*;

/// What a rank's compute thread does, the same on every rank.
#[derive(Clone, Copy, Debug)]
enum Op {
    AllToAll(AllToAllKind),
    /// Waits for every all-to-all so far.
    Wait,
    Gradient {
        group: GroupId,
        elements: usize,
    },
    MicroBatch {
        last: bool,
    },
    Flush,
    /// Waits for the step's gradients.
    WaitGradients,
}

fn kind() -> impl Strategy<Value = AllToAllKind> {
    let direction = prop_oneof![Just(Direction::Forward), Just(Direction::Backward)];
    let leg = prop_oneof![Just(Leg::Counts), Just(Leg::Dispatch), Just(Leg::Combine)];
    (direction, leg, 0u32..4, 1u32..4, 0u32..4).prop_map(|(direction, leg, layer, chunks, chunk)| AllToAllKind {
        direction,
        leg,
        layer,
        chunk: chunk % chunks,
        chunks,
    })
}

fn micro_batch() -> impl Strategy<Value = Vec<Op>> {
    let gradient =
        (0u32..3, 0usize..2000).prop_map(|(group, elements)| Op::Gradient { group: GroupId(group), elements });
    prop::collection::vec(prop_oneof![3 => kind().prop_map(Op::AllToAll), 2 => Just(Op::Wait), 4 => gradient], 0..25)
}

/// The program of a step: its micro-batches, of which the last one reduces, and its end.
fn program() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(micro_batch(), 1..4).prop_map(|micro_batches| {
        let n = micro_batches.len();
        let mut ops = Vec::new();
        for (i, micro_batch) in micro_batches.into_iter().enumerate() {
            ops.push(Op::MicroBatch { last: i + 1 == n });
            ops.extend(micro_batch);
        }
        ops.extend([Op::Wait, Op::Flush, Op::WaitGradients]);
        ops
    })
}

fn settings() -> impl Strategy<Value = PolicySettings> {
    (1usize..8000, 1usize..4000).prop_map(|(bucket_bytes, partition_bytes)| PolicySettings {
        bucket_bytes,
        partition_bytes,
        pipeline_chunks: 2,
        ..PolicySettings::default()
    })
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % n
    }
}

/// Members of each group.
fn groups(ranks: usize) -> Vec<Vec<usize>> {
    vec![(0..ranks).collect(), vec![0, ranks - 1], (1..ranks).collect()]
}

struct Rank {
    number: usize,
    rules: PolicyRules,
    plan: GapPlan,
    sequencer: Sequencer,
    timings: GapTimings,
    now: u64,
    next_op: usize,
    reduces: bool,
    flushed: bool,
    log: Vec<Launch>,
    all_to_alls: u32,
    all_to_alls_done: u32,
    all_reduces: u32,
    /// Allreduces in flight of which this rank is a member, by number within the step.
    in_flight: VecDeque<u32>,
    /// Elements of each group handed over and launched.
    ready: [usize; 3],
    launched: [usize; 3],
    /// Allreduces that `fixed` may launch: all that were cut when the last gap was opened.
    cut_at_opening: u32,
}

impl Rank {
    fn new(number: usize, rules: PolicyRules) -> Self {
        Rank {
            number,
            rules,
            plan: GapPlan::default(),
            sequencer: Sequencer::default(),
            timings: GapTimings::default(),
            now: 0,
            next_op: 0,
            reduces: true,
            flushed: false,
            log: Vec::new(),
            all_to_alls: 0,
            all_to_alls_done: 0,
            all_reduces: 0,
            in_flight: VecDeque::new(),
            ready: [0; 3],
            launched: [0; 3],
            cut_at_opening: 0,
        }
    }

    fn begin_step(&mut self, plan: GapPlan) {
        let Rank { number, rules, now, .. } = *self;
        let timings = std::mem::take(&mut self.timings);
        let mut sequencer = std::mem::take(&mut self.sequencer);
        sequencer.begin_step(now, rules, plan.clone());
        *self = Rank { plan, sequencer, timings, now, ..Rank::new(number, rules) };
    }

    /// Whether the compute thread can go on with `op`.
    fn is_free(&self, op: Op) -> bool {
        match op {
            Op::Wait => self.all_to_alls_done == self.all_to_alls,
            Op::WaitGradients => self.sequencer.gradients_finished(),
            _ => true,
        }
    }

    fn step(&mut self, op: Op, groups: &[Vec<usize>]) -> Result<(), TestCaseError> {
        self.next_op += 1;
        let mut submitted = None;
        match op {
            Op::AllToAll(kind) => {
                let index = self.sequencer.all_to_all_submitted(self.now, &kind);
                prop_assert_eq!(index, self.all_to_alls, "all-to-alls count within the step");
                self.all_to_alls += 1;
                submitted = Some(index);
            }
            Op::Gradient { group, elements } => {
                if self.reduces {
                    self.ready[group.0 as usize] += elements;
                }
                self.sequencer.gradient_ready(self.now, group, elements);
            }
            Op::MicroBatch { last } => {
                self.reduces = last;
                self.sequencer.begin_micro_batch(last);
            }
            Op::Flush => {
                self.flushed = true;
                self.sequencer.flush(self.now);
            }
            Op::Wait | Op::WaitGradients => {}
        }
        self.drain(submitted, groups)?;
        if let Op::AllToAll(kind) = op
            && kind.opens_gap()
        {
            self.cut_at_opening = self.sequencer.timings().alone.len() as u32;
        }
        Ok(())
    }

    /// Takes the decisions and checks each. `submitted` is the all-to-all that they answer, if it is one.
    fn drain(&mut self, submitted: Option<u32>, groups: &[Vec<usize>]) -> Result<(), TestCaseError> {
        let mut awaited = submitted;
        while let Some(launch) = self.sequencer.next_launch() {
            self.log.push(launch);
            match launch {
                Launch::AllToAll { index } => {
                    prop_assert_eq!(awaited.take(), Some(index), "an all-to-all launches when it is submitted");
                }
                Launch::AllReduce { index, op } => {
                    prop_assert_eq!(index, self.all_reduces, "allreduces count within the step");
                    self.all_reduces += 1;
                    self.check_all_reduce(index, submitted)?;
                    let group = op.group.0 as usize;
                    self.launched[group] += op.elements;
                    prop_assert!(op.elements > 0);
                    prop_assert!(self.launched[group] <= self.ready[group], "it launched before it was ready");
                    if groups[group].contains(&self.number) {
                        self.in_flight.push_back(index);
                    } else {
                        self.sequencer.all_reduce_done(self.now, index, false);
                    }
                }
            }
        }
        prop_assert_eq!(awaited, None, "an all-to-all was held back");
        Ok(())
    }

    /// Whether allreduce `index` may launch now.
    fn check_all_reduce(&self, index: u32, submitted: Option<u32>) -> Result<(), TestCaseError> {
        if self.flushed {
            return Ok(());
        }
        // An all-to-all that has just been submitted ends the gap of its own number, which lies before it.
        let (gap, ends_gap) = (submitted.unwrap_or(self.all_to_alls), submitted.is_some());
        let link_is_free = self.all_to_alls_done == self.all_to_alls && self.in_flight.is_empty();
        match self.rules.gap {
            GapRule::Eager => prop_assert!(!ends_gap, "what launches when it is ready holds no all-to-all back"),
            GapRule::BetweenPairs => prop_assert!(index < self.cut_at_opening, "it was not ready when the gap opened"),
            GapRule::AfterBackward => prop_assert!(false, "backward is not over"),
            GapRule::StartsInGap | GapRule::FinishesBetweenPairs => {
                prop_assert!(index < self.plan.launched_by_end(gap as usize), "the plan puts it later");
            }
        }
        if self.rules.gap != GapRule::Eager && !ends_gap {
            prop_assert!(link_is_free, "within a gap, one at a time and beside no all-to-all");
        }
        Ok(())
    }
}

/// Something that can happen next.
#[derive(Clone, Copy)]
enum Event {
    Op(usize),
    AllToAllDone(usize),
    AllReduceDone(usize),
}

/// Runs one step on all ranks: whatever can happen next happens in random order, after a random time.
fn run_step(
    ranks: &mut [Rank],
    program: &[Op],
    groups: &[Vec<usize>],
    random: &mut Random,
) -> Result<(), TestCaseError> {
    loop {
        let mut events = Vec::new();
        for (number, rank) in ranks.iter().enumerate() {
            if program.get(rank.next_op).is_some_and(|op| rank.is_free(*op)) {
                events.push(Event::Op(number));
            }
            let done = rank.all_to_alls_done;
            if done < rank.all_to_alls && ranks.iter().all(|other| done < other.all_to_alls) {
                events.push(Event::AllToAllDone(number));
            }
            // Ranks outside of its group launch it too, but nobody waits for them.
            if let Some(&index) = rank.in_flight.front()
                && ranks.iter().all(|other| index < other.all_reduces || !shares(rank, other, index, groups))
            {
                events.push(Event::AllReduceDone(number));
            }
        }
        if events.is_empty() {
            break;
        }
        let event = events[random.below(events.len() as u64) as usize];
        let (Event::Op(number) | Event::AllToAllDone(number) | Event::AllReduceDone(number)) = event;
        let rank = &mut ranks[number];
        rank.now += random.below(1000);
        match event {
            Event::Op(_) => rank.step(program[rank.next_op], groups)?,
            Event::AllToAllDone(_) => {
                rank.all_to_alls_done += 1;
                rank.sequencer.all_to_all_done(rank.now);
                rank.drain(None, groups)?;
            }
            Event::AllReduceDone(_) => {
                let index = rank.in_flight.pop_front().expect("it is in flight");
                rank.sequencer.all_reduce_done(rank.now, index, true);
                rank.drain(None, groups)?;
            }
        }
    }
    for rank in ranks.iter() {
        prop_assert_eq!(rank.next_op, program.len(), "rank {} hangs", rank.number);
        prop_assert_eq!(rank.launched, rank.ready, "every element is launched once");
    }
    Ok(())
}

/// Whether `other` is in the group of the allreduce that `rank` launched as number `index`.
fn shares(rank: &Rank, other: &Rank, index: u32, groups: &[Vec<usize>]) -> bool {
    let group = rank.log.iter().find_map(|launch| match launch {
        Launch::AllReduce { index: launched, op } if *launched == index => Some(op.group),
        _ => None,
    });
    groups[group.expect("it is in flight").0 as usize].contains(&other.number)
}

/// The plan of the next step, from what the ranks measured, bent at random: it need not be right to be agreed on.
fn agree(ranks: &mut [Rank], groups: &[Vec<usize>], random: &mut Random) -> Result<GapPlan, TestCaseError> {
    let mut sum: Vec<f64> = Vec::new();
    for rank in ranks.iter_mut() {
        rank.timings.update(&rank.sequencer.timings());
        let mut message = Vec::new();
        rank.timings.encode(&mut message);
        sum.resize(message.len(), 0.0);
        sum.iter_mut().zip(message).for_each(|(sum, x)| *sum += x);
    }
    for x in &mut sum {
        *x *= random.below(5) as f64 / 2.0;
    }
    let plan = |rank: &Rank| GapPlan::new(&rank.rules, &rank.timings.decode_sum(&sum, groups), groups);
    let plans: Vec<GapPlan> = ranks.iter().map(plan).collect();
    prop_assert!(plans.iter().all(|plan| *plan == plans[0]), "all ranks make the same plan");
    Ok(plans[0].clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_rank_launches_the_same_in_the_same_order(
        ranks in 2usize..5,
        settings in settings(),
        program in program(),
        steps in 1usize..5,
        seed: u64,
    ) {
        for policy in Policy::ALL {
            let rules = PolicyRules::new(policy, &settings);
            let groups = groups(ranks);
            let mut random = Random(seed);
            let mut ranks: Vec<Rank> = (0..ranks).map(|number| Rank::new(number, rules)).collect();
            let mut plan = GapPlan::default();
            for step in 0..steps {
                ranks.iter_mut().for_each(|rank| rank.begin_step(plan.clone()));
                run_step(&mut ranks, &program, &groups, &mut random)?;
                for rank in &ranks {
                    prop_assert_eq!(&rank.log, &ranks[0].log, "{}: rank {} in step {}", policy, rank.number, step);
                }
                plan = agree(&mut ranks, &groups, &mut random)?;
            }
        }
    }
}
