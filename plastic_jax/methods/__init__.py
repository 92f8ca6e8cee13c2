"""What acts on a trial: optimisers, interventions, and the diagnostics that watch it. Each is a file of its own."""
