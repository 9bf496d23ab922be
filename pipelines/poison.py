"""Rows that kill the process that computes them: found by the notes of dead processes, and put aside.

Ray starts a killed actor again and gives it the block that it had, for ever. So an actor notes in
OUT/attempts/<first row id>.json what it is about to compute, and removes the note when the block's shard is committed.
A note that is there already is from a process that died (or was killed with its driver), and the block is computed in
smaller groups, each noted first:

    the block  ->  its batches  ->  single rows, of a batch that a process died in

A row that processes died on DEATHS_ALONE times while they computed nothing else is put aside. A killed actor or a lost
machine costs its block a slower attempt and blames no row: that takes four deaths, each of them where the last one was.
A block that nothing happens to costs one small file, written and removed.

Where every row seems to kill, and none could be computed, it is not the rows: that is an error.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alphatoken import storage
from alphatoken.batching import plan_batches
from alphatoken.errors import UserError
from alphatoken.run_folder import RunFolder, row_id_runs

logger = logging.getLogger(__name__)

DEATHS_ALONE = 2  # of a row until it is put aside
DEATHS_AFTER = 3  # when all rows were computed, until that is an error
DEADLY_ROWS = 4  # that died alone, none computed: a wrong set-up
DIED = "the process died while this row was computed"

BLOCK, BATCH, ROW, AFTER = "block", "batch", "row", "after"  # what a process was computing; AFTER: writing the shard

Scored = tuple[pa.Table, dict[int, str], int]  # table, {row index: reason} to put aside, computed positions


class Attempt:
    """One more attempt at a block of encoded rows, after what earlier ones noted."""

    def __init__(
        self, output: str, table: pa.Table, batch_tokens: int, lengths: Sequence[int] | None = None
    ) -> None:
        """batch_tokens: the size of the groups that are tried after a first death. lengths: of the rows, where the
        table has no tokens.
        """
        self.output, self.table, self.batch_tokens, self.lengths = output, table, batch_tokens, lengths
        self.row_ids = table["row_id"].to_numpy()
        self.deaths: list[dict] = []  # notes of the processes that died
        self.passed = False  # whether some row of the block was ever computed
        self.deadly: dict[int, str] = {}  # {row index: reason} of rows that are put aside
        self.announced = False  # whether the whole block is noted
        if not table.num_rows:
            return
        self.uri = storage.join(output, "attempts", f"{int(self.row_ids.min()):015d}.json")
        if storage.exists(self.uri):
            note = storage.read_json(self.uri)
            self.deaths, self.passed = [*note["deaths"], note["now"]], note["passed"]
            logger.warning("a process died in the block of row %d, %d times by now", self.row_ids.min(),
                           len(self.deaths))  # fmt: skip

    @classmethod
    def at(cls, output: str, lengths: dict[int, int], batch_tokens: int) -> "Attempt":
        """An attempt at rows that are in no table. lengths: by row id, in tokens."""
        table = pa.table({"row_id": pa.array(list(lengths), pa.int64())})
        return cls(output, table, batch_tokens, list(lengths.values()))

    def score(self, compute: Callable[[pa.Table], Scored]) -> Scored:
        """`compute` on the rows, in one call if no process died on them. Rows that killed come last, without values."""
        if not self.table.num_rows:
            return compute(self.table)
        failures: dict[int, str] = {}
        tables, computed, done = [], 0, 0
        for indices in self.parts():
            table, failed, positions = compute(self.table.take(indices))
            failures |= {done + index: reason for index, reason in failed.items()}
            tables.append(table)
            done += len(indices)
            computed += positions
        if not tables:  # every row kills: what the others would have as columns
            tables.append(compute(self.table.slice(0, 0))[0])
        if self.deadly:
            tables.append(self.table.take(list(self.deadly)))
            failures |= dict(enumerate(self.deadly.values(), start=done))
        return pa.concat_tables(tables, promote_options="default"), failures, computed

    def parts(self) -> Iterator[list[int]]:
        """Row indices that are to be computed together: each is noted when it is asked for, and done with when the
        next one is. Rows in `deadly` are in none. UserError where the deaths are not the rows' own.
        """
        if not self.table.num_rows:
            return
        self.deadly = self._deadly_rows()
        for doing, indices in self._groups(self.deadly):
            if doing != BLOCK or not self.announced:
                self._note(doing, indices)
            yield indices
            self.passed = True
        if self.deaths:
            self._note(AFTER, [])

    def announce(self) -> None:
        """Note a first attempt before its turn comes, so that a GPU need not wait for storage. If another block kills
        the process meanwhile, this one is thought guilty once, and has the process to itself from then on.
        """
        if self.table.num_rows and not self.deaths:
            self._note(BLOCK, range(self.table.num_rows))
            self.announced = True

    def end(self) -> None:
        """The block is committed."""
        if self.table.num_rows:
            storage.remove_file(self.uri)

    def _deadly_rows(self) -> dict[int, str]:
        """{row index: reason} of the rows to put aside. UserError where the deaths are not the rows' own."""
        if sum(death["doing"] == AFTER for death in self.deaths) >= DEATHS_AFTER:
            raise UserError(
                f"the process died {DEATHS_AFTER} times while it wrote the shard of row {self.row_ids.min()}: it may "
                "lack memory; try a smaller --shard-tokens, or fewer actors per machine"
            )
        alone, times = self._deaths(ROW), self._deaths(BLOCK, BATCH, ROW)
        if alone.any() and not self.passed:
            self._check_set_up(int(np.count_nonzero(alone)))
        return {int(i): f"{DIED}, {times[i]} times" for i in np.flatnonzero(alone >= DEATHS_ALONE)}

    def _check_set_up(self, rows: int) -> None:
        """Raises UserError if no row of the run could be computed and DEADLY_ROWS seem to kill, here or in others."""
        records = RunFolder(self.output).commits()
        if any(record["counts"]["rows_out"] for record in records):
            return
        reasons = [item for record in records for item in record["reasons"].items()]
        rows += sum(count for reason, count in reasons if reason.startswith(DIED))
        if rows >= DEADLY_ROWS:
            raise UserError(
                f"the process died on each of {rows} rows alone, and no row could be scored: a wrong set-up or too "
                "little memory for the model, not the rows; Ray's logs say how it died"
            )

    def _groups(self, deadly: dict[int, str]) -> list[tuple[str, list[int]]]:
        """What is computed together, in order, as (what it is, row indices)."""
        rows = [index for index in range(self.table.num_rows) if index not in deadly]
        if not self.deaths:
            return [(BLOCK, rows)]
        narrow, alone = self._deaths(BATCH, ROW), self._deaths(ROW)
        # The likeliest first, so that little is computed again; unless it may be that all rows kill.
        suspects = sorted(
            (index for index in rows if narrow[index]), key=lambda i: -alone[i] if self.passed else alone[i]
        )
        batches = self._batches([index for index in rows if not narrow[index]])
        if not suspects and len(batches) == 1:  # the batch is the block
            suspects, batches = batches[0], []
        return [(ROW, [index]) for index in suspects] + [(BATCH, batch) for batch in batches]

    def _batches(self, rows: list[int]) -> list[list[int]]:
        lengths = self.lengths
        if lengths is None:
            columns = [name for name in self.table.column_names if name.endswith("_ids")]
            lengths = sum(pc.list_value_length(self.table[name]).to_numpy() for name in columns)
        batches = plan_batches([int(lengths[row]) for row in rows], self.batch_tokens)
        return [[rows[i] for i in batch] for batch in batches]

    def _deaths(self, *doing: str) -> np.ndarray:
        """(rows,) how often a process died at one of `doing` with the row in it."""
        counts = np.zeros(len(self.row_ids), dtype=np.int64)
        for death in self.deaths:
            for first, last in death["row_ids"] if death["doing"] in doing else ():
                counts += (self.row_ids >= first) & (self.row_ids <= last)
        return counts

    def _note(self, doing: str, indices: Sequence[int]) -> None:
        now = {"doing": doing, "row_ids": row_id_runs(self.row_ids[list(indices)])}
        storage.write_json({"now": now, "deaths": self.deaths, "passed": self.passed}, self.uri)
