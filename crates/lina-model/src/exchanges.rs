//! Exchange buffers, kept from one micro-op to the next at the most that they ever held.

use lina_comm::{AllToAllKind, Exchange};

use crate::pass::grow;

/// Exchanges that are not under way.
#[derive(Debug, Default)]
pub(crate) struct ExchangePool {
    spare: Vec<Exchange>,
}

impl ExchangePool {
    /// An exchange of rows of `width` elements. `send_rows` and `recv_rows` are per rank. It receives into `saved`, if
    /// given, which gets its buffer back from [`put`](Self::put).
    pub fn take(
        &mut self,
        kind: AllToAllKind,
        width: usize,
        send_rows: &[usize],
        recv_rows: &[usize],
        saved: Option<&mut Vec<f32>>,
    ) -> Exchange {
        let mut exchange = self.spare.pop().unwrap_or_else(|| Exchange {
            kind,
            send: Vec::new(),
            send_elements: Vec::new(),
            recv: Vec::new(),
            recv_elements: Vec::new(),
        });
        exchange.kind = kind;
        if let Some(saved) = saved {
            std::mem::swap(&mut exchange.recv, saved);
        }
        let fit = |elements: &mut Vec<usize>, buffer: &mut Vec<f32>, rows: &[usize]| {
            elements.clear();
            elements.extend(rows.iter().map(|rows| rows * width));
            grow(buffer, elements.iter().sum());
        };
        fit(&mut exchange.send_elements, &mut exchange.send, send_rows);
        fit(&mut exchange.recv_elements, &mut exchange.recv, recv_rows);
        exchange
    }

    /// Gives a finished exchange back; what it received goes to `saved`, if given.
    pub fn put(&mut self, mut exchange: Exchange, saved: Option<&mut Vec<f32>>) {
        if let Some(saved) = saved {
            std::mem::swap(&mut exchange.recv, saved);
        }
        self.spare.push(exchange);
    }
}
