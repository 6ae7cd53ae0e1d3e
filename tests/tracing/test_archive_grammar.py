"""Size expressions and guards: what torch writes passes, anything else does not."""

import pytest

from fxprune.tracing.archive_grammar import guard_expression, size_expression


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(FloorDiv(Symbol('s77', integer=True), Integer(2)), Integer(-1))",
        "Mul(Rational(1, 2), Pow(Symbol('u0', integer=True), Integer(2)))",
        "FloorToInt(FloatPow(ToFloat(Symbol('s0')), Float('0.5', precision=53)))",
        "Max(1, s0 // 2 + 3) % 4",
        "And(Equality(s0, Integer(3)), Not(StrictLessThan(s1, Integer(-2))))",
        "2 * s10 - 2",
        "s0 ** 2",
    ],
)
def test_sizes_that_torch_writes(text: str) -> None:
    assert size_expression(text) == text
    assert size_expression(f"  {text} # comment") == text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "s0.__class__",
        "(lambda: 1)()",
        "[s0 for s0 in (1,)]",
        "f'{s0}'",
        "Symbol('s0', **{})",
        "Symbol('x; y')",
        "Symbol(s0)",
        "Symbol('s0', cls=print)",
        "eval('1')",
        "Function('f')(s0)",
        "Integer('1')",
        "Add(*s0)",
        "Float('1e999999999', precision=53)",
        "Float('1', precision=99999)",
        "9 ** 9 ** 9",
        "9 ** 99",
        "s0 ** s1",
        "(s0 ** 8) ** 8",
        "Pow(Pow(Integer(9), Integer(8)), Integer(8))",
        "LShift(Integer(1), Integer(999999999))",
        "LShift(LShift(Integer(1), Integer(60)), Integer(60))",
        "1 << 62",
        "RoundDecimal(Integer(1), Integer(-999999999))",
        "99999999999999999999",
        "1e999",
        "s99999999999",
        "'s0'",
        "x",
        "(" * 5000 + "1" + ")" * 5000,
        "1" + "+1" * 20_000,
        "s0 :=",
        "",
        "s0\0",
    ],
)
def test_sizes_that_torch_does_not_write(text: str) -> None:
    with pytest.raises(ValueError, match=r"place|expression|power|characters"):
        size_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[0] <= 8",
        "1 + L['x'].size()[0] // 2 <= L['d']['k'][3].size()[1]",
        "L['n'] != 3 and (not L['x'].stride()[0] == 4)",
        "max(1, math.floor(L['x'].storage_offset() / 2)) == 1",
        "torch.sym_float(L['x'].size()[0]) ** 0.5 >= 2.0",
    ],
)
def test_guards_that_torch_writes(text: str) -> None:
    assert guard_expression(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].size()[f()]",
        "L['x'].tolist()",
        "L['x'].__class__",
        "L[f()]",
        "L['x\"y']",
        "L['a']['b\"c']",
        "math.factorial(9)",
        "torch.load('x')",
        "torch.sym_float.__globals__",
        "M['x'].size()[0]",
        "s0",
        "L['x'].size(1)[0]",
    ],
)
def test_guards_that_torch_does_not_write(text: str) -> None:
    with pytest.raises(ValueError, match="has no place"):
        guard_expression(text)
