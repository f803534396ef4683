"""Generated tasks on which the small models are trained and evaluated."""
