"""The way from a prompt to text: tokenise, run the core, detokenise."""
