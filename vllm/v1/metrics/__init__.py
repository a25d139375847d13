"""What an engine counts and times, and how it is read: as plain numbers, or as Prometheus text."""
