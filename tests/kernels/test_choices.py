"""The table of where a convolution's noise is made: every question has an answer, and whoever asks sees the same table."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import rse_fast
from rse_fast import noise
from rse_fast.kernels import triton
from rse_fast.kernels.triton import choices

ROOT = Path(__file__).parents[2]
WEIGHTS = {  # shape class: weight, groups
    "first": (torch.Size((64, 3, 3, 3)), 1),
    "pointwise": (torch.Size((256, 512, 1, 1)), 1),
    "other": (torch.Size((64, 64, 3, 3)), 1),
    "grouped": (torch.Size((64, 1, 3, 3)), 64),
}


def test_shape_classes():
    for name, (weight, groups) in WEIGHTS.items():
        assert choices.shape_class(weight, groups) == name
    assert choices.shape_class(torch.Size((512, 512, 1, 1)), 1) == "other"  # two tiles of output channels
    assert choices.shape_class(torch.Size((64, 3, 3)), 1) == "grouped"  # no 2-D kernel


def test_every_question_has_an_answer_that_exists():
    dtypes = (*triton.DTYPES, *triton.LOW_PRECISION)
    for question, (weight, groups), dtype in itertools.product(choices.WAYS, WEIGHTS.values(), dtypes):
        assert choices.look_up("Some GPU", dtype, question, weight, groups) in choices.WAYS[question], (question, weight, dtype)


def test_the_default_is_the_break_even_of_instruction_counts():
    half, wide = torch.bfloat16, torch.float32
    expected = {
        ("input", half): {"first": "in_kernel", "pointwise": "in_kernel", "other": "separate", "grouped": "separate"},
        ("input", wide): dict.fromkeys(WEIGHTS, "separate"),
        ("output", half): {"first": "separate", "pointwise": "epilogue", "other": "separate", "grouped": "separate"},
        ("output", wide): dict.fromkeys(WEIGHTS, "separate"),
        ("output", torch.int8): {**dict.fromkeys(WEIGHTS, "epilogue"), "grouped": "separate"},
        ("output", torch.float8_e4m3fn): {**dict.fromkeys(WEIGHTS, "epilogue"), "grouped": "separate"},
    }
    for (question, dtype), answers in expected.items():
        assert {name: choices.look_up("Some GPU", dtype, question, *shape) for name, shape in WEIGHTS.items()} == answers, question


def test_a_row_of_a_device_goes_first(monkeypatch):
    monkeypatch.setattr(choices, "CHOICES", {("Some GPU", "bfloat16", "input", "other"): "in_kernel", **choices.CHOICES})
    found = [choices.look_up(device, torch.bfloat16, "input", *WEIGHTS["other"]) for device in ("Some GPU", "Another")]
    assert found == ["in_kernel", "separate"]


def test_the_documentation_shows_this_table():
    assert choices.table() in (ROOT / "DESIGN.md").read_text(), choices.table()


def test_describe_tells_the_choice(monkeypatch):
    model = rse_fast.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv1d(8, 8, 1)).bfloat16())
    assert {d.noise for d in rse_fast.describe(model).layers} == {"separate"}
    monkeypatch.setattr(noise, "active_backend", lambda x: "triton")
    found = rse_fast.describe(model)
    assert [d.noise for d in found.layers] == ["in_kernel", "separate", "in_kernel", "separate"]
    assert [line.split()[-2:] for line in str(found).splitlines()[1:]] == [["triton,", d.noise] for d in found.layers]


def test_what_runs_only_without_a_device_falls_back():
    x, weight = torch.zeros(1, 3, 4, 4), torch.zeros(8, 3, 3, 3)
    assert not triton.convolves("input", x.bfloat16(), weight.bfloat16(), 1)  # no device, and this is no interpreter
    with pytest.raises(ValueError, match="backend 'triton' needs tensors on a CUDA device"):
        rse_fast.functional.conv_activate_noise(x, weight, 0.1, seed=1, backend="triton")
