"""From flags and keyword arguments to the engine's configuration."""
