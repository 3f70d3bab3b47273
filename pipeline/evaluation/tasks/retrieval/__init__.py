"""Zero-shot retrieval between captions and pictures or clips."""
