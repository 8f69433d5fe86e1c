//! lina-plan
