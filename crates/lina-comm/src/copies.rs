//! Copies between the memory of an emulated device and its host's.
//!
//! They run beside computation and the network, at one rate each way, one after another in each direction. So when a
//! copy ends is known when it begins, on a virtual clock as on the wall clock: waiting for one is waiting until then.
//! Nothing is moved, since what stands for a device computes from host memory anyway.

use lina_plan::Nanos;

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDirection {
    /// From host memory to the device.
    ToDevice,
    /// From the device to host memory.
    ToHost,
}

impl CopyDirection {
    /// The name in traces.
    pub fn name(self) -> &'static str {
        match self {
            CopyDirection::ToDevice => "host to device",
            CopyDirection::ToHost => "device to host",
        }
    }
}

/// A copy of a layer's experts or of their gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostCopy {
    /// Which way.
    pub direction: CopyDirection,
    /// Index of the layer.
    pub layer: u32,
    /// Its size.
    pub bytes: u64,
}

/// A copy under way; give it to [`Comm::wait_copy`](crate::Comm::wait_copy) before its destination is used.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "what is copied must not be used before the copy has been waited for"]
pub struct CopyTicket(pub(crate) Nanos);

/// When a copy runs, on the body's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyTimes {
    pub(crate) start: Nanos,
    pub(crate) end: Nanos,
}

/// One rank's way to its host's memory and back.
#[derive(Debug)]
pub(crate) struct CopyLanes {
    bytes_per_ns: f64,
    /// When each direction's last copy ends.
    free: [Nanos; 2],
}

impl CopyLanes {
    pub(crate) fn new(gbps: f64) -> Self {
        CopyLanes { bytes_per_ns: gbps / 8.0, free: [0; 2] }
    }

    /// Begins a copy as soon as its direction is free, at `now` at the earliest.
    pub(crate) fn begin(&mut self, now: Nanos, copy: &HostCopy) -> CopyTimes {
        let free = &mut self.free[copy.direction as usize];
        let start = now.max(*free);
        let end = start + (copy.bytes as f64 / self.bytes_per_ns).round() as Nanos;
        *free = end;
        CopyTimes { start, end }
    }

    /// When the last copy in `direction` ends.
    pub(crate) fn free(&self, direction: CopyDirection) -> Nanos {
        self.free[direction as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_queue_in_their_own_direction_only() {
        let mut lanes = CopyLanes::new(80.0);
        let copy = |direction, bytes| HostCopy { direction, layer: 0, bytes };
        let times = |start, end| CopyTimes { start, end };
        assert_eq!(lanes.begin(100, &copy(CopyDirection::ToDevice, 500)), times(100, 150));
        assert_eq!(lanes.begin(110, &copy(CopyDirection::ToDevice, 300)), times(150, 180));
        assert_eq!(lanes.begin(120, &copy(CopyDirection::ToHost, 100)), times(120, 130));
        assert_eq!(lanes.begin(200, &copy(CopyDirection::ToDevice, 0)), times(200, 200));
        assert_eq!((lanes.free(CopyDirection::ToDevice), lanes.free(CopyDirection::ToHost)), (200, 130));
    }
}
