"""The paper's figure 1 on its Web mixture: WikiText-103, Amazon reviews, CC-News and IMDB, about 600M tokens.

A budget is the cost of 10 passes of the size's memory over the corpus.
"""

from configs import wikitext103_gpt2_small
from configs.sweeps import gpt2_sizes, point

POSITIONS = 600_000_000  # approximate training positions
PASSES = 10
SEEDS = (0,)


def web():
    """The config that the sweeps over the mixture start from."""
    config = wikitext103_gpt2_small.get_config()
    config.corpus.name = "Salesforce/wikitext,fancyzhx/amazon_polarity,vblagoje/cc_news,stanfordnlp/imdb"
    config.corpus.subset = "wikitext-103-raw-v1,,,"
    config.corpus.text_key = "text,content,text,text"
    config.corpus.articles = "wikitext,,,"
    config.corpus.max_bytes = 2_600_000_000  # about 600M tokens
    config.corpus.validation_fraction = 0.001
    config.corpus.test_fraction = 0.001
    return config


def get_sweep():
    config = web()
    config.workdir = "runs/web_sizes"
    points = []
    for size in gpt2_sizes.SIZES:
        flops = PASSES * POSITIONS * gpt2_sizes.memory_flops(size)
        for seed in SEEDS:
            for arm in ("continued",) if size == "xl" else ("continued", "augmented"):
                overrides = gpt2_sizes.overrides(size)
                points.append(point(f"{size}-{arm}-s{seed}", arm, flops, seed=seed, overrides=overrides))
    return {"config": config, "counted": "training", "positions": POSITIONS, "points": points}
