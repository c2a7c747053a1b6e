"""Plan a merge, execute it, verify, compare and publish the result."""
