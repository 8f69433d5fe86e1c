//! The engine: operations are launched one after another in the order of their submission, each on the stream of its
//! class, and finish when an event behind them has happened. With an all-to-all's data every rank tells every other when it
//! launched, from which all know how long the exchange itself took.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lina_cuda::{Buffer, CudaError, DType, Device, Event, PinnedBuffer, Priority, Stream};

use super::NcclConfig;
use super::library::{Communicator, Nccl, PATIENCE, State, UniqueId};
use super::star::Star;
use super::start::Started;
use super::sums::{OrderedSums, Sums};
use crate::buffer::Region;
use crate::device::copy_bytes;
use crate::driver::{Operation, Reduction};
use crate::exchange::AnyExchange;
use crate::processes::heartbeat::Heartbeat;
use crate::processes::{Assembly, Fault, Patience};
use crate::recorder::ComputeClock;
use crate::threaded::{Engine, Finished, Hold, LOOK_AROUND, WATCH};
use crate::transfer::sum_control;
use crate::wire::{CHANNELS, Channel};
use crate::{AllToAllKind, CommError, DeviceExchange, Exchange};

/// Looks at what is under way with only a yield in between, after something has happened: some 50 us.
const YIELDS: u32 = 40;
/// No sleep is longer while operations are under way.
const LONGEST_SLEEP: Duration = Duration::from_micros(50);
/// What goes wrong here may be another rank's end, which its heartbeat tells within this time.
const SECOND_OPINION: Duration = Duration::from_millis(500);
/// What a rank has sent before it left comes within this time.
const DELIVERY: Duration = Duration::from_secs(2);
/// Bytes in which a rank says when it launched an all-to-all: nanoseconds since the epoch, which all ranks have in common.
const LAUNCH_TIME: usize = size_of::<u64>();
/// Bytes of the smallest stage.
const SMALLEST_STAGE: usize = 4096;
/// Stages of the smallest size that each class of operations has from the start.
const FIRST_STAGES: usize = 4;
/// Elements of the sums with which a group's ranks are connected: NCCL has one way for small ones and one for large ones.
const CONNECTING: [usize; 2] = [256, 1 << 20];
/// Thread blocks of a kernel of NCCL's where ranks share a GPU: kernels of all of them have to run at the same time, or
/// they wait for each other for ever.
const BLOCKS_OF_SHARED: u16 = 4;
/// How long what is under way may take to end once its communicator has been given up.
const ABORT: Duration = Duration::from_secs(2);

impl From<CudaError> for Fault {
    fn from(error: CudaError) -> Self {
        Fault(error.to_string())
    }
}

/// An operation under way.
struct UnderWay {
    launched: Instant,
    /// Behind it in its stream, once it has been enqueued. The compute thread may have it too.
    done: Option<Arc<Event>>,
    task: Task,
}

enum Task {
    /// With a stage for this rank's launch time and those of all ranks. Once it has been enqueued, its exchange is handed back.
    Exchange {
        index: u32,
        exchange: Option<DeviceExchange>,
        kind: AllToAllKind,
        sent_bytes: u64,
        times: PinnedBuffer,
    },
    /// With a stage for the pieces, each behind its sender's launch time. Bytes from `received` on have come.
    HostExchange {
        index: u32,
        exchange: Exchange,
        stage: PinnedBuffer,
        received: usize,
    },
    Reduction(Reduction),
    /// A small sum, of which every rank's `bytes` bytes come into the stage, by rank.
    Control {
        stage: PinnedBuffer,
        bytes: usize,
    },
}

/// The operations of a class.
struct Lane {
    stream: Stream,
    under_way: VecDeque<UnderWay>,
    /// Spare host memory that the device reads and writes by itself: for what is the host's and small. It is kept, since the
    /// system may wait for the device before it takes it back, and the device for another rank.
    stages: Vec<PinnedBuffer>,
}

impl Lane {
    /// Its kernels go ahead of the computation's: they are few and small, and others wait for them.
    fn new(device: &Device) -> Result<Self, CudaError> {
        let stream = Stream::new(device, Priority::High)?;
        let stages = (0..FIRST_STAGES).map(|_| PinnedBuffer::zeros(device, SMALLEST_STAGE));
        Ok(Lane { stream, under_way: VecDeque::new(), stages: stages.collect::<Result<_, _>>()? })
    }

