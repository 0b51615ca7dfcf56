"""DPO here and in TRL 1.16: the same rows, weights, order and optimizer give the same numbers, step by step.

Rows are plain strings: their token ids and masks are equal on both sides (checked). For conversations TRL
also scores what a chat template puts after the end of the turn (a newline in ChatML), which we cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.engine.logprobs import Asked
from firesteel.engine.models import load_base
from firesteel.engine.packing import plan
from firesteel.engine.trainer import Sequences, Trainer
from firesteel.sdk import LoraConfig
from training.recipes.dpo_loop import Config, main
from training.utils import DpoObjective, build_service_client, make_pair_loss
from training.utils.losses import PairLogprobs
from training.utils.pairs import PreferencePair, render_pairs
from training.utils.preference_data import read_preferences
from training.utils.rendering import Renderer
from training.utils.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

BATCH, STEPS, RANK = 4, 10, 8
RATE = {0: 5e-4, RANK: 5e-3}
ROWS = [
    {
        "prompt": f"Question {i}: how {'very ' * (i % 3)}long is it? ",
        "chosen": f"About {i} metres{', I think' * (i % 2)}.",
        "rejected": f"That is hard to say{' of anything' * (i % 4)}.",
    }
    for i in range(BATCH * STEPS)
]


@dataclass
class Start:
    """Rows on disk, and the weights that both sides start from."""

    folder: Path
    data: Path
    model: Path
    rank: int
    adapter: Path | None


@pytest.fixture(params=[0, RANK], ids=["full-parameter", "lora"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Start:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = store.fetch(load_catalog().resolve_model("tiny-llama"))
    adapter = None
    if request.param:
        with build_service_client(base_model="tiny-llama", lora_rank=RANK) as service:
            fresh = service.create_training_client(seed=0).save_weights(str(tmp_path / "start"))
            adapter = Path(fresh.result().path)
    return Start(tmp_path, data, model, request.param, adapter)


def trl_model(start: Start) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32)
    if start.adapter is None:
        return network
    return PeftModel.from_pretrained(network, start.adapter, is_trainable=True)


def trl_trainer(start: Start) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(start.folder / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=RATE[start.rank],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1e9,  # off
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        max_length=None,
        beta=0.1,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(start.model)
    return DPOTrainer(
        trl_model(start), args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
    )


def our_run(start: Start) -> list[dict[str, float]]:
    """The recipe itself; its per-step metrics."""
    config = Config(
        log_path=str(start.folder / "run"),
        base_model="tiny-llama",
        dataset=str(start.data),
        lora_rank=start.rank,
        learning_rate=RATE[start.rank],
        weight_decay=0.0,
        batch_size=BATCH,
        shuffle=False,
    )
    main(config)
    lines = (start.folder / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def our_pairs(start: Start) -> tuple[PreferencePair, ...]:
    return render_pairs(read_preferences(start.data), Renderer(load_tokenizer("tiny-llama"))).pairs


def moved(weights: dict[str, torch.Tensor], since: dict[str, torch.Tensor]) -> torch.Tensor:
    """All weights' movement as one vector, in the order of their names."""
    return torch.cat([(weights[name] - since[name]).flatten() for name in sorted(since)])


def exported(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_the_tokens_and_masks_are_those_of_trl(start: Start) -> None:
    for ours, theirs in zip(our_pairs(start), trl_trainer(start).train_dataset, strict=True):
        for datum, response in zip(ours.datums, (theirs["chosen_ids"], theirs["rejected_ids"]), strict=True):
            tokens = [*theirs["prompt_ids"], *response]
            assert datum.model_input.to_ints() == tokens[:-1]
            assert datum.loss_fn_inputs["target_tokens"].data == tokens[1:]
            scored = [0.0] * (len(theirs["prompt_ids"]) - 1) + [1.0] * len(response)
            assert datum.loss_fn_inputs["weights"].data == scored


def test_every_step_and_the_final_weights_are_those_of_trl(start: Start) -> None:
    ours = our_run(start)
    trainer = trl_trainer(start)
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == STEPS
    losses = [record["train/dpo_loss"] for record in ours]
    assert max(losses) - min(losses) >= 0.05
    names = {
        "train/dpo_loss": "loss",
        "train/grad_norm": "grad_norm",
        "rewards/chosen": "rewards/chosen",
        "rewards/rejected": "rewards/rejected",
        "rewards/margins": "rewards/margins",
        "logps/chosen": "logps/chosen",
        "logps/rejected": "logps/rejected",
    }
    for our_name, their_name in names.items():
        mine, other = ([float(r[n]) for r in rows] for rows, n in ((ours, our_name), (theirs, their_name)))
        # Log-probabilities are sums near -120; the rest is of order 1.
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-5, err_msg=our_name)

    before = exported(start.adapter or start.model)
    trainer.model.save_pretrained(start.folder / "theirs")
    own = moved(exported(start.folder / "run" / ("adapter" if start.rank else "model")), before)
    other = moved(exported(start.folder / "theirs"), before)
    assert own.norm() > 0
    assert (own - other).norm() / other.norm() < 1e-4


def test_the_gradient_of_the_first_step_is_that_of_trl(start: Start) -> None:
    trainer = trl_trainer(start)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch).backward()
    theirs = {
        name.replace("base_model.model.", "").replace(".default", ""): parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    ours = dict(our_gradient(start))
    assert set(ours) == set(theirs)
    mine, other = (torch.cat([grads[name].flatten() for name in sorted(ours)]) for grads in (ours, theirs))
    assert other.norm() > 0.1
    assert (mine - other).norm() / other.norm() < 1e-5


def our_gradient(start: Start) -> Iterator[tuple[str, torch.Tensor]]:
    """The first batch through the engine's trainer: forward, the loss on its log-probabilities, backward."""
    catalog = load_catalog()
    shape = catalog.shape("accounts/local/trainingShapes/cpu-lora")
    base = load_base("tiny-llama", catalog.resolve_model("tiny-llama"), start.model, shape)
    trainer = Trainer(base, "policy", LoraConfig(rank=RANK, seed=0) if start.rank else None, trainable=True)
    pairs = our_pairs(start)[:BATCH]
    datums = [datum for pair in pairs for datum in pair.datums]
    tokens = tuple(np.asarray(datum.model_input.to_ints()) for datum in datums)
    asked = tuple(Asked(datum.loss_fn_inputs["target_tokens"].to_numpy()) for datum in datums)
    sequences = Sequences(tokens, asked, plan(tokens, 1024))
    answer, retained = trainer.forward_retained(sequences, lambda index, logprobs: logprobs.sum())
    scores = answer.logprobs
    scored = [row[d.loss_fn_inputs["weights"].to_numpy() != 0] for row, d in zip(scores, datums, strict=True)]
    references = [PairLogprobs(scored[i], scored[i + 1]) for i in range(0, len(scored), 2)]
    leaves = [torch.tensor(row, requires_grad=True) for row in scores]
    loss, _ = make_pair_loss(pairs, references, DpoObjective(0.1))(datums, leaves)
    loss.backward()
    trainer.backward(retained, [leaf.grad.numpy() for leaf in leaves])
    for name, parameter in base.network.named_parameters():
        if parameter.grad is not None:
            yield name.replace(".policy.", "."), parameter.grad
