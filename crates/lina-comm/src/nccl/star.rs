//! Every rank's TCP connection to rank 0: what ranks tell each other before NCCL does.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::processes::{Assembly, Fault};

/// How long all ranks may take to come.
const MEET: Duration = Duration::from_secs(120);
/// How long one attempt to connect, or a stranger's greeting, may take.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a rank may think about an answer: its library may be loading.
const ANSWER: Duration = Duration::from_secs(300);
/// What a rank's greeting begins with, so that a stranger is not taken for one.
const GREETING: u64 = 0x6c69_6e61_6e63_636c;
/// No message is longer.
const LONGEST: usize = 1 << 24;

/// One rank's connections: rank 0's to all others, the others' to rank 0.
#[derive(Debug)]
pub(super) struct Star {
    rank: usize,
    /// By rank; `None` where there is no connection.
    streams: Vec<Option<TcpStream>>,
}

impl Star {
    /// Meets the other ranks at `place`; blocks until all have come.
    pub(super) fn meet(rank: usize, ranks: usize, place: &(String, u16)) -> Result<Star, Fault> {
        let mut streams: Vec<Option<TcpStream>> = (0..ranks).map(|_| None).collect();
        if rank == 0 {
            if ranks > 1 {
                accept(&mut streams, place)?;
            }
        } else {
            streams[0] = Some(call(rank, ranks, place)?);
        }
        for stream in streams.iter().flatten() {
            let set = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(ANSWER)));
            set.map_err(|e| Fault(format!("a connection between ranks cannot be set up: {e}")))?;
        }
        Ok(Star { rank, streams })
    }

    fn stream(&self, peer: usize) -> &TcpStream {
        self.streams[peer].as_ref().expect("only rank 0 is connected with all others")
    }

    fn send(&self, peer: usize, bytes: &[u8]) -> Result<(), Fault> {
        let mut message = (bytes.len() as u32).to_le_bytes().to_vec();
        message.extend(bytes);
        self.stream(peer).write_all(&message).map_err(|e| Fault(format!("rank {peer} cannot be told anything: {e}")))
    }

    fn receive(&self, peer: usize) -> Result<Vec<u8>, Fault> {
        let read = || -> io::Result<Vec<u8>> {
            let mut stream = self.stream(peer);
            let mut len = [0; 4];
            stream.read_exact(&mut len)?;
            let len = u32::from_le_bytes(len) as usize;
            if len > LONGEST {
                return Err(ErrorKind::InvalidData.into());
            }
            let mut bytes = vec![0; len];
            stream.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|e| Fault(format!("rank {peer} does not answer: {e}")))
    }
}

impl Assembly for Star {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.streams.len()
    }

    fn gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Fault> {
        let ranks = self.ranks();
        if self.rank != 0 {
            self.send(0, mine)?;
            return (0..ranks).map(|_| self.receive(0)).collect();
        }
        let mut all = vec![mine.to_vec()];
        for peer in 1..ranks {
            all.push(self.receive(peer)?);
        }
        for peer in 1..ranks {
            all.iter().try_for_each(|bytes| self.send(peer, bytes))?;
        }
        Ok(all)
    }

    fn broadcast(&mut self, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        if self.rank != 0 {
            *bytes = self.receive(0)?;
            return Ok(());
        }
        (1..self.ranks()).try_for_each(|peer| self.send(peer, bytes))
    }

    fn tell(&mut self, peer: usize, value: i64) -> Result<(), Fault> {
        self.send(peer, &value.to_le_bytes())
    }

    fn hear(&mut self, peer: usize) -> Result<i64, Fault> {
        let bytes = self.receive(peer)?;
        let value = bytes.try_into().map_err(|_| Fault(format!("rank {peer} does not say what was expected")))?;
        Ok(i64::from_le_bytes(value))
    }
}

