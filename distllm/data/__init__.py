"""Where records come from and how they become token ids: sources, tokenizers, chat templates, packing, sampling.

A source is one file, registered under its own name, which serves records of `distllm.types` per split.
Turning examples into batches is the objectives' business; which samples a step takes is the sampler's.
"""
