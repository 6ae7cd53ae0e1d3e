"""The zoo is what it says: it builds, runs at the sizes it names, and covers every form."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.zoo import ZOO, Inputs, ZooModel, by_name

# oneDNN says once a process that it leaves projections to the default kernel.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

CLASSES = {"recurrent", "input", "feedforward"}

# Tensors of two or more dimensions that weigh no connections.
NO_WEIGHTS = {
    ("lstm-learned-states", "h_0"),
    ("lstm-learned-states", "c_0"),
    ("gru-learned-state", "h_0"),
    ("transformer-tagger", "position"),
    ("diarizer", "low"),
    ("diarizer", "band"),
    *(
        ("dual-path-enhancer", f"path.{norm}.{gain}")
        for norm in ("intra_norm", "inter_norm")
        for gain in ("weight", "bias")
    ),
}

# Every form that the design names, and models that have it.
FORMS: dict[str, list[str]] = {
    "LSTM": ["lstm", "lstm-final-cell"],
    "GRU": ["gru", "gru-final-state"],
    "RNN tanh": ["rnn-tanh"],
    "RNN relu": ["rnn-relu"],
    "layers 1..n": ["lstm", "lstm-two-layer", "lstm-dropout"],
    "bidirectional": ["bilstm", "bigru-two-layer", "birnn-time-major"],
    "proj_size": ["lstm-projected", "lstm-projected-two-layer", "bilstm-projected"],
    "without bias": ["gru-no-bias", "lstm-final-cell"],
    "time-major": ["birnn-time-major", "rnn-state-in-out"],
    "dropout": ["lstm-dropout", "tied-character-model"],
    "packed, sorted": ["packed-rnn-sorted"],
    "packed, unsorted": ["packed-gru-unsorted", "packed-bilstm-two-layer"],
    "packed, total length": ["packed-lstm-total-length", "luong-decoder"],
    "packed, padding value": ["packed-lstm-total-length", "packed-rnn-sorted"],
    "packed, final state": ["packed-gru-final-state", "packed-lstm-states", "pronouncer"],
    "unbatched": ["gru-unbatched"],
    "initial states given": ["bigru-state-in", "lstm-states-in-out", "packed-lstm-states"],
    "initial states learned": ["lstm-learned-states", "gru-learned-state"],
    "initial states computed": ["captioner", "lstm-encoder-decoder"],
    "projected with initial states": ["lstm-projected-states"],
    "outputs used whole": ["lstm", "gru", "bilstm"],
    "last step": ["rnn-relu", "gru-no-bias"],
    "h_n": ["gru-final-state", "bilstm-final-states", "lstm-flattened-states"],
    "c_n": ["lstm-final-cell"],
    "stacked states": ["bigru-viewed-states", "gru-summed-states", "voice-activity"],
    "final states returned": ["lstm-states-in-out", "rnn-state-in-out", "dict-output"],
    "recurrent module alone": ["bare-lstm", "bare-gru-two-layer"],
    "cell called once": ["lstm-cell-step", "gru-cell-step", "rnn-cell-step"],
    "cell in a loop": ["lstm-cell-loop", "gru-cell-loop", "rnn-cell-loop", "stacked-lstm-cells"],
    "one module called several times": ["lstm-siamese", "lstm-in-two-parts", "same-gru-twice"],
    "hand-written cell": ["manual-lstm", "manual-lstm-joint", "manual-gru", "manual-rnn"],
    "hand-written cell called once": ["manual-lstm-step"],
    "weight put together": ["manual-lstm-parts"],
    "weight reused in a row": ["same-linear-twice", "iterated-residual"],
    "output fed back": ["pronouncer", "forecaster"],
    "encoder-decoder": ["gru-encoder-decoder", "lstm-encoder-decoder", "packed-encoder-decoder"],
    "residual between layers": ["residual-lstms", "dual-path-enhancer"],
    "concat between layers": ["dense-grus", "noise-suppressor"],
    "gating between layers": ["gated-grus", "two-stage-enhancer"],
    "attention between layers": ["attention-between-lstms", "bahdanau-decoder", "luong-decoder"],
    "LayerNorm between layers": ["normalized-lstms"],
    "directions summed": ["speech-recognizer"],
    "scores by a vector": ["vector-attention"],
    "windows over time": ["vector-attention"],
    "maxout": ["vector-attention"],
    "flipped sequence": ["flipped-gru-pair"],
    "grouped RNN": ["grouped-grus", "groups-as-batch", "dual-path-enhancer"],
    "tied embedding and decoder": ["tied-character-model", "tied-projected-lm"],
    "Linear": ["mlp", "single-linear"],
    "Conv1d": ["conv-lstm", "causal-convs"],
    "Conv2d": ["conv2d-gru", "lenet", "residual-cnn"],
    "grouped convolution": ["conv-lstm", "conv2d-gru"],
    "depthwise convolution": ["conv-lstm"],
    "transposed convolution": ["conv-transpose-gru", "dual-path-enhancer"],
    "Embedding": ["bilstm-attention-pooling", "captioner"],
    "LayerNorm": ["normalized-lstms", "dual-path-enhancer", "manual-lstm-joint"],
    "GroupNorm": ["conv-transpose-gru"],
    "InstanceNorm": ["diarizer"],
    "BatchNorm": ["conv-lstm", "conv2d-gru", "residual-cnn"],
    "pooling": ["pooled-bilstm", "conv2d-gru", "lenet"],
    "activations": ["activations"],
    "GLU": ["activations"],
    "multi-head attention": ["attention-between-lstms", "transformer-tagger"],
    "scaled-dot-product attention": ["heads-attention"],
    "attention pooling": ["bilstm-attention-pooling"],
    "einsum": ["einsum-attention"],
    "reshapes": ["grouped-grus", "groups-as-batch", "heads-attention", "dual-path-enhancer"],
    "padding": ["causal-convs", "spectrogram-lstm"],
    "STFT-like framing": ["framed-gru", "spectrogram-lstm", "two-stage-enhancer"],
    "fixed time": ["mixer"],
    "dict, list and None outputs": ["dict-output", "nested-output"],
    "published recurrent shapes": [
        "two-stage-enhancer",
        "dual-path-enhancer",
        "voice-activity",
        "pronouncer",
        "diarizer",
        "tied-character-model",
        "bilstm-attention-pooling",
        "noise-suppressor",
        "row-classifier",
        "speech-recognizer",
    ],
    "published stateless shapes": ["residual-cnn", "lenet", "mlp", "transformer-tagger"],
}

every_model = pytest.mark.parametrize("model", ZOO, ids=lambda model: model.name)


def built(model: ZooModel, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.build()


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    result: Inputs = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
    return result


def sizes(model: ZooModel) -> list[tuple[int, int]]:
    """The example's (batch, time), then the nearest to (1, 1) and (3, 7) that the model takes."""
    valid = model.valid_time or (lambda time: True)
    wanted = [(1, min(t for t in range(1, 20) if valid(t)))]
    wanted += [(3, min((t for t in range(1, 20) if valid(t)), key=lambda t: abs(t - 7)))]
    others = [
        (
            batch if model.batch_varies else model.batch,
            time if model.time_varies else model.time,
        )
        for batch, time in wanted
    ]
    return list(dict.fromkeys([(model.batch, model.time), *others]))


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if leaf is not None]


