"""Documents from files, installed documentation or the Hugging Face hub; tokenizer; token streams."""