    /// A stage for at least `bytes` bytes.
    fn stage(&mut self, bytes: usize) -> Result<PinnedBuffer, CudaError> {
        let fitting = (0..self.stages.len()).filter(|&i| self.stages[i].len() >= bytes);
        match fitting.min_by_key(|&i| self.stages[i].len()) {
            Some(smallest) => Ok(self.stages.swap_remove(smallest)),
            None => PinnedBuffer::zeros(self.stream.device(), room(bytes)),
        }
    }
}

/// Bytes of a new stage for `bytes` bytes, which fits others too.
fn room(bytes: usize) -> usize {
    bytes.next_power_of_two().max(SMALLEST_STAGE)
}

/// The communicator of a set of ranks; `None` on ranks outside.
type Slot = (Vec<usize>, Option<Communicator>);

pub(super) struct NcclEngine {
    rank: usize,
    ranks: usize,
    members: Arc<Vec<Vec<usize>>>,
    timeout: Duration,
    /// The moment from which all ranks count time.
    epoch: Instant,
    device: Device,
    /// Whether any ranks have the same GPU: members of a communicator must agree on what follows from it.
    shared: bool,
    nccl: &'static Nccl,
    star: Star,
    /// Of all ranks: the all-to-alls' and the closing sums', where there is more than one rank.
    all_to_all: Option<Communicator>,
    control: Option<Communicator>,
    /// Of the sets of ranks that reduction groups have, each once; none of a single rank.
    groups: Vec<Slot>,
    sums: Sums,
    /// By channel.
    lanes: [Lane; CHANNELS],
    /// Not yet launched, in order.
    waiting: VecDeque<Operation>,
    /// The class of the newest operation, if NCCL is still preparing it. Nothing else is launched meanwhile: devices run
    /// all ranks' operations in one order.
    preparing: Option<Channel>,
    /// Operations started or skipped; the same count means the same operation on all ranks.
    started: u64,
    events: Vec<Event>,
    /// Exchanges that the compute thread may have back: the device carries them out.
    handed_back: Vec<(u32, AnyExchange, Hold)>,
    patience: Patience,
    /// When an operation was last found to have run.
    last_end: Instant,
    looked: Instant,
    failure: Option<CommError>,
    /// Beats until the last communicator is taken apart.
    heartbeat: Heartbeat,
}

impl NcclEngine {
    /// Makes the communicators; all ranks call it together, with the same moment as their `epoch`. Where another rank is
    /// lost meanwhile, the engine says so at the first occasion.
    ///
    /// # Errors
    /// What went wrong on this rank, of which the others have been told.
    pub(super) fn new(
        started: Started,
        config: &NcclConfig,
        members: Arc<Vec<Vec<usize>>>,
        epoch: Instant,
    ) -> Result<Self, Fault> {
        let Started { rank, device, shared, nccl, star, heartbeat, .. } = started;
        device.bind()?;
        let lanes = [Lane::new(&device)?, Lane::new(&device)?, Lane::new(&device)?];
        let stream = &lanes[Channel::AllReduce as usize].stream;
        let sums = if config.ordered_sums { Sums::Ordered(OrderedSums::new(&device, stream)?) } else { Sums::Nccl };
        let mut engine = NcclEngine {
            rank,
            ranks: config.ranks,
            timeout: config.timeout,
            epoch,
            device,
            shared,
            nccl,
            star,
            all_to_all: None,
            control: None,
            groups: Vec::new(),
            sums,
            lanes,
            waiting: VecDeque::new(),
            preparing: None,
            started: 0,
            events: Vec::new(),
            handed_back: Vec::new(),
            patience: Patience::new(YIELDS, LONGEST_SLEEP),
            last_end: Instant::now(),
            looked: Instant::now(),
            failure: None,
            heartbeat,
            members,
        };
        if engine.ranks > 1
            && let Err(fault) = engine.make_all()
        {
            engine.hear_others();
            let failure = CommError::RankFailed { rank, reason: fault.0.clone() };
            engine.compute_failed(failure.clone());
            if engine.failure == Some(failure) {
                return Err(fault);
            }
        }
        Ok(engine)
    }

