"""Where metrics and samples of a run go."""
