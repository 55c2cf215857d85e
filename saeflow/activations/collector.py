"""Token parts through the model, or out of an engine's files: activations and norms, written as they are computed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from saeflow.activations.forward import ForwardPass
from saeflow.activations.lengths import LENGTHS_FILE, PartLengths, lengths_of
from saeflow.activations.norms import NORMS_FILE, Norms
from saeflow.activations.shards import plan_layout
from saeflow.activations.writer import as_on_disk, open_writer, to_precision
from saeflow.model.sites import Site
from saeflow.recipe.data_settings import ActivationsConfig
from saeflow.runtime.progress import Bar
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord

_Stored = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Values of one site as stored, and the norms of its vectors before and after they were rounded."""
_QUEUE = 4
"""Forward batches that wait for the disk before the model has to wait."""


@dataclass
class Collector:
    """Runs the model over token parts, and stores the activations at its sites in `target`."""

    forward: ForwardPass
    target: Artefact

    @property
    def sites(self) -> list[Site]:
        return self.forward.sites

    def collect(self, part: PartRecord, bar: Bar) -> PartRecord:
        """Run the model over one token part and keep the activations as a part."""
        source, config = self.forward.source, self.forward.config
        n, length = part.counts["n_sequences"], int(source.fact("context_length"))
        norms, lengths, known = Norms(self.sites, length), PartLengths(self.sites), dict[str, str]()

        def store(rows: slice, mask: np.ndarray, values: list[Tensor]) -> tuple[np.ndarray, list[_Stored]]:
            return mask, [_stored(each, config, part, rows.start) for each in values]

        with self.target.new_part(part.index, dict(part.counts), {"tokens": part.folder}, known) as folder:
            writers = [
                open_writer(folder / site.file, plan_layout(n, length, site.width, config), config)
                for site in self.sites
            ]
            with ThreadPoolExecutor(1, "saeflow-disk") as disk:
                pending: deque[Future[None]] = deque()
                for mask, found in self.forward.run(part, store):
                    pending += [disk.submit(w.append, block) for w, (block, *_) in zip(writers, found, strict=True)]
                    norms.add([each for _, each, _ in found], mask)
                    lengths.add([each for *_, each in found])
                    while len(pending) > _QUEUE * len(writers):
                        pending.popleft().result()
                    bar.advance(int(mask.sum()))
                for future in pending:
                    future.result()
            norms.write(folder / NORMS_FILE)
            if "median_lengths" in self.target.record.facts:  # else the other parts have none: of an earlier saeflow
                lengths.write(folder / LENGTHS_FILE)
            for writer in writers:
                writer.close()
                known |= {f"{writer.path.name}/{name}": each for name, each in writer.checksums.items()}
        return self.target.made[part.index]


def _stored(values: Tensor, config: ActivationsConfig, part: PartRecord, first: int) -> _Stored:
    """Round the values (s, T, D) of one site, once."""
    exact = lengths_of(values)
    rounded = to_precision(values, config, part, first, float(exact.max()))
    return as_on_disk(rounded), exact, exact if rounded is values else lengths_of(rounded)
