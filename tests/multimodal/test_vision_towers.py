"""Vision towers as Cells against those of transformers, and what goes in and out of them against its functions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from tests.layer_testing import back_end, context  # noqa: F401 (autouse)
from tests.layer_testing import load as fill
from tests.multimodal.models import CASES, Prompt, picture
from vllm_ms_models import compat
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.layers.multimodal import PlacedItem
from vllm_ms_models.qwen2_5_vl.model import Qwen2_5_VLForConditionalGeneration
from vllm_ms_models.qwen2_5_vl.vision import arrange
from vllm_ms_models.registry import lookup

compat.declare_torchvision_operators()
GRIDS = [(1, 4, 6), (1, 2, 2), (3, 10, 4), (1, 14, 18), (2, 8, 8)]


@pytest.mark.parametrize("name", CASES)
def test_embeddings(name: str) -> None:
    """As near to float64 as torch's float32, up to a factor of 4 for another order of sums."""
    case = CASES[name]
    model = case.reference()
    config = model.config
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    cell: Any = lookup(case.architecture)(config, context())
    towers = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")
    weights = {key.removeprefix("model."): value for key, value in model.state_dict().items() if key.startswith(towers)}
    parts = [part for _, part in cell.cells_and_names() if hasattr(part, "slots")]
    wanted = {slot.name for part in parts for slot in part.slots() if slot.name in weights}
    for part in parts:
        if any(slot.name in weights for slot in part.slots()):
            names = {slot.name for slot in part.slots()}
            fill(part, {key: weights[key] for key in names})
        if hasattr(part, "finish_loading"):
            part.finish_loading()
    assert wanted
    given = Prompt(case.image * 3, [picture(120, 40, 1), picture(56, 56, 2), picture(200, 300, 3)]).for_torch(case)
    inputs = {key: value for key, value in given.items() if key in ("pixel_values", "image_grid_thw")}
    rows, sizes = cell.embed_items(**{key: to_mindspore(value) for key, value in inputs.items()})
    found = to_torch(rows).split(sizes)
    with torch.inference_mode():
        theirs = model.model.get_image_features(**inputs).pooler_output
        inputs["pixel_values"] = inputs["pixel_values"].double()
        exact = model.double().model.get_image_features(**inputs).pooler_output
    assert [len(part) for part in found] == [len(part) for part in exact]
    ours, wanted_rows, other = (torch.cat(list(part)).double() for part in (found, exact, theirs))
    error, torch_error = (ours - wanted_rows).abs().max(), (other - wanted_rows).abs().max()
    assert 0 < error <= 4 * torch_error


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("merge", [1, 2])
def test_windows(merge: int, window: int) -> None:
    grids = torch.tensor(GRIDS)
    found = arrange(GRIDS, merge, window)
    order, bounds = get_vision_window_index(grids, merge, window * merge * 14, 14)
    assert np.array_equal(found.order, order.numpy())
    assert found.windows == bounds.diff().tolist()
    places = get_vision_position_ids(grids, merge).reshape(-1, merge**2, 2)[order].reshape(-1, 2)
    assert np.array_equal(found.places.T, places.numpy())
    assert found.frames == [rows * columns for time, rows, columns in GRIDS for _ in range(time)]


@pytest.mark.parametrize("seed", range(5))
def test_positions(seed: int) -> None:
    """vLLM's own for the same prompt, with videos whose time goes far beyond their rows and columns."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Theirs
    from vllm.multimodal.inputs import (
        MultiModalFeatureSpec,
        MultiModalFieldConfig,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    random = np.random.default_rng(seed)
    items, features, offset = [], [], int(random.integers(5))
    for _ in range(random.integers(4)):
        modality = ("image", "video")[random.integers(2)]
        grid = np.array([random.integers(1, 5) if modality == "video" else 1, *(2 * random.integers(1, 6, 2))])
        data = {f"{modality}_grid_thw": grid}
        if modality == "video":
            data["second_per_grid_ts"] = np.array(random.choice([0.3, 1.0, 7.5]))
        size = int(grid.prod()) // 4
        items.append(PlacedItem(modality, offset, data))
        field = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        elements = {key: field.build_elems(key, torch.tensor(value)[None])[0] for key, value in data.items()}
        place = PlaceholderRange(offset=offset, length=size)
        features.append(MultiModalFeatureSpec(MultiModalKwargsItem(elements), modality, f"{offset}", place))
        offset += size + int(random.integers(3))
    tokens = offset + 3
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    theirs = SimpleNamespace(config=config)
    theirs.iter_mm_grid_thw = lambda given: Theirs.iter_mm_grid_thw(theirs, given)
    wanted, _ = Theirs.get_mrope_input_positions(theirs, list(range(tokens)), features)
    ours: Any = SimpleNamespace(merge=2, tokens_per_second=2, _text=Qwen2_5_VLForConditionalGeneration._text)
    found = Qwen2_5_VLForConditionalGeneration.item_positions(ours, tokens, items)
    assert np.array_equal(found, wanted.numpy())
