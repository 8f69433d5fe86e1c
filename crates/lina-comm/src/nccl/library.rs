//! NCCL's library, loaded when it is first needed, and what the engine needs of it.
//!
//! Communicators are of the kind that blocks where members have to find each other: of the other kind every launch starts a
//! thread. What may block for long is done beside the communication thread, which can so give it up.
//!
//! The bindings of `cudarc` look for `libnccl.so`, which only packages for developers have, and panic where a function is
//! missing. So the few functions that are called are bound here.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use libloading::Library;
use lina_cuda::Device;
use lina_cuda::cudarc::driver::sys::CUstream;

use crate::processes::Fault;

/// Oldest version that will do: the first with this configuration and with what can be aborted safely.
const NEEDED: c_int = 2_18_00;
/// File names, the one of packages without headers first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Of NCCL's socket transport: the largest message that travels in one piece with its size. Where a packet ends between the
/// two, the receiver takes what follows for the next message's size (seen with 2.28.9: "message truncated", or a wrong
/// value). So none does, unless the user has decided otherwise.
const INLINE: (&str, &str) = ("NCCL_SOCKET_INLINE", "0");
/// How long a communicator may take to be made, to be used for the first time or to be taken apart.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// How often it is asked meanwhile whether that still makes sense.
const LOOK: Duration = Duration::from_millis(20);

/// `ncclSuccess`, and `ncclInProgress` of a communicator that does not block.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`, `ncclFloat32` and `ncclSum`.
const BYTES: c_int = 1;
const F32: c_int = 7;
const SUM: c_int = 0;

type Handle = *mut c_void;

/// What the members of a communicator that is to be made have in common.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UniqueId([c_char; UniqueId::LEN]);

impl UniqueId {
    /// Its size in bytes.
    pub(super) const LEN: usize = 128;

    pub(super) fn to_bytes(self) -> [u8; UniqueId::LEN] {
        self.0.map(|byte| byte as u8)
    }

    pub(super) fn from_bytes(bytes: [u8; UniqueId::LEN]) -> Self {
        UniqueId(bytes.map(|byte| byte as c_char))
    }
}

/// `ncclConfig_t` as of NCCL 2.18. Its size and version tell later libraries that they are to choose the rest.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls return when their work is enqueued, and a kernel has at most `max_blocks` thread blocks; everything else is up to
    /// the library.
    fn new(max_blocks: Option<u16>) -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: NEEDED as u32,
            blocking: 1,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: max_blocks.map_or(UNDEFINED, c_int::from),
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// Functions by name and type, and how they are looked up.
macro_rules! functions {
    ($($field:ident = $symbol:ident($($argument:ty),*) -> $result:ty;)*) => {
        #[derive(Debug)]
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn load(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Functions {
                    // SAFETY: the types are those of NCCL's header, which have been the same since 2.18.
                    $($field: *unsafe { library.get(concat!(stringify!($symbol), "\0").as_bytes()) }?,)*
                })
            }
        }
    };
}

