//! The heartbeat beside MPI or NCCL, which do not say that a rank has died or fallen silent, but wait.
//!
//! Every two ranks share a TCP connection. A rank that lives says so regularly; a connection that closes without a
//! farewell means that the rank has died; one on which nothing comes for the set time, that it is silent. Whoever
//! notices, or fails itself, tells all others, so that all name the same rank.
//!
//! A rank whose beats come may still keep the others waiting in an operation, for which their engines have the same time.
//! Beats say whether a rank has long work on its host; while one does, that time does not run.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::LastWords;
use crate::CommError;
use crate::threaded::Mailbox;

/// How often connections are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Time between two beats, or a tenth of the timeout where that is less.
const BEAT: Duration = Duration::from_secs(1);
/// How long one address is tried, and how long a stranger's answer is waited for.
const CONNECT: Duration = Duration::from_secs(2);
/// How long all connections may take.
const MEET: Duration = Duration::from_secs(60);
/// The compute thread has this long to end its rank in order before the last words are said for it.
const GRACE: Duration = Duration::from_millis(300);

/// Errors of a network that does not deliver.
const UNDELIVERED: [ErrorKind; 4] =
    [ErrorKind::TimedOut, ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable, ErrorKind::NetworkDown];

/// What a message begins with.
const ALIVE: u8 = 1;
const FAREWELL: u8 = 2;
const RANK_FAILED: u8 = 3;
const RANK_SILENT: u8 = 4;

/// Where the other ranks find this one.
pub(crate) struct Meeting {
    listener: TcpListener,
}

impl Meeting {
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Meeting { listener: TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))? })
    }

    /// Addresses of this host, each with the port, separated by spaces. Loopback is first: it serves ranks of one host,
    /// and is refused at once where there is none.
    pub(crate) fn addresses(&self) -> io::Result<String> {
        let port = self.listener.local_addr()?.port();
        let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
        addresses.extend(if_addrs::get_if_addrs()?.iter().map(if_addrs::Interface::ip).filter(IpAddr::is_ipv4));
        addresses.dedup();
        let texts = addresses.into_iter().map(|address| SocketAddr::new(address, port).to_string());
        Ok(texts.collect::<Vec<_>>().join(" "))
    }

    /// Connects with every other rank: calls those below, and is called by those above. `token` is the job's own, so
    /// that a stranger on the same address is not taken for a rank.
    ///
    /// # Errors
    /// A sentence that names a rank that cannot be reached.
    pub(crate) fn connect(
        self,
        rank: usize,
        token: u64,
        addresses: &[String],
    ) -> Result<Vec<Option<TcpStream>>, String> {
        let ranks = addresses.len();
        let mut streams: Vec<Option<TcpStream>> = (0..ranks).map(|_| None).collect();
        let mut slots = streams.iter_mut();
        for (peer, slot) in slots.by_ref().take(rank).enumerate() {
            *slot = Some(call(token, rank, peer, &addresses[peer])?);
        }
        let refused = |e: io::Error| format!("connections of the heartbeat cannot be accepted: {e}");
        self.listener.set_nonblocking(true).map_err(refused)?;
        let deadline = Instant::now() + MEET;
        while let Some(missing) = (rank + 1..ranks).find(|&peer| streams[peer].is_none()) {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Some(peer) = answer(&stream, token, rank).filter(|peer| (rank + 1..ranks).contains(peer)) {
                        streams[peer] = Some(stream);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    return Err(format!("rank {missing} has not connected by TCP within {} s", MEET.as_secs()));
                }
                Err(e) => return Err(refused(e)),
            }
        }
        Ok(streams)
    }
}

/// What two ranks tell each other first.
fn greeting(token: u64, from: usize, to: usize) -> [u8; 24] {
    let mut bytes = [0; 24];
    for (place, value) in bytes.chunks_exact_mut(8).zip([token, from as u64, to as u64]) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn call(token: u64, rank: usize, peer: usize, addresses: &str) -> Result<TcpStream, String> {
    let attempt = |address: &str| -> io::Result<TcpStream> {
        let address: SocketAddr = address.parse().map_err(|_| ErrorKind::InvalidInput)?;
        let mut stream = TcpStream::connect_timeout(&address, CONNECT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CONNECT))?;
        stream.write_all(&greeting(token, rank, peer))?;
        let mut reply = [0; 24];
        stream.read_exact(&mut reply)?;
        if reply == greeting(token, peer, rank) { Ok(stream) } else { Err(ErrorKind::InvalidData.into()) }
    };
    let deadline = Instant::now() + MEET;
    loop {
        if let Some(stream) = addresses.split(' ').find_map(|address| attempt(address).ok()) {
            return Ok(stream);
        }
        if Instant::now() > deadline {
            return Err(format!("rank {peer} cannot be reached by TCP from rank {rank} at any of {addresses}"));
        }
    }
}

