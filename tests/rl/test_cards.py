"""Algorithm cards: complete, true to the defaults, and true to the peer whose source is at hand."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from distllm import registry
from distllm.cli.main import main
from distllm.config.files import conf_dir

ALGORITHMS = registry.names("algorithm")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_card_is_complete(name):
    cls = registry.get("algorithm", name)
    card, options = cls.card, cls.Options(name=name)
    assert re.search(r"arXiv \d{4}\.\d{5}", card.paper)
    assert "loss = " in card.equation and card.expectation.endswith(".")
    for f in fields(options):
        if f.name != "name":
            assert card.source(f.name), f"{name}.{f.name} has no source"
    known = {f.name for f in fields(options)}
    assert set(card.sources) <= known, "a source for an option that does not exist"
    assert card.differences
    assert (conf_dir() / "stage" / f"{name}.yaml").is_file()
    assert options.name == name


def test_no_two_algorithms_share_a_card():
    cards = [registry.get("algorithm", name).card for name in ALGORITHMS]
    assert len({card.equation for card in cards}) == len(cards)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_explain_prints_the_card(capsys, name):
    assert main(["explain", f"stage={name}"]) == 0
    text = capsys.readouterr().out
    for word in ("rho_t = exp(l_t - l_old_t)", "clip_low=0.2", "OpenAI's code", "TRL: ", "verl: "):
        assert word in text
    assert max(map(len, text.splitlines())) < 140


def test_explain_with_more_than_a_stage_explains_settings(capsys):
    assert main(["explain", "stage", "stage=grpo"]) == 0
    assert "stage.clip_low=0.2" in capsys.readouterr().out
    assert main(["explain", "stage=pretrain"]) == 0
    assert "optim.lr=" in capsys.readouterr().out


def peer_defaults(file):
    """Read the defaults of TRL's config classes from their source."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("trl is not installed")
    source = (Path(spec.submodule_search_locations[0]) / "trainer" / file).read_text()
    found = re.findall(r"^    (\w+): [^\n=]+ = field\(\s*default=([^,\n]+)", source, re.M)
    return dict(found)


def test_what_the_cards_say_of_trl_is_so():
    grpo, rloo = peer_defaults("grpo_config.py"), peer_defaults("rloo_config.py")
    ours = registry.get("algorithm", "grpo").Options()
    assert grpo["num_generations"] == "8" == str(ours.num_samples)
    assert grpo["epsilon"] == "0.2" == str(ours.clip_low)
    assert grpo["beta"] == "0.0" == str(ours.kl_coef)
    assert grpo["loss_type"] == '"dapo"' and grpo["scale_rewards"] == '"group"'
    assert grpo["delta"] == "None" and grpo["epsilon_high"] == "None"
    assert grpo["entropy_coef"] == "0.0" and grpo["use_bias_correction_kl"] == "True"
    assert rloo["num_generations"] == "2" and rloo["beta"] == "0.05"
    assert registry.get("algorithm", "rloo").Options().kl_coef == 0.05
    spec = importlib.util.find_spec("trl")
    trainer = Path(spec.submodule_search_locations[0]) / "trainer"
    source = (trainer / "grpo_trainer.py").read_text()
    assert "torch.clamp(coef_1, max=self.epsilon_high).detach()" in source  # CISPO: above only
    assert "per_token_kl * coef_1" in source
    assert "std_rewards + 1e-4" in source
    source = (trainer / "rloo_trainer.py").read_text()
    assert "logps = (per_token_logps * completion_mask).sum(1)" in source  # one ratio per response
    assert "rewards = rewards - self.beta * kl" in source  # before the baseline
