//! Host endpoints that lead to guest ones.
