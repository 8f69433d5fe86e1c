//! lina-model