    /// Makes the communicators of all ranks, then those of the groups.
    fn make_all(&mut self) -> Result<(), Fault> {
        let all: Vec<usize> = (0..self.ranks).collect();
        let mut made = self.make(&[all.clone(), all])?.into_iter();
        self.all_to_all = made.next().flatten();
        self.control = made.next().flatten();
        if let Some(communicator) = &self.all_to_all {
            let stream = &self.lanes[Channel::AllToAll as usize].stream;
            connect(&self.device, stream, &self.heartbeat, communicator, 1 + self.ranks, |at| {
                let bytes = size_of::<f32>();
                let pieces = |_, from| [[(at, bytes), (at + ((1 + from) * bytes) as u64, bytes)]];
                // SAFETY: `connect` keeps the memory.
                unsafe { communicator.exchange(stream.raw(), pieces) }
            })?;
        }
        self.make_groups()
    }

    /// Makes a communicator for each of `sets`, on its members. All ranks call it together; blocks.
    fn make(&mut self, sets: &[Vec<usize>]) -> Result<Vec<Option<Communicator>>, Fault> {
        let mut mine = Vec::new();
        for _ in sets.iter().filter(|members| members[0] == self.rank) {
            mine.extend(self.nccl.unique_id()?.to_bytes());
        }
        let all = self.star.gather(&mine)?;
        let mut ids: Vec<_> = all.iter().map(|bytes| bytes.as_chunks::<{ UniqueId::LEN }>().0.iter()).collect();
        let mut made = Vec::with_capacity(sets.len());
        for members in sets {
            let id = ids[members[0]].next().ok_or_else(|| Fault(format!("rank {} led no group", members[0])))?;
            let communicator = match members.iter().position(|&rank| rank == self.rank) {
                Some(member) => {
                    let heartbeat = &self.heartbeat;
                    let may_go_on = || heartbeat.failure().is_none();
                    let (id, place) = (UniqueId::from_bytes(*id), (member, members.len()));
                    let max_blocks = self.shared.then_some(BLOCKS_OF_SHARED);
                    Some(Communicator::new(self.nccl, id, place, max_blocks, &self.device, may_go_on)?)
                }
                None => None,
            };
            made.push(communicator);
        }
        Ok(made)
    }

    /// Makes the communicators of the present groups, keeps those that there are, takes the others apart. All ranks call
    /// it together; blocks.
    fn make_groups(&mut self) -> Result<(), Fault> {
        let sets = distinct(&self.members);
        let (kept, gone): (Vec<Slot>, Vec<Slot>) =
            self.groups.drain(..).partition(|(members, _)| sets.contains(members));
        self.groups = kept;
        for communicator in gone.into_iter().filter_map(|(_, communicator)| communicator) {
            communicator.finish(&self.device, || self.heartbeat.failure().is_none())?;
        }
        let new: Vec<Vec<usize>> =
            sets.into_iter().filter(|set| self.groups.iter().all(|(members, _)| members != set)).collect();
        let (made, kept) = (self.make(&new)?, self.groups.len());
        // A failure finds them here, to be aborted: their first operation may be under way.
        self.groups.extend(new.into_iter().zip(made));
        for communicator in self.groups[kept..].iter().filter_map(|(_, communicator)| communicator.as_ref()) {
            for elements in CONNECTING {
                let (device, heartbeat) = (&self.device, &self.heartbeat);
                let stream = &self.lanes[Channel::AllReduce as usize].stream;
                connect(device, stream, heartbeat, communicator, elements, |at| {
                    let settled = || communicator.settled(|| heartbeat.failure().is_none());
                    // SAFETY: `connect` keeps the memory.
                    unsafe { self.sums.enqueue(communicator, &[(at, elements)], stream, settled) }
                })?;
            }
        }
        Ok(())
    }

    /// Launches what may be launched.
    fn launch_waiting(&mut self) -> Result<(), Fault> {
        loop {
            if let Some(channel) = self.preparing {
                if self.communicator(channel).map_or(Ok(State::Ready), Communicator::state)? == State::InProgress {
                    return Ok(());
                }
                self.preparing = None;
                self.launched(channel)?;
            }
            let Some(operation) = self.waiting.pop_front() else { return Ok(()) };
            self.patience.reset();
            let channel = operation.channel();
            self.launch(operation)?;
            self.preparing = Some(channel);
        }
    }

