"""Where examples come from: decoding, sources, normalisation, batches."""
