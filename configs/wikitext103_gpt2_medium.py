"""WikiText-103 with GPT-2 medium and the 345M memory; otherwise as for GPT-2 small."""

from configs import wikitext103_gpt2_small


def get_config():
    config = wikitext103_gpt2_small.get_config()
    config.workdir = "runs/wikitext103_gpt2_medium"
    config.base.path = "openai-community/gpt2-medium"
    config.memory.width = 1024
    config.memory.blocks = 36
    config.training.remat = True
    return config