    /// The communicator of the channel's newest operation; `None` if that has no other rank.
    fn communicator(&self, channel: Channel) -> Option<&Communicator> {
        match channel {
            Channel::AllToAll => self.all_to_all.as_ref(),
            Channel::Control => self.control.as_ref(),
            Channel::AllReduce => match &self.lanes[channel as usize].under_way.back()?.task {
                Task::Reduction(reduction) => group(&self.members, &self.groups, reduction),
                _ => None,
            },
        }
    }

    fn launch(&mut self, operation: Operation) -> Result<(), Fault> {
        self.device.bind()?;
        let channel = operation.channel();
        // Memory that NCCL is about to know is this engine's before it does, and stays it until the operation has run.
        let task = match operation {
            Operation::AllToAll { index, exchange, .. } => {
                let (kind, sent_bytes) = (exchange.kind(), exchange.sent_bytes(self.rank));
                match exchange {
                    AnyExchange::Device(exchange) => {
                        let mut times = self.lanes[channel as usize].stage((1 + self.ranks) * LAUNCH_TIME)?;
                        times[..LAUNCH_TIME].copy_from_slice(&self.now().to_le_bytes());
                        Task::Exchange { index, exchange: Some(exchange), kind, sent_bytes, times }
                    }
                    AnyExchange::Host(exchange) => self.staged_exchange(index, exchange)?,
                }
            }
            Operation::AllReduce(reduction) => Task::Reduction(reduction),
            Operation::Control(values) => self.staged_control(&values)?,
        };
        let lane = &mut self.lanes[channel as usize];
        lane.under_way.push_back(UnderWay { launched: Instant::now(), done: None, task });
        let Some(UnderWay { task, .. }) = self.lanes[channel as usize].under_way.back() else { return Ok(()) };
        let stream = &self.lanes[channel as usize].stream;
        match task {
            Task::Exchange { exchange, times, .. } => {
                let exchange = exchange.as_ref().expect("it is handed back once it is launched");
                let (from, received) = (times.address(), times.address() + LAUNCH_TIME as u64);
                let mut send = vec![(0, LAUNCH_TIME); self.ranks];
                let mut recv = places(&vec![LAUNCH_TIME; self.ranks]);
                // It knows its own.
                (send[self.rank].1, recv[self.rank].1) = (0, 0);
                let launches = Pieces { from, to: received, send, recv };
                let DeviceExchange { send, send_elements, recv, recv_elements, .. } = exchange;
                let sizes = |elements: &[usize]| -> Vec<usize> {
                    elements.iter().map(|elements| elements * send.dtype().bytes()).collect()
                };
                let data = Pieces {
                    from: send.whole().ptr(),
                    to: recv.whole().ptr(),
                    send: places(&sizes(send_elements)),
                    recv: places(&sizes(recv_elements)),
                };
                self.exchange_pieces(&[launches, data], stream)
            }
            Task::HostExchange { exchange, stage, received, .. } => {
                let mut send = places(&staged_sizes(&exchange.send_elements));
                let mut recv = places(&staged_sizes(&exchange.recv_elements));
                // Its own piece is there already.
                (send[self.rank].1, recv[self.rank].1) = (0, 0);
                let pieces = Pieces { from: stage.address(), to: stage.address() + *received as u64, send, recv };
                self.exchange_pieces(&[pieces], stream)
            }
            Task::Reduction(reduction) => {
                let Some(communicator) = group(&self.members, &self.groups, reduction) else { return Ok(()) };
                let on_host =
                    || Fault("a gradient is in host memory, expected device memory with engine nccl".to_owned());
                let place = |piece: &Region| Ok((piece.device_address().ok_or_else(on_host)?, piece.len()));
                let pieces = reduction.pieces.iter().map(place).collect::<Result<Vec<_>, Fault>>()?;
                let settled = || communicator.settled(|| self.heartbeat.failure().is_none());
                // SAFETY: the pieces are in their lane's queue until the sum has run, and nobody else touches them.
                unsafe { self.sums.enqueue(communicator, &pieces, stream, settled) }
            }
            Task::Control { stage, bytes } => {
                let Some(communicator) = &self.control else { return Ok(()) };
                // SAFETY: the stage is in its lane's queue until all of it has run.
                communicator.group(|| unsafe { communicator.gather(stage.address(), *bytes, stream.raw()) })
            }
        }
    }