functions! {
    get_unique_id = ncclGetUniqueId(*mut UniqueId) -> c_int;
    comm_init = ncclCommInitRankConfig(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
    comm_state = ncclCommGetAsyncError(Handle, *mut c_int) -> c_int;
    comm_finalize = ncclCommFinalize(Handle) -> c_int;
    comm_destroy = ncclCommDestroy(Handle) -> c_int;
    comm_abort = ncclCommAbort(Handle) -> c_int;
    group_start = ncclGroupStart() -> c_int;
    group_end = ncclGroupEnd() -> c_int;
    send = ncclSend(*const c_void, usize, c_int, c_int, Handle, CUstream) -> c_int;
    recv = ncclRecv(*mut c_void, usize, c_int, c_int, Handle, CUstream) -> c_int;
    all_reduce = ncclAllReduce(*const c_void, *mut c_void, usize, c_int, c_int, Handle, CUstream) -> c_int;
    all_gather = ncclAllGather(*const c_void, *mut c_void, usize, c_int, Handle, CUstream) -> c_int;
    error_string = ncclGetErrorString(c_int) -> *const c_char;
    last_error = ncclGetLastError(Handle) -> *const c_char;
}

/// The loaded library.
#[derive(Debug)]
pub(super) struct Nccl {
    functions: Functions,
    /// Major and minor version and patch.
    pub(super) version: (u32, u32, u32),
    /// The file that it was loaded from.
    pub(super) path: String,
    /// Keeps the functions.
    _library: Library,
}

impl Nccl {
    /// The library of this process.
    ///
    /// # Errors
    /// A sentence: it is not there, or too old.
    pub(super) fn get() -> Result<&'static Nccl, String> {
        static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();
        NCCL.get_or_init(Nccl::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Nccl, String> {
        let (name, value) = INLINE;
        if std::env::var_os(name).is_none() {
            // SAFETY: NCCL reads its variables later. Rust's own accesses exclude each other, and a rank loads NCCL before
            // it starts anything else that might look at them from another thread.
            unsafe { std::env::set_var(name, value) };
        }
        // SAFETY: NCCL's initialisers do nothing that matters here.
        let library = NAMES.into_iter().find_map(|name| unsafe { Library::new(name) }.ok()).ok_or(
            "libnccl.so.2 cannot be loaded, expected NCCL 2.18 or later on the library path (the package nvidia-nccl-cu13 \
             has it in nvidia/nccl/lib)",
        )?;
        let broken = |e: libloading::Error| format!("libnccl.so.2 is not complete: {e}");
        type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
        // SAFETY: the type is that of NCCL's header.
        let get_version: GetVersion = *unsafe { library.get::<GetVersion>(b"ncclGetVersion\0") }.map_err(broken)?;
        let mut version = 0;
        // SAFETY: the out-parameter is valid.
        if unsafe { get_version(&mut version) } != SUCCESS || version < NEEDED {
            let (major, minor, patch) = parts(version);
            return Err(format!("NCCL {major}.{minor}.{patch} is too old, expected 2.18 or later"));
        }
        let functions = Functions::load(&library).map_err(broken)?;
        let path = path_of(get_version as *const c_void).unwrap_or_else(|| "libnccl.so.2".to_owned());
        Ok(Nccl { functions, version: parts(version), path, _library: library })
    }

    /// What a new communicator's members have in common, made by one of them.
    pub(super) fn unique_id(&self) -> Result<UniqueId, Fault> {
        let mut id = UniqueId([0; UniqueId::LEN]);
        // SAFETY: the out-parameter is valid.
        self.checked("ncclGetUniqueId", std::ptr::null_mut(), unsafe { (self.functions.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// The outcome of a call, of which `communicator` (null for none) may know more.
    fn checked(&self, call: &str, communicator: Handle, code: c_int) -> Result<(), Fault> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        let text = |text: *const c_char| {
            if text.is_null() {
                return String::new();
            }
            // SAFETY: NCCL answers with strings that stay.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        // SAFETY: takes any code.
        let meaning = text(unsafe { (self.functions.error_string)(code) });
        // SAFETY: takes a communicator or null.
        let more = text(unsafe { (self.functions.last_error)(communicator) });
        let more = more.trim();
        let more = if more.is_empty() { String::new() } else { format!(": {more}") };
        Err(Fault(format!("{call} failed: {meaning} ({code}){more}")))
    }
}

/// Major and minor version and patch of NCCL's number.
fn parts(version: c_int) -> (u32, u32, u32) {
    let version = version.max(0) as u32;
    (version / 10_000, version % 10_000 / 100, version % 100)
}

/// The file that holds a function.
fn path_of(function: *const c_void) -> Option<String> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: the out-parameter is valid, and zeros are a value of it.
    let info = unsafe {
        if libc::dladdr(function, info.as_mut_ptr()) == 0 {
            return None;
        }
        info.assume_init()
    };
    // SAFETY: the loader's name of a library that stays loaded.
    (!info.dli_fname.is_null()).then(|| unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned())
}

/// What a communicator is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// What was called last has been enqueued.
    Ready,
    /// It is still being prepared.
    InProgress,
}

/// Some of the ranks. Its handle is used by one thread, whose current device is the rank's.
#[derive(Debug)]
pub(super) struct Communicator {
    nccl: &'static Nccl,
    handle: Handle,
    /// This rank's number in it, and how many there are.
    member: usize,
    members: usize,
}

impl Communicator {
    /// Makes one of `members` ranks, of which this one is number `member`, whose kernels have at most `max_blocks` thread
    /// blocks; all members call it together. Blocks, as long as `may_go_on`.
    pub(super) fn new(
        nccl: &'static Nccl,
        id: UniqueId,
        (member, members): (usize, usize),
        max_blocks: Option<u16>,
        device: &Device,
        may_go_on: impl Fn() -> bool,
    ) -> Result<Self, Fault> {
        let device = device.clone();
        let init = move || -> Result<Address, Fault> {
            device.bind().map_err(|error| Fault(error.to_string()))?;
            let mut handle = std::ptr::null_mut();
            let mut config = Config::new(max_blocks);
            let (member, members) = (member as c_int, members as c_int);
            // SAFETY: the out-parameters are valid; NCCL reads the configuration during the call.
            let code = unsafe { (nccl.functions.comm_init)(&mut handle, members, id, member, &mut config) };
            nccl.checked("ncclCommInitRankConfig", std::ptr::null_mut(), code)?;
            Ok(Address(handle))
        };
        let Address(handle) = beside("making a communicator", init, &may_go_on)?;
        let communicator = Communicator { nccl, handle, member, members };
        communicator.settled(&may_go_on)?;
        Ok(communicator)
    }

    /// This rank's number in it, and how many there are.
    pub(super) fn place(&self) -> (usize, usize) {
        (self.member, self.members)
    }

    /// What it is at.
    ///
    /// # Errors
    /// What went wrong since the last call, which may be that another rank has gone.
    pub(super) fn state(&self) -> Result<State, Fault> {
        let mut state = SUCCESS;
        // SAFETY: the handle lives and the out-parameter is valid.
        let code = unsafe { (self.nccl.functions.comm_state)(self.handle, &mut state) };
        self.nccl.checked("ncclCommGetAsyncError", self.handle, code)?;
        self.nccl.checked("a collective of NCCL", self.handle, state)?;
        Ok(if state == IN_PROGRESS { State::InProgress } else { State::Ready })
    }

    /// Waits until it is ready: where its user has chosen the kind that does not block.
    pub(super) fn settled(&self, may_go_on: impl Fn() -> bool) -> Result<(), Fault> {
        let deadline = Instant::now() + PATIENCE;
        while self.state()? == State::InProgress {
            if !may_go_on() || Instant::now() > deadline {
                return Err(Fault("NCCL's preparations were broken off".to_owned()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Makes the calls of `body` one operation, which is enqueued once the communicator is [`State::Ready`] again.
    pub(super) fn group(&self, body: impl FnOnce() -> Result<(), Fault>) -> Result<(), Fault> {
        // SAFETY: takes nothing.
        self.nccl.checked("ncclGroupStart", self.handle, unsafe { (self.nccl.functions.group_start)() })?;
        let outcome = body();
        // SAFETY: takes nothing; one end for each start, whatever came between.
        let end = self.nccl.checked("ncclGroupEnd", self.handle, unsafe { (self.nccl.functions.group_end)() });
        outcome.and(end)
    }

    /// Exchanges memory with all other members, as one operation in the order of `stream`: `pieces` says what is sent to the
    /// first and what is received from the second of two members, as device addresses and bytes. Nothing is ordinary.
    ///
    /// # Safety
    /// What is sent must stay, unchanged, and what is received into, touched by nobody, until the operation has run or the
    /// communicator is aborted.
    pub(super) unsafe fn exchange<P: IntoIterator<Item = [(u64, usize); 2]>>(
        &self,
        stream: CUstream,
        pieces: impl Fn(usize, usize) -> P,
    ) -> Result<(), Fault> {
        let (member, members) = self.place();
        let Functions { send, recv, .. } = &self.nccl.functions;
        self.group(|| {
            // The nearest first, with other partners each time.
            for distance in 1..members {
                let (to, from) = ((member + distance) % members, (member + members - distance) % members);
                for [(out, sent), (into, received)] in pieces(to, from) {
                    if sent > 0 {
                        // SAFETY: the handle lives; the caller vouches for the memory.
                        let code = unsafe { send(out as *const c_void, sent, BYTES, to as c_int, self.handle, stream) };
                        self.nccl.checked("ncclSend", self.handle, code)?;
                    }
                    if received > 0 {
                        // SAFETY: as above.
                        let code =
                            unsafe { recv(into as *mut c_void, received, BYTES, from as c_int, self.handle, stream) };
                        self.nccl.checked("ncclRecv", self.handle, code)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Sums `elements` f32 at the device address `at` over the members, in place, in the order of `stream`.
    ///
    /// # Safety
    /// The memory must stay, touched by nobody, until the operation has run or the communicator is aborted.
    pub(super) unsafe fn sum(&self, at: u64, elements: usize, stream: CUstream) -> Result<(), Fault> {
        let at = at as *mut c_void;
        // SAFETY: the handle lives; the caller vouches for the memory.
        let code = unsafe { (self.nccl.functions.all_reduce)(at, at, elements, F32, SUM, self.handle, stream) };
        self.nccl.checked("ncclAllReduce", self.handle, code)
    }

    /// Fills the device memory at `at` with every member's `bytes` bytes, of which this one's are in their place already,
    /// in the order of `stream`.
    ///
    /// # Safety
    /// The memory must stay, touched by nobody, until the operation has run or the communicator is aborted.
    pub(super) unsafe fn gather(&self, at: u64, bytes: usize, stream: CUstream) -> Result<(), Fault> {
        let mine = (at + (self.member * bytes) as u64) as *const c_void;
        // SAFETY: the handle lives; the caller vouches for the memory.
        let code =
            unsafe { (self.nccl.functions.all_gather)(mine, at as *mut c_void, bytes, BYTES, self.handle, stream) };
        self.nccl.checked("ncclAllGather", self.handle, code)
    }

    /// Takes it apart together with the other members, once they have come as far too.
    pub(super) fn finish(self, device: &Device, may_go_on: impl Fn() -> bool) -> Result<(), Fault> {
        let (nccl, device, address) = (self.nccl, device.clone(), Address(self.handle));
        let finalize = move || {
            let Address(handle) = { address };
            device.bind().map_err(|error| Fault(error.to_string()))?;
            // SAFETY: the handle lives, and no other thread uses it meanwhile.
            nccl.checked("ncclCommFinalize", handle, unsafe { (nccl.functions.comm_finalize)(handle) })
        };
        beside("taking a communicator apart", finalize, &may_go_on)?;
        self.settled(may_go_on)?;
        // SAFETY: finalised, and not used any more.
        self.nccl.checked("ncclCommDestroy", std::ptr::null_mut(), unsafe {
            (self.nccl.functions.comm_destroy)(self.handle)
        })
    }

    /// Gives it up: what is under way ends, whatever state it is in.
    pub(super) fn abort(self) {
        // SAFETY: the handle lives and is not used any more. A failure leaves nothing to be done.
        let _ = unsafe { (self.nccl.functions.comm_abort)(self.handle) };
    }
}

/// A communicator's handle on its way between threads.
struct Address(Handle);

// SAFETY: any thread may use a communicator, one at a time, and whoever sends this does not keep it.
unsafe impl Send for Address {}

/// Does on a thread of its own what may block for ever, and waits for it as long as `may_go_on`. What is given up stays
/// behind.
fn beside<R: Send + 'static>(
    what: &str,
    call: impl FnOnce() -> Result<R, Fault> + Send + 'static,
    may_go_on: impl Fn() -> bool,
) -> Result<R, Fault> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().name("lina-nccl".to_owned());
    thread
        // Who has given up does not listen any more.
        .spawn(move || drop(sender.send(call())))
        .map_err(|e| Fault(format!("a thread cannot be started: {e}")))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(outcome) => return outcome,
            Err(mpsc::RecvTimeoutError::Timeout) if !may_go_on() => {
                return Err(Fault(format!("{what} was broken off")));
            }
            Err(mpsc::RecvTimeoutError::Timeout) if Instant::now() > deadline => {
                return Err(Fault(format!("{what} has not come to an end within {} s", PATIENCE.as_secs())));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(Fault(format!("{what} panicked"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_small_message_travels_with_its_size() {
        // Whether or not the library is there: it has to be said before it is loaded.
        let _ = Nccl::get();
        assert!(std::env::var_os(INLINE.0).is_some());
    }
}
