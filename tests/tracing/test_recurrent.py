"""One layer in one direction equals torch's own module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fxprune.errors import InputError
from fxprune.tracing.recurrent import gru, lstm, rnn, stock_operations

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

TIME, BATCH, INPUTS, HIDDEN = 5, 3, 4, 6
LENGTHS = torch.tensor([2, 5, 1])


def weights(module: nn.RNNBase, end: str = "") -> dict[str, Tensor | None]:
    names = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}
    return {k: getattr(module, f"{v}_l0{end}", None) for k, v in names.items()}


def run(module: nn.RNNBase, x: Tensor, states: list[Tensor | None], **options: Any) -> Any:
    """One direction of the module, as the functions compute it."""
    w: Any = weights(module, "_reverse" if options.get("reverse") else "")
    if isinstance(module, nn.LSTM):
        w_hr: Any = module.weight_hr_l0 if module.proj_size else None
        return lstm(x, states[0], states[1], **w, w_hr=w_hr, **options)
    if isinstance(module, nn.GRU):
        return gru(x, states[0], **w, **options)
    return rnn(x, states[0], **w, **options, nonlinearity=str(module.nonlinearity))


def reference(module: nn.RNNBase, x: Tensor, states: Any, lengths: Tensor | None) -> list[Tensor]:
    """Outputs and final states of torch's module."""
    if lengths is None:
        y, final = module(x, states)
    else:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        packed, final = module(packed, states)
        y, _ = pad_packed_sequence(packed, total_length=TIME)
    return [y, *(final if isinstance(final, tuple) else (final,))]


MODULES: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(INPUTS, HIDDEN),
    "lstm-no-bias": lambda: nn.LSTM(INPUTS, HIDDEN, bias=False),
    "lstm-projected": lambda: nn.LSTM(INPUTS, HIDDEN, proj_size=2),
    "gru": lambda: nn.GRU(INPUTS, HIDDEN),
    "gru-no-bias": lambda: nn.GRU(INPUTS, HIDDEN, bias=False),
    "rnn-tanh": lambda: nn.RNN(INPUTS, HIDDEN),
    "rnn-relu": lambda: nn.RNN(INPUTS, HIDDEN, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_forward_equals_torch(name: str, lengths: Tensor | None, given: bool) -> None:
    module = MODULES[name]()
    x = torch.randn(TIME, BATCH, INPUTS)
    outputs = getattr(module, "proj_size", 0) or HIDDEN
    states = [torch.randn(BATCH, outputs), torch.randn(BATCH, HIDDEN)]
    stacked: Any = tuple(s.unsqueeze(0) for s in states)
    if not isinstance(module, nn.LSTM):
        states, stacked = states[:1], stacked[0]
    expected = reference(module, x, stacked if given else None, lengths)
    found = run(module, x, list(states) if given else [None, None], lengths=lengths)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_reverse_equals_the_second_direction(layer: Any, lengths: Tensor | None) -> None:
    module = layer(INPUTS, HIDDEN, bidirectional=True)
    x = torch.randn(TIME, BATCH, INPUTS)
    y, *finals = reference(module, x, None, lengths)
    found = run(module, x, [None, None], lengths=lengths, reverse=True)
    torch.testing.assert_close(found[0], y[:, :, HIDDEN:], rtol=1e-6, atol=1e-6)
    for a, b in zip(found[1:], finals, strict=True):
        torch.testing.assert_close(a, b[1], rtol=1e-6, atol=1e-6)


def test_a_projection_as_wide_as_the_layer() -> None:
    """torch takes equal sizes of both states for no projection; ours must not."""
    module = nn.LSTM(INPUTS, HIDDEN).double()
    w_hr = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)
    x = torch.randn(TIME, BATCH, INPUTS, dtype=torch.float64)
    w: Any = weights(module)
    y, h_n, c_n = lstm(x, None, None, **w, w_hr=w_hr)
    h, c = torch.zeros(2, BATCH, HIDDEN, dtype=torch.float64)
    for step in range(TIME):
        gates = x[step] @ w["w_ih"].T + w["b_ih"] + h @ w["w_hh"].T + w["b_hh"]
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()) @ w_hr.T
        torch.testing.assert_close(y[step], h)
    torch.testing.assert_close(h_n, h)
    torch.testing.assert_close(c_n, c)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn-tanh"])
def test_gradients_equal_torch(name: str, lengths: Tensor | None) -> None:
    module = MODULES[name]().double()
    x = torch.randn(TIME, BATCH, INPUTS, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    ours = torch.autograd.grad(run(module, x, [None, None], lengths=lengths)[0].sin().sum(), leaves)
    theirs = torch.autograd.grad(reference(module, x, None, lengths)[0].sin().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_beyond_a_length_outputs_are_zero_and_states_stay() -> None:
    module = nn.GRU(INPUTS, HIDDEN)
    x = torch.randn(TIME, BATCH, INPUTS)
    y, h_n = run(module, x, [None], lengths=LENGTHS)
    for index, length in enumerate(LENGTHS.tolist()):
        assert not y[length:, index].any()
        torch.testing.assert_close(h_n[index], y[length - 1, index])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(TIME, BATCH, 9)}, r"sequence has shape \(5, 3, 9\); expected"),
        ({"x": torch.zeros(TIME, INPUTS)}, "sequence has shape"),
        ({"x": torch.zeros(0, BATCH, INPUTS)}, "the sequence is empty"),
        ({"h_0": torch.zeros(2, HIDDEN)}, r"h_0 has shape \(2, 6\); expected \[3, 6\]"),
        ({"h_0": torch.zeros(BATCH, 5)}, "h_0 has shape"),
        ({"c_0": torch.zeros(BATCH, 5)}, "c_0 has shape"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths has shape \(2,\); expected \[3\]"),
        ({"lengths": torch.tensor([0, 2, 5])}, "must lie between 1 and the 5 steps"),
        ({"lengths": torch.tensor([1, 2, 6])}, "must lie between 1 and the 5 steps"),
    ],
)
def test_shapes_are_checked_before_the_kernel_reads(change: dict[str, Tensor], text: str) -> None:
    w: Any = weights(nn.LSTM(INPUTS, HIDDEN))
    call: dict[str, Any] = {"x": torch.zeros(TIME, BATCH, INPUTS), "h_0": None, "c_0": None, **w}
    with pytest.raises(InputError, match=f"LSTM: .*{text}"):
        lstm(**{**call, **change})


class Layer(nn.Module):
    """The function alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w_ih, self.w_hh = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Runs a GRU without bias."""
        return gru(x, None, self.w_ih, self.w_hh)


def operations() -> set[str]:
    exported = torch.export.export(Layer(), (torch.randn(4, 2, 3),), strict=False)
    return {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}


def test_exports_see_one_marker_or_torchs_own_operation() -> None:
    assert "fxprune.gru.default" in operations()
    with stock_operations():
        stock = operations()
    assert "aten.gru.input" in stock
    assert "fxprune.gru.default" not in stock
    assert "fxprune.gru.default" in operations()


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_markers_run_outside_fxprune(name: str) -> None:
    x = torch.randn(4, 2, 3)
    layer: Any = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[name](3, 5)
    w = list(weights(layer).values())
    states = [None] * (2 if name == "lstm" else 1)
    rest: Any = {"lstm": [None, None, False], "gru": [None, False], "rnn": [None, False, "tanh"]}[
        name
    ]
    y, *_ = getattr(torch.ops.fxprune, name)(x, *states, *w, *rest)
    torch.testing.assert_close(y, layer(x)[0], rtol=1e-6, atol=1e-6)
