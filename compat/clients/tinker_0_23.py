"""Plain `tinker` 0.23.0: adapters only, everything on the data plane.

python compat/clients/tinker_0_23.py --url http://127.0.0.1:PORT --key KEY --expected compat-expected.json
"""

from typing import Any

import tinker
from common import (
    Checks,
    Task,
    answer_means,
    answer_rows,
    answer_sums,
    cross_entropy_steps,
    dpo_steps,
    pair_rows,
    parse_task,
)


def main() -> None:
    """All scenarios on one session."""
    task = parse_task(__doc__.splitlines()[0])
    checks = Checks()
    checks.raises("a wrong key", lambda: tinker.ServiceClient(base_url=task.url, api_key="tml-wrong"))
    service = tinker.ServiceClient(base_url=task.url, api_key=f"tml-{task.key}")
    models = [model.model_name for model in service.get_server_capabilities().supported_models]
    checks.true("the server names the model", task.model in models, models)
    cross_entropy(service, task, checks)
    policy = dpo(service, task, checks)
    sampling(service, policy, task, checks)
    listings(service, policy, checks)
    mistakes(service, policy, task, checks)
    checks.end()


def create_policy(service: Any, task: Task, scenario: dict[str, Any]) -> Any:
    """This client sends no alpha; all else that the numbers depend on is sent."""
    lora = scenario["lora"]
    return service.create_lora_training_client(
        task.model,
        rank=lora["rank"],
        seed=lora["seed"],
        train_attn=lora["train_attn"],
        train_mlp=lora["train_mlp"],
        train_unembed=lora["train_unembed"],
    )


def cross_entropy(service: Any, task: Task, checks: Checks) -> None:
    """A built-in loss in two calls a step, and a new client from a state with its optimizer."""
    scenario = task.scenarios["cross-entropy-lora"]
    rows = answer_rows(tinker, task.pairs)
    policy = create_policy(service, task, scenario)
    info = policy.get_info()
    checks.equal("cross-entropy: what the model is", (info.is_lora, info.lora_rank), (True, 8))
    losses = cross_entropy_steps(tinker, policy, rows, scenario, scenario["save_after"])
    path = policy.save_state("step-4").result().path
    checks.true("cross-entropy: the state is named by its model", path.startswith("tinker://"), path)
    rest = scenario["steps"] - scenario["save_after"]
    losses += cross_entropy_steps(tinker, policy, rows, scenario, rest)
    checks.close("cross-entropy: losses of 8 steps", losses, scenario["losses"])
    checks.moved("cross-entropy", losses)
    second = service.create_training_client_from_state_with_optimizer(path)
    again = cross_entropy_steps(tinker, second, rows, scenario, rest)
    checks.equal("cross-entropy: a new client repeats the steps exactly", again, losses[-rest:])
    third = service.create_training_client_from_state(path)
    first = cross_entropy_steps(tinker, third, rows, scenario, 1)
    checks.close("cross-entropy: weights alone", first, scenario["losses"][scenario["save_after"] :][:1])


def dpo(service: Any, task: Task, checks: Checks) -> Any:
    """A loss of our own against the sampler's log-probabilities of the base model. Gives the policy."""
    scenario = task.scenarios["dpo-lora"]
    rows = pair_rows(tinker, task.pairs)
    policy = create_policy(service, task, scenario)
    base = answer_sums(policy, rows)
    sampler = service.create_sampling_client(base_model=task.model)
    checks.close("dpo: the base model's sampler", sampled_means(sampler, task), scenario["reference_means"])
    losses = dpo_steps(tinker, policy, rows, base, scenario, scenario["save_after"])
    path = policy.save_state("step-4").result().path
    rest = scenario["steps"] - scenario["save_after"]
    losses += dpo_steps(tinker, policy, rows, base, scenario, rest)
    checks.close("dpo: losses of 8 steps", losses, scenario["losses"])
    checks.moved("dpo", losses)
    policy.load_state_with_optimizer(path).result()
    again = dpo_steps(tinker, policy, rows, base, scenario, rest)
    checks.equal("dpo: the state with its optimizer repeats the steps exactly", again, losses[-rest:])
    return policy


