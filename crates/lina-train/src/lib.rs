//! lina-train
