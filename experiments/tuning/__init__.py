"""The search for temperature profiles: objectives, trials, confirmation on fresh data."""