    /// Exchanges pieces with all other ranks, and copies this rank's own; as one operation.
    fn exchange_pieces(&self, sets: &[Pieces], stream: &Stream) -> Result<(), Fault> {
        for Pieces { from, to, send, recv } in sets {
            let ((own_from, own), (own_to, own_received)) = (send[self.rank], recv[self.rank]);
            let own = own_bytes(own, own_received)?;
            // SAFETY: the pieces are within buffers that stay in their lane's queue until all of it has run, or are with a
            // compute thread whose stream waits for that.
            unsafe { copy_bytes(stream, from + own_from, to + own_to, own) }?;
        }
        let Some(communicator) = &self.all_to_all else { return Ok(()) };
        let pieces = |to: usize, from: usize| {
            sets.iter().map(move |pieces| {
                let ((send_start, send), (recv_start, recv)) = (pieces.send[to], pieces.recv[from]);
                [(pieces.from + send_start, send), (pieces.to + recv_start, recv)]
            })
        };
        // SAFETY: as above; what is received overlaps nothing, and nobody else has the buffers.
        unsafe { communicator.exchange(stream.raw(), pieces) }
    }

    fn staged_exchange(&mut self, index: u32, exchange: Exchange) -> Result<Task, Fault> {
        let [sizes, coming] = [&exchange.send_elements, &exchange.recv_elements].map(|elements| staged_sizes(elements));
        let sent: usize = sizes.iter().sum();
        // Received bytes begin where devices like to write.
        let received = sent.next_multiple_of(16);
        let now = self.now().to_le_bytes();
        let mut stage = self.lanes[Channel::AllToAll as usize].stage(received + coming.iter().sum::<usize>())?;
        let (mut place, mut values) = (&mut stage[..sent], exchange.send.iter());
        for (&elements, &bytes) in exchange.send_elements.iter().zip(&sizes) {
            let (piece, rest) = place.split_at_mut(bytes);
            piece[..LAUNCH_TIME].copy_from_slice(&now);
            write(&mut piece[LAUNCH_TIME..], values.by_ref().take(elements).map(|value| value.to_le_bytes()));
            place = rest;
        }
        let own = own_bytes(sizes[self.rank], coming[self.rank])?;
        let [from, to] = [sizes, coming].map(|sizes| sizes[..self.rank].iter().sum::<usize>());
        stage.copy_within(from..from + own, received + to);
        Ok(Task::HostExchange { index, exchange, stage, received })
    }

    fn staged_control(&mut self, values: &[f64]) -> Result<Task, Fault> {
        let bytes = size_of_val(values);
        let mut stage = self.lanes[Channel::Control as usize].stage(self.ranks * bytes)?;
        let mine = self.rank * bytes;
        write(&mut stage[mine..mine + bytes], values.iter().map(|value| value.to_le_bytes()));
        Ok(Task::Control { stage, bytes })
    }

    /// The channel's newest operation has been enqueued: an event comes behind it, for which a device may wait.
    fn launched(&mut self, channel: Channel) -> Result<(), Fault> {
        let event = self.events.pop().map_or_else(|| Event::new(&self.device), Ok)?;
        let Lane { stream, under_way, .. } = &mut self.lanes[channel as usize];
        let Some(operation) = under_way.back_mut() else { return Ok(()) };
        event.record(stream)?;
        let event = Arc::new(event);
        operation.done = Some(Arc::clone(&event));
        if let Task::Exchange { index, exchange, .. } = &mut operation.task
            && let Some(exchange) = exchange.take()
        {
            let hold = move |clock: &mut ComputeClock| clock.hold(&event);
            self.handed_back.push((*index, AnyExchange::Device(exchange), Box::new(hold)));
        }
        Ok(())
    }

    /// The channel's oldest operation, if it has run.
    fn pop_done(&mut self, channel: usize) -> Result<Option<UnderWay>, Fault> {
        let queue = &mut self.lanes[channel].under_way;
        let Some(done) = queue.front().and_then(|front| front.done.as_ref()) else { return Ok(None) };
        Ok(if done.query()? { queue.pop_front() } else { None })
    }

