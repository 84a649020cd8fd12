from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neuromf.files import read_json, write_text
from neuromf.training.telemetry import SUMMARY, Epoch, Summaries, TensorBoard, numbers

FIGURES = (
    "raw", "weighted", "denominator", "r", "t", "u_norm", "V_norm", "v_norm", "v_tilde_norm", "jvp_norm",
    "cosine_V", "cosine_v_tilde", "relative_error", "x_mean", "x_square", "x_min", "x_max",
)  # fmt: skip
FIELDS = {
    "loss_mean", "loss_std", "raw_loss_mean", "raw_loss_std", "raw_loss_fm_mean", "raw_loss_mf_mean", "velocity_norms",
    "cosine_sim_V_vc", "cosine_sim_vtilde_vc", "relative_error", "adaptive_weight", "x_hat_stats", "grad_clip_fraction",
    "grad_norm_mean", "grad_norm_std", "epoch_time_sec", "sampling", "raw_loss_by_t",
}  # fmt: skip


def record(moving: list[bool], **values: list[float]) -> dict[str, torch.Tensor]:
    """One update's figures: zero unless given."""
    figures = {name: torch.tensor(values.get(name, [0.0] * len(moving))) for name in FIGURES}
    return {**figures, "moving": torch.tensor(moving)}


def epoch_of(*records: dict[str, torch.Tensor], norms=(1.0, 3.0), clipped=(False, True)) -> Epoch:
    epoch = Epoch()
    for one, norm, clip in zip(records, norms, clipped, strict=False):
        epoch.add(one, norm, clip, 0.5)
    return epoch


def test_means_are_sums_over_counts_whatever_the_batches():
    summary = epoch_of(
        record(
            [True, False, False], raw=[9.0, 1.0, 2.0], jvp_norm=[4.0, 0.0, 0.0], r=[0.1, 0.5, 0.5], t=[0.9, 0.5, 0.5]
        ),
        record([True], raw=[3.0], jvp_norm=[8.0], r=[0.0], t=[1.0]),
    ).summary()
    assert summary["raw_loss_mean"] == pytest.approx(15 / 4)
    assert summary["raw_loss_fm_mean"] == pytest.approx(1.5)
    assert summary["raw_loss_mf_mean"] == pytest.approx(6)
    assert summary["velocity_norms"]["jvp_norm"] == pytest.approx(6)  # of the samples that have a derivative
    assert summary["sampling"]["h_zero_frac"] == pytest.approx(0.5)
    assert summary["sampling"]["h_mean"] == pytest.approx(1.8 / 4)
    assert summary["sampling"]["count"] == 4
    assert summary["raw_loss_by_t"] == [None, None, pytest.approx(1.5), None, pytest.approx(6)]
    assert summary["grad_norm_mean"] == pytest.approx(2)
    assert summary["grad_norm_std"] == pytest.approx(1)
    assert summary["grad_clip_fraction"] == pytest.approx(0.5)
    assert summary["epoch_time_sec"] == pytest.approx(1.0)


def test_the_spread_of_the_data_estimates_is_over_all_their_elements():
    elements = torch.tensor([[1.0, 3.0], [5.0, 11.0]])
    moments = {"x_mean": elements.mean(1).tolist(), "x_square": elements.square().mean(1).tolist()}
    ends = {"x_min": [1.0, 5.0], "x_max": [3.0, 11.0]}
    stats = epoch_of(record([False, False], **moments, **ends)).summary()["x_hat_stats"]
    expected = {"mean": 5.0, "std": elements.std(correction=0).item(), "min": 1.0, "max": 11.0}
    assert stats == pytest.approx(expected, rel=1e-6)


def test_all_fields_are_there_and_can_be_written():
    summary = epoch_of(record([True, False])).summary()
    assert set(summary) == FIELDS
    assert set(summary["velocity_norms"]) == {"u_norm", "compound_v_norm", "target_v_norm", "v_tilde_norm", "jvp_norm"}
    json.dumps(summary, allow_nan=False)


def test_what_an_epoch_had_no_sample_for_is_null():
    still = epoch_of(record([False, False], raw=[1.0, 2.0])).summary()
    assert still["raw_loss_mf_mean"] is None
    assert still["velocity_norms"]["jvp_norm"] is None
    assert still["cosine_sim_vtilde_vc"] is None
    assert still["raw_loss_fm_mean"] == pytest.approx(1.5)
    assert epoch_of(record([True])).summary()["raw_loss_fm_mean"] is None


def test_a_skipped_update_does_not_make_the_epoch_null():
    epoch = epoch_of(
        record([False], raw=[2.0]), record([False], raw=[math.nan], x_min=[math.nan]), norms=(1.0, math.nan)
    )
    summary = epoch.summary()
    assert summary["raw_loss_mean"] == pytest.approx(2.0)
    assert summary["grad_norm_mean"] == pytest.approx(1.0)
    assert summary["x_hat_stats"]["min"] == pytest.approx(0.0)
    json.dumps(epoch_of(record([False], raw=[math.nan]), norms=(math.nan,)).summary(), allow_nan=False)


