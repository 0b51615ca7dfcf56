"""The scenarios of both Fireworks clients, whose service client has the same methods under other types."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from common import (
    Checks,
    Task,
    answer_means,
    answer_rows,
    answer_sums,
    closing,
    cross_entropy_steps,
    dpo_steps,
    pair_rows,
)


@dataclass(frozen=True)
class Client:
    """One version of the Fireworks SDK."""

    service: Any
    """The class `FiretitanServiceClient`."""
    control_plane: Any
    """The class `TrainerJobManager`."""
    types: Any


def build_service(client: Client, task: Task, **settings: Any) -> Any:
    """As the cookbook does it: lazy, and without the deployment that its default would ask for."""
    return client.service.from_firetitan_config(
        api_key=task.key,
        base_url=task.url,
        create_deployment=False,
        gradient_accumulation_steps=None,  # its default of 1 makes it warn about itself
        cleanup_trainer_on_close=True,
        **{"base_model": task.model, **settings},
    )


def create_lora_policy(service: Any, scenario: dict[str, Any]) -> Any:
    """All settings of the adapter are sent: the numbers depend on each."""
    lora = scenario["lora"]
    return service.create_training_client(
        lora_rank=lora["rank"],
        lora_alpha=lora["alpha"],
        seed=lora["seed"],
        train_attn=lora["train_attn"],
        train_mlp=lora["train_mlp"],
        train_unembed=lora["train_unembed"],
    )


def full_parameter(client: Client, task: Task, checks: Checks) -> None:
    """All weights trained against a reference in a trainer of its own; saved, resumed, promoted."""
    scenario = task.scenarios["dpo-full"]
    rows = pair_rows(client.types, task.pairs)
    with closing(build_service(client, task, lora_rank=0, reference_required=True)) as service:
        policy = service.create_training_client(lora_rank=0)
        reference = service.create_reference_client(lora_rank=0)
        job = service.trainer_job_id
        checks.true("full: the reference has a trainer of its own", service.reference_trainer_job_id != job)
        checks.true("full: the job tells the longest context", service.max_context_length > 0)
        base = check_training(client, checks, "full", policy, reference, rows, scenario)
        checks.equal("full: the trainer lists its states", policy.list_checkpoints(), ["step-4"])
        service.release_references()
        exported = policy.save_weights_for_sampler("final", checkpoint_type="base").result().path
        check_listing(checks, "full", service, job, "step-4", exported)
        model = promote(task, service, job, exported)
        with closing(build_service(client, task, lora_rank=0, reference_required=False)) as other:
            second = other.create_training_client(lora_rank=0)
            path = second.resolve_checkpoint_path("step-4", source_job_id=job)
            second.load_state_with_optimizer(path).result()
            again = dpo_steps(client.types, second, rows, base, scenario, 4)
            checks.close("full: another job goes on from the state", again, scenario["losses"][4:])
    check_deleted(client, task, checks, job)
    with closing(build_service(client, task, base_model=model, lora_rank=0)) as service:
        promoted = service.create_training_client(lora_rank=0)
        checks.close("full: the promoted model", answer_means(promoted, rows), scenario["final_means"])


def lora(client: Client, task: Task, checks: Checks) -> None:
    """An adapter trained against the base it sits on; saved, resumed, promoted alone and merged."""
    scenario = task.scenarios["dpo-lora"]
    rank = scenario["lora"]["rank"]
    rows = pair_rows(client.types, task.pairs)
    with closing(build_service(client, task, max_lora_rank=rank)) as service:
        policy = create_lora_policy(service, scenario)
        reference = service.create_reference_client(policy_client=policy)
        job = service.trainer_job_id
        checks.equal(
            "lora: the reference shares the policy's trainer", service.reference_trainer_job_id, None
        )
        check_training(client, checks, "lora", policy, reference, rows, scenario)
        exported = policy.save_weights_for_sampler("final").result().path
        merged = policy.save_weights_for_sampler("merged", checkpoint_type="merged_base").result().path
        check_listing(checks, "lora", service, job, "step-4", exported)
        adapter, model = promote(task, service, job, exported), promote(task, service, job, merged)
        warm = create_lora_policy(service, scenario)
        warm.load_adapter(adapter).result()
        checks.close("lora: the promoted adapter", answer_means(warm, rows), scenario["final_means"])
    check_deleted(client, task, checks, job)
    with closing(build_service(client, task, base_model=model, lora_rank=0)) as service:
        promoted = service.create_training_client(lora_rank=0)
        checks.close("lora: the promoted merged model", answer_means(promoted, rows), scenario["final_means"])


def cross_entropy(client: Client, task: Task, checks: Checks) -> None:
    """A built-in loss in two calls a step, none waited for before the next."""
    scenario = task.scenarios["cross-entropy-lora"]
    rows = answer_rows(client.types, task.pairs)
    with closing(build_service(client, task, max_lora_rank=scenario["lora"]["rank"])) as service:
        policy = create_lora_policy(service, scenario)
        losses = cross_entropy_steps(client.types, policy, rows, scenario, scenario["steps"])
        checks.close("cross-entropy: losses of 8 steps", losses, scenario["losses"])
        checks.moved("cross-entropy", losses)


def mistakes(client: Client, task: Task, checks: Checks) -> None:
    """What a user gets wrong is told at once, and the client goes on."""
    scenario = task.scenarios["dpo-lora"]
    rows = pair_rows(client.types, task.pairs)
    wrong = Task(task.url, "wrong-key", task.model, task.pairs, task.scenarios)
    with closing(build_service(client, wrong, max_lora_rank=8)) as service:
        checks.raises("mistakes: a wrong key", lambda: create_lora_policy(service, scenario))
    with closing(build_service(client, task, base_model="no-such-model", lora_rank=0)) as service:
        checks.raises("mistakes: an unknown base model", lambda: service.create_training_client(lora_rank=0))
    with closing(build_service(client, task, max_lora_rank=8)) as service:
        policy = create_lora_policy(service, scenario)
        reference = service.create_reference_client(policy_client=policy)
        checks.raises("mistakes: an unknown state", lambda: policy.load_state("no-such-state").result())
        step = client.types.AdamParams(**scenario["adam"])
        checks.raises("mistakes: a step of the reference", lambda: reference.optim_step(step).result())
        means = answer_means(policy, rows)
        checks.close("mistakes: the policy goes on", means, scenario["reference_means"])


def check_training(
    client: Client,
    checks: Checks,
    name: str,
    policy: Any,
    reference: Any,
    rows: list[Any],
    scenario: dict[str, Any],
) -> list[float]:
    """Eight steps with a save after the fourth, then the last four again from there. Gives the reference's sums."""
    checks.close(f"{name}: the reference", answer_means(reference, rows), scenario["reference_means"])
    base = answer_sums(reference, rows)
    losses = dpo_steps(client.types, policy, rows, base, scenario, scenario["save_after"])
    path = policy.save_state("step-4").result().path
    rest = scenario["steps"] - scenario["save_after"]
    losses += dpo_steps(client.types, policy, rows, base, scenario, rest)
    checks.close(f"{name}: losses of 8 steps", losses, scenario["losses"])
    checks.moved(name, losses)
    checks.close(f"{name}: the policy after 8 steps", answer_means(policy, rows), scenario["final_means"])
    policy.load_state_with_optimizer(path).result()
    again = dpo_steps(client.types, policy, rows, base, scenario, rest)
    checks.equal(f"{name}: the state with its optimizer repeats the steps exactly", again, losses[-rest:])
    return base


