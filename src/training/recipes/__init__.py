"""One file per algorithm: `Config` and `main(config)`, top to bottom; none imports another."""
