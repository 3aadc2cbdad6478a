"""Which files of a folder are the weights, and that none of them is elsewhere."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.checkpoint_files import Collector, assert_same, fails, save, save_index, save_shards
from vllm_ms_models.checkpoint import list_tensors, load, open_checkpoint
from vllm_ms_models.checkpoint.files import read_json

A = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
B = {"b": np.arange(8, dtype=np.float16)}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def files(folder: Path) -> list[str]:
    return [path.name for path in open_checkpoint(folder).files]


def check_bad(folder: Path, *texts: str) -> None:
    fails(lambda: open_checkpoint(folder), str(folder), *texts)


def test_sharded(tmp_path: Path) -> None:
    names = save_shards(tmp_path, A, B)
    assert files(tmp_path) == names
    assert {name: info.path.name for name, info in list_tensors(tmp_path).items()} == {"a": names[0], "b": names[1]}
    collector = Collector()
    assert load(str(tmp_path), collector.slots(A | B), progress=False).tensors == 2
    assert_same(collector.arrays["a"], A["a"])
    assert_same(collector.arrays["b"], B["b"])


def test_an_index_in_a_subfolder_of_shards(tmp_path: Path) -> None:
    save(tmp_path / "weights" / "x.safetensors", A)
    save_index(tmp_path, {"a": "weights/x.safetensors"})
    assert list(list_tensors(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "consolidated.safetensors", "adapter_model.safetensors"], ["model.safetensors"]),
        (["model-00001-of-00001.safetensors", "consolidated.safetensors"], ["model-00001-of-00001.safetensors"]),
        (["quant_model_weights.safetensors"], ["quant_model_weights.safetensors"]),
        (["quant_model_weights.safetensors", "consolidated.safetensors"], ["quant_model_weights.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
    ],
)
def test_without_an_index(tmp_path: Path, present: list[str], chosen: list[str]) -> None:
    for name in present:
        save(tmp_path / name, A)
    assert files(tmp_path) == chosen


def test_shards_without_an_index(tmp_path: Path) -> None:
    names = save_shards(tmp_path, A, B, index=False, stem="quant_model_weights")
    assert files(tmp_path) == names
    (tmp_path / names[0]).unlink()
    check_bad(tmp_path, "lacks 1 of the 2 shards quant_model_weights-*", "number 1;", "download the model again")


def test_numbers_of_shards_are_not_believed(tmp_path: Path) -> None:
    save(tmp_path / "model-00007-of-999999999.safetensors", A)
    check_bad(tmp_path, "lacks 999999998 of the 999999999 shards", "number 1, 2, 3, 4, 5, ...")


def test_an_index_of_another_name(tmp_path: Path) -> None:
    save(tmp_path / "quant_model_weights-00001-of-00001.safetensors", A)
    save_index(
        tmp_path, {"a": "quant_model_weights-00001-of-00001.safetensors"}, "quant_model_weights.safetensors.index.json"
    )
    assert list(list_tensors(tmp_path)) == ["a"]
    save_index(tmp_path, {"a": "x.safetensors"}, "other.safetensors.index.json")
    check_bad(tmp_path, "has 2 index files", "keep the one that belongs to the weights")


def test_the_index_decides(tmp_path: Path) -> None:
    names = save_shards(tmp_path, A, B)
    save(tmp_path / SINGLE, A | B)
    assert files(tmp_path) == names


def test_missing_shards(tmp_path: Path) -> None:
    names = save_shards(tmp_path, A, B, {"c": A["a"]})
    (tmp_path / names[1]).unlink()
    check_bad(tmp_path, "1 of the 3 weight files", f"are missing: '{names[1]}'", "download the model again")
    save(tmp_path / "quant.safetensors", A)
    check_bad(tmp_path, "it does hold 'quant.safetensors': does the index belong to them?")


def test_tensor_of_the_index_is_not_in_its_shard(tmp_path: Path) -> None:
    names = save_shards(tmp_path, A, B)
    save_index(tmp_path, {"a": names[0], "b": names[1], "c": names[1], "d": names[0]})
    check_bad(tmp_path, "says that tensor 'c' is in", names[1], "does not have it", "the same holds for 'd'")
    save_index(tmp_path, {"a": names[1], "b": names[1], "z": names[0]})
    check_bad(tmp_path, "says that tensor 'a' is in", f"(it is in {names[0]})")


def test_tensor_twice(tmp_path: Path) -> None:
    names = save_shards(tmp_path, A, A | B, index=False)
    check_bad(tmp_path, "Tensor 'a' is in both", names[0], names[1], "remove the file")
    save_index(tmp_path, {"a": names[0], "b": names[1]})
    check_bad(tmp_path, "Tensor 'a' is in both")


def test_a_tensor_that_the_index_does_not_list_is_seen(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", A | B)
    save_index(tmp_path, {"a": "x.safetensors"})
    assert set(list_tensors(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not valid JSON"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "has no weight_map"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": ["a"]}', "has no weight_map"),
        (b'{"weight_map": {"a": 1}}', "maps tensor 'a' to 1"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "maps tensor 'a' to 'pytorch_model.bin'"),
    ],
)
def test_broken_index(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / INDEX).write_bytes(content)
    check_bad(tmp_path, INDEX, text)


def test_huge_or_strange_index(tmp_path: Path) -> None:
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(2**40)
    check_bad(tmp_path, "1099511627776 bytes found", "at most 100000000")
    (tmp_path / INDEX).unlink()
    os.mkfifo(tmp_path / INDEX)
    check_bad(tmp_path, "is not a file of JSON")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..//x.safetensors", "a\0.safetensors"],
)
def test_index_leads_outside(tmp_path: Path, name: str) -> None:
    save(tmp_path / "x.safetensors", A)
    folder = tmp_path / "model"
    save_index(folder, {"a": name})
    check_bad(folder, "is not a path inside of the folder", "refusing to follow it")


@pytest.mark.parametrize("name", ["\ud800.safetensors", "x" * 5000 + ".safetensors"])
def test_impossible_file_names(tmp_path: Path, name: str) -> None:
    save_index(tmp_path, {"a": name})
    check_bad(tmp_path)


@pytest.mark.parametrize("what", [SINGLE, INDEX, "linked shard", "linked subfolder"])
def test_links_outside_are_refused(tmp_path: Path, what: str) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    save(outside / "x.safetensors", A)
    save_index(outside, {"a": "x.safetensors"})
    folder.mkdir()
    if what == SINGLE:
        (folder / SINGLE).symlink_to(outside / "x.safetensors")
    elif what == INDEX:
        (folder / INDEX).symlink_to(outside / INDEX)
    elif what == "linked shard":
        (folder / "x.safetensors").symlink_to(Path("..") / "outside" / "x.safetensors")
        save_index(folder, {"a": "x.safetensors"})
    else:
        (folder / "sub").symlink_to(outside)
        save_index(folder, {"a": "sub/x.safetensors"})
    check_bad(folder, "is a symbolic link to", str(outside), "outside of the model folder", "link the whole folder")


def test_links_inside_and_a_linked_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(folder / "data" / "x", A)
    (folder / SINGLE).symlink_to("data/x")
    (tmp_path / "link").symlink_to(folder)
    assert list(list_tensors(tmp_path / "link")) == ["a"]


def test_loop_and_dangling_links(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to(SINGLE)
    check_bad(tmp_path, "are missing")
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to("nothing")
    check_bad(tmp_path, "1 of the 1 weight files", "are missing: 'model.safetensors'")


def hub_snapshot(cache: Path, repository: str = "models--org--name") -> Path:
    """As the Hugging Face hub client lays it out: everything is a link into `blobs`."""
    blobs, snapshot = cache / repository / "blobs", cache / repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, tensors in ((0, A), (1, B)):
        save(blobs / f"blob{number}", tensors)
        (snapshot / f"model-{number}.safetensors").symlink_to(f"../../blobs/blob{number}")
    (blobs / "index").write_text(json.dumps({"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}))
    (snapshot / INDEX).symlink_to("../../blobs/index")
    return snapshot


def test_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub")
    assert set(list_tensors(snapshot)) == {"a", "b"}
    (tmp_path / "cache").symlink_to(tmp_path / "hub")
    assert set(list_tensors(tmp_path / "cache" / "models--org--name" / "snapshots" / "0123abcd")) == {"a", "b"}


def test_hub_cache_stays_within_its_model(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    hub_snapshot(tmp_path, "models--org--other")
    for target in ("../../../models--org--other/blobs/blob1", "../../refs/blob1", "../../../outside"):
        path = Path(os.path.normpath(snapshot / target))
        save(path, B)
        (snapshot / "model-1.safetensors").unlink()
        (snapshot / "model-1.safetensors").symlink_to(target)
        check_bad(snapshot, "is a symbolic link to", "outside of the model folder")


def test_hub_cache_whose_blobs_are_elsewhere(tmp_path: Path) -> None:
    """An archive may bring a folder that looks like a cache, with `blobs` leading anywhere."""
    snapshot = hub_snapshot(tmp_path / "hub")
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    check_bad(snapshot, "is a symbolic link to", str(tmp_path / "elsewhere"), "outside of the model folder")


def test_read_json_stays_in_the_folder_and_is_bounded(tmp_path: Path) -> None:
    """As the descriptions of quantized weights are read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (folder / "a.json").symlink_to("../secret.json")
    fails(lambda: read_json(folder, "a.json"), "outside of the model folder")
    (folder / "b.json").symlink_to("/dev/zero")
    fails(lambda: read_json(folder, "b.json"), "outside of the model folder")
    (folder / "c.json").write_bytes(b"")
    os.truncate(folder / "c.json", 2**40)
    fails(lambda: read_json(folder, "c.json"), "1099511627776 bytes found")
    (folder / "d.json").symlink_to("nothing.json")
    fails(lambda: read_json(folder, "d.json"), "cannot be read (No such file or directory)")
    (folder / "e.json").write_text('{"a": 1}')
    assert read_json(folder, "e.json") == {"a": 1}


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"],
)
def test_pickle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    check_bad(tmp_path, f"only in formats that are not loaded ('{name}'", "convert them to safetensors")


def test_pickle_beside_safetensors_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    save(tmp_path / SINGLE, A)
    assert files(tmp_path) == [SINGLE]


def test_no_weights_or_no_folder(tmp_path: Path) -> None:
    check_bad(tmp_path, "has no weights", "model.safetensors or other *.safetensors files are expected")
    check_bad(tmp_path / "nothing", "does not exist", "give the folder that holds config.json")
    save(tmp_path / SINGLE, A)
    check_bad(tmp_path / SINGLE, "is not a folder")
