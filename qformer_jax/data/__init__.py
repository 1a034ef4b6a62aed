"""Images and text to batches: pack a source once, then read it with random access."""
