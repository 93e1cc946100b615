"""The model and its folders against transformers' GPT-2, which is the oracle."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sophia_train.errors import ConfigError, DataError, MissingInputError
from sophia_train.models import convert
from sophia_train.models.gpt2 import GPT2, GPT2Config

SMALL = GPT2Config(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=70)

variants = pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            replace(SMALL, bias=bias, scale_attn_by_inverse_layer_idx=scaled), id=f"{bias=}-{scaled=}"
        )
        for bias in (False, True)
        for scaled in (False, True)
    ],
)


def random_model(config, dtype=torch.float32):
    """A model none of whose parameters is at its initial value."""
    model = GPT2(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
        model.transformer.wte.weight[config.vocab_size :] = 0
    return model.eval()


def hugging_face_model(transformers, config, dtype=torch.float32, **options):
    content = convert.hf_config(config) | options
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**content)).to(dtype).eval()


def load(module, state):
    """Load a state dict; a tied head that is not in it is fine, anything else is not."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@variants
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients_equal_those_of_transformers(transformers, config, attention):
    ours = random_model(config, torch.float64)
    theirs = hugging_face_model(transformers, config, torch.float64, attn_implementation=attention)
    load(theirs, convert.to_hf_state(ours, config))
    idx = torch.randint(config.vocab_size, (2, config.block_size), generator=torch.Generator().manual_seed(2))
    labels = idx.roll(-1, 1)

    logits, expected = ours(idx), theirs(idx).logits
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)

    ours(idx, labels).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    as_theirs = convert.to_hf_state(gradients, config)
    for name, parameter in theirs.named_parameters():
        if config.bias or not name.endswith(".bias"):
            torch.testing.assert_close(as_theirs[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=name)


@variants
def test_our_parameters_survive_the_round_trip_bitwise(config):
    model = random_model(config)
    assert_same_tensors(
        convert.from_hf_state(convert.to_hf_state(model, config), config), dict(model.named_parameters())
    )


def test_their_parameters_survive_the_round_trip_bitwise(transformers):
    config = replace(SMALL, bias=True)
    state = {name: p.detach() for name, p in hugging_face_model(transformers, config).named_parameters()}
    state = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    assert_same_tensors(convert.to_hf_state(convert.from_hf_state(state, config), config), state)


@variants
@pytest.mark.parametrize("vocab_size", [64, 65])
def test_configurations_survive_the_round_trip(config, vocab_size):
    config = replace(config, vocab_size=vocab_size, dropout=0.2)
    content = json.loads(json.dumps(convert.hf_config(config)))
    assert convert.config_from_hf(content) == config


def test_only_the_vocabulary_of_gpt2_has_its_end_of_text():
    assert convert.hf_config(replace(SMALL, vocab_size=50257))["eos_token_id"] == 50256
    assert convert.hf_config(SMALL)["eos_token_id"] is None


@variants
def test_transformers_loads_an_exported_folder(transformers, config, tmp_path):
    model = random_model(config)
    convert.export_folder(model, tmp_path / "exported")
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "exported", output_loading_info=True, local_files_only=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    idx = torch.arange(10)[None]
    torch.testing.assert_close(theirs.eval()(idx).logits, model(idx), rtol=1e-4, atol=1e-4)
    assert_same_tensors(
        convert.from_hf_state(dict(theirs.named_parameters()), config), dict(model.named_parameters())
    )


@variants
def test_an_exported_folder_loads_as_the_same_model(config, tmp_path):
    model = random_model(config)
    convert.export_folder(model, tmp_path / "exported")
    loaded_config, state = convert.load_folder(tmp_path / "exported")
    assert loaded_config == config
    assert_same_tensors(state, dict(model.named_parameters()))
    GPT2(loaded_config).load_state_dict(state)


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_transformers_saved_loads(transformers, tmp_path, max_shard_size, dtype):
    config = replace(SMALL, bias=True, dropout=0.1)
    theirs = hugging_face_model(transformers, config, dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    loaded_config, state = convert.load_folder(tmp_path)
    assert loaded_config == config
    assert_same_tensors(convert.to_hf_state(state, config), dict(theirs.named_parameters()))


def test_a_folder_without_biases_keeps_its_mark_through_transformers(transformers, tmp_path):
    model = random_model(SMALL)
    convert.export_folder(model, tmp_path / "ours")
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    config, state = convert.load_folder(tmp_path / "theirs")
    assert config == SMALL
    assert_same_tensors(state, dict(model.named_parameters()))


def test_biases_that_were_trained_after_an_export_are_not_lost_silently():
    state = convert.to_hf_state(random_model(SMALL), SMALL)
    state["transformer.h.1.attn.c_attn.bias"][3] = 0.5
    with pytest.raises(ConfigError, match="h.1.attn.c_attn.bias is not zero.*remove that key"):
        convert.from_hf_state(state, SMALL)
    with_biases = convert.from_hf_state(state, replace(SMALL, bias=True))
    assert with_biases["transformer.h.1.attn.c_attn.bias"][3] == 0.5


def test_names_of_old_folders_are_understood():
    """The hub's gpt2 has no `transformer.` prefix and holds the causal masks beside the parameters."""
    config = replace(SMALL, bias=True)
    model = random_model(config)
    state = convert.to_hf_state(model, config)
    old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    assert_same_tensors(convert.from_hf_state(old, config), dict(model.named_parameters()))


def test_a_tied_head_is_accepted_under_either_name_and_an_untied_one_refused():
    model = random_model(SMALL)
    state = convert.to_hf_state(model, SMALL)
    embedding = state["transformer.wte.weight"]
    both = state | {"lm_head.weight": embedding.clone()}
    head_only = {name: t for name, t in both.items() if name != "transformer.wte.weight"}
    for accepted in (both, head_only):
        assert_same_tensors(convert.from_hf_state(accepted, SMALL), dict(model.named_parameters()))
    with pytest.raises(ConfigError, match="tied"):
        convert.from_hf_state(state | {"lm_head.weight": embedding + 1}, SMALL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("activation_function", "relu"),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("reorder_and_upcast_attn", True),
        ("scale_attn_weights", False),
        ("n_inner", 17),
        ("layer_norm_epsilon", 1e-6),
        ("attn_pdrop", 0.5),
        ("n_layer", 0),
        ("n_layer", "three"),
        ("n_embd", None),
        ("n_head", 3),
        ("n_head", 2.0),
        ("resid_pdrop", None),
        ("scale_attn_by_inverse_layer_idx", "yes"),
    ],
)
def test_what_the_model_cannot_express_is_refused_in_one_line(key, value):
    with pytest.raises(ConfigError, match=key.replace("resid", "(attn|embd)")) as caught:
        convert.config_from_hf(convert.hf_config(SMALL) | {key: value})
    assert "\n" not in str(caught.value)


def test_equal_spellings_and_silent_defaults_are_accepted():
    content = convert.hf_config(SMALL) | {"activation_function": "gelu_pytorch_tanh", "n_inner": 64}
    assert convert.config_from_hf(content) == SMALL
    with pytest.raises(ConfigError, match="model_type"):
        convert.config_from_hf({})
    assert convert.config_from_hf({"model_type": "gpt2"}) == GPT2Config(bias=True, dropout=0.1)


def test_tensors_that_do_not_fit_are_refused():
    state = convert.to_hf_state(random_model(SMALL), SMALL)
    name = "transformer.h.2.mlp.c_fc.weight"
    with pytest.raises(DataError, match=f"no {name}"):
        convert.from_hf_state({key: tensor for key, tensor in state.items() if key != name}, SMALL)
    with pytest.raises(DataError, match=name):
        convert.from_hf_state(state | {name: state[name].T}, SMALL)
    with pytest.raises(DataError, match=r"transformer\.h\.3"):
        convert.from_hf_state(state | {"h.3.ln_1.weight": torch.ones(16)}, SMALL)
    with pytest.raises(DataError, match="wte"):
        convert.to_hf_state({"transformer.wte.weight": torch.ones(3, 3)}, SMALL)


def test_pickled_weights_are_refused_unread(tmp_path):
    convert.export_folder(random_model(SMALL), tmp_path / "exported")
    (tmp_path / "exported" / "model.safetensors").rename(tmp_path / "exported" / "pytorch_model.bin")
    with pytest.raises(MissingInputError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        convert.load_folder(tmp_path / "exported")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"config\.json"):
        convert.load_folder(tmp_path / "nowhere")
    folder = tmp_path / "exported"
    convert.export_folder(random_model(SMALL), folder)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors is damaged"):
        convert.load_folder(folder)
    weights.unlink()
    with pytest.raises(MissingInputError, match=r"no model\.safetensors"):
        convert.load_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json"):
        convert.load_folder(folder)


@pytest.mark.parametrize("names", [{}, {"a": "../outside.safetensors"}], ids=["empty", "outside"])
def test_a_shard_index_names_files_of_its_folder(tmp_path, names):
    convert.export_folder(random_model(SMALL), tmp_path / "exported")
    weights = tmp_path / "exported" / "model.safetensors"
    save_file(load_file(weights), tmp_path / "outside.safetensors")
    weights.unlink()
    (tmp_path / "exported" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(DataError, match="names no files of this folder"):
        convert.load_folder(tmp_path / "exported")


def test_an_export_is_all_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "exported"

    def full_disk(operation, path):
        if operation == "rename" and path == target:
            raise OSError(28, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr("sophia_train.durable.before", full_disk)
        with pytest.raises(OSError, match="disk full"):
            convert.export_folder(random_model(SMALL), target)
    assert list(tmp_path.iterdir()) == []
    convert.export_folder(random_model(SMALL), target)
    with pytest.raises(FileExistsError):
        convert.export_folder(random_model(SMALL), target)
