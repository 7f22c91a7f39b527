"""One module a source of text; each gives a list of `Document`."""
