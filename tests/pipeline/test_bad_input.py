"""What a user can get wrong in a whole stage: a message with the values, and nothing lost."""

import os
import shutil
import subprocess

import pytest

from distllm.arch.io import load_model, save_model
from distllm.data.tokenizer import save_tokenizer, train_tokenizer
from distllm.errors import CheckpointError, ConfigError, EngineError, UserError
from distllm.testing.stages import SKILLS, run_tiny, weights_hash, write_text
from distllm.testing.tiny import tiny_decoder

SFT = ["stage=sft", *SKILLS]


def test_a_sequence_longer_than_the_model_names_both_lengths(tmp_path, parent):
    with pytest.raises(
        ConfigError, match=r"train\.seq_len=128 .* max_seq_len=96.*train\.seq_len=96"
    ):
        run_tiny(
            tmp_path / "run",
            [*SFT, f"model='{parent}'", "arch.max_seq_len=128", "train.seq_len=128"],
        )


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path, parent):
    small = train_tokenizer(["other text entirely, again and again"], 300)
    save_tokenizer(small, tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=rf"tokenizer=.*{len(small)} ids.*differs.*512 ids"):
        run_tiny(tmp_path / "run", [*SFT, f"model='{parent}'", f"tokenizer='{tmp_path}/tokenizer'"])


def test_a_tokenizer_larger_than_a_new_model_names_both_sizes(tmp_path, parent):
    with pytest.raises(ConfigError, match=r"512.*arch\.vocab_size=400|400.*512"):
        run_tiny(tmp_path / "run", [*SFT, f"tokenizer='{parent}'", "arch.vocab_size=400"])


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path, parent):
    model, _ = load_model(parent, head="last")
    save_model(model, train_tokenizer(["quite another text"], 300), tmp_path / "reward")
    with pytest.raises(ConfigError, match=r"stage\.reward_model=.*another tokenizer"):
        run_tiny(
            tmp_path / "run",
            ["stage=grpo", *SKILLS, f"model='{parent}'", f"stage.reward_model='{tmp_path}/reward'"],
        )


def test_a_language_model_is_no_reward_model(tmp_path, parent):
    with pytest.raises(ConfigError, match=r"head lm.*stage=reward"):
        run_tiny(
            tmp_path / "run",
            ["stage=ppo", *SKILLS, f"model='{parent}'", f"stage.reward_model='{parent}'"],
        )


def test_a_run_directory_of_another_config_is_never_overwritten(tmp_path, parent):
    settings = [*SFT, f"model='{parent}'", "train.max_steps=2"]
    run_tiny(tmp_path / "run", settings)
    before = weights_hash(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.001 there, 0\.5 now"):
        run_tiny(tmp_path / "run", [*settings, "optim.lr=0.5"])
    assert weights_hash(tmp_path / "run") == before


def test_a_diverged_run_stops_with_the_samples_and_keeps_the_checkpoint(tmp_path, parent):
    settings = [*SFT, f"model='{parent}'", "train.save_every_steps=1", "optim.max_grad_norm=0"]
    with pytest.raises(EngineError) as caught:
        run_tiny(tmp_path / "run", [*settings, "optim.lr=1e30"])
    message = str(caught.value)
    assert "non-finite" in message and "train.max_skipped_steps=0" in message
    assert "samples [" in message
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_steps_may_be_skipped_up_to_the_limit(tmp_path, parent):
    settings = [*SFT, f"model='{parent}'", "optim.max_grad_norm=0", "optim.lr=1e30"]
    with pytest.raises(EngineError, match=r"4 steps were skipped and train\.max_skipped_steps=3"):
        run_tiny(tmp_path / "run", [*settings, "train.max_skipped_steps=3"])


@pytest.fixture
def small_disk(tmp_path):
    """Mount 1.5 MB of memory as a disk."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", folder], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_with_a_clear_error_and_the_run_goes_on_when_there_is_room(
    small_disk, tmp_path, parent
):
    settings = [*SFT, f"model='{parent}'", "train.max_steps=6", "train.save_every_steps=2"]
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 1_150_000)
    with pytest.raises(UserError, match=r"bytes"):
        run_tiny(small_disk / "run", settings)
    ballast.unlink()
    assert run_tiny(small_disk / "run", settings).finished
    run_tiny(tmp_path / "elsewhere", settings)
    assert weights_hash(small_disk / "run") == weights_hash(tmp_path / "elsewhere")


def test_half_a_model_directory_is_refused(tmp_path, parent):
    broken = tmp_path / "broken"
    shutil.copytree(parent, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged"):
        run_tiny(tmp_path / "run", [*SFT, f"model='{broken}'"])


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    save_model(tiny_decoder(), None, tmp_path / "bare")
    with pytest.raises(UserError, match="tokenizer"):
        run_tiny(tmp_path / "run", [*SFT, f"model='{tmp_path}/bare'"])


def test_data_that_the_stage_cannot_learn_from_is_refused(tmp_path, parent):
    text = write_text(tmp_path / "text.txt")
    with pytest.raises(UserError, match="dialogues"):
        run_tiny(
            tmp_path / "run", ["stage=sft", "data=file", f"data.path='{text}'", f"model='{parent}'"]
        )
