"""Everything that others may have written, damaged at random: the outcome is a result or a SlrmergeError."""
