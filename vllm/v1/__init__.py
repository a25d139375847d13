"""The engine: input and output processing, scheduling, and the worker that puts decisions on the device."""
