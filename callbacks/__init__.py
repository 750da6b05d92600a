"""Lightning callbacks: freezing, handoff, run cards, guards, predictions, pictures."""
