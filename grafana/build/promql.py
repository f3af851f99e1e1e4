"""Words that stand for selectors in expressions, and the shapes many expressions share.

An expression is written as Prometheus reads it, but for three words inside its braces:

    HERE    the servers that are chosen: job and instance
    ROUTE   of these, the chosen endpoints
    CHOSEN  of these, the chosen countries
"""

from __future__ import annotations

import inspect
import re

HERE = 'job=~"$job",instance=~"$instance"'


def write_out(expression: str, *, endpoint: str) -> str:
    """Return an expression in plain PromQL.

    Args:
        expression: With words instead of selectors, and as much indentation as reads well.
        endpoint: How the variable ``endpoint`` is matched.
    """
    route = f"{HERE},{endpoint}"
    words = {"HERE": HERE, "ROUTE": route, "CHOSEN": route + ',country=~"$country"'}
    plain = inspect.cleandoc(expression)
    return re.sub(r"\b(HERE|ROUTE|CHOSEN)\b", lambda word: words[word[0]], plain)


def share(matcher: str, *, of: str) -> str:
    """Divide what also matches by the whole: 0, rather than nothing, where nothing does.

    Args:
        matcher: Such as ``status=~"5.."``.
        of: A sum over counters, not negative; where it is 0 there is no share.
    """
    part = re.sub(r"\b(HERE|ROUTE|CHOSEN)\b", rf"\1,{matcher}", of)
    return f"({part} or 0 * {of}) / ({of} > 0)"


def quantile(of_all: float, buckets: str) -> str:
    """Estimate a quantile in seconds; nothing, rather than not a number, where nothing was."""
    return f"histogram_quantile({of_all}, {buckets}) >= 0"


def busiest(count: int, expression: str, *, by: str, ranked: str) -> str:
    """Return only the series which are the highest at the end of the chosen range.

    A mere topk would choose anew at each step, and draw a line for each that ever was high.
    """
    return f"{expression} and on ({by}) topk({count}, {ranked})"
