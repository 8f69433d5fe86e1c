//! Rows on their way between ranks: from device to device, or through the hosts' memory where the ranks' engine knows no
//! devices.

use lina_comm::{AllToAllKind, Comm, DeviceExchange, Ticket};
use lina_cuda::{CudaError, DType, Gpu};

use crate::batch::StepError;
use crate::cuda::exchanges::DeviceExchangePool;
use crate::exchanges::ExchangePool;

/// How rows travel between devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowRoute {
    /// From device to device: on engine `nccl`.
    Devices,
    /// Through host memory: between threads of one process.
    Hosts,
}

/// Exchanges that are not under way, and how to send them.
#[derive(Debug)]
pub(super) struct RowExchanges {
    route: RowRoute,
    devices: DeviceExchangePool,
    hosts: ExchangePool,
}

/// Rows that travel.
pub(super) enum Travelling {
    Devices(Ticket),
    /// What will be received into comes along.
    Hosts(Ticket, DeviceExchange),
}

impl RowExchanges {
    /// Exchanges of rows that are stored as `dtype`.
    pub fn new(route: RowRoute, dtype: DType) -> Self {
        RowExchanges { route, devices: DeviceExchangePool::new(dtype), hosts: ExchangePool::default() }
    }

    /// For exchanges of counts, which are the host's on every route.
    pub fn hosts(&mut self) -> &mut ExchangePool {
        &mut self.hosts
    }

    /// An exchange of rows of `width` elements, whose send buffer is to be filled. `send_rows` and `recv_rows` are per rank.
    pub fn take(
        &mut self,
        gpu: &Gpu,
        kind: AllToAllKind,
        width: usize,
        send_rows: &[usize],
        recv_rows: &[usize],
    ) -> Result<DeviceExchange, CudaError> {
        self.devices.take(gpu, kind, width, send_rows, recv_rows, None)
    }

    /// Sends what has been enqueued to fill the exchange.
    pub fn begin(&mut self, comm: &mut Comm, gpu: &Gpu, exchange: DeviceExchange) -> Result<Travelling, StepError> {
        if self.route == RowRoute::Devices {
            return Ok(Travelling::Devices(comm.all_to_all_on_device(exchange)?));
        }
        let (send, recv) = (&exchange.send_elements, &exchange.recv_elements);
        let mut through = self.hosts.take(exchange.kind, 1, send, recv, None);
        let elements = send.iter().sum();
        gpu.download(exchange.send.slice(0..elements), &mut through.send[..elements])?;
        Ok(Travelling::Hosts(comm.all_to_all(through)?, exchange))
    }

    /// Waits for an exchange: what is enqueued from here on finds the rows in its receive buffer.
    pub fn finish(&mut self, comm: &mut Comm, gpu: &Gpu, travelling: Travelling) -> Result<DeviceExchange, StepError> {
        match travelling {
            Travelling::Devices(ticket) => Ok(comm.wait_on_device(ticket)?),
            Travelling::Hosts(ticket, mut exchange) => {
                let through = comm.wait(ticket)?;
                let elements = exchange.recv_elements.iter().sum();
                gpu.upload(&through.recv[..elements], exchange.recv.slice_mut(0..elements))?;
                self.hosts.put(through, None);
                Ok(exchange)
            }
        }
    }

    /// Gives a finished exchange back.
    pub fn put(&mut self, exchange: DeviceExchange) {
        self.devices.put(exchange, None);
    }
}
