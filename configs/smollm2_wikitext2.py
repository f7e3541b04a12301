"""SmolLM2-135M on the validation and test text of WikiText-2, split by article (extra `gguf`, `make smollm2-model`).

2.4 MB of articles of Wikipedia (CC BY-SA), in WikiText's format, as valid.txt and test.txt: half a million positions of
training. Put the files into data/wikitext-2/, or name their folder: --config.corpus.path=DIR. The run takes about
70 minutes on two CPU cores and 8 GiB.
"""

from configs import smollm2


def get_config():
    config = smollm2.get_config()
    config.workdir = "runs/smollm2_wikitext2"
    config.corpus.source = "files"
    config.corpus.path = "data/wikitext-2"
    config.corpus.articles = "wikitext"
    config.corpus.max_bytes = 0
    config.corpus.test_fraction = 0.1  # of some 120 articles
    config.training.epochs = 2.0
    return config
