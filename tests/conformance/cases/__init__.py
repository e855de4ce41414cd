"""One module per file of vectors: `cases(vectors) -> [(case, function that yields Comparisons)]`."""
