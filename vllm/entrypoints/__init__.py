"""Where requests come in: the offline API, the command line, HTTP."""
