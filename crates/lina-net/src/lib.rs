//! lina-net
