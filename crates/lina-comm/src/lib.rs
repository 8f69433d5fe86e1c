//! lina-comm
