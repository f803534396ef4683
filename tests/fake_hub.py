"""A model on the hub that is in truth a local folder."""

import json
import pathlib
import shutil

import huggingface_hub
from huggingface_hub.utils import (
  SafetensorsFileMetadata,
  SafetensorsRepoMetadata,
  TensorInfo,
  filter_repo_objects,
)


def serve(monkeypatch, origin: pathlib.Path, snapshot: pathlib.Path) -> list:
  """Downloads of `some/model` copy from `origin` to `snapshot`; returns the list of them."""
  calls = []

  def snapshot_download(name, *, revision, allow_patterns):
    assert name == "some/model"
    files = filter_repo_objects([p.name for p in origin.iterdir()], allow_patterns=allow_patterns)
    snapshot.mkdir(exist_ok=True)
    calls.append((revision, sorted(files := list(files))))
    for file in files:
      shutil.copyfile(origin / file, snapshot / file)
    return str(snapshot)

  def get_safetensors_metadata(name, *, revision):
    assert (name, revision) == ("some/model", snapshot.name)
    index = origin / "model.safetensors.index.json"
    sharded = not (origin / "model.safetensors").exists()
    weight_map = json.loads(index.read_text())["weight_map"] if sharded else {}
    files = {}
    for file in set(weight_map.values()) if sharded else ["model.safetensors"]:
      with open(origin / file, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
      header.pop("__metadata__", None)
      tensors = {
        name: TensorInfo(entry["dtype"], entry["shape"], tuple(entry["data_offsets"]))
        for name, entry in header.items()
      }
      files[file] = SafetensorsFileMetadata({}, tensors)
    return SafetensorsRepoMetadata(None, sharded, weight_map, files)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
  return calls
