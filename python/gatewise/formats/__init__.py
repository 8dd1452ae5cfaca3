"""Files of other frameworks, one module a format; each imports its framework only when it is used."""