/// The rank that calls, if it is one of this job's and means this one.
fn answer(mut stream: &TcpStream, token: u64, rank: usize) -> Option<usize> {
    stream.set_nonblocking(false).ok()?;
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(CONNECT)).ok()?;
    let mut call = [0; 24];
    stream.read_exact(&mut call).ok()?;
    let from = u64::from_le_bytes(call[8..16].try_into().ok()?) as usize;
    if call != greeting(token, from, rank) {
        return None;
    }
    stream.write_all(&greeting(token, rank, from)).ok()?;
    Some(from)
}

/// The heartbeat of one rank: a thread that speaks and listens until this value is dropped.
pub(crate) struct Heartbeat {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    rank: usize,
    timeout: Duration,
    mailbox: Arc<Mailbox>,
    last_words: Option<LastWords>,
    state: Mutex<State>,
}

struct State {
    /// By rank; `None` for this one.
    peers: Vec<Option<Peer>>,
    progress: u64,
    /// When a rank, this one included, was last known to have long work on its host.
    last_busy: Option<Instant>,
    failure: Option<CommError>,
    /// The failure is of this rank's compute thread, which says so itself.
    quiet: bool,
    /// The job has ended.
    over: bool,
}

struct Peer {
    stream: TcpStream,
    inbox: Vec<u8>,
    heard: Instant,
    progress: u64,
    said_farewell: bool,
    closed: bool,
}

impl Heartbeat {
    pub(crate) fn start(
        rank: usize,
        streams: Vec<Option<TcpStream>>,
        timeout: Duration,
        mailbox: Arc<Mailbox>,
        last_words: Option<LastWords>,
    ) -> io::Result<Self> {
        let mut peers = Vec::with_capacity(streams.len());
        for stream in streams {
            if let Some(stream) = &stream {
                stream.set_nonblocking(true)?;
            }
            peers.push(stream.map(|stream| Peer {
                stream,
                inbox: Vec::new(),
                heard: Instant::now(),
                progress: 0,
                said_farewell: false,
                closed: false,
            }));
        }
        let state = Mutex::new(State { peers, progress: 0, last_busy: None, failure: None, quiet: false, over: false });
        let shared = Arc::new(Shared { rank, timeout, mailbox, last_words, state });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(format!("lina-heart-{rank}")).spawn(move || watched.watch())?;
        Ok(Heartbeat { shared, thread: Some(thread) })
    }

    /// Why the job has ended early, if it has.
    pub(crate) fn failure(&self) -> Option<CommError> {
        self.shared.lock().failure.clone()
    }

