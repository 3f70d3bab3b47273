"""Pictures of what the words of a caption attend to."""
