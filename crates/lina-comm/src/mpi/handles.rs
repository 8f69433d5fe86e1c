//! MPI's handles with what the engine needs of them: communicators, and a table of the requests under way.
//!
//! The `mpi` crate ties a nonblocking request to a borrow of its buffer within one scope. The engine's requests live in
//! queues next to buffers that it owns, so it uses the crate's `ffi`. Everything here is called by the communication
//! thread only, which is the one that initialised MPI.

use std::ffi::{c_char, c_int, c_void};
use std::mem::MaybeUninit;

use mpi::ffi;

use crate::processes::{Assembly, Fault};

/// The value of an MPI call as a result.
fn checked(call: &str, code: c_int) -> Result<(), Fault> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len = 0;
    // SAFETY: the buffer has the length that MPI asks for, and MPI writes its text's length.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut len) };
    let text = String::from_utf8_lossy(&text[..(len.max(0) as usize).min(text.len())]).into_owned();
    Err(Fault(format!("{call} failed: {text}")))
}

/// A communicator. Handles made here live until MPI is finalised.
#[derive(Clone, Copy, Debug)]
pub(super) struct Communicator(ffi::MPI_Comm);

impl Communicator {
    /// All ranks. Errors become values on it and on what is made of it.
    fn world() -> Result<Self, Fault> {
        // SAFETY: MPI is initialised; both are constants of the library.
        let (world, handler) = unsafe { (ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN) };
        // SAFETY: as above.
        checked("MPI_Comm_set_errhandler", unsafe { ffi::MPI_Comm_set_errhandler(world, handler) })?;
        Ok(Communicator(world))
    }

    fn rank(self) -> Result<usize, Fault> {
        let mut rank = 0;
        // SAFETY: a valid communicator and a place for the result.
        checked("MPI_Comm_rank", unsafe { ffi::MPI_Comm_rank(self.0, &mut rank) })?;
        Ok(rank as usize)
    }

    fn size(self) -> Result<usize, Fault> {
        let mut size = 0;
        // SAFETY: a valid communicator and a place for the result.
        checked("MPI_Comm_size", unsafe { ffi::MPI_Comm_size(self.0, &mut size) })?;
        Ok(size as usize)
    }

    /// The same ranks, whose messages do not match those of this one. All ranks call it together.
    pub(super) fn duplicate(self) -> Result<Self, Fault> {
        let mut copy = self.0;
        // SAFETY: a valid communicator and a place for the result.
        checked("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(self.0, &mut copy) })?;
        Ok(Communicator(copy))
    }

    /// The communicator of some of the ranks, ascending; all ranks call it together, `None` for those outside.
    pub(super) fn of_members(self, member: Option<usize>) -> Result<Option<Self>, Fault> {
        // SAFETY: a constant of the library.
        let outside = unsafe { ffi::RSMPI_UNDEFINED };
        let color = if member.is_some() { 0 } else { outside };
        let mut part = self.0;
        let key = member.unwrap_or(0) as c_int;
        // SAFETY: a valid communicator and a place for the result.
        checked("MPI_Comm_split", unsafe { ffi::MPI_Comm_split(self.0, color, key, &mut part) })?;
        Ok(member.map(|_| Communicator(part)))
    }

    /// Gives the handle back, on all its ranks; nothing may be under way on it.
    pub(super) fn free(mut self) -> Result<(), Fault> {
        // SAFETY: a valid communicator, of which this was the only handle that is used.
        checked("MPI_Comm_free", unsafe { ffi::MPI_Comm_free(&mut self.0) })
    }

    /// Starts sending `bytes` to `peer`, at most 2^31 - 1 of them.
    ///
    /// # Safety
    /// The memory must stay where it is, unchanged, until the request is done or MPI is never called again.
    unsafe fn send(self, bytes: *const u8, len: usize, peer: usize, tag: c_int) -> Result<ffi::MPI_Request, Fault> {
        // SAFETY: a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: the caller vouches for the memory.
        let code = unsafe {
            let (bytes, kind) = (bytes.cast::<c_void>(), ffi::RSMPI_UINT8_T);
            ffi::MPI_Isend(bytes, len as c_int, kind, peer as c_int, tag, self.0, &mut request)
        };
        checked("MPI_Isend", code)?;
        Ok(request)
    }

    /// Starts receiving up to `len` bytes from `peer`.
    ///
    /// # Safety
    /// The memory must stay where it is, and be touched by nobody, until the request is done or MPI is never called
    /// again.
    unsafe fn receive(self, bytes: *mut u8, len: usize, peer: usize, tag: c_int) -> Result<ffi::MPI_Request, Fault> {
        // SAFETY: a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: the caller vouches for the memory.
        let code = unsafe {
            let (bytes, kind) = (bytes.cast::<c_void>(), ffi::RSMPI_UINT8_T);
            ffi::MPI_Irecv(bytes, len as c_int, kind, peer as c_int, tag, self.0, &mut request)
        };
        checked("MPI_Irecv", code)?;
        Ok(request)
    }
}

/// All ranks of MPI, before their first operation.
pub(super) struct World {
    pub(super) communicator: Communicator,
    rank: usize,
    ranks: usize,
}

impl World {
    pub(super) fn new() -> Result<Self, Fault> {
        let communicator = Communicator::world()?;
        Ok(World { communicator, rank: communicator.rank()?, ranks: communicator.size()? })
    }
}

impl Assembly for World {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Fault> {
        let mut all = vec![0u8; mine.len() * self.ranks];
        let len = mine.len() as c_int;
        // SAFETY: `all` has room for `mine.len()` bytes of each rank.
        let code = unsafe {
            let (from, to) = (mine.as_ptr().cast::<c_void>(), all.as_mut_ptr().cast::<c_void>());
            ffi::MPI_Allgather(from, len, ffi::RSMPI_UINT8_T, to, len, ffi::RSMPI_UINT8_T, self.communicator.0)
        };
        checked("MPI_Allgather", code)?;
        Ok(all.chunks_exact(mine.len()).map(<[u8]>::to_vec).collect())
    }