    /// Whether `rank` has said that it has nothing more to do.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        self.shared.lock().peers[rank].as_ref().is_some_and(|peer| peer.said_farewell)
    }

    /// From when on what is awaited since `since` counts as late: the moment at which a rank was last busy, if that was later.
    pub(crate) fn overdue_from(&self, since: Instant) -> Instant {
        self.shared.lock().last_busy.map_or(since, |busy| busy.max(since))
    }

    /// How far this rank has come, as a number that grows; travels with the beats.
    #[cfg(feature = "nccl")]
    pub(crate) fn set_progress(&self, progress: u64) {
        self.shared.lock().progress = progress;
    }

    /// The rank that has come least far, as far as is known, and how far.
    #[cfg(feature = "nccl")]
    pub(crate) fn slowest(&self) -> (usize, u64) {
        let state = self.shared.lock();
        let of = |peer: &Option<Peer>| peer.as_ref().map_or(state.progress, |peer| peer.progress);
        let all = state.peers.iter().map(of).enumerate();
        all.min_by_key(|&(_, progress)| progress).unwrap_or((self.shared.rank, state.progress))
    }

    /// Ends the job on every rank.
    pub(crate) fn fail(&self, failure: CommError) {
        self.shared.fail(&mut self.shared.lock(), failure);
    }

    /// The same for a failure of which this rank's compute thread says itself why: if it is the first, nobody else says it
    /// here, however long the rank takes to end.
    pub(crate) fn fail_quietly(&self, failure: CommError) {
        let mut state = self.shared.lock();
        state.quiet |= state.failure.is_none();
        self.shared.fail(&mut state, failure);
    }

    /// This rank has done its part: when its connections close, nothing is wrong.
    pub(crate) fn farewell(&self) {
        self.shared.lock().tell_all(&[FAREWELL]);
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        if let Some(thread) = self.thread.take() {
            // It holds no lock while it could panic, and has nothing to tell.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn watch(&self) {
        let beat = BEAT.min(self.timeout / 10);
        let mut spoken: Option<Instant> = None;
        loop {
            let mut state = self.lock();
            if state.over {
                return;
            }
            let busy = self.mailbox.is_busy();
            if busy {
                state.last_busy = Some(Instant::now());
            }
            if spoken.is_none_or(|at| at.elapsed() >= beat) {
                spoken = Some(Instant::now());
                let beat = alive(state.progress, busy);
                state.tell_all(&beat);
            }
            if let Some(failure) = state.listen().or_else(|| self.silent(&state)) {
                self.fail(&mut state, failure);
            }
            if let Some(failure) = state.failure.clone() {
                let quiet = state.quiet;
                drop(state);
                if !quiet {
                    self.see_to_the_end(&failure);
                }
                return;
            }
            drop(state);
            std::thread::sleep(LOOK.min(beat));
        }
    }

    /// The rank that has not been heard of for the set time. If that is every rank, it is this one that is cut off.
    fn silent(&self, state: &State) -> Option<CommError> {
        let watched = |peer: &&Peer| !peer.said_farewell && !peer.closed;
        let all = state.peers.iter().flatten().filter(watched).count();
        let silent = |peer: &Peer| watched(&peer) && peer.heard.elapsed() > self.timeout;
        let mut ranks = (0..state.peers.len()).filter(|&rank| state.peers[rank].as_ref().is_some_and(silent));
        let first = ranks.next()?;
        let seconds = self.timeout.as_secs();
        if all > 1 && 1 + ranks.count() == all {
            let reason = format!("it has heard of no other rank for {seconds} s; its network is down");
            return Some(CommError::RankFailed { rank: self.rank, reason });
        }
        Some(CommError::RankSilent { rank: first, seconds, operation: "its heartbeat".to_owned() })
    }

    fn fail(&self, state: &mut State, failure: CommError) {
        if state.failure.is_none() {
            state.tell_all(&encode(&failure));
            state.failure = Some(failure.clone());
            // The communication thread may be inside a library that does not return once it has lost a peer.
            self.mailbox.fail(failure);
            self.mailbox.poke();
        }
    }

    /// The job has failed. Its compute thread hears of that when it next communicates; a launcher may not wait that
    /// long before it kills this process, so somebody has to say why.
    fn see_to_the_end(&self, failure: &CommError) {
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            if self.lock().over {
                return;
            }
            std::thread::sleep(LOOK);
        }
        if let Some(last_words) = self.last_words {
            last_words(failure);
        }
    }
}

impl State {
    /// Sends to all peers, without waiting: to one that does not read, nothing can be told.
    fn tell_all(&mut self, message: &[u8]) {
        for peer in self.peers.iter_mut().flatten().filter(|peer| !peer.closed) {
            // A connection that cannot be written is found closed or silent by reading.
            let _ = peer.stream.write(message);
        }
    }

    /// Reads what has come; returns a failure that it tells of.
    fn listen(&mut self) -> Option<CommError> {
        let mut found = None;
        for (rank, peer) in self.peers.iter_mut().enumerate() {
            let Some(peer) = peer.as_mut().filter(|peer| !peer.closed) else { continue };
            peer.read();
            while let Some((message, len)) = decode(&peer.inbox) {
                peer.inbox.drain(..len);
                match message {
                    Message::Alive { progress, busy } => {
                        peer.progress = progress;
                        if busy {
                            self.last_busy = Some(Instant::now());
                        }
                    }
                    Message::Farewell => peer.said_farewell = true,
                    Message::Failed(failure) => found = found.or(Some(failure)),
                }
            }
            if peer.closed && !peer.said_farewell && found.is_none() {
                let reason = "its process has died or was killed".to_owned();
                found = Some(CommError::RankFailed { rank, reason });
            }
        }
        found
    }
}

