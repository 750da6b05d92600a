"""Lightning callbacks: freezing, guards, predictions, progress, resuming, kept tokens."""