def test_the_last_update_adds_its_own_figures():
    epoch = epoch_of(record([True]))
    epoch.close({"block_grad_norms": {"out": 0.5}, "relative_update_norm": 0.01})
    summary = epoch.summary()
    assert set(summary) == FIELDS | {"block_grad_norms", "relative_update_norm"}
    assert summary["block_grad_norms"] == {"out": 0.5}


def test_an_unfinished_epoch_survives_a_restart(tmp_path):
    records = [record([True, False], raw=[9.0, 1.0]), record([True], raw=[3.0])]
    whole, resumed = epoch_of(*records), Epoch()
    torch.save(epoch_of(records[0]).state(), tmp_path / "state.pt")
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.add(records[1], 3.0, True, 0.5)
    assert resumed.summary() == whole.summary()


# --- files -----------------------------------------------------------------------------------------------------


def numbered(epoch: int) -> dict[str, object]:
    return {
        "epoch": epoch,
        "global_step": 10 * epoch,
        "raw_loss_mean": 1.0 / epoch,
        "nested": {"a": 1.0, "b": [2.0, None]},
        "no": None,
    }


def test_every_epoch_has_its_file_and_the_array_has_all(tmp_path):
    summaries = Summaries(tmp_path, 0)
    for epoch in (1, 2):
        summaries.add(numbered(epoch))
    assert read_json(tmp_path / SUMMARY) == [numbered(1), numbered(2)]
    assert read_json(tmp_path / "diagnostics/per_epoch_metrics/epoch_002/summary.json") == numbered(2)
    assert [line[0] for line in (tmp_path / SUMMARY).read_text().splitlines()] == ["[", "{", "{", "]"]


def test_a_resumed_run_drops_the_epochs_it_will_redo(tmp_path):
    summaries = Summaries(tmp_path, 0)
    for epoch in (1, 2, 3):
        summaries.add(numbered(epoch))
    assert [e["epoch"] for e in Summaries(tmp_path, 20).epochs] == [1, 2]
    resumed = Summaries(tmp_path, 29)
    assert [e["epoch"] for e in resumed.epochs] == [1, 2]
    resumed.add(numbered(3))
    assert read_json(tmp_path / SUMMARY) == [numbered(1), numbered(2), numbered(3)]


def test_a_damaged_array_does_not_stop_a_run(tmp_path):
    write_text(tmp_path / SUMMARY, "[{")
    summaries = Summaries(tmp_path, 100)
    summaries.add(numbered(4))
    assert read_json(tmp_path / SUMMARY) == [numbered(4)]


def test_numbers_are_flat_and_of_one_kind():
    found = numbers({"epoch": 1, "global_step": 2, "a": 1, "b": {"c": True, "d": [0.5, None]}, "e": "text", "f": None})
    assert found == {"a": 1.0, "b/c": 1.0, "b/d/0": 0.5}
    assert all(type(value) is float for value in found.values())


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder / "logs")).Reload()


def test_tensorboard_gets_every_number(tmp_path):
    board = TensorBoard(tmp_path, 0)
    for epoch in (1, 2):
        board.write(numbered(epoch))
    board.close()
    found = events(tmp_path)
    assert set(found.Tags()["scalars"]) == {"raw_loss_mean", "nested/a", "nested/b/0"}
    assert [(e.step, e.value) for e in found.Scalars("raw_loss_mean")] == [(10, 1.0), (20, 0.5)]


def test_a_killed_session_leaves_its_epochs_in_tensorboard(tmp_path):
    board = TensorBoard(tmp_path, 0)
    board.write(numbered(1))
    assert [e.step for e in events(tmp_path).Scalars("raw_loss_mean")] == [10]  # not closed
    board.close()


@pytest.mark.parametrize(("saved", "redone"), [(20, [3]), (25, [3]), (10, [2, 3]), (9, [1, 2, 3])])
def test_a_resumed_run_has_every_point_once(tmp_path, saved, redone):
    for start, epochs in ((0, [1, 2, 3]), (saved, redone)):
        board = TensorBoard(tmp_path, start)
        for epoch in epochs:
            board.write(numbered(epoch))
        board.close()
    assert [e.step for e in events(tmp_path).Scalars("raw_loss_mean")] == [10, 20, 30]


def test_tensorboard_holds_the_settings_and_pictures(tmp_path):
    rows = np.zeros((4, 6, 3), dtype=np.uint8)
    rows[0, 0] = 255, 128, 0
    Image.fromarray(rows).save(tmp_path / "picture.png")
    board = TensorBoard(tmp_path, 0)
    board.settings("training:\n  lr: 0.1\n")
    board.picture("samples/decoded", tmp_path / "picture.png", 10)
    board.close()
    found = events(tmp_path)
    (text,) = found.Tensors("settings/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "```yaml\ntraining:\n  lr: 0.1\n```"
    (image,) = found.Images("samples/decoded")
    assert (image.step, image.width, image.height) == (10, 6, 4)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), rows)


def test_figures_that_only_some_objectives_have_are_summed_up_where_they_are():
    plain = epoch_of(record([True, False])).summary()
    second_head = epoch_of({**record([True, False]), "raw_v": torch.tensor([1.0, 4.0])}).summary()
    assert "raw_loss_vhead_mean" not in plain
    assert second_head["raw_loss_vhead_mean"] == 2.5