impl Peer {
    fn read(&mut self) {
        let mut bytes = [0; 512];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => self.closed = true,
                Ok(n) => {
                    self.inbox.extend(&bytes[..n]);
                    self.heard = Instant::now();
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                // What the network cannot deliver may yet come; only the peer's system says that its process is gone.
                Err(e) if UNDELIVERED.contains(&e.kind()) => {}
                Err(_) => self.closed = true,
            }
            return;
        }
    }
}

#[derive(Debug, PartialEq)]
enum Message {
    /// And how far the rank has come, and whether it has long work on its host.
    Alive {
        progress: u64,
        busy: bool,
    },
    Farewell,
    Failed(CommError),
}

/// Bytes of a beat.
const BEAT_BYTES: usize = 10;

/// A beat as a message: what it is, how far the rank has come, whether it is busy.
fn alive(progress: u64, busy: bool) -> [u8; BEAT_BYTES] {
    let mut message = [ALIVE; BEAT_BYTES];
    message[1..9].copy_from_slice(&progress.to_le_bytes());
    message[9] = u8::from(busy);
    message
}

/// A failure as a message: what it is, the rank, the seconds, the text's length, the text.
fn encode(failure: &CommError) -> Vec<u8> {
    let (kind, rank, seconds, text) = match failure {
        CommError::RankFailed { rank, reason } => (RANK_FAILED, rank, &0, reason),
        CommError::RankSilent { rank, seconds, operation } => (RANK_SILENT, rank, seconds, operation),
    };
    let mut end = text.len().min(usize::from(u16::MAX));
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut message = vec![kind];
    message.extend((*rank as u32).to_le_bytes());
    message.extend(seconds.to_le_bytes());
    message.extend((end as u16).to_le_bytes());
    message.extend(&text.as_bytes()[..end]);
    message
}

