//! Exchange buffers on the device, kept from one micro-op to the next at the most that they ever held.

use lina_comm::{AllToAllKind, DeviceExchange};
use lina_cuda::{Buffer as DeviceBuffer, CudaError, DType, Gpu};

/// Exchanges that are not under way.
#[derive(Debug)]
pub(crate) struct DeviceExchangePool {
    dtype: DType,
    spare: Vec<DeviceExchange>,
}

impl DeviceExchangePool {
    /// A pool of exchanges of elements that are stored as `dtype`.
    pub fn new(dtype: DType) -> Self {
        DeviceExchangePool { dtype, spare: Vec::new() }
    }

    /// An exchange of rows of `width` elements. `send_rows` and `recv_rows` are per rank. It receives into `saved`, if
    /// given, which gets its buffer back from [`put`](Self::put).
    pub fn take(
        &mut self,
        gpu: &Gpu,
        kind: AllToAllKind,
        width: usize,
        send_rows: &[usize],
        recv_rows: &[usize],
        saved: Option<&mut DeviceBuffer>,
    ) -> Result<DeviceExchange, CudaError> {
        let mut exchange = match self.spare.pop() {
            Some(exchange) => exchange,
            None => DeviceExchange {
                kind,
                send: gpu.uninit(0, self.dtype)?,
                send_elements: Vec::new(),
                recv: gpu.uninit(0, self.dtype)?,
                recv_elements: Vec::new(),
            },
        };
        exchange.kind = kind;
        if let Some(saved) = saved {
            std::mem::swap(&mut exchange.recv, saved);
        }
        let fit = |elements: &mut Vec<usize>, buffer: &mut DeviceBuffer, rows: &[usize]| {
            elements.clear();
            elements.extend(rows.iter().map(|rows| rows * width));
            gpu.grow(buffer, elements.iter().sum())
        };
        fit(&mut exchange.send_elements, &mut exchange.send, send_rows)?;
        fit(&mut exchange.recv_elements, &mut exchange.recv, recv_rows)?;
        Ok(exchange)
    }

    /// Gives a finished exchange back; what it received goes to `saved`, if given.
    pub fn put(&mut self, mut exchange: DeviceExchange, saved: Option<&mut DeviceBuffer>) {
        if let Some(saved) = saved {
            std::mem::swap(&mut exchange.recv, saved);
        }
        self.spare.push(exchange);
    }
}
