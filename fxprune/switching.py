"""What a program's module does in train mode: the calls that follow it, or its refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["EvalOnly", "batch_counter", "insert_refusal", "make_switchable"]

aten = torch.ops.aten


class _BatchNorm(nn.Module):
    """Batch norm over the program's tensors that follows ``training``."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        batches: Tensor | None = None,
    ) -> Tensor:
        if self.training and batches is not None:
            batches.add_(1)
        return functional.batch_norm(
            x, mean, var, weight, bias, self.training, self.momentum, self.eps
        )


class _Attention(nn.Module):
    """Scaled dot-product attention whose dropout follows ``training``."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        _: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout, is_causal, **kwargs
        )


class _FeatureDropout(nn.Module):
    """Dropout of whole channels, [batch, channels, ...], of any number of dimensions."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.feature_dropout(x, self.p, self.training)


class EvalOnly(nn.Module):
    """Refuses train mode for the module that it is a part of, and for every copy of that.

    Attributes:
        difference: where the user's model computes something else in train mode.
    """

    def __init__(self, difference: str) -> None:
        super().__init__()
        self.difference = difference
        self.eval()

    def train(self, mode: bool = True) -> EvalOnly:
        """Stays in eval mode.

        Raises:
            InputError: train mode is asked for.
        """
        if mode:
            raise InputError(
                "this model computes something else in train mode than in eval mode: "
                f"{self.difference}. The traced program knows eval mode only; make the difference "
                "a dropout or a batch norm, or train the original model."
            )
        return super().train(False)

    def forward(self) -> None:
        """Does nothing: the call keeps this module in copies of the graph."""


_DROPOUTS: dict[Any, Callable[[Any], nn.Module]] = {
    aten.dropout.default: nn.Dropout,
    aten.dropout_.default: nn.Dropout,
    aten.feature_dropout.default: _FeatureDropout,
    aten.alpha_dropout.default: nn.AlphaDropout,
}


def make_switchable(
    graph: fx.Graph, node: fx.Node, value: float, tensors: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Replaces an evaluation-mode call by a module that follows train() and eval().

    Args:
        graph: changed in place.
        node: a dropout, batch norm or attention call in it.
        value: its flag or probability in train mode.
        tensors: the program's.

    Returns:
        The module, under the name that the graph calls it by.
    """
    name = f"_switch_{node.name}"
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}
    made: nn.Module
    if node.target is aten.batch_norm.default:
        x, weight, bias, mean, var, _, momentum, eps, *_rest = node.args
        args = (x, weight, bias, mean, var)
        made = _BatchNorm(momentum, eps)  # type: ignore[arg-type]
        if (counter := batch_counter(node)) in tensors:
            with graph.inserting_before(node):
                args = (*args, graph.create_node("get_attr", counter))
    elif node.target is aten.scaled_dot_product_attention.default:
        args = node.args
        made = _Attention(value)
        kwargs = dict(node.kwargs)
    else:
        args = (node.args[0],)
        made = _DROPOUTS[node.target](node.args[1])
    with graph.inserting_before(node):
        call = graph.create_node("call_module", name, args, kwargs)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return {name: made}


def batch_counter(node: fx.Node) -> str:
    """The name that torch's batch norm gives the number of batches beside its running mean."""
    mean: Any = node.args[3]
    return str(mean.target).removesuffix("running_mean") + "num_batches_tracked"


def insert_refusal(graph: fx.Graph, difference: str) -> dict[str, nn.Module]:
    """Adds a part that refuses train mode; first, so that no other part has switched by then."""
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        graph.create_node("call_module", "_eval_only", ())
    return {"_eval_only": EvalOnly(difference)}
