# SPDX-License-Identifier: Apache-2.0
"""The language model in 8 and 4 bits, against plain arithmetic that is written out here, and through whole answers."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.engine.model.small_virst_7b import SMALL_7B, VOCABULARY, small_virst_7b
from tests.engine.model.test_virst_7b import frames_of, prompts_of
from virst_engine.errors import WeightsError
from virst_engine.model.chat_tokenizer import ChatRow
from virst_engine.model.quantised import OUTLIER, is_quantised, quantise_layers, quantised_bytes
from virst_engine.model.virst_7b import Virst7b
from virst_engine.model.virst_7b_config import Virst7bConfig
from virst_engine.model.virst_checkpoint import BASE_PARTS, expected_state
from virst_engine.model.weights_folder import (
    Manifest,
    StoredTensor,
    load_reasoner_model,
    read_manifest,
    weights_bytes,
    working_bytes,
    write_folder,
)
from virst_engine.slow.virst_7b_reasoner import WINDOWS

bnb = pytest.importorskip("bitsandbytes")

# Blocks of nf4 fill the rows of these layers.
SMALL_4BIT = replace(SMALL_7B, language=replace(SMALL_7B.language, hidden=64, feedforward=128))
BITS = pytest.mark.parametrize("bits", [8, 4])
Plain = Callable[[Tensor, Tensor], Tensor]
KINDS = {8: "Linear8bitLt", 4: "Linear4bit"}
# QLoRA, appendix E.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def model() -> Virst7b:
    return small_virst_7b(SMALL_4BIT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Virst7b) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "weights"
    write_folder(folder, model.config, model.state_dict().items(), {}, [], 40_000)
    return folder


def layers_of(model: Virst7b) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if is_quantised(f"{name}.weight")}


# --- what is quantised ---------------------------------------------------------------------------------------------


@BITS
def test_layers_of_the_decoder_blocks_are_quantised_and_nothing_else(folder: Path, model: Virst7b, bits: int) -> None:
    loaded = load_reasoner_model(folder, weight_bits=bits)
    names = {f"language_model.layers.{layer}.self_attn.{of}_proj" for layer in (0, 1) for of in "qkvo"}
    names |= {f"language_model.layers.{layer}.mlp.{of}_proj" for layer in (0, 1) for of in ("gate", "up", "down")}
    assert layers_of(loaded).keys() == names
    assert {name for name, module in loaded.named_modules() if type(module).__name__ == KINDS[bits]} == names
    for layer in layers_of(loaded).values():
        assert layer.weight.dtype == {8: torch.int8, 4: torch.uint8}[bits]
        assert not layer.training
        assert not layer.weight.requires_grad
    stored = model.state_dict()
    for name, value in loaded.named_parameters():
        if name.startswith("seg_model."):
            assert value.device.type == "meta"
        elif not is_quantised(name):
            assert torch.equal(value, stored[name]), name


def test_sixteen_bits_are_the_weights_as_they_are_stored(folder: Path, model: Virst7b) -> None:
    loaded = load_reasoner_model(folder, weight_bits=16)
    assert all(type(layer) is nn.Linear for layer in layers_of(loaded).values())
    assert torch.equal(prompts_of(loaded), prompts_of(model))


# --- numbers -------------------------------------------------------------------------------------------------------


def plain_int8(weight: Tensor, x: Tensor) -> Tensor:
    """LLM.int8(): rows of weights and of inputs have a scale each; columns with an outlier are not rounded in x."""

    def rounded(rows: Tensor) -> Tensor:
        rows = rows.half().float()  # what the method starts from
        scale = rows.abs().amax(1, keepdim=True) / 127
        return torch.round(rows / scale) * scale

    is_outlier = (x.abs() >= OUTLIER).any(0)
    inputs = rounded(torch.where(is_outlier, 0.0, x)) + torch.where(is_outlier, x, 0.0)
    return inputs @ rounded(weight).T


def plain_nf4(weight: Tensor, x: Tensor) -> Tensor:
    """Each weight is the nearest of 16 levels, times the largest of its block of 64."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    level = (blocks / scale)[..., None].sub(NF4).abs().argmin(-1)
    return x @ (NF4[level] * scale).reshape(weight.shape).T


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "plain", "tolerance"), [(8, plain_int8, 4e-3), (4, plain_nf4, 8e-3)])
def test_a_layer_computes_what_the_method_says(
    tmp_path: Path, model: Virst7b, bits: int, plain: Plain, tolerance: float, dtype: torch.dtype
) -> None:
    """The rest is the rounding of bfloat16, in which 4 bits are computed by some CPUs whatever the inputs are."""
    tensors = ((name, value.to(dtype)) for name, value in model.state_dict().items())
    write_folder(tmp_path / "weights", model.config, tensors, {})
    loaded = load_reasoner_model(tmp_path / "weights", weight_bits=bits)
    for name, layer in layers_of(loaded).items():
        full = model.get_submodule(name)
        weight, bias = full.weight.to(dtype).float(), 0.0 if full.bias is None else full.bias.to(dtype).float()
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
        x[2, 7], x[4, 20] = 9.0, -30.0  # outliers
        for rows in (x, x[:1]):  # a sequence, a token
            expected = plain(weight, rows.float()) + bias
            got = layer(rows[None])[0]
            assert got.dtype == dtype
            assert relative(got.float(), expected) < tolerance, name
        lost = relative(x.float() @ weight.T + bias, plain(weight, x.float()) + bias)
        assert tolerance < lost < {8: 0.01, 4: 0.13}[bits], name  # by the method itself: it is told from no method


