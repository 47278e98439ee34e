"""F1 of entities and classes against cases counted by hand."""

import pytest

from distllm.train.verdicts import entities, entity_metrics, macro_f1


@pytest.mark.parametrize(
    "tags, found",
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("I-PER I-PER O I-PER", [("PER", 0, 2), ("PER", 3, 4)]),
        ("O B-A-B I-A-B", [("A-B", 1, 3)]),
    ],
)
def test_entities(tags, found):
    assert entities(tags.split()) == found


def test_only_whole_entities_count():
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC", "I-LOC"]]
    metrics = entity_metrics(said, right)
    # 3 said, 3 true, 2 hits; token accuracy would be 6 of 7.
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["f1/PER"] == 0 and metrics["f1/LOC"] == 1
    assert entity_metrics([["O"]], [["B-X"]])["f1"] == 0


def test_macro_f1_by_hand():
    # class 0: 1 hit, 2 said, 1 true -> 2/3; class 1: 1 hit, 1 said, 2 true -> 2/3; class 2 never occurs
    assert macro_f1([0, 0, 1], [0, 1, 1], 3) == pytest.approx(2 / 3)
