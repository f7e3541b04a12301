"""Floor 2: documents from files, installed documentation or the Hugging Face hub; tokenizer; token streams."""