def test_int8_is_exact_but_for_the_last_digits(folder: Path, model: Virst7b) -> None:
    """In float32, where nothing else is rounded. Without outliers, what is left out shows, too."""
    layer = load_reasoner_model(folder, weight_bits=8).language_model.layers[0].mlp.up_proj
    weight = model.language_model.layers[0].mlp.up_proj.weight
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    x[2, 7] = 30.0
    assert relative(layer(x), plain_int8(weight, x)) < 1e-4
    everything_rounded = plain_int8(weight, x / 10) * 10  # no input is above the threshold
    assert relative(layer(x), everything_rounded) > 1e-2


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))


@pytest.mark.parametrize(("bits", "least"), [(8, 0.99), (4, 0.95)])
def test_prompts_stay_close_to_those_of_full_precision(
    folder: Path, model: Virst7b, tmp_path: Path, bits: int, least: float
) -> None:
    """Measured: 0.9996 and 0.977; with the rows of one weight of the first layer in another order at most 0.918."""
    expected = prompts_of(model, clips=2)
    assert cosine(prompts_of(load_reasoner_model(folder, weight_bits=bits), clips=2), expected) > least
    for name in layers_of(model):
        if ".layers.0." in name:
            state = model.state_dict()
            state[f"{name}.weight"] = state[f"{name}.weight"].flip(0)
            write_folder(tmp_path / name, model.config, state.items(), {})
            wrong = load_reasoner_model(tmp_path / name, weight_bits=bits)
            assert cosine(prompts_of(wrong, clips=2), expected) < least, name


@BITS
def test_words_are_the_likeliest_ones_with_all_read_anew_for_each(folder: Path, bits: int) -> None:
    """A token at a time goes another way through the kernels than a sentence does."""
    loaded, end = load_reasoner_model(folder, weight_bits=bits), VOCABULARY - 1
    visual, table = loaded.encode_short_clips(frames_of()).flatten(0, 1), loaded.language_model.embed_tokens.weight
    words = loaded.answer_tokens(visual, ChatRow((1, 2, 3), (4, 5, 6), ()), marks=(end,), ends=(end,), longest=8)
    read = torch.cat((table[[1, 2, 3]], visual, table[[4, 5, 6]]))
    assert words
    for word in words:
        hidden = loaded.language_model(inputs_embeds=read[None]).last_hidden_state[0, -1]
        logits = loaded.lm_head(hidden)
        assert logits[word] > logits.max() - 0.05 * logits.std()
        read = torch.cat((read, table[word : word + 1]))
    assert len(set(words)) > 1


# --- memory --------------------------------------------------------------------------------------------------------


def bytes_of(model: Virst7b) -> int:
    """Of all numbers that a model holds, scales included, before its first answer."""
    held = [value for name, value in model.named_parameters() if not name.startswith("seg_model.")]
    for layer in layers_of(model).values():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            held.append(layer.weight.SCB)
            assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()
        else:
            held += [layer.weight.quant_state.absmax, layer.weight.quant_state.code]
    return sum(value.nbytes for value in held)


@BITS
def test_the_bytes_that_a_budget_is_compared_with_are_those_on_the_device(folder: Path, bits: int) -> None:
    loaded = load_reasoner_model(folder, weight_bits=bits)
    counted = weights_bytes(read_manifest(folder), weight_bits=bits)
    assert bytes_of(loaded) == pytest.approx(counted, rel=0.02)
    assert counted < weights_bytes(read_manifest(folder))
    for name, layer in layers_of(loaded).items():
        scales = layer.weight.SCB if bits == 8 else layer.weight.quant_state.absmax
        shape = (layer.out_features, layer.in_features)
        assert layer.weight.nbytes + scales.nbytes == quantised_bytes(shape, bits), name


