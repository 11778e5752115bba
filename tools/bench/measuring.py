"""One server's turn: what it serves, a warm-up, the run."""

import asyncio
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase

from ipc.errors import InvalidRequest, Unavailable
from tools.bench.completion_client import CompletionClient, accepted_form, served_models
from tools.bench.http_exchange import Address
from tools.bench.load_run import LoadRun
from tools.bench.plan import Measure
from tools.bench.progress_bar import ProgressBar
from tools.bench.records import Measurement
from tools.bench.servers import Target
from tools.bench.warm_up import warm_up
from tools.bench.workload import plan_requests
from tools.options.keys import client_key


async def measure_server(
    target: Target, url: str, plan: Measure, progress: ProgressBar
) -> Measurement:
    """Runs the plan's workload on the server at ``url``.

    Raises:
        InvalidRequest: the server lacks adapters, or takes no prompt that can be made.
        Unavailable: it does not answer, or answers wrongly before the run has begun.
    """
    address, workload = Address.parse(url, client_key(os.environ)), plan.workload
    models = await served_models(address, url)
    names = _choose(models.adapters, plan.adapter_pattern, workload.num_adapters, url)
    form = plan.form or await accepted_form(address, models.base)
    client = CompletionClient(address, models.base, form)
    requests = plan_requests(workload, names, plan.seed)
    asked_for = sorted({request.adapter for request in requests if request.adapter is not None})
    progress.phase("warming up")
    try:
        async with asyncio.timeout(plan.time_limit_s):
            await warm_up(client, workload, asked_for, plan.warm_up, plan.seed)
    except TimeoutError:
        raise Unavailable(f"not warm after the time limit of {plan.time_limit_s:g} s") from None
    run = LoadRun(
        client,
        workload,
        requests,
        plan.seed,
        plan.time_limit_s,
        plan.churn_paths,
        progress.show,
    )
    return Measurement(
        name=target.name,
        source=target.source,
        base_model=models.base,
        workload=workload,
        seed=plan.seed,
        run=await run.run(),
    )


def _choose(listed: Sequence[str], pattern: str, count: int, url: str) -> Sequence[str]:
    """The first ``count`` adapters of the pattern, in alphabetical order."""
    matching = [name for name in listed if fnmatchcase(name, pattern)]
    if len(matching) < count:
        raise InvalidRequest(
            f"the workload asks for {count} adapters, but {url} lists {len(matching)} of the"
            f" pattern {pattern}"
        )
    return matching[:count]