fn greeting(rank: usize, ranks: usize) -> [u8; 24] {
    let mut bytes = [0; 24];
    for (place, value) in bytes.chunks_exact_mut(8).zip([GREETING, rank as u64, ranks as u64]) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Waits for every other rank's call.
fn accept(streams: &mut [Option<TcpStream>], (host, port): &(String, u16)) -> Result<(), Fault> {
    let ranks = streams.len();
    let refused = |e: io::Error| Fault(format!("rank 0 cannot listen on port {port} (MASTER_PORT): {e}"));
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    let deadline = Instant::now() + MEET;
    while let Some(missing) = (1..ranks).find(|&peer| streams[peer].is_none()) {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Some(peer) = answer(&stream, ranks) {
                    streams[peer] = Some(stream);
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => std::thread::sleep(PAUSE),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let seconds = MEET.as_secs();
                return Err(Fault(format!("rank {missing} has not come to {host}:{port} within {seconds} s")));
            }
            Err(e) => return Err(refused(e)),
        }
    }
    Ok(())
}

/// The rank that calls, if it is one of this job's.
fn answer(mut stream: &TcpStream, ranks: usize) -> Option<usize> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(ATTEMPT)).ok()?;
    let mut call = [0; 24];
    stream.read_exact(&mut call).ok()?;
    let rank = u64::from_le_bytes(call[8..16].try_into().ok()?) as usize;
    if call != greeting(rank, ranks) || !(1..ranks).contains(&rank) {
        return None;
    }
    stream.write_all(&greeting(0, ranks)).ok()?;
    Some(rank)
}

/// Calls rank 0 until it answers.
fn call(rank: usize, ranks: usize, (host, port): &(String, u16)) -> Result<TcpStream, Fault> {
    let attempt = || -> io::Result<TcpStream> {
        let mut error = ErrorKind::NotFound.into();
        for address in (host.as_str(), *port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, ATTEMPT) {
                Ok(mut stream) => {
                    stream.set_read_timeout(Some(ATTEMPT))?;
                    stream.write_all(&greeting(rank, ranks))?;
                    let mut reply = [0; 24];
                    stream.read_exact(&mut reply)?;
                    let ours = reply == greeting(0, ranks);
                    return if ours { Ok(stream) } else { Err(ErrorKind::InvalidData.into()) };
                }
                Err(e) => error = e,
            }
        }
        Err(error)
    };
    let deadline = Instant::now() + MEET;
    loop {
        match attempt() {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > deadline => {
                let place = format!("{host}:{port} (MASTER_ADDR, MASTER_PORT)");
                return Err(Fault(format!("rank {rank} cannot reach rank 0 at {place}: {e}")));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_meet_and_talk_whoever_else_calls() {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let place = ("127.0.0.1".to_owned(), port);
        let ranks = 4;
        let stranger = {
            let place = place.clone();
            move || {
                let deadline = Instant::now() + Duration::from_secs(5);
                while Instant::now() < deadline {
                    if let Ok(mut stream) = TcpStream::connect((place.0.as_str(), place.1)) {
                        return stream.write_all(&[7; 24]).unwrap();
                    }
                }
            }
        };
        let stranger = std::thread::spawn(stranger);
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                let place = place.clone();
                std::thread::spawn(move || {
                    let mut star = Star::meet(rank, ranks, &place).unwrap();
                    let all = star.gather(&vec![rank as u8; rank]).unwrap();
                    assert!(all.iter().enumerate().all(|(from, bytes)| *bytes == vec![from as u8; from]));
                    let mut text = if rank == 0 { b"first".to_vec() } else { Vec::new() };
                    star.broadcast(&mut text).unwrap();
                    assert_eq!(text, b"first");
                    if rank == 0 {
                        (1..ranks).for_each(|peer| assert_eq!(star.hear(peer).unwrap(), -(peer as i64)));
                    } else {
                        star.tell(0, -(rank as i64)).unwrap();
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        stranger.join().unwrap();
    }
}
