"""Policies in all their forms, their errors word by word, and what protection means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.analysis import analyze
from fxprune.contract import Effect, Facts, Pass, PassResult
from fxprune.errors import ConfigError
from fxprune.passes.magnitude import Magnitude
from fxprune.policy import Policy, as_policy, protected
from fxprune.program import Program
from fxprune.tracing.tracer import trace


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Stands in for passes with options of every kind."""

    effect = Effect.LOSSY

    criterion: Any = "gradient"
    weights: Any = ()

    def run(self, program: Program, facts: Facts) -> PassResult:
        return PassResult(program, changed=False)


TABLE: dict[str, type[Pass]] = {"magnitude": Magnitude, "sensitivity": Sensitivity}
TEXT = "magnitude{sparsity=0.9,structure=connection};sensitivity{criterion=hessian}"
PASSES = (Magnitude(0.9, "connection"), Sensitivity("hessian"))


@pytest.mark.parametrize(
    "given_form",
    [Policy(PASSES), list(PASSES), PASSES, TEXT, f"  {TEXT.replace(',', ' , ')}\n"],
)
def test_all_forms_give_the_same_policy(given_form: Any) -> None:
    assert as_policy(given_form, TABLE) == Policy(PASSES)


def test_one_pass_is_a_policy() -> None:
    assert as_policy(PASSES[0], TABLE) == Policy(PASSES[:1])
    loose: tuple[Any, ...] = (PASSES[0], iter(PASSES[:1]))
    assert all(Policy(given) == Policy(PASSES[:1]) for given in loose)
    assert as_policy("sensitivity", TABLE) == Policy((Sensitivity(),))
    assert as_policy("", TABLE) == Policy(())


def test_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        'protect = ["decoder.*"]\nstates = "shrink"\n'
        '[[pass]]\nname = "magnitude"\nsparsity = 0.9\nstructure = "connection"\n'
        '[[pass]]\nname = "sensitivity"\ncriterion = "hessian"\nweights = [1, 0.5]\n'
    )
    expected = Policy(
        (PASSES[0], Sensitivity("hessian", (1, 0.5))), protect=("decoder.*",), states="shrink"
    )
    assert as_policy(path, TABLE) == expected
    assert as_policy(str(path), TABLE) == expected


def test_text_form() -> None:
    policy = Policy(PASSES, protect=["decoder.*", "a b"], states="shrink")
    assert str(policy) == f'protect=[decoder.*,"a b"];states=shrink;{TEXT}'
    assert as_policy(str(policy), TABLE) == policy


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["true", "None", "1e5", "inf", "a=b", "x;y", '"', "-", "décodeur.*"]),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


@given(
    VALUES, VALUES, st.lists(st.text(max_size=6), max_size=3), st.sampled_from(["keep", "shrink"])
)
def test_every_policy_survives_its_text_form(
    criterion: Any, weights: Any, protect: list[str], states: Any
) -> None:
    policy = Policy((Sensitivity(criterion, weights), PASSES[0]), protect, states)
    read = as_policy(str(policy), TABLE)
    assert read == policy
    assert repr(read) == repr(policy)  # 1 and 1.0 and True are equal, but not the same