@BITS
def test_a_budget_for_fewer_bits_is_enough_for_them_alone(folder: Path, bits: int) -> None:
    manifest = read_manifest(folder)
    working = working_bytes(manifest.config, weight_bits=bits)
    needed_gib = (weights_bytes(manifest, weight_bits=bits) + working) / 2**30
    load_reasoner_model(folder, budget_gib=needed_gib * 1.001, weight_bits=bits)
    remedy = {8: "use --weight-bits 4, end what else", 4: r"\(--memory-budget-gib\), end what else"}[bits]
    with pytest.raises(WeightsError, match=rf"the budget is [\d.]+ GiB; allow more .*{remedy}"):
        load_reasoner_model(folder, budget_gib=needed_gib * 0.999, weight_bits=bits)
    with pytest.raises(WeightsError, match=r"the budget is .*load fewer bits of each weight \(--weight-bits 8 or 4\)"):
        load_reasoner_model(folder, budget_gib=needed_gib * 0.5)


MEASURE = """
import sys
from pathlib import Path
from virst_engine.model.weights_folder import load_reasoner_model

def peak() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

small, large, bits = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
load_reasoner_model(small, weight_bits=bits)  # what building a model allocates, whatever its size
before = peak()
model = load_reasoner_model(large, weight_bits=bits)
print(peak() - before)
"""


@BITS
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's /proc")
def test_a_model_is_never_held_in_full_precision(folder: Path, tmp_path: Path, bits: int) -> None:
    """About 200 MB of float32 in another process: what remains of them, a shard, and a weight in between."""
    language = replace(SMALL_4BIT.language, hidden=512, feedforward=8192, layers=4, heads=8)
    config = replace(SMALL_4BIT, language=language)
    with torch.device("meta"):
        shapes = Virst7b(config).state_dict()
    numbers = ((name, torch.full(value.shape, 0.01)) for name, value in shapes.items())
    write_folder(tmp_path / "large", config, numbers, {}, [], 16 << 20)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "large"), str(bits)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},  # glibc keeps smaller blocks when they are freed
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    manifest = read_manifest(tmp_path / "large")
    assert float(run.stdout) < 0.65 * weights_bytes(manifest)


def test_at_full_size_a_budget_sees_this() -> None:
    """The figures of the README, by arithmetic: nothing of that size was run."""
    config = Virst7bConfig()
    tensors = {
        name: StoredTensor("", "bfloat16" if name.startswith(BASE_PARTS) else "float32", tuple(value.shape))
        for name, value in expected_state(config).items()
    }
    manifest = Manifest(config, tensors, {}, {})
    layers = sum(tensor.bytes for name, tensor in tensors.items() if is_quantised(name))
    assert layers / weights_bytes(manifest) == pytest.approx(0.81, abs=0.005)
    for bits, weights_gib, needed_gib in ((16, 14.97, 15.92), (8, 8.90, 9.98), (4, 6.24, 7.31)):
        weights = weights_bytes(manifest, weight_bits=bits)
        needed = weights + working_bytes(config, WINDOWS, bits)
        assert (weights / 2**30, needed / 2**30) == pytest.approx((weights_gib, needed_gib), abs=0.006)
        layers_replaced = quantise_layers(Virst7b.without_numbers(config), bits)  # their sizes are good for 4 bits
        assert len(layers_replaced) == (0 if bits == 16 else 28 * 7)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_other_numbers_of_bits_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="weights have 16, 8 or 4 bits, got 5"):
        load_reasoner_model(folder, weight_bits=5)


def test_layers_whose_rows_blocks_do_not_fill_are_refused_in_4_bits(tmp_path: Path) -> None:
    model = small_virst_7b(SMALL_7B)
    write_folder(tmp_path / "weights", model.config, model.state_dict().items(), {})
    says = (
        "4-bit weights need layers of a multiple of 64 inputs and of 32 outputs, "
        "language_model.layers.0.self_attn.q_proj has 32 and 32; use --weight-bits 8"
    )
    with pytest.raises(WeightsError, match=re.escape(says)):
        load_reasoner_model(tmp_path / "weights", weight_bits=4)
    in_8 = prompts_of(load_reasoner_model(tmp_path / "weights", weight_bits=8))
    assert cosine(in_8, prompts_of(model)) > 0.99


@BITS
def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        WeightsError, match=r"need bitsandbytes \(.*\): pip install bitsandbytes, or use --weight-bits 16"
    ):
        load_reasoner_model(folder, weight_bits=bits)
    load_reasoner_model(folder)


@BITS
def test_an_unknown_device_is_told(folder: Path, bits: int) -> None:
    with pytest.raises(WeightsError, match=r"cannot be put on device 'cuda:99'.*set model.device"):
        load_reasoner_model(folder, "cuda:99", weight_bits=bits)


def test_nothing_is_downloaded_and_nothing_said(folder: Path, tmp_path: Path) -> None:
    """bitsandbytes fetches code for some CPUs where it finds `kernels`, and warns of every int8 layer."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **named): raise SystemExit('a kernel was asked for')")
    code = (
        "import torch; from pathlib import Path; from virst_engine.model.weights_folder import load_reasoner_model; "
        f"model = load_reasoner_model(Path({str(folder)!r}), weight_bits=8).language_model; "
        "torch.inference_mode()(model)(inputs_embeds=torch.ones(1, 3, 64))"
    )
    search = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