def check_listing(checks: Checks, name: str, service: Any, job: str, state: str, exported: str) -> None:
    """Both kinds of checkpoint are listed at once, and only what can be promoted says so."""
    found = {row["name"].rsplit("/", 1)[1]: row for row in service.list_checkpoints(job)}
    checks.true(f"{name}: the list has state and export", {state, exported} <= set(found), sorted(found))
    promotable = {checkpoint: row.get("promotable") for checkpoint, row in found.items()}
    checks.true(f"{name}: the export is promotable", promotable.get(exported) is True, promotable)
    times = [row["createTime"] for row in found.values()]
    checks.equal(f"{name}: the oldest is first", times, sorted(times))


def promote(task: Task, service: Any, job: str, checkpoint: str) -> str:
    """Make a model of an export and give its name."""
    rows = service.list_checkpoints(job)
    name = next(row["name"] for row in rows if row["name"].endswith(f"/{checkpoint}"))
    identifier = f"compat-{uuid.uuid4().hex[:8]}"
    model = service.promote_checkpoint(name=name, output_model_id=identifier, base_model=task.model)
    return str(model["name"])


def check_deleted(client: Client, task: Task, checks: Checks, job: str) -> None:
    """Closing deleted the trainer; what it saved is still listed."""
    with client.control_plane(api_key=task.key, base_url=task.url) as control_plane:
        left = control_plane.try_get(job)
        gone = left is None or left["state"] in ("JOB_STATE_DELETED", "JOB_STATE_ARCHIVED")
        checks.true("close: the trainer is gone", gone, left)
        checks.true("close: its checkpoints are listed", len(control_plane.list_checkpoints(job)) >= 2)
