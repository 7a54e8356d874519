"""Any number of samples of a run, written to files."""
