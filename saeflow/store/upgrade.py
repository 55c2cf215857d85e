"""Bring the records of an earlier format up to date."""

from __future__ import annotations

from saeflow.recipe.fingerprint import FORMAT_VERSION
from saeflow.store.artefact import Artefact
from saeflow.store.records import PartRecord, checked_text, read_checked, write_checked, write_record
from saeflow.store.store import Store


def upgrade(store: Store) -> list[str]:
    """Bring the records of a store to the format of this saeflow. Return lines that say what was done."""
    done = []
    for artefact in store.artefacts():
        before = artefact.record.format_version
        if before < FORMAT_VERSION:
            with artefact.writing():
                _upgrade(store, artefact)
            done.append(f"{artefact.id}: format {before} to {FORMAT_VERSION}")
    if read_checked(store.root / "store.json")["format_version"] < FORMAT_VERSION:
        write_checked(store.root / "store.json", {"format_version": FORMAT_VERSION})
        store.storage.send(store.root / "store.json")
    return done or [f"{store.name} has format {FORMAT_VERSION} already"]


def _upgrade(store: Store, artefact: Artefact) -> None:
    """Write into the parts what they were made from: format 1 had one generation, so that is the parts of now."""
    generation = artefact.generation()
    if generation is not None:
        inputs = [store.by_id(name) for name in artefact.record.inputs if not name.startswith("saes/")]
        artefact.publish([_upgraded(artefact, part, inputs) for part in generation.parts])
    artefact.take_format()


def _upgraded(artefact: Artefact, part: PartRecord, inputs: list[Artefact]) -> PartRecord:
    """Return the part under its new name, its files linked, not copied. From format 2 on, parts stay as they are."""
    if part.format_version > 1:
        return part
    folders = ((str(each.kind), p) for each in inputs for p in each.published().parts)
    made_from = {kind: p.folder for kind, p in folders if p.index == part.index}
    fresh = PartRecord(index=part.index, counts=part.counts, files=part.files, inputs=made_from)
    source, target = artefact.part_path(part), artefact.part_path(fresh)
    if source == target:
        write_record(target / "part.json", fresh)
        artefact.storage.send(target / "part.json")
    else:
        artefact.storage.copy_part(source, target, artefact.own_work / fresh.folder, checked_text(fresh.as_json))
    return fresh
