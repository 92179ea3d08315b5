"""Answers held against each other, and put into words."""
import math

from torch import Tensor

from homework.cases import Case
from homework.process import Failed


def plain(value):
    """Tensors as lists, all numbers as floats, for comparing and for showing."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return float(value) if isinstance(value, (bool, int, float)) else None


def equal(found, wanted, tiny: bool = False) -> bool:
    """Whether two nested lists have one shape and nearly the same numbers. None is no gradient,
    which counts as 0 all over. tiny: numbers near 0 are compared relatively, too."""
    if isinstance(wanted, list):
        if found is None:
            return all(equal(None, one) for one in wanted)
        return (isinstance(found, list) and len(found) == len(wanted)
                and all(equal(*pair, tiny) for pair in zip(found, wanted)))
    if found is None or wanted is None:
        return (found or 0.0) == (wanted or 0.0) if not isinstance(found, list) else equal(
            None, found)
    return isinstance(found, float) and (found == wanted or math.isclose(
        found, wanted, rel_tol=1e-6, abs_tol=0.0 if tiny else 1e-8))


def shape(value) -> str:
    """What a value is, for a message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, list):
        return f"({', '.join(map(shape, value))})" if len(value) < 6 else f"{len(value)} values"
    return "nothing" if value is None else type(value).__name__


def shown(value) -> str:
    """Numbers for a message."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return "none" if value is None else f"{value:.5g}"


def outcome(who, case: Case) -> tuple[list, str]:
    """([value, gradients] as nested lists, ""), or ([], why there is none)."""
    try:
        found = who.call(case.module, case.name, *case.args, grad=case.grad)
    except Failed as error:
        return [], str(error)
    return [plain(found.value), plain(found.grads)], ""
