"""How long arithmetic takes, in words, for `plan`."""

from stages.contracts.survey import Survey

RATES = (100e12, 1e12)
"""Rates, in operations a second, for which `plan` states times: scale them by what your hardware reaches."""


def work_text(flops: float, alone_flops: float = 0.0) -> str:
    """So many floating-point operations, and how long they take at the stated rates. alone_flops: those of them that cannot be
    shared among workers."""
    times = ", ".join(f"{_duration(flops / rate)} at {rate / 1e12:g} TFLOP/s" for rate in RATES)
    shared = f"all but {alone_flops / flops:.0%}, which one does alone" if alone_flops else "it"
    return f"{flops / 1e12:.3g} TFLOP: one worker takes {times}; n workers, an n-th of {shared}"


def forward_flops(survey: Survey) -> float:
    """Floating-point operations for a token that passes through all layers, two a weight that it meets. Attention scores,
    embedding and head are left out."""
    experts = sum(survey.layer_expert_bytes) / survey.itemsize
    rest = sum(survey.layer_bytes) / survey.itemsize - experts
    return 2 * (rest + experts * survey.top_k / survey.num_experts)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.1f} s"