    fn broadcast(&mut self, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        let world = self.communicator.0;
        let mut len = bytes.len() as u64;
        // SAFETY: one value of the type that is named.
        let code = unsafe { ffi::MPI_Bcast((&raw mut len).cast::<c_void>(), 1, ffi::RSMPI_UINT64_T, 0, world) };
        checked("MPI_Bcast", code)?;
        bytes.resize(len as usize, 0);
        if bytes.is_empty() {
            // The pointer of an empty vector is none that MPI accepts.
            return Ok(());
        }
        // SAFETY: `bytes` has the length that rank 0 sends.
        let code =
            unsafe { ffi::MPI_Bcast(bytes.as_mut_ptr().cast::<c_void>(), len as c_int, ffi::RSMPI_UINT8_T, 0, world) };
        checked("MPI_Bcast", code)
    }

    fn tell(&mut self, peer: usize, value: i64) -> Result<(), Fault> {
        // SAFETY: one value of the type that is named.
        let code = unsafe {
            let value = (&raw const value).cast::<c_void>();
            ffi::MPI_Send(value, 1, ffi::RSMPI_INT64_T, peer as c_int, 0, self.communicator.0)
        };
        checked("MPI_Send", code)
    }

    fn hear(&mut self, peer: usize) -> Result<i64, Fault> {
        let mut value = 0i64;
        // SAFETY: room for one value of the type that is named.
        let code = unsafe {
            let (value, from) = ((&raw mut value).cast::<c_void>(), peer as c_int);
            ffi::MPI_Recv(value, 1, ffi::RSMPI_INT64_T, from, 0, self.communicator.0, ffi::RSMPI_STATUS_IGNORE)
        };
        checked("MPI_Recv", code)?;
        Ok(value)
    }
}

/// Where a message goes to or comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) communicator: Communicator,
    /// The peer's rank in the communicator.
    pub(super) peer: usize,
    pub(super) tag: c_int,
}

/// A request that is done: what it was for, and how many bytes arrived (of a receive).
#[derive(Debug)]
pub(super) struct Done<T> {
    pub(super) label: T,
    pub(super) bytes: usize,
}

/// The requests under way, each with a label that says what it is for.
pub(super) struct Requests<T> {
    handles: Vec<ffi::MPI_Request>,
    labels: Vec<T>,
    indices: Vec<c_int>,
    statuses: Vec<MaybeUninit<ffi::MPI_Status>>,
    max_message_bytes: usize,
}

