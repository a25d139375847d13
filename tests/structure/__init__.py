"""Rules that hold for the repository as a whole. Each check is also run on a made-up offender, to show that it can fail."""
