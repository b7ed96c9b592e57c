"""One module for each implementation that takes part; see :mod:`numpygpt.bench.contestant`."""
