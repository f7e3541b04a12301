"""Text to report in minutes on two CPU cores: documentation installed with Python, a tiny GPT-2, a memory beside it."""

from configs import default


def get_config():
    config = default.get_config()
    config.workdir = "runs/quickstart"
    config.corpus.max_bytes = 2_500_000
    return config
