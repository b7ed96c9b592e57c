"""The benchmark: numpygpt beside the machine's limits and other implementations, in one run."""
