"""The paper's comparison at full scale: Mistral-7B-v0.3, its 1B memory, and the alternatives for the same text and
compute (extras `hub`, `dense`; needs accelerators; `mlpmem plan` predicts which and for how long).

The paper trains one memory on Wikipedia for questions and one on a mixture for the nine word tasks; here one memory is
trained on both. For Wikipedia alone: --config.corpus.name=wikimedia/wikipedia --config.corpus.subset=20231101.en
--config.corpus.text_key=text --config.corpus.articles= --config.workdir=DIR.

    mlpmem run --config=configs/mistral_7b_compare.py
    mlpmem compare --config=configs/mistral_7b_compare.py

On many hosts these are `--stage=run` and `--stage=compare` of a launcher (docs/launch.md).

HaluEval's instructions, MR, CR, HYP and AG News are files of github.com/RUCAIBox/HaluEval and
github.com/GSYfate/knnlm-limits, which belong in `config.comparison.data`; everything else comes from the hub.
"""

from configs import mistral_7b
from mlpmem_jax.comparison import published


def get_config():
    config = mistral_7b.get_config()
    config.workdir = "runs/mistral_7b_compare"
    config.corpus.name = (
        "wikimedia/wikipedia,Salesforce/wikitext,fancyzhx/amazon_polarity,vblagoje/cc_news,stanfordnlp/imdb"
    )
    config.corpus.subset = "20231101.en,wikitext-103-raw-v1,,,"
    config.corpus.text_key = "text,text,content,text,text"
    config.corpus.articles = ",wikitext,,,"
    comparison = config.comparison
    comparison.systems = "base,memory,knn_lm,rag,cpt,lora,memory+rag,cpt+memory"
    comparison.tasks = ",".join(published.QUESTIONS + published.WORDS + published.HALLUCINATION)
    comparison.hub = True
    comparison.retriever = "models/bge-m3"  # a clone of huggingface.co/BAAI/bge-m3
    comparison.k = 2048  # neighbors of kNN-LM, as in knnlm-limits
    return config
