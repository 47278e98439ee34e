"""Where records come from and how they become token ids.

Sources, tokenizers, chat templates, packing, sampling, and statistical language models to compare
with. A source is one file, registered under its own name, which serves records of `distllm.types`
per split. Turning examples into batches is the objectives' business.
"""
