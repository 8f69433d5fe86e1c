//! lina-report
