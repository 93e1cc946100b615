"""The model, its losses, and its exchange with Hugging Face."""
