"""The engine: units of work, a pure scheduler, and its two drivers."""
