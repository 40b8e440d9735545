//! Profile file, defaults, validation (raw → resolved), and where everything lies.
