"""Llama-2-7B with the paper's 1B memory for it; otherwise as for Mistral-7B."""

from configs import mistral_7b


def get_config():
    config = mistral_7b.get_config()
    config.workdir = "runs/llama2_7b"
    config.tokenizer.path = "meta-llama/Llama-2-7b-hf"  # 32,000 tokens
    config.base.path = "meta-llama/Llama-2-7b-hf"
    config.memory.feed_forward_width = 11008
    return config
