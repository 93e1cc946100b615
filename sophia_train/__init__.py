"""GPT pre-training around Sophia, the second-order optimizer (Liu et al., ICLR 2024)."""

__version__ = "0.1.0"
