"""`fireworks-ai` 1.2.9 with `tinker` 0.23.0: the managed service client behind the cookbook's recipes.

python compat/clients/fireworks_1_2_9.py --url http://127.0.0.1:PORT --key KEY --expected compat-expected.json
"""

import managed
import tinker
from common import Checks, parse_task
from fireworks.training.sdk import FiretitanServiceClient, TrainerJobManager


def main() -> None:
    """All scenarios, one after another."""
    task = parse_task(__doc__.splitlines()[0])
    checks = Checks()
    client = managed.Client(FiretitanServiceClient, TrainerJobManager, tinker)
    managed.full_parameter(client, task, checks)
    managed.lora(client, task, checks)
    managed.cross_entropy(client, task, checks)
    managed.mistakes(client, task, checks)
    checks.end()


if __name__ == "__main__":
    main()
