"""Gradient sums that outlive the process that adds them up: of directions and Fisher diagonals.

    OUT.parts/run.json                     what is summed; OUT.parts of another run is refused
    OUT.parts/sums/<number>.safetensors    a sum so far, and how many blocks of examples are in it
    OUT.parts/attempts/                    what is being computed: pipelines/poison.py

Blocks come in the same order again, and those that are in the sum are passed over. The folder goes when OUT is there.
"""

import logging
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch

from alphatoken import storage, tensor_file
from alphatoken.direction import GradientSum
from alphatoken.run_folder import RunFolder
from pipelines.poison import Attempt
from pipelines.progress import Tick

logger = logging.getLogger(__name__)

ROWS_PER_TARGET = 10**12  # of 1,000 files
SAVE_SECONDS = 60.0  # about what is lost at most, beside the block that was being computed
SAVE_SHARE = 0.02  # of the time that saving takes at most: where it is slow, more is lost

Block = list[tuple[int, Any]]  # (row id, example)
Add = Callable[[list[Any], GradientSum], GradientSum]  # examples, and the sum so far, which it may take over


def open_parts(output: str, identity: dict, overwrite: bool) -> RunFolder:
    """The folder for the parts of `output`. UserError where another run's are there, unless `overwrite`."""
    folder = RunFolder(f"{output}.parts")
    folder.open(identity, overwrite)
    return folder


class KeptSums:
    """The sums of one run. number: which of them, by 15 digits in its file's name."""

    def __init__(self, folder: RunFolder, batch_tokens: int, device: torch.device) -> None:
        """batch_tokens: how many are tried together after a death."""
        self.folder, self.batch_tokens, self.device = folder, batch_tokens, device
        self.due = time.monotonic() + SAVE_SECONDS

    def over(
        self,
        number: int,
        blocks: Iterable[Block],
        add: Add,
        length_of: Callable[[Any], int],
        tick: Tick,
        what: str,
    ) -> tuple[GradientSum, dict[int, str]]:
        """(the sum over all examples of `blocks` that no process dies on, {row id: reason} of the others).

        length_of: in tokens. tick: told, as `what`, how many were added before.
        """
        total, done, deadly = self._load(number)
        if done:
            logger.info("resuming: %d rows were already added up", total.num_rows)
            tick(what, total.num_rows)
        for block in islice(blocks, done, None):
            total, killed = self._add_block(number, block, total, add, length_of)
            deadly |= killed
            done += 1
            if time.monotonic() >= self.due:
                self._save(number, total, done, deadly)
        return total, deadly

    def _add_block(
        self, number: int, block: Block, total: GradientSum, add: Add, length_of: Callable[[Any], int]
    ) -> tuple[GradientSum, dict[int, str]]:
        # Row ids of every target begin at 0, and a note has the name of its first; a target has two sums.
        first = number // 2 * ROWS_PER_TARGET
        lengths = {first + row_id: length_of(example) for row_id, example in block}
        attempt = Attempt.at(self.folder.uri, lengths, self.batch_tokens)
        for indices in attempt.parts():
            total = add([block[index][1] for index in indices], total)
        attempt.end()
        return total, {block[index][0]: reason for index, reason in attempt.deadly.items()}

    def _load(self, number: int) -> tuple[GradientSum, int, dict[int, str]]:
        """(sum, blocks in it, deadly rows met)."""
        uri = self.folder.sum_uri(number)
        if not storage.exists(uri):
            return GradientSum(), 0, {}
        found = tensor_file.load(uri, "sum")
        tensors = {name: tensor.to(self.device) for name, tensor in found.group("sum").items()}
        about = found.provenance
        total = GradientSum(tensors, about.num_rows, about.num_tokens, about.options["weight"])
        return total, about.options["blocks"], {int(row): why for row, why in about.options["deadly"].items()}

    def _save(self, number: int, total: GradientSum, done: int, deadly: dict[int, str]) -> None:
        started = time.monotonic()
        options = {"weight": total.weight, "blocks": done, "deadly": deadly}
        about = tensor_file.Provenance("sum", "", "", "", total.num_rows, total.num_tokens, options)
        tensors = {f"sum/{name}": tensor.cpu() for name, tensor in total.tensors.items()}
        tensor_file.save(self.folder.sum_uri(number), tensor_file.TensorFile(about, tensors))
        now = time.monotonic()
        self.due = now + max(SAVE_SECONDS, (now - started) / SAVE_SHARE)
