//! Takes connections, serves each with HTTP/1.1, and ends in order: answers under way are finished first.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use lina_infer::EngineHandle;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::{sleep, timeout};

use crate::connection::Connection;
use crate::options::{ServeOptions, Timeouts};
use crate::routes;
use crate::server::Server;
use crate::{ServeError, ServeSummary, ServedModel};

/// How long a server whose engine has failed tells clients so before it ends.
const FAILURE_IS_TOLD: Duration = Duration::from_secs(2);
/// How long the last answers may take to reach their clients once they are complete.
const LAST_WRITES: Duration = Duration::from_secs(10);
/// Threads that read prompts and write conversations.
const READING_THREADS: usize = 2;
/// Pause after a connection could not be taken, as when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An address that is taken before anything slow is done, such as loading a model.
#[derive(Debug)]
pub struct Listener {
    listener: StdListener,
    address: SocketAddr,
}

impl Listener {
    /// Listens on the host and port of `options`.
    ///
    /// # Errors
    /// [`ServeError::Listen`] if the name is not known, or the port in use or reserved.
    pub fn bind(options: &ServeOptions) -> Result<Self, ServeError> {
        let ServeOptions { host, port, .. } = options;
        let fail = |message: String| ServeError::Listen(message);
        let addresses: Vec<SocketAddr> = (host.as_str(), *port)
            .to_socket_addrs()
            .map_err(|error| {
                fail(format!("host {host:?} is not known ({error}), expected an address of this machine"))
            })?
            .collect();
        let listener = StdListener::bind(addresses.as_slice()).map_err(|error| {
            fail(match error.kind() {
                io::ErrorKind::AddrInUse => format!("port {port} of {host} is in use, expected one that is free"),
                io::ErrorKind::PermissionDenied => {
                    format!("port {port} of {host} is reserved for the system, expected one from 1024 on")
                }
                io::ErrorKind::AddrNotAvailable => {
                    format!("host {host:?} is no address of this machine, expected one that is, or 0.0.0.0 for all")
                }
                _ => format!("cannot listen on port {port} of {host}: {error}"),
            })
        })?;
        let address = listener
            .set_nonblocking(true)
            .and_then(|()| listener.local_addr())
            .map_err(|error| fail(format!("cannot listen on port {port} of {host}: {error}")))?;
        Ok(Listener { listener, address })
    }

    /// Where it listens; with the port that the system chose if it was asked to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Asks a server to end in order, from any thread. Clones ask the same one.
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<watch::Sender<bool>>);

impl Shutdown {
    /// A request that has not been made yet.
    pub fn new() -> Self {
        Shutdown(Arc::new(watch::Sender::new(false)))
    }

    /// No new requests are taken; those that run or wait are answered, then the server ends.
    pub fn request(&self) {
        self.0.send_replace(true);
    }

    /// Whether it has been requested.
    pub fn requested(&self) -> bool {
        *self.0.borrow()
    }

    async fn wait(&self) {
        // The sender is here, so the channel is open.
        let _ = self.0.subscribe().wait_for(|&requested| requested).await;
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

/// Serves `model` on the engine until `shutdown` is requested or the engine ends. Runs on the calling thread.
///
/// # Errors
/// [`ServeError::Engine`] if the engine ends on its own, [`ServeError::Listen`] if the system refuses a thread or the
/// listener.
pub fn serve(
    listener: Listener,
    engine: EngineHandle,
    model: ServedModel,
    options: ServeOptions,
    shutdown: &Shutdown,
) -> Result<ServeSummary, ServeError> {
    let unable = |error: io::Error| ServeError::Listen(format!("cannot serve on {}: {error}", listener.address));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(READING_THREADS)
        .build()
        .map_err(unable)?;
    let ended = watch_engine(engine.clone()).map_err(unable)?;
    let server = Arc::new(Server::new(engine, model, options));
    let result = runtime.block_on(async {
        let listener = TcpListener::from_std(listener.listener).map_err(unable)?;
        run(listener, &server, ended, shutdown).await
    });
    // Whatever still reads a prompt has no client any more.
    runtime.shutdown_background();
    result.map(|()| server.summary())
}

/// Reports the end of the engine.
fn watch_engine(engine: EngineHandle) -> io::Result<oneshot::Receiver<()>> {
    let (send, ended) = oneshot::channel();
    let wait = move || {
        engine.wait();
        // A server that has ended does not listen any more.
        let _ = send.send(());
    };
    std::thread::Builder::new().name("lina-engine-end".into()).spawn(wait)?;
    Ok(ended)
}

async fn run(
    listener: TcpListener,
    server: &Arc<Server>,
    ended: oneshot::Receiver<()>,
    shutdown: &Shutdown,
) -> Result<(), ServeError> {
    let open = GracefulShutdown::new();
    let acceptor = Acceptor {
        permits: Arc::new(Semaphore::new(server.options.max_connections.clamp(1, Semaphore::MAX_PERMITS))),
        listener,
        router: routes::router(Arc::clone(server)),
        timeouts: server.options.timeouts,
    };
    let end = async {
        // An error says that the watching thread is gone: then so is the engine.
        let _ = ended.await;
        if !server.draining() {
            sleep(FAILURE_IS_TOLD).await;
        }
    };
    tokio::pin!(end);
    loop {
        tokio::select! {
            (stream, permit) = acceptor.accept() => acceptor.serve(stream, permit, &open),
            () = shutdown.wait(), if !server.draining() => server.drain(),
            () = &mut end => break,
        }
    }
    drop(acceptor);
    // A client that does not read its answer is left behind.
    let _ = timeout(LAST_WRITES, open.shutdown()).await;
    server.engine.status().failed.map_or(Ok(()), |reason| Err(ServeError::Engine(reason)))
}

/// What connections are made of.
struct Acceptor {
    listener: TcpListener,
    /// One for each connection that may be open.
    permits: Arc<Semaphore>,
    router: Router,
    timeouts: Timeouts,
}

impl Acceptor {
    /// The next connection, once one may be open.
    async fn accept(&self) -> (TcpStream, Option<OwnedSemaphorePermit>) {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return (stream, permit),
                // The client has left already, or the process is short of something: both pass.
                Err(_) => sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    fn serve(&self, stream: TcpStream, permit: Option<OwnedSemaphorePermit>, open: &GracefulShutdown) {
        // Tokens are small and must not wait for each other. A failure only costs time.
        let _ = stream.set_nodelay(true);
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.timeouts.head)
            .serve_connection(
                TokioIo::new(Connection::new(stream, self.timeouts.write)),
                TowerToHyperService::new(self.router.clone()),
            );
        let connection = open.watch(connection);
        tokio::spawn(async move {
            // What goes wrong on a connection is its client's affair.
            let _ = connection.await;
            drop(permit);
        });
    }
}
