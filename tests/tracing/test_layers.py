"""The traced forward of nn.LSTM, nn.GRU and nn.RNN computes what torch's computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fxprune.errors import TraceError
from fxprune.tracing.layers import guarded_layers, run_stack, traced_layers
from fxprune.tracing.packing import TracedSequence

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

LAYERS: tuple[Any, ...] = (nn.LSTM, nn.GRU, nn.RNN)
FORMS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False},
    {"num_layers": 3, "dropout": 0.5},
]


def flat(result: Any) -> list[Tensor]:
    y, states = result
    return [y, *(states if isinstance(states, tuple) else (states,))]


def same(a: Any, b: Any) -> None:
    for left, right in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [2, 3])
def test_traced_forward_equals_torch(layer: Any, form: dict[str, Any], rank: int) -> None:
    module = layer(3, 4, **form).eval()
    x = torch.randn(*((5, 3) if rank == 2 else (2, 5, 3)))
    count = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if rank == 2 else (2 if module.batch_first else 5,)
    state: Any = torch.randn(count, *batch, 4)
    state = (state, state * 2) if layer is nn.LSTM else state
    expected = module(x), module(x, state)
    with traced_layers():
        found = module(x), module(x, state)
    for a, b in zip(found, expected, strict=True):
        same(a, b)


def test_projections() -> None:
    module = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    x = torch.randn(5, 2, 3)
    expected = module(x)
    with traced_layers():
        same(module(x), expected)


def test_packed_input_gives_packed_output() -> None:
    module = nn.GRU(3, 4, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([2, 5])
    y, h = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    expected, _ = nn.utils.rnn.pad_packed_sequence(y)
    with traced_layers():
        result, h_n = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        assert isinstance(result, TracedSequence)
        padded, _ = nn.utils.rnn.pad_packed_sequence(result)
    torch.testing.assert_close(padded, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h_n, h, rtol=1e-6, atol=1e-6)


def final_state(module: nn.GRU, x: Tensor) -> Tensor:
    state: Tensor = module(pack_padded_sequence(x, torch.tensor([5, 2])))[1]
    return state


@pytest.mark.parametrize("context", [traced_layers, guarded_layers])
def test_other_threads_are_left_alone(context: Any) -> None:
    module, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    expected = final_state(module, x)
    with context(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(final_state, module, x).result(), expected)


def test_sequences_that_were_packed_before_are_run_as_they_are() -> None:
    module = nn.GRU(3, 4)
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    expected = module(packed)[1]
    with traced_layers():
        assert torch.equal(module(packed)[1], expected)


def test_one_thread_traces_at_a_time() -> None:
    forward, order = nn.GRU.forward, []

    def other() -> None:
        with guarded_layers():
            order.append("other")

    with ThreadPoolExecutor(1) as pool:
        with traced_layers():
            waits = pool.submit(other)
            with pytest.raises(TimeoutError):
                waits.result(timeout=0.02)
            order.append("first")
        waits.result()
    assert order == ["first", "other"]
    assert nn.GRU.forward is forward


def test_dropout_between_layers_draws_the_same_numbers() -> None:
    module = nn.GRU(3, 4, num_layers=3, dropout=0.5).train()
    x = torch.randn(5, 2, 3)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    with traced_layers():
        same(module(x), expected)


@pytest.mark.parametrize("context", [traced_layers, guarded_layers])
def test_forwards_are_restored_on_an_error(context: Any) -> None:
    before = [layer.forward for layer in LAYERS]
    with pytest.raises(KeyboardInterrupt), context():
        assert all(layer.forward is not f for layer, f in zip(LAYERS, before, strict=True))
        raise KeyboardInterrupt
    assert [layer.forward for layer in LAYERS] == before


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 2, 4), (1, 2, 5)])
def test_states_of_packed_sequences_are_checked_before_torch_reads_them(
    shape: tuple[int, ...],
) -> None:
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    with guarded_layers(), pytest.raises(TraceError, match=r"GRU: h_0 has shape .*expected \[1,"):
        nn.GRU(3, 4)(packed, torch.zeros(*shape))
    with guarded_layers():
        _, h_n = nn.GRU(3, 4)(packed, torch.zeros(1, 2, 4))
    assert h_n.shape == (1, 2, 4)


def test_inputs_of_other_ranks_are_refused() -> None:
    with traced_layers(), pytest.raises(TraceError, match="LSTM got an input of 4 dimensions"):
        nn.LSTM(3, 4)(torch.zeros(1, 2, 5, 3))


def test_a_stack_returns_the_final_states_of_every_layer_and_direction() -> None:
    from fxprune.tracing.layers import LayerWeights

    module: Any = nn.RNN(3, 4, num_layers=2, bidirectional=True)
    weights = [
        LayerWeights(*(getattr(module, f"{n}_l{k}{end}") for n in names))
        for k in range(2)
        for end in ("", "_reverse")
        for names in [("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    ]
    x = torch.randn(5, 2, 3)
    y, finals = run_stack("rnn_tanh", x, (None,), weights, bidirectional=True)
    expected, h_n = module(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack([f[0] for f in finals]), h_n, rtol=1e-6, atol=1e-6)
