"""Adapters out of a run and into one: what peft loads, what it saved, and every refusal by name."""

from __future__ import annotations

import json

import pytest
import torch
from drawn_adapters import randomised
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from safetensors.torch import load_file, save_file
from stock_models import FAMILIES, E, batch_of, relative, stock_loss, stock_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from fedmoe_bindings.peft.fuse import fuse_lora
from fedmoe_bindings.peft.state import lora_of_state, read_adapter, save_adapter
from fedmoe_bindings.transformers import TransformersAdapter
from fedmoe_core.base.tensor_key import to_keys
from fedmoe_core.layer.lora import FACTORS, LoraSpec

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def live(family: str) -> tuple[TransformersAdapter, dict[str, torch.Tensor]]:
    """The simulator's model with adapters of rank 3 that change something, and its state."""
    adapter = TransformersAdapter(stock_model(family))
    state = adapter.state() | adapter.add_lora(LoraSpec(3, 4.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for key, value in state.items():
        if key.rsplit(".")[-1] in FACTORS:
            state[key] = torch.randn(value.shape, generator=generator) * 0.3
    adapter.configure(state)
    return adapter, state


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_with_the_directory_is_the_simulators_model(family, tmp_path):
    adapter, state = live(family)
    batch = batch_of()
    want = adapter.loss(batch)
    layers = lora_of_state(state, 4 / 3)
    with torch.device("meta"):
        bare = type(stock_model(family))(stock_model(family).config)
    save_adapter(bare, layers, tmp_path / "made", base="someone/model")
    model = PeftModel.from_pretrained(stock_model(family), tmp_path / "made")
    assert sum(isinstance(module, ParamWrapper) for module in model.modules()) == 2 * len(layers)
    assert relative(stock_loss(model, batch), want) < 1e-5
    assert relative(stock_loss(fuse_lora(model), batch), want) < 1e-5
    with model.disable_adapter():
        assert abs(stock_loss(model, batch) - want) > 1e-3
    assert json.loads((tmp_path / "made/adapter_config.json").read_text())["base_model_name_or_path"] == "someone/model"
    for before, after in zip(layers, read_adapter(bare, tmp_path / "made"), strict=True):
        assert after.scale == pytest.approx(before.scale, rel=1e-15)
        for name in FACTORS:
            assert torch.equal(getattr(after, name), getattr(before, name))


def test_the_same_file_as_pefts_own(tmp_path):
    config = LoraConfig(r=3, lora_alpha=4, target_modules=[], target_parameters=BOTH)
    model = randomised(get_peft_model(stock_model("qwen3_moe"), config))
    model.save_pretrained(tmp_path / "peft")
    stock = stock_model("qwen3_moe")
    save_adapter(stock, read_adapter(stock, tmp_path / "peft"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_parameters=BOTH, use_rslora=True),
        dict(target_parameters=BOTH, rank_pattern={".*down_proj": 5}, alpha_pattern={".*layers.2.*": 9}),
        dict(target_parameters=["layers.0.mlp.experts.down_proj", "layers.2.mlp.experts.gate_up_proj"]),
        dict(target_parameters=BOTH[1:]),
        dict(target_parameters=["layers.2.mlp.experts.gate_up_proj"]),
    ],
    ids=["rslora", "patterns", "one each", "down", "one layer"],
)
def test_whatever_peft_saved_changes_the_simulators_model_alike(settings, tmp_path):
    model = randomised(get_peft_model(stock_model("qwen3_moe"), LoraConfig(r=2, target_modules=[], **settings)))
    model.save_pretrained(tmp_path)
    layers = read_adapter(stock_model("qwen3_moe"), tmp_path)
    (form,) = {(lora.rank, lora.scale) for lora in layers}
    adapter = TransformersAdapter(stock_model("qwen3_moe"))
    state = adapter.state()
    adapter.add_lora(LoraSpec(form[0], form[1] * form[0]), seed=0)
    for number, lora in enumerate(layers):
        state |= to_keys(number, lora.factors)
    adapter.configure(state)
    assert relative(adapter.loss(batch_of()), stock_loss(model, batch_of())) < 1e-5
    assert abs(adapter.loss(batch_of()) - stock_loss(stock_model("qwen3_moe"), batch_of())) > 1e-4


def test_transposed_and_interleaved_experts(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_local_experts=E, vocab_size=61)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.3)
    stock = GptOssForCausalLM(GptOssConfig(**sizes, **heads))
    model = randomised(get_peft_model(stock, LoraConfig(r=3, target_modules=[], target_parameters=BOTH)))
    model.save_pretrained(tmp_path / "peft")
    bare = GptOssForCausalLM(GptOssConfig(**sizes, **heads))
    layers = read_adapter(bare, tmp_path / "peft")
    wrapper = next(m for m in model.modules() if isinstance(m, ParamWrapper) and m.parameter_name == "gate_up_proj")
    rows = wrapper.get_delta_weight("default").mT
    assert relative(layers[0].change("w_in", 4), torch.cat([rows[4, ::2], rows[4, 1::2]])) < 1e-6
    save_adapter(bare, layers, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_what_cannot_be_a_runs_adapters_is_refused(tmp_path):
    stock = stock_model("qwen3_moe")
    with pytest.raises(OSError, match=r"has no adapter_config.json; give a directory that peft saved"):
        read_adapter(stock, tmp_path)
    both = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH)
    get_peft_model(stock_model("qwen3_moe"), both).save_pretrained(tmp_path / "attention")
    with pytest.raises(ValueError, match=r"also holds .*q_proj.*; only LoRA on the experts"):
        read_adapter(stock, tmp_path / "attention")
    plain = LoraConfig(r=2, target_modules=[], target_parameters=BOTH)
    get_peft_model(stock_model("qwen3_moe"), plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="are of another model"):
        read_adapter(stock_model("qwen3_moe", moe_intermediate_size=14), tmp_path / "plain")
    with pytest.raises(ValueError, match="no stacked experts"):
        read_adapter(nn.Linear(2, 2), tmp_path / "plain")
    config = tmp_path / "plain/adapter_config.json"
    whole = json.loads(config.read_text())
    for name in ("use_dora", "lora_bias"):
        config.write_text(json.dumps(whole | {name: True}))
        with pytest.raises(ValueError, match=f"uses {name}=True; train LoRA without it"):
            read_adapter(stock, tmp_path / "plain")
    config.write_text(json.dumps(whole))
    file = tmp_path / "plain/adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_file({key: value for key, value in tensors.items() if key != lost}, file)
    with pytest.raises(ValueError, match=r"but holds no .*lora_B.weight"):
        read_adapter(stock, tmp_path / "plain")
    file.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_adapter(stock, tmp_path / "plain")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(OSError, match="a pickle is never read"):
        read_adapter(stock, tmp_path / "plain")
    layers = lora_of_state(live("qwen3_moe")[1], 1.0)
    with pytest.raises(ValueError, match="1 layers of adapters in 1 forms do not fit 2 MoE layers"):
        save_adapter(stock, layers[:1], tmp_path / "half")