def test_there_are_enough_models_with_names_of_their_own() -> None:
    names = [model.name for model in ZOO]
    assert len(names) >= 60
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert [name for name in names if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)] == []


def test_by_name() -> None:
    assert by_name("bilstm") is next(model for model in ZOO if model.name == "bilstm")
    with pytest.raises(KeyError, match="no model 'bilstn' in the zoo"):
        by_name("bilstn")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_a_model(form: str) -> None:
    names = {model.name for model in ZOO}
    assert FORMS[form]
    assert set(FORMS[form]) - names == set()


def test_every_model_stands_for_a_form() -> None:
    named = {name for names in FORMS.values() for name in names}
    assert {model.name for model in ZOO} - named == set()


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_runs_at_the_sizes_it_names(model: ZooModel, dtype: torch.dtype) -> None:
    module = built(model).eval().to(dtype)
    for batch, time in sizes(model):
        with torch.no_grad():
            outputs = tensors(module(*converted(model.inputs(batch, time), dtype)))
        assert outputs, (batch, time)
        for output in outputs:
            assert output.numel() > 0, (batch, time)
            assert output.dtype in (dtype, torch.int64), (batch, time)
            assert bool(output.isfinite().all()), (batch, time)


@every_model
def test_is_deterministic(model: ZooModel) -> None:
    before = torch.get_rng_state()
    for first, second in zip(
        (*built(model).state_dict().values(), *model.inputs(model.batch, model.time)),
        (*built(model).state_dict().values(), *model.inputs(model.batch, model.time)),
        strict=True,
    ):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


@every_model
def test_has_the_sizes_that_its_inputs_ask_for(model: ZooModel) -> None:
    shapes = {
        (batch, time): [tuple(x.shape) for x in model.inputs(batch, time)]
        for batch, time in sizes(model)
    }
    assert len({str(value) for value in shapes.values()}) == len(shapes), shapes
    assert all(
        x.dtype in (torch.float32, torch.int64) for x in model.inputs(model.batch, model.time)
    )


@every_model
def test_table_names_every_weight(model: ZooModel) -> None:
    module = built(model)
    parameters = dict(module.named_parameters())
    known = parameters | dict(module.named_buffers())
    assert set(model.classes) - set(known) == set()
    assert all(kinds and set(kinds) <= CLASSES for kinds in model.classes.values())
    unnamed = {name for name, p in parameters.items() if p.dim() >= 2} - set(model.classes)
    assert unnamed == {name for owner, name in NO_WEIGHTS if owner == model.name}


def leaf_modules(module: nn.Module) -> Iterator[nn.Module]:
    """PyTorch's own modules: each of their weights is used once in a call."""
    return (m for m in module.modules() if type(m).__module__.startswith("torch.nn"))


@every_model
def test_table_counts_every_call(model: ZooModel) -> None:
    module = built(model)  # in train mode, where no fused kernel goes past the modules
    calls: Counter[str] = Counter()
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def count(owner: nn.Module, *_: Any) -> None:
        calls.update(names[id(p)] for p in owner.parameters(recurse=False))

    for leaf in leaf_modules(module):
        leaf.register_forward_hook(count)
    with torch.random.fork_rng():
        module(*model.inputs(model.batch, model.time))
    counted = {name: len(kinds) for name, kinds in model.classes.items() if calls[name]}
    assert counted == {name: calls[name] for name in counted}
