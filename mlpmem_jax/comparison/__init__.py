"""The paper's comparison: a memory, kNN-LM, RAG and continued pretraining on the same questions.

tasks/        one file per task: its questions, prompts and metrics
hub.py        task files from the Hugging Face hub
question.py   a task's questions and a system's answers
metrics.py    how answers are judged
passages.py   the training text as passages, and retrievers over them
searching.py  searches over keys and passages
packing.py    packs texts into sequences so that shared prefixes are computed once
reading.py    log-probabilities of given tokens in packed texts
scores.py     log-probabilities and generated texts of a task, cached for the next run
sides.py      what is mixed into a language model's distribution: the memory or kNN search
systems.py    the systems: a language model, with or without passages in its prompt and a side mixed in
greedy.py     greedy decoding of a system
weights.py    lambda for each question, tuned on other questions
costs.py      what a system costs to build and to store
compare.py    the command: every system on every task, from scoring to the report
speed.py      the command with --speed: latency and throughput by corpus size
harness.py    runs tasks of lm-evaluation-harness
page.py       the report
"""