def sampling(service: Any, policy: Any, task: Task, checks: Checks) -> None:
    """The policy's weights as they are, by a name and without one."""
    scenario = task.scenarios["dpo-lora"]
    path = policy.save_weights_for_sampler("final").result().path
    checks.true("sampling: the export is named by its model", path.startswith("tinker://"), path)
    prompt = tinker.ModelInput.from_ints(task.pairs[0]["chosen"][: task.pairs[0]["prompt_tokens"]])
    greedy = tinker.SamplingParams(max_tokens=12, temperature=0.0)
    answers = []
    for name, sampler in (
        ("by path", service.create_sampling_client(model_path=path)),
        ("of now", policy.save_weights_and_get_sampling_client()),
    ):
        checks.close(f"sampling {name}: logprobs", sampled_means(sampler, task), scenario["final_means"])
        sequences = sampler.sample(prompt, 2, greedy).result().sequences
        answers += [list(sequence.tokens) for sequence in sequences]
        lengths = {(len(sequence.tokens), len(sequence.logprobs)) for sequence in sequences}
        checks.true(f"sampling {name}: tokens with logprobs", all(a == b for a, b in lengths), lengths)
    checks.true("sampling: greedy answers are one", all(a == answers[0] for a in answers), answers)


def listings(service: Any, policy: Any, checks: Checks) -> None:
    """Training runs and their checkpoints, and the end of one."""
    rest, run_id = service.create_rest_client(), policy.model_id
    runs = {run.training_run_id: run for run in rest.list_training_runs().result().training_runs}
    checks.true("listings: the policy is a training run", run_id in runs, list(runs))
    checks.equal("listings: of an adapter", (runs[run_id].is_lora, runs[run_id].lora_rank), (True, 8))
    policy.save_state("to-be-deleted").result()
    rows = rest.list_checkpoints(run_id).result().checkpoints
    named = {row.checkpoint_id: row for row in rows}
    checks.true("listings: its checkpoint", "weights/to-be-deleted" in named, list(named))
    path = named["weights/to-be-deleted"].tinker_path
    info = rest.get_weights_info_by_tinker_path(path).result()
    checks.equal("listings: what it is of", (info.is_lora, info.lora_rank), (True, 8))
    rest.delete_checkpoint(run_id, "weights/to-be-deleted").result()
    left = [row.checkpoint_id for row in rest.list_checkpoints(run_id).result().checkpoints]
    checks.true("listings: and it is gone", "weights/to-be-deleted" not in left, left)


def mistakes(service: Any, policy: Any, task: Task, checks: Checks) -> None:
    """What a user gets wrong is told at once, and the client goes on."""
    scenario = task.scenarios["dpo-lora"]
    checks.raises(
        "mistakes: an unknown base model",
        lambda: service.create_lora_training_client("no-such-model", rank=8),
    )
    lost = "tinker://no-such-model/weights/no-such-state"
    checks.raises("mistakes: an unknown state", lambda: policy.load_state(lost).result())
    means = answer_means(policy, pair_rows(tinker, task.pairs))
    checks.close("mistakes: the policy goes on", means, scenario["final_means"])


def sampled_means(sampler: Any, task: Task) -> list[float]:
    """Per row the mean of the answer's log-probabilities, asked for as those of a prompt."""
    sides = [(pair[side], pair["prompt_tokens"]) for pair in task.pairs for side in ("chosen", "rejected")]
    futures = [sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)) for tokens, _ in sides]
    answers = [future.result()[start:] for future, (_, start) in zip(futures, sides, strict=True)]
    return [sum(values) / len(values) for values in answers]


if __name__ == "__main__":
    main()
