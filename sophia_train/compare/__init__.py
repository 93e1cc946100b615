"""Reading runs: curves and, over several runs, comparisons."""
