"""WikiText-103 with GPT-2 large and the 774M memory; otherwise as for GPT-2 small."""

from configs import wikitext103_gpt2_small


def get_config():
    config = wikitext103_gpt2_small.get_config()
    config.workdir = "runs/wikitext103_gpt2_large"
    config.base.path = "openai-community/gpt2-large"
    config.memory.width = 1280
    config.memory.blocks = 54
    config.training.remat = True
    return config