    fn advance(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), Fault> {
        self.launch_waiting()?;
        for channel in 0..CHANNELS {
            while let Some(UnderWay { launched, done, task }) = self.pop_done(channel)? {
                self.patience.reset();
                self.last_end = Instant::now();
                // An event that the compute thread still has is not recorded anew.
                self.events.extend(done.and_then(Arc::into_inner));
                finished.push(self.finished(launched, task)?);
            }
        }
        if self.looked.elapsed() >= LOOK_AROUND {
            self.looked = Instant::now();
            let groups = self.groups.iter().filter_map(|(_, communicator)| communicator.as_ref());
            for communicator in self.all_to_all.iter().chain(&self.control).chain(groups) {
                communicator.state()?;
            }
        }
        Ok(())
    }

    /// What an operation that has run has brought, and since when all members were there.
    fn finished(&mut self, launched: Instant, task: Task) -> Result<(Instant, Finished), Fault> {
        let lane = &mut self.lanes[Channel::AllToAll as usize];
        let mut all_launched = launched;
        let mut note = |rank: usize, bytes: &[u8]| {
            if rank != self.rank
                && let Some(ns) = bytes.first_chunk()
            {
                let launch = self.epoch + Duration::from_nanos(u64::from_le_bytes(*ns));
                all_launched = all_launched.max(launch);
            }
        };
        let finished = match task {
            Task::Exchange { index, kind, sent_bytes, times, .. } => {
                let others = times[LAUNCH_TIME..].chunks_exact(LAUNCH_TIME).take(self.ranks);
                others.enumerate().for_each(|(rank, bytes)| note(rank, bytes));
                lane.stages.push(times);
                Finished::AllToAll { index, kind, sent_bytes, exchange: None }
            }
            Task::HostExchange { index, mut exchange, stage, received } => {
                let mut recv = exchange.recv.iter_mut();
                let mut come = &stage[received..];
                for (rank, &elements) in exchange.recv_elements.iter().enumerate() {
                    let (piece, rest) = come.split_at(LAUNCH_TIME + elements * size_of::<f32>());
                    note(rank, piece);
                    let (words, _) = piece[LAUNCH_TIME..].as_chunks::<4>();
                    words.iter().zip(recv.by_ref()).for_each(|(word, value)| *value = f32::from_le_bytes(*word));
                    come = rest;
                }
                lane.stages.push(stage);
                Finished::all_to_all(index, AnyExchange::Host(exchange), self.rank)
            }
            Task::Reduction(reduction) => Finished::AllReduce(reduction),
            Task::Control { stage, bytes } => {
                let (words, _) = stage[..self.ranks * bytes].as_chunks::<8>();
                let values: Vec<f64> = words.iter().map(|word| f64::from_le_bytes(*word)).collect();
                self.lanes[Channel::Control as usize].stages.push(stage);
                let count = bytes / size_of::<f64>();
                let part = |rank: usize| values[rank * count..(rank + 1) * count].to_vec();
                let sum = sum_control((0..self.ranks).map(|rank| (rank, part(rank))));
                Finished::Control(sum.map_err(|error| Fault(error.to_string()))?)
            }
        };
        // Clocks are set with an error, so that a launch may seem to come from the future.
        Ok((all_launched.min(Instant::now()), finished))
    }

