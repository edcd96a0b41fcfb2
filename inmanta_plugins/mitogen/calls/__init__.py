"""One remote call: request, result, calls in flight, transfers and the log record."""
