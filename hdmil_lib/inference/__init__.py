"""From a slide file to a prediction: choosing tiles, reading them, stopping early, and what may be promised."""