    /// Nanoseconds since the epoch.
    fn now(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    /// Whether a rank that this one waits for has left, or nothing has come of an operation for too long.
    fn look_after_peers(&self) -> Result<(), CommError> {
        for (lane, channel) in self.lanes.iter().zip([Channel::AllToAll, Channel::AllReduce, Channel::Control]) {
            let Some(UnderWay { launched, task, .. }) = lane.under_way.front() else { continue };
            let group = if let Task::Reduction(reduction) = task { reduction.group.0 as usize } else { 0 };
            let gone = self.members[group].iter().find(|&&rank| self.heartbeat.has_left(rank));
            if launched.elapsed() > DELIVERY
                && let Some(&rank) = gone
            {
                return Err(CommError::left(rank));
            }
            if self.heartbeat.overdue_from(*launched).elapsed() > self.timeout {
                let (rank, progress) = self.heartbeat.slowest();
                let (seconds, operation) = (self.timeout.as_secs(), channel.name().to_owned());
                if progress < self.started {
                    return Err(CommError::RankSilent { rank, seconds, operation });
                }
                let reason =
                    format!("NCCL has not come to the end of {operation} for {seconds} s, which all ranks began");
                return Err(CommError::RankFailed { rank: self.rank, reason });
            }
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.lanes.iter().all(|lane| lane.under_way.is_empty())
    }

    /// Something went wrong here, by itself or because another rank has gone.
    fn fail_here(&mut self, Fault(reason): Fault) {
        self.hear_others();
        self.end(CommError::RankFailed { rank: self.rank, reason });
    }

    /// Waits for the heartbeat to tell of another rank's end, as long as that may take.
    fn hear_others(&self) {
        let deadline = Instant::now() + SECOND_OPINION;
        while self.failure.is_none() && self.heartbeat.failure().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The job is over: what is under way is given up.
    fn end(&mut self, failure: CommError) {
        if self.failure.is_some() {
            return;
        }
        self.heartbeat.fail(failure.clone());
        // Somebody else's failure may have come first; all ranks name the same one.
        self.failure = self.heartbeat.failure().or(Some(failure));
        self.waiting.clear();
        self.communicators().for_each(Communicator::abort);
    }

    /// Takes all communicators, in the order in which they were made.
    fn communicators(&mut self) -> impl Iterator<Item = Communicator> + use<> {
        let groups = std::mem::take(&mut self.groups);
        let all = self.all_to_all.take().into_iter().chain(self.control.take());
        all.chain(groups.into_iter().filter_map(|(_, communicator)| communicator))
    }
}

/// Runs an operation on `elements` f32, whatever they are: NCCL connects ranks in their first operations, which would be
/// taken for slow ones. All members call it together; blocks.
fn connect(
    device: &Device,
    stream: &Stream,
    heartbeat: &Heartbeat,
    communicator: &Communicator,
    elements: usize,
    operation: impl FnOnce(u64) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut memory = ManuallyDrop::new(Buffer::new(stream, elements, DType::F32)?);
    let may_go_on = || heartbeat.failure().is_none();
    operation(memory.whole().ptr())?;
    communicator.settled(may_go_on)?;
    let event = Event::new(device)?;
    event.record(stream)?;
    let deadline = Instant::now() + PATIENCE;
    while !event.query()? {
        communicator.state()?;
        if !may_go_on() {
            return Err(Fault("connecting ranks was broken off".to_owned()));
        }
        if Instant::now() > deadline {
            let seconds = PATIENCE.as_secs();
            return Err(Fault(format!("connecting ranks has not come to an end within {seconds} s")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: not dropped before; where the device may still use it, it stays.
    unsafe { ManuallyDrop::drop(&mut memory) };
    Ok(())
}

/// The communicator of a reduction's group; `None` if that has no other rank.
fn group<'a>(members: &[Vec<usize>], groups: &'a [Slot], reduction: &Reduction) -> Option<&'a Communicator> {
    let members = &members[reduction.group.0 as usize];
    groups.iter().find(|(set, _)| set == members)?.1.as_ref()
}

/// The size of what a rank sends itself.
fn own_bytes(sent: usize, received: usize) -> Result<usize, Fault> {
    if sent == received {
        return Ok(sent);
    }
    Err(Fault(format!("it sends itself {sent} bytes and expects {received}")))
}

/// Writes values one after another.
fn write<const N: usize>(bytes: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
    bytes.chunks_exact_mut(N).zip(values).for_each(|(place, value)| place.copy_from_slice(&value));
}

/// Sets of more than one rank, each once.
fn distinct(groups: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut sets: Vec<Vec<usize>> = Vec::new();
    for members in groups.iter().filter(|members| members.len() > 1) {
        if !sets.contains(members) {
            sets.push(members.clone());
        }
    }
    sets
}

/// What goes where in an all-to-all, in bytes.
struct Pieces {
    /// Device addresses of what is sent and received.
    from: u64,
    to: u64,
    /// By rank: where its piece begins, and its size.
    send: Vec<(u64, usize)>,
    recv: Vec<(u64, usize)>,
}

/// Where pieces of so many bytes begin, one after another, and their sizes.
fn places(sizes: &[usize]) -> Vec<(u64, usize)> {
    let mut start = 0;
    let place = |&size: &usize| {
        let at = start;
        start += size as u64;
        (at, size)
    };
    sizes.iter().map(place).collect()
}

/// Bytes of pieces of so many f32, each behind a launch time.
fn staged_sizes(elements: &[usize]) -> Vec<usize> {
    elements.iter().map(|elements| LAUNCH_TIME + elements * size_of::<f32>()).collect()
}

impl Engine for NcclEngine {
    fn start(&mut self, operation: Operation) {
        // What comes after a failure goes straight back to its owner, who is about to hear of it.
        if self.failure.is_some() {
            return;
        }
        self.started += 1;
        self.heartbeat.set_progress(self.started);
        self.waiting.push_back(operation);
        if let Err(fault) = self.launch_waiting() {
            self.fail_here(fault);
        }
    }

    fn set_groups(&mut self, groups: &Arc<Vec<Vec<usize>>>) {
        self.members = Arc::clone(groups);
        if self.failure.is_none()
            && self.ranks > 1
            && let Err(fault) = self.make_groups()
        {
            self.fail_here(fault);
        }
    }

    fn skip(&mut self, _channel: Channel) {
        self.started += 1;
        self.heartbeat.set_progress(self.started);
    }

    fn poll(&mut self, finished: &mut Vec<(Instant, Finished)>) -> Result<(), CommError> {
        if self.failure.is_none()
            && let Some(failure) = self.heartbeat.failure()
        {
            self.end(failure);
        }
        if self.failure.is_none() {
            let look = self.looked.elapsed() >= LOOK_AROUND;
            if let Err(fault) = self.advance(finished) {
                self.fail_here(fault);
            } else if look && let Err(failure) = self.look_after_peers() {
                self.end(failure);
            }
        }
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn take_launched(&mut self) -> Vec<(u32, AnyExchange, Hold)> {
        // After a failure they stay, until the device is done with them.
        if self.failure.is_some() { Vec::new() } else { std::mem::take(&mut self.handed_back) }
    }

    fn patience(&mut self) -> Duration {
        if self.failure.is_none() && !self.is_idle() {
            self.patience.next()
        } else if self.failure.is_none() && self.last_end.elapsed() < WATCH {
            // The next one is about to come, where few tokens are computed.
            Duration::ZERO
        } else {
            LOOK_AROUND
        }
    }

    fn fail(&mut self, failure: CommError) {
        self.end(failure);
    }

    fn compute_failed(&mut self, failure: CommError) {
        self.heartbeat.fail_quietly(failure.clone());
        self.end(failure);
    }
}

impl Drop for NcclEngine {
    fn drop(&mut self) {
        if !self.is_idle() {
            self.end(CommError::left(self.rank));
        }
        if self.failure.is_none() {
            self.heartbeat.farewell();
            for communicator in self.communicators() {
                // This rank has all that it wanted; who has not says so itself.
                let _ = communicator.finish(&self.device, || self.heartbeat.failure().is_none());
            }
            return;
        }
        let deadline = Instant::now() + ABORT;
        for lane in &mut self.lanes {
            let ended = || Event::new(&self.device).and_then(|event| event.record(&lane.stream).map(|()| event));
            let ended = ended().is_ok_and(|event| {
                loop {
                    match event.query() {
                        Ok(false) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                        outcome => return outcome.unwrap_or(true),
                    }
                }
            });
            if !ended {
                // The device may still touch the memory of what is under way.
                std::mem::forget(std::mem::take(&mut lane.under_way));
                std::mem::forget(std::mem::take(&mut lane.stages));
                std::mem::forget(std::mem::take(&mut self.handed_back));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_of_ranks_has_one_communicator() {
        let groups = [vec![0, 1, 2], vec![1], vec![0, 2], vec![0, 1, 2], vec![0, 2], vec![]];
        assert_eq!(distinct(&groups), [vec![0, 1, 2], vec![0, 2]]);
    }

    #[test]
    fn stages_fit_others_too() {
        assert_eq!([1, 5000, 9 << 20].map(room), [SMALLEST_STAGE, 8192, 16 << 20]);
    }

    #[test]
    fn pieces_lie_one_after_another() {
        assert_eq!(places(&[6, 0, 10]), [(0, 6), (6, 0), (6, 10)]);
    }
}
