"""One trainer: everything that touches weights. Knows no HTTP and no recipe."""
