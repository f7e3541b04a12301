"""Documents from files, installed documentation or the Hugging Face hub; tokenizers; token streams."""
