"""Cross-entropy in training over part of the vocabulary, for large vocabularies and small models."""

import torch
from torch import Tensor

from distllm.layers.cross_entropy import linear_cross_entropy


def sampled_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_sampled: int
) -> Tensor:
    """Sum the cross-entropy of `labels` with the softmax's normaliser estimated from part of the words.

    All words that are a label of the batch take part; of the others, `num_sampled` drawn without replacement, each
    standing for as many as there are to one drawn. So the normaliser of every token is estimated without bias, its
    logarithm is too small by about half the estimate's relative variance. With at least as many as there are others the
    loss is the exact one.

    Args:
        hidden: [tokens, d_model].
        weight: [vocab, d_model], whole.
        labels: [tokens] int64, all valid ids.
        num_sampled: at least 1.

    Returns:
        Scalar in float32 or wider; 0 with a graph attached when nothing is labelled.

    Reference: Botev, Zheng & Barber 2017, "Complementary sum sampling for likelihood approximation in large scale
    classification" (AISTATS), with uniform samples.
    """
    present = torch.zeros(len(weight), dtype=torch.bool, device=labels.device)
    present[labels] = True
    others = (~present).nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), device=labels.device)[:num_sampled]]
    words = torch.cat([present.nonzero()[:, 0], drawn])
    place = torch.empty(len(weight), dtype=torch.int64, device=labels.device)
    place[words] = torch.arange(len(words), device=labels.device)
    # What a drawn word stands for is added to its logit, as one more channel of the product.
    stands_for = hidden.new_zeros(len(words))
    if len(drawn):
        stands_for[-len(drawn) :] = torch.tensor(len(others) / len(drawn)).log()
    rows = torch.cat([weight[words], stands_for[:, None].to(weight.dtype)], dim=1)
    return linear_cross_entropy(
        torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1), rows, place[labels]
    )
