"""Leases: one writer an artefact, a dead one's work taken over, a halted one that wakes up publishes nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from saeflow.runtime.errors import UserError
from saeflow.store.artefact import Artefact, writing_all
from saeflow.store.lease import acquire, hold_lease, is_free
from saeflow.store.lease_slot import FileSlot, Owner, Slot, machine_name, start_time
from saeflow.store.records import Kind
from saeflow.store.storage.bucket import BucketSlot
from saeflow.store.storage.objects import Objects
from saeflow.store.store import Store
from tests.faults import POINTS, Runner
from tests.faults.overlap import halted, side_by_side, waiting_runner
from tests.support.small_pipeline import take_over


@pytest.fixture
def slot(tmp_path: Path) -> FileSlot:
    return FileSlot(tmp_path / "locks" / "x.lease")


@pytest.fixture
def bucket() -> Objects:
    return Objects("memory:///")


@pytest.fixture
def machines(bucket: Objects, tmp_path: Path) -> Callable[[], BucketSlot]:
    """Each call is another machine that sees the same bucket."""
    return lambda: BucketSlot(bucket, "tmp/locks/x.lease", tmp_path / "tmp" / "locks" / "x.lease")


@pytest.fixture(params=["folder", "bucket"])
def any_slot(request: pytest.FixtureRequest) -> Slot:
    if request.param == "folder":
        return request.getfixturevalue("slot")
    return request.getfixturevalue("machines")()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEFLOW_LEASE_SECONDS", "1")


def foreign(slot: FileSlot, **changes: Any) -> Owner:
    """An owner on another machine, of whom nothing but the lease is known."""
    owner = replace(Owner.here(), machine="elsewhere", about="process 7 on elsewhere (saeflow run)", **changes)
    with slot.guard():
        slot.put(owner)
    return owner


def never(seconds: float) -> None:
    raise AssertionError(f"nobody need be waited for, not for {seconds} s")


def test_a_second_writer_of_this_machine_is_refused_at_once_and_the_first_is_named(slot: FileSlot) -> None:
    named = rf"writing tokens/x: process {os.getpid()} on .*\n.*overlap = \"wait\""
    with hold_lease(slot, "tokens/x", "refuse"), pytest.raises(UserError, match=named):
        acquire(slot, "tokens/x", "refuse", never)
    acquire(slot, "tokens/x", "refuse").release()
    assert [path.name for path in slot.path.parent.iterdir()] == ["x.lock"]


def test_a_second_writer_that_waits_begins_when_the_first_ends(slot: FileSlot) -> None:
    order = []

    def second() -> None:
        with hold_lease(slot, "x", "wait") as mine:
            order.append(("second", mine.waited))

    with hold_lease(slot, "x", "refuse"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append(("first", False))
    thread.join()
    assert order == [("first", False), ("second", True)]


def test_a_lease_held_for_longer_than_it_lasts_stays_its_owners(slot: FileSlot) -> None:
    with hold_lease(slot, "x", "refuse"):
        time.sleep(1.5)
        with pytest.raises(UserError, match="Another run is writing"):
            acquire(slot, "x", "refuse")


def test_a_dead_process_of_this_machine_is_followed_at_once(slot: FileSlot) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = replace(Owner.here(), pid=child.pid, born=start_time(child.pid) or 1.0, seconds=3600.0)
    child.wait()
    with slot.guard():
        slot.put(owner)
    acquire(slot, "x", "refuse", never).release()


def test_an_owner_of_this_machine_that_runs_is_left_alone_however_silent(slot: FileSlot) -> None:
    with slot.guard():
        slot.put(replace(Owner.here(), token="busy", seconds=0.2))
    over = threading.Event()
    threading.Timer(1, over.set).start()

    def sleep(seconds: float) -> None:
        if over.wait(seconds):
            slot.path.unlink(missing_ok=True)

    acquire(slot, "x", "wait", sleep).release()
    assert over.is_set()


def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(slot: FileSlot) -> None:
    with slot.guard():
        slot.put(replace(Owner.here(), born=1.0))
    acquire(slot, "x", "refuse").release()


@pytest.mark.parametrize("overlap", ["refuse", "wait"])
def test_a_silent_owner_elsewhere_is_followed_once_its_lease_has_lasted(slot: FileSlot, overlap: Any) -> None:
    foreign(slot)
    began = time.monotonic()
    acquire(slot, "x", overlap).release()
    assert time.monotonic() - began >= 1


def test_an_owner_elsewhere_that_gives_signs_of_life_is_never_followed(slot: FileSlot) -> None:
    owner, over = foreign(slot), threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(0.2):
            beats += 1
            with slot.guard():
                slot.put(replace(owner, beat=beats))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            acquire(slot, "x", "refuse")
    finally:
        over.set()
        thread.join()


def test_a_lease_is_renewed_so_that_other_machines_leave_it_alone(
    any_slot: Slot,
) -> None:
    mine = acquire(any_slot, "x", "refuse", owner=replace(Owner.here(), machine="elsewhere"))
    with pytest.raises(UserError, match="Another run is writing x"):
        acquire(any_slot, "x", "refuse")
    mine.require()
    mine.release()
    acquire(any_slot, "x", "refuse").release()


def test_a_lease_that_is_renewed_no_more_is_taken_by_other_machines(
    any_slot: Slot,
) -> None:
    lost = acquire(any_slot, "x", "refuse", owner=replace(Owner.here(), machine="elsewhere"))
    lost._over.set()
    with hold_lease(any_slot, "x", "refuse"):
        with pytest.raises(UserError, match="has taken over"):
            lost.require()
        lost.release()
        with pytest.raises(UserError, match="Another run is writing"):
            acquire(any_slot, "x", "refuse")


def test_in_a_bucket_a_release_never_takes_the_lease_from_the_next_owner(
    machines: Callable[[], BucketSlot], bucket: Objects
) -> None:
    next_owners = []

    class Slow(Objects):
        def put(self, key: str, content: bytes, tag: str | None) -> str | None:
            """The next one sees what the release has written before the release has ended."""
            found = super().put(key, content, tag)
            if content == b"{}\n" and not next_owners:
                next_owners.append(acquire(machines(), "x", "wait"))
            return found

    slow = Slow("memory:///")
    slow.store = bucket.store
    slot = machines()
    acquire(BucketSlot(slow, slot.key, slot.path), "x", "wait").release()
    with pytest.raises(UserError, match="Another run is writing"):
        acquire(machines(), "x", "refuse")
    next_owners[0].require()
    next_owners[0].release()


def test_in_a_bucket_two_that_wait_have_the_lease_one_after_the_other(machines: Callable[[], BucketSlot]) -> None:
    inside, most = [0], [0]

    def work(slot: BucketSlot) -> None:
        with hold_lease(slot, "x", "wait"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=work, args=(machines(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_an_owner_that_beats_again_keeps_the_lease_that_another_is_about_to_take(slot: FileSlot) -> None:
    owner = foreign(slot)
    silent = slot.read()[1]
    slot.beat(replace(owner, beat=1), None)
    assert not slot.swap(Owner.here(), silent)[0]
    assert slot.read()[0] == owner


def test_the_leases_of_a_dead_machine_lapse_together(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    targets = [store.artefact("saes", f"member-{n}", "00000000") for n in range(5)]
    for target in targets:
        take_over(target.slot)
    began = time.monotonic()
    with writing_all(targets):
        assert 1 <= time.monotonic() - began < len(targets), "each lease lasts a second"


def test_whether_a_lease_is_free_is_found_out_without_taking_it_and_names_the_artefact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slot = Store.create(tmp_path).artefact("tokens", "x", "00000000").slot
    take_over(slot)
    before = slot.read()
    assert is_free(slot)
    assert slot.read() == before
    assert "tokens/x-00000000 is being written by process 7 on elsewhere" in caplog.text
    assert "this" not in caplog.text.split()


def test_a_store_that_does_not_answer_holds_up_no_release_and_hides_no_error(tmp_path: Path) -> None:
    over, silent, answered = threading.Event(), threading.Event(), threading.Event()

    class Silent(Objects):
        def put(self, key: str, content: bytes, tag: str | None) -> str | None:
            if silent.is_set():
                over.wait(60)
                answered.set()
                raise UserError("The store does not answer")
            return super().put(key, content, tag)

    def interrupted() -> None:
        with hold_lease(BucketSlot(Silent("memory:///"), "x.lease", tmp_path / "x.lease"), "x", "refuse") as mine:
            mine.patience = 0.2
            silent.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not answered.is_set()
    over.set()


def test_a_release_that_fails_does_not_hide_why_the_work_ended(
    slot: FileSlot, caplog: pytest.LogCaptureFixture
) -> None:
    class ReadOnly(FileSlot):
        def swap(self, owner: Owner | None, tag: Any) -> tuple[bool, Any]:
            if owner is None:
                raise OSError("read-only")
            return super().swap(owner, tag)

    def ends() -> None:
        with hold_lease(ReadOnly(slot.path), "x", "refuse"):
            raise UserError("why the work ended")

    with pytest.raises(UserError, match="why the work ended"):
        ends()
    assert "could not be given back: read-only" in caplog.text


def test_expiry_counts_by_the_watchers_own_steady_clock(slot: FileSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(slot)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock on the wall was put back to 1970
    os.utime(slot.path, (4e9, 4e9))  # and the file is from the future
    acquire(slot, "x", "refuse").release()


def a_lease(**changes: Any) -> bytes:
    return json.dumps(vars(replace(Owner.here(), machine="elsewhere")) | changes).encode()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b'{"token": 3}', b"\0\0", b'{"token": "\x1b[2J"}', b"\xff\xfe"]
    + [a_lease(token=token) for token in ("a/b", "..", "", None)]
    + [a_lease(pid=pid) for pid in (-1, 0, 1 << 70, math.inf)]
    + [a_lease(seconds=seconds) for seconds in (math.nan, 0, -1, 1e9)],
)
def test_nonsense_in_the_place_of_a_lease_belongs_to_nobody(slot: FileSlot, content: bytes) -> None:
    slot.path.parent.mkdir()
    slot.path.write_bytes(content)
    acquire(slot, "x", "refuse").release()


@pytest.mark.parametrize("seconds", ["1m", "nan", "0", "-5", "inf", "100000"])
def test_a_length_of_leases_that_is_none_is_refused_with_what_it_may_be(
    slot: FileSlot, monkeypatch: pytest.MonkeyPatch, seconds: str
) -> None:
    monkeypatch.setenv("SAEFLOW_LEASE_SECONDS", seconds)
    with pytest.raises(UserError, match=rf"SAEFLOW_LEASE_SECONDS is '{seconds}', .* from 1 to 86,400"):
        acquire(slot, "x", "refuse")


def test_an_argument_that_is_no_text_keeps_nobody_from_work(slot: FileSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["saeflow", "run", os.fsdecode(b"rec\xe9.toml")])
    with hold_lease(slot, "x", "refuse") as mine:
        assert "saeflow run rec?.toml" in mine.owner.about
        assert slot.read()[0] == mine.owner


def test_a_process_of_which_the_system_shows_only_its_number_is_watched_not_taken_for_dead(
    slot: FileSlot, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = replace(Owner.here(), pid=os.getppid(), token="hidden")
    read, hidden = Path.read_bytes, f"/proc/{owner.pid}/stat"

    def read_bytes(self: Path) -> bytes:
        if str(self) == hidden:
            raise PermissionError
        return read(self)

    def refused(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(psutil, "Process", refused)
    assert not owner.is_gone()
    assert not owner.lives()
    with slot.guard():
        slot.put(owner)
    began = time.monotonic()
    acquire(slot, "x", "refuse").release()
    assert time.monotonic() - began >= 1


def test_what_another_process_calls_itself_is_shown_harmless(slot: FileSlot) -> None:
    owner = foreign(slot)
    with slot.guard():
        slot.put(replace(owner, machine=machine_name(), about="\x1b[2J\u202eevil"))
    with pytest.raises(UserError) as refused:
        acquire(slot, "x", "refuse")
    assert "\x1b" not in str(refused.value)
    assert "\u202e" not in str(refused.value)


def test_of_many_that_want_a_lease_one_has_it_at_a_time(slot: FileSlot) -> None:
    inside, most, done = [0], [0], []

    def work() -> None:
        with hold_lease(slot, "x", "wait"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            inside[0] -= 1
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert len(done) == 4


def two_processes(folder: Path, kind: Kind) -> list[Artefact]:
    """One artefact as two processes see it, each of which has opened the store."""
    return [Store.create(folder).artefact(kind, "x", "00000000") for _ in range(2)]


def a_part(target: Artefact, text: str) -> None:
    with target.new_part(0, {"n": 1}) as folder:
        (folder / "data").write_text(text)


def test_who_has_lost_the_lease_publishes_nothing(tmp_path: Path) -> None:
    target = Store.create(tmp_path).artefact("tokens", "x", "00000000")

    def publish() -> None:
        with target.writing():
            target.create({})
            a_part(target, "mine")
            take_over(target.slot)
            target.publish(target.made.values())

    with pytest.raises(UserError, match=r"silent for more than 1 s, and process 7 on elsewhere"):
        publish()
    assert target.generation() is None


def test_who_finds_another_generation_than_it_began_with_publishes_nothing_lease_or_not(
    tmp_path: Path,
) -> None:
    target, other = two_processes(tmp_path, "tokens")

    def publish() -> None:
        with target.writing():
            target.create({})
            a_part(target, "mine")
            a_part(other, "theirs")
            other.publish(other.made.values())
            target.publish(target.made.values())

    with pytest.raises(UserError, match="has published tokens/x-00000000 since"):
        publish()
    assert target.published().parts == tuple(other.made.values())


def an_sae(target: Artefact, weights: str) -> None:
    with target.publish_folder({}, [], {}) as folder:
        (folder / "weights").write_text(weights)


def test_a_run_that_wakes_up_after_another_has_published_and_ended_neither_takes_its_lease_back_nor_publishes(
    tmp_path: Path,
) -> None:
    target, other = two_processes(tmp_path, "saes")

    def woken() -> None:
        with target.writing():
            [hold] = target.holds
            hold.lease._over.set()  # halted: it beats no more
            take_over(target.slot)
            an_sae(other, "theirs")
            target.slot.path.unlink()
            hold.lease.beaten -= 2
            hold.lease._over.clear()
            assert not hold.lease.renew()
            assert target.slot.read()[0] is None
            an_sae(target, "mine")

    with pytest.raises(UserError, match="silent for more than 1 s, and another run may have taken over and ended"):
        woken()
    assert (target.path / "weights").read_text() == "theirs"


def test_a_finished_sae_is_never_replaced_by_another_runs(tmp_path: Path) -> None:
    target, other = two_processes(tmp_path, "saes")

    def late() -> None:
        with target.writing():
            an_sae(other, "theirs")
            an_sae(target, "mine")

    with pytest.raises(UserError, match="has published saes/x-00000000 since"):
        late()
    assert (target.path / "weights").read_text() == "theirs"


def test_a_lease_that_somebody_removed_is_taken_back_by_an_owner_that_was_never_silent(slot: FileSlot) -> None:
    with hold_lease(slot, "x", "refuse") as mine:
        slot.path.unlink()
        assert mine.renew()
        assert slot.read()[0] == mine.owner


def test_who_has_lost_the_lease_names_no_further_files_in_the_record(tmp_path: Path) -> None:
    target = Store.create(tmp_path).artefact("features", "x", "00000000")

    def attach() -> None:
        with target.writing():
            target.create({})
            (target.path / "similar.parquet").write_text("mine")
            take_over(target.slot)
            target.add_files(["similar.parquet"])

    with pytest.raises(UserError, match="has taken over"):
        attach()
    assert target.record.files == []


def test_a_writer_that_wakes_up_late_writes_into_nobody_elses_part(tmp_path: Path) -> None:
    target, other = two_processes(tmp_path, "tokens")

    def woken() -> None:
        with target.writing(), target.new_part(0, {}) as late:
            target.holds[-1].lease._over.set()  # halted: it beats no more
            take_over(target.slot)
            with other.writing(), other.new_part(0, {}) as folder:
                (folder / "data").write_text("theirs")
                late.mkdir(parents=True, exist_ok=True)  # as a writer of shards does
                for name in ("data", "shard"):
                    (late / name).write_text("mine")

    with pytest.raises(UserError, match="silent for more than 1 s"):
        woken()
    assert [file.name for file in other.made[0].files] == ["data"]
    assert other.part_file(other.made[0], "data").read_text() == "theirs"


def test_a_work_folder_that_the_next_owner_has_cleared_away_is_explained_by_the_loss(tmp_path: Path) -> None:
    target = Store.create(tmp_path).artefact("tokens", "x", "00000000")

    def write() -> None:
        with target.writing(), target.new_part(0, {}):
            take_over(target.slot)
            shutil.rmtree(target.work)

    with pytest.raises(UserError, match="has taken over"):
        write()


def test_an_error_after_the_loss_of_a_lease_is_explained_by_it(tmp_path: Path) -> None:
    target = Store.create(tmp_path).artefact("tokens", "x", "00000000")

    def write() -> None:
        with target.writing():
            take_over(target.slot)
            raise FileNotFoundError("the other has cleared the folder for work in progress")

    with pytest.raises(UserError, match="silent for more than"):
        write()


def test_a_part_that_is_there_already_is_kept_and_never_away_for_an_instant(tmp_path: Path) -> None:
    target = Store.create(tmp_path).artefact("tokens", "x", "00000000")
    a_part(target, "same")
    [folder] = (target.path / "parts").iterdir()
    node = folder.stat().st_ino
    a_part(target, "same")
    assert [each.stat().st_ino for each in (target.path / "parts").iterdir()] == [node]
    (folder / "data").write_text("SAME")
    a_part(target, "same")
    assert (folder / "data").read_text() == "same"


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return waiting_runner(tmp_path_factory.mktemp("overlap"))


@pytest.mark.long
def test_two_runs_at_once_leave_the_store_of_one(runner: Runner) -> None:
    assert side_by_side(runner) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "when"), [("collect", "in the middle of a part"), ("train", "in the middle of a checkpoint")]
)
def test_a_run_halted_past_its_lease_and_continued_leaves_the_store_of_one(
    runner: Runner, stage: str, when: str
) -> None:
    [point] = [point for point in POINTS if (point.stage, point.when) == (stage, when)]
    assert halted(runner, point) == []
