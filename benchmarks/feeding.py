"""Does a fast device wait for Ray? The scoring pipeline around one that computes a stated number of tokens a second.

    python benchmarks/feeding.py [--rates 50000 200000] [--json FILE]

The device is a stand-in, with a GPU's manners: work is queued and takes its time, the host goes on, and whoever asks
for a result sleeps until it is there. All else is the real thing: files, chat template, tokenizer, Ray, the scoring
actor, Parquet with commit records; with --latency, every write, every look for a file and every removal by that actor
takes so much longer; reading the input does not. Idle is the share of the time from the device's first batch to its
last one in which it had nothing to do. `one at a time` is the control: a block is written before the next is computed,
results are asked for at once. The CPU cores that do the rest are this machine's, so a rate that they cannot feed says
how many a GPU like that needs.
"""

import argparse
import tempfile
import time
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from common import DATA_HELP, embedded_file, print_table, write_result

from alphatoken import scoring, storage
from alphatoken.batching import Batch
from alphatoken.config import EMBEDDED_MODEL, ScoreConfig
from alphatoken.sources import plan_units
from alphatoken.values import TokenValues
from pipelines.blocks import map_blocks
from pipelines.cluster import actor_pool, connect, prepare_worker
from pipelines.encode import EncodePlan, encoded_dataset
from pipelines.score import BYTES_PER_TOKEN, shard_tokens
from pipelines.scorer import Scorer
from pipelines.turns import Turns

SECONDS = 15  # of the device's work
FILES = 4  # that the rows are in: tasks read and tokenise them side by side
REQUESTS = ("_write_and_rename", "exists", "remove_file")  # of storage.py


class Device:
    """A queue that is worked off at a rate. An estimator, too: every value is zero."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.began: float | None = None
        self.ends = self.busy = 0.0

    def __call__(self, batch: Batch) -> TokenValues:
        now, seconds = time.monotonic(), batch.input_ids.numel() / self.rate
        self.began = self.began or now
        self.ends = max(now, self.ends) + seconds
        self.busy += seconds
        zero = torch.zeros(len(batch.targets))
        return TokenValues(zero, zero, zero)

    def idle(self) -> float:
        """So far, in seconds."""
        return self.ends - (self.began or self.ends) - self.busy


class Result:
    """Instead of a `Fetch`: there when the device is done with what was queued before."""

    def __init__(self, tensor: torch.Tensor, device: Device, at_once: bool) -> None:
        self.tensor, self.ready = tensor, device.ends
        if at_once:
            self.wait()

    def wait(self) -> torch.Tensor:
        time.sleep(max(0.0, self.ready - time.monotonic()))
        return self.tensor


class StandIn(Scorer):
    """The scoring actor with such a device instead of a model."""

    def __init__(self, config: ScoreConfig, rate: float, latency: float, ahead: bool) -> None:
        prepare_worker(1)
        self.config, self.output, self.targets = config, config.output, []
        self.device, self.estimator, self.turns = torch.device("cpu"), Device(rate), Turns()
        scoring.Fetch = lambda tensor: Result(tensor, self.estimator, at_once=not ahead)
        for name in REQUESTS if latency else ():
            setattr(storage, name, _slowly(getattr(storage, name), latency))

    def __call__(self, block: pa.Table) -> dict[str, list]:
        counts = super().__call__(block)
        return counts | {"device_ends": [self.estimator.ends], "device_idle": [self.estimator.idle()],
                         "device_busy": [self.estimator.busy]}  # fmt: skip


def _slowly(call: Any, latency: float) -> Any:
    def slow(*arguments: Any) -> Any:
        time.sleep(latency)
        return call(*arguments)

    return slow


def fed(config: ScoreConfig, rate: float, latency: float, ahead: bool) -> dict[str, float]:
    """One run: the device's seconds of work, and those for which it waited."""
    size = BYTES_PER_TOKEN * shard_tokens(config, units := plan_units(config.data))
    blocks = encoded_dataset(units, EncodePlan(config.model, False, config), size)
    rows = map_blocks(
        blocks, StandIn, fn_constructor_args=(config, rate, latency, ahead), zero_copy_batch=True,
        compute=actor_pool(1, 1, ahead or None), num_cpus=1,
    ).iter_rows()  # fmt: skip
    last = max(rows, key=lambda row: row["device_ends"])
    return {"busy": last["device_busy"], "idle": last["device_idle"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[50_000, 200_000], help="tokens a second")
    slower = "seconds more for the actor's writes, looks, removals"
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.05], help=slower)
    parser.add_argument("--shard-tokens", type=int, default=65_536, help="what an input of 17 million tokens has")
    parser.add_argument("--data", default=embedded_file("train.jsonl"), help=DATA_HELP + "; repeated as needed")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    lines = Path(arguments.data).read_text().splitlines(keepends=True)
    tokens = sum(map(len, lines)) / 4  # about
    connect()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (rate, latency) in enumerate(product(arguments.rates, arguments.latency)):
            part = "".join(islice(cycle(lines), round(len(lines) * rate * SECONDS / tokens / FILES)))
            files = [f"{folder}/rows-{index}.jsonl" for index in range(FILES)]
            for file in files:
                Path(file).write_text(part)
            runs = {}
            for name, ahead in (("ahead", True), ("one at a time", False)):
                config = ScoreConfig(
                    model=EMBEDDED_MODEL, data=files, output=f"{folder}/{number}-{name}", estimator="loss",
                    shard_tokens=arguments.shard_tokens,
                )  # fmt: skip
                runs[name] = fed(config, rate, latency, ahead)
            found.append({"rate": rate, "latency": latency, "runs": runs})
    shares = [[run["idle"] / (run["idle"] + run["busy"]) for run in line["runs"].values()] for line in found]
    print_table(
        "Share of the time in which the device had nothing to do",
        ["tokens a second", "writing, ms more", "as it is", "one at a time"],
        [
            [f"{line['rate']:,.0f}", f"{1000 * line['latency']:.0f}", *(f"{share:.1%}" for share in pair)]
            for line, pair in zip(found, shares, strict=True)
        ],
    )
    write_result(arguments.json, {"shard_tokens": arguments.shard_tokens, "results": found})


if __name__ == "__main__":
    main()