/// The first message of `bytes` and its length, once it is complete.
fn decode(bytes: &[u8]) -> Option<(Message, usize)> {
    const HEAD: usize = 15;
    match *bytes.first()? {
        FAREWELL => Some((Message::Farewell, 1)),
        kind @ (RANK_FAILED | RANK_SILENT) => {
            let head = bytes.get(..HEAD)?;
            let rank = u32::from_le_bytes(head[1..5].try_into().ok()?) as usize;
            let seconds = u64::from_le_bytes(head[5..13].try_into().ok()?);
            let len = usize::from(u16::from_le_bytes(head[13..15].try_into().ok()?));
            let text = String::from_utf8_lossy(bytes.get(HEAD..HEAD + len)?).into_owned();
            let failure = if kind == RANK_FAILED {
                CommError::RankFailed { rank, reason: text }
            } else {
                CommError::RankSilent { rank, seconds, operation: text }
            };
            Some((Message::Failed(failure), HEAD + len))
        }
        _ => {
            let beat = bytes.get(..BEAT_BYTES)?;
            let progress = u64::from_le_bytes(beat[1..9].try_into().ok()?);
            Some((Message::Alive { progress, busy: beat[9] != 0 }, BEAT_BYTES))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_whole_or_not_at_all() {
        let failed = CommError::RankFailed { rank: 3, reason: "no löss".to_owned() };
        let silent = CommError::RankSilent { rank: 1, seconds: 30, operation: "an allreduce".to_owned() };
        for failure in [failed, silent] {
            let bytes = encode(&failure);
            assert!((0..bytes.len()).all(|len| decode(&bytes[..len]).is_none()));
            assert_eq!(decode(&bytes), Some((Message::Failed(failure), bytes.len())));
        }
        for busy in [false, true] {
            let bytes = alive(1 << 40, busy);
            let beat = Message::Alive { progress: 1 << 40, busy };
            assert_eq!((decode(&bytes[..9]), decode(&bytes)), (None, Some((beat, 10))));
        }
        assert_eq!(decode(&[FAREWELL]), Some((Message::Farewell, 1)));
    }

    fn hearts(ranks: usize, timeout: Duration) -> Vec<Heartbeat> {
        hearts_with(ranks, timeout, None)
    }

    fn hearts_with(ranks: usize, timeout: Duration, last_words: Option<LastWords>) -> Vec<Heartbeat> {
        let meetings: Vec<Meeting> = (0..ranks).map(|_| Meeting::open().unwrap()).collect();
        let addresses: Vec<String> = meetings.iter().map(|meeting| meeting.addresses().unwrap()).collect();
        let threads: Vec<_> = (meetings.into_iter().enumerate())
            .map(|(rank, meeting)| {
                let addresses = addresses.clone();
                std::thread::spawn(move || {
                    let streams = meeting.connect(rank, 7, &addresses).unwrap();
                    Heartbeat::start(rank, streams, timeout, Arc::new(Mailbox::new()), last_words).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    #[track_caller]
    fn wait_for(heart: &Heartbeat) -> CommError {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some(failure) = heart.failure() {
                return failure;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("no failure was noticed")
    }

    #[test]
    fn a_rank_that_vanishes_is_named_and_one_that_leaves_is_not() {
        let mut hearts = hearts(3, Duration::from_secs(20));
        let leaver = hearts.pop().unwrap();
        leaver.farewell();
        drop(leaver);
        std::thread::sleep(Duration::from_millis(100));
        assert!(hearts[0].failure().is_none() && hearts[0].has_left(2) && !hearts[0].has_left(1));
        drop(hearts.pop());
        assert!(matches!(wait_for(&hearts[0]), CommError::RankFailed { rank: 1, .. }));
    }

    #[test]
    fn all_ranks_hear_the_same_reason() {
        let hearts = hearts(3, Duration::from_secs(20));
        let failure = CommError::RankFailed { rank: 1, reason: "it was told to".to_owned() };
        hearts[1].fail(failure.clone());
        assert!(hearts.iter().all(|heart| wait_for(heart) == failure));
    }

    #[test]
    fn a_rank_that_says_itself_why_it_ends_has_no_last_words() {
        static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let said = || SAID.lock().unwrap().len();
        for (quietly, expected) in [(true, 2), (false, 3)] {
            SAID.lock().unwrap().clear();
            let hearts =
                hearts_with(3, Duration::from_secs(20), Some(|error| SAID.lock().unwrap().push(error.to_string())));
            let failure = CommError::RankFailed { rank: 1, reason: "a.txt is empty".to_owned() };
            if quietly {
                hearts[1].fail_quietly(failure.clone());
            } else {
                hearts[1].fail(failure.clone());
            }
            assert!(hearts.iter().all(|heart| wait_for(heart) == failure));
            let deadline = Instant::now() + Duration::from_secs(10);
            while said() < expected && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(GRACE);
            assert_eq!(*SAID.lock().unwrap(), vec![failure.to_string(); expected]);
        }
    }

    #[test]
    fn what_another_rank_has_failed_of_is_said() {
        static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let hearts =
            hearts_with(2, Duration::from_secs(20), Some(|error| SAID.lock().unwrap().push(error.to_string())));
        let failure = CommError::RankFailed { rank: 0, reason: "it was first".to_owned() };
        hearts[0].fail(failure.clone());
        assert_eq!(wait_for(&hearts[1]), failure);
        hearts[1].fail_quietly(CommError::RankFailed { rank: 1, reason: "it heard of that".to_owned() });
        let deadline = Instant::now() + Duration::from_secs(10);
        while SAID.lock().unwrap().len() < 2 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(*SAID.lock().unwrap(), vec![failure.to_string(); 2]);
    }

    #[test]
    fn while_a_rank_is_busy_nothing_is_overdue() {
        let hearts = hearts(3, Duration::from_secs(1));
        let start = Instant::now();
        let overdue_from = || hearts.iter().map(|heart| heart.overdue_from(start)).min().unwrap();
        let wait_until = |reached: &dyn Fn() -> bool| {
            let deadline = Instant::now() + Duration::from_secs(10);
            while !reached() {
                assert!(Instant::now() < deadline, "beats carry whether ranks are busy");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        assert_eq!(overdue_from(), start);
        hearts[1].shared.mailbox.set_busy(true);
        // Longer than the timeout, on all ranks and on the busy one itself.
        wait_until(&|| overdue_from() > start + Duration::from_millis(1500));
        hearts[1].shared.mailbox.set_busy(false);
        wait_until(&|| overdue_from().elapsed() > Duration::from_millis(500));
        assert!(hearts.iter().all(|heart| heart.failure().is_none()));
        // What began later counts from its own beginning.
        let later = Instant::now();
        assert_eq!(hearts[0].overdue_from(later), later);
    }

    #[cfg(feature = "nccl")]
    #[test]
    fn the_rank_that_is_behind_is_known() {
        let hearts = hearts(3, Duration::from_millis(500));
        hearts.iter().zip([5, 3, 7]).for_each(|(heart, progress)| heart.set_progress(progress));
        let deadline = Instant::now() + Duration::from_secs(10);
        while hearts.iter().any(|heart| heart.slowest() != (1, 3)) {
            assert!(Instant::now() < deadline, "beats carry how far ranks have come");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
