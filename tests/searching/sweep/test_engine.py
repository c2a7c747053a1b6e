"""A pass over the layers: what is computed once, what is in memory at a time, and how a killed one resumes."""

import gc
import json
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.searching.sweep.engine import Sweep
from slrmerge.searching.sweep.model import StagedModel
from slrmerge.searching.sweep.paths import TensorAlpha
from slrmerge.searching.sweep.trie import Context
from slrmerge.searching.sweep.weights import HybridWeights
from tests.searching.sweep.models import (
    INTERVALS,
    LAYERS,
    MIXED,
    POST,
    PRE,
    SOUPS,
    Killed,
    Recorder,
    contexts,
    edit_config,
    gaps,
    hybrid,
    merged_log_probs,
    scores,
    swept,
    swept_in_memory,
    write_models,
)

ALL = [POST, PRE, *INTERVALS, *SOUPS, *MIXED]
FEW = [POST, PRE, *INTERVALS[3:6], SOUPS[1]]
IN_MEMORY, MAPPED = 1 << 30, 0


def share(folder: Path, *names: str) -> None:
    """Give the post-trained side the pre-trained bytes of all tensors with these prefixes."""
    pre, post = (load_file(folder / side / "model.safetensors") for side in ("pre", "post"))
    shared = {name: pre[name] if name.startswith(names) else tensor for name, tensor in post.items()}
    save_file(shared, folder / "post" / "model.safetensors", {"format": "pt"})


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.tobytes() == other.tobytes()


# What is computed


