"""Token parts through the model: activations and norms of one part, written while the next batches are computed."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from saeflow.activations.engines.reader import EngineFiles, RequestRows
from saeflow.activations.norms import NORMS_FILE, Norms, norms_of
from saeflow.activations.shards import plan_layout
from saeflow.activations.writer import open_writer, to_disk_precision
from saeflow.corpus import token_parts
from saeflow.model.sites import Site, SiteReader, device_of
from saeflow.recipe.settings import ActivationsConfig
from saeflow.runtime.devices import own_stream
from saeflow.runtime.progress import Bar
from saeflow.runtime.threads import map_in_order, ranges
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord

Reading = Callable[[slice], dict[str, Tensor]]
"""Returns the activations (s, T, D) of some sequences of a part, by site."""

_QUEUE = 4
"""Forward batches that wait for the disk before the model has to wait."""


def device_of_source(source: nn.Module | EngineFiles) -> torch.device:
    """Return the device of a model; files are read by the processor."""
    return torch.device("cpu") if isinstance(source, EngineFiles) else device_of(source)


@dataclass
class Collector:
    """Runs the model over token parts of `source`, and stores the activations at the sites in `target`.

    Without a model, the activations are those that an inference engine has written.
    """

    source: Artefact
    target: Artefact
    config: ActivationsConfig
    model: nn.Module | EngineFiles
    sites: list[Site]
    workers: int
    """Forward passes at the same time."""

    @contextlib.contextmanager
    def _reading(self, part: PartRecord, vocab_ids: np.ndarray, mask: np.ndarray) -> Iterator[Reading]:
        """Give what returns the activations (s, T, D) of sequences of the part, by site."""
        if isinstance(self.model, EngineFiles):
            yield RequestRows.of(self.model, self.source, part, self.sites).read
            return

        def read(rows: slice) -> dict[str, Tensor]:
            padding = None if mask[rows].all() else torch.from_numpy(mask[rows])
            return reader.read(torch.from_numpy(vocab_ids[rows]), padding)

        with contextlib.closing(SiteReader(self.model, self.sites)) as reader:
            yield read

    def collect(self, part: PartRecord, bar: Bar) -> PartRecord:
        """Run the model over one token part and keep the activations as a part."""
        vocab_ids, mask = token_parts.read_part(self.source, part)
        n, length = vocab_ids.shape
        batches = [slice(*rows) for rows in ranges(n, self.config.forward_batch)]
        norms = Norms(self.sites, length)

        def forward(rows: slice) -> list[tuple[np.ndarray, np.ndarray]]:
            """Return the stored values and the norms of each site."""
            found = []
            with own_stream(device_of_source(self.model)):
                read = reading(rows)
                for values in (read[site.name] for site in self.sites):
                    lengths = norms_of(values)
                    stored = to_disk_precision(values, self.config, part, rows.start, float(lengths.max()))
                    found.append((stored, lengths))
            return found

        known: dict[str, str] = {}
        with (
            self.target.new_part(part.index, dict(part.counts), {"tokens": part.folder}, known) as folder,
            self._reading(part, vocab_ids, mask) as reading,
        ):
            writers = [
                open_writer(folder / site.file, plan_layout(n, length, site.width, self.config), self.config)
                for site in self.sites
            ]
            with ThreadPoolExecutor(1, "saeflow-disk") as disk:
                pending: deque[Future[None]] = deque()
                for rows, found in zip(batches, map_in_order(forward, batches, self.workers), strict=True):
                    pending += [disk.submit(w.append, block) for w, (block, _) in zip(writers, found, strict=True)]
                    norms.add([each for _, each in found], mask[rows])
                    while len(pending) > _QUEUE * len(writers):
                        pending.popleft().result()
                    bar.advance(int(mask[rows].sum()))
                for future in pending:
                    future.result()
            norms.write(folder / NORMS_FILE)
            for writer in writers:
                writer.close()
                known |= {f"{writer.path.name}/{name}": each for name, each in writer.checksums.items()}
        return self.target.made[part.index]
