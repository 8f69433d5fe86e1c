//! lina-data