def test_an_embedding_that_cannot_be_loaded_by_row_gives_the_same(
    llamas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_row = swept(llamas, FEW, contexts())
    monkeypatch.setattr(StagedModel, "_named_by_row", lambda self, after: ((), ()))
    assert same(swept(llamas, FEW, contexts()), by_row)


def test_layers_that_are_the_same_on_both_sides_are_computed_once(tmp_path: Path) -> None:
    write_models(tmp_path, "llama")
    share(tmp_path, "model.layers.1.", "model.layers.3.")
    recorder = Recorder()
    log_probs = swept(tmp_path, [POST, *INTERVALS], contexts(), progress=recorder)
    #  states: what layer 0 is, then whether layer 2 is restored too
    assert sum(recorder.states) == 2 + 2 + 4 + 4
    assert max(gaps(log_probs, merged_log_probs(tmp_path, [POST, *INTERVALS], contexts(), tmp_path))) < 1e-5
    kinds: dict[tuple[bool, bool], list[np.ndarray]] = {}
    for rules, log_prob in zip([POST, *INTERVALS], log_probs, strict=True):
        start, end = rules.restore[0] if rules.restore else (LAYERS, LAYERS)
        kinds.setdefault((start <= 0 <= end, start <= 2 <= end), []).append(log_prob)
    assert sorted(map(len, kinds.values())) == [2, 2, 3, 4]
    for alike in kinds.values():
        assert all(same(alike[0], other) for other in alike)
    assert len({alike[0].tobytes() for alike in kinds.values()}) == 4


def test_a_layer_of_which_a_part_is_the_same_is_computed_for_both_sides(tmp_path: Path) -> None:
    write_models(tmp_path, "llama")
    share(tmp_path, "model.layers.1.self_attn.")
    recorder = Recorder()
    hybrids = [POST, hybrid(restore=[1, 1]), MIXED[0], hybrid(restore=[2, 2])]
    log_probs = swept(tmp_path, hybrids, contexts(), progress=recorder)
    assert max(gaps(log_probs, merged_log_probs(tmp_path, hybrids, contexts(), tmp_path))) < 1e-5
    #  layer 1: as it is, or its MLP restored, its attention alone being no change; layer 2: from there as it is twice,
    #  and from the first also with its attention and wholly restored
    assert sum(recorder.states) == 1 + 2 + 4 + 4


def test_blends_of_equal_tensors_are_computed_as_those_of_others(tmp_path: Path) -> None:
    write_models(tmp_path, "llama")
    share(tmp_path, "model.layers.0.")
    hybrids = [POST, hybrid(layers=[{"range": [0, 0], "alpha": 0.3}]), hybrid(restore=[0, 0])]
    recorder = Recorder()
    log_probs = swept(tmp_path, hybrids, contexts(), progress=recorder)
    assert sum(recorder.states) == 2 * LAYERS
    assert same(log_probs[0], log_probs[2])
    expected = merged_log_probs(tmp_path, hybrids, contexts(), tmp_path)
    assert max(gaps(log_probs, expected)) < 1e-5


def test_a_hybrid_that_overflows_gives_no_target_any_probability(tmp_path: Path) -> None:
    write_models(tmp_path, "llama")
    path = tmp_path / "pre" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    wanted = contexts()
    log_probs = swept(tmp_path, [POST, hybrid(restore=[2, 2]), hybrid(restore=[1, 1])], wanted)
    finite, overflowed, other = (scores(log_probs[[number]]) for number in range(3))
    assert (overflowed.quality == 0).all()
    assert (overflowed.diversity == 0).all()
    assert (finite.quality > 0).all()
    assert (other.quality > 0).all()
    assert (
        np.isnan(log_probs).sum(axis=(1, 2)) == sum(log_probs.shape[2] - len(context.targets) for context in wanted)
    ).all()


def test_soups_share_no_state_with_either_side(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", dtypes=(torch.bfloat16, torch.bfloat16))
    share(tmp_path, "model.layers.0.", "model.embed_tokens")
    hybrids = [POST, PRE, *SOUPS]
    recorder = Recorder()
    log_probs = swept(tmp_path, hybrids, contexts(), progress=recorder)
    assert max(gaps(log_probs, merged_log_probs(tmp_path, hybrids, contexts(), tmp_path))) < 1e-5
    #  post and pre are one up to layer 0
    assert sum(recorder.states) == LAYERS * len(hybrids) - 1


def test_equal_hybrids_are_computed_once(llamas: Path) -> None:
    twins = [hybrid(restore=[1, 2]), hybrid(layers=[{"range": [1, 2], "alpha": 1.0}]), hybrid(restore=[[1, 1], [2, 2]])]
    recorder = Recorder()
    first, second, third = swept(llamas, twins, contexts(), progress=recorder)
    assert sum(recorder.states) == LAYERS
    assert same(first, second)
    assert same(first, third)


def test_progress_reports_each_layer_and_the_head(llamas: Path) -> None:
    recorder = Recorder()
    swept(llamas, ALL, contexts(), progress=recorder)
    assert recorder.stages == [*(f"layer {k} of {LAYERS}" for k in range(1, 1 + LAYERS)), "answers"]
    assert recorder.messages == []


# How it is divided


@pytest.mark.parametrize("head_bytes", [1, 5000, 20_000])
def test_a_head_in_pieces_gives_the_same_log_probs(
    llamas: Path, monkeypatch: pytest.MonkeyPatch, head_bytes: int
) -> None:
    whole = swept(llamas, FEW, contexts())
    pieces: list[range] = []
    rows = Sweep._vocabulary_runs

    def counted(self: Sweep, width: int) -> Iterable[range]:
        for piece in rows(self, width):
            pieces.append(piece)
            yield piece

    monkeypatch.setattr(Sweep, "_vocabulary_runs", counted)
    assert max(gaps(swept_in_memory(llamas, FEW, contexts(), head_bytes=head_bytes), whole)) < 1e-6
    assert len({(piece.start, piece.stop) for piece in pieces}) > 1


@pytest.mark.parametrize("chunk_tokens", [1, 100])
def test_states_in_small_chunks_give_the_same_log_probs(llamas: Path, chunk_tokens: int) -> None:
    whole, few, many = swept(llamas, ALL, contexts()), Recorder(), Recorder()
    swept(llamas, ALL, contexts(), progress=few)
    cut = swept_in_memory(llamas, ALL, contexts(), progress=many, chunk_tokens=chunk_tokens)
    assert max(gaps(cut, whole)) < 1e-6
    assert sum(few.states) == sum(many.states)
    assert len(many.states) > len(few.states)


@pytest.mark.parametrize(
    ("dtype", "max_bytes"),
    [(torch.float32, MAPPED), (torch.float32, 30_000), (torch.float32, 100_000), (torch.bfloat16, MAPPED)],
)
def test_states_in_files_give_the_same_bits_as_states_in_memory(
    llamas: Path, tmp_path: Path, dtype: torch.dtype, max_bytes: int
) -> None:
    in_memory = swept(llamas, ALL, contexts(), dtype=dtype)
    assert same(in_memory, swept(llamas, ALL, contexts(), dtype=dtype, kept=tmp_path, max_bytes=max_bytes))
    assert [path.name for path in tmp_path.iterdir()] == ["log_probs.npz"]


def test_at_most_two_layers_of_weights_are_in_memory(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(llamas / "post")
    layer_bytes = sum(info.nbytes for name, info in checkpoint.items() if name.startswith("model.layers.0."))
    outer_bytes = checkpoint.total_bytes - LAYERS * layer_bytes
    alive: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
    most = {"layers": 0, "outer": 0}

    def watch(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            nbytes = tensor.numel() * tensor.element_size()
            kind = "layers" if ".layers." in name else "outer"
            alive[len(alive)] = weakref.ref(tensor), nbytes if kind == "layers" else -nbytes
        held = [nbytes for reference, nbytes in alive.values() if reference() is not None]
        most["layers"] = max(most["layers"], sum(nbytes for nbytes in held if nbytes > 0))
        most["outer"] = max(most["outer"], -sum(nbytes for nbytes in held if nbytes < 0))

    load, load_rows = HybridWeights.load, HybridWeights.load_rows

    def watched(self: HybridWeights, tensors: Iterable[TensorAlpha]) -> dict[str, torch.Tensor]:
        loaded = load(self, tensors)
        watch(loaded.items())
        return loaded

    def watched_rows(self: HybridWeights, tensor: TensorAlpha, rows: Sequence[int]) -> torch.Tensor:
        loaded = load_rows(self, tensor, rows)
        watch([(tensor.name, loaded)])
        return loaded

    monkeypatch.setattr(HybridWeights, "load", watched)
    monkeypatch.setattr(HybridWeights, "load_rows", watched_rows)
    gc.disable()  # weights must not need it
    try:
        swept(llamas, ALL, contexts())
    finally:
        gc.enable()
    assert layer_bytes <= most["layers"] <= 2 * layer_bytes
    assert 0 < most["outer"] <= 2 * outer_bytes
    assert len(alive) > LAYERS * 2


def test_every_variant_of_a_layer_is_read_once(llamas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[TensorAlpha] = []
    load = HybridWeights.load

    def counted(self: HybridWeights, tensors: Iterable[TensorAlpha]) -> dict[str, torch.Tensor]:
        tensors = list(tensors)
        loaded.extend(tensors)
        return load(self, tensors)

    monkeypatch.setattr(HybridWeights, "load", counted)
    swept(llamas, [POST, PRE, *INTERVALS], contexts())
    inner = [tensor for tensor in loaded if ".layers." in tensor.name]
    names = [name for name in open_checkpoint(llamas / "post").weight_map if ".layers." in name]
    assert sorted(inner) == sorted((name, alpha) for name in names for alpha in (0.0, 1.0))


# Killed and resumed


LIMITS = ((IN_MEMORY, IN_MEMORY), (MAPPED, MAPPED), (MAPPED, IN_MEMORY), (20_000, MAPPED))
"""Of memory, for a sweep that is killed and for the one that resumes."""


@pytest.mark.parametrize("limit", range(len(LIMITS)), ids=map(str, LIMITS))
def test_a_sweep_killed_anywhere_resumes_and_gives_the_same_bits(llamas: Path, tmp_path: Path, limit: int) -> None:
    hybrids, few = [POST, PRE, INTERVALS[4]], contexts()[:3]
    whole = Recorder()
    complete = swept(llamas, hybrids, few, progress=whole)
    for kill_at in range(limit % 2, len(whole.stages) + len(whole.states), 2):
        kept, killed, again = tmp_path / str(kill_at), Recorder(kill_at=kill_at), Recorder()
        with pytest.raises(Killed):
            swept(llamas, hybrids, few, kept=kept, max_bytes=LIMITS[limit][0], progress=killed)
        log_probs = swept(llamas, hybrids, few, kept=kept, max_bytes=LIMITS[limit][1], progress=again)
        assert same(log_probs, complete), kill_at
        finished = max(0, len(killed.stages) - 1 + killed.at_stage)
        assert again.stages == whole.stages[finished:], kill_at
        assert sum(again.states) == sum(whole.states)
        assert len(again.messages) == 1, kill_at
        assert [path.name for path in kept.iterdir()] == ["log_probs.npz"]


def test_a_sweep_killed_again_and_again_completes(llamas: Path, tmp_path: Path) -> None:
    complete, runs = swept(llamas, FEW, contexts()), 0
    for runs in range(100):
        try:
            log_probs = swept(
                llamas,
                FEW,
                contexts(),
                kept=tmp_path,
                max_bytes=(IN_MEMORY, MAPPED)[runs % 2],
                progress=Recorder(kill_at=6),
            )
            break
        except Killed:
            continue
    assert runs > 1
    assert same(log_probs, complete)


def test_a_complete_pass_is_not_computed_again(llamas: Path, tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    log_probs = swept(llamas, FEW, contexts(), kept=tmp_path, progress=first)
    assert same(swept(llamas, FEW, contexts(), kept=tmp_path, progress=second), log_probs)
    assert first.stages
    assert second.stages == second.states == []
    assert len(second.messages) == 1


def other_dtype(folder: Path) -> dict[str, Any]:
    return {"dtype": torch.bfloat16}


def other_config(folder: Path) -> dict[str, Any]:
    rope = json.loads((folder / "post" / "config.json").read_text())["rope_parameters"]
    edit_config(folder / "post", rope_parameters={**rope, "rope_theta": 3.0})
    return {}


def other_weights(folder: Path) -> dict[str, Any]:
    share(folder, "model.layers.0.mlp")
    return {}


CHANGES = {
    "dtype": other_dtype,
    "output dtype": lambda folder: {"output_dtype": "bfloat16"},
    "config": other_config,
    "weights": other_weights,
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_states_of_another_sweep_are_not_resumed(tmp_path: Path, change: Any, finished: bool) -> None:
    write_models(tmp_path, "llama")
    kept = tmp_path / "kept"
    if finished:
        swept(tmp_path, FEW, contexts(), kept=kept)
    else:
        with pytest.raises(Killed):
            swept(tmp_path, FEW, contexts(), kept=kept, progress=Recorder(kill_at=8))
    before = swept(tmp_path, FEW, contexts())
    others, recorder = change(tmp_path), Recorder()
    log_probs = swept(tmp_path, FEW, contexts(), kept=kept, progress=recorder, **others)
    assert same(log_probs, swept(tmp_path, FEW, contexts(), **others))
    assert not same(log_probs, before)
    assert len(recorder.stages) == LAYERS + 1


@pytest.mark.parametrize("what", ["hybrids", "ids", "targets"])
def test_the_result_of_another_request_is_not_used(llamas: Path, tmp_path: Path, what: str) -> None:
    swept(llamas, FEW, contexts(), kept=tmp_path)
    hybrids, wanted = list(FEW), contexts()
    if what == "hybrids":
        hybrids[2] = INTERVALS[0]
    elif what == "ids":
        wanted[0] = Context((*wanted[0].ids, 5), wanted[0].targets)
    else:
        wanted[0] = Context(wanted[0].ids, wanted[0].targets[::-1])
    log_probs = swept(llamas, hybrids, wanted, kept=tmp_path)
    assert same(log_probs, swept(llamas, hybrids, wanted))


@pytest.mark.parametrize("damage", [b"", b"PK", b"\x00" * 100, None])
def test_a_damaged_result_is_computed_again(llamas: Path, tmp_path: Path, damage: bytes | None) -> None:
    log_probs = swept(llamas, FEW, contexts(), kept=tmp_path)
    path = tmp_path / "log_probs.npz"
    path.write_bytes(path.read_bytes()[:-30] if damage is None else damage)
    assert same(swept(llamas, FEW, contexts(), kept=tmp_path), log_probs)


def test_damaged_states_are_reported_and_computed_again(llamas: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        swept(llamas, FEW, contexts(), kept=tmp_path, progress=Recorder(kill_at=8))
    (states,) = tmp_path.glob("states-*")
    states.write_bytes(bytes(states.stat().st_size))
    recorder = Recorder()
    log_probs = swept(llamas, FEW, contexts(), kept=tmp_path, progress=recorder)
    assert len(recorder.messages) == 1
    assert len(recorder.stages) == LAYERS + 1
    assert same(log_probs, swept(llamas, FEW, contexts()))


def test_a_sweep_without_a_folder_writes_nothing(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(llamas.rglob("*"))
    swept(llamas, FEW, contexts(), max_bytes=0)
    assert list(tmp_path.iterdir()) == []
    assert sorted(llamas.rglob("*")) == before
