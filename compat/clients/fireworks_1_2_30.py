"""`fireworks-ai` 1.2.30, which has a client and types of its own and no `tinker`.

python compat/clients/fireworks_1_2_30.py --url http://127.0.0.1:PORT --key KEY --expected compat-expected.json
"""

import managed
from common import Checks, Task, answer_means, closing, pair_rows, parse_task
from fireworks.training import sdk


def main() -> None:
    """All scenarios, one after another."""
    task = parse_task(__doc__.splitlines()[0])
    checks = Checks()
    client = managed.Client(sdk.FiretitanServiceClient, sdk.TrainerJobManager, sdk)
    managed.full_parameter(client, task, checks)
    managed.lora(client, task, checks)
    managed.cross_entropy(client, task, checks)
    managed.mistakes(client, task, checks)
    native(client, task, checks)
    checks.end()


def native(client: managed.Client, task: Task, checks: Checks) -> None:
    """What only this version has: a custom loss on a forward that was made before, and unloading a model."""
    scenario = task.scenarios["dpo-lora"]
    rows = pair_rows(sdk, task.pairs)
    with closing(managed.build_service(client, task, max_lora_rank=scenario["lora"]["rank"])) as service:
        policy = managed.create_lora_policy(service, scenario)
        before = policy.forward(rows, "cross_entropy").result()

        def negative_sum(data: list, logprobs: list) -> tuple:
            loss = -sum(values.sum() for values in logprobs)
            return loss, {"own_loss": loss.item()}

        result = policy.forward_backward_custom(rows, negative_sum, precomputed_forward=before).result()
        total = -sum(sum(output["logprobs"].data) for output in before.loss_fn_outputs)
        checks.close("native: precomputed forward", [result.metrics["own_loss"] / total], [1.0])
        policy.optim_step(sdk.AdamParams(**scenario["adam"])).result()
        moved = [
            after - at_start
            for after, at_start in zip(answer_means(policy, rows), scenario["reference_means"], strict=True)
        ]
        checks.true("native: that step raises what it summed", min(moved) > 0, moved)
        unloaded = policy.unload_model().result()
        checks.equal("native: the model is unloaded", unloaded.model_id, policy.model_id)


if __name__ == "__main__":
    main()
