"""From task examples to answers and likelihoods: prompts, engine, lm-eval adapter, methods."""