impl<T: Copy> Requests<T> {
    /// Nothing under way. Data is cut into messages of at most `max_message_bytes`, since MPI counts in 31 bits.
    pub(super) fn new(max_message_bytes: usize) -> Self {
        let max_message_bytes = max_message_bytes.clamp(1, c_int::MAX as usize);
        Requests {
            handles: Vec::new(),
            labels: Vec::new(),
            indices: Vec::new(),
            statuses: Vec::new(),
            max_message_bytes,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }

    /// The labels of what is under way.
    pub(super) fn labels(&self) -> &[T] {
        &self.labels
    }

    /// Starts sending `values`; returns the number of messages, none for no values.
    ///
    /// # Safety
    /// The memory must stay where it is, unchanged, until all are done or MPI is never called again.
    pub(super) unsafe fn send<V>(&mut self, values: &[V], route: Address, label: T) -> Result<usize, Fault> {
        let Address { communicator, peer, tag } = route;
        let from = values.as_ptr().cast::<u8>();
        self.post(size_of_val(values), label, |start, len| {
            // SAFETY: within `values`, for which the caller vouches.
            unsafe { communicator.send(from.add(start), len, peer, tag) }
        })
    }

    /// Starts receiving `values`; returns the number of messages, none for no values.
    ///
    /// # Safety
    /// The memory must stay where it is, and be touched by nobody, until all are done or MPI is never called again.
    pub(super) unsafe fn receive<V>(&mut self, values: &mut [V], route: Address, label: T) -> Result<usize, Fault> {
        let Address { communicator, peer, tag } = route;
        let to = values.as_mut_ptr().cast::<u8>();
        self.post(size_of_val(values), label, |start, len| {
            // SAFETY: within `values`, for which the caller vouches.
            unsafe { communicator.receive(to.add(start), len, peer, tag) }
        })
    }

    /// Cuts `bytes` into messages, which `start_message` starts from an offset and a length.
    fn post(
        &mut self,
        bytes: usize,
        label: T,
        start_message: impl Fn(usize, usize) -> Result<ffi::MPI_Request, Fault>,
    ) -> Result<usize, Fault> {
        let starts = (0..bytes).step_by(self.max_message_bytes);
        let messages = starts.len();
        for start in starts {
            self.handles.push(start_message(start, self.max_message_bytes.min(bytes - start))?);
            self.labels.push(label);
        }
        Ok(messages)
    }

    /// Lets MPI make progress and appends what is done.
    pub(super) fn test(&mut self, done: &mut Vec<Done<T>>) -> Result<(), Fault> {
        let n = self.handles.len();
        if n == 0 {
            return Ok(());
        }
        self.indices.resize(n, 0);
        self.statuses.resize(n, MaybeUninit::uninit());
        let mut completed = 0;
        // SAFETY: three arrays of the length that is named; MPI keeps to it.
        let code = unsafe {
            ffi::MPI_Testsome(
                n as c_int,
                self.handles.as_mut_ptr(),
                &mut completed,
                self.indices.as_mut_ptr(),
                self.statuses.as_mut_ptr().cast::<ffi::MPI_Status>(),
            )
        };
        checked("MPI_Testsome", code)?;
        let completed = usize::try_from(completed).unwrap_or(0).min(n);
        for (index, status) in self.indices[..completed].iter().zip(&self.statuses) {
            let mut bytes = 0;
            // SAFETY: MPI has filled the statuses of what is completed. Of a send, the count says nothing.
            unsafe { ffi::MPI_Get_count(status.as_ptr(), ffi::RSMPI_UINT8_T, &mut bytes) };
            let label = self.labels[*index as usize];
            done.push(Done { label, bytes: usize::try_from(bytes).unwrap_or(0) });
        }
        // From the back, so that what moves into a hole stays under way.
        self.indices[..completed].sort_unstable_by(|a, b| b.cmp(a));
        for &index in &self.indices[..completed] {
            self.handles.swap_remove(index as usize);
            self.labels.swap_remove(index as usize);
        }
        Ok(())
    }
}