BAD_TEXT = [
    (
        "magnitud{sparsity=0.9}",
        "unknown pass 'magnitud', at character 1 of policy 'magnitud{sparsity=0.9}'. There are "
        "magnitude, sensitivity. Did you mean 'magnitude'?",
    ),
    (
        "sensitivity;magnitude{sparsty=0.9}",
        "pass 'magnitude' has no option 'sparsty', at character 23 of policy "
        "'sensitivity;magnitude{sparsty=0.9}'. Its options are sparsity, structure, scope, norm, "
        "round_to. Did you mean 'sparsity'?",
    ),
    (
        "magnitude",
        "pass 'magnitude' needs the option 'sparsity', at character 1 of policy 'magnitude'",
    ),
    (
        "magnitude{sparsity=1.0}",
        "option 'sparsity' of pass 'magnitude' must be a number in [0, 1), not 1.0, at character 1 "
        "of policy 'magnitude{sparsity=1.0}'",
    ),
    (
        "magnitude{sparsity=half}",
        "option 'sparsity' of pass 'magnitude' must be a number in [0, 1), not 'half', at "
        "character 1 of policy 'magnitude{sparsity=half}'",
    ),
    (
        "magnitude{sparsity=0.5,structure=neurons}",
        "option 'structure' of pass 'magnitude' must be one of connection, row, column, neuron, "
        "not 'neurons', at character 1 of policy 'magnitude{sparsity=0.5,structure=neurons}'",
    ),
    (
        "magnitude{sparsity=0.5,sparsity=0.6}",
        "option 'sparsity' of pass 'magnitude' is given twice, at character 24 of policy "
        "'magnitude{sparsity=0.5,sparsity=0.6}'",
    ),
    (
        "magnitude{sparsity=0.5",
        "expected a ',' before the next option, or a '}', found the end, at the end of policy "
        "'magnitude{sparsity=0.5'",
    ),
    (
        "magnitude{sparsity}",
        "expected a '=' after option 'sparsity', found '}', at character 19 of policy "
        "'magnitude{sparsity}'",
    ),
    (
        "sensitivity sensitivity",
        "expected a ';' before the next pass, or the end, found 'sensitivity', at character 13 of "
        "policy 'sensitivity sensitivity'",
    ),
    (
        "sensitivity;",
        "expected the name of a pass, found the end, at the end of policy 'sensitivity;'",
    ),
    (
        "protekt=[a];sensitivity",
        "unknown setting 'protekt', at character 1 of policy 'protekt=[a];sensitivity'. Settings "
        "are protect, states. Did you mean 'protect'?",
    ),
    (
        "states=keep;states=keep",
        "setting 'states' is given twice, at character 13 of policy 'states=keep;states=keep'",
    ),
    ("states=small", "states must be 'keep' or 'shrink', not 'small'"),
    (
        "protect=5;magnitude{sparsity=0.5}",
        "protect must be a list of patterns such as ['encoder.*'], not 5",
    ),
    ("protect=none", "protect must be a list of patterns such as ['encoder.*'], not None"),
    ("protect=a", "protect must be a list of patterns such as ['encoder.*'], not 'a'"),
    (
        'sensitivity{criterion="\\x"}',
        "at character 23 of policy 'sensitivity{criterion=\"\\\\x\"}': not a JSON string "
        "(Invalid \\escape)",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXT)
def test_bad_text_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        as_policy(text, TABLE)
    assert str(caught.value) == message


BAD_FILES = [
    ("pass = 3", "'pass' must be written [[pass]], once for each pass, in {path}"),
    (
        "[[pass]]\nsparsity = 1",
        'the pass needs a name, such as name = "magnitude", in [[pass]] number 1 of {path}',
    ),
    (
        '[[pass]]\nname = "sensitivity"\n[[pass]]\nname = "magnitude"\nsparsity = 2',
        "option 'sparsity' of pass 'magnitude' must be a number in [0, 1), not 2, in [[pass]] "
        "number 2 of {path}",
    ),
    (
        'state = "keep"',
        "unknown setting 'state', at the top of {path}. Settings are protect, states. Did you mean "
        "'states'?",
    ),
    ("a = [", "{path} is not a TOML file: Invalid value (at end of document)"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_bad_file_is_refused_with_the_place(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        as_policy(path, TABLE)
    assert str(caught.value) == message.format(path=path)


def test_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        as_policy(tmp_path / "none.toml", TABLE)
    path = str(tmp_path / "none.toml")
    assert str(caught.value) == f"cannot read the policy file {path!r}: No such file or directory"


@pytest.mark.parametrize(
    ("given_form", "message"),
    [
        (3, "the path of a TOML file, not 3 (int)"),
        (
            [Magnitude],
            "a policy holds passes, not the class Magnitude: make one, such as Magnitude(...)",
        ),
        (["magnitude"], "a policy holds passes, not 'magnitude' (str)"),
    ],
)
def test_other_things_are_no_policies(given_form: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        as_policy(given_form, TABLE)
    assert str(caught.value).endswith(message)


def test_a_policy_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="a policy holds passes, not None"):
        Policy(None)  # type: ignore[arg-type]


def test_numbers_of_numpy_read_back() -> None:
    given = Magnitude(np.float64(0.5))
    assert str(given) == "magnitude{sparsity=0.5}"
    assert as_policy(str(given), TABLE) == Policy([given])


# Protection ------------------------------------------------------------------------------------


class Language(nn.Module):
    """Embedding, projected LSTM, hidden layer, tied decoder: every kind of producer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = nn.LSTM(6, 7, proj_size=5)
        self.hidden = nn.Linear(5, 6)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.decoder(torch.tanh(self.hidden(self.rnn(self.embedding(tokens))[0])))
        return scores


@pytest.fixture(scope="module")
def language() -> Program:
    return trace(Language(), torch.zeros(3, 2, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize(
    ("patterns", "tensors", "stay"),
    [
        ((), set(), {}),
        # The hidden layer feeds the tied weight, so its units are the embedding's channels.
        (("hidden.weight",), {"hidden.weight"}, {"embedding": 6}),
        (("hidden.bias",), {"hidden.bias"}, {"embedding": 6}),
        (("decoder.weight",), {"embedding.weight"}, {"embedding": 6}),
        (("rnn.weight_hr_l0",), {"rnn.weight_hr_l0"}, {"rnn.l0": 7, "rnn.l0.outputs": 5}),
        (("rnn.bias_ih*",), {"rnn.bias_ih_l0"}, {"rnn.l0": 7, "rnn.l0.outputs": 5}),
        (
            ("rnn.weight_?h_l0", "decoder.bias"),
            {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "decoder.bias"},
            {"rnn.l0": 7, "rnn.l0.outputs": 5},
        ),
    ],
)
def test_protected_tensors_keep_the_neurons_they_produce(
    language: Program, patterns: tuple[str, ...], tensors: set[str], stay: dict[str, int]
) -> None:
    neurons = analyze(language)
    found = protected(language, neurons, patterns)
    assert found.tensors == tensors
    counts = {g.name: int((found.neurons[g.neurons] & g.free).sum()) for g in neurons.groups}
    assert {name: n for name, n in counts.items() if n} == stay


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("rnn", "protect pattern 'rnn' matches no parameter. Did you mean 'rnn.*'?"),
        (
            "hiden.weight",
            "protect pattern 'hiden.weight' matches no parameter. Did you mean 'hidden.weight' or "
            "'decoder.weight' or 'embedding.weight'?",
        ),
        (
            "zzz",
            "protect pattern 'zzz' matches no parameter. Names look like 'embedding.weight'.",
        ),
    ],
)
def test_patterns_that_match_nothing_are_refused(
    language: Program, pattern: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        protected(language, analyze(language), ("hidden.*", pattern))
    assert str(caught.value) == message
