"""SmolLM2-135M on the passages that answer 2,655 questions of NQ-open (extra `gguf`; `make smollm2-nq`).

The file is `nq-open-oracle.jsonl.gz` of github.com/nelson-liu/lost-in-the-middle (MIT; text CC BY-SA): one question in
a line, with the passage of Wikipedia that answers it. Put it at data/nq/, or name it: --config.corpus.path=FILE.
"""

from configs import smollm2


def get_config():
    config = smollm2.get_config()
    config.workdir = "runs/smollm2_nq"
    config.corpus.source = "files"
    config.corpus.path = "data/nq/nq-open-oracle.jsonl.gz"
    config.corpus.text_key = "ctxs.0.title+ctxs.0.text"
    config.corpus.group_key = "ctxs.0.title"  # passages of one article stay on one side of the split
    config.corpus.max_bytes = 0
    return config
