"""Training scripts to read, run and copy."""
