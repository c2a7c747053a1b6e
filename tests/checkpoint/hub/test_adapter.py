"""An adapter on the Hub: downloaded whole, its base read by ranges."""

from pathlib import Path

from slrmerge.checkpoint.opening import open_pair
from slrmerge.merging.executor import merge
from slrmerge.merging.verify import verify
from tests.adapters import Q, lora_tensors, write_adapter
from tests.checkpoint.hub.server import HubServer
from tests.checkpoints import llama_tensors, read_back, safetensors_bytes


def test_an_adapter_on_the_hub_is_downloaded_and_its_base_read_by_ranges(hub: HubServer, tmp_path: Path) -> None:
    base = llama_tensors("base")
    hub.commit("org/base", {"config.json": b'{"num_hidden_layers": 6}', "model.safetensors": safetensors_bytes(base)})
    factors = lora_tensors(base, [f"model.layers.1.{Q}"])
    folder = write_adapter(
        tmp_path / "lora", factors, side_files={"tokenizer_config.json": "{}"}, base_model_name_or_path="org/base"
    )
    commit = hub.commit("org/lora", {path.name: path.read_bytes() for path in folder.iterdir()})
    pair = open_pair(None, "org/lora")
    assert pair.pretrained.model_name == "org/base"
    assert pair.posttrained.reference == f"{pair.pretrained.reference}+org/lora@{commit}"
    assert pair.posttrained.model_name == "org/lora"
    assert "tokenizer_config.json" in pair.posttrained.side_files
    assert pair.pretrained.is_remote
    merged = merge({"posttrained": "org/lora", "alpha": 0.5}, tmp_path / "out")
    assert read_back(merged.folder)[f"model.layers.0.{Q}.weight"] == base[f"model.layers.0.{Q}.weight"]
    assert verify(merged.folder, full=True).against_sources
    again = open_pair(pair.pretrained.reference, pair.posttrained.reference)
    assert again.posttrained.fingerprint() == pair.posttrained.fingerprint()
