"""Decisions on the host: which sequences run, with which attention pages and which GDN slots."""
