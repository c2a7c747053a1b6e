"""Files on disk, YAML, progress: what the rest is written with."""
