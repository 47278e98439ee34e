"""How far sampled responses depend on their batch: all equal in fp32, the share in bf16 told by `distllm evaluate`."""

import json

import pytest
from patched import planted

from distllm.cli.main import main
from distllm.generation import noise
from distllm.pipeline.agreement import equal_shares
from distllm.testing.stages import SKILLS, TINY, run_tiny


def test_shares_by_hand():
    some = [[1, 2, 3], [4, 5], [6]]
    assert equal_shares(some, [[1, 2, 3], [4, 9], [6, 7, 8]]) == (5 / 8, 1 / 3)
    assert equal_shares(some, some) == (1.0, 1.0)
    assert equal_shares([], []) == (0.0, 0.0)


@pytest.fixture(scope="module")
def tell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement") / "run"
    run_tiny(folder, ["stage=sft", *SKILLS, "train.max_steps=1"])

    def tell(precision, capsys):
        capsys.readouterr()
        given = [*TINY, "stage=sft", *SKILLS, f"train.precision={precision}"]
        assert main(["evaluate", f"model={folder}/model", *given]) == 0
        return json.loads(capsys.readouterr().out)

    return tell


def test_in_fp32_a_response_does_not_depend_on_its_batch(tell, capsys):
    told = tell("fp32", capsys)
    assert told["agreement/tokens"] == told["agreement/responses"] == 1.0


def test_in_bf16_the_share_is_told(tell, capsys):
    told = tell("bf16", capsys)
    assert 0.5 < told["agreement/tokens"] <= 1.0
    assert told["agreement/responses"] <= 1.0


def test_noise_by_row_is_noticed(tell, capsys):
    own = "prompts, samples = np.asarray(prompt_indices), np.asarray(sample_indices)"
    with planted(noise, own, own.replace("(prompt_indices)", "(range(len(prompt_indices)))")):
        assert tell("fp32", capsys)["agreement/tokens"] < 0.5
