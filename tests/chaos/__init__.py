"""The kill matrix: whatever dies at whatever moment, the run ends as if nothing had happened."""
