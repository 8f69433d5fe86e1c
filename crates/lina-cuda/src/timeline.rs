//! When each launch of a stream ran, for whoever wants to know where a step's time goes and what lies between kernels.

use std::cell::RefCell;

use crate::error::CudaError;
use crate::event::Event;
use crate::stream::Stream;

/// A launch that has run.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Name of the kernel, or what it is that a library launched.
    pub name: String,
    /// Since recording began, in milliseconds.
    pub start_ms: f64,
    /// When it ended.
    pub end_ms: f64,
}

/// Launches under way, each between two events.
#[derive(Debug, Default)]
pub(crate) struct Timeline(RefCell<Option<Recording>>);

#[derive(Debug)]
struct Recording {
    began: Event,
    launches: Vec<(String, Event, Event)>,
}

impl Timeline {
    /// Runs `launch`, which enqueues on `stream`, between two events if somebody wants to know.
    pub(crate) fn around<R>(
        &self,
        stream: &Stream,
        name: &str,
        launch: impl FnOnce() -> Result<R, CudaError>,
    ) -> Result<R, CudaError> {
        if !self.is_running() {
            return launch();
        }
        let (start, end) = (stream.event()?, stream.event()?);
        start.record(stream)?;
        let result = launch()?;
        end.record(stream)?;
        if let Some(recording) = self.0.borrow_mut().as_mut() {
            recording.launches.push((name.to_owned(), start, end));
        }
        Ok(result)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.0.borrow().is_some()
    }

    pub(crate) fn begin(&self, stream: &Stream) -> Result<(), CudaError> {
        let began = stream.event()?;
        began.record(stream)?;
        *self.0.borrow_mut() = Some(Recording { began, launches: Vec::new() });
        Ok(())
    }

    /// Waits for the stream and returns what ran.
    pub(crate) fn end(&self, stream: &Stream) -> Result<Vec<Launch>, CudaError> {
        let Some(Recording { began, launches }) = self.0.borrow_mut().take() else { return Ok(Vec::new()) };
        stream.synchronize()?;
        let since = |event: &Event| event.elapsed_ms_since(&began).map(f64::from);
        launches
            .into_iter()
            .map(|(name, start, end)| Ok(Launch { name, start_ms: since(&start)?, end_ms: since(&end)? }))
            .collect()
    }
}
